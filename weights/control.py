"""A ControlNet alone, for a base model that is loaded already: the way in which several steer one picture.

`load_model` puts one ControlNet into a model. Each further one is read here from a file, a diffusers folder or the
folder of a training run, checked against the shapes of the model's UNet, and handed to `sampler.Control`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from controlnet import ControlNet
from ldm import ControlLDM, ModelConfig
from weights.configs import CheckpointError, check_network, is_run, metadata_config
from weights.control_depth import check_depth, with_control_depth
from weights.detect import hint_channels_of, hint_widths_of, pools_globally
from weights.reading import load_metadata, load_state_dict
from weights.runs import load_run, newest_checkpoint
from weights.source import load_component, read_component, strip_prefix, whole_control
from weights.spelling import CONTROL, UNET


def load_controls(paths: Sequence[str | Path], model: ControlLDM, base: str | Path = "") -> list[ControlNet]:
    """`load_control` of each path."""
    return [load_control(path, model, base) for path in paths]


def load_control(path: str | Path, model: ControlLDM, base: str | Path = "") -> ControlNet:
    """The ControlNet of a file, a diffusers folder or a run's newest checkpoint, as one that steers `model`.

    Returns it in float32, on the CPU, in evaluation mode, requiring no gradients; `model` stays as it is. Differences
    to a UNet are added to that of `model`. `base`: where `model` comes from, for messages. Raises CheckpointError for a
    ControlNet of another kind of model.
    """
    control, saved = read_control(path)
    base = base or f"the model {model.config.name}"
    unet = {UNET + k: v.detach().cpu() for k, v in model.unet.state_dict().items()}
    tensors = strip_prefix(whole_control(path, control, base, unet), CONTROL)
    if not is_run(path):  # whose config.json holds the settings of the training
        check_network(
            folder if (folder := Path(path, "controlnet")).is_dir() else path,
            "ControlNet",
            with_control_depth(model.config, tensors),
        )
    channels, widths = hint_channels_of(tensors, path), hint_widths_of(tensors, path)
    config = with_control_depth(model.config, tensors)
    if config.control_depth:
        check_depth(str(path), config.control_depth, config.unet)
    with torch.device("meta"):
        net = ControlNet(config.control_unet, channels, widths)
    load_component(path, net, tensors, CONTROL)
    net.global_pool = saved.global_pool if saved else pools_globally(path)
    if is_run(path):
        run = load_run(path)
        net.only_mid_control = run.get("only_mid_control", False)
        _tell_differences(path, saved, model, trained_decoder=not run.get("sd_locked", True))
    return net.requires_grad_(False).eval()


def read_control(path: str | Path) -> tuple[dict[str, Tensor], ModelConfig | None]:
    """The tensors of the ControlNet at `path` under original keys, and of a run, whose moving average counts if it has
    one, the configuration of its model."""
    if not is_run(path):
        return read_component(path, CONTROL), None
    folder = newest_checkpoint(path)
    file, average = folder / "trained.safetensors", folder / "average.safetensors"
    state = load_state_dict(file) | (load_state_dict(average) if average.exists() else {})
    control = {k: v for k, v in state.items() if k.startswith(CONTROL)}
    if not control:
        raise CheckpointError(f"{file}: has no ControlNet")
    return control, metadata_config(file, load_metadata(file).get("config", ""))


def _tell_differences(path: str | Path, saved: ModelConfig | None, model: ControlLDM, trained_decoder: bool) -> None:
    """Print what of a run's result its ControlNet alone does not bring along."""
    if trained_decoder:
        print(f"{path}: trained the UNet's decoder too, which does not come along with its ControlNet")
    if saved and saved.prediction != model.config.prediction:
        predictions = f"predicts {saved.prediction}; this one predicts {model.config.prediction}"
        print(f"{path}: was trained on a model that {predictions}")
