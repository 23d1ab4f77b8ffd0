"""Reading, resizing and saving the images of a data set.

Image files come in many kinds: with alpha or without, gray with 16 bits a pixel (depth maps), turned by the camera, cut
short. `read_image` brings all of them to (H,W,C) uint8 or says in one line what is wrong with the file. Hints may have
any number of channels; those that no picture format can hold are `.npy` files.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

RESAMPLE = {"area": Image.Resampling.BOX, "nearest": Image.Resampling.NEAREST}
Size = tuple[int, int]  # (width, height) in pixels
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # number of channels -> Pillow's mode


class DataError(ValueError):
    """A data set that cannot be trained on. The message names the file, the line and what to do about the problem."""


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn any of the many exceptions of image decoders into a DataError of one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as e:
        reason = "no such image" if isinstance(e, FileNotFoundError) else f"not a readable image ({e})"
        raise DataError(f"{path}: {reason}") from e


def read_image(path: str | Path, channels: int | None = 3) -> np.ndarray:
    """Read an image file as (H,W,channels) uint8.

    Pictures can be read with 1, 3 or 4 channels; `.npy` files, (H,W,C) of uint8 or of floats in [0,1], have any number.
    With `channels` None a picture is read as RGB and a `.npy` file with the channels it has. Raises DataError.
    """
    path = Path(path)
    with _naming(path):
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            array = array[..., None] if array.ndim == 2 else array
            if array.dtype != np.uint8:
                if array.dtype.kind != "f" or array.min() < 0 or array.max() > 1:
                    values = f"{array.dtype} from {array.min()} to {array.max()}"
                    raise DataError(f"{path}: holds {values}; give uint8, or floats in [0, 1]")
                array = (array * 255).round().astype(np.uint8)
            if array.ndim != 3 or channels not in (None, array.shape[2]):
                raise DataError(f"{path}: is {array.shape}, should be (height, width, {channels})")
            return array
        with Image.open(path) as image:
            if channels not in (None, *MODES):
                other = f"for {channels} give .npy files of (height, width, {channels})"
                raise DataError(f"{path}: a picture has 1, 3 or 4 channels; {other}")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, as in depth maps; Pillow's own conversion would clip them
                pixels = (np.asarray(image).astype(np.float32) / 257).round().clip(0, 255)
                image = Image.fromarray(pixels.astype(np.uint8))
            array = np.asarray(image.convert(MODES[channels or 3]))
        return array[..., None] if array.ndim == 2 else array


def size_on_disk(path: Path) -> Size:
    """The (width, height) of an image file, without decoding its pixels. Raises DataError."""
    with _naming(path):
        if path.suffix == ".npy":
            height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
            return width, height
        with Image.open(path) as image:
            quarter_turn = image.getexif().get(0x0112, 1) >= 5  # the camera's orientation tag
            return image.size[::-1] if quarter_turn else image.size


def save_hint(stem: Path, hint: np.ndarray) -> Path:
    """Save a hint (H,W,C) in [0,1] for `read_image` and return its path: a `.png`, or a `.npy` where C needs one."""
    array, channels = (hint * 255).round().astype(np.uint8), hint.shape[2]
    path = stem.with_suffix(".png" if channels in MODES else ".npy")
    if channels in MODES:
        Image.fromarray(array[..., 0] if channels == 1 else array).save(path)
    else:
        np.save(path, array)
    return path


def resize(array: np.ndarray, size: Size, resample: Image.Resampling) -> np.ndarray:
    """Scale (H,W,C) to cover `size` (width, height) and cut out the middle: (height,width,C) of the same dtype."""
    height, width = array.shape[:2]
    if (width, height) == tuple(size):
        return array
    scale = min(width / size[0], height / size[1])  # source pixels per target pixel
    w, h = size[0] * scale, size[1] * scale
    box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
    if array.dtype == np.uint8 and array.shape[2] in (3, 4):
        return np.asarray(Image.fromarray(array).resize(size, resample, box=box))
    planes = np.ascontiguousarray(array.transpose(2, 0, 1))
    resized = [np.asarray(Image.fromarray(plane).resize(size, resample, box=box)) for plane in planes]
    return np.stack(resized, axis=-1)
