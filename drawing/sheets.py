"""Tables of pictures: the contact sheet of a list, and the labelled grid of strengths and seeds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drawing.loading import Loaded, read_hint
from drawing.pictures import CELLS, Picture, sheet_names
from drawing.request import Request
from training.images import save_picture
from training.records import INK, PAPER, hint_image, save_grid

THUMBNAIL = 160  # pixels: the longer side
COLUMNS = 4  # of a contact sheet
GAP = 8


def thumbnail(picture: np.ndarray) -> Image.Image:
    """A small copy of a picture (H,W,3) uint8."""
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return image


class Sheet:
    """The table of the pictures of a command: a grid, or the contact sheets of a list. Collects what they show."""

    def __init__(self, request: Request, loaded: Loaded, pictures: Sequence[Picture]):
        self.request, self.loaded, self.pictures = request, loaded, pictures
        self.names = sheet_names(request, len(pictures))  # of the files, without .png
        self._shown: dict[str, list] = {}  # name of a picture -> its hints and itself; thumbnails in a list

    def add(self, picture: Picture, pixels: np.ndarray) -> None:
        """Take a picture (H,W,3) uint8."""
        pairs = zip(picture.hints, self.loaded.controls, strict=True)
        hints = [hint_image(read_hint(file, c.reading, c.resample, picture.size)) for file, c in pairs]
        shown = [*hints, pixels]
        self._shown[picture.name] = list(map(thumbnail, shown)) if self.request.is_list else shown

    def save(self, text: Mapping[str, str]) -> None:
        """Save the sheets in the folder of the request, each with `text` (see `save_picture`)."""
        out = Path(self.request.out)
        if not self.request.is_list:
            save_grid(out / "grid.png", *self._grid(), text)
            return
        cells = [(p.name, p.prompt, self._shown[p.name]) for p in self.pictures]
        for i, name in enumerate(self.names):
            save_contact_sheet(out / f"{name}.png", cells[i * CELLS : (i + 1) * CELLS], text)

    def _grid(self) -> tuple[dict[str, list[np.ndarray]], list[str]]:
        """Columns and captions for `save_grid`: the hints, and a column for each picture or for each strength."""
        pictures, prompt = self.pictures, self.request.prompt
        hints = self._shown[pictures[0].name][:-1]
        rows = len({p.seed for p in pictures}) if self.request.is_grid else 1
        columns = {f"hint {i}" if len(hints) > 1 else "hint": [hint] * rows for i, hint in enumerate(hints, 1)}
        if not self.request.is_grid:
            return columns | {p.name: self._shown[p.name][-1:] for p in pictures}, [prompt]
        varied = next((i for i, c in enumerate(self.request.controls) if c.strengths), None)
        for p in pictures:
            label = "picture" if varied is None else f"strength {p.strengths[varied]:.10g}"
            columns.setdefault(label, []).append(self._shown[p.name][-1])
        seeds = [f"seed {seed}" for seed in dict.fromkeys(p.seed for p in pictures)]
        return columns, [f"{seeds[0]}: {prompt}", *seeds[1:]]


def save_contact_sheet(
    path: str | Path, cells: Sequence[tuple[str, str, Sequence[Image.Image]]], text: Mapping[str, str]
) -> None:
    """Save a sheet of at most CELLS cells: (name, prompt, thumbnails side by side), with name and prompt, cut
    to the width of the cell, under the thumbnails. `text`: see `save_picture`."""
    font = ImageFont.load_default(size=13)
    side = THUMBNAIL + GAP
    width = side * max(len(images) for _, _, images in cells)
    height = side + 2 * (font.size + 4)
    columns, rows = min(COLUMNS, len(cells)), math.ceil(len(cells) / COLUMNS)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (name, prompt, images) in enumerate(cells):
        left, top = GAP + (i % COLUMNS) * (width + GAP), GAP + (i // COLUMNS) * (height + GAP)
        for k, image in enumerate(images):
            sheet.paste(image, (left + k * side, top + THUMBNAIL - image.height))
        for k, line in enumerate((name, prompt)):
            draw.text((left, top + THUMBNAIL + 2 + k * (font.size + 4)), cut(line, font, width - GAP), INK, font)
    save_picture(path, sheet, text)


def cut(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """As much of the beginning of `text` as `width` pixels hold, with three dots where something is missing."""
    text = " ".join(text[:200].split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
