"""ControlNet: a trainable copy of the UNet's encoder that steers the locked UNet through zero convolutions.

The copy reads the same noisy latents, timestep and prompt as the UNet, plus a *hint* image. What it finds at every
level leaves it through a 1x1 convolution that starts at zero, and is added to the skips that the UNet's decoder reads:

    hint (B,C,H,W) --input_hint_block--> (B,c,H/8,W/8) --+
    x_t --first block--------------------------------> (+) --encoder copy--> 13 features --zero convs--> 13 residuals

Because of the zeros, the attached model computes exactly what the base computes, bit for bit, until training moves
them; nothing the base knows is ever lost. Follows Zhang et al. 2023 (arXiv:2302.05543).

`ControlLDM` is the whole model, the four parts (UNet, ControlNet, VAE, text tower) under the names they have in
checkpoints; `MODELS` the table of the models that the project knows.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import CheckpointError
from clip_text import CLIPTextModel, TextConfig, Tokenizer, clip_spelling
from exchange import CONTROL, DIFFERENCE, TEXT, UNET, VAE
from unet import Conv1x1, UNet, UNetConfig, UNetEncoder, zero_module
from vae import AutoencoderKL, VAEConfig, sample_posterior

NEW = ("input_hint_block.", "zero_convs.", "middle_block_out.")  # what a ControlNet has and a UNet has not
HINT_WIDTHS = (16, 32, 96, 256)  # channels of the hint encoder at full, half, quarter and eighth size


class ControlNet(UNetEncoder):
    """The trainable copy. `hint_channels`: channels of the hint image; `hint_widths`: of the hint encoder's layers."""

    def __init__(
        self, config: UNetConfig, hint_channels: int = 3, hint_widths: tuple[int, int, int, int] = HINT_WIDTHS
    ):
        super().__init__(config)
        self.hint_channels, self.hint_widths = hint_channels, tuple(hint_widths)
        w = hint_widths
        self.input_hint_block = nn.Sequential(
            nn.Conv2d(hint_channels, w[0], 3, padding=1), nn.SiLU(),  # (B,16,H,W)
            nn.Conv2d(w[0], w[0], 3, padding=1), nn.SiLU(),
            nn.Conv2d(w[0], w[1], 3, padding=1, stride=2), nn.SiLU(),  # (B,32,H/2,W/2)
            nn.Conv2d(w[1], w[1], 3, padding=1), nn.SiLU(),
            nn.Conv2d(w[1], w[2], 3, padding=1, stride=2), nn.SiLU(),  # (B,96,H/4,W/4)
            nn.Conv2d(w[2], w[2], 3, padding=1), nn.SiLU(),
            nn.Conv2d(w[2], w[3], 3, padding=1, stride=2), nn.SiLU(),  # (B,256,H/8,W/8)
            zero_module(nn.Conv2d(w[3], config.model_channels, 3, padding=1)),  # (B,model_channels,H/8,W/8)
        )  # fmt: skip
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_module(Conv1x1(c, c))) for c in self.skip_channels)
        c = self.skip_channels[-1]
        self.middle_block_out = nn.Sequential(zero_module(Conv1x1(c, c)))

    @classmethod
    def from_unet(
        cls,
        unet: UNet,
        hint_channels: int = 3,
        hint_widths: tuple[int, int, int, int] = HINT_WIDTHS,
        seed: int = 0,
        hint_gain: float = 1.0,
    ) -> "ControlNet":
        """A ControlNet whose encoder is a copy of `unet`'s; what a UNet has not comes from `new_weights`."""
        state = unet.state_dict() | new_weights(unet.config, hint_channels, hint_widths, seed, hint_gain)
        with torch.device("meta"):
            control = cls(unet.config, hint_channels, hint_widths)
        like = unet.time_embed[0].weight
        control.load_state_dict({k: state[k].to(like, copy=True) for k in control.state_dict()}, assign=True)
        return control

    def read_hint(self, hint: Tensor) -> Tensor:
        """hint (B,hint_channels,8h,8w) in [0,1] -> (B,model_channels,h,w), which is the same at every timestep."""
        return self.run(self.input_hint_block, hint.to(self.dtype))

    def forward(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, only_mid_control: bool = False
    ) -> list[Tensor]:
        """x (B,4,h,w), hint (B,hint_channels,8h,8w) in [0,1], timesteps (B,), context (B,77,D) -> 13 residuals.

        They come shallow to deep, the middle block's last. With `only_mid_control` the middle block's alone is
        computed, in a list of one.
        """
        return self.residuals(x, self.read_hint(hint), timesteps, context, only_mid_control)

    def residuals(
        self, x: Tensor, guided: Tensor, timesteps: Tensor, context: Tensor, only_mid_control: bool = False
    ) -> list[Tensor]:
        """The same, of a hint that `read_hint` has read."""
        h, skips, _ = self.encode(x, timesteps, context, guided)
        convs = () if only_mid_control else zip(self.zero_convs, skips, strict=True)
        return [*(self.run(conv, skip) for conv, skip in convs), self.run(self.middle_block_out, h)]


def new_weights(
    config: UNetConfig, hint_channels: int, hint_widths: tuple[int, int, int, int], seed: int, hint_gain: float
) -> dict[str, Tensor]:
    """The weights of a new ControlNet that its UNet does not have: zero convolutions, and the hint encoder in PyTorch's
    default initialisation from `seed`, times `hint_gain`, its last convolution zero.

    The default makes each of the seven layers pass on a third of what it gets, so at first the hint hardly arrives: one
    reason why convergence is late and sudden. A gain of 3 lets it through; 1 is the original's.
    """
    with torch.device("meta"):
        control = ControlNet(config, hint_channels, hint_widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in control.input_hint_block.to_empty(device="cpu"):
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
                layer.weight.data *= hint_gain
    zero_module(control.input_hint_block[-1])
    state = {k: v for k, v in control.state_dict().items() if k.startswith(NEW)}
    return {k: v if v.device.type == "cpu" else torch.zeros(v.shape) for k, v in state.items()}


# -------------------------------------------------------------------------------------------- the models that there are
@dataclass(frozen=True)
class ModelConfig:
    """One row of the table: the shapes of the four parts, and the constants they were trained with."""

    name: str
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    pad: str = "end"  # what prompts are padded with: "end" (SD 1.x) or "zero" (SD 2.x)
    prediction: str = "eps"  # what the UNet says: the noise ("eps") or the velocity ("v")
    scale_factor: float = 0.18215  # latents are the VAE's times this
    linear_start: float = 0.00085  # the noise schedule's betas go from here ...
    linear_end: float = 0.012  # ... to here, linear in their square roots
    zero_terminal_snr: bool = False  # stretched so that it ends in pure noise
    timesteps: int = 1000
    hint_widths: tuple[int, int, int, int] = HINT_WIDTHS
    hint_gain: float = 1.0  # scale of the hint encoder's initial weights
    guidance: float = 9.0  # the guidance scale that suits this model
    resolution: int = 512  # the size that it was trained at

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        fields = json.loads(text)
        tuples = lambda d: {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        parts = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig}
        return cls(**tuples({k: parts[k](**tuples(v)) if k in parts else v for k, v in fields.items()}))

    @property
    def vae_factor(self) -> int:
        """How many pixels a latent is wide: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.ch_mult) - 1)

    @property
    def multiple(self) -> int:
        """What the sides of an image must be multiples of: 64 for Stable Diffusion."""
        return self.vae_factor * 2 ** (len(self.unet.channel_mult) - 1)


_SD2 = dict(
    unet=UNetConfig(context_dim=1024, num_heads=None, num_head_channels=64, use_linear_in_transformer=True),
    text=TextConfig(width=1024, layers=24, heads=16, mlp_width=4096, activation="gelu", penultimate=True),
    pad="zero",
)
_TINY = dict(
    unet=UNetConfig(
        model_channels=48,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(2, 4),
        context_dim=64,
        num_heads=None,
        num_head_channels=24,
        norm_groups=4,
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
)

SD15 = ModelConfig("sd15")
SD21 = ModelConfig("sd21", **_SD2)
SD21_V = ModelConfig("sd21_v", **_SD2, prediction="v", resolution=768)
TINY = ModelConfig("tiny", **_TINY)
MODELS = {model.name: model for model in (SD15, SD21, SD21_V, TINY)}

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_tf32(on: bool) -> None:
    """Shall a GPU round the factors of float32 products to 10 bits? A setting of the whole process."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def computed_in(name: str, device: torch.device | str) -> torch.dtype:
    """The type that `device` computes in where weights are kept in PRECISIONS[name]: the same, but float32 on a CPU
    that has no instructions for the shorter one and would take a hundred times as long with it."""
    dtype, onednn = PRECISIONS[name], torch.ops.mkldnn
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if torch.device(device).type != "cpu" or dtype not in known:
        return dtype
    return dtype if torch.backends.mkldnn.is_available() and getattr(onednn, known[dtype])() else torch.float32


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The keys that start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def detect(path: str | Path, state: dict[str, Tensor], prefix: str = UNET) -> ModelConfig:
    """Which model a file holds: from its metadata (`config`, as this project writes it), otherwise from the shapes of
    its UNet (or, under the prefix CONTROL, of its ControlNet). CheckpointError says what is there instead."""
    if text := checkpoint.load_metadata(path).get("config"):
        try:
            return ModelConfig.from_json(text)
        except (TypeError, ValueError, KeyError, AttributeError):
            pass  # another program's `config`
    first = state.get(prefix + "input_blocks.0.0.weight")
    if first is None:
        raise CheckpointError(f"{path}: {describe(state)}; a Stable Diffusion 1.x or 2.x model is needed here")
    attention = state.get(prefix + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if any(".label_emb." in k or ".add_embedding." in k for k in state) or (attention is None and len(first) == 320):
        raise CheckpointError(f"{path}: a UNet of the SDXL kind; SD 1.x and SD 2.x are supported")
    width = attention.shape[1] if attention is not None else "unknown"
    if first.shape[1] != 4:
        raise CheckpointError(
            f"{path}: a UNet with {first.shape[1]} input channels (inpainting has 9, instruct-pix2pix 8, "
            "depth-to-image 5); models with 4 are supported"
        )
    models = {768: SD15, 1024: SD21}
    if width not in models or first.shape[0] != 320:
        raise CheckpointError(
            f"{path}: a UNet of {first.shape[0]} channels with prompts of width {width}; supported are SD 1.x (320 and "
            "768), SD 2.x (320 and 1024), and safetensors files of the models that pretrain.py makes"
        )
    return models[width]


def describe(state: dict[str, Tensor]) -> str:
    """What a file without the UNet that we look for is, in words."""
    if any(k.startswith(UNET + "input_blocks.") for k in state):
        return "a Stable Diffusion model" + (
            "" if any(k.startswith(CONTROL) for k in state) else " without a ControlNet"
        )
    some = lambda *needles: any(needle in k for k in state for needle in needles)
    if some("lora_", ".lora.", "hada_", "lokr_"):
        return "a LoRA, which changes a model but is none"
    if some("conditioner.embedders.", "add_embedding."):
        return "an SDXL model"
    if some("joint_blocks.", "double_blocks.", "transformer_blocks.0.attn.add_q_proj"):
        return "a diffusion transformer (as SD 3 and Flux are)"
    if some(CONTROL):
        return "a ControlNet alone, without a base model"
    if some(VAE):
        return "a VAE alone"
    if some(TEXT):
        return "a text encoder alone"
    return f"no Stable Diffusion UNet in it (keys like {UNET}input_blocks.0.0.weight), but {min(state)} and others"


def gather(
    path: str | Path,
    base: str | Path | None = None,
    control: str | Path | None = None,
    vae: str | Path | None = None,
    ema: bool = False,
    averaged: bool = True,
) -> dict[str, Tensor]:
    """All tensors of a model in original names, put together from what each of these says.

    `path`: a Stable Diffusion file or diffusers folder; or the folder of a training run, which stands for its base with
    the newest checkpoint's weights over it. `base`: with a run, another base than its own. `control`: a file or folder
    with a ControlNet (also as a difference to the UNet) that joins, or replaces, the model's. `vae`: the same for the
    VAE. `ema`: take the UNet's moving average (`model_ema.*`) for its weights. `averaged`: of a run that keeps a moving
    average of what it trains, take that.
    """
    path, trained = Path(path), {}
    if checkpoint.is_run(path):
        if control:
            raise CheckpointError(f"{path}: a run has its own ControlNet; --control {control} goes with a base model")
        folder = checkpoint.newest(path)
        trained = checkpoint.load_state_dict(folder / "trained.safetensors")
        if averaged and (folder / "average.safetensors").exists():
            trained |= checkpoint.load_state_dict(folder / "average.safetensors")
        run, path = path, Path(base or checkpoint.load_run(path)["base"])
        if not path.exists():
            raise CheckpointError(f"{run}: its base {path} is not there; --base FILE says where it is now")
    state = checkpoint.load_state_dict(path)
    if ema:
        names = {k: "model_ema." + k.removeprefix("model.").replace(".", "") for k in state if k.startswith(UNET)}
        if not names or not state.keys() >= set(names.values()):
            raise CheckpointError(f"{path}: has no moving average of its UNet (model_ema.*); leave --ema out")
        state |= {k: state[name] for k, name in names.items()}
    state = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
    if control:
        given = take(control, CONTROL)
        check_twins(control, given, path, state)
        difference = given.pop(DIFFERENCE, None) is not None
        state |= add_encoder(given, state) if difference else given
    if vae:
        given = take(vae, VAE)
        wrong = [k for k, v in given.items() if k in state and state[k].shape != v.shape]
        if wrong:
            raise CheckpointError(f"{vae}: a VAE of another shape than that of {path} ({wrong[0]})")
        state |= given
    return state | trained


VAE_PARTS = tuple(VAE + name for name in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))  # not its loss


def take(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """The ControlNet (and the mark of differences, if it has that) or the VAE of a file, by prefix; CheckpointError
    where it has none."""
    state = checkpoint.load_state_dict(path)
    wanted = VAE_PARTS if prefix == VAE else prefix
    given = {k: v for k, v in state.items() if k.startswith(wanted)}
    if not given:
        raise CheckpointError(f"{path}: {describe(state)}; a {'VAE' if prefix == VAE else 'ControlNet'} is needed here")
    return given | {k: state[k] for k in (DIFFERENCE,) if k in state and prefix == CONTROL}


def twin(key: str) -> str:
    """Which weight of the UNet one of the ControlNet is a copy of (its own, as the zero convolutions, have none)."""
    return UNET + key.removeprefix(CONTROL)


def check_twins(path: str | Path, control: dict[str, Tensor], base: str | Path, state: dict[str, Tensor]) -> None:
    """CheckpointError unless the ControlNet's copies have the shapes of the UNet in `state`."""
    shared = [k for k in control if twin(k) in state]
    wrong = [k for k in shared if control[k].shape != state[twin(k)].shape]
    if wrong or not shared:
        raise CheckpointError(
            f"{path}: a ControlNet of another kind of model than {base} ({(wrong or list(control))[0]})"
        )


def add_encoder(control: dict[str, Tensor], state: dict[str, Tensor], sign: int = 1) -> dict[str, Tensor]:
    """Add the UNet's weights in `state` to (with sign -1: subtract them from) those of `control` that are copies of
    them (see `check_twins`)."""
    return {
        k: (v.float() + sign * state[twin(k)].float()).to(v.dtype) if twin(k) in state else v
        for k, v in control.items()
    }


def read_model(
    path: str | Path,
    base: str | Path | None = None,
    control: str | Path | None = None,
    vae: str | Path | None = None,
    ema: bool = False,
    prediction: str = "auto",
    clip_skip: int | None = None,
    zero_terminal_snr: bool = False,
    averaged: bool = True,
) -> tuple[dict[str, Tensor], ModelConfig]:
    """A model's tensors, put together as `gather` does, and which model they are.

    What a run was trained with stands where nothing else is said. `prediction` ("eps" or "v") says what a file cannot
    tell (SD 2.1 at 768 px is "v"). `clip_skip`: 2 leaves out the text tower's last layer, 3 the last two, ...
    `zero_terminal_snr`: the schedule is stretched to end in pure noise.
    """
    path = Path(path)
    if checkpoint.is_run(path):
        run = checkpoint.load_run(path)
        base, vae, ema = base or run["base"], vae or run.get("vae"), ema or run.get("ema", False)
        clip_skip = run.get("clip_skip", 1) if clip_skip is None else clip_skip
        prediction = run.get("prediction", "auto") if prediction == "auto" else prediction
        zero_terminal_snr = zero_terminal_snr or run.get("zero_terminal_snr", False)
    elif base:
        raise CheckpointError(f"--base goes with the folder of a run; {path} is a whole model by itself")
    state = gather(path, base, control, vae, ema, averaged)
    source = Path(base) if checkpoint.is_run(path) else path
    config = configure(source, detect(source, state), prediction, clip_skip or 1)
    if zero_terminal_snr and config.prediction != "v":
        raise CheckpointError(f"{path}: predicts eps, which says nothing at zero SNR; that schedule is for v models")
    return state, dataclasses.replace(config, zero_terminal_snr=zero_terminal_snr or config.zero_terminal_snr)


def configure(path: Path, config: ModelConfig, prediction: str, clip_skip: int) -> ModelConfig:
    """`config` with what the user said, or the scheduler of a diffusers folder says, about what weights cannot tell."""
    if prediction == "auto":
        known = checkpoint.load_prediction(path)
        if known is None and config == SD21:
            print(
                f"{path}: an SD 2.x model, taken for the one at 512 px, which predicts eps; for the one at 768 px "
                "(v-prediction) say --prediction v"
            )
        prediction = known or config.prediction
    if config == SD21 and prediction == "v":
        config = SD21_V
    layers = config.text.layers - (clip_skip - 1)
    if clip_skip < 1 or layers <= config.text.penultimate:
        raise CheckpointError(f"--clip-skip is {clip_skip}; this text tower has {config.text.layers} layers")
    text = dataclasses.replace(config.text, layers=layers)
    return dataclasses.replace(config, prediction=prediction, text=text)


# ------------------------------------------------------------------------------------------------------ the whole model
class ControlLDM(nn.Module):
    """UNet, ControlNet, VAE and text tower; `state_dict()` has the key names of a checkpoint file.

    `control_model` is None for a base model without ControlNet.
    """

    def __init__(self, config: ModelConfig, hint_channels: int | None = 3):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.diffusion_model = UNet(config.unet)
        self.control_model = (
            None if hint_channels is None else ControlNet(config.unet, hint_channels, config.hint_widths)
        )
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
        return self.unet.time_embed[0].weight.device

    @classmethod
    def from_file(
        cls, path: str | Path, attach: bool = False, hint_channels: int | None = None, prediction: str = "auto",
        seed: int = 0, base: str | Path | None = None, control: str | Path | None = None,
        vae: str | Path | None = None, ema: bool = False, clip_skip: int | None = None,
        zero_terminal_snr: bool = False, averaged: bool = True,
    ) -> "ControlLDM":  # fmt: skip
        """Build the model that `path` holds, in float32, on the CPU.

        `attach`: where there is no ControlNet, add a new one, with `hint_channels` (default 3) and its hint encoder
        initialised from `seed`. The others: see `read_model`.
        """
        path = Path(path)
        state, config = read_model(path, base, control, vae, ema, prediction, clip_skip, zero_terminal_snr, averaged)
        own = part(state, CONTROL)
        if own:
            first = own.get("input_hint_block.0.weight")
            if first is None:
                raise CheckpointError(f"{path}: its ControlNet lacks input_hint_block.0.weight")
            if hint_channels not in (None, first.shape[1]):
                raise CheckpointError(
                    f"{path}: its ControlNet takes hints of {first.shape[1]} channels, not {hint_channels}"
                )
            config = dataclasses.replace(config, hint_widths=hint_widths(own))
            hint_channels = first.shape[1]
        with torch.device("meta"):
            model = cls(config, hint_channels if own else None)
        parts = [(UNET, model.unet), (VAE, model.vae), (TEXT, model.text)]
        parts += [(CONTROL, model.control_model)] if own else []
        for prefix, module in parts:
            load_part(path, module, part(state, prefix), prefix)
        if attach and not own:
            model.control_model = ControlNet.from_unet(
                model.unet, hint_channels or 3, config.hint_widths, seed, config.hint_gain
            )
        return model.requires_grad_(False).eval()

    def encode_prompts(self, prompts: str | list[str]) -> Tensor:
        """B prompts -> context (B,77,D)."""
        return self.text(self.tokenizer(prompts).to(self.text.text_model.final_layer_norm.weight.device))

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw latents (B,4,h,w), scaled for the UNet, from the VAE's moments with standard normal `noise`."""
        return sample_posterior(moments, noise) * self.config.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,4,h,w) -> image (B,3,8h,8w) in [-1,1]."""
        return self.vae.decode((latents / self.config.scale_factor).to(self.vae.post_quant_conv.weight.dtype)).clamp(
            -1, 1
        )

    def predict(
        self, x: Tensor, timesteps: Tensor, context: Tensor, hint: Tensor | None = None, only_mid_control: bool = False
    ) -> Tensor:
        """What the steered UNet says of x (B,4,h,w): eps or v, as `config.prediction` names it."""
        control = None
        if hint is not None and self.control_model is not None:
            control = self.control_model(x, hint, timesteps, context, only_mid_control)
        return self.unet(x, timesteps, context, control, only_mid_control)


def hint_widths(control: dict[str, Tensor]) -> tuple[int, ...]:
    """The widths of the hint encoder that a ControlNet's tensors (without their prefix) have."""
    try:
        return tuple(control[f"input_hint_block.{i}.weight"].shape[0] for i in (0, 4, 8, 12))
    except KeyError as e:
        raise CheckpointError(f"a ControlNet without its hint encoder's {e.args[0]}") from e


def load_part(path: Path, module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Put a part's tensors, as float32, into `module` (on the meta device); say in one line what does not fit."""
    own = module.state_dict()
    if isinstance(module, CLIPTextModel):
        state = clip_spelling(state)
    missing = sorted(own.keys() - state.keys())
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(own)} weights under {prefix} missing, as {missing[0]}")
    if wrong:
        k = wrong[0]
        raise CheckpointError(f"{path}: {prefix}{k} is {list(state[k].shape)}, should be {list(own[k].shape)}")
    module.load_state_dict({k: state[k].float().clone() for k in own}, assign=True)
