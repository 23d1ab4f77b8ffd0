"""The pictures of a run over its steps: cut out of the image log, for the page's slider and for an animation.

An image grid says where its pictures are (`training.records.GRID`). Hints and targets stay the same over the steps, so
the page holds them once, and of each step only the predictions. Grids of runs from before this mark are shown whole.
Everything is made small (SIDE, MOST_STEPS), so that the page stays a file that one can send; what was made of a grid is
kept in memory, so that a training opens each grid once.
"""

import base64
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from training.images import save_whole
from training.records import GRID, INK, PAPER

SIDE = 256  # pixels of a picture's longer side in the page
WHOLE_SIDE = 900  # of a grid that is shown whole
MOST_STEPS, MOST_ROWS = 40, 8
MOST_PIXELS = 2**28  # of a grid that is opened
FRAME_SIDE = 160  # of a picture in the animation
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for a damaged file
CONTROL, PREDICTION, TRUTH = "control", "prediction", "ground truth"  # labels of the grid's columns


def list_grids(run: str | Path, most: int = MOST_STEPS) -> dict[int, Path]:
    """Step -> file of the image log of the folder `run`, ascending. Of more than `most` every second, every fourth, ...
    and the newest, so that a run that grows keeps showing the same ones until they are twice as many."""
    found = {}
    for path in (Path(run) / "image_log").glob("step-*.png"):
        if (match := re.fullmatch(r"step-(\d{1,15})\.png", path.name)) and path.is_file():
            found[int(match[1])] = path
    steps = sorted(found)
    every = 1
    while len(steps) > most * every:
        every *= 2
    return {step: found[step] for step in sorted({*steps[::every], *steps[-1:]})}


def cut(path: Path) -> tuple[Image.Image, list[dict[str, Image.Image]], list[str]]:
    """A grid whole; its rows, each label -> picture, none if the file does not say where they are; and the captions.
    Raises OSError or ValueError for a file that is no picture."""
    with Image.open(path, formats=["PNG"]) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{path}: {image.width}x{image.height} pixels are too many")
        image.load()
        sheet, text = image if image.mode == "RGB" else image.convert("RGB"), image.info.get(GRID, "")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        places = json.loads(text)
        (width, height), tops = map(int, places["size"]), [int(top) for top in places["rows"][:MOST_ROWS]]
        heights = [int(h) for h in places.get("heights", [height] * len(tops))]
        columns = {str(label): int(left) for label, left in places["columns"].items()}
        inside = (
            max(columns.values()) + width <= sheet.width
            and max(map(sum, zip(tops, heights, strict=False))) <= sheet.height
        )
        inside = inside and min(*columns.values(), *tops) >= 0 and min(width, *heights) > 0
        if inside and columns.keys() >= {CONTROL, PREDICTION}:
            rows = [
                {label: sheet.crop((left, top, left + width, top + height)) for label, left in columns.items()}
                for top, height in zip(tops, heights, strict=True)
            ]
            return sheet, rows, [str(caption)[:1000] for caption in places["captions"]][:MOST_ROWS]
    return sheet, [], []


def data_uri(image: Image.Image, side: int = SIDE) -> str:
    """A picture as JPEG in a data URI, made smaller if its longer side has more than `side` pixels."""
    stream = io.BytesIO()
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(stream, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


class ImageLog:
    """The image log of the folder `run`, small enough for a page. Reading again opens only the grids that are new."""

    def __init__(self, run: str | Path):
        self.run = Path(run)
        self._rows: dict[tuple[Path, int], list[dict[str, str]]] = {}  # file and time of its last change -> data URIs
        self._captions: list[str] = []

    def read(self) -> dict[str, Any]:
        """{"steps", "rows": [{"caption", "control", "truth", "predictions": [one a step]}]}, or, if one of the grids
        does not say where its pictures are, {"steps", "grids": [one a step]}. Grids that cannot be read are left out.
        """
        grids, rows_of = list_grids(self.run), {}
        for step, path in grids.items():
            with contextlib.suppress(*UNREADABLE):
                rows_of[step] = self._read_rows(path)
        used = [(path, path.stat().st_mtime_ns) for path in grids.values() if path.exists()]
        self._rows = {key: rows for key, rows in self._rows.items() if key in used}
        if not all(rows_of.values()):
            return {"steps": list(rows_of), "grids": [data_uri(cut(grids[step])[0], WHOLE_SIDE) for step in rows_of]}
        rows = []
        for i, row in enumerate(list(rows_of.values())[-1] if rows_of else ()):
            predictions = [there[i][PREDICTION] if i < len(there) else "" for there in rows_of.values()]
            caption = self._captions[i] if i < len(self._captions) else ""
            fixed = {"caption": caption, "control": row[CONTROL], "truth": row.get(TRUTH, "")}
            rows.append(fixed | {"predictions": predictions})
        return {"steps": list(rows_of), "rows": rows}

    def _read_rows(self, path: Path) -> list[dict[str, str]]:
        """The pictures of a grid as data URIs, by label; empty if the grid does not say where they are."""
        key = path, path.stat().st_mtime_ns
        if key not in self._rows:
            _, rows, captions = cut(path)
            wanted = (CONTROL, PREDICTION, TRUTH)
            self._rows[key] = [{k: data_uri(image) for k, image in row.items() if k in wanted} for row in rows]
            self._captions = captions or self._captions
        return self._rows[key]


# --------------------------------------------------------------------------------------------------------- animation
def save_animation(log: dict[str, Any], path: str | Path) -> bool:
    """Write what `ImageLog.read` gives as an animated GIF: control, prediction and truth of each row, a frame a step,
    the last one longest. False, and no file, if there are no two grids that say where their pictures are."""
    rows, frames = log.get("rows", [])[:4], []
    if not rows or len(log["steps"]) < 2:
        return False
    pictures = [{CONTROL: open_uri(row["control"]), TRUTH: open_uri(row["truth"])} for row in rows]
    for i, step in enumerate(log["steps"]):
        predictions = [{PREDICTION: open_uri(row["predictions"][i])} for row in rows]
        frames.append(_frame(step, [a | b for a, b in zip(pictures, predictions, strict=True)]))
    chosen = frames[:: max(1, len(frames) // 4)][:5] + frames[-1:]  # one palette for all: colours do not flicker
    sample = Image.new("RGB", (frames[0].width // 2, len(chosen) * (frames[0].height // 2)))
    for i, frame in enumerate(chosen):
        sample.paste(frame.resize((sample.width, frames[0].height // 2)), (0, i * (frames[0].height // 2)))
    palette = sample.quantize(256, Image.Quantize.MEDIANCUT)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [350] * (len(frames) - 1) + [2500]  # milliseconds
    settings = dict(format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=False)
    save_whole(path, lambda partial: frames[0].save(partial, **settings))
    return True


def open_uri(uri: str) -> Image.Image | None:
    """The picture of a data URI that `data_uri` made; None for an empty one."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) if uri else None


def _frame(step: int, rows: list[dict[str, Image.Image | None]]) -> Image.Image:
    """A frame of the animation: labels and step above the rows."""
    labels = [label for label in (CONTROL, PREDICTION, TRUTH) if rows[0].get(label) or label == PREDICTION]
    width, height = rows[0][CONTROL].size
    scale = min(1.0, FRAME_SIDE / max(width, height))
    cell = max(1, round(width * scale)), max(1, round(height * scale))
    font, gap = ImageFont.load_default(size=13), 4
    column, head = max(cell[0], 96), 42
    frame = Image.new("RGB", (len(labels) * (column + gap) + gap, head + len(rows) * (cell[1] + gap)), PAPER)
    draw = ImageDraw.Draw(frame)
    draw.text((gap, 3), f"step {step}", INK, ImageFont.load_default(size=16))
    for c, label in enumerate(labels):
        x = gap + c * (column + gap)
        draw.text((x, head - 18), label, INK, font)
        for r, row in enumerate(rows):
            if row.get(label):
                frame.paste(row[label].resize(cell, Image.Resampling.LANCZOS), (x, head + r * (cell[1] + gap)))
    return frame
