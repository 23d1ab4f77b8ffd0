"""File locks among processes, on Linux, macOS and Windows. A lock dies with the process that holds it.

`locked` waits for a lock, as the writers of a shared cache do. `take_lock` does not wait, as the owner of a run's
folder does not. A system without file locks has none to hold.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO
from weakref import WeakSet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everything but Windows
    msvcrt = None

# A forked child (a worker that loads data) shares its parent's locks, and would keep them after the parent's death.
_held: WeakSet[TextIO] = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [file.close() for file in list(_held)])


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path` among processes, waiting until it is free; a system without file locks has none to hold."""
    with open(path, "a+") as file:  # "a" would wait if somebody put a pipe there
        _held.add(file)
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file releases the lock
        while msvcrt and not fcntl:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                break
            except OSError as e:
                if e.errno != errno.EDEADLK:  # the code for "not within ten seconds"
                    raise
        try:
            yield
        finally:
            if msvcrt and not fcntl:
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def take_lock(path: Path) -> TextIO | None:
    """The opened lock file, locked until it is closed; None if another process holds the lock."""
    while True:
        file = open(path, "a+")  # noqa: SIM115 (the caller closes it, which releases the lock)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt:
                file.seek(1 << 30)  # a byte past the text, which others may then read
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                file.close()
                return None
            return file  # a file system without locks
        _held.add(file)
        # the owner before may have removed the file between our open and our lock
        if not fcntl or (path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino):
            return file
        file.close()
