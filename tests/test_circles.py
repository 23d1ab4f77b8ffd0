"""The toy problem and its judge."""

import numpy as np
from PIL import Image

from data import FolderDataset
from toy import circles
from toy.circles import COLORS, Circle, measure


def test_colors():
    assert len(COLORS) == 141
    assert COLORS["light golden rod yellow"] == (250, 250, 210) and COLORS["turquoise"] == (64, 224, 208)
    assert circles.among_nearest(np.array([0, 255, 255]), "aqua")
    assert circles.among_nearest(np.array([0, 250, 250]), "cyan")
    assert not circles.among_nearest(np.array([255.0, 0, 0]), "blue")


def test_same_seed_same_files(tmp_path):
    for name in ("a", "b"):
        circles.make(tmp_path / name, 6, 32, seed=4)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 13
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert circles.random_circle(5, 0) != circles.random_circle(4, 0)
    with Image.open(tmp_path / "a/source/0.png") as hint:
        assert (np.asarray(hint) > 0).mean() < 0.3  # a thin line
    assert FolderDataset(tmp_path / "a")[0]["txt"].endswith("background")


def test_measure():
    circle = Circle(0.4, 0.5, 0.25, "red", "blue")
    right = circle.draw(64)[1]
    assert measure(right, circle).iou > 0.99
    verdict = measure(right, Circle(0.7, 0.5, 0.25, "red", "blue"))
    assert 0.1 < verdict.iou < 0.4 and verdict.color_right and verdict.background_right
    verdict = measure(Circle(0.4, 0.5, 0.25, "dark orchid", "white").draw(64)[1], circle)
    assert verdict.iou < 0.5 and not verdict.color_right
    nothing = measure(np.full((64, 64, 3), (0, 0, 255), np.uint8), circle)
    assert nothing.iou == 0 and nothing.background_right and not nothing.color_right
    smaller = measure(Circle(0.4, 0.5, 0.25 * 0.9**0.5, "red", "blue").draw(128)[1], circle)
    assert abs(smaller.iou - 0.9) < 0.01


def test_sizes_that_no_network_computes_are_judged_at_the_nearest(model_file, capsys):
    circles.main(["judge", str(model_file), "--count", "1", "--steps", "1", "--size", "50x30", "--device", "cpu"])
    assert "hints of 64x32" in capsys.readouterr().out


def test_held_out_circles_can_be_judged():
    for circle in circles.held_out(20):
        assert circles.distinct(circle)
        verdict = measure(circle.draw(64)[1], circle)
        assert verdict.iou > 0.99 and verdict.color_right and verdict.background_right
