"""What prompt.json may hold: whatever it is, rows come out or one line says what is wrong with each."""

import json
import os

import pytest

import data
from data import DataError, FolderDataset
from tests.test_data import picture, row, write
from tests.test_verify import open_folder
from training.layouts import read_rows

GOOD = json.dumps(row(0))


@pytest.fixture
def one(tmp_path):
    """A folder with the images of row 0; its prompt.json is the test's."""
    for side in ("source", "target"):
        picture(tmp_path / side / "0.png", 8, 8)
    return tmp_path


def problems(root, text: str | bytes) -> list[str]:
    """The problems of a prompt.json of this text, without the path before "line 3: "."""
    (root / "prompt.json").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    told = [r.problem for r in read_rows(root) if r.problem]
    assert not any("\n" in problem for problem in told)
    return told


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (GOOD[:-1] + ', "n": ' + "9" * 5000 + "}", "not JSON that can be read (Exceeds the limit"),
        (GOOD[:-1] + ', "n": ' + "9" * 30 + "}", "n is a whole number beyond 64 bits"),
        (GOOD.replace('"p"', r'"\ud800"'), r"prompt has half of a character (\ud800)"),
        (GOOD.replace("source/0", r"source/\udcff0"), r"source has half of a character (\udcff)"),
        (GOOD[:-1] + r', "\udfff": 1}', r"\udfff has half of a character"),
        (GOOD.replace("source/0", r"source/\u00000"), "is no path"),
        (GOOD.replace("source/0.png", ""), "is no path"),
        (GOOD.replace("source/0.png", "../0.png"), "leaves the folder"),
        (GOOD.replace("source/0.png", "/etc/passwd"), "/etc/passwd leaves the folder"),
        (GOOD.replace("source/0.png", r"..\\..\\0.png"), "leaves the folder"),
        (GOOD.replace("source/0.png", r"C:\\data\\0.png"), "leaves the folder (a drive"),
        (GOOD.replace("source/0.png", "C:/data/0.png"), "leaves the folder (a drive"),
        (GOOD.replace("source/0.png", r"\\\\server\\share\\0.png"), "leaves the folder"),
        (GOOD.replace('"p"', "3"), "lacks the text prompt"),
        ("[1, 2]", "lacks the text source and target and prompt"),
        ("null", "lacks the text"),
        ('"text"', "lacks the text"),
        ("{,}", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
    ],
)
def test_a_bad_line_is_one_line_and_the_next_row_is_read(line, words, one):
    told = problems(one, f"{line}\n{GOOD}\n")
    assert len(told) == 1 and words in told[0]
    assert [r.readable for r in read_rows(one)] == [False, True]
    with pytest.raises(DataError, match="line 1: "):
        FolderDataset(one)
    with pytest.raises(DataError, match="line 1: "):
        open_folder(one)[0]
    assert open_folder(one)[1]["txt"] == "p"
    rows, listed = data.check(str(one))
    assert rows == 1 and len(listed) == 1 and words in listed[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_with_a_mark_are_read(encoding, one):
    text = json.dumps(row(0, "ein Kreis, grün 🟢"), ensure_ascii=False) + "\r\n" + GOOD + "\r\n"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    assert problems(one, mark + text.encode(encoding)) == []
    assert [FolderDataset(one).prompt(i) for i in range(2)] == ["ein Kreis, grün 🟢", "p"]


def test_encodings_that_are_wrong_are_said(one):
    assert "byte order mark" in problems(one, GOOD.encode("utf-16-le"))[0]
    assert problems(one, GOOD.encode().replace(b'"p"', b'"\xe9"')) == ["not UTF-8 text"]
    assert "UTF-16 text" in problems(one, b"\xff\xfe" + b"\x00\xd8" * 4)[0]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read(indent, one):
    rows = [row(0, "a"), row(0, "b") | {"class": 3}, row(0, " ")]
    text = json.dumps(rows, indent=indent)
    assert problems(one, f"\n{text}\n") == ["the prompt is empty"]
    assert [r.where.split(", ")[1] for r in read_rows(one)] == ["item 1", "item 2", "item 3"]
    assert [FolderDataset(one).prompt(i) for i in range(3)] == ["a", "b", " "]
    assert len(problems(one, text[:-1])) == 1 and "not JSON" in problems(one, text[:-1])[0]


def test_backslashes_of_windows_are_read(one):
    write(one, GOOD.replace("source/0.png", r"source\\0.png").replace("target/0.png", r"target\\0.png"))
    assert FolderDataset(one)[0]["jpg"].shape == (8, 8, 3)
    (one / r"source\0.png").write_bytes((one / "source/0.png").read_bytes())  # a name on Linux: taken as it is
    assert FolderDataset(one).rows[0].hint.name == r"source\0.png"


def test_links_that_leave_the_folder_need_the_flag(one, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    picture(outside / "0.png", 8, 8)
    write(one, row(0))
    os.replace(one / "source/0.png", one / "kept.png")
    (one / "source/0.png").symlink_to(one / "kept.png")
    assert FolderDataset(one)[0]["hint"].shape == (8, 8, 3)  # within the folder
    for link, target in ((one / "source/0.png", outside / "0.png"), (one / "source", outside)):
        if link.is_symlink():
            link.unlink()
        else:
            link.rename(one / "moved")
        link.symlink_to(target)
        with pytest.raises(DataError, match=r"line 1: .*0.png is a link that leaves the folder \(to .*--follow-links"):
            FolderDataset(one)
        assert FolderDataset(one, follow_links=True)[0]["hint"].shape == (8, 8, 3)
        assert data.main(["check", str(one)]) == 1 and data.main(["check", str(one), "--follow-links"]) == 0
        link.unlink()
        (one / "source").mkdir(exist_ok=True)
    inner = one.parent / "linked"
    picture(one / "source/0.png", 8, 8)
    inner.symlink_to(one)
    assert FolderDataset(inner)[0]["hint"].shape == (8, 8, 3)  # the folder itself may be a link


def test_what_is_no_file_is_not_waited_for(one):
    os.mkfifo(one / "prompt.json")
    with pytest.raises(DataError, match=r"prompt.json: is no regular file \(a folder, pipe or device\)"):
        FolderDataset(one)
    assert not data.is_dataset(one)


def test_further_keys_go_together_or_are_left_out(one):
    """A key that is a text in one row and a number in another would end a run when the two meet in a batch; the names
    of what a sample holds are not free."""
    write(one, row(0) | {"a": 1, "b": "x", "moments": 3}, row(0) | {"a": 2.5, "b": 2, "moments": 4})
    samples = data.Samples(FolderDataset(one), range(2), 0, (4, 1, 1))
    batch = next(data.batches(samples, 0, 2, 2))
    assert "b" not in batch and "moments" not in batch and sorted(batch["a"].tolist()) == [1, 2.5]
