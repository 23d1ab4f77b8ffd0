"""The VAE: how images become latents and back.

Stable Diffusion does not denoise pixels. An autoencoder first folds every 8x8 patch of an RGB image into 4 numbers, the
*latents*, and diffusion happens there, on 48 times fewer values. The encoder's output is a Gaussian for each latent
(mean and log-variance, together the *moments*); a sample of it, times a scale factor that brings it to unit variance,
is what the UNet sees. The decoder paints the image back.

    image (B,3,H,W) in [-1,1] --Encoder--> moments (B,2z,H/8,W/8) --sample--> z (B,z,H/8,W/8) --Decoder--> image

Module and parameter names are those of `first_stage_model.*` in Stable Diffusion checkpoints, so `state_dict()` is the
file format. Follows Rombach et al. 2022 (arXiv:2112.10752), the KL-regularised autoencoder with factor 8.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder; every level after the first halves the image, so `ch_mult` of four gives factor 8."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    norm_groups: int = 32


class ResBlock(nn.Module):
    """norm, silu, conv, twice, plus a shortcut. (B,c_in,h,w) -> (B,c_out,h,w)"""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions, with 1x1 convolutions for q, k, v. Keeps the shape."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B,1,hw,c)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(c)) v
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves height and width; pads only on the right and at the bottom, as the original does."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repetition, then smooths with a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks (named `block`), and, where there is one, the change of size after them."""

    def __init__(self, c_in: int, c_out: int, num_blocks: int, groups: int, resize: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(num_blocks))
        if resize == "down":
            self.downsample = Downsample(c_out)
        elif resize == "up":
            self.upsample = Upsample(c_out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.block_1 = ResBlock(c, c, groups)
        self.attn_1 = Attention(c, groups)
        self.block_2 = ResBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        inputs = [config.ch, *widths[:-1]]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in, c, config.num_res_blocks, config.norm_groups, None if i == last else "down")
            for i, (c_in, c) in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B,ch,H,W)
        for level in self.down:
            h = level(h)
        h = self.mid(h)  # (B,ch*mult,H/8,W/8)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B,2z,H/8,W/8)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups)
        # `up` is numbered by resolution, 0 the finest, so it is walked backwards
        self.up = nn.ModuleList(
            Level(c_in, c, config.num_res_blocks + 1, config.norm_groups, None if i == 0 else "up")
            for i, (c_in, c) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B,ch*mult,h,w)
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B,3,8h,8w)


class AutoencoderKL(nn.Module):
    """The autoencoder of Stable Diffusion; both directions are unscaled (the scale factor belongs to the caller)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    @property
    def factor(self) -> int:
        """How many pixels a latent is wide: 8 for four levels."""
        return 2 ** (len(self.config.ch_mult) - 1)

    @property
    def decoding(self) -> tuple[nn.Module, nn.Module]:
        """The parts that `decode` needs."""
        return self.post_quant_conv, self.decoder

    def moments(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) in [-1,1], H and W multiples of `factor` -> (B,2z,H/8,W/8): mean, then log-variance."""
        return self.quant_conv(self.encoder(image))

    def decode(self, z: Tensor) -> Tensor:
        """z (B,z,h,w), unscaled -> image (B,3,8h,8w), about [-1,1] and not clamped."""
        return self.decoder(self.post_quant_conv(z))


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw z from the Gaussian that `moments` (B,2z,h,w) describe; `noise` (B,z,h,w) is standard normal.

    The log-variance is clamped to [-30, 20], as in the original's DiagonalGaussianDistribution.
    """
    mean, log_var = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_var.clamp(-30.0, 20.0)) * noise
