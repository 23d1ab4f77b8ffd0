"""Hints for the page: files that a browser sends, and those of the run's validation set.

A browser sends the content of an image file, never a path. It is decoded as training decodes hints, within bounds of
its own, one file at a time, since Pillow's bound on the size of images is a setting of the whole process.
"""

import contextlib
import io
import itertools
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import data
from training import images
from training.annotators import ANNOTATORS, annotate
from training.images import DataError, Reading, Size
from training.validation import held_out

MAX_PIXELS = 16_000_000  # of an image that is sent
MAX_SHOWN = 48  # hints of the validation set that the page offers
NUMPY_MAGIC = b"\x93NUMPY"
_decoding = threading.Lock()


class RequestError(ValueError):
    """What a browser asks for cannot be; the message is a sentence for its user."""


def read_hint(content: bytes, reading: Reading, resample: str, size: Size) -> np.ndarray:
    """The hint (H,W,C) uint8 in the `content` of an image file, brought to `size` (width, height). RequestError for
    what is no image, or too large a one."""
    return fit_hint(decode_hint(content, reading), resample, size)


def decode_hint(content: bytes, reading: Reading) -> np.ndarray:
    """The same in the size that the file has."""
    with _decoding:
        try:
            _check_size(content)
            return _decode(content, reading)
        except DataError as e:
            raise RequestError(f"The image cannot be used: {images.one_line(e)[:300]}.") from e


def fit_hint(array: np.ndarray, resample: str, size: Size) -> np.ndarray:
    """A hint (H,W,C) uint8 brought to `size` (width, height). RequestError for a size that takes too much memory."""
    if size[0] * size[1] * array.shape[2] > 4 * MAX_PIXELS:
        raise RequestError(f"A hint of {size[0]}x{size[1]} with {array.shape[2]} channels is too large for this page.")
    return data.resize(array, size, images.RESAMPLE[resample])


def annotate_photo(content: bytes, kind: str, parameters: dict[str, float], channels: int, size: Size) -> np.ndarray:
    """The hint (H,W,channels) uint8 that an annotator of `training.annotators` makes of the photo in the `content` of a
    file, which is first brought to `size` (width, height), as for a data set. RequestError for an unknown annotator or
    parameter, too."""
    photo = data.resize(decode_hint(content, Reading(3, "white")), size, Image.Resampling.LANCZOS)
    try:
        hint = annotate(kind, photo, **parameters)
    except DataError as e:
        raise RequestError(f"The hint cannot be made: {images.one_line(e)[:300]}.") from e
    if channels == 1 and hint.shape[2] == 3:
        return np.asarray(Image.fromarray(hint).convert("L"))[..., None]
    return hint.repeat(3, axis=2) if channels == 3 and hint.shape[2] == 1 else hint


def describe_annotators() -> list[dict[str, Any]]:
    """The annotators that the page offers, with their parameters."""
    fields = lambda p: {"name": p.name, "default": p.default, "low": p.low, "high": p.high, "help": p.help}
    whole = lambda p: {"whole": isinstance(p.default, int)}
    return [
        {"name": name, "help": made.help, "parameters": [fields(p) | whole(p) for p in made.parameters]}
        for name, made in ANNOTATORS.items()
    ]


def _check_size(content: bytes) -> None:
    """RequestError if the header of a picture file tells of more than MAX_PIXELS. What is no picture passes."""
    try:
        with warnings.catch_warnings(), contextlib.suppress(OSError, ValueError, SyntaxError, EOFError):
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"has {width}x{height} pixels")
    except Image.DecompressionBombError as e:
        raise RequestError(
            f"The image is too large: at most {MAX_PIXELS // 1_000_000} megapixels are read here."
        ) from e


def _decode(content: bytes, reading: Reading) -> np.ndarray:
    """Decode the content of a file; messages of DataError do not name a file."""
    with contextlib.ExitStack() as stack:
        path = Path("image.png")  # nothing is opened: the content is there
        if content.startswith(NUMPY_MAGIC):  # numpy reads the header of an array from a file alone
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hint.npy"
            path.write_bytes(content)
        try:
            return images.decode(path, reading, content).array
        except DataError as e:
            raise DataError(str(e).removeprefix(f"{images.one_line(path)}: ")) from e.__cause__


def to_png(hint: np.ndarray) -> bytes:
    """A hint (H,W,C) uint8 as a PNG file: as it is with 1, 3 or 4 channels, and otherwise what one can see of it."""
    if hint.shape[2] not in images.MODES:
        missing = np.zeros((*hint.shape[:2], max(0, 3 - hint.shape[2])), np.uint8)
        hint = np.concatenate([hint[..., :3], missing], axis=2)
    stream = io.BytesIO()
    Image.fromarray(hint[..., 0] if hint.shape[2] == 1 else hint).save(stream, "PNG")
    return stream.getvalue()


class ValidationHints:
    """The hints that the run `settings` held out, its last `count` (None: as many as `validation` asks for). Where its
    data set is not there, there are none, and `note` says why."""

    def __init__(self, settings: dict[str, Any], count: int | None = None):
        self.dataset: data.FolderDataset | None = None
        self.numbers: list[int] = []
        self.note = ""
        folder = settings.get("data")
        if not folder:
            self.note = "This model names no data set whose hints could be offered."
            return
        try:
            self.dataset = data.FolderDataset(
                folder, data.parse_resolution(settings["resolution"]) if settings.get("resolution") else None,
                settings.get("hint_channels", 3), settings.get("hint_resample", "area"), False,
                settings.get("hint_ground", "auto"), settings.get("hint_scale", 0.0),
                settings.get("follow_links", False), MAX_PIXELS / 1e6, settings.get("columns", ""),
                settings.get("hints", ""),
            )  # fmt: skip
            count = len(held_out(len(self.dataset), settings.get("validation", 8))) if count is None else count
            usable = (i for i in reversed(range(len(self.dataset))) if self._trained(i, settings.get("skip_bad_rows")))
            self.numbers = sorted(itertools.islice(usable, count))[:MAX_SHOWN]
            self.note = "" if self.numbers else "None of the pairs of the run can be read."
        except (ValueError, OSError, TypeError) as e:
            self.note = f"The data set of the run is not there: {images.one_line(e)[:200]}."

    def _trained(self, number: int, some_skipped: bool) -> bool:
        """Whether a row was one of the run's: bad rows, where they are skipped, do not count among the last ones."""
        if not some_skipped:
            return self.dataset.rows[number].readable
        with contextlib.suppress(DataError):
            return bool(self.dataset.load_item(number))
        return False

    def prompt(self, number: int) -> str:
        """The prompt of an offered hint."""
        return self.dataset.prompt(number)

    def paper(self) -> str:
        """What the hints are drawn on: "white" or "black", judged by the first of them."""
        with contextlib.suppress(RequestError):
            return "white" if self.read(self.numbers[0]).mean() > 127 else "black"
        return "black"

    def read(self, number: int) -> np.ndarray:
        """An offered hint, (H,W,C) uint8 in the size of the run. RequestError for any other number, and for a file that
        cannot be read."""
        if number not in self.numbers:
            raise RequestError("There is no validation hint of this number.")
        with _decoding:
            try:
                return (self.dataset.hint(number) * 255).round().astype(np.uint8)
            except DataError as e:
                raise RequestError(f"The hint cannot be read: {images.one_line(e)[:300]}.") from e
