"""The files in a run's folder that people look at: metrics, image grids, curves.

`metrics.jsonl` has one JSON object a line; image grids are PNG files with labelled columns; `curves.png` shows the loss
and the control gain (see `training/validation.py`) against the step. An image grid carries a text GRID that says
where its pictures are, for programs that cut them out again (`report/pictures.py`).
"""

import contextlib
import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.images import save_picture
from weights.writing import write_atomically

GRID = "grid"  # the name of the text chunk in an image grid
INK, PAPER, FAINT, BLUE, RED = (30, 30, 30), (255, 255, 255), (225, 225, 225), (31, 105, 190), (200, 50, 40)


# ------------------------------------------------------------------------------------------------------------ images
def to_uint8(images: Tensor) -> list[np.ndarray]:
    """Turn images (B,3,H,W) in [-1,1] into B arrays (H,W,3) uint8."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def hint_image(hint: Tensor) -> np.ndarray:
    """Turn a hint (C,H,W), in [0,1] or of bytes, into a picture (H,W,3) uint8.

    1 channel becomes gray, 2 become red and green, and of more than 3 the first three are shown.
    """
    pixels = hint if hint.dtype == torch.uint8 else (hint.float().clamp(0, 1) * 255).round().byte()
    channels = list(pixels.cpu().numpy()[:3])
    black = np.zeros_like(channels[0])
    return np.stack({1: channels * 3, 2: [*channels, black]}.get(len(channels), channels), axis=-1)


def save_grid(
    path: str | Path, columns: dict[str, Sequence[np.ndarray]], captions: Sequence[str] = (),
    text: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Save a table of pictures as the image file `path`.

    `columns`: label -> pictures (H,W,3) uint8, one a row; the table has room for the largest. `captions`: the text
    under each row, broken to the width of the table. `text`: see `save_picture`. The file is written whole or not at
    all. A PNG file says where the pictures are, in the text GRID: {"size": [W, H], "columns": {label: left edge},
    "rows": [upper edges], "heights": [those of the rows], "captions": [...]}.
    """
    rows = max(len(images) for images in columns.values())
    heights = [max(images[row].shape[0] for images in columns.values() if row < len(images)) for row in range(rows)]
    width = max(image.shape[1] for images in columns.values() for image in images)
    font = ImageFont.load_default(size=max(11, min(22, max(width, 96) // 10)))
    column = max(width, 96, *(math.ceil(font.getlength(label)) for label in columns))  # labels get the room they need
    line, gap = font.size + 5, 6
    sheet_width = len(columns) * (column + gap) + gap
    wrapped = [_wrap(caption, font, sheet_width - 2 * gap) for caption in captions] or [[]] * rows
    wrapped += [[]] * (rows - len(wrapped))
    sheet_height = 2 * gap + line + sum(heights) + sum(gap + line * len(lines) for lines in wrapped)
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        draw.text((gap + c * (column + gap), gap), label, INK, font)
    y, tops = 2 * gap + line, []
    for row, lines in enumerate(wrapped):
        tops.append(y)
        for c, images in enumerate(columns.values()):
            if row < len(images):
                sheet.paste(Image.fromarray(images[row]), (gap + c * (column + gap), y))
        y += heights[row] if row < rows else 0
        for caption in lines:
            draw.text((gap, y + 1), caption, INK, font)
            y += line
        y += gap
    lefts = {label: gap + c * (column + gap) for c, label in enumerate(columns)}
    places = {
        "size": [width, max(heights)],
        "columns": lefts,
        "rows": tops,
        "heights": heights,
        "captions": list(captions),
    }
    save_picture(path, sheet, {GRID: json.dumps(places), **(text or {})})


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels, between words, and within a word that is longer than that (as
    whole prompts in Chinese are). Of more than 1000 characters the rest is left out."""
    lines, current = [], ""
    for word in (text if len(text) <= 1000 else text[:1000] + " ...").split():
        longer = f"{current} {word}".strip()
        if current and font.getlength(longer) > width:
            lines.append(current)
            longer = word
        while len(longer) > 1 and font.getlength(longer) > width:
            # the most characters that fit; a longer text is wider
            fits = max(1, bisect_right(range(1, len(longer)), width, key=lambda n: font.getlength(longer[:n])))  # noqa: B023
            lines.append(longer[:fits])
            longer = longer[fits:]
        current = longer
    return [*lines, current] if current else lines


# ----------------------------------------------------------------------------------------------------------- metrics
class Metrics:
    """`metrics.jsonl` of the folder `run`: one line for each measurement, with `step` and the measured values.

    Lines after `step` are cut off: they are of a run that was stopped past its last checkpoint, and the resumed run
    will measure these steps itself. Lines that a full disk refused are kept and written with the next line.
    `tensorboard`: write the values to the folder `tensorboard/` of the run, too.
    """

    def __init__(self, run: str | Path, step: int = 0, tensorboard: bool = False):
        self.path = Path(run) / "metrics.jsonl"
        self.lines = [entry for entry in read_metrics(run) if entry["step"] <= step]
        text = self._text(0)
        write_atomically(self.path, lambda partial: partial.write_bytes(text))
        self._lines_written, self._bytes_written = len(self.lines), len(text)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: Any) -> None:
        """Append a line with everything in `values`, named numbers that were measured at `step`. Raises OSError."""
        self.lines.append({"step": step, **values})
        self._write()
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        if self.board:
            self.board.flush()

    def _text(self, start: int) -> bytes:
        return "".join(json.dumps(entry) + "\n" for entry in self.lines[start:]).encode()

    def _write(self) -> None:
        """Append the lines that are not in the file yet, after cutting off what a failed attempt left."""
        if not self.path.exists() or self.path.stat().st_size < self._bytes_written:  # the file is gone or was cut
            self._lines_written = self._bytes_written = 0
        text = self._text(self._lines_written)
        with open(self.path, "ab") as f:
            f.truncate(self._bytes_written)
            f.write(text)
        self._lines_written, self._bytes_written = len(self.lines), self._bytes_written + len(text)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of all lines that have `name`."""
        entries = [entry for entry in self.lines if name in entry]
        return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of the `metrics.jsonl` of the folder `run`, each a dict of numbers with `step`. Damaged lines and what
    is no number are left out."""
    path, entries = Path(run) / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    number = lambda v: isinstance(v, float) or (type(v) is int and abs(v) < 2**63)
    entries = [{k: v for k, v in entry.items() if number(v)} for entry in entries if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry.get("step"), int)]


def sudden_convergence(steps: Sequence[int], gains: Sequence[float]) -> int | None:
    """The step at which the ControlNet began to obey the hint, or None if it has not yet.

    `gains`: control gains measured at `steps`. The step is the first whose gain is above 0.1 and so is the next one.
    """
    for step, gain, next_gain in zip(steps, gains, gains[1:], strict=False):
        if gain > 0.1 and next_gain > 0.1:
            return step
    return None


def turned_at(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The step with the lowest validation loss, if the loss has turned since, or None.

    Validation takes the same items, noise and timesteps each time, but weights that move fast make the loss go up and
    down by some percent. So means of three measurements in a row are compared: the loss has turned if the newest mean
    is 5% or more above the lowest one, with which it has no measurement in common. A loss that is lowest before the
    first step has not fallen yet.
    """
    steps, losses = _finite(steps, losses)
    means = [sum(losses[k : k + 3]) / 3 for k in range(len(losses) - 2)]
    lowest = min(range(len(losses)), key=losses.__getitem__, default=0)
    turned = len(means) > 3 and means[-1] > 1.05 * min(means[:-3])
    return steps[lowest] if turned and 0 < steps[lowest] < steps[-3] else None


# ------------------------------------------------------------------------------------------------------------ curves
def save_curves(path: str | Path, metrics: Metrics) -> None:
    """Draw the loss (smoothed, over its raw values) and the control gain against the step, one above the other.

    Values that are not finite are left out. The file is written whole or not at all.
    """
    sheet = Image.new("RGB", (900, 620), PAPER)
    draw = ImageDraw.Draw(sheet)
    steps, losses = _finite(*metrics.series("loss"))
    smooth = list(itertools.accumulate(losses, lambda mean, loss: 0.95 * mean + 0.05 * loss))
    end = max([1, *metrics.series("loss")[0]])
    _panel(draw, (90, 30, 870, 290), "loss", end, [(steps, losses, FAINT), (steps, smooth, BLUE)])
    steps, gains = _finite(*metrics.series("control_gain"))
    title = "control gain: 1 - loss(right hints) / loss(others' hints)"
    _panel(draw, (90, 340, 870, 580), title, end, [(steps, gains, RED)])
    converged = sudden_convergence(steps, gains)
    if converged is not None:
        x = 90 + (870 - 90) * min(1, converged / end)
        draw.line((x, 340, x, 580), INK)
        _label(draw, (x + 5, 345), f"sudden convergence, step {converged}", "la")
    save_picture(path, sheet)


def _finite(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The finite ones of `values`, and their steps."""
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if np.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _label(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str) -> None:
    """Write `text` at `place` (see Pillow's text anchors), moved as far to a side as it takes to be in the picture."""
    font = ImageFont.load_default(size=14)
    left, _, right, _ = draw.textbbox(place, text, font, anchor)
    x = place[0] + max(0, 2 - left) - max(0, right - (draw.im.size[0] - 2))
    draw.text((x, place[1]), text, INK, font, anchor)


def _panel(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, end: int, curves: list) -> None:
    """Draw axes from step 0 to `end` and `curves` [(steps, values, color)] into `box` (left, top, right, bottom)."""
    left, top, right, bottom = box
    values = [y for _, ys, _ in curves for y in ys] or [0.0, 1.0]
    low, high = min(0.0, *values), max(1e-6, float(np.percentile(values, 99.5)))  # outliers may leave the panel
    _label(draw, (left, top - 20), title, "la")
    for k in range(5):
        y = bottom - (bottom - top) * k / 4
        draw.line((left, y, right, y), FAINT)
        _label(draw, (left - 8, y), f"{low + (high - low) * k / 4:.3g}", "rm")
        _label(draw, (left + (right - left) * k / 4, bottom + 5), str(round(end * k / 4)), "ma")
    to_x = lambda step: left + (right - left) * step / max(1, end)
    to_y = lambda value: bottom - (bottom - top) * (min(max(value, low), high) - low) / (high - low)
    for xs, ys, color in curves:
        points = [(to_x(x), to_y(y)) for x, y in zip(xs, ys, strict=True)]
        if len(points) > 1:
            draw.line(points, color, 2)
