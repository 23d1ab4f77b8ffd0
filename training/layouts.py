"""Which layout a data set has, and its rows.

    what --data names                  layout           read by
    a folder with prompt.json          Fill50K          training/tables.py
    a folder with metadata.jsonl/csv   imagefolder      training/tables.py
    a .csv, .tsv, .json, .jsonl file   table            training/tables.py
    a folder of images, and --hints    folder pairs     training/pairs.py
    .tar files: one, a pattern or a    WebDataset       training/shards.py
    folder of them

The layout is found from what is there. A folder in which it is not clear is refused, with what was looked for and what
was found. Whatever the layout, what comes out is a list of `training.rows.Row`s.
"""

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.console import shell_line
from training.files import DataError, natural_order, one_line, read_bytes
from training.pairs import read_pairs
from training.rows import EMPTY, IMAGE_ENDINGS, RESERVED, Row, check_texts, find_file, further_keys, inside_of
from training.rows import check_aspects as check_aspects
from training.rows import keys_of_all as keys_of_all
from training.shards import read_shards
from training.tables import (
    FILL50K,
    MAX_LIST_BYTES,
    READERS,
    find_columns,
    numbers_where_all,
    parse_columns,
    read_csv,
    read_json_lines,
)

# The lists that a folder can hold, by name. A reader yields the place of each triple in the file and a dict with the
# FIELDS (paths relative to the folder) and any further keys; the columns of the metadata files have names of their own.
METADATA = "with columns image or file_name, conditioning_image, and text"
LAYOUTS: dict[str, tuple[Callable[[Path], Iterator[tuple[str, Any]]], str]] = {
    "prompt.json": (read_json_lines, "one JSON object a line, with source, target and prompt"),
    "metadata.jsonl": (read_json_lines, f"one JSON object a line, {METADATA}"),
    "metadata.csv": (read_csv, f"a table {METADATA}"),
}
MAX_FILES = 100_000  # that a pattern may stand for
# What the flags of data.py and train.py say of themselves.
DATA_HELP = (
    "the data set: a folder with prompt.json or metadata.csv or .jsonl; a .csv or .jsonl file; a folder of images with "
    "captions (and --hints); or .tar shards, in quotes where a pattern names them ('shards/{000..003}.tar')"
)
HINTS_HELP = "folder of the hints, where --data is a folder of images: files of the same names, in any image format"
COLUMNS_HELP = (
    "names of columns, as in target=image,hint=edges,prompt=caption, where they are not the usual ones; in .tar shards "
    "the endings of members"
)


@dataclass(frozen=True)
class Layout:
    """What a data set is: the layout's name, the folder of its files, and its list, shards or folder of hints.

    `whole_folder`: the shards are those of the folder, and were not named one by one. `remark`: what should be told
    beside the name.
    """

    name: str
    folder: Path
    file: Path | None = None
    shards: tuple[Path, ...] = ()
    hints: Path | None = None
    whole_folder: bool = False
    remark: str = ""

    def __str__(self) -> str:
        what = self.file.name if self.file else f"hints in {self.hints}" if self.hints else _count_shards(self.shards)
        return f"{self.name} ({what}{self.remark})"


def _count_shards(shards: tuple[Path, ...]) -> str:
    return f"{len(shards)} shards" if len(shards) > 1 else shards[0].name


# ----------------------------------------------------------------------------------------------------------- detection
def detect(root: str | Path, hints: str | Path = "") -> Layout:
    """The layout of what `root` names: a folder, a file or a pattern. `hints`: the folder of the hints of folder pairs.

    Raises DataError, one line that says what was looked for and what is there.
    """
    path = Path(root)
    if path.is_dir():
        return _detect_folder(path, hints)
    if hints:
        raise DataError(f"{root}: --hints goes with a folder of images, which this is not; leave --hints out")
    if path.exists():
        return _detect_file(path)
    if not is_pattern(root):
        raise DataError(f"{root}: no such folder or file{'; `make fill50k` downloads it' * (path.name == 'fill50k')}")
    files = expand(root)
    others = [file for file in files if file.suffix.lower() != ".tar"]
    if others:
        raise DataError(f"{root}: a pattern is for .tar shards, and {one_line(others[0])} is none")
    return Layout("WebDataset", files[0].parent, shards=files)


def _detect_folder(folder: Path, hints: str | Path) -> Layout:
    lists = [name for name in LAYOUTS if (folder / name).is_file()]
    shards = [path for path in folder.glob("*.tar") if not path.name.startswith(".")]
    shards = tuple(sorted(shards, key=lambda path: natural_order(path.name)))
    if len(lists) > 1:
        raise DataError(f"{folder}: both {' and '.join(lists)} list rows; --data {folder / lists[0]} takes one of them")
    if lists and hints:
        raise DataError(
            f"{folder}: {lists[0]} names the hints of its rows, and --hints is for a folder without a list; leave "
            "--hints out, or move the list away"
        )
    if hints:
        if not Path(hints).is_dir():
            raise DataError(f"{one_line(hints)}: no such folder (--hints)")
        return Layout("folder pairs", folder, hints=Path(hints))
    if lists:
        remark = f"; its {len(shards)} .tar files are not read" if shards else ""
        return Layout(_list_name(lists[0]), folder, folder / lists[0], remark=remark)
    for name in LAYOUTS:
        if (folder / name).exists():
            raise DataError(f"{folder / name}: is no regular file (a folder, pipe or device)")
    if shards and (loose := [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS)]):
        raise DataError(
            f"{folder}: both {len(shards)} .tar shards and {len(loose)} images; --data '{folder}/*.tar' takes the "
            "shards, --hints FOLDER the images"
        )
    if shards:
        return Layout("WebDataset", folder, shards=shards, whole_folder=True)
    looked_for = " or ".join(f"{name} in it: {form}" for name, (_, form) in LAYOUTS.items())
    raise DataError(
        f"{folder}: no {looked_for}; no .tar shards in it; and no --hints FOLDER, which goes with images that have "
        f"captions (.txt) beside them (found {_found_in(folder)}){_advice(folder)}"
    )


def _detect_file(path: Path) -> Layout:
    if not path.is_file():
        raise DataError(f"{path}: is no regular file (a folder, pipe or device)")
    if path.name in LAYOUTS:
        return Layout(_list_name(path.name), path.parent, path)
    if path.suffix.lower() == ".tar":
        return Layout("WebDataset", path.parent, shards=(path,))
    if path.suffix.lower() in READERS:
        return Layout("table", path.parent, path)
    raise DataError(f"{path}: is no data set: a folder, a table ({', '.join(READERS)}) or .tar shards are")


def _list_name(name: str) -> str:
    return {"prompt.json": "Fill50K", "metadata.jsonl": "imagefolder", "metadata.csv": "imagefolder"}.get(name, "list")


def _advice(folder: Path) -> str:
    """What to name instead, to judge by what is in a folder that is no data set."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: natural_order(entry.name))
        folders = [entry.path for entry in entries if entry.is_dir() and _holds_images(entry.path)]
    except OSError:
        return ""
    named = lambda path: shell_line([str(path)])
    tables = [entry.path for entry in entries if entry.name.lower().endswith((".csv", ".tsv", ".jsonl"))]
    if tables:
        return f"; {named(tables[0])}, named itself, would be read as a table"
    if len(folders) == 2:
        return f"; of {named(folders[0])} and {named(folders[1])} name the targets, and the hints by --hints"
    if _holds_images(folder):
        return f"; `python data.py hints {named(folder)} OUT --kind canny` makes photos a data set"
    return ""


def _holds_images(folder: str | Path) -> bool:
    return any(entry.name.lower().endswith(IMAGE_ENDINGS) for entry in itertools.islice(os.scandir(folder), 1000))


def _found_in(folder: Path) -> str:
    """What is in a folder, in a few words: sub-folders, single files, and how many there are of each ending."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: natural_order(entry.name))
    except OSError as e:
        return e.strerror or str(e)
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    folders = [entry.name for entry in entries if os.path.isdir(entry.path)]
    lists = [f"{name}/{file}" for name in folders[:100] for file in LAYOUTS if (folder / name / file).is_file()]
    files = [entry.name for entry in entries if not os.path.isdir(entry.path)]
    endings = Counter(os.path.splitext(name)[1].lower() for name in files)
    few = [name for name in files if endings[os.path.splitext(name)[1].lower()] == 1]
    many = [f"{count} {ending or 'without an ending'}" for ending, count in endings.most_common() if count > 1]
    found = [*lists[:3], *many[:5], *few[:5], *(f"{name}/" for name in folders[: 0 if lists else 5])]
    return one_line(", ".join(found) if found else "nothing")


def is_dataset(root: str | Path, hints: str | Path = "") -> bool:
    """Whether `root` is a data set in one of the layouts."""
    try:
        return bool(detect(root, hints))
    except (DataError, OSError, ValueError):
        return False


def find_list(root: str | Path) -> Path:
    """The file in the folder `root` that lists its triples. Raises DataError if there is none."""
    file = detect(root).file
    if file is None:
        raise DataError(f"{root}: no file in it lists rows ({' or '.join(LAYOUTS)})")
    return file


# ------------------------------------------------------------------------------------------------------------ patterns
def is_pattern(root: str | Path) -> bool:
    return bool(re.search(r"[*?\[]|\{.*(\.\.|,).*\}", str(root)))


def expand(pattern: str | Path) -> tuple[Path, ...]:
    """The files that a pattern stands for, in order: {000..012} and {a,b} as in a shell, * and ? and [] as in a folder.

    DataError if a file that is named by braces alone is not there, or nothing is found.
    """
    names = list(itertools.islice(_expand_braces(os.path.expanduser(pattern)), MAX_FILES + 1))
    if not 0 < len(names) <= MAX_FILES:
        raise DataError(f"{pattern}: stands for {f'more than {MAX_FILES} files' if names else 'no file'}")
    files, missing = [], []
    for name in names:
        is_glob = glob.has_magic(name) and not os.path.exists(name)
        found = sorted(glob.glob(name), key=natural_order) if is_glob else [name] if os.path.exists(name) else []
        files += map(Path, found)
        missing += [] if found else [name]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{one_line(missing[0])}: no such file{more}")
    return tuple(dict.fromkeys(files))


def _expand_braces(text: str) -> Iterator[str]:
    """Texts with the first {...} of `text` that holds no other replaced by each of its choices, and so on."""
    match = re.search(r"\{(?:([0-9]{1,9})\.\.([0-9]{1,9})|([^{}]*,[^{}]*))\}", text)
    if not match:
        yield text
        return
    first, last, choices = match.groups()
    if first:
        width = len(first) if first.startswith("0") else 0
        words = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    else:
        words = iter(choices.split(","))
    for word in words:
        yield from _expand_braces(text[: match.start()] + word + text[match.end() :])


def short_name(root: str | Path) -> str:
    """A name for runs on this data set: of the folder, of the table, or of the folder of the shards."""
    path = Path(os.path.realpath(root))
    if not path.exists():
        plain = itertools.takewhile(lambda part: not is_pattern(part), Path(os.path.abspath(root)).parts)
        path = Path(*plain) if is_pattern(root) else path
    elif path.is_file():
        path = path.parent if path.name in LAYOUTS else path.with_suffix("")
    return path.name or "data"


# ---------------------------------------------------------------------------------------------------------------- rows
def read_rows(
    root: str | Path, follow_links: bool = False, columns: str = "", hints: str | Path = "",
    index_dir: str | Path | None = None,
) -> list[Row]:  # fmt: skip
    """All rows of the data set `root`, with the problems that show without opening any image.

    `follow_links`: links in the folder may lead out of the folder. `columns`: names of columns or endings, as --columns
    has them. `hints`: the folder of the hints of folder pairs. `index_dir`: where indices of shards are remembered.
    """
    return read_layout(detect(root, hints), follow_links, columns, index_dir)[0]


def read_layout(
    layout: Layout, follow_links: bool = False, columns: str = "", index_dir: str | Path | None = None
) -> tuple[list[Row], str]:
    """The rows of a data set of this layout, and a remark about them ("": none)."""
    asked = parse_columns(columns)
    if layout.file:
        return _read_list(layout, follow_links, asked), ""
    if layout.hints:
        if set(asked) - {"prompt"}:
            raise DataError("--columns: folder pairs have no columns; prompt=txt names the ending of their captions")
        rows, left = read_pairs(layout.folder, layout.hints, follow_links, asked.get("prompt", ""))
        return rows, f"{left} hints in {layout.hints} belong to no image" if left else ""
    if layout.whole_folder and not follow_links:
        inside = inside_of(layout.folder)
        for path in layout.shards:
            find_file(layout.folder, path.name, inside)
    return read_shards(layout.shards, asked, Path(index_dir) if index_dir else None), ""


def _read_list(layout: Layout, follow_links: bool, asked: dict[str, str]) -> list[Row]:
    """The rows of a folder with a list, or of a table."""
    reader, _ = LAYOUTS.get(layout.file.name) or (READERS[layout.file.suffix.lower()], "")
    entries = list(reader(layout.file))
    objects = [entry for _, entry in entries if isinstance(entry, dict)]
    columns = FILL50K | asked
    if layout.name in ("imagefolder", "table") and objects:
        names = dict.fromkeys(itertools.chain.from_iterable(objects))
        columns = find_columns(names, asked, one_line(layout.file))
    if reader is read_csv:
        numbers_where_all(objects, columns.values())
    inside = None if follow_links else inside_of(layout.folder)
    return [_make_row(layout, columns, inside, place, entry) for place, entry in entries]


def _make_row(
    layout: Layout, columns: dict[str, str], inside: Callable[[str], bool] | None, place: str, entry: Any
) -> Row:
    where = f"{layout.file}, {place}"
    try:
        if isinstance(entry, DataError):
            raise entry
        check_texts(entry, columns)
        hint, target = (find_file(layout.folder, entry[columns[role]], inside) for role in ("hint", "target"))
        extra = further_keys(entry, RESERVED | set(columns.values()))
    except DataError as e:
        return Row(where, problem=str(e))
    prompt = entry[columns["prompt"]]
    return Row(where, hint, target, prompt, extra, "" if prompt.strip() else EMPTY)


def content(layout: Layout, rows: list[Row]) -> Iterator[Any]:
    """What tells one list of rows from another: the bytes of the file that lists them, or what the rows say."""
    if layout.file:
        yield read_bytes(layout.file, MAX_LIST_BYTES)
        return
    for row in rows:
        yield from (row.hint.name, row.target.name, row.prompt, sorted(row.extra.items()), row.problem)
