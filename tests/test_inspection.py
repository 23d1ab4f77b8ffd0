"""What `data.py check` tells beside errors: duplicates, hints that say nothing or everything, kinds of files."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

import data
from data import FolderDataset
from tests.test_data import row, write
from tests.test_shards import make, png
from toy import circles
from training import inspection, verify
from training.images import KINDS


def noise(seed: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def told(root, **settings) -> list[str]:
    dataset = FolderDataset(root, hint_channels=None, strict=False, **settings)
    verify.find_bad_rows(dataset, workers=0)
    return inspection.oddities(dataset)


@pytest.fixture
def plain(tmp_path):
    """A folder of six pairs in which nothing is odd."""
    write(tmp_path, *(row(i) for i in range(6)))
    for side, first in (("source", 0), ("target", 100)):
        (tmp_path / side).mkdir()
        for i in range(6):
            noise(first + i).save(tmp_path / side / f"{i}.png")
    return tmp_path


def test_nothing_odd_is_one_line_about_sizes(plain):
    assert told(plain) == ["sizes of the targets: 8x8 (6)"]


def test_duplicates_are_found_by_their_pixels(plain):
    noise(100).save(plain / "target/2.png", compress_level=0)  # another file of the same pixels, with another hint
    noise(101).save(plain / "target/4.png")
    noise(1).save(plain / "source/4.png", compress_level=0)
    noise(101).save(plain / "target/5.png")
    noise(1).save(plain / "source/5.png")
    pairs, targets = told(plain)[:2]
    assert pairs.startswith("2 of 6 rows repeat the target and the hint of an earlier row (the first: ")
    assert pairs.endswith(f"{plain}/target/4.png is {plain}/target/1.png)")
    assert targets.startswith("1 of 6 rows repeat the target, with another hint, of an earlier row (the first: ")
    assert targets.endswith(f"{plain}/target/2.png is {plain}/target/0.png)")


def test_rows_of_the_same_files_are_told_by_their_lines(plain):
    lines = (plain / "prompt.json").read_text().splitlines()
    (plain / "prompt.json").write_text("\n".join([*lines, lines[1]]) + "\n")
    assert told(plain)[0].endswith(f"prompt.json, line 7 and {plain}/prompt.json, line 2, {plain}/target/1.png)")


def test_one_target_with_three_hints(plain):
    for i in (1, 2):
        noise(100).save(plain / f"target/{i}.png")
    noise(1).save(plain / "source/2.png")  # of these the last repeats the one before
    assert [line.split(" rows ")[0] for line in told(plain)[:2]] == ["1 of 6", "1 of 6"]


def test_hints_that_say_nothing_or_everything(plain):
    Image.new("RGB", (8, 8), (3, 4, 5)).save(plain / "source/1.png")
    Image.new("L", (8, 8), 255).save(plain / "source/3.png")
    noise(102).save(plain / "source/2.bmp")
    write(plain, *(row(i) for i in range(6) if i != 2), row(2) | {"source": "source/2.bmp"})
    lines = told(plain)
    assert lines[0] == f"2 of 6 hints are all one colour: they say nothing (the first: {plain}/source/1.png)"
    assert lines[1] == f"1 of 6 hints are equal to their target: they say everything (the first: {plain}/source/2.bmp)"


def test_kinds_of_files_are_counted_with_what_is_made_of_them(plain):
    noise(1).convert("L").save(plain / "source/1.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(plain / "source/2.png")
    noise(102).convert("CMYK").save(plain / "target/2.tif")
    noise(103).convert("RGBA").save(plain / "target/3.png")
    noise(104).convert("P").save(plain / "target/4.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(105).save(plain / "target/5.png", exif=exif)
    np.save(plain / "source/0.npy", np.linspace(0, 1, 192, dtype=np.float32).reshape(8, 8, 3))
    rows = [row(i) for i in range(6)]
    rows[2]["target"], rows[0]["source"] = "target/2.tif", "source/0.npy"
    write(plain, *rows)
    lines = told(plain)
    assert f"2 of 6 hints are gray: the shade goes to every channel (the first: {plain}/source/1.png)" in lines
    assert f"1 of 6 hints are of 16 bits a channel: brought to 8 bits (the first: {plain}/source/2.png)" in lines
    assert (
        f"1 of 6 hints are of floats or 32 bits a channel: brought to 8 bits (the first: {plain}/source/0.npy)" in lines
    )
    wanted = {"CMYK": "2.tif", "with an alpha channel": "3.png", "with a palette": "4.png", "with a camera's": "5.png"}
    for words, name in wanted.items():
        assert any(line.startswith(f"1 of 6 targets are {words}") and name in line for line in lines), words
    assert all("1 of 6 targets" not in line or any(what in line for what, _ in KINDS.values()) for line in lines)


def test_sizes(plain):
    noise(0, 16).save(plain / "source/0.png")
    for i in range(1, 6):
        for side, first in (("source", 10), ("target", 20)):
            noise(first + i, 8 + i).save(plain / side / f"{i}.png")
    lines = told(plain)
    assert lines[0].startswith("sizes of the targets: 8x8 (1), 9x9 (1),") and lines[0].endswith("and 1 other sizes")
    assert lines[1] == "1 of 6 hints have another size than their target"


def test_the_check_of_damaged_data_tells_all_of_it(plain, capsys):
    (plain / "target/0.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(plain / "source/1.png")
    sheet = plain / "sheet.png"
    assert data.main(["check", str(plain), "--sheet", str(sheet)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{plain}: Fill50K (prompt.json), 6 rows" and "1 of 5 hints are all one colour" in lines[1]
    assert lines[-3:-1] == [f"saved 5 random rows as {sheet}", lines[-2]] and "0.png: not a readable" in lines[-2]
    for side in ("source", "target"):
        for path in (plain / side).iterdir():
            path.unlink()
    assert (
        data.main(["check", str(plain), "--sheet", str(plain / "none.png")]) == 1 and not (plain / "none.png").exists()
    )


def test_the_words_that_long_prompts_lose(plain):
    words = " ".join(f"word{'abcdefghij'[i % 10]}" for i in range(100))
    kept = " ".join(["circle"] * 75)
    assert verify.lost_words(f"{kept} gold, and more") == '"gold, and more"' and verify.lost_words(kept) == '""'
    assert verify.lost_words(f"{kept} {'x ' * 20}") == '"x x x x x x x x ..."'
    assert verify.lost_words(kept + " " + "漢" * 200) == f'"{"漢" * 80} ..."'
    write(plain, *(row(i, prompt) for i, prompt in enumerate([f"{kept} blue", "p", words, words, words, "q"])))
    dataset = FolderDataset(plain)
    verify.find_bad_rows(dataset, workers=0)
    (line,) = verify.remarks(dataset, (8, 8))
    assert line.startswith("4 of 6 prompts have more than 75 tokens, and the rest is cut off; the first: ")
    assert "line 1, 76 tokens: circle" in line and 'loses "blue"; ' in line and line.count("loses") == 3


# ------------------------------------------------------------------------------------------------------ contact sheet
def test_the_sheet_shows_twelve_rows_that_the_seed_chooses(tmp_path, monkeypatch):
    circles.make(tmp_path / "d", 30, 32, seed=3)
    path, read = tmp_path / "new" / "sheet.png", []
    real = FolderDataset.load_item
    monkeypatch.setattr(FolderDataset, "load_item", lambda self, i, *a: read.append(i) or real(self, i, *a))

    def sheet(*flags):
        read.clear()
        assert data.main(["check", str(tmp_path / "d"), "--sheet", str(path), *flags]) == 0
        return path.read_bytes()

    first = sheet()
    rows = list(read)
    assert len(set(rows)) == 12 and rows == sorted(rows)
    assert sheet() == first and sheet("--seed", "1") != first and read != rows
    with Image.open(path) as image:
        assert image.width < 600 and image.height > 12 * 224


def test_the_sheet_keeps_shapes_and_shows_hints_of_any_channels(tmp_path):
    write(tmp_path, *({"source": f"{i}.npy", "target": f"{i}.png", "prompt": "a\nb" * 9} for i in range(3)))
    for i, (channels, dtype) in enumerate(((2, np.uint8), (7, np.float32), (1, np.uint8))):
        np.save(tmp_path / f"{i}.npy", np.ones((10, 30, channels), dtype))
        noise(i, 30).crop((0, 0, 30, 10)).save(tmp_path / f"{i}.png")
    dataset = FolderDataset(tmp_path, hint_channels=None)
    assert inspection.save_sheet(tmp_path / "sheet.png", dataset, [0, 1, 2], 0, side=60) == 3
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert ((shown == 235).all(-1)).sum() >= 3 * 2 * 60 * 40  # above and below the pictures of 60x20
    with pytest.raises(data.DataError, match="ending names no picture"):
        inspection.save_sheet(tmp_path / "sheet", dataset, [0], 0)


def test_facts_say_what_is_known_of_members_too(tmp_path):
    out = io.BytesIO()
    noise(1).convert("L").save(out, "PNG")
    path = make(tmp_path / "a.tar", ("0.png", out.getvalue()), ("0.hint.png", png()), ("0.txt", b"p"))
    assert told(path) == [
        f"1 of 1 hints are all one colour: they say nothing (the first: {path}/0.hint.png)",
        f"1 of 1 targets are gray: the shade goes to every channel (the first: {path}/0.png)",
        "sizes of the targets: 8x8 (1)",
    ]


def test_facts_of_older_versions_are_found_out_again(plain, monkeypatch):
    """What a version before remembered has no digest of pixels."""
    monkeypatch.setattr(verify, "FRESH", 0)
    dataset = FolderDataset(plain)
    verify.find_bad_rows(dataset, plain / "cache", workers=0)
    file = plain / "cache/verified.jsonl"
    older, before = verify.Memory(plain / "older/verified.jsonl"), verify.VERSION
    hint, target = dataset.readings()
    verify.VERSION = before.replace("2 ", "1 ", 1)
    for line in file.read_bytes().split(b"\n"):
        key, value = json.loads(line[9:]) if line else ("", None)
        if key.startswith("file "):
            older.add(key, value)
    for a, b in dataset.facts:
        older.add(verify.fact_name(a.content, dataset.rows[0].hint, hint), list(a)[:7])
        older.add(verify.fact_name(b.content, dataset.rows[0].target, target), list(b)[:7])
    older.flush()
    verify.VERSION = before
    again = FolderDataset(plain)
    verify.find_bad_rows(again, plain / "older", workers=0)
    assert again.facts == dataset.facts and all(re.fullmatch("[0-9a-f]{24}", a.pixels) for a, _ in again.facts)
