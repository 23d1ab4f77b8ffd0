"""Which model is this? What the tensors of a file, its metadata and the settings beside it say of the model.

A file that this project wrote has the model's configuration in its metadata. Of other files the shapes of the UNet tell
the family, SD 1.x or SD 2.x; whether an SD 2.x model predicts eps or v, a statistic of its weights tells.
"""

from pathlib import Path

from torch import Tensor

from ldm import SD15, SD21, SD21_V, ModelConfig
from weights.configs import CheckpointError, metadata_config, network_settings
from weights.kinds import describe, refuse_other_kinds
from weights.reading import load_metadata
from weights.spelling import UNET


def detect_model(path: str | Path, state: dict[str, Tensor], prefix: str = UNET) -> ModelConfig:
    """The configuration of the model in a file: from the file's metadata, otherwise from the weights in `state`.

    The metadata has the key `config` if this project wrote the file. `prefix`: see `model_of_weights`.
    """
    return metadata_config(path, load_metadata(path).get("config", "")) or model_of_weights(path, state, prefix)


def model_of_weights(path: str | Path, state: dict[str, Tensor], prefix: str = UNET) -> ModelConfig:
    """The known model with the weights `state`, which come from `path`.

    `prefix` CONTROL looks at the shapes of a ControlNet instead of the UNet's. Raises CheckpointError that says what
    the file holds instead of a known model.
    """
    if prefix + "input_blocks.0.0.weight" not in state:
        raise CheckpointError(f"{path}: {describe(state)}; a Stable Diffusion 1.x or 2.x model is needed here")
    first = convolution(path, state, prefix + "input_blocks.0.0.weight")
    attention = state.get(prefix + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if attention is None and len(first) == 320:
        raise CheckpointError(f"{path}: a UNet of the SDXL kind; SD 1.x and SD 2.x are supported")
    refuse_other_kinds(path, state)
    width = attention.shape[1] if attention is not None and attention.ndim == 2 else "unknown"
    if first.shape[1] != 4:
        raise CheckpointError(
            f"{path}: a UNet with {first.shape[1]} input channels (inpainting has 9, instruct-pix2pix 8, "
            "depth-to-image 5); models with 4 are supported"
        )
    models = {768: SD15, 1024: SD21_V if measured_prediction(state) == "v" else SD21}
    if width not in models or first.shape[0] != 320:
        raise CheckpointError(
            f"{path}: a UNet of {first.shape[0]} channels with prompts of width {width}; supported are SD 1.x (320 and "
            "768), SD 2.x (320 and 1024), and safetensors files of the models that toy.pretrain makes"
        )
    return models[width]


def measured_prediction(state: dict[str, Tensor]) -> str:
    """What an SD 2.x UNet predicts, "eps" or "v", by ComfyUI's statistic; empty if the tensor for it is missing."""
    bias = state.get(UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias")
    return "" if bias is None else "v" if bias.float().std(correction=0) > 0.09 else "eps"


def hint_widths_of(control: dict[str, Tensor], path: str | Path) -> tuple[int, ...]:
    """The widths of the hint encoder in a ControlNet's tensors (keys without prefix), which come from `path`."""
    return tuple(convolution(path, control, f"input_hint_block.{i}.weight").shape[0] for i in (0, 4, 8, 12))


def hint_channels_of(control: dict[str, Tensor], path: str | Path) -> int:
    """The channels of the hint that a ControlNet takes (keys without prefix), which comes from `path`."""
    return convolution(path, control, "input_hint_block.0.weight").shape[1]


def convolution(path: str | Path, state: dict[str, Tensor], key: str) -> Tensor:
    """The weight of a convolution with this key; CheckpointError if it is missing or none."""
    if key not in state:
        raise CheckpointError(f"{path}: lacks {key}")
    if state[key].ndim != 4:
        raise CheckpointError(f"{path}: {key} is {list(state[key].shape)}, should have 4 dimensions")
    return state[key]


def pools_globally(path: str | Path) -> bool:
    """Whether the ControlNet of a file or folder averages its residuals over the image (`ControlNet.global_pool`).

    diffusers' folders and this project's files say so. Of other files the name decides, as in other programs.
    """
    path = Path(path, "controlnet") if Path(path, "controlnet").is_dir() else Path(path)
    if "global_pool_conditions" in (settings := network_settings(path, "ControlNet")):
        return settings["global_pool_conditions"]
    metadata = load_metadata(path)
    if config := metadata_config(path, metadata.get("config", "")):
        return config.global_pool
    if "global_pool" in metadata:
        return metadata["global_pool"] == "true"
    named = path.is_file() and "shuffle" in path.stem.lower()
    if named:
        print(f"{path}: has `shuffle` in its name, so its residuals are averaged over the image, as other programs do")
    return named
