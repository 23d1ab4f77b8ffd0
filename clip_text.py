"""How prompts become vectors: CLIP's tokenizer and the two text encoders that Stable Diffusion uses.

A prompt is cut into at most 75 byte-pair tokens, framed by a start and an end token and padded to 77; a causal
transformer turns the 77 ids into 77 vectors, the *context* that the UNet's cross-attention reads.

    prompts --Tokenizer--> ids (B,77) --CLIPTextModel--> context (B,77,width)

SD 1.x uses CLIP ViT-L (OpenAI): last layer, final norm, padded with the end token. SD 2.x uses OpenCLIP
ViT-H's: last layer but one, then the final norm, padded with 0. Parameters carry the names of the former
(`text_model.*`, as `cond_stage_model.transformer.*` in files); loading understands both spellings.
Follows Radford et al. 2021 (arXiv:2103.00020).
"""

import gzip
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor, nn

MAX_TOKENS = 77
VOCABULARY = 49408
START, END = "<|startoftext|>", "<|endoftext|>"  # ids 49406 and 49407
MERGES = Path(__file__).parent / "models" / "clip_bpe_merges.txt.gz"


# ---------------------------------------------------------------------------------------------------------- tokenizer
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
def _bpe() -> tokenizers.Tokenizer:
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


class Tokenizer:
    """CLIP's tokenizer. `pad` is "end" (SD 1.x pads with the end token) or "zero" (SD 2.x pads with id 0)."""

    def __init__(self, pad: str = "end"):
        if pad not in ("end", "zero"):
            raise ValueError(f'Tokenizer: pad is "end" or "zero", not {pad!r}')
        self.bpe = _bpe()
        self.start, self.end = self.bpe.token_to_id(START), self.bpe.token_to_id(END)
        self.pad = self.end if pad == "end" else 0

    def __call__(self, prompts: str | list[str]) -> Tensor:
        """One prompt or a list of B -> (B,77) int64. A longer prompt is cut; the end token is kept."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = torch.full((len(prompts), MAX_TOKENS), self.pad, dtype=torch.int64)
        for row, encoding in zip(ids, self.bpe.encode_batch(prompts, add_special_tokens=False), strict=True):
            framed = [self.start, *encoding.ids[: MAX_TOKENS - 2], self.end]
            row[: len(framed)] = torch.tensor(framed)
        return ids

    def count(self, prompts: list[str]) -> list[int]:
        """How many tokens each prompt has, without start and end: what is beyond 75 is cut."""
        return [len(encoding.ids) for encoding in self.bpe.encode_batch(prompts, add_special_tokens=False)]


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


# --------------------------------------------------------------------------------------------------------- text encoder
@dataclass(frozen=True)
class TextConfig:
    """Shape of the text encoder. `penultimate`: the last of `layers` is left out, as SD 2.x does (and clip-skip 2)."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    penultimate: bool = False


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.position_embedding = nn.Embedding(MAX_TOKENS, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    """Causal multi-head self-attention. (B,N,width) -> (B,N,width)"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B,heads,N,width/heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextTransformer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(config.width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.layers - config.penultimate))
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)  # (B,77,width)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    """The text encoder as Stable Diffusion uses it: ids (B,77) int64 -> context (B,77,width)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """Load either spelling, with or without the prefix it has in a Stable Diffusion checkpoint.

        Tensors that the encoder does not use are ignored (the last of 24 layers, `text_projection`, `logit_scale`,
        `position_ids`); a missing tensor that the encoder needs is an error.
        """
        given, own = clip_spelling(state_dict), self.state_dict().keys()
        return super().load_state_dict({k: v for k, v in given.items() if k in own}, strict=strict, assign=assign)


# OpenCLIP's names of a layer's parameters, and CLIP's. The fused `attn.in_proj_*` is q, k, v in one.
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
OPENCLIP_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def clip_spelling(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a text encoder's keys CLIP's spelling (`text_model.*`), whatever prefix and spelling they come in."""
    out = {}
    for key, value in state_dict.items():
        key = key.removeprefix("cond_stage_model.").removeprefix("transformer.text_model.").removeprefix("model.")
        if key.startswith("transformer.") and not key.startswith("transformer.resblocks."):
            key = key.removeprefix("transformer.")  # as many merges of SD 1.x have it, without `text_model.`
        if key in OPENCLIP_TOP:
            out["text_model." + OPENCLIP_TOP[key]] = value
        elif key.startswith("transformer.resblocks."):
            number, name = key.removeprefix("transformer.resblocks.").split(".", 1)
            layer = f"text_model.encoder.layers.{number}."
            if name.startswith("attn.in_proj_"):
                kind = name.removeprefix("attn.in_proj_")  # weight or bias
                for part, tensor in zip("qkv", value.chunk(3), strict=True):
                    out[f"{layer}self_attn.{part}_proj.{kind}"] = tensor
            else:
                module, kind = name.rsplit(".", 1)
                out[f"{layer}{OPENCLIP_LAYER[module]}.{kind}"] = value
        else:
            out["text_model." + key.removeprefix("text_model.")] = value
    return out


def openclip_spelling(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's spelling (`text_model.*`) -> OpenCLIP's. A key without a name in OpenCLIP is left out."""
    top = {v: k for k, v in OPENCLIP_TOP.items()}
    layer = {v: k for k, v in OPENCLIP_LAYER.items()}
    out = {}
    for key, value in state_dict.items():
        key = key.removeprefix("text_model.")
        if key in top:
            out[top[key]] = value
        elif key.startswith("encoder.layers."):
            number, name = key.removeprefix("encoder.layers.").split(".", 1)
            there, (module, kind) = f"transformer.resblocks.{number}.", name.rsplit(".", 1)
            if module in layer:
                out[f"{there}{layer[module]}.{kind}"] = value
            elif module == "self_attn.q_proj":  # q, k and v become one
                parts = [state_dict[f"text_model.encoder.layers.{number}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                out[f"{there}attn.in_proj_{kind}"] = torch.cat(parts)
    return out
