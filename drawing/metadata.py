"""The settings of a picture, as a text in its PNG file.

The text has the form that Automatic1111's web UI writes under the key `parameters` and that many tools show and read:
the prompt, the negative prompt, and one line of settings. What decides about the pixels is in it, digests of weights
and hints too, so two files with equal texts are equal pictures, and a list that was interrupted goes on where it was.
"""

import json
from pathlib import Path

from PIL import Image

from drawing.loading import Loaded, LoadedControl
from drawing.pictures import Picture
from drawing.request import Request
from sampler import usual_spacing

KEY = "parameters"
# What the web UI calls the solvers and the spacings; others keep their names here.
SAMPLERS = {"ddim": "DDIM", "dpm": "DPM++ 2M", "euler": "Euler", "euler_a": "Euler a"}
SCHEDULES = {"leading": "DDIM", "trailing": "SGM Uniform", "linspace": "Uniform", "karras": "Karras"}


def parameters(request: Request, loaded: Loaded, picture: Picture) -> str:
    """The text for one picture of a request."""
    config = loaded.model.config
    spacing = usual_spacing(request.solver, config) if request.spacing == "auto" else request.spacing
    settings = {
        "Steps": request.steps,
        "Sampler": SAMPLERS.get(request.solver, request.solver),
        "Schedule type": SCHEDULES.get(spacing, spacing),
        "CFG scale": _short(config.guidance if request.scale is None else request.scale),
        "Seed": picture.seed,
        "Image number": picture.number or None,
        "Size": "x".join(map(str, picture.size)),
        "Model": _name(request.model),
        "Weights": loaded.weights,
        "VAE": _name(request.vae) if request.vae else None,
        "Clip skip": request.clip_skip,
        "Eta": _short(request.eta) if request.eta and request.solver == "ddim" else None,
        "Denoising strength": _short(request.denoise) if picture.init else None,
        "Init image": f"{picture.init.path.name} [{picture.init.digest}]" if picture.init else None,
        "Precision": request.precision if request.precision != "fp32" else None,
    }
    for i, control in enumerate(loaded.controls):
        settings[f"ControlNet {i}"] = _control(request, control, picture, i)
    settings["Version"] = "minControlNet"
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    # a text chunk has no zero bytes, and UTF-8 no halves of characters (which a path may have)
    text = f"{picture.prompt}{negative}\n{line}".replace("\0", "\\0")
    return text.encode("utf-8", "backslashreplace").decode()


def _control(request: Request, control: LoadedControl, picture: Picture, i: int) -> str:
    """The settings of ControlNet number i, in the form of the web UI's ControlNet extension."""
    asked, reading = control.request, control.reading
    settings = {
        "Module": "none",
        "Model": f"{_name(asked.control or request.model)} [{control.weights}]",
        "Weight": _short(picture.strengths[i]),
        "Resize Mode": "Crop and Resize",
        "Guidance Start": _short(asked.control_start),
        "Guidance End": _short(asked.control_end),
        "Control Mode": "ControlNet is more important" if asked.guess_mode else "Balanced",
        "Hint": f"{picture.hints[i].path.name} [{picture.hints[i].digest}]",
        "Hint Resample": control.resample if control.resample != "area" else None,
        "Hint Ground": reading.ground if reading.ground != "auto" else None,
        "Hint Scale": _short(reading.scale) if reading.scale else None,
        "Only Mid Control": True if control.net.only_mid_control else None,
    }
    return ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)


def _short(number: float) -> str:
    return f"{number:.10g}"


def _name(path: str) -> str:
    """The name of a model: of a file without its ending, of a folder as it is."""
    return Path(path).name if Path(path).is_dir() else Path(path).stem


def _quoted(value: object) -> str:
    """A value as it stands in the line of settings, in quotes where it would end too early."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def read_parameters(path: str | Path) -> str | None:
    """The settings in a PNG file; None if there is no such file, no settings in it, or no whole picture."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(KEY)
            image.load()
    except Exception:  # whatever a damaged file makes Pillow raise: it is no picture of ours
        return None
    return text if isinstance(text, str) else None
