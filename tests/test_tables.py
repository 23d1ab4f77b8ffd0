"""Tables, folders and patterns: which layout is taken, which column is which, and what is wrong in one line."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import data
from data import DataError, FolderDataset
from tests.test_data import picture, row, write
from training.layouts import expand, is_pattern, read_rows
from training.tables import find_columns, parse_columns, read_csv


@pytest.fixture
def one(tmp_path):
    """A folder with two images, t.png and h.png."""
    for name in ("t", "h"):
        picture(tmp_path / f"{name}.png", 8, 8)
    return tmp_path


def refused(root, **settings) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises(DataError) as told:
        FolderDataset(root, **settings)
    assert "\n" not in str(told.value)
    return str(told.value)


def table(root, text: str | bytes, name: str = "pairs.csv"):
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / name


# ------------------------------------------------------------------------------------------------------------- columns
@pytest.mark.parametrize(
    "columns",
    [
        "target,source,prompt", "image,conditioning_image,text", "file_name,conditioning_image,caption",
        "file_name,conditioning_image_file_name,text", "Image,Hint,Caption", "image_path,hint_path,prompt",
        "image_file_name,control_image_file_name,text",
    ],
)  # fmt: skip
def test_columns_that_people_have(columns, one):
    for name in ("pairs.csv", "metadata.csv"):
        dataset = FolderDataset(table(one, f"{columns}\nt.png,h.png,a circle\n", name))
        found = dataset.rows[0]
        assert (found.target.name, found.hint.name, found.prompt, found.extra) == ("t.png", "h.png", "a circle", {})
    os.remove(one / "pairs.csv")
    assert FolderDataset(one)[0]["txt"] == "a circle"  # the folder with metadata.csv
    os.remove(one / "metadata.csv")
    entry = dict(zip(columns.split(","), ("t.png", "h.png", "p"), strict=True))
    for name in ("metadata.jsonl", "x.json", "x.jsonl", "x.ndjson"):
        text = json.dumps([entry] if name == "x.json" else entry)
        assert FolderDataset(table(one, text, name))[0]["jpg"].shape == (8, 8, 3)


def test_columns_by_name_and_further_ones(one):
    text = "id,photo,edges,words,label,score,mixed\n1,t.png,h.png,7,3,0.5,1\n2,t.png,h.png,8,4,1e-3,x\n"
    dataset = FolderDataset(table(one, text), columns="target=photo, hint=edges, prompt=words")
    assert [dataset.prompt(i) for i in range(2)] == ["7", "8"]  # a prompt is a text, whatever it looks like
    batch = next(data.batches(data.Samples(dataset, [0, 1], 0, (4, 1, 1)), 0, 2, 2))
    assert sorted(batch["label"].tolist()) == [3, 4] and sorted(batch["score"].tolist()) == [0.001, 0.5]
    assert sorted(batch["mixed"]) == ["1", "x"] and sorted(batch["id"].tolist()) == [1, 2]
    write(one, {"source": "h.png", "target": "t.png", "prompt": "a", "alt": "b"})
    assert [FolderDataset(one, columns=c).prompt(0) for c in ("", "prompt=alt")] == ["a", "b"]


def test_columns_that_are_missing_or_not_clear_are_one_line(one):
    path = table(one, "image,edges,text\nt.png,h.png,p\n")
    told = refused(path)
    assert "no column for the hint (source, conditioning_image, hint," in told
    assert "its columns are image, edges, text" in told and "--columns hint=NAME" in told
    assert "no column sketch for the hint; its columns are image" in refused(path, columns="hint=sketch")
    told = refused(table(one, "image,hint,text,caption\nt.png,h.png,p,q\n"))
    assert "columns text and caption for the prompt" in told and "--columns prompt=text takes one" in told
    assert "no column for the target" in refused(table(one, "t.png,h.png,a circle\nt.png,h.png,b\n"))  # no header
    assert "2 columns 'image'" in refused(table(one, "image,hint,image,text\nt.png,h.png,t.png,p\n"))
    assert "first line, which should name the columns, is empty" in refused(table(one, ""))
    assert "(pairs.csv) has no rows" in refused(table(one, "image,hint,text\n"))
    for columns in ("image", "target=", "image=a", "target=a,target=b", "=", "target=image;hint=edges,x"):
        assert f"--columns is {columns!r}, should be like target=" in refused(path, columns=columns)
    with pytest.raises(DataError, match="x: has no column for the target"):
        find_columns([], {}, "x")
    assert parse_columns(" hint=a b , prompt=c=d ") == {"hint": "a b", "prompt": "c=d"} and parse_columns("") == {}


# ----------------------------------------------------------------------------------------------------------------- CSV
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_csv_as_spreadsheets_write_it(end, delimiter, encoding, one):
    prompt = f'grün, "gold"; 🟢{end}second line\t!'
    quoted = '"' + prompt.replace('"', '""') + '"'
    lines = [["image", "hint", "text"], ["t.png", '"h.png"', quoted], [], ["t.png", "h.png", "b"]]
    path = table(one, (end.join(delimiter.join(line) for line in lines) + end).encode(encoding), "pairs.tsv")
    assert [r.prompt for r in read_rows(path)] == [prompt, "b"]
    assert [r.where.split(", ")[1] for r in read_rows(path)] == ["line 2", "line 5"]  # where each begins


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("t.png,h.png", "has 2 cells, the first line 3"),
        ("t.png,h.png,a,b", "has 4 cells, the first line 3"),
        ('t.png,"h.png"x,p', "not CSV (',' expected after '\"')"),
        (b"t.png,h.png,\xe9", "not UTF-8 text"),
        (",h.png,p", "image is '', which is no path"),
        ("t.png,../h.png,p", "leaves the folder"),
        ("t.png,/etc/passwd,p", "/etc/passwd leaves the folder"),
        ("t.png,C:\\h.png,p", "leaves the folder (a drive"),
        ("t.png,h\0.png,p", "which is no path"),
        ("t.png,h.png," + "9" * 2_000_000, "not CSV (field larger than field limit"),
    ],
)
def test_a_bad_line_of_csv_is_one_line_and_the_next_row_is_read(line, words, one):
    line = line if isinstance(line, bytes) else line.encode()
    path = table(one, b"image,hint,text\n" + line + b"\nt.png,h.png,good\n")
    rows = read_rows(path)
    assert [r.readable for r in rows] == [False, True] and words in rows[0].problem and "\n" not in rows[0].problem
    assert rows[1].prompt == "good" and f"{path}, line 2: " in refused(path)


def test_a_quote_that_never_ends_is_told_where_it_begins(one):
    path = table(one, 'image,hint,text\nt.png,h.png,a\nt.png,h.png,"b\nt.png,h.png,c\n')
    assert [r.readable for r in read_rows(path)] == [True, False]
    assert "line 3: not CSV (a double quote is never closed)" in refused(path)


def test_an_empty_prompt_and_an_index_column_of_pandas(one):
    path = table(one, ",image,hint,text,\n0,t.png,h.png,,x\n1,t.png,h.png,b,y\n")
    assert [r.problem for r in read_rows(path)] == ["the prompt is empty", ""] and FolderDataset(path)[0]["txt"] == ""
    assert not read_rows(path)[0].extra and [entry for _, entry in read_csv(path)][0].keys() == {
        "image",
        "hint",
        "text",
    }


def test_paths_are_relative_to_the_table_and_links_are_not_followed(one, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (one / "sub").mkdir()
    path = table(one / "sub", "image,hint,text\nx.png,x.png,p\n")
    assert "sub/x.png: no such image" in str(pytest.raises(DataError, FolderDataset(path).sizes, 0).value)
    picture(outside / "0.png", 8, 8)
    (one / "sub/x.png").symlink_to(outside / "0.png")
    assert "--follow-links" in refused(path) and FolderDataset(path, follow_links=True)[0]["jpg"].shape == (8, 8, 3)


# ----------------------------------------------------------------------------------------------------------- detection
def test_what_is_no_data_set_says_what_was_looked_for_and_found(one):
    for i in range(12):
        picture(one / f"photos/{i}.jpg", 8, 8)
        (one / f"photos/{i}.txt").write_text("p")
    (one / "photos/train").mkdir()
    write(one / "photos/train", row(0))
    told = refused(one / "photos")
    looked_for = (
        "no prompt.json in it",
        "metadata.jsonl in it",
        "metadata.csv in it",
        "no .tar shards",
        "--hints FOLDER",
    )
    assert all(words in told for words in looked_for) and "found train/prompt.json, 12 .jpg, 12 .txt" in told
    (one / "empty").mkdir()
    assert "(found nothing)" in refused(one / "empty")
    assert refused(one / "nowhere") == f"{one / 'nowhere'}: no such folder or file"
    assert "t.png: is no data set: a folder, a table (.json, " in refused(one / "t.png")
    os.mkfifo(one / "p.csv")
    assert "is no regular file" in refused(one / "p.csv")
    assert not any(
        data.is_dataset(path) for path in (one, one / "photos", one / "nowhere", one / "p.csv", "\0", "a" * 9999)
    )
    assert data.is_dataset(one / "photos", one) and data.is_dataset(one / "photos/train")


def test_folders_that_are_not_clear_are_refused_with_the_way_out(one):
    write(one, {"source": "h.png", "target": "t.png", "prompt": "of prompt.json"})
    (one / "a.tar").write_bytes(bytes(10240))
    assert "Fill50K (prompt.json; its 1 .tar files are not read), 1 rows" in str(FolderDataset(one))
    table(one, "image,hint,text\nt.png,h.png,of metadata.csv\n", "metadata.csv")
    told = refused(one)
    assert f"both prompt.json and metadata.csv list rows; --data {one}/prompt.json takes one" in told
    names = ("prompt.json", "metadata.csv")
    assert [FolderDataset(one / name).prompt(0) for name in names] == ["of prompt.json", "of metadata.csv"]
    (one / "metadata.csv").unlink()
    assert "prompt.json names the hints of its rows" in refused(one, hints=one)
    assert "--hints goes with a folder of images" in refused(one / "prompt.json", hints=one)
    (one / "prompt.json").unlink()
    assert "both 1 .tar shards and 2 images" in refused(one)


def test_patterns(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "a-010.tar", "b-2.tar", "b-10.tar", "x{1}.tar", "[1].tar"):
        (tmp_path / name).touch()
    names = lambda pattern: [path.name for path in expand(f"{tmp_path}/{pattern}")]
    ends = ["a-000.tar", "a-010.tar"]
    assert names("a-{000..001}.tar") == ["a-000.tar", "a-001.tar"] and names("b-*.tar") == ["b-2.tar", "b-10.tar"]
    assert names("{b-10,a-000}.tar") == ["b-10.tar", "a-000.tar"] and names("a-0{00,1{0..0}}.tar") == ends
    assert names("a-0?0.tar") == ends and names("{a-010,a-*}.tar") == ["a-010.tar", "a-000.tar", "a-001.tar"]
    assert names("[1].tar") == ["[1].tar"] and names("x{1}.tar") == ["x{1}.tar"]
    for pattern, words in (
        ("a-{000..004}.tar", r"a-002.tar: no such file \(and 2 more\)"), ("c*.tar", "no such file"),
        ("{0..9}{0..99999}.tar", "more than 100000 files"), ("{3..1}.tar", "stands for no file"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            names(pattern)
    assert is_pattern("a{0..1}") and is_pattern("*.tar") and not is_pattern("x{1}.tar") and not is_pattern("a b.tar")
    (tmp_path / "c.csv").touch()
    assert "a pattern is for .tar shards" in refused(f"{tmp_path}/*.csv")


# -------------------------------------------------------------------------------------------------------- folder pairs
@pytest.fixture
def pairs(tmp_path):
    """photos/ and edges/, with 1.png to 3.png and a sub-folder."""
    for stem in ("2", "10", "sub/1"):
        picture(tmp_path / f"photos/{stem}.JPG", 8, 8)
        picture(tmp_path / f"edges/{stem}.png", 8, 8)
        (tmp_path / f"photos/{stem}.txt").write_text(f"prompt {stem}\n")
    return tmp_path


def problems(root, **settings) -> dict[str, str]:
    rows = read_rows(root / "photos", hints=root / "edges", **settings)
    return {row.where.split(", ")[-1]: row.problem for row in rows if row.problem}


def test_folder_pairs_in_their_natural_order(pairs):
    picture(pairs / "edges/of no image.png", 8, 8)
    for name in (".DS_Store", "photos/._2.JPG", "photos/notes.md", "photos/.git/x.png"):
        (pairs / name).parent.mkdir(exist_ok=True)
        (pairs / name).write_bytes(b"x")
    dataset = FolderDataset(pairs / "photos", hints=pairs / "edges")
    assert [dataset.prompt(i) for i in range(3)] == ["prompt 2", "prompt 10", "prompt sub/1"]
    assert [row.hint.name for row in dataset.rows] == ["2.png", "10.png", "1.png"]
    assert str(dataset).endswith(
        f"folder pairs (hints in {pairs}/edges), 3 rows; 1 hints in {pairs}/edges belong to no image"
    )
    (pairs / "edges").rename(pairs / "photos/edges")  # in the folder of the targets: its images are no targets
    assert len(FolderDataset(pairs / "photos", hints=pairs / "photos/edges")) == 3
    assert dataset.check_command == f"python data.py check {pairs}/photos --hints {pairs}/edges"


def test_folder_pairs_of_which_something_is_missing_or_there_twice(pairs):
    (pairs / "edges/2.png").unlink()
    picture(pairs / "edges/10.jpg", 8, 8)
    (pairs / "photos/sub/1.txt").unlink()
    assert problems(pairs) == {
        "2": f"has no hint in {pairs}/edges", "10": f"has 2 hints in {pairs}/edges: 10.jpg and 10.png",
        "sub/1": "has no caption (.txt or .caption); an empty file stands for no prompt",
    }  # fmt: skip
    picture(pairs / "photos/2.webp", 8, 8)
    (pairs / "photos/sub/1.txt").write_text(" ")
    assert problems(pairs)["2"] == "has 2 targets: 2.JPG and 2.webp"
    assert problems(pairs)["sub/1"] == "the prompt is empty"
    assert "and 1 more: python data.py check" in refused(pairs / "photos", hints=pairs / "edges")


def test_captions_of_two_endings_and_of_odd_bytes(pairs):
    (pairs / "photos/2.caption").write_bytes(b"\xff\xfe" + "grün\r\nund gelb".encode("utf-16-le"))
    assert "has 2 captions (.txt or .caption): 2.caption and 2.txt; --columns prompt=" in problems(pairs)["2"]
    assert problems(pairs, columns="prompt=txt") == {}
    rows = read_rows(pairs / "photos", hints=pairs / "edges", columns="prompt=caption")
    assert rows[0].prompt == "grün\r\nund gelb" and rows[1].problem.startswith("has no caption (.caption)")
    (pairs / "photos/2.txt").write_bytes(b"\xe9")
    (pairs / "photos/10.txt").write_bytes(b"x" * 2_000_000)
    (pairs / "photos/sub/1.txt").unlink()
    os.mkfifo(pairs / "photos/sub/1.txt")
    told = problems(pairs, columns="prompt=txt")
    assert "2.txt: not UTF-8 text" in told["2"] and "10.txt: has 2000000 bytes" in told["10"]
    assert "1.txt: is no regular file" in told["sub/1"]


def test_folders_that_cannot_be_pairs(pairs):
    assert "is the folder of the targets itself" in refused(pairs / "photos", hints=pairs / "photos/../photos")
    assert "nowhere: no such folder (--hints)" in refused(pairs / "photos", hints=pairs / "nowhere")
    assert "folder pairs have no columns" in refused(pairs / "photos", hints=pairs / "edges", columns="hint=a")
    (pairs / "empty").mkdir()
    assert "no images in it (files that end in .png, .jpg" in refused(pairs / "empty", hints=pairs / "edges")


def test_links_among_folder_pairs(pairs, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    for name in ("photos/2.JPG", "edges/10.png", "photos/sub"):
        (pairs / name).rename(outside / name.replace("/", "-"))
        (pairs / name).symlink_to(outside / name.replace("/", "-"))
    (pairs / "photos/circle").symlink_to(pairs / "photos")
    (pairs / "photos/self.png").symlink_to(pairs / "photos/self.png")
    told = problems(pairs)
    assert told["sub"].endswith("photos/sub is a link to a folder; --follow-links enters it") and "circle" in told
    assert all(f"a link that leaves the folder (to {outside}" in told[name] for name in ("2", "10"))
    rows = read_rows(pairs / "photos", True, hints=pairs / "edges")
    assert [r.prompt for r in rows if r.readable] == ["prompt 2", "prompt 10", "prompt sub/1"]


def test_npy_hints_of_folder_pairs(pairs):
    (pairs / "edges/2.png").unlink()
    np.save(pairs / "edges/2.npy", np.zeros((8, 8, 5), np.float32))
    for name in ("10", "sub/1"):
        (pairs / f"edges/{name}.png").unlink()
        np.save(pairs / f"edges/{name}.npy", np.ones((8, 8, 5), np.uint8))
    dataset = FolderDataset(pairs / "photos", hint_channels=5, hints=pairs / "edges")
    assert dataset[0]["hint"].shape == (8, 8, 5) and Image.open(dataset.rows[0].target).size == (8, 8)
