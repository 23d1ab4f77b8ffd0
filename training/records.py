"""The files in a run's folder that people look at: metrics, image grids, curves.

`metrics.jsonl` has one JSON object a line; image grids are PNG files with labelled columns; `curves.png` shows the loss
and the control gain (see `training/validation.py`) against the step.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER, FAINT, BLUE, RED = (30, 30, 30), (255, 255, 255), (225, 225, 225), (31, 105, 190), (200, 50, 40)


# ------------------------------------------------------------------------------------------------------------ images
def to_uint8(images: Tensor) -> list[np.ndarray]:
    """Turn images (B,3,H,W) in [-1,1] into B arrays (H,W,3) uint8."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def hint_image(hint: Tensor) -> np.ndarray:
    """Turn a hint (C,H,W) in [0,1] into a picture (H,W,3) uint8.

    1 channel becomes gray, 2 become red and green, and of more than 3 the first three are shown.
    """
    channels = list((hint.float().clamp(0, 1) * 255).round().byte().cpu().numpy()[:3])
    black = np.zeros_like(channels[0])
    return np.stack({1: channels * 3, 2: [*channels, black]}.get(len(channels), channels), axis=-1)


def save_grid(path: str | Path, columns: dict[str, Sequence[np.ndarray]], captions: Sequence[str] = ()) -> None:
    """Save a table of pictures as the image file `path`.

    `columns`: label -> pictures (H,W,3) uint8, one a row, all of one size. `captions`: the text under each row, broken
    to the width of the table.
    """
    rows = max(len(images) for images in columns.values())
    height, width = next(iter(columns.values()))[0].shape[:2]
    column = max(width, 96)  # small pictures get room for their labels
    font = ImageFont.load_default(size=max(11, min(22, column // 10)))
    line, gap = font.size + 5, 6
    sheet_width = len(columns) * (column + gap) + gap
    wrapped = [_wrap(caption, font, sheet_width - 2 * gap) for caption in captions] or [[]] * rows
    wrapped += [[]] * (rows - len(wrapped))
    sheet_height = 2 * gap + line + sum(height + gap + line * len(lines) for lines in wrapped)
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        draw.text((gap + c * (column + gap), gap), label, INK, font)
    y = 2 * gap + line
    for row, lines in enumerate(wrapped):
        for c, images in enumerate(columns.values()):
            if row < len(images):
                sheet.paste(Image.fromarray(images[row]), (gap + c * (column + gap), y))
        y += height
        for text in lines:
            draw.text((gap, y + 1), text, INK, font)
            y += line
        y += gap
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    lines, current = [], ""
    for word in text.split():
        longer = f"{current} {word}".strip()
        if current and font.getlength(longer) > width:
            lines.append(current)
            longer = word
        current = longer
    return [*lines, current] if current else lines


# ----------------------------------------------------------------------------------------------------------- metrics
class Metrics:
    """`metrics.jsonl` of the folder `run`: one line for each measurement, with `step` and the measured values.

    Opens the file for appending. Lines after `step` are cut off: they are of a run that was stopped past its last
    checkpoint, and the resumed run will measure these steps itself. `tensorboard`: write the values to the folder
    `tensorboard/` of the run, too.
    """

    def __init__(self, run: str | Path, step: int = 0, tensorboard: bool = False):
        self.path = Path(run) / "metrics.jsonl"
        self.lines = [entry for entry in read_metrics(run) if entry["step"] <= step]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.lines))
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: Any) -> None:
        """Append a line with everything in `values`, named numbers that were measured at `step`."""
        self.lines.append({"step": step, **values})
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        if self.board:
            self.board.flush()
        with open(self.path, "a") as f:
            f.write(json.dumps(self.lines[-1]) + "\n")

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of all lines that have `name`."""
        entries = [entry for entry in self.lines if name in entry]
        return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of the `metrics.jsonl` of the folder `run`, up to a line that an interruption cut short."""
    path, entries = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def sudden_convergence(steps: Sequence[int], gains: Sequence[float]) -> int | None:
    """The step at which the ControlNet began to obey the hint, or None if it has not yet.

    `gains`: control gains measured at `steps`. The step is the first whose gain is above 0.1 and so is the next one.
    """
    for step, gain, next_gain in zip(steps, gains, gains[1:], strict=False):
        if gain > 0.1 and next_gain > 0.1:
            return step
    return None


# ------------------------------------------------------------------------------------------------------------ curves
def save_curves(path: str | Path, metrics: Metrics) -> None:
    """Draw the loss (smoothed, over its raw values) and the control gain against the step, one above the other."""
    sheet = Image.new("RGB", (900, 620), PAPER)
    draw = ImageDraw.Draw(sheet)
    steps, losses = metrics.series("loss")
    smooth = list(itertools.accumulate(losses, lambda mean, loss: 0.95 * mean + 0.05 * loss))
    end = max(steps, default=1)
    _panel(draw, (70, 30, 880, 290), "loss", end, [(steps, losses, FAINT), (steps, smooth, BLUE)])
    steps, gains = metrics.series("control_gain")
    title = "control gain: 1 - loss(right hints) / loss(others' hints)"
    _panel(draw, (70, 340, 880, 580), title, end, [(steps, gains, RED)])
    converged = sudden_convergence(steps, gains)
    if converged is not None:
        x = 70 + (880 - 70) * converged / end
        draw.line((x, 340, x, 580), INK)
        draw.text((x + 5, 345), f"sudden convergence, step {converged}", INK, ImageFont.load_default(size=14))
    sheet.save(path)


def _panel(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, end: int, curves: list) -> None:
    """Draw axes from step 0 to `end` and `curves` [(steps, values, color)] into `box` (left, top, right, bottom)."""
    left, top, right, bottom = box
    font = ImageFont.load_default(size=14)
    finite = [y for _, ys, _ in curves for y in ys if np.isfinite(y)] or [0.0, 1.0]
    low, high = min(0.0, *finite), max(1e-6, float(np.percentile(finite, 99.5)))  # outliers may leave the panel
    draw.text((left, top - 20), title, INK, font)
    for k in range(5):
        y = bottom - (bottom - top) * k / 4
        draw.line((left, y, right, y), FAINT)
        draw.text((8, y - 8), f"{low + (high - low) * k / 4:.3g}", INK, font)
        draw.text((left + (right - left) * k / 4 - 10, bottom + 5), str(round(end * k / 4)), INK, font)
    to_x = lambda step: left + (right - left) * step / max(1, end)
    to_y = lambda value: bottom - (bottom - top) * (min(max(value, low), high) - low) / (high - low)
    for xs, ys, color in curves:
        points = [(to_x(x), to_y(y)) for x, y in zip(xs, ys, strict=True) if np.isfinite(y)]
        if len(points) > 1:
            draw.line(points, color, 2)
