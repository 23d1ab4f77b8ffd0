"""Two processes in turns: a *worker* makes one step or image when it is asked.

The workers are asked in turns, A B A B, so that other load on the machine meets both, and the ratio of their times is
taken pair by pair.
"""

import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.parts import breakdown, matmul_rate, synchronize
from benchmarks.tasks import TASKS
from config import Config
from ldm import use_tf32
from lowvram.process import GIB, peak_resident

BENCH = Path(__file__).parent.parent / "bench.py"


def serve(task: str, who: str, name: str, config: Config) -> None:
    """The process of a worker: answers each line of stdin with a line of JSON on stdout.

    run: seconds of one step or image. breakdown: seconds of the parts of a step. rate: operations a second in products
    of matrices. peak: most GiB of memory so far.
    """
    torch.manual_seed(0)
    use_tf32(config.precision != "fp32")
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)
    function, peak = TASKS[task][who](config, name), 0.0
    for line in sys.stdin:
        reset_peak(config.device)
        if line.strip() == "run":
            start = time.perf_counter()
            function()
            synchronize(config.device)
            answer = time.perf_counter() - start
            peak = max(peak, peak_since_reset(config.device))
        elif line.strip() == "breakdown":
            answer = breakdown(function)
        elif line.strip() == "rate":
            answer = matmul_rate(config)
        else:
            answer = peak
        print(json.dumps(answer), flush=True)


def reset_peak(device: str) -> None:
    """Start to count the peak memory anew. (On a CPU only Linux can.)"""
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset(device: str) -> float:
    """The most GiB since `reset_peak`: that PyTorch reserved of a GPU, or resident of the CPU."""
    if "cuda" in device:
        return torch.cuda.max_memory_reserved() / GIB
    try:
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / GIB
    except (OSError, TypeError):  # not Linux
        return peak_resident()


def ask(worker: subprocess.Popen, question: str) -> float | dict[str, float]:
    """The answer of a worker's process to one of the questions that `serve` knows."""
    print(question, file=worker.stdin, flush=True)
    answer = worker.stdout.readline()
    if not answer:
        sys.exit("bench.py: a worker process ended; its error is printed above (out of memory?)")
    return json.loads(answer)


class Comparison(NamedTuple):
    """What `compare` measured. Who: "ours", and "diffusers" if it was asked for."""

    seconds: dict[str, list[float]]  # who -> seconds of each run
    peaks: dict[str, float]  # who -> most memory, GiB
    rates: list[float]  # operations a second of the machine, measured after each step
    parts: dict[str, float]  # seconds of the parts of our step

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as theirs each of our runs was, pair by pair, ascending; empty without diffusers."""
        theirs = self.seconds.get("diffusers", [])
        return sorted(b / a for a, b in zip(self.seconds["ours"], theirs, strict=True)) if theirs else []

    def rows(self) -> dict[str, str]:
        """Peak memory, and the comparison with diffusers, in words."""
        rows = {"peak memory, GiB": f"{self.peaks['ours']:.2f}"}
        if ratios := self.ratios:
            rows |= {
                "diffusers, seconds": spread(self.seconds["diffusers"]),
                "diffusers, peak GiB": f"{self.peaks['diffusers']:.2f}",
                "times as fast": f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, pair by pair)",
                "fraction of their memory": f"{self.peaks['ours'] / self.peaks['diffusers']:.2f}",
            }
        return rows


def compare(task: str, config: Config, name: str, repeat: int, warmup: int, against: bool) -> Comparison:
    """Run `task` `warmup` + `repeat` times, in turns with diffusers if `against`, and measure the last `repeat` runs.

    Peak memory is what PyTorch reserves of a GPU, or what is resident on a CPU.
    """
    seconds, rates, parts = {who: [] for who in (TASKS[task] if against else ["ours"])}, [], {}
    with contextlib.ExitStack() as stack:  # which ends the processes
        workers = {}
        for who in seconds:
            command = [sys.executable, str(BENCH), "serve", task, who, name, json.dumps(asdict(config))]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            workers[who] = stack.enter_context(worker)
        for turn in range(warmup + repeat):
            if turn == warmup:  # before the products of `rate`, whose memory PyTorch would keep and count
                peaks = {who: ask(worker, "peak") for who, worker in workers.items()}
            taken = {who: ask(worker, "run") for who, worker in workers.items()}
            if turn >= warmup:
                rates.append(ask(workers["ours"], "rate"))
                for who in workers:
                    seconds[who].append(taken[who])
        if "cuda" not in config.device:
            peaks = {who: ask(worker, "peak") for who, worker in workers.items()}
        if task == "step" and not config.compile:  # timed functions would be compiled anew
            parts = ask(workers["ours"], "breakdown")
    return Comparison(seconds, peaks, rates, parts)


def spread(values: list[float]) -> str:
    """Median, minimum and maximum in words."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
