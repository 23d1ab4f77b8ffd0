"""Thousands of inputs (`tests/fuzz_inputs.py`), each read in a forked child under limits.

The child reads an input with bounded memory and says how it went; the parent ends a child that takes too long. What may
come out is success, a ValueError or OSError of one line, or argparse's exit with status 2. All else is a finding:

    traceback     another exception, or a message of several lines
    hang          more than LIMIT seconds, also when tried again with three times as many
    crash         the process died
"""

import io
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.fuzz_inputs import ALL, make_corpus, outcome, prepare

try:
    import resource
except ImportError:  # Windows
    resource = None

LIMIT = 10.0  # seconds for one input
MEMORY = 4 << 30  # bytes that a child may take more than it has at its start


@dataclass
class Figures:
    """What an attack found. The three bad numbers should be 0."""

    attempts: int = 0
    tracebacks: int = 0
    hangs: int = 0
    crashes: int = 0
    slowest: tuple[float, str] = (0.0, "")
    peak: float = 0.0  # GiB of resident memory
    outcomes: Counter = field(default_factory=Counter)
    messages: list[tuple[str, str]] = field(default_factory=list)  # of each input what it was and what was said
    kept: list[str] = field(default_factory=list)  # of each finding where it is and what it was

    def add(self, report: dict) -> None:
        """Count an input that came to an end."""
        self.attempts += 1
        self.outcomes[report["what"].split(":")[0], report["kind"]] += 1
        self.messages.append((report["what"], report["message"]))
        self.peak = max(self.peak, report["rss"])
        self.slowest = max(self.slowest, (report["seconds"], f"number {report['number']}, {report['what']}"))

    @property
    def bad(self) -> int:
        return self.tracebacks + self.hangs + self.crashes

    def __str__(self) -> str:
        seconds, what = self.slowest
        return (
            f"{self.attempts} attempts, {self.tracebacks} tracebacks, {self.hangs} hangs, {self.crashes} crashes; "
            f"slowest {seconds:.1f} s ({what[:80]}); peak memory {self.peak:.2f} GiB"
        )


def peak_of_children() -> float:
    """The most memory, in GiB, of a process that this one started and that has ended; 0 where no system tells."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit if resource else 0.0


class Child:
    """A forked process that goes through inputs and reports each, one line of JSON at its start and one at its end."""

    def __init__(self, corpus: Path, folder: Path, seed: int, numbers: range, readers: tuple[str, ...]):
        self.folder, self.buffer = folder, b""
        self.pipe, writing = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            return
        status = 1
        try:
            self._work(corpus, seed, numbers, readers, os.fdopen(writing, "w"))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _work(self, corpus: Path, seed: int, numbers: range, readers: tuple[str, ...], report: io.TextIOBase) -> None:
        log = os.open(self.folder.parent / "output.txt", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (open(fd, "w", 1, "utf-8", "backslashreplace", closefd=False) for fd in (1, 2))  # noqa: SIM115
        torch.set_num_threads(1)
        if resource and Path("/proc/self/statm").exists():
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        say = lambda **what: (report.write(json.dumps(what) + "\n"), report.flush())
        for number in numbers:
            os.truncate(log, 0)
            os.chdir(self.folder.parent)
            shutil.rmtree(self.folder, ignore_errors=True)
            what, call = prepare(corpus, self.folder, seed, number, readers)
            os.chdir(self.folder)  # for relative outputs
            say(number=number, what=what)
            started = time.monotonic()
            kind, message = outcome(call)
            seconds = time.monotonic() - started
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if resource else 0.0
            say(number=number, what=what, kind=kind, message=message, seconds=seconds, rss=rss)
            if kind == "traceback":  # the parent keeps the folder, then lets the next child go on
                return

    def next(self, seconds: float) -> dict | None:
        """The next report; {} at the end of the child, None if there is none within `seconds`."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            if not select.select([self.pipe], [], [], max(0, deadline - time.monotonic()))[0]:
                return None
            piece = os.read(self.pipe, 1 << 16)
            if not piece:
                return {}
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def end(self, kill: bool = True) -> int:
        """Wait for the end of the child; its exit status (negative: the signal that ended it)."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)  # it has not been waited for, so the number is still its own
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fuzz(
    count: int, seed: int = 0, readers: tuple[str, ...] = ALL, only: int | None = None, root: Path | None = None,
    corpus: Path | None = None, say: Callable[[str], object] = print,
) -> Figures:  # fmt: skip
    """Give `count` inputs of `seed` to `readers`; what is found is told by `say` and kept in a folder of `root`."""
    root = root or Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = corpus or make_corpus(root / "corpus")
    work, figures = root / "work", Figures()
    numbers = range(count) if only is None else range(only, only + 1)
    at = numbers.start
    while at < numbers.stop:
        child, current, kind = Child(corpus, work, seed, range(at, numbers.stop), readers), {}, ""
        while not kind and (report := child.next(LIMIT if current else 30.0)):
            if "kind" not in report:
                current = report
                continue
            at, current = report["number"] + 1, {}
            figures.add(report)
            if report["kind"] == "traceback":  # the child ends after one
                kind = "traceback"
                _keep(root, seed, report, kind, report["message"], figures, say)
        if kind:
            child.end()
            continue
        status = child.end(kill=report is None)
        failed = current or {"number": at, "what": "before the input was made"}
        if report is None and _slow_again(corpus, work, seed, failed["number"], readers):
            kind, message = "hang", f"no end within {3 * LIMIT:.0f} s"
        elif report == {} and status != 0:
            kind, message = "crash", f"exit status {status}"
        if report is None or kind:
            at = failed["number"] + 1
            figures.attempts += 1
        if kind:
            _keep(root, seed, failed, kind, message, figures, say)
    return figures


def _slow_again(corpus: Path, work: Path, seed: int, number: int, readers: tuple[str, ...]) -> bool:
    """Whether an input has no end within three times the limit either: the machine may only have been busy."""
    child = Child(corpus, work, seed, range(number, number + 1), readers)
    report = child.next(30.0)
    report = report and child.next(3 * LIMIT)
    child.end()
    return report is None


def _keep(root: Path, seed: int, report: dict, kind: str, message: str, figures: Figures, say: Callable) -> None:
    """Move the files of a finding to a folder of their own, with the words how to repeat it."""
    folder = root / f"{kind}-{seed}-{report['number']}"
    shutil.rmtree(folder, ignore_errors=True)
    if (root / "work").exists():
        (root / "work").rename(folder)
    folder.mkdir(exist_ok=True)
    figures.tracebacks += kind == "traceback"
    figures.hangs += kind == "hang"
    figures.crashes += kind == "crash"
    again = f"python -m tests.attack fuzz --seed {seed} --only {report['number']}"
    output = (root / "output.txt").read_text(errors="replace")[-4000:]
    (folder / "finding.txt").write_text(f"{again}\n{report['what']}\n{message}\n{output}", errors="replace")
    lines = message.strip().splitlines() or [""]
    figures.kept.append(f"{folder}: {report['what'][:200]}: {lines[-1][:200]}")
    say(f"{kind}: number {report['number']}, {report['what'][:300]}: {lines[-1][:300]} ({folder})")
