"""What SDXL's UNet is told beside the noisy latents and the timestep: contexts of two text encoders, and the vector y.

    prompts --Tokenizer("end")---> CLIPTextModel (ViT-L)         context (B,77,768)  --+
                                                                                       +--> context (B,77,2048)
    prompts --Tokenizer("zero")--> OpenCLIPTextModel (ViT-bigG)  context (B,77,1280) --+
                                                                 pooled (B,1280) ------+
                                                                                       +--> y (B,2816)
    original height, width, crop top, left, target height, width   --sinusoids---------+

The sizes say how the training image came about: how large it was, how many pixels were cut off above and on the left
after it was resized, and which size was left. A model that is told them learns from small and from cropped images
without drawing blurred and cropped ones; to draw, one names a large image without a crop. Follows Podell et al. 2023
(arXiv:2307.01952, section 2.2) and, in its names, OpenCLIP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_text import ACTIVATIONS, MAX_TOKENS, VOCABULARY, CLIPTextModel, Embedding, TextConfig
from unet import timestep_embedding

SIZES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")  # in pixels
SIZE_WIDTH = 256  # numbers that stand for one size


def embed_sizes(sizes: Tensor) -> Tensor:
    """sizes (B,6), in the order of SIZES -> (B,6*256) float32. (bfloat16 would turn 1365 into 1368.)"""
    return timestep_embedding(sizes.flatten(), SIZE_WIDTH).reshape(len(sizes), -1)


def whole_image(size: tuple[int, int], count: int = 1) -> Tensor:
    """The sizes, (count,6) float32, of images of `size` (width, height) that were neither resized nor cropped."""
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(count, -1)


# ----------------------------------------------------------------------------------------- the second encoder of SDXL
class FusedSelfAttention(nn.Module):
    """Causal multi-head self-attention, queries, keys and values in one matrix. (B,N,width) -> (B,N,width)"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.Linear(width, 3 * width).weight.detach())
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)  # (B,heads,N,width/heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(-2))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = FusedSelfAttention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(config.width, config.mlp_width)
        self.mlp.c_proj = nn.Linear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(self.activation(self.mlp.c_fc(self.ln_2(x))))


class OpenCLIPTextModel(nn.Module):
    """OpenCLIP's text encoder under its own names: ids (B,77) int64 -> context (B,77,width), and with `encode` a vector
    for the whole prompt besides."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(VOCABULARY, config.width)
        self.positional_embedding = nn.Parameter(torch.randn(MAX_TOKENS, config.width) * 0.01)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ResidualAttentionBlock(config) for _ in range(config.layers))
        self.ln_final = nn.LayerNorm(config.width)
        scale = config.width**-0.5
        self.text_projection = nn.Parameter(torch.randn(config.width, config.projection or config.width) * scale)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encode(ids)[0]

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The context (B,77,width), and (B,projection), which all layers, the norm and the projection make of the
        state at the first end token."""
        used = self.config.layers - self.config.penultimate
        x = self.token_embedding(ids) + self.positional_embedding
        for layer in self.transformer.resblocks[:used]:
            x = layer(x)
        context = self.ln_final(x) if self.config.final_norm else x
        for layer in self.transformer.resblocks[used:]:
            x = layer(x)
        end = (ids == VOCABULARY - 1).int().argmax(dim=1)  # argmax: the first of equals
        last = x[torch.arange(len(x), device=x.device), end]
        return context, self.ln_final(last) @ self.text_projection


class TextEncoders(nn.Module):
    """The two text encoders of SDXL, under the names that its files give them after `conditioner.`."""

    def __init__(self, first: TextConfig, second: TextConfig):
        super().__init__()
        self.config = first, second
        self.embedders = nn.ModuleList([nn.Module(), nn.Module()])
        self.embedders[0].transformer = CLIPTextModel(first)
        self.embedders[1].model = OpenCLIPTextModel(second)

    def encoders(self) -> list[nn.Module]:
        """Both encoders, the one whose vectors come first in the context first."""
        return [self.embedders[0].transformer, self.embedders[1].model]
