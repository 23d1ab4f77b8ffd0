"""What a browser may ask for: a drawing, with every number in its range and every text of bounded length.

Nothing that a request holds is a path or a name of a file. ControlNets are chosen by their place in the list that
`play.py` was started with; hints come as the content of image files (base64). What cannot be is refused with a sentence
for the user (RequestError).
"""

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any

import data
from playground.hints import RequestError
from sampler import SOLVERS, SPACINGS
from training.images import Size

MAX_TEXT = 4000  # characters of a prompt
MOST_CONTROLS, MOST_PICTURES = 4, 16
MOST_PIXELS = 1536 * 1536  # of a picture that is drawn
MAX_SEED = 2**53 - 1  # the largest whole number that JavaScript holds exactly


@dataclass(frozen=True)
class ControlChoice:
    """A ControlNet with its hint."""

    net: int  # its place in the list of ControlNets
    hint: bytes  # the content of an image file
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn. `strengths`: one picture for each of them and of `num`; empty: as the controls say."""

    prompt: str
    size: Size  # (width, height)
    negative: str = ""
    seed: int = 0
    steps: int = 20
    solver: str = "ddim"
    scale: float | None = None  # guidance; None: the model's own
    spacing: str = "auto"
    num: int = 1
    controls: tuple[ControlChoice, ...] = ()
    strengths: tuple[float, ...] = ()


def parse_drawing(fields: Any, multiple: int, nets: int) -> Drawing:
    """The drawing that the JSON of a request asks for, of a model that needs sides divisible by `multiple` and offers
    `nets` ControlNets. Raises RequestError."""
    if not isinstance(fields, dict):
        raise RequestError("The request is no JSON object.")
    listed = fields.get("controls", [])
    if not isinstance(listed, list) or len(listed) > MOST_CONTROLS:
        raise RequestError(f"At most {MOST_CONTROLS} ControlNets can be used at once.")
    strengths = fields.get("strengths", [])
    if not isinstance(strengths, list) or len(strengths) > MOST_PICTURES:
        raise RequestError(f"At most {MOST_PICTURES} strengths can be compared at once.")
    drawing = Drawing(
        prompt=text(fields, "prompt", "prompt"),
        size=parse_size(fields.get("size"), multiple),
        negative=text(fields, "negative", "negative prompt"),
        seed=whole(fields, "seed", 0, 0, MAX_SEED),
        steps=whole(fields, "steps", 20, 1, 999),
        solver=choice(fields, "solver", tuple(SOLVERS)),
        scale=None if fields.get("scale") is None else number(fields, "scale", 0.0, 0, 100),
        spacing=choice(fields, "spacing", ("auto", *SPACINGS)),
        num=whole(fields, "num", 1, 1, MOST_PICTURES),
        controls=tuple(parse_control(entry, nets) for entry in listed),
        strengths=tuple(number({"strength": value}, "strength", 1.0, -10, 10) for value in strengths),
    )
    if drawing.num * max(1, len(drawing.strengths)) > MOST_PICTURES:
        raise RequestError(f"At most {MOST_PICTURES} pictures can be drawn at once.")
    return drawing


def parse_control(entry: Any, nets: int) -> ControlChoice:
    """One of the ControlNets of a request."""
    if not isinstance(entry, dict):
        raise RequestError("A ControlNet of the request is no JSON object.")
    if not nets:
        raise RequestError("This model has no ControlNet; start the page with --control FILE.")
    start, end = number(entry, "start", 0.0, 0, 1), number(entry, "end", 1.0, 0, 1)
    if start > end:
        raise RequestError("Control should start before it ends.")
    net = whole(entry, "net", 0, 0, nets - 1)
    strength, guess_mode = number(entry, "strength", 1.0, -10, 10), entry.get("guess_mode") is True
    return ControlChoice(net, parse_hint(entry.get("hint")), strength, start, end, guess_mode)


def parse_hint(value: Any) -> bytes:
    """The content of an image file from base64."""
    try:
        content = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError) as e:
        raise RequestError("The hint is not readable (no base64).") from e
    if not content:
        raise RequestError("A ControlNet has no hint; draw one, or leave the ControlNet out.")
    return content


def parse_size(value: Any, multiple: int) -> Size:
    """The size of the pictures: "512" or "512x768", to the nearest sides that the model can compute."""
    try:
        size = data.fit_size(data.parse_resolution(value if isinstance(value, str) else ""), multiple)
    except data.DataError as e:
        raise RequestError("The size should be a number of pixels, or two as in 512x768.") from e
    if size[0] * size[1] > MOST_PIXELS:
        raise RequestError(
            f"Pictures of {size[0]}x{size[1]} are too large; {math.isqrt(MOST_PIXELS)} squared is the most."
        )
    return size


def choice(fields: dict[str, Any], name: str, choices: tuple[str, ...]) -> str:
    """One of `choices`, the first if nothing is chosen."""
    value = fields.get(name, choices[0])
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"The {name} should be one of {', '.join(choices)}.")
    return value


def text(fields: dict[str, Any], name: str, label: str) -> str:
    """A text of a request, "" if it is not there."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise RequestError(f"The {label} should be a text.")
    if len(value) > MAX_TEXT:
        raise RequestError(f"The {label} has {len(value)} characters; {MAX_TEXT} are read at most.")
    return value.encode("utf-8", "replace").decode()  # half a character would not go into a command line


def number(fields: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number of a request within its range."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(f"The value of {name.replace('_', ' ')} should be a number from {low:g} to {high:g}.")
    return float(value)


def whole(fields: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A whole number of a request within its range."""
    value = fields.get(name, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"The value of {name} should be a whole number from {low} to {high}.")
    return value
