"""What the folder of a run tells: measurements, settings, data, machine, and how far the run is.

Everything is read from files that a training leaves, and each of them may be missing, cut off, or from another version:
what cannot be read is left out. Only `config.json` has to be there.
"""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import PRESETS, Config, flag_name
from flag_types import flag_words
from training.console import shell_line
from training.history import read_history
from training.records import read_metrics, sudden_convergence
from training.run_folder import hint_flags
from weights.configs import CheckpointError
from weights.runs import list_checkpoints, load_run, load_state, step_of

MEASURED = (
    "loss", "val_loss", "val_loss_other_hints", "control_gain", "grad_norm", "learning_rate", "images_per_second",
    "memory_gib",
)  # fmt: skip
MORE = 12  # further measurements, of another version or of a changed loop, that a page shows


@dataclass
class RunRecord:
    """The folder `path` of a run, with what it tells."""

    path: Path
    settings: dict[str, Any]  # config.json
    measured: dict[str, tuple[list[int], list[float]]]  # name -> steps and values, of metrics.jsonl and history.jsonl
    history: list[dict[str, Any]]  # history.jsonl
    state: dict[str, Any]  # state.json of the newest checkpoint, or nothing

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def end(self) -> int:
        """The last step of which anything is known."""
        return max([1, self.state.get("step", 0), *(steps[-1] for steps, _ in self.measured.values())])

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Ascending steps, and the values of a measurement at them."""
        return self.measured.get(name, ([], []))

    def further_names(self) -> list[str]:
        """The measurements that are not in MEASURED, the most frequent first."""
        names = [name for name in self.measured if name not in MEASURED]
        return sorted(names, key=lambda name: -len(self.measured[name][0]))[:MORE]

    def converged(self) -> int | None:
        """The step of the sudden convergence, None before it."""
        return sudden_convergence(*self.series("control_gain"))

    def figures(self) -> dict[str, str]:
        """The figures by which one judges a run, as texts by their names."""
        found = {"steps": f"{self.end:,} of {self.settings.get('steps', self.end):,}"}
        for label, name, form in (("control gain", "control_gain", ".3f"), ("validation loss", "val_loss", ".4f")):
            if values := self.series(name)[1]:
                found[label] = format(values[-1], form) if math.isfinite(values[-1]) else "not finite"
        if "control gain" in found:
            step = self.converged()
            found["sudden convergence"] = "not yet" if step is None else f"step {step:,}"
        speeds = [speed for speed in self.series("images_per_second")[1] if speed > 0]
        if speeds:
            found["images a second"] = f"{statistics.median(speeds):.3g}"
        if memory := self.series("memory_gib")[1]:
            found["most memory"] = f"{max(memory):.2f} GiB"
        return found

    def changed_settings(self) -> list[tuple[str, str, str]]:
        """(flag, value, default) of each setting that differs from its default."""
        preset = PRESETS.get(self.settings.get("memory"), {})
        rows = []
        for f in dataclasses.fields(Config):
            default = preset.get(f.name) if f.default is None else f.default
            value = self.settings.get(f.name, default)
            if value != default and f.name != "device":
                rows.append((flag_name(f.name), str(value), str(default) if default != "" else "none"))
        return rows

    def starts(self) -> list[dict[str, Any]]:
        """The starts of the training, with tables of facts."""
        return [entry for entry in self.history if isinstance(entry.get("start"), str)]

    def data_facts(self) -> dict[str, str]:
        """What is known of the data set: noted at the last start, or else found in the settings and the checkpoint."""
        facts: dict[str, Any] = {"folder": self.settings.get("data"), "size": self.settings.get("resolution")}
        for start in self.starts():
            facts |= _table(start.get("data"))
        samples, rows = self.state.get("samples"), facts.get("trained on")
        if samples:
            facts["samples seen"] = f"{samples:,}"
            if isinstance(rows, int) and rows > 0:
                facts["times through the data"] = f"{samples / rows:.1f}"
        return {name: str(value) for name, value in facts.items() if value not in (None, "")}

    def machine_facts(self) -> dict[str, str]:
        """The machine of the last start."""
        return {
            name: str(value) for start in self.starts()[-1:] for name, value in _table(start.get("machine")).items()
        }

    def commands(self, prompt: str) -> dict[str, str]:
        """What one can do with the run, as command lines by what they do."""
        run, steps = str(self.path), self.settings.get("steps", 0)
        saved = [p for p in (self.path / "hint.png", self.path / "hint.npy") if p.is_file()]
        hint = hint_flags(saved[0], self.settings.get("hint_scale", 0)) if saved else ["--hint", "hint.png"]
        finished = isinstance(steps, int) and self.end >= steps
        lines = {
            "train longer" if finished else "resume": ["train.py", "--resume", run]
            + (["--steps", str(2 * steps)] if finished else []),
            "draw": ["sampler.py", "--model", run, *hint, *flag_words("--prompt", prompt or "..."), "--out", "samples"],
            "export for other programs": ["merge.py", "extract", run, "control.safetensors", "--half"],
            "export with the base": ["merge.py", "export", run, "exported"],
        }
        return {name: shell_line(["python", *words]) for name, words in lines.items()}


def _table(value: Any) -> dict[str, Any]:
    """The short texts and numbers of a table of facts, whatever a damaged file makes of it."""
    if not isinstance(value, dict):
        return {}
    return {
        str(k)[:100]: v for k, v in list(value.items())[:50] if isinstance(v, (int, float, str)) and len(str(v)) < 500
    }


def read_record(run: str | Path, entries: Sequence[dict[str, Any]] | None = None) -> RunRecord:
    """Read what the folder `run` tells. `entries`: its metrics, if they are in memory. CheckpointError if `run` is not
    the folder of a run."""
    settings, history = load_run(run), read_history(run)
    memory: list[dict[str, Any]] = []
    for entry in history:
        if "start" in entry:  # what was measured later than a step from which the run was resumed is not part of it
            memory = [earlier for earlier in memory if earlier["step"] <= entry["step"]]
        elif type(entry.get("memory_gib")) in (int, float):
            memory.append({"step": entry["step"], "memory_gib": float(entry["memory_gib"])})
    state: dict[str, Any] = {}
    for folder in list_checkpoints(run)[::-1]:
        with contextlib.suppress(CheckpointError, OSError):
            state = load_state(folder) | {"step": step_of(folder)}
            break
    entries = read_metrics(run) if entries is None else entries
    return RunRecord(Path(run), settings, by_name([*entries, *memory]), history, state)


def by_name(entries: Iterable[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> ascending steps and the values at them; of several values at a step the last one counts."""
    values: dict[str, dict[int, float]] = {}
    for entry in entries:
        step = entry["step"]
        for name, value in entry.items() if step >= 0 else ():
            values.setdefault(name, {})[step] = value
    values.pop("step", None)
    return {name: (sorted(found), [found[step] for step in sorted(found)]) for name, found in values.items()}
