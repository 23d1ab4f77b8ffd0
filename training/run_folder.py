"""The folder of a run: who owns it, and what happens when it cannot be written.

RUN/config.json      the settings of the run
RUN/metrics.jsonl    what was measured, one line a step
RUN/history.jsonl    machine, versions and data of each start, and memory over time
RUN/report.html      the page of the run: curves, images, settings, commands
RUN/curves.png       loss and control gain
RUN/image_log/       a grid of images for each measurement; those later than the step of a resume are removed
RUN/progress.gif     the images of the image log, one after the other
RUN/checkpoints/     see training/checkpoints.py
RUN/set_aside/       checkpoints later than the one that a resume chose
RUN/error.txt        the traceback of an exception that ended the run
RUN/.lock            host and process of the training that owns the folder; its lock dies with the process
"""

import contextlib
import dataclasses
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from config import Config
from training.locks import take_lock
from weights.reading import CheckpointError
from weights.writing import save_json

LEFTOVERS = (
    "checkpoints", "set_aside", "image_log", "tensorboard", "metrics.jsonl", "history.jsonl", "report.html",
    "progress.gif", "curves.png", "judge.png", "error.txt",
)  # fmt: skip


class RunFolder:
    """The folder `path` of a run whose settings are `config`. `device`: the device as the user named it."""

    def __init__(self, path: Path, config: Config, device: str):
        self.path, self.config, self.device = path, config, device
        self._failing: set[str] = set()  # files that could not be written the last time

    def prepare(self, anew: bool) -> None:
        """Make the folder and write config.json. `anew`: remove everything that a run before left in the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        # what a training that was killed left half written or half removed
        patterns = (".*.partial*", "image_log/.*.partial*", "checkpoints/*.partial", "checkpoints/*.removed")
        halves = [path for pattern in patterns for path in self.path.glob(pattern)]
        for leftover in (*halves, *(self.path / name for name in LEFTOVERS if anew)):
            _remove(leftover)
        self.save_config()

    def remove_later_images(self, step: int) -> None:
        """Remove the pictures of the image log that are later than `step`, with which the run goes on: its settings may
        be others now."""
        with self.guard("image_log"):
            for path in self.path.glob("image_log/step-*.png"):
                number = path.stem.removeprefix("step-")
                if number.isdecimal() and int(number) > step:
                    _remove(path)

    def save_config(self) -> None:
        save_json(self.path / "config.json", dataclasses.asdict(self.config) | {"device": self.device})

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """While entered, an OSError (a full or read-only disk, a folder that is gone) costs the file `name` and not the
        run. The first failure of a file is told, and its next success."""
        try:
            yield
        except OSError as e:
            if name not in self._failing:
                tqdm.write(f"{self.path / name} could not be written ({e.strerror or e}); the training continues")
            self._failing.add(name)
        else:
            if name in self._failing:
                tqdm.write(f"{self.path / name} can be written again")
                self._failing.remove(name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """While entered, this process owns the folder. CheckpointError names the owner if another process does."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / ".lock"
        file = take_lock(path)
        if file is None:
            owner = path.read_text(errors="replace").strip() or "another process"
            raise CheckpointError(
                f"{self.path}: is being trained by {owner}; wait for its end, or choose another --out"
            )
        with file:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                with contextlib.suppress(PermissionError):  # Windows cannot remove an open file; it stays, unlocked
                    path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # nothing came of the run: an empty folder need not stay
                    self.path.rmdir()


def hint_flags(hint: Path, hint_scale: float) -> list[str]:
    """The flags of sampler.py for a hint that a run saved, whose numbers are brought to 0 to 255 by the run's
    `hint_scale` already."""
    return ["--hint", str(hint), *(["--hint-scale", "0"] if hint_scale else [])]


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there. Of a link to a folder, which may be on another disk, the content goes."""
    if path.is_symlink() and path.is_dir():
        for child in path.iterdir():
            _remove(child)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
