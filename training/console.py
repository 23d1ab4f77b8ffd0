"""A program in a terminal: output that cannot end a training, and errors of one line.

What is printed matters less than the steps that were made.

A terminal that was closed, a pipe whose reader ended (`| head`), a full disk under a log file: each raises OSError in
`print`. A console with an old encoding (Windows, `LANG=C`) raises UnicodeEncodeError at a letter of a prompt that it
lacks. `protect_output` makes all of that harmless for the whole process.

`run_program` ends a program that was given a bad input, or more work than memory, with one line and no traceback.
"""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from training.files import one_line


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
        if not isinstance(stream, _Lenient):
            setattr(sys, name, _Lenient(stream))


def run_program(name: str, main: Callable[[], Any], **texts: str) -> NoReturn:
    """Run `main` and end the process as `exit_status` says."""
    sys.exit(exit_status(name, main, **texts))


def exit_status(
    name: str,
    main: Callable[[], Any],
    interrupted: str = "stopped",
    leaner: str = "smaller images or batches take less",
) -> int | str:
    """Run `main`. Returns what `sys.exit` takes: the status that `main` returned (0 for None), or one line, which
    begins with the program's `name`, about a bad input (ValueError, OSError), memory that did not suffice, or Ctrl-C.

    `interrupted`: what is said after Ctrl-C, unless the exception says more; `leaner`: what takes less memory. Every
    other exception is a mistake in the code and keeps its traceback.
    """
    protect_output()
    try:
        return main() or 0
    except (ValueError, OSError) as e:
        message = one_line(e)
    except KeyboardInterrupt as e:
        message = str(e) or interrupted
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        message = f"{describe_out_of_memory(e)}; {leaner}"
    return f"{name}: {message}"


def shell_line(words: Sequence[str]) -> str:
    """Words as a command that can be pasted: into a POSIX shell, or on Windows into cmd.exe and PowerShell. Words with
    characters that the two read differently even within quotes become "..." there."""
    return shlex.join(words) if os.name != "nt" else " ".join(map(_quoted_on_windows, words))


def _quoted_on_windows(word: str) -> str:
    if re.fullmatch(r"[\w./:\\=+@-]+", word):
        return word
    if re.search(r'["%$`\x00-\x1f\u201c-\u201e]', word):
        return '"..."'
    return f'"{word}\\"' if word.endswith("\\") else f'"{word}"'


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, of a GPU (torch.OutOfMemoryError) or of the computer (a
    RuntimeError of PyTorch's CPU allocator)."""
    known = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return known or isinstance(error, MemoryError)


def describe_out_of_memory(error: BaseException) -> str:
    """What ran out of memory, and how much was asked for in vain, as far as the exception tells."""
    whose = "the device" if type(error).__name__ == "OutOfMemoryError" else "the computer"
    asked = re.search(r"tried to allocate ([\d.]+ ?[KMG]iB|\d+ bytes)", str(error), re.IGNORECASE)
    if not asked:
        return f"{whose} ran out of memory"
    amount = asked[1]
    if amount.endswith("bytes"):
        amount = f"{int(amount.split()[0]) / 2**30:.2f} GiB"
    return f"{whose} ran out of memory ({amount} more were asked for)"
