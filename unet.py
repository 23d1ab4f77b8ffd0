"""The UNet of Stable Diffusion: given noisy latents, a timestep and a prompt, say what the noise is.

It is a stack of blocks, seen in the paper's figure as a U: `input_blocks` go down (residual blocks, transformers,
halvings), `middle_block` sits at the bottom, `output_blocks` come up again and read, by concatenation, what the way
down left behind (the *skips*). The prompt enters through the cross-attention of the transformers, the timestep through
every residual block.

    x (B,4,h,w), t (B,), context (B,77,D) --encode--> h, 12 skips --decode--> eps (B,4,h,w)

The two halves are separate methods because ControlNet needs them so: it *is* an encoder (`UNetEncoder`, written once,
here), and what it finds is added to the skips before the decoder reads them. Module names are those of
`model.diffusion_model.*` in Stable Diffusion checkpoints. Follows Rombach et al. 2022 (arXiv:2112.10752) and, for the
backbone, Dhariwal & Nichol 2021 (arXiv:2105.05233).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the UNet, in the field names of Stable Diffusion's YAML files.

    `attention_resolutions` are the downsampling factors at which transformers sit. Exactly one of `num_heads` (fixed
    number of heads: SD 1.x) and `num_head_channels` (fixed width of a head: SD 2.x) is set. `norm_groups` is 32 in
    Stable Diffusion; a narrow model needs fewer, or its norms erase flat colours.
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

    def __post_init__(self):
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ValueError("UNetConfig: set exactly one of num_heads and num_head_channels (the other None)")

    def heads(self, channels: int) -> int:
        return self.num_heads or channels // self.num_head_channels


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """(B,) integer or real timesteps -> (B,dim) float32: cosines, then sines, of geometrically spaced frequencies."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero: it starts as the function 0 and learns its way in."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`; what is inside is not kept for the way back but computed again.

    Gradient checkpointing: Chen et al. 2016 (arXiv:1604.06174).
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing random in it


def in_precision(block: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """How to call `block` in `dtype`: with copies of its weights where they have another (trained ones are kept in
    fp32), through which the gradient finds back to them."""
    if next(block.parameters()).dtype == dtype:
        return block
    weights = lambda: {name: p.to(dtype) for name, p in block.named_parameters()}
    return lambda *inputs: torch.func.functional_call(block, weights(), inputs)


class FrozenConvolution(torch.autograd.Function):
    """A convolution whose weights do not train: what went in need not be kept for the way back. (PyTorch's own keeps
    it, although only a gradient of the weights would ask for it.)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.of = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (shape, stride, padding) = ctx.saved_tensors, ctx.of
        return nn.grad.conv2d_input(shape, weight, grad, stride, padding), None, None, None, None


class Conv2d(nn.Conv2d):
    """PyTorch's, that keeps nothing for a gradient which nobody asks for."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and not (self.weight.requires_grad or self.bias.requires_grad):
            return FrozenConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


class Conv3x3(Conv2d):
    """A 3x3 convolution over an image with a border of zeros. (B,c_in,h,w) -> (B,c_out,h/stride,w/stride)

    On the CPU, from small maps to many channels, as one product of matrices: the columns (what the kernel sees at each
    position) are then smaller than the weights, which a convolution routine would first bring into an order of its own.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__(c_in, c_out, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = (-(-side // self.stride[0]) for side in x.shape[2:])
        small = 2 * len(x) * h * w < self.out_channels
        if not (small and x.device.type == "cpu" and self.weight.is_contiguous()):
            return super().forward(x)
        columns = F.unfold(x, 3, padding=1, stride=self.stride).transpose(0, 1).flatten(1)  # (9*c_in,B*h*w)
        out = torch.addmm(self.bias[:, None], self.weight.flatten(1), columns)  # this way round BLAS is fastest
        return out.unflatten(1, (len(x), h, w)).transpose(0, 1)


class Conv1x1(Conv2d):
    """A 1x1 convolution: the same map of channels at every position. (B,c_in,h,w) -> (B,c_out,h,w)

    On the CPU, where no gradient is asked for, as a product of matrices, which on small maps takes a third of the time
    of a convolution routine. (With one, each sample would make a gradient of the weights of its own.)
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        if x.is_contiguous(memory_format=torch.channels_last):
            return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        weight = self.weight.flatten(1).expand(len(x), -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


class ResBlock(nn.Module):
    """Two convolutions around which the timestep is added. (B,c_in,h,w), emb (B,4*model_channels) -> (B,c_out,h,w)"""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, c_in, eps=1e-5), nn.SiLU(), Conv3x3(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, c_out, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # the original's dropout, always 0 in Stable Diffusion; keeps the numbering of the keys
            zero_module(Conv3x3(c_out, c_out)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else Conv1x1(c_in, c_out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B,N,C) to `context` (B,M,D), or to itself where there is none. -> (B,N,C)"""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.slice = 0  # queries that are attended from at once; 0: all
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,heads,N,C/heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))  # fmt: skip
        if self.slice:
            h = torch.cat([again(F.scaled_dot_product_attention, part, k, v) for part in q.split(self.slice, 2)], 2)
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(-2))


class Gate(torch.autograd.Function):
    """(...,2C) -> (...,C): one half times the exact GELU of the other, which is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        to_value, to_gate = out.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=to_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=to_gate)
        return out


class GEGLU(nn.Module):
    """One projection to twice the width; one half, through an exact GELU, gates the other."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return Gate.apply(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each after a LayerNorm and with a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over all positions of a feature map. Its projections are linear in SD 2.x, 1x1 in SD 1.x."""

    def __init__(self, c: int, config: UNetConfig):
        super().__init__()
        self.use_linear = config.use_linear_in_transformer
        self.norm = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c) if self.use_linear else Conv1x1(c, c)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, config.context_dim, config.heads(c))])
        self.proj_out = zero_module(nn.Linear(c, c) if self.use_linear else Conv1x1(c, c))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        to_tokens = lambda y: y.flatten(2).transpose(1, 2)  # (B,C,h,w) -> (B,h*w,C)
        to_map = lambda y: y.transpose(1, 2).reshape(x.shape)  # and back
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.use_linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + (to_map(self.proj_out(h)) if self.use_linear else self.proj_out(to_map(h)))


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, c: int):
        super().__init__()
        self.op = Conv3x3(c, c, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then smooths with a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = Conv3x3(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Sequential):
    """Layers in a row, each given what it asks for: residual blocks the timestep, transformers the context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetEncoder(nn.Module):
    """The way down and the middle: what the UNet and its trainable copy, the ControlNet, have in common."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.compute: torch.dtype | None = None  # the precision to compute in; None: that of the weights
        self.recompute = False  # keep only what goes into a block for the way back, compute the rest again
        self.fetch: Callable[[nn.Module], Callable[..., Tensor]] | None = None  # brings a block's weights
        c0, groups = config.model_channels, config.norm_groups
        emb_dim = 4 * c0
        self.time_embed = nn.Sequential(nn.Linear(c0, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.input_blocks = nn.ModuleList([Block(Conv3x3(config.in_channels, c0))])
        self.skip_channels = [c0]  # channels of what each input block leaves behind
        c, factor = c0, 1
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers = [ResBlock(c, mult * c0, emb_dim, groups)]
                c = mult * c0
                if factor in config.attention_resolutions:
                    layers.append(SpatialTransformer(c, config))
                self.input_blocks.append(Block(*layers))
                self.skip_channels.append(c)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(Block(Downsample(c)))
                self.skip_channels.append(c)
                factor *= 2
        self.middle_block = Block(
            ResBlock(c, c, emb_dim, groups), SpatialTransformer(c, config), ResBlock(c, c, emb_dim, groups)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The precision that is computed in."""
        return self.compute or self.time_embed[0].weight.dtype

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """`block(*inputs)`, in the way that `compute`, `recompute` and `fetch` say: every layer with weights is called
        through here."""
        call = self.fetch(block) if self.fetch else block
        call = in_precision(block, self.dtype) if call is block else call
        return again(call, *inputs) if self.recompute else call(*inputs)

    def encode(
        self, x: Tensor, timesteps: Tensor, context: Tensor, hint: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The way down.

        x (B,in_channels,h,w) with h, w multiples of 2^(levels-1); timesteps (B,); context (B,M,context_dim);
        `hint`, if given, (B,model_channels,h,w), is added once, after the first block.
        Returns the middle block's output, the skips from shallow to deep, and the timestep's embedding.
        """
        x, context = x.to(self.dtype), context.to(self.dtype)
        emb = self.run(self.time_embed, timestep_embedding(timesteps, self.config.model_channels).to(self.dtype))
        skips, h = [], x
        for i, block in enumerate(self.input_blocks):
            h = self.run(block, h, emb, context)
            if i == 0 and hint is not None:
                h = h + hint
            skips.append(h)
        return self.run(self.middle_block, h, emb, context), skips, emb


class UNet(UNetEncoder):
    """The whole U: the encoder, and the decoder that comes up again."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c0, groups = config.model_channels, config.norm_groups
        emb_dim = 4 * c0
        skip_channels = list(self.skip_channels)
        c = config.channel_mult[-1] * c0
        factor = 2 ** (len(config.channel_mult) - 1)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [ResBlock(c + skip_channels.pop(), mult * c0, emb_dim, groups)]
                c = mult * c0
                if factor in config.attention_resolutions:
                    layers.append(SpatialTransformer(c, config))
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(c))
                    factor //= 2
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, c, eps=1e-5),
            nn.SiLU(),
            zero_module(Conv3x3(c, config.out_channels)),
        )

    def decode(
        self,
        h: Tensor,
        skips: Sequence[Tensor],
        emb: Tensor,
        context: Tensor,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
    ) -> Tensor:
        """The way up, from what `encode` returned.

        `control`: the ControlNet's residuals, shallow to deep, the middle block's last. They are added to the skips and
        to h; with `only_mid_control` the last one alone is used. Returns eps (or v), (B,out_channels,h,w).
        """
        context = context.to(self.dtype)
        skips = list(skips)
        if control is not None:
            h = h + control[-1].to(h.dtype)
            if not only_mid_control:
                skips = [s + c.to(s.dtype) for s, c in zip(skips, control[:-1], strict=True)]
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.run(self.out, h)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
    ) -> Tensor:
        """x (B,4,h,w), timesteps (B,) in 0..999, context (B,77,context_dim) -> eps (B,4,h,w)."""
        return self.decode(*self.encode(x, timesteps, context), context, control, only_mid_control)
