"""Everything that has to be seen on a GPU, by one command, also if the GPU is there for minutes at a time.

    python bench.py gpu --out runs/gpu                                  on a GPU: SD 1.5 at 512 px
    python bench.py gpu --out runs/gpu --device cpu --model tiny        the rehearsal

The parts run one after the other, the most important first, each in a process of its own and each at most `--minutes`.
A part that is finished leaves PART.json; the next start makes only what is missing, and goes on with a training that
was stopped. What a part printed is in PART.log. At the end all results are in results.json and table.md.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from benchmarks import checks
from benchmarks.checks import Setting
from benchmarks.figures import Row, as_table
from benchmarks.workers import BENCH
from config import GPU_PRESETS
from weights.writing import save_json

Part = Callable[[Setting], list[Row]]


def parts() -> dict[str, Part]:
    """Name -> check, the most important first."""
    step, memory, resume = checks.check_step, checks.check_memory, checks.check_resume
    rest = [name for name in GPU_PRESETS if name not in ("16gb", "8gb")]
    found: dict[str, Part] = {
        "limits": checks.check_limits,
        "step-bf16": step,
        "graph": checks.check_graph,
        "step-bf16-compile-channels-last": partial(step, compile=True, channels_last=True),
        "memory-16gb": partial(memory, preset="16gb"),
        "memory-8gb": partial(memory, preset="8gb"),
        "resume-exact": partial(resume, preset="exact"),
        "resume-16gb": partial(resume, preset="16gb"),
        "streaming": checks.check_streaming,
        "oom": checks.check_oom,
        "tutorial": checks.check_tutorial,
        "demo": checks.check_demo,
        "step-bf16-batch-16": partial(step, batch=16),
        "step-bf16-channels-last": partial(step, channels_last=True),
        "step-bf16-compile": partial(step, compile=True),
        "step-bf16-batch-16-compile-channels-last": partial(step, batch=16, compile=True, channels_last=True),
        "step-bf16-no-cuda-graph": partial(step, cuda_graph=False),
        "step-tf32": partial(step, preset="exact", precision="tf32"),
        "step-fp32": partial(step, preset="exact"),
        "memory-exact": partial(memory, preset="exact"),
        **{f"memory-{name}": partial(memory, preset=name) for name in rest},
        **{f"resume-{name}": partial(resume, preset=name) for name in ("8gb", *rest)},
        **{f"step-{name}": partial(step, preset=name) for name in GPU_PRESETS[1:]},
        "image-bf16": partial(checks.check_image, precision="bf16"),
        "image-fp32": checks.check_image,
        "step-muon": partial(step, optimizer="muon"),
        "sanitizer": checks.check_sanitizer,
    }
    return found


def run_part(name: str, text: str) -> None:
    """The process of a part. `text`: its Setting as JSON. Writes PART.json when it is finished."""
    setting = Setting(**json.loads(text))
    start = time.perf_counter()
    rows = parts()[name](setting)
    result = {"part": name, "machine": machine_of(setting.device), "seconds": round(time.perf_counter() - start, 1)}
    save_json(setting.path(f"{name}.json"), result | {"rows": [row._asdict() for row in rows]})


def machine_of(device: str) -> str:
    """The device, by name, and the version of PyTorch."""
    name = torch.cuda.get_device_name(device) if "cuda" in device else device
    return f"{name}, torch {torch.__version__}"


def run_all(setting: Setting, names: Iterable[str], minutes: float, budget: float) -> int:
    """Run those of the parts `names` that are not finished, each for at most `minutes`, all for at most `budget` ones.

    Prints the table, writes it beside the results, and returns how many parts are not finished.
    """
    setting.path("").mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for name in names:
        if setting.path(f"{name}.json").exists():
            print(f"{name}: finished before")
            continue
        left = 60 * budget - (time.monotonic() - begun)
        if left <= 0:
            print(f"{name}: not begun, the {budget:g} minutes of --budget are over")
            continue
        print(f"{name}: ", end="", flush=True)
        print(run_process(setting, name, min(60 * minutes, left)), flush=True)
    return report(setting, names)


def run_process(setting: Setting, name: str, seconds: float) -> str:
    """Run a part in a process of its own for at most `seconds`. Returns what became of it, in words."""
    command = [sys.executable, str(BENCH), "part", name, json.dumps(dataclasses.asdict(setting))]
    log, start = setting.path(f"{name}.log"), time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # a training saves a checkpoint
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        finally:
            process.kill()
            process.wait()
    taken = time.monotonic() - start
    if setting.path(f"{name}.json").exists():
        return f"{taken:.0f} s"
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
    return f"NOT finished after {taken:.0f} s: {last[0][:200]} (all of it: {log})"


def report(setting: Setting, names: Iterable[str]) -> int:
    """Print the table of the results that there are, write results.json and table.md, and return how many are missing.

    Results of other machines keep their names, in tables of their own.
    """
    results: list[dict[str, Any]] = []
    files = {name: setting.path(f"{name}.json") for name in names}
    for file in files.values():
        if file.exists():
            results.append(json.loads(file.read_text()))
    tables = []
    for machine in dict.fromkeys(result["machine"] for result in results):
        rows = [Row(**row) for result in results if result["machine"] == machine for row in result["rows"]]
        tables.append(f"{setting.model}, {setting.side} px, on {machine}:\n\n{as_table(rows)}\n")
    missing = [name for name, file in files.items() if not file.exists()]
    save_json(setting.path("results.json"), results)
    text = "\n".join(tables) + (f"\nnot finished: {', '.join(missing)}\n" if missing else "")
    setting.path("table.md").write_text(text)
    print("\n" + text)
    return len(missing)
