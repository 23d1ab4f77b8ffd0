"""The model, its ControlNets and how their hints are read, as a `Request` says."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import data
from controlnet import ControlNet
from drawing.request import ControlRequest, Request
from ldm import ControlLDM, compute_dtype_for, use_tf32
from lowvram.process import disable_malloc_trim
from training import images
from training.files import File
from training.images import Reading, Size
from weights import CheckpointError, ModelSource, load_control, load_model
from weights.runs import is_run, load_run


@dataclass(frozen=True)
class LoadedControl:
    """A ControlNet on its device, and how its hints are read."""

    request: ControlRequest
    net: ControlNet
    weights: str  # `weights_digest` of the net
    reading: Reading
    resample: str


@dataclass(frozen=True)
class Loaded:
    """Everything that draws: the model on its device, and the ControlNets of the request, in their order."""

    model: ControlLDM
    weights: str  # `weights_digest` of the model without its ControlNet
    controls: tuple[LoadedControl, ...]


def load(request: Request) -> Loaded:
    """Load what `request` names and move it to its device. Raises CheckpointError.

    The first ControlNet is the model's own, or the one that takes its place in a model that is no run; the others join
    it. A ControlNet that is named twice is loaded once.
    """
    joined = "" if is_run(request.model) or not request.controls else request.controls[0].control
    model = load_model(
        ModelSource(
            request.model, base=request.base, control=joined, vae=request.vae, ema=request.ema,
            prediction=request.prediction, clip_skip=request.clip_skip,
        )
    )  # fmt: skip
    if request.controls and model.control_model is None:
        raise CheckpointError(f"{request.model}: has no ControlNet, so a hint has no effect; --control FILE gives one")
    nets, controls = {}, []
    for number, asked in enumerate(request.controls):
        key = asked.control, asked.only_mid_control
        if key not in nets:
            first = number == 0 and asked.control == joined
            nets[key] = model.control_model if first else load_control(asked.control, model, request.model)
        controls.append(_with_reading(asked, nets[key], request.model))
    digest = weights_digest(model.unet, model.vae, model.text, more=model.config.to_json())
    use_tf32(request.precision != "fp32")
    disable_malloc_trim()
    dtype = compute_dtype_for(request.precision, request.device)
    for module in (model, *nets.values()):
        module.to(request.device, dtype)
    model.vae.to(model.config.vae_dtype(dtype))
    if not model.config.pooled and (request.original_size or any(request.crop)):
        print("--original-size and --crop are for SDXL; this model takes no sizes")
    return Loaded(model, digest, tuple(controls))


def _with_reading(asked: ControlRequest, net: ControlNet, model: str) -> LoadedControl:
    """`net` with the settings of the request, or else of the run in which it was trained."""
    source = asked.control or model
    run = load_run(source) if is_run(source) else {}
    chosen = lambda value, name, default: run.get(name, default) if value is None else value
    if asked.only_mid_control is not None:
        net.only_mid_control = asked.only_mid_control
    resample = chosen(asked.hint_resample, "hint_resample", "area")
    reading = Reading(
        net.hint_channels, chosen(asked.hint_ground, "hint_ground", "auto"),
        chosen(asked.hint_scale, "hint_scale", 0.0), class_numbers=net.hint_channels == 1 and resample == "nearest",
    )  # fmt: skip
    digest = weights_digest(net, more=f"{net.only_mid_control} {net.global_pool}")
    return LoadedControl(asked, net, digest, reading, resample)


def weights_digest(*modules: nn.Module, more: str = "") -> str:
    """10 hex digits that change when the weights change: a digest of 64 values of each tensor, spread evenly over it.

    A digest of all values would take seconds for a model of some GB, at each command. `more` is a part of it, too.
    """
    parts = [more]
    for module in modules:
        for name, tensor in module.state_dict().items():
            flat = tensor.reshape(-1)
            some = flat[:: max(1, len(flat) // 64)].float().cpu()
            parts += [name, tuple(tensor.shape), some.numpy().tobytes()]
    return data.digest(*parts).hex()[:10]


# ----------------------------------------------------------------------------------------------------- hints and init
@dataclass(frozen=True)
class ImageFile:
    """An image that steers pictures, as it is on the disk."""

    path: File
    size: Size  # (width, height) in pixels
    digest: str  # of the file's content

    @classmethod
    def look_at(cls, path: str | File) -> "ImageFile":
        """Size and digest of an image file. Raises DataError."""
        path = Path(path) if isinstance(path, str) else path
        return cls(path, images.size_on_disk(path), data.digest(images.read_bytes(path)).hex()[:10])


@lru_cache(maxsize=8)
def read_hint(file: ImageFile, reading: Reading, resample: str, size: Size) -> Tensor:
    """The hint (C,H,W) in [0,1] in a file, brought to `size` (width, height)."""
    array = data.resize(images.decode(file.path, reading).array, size, images.RESAMPLE[resample])
    return data.to_tensor(array.astype(np.float32) / 255)


@torch.no_grad()
def encode_init(model: ControlLDM, file: ImageFile, size: Size) -> Tensor:
    """The scaled latents (4,h,w) of the picture in a file, brought to `size`: the mean that the VAE's encoder gives.

    What is transparent in the picture is laid on white.
    """
    array = images.decode(file.path, Reading(3, ground="white")).array
    image = data.to_tensor(data.resize(array, size, Image.Resampling.LANCZOS).astype(np.float32) / 127.5 - 1)
    moments = model.encode_images(image[None]).float()
    no_noise = torch.zeros_like(moments[:, : moments.shape[1] // 2])
    return model.sample_latents(moments, no_noise)[0]
