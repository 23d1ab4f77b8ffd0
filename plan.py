"""Which GPU does it take? Memory, arithmetic, disk and time of a configuration, without a GPU and without weights.

    python train.py --plan --base sd15 --batch-size 4 --vram 8
    python train.py --plan --base v1-5-pruned.safetensors --data data/fill50k --memory 6gb --rate 2.5
    python train.py --plan --resume runs/fill50k                    the time from the steps that it has made

The step that `engine.py` would make is made on fake tensors, which have shapes and no content, and `memory.measure`
counts what is alive. What CUDA needs beside that is allowed for by two constants, stated where they are used.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import engine
import memory
from config import PRESETS, Config, resolve, validate
from controlnet import MODELS, PRECISIONS, ControlLDM, ModelConfig, computed_in, read_model
from memory import GIB, Peak
from parallel import Ranks

WORKSPACE = 0.25 * GIB  # cuBLAS' and cuDNN's, inside of what PyTorch allocates
CONTEXT = 0.6 * GIB  # driver, kernels, fragmentation: what a GPU cannot give to tensors


# ---------------------------------------------------------------------------------------------------------- prediction
def fake_batch(config: Config, shapes: ModelConfig, size: tuple[int, int]) -> dict[str, Tensor]:
    """A micro-batch as the loader would give it, of images of `size` (width, height)."""
    b, (w, h), z = config.batch_size, size, shapes.vae.z_channels
    lh, lw = h // shapes.vae_factor, w // shapes.vae_factor
    batch = {
        "hint": torch.empty(b, config.hint_channels, h, w),
        "timestep": torch.zeros(b, dtype=torch.int64),
        "noise": torch.empty(b, z, lh, lw),
        "posterior": torch.empty(b, z, lh, lw),
        "context": torch.empty(b, 77, shapes.text.width),
    }
    if config.cache:
        return batch | {"moments": torch.empty(b, 2 * z, lh, lw)}
    return batch | {"image": torch.empty(b, 3, h, w)}


def predict(config: Config, shapes: ModelConfig, size: tuple[int, int]) -> dict[str, Peak]:
    """What the GPU has to hold at most, name -> peak, while the run trains, caches and draws. `config` is resolved."""
    same = lambda name: {"tf32": "fp32", "fp16": "bf16"}.get(name, name)  # of the same size
    precision, weights = same(config.precision), same(config.trained_weights)
    config = dataclasses.replace(config, device="cpu", precision=precision, trained_weights=weights, compile=False)
    peaks = {}
    with FakeTensorMode():
        model = ControlLDM(shapes, config.hint_channels).requires_grad_(False)
        frozen_parts = [*model.vae.parameters(), *model.text.parameters()]
        for p in frozen_parts:
            p.data = p.data.to(PRECISIONS[precision])
        made = engine.assemble(config, model)
        on_gpu = lambda: {
            "ControlNet" if config.sd_locked else "what trains": list(made.trained.values()),
            "frozen UNet": [p for p in model.unet.parameters() if not p.requires_grad],
        }
        resting = {} if config.cache else {"VAE and text tower": frozen_parts}

        begin(made.optimizer)
        if config.stream:  # which knows what to bring ahead after two steps
            for _ in range(2):
                made.backward(fake_batch(config, shapes, size), last=True)
                made.forget()
        state = [v for e in made.optimizer.state.values() for v in e.values() if isinstance(v, Tensor)]

        def step(live: memory.Live) -> None:
            for p in made.trained.values():
                p.register_post_accumulate_grad_hook(lambda p: live.label(p.grad, "gradients"))
            micro_batches = min(2, config.accumulate_grad_batches)  # the second finds gradients there
            for i in range(micro_batches):
                made.backward(fake_batch(config, shapes, size), last=i + 1 == micro_batches)
            if made.offload:
                made.offload.arrive()
            update_largest(made.optimizer)
            if made.offload:
                made.offload.send()
            made.forget()

        kept = {"moving average": list(made.average.values()), "optimizer state": state} if not made.offload else {}
        peaks["training"] = memory.measure(step, on_gpu() | resting | kept)
        peaks["training"].total += int(WORKSPACE)
        peaks["training"].parts["CUDA's workspaces (allowed)"] = int(WORKSPACE)
        images = torch.empty(config.encode_batch_size, 3, size[1], size[0], dtype=PRECISIONS[precision])
        peaks["caching"] = phase(lambda: model.vae.moments(images), {"VAE and text tower": frozen_parts})
        z = torch.empty(1, shapes.vae.z_channels, size[1] // shapes.vae_factor, size[0] // shapes.vae_factor)

        def draw() -> Tensor:
            with made.averaged():
                return model.decode(z)

        peaks["drawing"] = phase(
            draw, on_gpu() | kept | {"VAE": [p for part in model.vae.decoding for p in part.parameters()]}
        )
    return peaks if config.cache else {k: v for k, v in peaks.items() if k != "caching"}


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, as its first step does."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, memory.AdamW):
        for p in parameters:
            optimizer.begin(p)
    else:
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def update_largest(optimizer: torch.optim.Optimizer) -> None:
    """A step as far as memory is concerned: ours takes one parameter after the other, so the largest will do."""
    if isinstance(optimizer, memory.AdamW):
        group = optimizer.param_groups[0]
        largest = max(group["params"], key=lambda p: p.numel())
        optimizer.update(largest, group["lr"], group["weight_decay"], group["betas"], group["eps"])
    else:
        optimizer.step()


def phase(function: Callable[[], Tensor], known: dict[str, list[Tensor]]) -> Peak:
    """The peak of something without gradients."""
    with torch.no_grad():
        peak = memory.measure(lambda live: function(), known)
    return Peak(peak.total + int(WORKSPACE), peak.parts)


def largest(peaks: dict[str, Peak]) -> int:
    return max(peak.total for peak in peaks.values())


def flops(config: Config, shapes: ModelConfig, size: tuple[int, int]) -> int:
    """Operations of one image's part of a step: what the mathematics needs, nothing computed twice, no VAE, no text."""
    plain = dict(batch_size=1, device="cpu", cache=True, compile=False, memory="fast", accumulate_grad_batches=1)
    config = resolve(dataclasses.replace(config, **plain, **dict.fromkeys(PRESETS["fast"])), "fast")
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        made = engine.assemble(config, ControlLDM(shapes, config.hint_channels).requires_grad_(False))
        with FlopCounterMode(display=False) as counter:
            made.backward(fake_batch(config, shapes, size), last=True)
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------ settings
def settle(config: Config, ranks: Ranks) -> Config:
    """`config` with a preset of memory chosen where it says "auto" (the same on all ranks), and all settings filled in
    and checked."""
    preset, given = config.memory, all(getattr(config, name) is not None for name in PRESETS["fast"])
    if preset == "auto":
        preset = "fast"
        if "cuda" in config.device and torch.cuda.is_available() and config.base and not given:
            shapes, size = shapes_of(config)
            free = ranks.least(torch.cuda.mem_get_info(config.device)[0])
            preset = fastest(config, shapes, size, free)[0] or list(PRESETS)[-1]
            print(f"--memory {preset}: the fastest that fits into the {free / GIB:.1f} GiB that are free")
    config = resolve(config, preset)
    validate(config)
    if computed_in(config.precision, config.device) != PRECISIONS[config.precision]:
        print(f"this CPU has no instructions for {config.precision}: weights are kept in it, fp32 is computed in")
    return config


def fastest(
    config: Config, shapes: ModelConfig, size: tuple[int, int], room: float
) -> tuple[str | None, dict[str, dict[str, Peak]]]:
    """The first preset whose prediction fits into `room` bytes of a GPU (None: none does), and the predictions that
    were made on the way."""
    seen = {}
    for name in tqdm(PRESETS, desc="predicting memory", unit="preset", leave=False, disable=None):
        seen[name] = predict(resolve(config, name), shapes, size)
        if largest(seen[name]) + CONTEXT <= room:
            return name, seen
    return None, seen


def shapes_of(config: Config) -> tuple[ModelConfig, tuple[int, int]]:
    """The model that `config.base` is, by its file or by its name in MODELS, and the size of its images."""
    if config.base in MODELS and not Path(config.base).exists():
        shapes = MODELS[config.base]
    else:
        shapes = read_model(config.base, prediction=config.prediction)[1]
    if config.resolution:
        wanted = data.parse_resolution(config.resolution)
    elif config.data and Path(config.data).exists():
        wanted = data.Fill50K(config.data, None, config.hint_channels, config.hint_resample).sizes(0)[1]
    else:
        wanted = (shapes.resolution, shapes.resolution)
    return shapes, data.fit_size(wanted, shapes.multiple)


def room(device: str) -> int:
    """Bytes of a GPU's memory, taken or not."""
    return torch.cuda.get_device_properties(device).total_memory


def what_fits(config: Config) -> str:
    """After running out of memory: the flags that would have fitted, in words. `config` is resolved."""
    shapes, size = shapes_of(config)
    open_ = dataclasses.replace(config, **dict.fromkeys(PRESETS["fast"]))
    options = []
    if config.batch_size > 1:
        smaller = dict(batch_size=1, accumulate_grad_batches=config.accumulate_grad_batches * config.batch_size)
        options.append(
            (
                dataclasses.replace(config, **smaller),
                f"--batch-size 1 --accumulate-grad-batches {smaller['accumulate_grad_batches']}",
            )
        )
    leaner = list(PRESETS)[list(PRESETS).index(config.memory) + 1 if config.memory in PRESETS else 1 :]
    options += [(resolve(open_, name), f"--memory {name}") for name in leaner]
    if config.batch_size > 1:
        one = dataclasses.replace(open_, **smaller)
        options += [(resolve(one, name), f"--memory {name} {options[0][1]}") for name in leaner]
    lowest = None
    for changed, flags in options:
        need = largest(predict(changed, shapes, size)) + CONTEXT
        if need <= room(config.device):
            return f"{flags} takes {need / GIB:.1f} GiB"
        lowest = min(lowest or (need, flags), (need, flags))
    return f"the leanest is {lowest[1]}, {lowest[0] / GIB:.1f} GiB" if lowest else "a smaller --resolution takes less"


# ---------------------------------------------------------------------------------------------------------------- plan
def plan(config: Config, vram: float | None = None, rate: float | None = None) -> str:
    """What training as `config` says would take, as a page of text. `vram`: GiB of the GPU in question; `rate`: images
    a second, for the time. Raises CheckpointError or DataError for what cannot be trained on."""
    shapes, size = shapes_of(config)
    if vram is None and config.memory == "auto" and "cuda" in config.device and torch.cuda.is_available():
        vram = room(config.device) / GIB
    # of a run that is resumed all is settled: compare the presets as they are
    free = config if config.memory == "auto" else dataclasses.replace(config, **dict.fromkeys(PRESETS["fast"]))
    fits, seen = fastest(free, shapes, size, vram * GIB) if vram else (None, {})
    preset = config.memory if config.memory != "auto" else fits or (list(PRESETS)[-1] if vram else "fast")
    config = resolve(config, preset)
    validate(dataclasses.replace(config, device="cpu"))
    peaks = seen.get(preset) if free is config else None
    peaks = peaks or predict(config, shapes, size)
    step, images = peaks["training"], config.batch
    lines = [
        f"{shapes.name} at {size[0]}x{size[1]}, batch {config.batch_size} x {config.accumulate_grad_batches}, "
        f"--memory {preset}: {describe(config)}",
        f"GPU memory, training  {step.total / GIB:6.2f} GiB predicted; at its peak:",
    ]
    lines += [f"    {bytes_ / GIB:6.2f}  {part}" for part, bytes_ in step.parts.most_common() if bytes_ > 5e6]
    lines += [f"GPU memory, {name:9} {peak.total / GIB:6.2f} GiB" for name, peak in peaks.items() if name != "training"]
    lines.append(f"CPU memory            {on_cpu(config, shapes) / GIB:6.2f} GiB beside the program")
    each = flops(config, shapes, size)
    lines.append(f"arithmetic            {each * images / 1e12:6.2f} TFLOP a step, {each / 1e12:.2f} an image")
    if config.cache and (Path(config.data) / "prompt.json").exists():
        rows, prompts = cache_size(config, shapes, size)
        lines.append(f"disk, cache           {(rows + prompts) / GIB:6.2f} GiB in {config.cache_dir}")
    if rate:
        hours = config.steps * images / rate / 3600
        lines.append(f"time                  {hours:6.1f} h for {config.steps} steps at {rate:g} images/s")
    if vram:
        need = {name: largest(found) / GIB for name, found in seen.items()}
        said = ", ".join(f"{name} {gib:.1f}" for name, gib in need.items())
        verdict = f"--memory {fits} is the fastest preset that fits" if fits else "none of the presets fits"
        lines.append(f"{vram:g} GiB, of which {CONTEXT / GIB:.1f} are CUDA's own: {verdict} ({said})")
        if not fits:
            lines.append("    a smaller --resolution or --batch-size 1 (with --accumulate-grad-batches) takes less")
    return "\n".join(lines)


def describe(config: Config) -> str:
    """The settings of memory in words."""
    said = [config.precision]
    said += ["gradient checkpointing"] if config.gradient_checkpointing else []
    said += [f"trained weights in {config.trained_weights}"] if config.trained_weights != "fp32" else []
    said += [f"moments in {config.optimizer_bits} bits"] if config.optimizer_bits != 32 else []
    said += ["optimizer on the CPU"] if config.optimizer_on_cpu else []
    return ", ".join(said + (["frozen blocks streamed"] if config.stream else []))


def on_cpu(config: Config, shapes: ModelConfig) -> int:
    """Bytes that training takes in the CPU's memory: the VAE's decoder at rest, the optimizer (weights, gradients and
    moments) and streamed blocks; or, if that is more, the whole model while it is loaded. Pinned memory comes in powers
    of two."""
    with torch.device("meta"):
        model = ControlLDM(shapes, config.hint_channels)
    trained = [p.numel() for p in engine.choose_trained(model, config).values()]
    locked = [p.numel() for p in model.unet.parameters() if not p.requires_grad]
    pinned = lambda sizes, width: sum(1 << (n * width - 1).bit_length() for n in sizes)
    width, everything = PRECISIONS[config.precision].itemsize, sum(p.numel() for p in model.parameters())
    resting = width * sum(p.numel() for part in model.vae.decoding for p in part.parameters()) * config.cache
    if config.optimizer_on_cpu:
        moments = 2 * config.optimizer_bits // 8
        resting += 2 * pinned(trained, 4) + sum(trained) * (moments + 4 * bool(config.ema_decay))
    if config.stream:
        resting += pinned(locked, width)
    loading = 4 * everything + config.optimizer_on_cpu * 2 * pinned(trained, 4)
    return max(resting, loading)


def cache_size(config: Config, shapes: ModelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Bytes of the latents and of the contexts of a data set, at most (what is there twice is kept once)."""
    pairs = data.Fill50K(config.data, size, config.hint_channels, config.hint_resample)
    latent = size[0] * size[1] // shapes.vae_factor**2 * 2 * shapes.vae.z_channels
    prompts = len({pairs.prompt(i) for i in range(len(pairs))} | {""})
    width = PRECISIONS[config.precision].itemsize
    return len(pairs) * latent * width, prompts * 77 * shapes.text.width * width
