"""WebDataset shards: tar archives in which files of the same key are a row.

    000017.jpg         the target; 000017.png and other image formats as well
    000017.hint.png    its hint
    000017.txt         its prompt; or 000017.json, an object with `prompt` (or `text`, `caption`) and further keys

The key is a member's name up to the first dot after the last slash, the rest is the ending; --columns names other
endings, and other keys of the object. Nothing is unpacked: an index of the members is made once (`training/tar.py`), so
row n is as near as in a folder, and images are read where they lie. Rows come in the order of the shards and of their
members. The index is remembered beside the cache, under the identity of the shard.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from training.files import Archive, DataError, Member, file_bytes, one_line
from training.images import save_whole
from training.memory import hexdigest, identity
from training.rows import EMPTY, IMAGE_ENDINGS, RESERVED, Row, check_whole, further_keys
from training.tables import NAMES, parse_json, read_text
from training.tar import Entry, list_members

VERSION = 1  # of the remembered index
PROMPT_ENDINGS = ("txt", "caption")
ENDINGS_OF = {role: {name + image for name in NAMES[role] for image in IMAGE_ENDINGS} for role in ("target", "hint")}
ENDINGS_OF["target"] |= {image[1:] for image in IMAGE_ENDINGS}
MAX_TEXT = 1 << 20  # bytes
Part = tuple[Entry, str | None]  # a member, and its text where it is one of those that hold text


def read_shards(shards: Iterable[Path], asked: dict[str, str], index_dir: Path | None = None) -> list[Row]:
    """The rows of the archives `shards`.

    `asked`: endings that --columns names for the ROLES. `index_dir`: where indices are remembered (None: nowhere).
    """
    rows = []
    for path in tqdm(list(shards), desc="reading shards", unit="shard", disable=None, delay=2, leave=False):
        archive, parts, damage = open_index(path, asked, index_dir)
        rows += _rows_of_shard(archive, parts, asked)
        if damage:
            rows.append(Row(one_line(path), problem=f"{damage}; its members up to there are read"))
    return rows


# --------------------------------------------------------------------------------------------------------------- index
def open_index(path: Path, asked: dict[str, str], index_dir: Path | None) -> tuple[Archive, list[Part], str]:
    """A shard, its members with the texts in them, and what is wrong with the archive."""
    try:
        found = os.stat(path)
    except OSError as e:
        raise DataError(f"{one_line(path)}: {e.strerror or e}") from e
    archive = Archive(path, found.st_size, found.st_mtime_ns)
    name = asked.get("prompt", "").lower().lstrip(".")
    endings = ("json", *((name, f"{name}.txt") if name else PROMPT_ENDINGS))
    key = identity(path)
    file = Path(index_dir) / f"{hexdigest(os.path.abspath(path))}.json.gz" if index_dir else None
    if file and key and (known := _load_index(file, [VERSION, key, *endings])):
        return archive, *known
    parts, damage = read_index(path, endings)
    if file and key and key == identity(path):
        text = json.dumps([[VERSION, key, *endings], damage, parts]).encode()
        with contextlib.suppress(OSError):
            save_whole(file, lambda partial: partial.write_bytes(gzip.compress(text, 1, mtime=0)))
    return archive, parts, damage


def read_index(path: Path, endings: Collection[str]) -> tuple[list[Part], str]:
    """The members of an archive, with the texts of those that have one of the `endings`, and what is wrong with the
    archive ("": nothing)."""
    parts: list[Part] = []
    try:
        length = file_bytes(path)
        with open(path, "rb", buffering=1 << 15) as opened:
            for entry in list_members(opened, length):
                parts.append(_read_part(opened, entry, endings))
    except DataError as e:
        return parts, str(e)
    except OSError as e:
        return parts, e.strerror or str(e)
    return parts, ""


def _load_index(file: Path, key: list[Any]) -> tuple[list[Part], str] | None:
    """What was remembered of a shard as it is now, if anything was and can be read."""
    try:
        known, damage, parts = json.loads(gzip.decompress(file.read_bytes())) if file.is_file() else (None, "", [])
        return ([(Entry(*entry), text) for entry, text in parts], damage) if known == key else None
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        return None


def _read_part(opened: BinaryIO, entry: Entry, endings: Collection[str]) -> Part:
    """The member with its text, if its ending is one of `endings`."""
    if split_name(entry.name)[1] not in endings or entry.problem:
        return entry, None
    if entry.size > MAX_TEXT:
        return entry._replace(problem=f"has {entry.size} bytes, more than a prompt takes"), None
    opened.seek(entry.offset)
    try:
        return entry, read_text(opened.read(entry.size))
    except DataError as e:
        return entry._replace(problem=f"is {e}"), None  # "is not UTF-8 text"


def split_name(name: str) -> tuple[str, str]:
    """Key and ending, in lower case, of a member's name: "a/0001.hint.PNG" has "a/0001" and "hint.png"."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


# ---------------------------------------------------------------------------------------------------------------- rows
def _rows_of_shard(archive: Archive, parts: list[Part], asked: dict[str, str]) -> Iterator[Row]:
    """The rows of one shard. Hidden files, and files without an ending (a README), belong to none."""
    samples: dict[str, list[tuple[str, Part]]] = {}
    for part in parts:
        key, ending = split_name(part[0].name)
        if ending and not key.endswith("/") and key:
            samples.setdefault(key, []).append((ending, part))
    name = one_line(archive.path)
    for key, members in samples.items():
        where = f"{name}, {one_line(key)}"
        try:
            yield _make_row(where, archive, members, asked)
        except DataError as e:
            yield Row(where, problem=str(e))


def _make_row(where: str, archive: Archive, members: list[tuple[str, Part]], asked: dict[str, str]) -> Row:
    """The row of the members (ending, part) of one key. DataError for what is missing, there twice or unreadable."""
    for ending, count in Counter(ending for ending, _ in members).items():
        if count > 1:
            raise DataError(f"has {count} members that end in .{one_line(ending)}")
    there = dict(members)
    for entry, _ in there.values():
        if entry.problem:
            raise DataError(f"{one_line(entry.name)} {entry.problem}")
    target, hint = (there[_find_image(there, role, asked)][0] for role in ("target", "hint"))
    prompt, extra = _find_prompt(there, asked)
    check_whole({"prompt": prompt} | extra)
    files = [Member(archive, entry.name, entry.offset, entry.size) for entry in (hint, target)]
    return Row(where, *files, prompt, extra, "" if prompt.strip() else EMPTY)


def _only(role: str, found: list[str], known: str, there: Iterable[str]) -> str:
    """The only one of the names `found`. DataError if there is none, or more than one."""
    if not found:
        raise DataError(f"has no {role} ({known}), but {', '.join(f'.{one_line(ending[:60])}' for ending in there)}")
    if len(found) > 1:
        names = " and ".join(map(one_line, found))
        raise DataError(f"has more than one {role}: {names}; --columns {role}={one_line(found[0])} takes one")
    return found[0]


def _find_image(there: dict[str, Part], role: str, asked: dict[str, str]) -> str:
    """The ending of the target or hint. Without --columns, that of a target is one of a picture, alone or after one of
    the NAMES; that of a hint comes after one of the NAMES."""
    if role in asked:
        name = asked[role].lower().lstrip(".")
        found = [ending for ending in there if ending == name or ending in [name + image for image in IMAGE_ENDINGS]]
        return _only(role, found, f".{one_line(name)}, as --columns says", there)
    taken = {name.lower().lstrip(".") for name in asked.values()}
    found = [ending for ending in there if ending in ENDINGS_OF[role] and ending not in taken]
    return _only(role, found, ".jpg, .png, ..." if role == "target" else ".hint.png, ...", there)


def _find_prompt(there: dict[str, Part], asked: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The prompt of a row, of a text file or otherwise of the object in its `.json` file; and further keys of that."""
    name = asked.get("prompt", "").lstrip(".")
    names = (name.lower(), f"{name.lower()}.txt") if name else PROMPT_ENDINGS
    texts = [ending for ending in there if ending in names and ending != "json"]
    entry, text = there.get("json", (None, "{}"))
    fields = parse_json(text.encode("utf-8", "surrogatepass"))
    if isinstance(fields, DataError):
        raise DataError(f"{one_line(entry.name)}: {fields}")
    fields = fields if isinstance(fields, dict) else {}
    if texts:
        prompt = there[_only("prompt", texts, "", there)][1]
        return prompt, further_keys(fields, RESERVED)
    found = [key for key in ((name,) if name else NAMES["prompt"]) if isinstance(fields.get(key), str)]
    known = f".{name} or {name} in .json" if name else f".txt, .caption, or {', '.join(NAMES['prompt'])} in .json"
    key = _only("prompt", found, one_line(known), there)
    return fields[key], further_keys(fields, {*RESERVED, key})
