"""From a drawing that a browser asks for to pictures: the same that `sampler.py` draws with the same settings.

While a picture forms, the estimate of the clean latents that each step implies (`SolverStep.x0`) is decoded now and
then, so that one sees what is coming. Decoding takes time that the picture waits for: at most a fifth of the whole.
"""

import base64
import dataclasses
import io
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
from config import default_device
from drawing.draw import encode, make_y
from flag_types import flag_words
from playground.hints import read_hint
from playground.jobs import Event
from playground.model import LoadedModel
from playground.request import ControlChoice, Drawing
from sampler import Control, Sampling, SolverStep, sample
from training.console import shell_line
from training.images import MODES
from training.records import to_uint8
from weights.runs import is_run

PREVIEW_SIDE = 384  # pixels of the longer side of a picture that forms
PREVIEW_SHARE = 0.2  # of the time that goes into such pictures
Show = Callable[[Event], None]


@dataclass(frozen=True)
class Order:
    """A drawing with its hints decoded: (H,W,C) uint8, one for each of its controls."""

    drawing: Drawing
    hints: tuple[np.ndarray, ...]


def prepare(loaded: LoadedModel, drawing: Drawing) -> Order:
    """Decode the hints of a drawing. RequestError for a hint that cannot be used."""
    hints = []
    for choice in drawing.controls:
        offered = loaded.controls[choice.net]
        reading = dataclasses.replace(offered.reading, scale=0.0) if offered.drawable else offered.reading
        hints.append(read_hint(choice.hint, reading, offered.resample, drawing.size))
    return Order(drawing, tuple(hints))


def plan(drawing: Drawing) -> list[tuple[int, float | None]]:
    """The pictures of a drawing: (number of the picture, strength); None stands for the controls' own strengths."""
    return [(i, strength) for i in range(drawing.num) for strength in drawing.strengths or (None,)]


def strengths_of(drawing: Drawing, strength: float | None) -> list[float]:
    """The strength of each control where `strength` is compared: of one control it is its strength, of several it
    multiplies theirs."""
    own = [control.strength for control in drawing.controls]
    if strength is None:
        return own
    return [strength] if len(own) == 1 else [strength * s for s in own]


@torch.no_grad()
def draw(loaded: LoadedModel, order: Order, show: Show) -> None:
    """Draw all pictures of an order, and show each step and each picture. What `show` raises ends the drawing."""
    model, drawing = loaded.model, order.drawing
    context, negative, *pooled = encode(model, drawing.prompt, drawing.negative)
    vectors = make_y(model, pooled, drawing.size)
    settings = Sampling(
        drawing.steps, drawing.solver, scale=drawing.scale, seed=drawing.seed, spacing=drawing.spacing
    )  # fmt: skip
    hints = [data.to_tensor(hint.astype(np.float32) / 255)[None].to(model.device) for hint in order.hints]
    pictures = plan(drawing)
    progress = Progress(loaded, drawing.steps, len(pictures), show)
    for i, (number, strength) in enumerate(pictures):
        progress.begin(i)
        strengths = strengths_of(drawing, strength)
        controls = [
            Control(loaded.controls[choice.net].net, hint, strengths[k], choice.start, choice.end, choice.guess_mode)
            for k, (choice, hint) in enumerate(zip(drawing.controls, hints, strict=True))
        ]
        latents = sample(
            model, context, negative, controls, drawing.size, settings, number, on_step=progress.step, **vectors
        )
        (image,) = to_uint8(model.decode(latents))
        show(
            {
                "event": "picture",
                "picture": i,
                "label": label(drawing, number, strength),
                "image": data_uri(image, "PNG"),
                "command": command_line(loaded, drawing, number, strengths),
            }
        )


class Progress:
    """Tells how far a drawing is, how long it will take, and what the picture looks like so far."""

    def __init__(self, loaded: LoadedModel, steps: int, pictures: int, show: Show):
        self.loaded, self.steps, self.pictures, self.show = loaded, steps, pictures, show
        self.picture = self.done = 0
        self.started = time.monotonic()
        self.previewed, self.cost = self.started, 0.0  # when the last preview was made, and the seconds it took

    def begin(self, picture: int) -> None:
        """Picture number `picture` begins."""
        self.picture, self.done = picture, 0

    def step(self, step: SolverStep) -> None:
        """A step of the solver is computed."""
        self.done += 1
        made = self.picture * self.steps + self.done
        event: Event = {
            "event": "step",
            "picture": self.picture,
            "pictures": self.pictures,
            "step": self.done,
            "steps": self.steps,
            "seconds": round((time.monotonic() - self.started) / made * (self.steps * self.pictures - made), 1),
        }
        if self.done < self.steps and (preview := self.preview(step.x0)):
            event["preview"] = preview
        self.show(event)

    def preview(self, x0: Tensor) -> str:
        """The picture that forms as a data URI, or nothing if decoding it would take too large a part of the time."""
        began = time.monotonic()
        if self.cost and began - self.previewed < self.cost * (1 / PREVIEW_SHARE - 1):
            return ""
        (image,) = to_uint8(self.loaded.model.decode(x0))
        uri = data_uri(image, "JPEG", PREVIEW_SIDE)
        self.previewed = time.monotonic()
        self.cost = self.previewed - began
        return uri


def label(drawing: Drawing, number: int, strength: float | None) -> str:
    """What tells a picture from the others of its drawing."""
    words = []
    if strength is not None:
        several = len(drawing.controls) > 1
        words.append(
            "without control" if strength == 0 else f"{'all strengths x' if several else 'strength'} {strength:g}"
        )
    if drawing.num > 1:
        words.append(f"picture {number}")
    return ", ".join(words)


def data_uri(image: np.ndarray, form: str, side: int = 0) -> str:
    """A picture (H,W,3) uint8 as a data URI; with `side` made smaller, if its longer side has more pixels."""
    stream, picture = io.BytesIO(), Image.fromarray(image)
    if side:
        picture.thumbnail((side, side))
    picture.save(stream, form)
    return f"data:image/{form.lower()};base64," + base64.b64encode(stream.getvalue()).decode()


def command_line(loaded: LoadedModel, drawing: Drawing, number: int, strengths: list[float]) -> str:
    """The command that draws picture `number` of a drawing again, from the hints as hint.png, hint-2.png, ..."""
    choices = loaded.choices
    words = ["python", "sampler.py", *flag("model", choices.model), *flag("base", choices.base)]
    words += [*flag("vae", choices.vae), *flag("precision", choices.precision, unless="fp32")]
    words += flag("device", choices.device, unless=default_device())
    words += [*flag("prompt", drawing.prompt, unless=None), *flag("negative-prompt", drawing.negative)]
    words += [*flag("seed", drawing.seed), *flag("steps", drawing.steps), *flag("solver", drawing.solver)]
    words += [*flag("scale", drawing.scale, unless=None), "--num", "1", *flag("first", number, unless=0)]
    words += flag("spacing", drawing.spacing, unless="auto")
    words += flag("resolution", "x".join(map(str, drawing.size)))
    own = choices.model if len(drawing.controls) == 1 or is_run(choices.model) else ""
    for i, choice in enumerate(drawing.controls):
        words += control_flags(loaded, choice, i, strengths[i], own if i == 0 else "")
    return shell_line(words)


def control_flags(loaded: LoadedModel, choice: ControlChoice, place: int, strength: float, own: str) -> list[str]:
    """The flags for the ControlNet at a `place` of a drawing. `own`: the ControlNet that needs no --control."""
    offered = loaded.controls[choice.net]
    ending = ".png" if offered.net.hint_channels in MODES else ".npy"
    words = flag("control", offered.path, unless=own)
    words += flag("hint", ("hint" if place == 0 else f"hint-{place + 1}") + ending)
    words += ["--hint-scale", "0"] if offered.drawable and offered.reading.scale else []
    words += flag("strength", strength, unless=None)
    words += [*flag("control-start", choice.start, unless=0.0), *flag("control-end", choice.end, unless=1.0)]
    return words + ["--guess-mode"] * choice.guess_mode


def flag(name: str, value: object, unless: object = "") -> list[str]:
    """A flag and its value as words of a command line; nothing where the value is `unless`, its default."""
    return [] if value == unless else flag_words(f"--{name}", str(value))
