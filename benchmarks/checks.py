"""What has to be seen on a GPU, and is nowhere else: each check is a function of a `Setting` that returns rows.

`benchmarks/gpu.py` runs each in a process of its own. On a CPU with the tiny model, where they take seconds and say
nothing of a GPU, they are rehearsed.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import train
from benchmarks.figures import Row, measure_row
from benchmarks.parts import synchronize
from benchmarks.tasks import OurStep, random_model
from benchmarks.workers import BENCH, peak_since_reset, reset_peak
from config import DEMO, TINY_BASE, Config, resolve
from ldm import MODELS
from lowvram import estimate, prediction, speed, tracking
from lowvram.process import GIB
from toy import circles
from training.cache import prepare_batch
from training.graph import GradientGraph, is_recorded
from training.records import read_metrics
from training.setup import Trainer, zero_grad
from weights import CheckpointError, load_state_dict
from weights.runs import list_checkpoints, newest_checkpoint
from weights.writing import save_safetensors


@dataclass(frozen=True)
class Setting:
    """What is checked, and where. `folder`: for data, weights and runs of the checks."""

    device: str
    model: str
    side: int  # of the images, in pixels
    folder: str
    against: bool  # compare with diffusers

    @property
    def rehearsal(self) -> bool:
        """On a CPU everything is as short as possible."""
        return "cuda" not in self.device

    def config(self, preset: str, **settings: Any) -> Config:
        """The settings of a run or a step with a preset."""
        plain = dict(base=self.model, out="none", resolution=str(self.side), device=self.device, clip_grad_norm=1.0)
        return resolve(Config(**(plain | settings)), preset)

    def path(self, name: str) -> Path:
        return Path(self.folder) / name

    def data(self, count: int, side: int) -> Path:
        """A data set of circles, a synthetic Fill50K, drawn at the first call."""
        folder = self.path(f"circles-{count}x{side}")
        if not (folder / "prompt.json").exists():
            circles.make(folder, count, side)
        return folder

    def base(self) -> Path:
        """A file with the model's random weights in fp16, written at the first call."""
        file = self.path(f"{self.model}-random.safetensors")
        if not file.exists():
            torch.manual_seed(0)
            state = {k: v.half().cpu() for k, v in random_model(self.model, self.device).state_dict().items()}
            base = {k: v for k, v in state.items() if not k.startswith("control_model.")}
            save_safetensors(file, base, {"config": MODELS[self.model].to_json()})
        return file


# ------------------------------------------------------------------------------------------------------- speed, memory
def check_limits(setting: Setting) -> list[Row]:
    """The rates of the machine."""
    machine = speed.measure_machine(setting.device)
    rows = [Row(f"products in {name}", f"{rate / 1e12:.4g} TFLOP/s") for name, rate in machine.flops.items()]
    rates = {"memory of the GPU": machine.memory, "link": machine.link, "memory of the CPU": machine.cpu_memory}
    rows += [Row(name, f"{rate / 1e9:.4g} GB/s") for name, rate in rates.items()]
    return [*rows, Row("the shortest operation", f"{machine.begin * 1e6:.2f} us")]


def check_step(setting: Setting, preset: str = "16gb", batch: int = 4, **settings: Any) -> list[Row]:
    """The speed of a step beside that of diffusers (`settings`: further settings of the run)."""
    config = setting.config(preset, batch_size=1 if setting.rehearsal else batch, **settings)
    return measure_row("step", config, setting.model, 1 if setting.rehearsal else 7, setting.against)


def check_image(setting: Setting, **settings: Any) -> list[Row]:
    """The speed of drawing an image beside that of diffusers' pipeline."""
    config = setting.config("exact", log_steps=2 if setting.rehearsal else 20, **settings)
    return measure_row("image", config, setting.model, 1 if setting.rehearsal else 5, setting.against)


def check_memory(setting: Setting, preset: str) -> list[Row]:
    """The most memory that steps with a preset allocate, beside what --plan predicts; and where steps are recorded as a
    CUDA graph, what PyTorch reserves for them."""
    config, size = setting.config(preset, batch_size=4, cuda_graph=False), (setting.side, setting.side)
    predicted = estimate.predict(config, MODELS[setting.model], size)["training"].total
    torch.manual_seed(0)
    step = OurStep(config, setting.model)
    step()
    if setting.rehearsal:  # the count of live bytes, on real tensors
        trainer = step.trainer
        known = prediction.weights_by_kind(trainer)
        known |= {} if config.optimizer_on_cpu else prediction.optimizer_memory(trainer)
        measured = tracking.measure(lambda tracker: step(), known).total + prediction.WORKSPACE
    else:
        reset_peak(setting.device)
        step()
        step()
        measured = torch.cuda.max_memory_allocated(setting.device)
    what = f"--memory {preset}, batch {config.batch_size} (theirs: predicted)"
    rows = [row_of_memory(f"memory of a step, {what}", measured, predicted)]
    config = dataclasses.replace(config, cuda_graph=True)
    if is_recorded(config) and not setting.rehearsal:
        predicted = estimate.predict(config, MODELS[setting.model], size)["training"].total
        del step
        step = OurStep(config, setting.model)
        torch.cuda.empty_cache()
        reset_peak(setting.device)
        step()
        step()
        measured = peak_since_reset(setting.device) * GIB
        rows.append(row_of_memory(f"reserved with a CUDA graph, {what}", measured, predicted))
    return rows


def row_of_memory(what: str, measured: float, predicted: float) -> Row:
    """Bytes that were measured beside those that were predicted."""
    ratio = measured / predicted
    fine = "within 10%" if 0.9 <= ratio <= 1.1 else "NOT within 10%"
    return Row(what, f"{measured / GIB:.3f} GiB", f"{predicted / GIB:.3f} GiB", f"{ratio:.3f}", fine)


# --------------------------------------------------------------------------------------------------------- correctness
def check_resume(setting: Setting, preset: str) -> list[Row]:
    """With --deterministic a run that is stopped and resumed has the bits of the run that is not."""
    folder = setting.path(f"resume-{preset}")
    shutil.rmtree(folder, ignore_errors=True)
    plain = dict(
        base=str(TINY_BASE), data=str(setting.data(24, 64)), batch_size=2, steps=4, learning_rate=1e-3, logger_freq=0,
        workers=0, device=setting.device, deterministic=True, memory=preset, cache_dir=str(folder / "cache"),
        ema_decay=0.9,
    )  # fmt: skip
    try:
        whole = train.train(Config(out=str(folder / "whole"), **plain))
        half = train.train(Config(out=str(folder / "half"), **(plain | dict(steps=2))))
        train.train(Config(out=str(half), **plain), resume=half)
    finally:
        torch.use_deterministic_algorithms(False)
    different = [
        f"{file}: {name}"
        for file in ("trained.safetensors", "optimizer.safetensors", "average.safetensors")
        for name, (a, b) in pairs(*(load_state_dict(newest_checkpoint(run) / file) for run in (whole, half))).items()
        if not same(a, b)
    ]
    verdict = "every bit is equal" if not different else f"{len(different)} tensors DIFFER, the first: {different[0]}"
    return [Row(f"resumed against not stopped, --deterministic --memory {preset}", verdict)]


def pairs(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """The tensors of two dictionaries by name; None where one has none of that name."""
    return {name: (a.get(name), b.get(name)) for name in {**a, **b}}


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal in shape, format and every number."""
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def check_oom(setting: Setting) -> list[Row]:
    """A real out-of-memory: its message, and whether what the message proposes trains."""
    data, out = setting.data(24, setting.side), setting.path("oom")
    config = Config(
        base=str(setting.base()), data=str(data), out=str(out), resolution=str(setting.side), device=setting.device,
        memory="exact", batch_size=4, steps=2, logger_freq=0, workers=0, cache_dir=str(setting.path("cache")),
    )  # fmt: skip
    size, model_config = (setting.side, setting.side), MODELS[setting.model]
    with small_memory(setting) as gpu_bytes:
        filled = resolve(config, "exact")
        peaks = estimate.predict(filled, model_config, size)
        config.batch_size = max(4, estimate.largest_batch(filled, model_config, size, peaks, gpu_bytes) * 5 // 4)
        try:
            train.train(config, overwrite=True)
            return [Row("out of memory", f"did NOT happen at batch {config.batch_size}")]
        except CheckpointError as e:
            message = str(e)
    rows = [Row("the message of an out-of-memory", message)]
    if flags := re.search(r"used; (--.*?) takes", message):
        given = train.parse(["--base", config.base, "--data", config.data, "--memory", "exact", *shlex.split(flags[1])])
        short = dict(accumulate_grad_batches=1, steps=1, batch_size=min(config.batch_size, given.config.batch_size))
        kept = ("out", "resolution", "device", "logger_freq", "workers", "cache_dir")
        changed = {name: getattr(config, name) for name in kept}
        torch.cuda.empty_cache()
        train.train(dataclasses.replace(given.config, **changed, **short), overwrite=True)
        rows.append(Row(f"what it proposes, {flags[1]}", "trains"))
    return rows


@contextlib.contextmanager
def small_memory(setting: Setting) -> Iterator[int]:
    """While entered, memory runs out: that of the GPU at its end; on a CPU, in a rehearsal, at the first batch. Yields
    the bytes that there are."""
    if not setting.rehearsal:
        yield estimate.gpu_memory(setting.device)
        return

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("a rehearsal")

    kept = train.prepare_batch, estimate.gpu_memory
    train.prepare_batch, estimate.gpu_memory = out_of_memory, lambda device: 2 * GIB
    try:
        yield 2 * GIB
    finally:
        train.prepare_batch, estimate.gpu_memory = kept


# --------------------------------------------------------------------------------------------------------- CUDA graph
class RepeatedGraph(GradientGraph):
    """A stand-in for rehearsals, where there is no GPU: its record is the function, computed again at each replay, as
    long as the weights are where they were."""

    def _record(self, inputs: dict[str, Tensor]) -> None:
        def passes() -> tuple[Tensor, list[Tensor | None]]:
            self._forget_gradients()
            loss = self.accumulate(inputs, True)
            return loss, [p.grad for p in self.parameters]

        places = [p.data_ptr() for p in self.parameters]

        def replay() -> None:
            assert places == [p.data_ptr() for p in self.parameters], "a CUDA graph would read weights of the past"
            loss, gradients = passes()
            self.loss.copy_(loss)
            for place, gradient in zip(self.gradients, gradients, strict=True):
                if place is not None:
                    place.copy_(gradient)

        self.graph, self.inputs = SimpleNamespace(replay=replay), inputs
        self.loss, self.gradients = passes()


def check_graph(setting: Setting) -> list[Row]:
    """A step that is recorded as a CUDA graph has the gradients of one that is not: with one micro-batch, with two, and
    recorded anew. A loss that cannot be recorded is computed without."""
    config = setting.config("16gb", batch_size=1 if setting.rehearsal else 4, deterministic=True)
    train.set_process_options(config)
    try:
        torch.manual_seed(0)
        step = OurStep(config, setting.model)
        trainer, kind = step.trainer, RepeatedGraph if setting.rehearsal else GradientGraph
        raw = next(step.batches)
        other = raw | {name: t.flip(-1) for name, t in raw.items() if name in ("hint", "noise")}
        batches = [prepare_batch(trainer.model, b, setting.device, 1) for b in (raw, other)]
        accumulate = partial(train.accumulate_gradient, trainer, step.loss)
        graph, rows = kind(accumulate, trainer.trainable.values()), []
        for what, count, anew in (("one micro-batch", 1, 0), ("two micro-batches", 2, 0), ("recorded anew", 2, 1)):
            if anew:
                graph.release()
            found = [summed(trainer, function, batches[-count:]) for function in (accumulate, graph)]
            away = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
            equal = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            rows.append(Row(f"a recorded step, {what}", "every bit is equal" if equal else f"{away:.2g} APART"))
    finally:
        torch.use_deterministic_algorithms(False)
    if not setting.rehearsal:
        asks = lambda model, batch: train.diffusion_loss(model, batch) * float(batch["noise"].sum() > -1e9)
        broken = GradientGraph(partial(train.accumulate_gradient, trainer, asks), trainer.trainable.values())
        found = summed(trainer, broken, batches[:1])
        fine = broken.impossible and all(t.isfinite().all() for t in found)
        rows.append(
            Row("a loss that asks the GPU for a number", "computed without a graph" if fine else "NOT computed")
        )
    return rows


def summed(trainer: Trainer, function: Callable[..., Tensor], batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The loss and the gradients that `function` adds up over micro-batches."""
    zero_grad(trainer)
    loss = sum(function(batch, False).clone() for batch in batches)
    gradients = [p.grad.clone() for p in trainer.trainable.values()]
    zero_grad(trainer)
    return [loss, *gradients]


# ----------------------------------------------------------------------------------------------------------- streaming
def check_streaming(setting: Setting) -> list[Row]:
    """`4gb` computes the same gradients with and without its streams and copies, and copies while it computes."""
    lean = dict(batch_size=1 if setting.rehearsal else 4, trained_weights="fp32")
    gradients, seconds, rows = {}, {}, []
    for stream, on_cpu in ((False, False), (True, False), (False, True), (True, True)):
        torch.manual_seed(0)
        step = OurStep(setting.config("4gb", stream=stream, optimizer_on_cpu=on_cpu, **lean), setting.model)
        gradients[stream, on_cpu] = three_gradients(step)
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            synchronize(setting.device)
            taken.append(time.perf_counter() - start)
        seconds[stream, on_cpu] = min(taken)
    for (stream, on_cpu), found in list(gradients.items())[1:]:
        what = " and ".join(["streamed blocks"] * stream + ["the optimizer on the CPU"] * on_cpu)
        away = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, gradients[False, False], strict=True))
        fine = "the same gradients" if away < 0.02 else "OTHER gradients"  # bf16 rounds to 0.004
        times = f"{seconds[stream, on_cpu]:.3f} s", f"{seconds[False, False]:.3f} s"
        rows.append(Row(f"a step with {what} (theirs: without)", *times, limit=f"{fine}: {away:.2g} apart"))
    if not setting.rehearsal:
        copied, hidden, busy = overlapped(gpu_events(step))
        said = f"{copied:.3f} s, {hidden / max(copied, 1e-9):.0%} of them beside kernels"
        rows.append(Row("copies between CPU and GPU in a step with 4gb", said, limit=f"kernels: {busy:.3f} s"))
    return rows


def three_gradients(step: OurStep) -> list[Tensor]:
    """The gradient of all weights, as one vector each, of three passes over the same batch with the same weights: from
    the second on blocks are copied ahead."""
    trainer, found = step.trainer, []
    for _ in range(3):
        prediction.backward(trainer, next(step.batches))
        trainer.home.wait_for_grads()
        found.append(torch.cat([p.grad.detach().float().cpu().flatten() for p in trainer.home.masters.values()]))
        zero_grad(trainer)
    return found


Interval = tuple[float, float]  # start and end, in seconds


def gpu_events(step: OurStep) -> dict[str, list[Interval]]:
    """When the kernels and when the copies between CPU and GPU of a step ran."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    found: dict[str, list[Interval]] = {"copies": [], "kernels": []}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            interval = event.time_range.start / 1e6, event.time_range.end / 1e6
            kind = "copies" if "HtoD" in event.name or "DtoH" in event.name else "kernels"
            if kind == "copies" or not event.name.startswith("Mem"):
                found[kind].append(interval)
    return found


def overlapped(events: Mapping[str, list[Interval]]) -> tuple[float, float, float]:
    """Seconds of copies, those of them while a kernel ran, and seconds of kernels."""
    copies, kernels = merged(events["copies"]), merged(events["kernels"])
    length = lambda intervals: sum(end - start for start, end in intervals)
    both = [(max(a[0], b[0]), min(a[1], b[1])) for a in copies for b in kernels if a[0] < b[1] and b[0] < a[1]]
    return length(copies), length(both), length(kernels)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as intervals that do not touch."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((start, end))
    return union


def check_sanitizer(setting: Setting) -> list[Row]:
    """NVIDIA's compute-sanitizer finds no wrong access in steps with `4gb` on the tiny model. PyTorch keeps no freed
    memory there, where a late access would not be noticed."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return [Row("compute-sanitizer", "is not installed here")]
    steps = f"from benchmarks import checks; checks.lean_steps({setting.device!r})"
    command = [tool, "--tool", "memcheck", sys.executable, "-c", steps]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent, env=environment)
    found = re.findall(r"ERROR SUMMARY: (.*)", said.stdout + said.stderr) if said.returncode == 0 else []
    return [Row("compute-sanitizer, steps with 4gb", "; ".join(found) or f"NO result (status {said.returncode})")]


def lean_steps(device: str) -> None:
    """Three steps of the tiny model with `4gb`: from the second on blocks are copied ahead."""
    step = OurStep(Setting(device, "tiny", 64, "", False).config("4gb", batch_size=1), "tiny")
    for _ in range(3):
        step()
    synchronize(device)


# ---------------------------------------------------------------------------------------------------------- whole runs
def check_tutorial(setting: Setting) -> list[Row]:
    """The tutorial's 4000 steps of batch 4, on random weights and a synthetic Fill50K. Goes on where it was stopped."""
    steps, count = (3, 24) if setting.rehearsal else (4000, 1000)
    run, start = setting.path("tutorial"), time.perf_counter()
    config = Config(
        base=str(setting.base()), data=str(setting.data(count, setting.side)), out=str(run), steps=steps, batch_size=4,
        device=setting.device, resolution=str(setting.side), cache_dir=str(setting.path("cache")), log_steps=2 if
        setting.rehearsal else 50, checkpoint_freq=10**6,
    )  # fmt: skip
    before = list_checkpoints(run)
    train.train(config, resume=run if before else None)
    taken = time.perf_counter() - start
    if int(newest_checkpoint(run).name[5:]) < steps:
        raise CheckpointError(f"{run}: was stopped; the next start goes on")
    rates = [entry["images_per_second"] for entry in read_metrics(run) if "images_per_second" in entry]
    how = "with reading, caching and pictures" if not before else "since it was resumed"
    limit = "" if setting.rehearsal else ("under 5 minutes" if taken < 300 else "NOT under 5 minutes")
    said = f"{taken:.0f} s {how}, {4 / statistics.median(rates):.4f} s a step"
    return [Row(f"{steps} steps of batch 4, {setting.side} px, --memory auto", said, limit=limit)]


def check_demo(setting: Setting) -> list[Row]:
    """The demo, as `python train.py` without flags makes it, and how well it obeys."""
    run, short = setting.path("demo"), dict(steps=2, logger_freq=0) if setting.rehearsal else {}
    places = dict(data=str(setting.data(24 if setting.rehearsal else 1000, 128)), out=str(run), device=setting.device)
    config = Config(**(DEMO | places | short | dict(cache_dir=str(setting.path("cache")))))
    start = time.perf_counter()
    train.train(config, overwrite=True)
    taken = time.perf_counter() - start
    figures = circles.judge(run, 1, 1) if setting.rehearsal else circles.judge(run, device=setting.device)
    said = f"IoU {figures['iou']:.3f}, both colours right in {figures['colors']:.0%}"
    return [Row(f"the demo, {config.steps} steps", f"{taken:.0f} s", limit=said)]
