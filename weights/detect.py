"""Which model is this? What the tensors of a file, its metadata and the settings beside it say of the model.

A file that this project wrote has the model's configuration in its metadata. Of other files the shapes of the UNet tell
the family, SD 1.x, SD 2.x or SDXL. Whether an SD 2.x model predicts eps or v, a statistic of its weights tells; of an
SDXL model, a tensor `v_pred` that is there for this purpose, or Stability's metadata (`modelspec.*`).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm import SD15, SD21, SD21_V, SDXL, ModelConfig
from weights.configs import CheckpointError, metadata_config, network_settings
from weights.control_depth import with_control_depth
from weights.kinds import describe, refuse_other_kinds
from weights.reading import load_metadata
from weights.spelling import CONTROL, DIFFERENCE, UNET


def detect_model(path: str | Path, state: dict[str, Tensor], prefix: str = UNET) -> ModelConfig:
    """The configuration of the model in a file: from the file's metadata, otherwise from the weights in `state`.

    The metadata has the key `config` if this project wrote the file. `prefix`: see `model_of_weights`.
    """
    config = metadata_config(path, load_metadata(path).get("config", "")) or model_of_weights(path, state, prefix)
    control = {k.removeprefix(CONTROL): v for k, v in state.items() if k.startswith(CONTROL)}
    return with_control_depth(config, control) if control and DIFFERENCE not in state else config


def model_of_weights(path: str | Path, state: dict[str, Tensor], prefix: str = UNET) -> ModelConfig:
    """The known model with the weights `state`, which come from `path`.

    `prefix` CONTROL looks at the shapes of a ControlNet instead of the UNet's. Raises CheckpointError that says what
    the file holds instead of a known model.
    """
    if prefix + "input_blocks.0.0.weight" not in state:
        raise CheckpointError(
            f"{path}: {describe(state)}; a Stable Diffusion 1.x or 2.x model or an SDXL base is needed here"
        )
    first = convolution(path, state, prefix + "input_blocks.0.0.weight")
    family = family_of(state, prefix)
    refuse_other_kinds(path, state)
    if family == "SDXL":
        return _sdxl(path, state, prefix)
    width = _prompt_width(state, prefix) or "unknown"
    if first.shape[1] != 4:
        raise CheckpointError(
            f"{path}: a UNet with {first.shape[1]} input channels (inpainting has 9, instruct-pix2pix 8, "
            "depth-to-image 5); models with 4 are supported"
        )
    models = {768: SD15, 1024: SD21_V if measured_prediction(state) == "v" else SD21}
    if width not in models or first.shape[0] != 320:
        raise CheckpointError(
            f"{path}: a UNet of {first.shape[0]} channels with prompts of width {width}; supported are SD 1.x (320 and "
            "768), SD 2.x (320 and 1024), SDXL (320 and 2048), and safetensors files of the models that toy.pretrain "
            "makes"
        )
    return models[width]


# --------------------------------------------------------------------------------------------------------------- SDXL
# Tensors beside the networks that mark other ways of training, and the models that have them.
OTHER_TRAINING = {
    "edm_mean": "Playground 2.5, which was trained with the noise of EDM",
    "edm_std": "Playground 2.5, which was trained with the noise of EDM",
    "edm_vpred.sigma_max": "CosXL, which was trained with the noise of EDM",
    "edm_vpred.sigma_min": "CosXL, which was trained with the noise of EDM",
}
DISTILLED = re.compile(r"(?<![a-z])(turbo|lightning|hyper[-_ ]?sd(?:xl)?|lcm|dmd2?)(?![a-z])")


def family_of(state: Mapping[str, Tensor], prefix: str = UNET) -> str:
    """Which family's UNet (or, with prefix CONTROL, ControlNet) this is: "SDXL", "SD 1.x" or "SD 2.x"; otherwise
    empty."""
    first, width = state.get(prefix + "input_blocks.0.0.weight"), _prompt_width(state, prefix)
    blocks = tuple(f"{prefix}input_blocks.{i}." for i in ("1.1", 9))  # SD has a transformer and a block of this number
    without_attention = first is not None and len(first) == 320 and not any(k.startswith(blocks) for k in state)
    label = state.get(prefix + "label_emb.0.0.weight")
    if label is not None and label.ndim == 2 and width != 1024 or width == 2048 or without_attention and not width:
        return "SDXL"
    return {768: "SD 1.x", 1024: "SD 2.x"}.get(width, "")


def _prompt_width(state: Mapping[str, Tensor], prefix: str) -> int:
    """The width of the prompts that a network reads; 0 if no tensor tells."""
    found = (v for k, v in state.items() if k.startswith(prefix) and k.endswith("attn2.to_k.weight") and v.ndim == 2)
    return next((v.shape[1] for v in found), 0)


def _sdxl(path: str | Path, state: dict[str, Tensor], prefix: str) -> ModelConfig:
    """The configuration of an SDXL base, fine-tuned or not; CheckpointError for its relatives, by name."""
    first, label = state[prefix + "input_blocks.0.0.weight"], state.get(prefix + "label_emb.0.0.weight")
    channels, width = first.shape[1], "no vector y" if label is None else f"a y of {label.shape[-1]} numbers"
    whole = any(k.startswith(prefix + "input_blocks.7.1.transformer_blocks.9.") for k in state)
    relatives = [
        ("the refiner of SDXL", len(first) == 384),
        ("an SDXL inpainting model (9 input channels)", channels == 9),
        ("an SDXL editing model (8 input channels)", channels == 8),
        *((f"{name} ({key})", key in state and prefix == UNET) for key, name in OTHER_TRAINING.items()),
        (f"a network of the SDXL kind with {width}", label is None or tuple(label.shape) != (1280, 2816)),
        (f"a network of the SDXL kind with {len(first)} and {channels} channels", first.shape[:2] != (320, 4)),
        ("a smaller UNet of the SDXL kind (as SSD-1B, Segmind Vega and KOALA are)", prefix == UNET and not whole),
    ]
    if other := next((name for name, fits in relatives if fits), ""):
        raise CheckpointError(f"{path}: {other}; the SDXL base and what was fine-tuned from it are supported")
    predicts_v = "v_pred" in state or load_metadata(path).get("modelspec.prediction_type") == "v"
    prediction = "v" if predicts_v else "eps"
    return dataclasses.replace(SDXL, prediction=prediction, zero_terminal_snr="ztsnr" in state)


def distilled(path: str | Path) -> str:
    """The word in a file's name or metadata that tells of a model distilled to few steps ("turbo"); else empty.

    Its tensors are those of the model that it was made of.
    """
    metadata = load_metadata(path)
    words = [Path(path).name, *(metadata.get(f"modelspec.{k}", "") for k in ("title", "architecture"))]
    return next((match[1] for word in words if (match := DISTILLED.search(word.lower()))), "")


# ----------------------------------------------------------------------------------------------------- what else shows
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
