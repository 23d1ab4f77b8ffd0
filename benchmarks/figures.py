"""The figures of a step, an image and the presets: as a report on one of them, and as rows of a table of many."""

import platform
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tasks import fake_image
from benchmarks.workers import Comparison, compare, spread
from config import GPU_PRESETS, Config, resolve
from ldm import MODELS
from lowvram import estimate
from lowvram.process import GIB
from training.graph import is_recorded


class Row(NamedTuple):
    """A row of the table "ours, theirs, ratio, limit": each in words, "" where there is none."""

    what: str
    ours: str
    theirs: str = ""
    ratio: str = ""
    limit: str = ""


def as_table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table."""
    lines = [Row("what", "ours", "theirs", "ratio", "limit"), Row(*["---"] * 5), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(config: Config) -> str:
    """The device and the version of PyTorch, in words."""
    if "cuda" in config.device:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------------ step and image
def task_flops(task: str, config: Config, name: str) -> float:
    """Floating-point operations that a step or an image needs, with nothing computed twice."""
    side = int(config.resolution)
    if task == "step":
        return estimate.flops(config, MODELS[name], (side, side)) * config.batch
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step, decode = fake_image(name, side)
        step()
        one = counter.get_total_flops()
        decode()
        return config.log_steps * one + counter.get_total_flops() - one


def title(task: str, config: Config, name: str) -> str:
    """What is measured, in words."""
    batch = f"batch {config.batch_size} x {config.accumulate_grad_batches}" if task == "step" else ""
    return f"{name}, {config.resolution} px, {batch or f'{config.log_steps} steps'}, {config.precision}"


def fractions_of_limit(result: Comparison, flop: float) -> list[float]:
    """What part of the machine's rate of large products each of our runs reached."""
    return [flop / rate / s for s, rate in zip(result.seconds["ours"], result.rates, strict=True)]


def measure_step(config: Config, name: str, repeat: int, against: bool) -> dict[str, str]:
    """Time and memory of our step, its fraction of the machine's limit, its parts, and diffusers' step beside it."""
    flop = task_flops("step", config, name)
    result = compare("step", config, name, repeat, 2, against)
    return {
        "model": title("step", config, name),
        "machine": machine(config),
        "seconds a step": spread(result.seconds["ours"]),
        "images a second": f"{config.batch / statistics.median(result.seconds['ours']):.3f}",
        "TFLOP a step": f"{flop / 1e12:.3f}",
        "matrix products, TFLOP/s": spread([rate / 1e12 for rate in result.rates]),
        "fraction of the limit": spread(fractions_of_limit(result, flop)),
        **({"its parts, without the CUDA graph": ""} if is_recorded(config) else {}),
        **{f"    {label}": f"{seconds:.3f}" for label, seconds in result.parts.items() if seconds > 0},
        **result.rows(),
    }


def measure_sample(config: Config, name: str, repeat: int, against: bool) -> dict[str, str]:
    """Time and memory of an image of our sampler, its fraction of the machine's limit, and diffusers' pipeline."""
    flop = task_flops("image", config, name)
    result = compare("image", config, name, repeat, 1, against)
    fraction = statistics.median(fractions_of_limit(result, flop))
    return {
        "model": title("image", config, name),
        "machine": machine(config),
        "seconds an image": f"{spread(result.seconds['ours'])}, {fraction:.2f} of the limit",
        **result.rows(),
    }


def measure_row(task: str, config: Config, name: str, repeat: int, against: bool) -> list[Row]:
    """The speed and the memory of a step or an image as rows of the table."""
    flop = task_flops(task, config, name)
    result = compare(task, config, name, repeat, 2 if task == "step" else 1, against)
    who = {k: (f"{statistics.median(v):.3f} s", f"{result.peaks[k]:.2f} GiB") for k, v in result.seconds.items()}
    ours, theirs = who["ours"], who.get("diffusers", ("", ""))
    ratios = result.ratios
    faster = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times as fast" if ratios else ""
    memory = f"{result.peaks['ours'] / result.peaks['diffusers']:.2f} of it" if ratios else ""
    rate, fraction = (statistics.median(values) for values in (result.rates, fractions_of_limit(result, flop)))
    limit = f"{fraction:.2f} of {rate / 1e12:.3g} TFLOP/s"
    what = f"{task}: {title(task, config, name)}"
    what += ", channels_last" * config.channels_last + ", compiled" * config.compile
    what += ", muon" * (config.optimizer == "muon") + f", {config.memory}" * (config.memory in GPU_PRESETS[1:])
    what += ", no CUDA graph" * ("cuda" in config.device and not config.cuda_graph)
    return [Row(what, ours[0], theirs[0], faster, limit), Row(f"{what}: memory", ours[1], theirs[1], memory)]


def memory_table(name: str, side: int, batch_sizes: list[int], repeat: int) -> str:
    """The memory of each preset as a table: predicted for each batch size. With `repeat` also the time of a step
    relative to `exact` and, on a GPU, the measured memory."""
    cuda, exact = torch.cuda.is_available(), {}
    rows = [["preset", *(f"batch {b}: predicted GiB" for b in batch_sizes)]]
    for b in batch_sizes if repeat else ():
        rows[0] += [f"batch {b}: measured GiB"] * cuda + [f"batch {b}: time"]
    for preset in ("exact", *GPU_PRESETS):
        configs = [resolve(Config(base=name, resolution=str(side), batch_size=b), preset) for b in batch_sizes]
        peaks = [estimate.largest_peak(estimate.predict(c, MODELS[name], (side, side))) for c in configs]
        row = [preset, *(f"{peak / GIB:.2f}" for peak in peaks)]
        for c in configs if repeat else ():
            result = compare("step", c, name, repeat, 2, False)
            median = statistics.median(result.seconds["ours"])
            row += [result.rows()["peak memory, GiB"]] * cuda
            row.append(f"{median / exact.setdefault(c.batch_size, median):.2f} x")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
