"""Pictures that a run leaves: curves that survive what is not finite, labels that are not cut, files that are whole."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from training.records import BLUE, Metrics, save_curves, save_grid


def metrics_of(tmp_path, losses, gains=()) -> Metrics:
    metrics = Metrics(tmp_path)
    metrics.lines += [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    metrics.lines += [{"step": step, "control_gain": gain} for step, gain in gains]
    return metrics


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_smoothed_line_goes_on_after_a_loss_that_is_not_finite(tmp_path, bad):
    losses = [bad if step in (0, 50, 51) else 0.5 - step / 1000 for step in range(199)]
    save_curves(tmp_path / "c.png", metrics_of(tmp_path, losses, [(0, 0.0), (50, bad), (100, 0.3), (150, 0.4)]))
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    columns = np.where((abs(pixels - np.array(BLUE)).sum(-1) < 30)[30:290].any(0))[0]
    assert columns.min() < 110 and columns.max() > 860


@pytest.mark.parametrize(
    ("losses", "gains"),
    [
        ([], []),
        ([float("nan")] * 3, [(0, float("nan"))]),
        ([1.0], [(0, -1e30), (1, 0.0)]),
        ([0.1] * 20, [(19, 0.5), (20, 0.5)]),
        ([-1.2345e-5, 1e9], [(0, 0.0), (1_000_000_000, 1e-9)]),
    ],
)
def test_no_label_is_cut_off(tmp_path, monkeypatch, losses, gains):
    """With no value at all, huge and tiny values, a long run, and a sudden convergence at the right edge."""
    drawn, text = [], ImageDraw.ImageDraw.text

    def watched(draw, xy, words, fill, font, anchor="la"):
        drawn.append((words, draw.textbbox(xy, words, font, anchor), draw.im.size))
        text(draw, xy, words, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", watched)
    metrics = metrics_of(tmp_path, losses, gains)
    metrics.lines += [{"step": 1_000_000_000, "loss": 0.1}] if gains and gains[-1][0] > 20 else []
    save_curves(tmp_path / "c.png", metrics)
    save_grid(tmp_path / "g.png", {"a label that is wider than": [np.zeros((8, 8, 3), np.uint8)], "b": []}, ["w" * 300])
    assert len(drawn) > 20
    for words, (left, top, right, bottom), (width, height) in drawn:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, words


def test_labels_of_columns_do_not_run_into_each_other(tmp_path):
    font = ImageFont.load_default(size=11)
    label = "a label of a column that is very wide"
    save_grid(tmp_path / "g.png", {label: [np.zeros((8, 8, 3), np.uint8)], "b": []})
    assert Image.open(tmp_path / "g.png").width > 2 * font.getlength(label)


def test_grids_and_curves_are_whole_or_absent(tmp_path, monkeypatch):
    def fail(image, file, *_, **settings):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    metrics = metrics_of(tmp_path, [0.1, 0.2])
    monkeypatch.setattr(Image.Image, "save", fail)
    for save in (
        lambda: save_curves(tmp_path / "c.png", metrics),
        lambda: save_grid(tmp_path / "new/g.png", {"a": [np.zeros((8, 8, 3), np.uint8)]}),
    ):
        with pytest.raises(OSError):
            save()
    assert [p.name for p in tmp_path.rglob("*.*")] == ["metrics.jsonl"]
