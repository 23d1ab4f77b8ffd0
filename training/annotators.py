"""Hints made from photos without a network: edges, scribbles, shades, blurs and blocks of colour.

The ControlNet paper (Zhang et al. 2023, arXiv:2302.05543) trains each ControlNet on pairs of a photo and the hint that
an *annotator* made from it. The trained ControlNet then turns such hints, drawn by hand or made from another picture,
into photos. The annotators here need numpy and Pillow alone:

    canny        thin white lines where the brightness changes        Canny 1986, equal to OpenCV's `cv2.Canny`
    sobel        how steep each change is, in shades of gray          Sobel and Feldman 1968
    scribble     a few thick lines, as a person would draw them       the paper's scribbles, from Canny's edges
    gray         brightness without colour (colouring old photos)     ITU-R BT.601
    blur         the photo out of focus                               Gauss; Gwosdek et al. 2011
    downscale    the photo in fewer pixels (sharpening)               means of blocks
    color-grid   where which colour is, coarsely                      the colour palette of T2I-Adapter, Mou et al. 2023

An annotator takes a photo (H,W,3) uint8, or a gray one as (H,W,1) or (H,W), and returns the hint, (H,W,1) or (H,W,3)
uint8. Its result depends on nothing else than the photo and the parameters. `ANNOTATORS` is the table of all with their
parameters, for the command line and whatever else offers them; `annotate` calls one by its name, parameters checked.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from training.images import DataError

TAN_22 = round((2**0.5 - 1) * 2**15)  # tan(22.5 degrees) in units of 2^-15: 13573


class Parameter(NamedTuple):
    """A number that an annotator takes: whole if the default is an int; `low` and `high` are the ends of its range."""

    name: str
    default: float
    low: float
    high: float
    help: str


class Annotator(NamedTuple):
    """An annotator with what a user needs to know: its parameters, what its hints show, and what they are good for."""

    function: Callable[..., np.ndarray]
    parameters: tuple[Parameter, ...]
    help: str


# --------------------------------------------------------------------------------------------------------------- edges
def canny(image: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """Edges by Canny's method (A computational approach to edge detection, 1986): (H,W,1) uint8, 255 on edges, else 0.

    An edge pixel is a local maximum of the gradient across the edge (so lines are one pixel thin), steeper than `low`,
    and connected by such pixels to one steeper than `high` (hysteresis: a line does not break where it fades).

    Steepness is |dx| + |dy| of Sobel's filters of 3x3 pixels, 0 to 2040: a step of brightness by s, straight up or
    across, has 4s. Of several channels the steepest counts, the first of equals. All arithmetic is in whole numbers,
    the same as in OpenCV (`modules/imgproc/src/canny.cpp`: aperture 3, L1 norm, no blur before), and so is the result.
    The thresholds may be given in either order.
    """
    return _drawn(edge_pixels(_with_channels(image), low, high), *image.shape[:2])


def edge_pixels(image: np.ndarray, low: int, high: int) -> np.ndarray:
    """Where Canny's edges are in an image (H,W,C): flat numbers (N,) of pixels, ascending, in the image with a border
    of one pixel around it, which has (H+2) * (W+2).

    In such numbers the neighbours of pixel i are i +- 1, i +- stride and i +- stride +- 1, where stride = W+2, and the
    border, which is never steep, saves every test whether a pixel has neighbours.
    """
    low, high = sorted((low, high))
    low = max(low, 0)  # the border has a steepness of 0
    stride = image.shape[1] + 2
    dx, dy, steepness = (np.pad(values, 1).ravel() for values in _steepest(image))
    pixels = np.flatnonzero(steepness > low)
    step, straight = _across_edge(dx[pixels], dy[pixels], stride)
    here, before, after = steepness[pixels], steepness[pixels - step], steepness[pixels + step]
    pixels = pixels[(here > before) & ((here > after) | (straight & (here == after)))]
    label = connected(pixels, stride)
    strong = np.zeros(len(pixels), dtype=bool)
    strong[label[steepness[pixels] > high]] = True
    return pixels[strong[label]]


def _drawn(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """White on black, (H,W,1) uint8, from the result of `edge_pixels`."""
    flat = np.zeros((height + 2) * (width + 2), dtype=np.uint8)
    flat[pixels] = 255
    return flat.reshape(height + 2, width + 2, 1)[1:-1, 1:-1]


def _steepest(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dy and |dx| + |dy| of the channel in which that sum is largest: three arrays (H,W)."""
    dx, dy = gradient(image[..., 0])
    steepness = abs(dx) + abs(dy)
    for channel in range(1, image.shape[2]):
        other_dx, other_dy = gradient(image[..., channel])
        other = abs(other_dx) + abs(other_dy)
        larger = other > steepness
        for values, others in ((dx, other_dx), (dy, other_dy), (steepness, other)):
            np.copyto(values, others, where=larger)
    return dx, dy, steepness


def gradient(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's filters on (H,W): the change to the right, dx, and downwards, dy, (H,W), for uint8 int16 within +-1020.

    Each is the difference of two neighbours two pixels apart, summed over three rows or columns with the weights 1, 2,
    1. Beyond its border the image goes on with the border's pixels.
    """
    p = np.pad(plane.astype(np.result_type(plane, np.int16)), 1, mode="edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]
    columns = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    return rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]


def _across_edge(dx: np.ndarray, dy: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """The step from each of N pixels to its neighbour in the direction of the gradient, in flat numbers, and whether
    that is along a row or a column, where of two equally steep pixels the first is the maximum: two arrays (N,).

    There are four directions, each 45 degrees wide: |dy| is compared with tan(22.5) |dx| and with tan(67.5) |dx|, which
    is (tan(22.5) + 2) |dx|. On a diagonal a maximum is steeper than both of its neighbours.
    """
    dx, dy = dx.astype(np.int64), dy.astype(np.int64)
    x, y = abs(dx) * TAN_22, abs(dy) << 15
    along_row, along_column = y < x, y > x + (abs(dx) << 16)
    rising = (dx ^ dy) < 0  # opposite signs: to the upper right or the lower left
    diagonal = np.where(rising, stride - 1, stride + 1)
    return np.where(along_row, 1, np.where(along_column, stride, diagonal)), along_row | along_column


def connected(pixels: np.ndarray, stride: int) -> np.ndarray:
    """Which of `pixels` are connected through neighbours (8 each): for each, the place in `pixels` of the first one of
    its group.

    `pixels` (N,) are flat numbers in rows of `stride`, ascending, none of them at the border. All groups are joined at
    once (as in Shiloach and Vishkin, An O(log n) parallel connectivity algorithm, 1982): every group that touches an
    earlier one becomes a part of the earliest such; then each pixel takes the group of its group until that is final.
    A line takes a few rounds however long it is; followed pixel by pixel it would take as many as it has pixels.
    """
    number = np.full(pixels[-1] + stride + 2 if len(pixels) else 0, -1, dtype=np.int32)
    number[pixels] = np.arange(len(pixels))
    neighbours = [number[pixels + step] for step in (1, stride - 1, stride, stride + 1)]
    a = np.concatenate([np.flatnonzero(neighbour >= 0) for neighbour in neighbours])
    b = np.concatenate([neighbour[neighbour >= 0] for neighbour in neighbours])
    label = np.arange(len(pixels))
    while len(a):
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while True:
            further = label[label]
            if np.array_equal(further, label):
                break
            label = further
        a, b = label[a], label[b]
        apart = a != b
        a, b = a[apart], b[apart]
    return label


def sobel(image: np.ndarray, gain: float = 3.0) -> np.ndarray:
    """The length of the gradient of the brightness by Sobel's filters: (H,W,1) uint8.

    A straight step of brightness by s comes out as `gain` * s, and 255 where that is more. (Sobel and Feldman, A 3x3
    isotropic gradient operator for image processing, 1968.)
    """
    dx, dy = (values.astype(np.float32) for values in gradient(gray(image)[..., 0]))
    return (np.sqrt(dx * dx + dy * dy) * (gain / 4)).round().clip(0, 255).astype(np.uint8)[..., None]


def scribble(
    image: np.ndarray, width: int = 8, radius: float = 4.0, length: int = 50, low: int = 10, high: int = 30
) -> np.ndarray:
    """A few thick lines such as a person would draw: (H,W,1) uint8, 255 on lines, else 0. All sizes are in pixels.

    The paper makes scribbles from the edges of a network (HED, Xie and Tu 2015) that it thins, blurs and thickens. Here
    Canny's method finds the edges at a coarse scale, as its author proposes: after a Gaussian blur with the standard
    deviation `radius`, in which small things vanish. Lines of fewer than `length` pixels are left out; the others are
    drawn with a round pen of `width`. `low` and `high` are Canny's thresholds, for the blurred brightness.
    """
    height, columns = image.shape[:2]
    # In whole shades a slope this gentle would be a staircase, and lines would break: parts of shades are kept.
    blurred = (256 * gaussian(gray(image)[..., 0], radius)).round().astype(np.int32)
    pixels = edge_pixels(blurred[..., None], 256 * low, 256 * high)
    label = connected(pixels, columns + 2)
    pixels = pixels[np.bincount(label, minlength=1)[label] >= length]
    return _with_pen(_drawn(pixels, height, columns)[..., 0], width)[..., None]


def gaussian(plane: np.ndarray, radius: float) -> np.ndarray:
    """(H,W) blurred with a Gaussian of standard deviation `radius` pixels, cut off at three of them: (H,W) float32.

    Beyond its border the image goes on with the border's pixels.
    """
    reach = max(1, round(3 * radius))
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * radius**2))
    weights = (weights / weights.sum()).astype(np.float32)
    for _ in range(2):  # along the columns, then, transposed, along the rows
        padded = np.pad(plane.astype(np.float32), ((reach, reach), (0, 0)), mode="edge")
        plane = sum(weight * padded[i : i + len(plane)] for i, weight in enumerate(weights)).T
    return plane


def _with_pen(lines: np.ndarray, width: int) -> np.ndarray:
    """(H,W) uint8 with every white pixel replaced by a white disc, `width` pixels across."""
    height, columns = lines.shape
    padded, thick = np.pad(lines, width), np.zeros_like(lines)
    middle = (width - 1) / 2
    for i, j in np.ndindex(width, width):
        if (i - middle) ** 2 + (j - middle) ** 2 <= (width / 2) ** 2:
            top, left = width - width // 2 + i, width - width // 2 + j
            thick |= padded[top : top + height, left : left + columns]
    return thick


# ------------------------------------------------------------------------------------------------- shades and colours
def gray(image: np.ndarray) -> np.ndarray:
    """The brightness, 0.299 red + 0.587 green + 0.114 blue (ITU-R BT.601): (H,W,1) uint8."""
    image = _with_channels(image)
    return image if image.shape[2] == 1 else np.asarray(Image.fromarray(image).convert("L"))[..., None]


def blur(image: np.ndarray, radius: float = 8.0) -> np.ndarray:
    """The photo blurred by a Gaussian of standard deviation `radius` pixels: (H,W,C) uint8.

    This is Pillow's filter, which runs boxes over the image instead and takes as long for every radius (Gwosdek et al.,
    Theoretical foundations of Gaussian convolution by extended box filtering, 2011).
    """
    image = _with_channels(image)
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return _with_channels(np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))))


def downscale(image: np.ndarray, factor: int = 8) -> np.ndarray:
    """The photo with 1 pixel for each `factor` x `factor`, their mean, enlarged to the photo's size: (H,W,C) uint8.

    A small picture given as a hint is enlarged to the same blocks. At the right and lower border blocks may be smaller.
    """
    return _blocks(image, *(np.arange(0, side, factor) for side in image.shape[:2]))


def color_grid(image: np.ndarray, cells: int = 8) -> np.ndarray:
    """The mean colour of each cell of a grid that has `cells` along the photo's shorter side: (H,W,C) uint8.

    The cells are as near to squares as whole numbers of them and of pixels allow. (T2I-Adapter, Mou et al. 2023,
    arXiv:2302.08453, whose spatial colour palette has cells of 64 pixels.)
    """
    sides, shorter = image.shape[:2], min(image.shape[:2])
    counts = (min(side, max(1, round(cells * side / shorter))) for side in sides)
    return _blocks(image, *(np.arange(n) * side // n for n, side in zip(counts, sides, strict=True)))


def _blocks(image: np.ndarray, tops: np.ndarray, lefts: np.ndarray) -> np.ndarray:
    """(H,W,C) uint8 with every block of a grid filled with its mean. `tops`, `lefts`: the first rows and columns."""
    image = _with_channels(image)
    heights, widths = np.diff(tops, append=image.shape[0]), np.diff(lefts, append=image.shape[1])
    sums = np.add.reduceat(np.add.reduceat(image, tops, axis=0, dtype=np.int64), lefts, axis=1)
    pixels = (heights[:, None] * widths)[..., None]
    means = ((2 * sums + pixels) // (2 * pixels)).astype(np.uint8)  # rounded to the nearest
    return means.repeat(heights, axis=0).repeat(widths, axis=1)


def _with_channels(image: np.ndarray) -> np.ndarray:
    """(H,W,C) of (H,W,C) or (H,W)."""
    return image[..., None] if image.ndim == 2 else image


# ---------------------------------------------------------------------------------------------------------- the table
_LOW, _HIGH = "edges end where the gradient falls below this", "an edge needs one pixel with a gradient above this"
ANNOTATORS = {
    "canny": Annotator(
        canny, (Parameter("low", 100, 0, 2040, _LOW), Parameter("high", 200, 0, 2040, _HIGH)), "thin edges"
    ),
    "sobel": Annotator(
        sobel,
        (Parameter("gain", 3.0, 0.1, 20.0, "brightness of the hint for a step of brightness in the photo"),),
        "soft edges: how steep each change is",
    ),
    "scribble": Annotator(
        scribble,
        (
            Parameter("width", 8, 1, 64, "thickness of the lines in pixels"),
            Parameter("radius", 4.0, 0.5, 20.0, "blur before, in pixels: more leaves out more detail"),
            Parameter("length", 50, 0, 1000, "shortest line that is drawn, in pixels"),
            Parameter("low", 10, 0, 2040, _LOW),
            Parameter("high", 30, 0, 2040, _HIGH),
        ),
        "a few thick lines",
    ),
    "gray": Annotator(gray, (), "the photo without colour"),
    "blur": Annotator(
        blur, (Parameter("radius", 8.0, 0.1, 200.0, "standard deviation of the blur in pixels"),), "the photo blurred"
    ),
    "downscale": Annotator(
        downscale,
        (Parameter("factor", 8, 2, 256, "pixels of the photo for one of the hint"),),
        "the photo in few pixels",
    ),
    "color-grid": Annotator(
        color_grid, (Parameter("cells", 8, 1, 256, "cells along the shorter side"),), "the mean colour of each cell"
    ),
}


def complete(kind: str, given: dict[str, float]) -> dict[str, float]:
    """All parameters of the annotator `kind`: those `given`, and the defaults of the others, in the table's order.

    DataError for an unknown kind or parameter and for a value outside of its range.
    """
    if kind not in ANNOTATORS:
        raise DataError(f"no kind of hint is called {kind!r}; there are {', '.join(ANNOTATORS)}")
    known = {parameter.name: parameter for parameter in ANNOTATORS[kind].parameters}
    for name, value in given.items():
        if name not in known:
            takes = f"it takes {' and '.join(known)}" if known else "it takes none"
            raise DataError(f"{kind} has no parameter {name!r}: {takes}")
        whole, low, high = isinstance(known[name].default, int), known[name].low, known[name].high
        if not isinstance(value, (int, float)) or not low <= value <= high or (whole and value != int(value)):
            raise DataError(f"{name} of {kind} is a {'whole ' * whole}number from {low:g} to {high:g}, not {value!r}")
    values = {name: given.get(name, parameter.default) for name, parameter in known.items()}
    return {name: type(known[name].default)(value) for name, value in values.items()}


def annotate(kind: str, image: np.ndarray, **parameters: float) -> np.ndarray:
    """The hint of `kind` for a photo (H,W,3), (H,W,1) or (H,W) uint8: (H,W,3) or (H,W,1) uint8. Raises DataError."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or not image.size:
        shape = f"{image.dtype} {image.shape}"
        raise DataError(f"a photo is (height, width, 3) or (height, width, 1) of uint8, not {shape}")
    parameters = complete(kind, parameters)
    return ANNOTATORS[kind].function(image, **parameters)
