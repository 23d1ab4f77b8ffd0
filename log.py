"""What a run leaves behind: metrics, image grids, curves, and the convergence meter's record.

Everything is a file in the run's folder that a person can open: `metrics.jsonl` (one JSON object a line), PNG grids
with labelled columns, and `curves.png` with the loss and the control gain.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

INK, PAPER, FAINT, BLUE, RED = (30, 30, 30), (255, 255, 255), (225, 225, 225), (31, 105, 190), (200, 50, 40)


# ------------------------------------------------------------------------------------------------------------ images
def to_uint8(images: Tensor) -> list[np.ndarray]:
    """(B,3,H,W) in [-1,1] -> B arrays (H,W,3) uint8."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def hint_image(hint: Tensor) -> np.ndarray:
    """A hint (C,H,W) in [0,1] as a picture (H,W,3) uint8: 1 channel as gray, of more than 3 the first three."""
    hint = hint.float().clamp(0, 1)
    planes = [hint[min(c, len(hint) - 1)] if len(hint) != 2 or c < 2 else hint[0] * 0 for c in range(3)]
    return np.stack([(p * 255).round().byte().cpu().numpy() for p in planes], axis=-1)


def save_grid(path: str | Path, columns: dict[str, Sequence[np.ndarray]], captions: Sequence[str] = ()) -> None:
    """Save a table of pictures: a labelled column for each entry of `columns` (pictures (H,W,3) uint8 of one size, one
    a row), and under each row its caption, broken to the width."""
    rows = max(len(images) for images in columns.values())
    height, width = next(iter(columns.values()))[0].shape[:2]
    shown = max(width, 96)  # small pictures get room for their labels
    font = ImageFont.load_default(size=max(11, min(22, shown // 10)))
    line, gap = font.size + 5, 6
    full = len(columns) * (shown + gap) + gap
    wrapped = [_wrap(caption, font, full - 2 * gap) for caption in captions] or [[]] * rows
    wrapped += [[]] * (rows - len(wrapped))
    tall = 2 * gap + line + sum(height + gap + line * len(text) for text in wrapped)
    sheet = Image.new("RGB", (full, tall), PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        draw.text((gap + c * (shown + gap), gap), label, INK, font)
    y = 2 * gap + line
    for r, text in enumerate(wrapped):
        for c, images in enumerate(columns.values()):
            if r < len(images):
                sheet.paste(Image.fromarray(images[r]), (gap + c * (shown + gap), y))
        y += height
        for part in text:
            draw.text((gap, y + 1), part, INK, font)
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
    """`metrics.jsonl` of a run: a line a step, each a dict with `step` and what was measured at it."""

    def __init__(self, run: str | Path, step: int = 0, tensorboard: bool = False):
        """Open for appending; lines after `step` (of a run that was stopped past its checkpoint) are cut off.
        `tensorboard`: write the same to `tensorboard/` in the run's folder."""
        self.path = Path(run) / "metrics.jsonl"
        self.lines = [entry for entry in read_metrics(run) if entry["step"] <= step]
        kept = "".join(json.dumps(entry) + "\n" for entry in self.lines)
        self.path.write_text(kept)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: Any) -> None:
        self.lines.append({"step": step, **values})
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        if self.board:
            self.board.flush()
        with open(self.path, "a") as f:
            f.write(json.dumps(self.lines[-1]) + "\n")

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the lines that have `name`."""
        entries = [entry for entry in self.lines if name in entry]
        return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl (a last line that was cut short is left out)."""
    path, entries = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def sudden_convergence(steps: Sequence[int], gains: Sequence[float]) -> int | None:
    """The step at which the hint began to be obeyed: where the control gain, having stayed near 0, is first above 0.1
    and stays there at the next measurement. None if that has not happened."""
    for i in range(len(gains) - 1):
        if gains[i] > 0.1 and gains[i + 1] > 0.1:
            return steps[i]
    return None


class Meter:
    """The convergence meter: how much better does the model do with the right hints than with others'?

    Every `every` steps (0: never) it asks `losses() -> (right hints, other hints)` on the fixed validation batch,
    writes the control gain, 1 - right / other, to the metrics, lets `draw(path)` save the image log, and tells of the
    jump. All of it inside of `within()`, where the model has the weights that are to be measured.
    """

    def __init__(
        self,
        run: Path,
        metrics: Metrics,
        every: int,
        losses: Callable[[], tuple],
        draw: Callable[[Path], None],
        within: Callable[[], AbstractContextManager],
    ):
        self.run, self.metrics, self.every = run, metrics, every
        self.losses, self.draw, self.within = losses, draw, within
        self.last = ""
        self.told = sudden_convergence(*metrics.series("control_gain")) is not None

    def measure(self, step: int, last: bool = False) -> None:
        """Measure if it is time; a resumed run does not repeat what the stopped one measured."""
        if not self.every or (step % self.every and not last) or step in self.metrics.series("control_gain")[0]:
            return
        with self.within():
            right, other = self.losses()
            gain = 1 - right / other
            self.metrics.add(step, val_loss=right, val_loss_other_hints=other, control_gain=gain)
            self.last = f", control gain {gain:.3f}"
            tqdm.write(f"step {step}: validation loss {right:.4f}, control gain {gain:.3f}")
            self.draw(self.run / "image_log" / f"step-{step:06d}.png")
        save_curves(self.run / "curves.png", self.metrics)
        at = sudden_convergence(*self.metrics.series("control_gain"))
        if at is not None and not self.told:
            self.told = True
            tqdm.write(f"sudden convergence at step {at}: the hint is obeyed (control gain {gain:.3f})")


# ------------------------------------------------------------------------------------------------------------ curves
def save_curves(path: str | Path, metrics: Metrics) -> None:
    """Draw the loss (smoothed, over its raw values) and the control gain against the step, one above the other."""
    sheet = Image.new("RGB", (900, 620), PAPER)
    draw = ImageDraw.Draw(sheet)
    steps, losses = metrics.series("loss")
    smooth, value = [], None
    for loss in losses:
        value = loss if value is None else 0.95 * value + 0.05 * loss
        smooth.append(value)
    end = max(steps, default=1)
    _panel(draw, (70, 30, 880, 290), "loss", end, [(steps, losses, FAINT), (steps, smooth, BLUE)])
    steps, gains = metrics.series("control_gain")
    _panel(
        draw,
        (70, 340, 880, 580),
        "control gain: 1 - loss(right hints) / loss(others' hints)",
        end,
        [(steps, gains, RED)],
    )
    at = sudden_convergence(steps, gains)
    if at is not None:
        x = 70 + (880 - 70) * at / end
        draw.line((x, 340, x, 580), INK)
        draw.text((x + 5, 345), f"sudden convergence, step {at}", INK, ImageFont.load_default(size=14))
    sheet.save(path)


def _panel(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, end: int, lines: list) -> None:
    left, top, right, bottom = box
    font = ImageFont.load_default(size=14)
    values = [v for _, ys, _ in lines for v in ys if np.isfinite(v)] or [0.0, 1.0]
    low, high = min(0.0, *values), max(1e-6, float(np.percentile(values, 99.5)))
    draw.text((left, top - 20), title, INK, font)
    for k in range(5):
        y = bottom - (bottom - top) * k / 4
        draw.line((left, y, right, y), FAINT)
        draw.text((8, y - 8), f"{low + (high - low) * k / 4:.3g}", INK, font)
        draw.text((left + (right - left) * k / 4 - 10, bottom + 5), str(round(end * k / 4)), INK, font)
    for xs, ys, color in lines:
        points = [
            (
                left + (right - left) * x / max(1, end),
                bottom - (bottom - top) * (min(max(y, low), high) - low) / (high - low),
            )
            for x, y in zip(xs, ys, strict=True)
            if np.isfinite(y)
        ]
        if len(points) > 1:
            draw.line(points, color, 2)
