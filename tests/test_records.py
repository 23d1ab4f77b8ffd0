"""Pictures that a run leaves: curves that survive what is not finite, labels that are not cut, files that are whole."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from training.records import BLUE, Metrics, save_curves, save_grid, turned_at


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


def test_a_grid_has_room_for_pictures_of_any_size(tmp_path):
    """No picture covers another or leaves the table: each colour has as many pixels as its picture."""
    sizes = [(120, 20), (30, 90), (64, 64), (8, 8)]
    pictures = [np.full((h, w, 3), (10 * k + 60, 90, 200), np.uint8) for k, (w, h) in enumerate(sizes)]
    save_grid(tmp_path / "g.png", {"a": pictures[:2], "b": pictures[2:]}, ["first", "second"])
    pixels = np.asarray(Image.open(tmp_path / "g.png").convert("RGB"))
    for picture in pictures:
        places = np.argwhere((pixels == picture[0, 0]).all(-1))
        low, high = places.min(0), places.max(0) + 1
        assert tuple(high - low) == picture.shape[:2] and len(places) == picture.shape[0] * picture.shape[1]


@pytest.mark.parametrize(
    ("losses", "turned"),
    [
        ([9, 8, 7, 6, 5, 5.4, 5.8, 6.2, 6.6], 4),
        ([9, 8, 7, 6, 5, 5.4, 5.8], None),  # not three of them yet
        ([9, 8, 7, 6, 5, 5.05, 4.95, 5.05, 5.1, 5.0, 5.1], None),  # flat, with noise
        # what a run on 300 circles measured every 50 steps: up and down by 8%, and down in the end
        ([728, 768, 828, 722, 614, 445, 469, 479, 458, 394, 341, 355, 351, 324, 294, 308, 264], None),
        ([7.0, 7.7, 8.3, 8.4, 8.5, 8.6, 8.7], None),  # has not fallen yet
        ([9, 8, float("nan"), 7, 6, 5, 5.5, 6, 6.5, 7], 5),
        ([float("nan")] * 9, None),
        ([1.0], None),
        ([], None),
    ],
)
def test_when_the_validation_loss_has_turned(losses, turned):
    assert turned_at(range(len(losses)), losses) == turned
    for count in range(len(losses)):  # and it is not said before its time
        assert turned_at(range(count), losses[:count]) is None or count > turned + 3
