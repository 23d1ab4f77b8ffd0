"""What a start found out about files and the next one need not find out again.

`Memory` is a dictionary in a file of lines; `identity` tells whether a file is still the one that was looked at, from
its place, size and times, without opening it.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

FRESH = 3 * 10**9  # ns; a file may change again within the resolution of its times (2 s on FAT) without a trace


class Memory:
    """A dictionary on disk that only grows. Lines that an interruption or a damaged disk made unreadable are no
    entries. A disk that takes no more costs the memory, not the run."""

    def __init__(self, path: Path | None):
        no_file = path and path.exists() and not path.is_file()  # a pipe would be waited for
        self.path, self.entries, self.new = None if no_file else path, {}, {}
        with contextlib.suppress(OSError):
            for line in self.path.read_bytes().split(b"\n") if self.path else ():
                if line[:9] == b"%08x " % zlib.crc32(line[9:]):
                    key, value = json.loads(line[9:])
                    self.entries[key] = value

    def get(self, key: str) -> Any:
        return self.new.get(key, self.entries.get(key))

    def add(self, key: str, value: Any) -> None:
        """Remember `value`, on disk with the next 1000 of its kind or at `flush`."""
        if self.get(key) != value:
            self.new[key] = value
        if len(self.new) >= 1000:
            self.flush()

    def flush(self) -> None:
        """Append the new entries to the file."""
        lines = [json.dumps(entry).encode() for entry in self.new.items()]
        self.entries |= self.new
        self.new = {}
        if self.path and lines:
            text = b"".join(b"\n%08x %s" % (zlib.crc32(line), line) for line in lines)
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab", buffering=0) as file:
                    file.write(text + b"\n")


def hexdigest(*parts: object, size: int = 12) -> str:
    """A digest of `size` bytes of bytes, or of anything with a repr, in hex."""
    h = hashlib.blake2b(digest_size=size)
    for part in parts:
        h.update(part if isinstance(part, (bytes, memoryview)) else repr(part).encode())
    return h.hexdigest()


def identity(path: Path, fresh: int = FRESH) -> str:
    """A digest of what changes when a file changes: place, size, times. "" for a file that is not there, or that has
    changed within the last `fresh` ns, so that another change could leave no trace."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < fresh:
        return ""
    return hexdigest(
        os.path.abspath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )
