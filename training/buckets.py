"""Which size does each image train at, and which part of the image is seen?

Networks compute with images whose sides are multiples of 64 pixels or so, and a batch holds images of one size. Either
all images become one size, whose shape then cuts into those of another shape; or with buckets each image takes, of many
sizes of about one area, the one that cuts least of it:

    1500x1000 --+                 +--> 1216x832         0.7%
     800x1200 --+--> of 1024x1024 +--> 832x1216 ...     cut off
    1000x1000 --+                 +--> 1024x1024

That is how SDXL was trained (Podell et al. 2023, arXiv:2307.01952, 2.3), after NovelAI's "aspect ratio bucketing". What
is cut off one side can be cut at one of several positions, and images can be flipped: an item then has variants, each
of which is encoded and cached once.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.images import RESAMPLE, DataError, Framing, Size, fraction_cut, resize
from training.randomness import derive_seed

LONGEST = 4  # the largest aspect ratio of a bucket


# ------------------------------------------------------------------------------------------------------------ one size
def parse_resolution(text: str) -> Size:
    """Parse "512" into (512, 512) and "512x768" into (512, 768): width, height in pixels."""
    try:
        sides = [int(side) for side in str(text).lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1 or max(sides) > 16384:
        raise DataError(f"a resolution is N or WxH of 1 to 16384 pixels (512, 512x768), not {str(text)[:100]!r}")
    return sides[0], sides[-1]


def fit_size(size: Size, multiple: int) -> Size:
    """The size nearest to `size` (width, height) whose sides are multiples of `multiple`, at least one each."""
    return tuple(max(multiple, round(side / multiple) * multiple) for side in size)


def choose_size(resolution: str, native: Size, multiple: int) -> Size:
    """The size to compute with: `resolution` ("512", "512x768"), or `native` if that is empty, by `fit_size`.

    Prints a line if the wanted size cannot be kept.
    """
    wanted = parse_resolution(resolution) if resolution else tuple(native)
    size = fit_size(wanted, multiple)
    if size != wanted:
        sizes = f"{wanted[0]}x{wanted[1]} becomes {size[0]}x{size[1]}"
        print(f"{sizes}: this UNet needs sides that are multiples of {multiple} pixels")
    return size


# ------------------------------------------------------------------------------------------------------------- buckets
def bucket_sizes(size: Size, multiple: int) -> list[Size]:
    """The sizes (width, height) of buckets for the area of `size`, from tall to wide: none has a larger area, so none
    takes more memory.

    For each side the other one is as long as the area allows or one step shorter, up to an aspect ratio of 4. A step is
    `multiple`, or the largest multiple of it in a sixteenth of a square's side: 64 at 1024x1024, where the list has all
    shapes with which SDXL was trained.
    """
    area, shapes = size[0] * size[1], {tuple(size)}
    step = multiple * max(1, int(area**0.5 / 16) // multiple)
    for side in range(step, int((area * LONGEST) ** 0.5) + 1, step):
        longest = area // side // step * step
        for other in (longest, longest - step):
            if other and max(side, other) <= LONGEST * min(side, other):
                shapes |= {(side, other), (other, side)}
    return sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape))


def nearest_bucket(native: Size, buckets: Sequence[Size]) -> Size:
    """The bucket that cuts least of an image (width, height); of equal ones the largest."""
    return min(buckets, key=lambda size: (round(fraction_cut(native, size), 9), -size[0] * size[1], size))


def describe_buckets(natives: Sequence[Size], buckets: Sequence[Size], places: Sequence[str]) -> list[str]:
    """Lines that say how many of the images (width, height) each bucket has, and how much of them is cut off. places:
    what messages call the images."""
    chosen = _nearest_of_all(natives, buckets)
    counts = Counter(chosen)
    used = sorted(counts, key=lambda size: (-counts[size], size))
    listed = ", ".join(f"{width}x{height}: {counts[width, height]}" for width, height in used)
    cut = [fraction_cut(native, size) for native, size in zip(natives, chosen, strict=True)]
    most = int(np.argmax(cut))
    (width, height), size = natives[most], chosen[most]
    lines = [f"{len(natives)} images in {len(used)} of {len(buckets)} buckets: {listed}"]
    if cut[most] < 5e-4:
        return [*lines, "nothing of them is cut off"]
    where = f"{places[most]}: {width}x{height} in {size[0]}x{size[1]}"
    return [*lines, f"{cut[most]:.1%} of an image is cut off at most ({where}), {sum(cut) / len(cut):.1%} on average"]


def _nearest_of_all(natives: Iterable[Size], buckets: Sequence[Size]) -> list[Size]:
    nearest = lru_cache(maxsize=None)(lambda native: nearest_bucket(native, buckets))
    return [nearest(tuple(native)) for native in natives]


# ------------------------------------------------------------------------------------------------------------ variants
@dataclass(eq=False)
class Framings:
    """How the items of a data set are framed in a run.

    sizes: the size of all items, or the buckets; bucket: for each item the number of its bucket (None: one size for
    all); natives: (width, height) of each target as it was (None: only known when an item is loaded). crops: at how
    many positions an item may be cut; flip: whether it may be flipped. Item i has the variants 0..`variants` - 1, of
    which number 0 is cut in the middle and not flipped.
    """

    sizes: Sequence[Size]
    bucket: np.ndarray | None = None
    natives: np.ndarray | None = None
    crops: int = 1
    flip: bool = False

    @property
    def variants(self) -> int:
        return self.crops * (2 if self.flip else 1)

    def size_of(self, i: int) -> Size:
        """The (width, height) at which item i trains."""
        return self.sizes[0 if self.bucket is None else self.bucket[i]]

    def framing(self, i: int, variant: int = 0, native: Size | None = None) -> Framing:
        """How a variant of item i is framed. native: the target's size as it was, if `natives` does not hold it."""
        if self.natives is not None:
            native = tuple(self.natives[i].tolist())
        crop, flipped = divmod(variant, 2) if self.flip else (variant, 0)
        framing = Framing(native, self.size_of(i), flipped=bool(flipped))
        if crop and max(framing.excess) >= 1:  # positions of less than a pixel are one position
            # beside the middle one position in each of equal parts of what can be cut off
            position = (crop - 1 + derive_seed("crop", i, crop) / 2**63) / (self.crops - 1)
            framing = replace(framing, position=position)
        return framing


def assign_buckets(natives: Iterable[Size], buckets: Sequence[Size]) -> np.ndarray:
    """For each image (width, height) the number of its bucket: (N,) int32."""
    number = {size: k for k, size in enumerate(buckets)}
    return np.array([number[size] for size in _nearest_of_all(natives, buckets)], dtype=np.int32)


class Framed:
    """What the data sets of `data.py` have in common: how their items are framed.

    A data set alone brings all images to its `size`, in the middle; a run sets `framings`, and then the items also have
    `sizes`, a tensor (6,) float32 of `Framing.numbers`.
    """

    size: Size | None
    framings: Framings | None = None

    @property
    def variants(self) -> int:
        """How many variants each item has."""
        return self.framings.variants if self.framings else 1

    def size_of(self, i: int) -> Size | None:
        """The (width, height) of item i's images; None: they stay as they are."""
        return self.framings.size_of(i) if self.framings else self.size

    def framing(self, i: int, variant: int = 0, native: Size | None = None) -> Framing:
        """How a variant of item i is framed; `native` as in `Framings.framing`."""
        return self.framings.framing(i, variant, native) if self.framings else Framing(native, self.size or native)

    def told_sizes(self, framing: Framing) -> dict[str, Tensor]:
        """`sizes` of an item that is framed so, if the items of this data set have that."""
        return {"sizes": torch.tensor(framing.numbers, dtype=torch.float32)} if self.framings else {}


def frame_keys(extra: dict[str, Any], framing: Framing, resample: str) -> dict[str, Any]:
    """Further keys of an item. Arrays and tensors of the target's height and width, (H,W), (H,W,C) or (C,H,W), are
    scaled, cut and flipped; other values stay as they are. Floats and uint8 are pixels and scaled as the hint is, by
    `resample` (a name in RESAMPLE); of other whole numbers and of bools, which are classes, the nearest is taken."""
    moved = framing.native != framing.size or framing.flipped
    return {name: _frame(value, framing, resample) if moved else value for name, value in extra.items()}


def _frame(value: Any, framing: Framing, resample: str) -> Any:
    shape, size = np.shape(value), framing.native[::-1]
    axes = (0, 1) if shape[:2] == size and len(shape) in (2, 3) else (1, 2) if shape[1:] == size else None
    if axes is None:
        return value
    if isinstance(value, torch.Tensor):
        array = value.detach().float() if value.is_floating_point() else value
        return torch.from_numpy(_frame(array.numpy(), framing, resample)).to(value.dtype)
    scale = lambda planes, how: resize(planes, framing.size, RESAMPLE[how], framing.position, framing.flipped)
    planes = np.moveaxis(value, axes, (0, 1)).reshape(*size, -1)
    if value.dtype == np.uint8:
        planes = scale(planes, resample)
    elif value.dtype.kind == "f":
        planes = scale(planes.astype(np.float32), resample).astype(value.dtype)
    else:  # from which row and column each value comes
        places = np.stack(np.indices(size), axis=-1).astype(np.float32)
        rows, columns = np.moveaxis(scale(places, "nearest").astype(int), -1, 0)
        planes = planes[rows, columns]
    return np.moveaxis(planes if len(shape) == 3 else planes[..., 0], (0, 1), axes).copy()
