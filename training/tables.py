"""Tables that list triples: JSON lines, a JSON array, CSV; and which of their columns is which.

A reader yields the place of each entry in the file ("line 3") and the entry, a dict by column, or in its place a
DataError that says what is wrong with it: one bad line costs one row.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training.files import DataError, naming, one_line, read_bytes
from training.rows import ROLES

MAX_LIST_BYTES = 1 << 32
BYTE_ORDER_MARKS = {  # the longer ones first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip
# What the columns of a table may be called: Fill50K's names, those of diffusers and of Hugging Face's imagefolder, and
# words that people use; each also with one of the ENDINGS ("conditioning_image_file_name").
NAMES = {
    "target": ("target", "image", "file_name"),
    "hint": ("source", "conditioning_image", "hint", "control_image", "conditioning"),
    "prompt": ("prompt", "text", "caption"),
}
ENDINGS = ("_file_name", "_path")
FILL50K = {"hint": "source", "target": "target", "prompt": "prompt"}
MAX_CELL = 1 << 20  # characters
HALF = re.compile("[\udc80-\udcff]")  # what Python decodes a byte to that is not UTF-8


def to_utf8(content: bytes) -> bytes:
    """A text in UTF-8, which it is already unless a byte order mark at its start says something else. DataError for a
    text that is not what its mark says."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8":
        return content
    try:
        return content.decode(encoding).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as e:
        raise DataError(f"not {encoding.upper()} text, as its first bytes say (byte {e.start} is wrong)") from e


def read_text(content: bytes) -> str:
    """The text of a caption file, without white space around it. DataError for what is no text."""
    try:
        return to_utf8(content).decode("utf-8").strip()
    except UnicodeDecodeError as e:
        raise DataError("not UTF-8 text") from e


# ---------------------------------------------------------------------------------------------------------------- JSON
def read_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Read a file of one JSON object a line, or of one array of objects: yield ("line 3" or "item 3", the object), or
    a DataError in place of the object. The text is UTF-8, or what a byte order mark at its start says."""
    content = read_bytes(file, MAX_LIST_BYTES)
    try:
        content = to_utf8(content)
    except DataError as e:
        yield "line 1", e
        return
    if re.match(rb"\s*\[\s*[{\]]", content):
        array = parse_json(content)
        array = array if isinstance(array, list) else [array]
        yield from ((f"item {number}", entry) for number, entry in enumerate(array, 1))
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", parse_json(line)


def parse_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8, or a DataError that says what is wrong with it."""
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        return DataError("not UTF-8 text")
    except json.JSONDecodeError as e:
        hint = "; the text has NUL bytes: is it UTF-16 without a byte order mark?" if b"\0" in text else ""
        return DataError(f"not JSON ({e.msg} at {f'line {e.lineno}, ' if e.lineno > 1 else ''}column {e.colno}{hint})")
    except RecursionError:
        return DataError("not JSON that can be read (nested too deeply)")
    except ValueError as e:  # a number of thousands of digits
        return DataError(f"not JSON that can be read ({one_line(e).split(';')[0]})")


# ----------------------------------------------------------------------------------------------------------------- CSV
def read_csv(file: Path) -> Iterator[tuple[str, Any]]:
    """Read a table whose first line names its columns, with commas, semicolons or tabs between the cells; a cell in
    double quotes may hold them, and line breaks. Yields ("line 3", dict) or a DataError in place of the dict.

    DataError for a file without columns, and for columns of one name.
    """
    content = read_bytes(file, MAX_LIST_BYTES)
    with naming(file):
        text = to_utf8(content).decode("utf-8", "surrogateescape")
    is_utf8 = not HALF.search(text)
    lines = _records(text)
    _, header = next(lines, ("", []))
    if isinstance(header, DataError) or not any(name.strip() for name in header):
        raise DataError(f"{one_line(file)}: its first line, which should name the columns, {_why_no_header(header)}")
    header = [name.strip() for name in header]
    if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise DataError(f"{one_line(file)}: there are {header.count(twice[0])} columns {one_line(repr(twice[0]))}")
    for place, cells in lines:
        if isinstance(cells, list) and len(cells) != len(header):
            cells = DataError(f"has {len(cells)} cells, the first line {len(header)}")
        elif isinstance(cells, list) and not is_utf8 and any(map(HALF.search, cells)):
            cells = DataError("not UTF-8 text")
        if isinstance(cells, list):
            cells = {name: cell for name, cell in zip(header, cells, strict=True) if name}
        yield place, cells


def _records(text: str) -> Iterator[tuple[str, list[str] | DataError]]:
    """The cells of each line of a CSV text that is not empty, and the number of the line on which they begin."""
    first_line = text[:MAX_CELL].lstrip("\r\n").splitlines()[:1] or [""]
    delimiter = max(",;\t", key=first_line[0].count)
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            reason = str(e).replace("unexpected end of data", "a double quote is never closed")
            yield f"line {start}", DataError(f"not CSV ({one_line(reason)})")
            continue
        if cells:
            yield f"line {start}", cells


def _why_no_header(header: list[str] | DataError) -> str:
    return f"is {header}" if isinstance(header, DataError) else "is empty"


def numbers_where_all(entries: list[dict[str, Any]], texts: Iterable[str]) -> None:
    """In a table that holds texts alone: columns, other than `texts`, in which every entry has a number get numbers."""
    for name in set(entries[0] if entries else ()) - set(texts):
        values = [entry.get(name, "") for entry in entries]
        for pattern, kind in ((r"[+-]?[0-9]{1,18}", int), (r"[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]{1,2})?", float)):
            if all(re.fullmatch(pattern, value) for value in values):
                for entry in entries:
                    entry[name] = kind(entry[name])
                break


READERS = {
    ".json": read_json_lines, ".jsonl": read_json_lines, ".ndjson": read_json_lines, ".csv": read_csv,
    ".tsv": read_csv,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- columns
def parse_columns(text: str) -> dict[str, str]:
    """ "target=a,hint=b" as a dict. DataError unless each name is one of the ROLES, with something behind it."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    columns = {role.strip(): name.strip() for role, _, name in pairs}
    if len(columns) < len(pairs) or not set(columns) <= set(ROLES) or not all(columns.values()):
        raise DataError(f"--columns is {one_line(repr(text))}, should be like target=image,hint=edges,prompt=caption")
    return columns


def find_columns(names: Iterable[str], asked: dict[str, str], place: object) -> dict[str, str]:
    """Which of the column `names` holds which of the ROLES: those that are `asked` for, and otherwise those with one of
    the NAMES. DataError, which begins with `place`, if there is none or more than one."""
    names = list(dict.fromkeys(names))
    there = f"its columns are {', '.join(one_line(name[:60]) for name in names[:20])}"
    columns = {}
    for role in ROLES:
        if role in asked and asked[role] not in names:
            raise DataError(f"{place}: has no column {one_line(asked[role])} for the {role}; {there}")
        candidates = [asked[role]] if role in asked else [name for name in names if _is_called(name, NAMES[role])]
        if len(candidates) != 1:
            found = f"columns {' and '.join(map(one_line, candidates))}" if candidates else "no column"
            choice = f"--columns {role}={candidates[0] if candidates else 'NAME'} takes one"
            known = "" if candidates else f" ({', '.join(NAMES[role])})"
            raise DataError(f"{place}: has {found} for the {role}{known}; {there}; {one_line(choice)}")
        columns[role] = candidates[0]
    return columns


def _is_called(name: str, known: tuple[str, ...]) -> bool:
    name = name.lower()
    return name in known or any(name.removesuffix(ending) in known for ending in ENDINGS if name.endswith(ending))
