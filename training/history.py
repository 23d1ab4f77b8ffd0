"""What a run remembers beside its metrics: on which machine it worked, on what data, and with how much memory.

`history.jsonl` has one JSON object a line. A line with `start` is written at each start of the training: the time, the
machine, versions, and the data set. A line with `memory_gib` is written at each measurement. Metrics are a function of
the seed and do not change on another machine, so what does change is in this file of its own.
"""

import contextlib
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import data
from config import Config
from lowvram.process import peak_gib

LARGEST = 64 * 2**20  # bytes of a history that are read


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions with which this process computes on `device`, as short texts and numbers."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return {
        "device": gpu or f"{device}: {_cpu_name()}",
        "CPU cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):  # Linux, where `platform` does not know the model
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def dataset_facts(config: Config, samples: data.Samples, held_out: list[int]) -> dict[str, Any]:
    """What is worth knowing of the data that a run trains on, as short texts and numbers."""
    facts: dict[str, Any] = {"rows": len(samples.dataset), "trained on": len(samples.indices)}
    facts |= {"validation": len(held_out), "size": config.resolution, "hint channels": config.hint_channels}
    facts["folder"] = config.data or "a data set of your own (Python)"
    if isinstance(samples.dataset, data.FolderDataset):
        facts["transparent hints are laid on"] = samples.dataset.hint_ground
    return facts


class History:
    """`history.jsonl` of the folder `run`, to which a training adds lines. All methods raise OSError."""

    def __init__(self, run: str | Path):
        self.path = Path(run) / "history.jsonl"

    def start(self, step: int, **facts: dict[str, Any]) -> None:
        """The training starts, or goes on, at `step`; `facts`: tables of short texts and numbers by their title."""
        self._add({"step": step, "start": time.strftime("%Y-%m-%d %H:%M:%S"), **facts})

    def measure(self, step: int, device: str) -> None:
        """Note the time and the most memory that was used on `device` until `step`, unless the system does not tell."""
        memory = peak_gib(device)
        if math.isfinite(memory):
            self._add({"step": step, "time": round(time.time()), "memory_gib": round(memory, 4)})

    def _add(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a+b") as f:
            f.seek(max(0, f.tell() - 1))
            whole = f.read() in (b"", b"\n")  # a full disk may have left half a line
            f.write(b"\n" * (not whole) + json.dumps(entry).encode() + b"\n")


def read_history(run: str | Path) -> list[dict[str, Any]]:
    """The lines of the `history.jsonl` of the folder `run` that have a `step`; damaged ones are left out."""
    path, entries = Path(run) / "history.jsonl", []
    if not path.is_file() or path.stat().st_size > LARGEST:
        return []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                entries.append(entry)
    return entries
