"""Where the members of a tar archive lie, without unpacking it.

A tar archive is a sequence of blocks of 512 bytes. Each member has a header block and then its content, filled up to
whole blocks, so the place of every member follows from the headers alone (POSIX.1-2017, pax; GNU tar's manual):

    0    name            100 bytes
    124  size            12 bytes: octal digits, or a binary number whose first bit is set (GNU)
    148  checksum        8 octal digits: the sum of the header's bytes, itself counted as spaces
    156  type            0 a file, 1 and 2 links, 3, 4 and 6 devices and pipes, 5 a folder; x, g, L, K: about the next
    257  "ustar"
    345  prefix          155 bytes, before the name (POSIX)

The archive may be anybody's: sizes are checked against the archive's length, lists of attributes are bounded, and what
is no plain file is an entry with a problem. Nothing is written anywhere, so a name can do no harm; one that would leave
the folder of an unpacked archive is a problem all the same.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from training.files import DataError

BLOCK = 512
MAX_ATTRIBUTES = 1 << 20  # bytes of a long name, or of a list of pax attributes
MAX_ZEROS = 1 << 11  # empty blocks between members (archives can be put one behind another) or at the end
COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
}  # fmt: skip
LINK = "is a link (tar --dereference --hard-dereference stores files in the place of links)"
NO_FILES = {
    b"1": LINK, b"2": LINK, b"3": "is a device", b"4": "is a device", b"6": "is a pipe",
    b"S": "is stored with holes (sparse)", b"M": "is a part of a file in several archives",
}  # fmt: skip


class Entry(NamedTuple):
    """A member of an archive: its name, where its content lies, and why it cannot be read ("": it can)."""

    name: str
    offset: int
    size: int
    problem: str = ""


def list_members(file: BinaryIO, length: int) -> Iterator[Entry]:
    """The members of the archive `file` of `length` bytes that are not folders, in their order.

    DataError, without the file's name, where the archive is damaged or ends too soon; what was before it is yielded.
    """
    start = file.read(8)
    if found := [name for mark, name in COMPRESSED.items() if start.startswith(mark)]:
        raise DataError(f"is compressed ({found[0]}): its members cannot be read where they lie; unpack it to a .tar")
    if length < BLOCK:
        raise DataError("is no tar archive (it is shorter than a header)")
    at, zeros, attributes = 0, 0, {}
    while at + BLOCK <= length and zeros < MAX_ZEROS:
        file.seek(at)
        header = file.read(BLOCK)
        at += BLOCK
        if not header.strip(b"\0"):
            zeros += 1
            continue
        zeros = 0
        if _number(header[148:156], at) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise DataError(f"is no tar archive, or damaged (the header at byte {at - BLOCK} has another checksum)")
        kind, size = header[156:157], _number(header[124:136], at)
        if kind == b"S":
            at += _extended_header(file, at, header[482:483])
        size = _attribute_size(attributes, size) if kind not in b"xgLK" else size
        stored = size if kind not in b"123456" else 0
        name = _name(header, attributes) if kind not in b"xgLK" else "a header"
        if at + stored > length:
            if kind in b"0\x007":
                yield Entry(name, at, size, "is cut off by the end of the archive")
            raise DataError(f"is cut short: it ends in {name!r}")
        if kind in b"xL":
            attributes |= _attributes(file, size, kind)
        elif kind not in b"gK5DV" and not name.endswith("/"):
            yield Entry(name, at, size, _problem(name, kind, attributes))
        attributes = attributes if kind in b"xgLK" else {}
        at += -(-stored // BLOCK) * BLOCK
    if not zeros:
        raise DataError("is cut short: it ends without the empty blocks that end an archive")


def _number(field: bytes, at: int) -> int:
    """The value of a numeric field of the header before byte `at`."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise DataError(f"is no tar archive, or damaged (no number where one is due, header at byte {at - BLOCK})")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes, attributes: dict[str, str]) -> str:
    """The name of a member, as long as the attributes before its header say it."""
    for key in ("GNU.sparse.name", "path"):
        if key in attributes:
            return attributes[key].removeprefix("./")
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return (f"{prefix}/" * bool(prefix) + _text(header[:100])).removeprefix("./")


def _problem(name: str, kind: bytes, attributes: dict[str, str]) -> str:
    """Why a member cannot be read; "" if it can."""
    if any(key.startswith("GNU.sparse") for key in attributes):
        kind = b"S"
    if kind not in b"0\x007":
        return NO_FILES.get(kind, f"is of the unknown kind {kind!r}")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "has a name that leaves the archive's folder"
    return ""


def _attributes(file: BinaryIO, size: int, kind: bytes) -> dict[str, str]:
    """What is said of the next member: `L`, its name (GNU); `x`, lines "LENGTH KEY=VALUE" (pax)."""
    if size > MAX_ATTRIBUTES:
        raise DataError(f"is damaged, or made to hurt: {size} bytes of attributes of one member")
    content = file.read(size)
    if kind == b"L":
        return {"path": _text(content)}
    found, at, record = {}, 0, re.compile(rb"([0-9]{1,7}) ([^=]+)=")
    while match := record.match(content, at):
        end = at + int(match[1])
        if not match.end() < end <= len(content):
            break
        found[_text(match[2])] = content[match.end() : end - 1].decode("utf-8", "surrogateescape")
        at = end
    if content[at:].strip(b"\0"):
        raise DataError("is damaged (a list of pax attributes cannot be read)")
    return {key: value for key, value in found.items() if key in ("path", "size") or key.startswith("GNU.sparse")}


def _attribute_size(attributes: dict[str, str], size: int) -> int:
    """The size of a member, of which the attributes before its header may say another (of files above 8 GiB)."""
    if "size" not in attributes:
        return size
    if not re.fullmatch(r"[0-9]{1,20}", attributes["size"]):
        raise DataError(f"is damaged (the size of a member is {attributes['size'][:40]!r})")
    return int(attributes["size"])


def _extended_header(file: BinaryIO, at: int, more: bytes) -> int:
    """The bytes of the further header blocks of a file with holes; the header says by `more` whether there are any."""
    size = 0
    while more == b"\1":
        file.seek(at + size)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise DataError("is cut short: it ends in a header")
        more, size = block[504:505], size + BLOCK
    return size
