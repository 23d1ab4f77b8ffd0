"""The latent diffusion model put together: UNet, ControlNet, VAE and text encoder, and the table of known models.

    prompts --text--> context --+
                                v
    images --vae--> latents --unet--> eps          hint --control_model--> residuals, added inside of the unet

`ModelConfig` holds everything that tells one model from another: the shapes of the four networks and the constants with
which they were trained. `MODELS` is the table of the known ones. `ControlLDM` is the model itself; its `state_dict()`
has the key names of Stable Diffusion checkpoints. Nothing here reads files; `weights.load_model` builds a `ControlLDM`
from one. Follows Rombach et al. 2022 (arXiv:2112.10752) and Zhang et al. 2023 (arXiv:2302.05543).
"""

import dataclasses
import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip_text import CLIPTextModel, TextConfig, Tokenizer
from controlnet import HINT_WIDTHS, ControlNet
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig, sample_posterior


@dataclass(frozen=True)
class ModelConfig:
    """One row of the table of models: the shapes of the networks, and the constants with which they were trained."""

    name: str
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    pad: str = "end"  # what prompts are padded with: "end" (SD 1.x) or "zero" (SD 2.x)
    prediction: str = "eps"  # what the UNet predicts: the noise ("eps") or the velocity ("v")
    scale_factor: float = 0.18215  # latents are the output of the VAE's encoder times this
    linear_start: float = 0.00085  # the first beta of the noise schedule; betas are linear in their square roots
    linear_end: float = 0.012  # the last beta
    zero_terminal_snr: bool = False  # the schedule is stretched so that it ends in pure noise
    timesteps: int = 1000
    hint_widths: tuple[int, int, int, int] = HINT_WIDTHS
    hint_gain: float = 1.0  # scale of the hint encoder's initial weights
    global_pool: bool = False  # the ControlNet's residuals are averaged over the image (`ControlNet.global_pool`)
    guidance: float = 9.0  # the guidance scale that suits this model
    resolution: int = 512  # the side of the images with which the model was trained, in pixels

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """The configuration that `to_json` wrote. Raises TypeError, ValueError or KeyError for any other text."""
        tuples = lambda fields: {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        networks = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig}
        fields = json.loads(text)
        return cls(**tuples({k: networks[k](**tuples(v)) if k in networks else v for k, v in fields.items()}))

    @property
    def vae_factor(self) -> int:
        """How many pixels wide a latent is: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.ch_mult) - 1)

    @property
    def multiple(self) -> int:
        """The number that must divide the sides of an image, in pixels: 64 for Stable Diffusion."""
        return self.vae_factor * 2 ** (len(self.unet.channel_mult) - 1)


_SD2 = dict(
    unet=UNetConfig(context_dim=1024, num_heads=None, num_head_channels=64, use_linear_in_transformer=True),
    text=TextConfig(width=1024, layers=24, heads=16, mlp_width=4096, activation="gelu", penultimate=True),
    pad="zero",
)
_TINY = dict(
    unet=UNetConfig(
        model_channels=48, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(2, 4), context_dim=64,
        num_heads=None, num_head_channels=24, norm_groups=4,
    ),
    vae=VAEConfig(ch=16, ch_mult=(1, 1, 2, 4), num_res_blocks=1, norm_groups=1),
    text=TextConfig(width=64, layers=2, heads=4, mlp_width=256),
    prediction="v",
    scale_factor=1.0,
    linear_end=0.02,
    hint_widths=(8, 16, 32, 64),
    hint_gain=3.0,
    guidance=2.0,
    resolution=128,
)  # fmt: skip

SD15 = ModelConfig("sd15")
SD21 = ModelConfig("sd21", **_SD2)
SD21_V = ModelConfig("sd21_v", **_SD2, prediction="v", resolution=768)
TINY = ModelConfig("tiny", **_TINY)
MODELS = {model.name: model for model in (SD15, SD21, SD21_V, TINY)}


# --------------------------------------------------------------------------------------------------------- precision
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_tf32(on: bool) -> None:
    """Let a GPU round the factors of float32 products to 10 bits of mantissa, or not. A setting of the process."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def compute_dtype_for(precision: str, device: torch.device | str) -> torch.dtype:
    """The dtype in which `device` computes where weights are kept in PRECISIONS[precision].

    The two dtypes are equal, except on a CPU without instructions for the short one: that CPU computes in float32,
    since it would take a hundred times as long with bfloat16 or float16.
    """
    dtype = PRECISIONS[precision]
    probes = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if torch.device(device).type != "cpu" or dtype not in probes:
        return dtype
    supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, probes[dtype])()
    return dtype if supported else torch.float32


# --------------------------------------------------------------------------------------------------------- the model
class ControlLDM(nn.Module):
    """UNet, ControlNet, VAE and text encoder under the key names of a checkpoint file.

    `hint_channels` None: a base model without ControlNet (`control_model` is None).
    """

    def __init__(self, config: ModelConfig, hint_channels: int | None = 3):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.diffusion_model = UNet(config.unet)
        self.control_model: ControlNet | None = None
        if hint_channels is not None:
            self.control_model = ControlNet(config.unet, hint_channels, config.hint_widths)
            self.control_model.global_pool = config.global_pool
        self.first_stage_model = AutoencoderKL(config.vae)
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.transformer = CLIPTextModel(config.text)
        self.tokenizer = Tokenizer(config.pad)

    @property
    def unet(self) -> UNet:
        return self.model.diffusion_model

    @property
    def vae(self) -> AutoencoderKL:
        return self.first_stage_model

    @property
    def text(self) -> CLIPTextModel:
        return self.cond_stage_model.transformer

    @property
    def device(self) -> torch.device:
        """The device on which the UNet computes."""
        return self.unet.time_embed[0].weight.device

    def encode_prompts(self, prompts: str | list[str]) -> Tensor:
        """One prompt or a list of B -> context (B,77,D)."""
        return self.text(self.tokenizer(prompts).to(self.text.text_model.final_layer_norm.weight.device))

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample latents (B,4,h,w), scaled for the UNet, from the VAE's posterior.

        moments (B,8,h,w) as `AutoencoderKL.moments` returns them; noise (B,4,h,w), standard normal.
        """
        return sample_posterior(moments, noise) * self.config.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,4,h,w) -> images (B,3,8h,8w) in [-1,1]."""
        z = (latents / self.config.scale_factor).to(self.vae.post_quant_conv.weight.dtype)
        return self.vae.decode(z).clamp(-1, 1)

    def predict(self, x: Tensor, timesteps: Tensor, context: Tensor, hint: Tensor | None = None) -> Tensor:
        """What the UNet, steered by the hint, predicts for x (B,4,h,w): eps or v, as `config.prediction` says.

        timesteps (B,), context (B,77,D), hint (B,C,8h,8w) in [0,1] or None for no control.
        """
        residuals = None if hint is None else self.control_model(x, hint, timesteps, context)
        return self.unet(x, timesteps, context, control=residuals)
