"""Reading, resizing and saving the images of a data set.

Image files come in many kinds: with transparency or without, gray with 16 bits a pixel (depth maps), floats, palettes,
turned by the camera, cut short, or no files at all but pipes. `read_image` brings all of them to (H,W,C) uint8 or says
in one line what is wrong with the file:

    regular file of bounded size --Pillow, numpy--> numbers of any format --/ largest value--> 0..255
        --transparent pixels laid on a ground--> (H,W,C) uint8

Hints may have any number of channels; those that no picture format can hold are `.npy` files.
"""

import contextlib
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from training.files import MAX_MEGAPIXELS, File, file_bytes, naming, open_file
from training.files import DataError as DataError
from training.files import one_line as one_line
from training.files import read_bytes as read_bytes

RESAMPLE = {"area": Image.Resampling.BOX, "nearest": Image.Resampling.NEAREST}
Size = tuple[int, int]  # (width, height) in pixels
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # number of channels -> Pillow's mode
GROUNDS = {"white": 255, "black": 0}  # what shows through transparent pixels
# The largest value of what Pillow reads into its modes of more than 8 bits, by the format of the numbers in the file.
LARGEST = {
    "I;12": 4095,
    "I;16S": 2**15 - 1,
    "I;16BS": 2**15 - 1,
    "I;32S": 2**31 - 1,
    "I;32BS": 2**31 - 1,
} | dict.fromkeys(("I;32", "I;32N", "I;32B"), 2**32 - 1)

# What a file can be beyond RGB of 8 bits, and what is made of it.
KINDS = {
    "gray": ("gray", "the shade goes to every channel"),
    "alpha": ("with an alpha channel", "transparent parts are laid on a ground"),
    "palette": ("with a palette", "its colours are taken"),
    "16 bits": ("of 16 bits a channel", "brought to 8 bits"),
    "numbers": ("of floats or 32 bits a channel", "brought to 8 bits"),
    "CMYK": ("CMYK", "converted to RGB without a colour profile"),
    "other colours": ("in another colour space", "converted to RGB"),
    "turned": ("with a camera's orientation tag", "turned upright"),
}


@dataclass(frozen=True)
class Reading:
    """How an image file becomes an array (H,W,channels) uint8.

    channels: 1, 3 or 4, and any number for `.npy` files; None reads pictures as RGB and `.npy` files as they are.
    ground: what shows through transparent pixels: "white", "black", or "auto", the one on which the rest is visible;
    with 4 channels transparency is kept. scale: the value in the file that becomes 255; 0: the largest value of the
    file's number format. class_numbers: palette images give the numbers of their colours. max_pixels: the largest
    image that is decoded.
    """

    channels: int | None = 3
    ground: str = "auto"
    scale: float = 0.0
    class_numbers: bool = False
    max_pixels: float = MAX_MEGAPIXELS * 1e6


class Decoded(NamedTuple):
    """An image and what training tells of it: the largest of its numbers and the one that counts as full; how bright
    its opaque part is (0..1; -1: nothing is transparent); what its file is beyond RGB of 8 bits."""

    array: np.ndarray  # (H,W,C) uint8
    largest: float
    full: float
    brightness: float = -1.0
    kinds: tuple[str, ...] = ()  # keys of KINDS


# ------------------------------------------------------------------------------------------------ from bytes to pixels
def check_pixels(width: int, height: int, max_pixels: float) -> None:
    """DataError for an image without pixels, or of more than the bound."""
    if width * height == 0:
        raise DataError("has nothing in it (no pixels)")
    if width * height > max_pixels:
        raise DataError(_too_large(f"is {width}x{height}", width * height, max_pixels))


def _too_large(what: str, pixels: int, max_pixels: float) -> str:
    wanted = f"--max-megapixels {math.ceil(pixels / 1e6)} raises it"
    return f"{what}, which takes more memory than the bound allows: {wanted} (now {max_pixels / 1e6:g})"


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """The formats that are read: all of Pillow's but those that hand the file to another program or system library."""
    Image.preinit()
    Image.init()
    return [name for name in Image.ID if name not in ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5")]


@lru_cache(maxsize=1)
def endings() -> frozenset[str]:
    """The endings of picture files that are read, with their dots, in small letters."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in _formats())


@contextlib.contextmanager
def _opened(content: bytes | BinaryIO, max_pixels: float) -> Iterator[Image.Image]:
    """The picture in `content`, not decoded yet. Pillow's own bound on the size, a global, is replaced by ours."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, int(max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(
                io.BytesIO(content) if isinstance(content, bytes) else content, formats=_formats()
            ) as image:
                check_pixels(*image.size, max_pixels)
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        (pixels,) = re.findall(r"\((\d+) pixels\)", str(e))[:1] or [max_pixels + 1]
        raise DataError(_too_large(f"has {pixels} pixels", int(pixels), max_pixels)) from e
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_image(path: str | Path, channels: int | None = 3, **settings: object) -> np.ndarray:
    """Read an image file as (H,W,channels) uint8; `settings`: further fields of Reading. Raises DataError.

    `.npy` files are (H,W,C) of uint8, of floats in [0,1], or with `scale` of any numbers from 0 to `scale`.
    """
    return decode(Path(path), Reading(channels, **settings)).array


def decode(file: File, reading: Reading, content: bytes | None = None) -> Decoded:
    """Read an image file, or its `content` if that is read already. Raises DataError."""
    content = read_bytes(file, reading.max_pixels) if content is None else content
    with naming(file):
        if file.suffix.lower() == ".npy":
            return _decode_array(_load_npy(content, reading.max_pixels), reading)
        if reading.channels not in (None, *MODES):
            other = f"for {reading.channels} give .npy files of (height, width, {reading.channels})"
            raise DataError(f"a picture has 1, 3 or 4 channels; {other}")
        with _opened(content, reading.max_pixels) as image:
            return _decode_picture(image, reading)


def _npy_header(file: BinaryIO, length: int) -> tuple[tuple[int, ...], np.dtype, int, str]:
    """Shape, dtype, place of the first number and memory order of a `.npy` file, checked against the file's length."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        if not length:
            raise ValueError("it has nothing in it")
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"its format has version {version[0]}.{version[1]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, column_order, dtype = readers[version](file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > length - file.tell():
            raise ValueError(f"it is too short for {shape} of {dtype}")
    except ValueError as e:
        raise DataError(f"not a readable .npy file of numbers ({one_line(' '.join(str(e).split()))})") from e
    return shape, dtype, file.tell(), "F" if column_order else "C"


def _load_npy(content: bytes, max_pixels: float) -> np.ndarray:
    """The array in a `.npy` file: (H,W) or (H,W,C) of numbers."""
    shape, dtype, offset, order = _npy_header(io.BytesIO(content), len(content))
    if dtype.kind not in "biuf" or len(shape) not in (2, 3):
        raise DataError(f"is {shape} of {dtype}, should be (height, width, channels) of uint8 or floats")
    check_pixels(shape[1], shape[0] * min(1, *shape[2:], 1), max_pixels)
    return np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order=order)


def _decode_array(array: np.ndarray, reading: Reading) -> Decoded:
    """The array of a `.npy` file as an image."""
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype.kind != "f" and array.dtype != np.uint8 and not reading.scale:
        raise DataError(_refusal(array))
    full = 255.0 if array.dtype == np.uint8 else 1.0
    pixels, largest, full = to_uint8_range(array, full, reading.scale)
    if reading.channels not in (None, array.shape[2]):
        raise DataError(f"is {array.shape}, should be (height, width, {reading.channels})")
    return Decoded(pixels, largest, full, kinds=() if array.dtype == np.uint8 else ("numbers",))


def to_uint8_range(array: np.ndarray, full: float, scale: float) -> tuple[np.ndarray, float, float]:
    """Map numbers from 0 to `scale` (0: to `full`) to 0..255. Returns the bytes, the largest number, and `full` or
    `scale`. Raises DataError for numbers outside of the range."""
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):  # a NaN anywhere makes both NaN
        raise DataError(f"holds {array.dtype} with NaN or infinity")
    limit = scale or full
    if low < 0 or high > limit:
        raise DataError(_refusal(array) if not scale else f"holds {high}, above --hint-scale {scale:g}")
    if array.dtype == np.uint8 and limit == 255:
        return array, float(high), limit
    if limit == 1:
        return (array * 255).round().astype(np.uint8), float(high), limit
    precise = array if array.dtype.kind == "f" and array.dtype.itemsize > 4 else array.astype(np.float32)
    return (precise / (limit / 255)).round().clip(0, 255).astype(np.uint8), float(high), limit


def _refusal(array: np.ndarray) -> str:
    values = f"{array.dtype} from {array.min()} to {array.max()}"
    return f"holds {values}; give uint8, or floats in [0, 1] (hints: or their largest value as --hint-scale)"


def _decode_picture(image: Image.Image, reading: Reading) -> Decoded:
    raw, kinds = _raw_mode(image), _kinds(image)
    ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies images that need no turning, too
    return _to_pixels(image, raw, reading)._replace(kinds=kinds)


def _to_pixels(image: Image.Image, raw: str, reading: Reading) -> Decoded:
    """The picture as an array. `raw`: the result of `_raw_mode`."""
    premultiplied = {"RGBa": "RGBA", "La": "LA"}
    image = image.convert(premultiplied[image.mode]) if image.mode in premultiplied else image
    if image.mode == "P" and reading.class_numbers:
        numbers, largest, full = to_uint8_range(np.asarray(image), 255, reading.scale)
        return Decoded(numbers[..., None], largest, full)
    alpha = _alpha(image, raw)
    largest, full = None, 255.0
    if image.mode[0] in "IF":  # Pillow's own conversion would clip these to 0..255
        numbers = np.asarray(image)
        full = 1.0 if image.mode == "F" else LARGEST.get(raw, 2**16 - 1)
        numbers = numbers.view(np.uint32) if full == 2**32 - 1 and numbers.dtype == np.int32 else numbers
        pixels, largest, full = to_uint8_range(numbers, full, reading.scale)
        image = Image.fromarray(pixels)
    if alpha is not None and reading.channels == 4:
        return Decoded(np.dstack([np.asarray(image.convert("RGB")), alpha]), 255, 255)
    mode = MODES[reading.channels or 3]
    array = np.asarray(image if image.mode == mode else image.convert(mode))  # which would copy
    array = array[..., None] if array.ndim == 2 else array
    if largest is None and reading.scale:
        array, largest, full = to_uint8_range(array, 255, reading.scale)
    brightness = -1.0
    if alpha is not None:
        weight = alpha.astype(np.float64)
        brightness = float((np.asarray(image.convert("L")) * weight).sum() / max(1.0, weight.sum()) / 255)
        array = lay_on(array, alpha, reading.ground if reading.ground in GROUNDS else visible_ground(brightness))
    return Decoded(array, float(array.max() if largest is None else largest), full, brightness)


def _kinds(image: Image.Image) -> tuple[str, ...]:
    """What a picture file that is not decoded yet is beyond RGB of 8 bits: keys of KINDS."""
    names = {"RGB": [], "1": ["gray"], "L": ["gray"], "P": ["palette"], "PA": ["palette", "alpha"], "CMYK": ["CMYK"]}
    names |= dict.fromkeys(("RGBA", "RGBa"), ["alpha"]) | dict.fromkeys(("LA", "La"), ["gray", "alpha"])
    raw = _raw_mode(image)
    mode = "LA" if raw.startswith("LA;") else image.mode  # Pillow opens gray with alpha of 16 bits as RGBA
    found = ["gray", "numbers"] if mode[0] in "IF" else names.get(mode, ["other colours"])
    if "16" in raw or image.mode.startswith("I;16"):
        found = [name for name in found if name != "numbers"] + ["16 bits"]
    return (*found, *(["turned"] if 2 <= _orientation(image) <= 8 else []))


def _orientation(image: Image.Image) -> int:
    """How the camera was held: 1 upright, 2 to 8 turned or mirrored; at 5 to 8 width and height change places."""
    return image.getexif().get(0x0112, 1)


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the format of the numbers in the file ("I;16B", "RGB;16B"), before the file is decoded."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    arguments = arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""


def _alpha(image: Image.Image, raw: str) -> np.ndarray | None:
    """How opaque each pixel is, (H,W) uint8, in whichever way the file says so; None if all pixels are opaque.

    `raw`: the result of `_raw_mode`. Beside a channel of its own, a palette can hold transparency, and a file can name
    one colour or shade that is transparent.
    """
    key = image.info.get("transparency")
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and image.has_transparency_data):
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    elif isinstance(key, int):
        steps = {"L;2": 85, "L;4": 17}.get(raw, 1)  # Pillow spreads shades of 2 and 4 bits over 0..255
        key = bool(key) if image.mode == "1" else key * steps
        alpha = np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)
    elif isinstance(key, tuple) and image.mode == "RGB":
        key = [value >> 8 if "16" in raw else value for value in key]
        alpha = np.where((np.asarray(image) == key).all(-1), 0, 255).astype(np.uint8)
    else:
        return None
    return None if alpha.min() == 255 else alpha


def visible_ground(brightness: float) -> str:
    """The ground on which something of this brightness (0..1) can be seen."""
    return "white" if brightness < 0.5 else "black"


def lay_on(array: np.ndarray, alpha: np.ndarray, ground: str) -> np.ndarray:
    """Lay (H,W,C) uint8 with `alpha` (H,W) uint8 on white or black."""
    opaque = alpha[..., None].astype(np.uint32)
    return ((array * opaque + GROUNDS[ground] * (255 - opaque) + 127) // 255).astype(np.uint8)


def size_on_disk(file: File, max_pixels: float = MAX_MEGAPIXELS * 1e6) -> Size:
    """The (width, height) of an image file, without decoding its pixels. Raises DataError."""
    with naming(file), open_file(file) as opened:
        if file.suffix.lower() == ".npy":
            height, width = _npy_header(opened, file_bytes(file))[0][:2]
            return width, height
        with _opened(opened, max_pixels) as image:
            tags = getattr(image, "tag_v2", None)  # of a TIFF file, whose `size` is turned in newer versions of Pillow
            size = (int(tags[256]), int(tags[257])) if tags else image.size
            return size[::-1] if _orientation(image) in (5, 6, 7, 8) else size


def is_plain(path: Path, content: bytes, max_pixels: float = MAX_MEGAPIXELS * 1e6) -> bool:
    """Whether every program reads the `content` of a file alike: a JPEG or PNG, with the ending of its format, RGB or
    gray in 8 bits, opaque, and not turned by an orientation tag. Raises DataError for what is no picture."""
    with naming(path), _opened(content, max_pixels) as image:
        named = Image.registered_extensions().get(path.suffix.lower())
        opaque = image.mode in ("L", "RGB") and "transparency" not in image.info and "16" not in _raw_mode(image)
        return opaque and image.format == named and named in ("JPEG", "PNG") and image.getexif().get(0x0112, 1) == 1


# --------------------------------------------------------------------------------------------------------------- saving
def save_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, with the same ending, and rename it to `path`: whatever happens,
    `path` is the whole new file or what stood there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        write(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def save_picture(
    path: str | Path, picture: np.ndarray | Image.Image, text: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """Save (H,W), (H,W,3) or (H,W,4) uint8 as a picture file, whole or not at all. DataError for an unknown ending.

    `text`: texts that a PNG file holds beside the picture, by their keys.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise DataError(f"{path}: the ending names no picture format; .png is one")
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    save_whole(path, partial(image.save, pnginfo=chunks) if text else image.save)


def save_hint(stem: Path, hint: np.ndarray) -> Path:
    """Save a hint (H,W,C) in [0,1] for `read_image` and return its path: a `.png`, or a `.npy` where C needs one."""
    array, channels = (hint * 255).round().astype(np.uint8), hint.shape[2]
    path = stem.with_suffix(".png" if channels in MODES else ".npy")
    if channels in MODES:
        save_picture(path, array[..., 0] if channels == 1 else array)
    else:
        save_whole(path, lambda partial: np.save(partial, array))
    return path


# ------------------------------------------------------------------------------------------------------------- resizing
def same_aspect(a: Size, b: Size) -> bool:
    """Whether two sizes (width, height) have the same aspect ratio, to within the rounding of a pixel."""
    return abs(a[0] * b[1] - b[0] * a[1]) < max(*a, *b)


def fraction_cut(native: Size, size: Size) -> float:
    """How much of the area of an image (width, height) is cut off when it is scaled to cover `size`: 0..1."""
    scale = min(native[0] / size[0], native[1] / size[1])
    return 1 - size[0] * scale * size[1] * scale / (native[0] * native[1])


@dataclass(frozen=True)
class Framing:
    """What is done to an image before training: it is scaled to cover `size`, cut, and perhaps mirrored.

    native: (width, height) of the image as it was; size: (width, height) of what becomes of it. Scaled to cover `size`,
    the image is too long on one side at most: `position` says what is kept there, from 0 (the left or upper end) over
    0.5 (the middle) to 1. flipped: left and right are exchanged afterwards.
    """

    native: Size
    size: Size
    position: float = 0.5
    flipped: bool = False

    @property
    def scale(self) -> float:
        """How many pixels of the image as it was become one pixel."""
        return min(self.native[0] / self.size[0], self.native[1] / self.size[1])

    @property
    def excess(self) -> tuple[float, float]:
        """How many pixels of width and of height are cut off the scaled image."""
        return tuple(max(0.0, n / self.scale - s) for n, s in zip(self.native, self.size, strict=True))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is kept, in pixels of the image as it was."""
        starts, ends = [], []
        for native, size in zip(self.native, self.size, strict=True):
            kept, before = size * self.scale, self.position
            starts.append(max(0.0, native * before - kept * before))  # rounding would put it outside of the image
            ends.append(min(float(native), native * before + kept * (1 - before)))
        return *starts, *ends

    @property
    def deviation(self) -> tuple[object, ...]:
        """What is not as usual, for keys of what is computed from the image; empty: in the middle and not flipped."""
        return (self.position, self.flipped) if (self.position, self.flipped) != (0.5, False) else ()

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told of an image (Podell et al. 2023, arXiv:2307.01952, 2.2): height and width as it was, pixels
        that were cut at the top and at the left after scaling, height and width as it is.

        In a flipped image the pixels that are missing at the left are those that were cut at the right.
        """
        (wide, high), before = self.excess, self.position
        left = wide * (1 - before if self.flipped else before)
        return *self.native[::-1], round(high * before), round(left), *self.size[::-1]


def resize(
    array: np.ndarray, size: Size, resample: Image.Resampling, position: float = 0.5, flipped: bool = False
) -> np.ndarray:
    """Scale (H,W,C) to cover `size` (width, height), cut and flip as in `Framing`: (height,width,C), same dtype."""
    framing = Framing(array.shape[1::-1], tuple(size), position, flipped)
    if framing.native != framing.size:
        array = _resample(array, framing, resample)
    return array[:, ::-1] if flipped else array


def _resample(array: np.ndarray, framing: Framing, resample: Image.Resampling) -> np.ndarray:
    size, box = framing.size, framing.box
    if array.dtype == np.uint8 and array.shape[2] in (3, 4):
        return np.asarray(Image.fromarray(array).resize(size, resample, box=box))
    planes = np.ascontiguousarray(array.transpose(2, 0, 1))
    resized = [np.asarray(Image.fromarray(plane).resize(size, resample, box=box)) for plane in planes]
    return np.stack(resized, axis=-1)
