"""Which model is this? A whole model put together from the files that each hold a piece of it.

A `ModelSource` names the pieces: a base model (original file or diffusers folder) or the folder of a training run, and
optionally a ControlNet, a VAE, and what no file can tell. The pieces are laid over one another, later ones on top:

    base  <-  the UNet's moving average (ema)  <-  ControlNet  <-  VAE  <-  what a run trained

`load_model` builds a `ControlLDM` from these tensors, `read_model` returns them with the model's configuration, for
tools that work on tensors. The configuration comes from the file's metadata where this project wrote the file, and
otherwise from the shapes of the UNet (`detect_model`). Keys are original ones everywhere; see `weights.spelling`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import CLIPTextModel, clip_spelling
from controlnet import ControlNet
from ldm import SD15, SD21, SD21_V, ControlLDM, ModelConfig
from weights.reading import CheckpointError, is_run, load_metadata, load_prediction, load_state_dict
from weights.runs import load_run, newest_checkpoint
from weights.spelling import CONTROL, DIFFERENCE, TEXT, UNET, VAE

COMPONENTS = {"UNet": UNET, "ControlNet": CONTROL, "VAE": VAE, "text encoder": TEXT}
VAE_KEYS = tuple(VAE + name for name in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))  # not its loss


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. Of a run, its own settings count wherever this says nothing."""

    path: str | Path  # a Stable Diffusion file, a diffusers folder, or the folder of a training run
    base: str | Path = ""  # with a run: another base model than the run's own
    control: str | Path = ""  # a ControlNet's file or folder, which joins or replaces the model's ControlNet
    vae: str | Path = ""  # a VAE's file or folder, which replaces the model's VAE
    ema: bool = False  # take the moving average of the base's UNet (`model_ema.*`) in place of its weights
    use_run_ema: bool = True  # take the moving average of a run's trained weights, if the run keeps one
    prediction: str = "auto"  # "eps" or "v", which weights cannot tell (SD 2.1 at 768 px predicts v)
    clip_skip: int | None = None  # 2 leaves out the last layer of the text encoder, 3 the last two, ...
    zero_terminal_snr: bool = False  # the noise schedule is stretched so that it ends in pure noise
    attach: bool = False  # add a new ControlNet if the model has none
    hint_channels: int | None = None  # channels of the hint: of a new ControlNet (None: 3), checked of a loaded one
    seed: int = 0  # of the initial weights of a new ControlNet's hint encoder


def load_model(source: ModelSource | str | Path) -> ControlLDM:
    """Build the model that `source` names: float32, on the CPU, in evaluation mode, requiring no gradients.

    `control_model` is None if the source has no ControlNet and does not ask to attach one. Raises CheckpointError.
    """
    source = _with_run_settings(source)
    base, trained = _read_base(source), _read_trained(source)
    config = _read_config(source, base | trained)
    control, hint_channels = strip_prefix(base | trained, CONTROL), None
    if control:
        hint_channels = _hint_channels(source, control)
        config = dataclasses.replace(config, hint_widths=hint_widths_of(control))
    with torch.device("meta"):
        model = ControlLDM(config, hint_channels)
    for prefix, module in ((UNET, model.unet), (VAE, model.vae), (TEXT, model.text)):
        load_component(source.path, module, strip_prefix(base, prefix), prefix)
    if control:
        load_component(source.path, model.control_model, control, CONTROL)
    elif source.attach:
        model.control_model = ControlNet.from_unet(
            model.unet, source.hint_channels or 3, config.hint_widths, source.seed, config.hint_gain
        )
    load_trained(source.path, model, trained)
    if control and is_run(source.path):
        model.control_model.only_mid_control = load_run(source.path).get("only_mid_control", False)
    return model.requires_grad_(False).eval()


def read_model(source: ModelSource | str | Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """All tensors of the model that `source` names, under original keys, and the model's configuration."""
    source = _with_run_settings(source)
    state = merge_sources(source)
    return state, _read_config(source, state)


def merge_sources(source: ModelSource | str | Path) -> dict[str, Tensor]:
    """All tensors of the model that `source` names, under original keys. Of a run's settings only the base counts."""
    source = _as_source(source)
    return _read_base(source) | _read_trained(source)


# -------------------------------------------------------------------------------------------------- reading the pieces
def _as_source(source: ModelSource | str | Path) -> ModelSource:
    return source if isinstance(source, ModelSource) else ModelSource(source)


def _with_run_settings(source: ModelSource | str | Path) -> ModelSource:
    """The source, completed by the settings with which its run was trained."""
    source = _as_source(source)
    if not is_run(source.path):
        if source.base:
            raise CheckpointError(f"--base goes with the folder of a run; {source.path} is a whole model by itself")
        return source
    run = load_run(source.path)
    return dataclasses.replace(
        source,
        base=source.base or run["base"],
        vae=source.vae or run.get("vae") or "",
        ema=source.ema or run.get("ema", False),
        clip_skip=run.get("clip_skip", 1) if source.clip_skip is None else source.clip_skip,
        prediction=run.get("prediction", "auto") if source.prediction == "auto" else source.prediction,
        zero_terminal_snr=source.zero_terminal_snr or run.get("zero_terminal_snr", False),
    )


def _base_path(source: ModelSource) -> Path:
    return Path(source.base or load_run(source.path)["base"]) if is_run(source.path) else Path(source.path)


def _read_base(source: ModelSource) -> dict[str, Tensor]:
    """The tensors of the base model, with `ema`, `control` and `vae` laid over them; nothing that a run trained."""
    path = _base_path(source)
    if is_run(source.path):
        if source.control:
            raise CheckpointError(
                f"{source.path}: a run has its own ControlNet; --control {source.control} goes with a base model"
            )
        if not path.exists():
            raise CheckpointError(f"{source.path}: its base {path} is not there; --base FILE says where it is now")
    state = load_state_dict(path)
    if source.ema:
        averages = {k: "model_ema." + k.removeprefix("model.").replace(".", "") for k in state if k.startswith(UNET)}
        if not averages or not state.keys() >= set(averages.values()):
            raise CheckpointError(f"{path}: has no moving average of its UNet (model_ema.*); leave --ema out")
        state |= {k: state[name] for k, name in averages.items()}
    state = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
    if source.control:
        control = read_component(source.control, CONTROL)
        check_matches_unet(source.control, control, path, state)
        is_difference = control.pop(DIFFERENCE, None) is not None
        state |= add_unet_weights(control, state) if is_difference else control
    if source.vae:
        vae = read_component(source.vae, VAE)
        misfits = [k for k, v in vae.items() if k in state and state[k].shape != v.shape]
        if misfits:
            raise CheckpointError(f"{source.vae}: a VAE of another shape than that of {path} ({misfits[0]})")
        state |= vae
    return state


def _read_trained(source: ModelSource) -> dict[str, Tensor]:
    """The tensors that a run trained, from its newest checkpoint; empty if the source is not a run."""
    if not is_run(source.path):
        return {}
    folder = newest_checkpoint(source.path)
    trained = load_state_dict(folder / "trained.safetensors")
    if source.use_run_ema and (folder / "average.safetensors").exists():
        trained |= load_state_dict(folder / "average.safetensors")
    return trained


def read_component(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """The ControlNet (prefix CONTROL, with the mark of a difference) or the VAE (prefix VAE) of a file or folder.

    Raises CheckpointError if the file has no such component.
    """
    state = load_state_dict(path)
    component = {k: v for k, v in state.items() if k.startswith(VAE_KEYS if prefix == VAE else prefix)}
    if not component:
        needed = "VAE" if prefix == VAE else "ControlNet"
        raise CheckpointError(f"{path}: {describe(state)}; a {needed} is needed here")
    return component | {k: state[k] for k in (DIFFERENCE,) if k in state and prefix == CONTROL}


def strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose key starts with `prefix`, under keys without the prefix."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


# ---------------------------------------------------------------------------------------------- ControlNet and UNet
def unet_key(key: str) -> str:
    """The key of the UNet's weight of which the ControlNet's weight `key` is a copy.

    Weights of the ControlNet alone (zero convolutions, hint encoder) get a key that no UNet has.
    """
    return UNET + key.removeprefix(CONTROL)


def check_matches_unet(
    path: str | Path, control: dict[str, Tensor], base: str | Path, state: dict[str, Tensor]
) -> None:
    """Raise CheckpointError unless the copied weights in `control` have the shapes of the UNet's weights in `state`."""
    copies = [k for k in control if unet_key(k) in state]
    misfits = [k for k in copies if control[k].shape != state[unet_key(k)].shape]
    if misfits or not copies:
        example = (misfits or list(control))[0]
        raise CheckpointError(f"{path}: a ControlNet of another kind of model than {base} ({example})")


def add_unet_weights(control: dict[str, Tensor], state: dict[str, Tensor], sign: int = 1) -> dict[str, Tensor]:
    """`control` plus (with sign -1: minus) the UNet's weights in `state`, wherever a weight is a copy of the UNet's.

    The shapes must match (see `check_matches_unet`).
    """
    return {
        k: (v.float() + sign * state[unet_key(k)].float()).to(v.dtype) if unet_key(k) in state else v
        for k, v in control.items()
    }


def hint_widths_of(control: dict[str, Tensor]) -> tuple[int, ...]:
    """The widths of the hint encoder in a ControlNet's tensors (keys without prefix)."""
    try:
        return tuple(control[f"input_hint_block.{i}.weight"].shape[0] for i in (0, 4, 8, 12))
    except KeyError as e:
        raise CheckpointError(f"a ControlNet without its hint encoder's {e.args[0]}") from e


def _hint_channels(source: ModelSource, control: dict[str, Tensor]) -> int:
    """The channels of the hint that a ControlNet takes; CheckpointError if the source asks for another number."""
    first = control.get("input_hint_block.0.weight")
    if first is None:
        raise CheckpointError(f"{source.path}: its ControlNet lacks input_hint_block.0.weight")
    if source.hint_channels not in (None, first.shape[1]):
        raise CheckpointError(
            f"{source.path}: its ControlNet takes hints of {first.shape[1]} channels, not {source.hint_channels}"
        )
    return first.shape[1]


# ------------------------------------------------------------------------------------------------- which model is this
def _read_config(source: ModelSource, state: dict[str, Tensor]) -> ModelConfig:
    path = _base_path(source)
    return apply_overrides(path, detect_model(path, state), source)


def detect_model(path: str | Path, state: dict[str, Tensor], prefix: str = UNET) -> ModelConfig:
    """The configuration of the model in a file: from the file's metadata, otherwise from the shapes in `state`.

    The metadata has the key `config` if this project wrote the file. `prefix` CONTROL looks at the shapes of a
    ControlNet instead of the UNet's. Raises CheckpointError that says what the file holds instead of a known model.
    """
    if text := load_metadata(path).get("config"):
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
            "768), SD 2.x (320 and 1024), and safetensors files of the models that toy.pretrain makes"
        )
    return models[width]


def apply_overrides(path: Path, config: ModelConfig, source: ModelSource) -> ModelConfig:
    """`config` with what weights cannot tell: as `source` says, or as the scheduler of the diffusers folder `path`."""
    prediction = source.prediction
    if prediction == "auto":
        known = load_prediction(path)
        if known is None and config == SD21:
            print(
                f"{path}: an SD 2.x model, taken for the one at 512 px, which predicts eps; for the one at 768 px "
                "(v-prediction) say --prediction v"
            )
        prediction = known or config.prediction
    if config == SD21 and prediction == "v":
        config = SD21_V
    clip_skip = source.clip_skip or 1
    layers = config.text.layers - (clip_skip - 1)
    if clip_skip < 1 or layers <= config.text.penultimate:
        raise CheckpointError(f"--clip-skip is {clip_skip}; this text encoder has {config.text.layers} layers")
    zero_terminal_snr = source.zero_terminal_snr or config.zero_terminal_snr
    if source.zero_terminal_snr and prediction != "v":
        raise CheckpointError(
            f"{source.path}: predicts eps, which says nothing at zero SNR; --zero-terminal-snr is for v-prediction"
        )
    text = dataclasses.replace(config.text, layers=layers)
    return dataclasses.replace(config, prediction=prediction, text=text, zero_terminal_snr=zero_terminal_snr)


def describe(state: dict[str, Tensor]) -> str:
    """In words, what kind of file has the keys of `state`; for messages about a file that lacks what is needed."""
    has = lambda *words: any(word in k for k in state for word in words)
    if any(k.startswith(UNET + "input_blocks.") for k in state):
        with_control = any(k.startswith(CONTROL) for k in state)
        return "a Stable Diffusion model" + ("" if with_control else " without a ControlNet")
    kinds = {
        "a LoRA, which changes a model but is none": ("lora_", ".lora.", "hada_", "lokr_"),
        "an SDXL model": ("conditioner.embedders.", "add_embedding."),
        "a diffusion transformer (as SD 3 and Flux are)": (
            "joint_blocks.", "double_blocks.", "transformer_blocks.0.attn.add_q_proj",
        ),
        "a ControlNet alone, without a base model": (CONTROL,),
        "a VAE alone": (VAE,),
        "a text encoder alone": (TEXT,),
    }  # fmt: skip
    for kind, words in kinds.items():
        if has(*words):
            return kind
    example = min(state, default="nothing")
    return f"no Stable Diffusion UNet in it (keys like {UNET}input_blocks.0.0.weight), but {example} and others"


# ---------------------------------------------------------------------------------------------------- filling a model
def load_component(path: str | Path, module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Load a component's tensors, as float32, into `module` on the meta device; `path` is named in messages.

    Raises CheckpointError, in one line, for missing weights and for weights of another shape.
    """
    own = module.state_dict()
    if isinstance(module, CLIPTextModel):
        state = clip_spelling(state)
    missing = sorted(own.keys() - state.keys())
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(own)} weights under {prefix} missing, as {missing[0]}")
    _check_shapes(path, own, state, prefix)
    module.load_state_dict({k: state[k].float().clone() for k in own}, assign=True)


def load_trained(path: str | Path, model: nn.Module, trained: dict[str, Tensor]) -> None:
    """Copy into the model every tensor of `trained` whose name the model has; tensors of other names are left out."""
    _check_shapes(path, model.state_dict(), trained)
    model.load_state_dict(trained, strict=False)


def _check_shapes(path: str | Path, own: dict[str, Tensor], state: dict[str, Tensor], prefix: str = "") -> None:
    for k in sorted(own.keys() & state.keys()):
        if own[k].shape != state[k].shape:
            raise CheckpointError(f"{path}: {prefix}{k} is {list(state[k].shape)}, should be {list(own[k].shape)}")


def missing_weights(state: dict[str, Tensor], config: ModelConfig, whole: bool = False) -> list[str]:
    """A line for each component of which weights are missing or have another shape than `config` says.

    A component that is missing altogether counts only with `whole`, a missing ControlNet never.
    """
    control = strip_prefix(state, CONTROL)
    hint_channels = control["input_hint_block.0.weight"].shape[1] if "input_hint_block.0.weight" in control else 3
    with torch.device("meta"):
        expected, lines = ControlLDM(config, hint_channels).state_dict(), []
    for name, prefix in COMPONENTS.items():
        own, wanted = strip_prefix(state, prefix), strip_prefix(expected, prefix)
        own, wanted = (clip_spelling(own), clip_spelling(wanted)) if prefix == TEXT else (own, wanted)
        lacking = [k for k, v in wanted.items() if k not in own or own[k].shape != v.shape]
        if lacking and (own or (whole and prefix != CONTROL)):
            lines.append(
                f"{len(lacking)} of {len(wanted)} tensors of the {name} (or in another shape), as {lacking[0]}"
            )
    return lines
