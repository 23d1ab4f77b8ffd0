"""Every file is decoded before training; bad rows are named, skipped or refused; what was found is remembered."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

import data
import train
from data import DataError, FolderDataset
from tests.test_data import picture, row, write
from tests.test_train import config, losses  # noqa: F401 (config is a fixture)
from training import verify
from weights.runs import newest_checkpoint


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the shared data set that a test may damage, old enough to be known by its times."""
    shutil.copytree(folder, tmp_path / "own")
    for path in (tmp_path / "own").rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    return tmp_path / "own"


def damage(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def open_folder(root, **settings) -> FolderDataset:
    return FolderDataset(root, strict=False, **settings)


def test_all_kinds_of_bad_rows_are_found_at_once(own):
    lines = (own / "prompt.json").read_text().splitlines()
    lines[9] = "{"
    (own / "prompt.json").write_text("\n".join(lines))
    damage(own / "source/2.png")
    damage(own / "target/3.png")
    (own / "source/4.png").unlink()
    Image.new("RGB", (32, 16)).save(own / "source/5.png")
    jpeg = own / "source/6.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(jpeg, "JPEG")
    damage(jpeg)
    np.save(own / "h.npy", np.full((32, 32, 3), np.nan, np.float32))
    os.rename(own / "h.npy", own / "source/7.npy")
    text = (own / "prompt.json").read_text().replace("source/7.png", "source/7.npy")
    (own / "prompt.json").write_text(text)
    bad = verify.find_bad_rows(open_folder(own), workers=0)
    assert list(bad) == [2, 3, 4, 5, 6, 7, 9]
    words = ["2.png: not a readable", "3.png: not a", "no such image", "aspect ratio", "6.png: not", "NaN", "not JSON"]
    for (number, problem), word in zip(bad.items(), words, strict=True):
        assert f"line {number + 1}: " in problem and word in problem and "\n" not in problem
    kept = open_folder(own).without(bad)
    assert len(kept) == 17 and verify.find_bad_rows(kept, workers=0) == {}
    assert [kept.prompt(i) for i in range(17)] == [open_folder(own).prompt(i) for i in range(24) if i not in bad]


def test_a_second_start_opens_no_file_and_a_changed_file_is_noticed(own, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "FRESH", 0)
    read, decoded = [], []
    real_read, real_decode = verify.read_bytes, verify.decode
    monkeypatch.setattr(verify, "read_bytes", lambda path, *a: read.append(path.name) or real_read(path, *a))
    monkeypatch.setattr(verify, "decode", lambda path, *a: decoded.append(path.name) or real_decode(path, *a))

    def find(**settings):
        read.clear(), decoded.clear()
        return verify.find_bad_rows(open_folder(own, **settings), tmp_path / "cache", workers=0)

    assert find() == {} and (len(read), len(decoded)) == (48, 48)
    assert find() == {} and not read
    content, times = (own / "source/3.png").read_bytes(), os.stat(own / "source/3.png")
    (own / "source/3.png").write_bytes(content[:-30] + bytes(30))  # as long, and as old
    os.utime(own / "source/3.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert list(find()) == [3] and read == decoded == ["3.png"]
    assert list(find()) == [3] and not read  # bad files are remembered, too
    (own / "source/3.png").write_bytes(content)
    assert find() == {} and read == ["3.png"] and not decoded  # known by its content
    assert find(hint_channels=1) == {} and len(decoded) == 24  # hints read in another way
    damaged = (tmp_path / "cache/verified.jsonl").read_bytes()
    (tmp_path / "cache/verified.jsonl").write_bytes(damaged[:900] + b"\xff" + damaged[901:-10])
    assert find() == {} and 0 < len(read) <= 4
    assert find() == {} and not read


def test_a_file_that_changed_just_now_is_not_known_by_its_times(own, tmp_path):
    """Written twice within the resolution of its times, a file can change without a trace."""
    (own / "source/0.png").write_bytes((own / "source/0.png").read_bytes())
    assert verify.identity(own / "source/0.png") == "" == verify.identity(own / "none.png")
    assert time.time_ns() > verify.FRESH


def test_processes_find_what_one_process_finds(own, tmp_path):
    damage(own / "source/2.png")
    one = verify.find_bad_rows(dataset := open_folder(own), workers=0)
    verify.MANY, before = 1, verify.MANY
    try:
        assert verify.find_bad_rows(two := open_folder(own), tmp_path / "cache", workers=2) == one
    finally:
        verify.MANY = before
    assert two.facts == dataset.facts and list(one) == [2]


def test_training_refuses_or_skips(config, own, capsys, monkeypatch):  # noqa: F811
    config.data = str(own)
    train.train(config)  # the latents are cached: nothing reads a hint before its turn comes
    capsys.readouterr()
    for name in ("source/1.png", "source/7.png"):
        damage(own / name)
    for cache in (True, False):
        config.cache = cache
        with pytest.raises(DataError, match=r"line 2: .*1.png: not a.*and 1 more.*--skip-bad-rows"):
            train.train(config, overwrite=True)
        assert [line.split(":")[0][-6:] for line in capsys.readouterr().out.splitlines()] == ["line 2", "line 8"]
    config.cache, config.skip_bad_rows = True, True
    run = train.train(config, overwrite=True)
    assert "2 of 24 rows are left out" in capsys.readouterr().out and len(losses(run)) == 4
    assert newest_checkpoint(run).name == "step-000004"


def test_many_bad_rows_are_twenty_lines_and_a_count(tmp_path, capsys):
    write(tmp_path, *(row(i) for i in range(30)))
    with pytest.raises(DataError, match="and 29 more"):
        verify.verified(open_folder(tmp_path), tmp_path / "cache", False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21 and "10 more bad rows: python data.py check" in lines[-1]
    with pytest.raises(DataError, match="all 30 rows are bad"):
        verify.verified(open_folder(tmp_path), tmp_path / "cache", True)


def test_row_digests_tell_which_rows_changed(own):
    def digests(verified=True):
        dataset = open_folder(own)
        if verified:
            verify.find_bad_rows(dataset, workers=0)
        return dataset.row_digests()

    before = digests()
    assert len(set(before)) == 24 and before == digests(verified=False)
    assert data.compare_rows(before, before[::-1]) == (0, 0)
    lines = (own / "prompt.json").read_text().splitlines()
    (own / "prompt.json").write_text("\n".join([*lines[3:], lines[5]]))
    assert data.compare_rows(before, digests()) == (3, 1)
    (own / "prompt.json").write_text("\n".join(lines).replace("circle", "disc", 1))
    picture(own / "source/9.png", 32, 32)
    assert data.compare_rows(before, digests()) == (2, 2)
    moved = own.parent / "moved"
    now = digests()
    own.rename(moved)
    assert FolderDataset(moved).row_digests() == now


def remarks(root, **settings) -> list[str]:
    dataset = open_folder(root, **settings)
    assert verify.find_bad_rows(dataset, workers=0) == {}
    return verify.remarks(dataset, (64, 64))


def test_what_should_be_known_is_told_once(tmp_path, capsys):
    long = "a very " * 80 + "long prompt"
    write(tmp_path, *(row(i, long if i == 2 else "p") for i in range(4)))
    for i in range(4):
        picture(tmp_path / f"target/{i}.png", *((64, 64) if i < 2 else (128, 64)))
        picture(tmp_path / f"source/{i}.png", *((64, 64) if i < 2 else (128, 64)), 255)
    aspects, prompts = remarks(tmp_path)
    assert "2 of 4 rows" in aspects and "50% of the image" in aspects and "line 3" in aspects and "64x64" in aspects
    assert "1 of 4 prompts have more than 75" in prompts and "line 3, 162 tokens: a very" in prompts
    assert data.check(str(tmp_path)) == (4, [])
    told = capsys.readouterr().out
    assert aspects in told and prompts in told

    Image.fromarray(np.linspace(0, 8000, 4096).astype(np.uint16).reshape(64, 64)).save(tmp_path / "source/0.png")
    ink = np.zeros((64, 64, 4), np.uint8)
    ink[28:36, :, 3] = 255
    Image.fromarray(ink).save(tmp_path / "source/1.png")
    Image.fromarray(ink).save(tmp_path / "target/1.png")
    hints, targets, ranges, *_ = remarks(tmp_path)
    assert "1 of 4 hints are transparent" in hints and "on white" in hints and "--hint-ground" in hints
    assert "1 of 4 targets are transparent" in targets
    assert "1 of 4 hints" in ranges and "8000 of 65535" in ranges and "--hint-scale 8000" in ranges
    assert not any("--hint-scale" in line for line in remarks(tmp_path, hint_scale=8000.0))  # was decided


def test_dark_hints_of_8_bits_are_told_of_only_where_all_are(tmp_path):
    write(tmp_path, row(0), row(1))
    for i, value in enumerate((20, 255)):
        picture(tmp_path / f"source/{i}.png", 64, 64, value)
        picture(tmp_path / f"target/{i}.png", 64, 64)
    assert remarks(tmp_path) == []
    picture(tmp_path / "source/1.png", 64, 64, 11)
    assert "2 of 2 hints" in remarks(tmp_path)[0] and "20 of 255" in remarks(tmp_path)[0]


def test_the_ground_of_hints_is_chosen_once_for_all(tmp_path, capsys):
    """Two hints in dark ink and one in light ink: all are laid on white, and the run remembers it."""
    write(tmp_path, *(row(i) for i in range(3)))
    for i, shade in enumerate((0, 0, 255)):
        ink = np.full((16, 16, 4), shade, np.uint8)
        ink[..., 3] = 0
        ink[8, :, 3] = 255
        picture(tmp_path / f"target/{i}.png", 16, 16)
        (tmp_path / "source").mkdir(exist_ok=True)
        Image.fromarray(ink).save(tmp_path / f"source/{i}.png")
    dataset = verify.verified(open_folder(tmp_path), tmp_path / "cache", False)
    assert dataset.hint_ground == "white" and all(dataset.hint(i)[0, 0, 0] == 1 for i in range(3))
    assert open_folder(tmp_path).hint(2)[0, 0, 0] == 0  # alone it would be on black


def test_the_run_keeps_how_hints_are_read(config, own, capsys):  # noqa: F811
    for i in range(24):
        hint = np.asarray(Image.open(own / f"source/{i}.png"))
        Image.fromarray(np.dstack([np.zeros_like(hint), hint[..., 0]])).save(own / f"source/{i}.png")
    config.data, config.steps = str(own), 1
    run = train.train(config)
    assert "24 of 24 hints are transparent in places: laid on white" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["hint_ground"] == "white"
