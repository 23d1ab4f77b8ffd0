"""CLIP's byte-pair encoder: the table that cuts words into pieces, and the files in which transformers keeps it.

A word begins as its bytes; the merges, in their order, join two neighbours into one. The vocabulary is made from the
merges alone. Follows OpenAI's `simple_tokenizer.py` and, for the files, transformers' `CLIPTokenizer`.
"""

import gzip
import json
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import normalizers, pre_tokenizers

MAX_TOKENS = 77
VOCABULARY = 49408
START, END = "<|startoftext|>", "<|endoftext|>"  # ids 49406 and 49407
MERGES = Path(__file__).parent / "models" / "clip_bpe_merges.txt.gz"


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes, in the order of the vocabulary (as in GPT-2).

    Bytes that print as themselves come first; the others follow as the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges, from the merges table alone."""
    merges = [tuple(line.split()) for line in gzip.decompress(MERGES.read_bytes()).decode().splitlines()]
    letters = _byte_alphabet()
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


@lru_cache(maxsize=1)
def byte_pair_encoder() -> tokenizers.Tokenizer:
    """CLIP's byte-pair encoder without framing and padding."""
    vocabulary, merges = _tables()
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
    )
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.add_special_tokens([START, END])
    return bpe


def tokenizer_files(pad: str) -> dict[str, str]:
    """The files of transformers' `CLIPTokenizer` (name -> text) that tokenizes as `Tokenizer(pad)` does."""
    vocabulary, merges = _tables()
    filler = END if pad == "end" else next(token for token, i in vocabulary.items() if i == 0)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": filler}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
