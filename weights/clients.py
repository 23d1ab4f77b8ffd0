"""What other programs expect of a ControlNet, and what to tell the user of it.

`docs/clients.md` lists the programs, what each reads, and the differences that were measured.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm import MODELS, ModelConfig
from weights.configs import CheckpointError
from weights.control_depth import NAMED, depth_from_text, written
from weights.detect import hint_channels_of
from weights.spelling import CONTROL, DIFFERENCE

FIRST_CONVOLUTION = CONTROL + "input_hint_block.0.weight"


def widen_hint(path: str | Path, control: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The ControlNet `control` (keys `control_model.*`, from `path`) for hints of `channels` channels.

    From 1 channel each of the new ones gets an equal part of the weight: an image whose channels are equal, which other
    programs make of a gray one, gives the numbers of the gray one. Raises CheckpointError for other changes.
    """
    own = hint_channels_of({k.removeprefix(CONTROL): v for k, v in control.items()}, path)
    if own == channels:
        return control
    if own != 1:
        raise CheckpointError(f"{path}: takes hints of {own} channels; --hint-channels widens those of 1 channel alone")
    weight = control[FIRST_CONVOLUTION]
    part = (weight.float() / channels).to(weight.dtype)
    return control | {FIRST_CONVOLUTION: part.expand(-1, channels, -1, -1).contiguous()}


def bare_names(control: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet alone under keys without the prefix `control_model.`."""
    return {k.removeprefix(CONTROL): v for k, v in control.items()}


def notes(out: str, state: dict[str, Tensor], config: ModelConfig | None, folder: bool) -> list[str]:
    """What a user should know of the ControlNet among `state` that goes to the file or folder `out`; a line for each.

    `config`: the model's; None if it is not known. `folder`: `out` is a folder for diffusers.
    """
    if FIRST_CONVOLUTION not in state:
        return []
    channels, alone = state[FIRST_CONVOLUTION].shape[1], all(k.startswith((CONTROL, DIFFERENCE)) for k in state)
    lines = []
    if channels != 3:
        way_out = "; merge.py extract --hint-channels 3 widens it" if channels == 1 else ""
        lines.append(
            f"its ControlNet takes hints of {channels} channel{'s' * (channels > 1)}; the pipelines of diffusers and "
            f"Automatic1111 give it images of 3; to diffusers, pass a tensor (1,{channels},H,W) instead{way_out}"
        )
    if config and config.control_depth:
        lines.append(f"its transformers have {written(config.control_depth)} blocks: {_readers_of_smaller(config)}")
    if config and config.name not in MODELS or config and config.name == "tiny":
        lines.append(f"a model of the size of {config.name} is known to this project and diffusers; others have none")
    elif folder and not alone:
        lines.append(f"InvokeAI imports two folders: the base, exported without --control, and {out}/controlnet")
    elif alone and not folder:
        lines += _about_the_name(out, config)
    if DIFFERENCE in state:
        lines.append(
            "differences work in ComfyUI (the node Load ControlNet Model (diff)) and in the ControlNet extension of "
            "Automatic1111 with SD 1.5; Forge, diffusers' from_single_file and stable-diffusion.cpp run them as "
            "weights, which is wrong"
        )
    return lines


def _readers_of_smaller(config: ModelConfig) -> str:
    """Who reads a ControlNet that is smaller than its UNet's encoder."""
    names = {depth_from_text(name, config.unet): name for name in NAMED} if config.text2 else {}
    if name := names.get(config.control_depth):
        return f"the size that diffusers published as `{name}`; diffusers reads it, and ComfyUI in diffusers' form"
    return "diffusers reads that from a folder (--format diffusers); programs that expect the full copy do not"


def _about_the_name(out: str, config: ModelConfig | None) -> list[str]:
    """How the name of a ControlNet's file should be for the programs that go by it."""
    stem, family = Path(out).stem, "sd21" if config and config.unet.context_dim == 1024 else "sd15"
    family = "sdxl" if config and config.text2 else family
    pooled = bool(config and config.global_pool)
    lines = []
    others = ("sd14", "sd15", "sd16", "sd21", "2.1") if family == "sdxl" else ("xl",)
    if family not in stem.lower() or any(word in stem.lower() for word in others):
        lines.append(
            "Automatic1111's ControlNet extension filters by the file's name: call it "
            f"control_{family}_NAME{'_shuffle' * pooled}.safetensors (canny, xl, shuffle in NAME mean something to it)"
        )
    if family == "sdxl":
        lines.append(
            "ComfyUI and Automatic1111 read this file; diffusers' from_single_file leaves out its embedding of the "
            "sizes (label_emb), so write a folder for diffusers (--format diffusers), whose file kohya's tools read too"
        )
    if family == "sd21":
        lines.append("Automatic1111's extension computes it with 8 heads, which is off by 5%; ComfyUI does not")
    if pooled and not stem.lower().endswith(("_shuffle", "_shuffle_fp16")):
        lines.append(
            "its residuals are averaged over the image; ComfyUI and Automatic1111 do that if the name ends in _shuffle"
        )
    if not pooled and "shuffle" in stem.lower():
        lines.append("other programs average the residuals of a file with `shuffle` in its name; choose another name")
    return lines


def modelspec(config: ModelConfig | None, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of Stability's model specification for a file with the tensors `state`; of SDXL, whose published
    file has such metadata. Fields that a reader of models goes by, no more."""
    if config is None or config.name != "sdxl":
        return {}
    alone = all(k.startswith((CONTROL, DIFFERENCE)) for k in state)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base" + "/controlnet" * alone,
        "modelspec.prediction_type": {"eps": "epsilon", "v": "v"}[config.prediction],
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
    }


def size_in_words(size: int) -> str:
    """A number of bytes as people read it: 5.71 GB, 723 MB, 12 kB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e3:.0f} kB"


def lost_in_pickle(state: dict[str, Tensor], config: ModelConfig, by_weights: ModelConfig | None) -> list[str]:
    """What of a model's configuration a file without metadata does not tell. `by_weights`: the configuration that is
    read from the weights alone, None if it cannot be."""
    if not any(not k.startswith((CONTROL, DIFFERENCE)) for k in state):
        return ["global pooling"] if config.global_pool else []
    if by_weights is None:
        return ["its shape"]
    words = {
        "prediction": f"{config.prediction}-prediction", "text": "clip-skip", "zero_terminal_snr": "zero terminal SNR",
        "global_pool": "global pooling", "scale_factor": "the scale of its latents", "linear_start": "its betas",
        "linear_end": "its betas", "zero_empty_negative": "what an empty negative prompt is",
        "timesteps": "its number of timesteps", "unet": "its shape", "vae": "its shape",
    }  # fmt: skip
    return list(dict.fromkeys(w for k, w in words.items() if getattr(config, k) != getattr(by_weights, k)))
