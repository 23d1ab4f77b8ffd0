"""The UNet of Stable Diffusion: given noisy latents, a timestep and a prompt, it predicts the noise in the latents.

The network is a U. The encoder (`input_blocks`) halves the map three times, `middle_block` sits at the bottom, and the
decoder (`output_blocks`) doubles the map again. Every output block reads, besides the map from below, the output of the
input block opposite (a *skip connection*), concatenated along the channels. This is the U of SD 1.5, for an image of
512 x 512 pixels (Res: residual block, Attn: transformer, the numbers are channels):

    map     input_blocks                skip                output_blocks
    64x64    0  Conv       4 ->  320  ----------------->  11  Res  640 ->  320, Attn       -> out -> eps
             1  Res, Attn        320  ----------------->  10  Res  640 ->  320, Attn
             2  Res, Attn        320  ----------------->   9  Res  960 ->  320, Attn
    32x32    3  Downsample       320  ----------------->   8  Res  960 ->  640, Attn, Upsample
             4  Res, Attn 320 -> 640  ----------------->   7  Res 1280 ->  640, Attn
             5  Res, Attn        640  ----------------->   6  Res 1920 ->  640, Attn
    16x16    6  Downsample       640  ----------------->   5  Res 1920 -> 1280, Attn, Upsample
             7  Res, Attn 640 -> 1280 ----------------->   4  Res 2560 -> 1280, Attn
             8  Res, Attn       1280  ----------------->   3  Res 2560 -> 1280, Attn
    8x8      9  Downsample      1280  ----------------->   2  Res 2560 -> 1280, Upsample
            10  Res             1280  ----------------->   1  Res 2560 -> 1280
            11  Res             1280  ----------------->   0  Res 2560 -> 1280
                                 middle_block  Res, Attn, Res  1280

The prompt enters through the cross-attention of the transformers, the timestep through every residual block. Encoder
and decoder are separate methods because a ControlNet *is* an encoder (`UNetEncoder`, written once, here), and its
residuals are added to the skips before the decoder reads them. Module names are those of `model.diffusion_model.*` in
Stable Diffusion checkpoints. Follows Rombach et al. 2022 (arXiv:2112.10752) and Dhariwal & Nichol 2021
(arXiv:2105.05233).

SDXL (Podell et al. 2023, arXiv:2307.01952) is this U with three levels, no transformers on the finest, several blocks
in each of the others (`transformer_depth`), and a vector y of further conditions, which is added to the timestep's
embedding.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import Conv1x1, Conv3x3, GatedGELU, GroupNorm, LayerNorm, Linear, checkpointed, config_repr, zero_module


@dataclass(frozen=True, repr=False)
class UNetConfig:
    """Shape of the UNet, in the field names of Stable Diffusion's YAML files.

    `attention_resolutions` are the downsampling factors at which there are transformers. Exactly one of `num_heads` (a
    fixed number of attention heads: SD 1.x) and `num_head_channels` (a fixed width of a head: SD 2.x) is set.
    `norm_groups` is 32 in Stable Diffusion; a narrow model needs fewer, or its norms erase flat colours.
    `transformer_depth`: the blocks of a transformer, for each level; the last number holds for the levels beyond and
    for the middle block. Where it is 0 a level has no transformers, and the middle block one without blocks.
    `adm_in_channels`: the width of y, a vector of further conditions (SDXL: 2816); None: there is none.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    context_dim: int = 768
    num_heads: int | None = 8
    num_head_channels: int | None = None
    use_linear_in_transformer: bool = False
    norm_groups: int = 32
    transformer_depth: tuple[int, ...] = (1,)
    adm_in_channels: int | None = None

    __repr__ = config_repr("transformer_depth", "adm_in_channels")

    def __post_init__(self):
        if isinstance(self.transformer_depth, int):  # as the YAML files of SD 1.x and 2.x have it
            object.__setattr__(self, "transformer_depth", (self.transformer_depth,))
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ValueError("UNetConfig: set exactly one of num_heads and num_head_channels (the other None)")

    def heads(self, channels: int) -> int:
        """The number of attention heads in a transformer of `channels` channels."""
        return self.num_heads or channels // self.num_head_channels

    def with_depth(self, transformer_depth: tuple[int, ...]) -> "UNetConfig":
        """The same network with other numbers of transformer blocks."""
        return dataclasses.replace(self, transformer_depth=transformer_depth)

    def depth(self, level: int) -> int:
        """The blocks in each transformer of level `level` (0 is the finest); 0 where the level has no transformers."""
        depth = self.transformer_depth[min(level, len(self.transformer_depth) - 1)]
        return depth if 2**level in self.attention_resolutions else 0

    @property
    def depths(self) -> tuple[int, ...]:
        """The depth of every level's transformers, the last level's replaced by the middle block's."""
        return (*(self.depth(level) for level in range(len(self.channel_mult) - 1)), self.transformer_depth[-1])

    def attends(self, level: int) -> bool:
        """Whether level `level` has transformers."""
        return self.depth(level) > 0


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """(B,) integer or real timesteps -> (B,dim) float32: cosines, then sines, of geometrically spaced frequencies."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embedding(c_in: int, c_out: int) -> nn.Sequential:
    """Two linear layers, which embed what applies to the whole image. (B,c_in) -> (B,c_out)"""
    return nn.Sequential(Linear(c_in, c_out), nn.SiLU(), Linear(c_out, c_out))


# ------------------------------------------------------------------------------------------------------------- the U
class UNetEncoder(nn.Module):
    """The left side and the bottom of the U: what the UNet and its trainable copy, the ControlNet, have in common."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: the dtype of the weights
        self.gradient_checkpointing = False  # keep the inputs of each block alone, compute it again in the backward
        self.weight_streamer: Callable[[nn.Module], Callable[..., Tensor]] | None = None  # see lowvram/streaming.py
        c0 = config.model_channels
        self.emb_dim = 4 * c0
        self.time_embed = embedding(c0, self.emb_dim)
        self.label_emb: nn.Sequential | None = None  # embeds y; the keys are label_emb.0.0.weight and so on
        if config.adm_in_channels:
            self.label_emb = nn.Sequential(embedding(config.adm_in_channels, self.emb_dim))
        self.input_blocks = nn.ModuleList([Block(Conv3x3(config.in_channels, c0))])
        self.skip_channels = [c0]  # the channels of each input block's output
        c = c0
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Block(*self.res_and_attention(c, mult * c0, level)))
                self.skip_channels.append(c := mult * c0)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(Block(Downsample(c)))
                self.skip_channels.append(c)
        resblock = lambda: ResBlock(c, c, self.emb_dim, config.norm_groups)
        self.middle_block = Block(resblock(), SpatialTransformer(c, config, config.transformer_depth[-1]), resblock())

    def res_and_attention(self, c_in: int, c_out: int, level: int) -> list[nn.Module]:
        """A residual block and, where the level has attention, a transformer."""
        layers: list[nn.Module] = [ResBlock(c_in, c_out, self.emb_dim, self.config.norm_groups)]
        depth = self.config.depth(level)
        return layers + [SpatialTransformer(c_out, self.config, depth)] if depth else layers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self.compute_dtype or self.time_embed[0].weight.dtype

    def call_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """`block(*inputs)`, with streamed weights and gradient checkpointing where they are on: for each of the block's
        `parts`, of which only one is on the GPU, or computed again, at a time."""
        return block(*inputs, self._call_part) if is_deep(block) else self._call_part(block, *inputs)

    def _call_part(self, part: nn.Module, *inputs: Tensor) -> Tensor:
        call = self.weight_streamer(part) if self.weight_streamer else part
        return checkpointed(call, *inputs) if self.gradient_checkpointing else call(*inputs)

    def embed(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """What every residual block is told: timesteps (B,) and, where the model has it, y (B,adm_in_channels) ->
        (B,4*model_channels). Raises ValueError for a y that is missing or that the model does not have."""
        if (y is None) != (self.label_emb is None):
            wanted = self.config.adm_in_channels
            raise ValueError(f"this model needs a vector y of {wanted} numbers" if wanted else "this model has no y")
        emb = timestep_embedding(timesteps, self.config.model_channels).to(self.dtype)
        emb = self.call_block(self.time_embed, emb)
        return emb if y is None else emb + self.call_block(self.label_emb, y.to(self.dtype))

    def encode(
        self, x: Tensor, timesteps: Tensor, context: Tensor, hint_embedding: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
        """Run the encoder and the middle block.

        x (B,in_channels,h,w) with h, w multiples of 2^(levels-1); timesteps (B,); context (B,M,context_dim); y
        (B,adm_in_channels); `hint_embedding` (B,model_channels,h,w), of a ControlNet, is added once, after the first
        block. Returns the middle block's output, the skips from shallow to deep, and the embedding of timestep and y.
        """
        x, context = x.to(self.dtype), context.to(self.dtype)
        emb = self.embed(timesteps, y)
        skips, h = [], x
        for i, block in enumerate(self.input_blocks):
            h = self.call_block(block, h, emb, context)
            if i == 0 and hint_embedding is not None:
                h = h + hint_embedding
            skips.append(h)
        return self.call_block(self.middle_block, h, emb, context), skips, emb


class UNet(UNetEncoder):
    """The whole U: the encoder and the decoder."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c0, skip_channels = config.model_channels, list(self.skip_channels)
        c = skip_channels[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = self.res_and_attention(c + skip_channels.pop(), mult * c0, level)
                c = mult * c0
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(c))
                self.output_blocks.append(Block(*layers))
        norm = GroupNorm(config.norm_groups, c, eps=1e-5)
        self.out = nn.Sequential(norm, nn.SiLU(), zero_module(Conv3x3(c, config.out_channels)))

    def decode(
        self, h: Tensor, skips: Sequence[Tensor], emb: Tensor, context: Tensor, control: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Run the decoder on what `encode` returned. Returns eps (or v), (B,out_channels,h,w).

        `control`: the residuals of a ControlNet, shallow to deep, the middle block's last. They are added to the skips
        and to h. A list of one residual is the middle block's alone (`ControlNet.only_mid_control`).
        """
        context, skips = context.to(self.dtype), list(skips)
        if control:
            h = h + control[-1].to(h.dtype)
        if control and len(control) > 1:
            skips = [skip + residual.to(skip.dtype) for skip, residual in zip(skips, control[:-1], strict=True)]
        for block in self.output_blocks:
            h = self.call_block(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.call_block(self.out, h)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, control: Sequence[Tensor] | None = None,
        y: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B,4,h,w), timesteps (B,) in 0..999, context (B,77,context_dim), y (B,adm_in_channels) -> eps (B,4,h,w).
        `control`: see `decode`."""
        return self.decode(*self.encode(x, timesteps, context, y=y), context, control)


Call = Callable[..., Tensor]  # call(module, *inputs) is module(*inputs), perhaps with weights that come for it alone


def call_directly(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs)


class Block(nn.Sequential):
    """Layers in a row. Each gets what it needs: residual blocks the timestep, transformers the context.

    `call` calls the modules that the block consists of (see `parts`)."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, call: Call = call_directly) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = call(layer, x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, call)
            else:
                x = call(layer, x)
        return x


def is_deep(block: nn.Module) -> bool:
    """Whether a block has a transformer of several blocks (SDXL: up to ten, 0.7 GB in bfloat16), and so is called part
    by part."""
    transformers = (m for m in block if isinstance(m, SpatialTransformer)) if isinstance(block, Block) else ()
    return any(transformer.depth > 1 for transformer in transformers)


def parts(block: nn.Module) -> list[nn.Module]:
    """The modules as which `UNetEncoder.call_block` calls `block`: the block itself, or, of a deep one, its layers, and
    of its transformers the norm, the projections and each block."""
    if not is_deep(block):
        return [block]
    layers = [layer.parts() if isinstance(layer, SpatialTransformer) else [layer] for layer in block]
    return [part for some in layers for part in some]


# -------------------------------------------------------------------------------------------- the layers of a block
class ResBlock(nn.Module):
    """Two convolutions, between which the timestep is added. (B,c_in,h,w), emb (B,emb_dim) -> (B,c_out,h,w)"""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(groups, c_in, eps=1e-5), nn.SiLU(), Conv3x3(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # the original's dropout, 0 in Stable Diffusion; it keeps the numbers in the key names
            zero_module(Conv3x3(c_out, c_out)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else Conv1x1(c_in, c_out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)  # (B,c_out,h,w)
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Halves height and width by a convolution with stride 2."""

    def __init__(self, c: int):
        super().__init__()
        self.op = Conv3x3(c, c, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width by repeating every value, then convolves."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = Conv3x3(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class SpatialTransformer(nn.Module):
    """A transformer of `depth` blocks over all positions of a feature map. Its projections are 1x1 convolutions in SD
    1.x, linear in SD 2.x and SDXL. (B,C,h,w), context (B,M,D) -> (B,C,h,w)"""

    def __init__(self, c: int, config: UNetConfig, depth: int):
        super().__init__()
        self.use_linear, self.depth = config.use_linear_in_transformer, depth
        projection = Linear if self.use_linear else Conv1x1
        self.norm = GroupNorm(config.norm_groups, c, eps=1e-6)
        self.proj_in = projection(c, c)
        blocks = (TransformerBlock(c, config.context_dim, config.heads(c)) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = zero_module(projection(c, c))

    def parts(self) -> list[nn.Module]:
        """The modules that `forward` calls, in their order."""
        return [self.norm, self.proj_in, *self.transformer_blocks, self.proj_out]

    def forward(self, x: Tensor, context: Tensor, call: Call = call_directly) -> Tensor:
        to_tokens = lambda y: y.flatten(2).transpose(1, 2)  # (B,C,h,w) -> (B,h*w,C)
        to_map = lambda y: y.transpose(1, 2).reshape(x.shape)  # (B,h*w,C) -> (B,C,h,w)
        h = call(self.norm, x)
        h = call(self.proj_in, to_tokens(h)) if self.use_linear else to_tokens(call(self.proj_in, h))
        for block in self.transformer_blocks:
            h = call(block, h, context)
        return x + (to_map(call(self.proj_out, h)) if self.use_linear else call(self.proj_out, to_map(h)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each after a LayerNorm and with a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class CrossAttention(nn.Module):
    """Multi-head attention from x (B,N,C) to `context` (B,M,D), or to x itself where context is None. -> (B,N,C)"""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_chunk = 0  # how many queries attend at once, to save memory; 0: all
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim, dim, bias=False)
        self.to_v = Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)  # (B,heads,N or M,C/heads)
        attention = F.scaled_dot_product_attention
        if self.query_chunk:
            h = torch.cat([checkpointed(attention, chunk, k, v) for chunk in q.split(self.query_chunk, 2)], 2)
        else:
            h = attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Two linear layers with a gated activation between them. (B,N,dim) -> (B,N,dim)"""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """A projection to twice the width; the GELU of one half gates the other half. (...,dim) -> (...,inner)"""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return GatedGELU.apply(self.proj(x))
