"""What does a run take: GPU memory, arithmetic, disk and time, without a GPU and without weights.

    python train.py --plan --base sd15 --batch-size 4 --vram 8      with every preset: memory, speed, largest batch
    python train.py --plan --base v1-5-pruned.safetensors --data data/fill50k --memory 6gb --rate 2.5
    python train.py --plan --resume runs/fill50k                    the time, at the speed of the run's steps so far

`lowvram/prediction.py` tells what one step holds and computes. Here predictions become answers: which preset fits, the
largest batch, the flags that would have fitted after a GPU ran out of memory, and the page of `--plan`.
"""

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import data
from config import DEMO, GPU_PRESETS, PRESETS, Config, resolve, validate
from ldm import MODELS, PRECISIONS, ControlLDM, ModelConfig, compute_dtype_for
from lowvram.muon import muon_flops
from lowvram.prediction import BESIDE_GRAPH, flops, largest_peak, predict
from lowvram.process import GIB, peak_memory
from lowvram.speed import COMMON, measure_machine, seconds
from lowvram.tracking import Peak
from training.cache import text_shape
from training.distributed import Ranks
from training.graph import is_recorded
from training.preparation import open_folder
from training.setup import (
    loading_formats,
    select_trainable,
)
from weights import CheckpointError
from weights.control_depth import depth_from_text, with_control_depth
from weights.runs import list_checkpoints
from weights.source import ModelSource, read_component, read_model, strip_prefix
from weights.spelling import CONTROL

CUDA_CONTEXT = 0.6 * GIB  # driver, kernels, fragmentation: what a GPU cannot give to tensors


# ------------------------------------------------------------------------------------------------------------- presets
def choose_preset(config: Config, ranks: Ranks) -> Config:
    """`config` with all settings about memory filled in from its preset, and checked.

    "auto" becomes the fastest preset that fits into the GPU's free memory, the same on all ranks; on other devices
    "exact". Raises CheckpointError for settings that exclude each other.
    """
    preset, all_given = config.memory, all(getattr(config, name) is not None for name in PRESETS["exact"])
    if preset == "auto":
        preset = "exact"
        if "cuda" in config.device and torch.cuda.is_available() and config.base and not all_given:
            free = ranks.min(torch.cuda.mem_get_info(config.device)[0])
            fits = fastest_preset(config, *model_and_size(config), free)[0]
            preset = fits or GPU_PRESETS[-1]
            reason = "the fastest preset that fits" if fits else "the leanest preset, although none fits"
            print(f"--memory {preset}: {reason} into the {free / GIB:.1f} GiB of GPU memory that are free")
    config = resolve(config, preset)
    validate(config)
    if compute_dtype_for(config.precision, config.device) != PRECISIONS[config.precision]:
        print(f"this CPU has no instructions for {config.precision}: weights are kept in it, but computed with in fp32")
    return config


def fastest_preset(
    config: Config, model_config: ModelConfig, size: tuple[int, int], gpu_bytes: float
) -> tuple[str | None, dict[str, dict[str, Peak]]]:
    """The first of GPU_PRESETS whose prediction fits into `gpu_bytes` of GPU memory (None if none does), and the
    predictions of the presets that were tried.

    All but the tutorial's fp32, which takes more memory and, on every GPU since 2020, several times as long.
    """
    predictions = {}
    for name in tqdm(GPU_PRESETS, desc="predicting memory", unit="preset", leave=False, disable=None):
        predictions[name] = predict(resolve(config, name), model_config, size)
        if largest_peak(predictions[name]) + CUDA_CONTEXT <= gpu_bytes:
            return name, predictions
    return None, predictions


def largest_batch(
    config: Config, model_config: ModelConfig, size: tuple[int, int], peaks: Mapping[str, Peak], gpu_bytes: float
) -> int:
    """The largest --batch-size whose prediction fits into `gpu_bytes` of GPU memory; 0 if none does.

    config: with a preset filled in; peaks: its prediction. Memory grows with the batch almost along a line: a first
    guess takes its slope from the activations, and a prediction for that batch tells the slope itself.
    """
    room, batch, known = gpu_bytes - CUDA_CONTEXT, config.batch_size, peaks["training"].total
    beside = max((peak.total for part, peak in peaks.items() if part != "training"), default=0)
    growing = sum(peaks["training"].parts.get(kind, 0) for kind in ("activations", BESIDE_GRAPH))
    if max(beside, known - growing) > room:
        return 0
    slope = max(1.0, growing / batch)
    other = min(max(1, batch + math.floor((room - known) / slope)), 64 * batch)
    if other != batch:
        found = predict(dataclasses.replace(config, batch_size=other), model_config, size)["training"].total
        slope = max(1.0, (found - known) / (other - batch))
    return max(0, batch + math.floor((room - known) / slope))


def model_and_size(config: Config) -> tuple[ModelConfig, tuple[int, int]]:
    """The model that `config.base` is, a file or a name in MODELS, and the (width, height) of its training images: with
    buckets of the largest, which takes most."""
    control = config.control if Path(config.control).exists() else ""  # a resumed run needs it no more
    if config.base in MODELS and not Path(config.base).exists():
        model_config = MODELS[config.base]
        if control:
            model_config = with_control_depth(model_config, strip_prefix(read_component(control, CONTROL), CONTROL))
    else:
        model_config = read_model(ModelSource(config.base, control=control, prediction=config.prediction))[1]
    depth = depth_from_text(config.control_depth, model_config.unet) or model_config.control_depth
    model_config = dataclasses.replace(model_config, control_depth=depth)
    if config.resolution:
        wanted = data.parse_resolution(config.resolution)
    elif config.data and not config.buckets and (config.data != DEMO["data"] or data.is_dataset(config.data)):
        wanted = first_size(config)
    else:
        wanted = (model_config.resolution, model_config.resolution)
    size = data.fit_size(wanted, model_config.multiple)
    buckets = data.bucket_sizes(size, model_config.multiple) if config.buckets else [size]
    return model_config, max(buckets, key=lambda bucket: (bucket[0] * bucket[1], bucket == size))


def first_size(config: Config) -> tuple[int, int]:
    """(width, height) of the first target of the data set: of the first that can be used, if others may be skipped."""
    dataset = open_folder(config)
    for i in range(len(dataset)):
        try:
            return dataset.sizes(i)[1]
        except data.DataError:
            if not config.skip_bad_rows:
                raise
    raise data.DataError(f"{config.data}: none of its rows can be used; {dataset.check_command} tells why")


def gpu_memory(device: str) -> int:
    """Bytes of the memory of a GPU, free or not."""
    return torch.cuda.get_device_properties(device).total_memory


@contextlib.contextmanager
def explain_oom(config: Config, run: Path) -> Iterator[None]:
    """When the GPU runs out of memory, raise CheckpointError with the settings that ran and flags that would fit."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        kept = [f" (its last checkpoint, {folder.name}, is whole)" for folder in list_checkpoints(run)[-1:]]
        raise CheckpointError(
            f"{run}{''.join(kept)}: out of memory on {config.device} with {config.resolution}, batch "
            f"{config.batch_size} x {config.accumulate_grad_batches}, {describe_memory(config)}; "
            f"{peak_memory(config.device)} were used; {suggest_flags(config)} (--plan tells more)"
        ) from e


def suggest_flags(config: Config) -> str:
    """After the GPU ran out of memory: the flags of train.py that would have fitted, and their memory, in words.

    config: with a preset filled in (`resolve`).
    """
    model_config, size = model_and_size(config)
    unset = dataclasses.replace(config, **dict.fromkeys(PRESETS["exact"]))
    leaner = GPU_PRESETS[GPU_PRESETS.index(config.memory) + 1 if config.memory in GPU_PRESETS else 0 :]
    options = [(f"--memory {name}", resolve(unset, name)) for name in leaner]
    if config.batch_size > 1:
        single = dict(batch_size=1, accumulate_grad_batches=config.accumulate_grad_batches * config.batch_size)
        flags = f"--batch-size 1 --accumulate-grad-batches {single['accumulate_grad_batches']}"
        both = [(f"{preset} {flags}", dataclasses.replace(changed, **single)) for preset, changed in options]
        options = [(flags, dataclasses.replace(config, **single)), *options, *both]
    if is_recorded(config):
        options.insert(0, ("--no-cuda-graph", dataclasses.replace(config, cuda_graph=False)))
    needs = []
    for flags, changed in options:
        needs.append((largest_peak(predict(changed, model_config, size)) + CUDA_CONTEXT, flags))
        if needs[-1][0] <= gpu_memory(config.device):
            return f"{flags} takes {needs[-1][0] / GIB:.1f} GiB"
    if not needs:
        return "a smaller --resolution takes less"
    least, flags = min(needs)
    return f"the leanest is {flags}, {least / GIB:.1f} GiB"


def describe_memory(config: Config) -> str:
    """The settings about memory, in words."""
    words = [config.precision]
    words += ["gradient checkpointing"] if config.gradient_checkpointing else []
    words += [f"trained weights in {config.trained_weights}"] if config.trained_weights != "fp32" else []
    words += [f"moments in {config.optimizer_bits} bits"] if config.optimizer_bits != 32 else []
    words += ["optimizer on the CPU"] if config.optimizer_on_cpu else []
    return ", ".join(words + (["frozen blocks streamed"] if config.stream else []))


# ---------------------------------------------------------------------------------------------------------------- plan
def plan(config: Config, vram: float | None = None, rate: float | None = None, processes: int = 1) -> str:
    """What training as `config` says would take, as a page of text.

    vram: GiB of the GPU in question. rate: images a second, to tell the time. processes: that predict at the same time,
    each one preset; more than 1 only in programs that other processes may import. Raises CheckpointError or DataError
    for what cannot be trained on.
    """
    model_config, size = model_and_size(config)
    on_gpu = "cuda" in config.device and torch.cuda.is_available()
    if vram is None and config.memory == "auto" and on_gpu:
        vram = gpu_memory(config.device) / GIB
    if not on_gpu:  # the plan is for one that is elsewhere
        config = dataclasses.replace(config, device="cuda")
    # a resumed run has all settings about memory fixed: unset them, to compare the presets
    fixed = config.memory != "auto"
    unset = dataclasses.replace(config, **dict.fromkeys(PRESETS["exact"])) if fixed else config
    predictions, batches = predict_presets(unset, model_config, size, vram, processes)
    fitting = lambda name: vram and largest_peak(predictions[name]) + CUDA_CONTEXT <= vram * GIB
    fits = next(filter(fitting, GPU_PRESETS), None)
    preset = config.memory if fixed else fits or GPU_PRESETS[-1 if vram else 0]
    peaks = predictions.get(preset) if unset == config else None
    config = resolve(config, preset)
    validate(dataclasses.replace(config, device="cpu"))
    peaks = peaks or predict(config, model_config, size)
    step, images = peaks["training"], config.batch
    lines = [
        f"{model_config.name} at {'most ' if config.buckets else ''}{size[0]}x{size[1]}, "
        f"batch {config.batch_size} x {config.accumulate_grad_batches}, "
        f"--memory {preset}: {describe_memory(config)}",
        f"GPU memory, training  {step.total / GIB:6.2f} GiB predicted; at its peak:",
    ]
    lines += [f"    {count / GIB:6.2f}  {kind}" for kind, count in step.parts.most_common() if count > 5e6]
    lines += [f"GPU memory, {name:9} {peak.total / GIB:6.2f} GiB" for name, peak in peaks.items() if name != "training"]
    lines.append(f"CPU memory            {cpu_memory(config, model_config) / GIB:6.2f} GiB beside the program")
    per_image = flops(config, model_config, size)
    lines.append(
        f"arithmetic            {per_image * images / 1e12:6.2f} TFLOP a step, {per_image / 1e12:.2f} an image"
    )
    if config.optimizer == "muon":
        orthogonal = muon_flops(trained_shapes(config, model_config))
        lines.append(
            f"                      {orthogonal / 1e12:6.2f} TFLOP more a step for Muon's orthogonal updates, "
            f"{orthogonal / per_image / images:.0%} of it"
        )
    if config.cache and data.is_dataset(config.data, config.hints):
        disk = sum(cache_size(config, model_config, size))
        lines.append(f"disk, cache           {disk / GIB:6.2f} GiB in {config.cache_dir}")
    if rate:
        hours = config.steps * images / rate / 3600
        lines.append(f"time                  {hours:6.1f} h for {config.steps} steps at {rate:g} images/s")
    lines += ["", *preset_table(unset, predictions, batches)]
    if vram:
        verdict = f"--memory {fits} is the fastest preset that fits" if fits else "none of the presets fits"
        lines.append(f"{vram:g} GiB, of which CUDA itself takes {CUDA_CONTEXT / GIB:.1f}: {verdict}")
        if not fits:
            lines.append("    a smaller --resolution or --batch-size 1 (with --accumulate-grad-batches) takes less")
    return "\n".join(lines)


def predict_presets(
    config: Config, model_config: ModelConfig, size: tuple[int, int], vram: float | None, processes: int
) -> tuple[dict[str, dict[str, Peak]], dict[str, int]]:
    """The prediction of every preset and, with `vram` (GiB), the largest batch that fits: two dictionaries by preset.

    config: with no preset filled in. A prediction takes some seconds of one core, so `processes` share them.
    """
    names = ("exact", *GPU_PRESETS)
    one = functools.partial(predict_preset, config, model_config, size, vram)
    with contextlib.ExitStack() as stack:
        each = map
        if processes > 1:
            context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads half
            ignore = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is for the plan
            each = stack.enter_context(ProcessPoolExecutor(min(processes, len(names)), context, **ignore)).map
        found = tqdm(
            each(one, names), desc="predicting memory", unit="preset", total=len(names), leave=False, disable=None
        )
        by_name = dict(zip(names, found, strict=True))
    batches = {name: batch for name, (_, batch) in by_name.items() if batch is not None}
    return {name: peaks for name, (peaks, _) in by_name.items()}, batches


def predict_preset(
    config: Config, model_config: ModelConfig, size: tuple[int, int], vram: float | None, name: str
) -> tuple[dict[str, Peak], int | None]:
    """The prediction of preset `name` and, with `vram` (GiB), the largest batch that fits."""
    config = resolve(config, name)
    peaks = predict(config, model_config, size)
    return peaks, largest_batch(config, model_config, size, peaks, vram * GIB) if vram else None


def preset_table(
    config: Config, predictions: Mapping[str, Mapping[str, Peak]], batches: Mapping[str, int]
) -> list[str]:
    """What each preset takes, as lines of text: memory, speed, the largest batch where `batches` has it, settings.

    config: with no preset filled in; predictions and batches: those of `predict_presets`.
    """
    on_gpu = "cuda" in config.device and torch.cuda.is_available()
    machine = measure_machine(config.device) if on_gpu else COMMON
    filled = {name: resolve(config, name) for name in predictions}
    took = {
        name: seconds(peaks["training"].operations, machine, filled[name].precision)
        for name, peaks in predictions.items()
    }
    lines = [f"{'--memory':10}{'GiB':>6}  {'speed':>5}" + ("  largest batch" if batches else "") + "  settings"]
    for name, peaks in predictions.items():
        speed = min(took.values()) / took[name] if took[name] else 1.0
        line = f"{name:10}{largest_peak(peaks) / GIB:6.2f}  {speed:5.2f}"
        if batches:
            line += f"  {batches[name]:13}"
        lines.append(f"{line}  {describe_memory(filled[name])}")
    how = "measured" if on_gpu else "that NVIDIA names; with a GPU at hand they are measured"
    return [*lines, f"speed: of a step, from its FLOPs and bytes at the rates of the {machine.name} ({how})"]


def trained_shapes(config: Config, model_config: ModelConfig) -> list[torch.Size]:
    """The shapes of the parameters that train."""
    with torch.device("meta"):
        return [p.shape for p in select_trainable(ControlLDM(model_config, config.hint_channels), config).values()]


def cpu_memory(config: Config, model_config: ModelConfig) -> int:
    """Bytes that training takes in the CPU's memory, beside the program and where a GPU computes.

    These are the VAE's decoder while it waits for the next picture, the optimizer (weights, gradients, moments) and the
    streamed blocks; or, if that is more, the whole model while it is loaded (files are mapped, and do not count), or
    UNet and ControlNet beside the optimizer's copies. Pinned memory comes in powers of two.
    """
    with torch.device("meta"):
        model = ControlLDM(model_config, config.hint_channels)
    trained = [p.numel() for p in select_trainable(model, config).values()]
    frozen = [p.numel() for p in model.unet.parameters() if not p.requires_grad]
    pinned = lambda counts, width: sum(1 << (n * width - 1).bit_length() for n in counts)
    width = PRECISIONS[config.precision].itemsize
    count = lambda module: sum(p.numel() for p in module.parameters())
    decoder = width * sum(map(count, model.vae.decoding)) * config.cache
    training = decoder
    if config.optimizer_on_cpu:
        moments = 2 * config.optimizer_bits // 8
        training += 2 * pinned(trained, 4) + sum(trained) * (moments + 4 * bool(config.ema_decay))
    if config.stream:
        training += pinned(frozen, width)
    formats = loading_formats(config)
    networks = sum(frozen) * formats["unet_dtype"].itemsize + 4 * (count(model.unet) - sum(frozen))
    networks += count(model.control_model) * formats["control_dtype"].itemsize
    loading = networks + 4 * count(model.vae) + count(model.text) * formats["text_dtype"].itemsize
    copying = networks + decoder + config.optimizer_on_cpu * 2 * pinned(trained, 4)
    return max(training, loading, copying)


def cache_size(config: Config, model_config: ModelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Bytes on disk of the latents and of the contexts of the data set, at most: equal images are cached once, and few
    are as large as `size` if there are buckets."""
    dataset = open_folder(config)
    moments = size[0] * size[1] // model_config.vae_factor**2 * 2 * model_config.vae.z_channels
    prompts = len({dataset.prompt(i) for i in range(len(dataset))} | {""})
    width = PRECISIONS[config.precision].itemsize
    variants = config.crops * (2 if config.flip else 1)
    return len(dataset) * variants * moments * width, prompts * math.prod(text_shape(model_config)) * width
