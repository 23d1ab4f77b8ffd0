"""Output that cannot end a training: what is printed matters less than the steps that were made.

A terminal that was closed, a pipe whose reader ended (`| head`), a full disk under a log file: each raises OSError in
`print`. A console with an old encoding (Windows, `LANG=C`) raises UnicodeEncodeError at a letter of a prompt that it
lacks. `protect_output` makes all of that harmless for the whole process.
"""

import contextlib
import os
import sys
from typing import Any, TextIO


class _Lenient:
    """A text stream of which writing and flushing do nothing where they fail."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def protect_output() -> None:
    """From now on nothing that is printed raises: what cannot be written is dropped, and letters that the console
    lacks become escapes. A process without any output (a service) gets one that nobody sees."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Lenient(stream))
