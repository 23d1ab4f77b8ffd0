"""One table for the machine at hand, "ours, theirs, ratio, limit", in minutes: what `make bench` prints.

Limits: of a step and an image, which fraction of the machine's rate in large products of matrices they reach; of the
loader, what an H100 would take (see `benchmarks/loader.py`).
"""

import contextlib
import datetime
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.figures import Row, as_table, machine, measure_row
from benchmarks.loader import ENOUGH, samples_needed, samples_per_second, sources
from config import Config, resolve
from ldm import compute_dtype_for

GIB_OF_BOTH, GIB_OF_OURS = 21, 11  # what SD 1.5 at 256 px takes on a CPU, with and without diffusers beside it

Measure = Callable[[], list[Row]]


def measures(device: str, against: bool) -> Iterator[tuple[str, Measure]]:
    """What is measured: words and a function for each, the most telling first."""

    def of(task: str, name: str, side: int, repeat: int, both: bool = against, **settings: object) -> Measure:
        config = Config(
            base=name, out="none", resolution=str(side), device=device, clip_grad_norm=1.0, log_steps=20, **settings
        )
        return lambda: measure_row(task, resolve(config, "exact"), name, repeat, both)

    demo = dict(batch_size=8, channels_last=True)
    yield "a step at the demo's shapes, with AdamW", of("step", "tiny", 128, 9, **demo)
    yield "an image at the demo's shapes", of("image", "tiny", 128, 5)
    yield "the loader", loader_rows
    if "cuda" in device:
        yield "a step of SD 1.5, bf16", of("step", "sd15", 512, 7, batch_size=4, precision="bf16")
        yield "an image of SD 1.5, bf16", of("image", "sd15", 512, 3, precision="bf16")
        return
    memory = available_memory()
    if memory < GIB_OF_OURS:
        return
    both = against and memory >= GIB_OF_BOTH
    if compute_dtype_for("bf16", device) == torch.bfloat16:
        yield "a step of SD 1.5, bf16", of("step", "sd15", 256, 3, both, batch_size=1, precision="bf16")
    yield "a step of SD 1.5, fp32", of("step", "sd15", 256, 3, both, batch_size=1)


def available_memory() -> float:
    """GiB of memory of this computer that programs could take now; 0 on systems that do not tell (all but Linux)."""
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) / 2**20 if found else 0.0
    return 0.0


def loader_rows() -> list[Row]:
    """The rate of the loader with two workers, from PNG files of 512 px, of which 50,000 rows share 128 pairs."""
    needed, rows, rates = samples_needed(512), 50_000, {}
    with tempfile.TemporaryDirectory() as folder:
        found = sources(Path(folder), 512, 128, rows)
        for source in (f"PNG in a list of {rows} rows", "the cache"):
            rates[source] = samples_per_second(found[source], 512, 2)
    return [
        Row(f"samples a second from {source}, 512 px, 2 workers", f"{rate:.0f}", "", "",
            f"{rate / needed:.2f} times what an H100 takes; {ENOUGH} is enough")
        for source, rate in rates.items()
    ]  # fmt: skip


def print_table(device: str, against: bool, minutes: float) -> None:
    """Measure and print the table. What would begin after two thirds of `minutes` is left out."""
    begun, rows, left_out = time.monotonic(), [], []
    for words, measure in measures(device, against):
        if time.monotonic() - begun > 40 * minutes:
            left_out.append(words)
            continue
        print(f"measuring {words} ...", flush=True)
        rows += measure()
    print(f"\n{datetime.date.today()}, {machine(Config(device=device))}, `python bench.py table`:\n\n{as_table(rows)}")
    if left_out:
        print(f"\nleft out for want of time (--minutes): {', '.join(left_out)}")
    if not against:
        print("\ntheirs is diffusers, which is not installed here: pip install -r requirements-dev.txt")
