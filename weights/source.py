"""Which model is this? A whole model put together from the files that each hold a piece of it.

A `ModelSource` names the pieces: a base model (original file or diffusers folder) or the folder of a training run, and
optionally a ControlNet, a VAE, and what no file can tell. The pieces are laid over one another, later ones on top:

    base  <-  the UNet's moving average (ema)  <-  ControlNet  <-  VAE  <-  what a run trained

`load_model` builds a `ControlLDM` from these tensors, `read_model` returns them with the model's configuration, for
tools that work on tensors. The configuration comes from the file's metadata where this project wrote the file, and
otherwise from the shapes of the UNet (`detect_model`). Keys are original ones everywhere; see `weights.spelling`.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_names import clip_spelling
from clip_text import CLIPTextModel
from controlnet import ControlNet
from layers import Addition
from ldm import SD21, SD21_V, ControlLDM, ModelConfig
from weights.configs import (
    CheckpointError,
    check_network,
    is_run,
    metadata_config,
    network_settings,
    pipeline_settings,
    scheduler_settings,
)
from weights.control_depth import check_control_depth, depth_from_text
from weights.detect import (
    detect_model,
    distilled,
    family_of,
    hint_channels_of,
    hint_widths_of,
    measured_prediction,
    pools_globally,
)
from weights.kinds import describe, refuse_other_kinds, refuse_unknown
from weights.reading import load_metadata, load_state_dict
from weights.runs import load_run, newest_checkpoint
from weights.spelling import COMPONENTS, CONTROL, DIFFERENCE, TEXT, TEXT_1, TEXT_2, UNET, VAE, text_prefixes

CLIP_TEXT = (TEXT, TEXT_1)  # the text encoders that are CLIPTextModels
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
    control_depth: str = ""  # how much of its transformers a new ControlNet keeps: see `control_depth.depth_from_text`
    hint_channels: int | None = None  # channels of the hint: of a new ControlNet (None: 3), checked of a loaded one
    seed: int = 0  # of the initial weights of a new ControlNet's hint encoder


def load_model(
    source: ModelSource | str | Path, unet_dtype: torch.dtype = torch.float32,
    control_dtype: torch.dtype = torch.float32, text_dtype: torch.dtype = torch.float32,
    in_full: Callable[[ControlLDM], Collection[str]] = lambda model: (),
) -> ControlLDM:  # fmt: skip
    """Build the model that `source` names: float32, on the CPU, in evaluation mode, requiring no gradients.

    `control_model` is None if the source has no ControlNet and does not ask to attach one. `unet_dtype`,
    `control_dtype`, `text_dtype`: of these networks, of which SDXL's have 10, 5 and 3 GB in float32; tensor by tensor
    is read and rounded, so the float32 model is never in memory. A new ControlNet is a copy of the weights that are not
    rounded. `in_full`: names the parameters of the UNet (of a model without content) that stay float32. Raises
    CheckpointError.
    """
    source = _with_run_settings(source)
    base, (trained, saved) = _read_base(source), _read_trained(source)
    whole = _overlay(base, trained)
    config = _read_config(source, whole, saved)
    control = strip_prefix(whole, CONTROL)
    hint_channels = _hint_channels(source, control) if control else None
    with torch.device("meta"):
        model = ControlLDM(config, hint_channels)
    full = {name.removeprefix(UNET) for name in in_full(model) if name.startswith(UNET)}
    networks = [(UNET, model.unet, unet_dtype), (VAE, model.vae, torch.float32)]
    prefixes = text_prefixes(config)
    networks += [(prefix, net, text_dtype) for prefix, net in zip(prefixes, model.text_encoders, strict=True)]
    for prefix, module, dtype in networks:
        load_component(_origin(source, prefix), module, strip_prefix(base, prefix), prefix, source.seed, dtype, full)
    if control:
        path = _origin(source, CONTROL)
        load_component(path, model.control_model, control, CONTROL, source.seed, control_dtype)
    elif source.attach:
        model.control_model = ControlNet.from_unet(
            model.unet, source.hint_channels or 3, config.hint_widths, source.seed, config.hint_gain,
            config.control_depth, strip_prefix(base, UNET), control_dtype,
        )  # fmt: skip
    load_trained(source.path, model, trained)
    if control and is_run(source.path):
        model.control_model.only_mid_control = load_run(source.path).get("only_mid_control", False)
    return model.requires_grad_(False).eval()


def read_model(source: ModelSource | str | Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """All tensors of the model that `source` names, under original keys, and the model's configuration."""
    source = _with_run_settings(source)
    base, (trained, saved) = _read_base(source), _read_trained(source)
    whole = _overlay(base, trained)
    config = _read_config(source, whole, saved)
    check_networks(base, config, lambda prefix: _origin(source, prefix))
    return whole, config


def unet_weights(source: ModelSource | str | Path) -> dict[str, Tensor]:
    """The weights of the base's UNet (keys without prefix) as the files have them: mapped, and not rounded."""
    return strip_prefix(_read_base(_with_run_settings(source)), UNET)


def merge_sources(source: ModelSource | str | Path) -> dict[str, Tensor]:
    """All tensors of the model that `source` names, under original keys. Of a run's settings only the base counts."""
    source = _as_source(source)
    return _overlay(_read_base(source), _read_trained(source)[0])


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


def _origin(source: ModelSource, prefix: str) -> Path:
    """The file or folder that the component with this prefix comes from; for messages."""
    if prefix == CONTROL and is_run(source.path):
        return Path(source.path)
    if own := {CONTROL: source.control, VAE: source.vae}.get(prefix):
        return Path(own)
    path = _base_path(source)
    folders = {UNET: "unet", CONTROL: "controlnet", VAE: "vae", TEXT_2: "text_encoder_2"}
    folder = path / folders.get(prefix, "text_encoder")
    return folder if (path / "model_index.json").exists() and folder.is_dir() else path


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
    refuse_other_kinds(path, state)
    if source.control:
        control = read_component(source.control, CONTROL)
        state = _overlay(state, whole_control(source.control, control, path, state))
    if source.vae:
        vae = read_component(source.vae, VAE)
        misfits = [k for k, v in vae.items() if k in state and state[k].shape != v.shape]
        if misfits:
            raise CheckpointError(f"{source.vae}: a VAE of another shape than that of {path} ({misfits[0]})")
        if lacking := [k for k in state if k.startswith(VAE_KEYS) and k not in vae]:
            raise CheckpointError(f"{source.vae}: lacks {lacking[0]} of a VAE ({len(lacking)} weights missing)")
        state |= vae
    return state


def _overlay(base: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """`base` with the tensors of `other` in place of its own. A ControlNet takes the place of another one as a whole:
    what a smaller one lacks must not stay there."""
    if any(k.startswith(CONTROL) for k in other):
        base = {k: v for k, v in base.items() if not k.startswith(CONTROL)}
    return base | other


def _read_trained(source: ModelSource) -> tuple[dict[str, Tensor], ModelConfig | None]:
    """The tensors that a run trained, from its newest checkpoint, and the configuration that is saved with them.

    Nothing if the source is not a run.
    """
    if not is_run(source.path):
        return {}, None
    folder = newest_checkpoint(source.path)
    trained = load_state_dict(folder / "trained.safetensors")
    if source.use_run_ema and (folder / "average.safetensors").exists():
        trained |= load_state_dict(folder / "average.safetensors")
    file = folder / "trained.safetensors"
    return trained, metadata_config(file, load_metadata(file).get("config", ""))


def read_component(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """The ControlNet (prefix CONTROL, with the mark of a difference) or the VAE (prefix VAE) of a file or folder.

    Raises CheckpointError if the file has no such component, or one of another kind.
    """
    state = load_state_dict(path)
    refuse_other_kinds(path, state)
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
    kinds = family_of(control, CONTROL), family_of(state)
    if misfits or not (copies or DIFFERENCE in control) or (all(kinds) and kinds[0] != kinds[1]):
        example = (misfits or list(control))[0]
        names = [kind or "unknown" for kind in kinds]
        which = "" if kinds[0] == kinds[1] else f": the ControlNet is {names[0]}, the base {names[1]}"
        raise CheckpointError(f"{path}: a ControlNet of another kind of model than {base}{which} ({example})")


def whole_control(
    path: str | Path, control: dict[str, Tensor], base: str | Path, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The ControlNet `control` from `path`, or, where it holds differences, their sum with the UNet in `state`.

    A weight that is missing among differences is equal to the UNet's. Raises CheckpointError if the ControlNet belongs
    to another kind of model than `base`, from which `state` comes.
    """
    check_matches_unet(path, control, base, state)
    encoder = tuple(UNET + name for name in ("input_blocks.", "middle_block.", "time_embed.", "label_emb."))
    copies = {CONTROL + k.removeprefix(UNET): v for k, v in state.items() if k.startswith(encoder)}
    if DIFFERENCE in control:
        control = copies | add_unet_weights({k: v for k, v in control.items() if k != DIFFERENCE}, state)
    return control


def add_unet_weights(control: dict[str, Tensor], state: dict[str, Tensor], sign: int = 1) -> dict[str, Tensor]:
    """`control` plus (with sign -1: minus) the UNet's weights in `state`, wherever a weight is a copy of the UNet's.

    The shapes must match (see `check_matches_unet`).
    """
    return {
        k: (v.float() + sign * state[unet_key(k)].float()).to(v.dtype) if unet_key(k) in state else v
        for k, v in control.items()
    }


def _hint_channels(source: ModelSource, control: dict[str, Tensor]) -> int:
    """The channels of the hint that a ControlNet takes; CheckpointError if the source asks for another number."""
    path = _origin(source, CONTROL)
    channels = hint_channels_of(control, path)
    if source.hint_channels not in (None, channels):
        raise CheckpointError(f"{path}: its ControlNet takes hints of {channels} channels, not {source.hint_channels}")
    return channels


# ------------------------------------------------------------------------------------------------- which model is this
def _read_config(source: ModelSource, state: dict[str, Tensor], saved: ModelConfig | None) -> ModelConfig:
    """The configuration of the model with the tensors `state`. `saved`: what the checkpoint of a run says."""
    path = _base_path(source)
    if saved and source.prediction == "auto" and source.base in ("", load_run(source.path)["base"]):
        source = dataclasses.replace(source, prediction=saved.prediction)
    config = apply_overrides(path, state, source)
    control = strip_prefix(state, CONTROL)
    if control:
        config = dataclasses.replace(
            config,
            hint_widths=hint_widths_of(control, _origin(source, CONTROL)),
            global_pool=saved.global_pool
            if saved
            else not is_run(source.path) and pools_globally(_origin(source, CONTROL)),
        )
        check_control_depth(_origin(source, CONTROL), config, source.control_depth)
    else:
        asked = depth_from_text(source.control_depth, config.unet)
        config = dataclasses.replace(config, global_pool=False, control_depth=asked)
    parts = (UNET, VAE, *text_prefixes(config)) + ((CONTROL,) if control else ())
    for kind, prefix in COMPONENTS.items():
        if prefix in parts and _origin(source, prefix) != Path(source.path):
            check_network(_origin(source, prefix), kind, config)
    return config


def apply_overrides(path: Path, state: dict[str, Tensor], source: ModelSource) -> ModelConfig:
    """The model's configuration, with what weights cannot tell as `source` says, or as the diffusers folder `path`."""
    config, scheduler = detect_model(path, state), scheduler_settings(path)
    if scale := network_settings(path / "vae", "VAE").get("scaling_factor"):
        scheduler["scale_factor"] = scale
    scheduler |= pipeline_settings(path)
    said = source.prediction if source.prediction != "auto" else scheduler.get("prediction", "")
    by_weights = not metadata_config(path, load_metadata(path).get("config", ""))
    if by_weights and config.name in (SD21.name, SD21_V.name):
        measured = measured_prediction(state)
        if not said and not measured:
            print(
                f"{path}: an SD 2.x model, taken for the one at 512 px, which predicts eps; for the one at 768 px "
                "(v-prediction) say --prediction v"
            )
        elif not said:
            print(f"{path}: an SD 2.x model that predicts {measured}, to judge by its weights; else say --prediction")
        elif measured and measured != said:
            print(f"{path}: to judge by its weights, this model predicts {measured}, and not {said} as was said")
    if said and config in (SD21, SD21_V) and (by_weights or said == "v"):
        config = SD21_V if said == "v" else SD21
    config = dataclasses.replace(config, **scheduler | ({"prediction": said} if said else {}))
    if by_weights and config.text2 and (word := distilled(path)):
        print(f"{path}: a model for few steps without guidance, to judge by `{word}` in its name; read as its base is")
    clip_skip = source.clip_skip or 1
    if config.text2 and clip_skip in (1, 2):
        clip_skip = 1  # the layer before the last is what this model reads anyway
    layers = config.text.layers - (clip_skip - 1)
    if config.text2 and clip_skip > 1:
        raise CheckpointError(f"--clip-skip is {clip_skip}; SDXL reads the layer before the last, which is clip-skip 2")
    if clip_skip < 1 or layers <= config.text.penultimate:
        raise CheckpointError(f"--clip-skip is {clip_skip}; this text encoder has {config.text.layers} layers")
    zero_terminal_snr = source.zero_terminal_snr or config.zero_terminal_snr
    if zero_terminal_snr and config.prediction != "v":
        asked = (
            "--zero-terminal-snr" if source.zero_terminal_snr else "the schedule with zero terminal SNR of this model"
        )
        raise CheckpointError(f"{path}: predicts eps, which says nothing at zero SNR; {asked} is for v-prediction")
    text = dataclasses.replace(config.text, layers=layers)
    return dataclasses.replace(config, text=text, zero_terminal_snr=zero_terminal_snr)


# ---------------------------------------------------------------------------------------------------- filling a model
def load_component(
    path: str | Path, module: nn.Module, state: dict[str, Tensor], prefix: str, seed: int = 0,
    dtype: torch.dtype = torch.float32, full: Collection[str] = (),
) -> None:  # fmt: skip
    """Load a component's tensors, as `dtype` (those named in `full` as float32), into `module` on the meta device;
    `path` is named in messages.

    An `Addition` whose weights the file lacks is initialised from `seed`. Raises CheckpointError, in one line, for
    other missing weights and for weights of another shape.
    """
    own = module.state_dict()
    if not state:
        name = next(name for name, known in COMPONENTS.items() if known == prefix)
        way_out = "; --vae FILE gives one" if prefix == VAE else "; a whole model is needed here"
        raise CheckpointError(f"{path}: has no {name}{way_out}")
    if isinstance(module, CLIPTextModel):
        state = _clip_spelling(path, state)
    new = _new_additions(module, state, seed)
    state = new | state
    refuse_unknown(path, prefix, state.keys() - own.keys(), state)
    _check_none_missing(path, state, own, prefix)
    _check_shapes(path, own, state, prefix)
    kept_as = lambda name: torch.float32 if name in full or name in new else dtype
    module.load_state_dict({k: state[k].to(kept_as(k), copy=True) for k in own}, assign=True)


def _new_additions(module: nn.Module, state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The initial weights of the Additions in `module` that have none in `state`."""
    weights = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, child in module.named_modules():
            keys = [f"{name}.{key}" for key in child.state_dict()] if isinstance(child, Addition) else []
            if any(key not in state for key in keys):
                child.to_empty(device="cpu").reset_parameters()
                weights |= dict(zip(keys, child.state_dict().values(), strict=True))
    return weights


def _clip_spelling(path: str | Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return clip_spelling(state)
    except (KeyError, ValueError, RuntimeError) as e:  # a key or a shape that OpenCLIP's text encoders do not have
        raise CheckpointError(f"{path}: a text encoder of an unknown kind ({' '.join(str(e).split())[:200]})") from e


def load_trained(path: str | Path, model: nn.Module, trained: dict[str, Tensor]) -> None:
    """Copy the tensors that a run trained into the model. CheckpointError names one that the model does not have: a
    modified model trained it, and without it another picture would come out."""
    own = model.state_dict()
    if strange := sorted(trained.keys() - own.keys()):
        raise CheckpointError(
            f"{path}: {len(strange)} trained tensors have no place in this model, as {strange[0]}; the run was trained "
            "with modules that this code does not have"
        )
    _check_shapes(path, own, trained)
    model.load_state_dict(trained, strict=False)


def _check_none_missing(path: str | Path, state: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str) -> None:
    if missing := sorted(wanted.keys() - state.keys()):
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(wanted)} weights under {prefix} missing, as {missing[0]}"
        )


def _check_shapes(path: str | Path, own: dict[str, Tensor], state: dict[str, Tensor], prefix: str = "") -> None:
    for k in sorted(own.keys() & state.keys()):
        if own[k].shape != state[k].shape:
            raise CheckpointError(f"{path}: {prefix}{k} is {list(state[k].shape)}, should be {list(own[k].shape)}")


@functools.lru_cache(maxsize=4)
def expected_weights(config: ModelConfig, hint_channels: int = 3) -> dict[str, Tensor]:
    """The tensors, on the meta device, of a whole model with a ControlNet."""
    with torch.device("meta"):
        return ControlLDM(config, hint_channels).state_dict()


def check_networks(state: dict[str, Tensor], config: ModelConfig, origin: Callable[[str], str | Path]) -> None:
    """Raise CheckpointError if a network in `state` has tensors that this project does not know and that may change its
    results, or if the ControlNet in it is not whole. `origin`: prefix of a network -> its file or folder."""
    for prefix in COMPONENTS.values():
        own, known = strip_prefix(state, prefix), strip_prefix(expected_weights(config), prefix)
        own, known = (_clip_spelling(origin(prefix), d) if prefix in CLIP_TEXT else d for d in (own, known))
        refuse_unknown(origin(prefix), prefix, own.keys() - known.keys(), own)
        if own and prefix == CONTROL:
            _check_none_missing(origin(prefix), own, known, prefix)


def missing_weights(path: str | Path, state: dict[str, Tensor], config: ModelConfig, whole: bool = False) -> list[str]:
    """A line for each component of which weights are missing or have another shape than `config` says.

    `path`: where `state` comes from. A component that is missing altogether counts only with `whole`, a missing
    ControlNet never.
    """
    control = strip_prefix(state, CONTROL)
    hint_channels = hint_channels_of(control, path) if "input_hint_block.0.weight" in control else 3
    lines = []
    for name, prefix in COMPONENTS.items():
        own, wanted = strip_prefix(state, prefix), strip_prefix(expected_weights(config, hint_channels), prefix)
        own, wanted = (_clip_spelling(path, own), clip_spelling(wanted)) if prefix in CLIP_TEXT else (own, wanted)
        lacking = [k for k, v in wanted.items() if k not in own or own[k].shape != v.shape]
        if lacking and (own or (whole and prefix != CONTROL)):
            way_out = "; --vae FILE gives one" if whole and prefix == VAE and not own else ""
            lines.append(
                f"{len(lacking)} of {len(wanted)} tensors of the {name} (or in another shape), as {lacking[0]}{way_out}"
            )
    return lines
