"""WebDataset shards are read where they lie; whatever an archive holds, rows come out, or a line says what is wrong."""

import bz2
import gzip
import io
import json
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

import data
from data import DataError, FolderDataset
from training import shards, tar, verify
from training.files import Archive, Member, open_file, read_bytes
from training.layouts import read_rows

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def png(value: int = 128, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(out, "PNG")
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def make(path, *members, form: int = tarfile.USTAR_FORMAT):
    """A tar archive of (name or TarInfo, content)."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else info.size
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, value: int = 128, prompt: bytes = b"p") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(value)), (f"{key}.hint.png", png(255 - value)), (f"{key}.txt", prompt)]


def problems(path, **settings) -> dict[str, str]:
    rows = read_rows(path, **settings)
    assert not any("\n" in row.problem + row.where for row in rows)
    return {row.where.removeprefix(f"{path}, "): row.problem for row in rows if row.problem}


# ---------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("form", FORMATS)
def test_archives_of_every_format_and_names_of_every_length(form, tmp_path):
    keys = ["000", "./001", "sub/" * 15 + "002", "a b/ü 🟢", "x" * 90]
    keys += [] if form == "ustar" else ["y" * 300, "z/" * 300 + "long"]
    keys = [key for key in keys if form != "ustar" or key.isascii()]
    path = make(
        tmp_path / "a.tar", *(part for i, key in enumerate(keys) for part in sample(key, i)), form=FORMATS[form]
    )
    dataset = FolderDataset(path)
    assert [row.where for row in dataset.rows] == [f"{path}, {key.removeprefix('./')}" for key in keys]
    assert [round((dataset[i]["jpg"][0, 0, 0] + 1) * 127.5) for i in range(len(keys))] == list(range(len(keys)))
    with tarfile.open(path) as archive, open(path, "rb") as opened:
        wanted = [(m.name.removeprefix("./"), m.offset_data, m.size, "") for m in archive.getmembers()]
        assert [tuple(entry) for entry in tar.list_members(opened, os.path.getsize(path))] == wanted
    assert str(dataset.rows[0].hint) == f"{path}/000.hint.png" and dataset.rows[0].hint.suffix == ".png"


def test_numbers_as_gnu_and_pax_write_large_ones(tmp_path):
    """Binary sizes, and a size in the attributes, with which the header's own is void."""
    content = bytearray(make(tmp_path / "a.tar", *sample("0")).read_bytes())
    size = len(png())
    content[124:136] = b"\x80" + size.to_bytes(11, "big")
    assert int.from_bytes(content[257:262], "big") == int.from_bytes(b"ustar", "big")
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + sum(content[156:512]) + 256)
    (tmp_path / "a.tar").write_bytes(content)
    assert problems(tmp_path / "a.tar") == {}
    info = member("1.png", pax_headers={"size": str(size), "comment": "x", "mtime": "1.5"})
    make(tmp_path / "b.tar", (info, png()), *sample("1")[1:], form=tarfile.PAX_FORMAT)
    assert problems(tmp_path / "b.tar") == {} and FolderDataset(tmp_path / "b.tar")[0]["jpg"].shape == (8, 8, 3)


def test_endings(tmp_path):
    webp, jpg = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(webp, "WEBP")
    Image.new("RGB", (8, 8)).save(jpg, "JPEG")
    array = io.BytesIO()
    np.save(array, np.ones((8, 8, 3), np.float32))
    path = make(
        tmp_path / "a.tar",
        ("0.JPG", jpg.getvalue()), ("0.conditioning_image.webp", webp.getvalue()),
        ("0.caption", b"\xef\xbb\xbf a \r\n"),
        ("1.webp", webp.getvalue()), ("1.hint.npy", array.getvalue()),
        ("1.json", json.dumps({"text": "b", "label": 3, "list": [1], "jpg": "x"}).encode()),
        ("2.target.png", png()), ("2.hint.jpeg", jpg.getvalue()), ("2.txt", b""),
        ("2.json", b'{"caption": "c", "label": 4}'),
        ("README", b"x"), (".hidden.png", b"x"), ("dir/._0.png", b"x"), (member("dir/", tarfile.DIRTYPE), b""),
    )  # fmt: skip
    dataset = FolderDataset(path)
    assert [dataset.prompt(i) for i in range(3)] == ["a", "b", ""] and dataset[1]["hint"].min() == 1
    assert [row.extra for row in dataset.rows] == [{}, {"label": 3}, {"caption": "c", "label": 4}]
    assert [row.problem for row in dataset.rows] == ["", "", "the prompt is empty"]


def test_endings_by_name(tmp_path):
    both = [("0.jpg", png(1)), ("0.png", png(2)), ("0.canny.png", png(3)), ("0.de.txt", b"rot"),
            ("0.json", b'{"words": "red", "text": "no"}')]  # fmt: skip
    path = make(tmp_path / "a.tar", *both)
    told = problems(path)["0"]
    assert told == "has more than one target: jpg and png; --columns target=jpg takes one"
    assert (
        problems(path, columns="target=jpg")["0"]
        == "has no hint (.hint.png, ...), but .jpg, .png, .canny.png, .de.txt, .json"
    )
    for hint, value in (("canny", 3), ("canny.png", 3), (".png", 2)):
        dataset = FolderDataset(path, columns=f"target=jpg,hint={hint},prompt=words")
        assert dataset.prompt(0) == "red" and round(dataset[0]["hint"][0, 0, 0] * 255) == value
    assert [FolderDataset(path, columns=f"hint=png,prompt={name}").prompt(0) for name in ("de", "de.txt")] == [
        "rot"
    ] * 2
    assert problems(path, columns="hint=png,prompt=x")["0"].startswith("has no prompt (.x or x in .json), but .jpg")
    path = make(tmp_path / "b.tar", *sample("0"), ("0.caption", b"q"), *sample("1")[:2], ("1.json", b'{"text": 3}'),
                *sample("2")[:2], ("2.json", b'{"text": "a", "caption": "b"}'))  # fmt: skip
    told = problems(path)
    assert told["0"] == "has more than one prompt: txt and caption; --columns prompt=txt takes one"
    assert told["1"].startswith(
        "has no prompt (.txt, .caption, or prompt, text, caption in .json), but .png, .hint.png"
    )
    assert told["2"] == "has more than one prompt: text and caption; --columns prompt=text takes one"


def test_what_a_row_of_an_archive_can_lack(tmp_path):
    cases = {
        "no-hint": sample("no-hint")[::2], "no-target": sample("no-target")[1:], "text": sample("text")[2:],
        "twice": [*sample("twice"), ("twice.png", png())], "case": [*sample("case"), ("case.PNG", png())],
        "encoding": [*sample("encoding")[:2], ("encoding.txt", b"\xe9")],
        "long": [*sample("long")[:2], ("long.txt", bytes(2 << 20))],
        "json": [*sample("json")[:2], ("json.json", b"{")], "array": [*sample("array")[:2], ("array.json", b"[1]")],
        "half": [*sample("half")[:2], ("half.json", rb'{"prompt": "\ud800"}')],
        "big": [*sample("big"), ("big.json", b'{"n": 99999999999999999999}')],
        "deep": [*sample("deep"), ("deep.json", b"[" * 99999)],
    }  # fmt: skip
    words = {
        "no-hint": "has no hint (.hint.png, ...), but .png, .txt", "no-target": "has no target",
        "text": "has no target", "twice": "has 2 members that end in .png", "case": "has 2 members",
        "encoding": "encoding.txt is not UTF-8 text", "long": "long.txt has 2097152 bytes, more than a prompt takes",
        "json": "json.json: not JSON", "array": "has no prompt", "half": "prompt has half of a character",
        "big": "beyond 64 bits", "deep": "nested too",
    }  # fmt: skip
    path = make(tmp_path / "a.tar", *(part for parts in cases.values() for part in parts), *sample("good"))
    told = problems(path)
    assert told.keys() == words.keys() and all(words[key] in told[key] for key in words), told
    assert data.check(str(path))[0] == 1 and len(data.check(str(path))[1]) == len(cases)
    with pytest.raises(DataError, match=f"{path}, no-hint: has no hint .*and 11 more: python data.py check"):
        FolderDataset(path)


# ----------------------------------------------------------------------------------------------------- hostile archives
def test_what_is_no_plain_file_is_not_read(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    kinds = {
        "link": (member("link.txt", tarfile.SYMTYPE, linkname=str(secret)), "link.txt is a link"),
        "hard": (member("hard.txt", tarfile.LNKTYPE, linkname="link.png"), "hard.txt is a link"),
        "char": (member("char.txt", tarfile.CHRTYPE, devmajor=1, devminor=5), "char.txt is a device"),
        "block": (member("block.txt", tarfile.BLKTYPE), "block.txt is a device"),
        "pipe": (member("pipe.txt", tarfile.FIFOTYPE), "pipe.txt is a pipe"),
        "odd": (member("odd.txt", b"Z"), "odd.txt is of the unknown kind b'Z'"),
        "holes": (
            member("GNUSparseFile.7/x.txt", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "holes.txt"}),
            "holes.txt is stored with holes",
        ),
        "../up": (member("../up.txt"), "../up.png has a name that leaves"),
        "/root": (member("/root.txt"), "/root.png has a name that leaves"),
    }
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        used = {key: value for key, value in kinds.items() if key != "holes" or form == tarfile.PAX_FORMAT}
        parts = [part for key, (info, _) in used.items() for part in (*sample(key)[:2], (info, b""))]
        told = problems(make(tmp_path / "a.tar", *parts, *sample("good"), form=form))
        assert told.keys() == used.keys(), told
        assert all(told[key].startswith(words) for key, (_, words) in used.items()), told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "secret.txt"]  # nothing is written


def gnu_sparse(name: str, content: bytes, extended: int) -> bytes:
    """An old GNU sparse member with some extended headers."""
    info = member(name, tarfile.GNUTYPE_SPARSE, size=len(content))
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = extended > 0
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    blocks = [bytes(504) + bytes([k + 1 < extended]) + bytes(7) for k in range(extended)]
    return bytes(header) + b"".join(blocks) + content.ljust(-(-len(content) // 512) * 512, b"\0")


@pytest.mark.parametrize("extended", [0, 1, 3])
def test_files_with_holes_are_passed_over(extended, tmp_path):
    path = make(tmp_path / "a.tar", *sample("good"))
    path.write_bytes(gnu_sparse("0.png", bytes(700), extended) + path.read_bytes())
    assert problems(path) == {"0": "0.png is stored with holes (sparse)"}
    assert FolderDataset(path, strict=False)[1]["txt"] == "p"


def header(name: str, kind: bytes, size: int | bytes) -> bytes:
    block = bytearray(member(name, kind).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    return bytes(block)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (header("0.png", b"0", 1 << 32), "is cut short: it ends in '0.png'"),
        (header("0.png", b"0", b"\x80" + b"\x7f" * 11), "is cut short"),
        (header("0.png", b"0", b"\xff" * 12), "no number where one is due"),
        (header("0.png", b"0", b"12x45\0      "), "no number where one is due"),
        (header("0.png", b"L", 1 << 32), "is cut short"),
        (header("0.png", b"L", (1 << 20) + 1) + bytes(1 << 21), "bytes of attributes of one member"),
        (header("0.png", b"x", 512) + b"7 path=\n".ljust(512, b"\0"), "pax attributes cannot be read"),
        (header("0.png", b"x", 512) + b"999999999 path=a".ljust(512, b"\0"), "pax attributes cannot be read"),
        (header("0.png", b"x", 512) + b"14 size=-9999\n".ljust(512, b"\0") + header("a", b"0", 0), "size of a member"),
        (header("0.png", b"x", 512) + b"14 size=99999\n".ljust(512, b"\0") + header("a", b"0", 0), "is cut short"),
        (gnu_sparse("0.png", b"", 1)[:512], "is cut short: it ends in a header"),
        (b"garbage" * 200, "another checksum|no number"),
        (header("0.png", b"0", 0)[:-12] + bytes(11) + b"x", "another checksum"),
        (b"", "ends without the empty blocks"),
    ],
)  # fmt: skip
def test_a_damaged_archive_is_one_line_after_its_good_rows(damage, words, tmp_path):
    path = make(tmp_path / "a.tar", *sample("good"), *sample("good2"))
    content = path.read_bytes().rstrip(b"\0")
    content = content.ljust(-(-len(content) // 512) * 512, b"\0")
    path.write_bytes(content + damage)
    rows = read_rows(path)
    assert [row.readable for row in rows[:2]] == [True, True] and rows[-1].where == str(path)
    assert any(word in rows[-1].problem for word in words.split("|")), rows[-1].problem
    assert "its members up to there are read" in rows[-1].problem
    rows, listed = data.check(str(path))
    assert rows == 2 and 1 <= len(listed) <= 2 and not any("\n" in line for line in listed)


def test_a_name_after_very_many_attributes(tmp_path):
    """A megabyte of attributes is read in one pass."""
    path = make(tmp_path / "a.tar", *sample("0"))
    body = b"6 a=b\n" * 170_000 + b"14 path=1.png\n"
    content = header("x", b"x", len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0") + path.read_bytes()
    path.write_bytes(content)
    told = problems(path)
    assert told.keys() == {"0", "1"} and told["1"] == "has no hint (.hint.png, ...), but .png"


def test_whatever_an_archive_is_cut_to_or_changed_in_rows_or_lines_come_out(tmp_path):
    parts = [*sample("0"), *sample("y" * 120), *sample("2")[:2], ("2.json", b'{"prompt": "a", "n": 3}')]
    whole = make(tmp_path / "whole.tar", *parts, form=tarfile.PAX_FORMAT).read_bytes()
    rng, path = random.Random(0), tmp_path / "a.tar"
    for number in range(150):
        content = bytearray(whole[: rng.randrange(len(whole))] if number % 3 == 0 else whole)
        for _ in range(rng.choice((0, 1, 3, 30)) if number % 3 == 0 else rng.choice((1, 3, 30))):
            if content:
                content[rng.randrange(len(content))] = rng.choice((0, 255, 48, 55, rng.randrange(256)))
        path.write_bytes(content)
        rows = read_rows(path)
        assert all("\n" not in row.where + row.problem for row in rows) and len(rows) <= 20
        verify.find_bad_rows(FolderDataset(path, strict=False), workers=0) if rows else None


def test_archives_that_are_compressed_empty_or_none(tmp_path):
    plain = make(tmp_path / "a.tar", *sample("0")).read_bytes()
    for content, words in (
        (gzip.compress(plain), "is compressed (gzip): its members cannot be read where they lie; unpack it to a .tar"),
        (bz2.compress(plain), "is compressed (bzip2)"), (b"", "shorter than a header"), (b"x" * 100, "shorter than"),
        (plain[:512] + b"\0" * 9, "0.png is cut off"), (b"x" * 5000, "is no tar archive"),
    ):  # fmt: skip
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(DataError) as told:
            FolderDataset(tmp_path / "a.tar")
        assert words in str(told.value) and str(told.value).startswith(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match=r"WebDataset \(a.tar\) has no rows"):
        FolderDataset(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(plain + make(tmp_path / "b.tar", *sample("1")).read_bytes())  # cat a.tar b.tar
    assert [row.where[-1] for row in FolderDataset(tmp_path / "a.tar").rows] == ["0", "1"]


# ------------------------------------------------------------------------------------------------ several shards, links
def test_a_folder_of_shards_and_links(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("10", "2", ".hidden"):
        make(tmp_path / "in" / f"{name}.tar", *sample("0", int(name) if name.isdigit() else 0))
    dataset = FolderDataset(tmp_path / "in")
    assert [round((dataset[i]["jpg"][0, 0, 0] + 1) * 127.5) for i in range(2)] == [2, 10]  # in the order of numbers
    assert str(dataset).endswith("WebDataset (2 shards), 2 rows")
    make(tmp_path / "out.tar", *sample("0"))
    (tmp_path / "in/3.tar").symlink_to(tmp_path / "out.tar")
    with pytest.raises(DataError, match="3.tar is a link that leaves the folder .*--follow-links"):
        FolderDataset(tmp_path / "in")
    assert len(FolderDataset(tmp_path / "in", follow_links=True)) == 3
    assert len(FolderDataset(f"{tmp_path}/in/*.tar")) == 3 == len(FolderDataset(tmp_path / "in/3.tar")) + 2  # named
    os.remove(tmp_path / "in/3.tar")
    os.mkfifo(tmp_path / "in/3.tar")
    assert "is no regular file" in read_rows(tmp_path / "in")[1].problem


def test_training_without_the_bad_rows_of_a_damaged_shard(tmp_path):
    good = make(tmp_path / "0.tar", *sample("0"), *sample("1"))
    make(tmp_path / "1.tar", *sample("2"), *sample("3"))
    content = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(content[: 512 * 8])
    dataset = FolderDataset(tmp_path, strict=False)
    bad = verify.find_bad_rows(dataset, workers=0)
    assert list(bad) == [3, 4] and "1.tar, 3: " in bad[3] and "1.tar: is cut short" in bad[4]
    kept = verify.verified(dataset, tmp_path / "cache", True)
    assert [row.where for row in kept.rows] == [f"{good}, 0", f"{good}, 1", f"{tmp_path}/1.tar, 2"] and len(
        kept[2]
    ) == 3
    damaged = bytearray(good.read_bytes())
    damaged[512 + 40] ^= 255  # in the picture 0.png
    good.write_bytes(damaged)
    bad = verify.find_bad_rows(FolderDataset(tmp_path, strict=False), workers=0)
    assert f"{good}, 0: {good}/0.png: not a readable image" in bad[0]


# ------------------------------------------------------------------------------------------- index and changed archives
def test_the_index_is_remembered_and_a_changed_shard_is_noticed(tmp_path, monkeypatch):
    path, index = make(tmp_path / "a.tar", *sample("0"), *sample("1", prompt=b"q")), tmp_path / "index"
    read, real = [], shards.read_index
    monkeypatch.setattr(shards, "read_index", lambda *a: read.append(a) or real(*a))
    monkeypatch.setattr(shards, "identity", lambda path: verify.path_identity(path, 0))

    def rows(**settings):
        read.clear()
        return [row.prompt for row in read_rows(path, index_dir=index, **settings)]

    assert rows() == ["p", "q"] and read
    assert rows() == ["p", "q"] and not read
    assert read_rows(path, index_dir=index) == read_rows(path)
    rows(columns="prompt=caption")
    assert read and problems(path, columns="prompt=caption")["0"].startswith("has no prompt")  # other texts are wanted
    make(path, *sample("0"), *sample("1", prompt=b"r"))  # as long as before
    assert rows() == ["p", "r"] and read and rows() == ["p", "r"] and not read
    (file,) = index.iterdir()
    for content in (b"", b"x", file.read_bytes()[:-9], gzip.compress(b"[]"), gzip.compress(b'["", 1, 2]'), b"\x1f\x8b"):
        file.write_bytes(content)
        assert rows() == ["p", "r"] and read and rows() == ["p", "r"] and not read
    path.write_bytes(path.read_bytes()[:2048])
    assert rows()[-1] == "" and read
    assert problems(path, index_dir=index) == problems(path)  # the damage is remembered as well
    monkeypatch.setattr(shards, "identity", lambda path: verify.path_identity(path))
    assert rows() and read and rows() and read  # changed just now: another change could leave no trace


def test_a_folder_for_the_index_that_cannot_be_written_costs_nothing(tmp_path):
    path = make(tmp_path / "a.tar", *sample("0"))
    os.utime(path, (1e9, 1e9))
    (tmp_path / "file").write_text("x")
    shards.identity, before = (lambda path: "known"), shards.identity
    try:
        assert len(read_rows(path, index_dir=tmp_path / "file/index")) == 1
    finally:
        shards.identity = before


def test_an_archive_that_changes_under_the_run_is_one_line(tmp_path):
    path = make(tmp_path / "a.tar", *sample("0"), *sample("1"))
    dataset = FolderDataset(path)
    assert dataset[1]["txt"] == "p"
    content = path.read_bytes()
    path.write_bytes(content[:512])
    for read in (lambda: dataset[0], lambda: dataset.sizes(1), lambda: dataset.key(1)):
        with pytest.raises(DataError, match=f"{path}, [01]: {path}/[01].*png: its archive has changed since"):
            read()
    path.unlink()
    with pytest.raises(DataError, match="no such image"):
        dataset[0]
    assert list(verify.find_bad_rows(dataset, workers=0)) == [0, 1]


def test_members_are_known_by_the_identity_of_their_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "FRESH", 0)
    path = make(tmp_path / "a.tar", *sample("0"), *sample("1", 9))
    read, real = [], verify.read_bytes
    monkeypatch.setattr(verify, "read_bytes", lambda file, *a: read.append(file.name) or real(file, *a))
    find = lambda: verify.find_bad_rows(FolderDataset(path, strict=False), tmp_path / "cache", workers=0)
    assert find() == {} and sorted(read) == ["0.hint.png", "0.png", "1.hint.png", "1.png"]
    read.clear()
    assert find() == {} and not read
    make(path, *sample("0"), *sample("1", 8))
    assert find() == {} and len(read) == 4


def test_a_member_is_a_file_like_others(tmp_path):
    path = make(tmp_path / "a.tar", ("0.txt", b"0123456789"), ("1.txt", b"abc"))
    found = os.stat(path)
    archive = Archive(path, found.st_size, found.st_mtime_ns)
    first = Member(archive, "sub/0.txt", 512, 10)
    assert read_bytes(first) == b"0123456789" and (first.name, first.suffix) == ("0.txt", ".txt")
    with open_file(first) as opened:
        assert opened.read(3) == b"012" and opened.seek(-2, 2) == 8 and opened.read() == b"89" and opened.read() == b""
        assert opened.seek(1) == 1 and opened.seek(2, 1) == 3 and opened.read(100) == b"3456789"
    assert pickle.loads(pickle.dumps(first)) == first
    with pytest.raises(DataError, match="a.tar/sub/0.txt: has 10 bytes, more than an image of 5e-07 megapixels takes"):
        read_bytes(first, 0.5)
    with open(path, "rb") as opened:
        assert [(e.name, e.size) for e in tar.list_members(opened, 10240)] == [("0.txt", 10), ("1.txt", 3)]
