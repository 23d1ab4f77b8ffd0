"""A file of a data set: a file on the disk, or a member of a tar archive that is read where it lies.

Rows name their images as `File`s; reading, verifying and decoding need not know which of the two kinds a file is:

    Path      a file on the disk
    Member    `size` bytes of an Archive from byte `offset` on

Neither holds an open file, so both can be sent to worker processes. Nothing that is not a regular file is opened: a
pipe or a device might never end.
"""

import contextlib
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

MAX_MEGAPIXELS = 256.0  # the largest image that is decoded, unless told otherwise
BYTES_A_PIXEL = 16  # no image file takes more


class DataError(ValueError):
    """A data set that cannot be trained on. The message names the file, the line and what to do about the problem."""


@dataclass(frozen=True)
class Archive:
    """A tar archive as it was when its members were found: its path, bytes, and time of the last change (ns)."""

    path: Path
    size: int
    changed: int


@dataclass(frozen=True)
class Member:
    """The member of an archive that is called `inner` there: `size` bytes from byte `offset` of the archive on."""

    archive: Archive
    inner: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(self.inner).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.inner).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.inner).suffix

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.inner}"


File = Path | Member


# ------------------------------------------------------------------------------------------------------------ messages
def one_line(text: object) -> str:
    """`text` with whatever does not print (line breaks, half characters) written as an escape."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def naming(file: File) -> Iterator[None]:
    """Turn any of the many exceptions of image decoders into a DataError of one line that names the file."""
    try:
        yield
    except DataError as e:
        raise DataError(f"{one_line(file)}: {e}") from e
    except FileNotFoundError as e:
        raise DataError(f"{one_line(file)}: no such image") from e
    except OSError as e:
        raise DataError(f"{one_line(file)}: {e.strerror or f'not a readable image ({one_line(e)})'}") from e
    except Exception as e:
        reason = one_line(" ".join(str(e).split())) or type(e).__name__
        raise DataError(f"{one_line(file)}: not a readable image ({reason})") from e


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names as people do, numbers by their value: 2.png, 10.png, 10b.png."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


# ------------------------------------------------------------------------------------------------------------- reading
def file_bytes(file: File) -> int:
    """The length of a file. DataError, without the file's name, for what is no regular file."""
    if isinstance(file, Member):
        return file.size
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise DataError("is no regular file (a folder, pipe or device)")
    return found.st_size


@contextlib.contextmanager
def open_file(file: File) -> Iterator[BinaryIO]:
    """Open a file to read it. DataError, without the file's name, for what is no regular file, and for the member of an
    archive that has changed since its members were found."""
    file_bytes(file)
    with open(file.archive.path if isinstance(file, Member) else file, "rb") as opened:
        if not isinstance(file, Member):
            yield opened
            return
        now = os.fstat(opened.fileno())
        if not stat.S_ISREG(now.st_mode) or (now.st_size, now.st_mtime_ns) != (file.archive.size, file.archive.changed):
            raise DataError("its archive has changed since its members were found; start again")
        yield io.BufferedReader(_Part(opened, file.offset, file.size))


class _Part(io.RawIOBase):
    """`size` bytes of an open file from byte `start` on, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        self.at = max(0, origin + offset)
        return self.at

    def readall(self) -> bytes:
        self.file.seek(self.start + self.at)
        content = self.file.read(max(0, self.size - self.at))
        self.at += len(content)
        return content

    def readinto(self, buffer: memoryview) -> int:
        self.file.seek(self.start + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.at)])
        self.at += count
        return count


def read_bytes(file: File, max_pixels: float = MAX_MEGAPIXELS * 1e6) -> bytes:
    """The content of a file. DataError also for one of more bytes than an image of `max_pixels` takes."""
    with naming(file):
        size = file_bytes(file)
        if size > BYTES_A_PIXEL * max_pixels:
            raise DataError(f"has {size} bytes, more than an image of {max_pixels / 1e6:g} megapixels takes")
        with open_file(file) as opened:
            return opened.read()
