"""How prompts become vectors: CLIP's tokenizer and the two text encoders that Stable Diffusion uses.

A prompt is cut into at most 75 byte-pair tokens, framed by a start and an end token and padded to 77; a causal
transformer turns the 77 ids into 77 vectors, the *context* that the UNet's cross-attention reads.

    prompts --Tokenizer--> ids (B,77) --CLIPTextModel--> context (B,77,width)

SD 1.x uses CLIP ViT-L (OpenAI): last layer, final norm, padded with the end token. SD 2.x uses OpenCLIP
ViT-H's: last layer but one, then the final norm, padded with 0. Parameters carry the names of the former
(`text_model.*`, as `cond_stage_model.transformer.*` in files); loading understands both spellings.
SDXL reads the last layer but one of CLIP ViT-L without a norm, and a second encoder besides (`conditioning.py`).
Follows Radford et al. 2021 (arXiv:2103.00020).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_bpe import END, MAX_TOKENS, START, VOCABULARY, byte_pair_encoder, tokenizer_files  # noqa: F401 (also found here)
from clip_names import clip_spelling, openclip_spelling  # noqa: F401 (also found here)
from layers import config_repr


# ---------------------------------------------------------------------------------------------------------- tokenizer
class Tokenizer:
    """CLIP's tokenizer. `pad` is "end" (SD 1.x pads with the end token) or "zero" (SD 2.x pads with id 0)."""

    def __init__(self, pad: str = "end"):
        if pad not in ("end", "zero"):
            raise ValueError(f'Tokenizer: pad is "end" or "zero", not {pad!r}')
        self.bpe = byte_pair_encoder()
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


# --------------------------------------------------------------------------------------------------------- text encoder
@dataclass(frozen=True, repr=False)
class TextConfig:
    """Shape of the text encoder. `penultimate`: the last of `layers` is left out, as SD 2.x does (and clip-skip 2).

    `final_norm`: the context passes the norm after the last layer (not in SDXL; its encoders keep the weights of all
    layers, as its files do). `projection`: the width of the vector for the whole prompt; None: there is none.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    penultimate: bool = False
    final_norm: bool = True
    projection: int | None = None

    __repr__ = config_repr("final_norm", "projection")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embedding(nn.Embedding):
    """nn.Embedding that draws no numbers on the meta device: PyTorch would import its compiler for that, which takes
    more than a second of every program's start."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embeddings(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.token_embedding = Embedding(VOCABULARY, width)
        self.position_embedding = Embedding(MAX_TOKENS, width)

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
        self.used, self.final_norm = config.layers - config.penultimate, config.final_norm
        kept = self.used if config.final_norm else config.layers
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(kept))
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)  # (B,77,width)
        for layer in self.encoder.layers[: self.used]:
            x = layer(x)
        return self.final_layer_norm(x) if self.final_norm else x


class CLIPTextModel(nn.Module):
    """The text encoder as Stable Diffusion uses it: ids (B,77) int64 -> context (B,77,width)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context, and the vector for the whole prompt, which this encoder does not have."""
        return self(ids), None

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """Load either spelling, with or without the prefix it has in a Stable Diffusion checkpoint.

        Tensors that the encoder does not use are ignored (the last of 24 layers, `text_projection`, `logit_scale`,
        `position_ids`); a missing tensor that the encoder needs is an error.
        """
        given, own = clip_spelling(state_dict), self.state_dict().keys()
        return super().load_state_dict({k: v for k, v in given.items() if k in own}, strict=strict, assign=assign)
