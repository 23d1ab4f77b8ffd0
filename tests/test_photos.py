"""A folder of photos becomes a data set: names, prompts, pixels, what is left out, and stopping at any moment."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import FolderDataset
from tests.test_images import png
from training import photos
from training.annotators import annotate, complete
from training.images import DataError, is_plain, read_image
from training.locks import take_lock
from training.photos import Recipe, make_dataset, prompt_for, scaled_size

CANNY = Recipe("canny", complete("canny", {}))


def pixels(seed: int, width: int = 48, height: int = 36) -> np.ndarray:
    """Blocks of random colours, (height,width,3): they have edges."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 6), -(-width // 6), 3), np.uint8)
    return blocks.repeat(6, 0).repeat(6, 1)[:height, :width].copy()


def save(path: Path, image: np.ndarray | Image.Image, caption: str | None = None, **settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **settings)
    if caption is not None:
        path.with_name(f"{path.name}.txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def album(tmp_path) -> Path:
    """Photos of many kinds, many of them of the same stem; two larger ones; with captions."""
    root = tmp_path / "album"
    save(root / "a.jpg", pixels(0), "the letter a")
    for number, name in enumerate(
        ("a.png", "a.PNG.png", "a.jpg.png", "a.jpeg", "a.webp", "cats/a.jpg", "cats/dogs/a.jpg"), 1
    ):
        save(root / name, pixels(number), f"number {number}")
    image = Image.fromarray(pixels(20))
    turned = image.getexif()
    turned[0x0112] = 6
    save(root / "kinds/turned.jpg", image, "turned", exif=turned)
    save(root / "kinds/cmyk.jpg", image.convert("CMYK"), "cmyk")
    save(root / "kinds/gray.png", image.convert("L"), "gray")
    save(root / "kinds/palette.png", image.quantize(8), "palette")
    save(root / "kinds/deep.png", pixels(20)[..., 0].astype(np.uint16) * 257, "deep")
    image.putalpha(Image.fromarray(pixels(21)[..., 0]))
    save(root / "kinds/alpha.png", image, "alpha")
    save(root / "large/wide.jpg", pixels(30, 151, 75), "wide")
    save(root / "large/high.png", pixels(31, 75, 151), "high")
    return root


def tree(root: Path) -> dict[str, bytes]:
    """The files of a folder and in it, without the memory, in which the order may differ."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "made.jsonl")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "prompt.json").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------- results
@pytest.mark.parametrize("workers", [0, 2])
def test_the_result_is_a_data_set_of_hints_and_photos(album, tmp_path, workers):
    out = tmp_path / "out"
    names = sorted(path.relative_to(album).as_posix() for path in album.rglob("*.*") if path.suffix != ".txt")
    assert make_dataset(album, out, CANNY, workers=workers) == (16, [])
    assert len(names) == 16 and [row["source"] for row in rows(out)] == [f"source/{name}.png" for name in names]
    assert len({row["target"] for row in rows(out)}) == 16
    for name, row in zip(names, rows(out), strict=True):
        photo = read_image(album / name, ground="white")
        assert np.array_equal(read_image(out / row["target"]), photo), name
        hint = read_image(out / row["source"], 1)
        assert np.array_equal(hint, annotate("canny", photo)) and (hint > 0).any(), name
        assert row["prompt"] == (album / f"{name}.txt").read_text()
    assert data.main(["check", str(out)]) == 0
    dataset = FolderDataset(out, size=(32, 32))
    assert len(dataset) == 16 and dataset[3]["jpg"].shape == dataset[3]["hint"].shape == (32, 32, 3)
    settings = json.loads((out / "hints.json").read_text())
    assert settings["kind"] == "canny" and settings["parameters"] == {"low": 100, "high": 200}
    assert not list(out.rglob(".*"))


def test_plain_photos_are_copied_byte_by_byte_and_others_become_png(album, tmp_path):
    make_dataset(album, tmp_path / "out", CANNY)
    copied = {
        "a.jpg",
        "a.png",
        "a.jpeg",
        "cats/a.jpg",
        "cats/dogs/a.jpg",
        "kinds/gray.png",
        "large/wide.jpg",
        "large/high.png",
    }
    for row in rows(tmp_path / "out"):
        name, target = row["source"][len("source/") : -len(".png")], tmp_path / "out" / row["target"]
        if name in copied or name in ("a.jpg.png", "a.PNG.png"):
            assert target.read_bytes() == (album / name).read_bytes()
            assert row["target"] == f"target/{name}" + ".png" * (name not in copied)
            assert not target.samefile(album / name)
        else:
            assert row["target"] == f"target/{name}.png" and Image.open(target).format == "PNG"
            assert Image.open(target).mode == "RGB" and not Image.open(target).getexif()


def test_what_other_programs_may_read_otherwise_is_not_plain(tmp_path):
    image, file = Image.fromarray(pixels(0)), tmp_path / "a.png"

    def plain(content: bytes = b"", name: str = "a.png", **settings) -> bool:
        file.write_bytes(content) if content else image.save(file, **settings)
        return is_plain(Path(name), file.read_bytes())

    assert plain() and plain(format="JPEG", name="A.JPEG") and plain(png(2, 8, [bytes(24)]))
    assert not plain(format="JPEG") and not plain(name="a.jpg") and not plain(format="WEBP", name="a.webp")
    assert not plain(transparency=(1, 2, 3)) and not plain(png(2, 8, [bytes(24)], transparent=bytes(6)))
    assert not plain(png(2, 16, [bytes(48)])) and not plain(png(0, 16, [bytes(16)]))
    with pytest.raises(DataError, match="a.png: not a readable image"):
        plain(b"nothing")


@pytest.mark.parametrize("kind", ["sobel", "scribble", "gray", "blur", "downscale", "color-grid"])
def test_every_kind(tmp_path, kind):
    save(tmp_path / "in/a.png", pixels(1, 60, 40))
    parameters = complete(kind, {})
    make_dataset(tmp_path / "in", tmp_path / "out", Recipe(kind, parameters), "p")
    hint = annotate(kind, pixels(1, 60, 40), **parameters)
    assert np.array_equal(read_image(tmp_path / "out/source/a.png.png", hint.shape[2]), hint)
    assert Image.open(tmp_path / "out/source/a.png.png").mode == {1: "L", 3: "RGB"}[hint.shape[2]]


def test_large_photos_are_scaled_down_to_cover_the_size(album, tmp_path, capsys):
    out = tmp_path / "out"
    make_dataset(album / "large", out, Recipe("canny", complete("canny", {}), (64, 64)))
    assert "2 of 2 photos are scaled down to cover 64x64" in capsys.readouterr().out
    assert [row["target"] for row in rows(out)] == ["target/high.png.png", "target/wide.jpg.png"]
    assert [FolderDataset(out).sizes(i) for i in range(2)] == [((64, 128), (64, 128)), ((128, 64), (128, 64))]
    for row in rows(out):
        assert np.array_equal(read_image(out / row["source"], 1), annotate("canny", read_image(out / row["target"])))
    hints = np.stack([FolderDataset(out, (64, 64))[i]["hint"] for i in range(2)])
    assert set(np.unique(hints)) == {0.0, 1.0}  # training cuts the middle out without touching the lines


@pytest.mark.parametrize("native", [(151, 75), (75, 151), (100, 100), (4000, 3001), (33, 1000), (65, 64), (64, 999)])
@pytest.mark.parametrize("wanted", [(64, 64), (63, 32), (32, 63), (1, 1)])
def test_scaled_sizes_cover_what_is_wanted_with_an_even_rest(native, wanted):
    size = scaled_size(native, wanted)
    if native[0] <= wanted[0] or native[1] <= wanted[1]:
        assert size == native
        return
    rest = [s - w for s, w in zip(size, wanted, strict=True)]
    assert min(rest) == 0 and all(r % 2 == 0 for r in rest)
    scale = max(w / n for w, n in zip(wanted, native, strict=True))
    assert all(abs(s - n * scale) <= 1 for s, n in zip(size, native, strict=True))


def test_small_photos_keep_their_size():
    assert scaled_size((500, 400), (512, 512)) == (500, 400)
    assert scaled_size((5000, 400), (512, 512)) == (5000, 400)
    assert scaled_size((512, 700), (512, 512)) == (512, 700)


# ------------------------------------------------------------------------------------------------ stopping and going on
def make_and_kill(album: Path, out: Path, number: int, how: str) -> bool:
    """Make the data set in a process of its own that is killed while it writes its file number `number`, with half of
    it written, or just after it. Returns whether it was killed."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    real, written = photos.save_whole, []

    def save_whole(path, write):
        def half(partial):
            write(partial)
            os.truncate(partial, partial.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        written.append(path)
        if len(written) - 1 != number:
            return real(path, write)
        real(path, half if how == "half" else write)
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        photos.save_whole = save_whole
        make_dataset(album, out, CANNY, workers=0)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["half", "after"])
def test_killed_at_every_write_and_given_again_is_the_same_as_never_stopped(album, tmp_path, how):
    for name in ("kinds", "large", "cats/dogs"):
        shutil.rmtree(album / name)
    make_dataset(album, tmp_path / "whole", CANNY, workers=0)
    whole = tree(tmp_path / "whole")
    writes = len(whole)
    for number in range(writes):
        out = tmp_path / f"killed{number}"
        assert make_and_kill(album, out, number, how)
        assert photos_are_whole(out, whole)
        assert (out / "prompt.json").exists() == (number == writes - 1 and how == "after")
        assert make_dataset(album, out, CANNY, workers=0) == (7, []) and tree(out) == whole
    again = tmp_path / "again"  # and one folder that is killed over and over: every start gets further
    assert sum(make_and_kill(album, again, 3, how) for _ in range(writes)) < writes
    assert tree(again) == whole


def photos_are_whole(out: Path, whole: dict[str, bytes]) -> bool:
    return all(whole[name] == content for name, content in tree(out).items() if not Path(name).name.startswith("."))


def test_what_is_done_is_not_done_again(album, tmp_path, monkeypatch, capsys):
    out, made, real = tmp_path / "out", [], photos.annotate

    def make(**settings):
        made.clear()
        monkeypatch.setattr(
            photos, "annotate", lambda kind, photo, **p: made.append(photo.shape) or real(kind, photo, **p)
        )
        result = make_dataset(album, out, CANNY, workers=0, **settings)
        return len(made), *result

    assert make() == (16, 16, []) and make() == (0, 16, [])
    before = tree(out)
    assert make(prompts="one for all") == (0, 16, []) and {row["prompt"] for row in rows(out)} == {"one for all"}
    (album / "a.jpg.txt").write_text("another caption")
    assert make() == (0, 16, [])
    assert [row["target"] for row in rows(out) if row["prompt"] == "another caption"] == ["target/a.jpg"]
    save(album / "new.jpg", pixels(40), "new")
    (album / "cats/a.jpg").unlink()
    assert make() == (1, 16, []) and "new" in [row["prompt"] for row in rows(out)]
    assert not any(row["source"] == "source/cats/a.jpg.png" for row in rows(out))
    save(album / "a.jpg", Image.fromarray(pixels(41)).convert("CMYK"))  # no longer one that can be copied
    (out / "source/a.webp.png").unlink()
    (out / "target/a.png").write_bytes(b"")
    assert make() == (3, 16, [])
    assert not (out / "target/a.jpg").exists() and (out / "target/a.jpg.png").exists()
    assert tree(out)["target/a.png"] == before["target/a.png"]
    assert np.array_equal(read_image(out / "target/a.jpg.png"), read_image(album / "a.jpg"))
    os.utime(album / "a.png", ns=(1, 1))  # the same bytes, but perhaps not: their time is another
    assert make() == (1, 16, []) and make() == (0, 16, [])
    (out / "made.jsonl").unlink()
    assert make() == (16, 16, [])


def test_a_full_disk_ends_the_work_and_costs_nothing_that_is_done(album, tmp_path, monkeypatch):
    out, real, written = tmp_path / "out", photos.save_whole, []

    def full(path, write):
        written.append(path)
        if len(written) == 13:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, write)

    monkeypatch.setattr(photos, "save_whole", full)
    with pytest.raises(OSError, match="No space"):
        make_dataset(album, out, CANNY, workers=0)
    monkeypatch.setattr(photos, "save_whole", real)
    assert not (out / "prompt.json").exists() and not (out / ".lock").exists()
    assert make_dataset(album, out, CANNY, workers=0) == (16, [])
    make_dataset(album, tmp_path / "whole", CANNY, workers=0)
    assert tree(out) == tree(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on(album, tmp_path, monkeypatch, capsys):
    real, calls = photos.annotate, []

    def annotate(*arguments, **parameters):
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments, **parameters)

    monkeypatch.setattr(photos, "annotate", annotate)
    command = ["hints", str(album), str(tmp_path / "out"), "--kind", "canny", "--workers", "0"]
    assert data.main(command) == 130 and "the same command makes the rest" in capsys.readouterr().out
    assert data.main(command) == 0 and len(calls) == 6 + 11


# ---------------------------------------------------------------------------------------------------------- left out
def test_damaged_photos_are_told_of_and_left_out(album, tmp_path, capsys):
    content = (album / "a.jpg").read_bytes()
    (album / "cut.jpg").write_bytes(content[: len(content) // 2])
    (album / "empty.png").write_bytes(b"")
    (album / "page.jpg").write_text("<html>")
    (album / "folder.jpg").mkdir()
    (album / "clip.mov").write_bytes(b"x")
    (album / ".hidden.jpg").write_bytes(b"x")
    (album / ".thumbnails").mkdir()
    save(album / ".thumbnails/a.jpg", pixels(0))
    bad = ["cut.jpg", "empty.png", "page.jpg"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(album / "pipe.png")  # reading it would wait for ever
        bad.append("pipe.png")
    for name in bad:
        (album / name).with_suffix(".txt").write_text("p")
    command = ["hints", str(album), str(tmp_path / "out"), "--kind", "canny"]
    assert data.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "left out: .mov 1" in lines[0] and lines[-1] == f"{tmp_path / 'out'}: 16 rows, {len(bad)} photos left out"
    assert [line.split(": ")[0] for line in lines[-1 - len(bad) : -1]] == [str(album / name) for name in bad]
    assert len(rows(tmp_path / "out")) == 16 and data.main(["check", str(tmp_path / "out")]) == 0
    shutil.copy(album / "a.jpg", album / "cut.jpg")  # repaired
    assert data.main(command) == 1 and len(rows(tmp_path / "out")) == 17


def test_nothing_but_damaged_photos_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no photos in it"):
        make_dataset(tmp_path / "in", tmp_path / "out", CANNY, "p")
    for name in "ab":
        (tmp_path / f"in/{name}.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a.jpg: not a readable image.* \(and so all 2 photos\)"):
        make_dataset(tmp_path / "in", tmp_path / "out", CANNY, "p")
    assert not (tmp_path / "out/prompt.json").exists()


@pytest.mark.skipif(os.sep == "\\", reason="names of bytes are those of Linux and macOS")
def test_names_that_cannot_be_used_are_told_of(album, tmp_path):
    long = "x" * 250 + ".jpg"  # with the ending of its hint it is longer than a file system allows
    shutil.copy(album / "a.jpg", album / long)
    content, bad = (album / "a.jpg").read_bytes(), os.fsencode(album) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(bad)).write_bytes(content)
    except OSError:
        pytest.skip("this file system takes text alone")
    (album / "line\nbreak, \u732b.jpg").write_bytes(content)
    count, problems = make_dataset(album, tmp_path / "out", CANNY, prompts="p")
    assert count == 17 and len(problems) == 2 and all("\n" not in line for line in problems)
    assert problems[0] == f"{album}/caf\\udce9.jpg: its name is not text in UTF-8; rename it"
    assert problems[1] == f"{album / long}: File name too long"
    assert data.check(str(tmp_path / "out")) == (17, [])


def test_hints_of_one_colour_are_told_of(tmp_path, capsys):
    save(tmp_path / "in/flat.png", np.full((20, 20, 3), 9, np.uint8))
    save(tmp_path / "in/edges.png", pixels(0))
    for _ in range(2):  # made, and remembered
        make_dataset(tmp_path / "in", tmp_path / "out", CANNY, "p")
        assert "1 of 2 hints are all of one colour: canny (low 100, high 200" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_that_lead_out_are_followed_when_asked(album, tmp_path):
    save(tmp_path / "elsewhere/far.jpg", pixels(50), "far")
    (album / "link.jpg").symlink_to(tmp_path / "elsewhere/far.jpg")
    (album / "link.txt").write_text("link")
    (album / "folder").symlink_to(tmp_path / "elsewhere")
    (album / "round").symlink_to(album)
    (album / "near.jpg").symlink_to(album / "a.jpg")
    (album / "near.txt").write_text("near")
    count, problems = make_dataset(album, tmp_path / "out", CANNY)
    assert count == 17 and [line.split(": ")[0] for line in problems] == [
        str(album / name) for name in ("folder", "round", "link.jpg")
    ]
    assert all("--follow-links" in line for line in problems)
    assert make_dataset(album, tmp_path / "out", CANNY, follow_links=True) == (19, [])
    assert not any((tmp_path / "out" / row["target"]).is_symlink() for row in rows(tmp_path / "out"))


# ------------------------------------------------------------------------------------------------------------- refused
def test_a_folder_takes_hints_of_one_recipe(album, tmp_path, capsys):
    out = tmp_path / "out"
    make_dataset(album, out, CANNY)
    before = tree(out)
    for other in (
        Recipe("canny", complete("canny", {"low": 50})),
        Recipe("gray", {}),
        Recipe("canny", complete("canny", {}), (32, 32)),
    ):
        with pytest.raises(DataError) as error:
            make_dataset(album, out, other)
        assert f"holds hints of canny (low 100, high 200, photos not scaled), not of {other}" in str(error.value)
        assert "\n" not in str(error.value) and tree(out) == before
    shutil.copytree(album, tmp_path / "second")
    with pytest.raises(DataError, match="holds hints of the photos in .*album; name another folder"):
        make_dataset(tmp_path / "second", out, CANNY)
    album.rename(tmp_path / "moved")  # a folder that is no longer there was moved
    assert make_dataset(tmp_path / "moved", out, CANNY) == (16, [])
    settings = json.loads((out / "hints.json").read_text())
    (out / "hints.json").write_text(json.dumps(settings | {"version": 0}))
    with pytest.raises(DataError, match="another version"):
        make_dataset(tmp_path / "moved", out, CANNY)
    for damage in ("{", "[]", "{}", '{"kind": 1, "parameters": 2, "size": 3}'):
        (out / "hints.json").write_text(damage)
        with pytest.raises(DataError, match="hints.json: does not say how"):
            make_dataset(tmp_path / "moved", out, CANNY)


def test_other_peoples_folders_are_left_alone(album, tmp_path, folder):
    own = tmp_path / "circles"
    shutil.copytree(folder, own)
    before = tree(own)
    with pytest.raises(DataError, match="circles: holds prompt.json, which this command did not make"):
        make_dataset(album, own, CANNY)
    assert tree(own) == before
    (tmp_path / "file").write_text("x")
    for out, message in (
        (album, "need two folders"),
        (album / "hints", "need two folders"),
        (tmp_path, "need two folders"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(DataError, match=message):
            make_dataset(album, out, CANNY)
    assert not (album / "hints").exists()


def test_two_processes_do_not_share_a_folder(album, tmp_path):
    (tmp_path / "out").mkdir()
    lock = take_lock(tmp_path / "out/.lock")
    with pytest.raises(DataError, match="another process makes hints"):
        make_dataset(album, tmp_path / "out", CANNY)
    lock.close()
    assert make_dataset(album, tmp_path / "out", CANNY) == (16, [])


# ------------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize(
    "file, content, prompt",
    [
        ("a.txt", b"a red car\n", "a red car"),
        ("a.caption", "ein rotes Auto, schön".encode(), "ein rotes Auto, schön"),
        ("a.jpg.txt", b"a\r\n  red\tcar ", "a red car"),
        ("a.txt", b"\xef\xbb\xbfa red car", "a red car"),
        ("a.txt", "rot, schön".encode("utf-16"), "rot, schön"),
        ("a.txt", b" \n", DataError("a.txt: the caption is empty")),
        ("a.txt", b"sch\xf6n", DataError("a.txt: not text in UTF-8 (byte 3 is wrong)")),
        ("b.txt", b"another", DataError("a.jpg: no caption beside it (a.txt or a.caption)")),
    ],
)
def test_captions(tmp_path, file, content, prompt):
    (tmp_path / file).write_bytes(content)
    if isinstance(prompt, str):
        assert prompt_for(tmp_path / "a.jpg", "captions") == prompt
        return
    with pytest.raises(DataError) as error:
        prompt_for(tmp_path / "a.jpg", "captions")
    assert str(error.value) == f"{tmp_path}{os.sep}{prompt}"


def test_captions_of_one_photo_go_before_those_of_a_stem(tmp_path):
    (tmp_path / "a.txt").write_text("stem")
    (tmp_path / "a.png.txt").write_text("photo")
    assert [prompt_for(tmp_path / name, "captions") for name in ("a.jpg", "a.png")] == ["stem", "photo"]


@pytest.mark.parametrize(
    "name, prompt",
    [
        ("red_car", "red car"),
        ("a red car, half-hidden", "a red car, half-hidden"),
        ("red-car_012", "red car"),
        ("red car (12)", "red car"),
        ("3_cats", "3 cats"),
        ("v1.2-cat", "v1.2 cat"),
        ("__red__car__", "red car"),
    ],
)
def test_prompts_from_names(name, prompt):
    assert prompt_for(Path(f"x/{name}.jpg"), "names") == prompt


def test_photos_without_a_prompt(album, tmp_path, capsys):
    (album / "large/wide.jpg.txt").unlink()
    save(album / "0012.jpg", pixels(60), "a number")
    command = ["hints", str(album), str(tmp_path / "out"), "--kind", "gray", "--workers", "0"]
    assert data.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"{album / 'large/wide.jpg'}: no caption beside it (wide.txt or wide.caption)",
        f"{tmp_path / 'out'}: 16 rows, 1 photo left out",
    ]
    assert data.main([*command, "--prompts", "names"]) == 1
    assert "0012.jpg: its name has no words" in capsys.readouterr().out and len(rows(tmp_path / "out")) == 16
    assert data.main([*command, "--prompts", "a photo"]) == 0 and len(rows(tmp_path / "out")) == 17
    for file in album.rglob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match="none of 17 photos has a prompt, the first: .*--prompts names.*--prompts TEXT"):
        data.main(command)


# --------------------------------------------------------------------------------------------------------- the command
def test_the_commands_flags_reach_the_hints(album, tmp_path):
    command = ["hints", str(album / "large"), str(tmp_path / "out"), "--kind", "canny", "--low", "300", "--high", "400"]
    assert data.main([*command, "--size", "64"]) == 0
    target = read_image(tmp_path / "out/target/wide.jpg.png")
    hint = annotate("canny", target, low=300, high=400)
    assert target.shape == (64, 128, 3) and np.array_equal(read_image(tmp_path / "out/source/wide.jpg.png", 1), hint)
    with pytest.raises(DataError, match="64x64.*not of canny .*photos scaled to 512x512"):
        data.main(command)
    with pytest.raises(DataError, match="photos not scaled"):
        data.main([*command, "--size", "0"])
    for wrong, message in (
        (["--radius", "3"], "canny has no parameter 'radius': it takes low and high"),
        (["--high", "2041"], "whole number from 0 to 2040"),
        (["--size", "big"], "a resolution is"),
        (["--max-megapixels", "0"], "above 0"),
        (["--workers", "-1"], "at least 0"),
    ):
        with pytest.raises(DataError, match=message):
            data.main([*command, *wrong])
    with pytest.raises(DataError, match="nowhere: no such folder or photo"):
        data.main(["hints", str(tmp_path / "nowhere"), *command[2:]])


def test_one_photo_becomes_one_hint(album, tmp_path, capsys):
    photo, out = album / "large/wide.jpg", tmp_path / "hint.png"
    command = ["hints", str(photo), str(out), "--kind", "canny"]
    assert data.main(command) == 0 and "saved the hint, 151x75" in capsys.readouterr().out
    assert np.array_equal(read_image(out, 1), annotate("canny", read_image(photo)))
    before = photo.read_bytes()
    for existing in (out, photo, album):
        with pytest.raises(DataError, match="exists already"):
            data.main(["hints", str(photo), str(existing), "--kind", "blur"])
    assert photo.read_bytes() == before
    assert data.main(["hints", str(photo), str(tmp_path / "b.png"), "--kind", "blur", "--size", "64"]) == 0
    assert read_image(tmp_path / "b.png").shape == (64, 128, 3)
    with pytest.raises(DataError, match="the ending names no picture format"):
        data.main(["hints", str(photo), str(tmp_path / "hint.xyz"), "--kind", "canny"])


def test_the_first_losses_of_a_training_on_hints(album, tmp_path, base):
    """The folder trains as it is."""
    import train

    make_dataset(album, tmp_path / "out", CANNY)
    arguments = ["--base", str(base), "--data", str(tmp_path / "out"), "--out", str(tmp_path / "run"), "--steps", "2"]
    arguments += ["--batch-size", "2", "--workers", "0", "--device", "cpu", "--logger-freq", "0", "--no-cache"]
    settings, *_ = train.parse([*arguments, "--resolution", "32"])
    assert train.train(settings) == tmp_path / "run"
