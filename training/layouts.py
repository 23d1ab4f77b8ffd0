"""How a folder lists its (target, hint, prompt) triples.

A folder has one of the `LAYOUTS` if it holds a file of that name. Fill50K's `prompt.json` has one JSON object a line,
with `source` (the hint image), `target` and `prompt`; a JSON array of such objects is read too. Nothing in the file is
trusted: whatever is wrong with a row becomes the row's `problem`, one line that names the place.
"""

import codecs
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from training.images import DataError, Size, one_line, read_bytes, same_aspect

EMPTY = "the prompt is empty"
FIELDS = ("source", "target", "prompt")
# Names of what a row and a sample hold (see `data.Samples`): a further key of a row cannot take one of them.
RESERVED = {
    *FIELDS, "jpg", "txt", "hint", "sizes", "moments", "latents", "context", "pooled", "y", "noise", "posterior_noise",
    "timesteps",
}  # fmt: skip
MAX_LIST_BYTES = 1 << 32
BYTE_ORDER_MARKS = {  # the longer ones first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One triple of a folder; `where` is its place as error messages name it: "ROOT/prompt.json, line 3".

    A row with a `problem` other than EMPTY cannot be used; its paths may be empty.
    """

    where: str
    hint: Path = Path()
    target: Path = Path()
    prompt: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def readable(self) -> bool:
        return self.problem in ("", EMPTY)


def read_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Read a file of one JSON object a line, or of one array of objects: yield ("line 3" or "item 3", the object), or
    a DataError in place of the object. The text is UTF-8, or what a byte order mark at its start says."""
    content = read_bytes(file, MAX_LIST_BYTES)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding != "utf-8":
        try:
            content = content.decode(encoding).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as e:
            yield "line 1", DataError(f"not {encoding.upper()} text, as its first bytes say (byte {e.start} is wrong)")
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


# The reader of a layout yields the place of each triple in the file and a dict with the FIELDS (paths relative to the
# folder) and any further keys.
LAYOUTS = {"prompt.json": (read_json_lines, "one JSON object a line, with source, target and prompt")}


def find_list(root: str | Path) -> Path:
    """The file in the folder `root` that lists its triples. Raises DataError if there is none."""
    for name in LAYOUTS:
        if (Path(root) / name).is_file():
            return Path(root) / name
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder")
    for name in LAYOUTS:
        if (Path(root) / name).exists():
            raise DataError(f"{Path(root) / name}: is no regular file (a folder, pipe or device)")
    raise DataError(f"{root}: no {' or '.join(f'{name} in it: {form}' for name, (_, form) in LAYOUTS.items())}")


def is_dataset(root: str | Path) -> bool:
    """Whether `root` is a folder in one of the layouts."""
    return any((Path(root) / name).is_file() for name in LAYOUTS)


def read_rows(root: str | Path, follow_links: bool = False) -> list[Row]:
    """All rows of the folder `root`, with the problems that show without opening any image.

    `follow_links`: links in the folder may lead out of the folder.
    """
    root, file = Path(root), find_list(root)
    real_root = os.path.realpath(root)
    inside = lru_cache(maxsize=None)(lambda path: Path(os.path.realpath(path)).is_relative_to(real_root))
    rows = []
    for place, entry in LAYOUTS[file.name][0](file):
        where = f"{file}, {place}"
        try:
            if isinstance(entry, DataError):
                raise entry
            check_fields(entry)
            hint, target = (find_file(root, entry[k], None if follow_links else inside) for k in FIELDS[:2])
            extra = further_keys(entry, RESERVED)
        except DataError as e:
            rows.append(Row(where, problem=str(e)))
            continue
        problem = "" if entry["prompt"].strip() else EMPTY
        rows.append(Row(where, hint, target, entry["prompt"], extra, problem))
    return rows


def check_fields(entry: Any) -> None:
    """DataError unless `entry` is a dict with the FIELDS as texts of whole characters."""
    missing = [k for k in FIELDS if not isinstance(entry, dict) or not isinstance(entry.get(k), str)]
    if missing:
        raise DataError(f"lacks the text {' and '.join(missing)}")
    for name, value in entry.items():
        for text in (name, value) if isinstance(value, str) else (name,):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as e:
                raise DataError(f"{one_line(name)} has half of a character ({one_line(text[e.start])})") from e
    for name in FIELDS[:2]:
        if "\0" in entry[name] or not entry[name].strip():
            raise DataError(f"{name} is {one_line(repr(entry[name]))}, which is no path")


def find_file(root: Path, name: str, inside: Callable[[str], bool] | None) -> Path:
    """The path of the file that a row calls `name`, relative to the folder `root`; Windows' backslashes are understood.

    DataError for a path outside of the folder, and for a link that leads out of it. `inside`: whether the place that a
    path leads to is in the folder (None: links are followed).
    """
    if os.sep != "\\":
        if "\\" in name and not os.path.lexists(root / name):
            name = name.replace("\\", "/")
        if re.match(r"[A-Za-z]:/", name):
            raise DataError(f"{one_line(name)} leaves the folder (a drive of Windows)")
    path = root / name
    suspicious = ".." in name or os.path.isabs(name) or os.sep == "\\"
    if suspicious and not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise DataError(f"{one_line(path)} leaves the folder")
    if inside and not inside(os.fspath(path) if os.path.islink(path) else os.path.dirname(path)):
        real = one_line(os.path.realpath(path))
        raise DataError(f"{one_line(path)} is a link that leaves the folder (to {real}); --follow-links allows it")
    return path


def further_keys(item: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The further keys of an item, as far as their values can be put together to a batch. DataError for a number that
    no tensor holds."""
    kinds = (Tensor, np.ndarray, np.generic, int, float, str)
    extra = {k: v for k, v in item.items() if k not in known and isinstance(v, kinds)}
    for name, value in extra.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise DataError(f"{one_line(name)} is a whole number beyond 64 bits")
    return extra


def keys_of_all(rows: Sequence[Row]) -> set[str]:
    """The further keys that all readable `rows` have, with values of one kind: texts, or numbers."""
    rows = [row for row in rows if row.readable]
    common = set.intersection(*(set(row.extra) for row in rows)) if rows else set()
    return {k for k in common if len({isinstance(row.extra[k], str) for row in rows}) == 1}


def check_aspects(row: Row, hint: Size, target: Size) -> None:
    """DataError, without the row's place, if the two images of a row have different aspect ratios."""
    if not same_aspect(hint, target):
        raise DataError(
            f"{row.hint.name} is {hint[0]}x{hint[1]} but {row.target.name} is {target[0]}x{target[1]} "
            f"({one_line(row.hint)}, {one_line(row.target)}); hint and target must have the same aspect ratio"
        )
