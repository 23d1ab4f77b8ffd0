"""Attacks on the programs, for hours if wanted; the suite runs small ones (`tests/test_attack.py`).

    python -m tests.attack kills --minutes 10     kill training at random moments, resume, compare with a whole run
    python -m tests.attack fuzz --count 5000      damaged files and odd flags (`tests/fuzzing.py`)
    python -m tests.attack disk                   train on a disk that fills up (needs the right to mount a tmpfs)
    python -m tests.attack soak --minutes 10      thousands of steps: memory, open files and checkpoints stay as few

Each prints a line of figures at its end, and exits with status 1 if anything is wrong; what was found is kept in a
folder whose name is printed, and `--seed` repeats it. The training that is attacked is the real train.py in a process
of its own, on 32-pixel circles and a model of two million random weights, with everything that has a state: moments in
8 bits, stochastic rounding, a moving average, a checkpoint at every step, measurements and pictures.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz_inputs import ALL, save_micro_model
from tests.fuzzing import Figures, fuzz, peak_of_children
from toy import circles
from training.records import read_metrics
from weights import CheckpointError
from weights.runs import check_checkpoint, list_checkpoints

ROOT = Path(__file__).parent.parent
PATIENCE = 120.0  # seconds without an end that are a hang
SOFT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT") if hasattr(signal, name))


# ----------------------------------------------------------------------------------------------------------- the victim
@dataclass(frozen=True)
class Victim:
    """A training to attack: the folder of everything, the number of its steps, and further flags."""

    folder: Path
    steps: int = 8
    more: tuple[str, ...] = ()

    def make(self) -> "Victim":
        """Write base model and data set; returns itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_micro_model(self.folder / "base.safetensors")
        circles.make(self.folder / "data", count=8, size=32, seed=3)
        return self

    def flags(self, out: Path, cache: Path | None = None) -> list[str]:
        """The command line of a new run in the folder `out`."""
        return [
            "--base", f"{self.folder}/base.safetensors", "--data", f"{self.folder}/data", "--out", str(out), "--steps",
            str(self.steps), "--batch-size", "2", "--learning-rate", "1e-3", "--memory", "6gb", "--ema-decay", "0.9",
            "--logger-freq", "3", "--log-steps", "2", "--log-images", "2", "--checkpoint-freq", "1", "--workers", "0",
            "--cache-dir", str(cache or out.with_name(f"{out.name}-cache")), "--device", "cpu", *self.more,
        ]  # fmt: skip


class Process:
    """train.py in a process group of its own; what it prints goes to a file."""

    def __init__(self, arguments: list[str], log: Path, forked: bool = False):
        self.log = log
        self._start = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            if forked:
                self.pid, self._popen = _fork(arguments, output.fileno()), None
                return
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            self._popen = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *arguments], cwd=ROOT, env=environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self.pid, self.status = self._popen.pid, None

    status: int | None = None  # as subprocess has it: negative for a signal

    def poll(self) -> int | None:
        """The exit status, or None while the process lives."""
        if self._popen:
            self.status = self._popen.poll()
        elif self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit status; None, and the group is killed, if the process does not end within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL, True)
                return None
            time.sleep(0.01)
        return self.status

    def signal(self, number: int, group: bool) -> None:
        """Send a signal, unless the process has ended: its number may be another's by now."""
        if self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def said(self) -> str:
        """What this process printed."""
        with open(self.log, "rb") as f:
            f.seek(self._start)
            return f.read().decode(errors="replace")


def _fork(arguments: list[str], output: int) -> int:
    """Run train.py's `main` in a fork of this process, which has imported everything already. Returns its number."""
    import torch

    import train

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SOFT)  # none may come before the `try` below
    if pid := os.fork():
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return pid
    status = 1
    try:
        for number in SOFT:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.setsid()
        torch.set_num_threads(1)  # threads do not survive a fork
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        try:
            train.main(arguments)
            status = 0
        except (ValueError, OSError, KeyboardInterrupt) as e:  # as train.py itself does
            print(f"train.py: {e}", file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def difference(run: Path, whole: Path, pictures: bool = True) -> str:
    """In words, how a finished run differs from the one that was never disturbed; empty if it does not.

    `pictures`: also in which pictures it has, of which a full disk costs some."""
    newest, wanted = (list_checkpoints(r)[-1:] for r in (run, whole))
    if [p.name for p in newest] != [p.name for p in wanted]:
        return f"its newest checkpoint is {newest}, not {wanted}"
    for file in ("trained.safetensors", "optimizer.safetensors", "average.safetensors"):
        if (newest[0] / file).read_bytes() != (wanted[0] / file).read_bytes():
            return f"{file} is another"
    strip = lambda entries: [{k: v for k, v in e.items() if k != "images_per_second"} for e in entries]
    lines, wanted_lines = strip(read_metrics(run)), strip(read_metrics(whole))
    if lines != wanted_lines:
        return f"its metrics are others: {[a for a in lines if a not in wanted_lines][:2]}, {len(lines)} lines"
    drawn, wanted_drawn = (sorted(p.name for p in (r / "image_log").glob("*")) for r in (run, whole))
    if pictures and drawn != wanted_drawn:
        return f"its image log has {drawn}, not {wanted_drawn}"
    leftovers = [p for p in run.rglob("*") if ".partial" in p.name or ".removed" in p.name or p.name == ".lock"]
    return f"leftovers: {leftovers}" if leftovers else ""


def complaint(process: Process, status: int | None, allowed: tuple[int, ...]) -> tuple[str, str]:
    """("hang" | "traceback" | "crash" | "", what is wrong with the way in which a process ended)."""
    said = process.said()
    if status is None:
        return "hang", "no end"
    orphans = status == -signal.SIGKILL and "resource_sharer" in said  # workers whose main process is gone
    if "Traceback" in said and not orphans:
        return "traceback", said.strip().splitlines()[-1]
    if status not in allowed:
        return "crash", f"exit status {status}: {said.strip().splitlines()[-1:]}"
    return "", ""


def count(figures: Figures, problem: tuple[str, str], where: Path, what: str, say: Callable[[str], object]) -> None:
    """Add a problem, if there is one, to the figures and tell it."""
    kind, text = problem
    if not kind:
        return
    figures.tracebacks += kind == "traceback"
    figures.hangs += kind == "hang"
    figures.crashes += kind == "crash"
    figures.kept.append(f"{where}: {kind}, {what}: {text}")
    say(figures.kept[-1][:500])


# ---------------------------------------------------------------------------------------------------------------- kills
def _moments(run: Path, cache: Path) -> dict[str, Callable[[], bool]]:
    """Moments of a training to wait for, before a random time passes and the kill comes."""
    done = len(read_metrics(run))
    newest = [p.name for p in list_checkpoints(run)[-1:]]
    pictures = len(list((run / "image_log").glob("*")))
    return {
        "start": lambda: True,
        "lock": (run / ".lock").exists,
        "cache": lambda: any(p.stat().st_size for p in cache.rglob("*.bin")),
        "step": lambda: len(read_metrics(run)) > done,
        "writing": lambda: any((run / "checkpoints").glob("*.partial")),
        "pruning": lambda: [p.name for p in list_checkpoints(run)[-1:]] != newest,
        "picture": lambda: len(list((run / "image_log").glob("*"))) > pictures,
    }


def _attack_once(victim: Victim, run: Path, rng: random.Random, forked: bool) -> tuple[Process, int | None, str, int]:
    """Start or resume the training and disturb it at a random moment. Returns the process, its exit status, what was
    done, and the signal."""
    cache = run.with_name(f"{run.name}-cache")
    resumes = bool(list_checkpoints(run))
    workers = ["--workers", rng.choice(("0", "0", "2"))]
    arguments = ["--resume", str(run)] if resumes else victim.flags(run)
    moments = _moments(run, cache)
    moment = rng.choice(list(moments))
    number = rng.choice((signal.SIGKILL,) * 5 + SOFT) if moment != "start" else signal.SIGKILL
    group = rng.random() < 0.5
    pause = rng.random() ** 2 * (0.3 if forked else 1.5) * (2 if moment == "start" else 1)
    process = Process([*arguments, *workers], run.with_suffix(".log"), forked)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not moments[moment]() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(pause)
    process.signal(number, group)
    twice = number != signal.SIGKILL and rng.random() < 0.2
    if twice:
        time.sleep(rng.random() * 0.1)
        process.signal(signal.SIGTERM, group)
    name, whom = signal.Signals(number).name + twice * " twice", "group" if group else "process"
    what = f"{name} to the {whom} at {moment} + {pause:.2f} s"
    return process, process.wait(), f"{what}, {' '.join(workers)}{', resumed' if resumes else ''}", number


def attack_run(
    victim: Victim, run: Path, whole: Path, rng: random.Random, most: int, figures: Figures, forked: bool,
    say: Callable[[str], object] = print,
) -> None:  # fmt: skip
    """Disturb one run at most `most` times, let it finish, and compare it with `whole`."""
    for _ in range(most):
        if figures.bad:
            return
        process, status, what, number = _attack_once(victim, run, rng, forked)
        figures.attempts += status == -signal.SIGKILL or number != signal.SIGKILL
        figures.outcomes[what.split(" +")[0]] += 1
        ended = (0, -signal.SIGKILL) if number == signal.SIGKILL else (0, 1, -number, -signal.SIGTERM)
        count(figures, complaint(process, status, ended), run, what, say)
        for folder in list_checkpoints(run):
            try:
                check_checkpoint(folder)
            except CheckpointError as e:
                count(figures, ("crash", f"a damaged checkpoint: {e}"), run, what, say)
    resumes = bool(list_checkpoints(run))
    last = Process(["--resume", str(run)] if resumes else victim.flags(run), run.with_suffix(".log"), forked)
    status = last.wait()
    count(figures, complaint(last, status, (0,)), run, "the last start", say)
    if not figures.bad and (text := difference(run, whole)):
        count(figures, ("crash", text), run, "not the run that was never killed", say)


def kills(
    minutes: float, seed: int, runs: int | None = None, forked: bool = False, root: Path | None = None
) -> Figures:
    """Attack runs until `minutes` are over (or `runs` are done)."""
    root = root or Path(tempfile.mkdtemp(prefix="kills-"))
    victim, figures, deadline = Victim(root / "victim").make(), Figures(), time.monotonic() + 60 * minutes
    whole = root / "whole"
    process = Process(victim.flags(whole), root / "whole.log", forked)
    count(figures, complaint(process, process.wait(), (0,)), whole, "the run that is not killed", print)
    number = 0
    while not figures.bad and time.monotonic() < deadline and number != runs:
        rng, started = random.Random(f"{seed}/{number}"), time.monotonic()
        attack_run(victim, root / f"run-{number}", whole, rng, rng.randint(2, 10), figures, forked)
        figures.slowest = max(figures.slowest, (time.monotonic() - started, f"run {number} of seed {seed}"))
        if not figures.bad:
            for path in root.glob(f"run-{number}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        number += 1
    figures.peak = peak_of_children()
    print(f"kills: {number} runs, {figures}; folder {root}")
    return figures


# ----------------------------------------------------------------------------------------------------------------- disk
@contextlib.contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[bool]:
    """A tmpfs of that size at `path`; False if this user may not mount one."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], capture_output=True)


def fill_disk(path: Path, leave: int) -> Path:
    """Fill the disk of the folder `path` but for `leave` bytes; returns the file to remove."""
    filler = path / "filler"
    with contextlib.suppress(OSError), open(filler, "wb") as f:
        while (free := shutil.disk_usage(path).free) > leave:
            f.write(bytes(min(free - leave, 1 << 20)))
            f.flush()
    return filler


def disk(rounds: int, seed: int, forked: bool = False, root: Path | None = None) -> Figures | None:
    """Train on a disk that fills up at a random moment, free it, resume. None where no tmpfs can be mounted."""
    root = root or Path(tempfile.mkdtemp(prefix="disk-"))
    victim, figures, whole = Victim(root / "victim").make(), Figures(), root / "whole"
    with small_disk(root / "small", 64) as mounted:
        if not mounted:
            print("disk: skipped, a tmpfs cannot be mounted here")
            return None
        process = Process(victim.flags(whole), root / "whole.log", forked)
        count(figures, complaint(process, process.wait(), (0,)), whole, "the run on a large disk", print)
        for number in range(rounds):
            rng, run = random.Random(f"{seed}/{number}"), root / "small" / f"run-{number}"
            cache = (run if rng.random() < 0.5 else whole).with_name(f"{run.name}-cache")
            steps, leave = rng.randint(-1, victim.steps - 1), int(rng.random() ** 3 * (8 << 20))
            what = f"{leave} bytes are left from step {steps} on, round {number} of seed {seed}"
            filler = fill_disk(root / "small", leave) if steps < 0 else None
            log, started = root / f"run-{number}.log", time.monotonic()
            process = Process(victim.flags(run, cache), log, forked)
            while filler is None and process.poll() is None:
                if len(read_metrics(run)) >= steps:
                    filler = fill_disk(root / "small", leave)
                time.sleep(0.002)
            status = process.wait()
            figures.attempts += 1
            count(figures, complaint(process, status, (0, 1)), log, what, print)
            kept = list_checkpoints(run)
            for folder in kept:
                try:
                    check_checkpoint(folder)
                except CheckpointError as e:
                    count(figures, ("crash", f"a damaged checkpoint: {e}"), log, what, print)
            if status == 0 and (not kept or int(kept[-1].name[5:]) != victim.steps):
                count(figures, ("crash", "exit status 0, but the last step is not saved"), log, what, print)
            if filler:
                filler.unlink()
            last = Process(["--resume", str(run)] if kept else victim.flags(run, cache), log, forked)
            count(figures, complaint(last, last.wait(), (0,)), log, f"resumed, {what}", print)
            if not figures.bad and (text := difference(run, whole, pictures=False)):
                count(figures, ("crash", text), log, f"not the run on a large disk, {what}", print)
            figures.slowest = max(figures.slowest, (time.monotonic() - started, what))
            for path in (run, cache):
                shutil.rmtree(path, ignore_errors=True)
    figures.peak = peak_of_children()
    print(f"disk: {figures}; folder {root}")
    return figures


# ----------------------------------------------------------------------------------------------------------------- soak
def _resources(pid: int) -> tuple[float, int]:
    """Resident memory in MiB and the number of open files of a process (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def soak(minutes: float, root: Path | None = None, more: tuple[str, ...] = ()) -> Figures:
    """Train for a long time; memory and open files must not grow after the first tenth, and checkpoints be as few as
    asked for."""
    root = root or Path(tempfile.mkdtemp(prefix="soak-"))
    flags = ("--checkpoint-freq", "20", "--logger-freq", "50", "--keep-checkpoints", "2", "--keep-every", "500")
    victim, figures = Victim(root / "victim", 1_000_000, (*flags, *more)).make(), Figures()
    run, seen = root / "run", []
    process = Process(victim.flags(run), root / "run.log")
    deadline = time.monotonic() + 60 * minutes
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(max(0.2, minutes * 60 / 400))
        with contextlib.suppress(OSError, IndexError):
            seen.append(_resources(process.pid))
    process.signal(signal.SIGTERM, False)
    count(figures, complaint(process, process.wait(), (0,)), root, "the end", print)
    steps = max((e["step"] for e in read_metrics(run)), default=0)
    figures.attempts = steps
    early, late = seen[len(seen) // 10 : len(seen) // 5], seen[-max(1, len(seen) // 10) :]
    memory = [max(m for m, _ in part) for part in (early, late)]
    files = [max(n for _, n in part) for part in (early, late)]
    figures.peak = max(m for m, _ in seen) / 1024
    if memory[1] > memory[0] * 1.05 + 10:
        count(
            figures,
            ("crash", f"memory grows: {memory[0]:.0f} MiB, then {memory[1]:.0f}"),
            root,
            f"{steps} steps",
            print,
        )
    if files[1] > files[0] + 2:
        count(figures, ("crash", f"open files: {files[0]}, then {files[1]}"), root, f"{steps} steps", print)
    kept = [int(p.name[5:]) for p in list_checkpoints(run)]
    wanted = 2 + len([s for s in kept[:-2] if s % 500 == 0])
    if len(kept) != wanted or len([s for s in kept[:-2] if s % 500]):
        count(figures, ("crash", f"checkpoints {kept}"), root, f"{steps} steps", print)
    print(
        f"soak: {steps} steps, memory {memory[0]:.0f} MiB early and {memory[1]:.0f} late, open files {files[0]} and "
        f"{files[1]}, {len(kept)} checkpoints; {figures.bad} problems; folder {root}"
    )
    return figures


# ------------------------------------------------------------------------------------------------------------------ CLI
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description="Attack the programs.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "kills": "kill training at random moments", "fuzz": "damaged files and odd flags",
        "disk": "train on a disk that fills up", "soak": "thousands of steps",
    }  # fmt: skip
    sub = {name: commands.add_parser(name, help=text) for name, text in helps.items()}
    for name in ("kills", "soak"):
        sub[name].add_argument("--minutes", type=float, default=5.0, help="time to spend")
    for name in ("kills", "fuzz", "disk"):
        sub[name].add_argument("--seed", type=int, default=0, help="equal seeds make equal attacks")
    sub["kills"].add_argument("--fork", action="store_true", help="fork instead of starting Python anew: more kills")
    sub["fuzz"].add_argument("--count", type=int, default=1000, help="number of inputs")
    sub["fuzz"].add_argument("--only", type=int, help="the number of one input")
    sub["fuzz"].add_argument(
        "--readers", nargs="+", choices=ALL, default=ALL, help="what is attacked", metavar="READER"
    )
    sub["disk"].add_argument("--rounds", type=int, default=20, help="number of runs")
    args = parser.parse_args(argv)
    if args.command == "kills":
        figures = kills(args.minutes, args.seed, forked=args.fork)
    elif args.command == "fuzz":
        figures = fuzz(args.count, args.seed, tuple(args.readers), args.only)
        print(f"fuzz: {figures}")
    elif args.command == "disk":
        figures = disk(args.rounds, args.seed)
    else:
        figures = soak(args.minutes)
    return 1 if figures and figures.bad else 0


if __name__ == "__main__":
    sys.exit(main())
