"""The latent diffusion model put together: UNet, ControlNet, VAE and text encoder, and the table of known models.

    prompts --text--> context --+   (SDXL: and pooled, which with the sizes of the image makes y)
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
from conditioning import TextEncoders, embed_sizes
from controlnet import HINT_WIDTHS, ControlNet
from precision import PRECISIONS, NotFiniteError, check_finite, compute_dtype_for, is_finite, use_tf32  # noqa: F401
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
    text2: TextConfig | None = None  # a second text encoder, whose vectors are put beside the first one's (SDXL)
    pad2: str = "zero"  # what its prompts are padded with
    zero_empty_negative: bool = False  # an empty negative prompt is zeros, and not what the encoders make of it
    prediction: str = "eps"  # what the UNet predicts: the noise ("eps") or the velocity ("v")
    scale_factor: float = 0.18215  # latents are the output of the VAE's encoder times this
    vae_fp16_safe: bool = True  # the VAE's activations stay below float16's largest number, 65504
    linear_start: float = 0.00085  # the first beta of the noise schedule; betas are linear in their square roots
    linear_end: float = 0.012  # the last beta
    zero_terminal_snr: bool = False  # the schedule is stretched so that it ends in pure noise
    timesteps: int = 1000
    hint_widths: tuple[int, int, int, int] = HINT_WIDTHS
    hint_gain: float = 1.0  # scale of the hint encoder's initial weights
    control_depth: tuple[int, ...] | None = None  # `transformer_depth` of a ControlNet that has less than the UNet
    global_pool: bool = False  # the ControlNet's residuals are averaged over the image (`ControlNet.global_pool`)
    guidance: float = 9.0  # the guidance scale that suits this model
    resolution: int = 512  # the side of the images with which the model was trained, in pixels

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """The configuration that `to_json` wrote. Raises TypeError, ValueError or KeyError for any other text."""
        tuples = lambda fields: {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        networks = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig, "text2": TextConfig}
        fields = json.loads(text)
        has_fields = lambda k, v: k in networks and v is not None
        return cls(**tuples({k: networks[k](**tuples(v)) if has_fields(k, v) else v for k, v in fields.items()}))

    @property
    def control_unet(self) -> UNetConfig:
        """The shape of the ControlNet: the UNet's, or with `control_depth` a smaller one."""
        return self.unet if self.control_depth is None else self.unet.with_depth(self.control_depth)

    @property
    def vae_factor(self) -> int:
        """How many pixels wide a latent is: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.ch_mult) - 1)

    @property
    def pooled(self) -> int:
        """The width of the vector that the text encoders give for a whole prompt; 0 where the model has none."""
        return self.text2.projection if self.text2 else 0

    @property
    def multiple(self) -> int:
        """The number that must divide the sides of an image, in pixels: 64 for Stable Diffusion, 32 for SDXL (which was
        trained on multiples of 64)."""
        return self.vae_factor * 2 ** (len(self.unet.channel_mult) - 1)

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the VAE in a model of `dtype`: float32 instead of a float16 in which it would overflow."""
        return dtype if self.vae_fp16_safe or dtype != torch.float16 else torch.float32


_SD2 = dict(
    unet=UNetConfig(context_dim=1024, num_heads=None, num_head_channels=64, use_linear_in_transformer=True),
    text=TextConfig(width=1024, layers=24, heads=16, mlp_width=4096, activation="gelu", penultimate=True),
    pad="zero",
)
_SDXL = dict(
    unet=UNetConfig(
        channel_mult=(1, 2, 4), attention_resolutions=(4, 2), transformer_depth=(1, 2, 10), context_dim=2048,
        num_heads=None, num_head_channels=64, use_linear_in_transformer=True, adm_in_channels=2816,
    ),
    text=TextConfig(penultimate=True, final_norm=False),
    text2=TextConfig(
        width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", penultimate=True, final_norm=False,
        projection=1280,
    ),
    zero_empty_negative=True,
    scale_factor=0.13025,
    vae_fp16_safe=False,
    guidance=5.0,
    resolution=1024,
)  # fmt: skip
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
    guidance=1.5,
    resolution=128,
)  # fmt: skip

SD15 = ModelConfig("sd15")
SD21 = ModelConfig("sd21", **_SD2)
SD21_V = ModelConfig("sd21_v", **_SD2, prediction="v", resolution=768)
SDXL = ModelConfig("sdxl", **_SDXL)
TINY = ModelConfig("tiny", **_TINY)
MODELS = {model.name: model for model in (SD15, SD21, SD21_V, SDXL, TINY)}


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
            self.control_model = ControlNet(config.control_unet, hint_channels, config.hint_widths)
            self.control_model.global_pool = config.global_pool
        self.first_stage_model = AutoencoderKL(config.vae)
        self.tokenizer = Tokenizer(config.pad)
        self.tokenizers = [self.tokenizer]  # one for each text encoder
        if config.text2 is None:
            self.cond_stage_model = nn.Module()
            self.cond_stage_model.transformer = CLIPTextModel(config.text)
        else:
            self.conditioner = TextEncoders(config.text, config.text2)
            self.tokenizers.append(Tokenizer(config.pad2))

    @property
    def unet(self) -> UNet:
        return self.model.diffusion_model

    @property
    def vae(self) -> AutoencoderKL:
        return self.first_stage_model

    @property
    def text(self) -> CLIPTextModel | TextEncoders:
        return self.cond_stage_model.transformer if self.config.text2 is None else self.conditioner

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The text encoders, in the order of their contexts."""
        return [self.text] if self.config.text2 is None else self.text.encoders()

    @property
    def device(self) -> torch.device:
        """The device on which the UNet computes."""
        return self.unet.time_embed[0].weight.device

    def encode_text(self, prompts: str | list[str]) -> tuple[Tensor, Tensor | None]:
        """One prompt or a list of B -> context (B,77,D) and pooled (B,P), which is None for models without a y."""
        device = next(self.text.parameters()).device
        pairs = zip(self.text_encoders, self.tokenizers, strict=True)
        encoded = [encoder.encode(tokenizer(prompts).to(device)) for encoder, tokenizer in pairs]
        return torch.cat([context for context, _ in encoded], dim=-1), encoded[-1][1]

    def encode_prompts(self, prompts: str | list[str]) -> Tensor:
        """One prompt or a list of B -> context (B,77,D)."""
        return self.encode_text(prompts)[0]

    def encode_negative(self, prompts: str | list[str]) -> tuple[Tensor, Tensor | None]:
        """`encode_text` for negative prompts: an empty one is zeros, where the model says so."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        context, pooled = self.encode_text(prompts)
        if self.config.zero_empty_negative:
            empty = torch.tensor([not prompt for prompt in prompts], device=context.device)
            context = context.masked_fill(empty[:, None, None], 0)
            pooled = None if pooled is None else pooled.masked_fill(empty[:, None], 0)
        return context, pooled

    def make_y(self, pooled: Tensor | None, sizes: Tensor) -> Tensor | None:
        """The vector y (B,adm_in_channels) float32 that UNet and ControlNet take; None for models without.

        pooled (B,P) of `encode_text`; sizes (B,6), in pixels and in the order of `conditioning.SIZES`.
        """
        if self.config.unet.adm_in_channels is None:
            return None
        return torch.cat([pooled.float(), embed_sizes(sizes.to(pooled.device))], dim=1)

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample latents (B,4,h,w), scaled for the UNet, from the VAE's posterior.

        moments (B,8,h,w) as `AutoencoderKL.moments` returns them; noise (B,4,h,w), standard normal.
        """
        return sample_posterior(moments, noise) * self.config.scale_factor

    def encode_images(self, images: Tensor) -> Tensor:
        """images (B,3,8h,8w) in [-1,1] -> moments (B,8,h,w) of the VAE's posterior, in the VAE's dtype. Raises
        NotFiniteError."""
        weight = self.vae.quant_conv.weight
        moments = self.vae.moments(images.to(weight.device, weight.dtype))
        check_finite(moments, "the latents of an image")
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,4,h,w) -> images (B,3,8h,8w) in [-1,1]. Raises NotFiniteError if the VAE makes no numbers
        of finite latents."""
        z = (latents / self.config.scale_factor).to(self.vae.post_quant_conv.weight.dtype)
        image = self.vae.decode(z)
        if not is_finite(image) and is_finite(latents):
            check_finite(image, "an image that the VAE decoded")
        return image.clamp(-1, 1)

    def predict(
        self, x: Tensor, timesteps: Tensor, context: Tensor, hint: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """What the UNet, steered by the hint, predicts for x (B,4,h,w): eps or v, as `config.prediction` says.

        timesteps (B,), context (B,77,D), hint (B,C,8h,8w) in [0,1] or None for no control, y of `make_y`.
        """
        residuals = None if hint is None else self.control_model(x, hint, timesteps, context, y)
        return self.unet(x, timesteps, context, control=residuals, y=y)
