"""Hints from photos: exact values on small images, and Canny's edges as OpenCV finds them."""

import inspect
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import annotators
from training.annotators import ANNOTATORS, annotate, complete
from training.images import DataError

KINDS = pytest.mark.parametrize("kind", ANNOTATORS)


@cache
def photo(name: str) -> np.ndarray:
    """A photograph of scikit-image's, (H,W,3) or (H,W) uint8."""
    data = pytest.importorskip("skimage.data")
    return np.asarray(Image.open(Path(data.__file__).parent / name))


def step(low: int, high: int, size: int = 16) -> np.ndarray:
    """Dark on the left, bright on the right from the middle on: (size,size) uint8."""
    return np.repeat(np.where(np.arange(size) < size // 2, low, high)[None], size, 0).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- canny
@pytest.mark.parametrize(
    "name", ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "coins.png"]
)
@pytest.mark.parametrize("low, high", [(100, 200), (20, 60), (0, 0), (400, 200)])
def test_canny_is_opencvs_on_photographs(name, low, high):
    cv2 = pytest.importorskip("cv2")
    image = np.ascontiguousarray(photo(name)[:, :, :3] if photo(name).ndim == 3 else photo(name))
    edges = annotators.canny(image, low, high)
    assert edges.shape == (*image.shape[:2], 1) and 0.01 < (edges == 255).mean() < 0.5
    assert np.array_equal(edges[..., 0], cv2.Canny(image, low, high))


def test_canny_is_opencvs_on_images_of_any_size_and_contrast():
    """Noise and a few flat shades (where many neighbours are equally steep), from one pixel on, gray and colour."""
    cv2 = pytest.importorskip("cv2")
    random = np.random.default_rng(0)
    for number in range(400):
        shape = (*random.integers(1, 24, 2), *[(), (1,), (3,)][number % 3])
        shades, contrast = random.choice([2, 3, 256]), random.integers(1, 128)
        image = (random.integers(0, shades, shape) * (1 if shades == 256 else contrast)).astype(np.uint8)
        low, high = (int(value) for value in random.integers(-60, 1200, 2))
        edges = annotators.canny(image, low, high)[..., 0]
        assert np.array_equal(edges, cv2.Canny(image, low, high)), (number, shape, low, high)


@pytest.mark.parametrize("turns", range(4))
def test_canny_draws_a_step_as_one_line_of_one_pixel(turns):
    edges = annotators.canny(np.rot90(step(0, 60), turns).copy(), 100, 200)[..., 0]
    expected = np.zeros((16, 16), np.uint8)
    expected[:, 7] = 255  # the last dark column, the first of two that are equally steep
    found = np.rot90(edges, -turns)
    assert np.array_equal(found, expected if turns in (0, 3) else np.roll(expected, 1, axis=1))


def test_canny_keeps_faint_edges_that_are_connected_to_clear_ones():
    fading = np.zeros((31, 16), np.uint8)
    fading[:, 8:] = 60 - np.arange(31)[:, None]  # gradients of 4 * 60, 4 * 59, ... 4 * 30 across, and 8 downwards
    assert (annotators.canny(fading, 100, 200)[:, 8, 0] == 255).all()
    assert not annotators.canny(step(0, 40), 100, 200).any()
    only_clear = annotators.canny(fading, 202, 203)[:, 8, 0]  # above 202 are the first 11: 4 * 50 + 8
    assert only_clear[:11].all() and not only_clear[11:].any()
    assert annotators.canny(step(0, 51), 100, 203).any() and not annotators.canny(step(0, 51), 100, 204).any()


def test_canny_takes_the_steepest_channel():
    red_and_blue = np.dstack([step(0, 40), np.zeros((16, 16), np.uint8), step(90, 0)])
    assert np.array_equal(annotators.canny(red_and_blue, 300, 350), annotators.canny(step(90, 0), 300, 350))
    assert annotators.canny(red_and_blue, 300, 350).any()


def test_connected_finds_the_groups_however_long_and_winding():
    measure = pytest.importorskip("skimage.measure")
    random, size = np.random.default_rng(1), 60
    winding = np.zeros((size, size), bool)
    winding[1:-1:2, 1:-1] = True
    for row in range(2, size - 2, 2):
        winding[row, 1 if row % 4 else -2] = True
    images = [winding, winding & (random.random((size, size)) < 0.95), *(random.random((8, size, size)) < 0.3)]
    for image in images:
        image[[0, -1]] = image[:, [0, -1]] = False
        pixels = np.flatnonzero(image)
        label = annotators.connected(pixels, size)
        expected = measure.label(image, connectivity=2).ravel()[pixels]
        assert len(set(zip(label, expected, strict=True))) == len(set(label)) == len(set(expected))
        assert all(label[place] == place <= at for at, place in enumerate(label))  # the first of the group
    assert len(set(annotators.connected(np.flatnonzero(winding), size))) == 1
    assert annotators.connected(np.array([], dtype=np.int64), size).shape == (0,)


# --------------------------------------------------------------------------------------------------- sobel and scribble
def test_sobel_is_the_height_of_a_step():
    hint = annotators.sobel(step(50, 90), gain=2.0)
    expected = np.zeros((16, 16, 1), np.uint8)
    expected[:, 7:9] = 80
    assert np.array_equal(hint, expected)
    assert annotators.sobel(step(0, 200), gain=2.0).max() == 255 and not annotators.sobel(step(7, 7)).any()
    slope = (2 * np.arange(12)[:, None] + 2 * np.arange(12)).astype(np.uint8)  # dx = dy = 16
    assert (annotators.sobel(slope, gain=3.0)[1:-1, 1:-1] == round(3 * 16 * 2**0.5 / 4)).all()


@pytest.mark.parametrize(
    "width, rows",
    [(1, ["#"]), (2, ["##", "##"]), (3, ["###", "###", "###"]), (4, [".##.", "####", "####", ".##."])]
    + [(5, [".###.", "#####", "#####", "#####", ".###."])],
)
def test_the_pen_is_a_disc_of_its_width(width, rows):
    lines = np.zeros((11, 11), np.uint8)
    lines[5, 5] = 255
    inked = annotators._with_pen(lines, width)
    places = np.argwhere(inked)
    top, left = places.min(0)
    assert ["".join(".#"[v // 255] for v in row) for row in inked[top:, left:][:width, :width].tolist()] == rows
    assert tuple(places.max(0) - (top, left)) == (width - 1, width - 1) and set(np.unique(inked)) == {0, 255}
    assert abs((places.min(0) + places.max(0)) / 2 - 5).max() <= 0.5
    corner = np.zeros((11, 11), np.uint8)
    corner[0, 0] = 255  # a pen that reaches over the border does not come back on the other side
    assert not annotators._with_pen(corner, width)[width:].any()


def test_scribble_draws_long_lines_thick_and_leaves_out_short_ones():
    image = np.zeros((96, 96), np.uint8)
    image[:, 40:] = 200
    image[8:14, 8:14] = 200  # a spot with an outline of some 30 pixels
    hint = annotators.scribble(image, width=7, radius=2.0, length=50)[..., 0]
    assert (hint[:, 36:43] == 255).all() and not hint[:, :36].any() and not hint[:, 43:].any()
    assert annotators.scribble(image, width=7, radius=2.0, length=5)[:30, :20].any()
    assert annotators.scribble(image, radius=2.0, length=96).any()
    assert not annotators.scribble(image, radius=2.0, length=97).any()
    assert not annotators.scribble(np.full((40, 40), 9, np.uint8)).any()


def test_lines_do_not_break_on_slopes_of_less_than_a_shade_a_pixel():
    """A faint disc, much blurred: its outline is one closed line."""
    y, x = np.mgrid[:128, :128]
    disc = np.where(np.hypot(x - 63.5, y - 63.5) < 40, 120, 90).astype(np.uint8)
    hint = annotators.scribble(disc, width=1, radius=5.0, length=150, low=5, high=15)[..., 0]
    y, x = np.nonzero(hint)
    angles = np.sort(np.arctan2(y - 63.5, x - 63.5))
    assert len(angles) > 150 and np.diff(angles).max() < 0.06 and abs(np.hypot(x - 63.5, y - 63.5) - 40).max() < 3


def test_gaussian_has_its_standard_deviation_and_keeps_the_mean():
    impulse = np.zeros((41, 41), np.uint8)
    impulse[20, 20] = 200
    blurred = annotators.gaussian(impulse, 3.0)
    assert blurred.shape == (41, 41) and np.isclose(blurred.sum(), 200, rtol=1e-4)
    assert np.allclose(blurred, blurred.T) and np.allclose(blurred, blurred[::-1, ::-1])
    variance = (blurred.sum(0) * (np.arange(41) - 20.0) ** 2).sum() / 200
    assert 8.7 < variance < 9.0  # a little is cut off at three standard deviations
    assert np.allclose(annotators.gaussian(np.full((5, 9), 77, np.uint8), 4.0), 77, atol=1e-3)
    sloping = annotators.gaussian(np.arange(80, dtype=np.uint8)[None].repeat(3, 0), 2.0)
    assert sloping.shape == (3, 80) and np.allclose(sloping[:, 10:-10], np.arange(10, 70), atol=1e-3)


# -------------------------------------------------------------------------------------------------- shades and colours
def test_gray_is_the_brightness():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [10, 20, 30]]], np.uint8)
    assert annotators.gray(colours)[..., 0].tolist() == [[76, 150, 29, 255, 18]]


def test_blur_spreads_and_keeps_flat_colours():
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = (255, 0, 128)
    image[:, :, 1] = 77
    blurred = annotators.blur(image, 1.5)
    assert (blurred[..., 1] == 77).all() and blurred.shape == image.shape
    red = blurred[..., 0].astype(int)
    assert red[20, 20] == red.max() < 30 and 200 < red.sum() < 310 and red[20, 24] == red[16, 20] == red[20, 16]
    assert red[20, 20] > annotators.blur(image, 3.0)[20, 20, 0]


def test_downscale_fills_blocks_with_their_means():
    image = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7, 1)
    hint = annotators.downscale(image, 3)[..., 0]
    # rows 0-2, columns 0-2: 0 1 2 7 8 9 14 15 16; the last column is 6 13 20, the last two rows begin 21 22 23 28 29 30
    assert hint.shape == (5, 7) and (hint[:3, :3] == 8).all() and (hint[:3, 3:6] == 11).all()
    assert (hint[:3, 6] == 13).all() and (hint[3:, :3] == 26).all() and (hint[3:, 6] == 31).all()  # 25.5 and 30.5 up
    whole = annotators.downscale(photo("astronaut.png"), 8)
    means = photo("astronaut.png").reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert abs(whole[::8, ::8] - means).max() <= 0.5 and np.array_equal(
        whole, whole[::8, ::8].repeat(8, 0).repeat(8, 1)
    )


def test_downscale_is_what_a_small_picture_becomes_as_a_hint():
    from training.images import RESAMPLE, resize

    hint = annotators.downscale(photo("astronaut.png"), 8)
    small = np.ascontiguousarray(hint[::8, ::8])
    assert np.array_equal(resize(small, (512, 512), RESAMPLE["area"]), hint)


def test_color_grid_has_its_cells_along_the_shorter_side():
    image = np.zeros((10, 31, 3), np.uint8)
    image[:5, :5], image[5:, 26:] = (200, 100, 50), (10, 20, 30)
    hint = annotators.color_grid(image, 2)  # 2 x 6 cells, of 5 x 5 pixels and one row of 5 x 6
    assert (hint[:5, :5] == (200, 100, 50)).all() and (hint[5:, 25:] == np.round(np.array((10, 20, 30)) * 5 / 6)).all()
    assert not hint[:5, 5:].any() and not hint[5:, :25].any()
    random = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    assert np.array_equal(annotators.color_grid(random, 30), random)  # a cell for each pixel
    assert np.array_equal(annotators.color_grid(random, 200), random)  # no more cells than pixels
    flat = annotators.color_grid(random.transpose(1, 0, 2), 1)
    assert len(np.unique(flat[:25].reshape(-1, 3), axis=0)) == 1 and (flat[0, 0] == flat[24, 29]).all()
    assert abs(flat[0, 0] - random[:, :25].mean((0, 1))).max() <= 0.5


# ------------------------------------------------------------------------------------------------------ the whole table
@KINDS
def test_every_kind_is_a_function_of_the_photo_alone(kind):
    image = photo("coffee.png")[:199, :301].copy()
    before, hint = image.copy(), annotate(kind, image)
    channels = 3 if kind in ("blur", "downscale", "color-grid") else 1
    assert hint.shape == (199, 301, channels) and hint.dtype == np.uint8 and len(np.unique(hint)) > 1
    assert np.array_equal(image, before) and np.array_equal(hint, annotate(kind, image[:, ::-1][:, ::-1]))
    assert not np.shares_memory(hint, image)


@KINDS
def test_gray_photos_come_in_three_forms(kind):
    image = photo("camera.png")[::3, ::3].copy()
    hint = annotate(kind, image)
    assert hint.shape == (*image.shape, 1) and np.array_equal(hint, annotate(kind, image[..., None]))
    colour = annotate(kind, image[..., None].repeat(3, 2))
    assert np.array_equal(colour, hint.repeat(colour.shape[2], 2))


@KINDS
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 3), (9, 1, 3), (2, 2), (3, 5, 1)])
def test_the_smallest_photos(kind, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ends = {p.name: (p.low, p.high) for p in ANNOTATORS[kind].parameters}
    for end in range(2):
        assert annotate(kind, image, **{name: both[end] for name, both in ends.items()}).shape[:2] == shape[:2]


@KINDS
def test_the_tables_defaults_are_the_functions(kind):
    annotator = ANNOTATORS[kind]
    signature = list(inspect.signature(annotator.function).parameters.values())[1:]
    assert {p.name: p.default for p in annotator.parameters} == {p.name: p.default for p in signature}
    assert all(p.low <= p.default <= p.high and p.help for p in annotator.parameters) and annotator.help
    assert complete(kind, {}) == {p.name: p.default for p in annotator.parameters}


def test_parameters_are_checked():
    assert complete("canny", {"high": 300.0}) == {"low": 100, "high": 300}
    assert isinstance(complete("canny", {"high": 300.0})["high"], int)
    for kind, given, message in (
        ("hed", {}, "no kind of hint is called 'hed'; there are canny, sobel"),
        ("canny", {"radius": 3}, "canny has no parameter 'radius': it takes low and high"),
        ("gray", {"low": 3}, "it takes none"),
        ("canny", {"low": -1}, "low of canny is a whole number from 0 to 2040, not -1"),
        ("canny", {"low": 10.5}, "whole number"),
        ("blur", {"radius": float("nan")}, "number from 0.1 to 200, not nan"),
        ("blur", {"radius": "3"}, "not '3'"),
        ("downscale", {"factor": 1}, "from 2 to 256"),
    ):
        with pytest.raises(DataError, match=message):
            complete(kind, given)
        with pytest.raises(DataError, match=message):
            annotate(kind, np.zeros((8, 8, 3), np.uint8), **given)
    for image in (
        np.zeros((8, 8, 3)),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros(8, np.uint8),
        np.zeros((0, 8), np.uint8),
    ):
        with pytest.raises(DataError, match="a photo is"):
            annotate("canny", image)
