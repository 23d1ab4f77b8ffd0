"""ControlNet: a trainable copy of the UNet's encoder that steers the locked UNet through zero convolutions.

The copy reads the same noisy latents, timestep and prompt as the UNet, and a *hint* image besides. The output of each
of its blocks passes through a zero convolution, a 1x1 convolution that starts at zero, and is added to the skip
connection that the decoder of the UNet reads:

                        locked UNet                                  ControlNet (trainable)
                                                                     hint (B,C,H,W)
             x_t (B,4,h,w)                       x_t                      | input_hint_block
                  |                               |                       v
            input_blocks.0                  input_blocks.0 ----------->  (+)
                  |                               |
            input_blocks.1..11              input_blocks.1..11  --> zero_convs.0..11  --+  12 residuals
                  |                               |                                     |
             middle_block                    middle_block       --> middle_block_out  --+  1 residual
                  |                                                                     |
            output_blocks  <----------------------- added to skips and middle ----------+
                  |
                 eps

Because of the zeros the attached model computes exactly what the base model computes, bit for bit, until training moves
them: training starts from the quality of the base and cannot lose it. Follows Zhang et al. 2023 (arXiv:2302.05543).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from layers import Addition, Conv1x1, Conv2d, zero_module
from unet import UNet, UNetConfig, UNetEncoder

HINT_WIDTHS = (16, 32, 96, 256)  # channels of the hint encoder at full, half, quarter and eighth size


class ZeroConv(Conv1x1):
    """A zero convolution: a 1x1 convolution whose weight and bias start at zero. (B,c,h,w) -> (B,c,h,w)"""

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def reset_parameters(self) -> None:
        zero_module(self)


class ControlNet(UNetEncoder):
    """The trainable copy of the encoder, its hint encoder and its zero convolutions.

    `hint_channels`: channels of the hint image; `hint_widths`: channels of the hint encoder's layers.
    """

    def __init__(
        self, config: UNetConfig, hint_channels: int = 3, hint_widths: tuple[int, int, int, int] = HINT_WIDTHS
    ):
        super().__init__(config)
        self.hint_channels, self.hint_widths = hint_channels, tuple(hint_widths)
        self.only_mid_control = False  # use the middle block's residual alone: faster, weaker control
        self.global_pool = False  # average each residual over the image: it says what is to be seen, but not where
        w = hint_widths
        self.input_hint_block = nn.Sequential(
            Conv2d(hint_channels, w[0], 3, padding=1), nn.SiLU(),  # (B,16,H,W)
            Conv2d(w[0], w[0], 3, padding=1), nn.SiLU(),
            Conv2d(w[0], w[1], 3, padding=1, stride=2), nn.SiLU(),  # (B,32,H/2,W/2)
            Conv2d(w[1], w[1], 3, padding=1), nn.SiLU(),
            Conv2d(w[1], w[2], 3, padding=1, stride=2), nn.SiLU(),  # (B,96,H/4,W/4)
            Conv2d(w[2], w[2], 3, padding=1), nn.SiLU(),
            Conv2d(w[2], w[3], 3, padding=1, stride=2), nn.SiLU(),  # (B,256,H/8,W/8)
            zero_module(Conv2d(w[3], config.model_channels, 3, padding=1)),  # (B,model_channels,H/8,W/8)
        )  # fmt: skip
        # the keys are zero_convs.0.0.weight and so on: the original has each in a Sequential of its own
        self.zero_convs = nn.ModuleList(nn.Sequential(ZeroConv(c)) for c in self.skip_channels)
        self.middle_block_out = nn.Sequential(ZeroConv(self.skip_channels[-1]))

    def forward(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None
    ) -> list[Tensor]:
        """The residuals that steer the UNet, shallow to deep, the middle block's last: 13 for Stable Diffusion, 10 for
        SDXL.

        x (B,4,h,w), hint (B,hint_channels,8h,8w) in [0,1], timesteps (B,), context (B,77,D), y (B,adm_in_channels).
        With `only_mid_control` the list holds the middle block's residual alone; with `global_pool` each residual is
        (B,c,1,1).
        """
        return self.residuals(x, self.embed_hint(hint), timesteps, context, y)

    def embed_hint(self, hint: Tensor) -> Tensor:
        """hint (B,hint_channels,8h,8w) in [0,1] -> hint_embedding (B,model_channels,h,w), equal at all timesteps."""
        return self.call_block(self.input_hint_block, hint.to(self.dtype))

    def residuals(
        self, x: Tensor, hint_embedding: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None
    ) -> list[Tensor]:
        """As `forward`, for a hint that `embed_hint` has encoded."""
        h, skips, _ = self.encode(x, timesteps, context, hint_embedding, y)
        outer = [] if self.only_mid_control else list(zip(self.zero_convs, skips, strict=True))
        residuals = [self.call_block(conv, features) for conv, features in [*outer, (self.middle_block_out, h)]]
        return [r.mean((2, 3), keepdim=True) for r in residuals] if self.global_pool else residuals

    @classmethod
    def from_unet(
        cls, unet: UNet, hint_channels: int = 3, hint_widths: tuple[int, int, int, int] = HINT_WIDTHS, seed: int = 0,
        hint_gain: float = 1.0, transformer_depth: tuple[int, ...] | None = None,
        weights: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32,
    ) -> "ControlNet":  # fmt: skip
        """A new ControlNet: the encoder is a copy of `unet`'s, everything else comes from `new_weights`.

        `transformer_depth`: a ControlNet with fewer blocks in its transformers, of which each is a copy of the UNet's
        block of that number. Residuals are as many as before. `weights`: the UNet's in full precision, which are copied
        as `dtype`, where those in `unet` are rounded.
        """
        config = unet.config if transformer_depth is None else unet.config.with_depth(transformer_depth)
        state = unet.state_dict() | dict(weights or {})
        state |= new_weights(config, hint_channels, hint_widths, seed, hint_gain)
        with torch.device("meta"):
            control_model = cls(config, hint_channels, hint_widths)
        like = unet.time_embed[0].weight
        dtype = dtype if weights else like.dtype
        copies = {name: state[name].to(like.device, dtype, copy=True) for name in control_model.state_dict()}
        control_model.load_state_dict(copies, assign=True)
        return control_model


def new_weights(
    config: UNetConfig, hint_channels: int, hint_widths: tuple[int, int, int, int], seed: int, hint_gain: float
) -> dict[str, Tensor]:
    """The weights of a new ControlNet that its UNet does not have: zero convolutions, and the hint encoder.

    The hint encoder gets PyTorch's default initialisation from `seed`, its last convolution zeros. With the default
    each of its seven layers passes on a third of its input's scale, so that at first the hint hardly arrives: one
    reason why convergence is late and sudden. `hint_gain` multiplies the weights: 3 lets the hint through, 1 is the
    original's initialisation.
    """
    with torch.device("meta"):
        control_model = ControlNet(config, hint_channels, hint_widths)
        copied = UNetEncoder(config).state_dict().keys()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in control_model.named_modules():
            if any(f"{name}.{p}" not in copied for p, _ in module.named_parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                getattr(module, "reset_parameters", lambda module=module: zero_module(module))()
        for addition in (m for m in control_model.modules() if isinstance(m, Addition)):
            addition.reset_parameters()
    for layer in control_model.input_hint_block[::2]:  # the convolutions; the activations are between them
        layer.weight.data *= hint_gain
    zero_module(control_model.input_hint_block[-1])
    return {name: tensor for name, tensor in control_model.state_dict().items() if name not in copied}
