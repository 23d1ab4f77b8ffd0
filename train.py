"""Train a ControlNet: the whole loop, top to bottom.

    python train.py                                             the demo: circles on the tiny base that ships
    python train.py --base sd15.safetensors --data data/fill50k --out runs/fill50k
    python train.py --resume runs/fill50k                       go on where it stopped

A step draws latents, noise them to a random timestep, lets the ControlNet steer the locked UNet, and compares what the
UNet says with the noise. Whatever is frozen is computed once (`frozen.py`); whatever is random is a function of
(seed, sample number), so a run that was stopped and resumed is the run that was not. A run is a folder: `config.json`,
`metrics.jsonl`, `curves.png`, `image_log/`, `checkpoints/`. Follows Zhang et al. 2023 (arXiv:2302.05543).
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import circles
import data
import frozen
import log
import sampler
from checkpoint import CheckpointError
from controlnet import PRECISIONS, ControlLDM

TINY_BASE = Path(__file__).parent / "models" / "tiny_sd.safetensors"


# ----------------------------------------------------------------------------------------------------- configuration
def setting(default: Any, group: str, text: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass
class Config:
    """Every setting of a run; each is a flag of the same name. Defaults are the ControlNet tutorial's."""

    base: str = setting("", "what to train", "Stable Diffusion file to attach a ControlNet to (or one that has it)")
    data: str = setting("", "what to train", "folder with prompt.json, source/ and target/ (Fill50K's layout)")
    out: str = setting("", "what to train", "the run's folder (default: runs/ and the data folder's name)")
    resolution: str = setting("", "what to train", "size of the images, N or WxH (default: the first target's)")
    hint_channels: int = setting(3, "what to train", "channels of the hint images: 1, 3, 4; others from .npy files")
    hint_resample: str = setting(
        "area", "what to train", "how hints are resized; nearest is for label maps", ("area", "nearest")
    )
    prediction: str = setting(
        "auto", "what to train", "v for SD 2.1 at 768 px, which its file cannot tell", ("auto", "eps", "v")
    )
    control: str = setting("", "what to train", "a ControlNet's file or folder to go on from (default: a new one)")
    vae: str = setting("", "what to train", "a VAE's file or folder to take for the base's")
    ema: bool = setting(False, "what to train", "take the base UNet's moving average (model_ema.*) for its weights")
    clip_skip: int = setting(1, "what to train", "2 leaves out the text tower's last layer, as some SD 1.x models want")

    sd_locked: bool = setting(True, "what is trained", "off: the UNet's decoder trains too; use a rate of 2e-6 then")
    only_mid_control: bool = setting(False, "what is trained", "steer through the middle block alone: fast, weak")

    steps: int = setting(10_000, "optimisation", "optimizer steps in all")
    batch_size: int = setting(4, "optimisation", "samples that are computed at once (a micro-batch)")
    accumulate_grad_batches: int = setting(
        1, "optimisation", "micro-batches a step: 4 of them are a batch 4 times as large"
    )
    learning_rate: float = setting(1e-5, "optimisation", "of AdamW")
    warmup_steps: int = setting(0, "optimisation", "steps over which the learning rate rises from 0")
    lr_schedule: str = setting("constant", "optimisation", "of the learning rate after that", ("constant", "cosine"))
    weight_decay: float = setting(1e-2, "optimisation", "of AdamW")
    clip_grad_norm: float = setting(0.0, "optimisation", "largest norm of the gradient; 0 turns clipping off")
    drop_prompt: float = setting(
        0.0, "optimisation", "fraction of prompts that are emptied, so that the hint must do (the paper's 0.5)"
    )
    timestep_bias: float = setting(
        1.0, "optimisation", "t = 1000 u^bias: below 1 more high-noise timesteps; 1 is uniform"
    )
    precision: str = setting("fp32", "optimisation", "of the computation; trained weights stay fp32", tuple(PRECISIONS))
    channels_last: bool = setting(
        False, "optimisation", "keep the channels of images and weights side by side in memory"
    )
    seed: int = setting(0, "optimisation", "all randomness is a function of it and of the sample's number")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "optimisation", "where to compute")

    cache: bool = setting(True, "frozen work", "compute the VAE's and text tower's outputs once; off: at every step")
    cache_dir: str = setting("data/.cache", "frozen work", "where they are kept; runs share them")
    encode_batch_size: int = setting(8, "frozen work", "images that the VAE encodes at once")
    workers: int = setting(
        2 if torch.cuda.is_available() else 0, "frozen work", "processes that load samples ahead; 0: none"
    )

    logger_freq: int = setting(
        300, "watching", "steps between image logs and measurements of the control gain; 0: never"
    )
    checkpoint_freq: int = setting(1000, "watching", "steps between checkpoints (there is always one at the end)")
    keep_checkpoints: int = setting(2, "watching", "how many of the newest are kept; 0: all")
    validation: int = setting(8, "watching", "samples held out to watch (of small data sets a tenth, at least 2)")
    log_images: int = setting(4, "watching", "of these, how many are drawn in the image log")
    log_steps: int = setting(50, "watching", "denoising steps of the image log")
    guidance: float = setting(0.0, "watching", "guidance scale of the image log; 0: what suits the model (9 for SD)")

    @property
    def batch(self) -> int:
        """Samples a step."""
        return self.batch_size * self.accumulate_grad_batches


# What `python train.py` alone does.
DEMO = dict(
    base=str(TINY_BASE),
    data="data/circles",
    out="runs/demo",
    steps=500,
    batch_size=16,
    learning_rate=2.5e-3,
    warmup_steps=20,
    lr_schedule="cosine",
    timestep_bias=0.6,
    weight_decay=0.0,
    clip_grad_norm=1.0,
    logger_freq=50,
    log_steps=20,
    validation=16,
)
# `base` and `data` may be other paths on resume, to the same weights and the same rows.
FIXED_ON_RESUME = (
    "resolution",
    "hint_channels",
    "hint_resample",
    "prediction",
    "control",
    "vae",
    "ema",
    "clip_skip",
    "seed",
    "validation",
)


# -------------------------------------------------------------------------------------------------------------- loss
def diffusion_loss(
    model: ControlLDM,
    latents: Tensor,
    context: Tensor,
    hint: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    only_mid_control: bool = False,
) -> Tensor:
    """Per-sample loss (B,), float32: the mean square of what the steered UNet gets wrong.

    latents (B,4,h,w), scaled; context (B,77,D); hint (B,C,8h,8w) in [0,1]; timesteps (B,) int64; noise (B,4,h,w). The
    target is the noise, or the velocity for v models. The locked encoder has no parameter that requires a gradient and
    so leaves no graph behind; of the locked decoder only what its activations' gradient needs is kept.
    """
    alphas = sampler.alphas_cumprod(model.config, latents.device)[timesteps]
    x_t = sampler.q_sample(latents, noise, alphas)
    predicted = model.predict(x_t, timesteps, context, hint, only_mid_control)
    target = noise if model.config.prediction == "eps" else sampler.velocity(latents, noise, alphas)
    return F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)


def learning_rate(config: Config, step: int) -> float:
    """The rate of step `step` (from 0): rises over the warm-up, then constant, or down to a fiftieth along a cosine.

    A function of settings and step alone, so a resumed run has the rates of one that was not stopped.
    """
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "cosine":
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate


# ------------------------------------------------------------------------------------------------------- what trains
def choose_trained(model: ControlLDM, config: Config) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by checkpoint name; they and only they require a gradient.

    The ControlNet, without its 12 outer zero convolutions under `only_mid_control`; with SD unlocked the UNet's
    decoder (`output_blocks`, `out`) too.
    """
    model.requires_grad_(False)
    trained = {}
    for name, p in model.named_parameters():
        control = name.startswith("control_model.")
        idle = config.only_mid_control and name.startswith("control_model.zero_convs.")
        decoder = name.startswith(("model.diffusion_model.output_blocks.", "model.diffusion_model.out."))
        if (control and not idle) or (decoder and not config.sd_locked):
            trained[name] = p.requires_grad_(True)
    return trained


# -------------------------------------------------------------------------------------------------------------- data
@dataclass
class Prepared:
    """The data set as the loop reads it."""

    samples: data.Samples
    validation: list[int]  # indices of the held-out items
    uncond: Tensor  # (77,D): the context of the empty prompt


def prepare(config: Config, model: ControlLDM, dataset: data.Fill50K | Sequence[dict[str, Any]]) -> Prepared:
    """Settle the data set's size, hold out the validation items, and fill the caches."""
    multiple, files = model.config.multiple, isinstance(dataset, data.Fill50K)
    native = dataset.sizes(0)[1] if files else np.shape(dataset[0]["jpg"])[1::-1]
    wanted = data.parse_resolution(config.resolution) if config.resolution else native
    size = data.fit_size(wanted, multiple)
    if size != native:
        print(f"images are brought from {native[0]}x{native[1]} to {size[0]}x{size[1]}")
    if size != wanted:
        print(f"{wanted[0]}x{wanted[1]} is not possible: this UNet needs sides that {multiple} divides")
    config.resolution = f"{size[0]}x{size[1]}"
    if files:
        dataset.size, triples = size, dataset
    else:
        triples = data.Triples(dataset, size, config.hint_channels, config.hint_resample)
    count = len(triples)
    if count < 2:
        raise data.DataError("the data set has 1 item; it takes 2 to see whether a hint makes a difference")
    held = max(2, min(config.validation, count // 10))
    train = range(count - held) if count > 2 * held else range(count)  # a handful: nothing to spare
    validation = list(range(count - held, count))

    once = None
    with torch.no_grad():
        uncond = model.encode_prompts("")[0].float().cpu()
        if config.cache:
            once = frozen.freeze(model, triples, config.cache_dir, config.encode_batch_size)
            model.vae.cpu()
            model.text.cpu()
    factor = model.vae.factor
    shape = (model.config.unet.in_channels, size[1] // factor, size[0] // factor)
    timestep_of = TimestepOf(config.timestep_bias, model.config.timesteps)
    return Prepared(
        data.Samples(triples, train, config.seed, shape, timestep_of, once, config.drop_prompt), validation, uncond
    )


@dataclass(frozen=True)
class TimestepOf:
    """u, uniform in [0,1) -> timestep: total * u^bias, rounded down."""

    bias: float
    total: int

    def __call__(self, u: float) -> int:
        return min(self.total - 1, int(self.total * u**self.bias))


def to_device(model: ControlLDM, batch: dict[str, Any], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A batch of samples -> latents, context, hint, timesteps, noise, as `diffusion_loss` takes them."""
    move = lambda x: x.to(device, non_blocking=True)
    with torch.no_grad():
        if "moments" in batch:
            moments = move(batch["moments"])
        else:
            moments = model.vae.moments(move(batch["image"]).to(model.vae.quant_conv.weight.dtype))
        context = move(batch["context"]) if "context" in batch else model.encode_prompts(batch["prompt"])
        latents = model.latents(moments.float(), move(batch["posterior"]))
    return latents, context, move(batch["hint"]), move(batch["timestep"]), move(batch["noise"])


# ---------------------------------------------------------------------------------------------------------- watching
class Watch:
    """The fixed validation batch: how much do the hints help, and what does it look like?"""

    def __init__(self, config: Config, model: ControlLDM, prepared: Prepared, autocast: torch.autocast):
        self.config, self.model, self.prepared, self.autocast = config, model, prepared, autocast
        samples = prepared.samples
        items = [samples.item(i) for i in prepared.validation]
        rounds = max(1, math.ceil(16 / len(items)))  # at least 16 measurements, at timesteps spread over the schedule
        count = rounds * len(items)
        generator = torch.Generator().manual_seed(data.mix("validation", config.seed))
        self.batches = []
        for r in range(rounds):
            at = torch.arange(r * len(items), (r + 1) * len(items))
            noise = torch.randn((2, len(items), *samples.latent_shape), generator=generator)
            extra = {
                "timestep": ((at + 0.5) * model.config.timesteps / count).long(),
                "noise": noise[0],
                "posterior": noise[1],
            }
            self.batches.append(torch.utils.data.default_collate(items) | extra)

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        """Mean loss with the right hints, and with the hints of other samples."""
        model = self.model
        size = self.config.batch_size
        sums = [0.0, 0.0]
        for batch in self.batches:
            latents, context, hint, timesteps, noise = to_device(model, batch, self.config.device)
            for k, given in enumerate((hint, hint.roll(1, dims=0))):
                for part in zip(*(x.split(size) for x in (latents, context, given, timesteps, noise)), strict=True):
                    with self.autocast:
                        sums[k] += diffusion_loss(model, *part, self.config.only_mid_control).sum().item()
        count = sum(len(batch["timestep"]) for batch in self.batches)
        return sums[0] / count, sums[1] / count

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Save the grid of the validation items: control, prediction, ground truth, reconstruction, prompt."""
        config, model, samples = self.config, self.model, self.prepared.samples
        count = min(config.log_images, len(self.prepared.validation))
        chosen = self.prepared.validation[:count]
        batch = {k: v[:count] for k, v in self.batches[0].items()}
        latents, context, hint, _, _ = to_device(model, batch, config.device)
        size = tuple(side * model.vae.factor for side in latents.shape[:1:-1])
        drawn = []
        for i in range(0, count, config.batch_size):
            part = slice(i, i + config.batch_size)
            negative = self.prepared.uncond.to(context).expand_as(context[part])
            with self.autocast:
                latents_drawn = sampler.sample(
                    model, context[part], negative, hint[part], size, config.log_steps, config.guidance or None,
                    config.seed, i, only_mid_control=config.only_mid_control,
                )  # fmt: skip
            drawn.append(latents_drawn)
        home = next(model.vae.parameters()).device  # after caching the VAE rests on the CPU
        model.vae.to(config.device)
        log.save_grid(
            path,
            {
                "control": [log.hint_image(h) for h in hint],
                "prediction": log.to_uint8(torch.cat([model.decode(z) for x in drawn for z in x.split(1)])),
                "ground truth": [log.to_uint8(data.to_tensor(samples.triples.image(i))[None])[0] for i in chosen],
                "reconstruction": log.to_uint8(torch.cat([model.decode(z) for z in latents.split(1)])),
            },
            [samples.triples.prompt(i) for i in chosen],
        )
        model.vae.to(home)


# ------------------------------------------------------------------------------------------------------- checkpoints
def save(
    run: Path, config: Config, model: ControlLDM, trained: dict, optimizer: Any, scaler: Any, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of a step: all of the ControlNet (also what does not train in this mode), and the decoder if
    it trains."""
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("control_model.")} | trained
    metadata = {"config": model.config.to_json(), "step": str(state["step"]), "sd_locked": json.dumps(config.sd_locked)}
    state = state | {"config": dataclasses.asdict(config)}
    return checkpoint.save_training(run, weights, metadata, trained, optimizer, scaler, state, config.keep_checkpoints)


# ---------------------------------------------------------------------------------------------------------- the loop
def optimizer_step(
    config: Config,
    model: ControlLDM,
    trained: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
    batches: Iterator[dict[str, Any]],
) -> tuple[float, float]:
    """One step on `accumulate_grad_batches` of `batches`: (mean loss of the samples, norm of the gradient)."""
    total = torch.zeros((), device=config.device)
    for _ in range(config.accumulate_grad_batches):
        batch = to_device(model, next(batches), config.device)
        with autocast:
            losses = diffusion_loss(model, *batch, config.only_mid_control)
        loss = losses.sum() / config.batch
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.clip_grad_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total.item(), norm.item()


def assemble(
    config: Config, model: ControlLDM
) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer, torch.amp.GradScaler, torch.autocast]:
    """What trains, its optimizer, the gradient scaler and the autocast of `config`; frozen weights change precision.

    Frozen weights live in the precision that they are used in; trained ones stay fp32 under autocast.
    """
    trained, dtype, kind = choose_trained(model, config), PRECISIONS[config.precision], torch.device(config.device).type
    for name, p in model.named_parameters():
        if not p.requires_grad and not name.startswith("control_model."):
            p.data = p.data.to(dtype)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    return trained, optimizer, scaler, torch.autocast(kind, dtype, enabled=dtype != torch.float32)


def train(
    config: Config,
    dataset: Sequence[dict[str, Any]] | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Train as `config` says and return the run's folder.

    `dataset`: any array-like of dict(jpg (H,W,3) float32 in [-1,1], txt, hint (H,W,C) float32 in [0,1]), instead of the
    folder `config.data`. `resume`: a run's folder to go on with; it is then also where the results go. `overwrite`:
    start anew in a folder that holds a run. Raises CheckpointError or DataError, one line each, for what cannot be
    trained on.
    """
    config = dataclasses.replace(config)  # what is found out goes into the run's copy
    validate(config)
    run = Path(resume or config.out)
    folder = checkpoint.newest(run) if resume else None
    if not resume and not overwrite and (done := checkpoint.list_checkpoints(run)):
        raise CheckpointError(
            f"{run} holds a run (at {done[-1].name}): --resume {run} goes on with it, --out FOLDER puts the new one "
            "elsewhere, --overwrite starts anew"
        )
    if dataset is None:  # opened first: a bad row is told of before gigabytes are read
        if not config.data:
            raise data.DataError(
                f"{run} was trained on a data set of your own: train.train(config, dataset, resume=run)"
            )
        dataset = data.Fill50K(config.data, None, config.hint_channels, config.hint_resample)
    model = ControlLDM.from_file(
        run if resume else config.base,
        attach=True,
        hint_channels=config.hint_channels,
        prediction=config.prediction,
        seed=config.seed,
        base=config.base,
        control=None if resume else config.control,
        vae=config.vae,
        ema=config.ema,
        clip_skip=config.clip_skip,
    ).to(config.device)
    config.prediction = model.config.prediction
    origin = {"base": frozen.fingerprint(model.unet, ("input_blocks.",)), "data": getattr(dataset, "fingerprint", "")}
    trained, optimizer, scaler, autocast = assemble(config, model)
    state, carried = {"step": 0, "samples": 0} | origin, {}
    if folder:
        state = checkpoint.restore_training(folder, trained, optimizer, scaler)
        for name, path in (("base", config.base), ("data", config.data)):
            if state.get(name, origin[name]) != origin[name]:
                raise CheckpointError(f"{path}: not the {name} that {run} was trained on (its content is another)")
        before = checkpoint.load_state_dict(folder / "trained.safetensors")
        carried = {k: v for k, v in before.items() if k not in trained}  # trained once and locked now: still part of it
    if state["step"] >= config.steps:
        raise CheckpointError(f"{run}: is at step {state['step']} already; --steps {config.steps} asks for no more")

    prepared = prepare(config, model, dataset)
    watch = Watch(config, model, prepared, autocast)
    run.mkdir(parents=True, exist_ok=True)
    if not resume:  # what a run that was stopped before its first checkpoint, or is to be overwritten, left
        for leftover in ("checkpoints", "image_log"):
            shutil.rmtree(run / leftover, ignore_errors=True)
    checkpoint.save_json(run / "config.json", dataclasses.asdict(config))
    metrics = log.Metrics(run, state["step"])
    meter = log.Meter(run, metrics, config.logger_freq, watch.losses, watch.draw)
    consumed, total = state["samples"], (config.steps - state["step"]) * config.batch
    loader = data.batches(
        prepared.samples, consumed, consumed + total, config.batch_size, config.workers, "cuda" in config.device
    )
    announce(config, model, trained, prepared, state["step"])

    with tqdm(total=config.steps, initial=state["step"], desc="training", unit="step", disable=None) as bar:
        for step in range(state["step"], config.steps):
            meter.measure(step)
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            loss, norm = optimizer_step(config, model, trained, optimizer, scaler, autocast, loader)
            values = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate(config, step)}
            rate = config.batch / (time.perf_counter() - start)
            metrics.add(step + 1, **values, images_per_second=round(rate, 4))
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.1f} images/s{meter.last}")
            bar.update()
            consumed += config.batch
            if (step + 1) % config.checkpoint_freq == 0 or step + 1 == config.steps:
                state = origin | {"step": step + 1, "samples": consumed}
                folder = save(run, config, model, trained | carried, optimizer, scaler, state)
    meter.measure(config.steps, last=True)
    report(run, folder, metrics, prepared)
    return run


def announce(config: Config, model: ControlLDM, trained: dict, prepared: Prepared, step: int) -> None:
    """One line on what is about to happen."""
    millions = sum(p.numel() for p in trained.values()) / 1e6
    count, decoder = len(prepared.samples.indices), "" if config.sd_locked else " and the unlocked decoder"
    print(
        f"{model.config.name}: training a ControlNet{decoder} of {millions:.1f} M parameters on {count} samples of "
        f"{config.resolution}, {config.batch} a step, {config.precision}, on {config.device}; "
        f"steps {step} to {config.steps}"
    )


def report(run: Path, folder: Path, metrics: log.Metrics, prepared: Prepared) -> None:
    """What came of it, where it is, and how to draw with it."""
    steps, gains = metrics.series("control_gain")
    at = log.sudden_convergence(steps, gains)
    if at is not None:
        print(f"sudden convergence at step {at}; control gain now {gains[-1]:.3f}")
    elif gains:
        print(f"the hint is not obeyed yet (control gain {gains[-1]:.3f}); Stable Diffusion takes 3000 to 7000 steps")
    samples, shown = prepared.samples, prepared.validation[0]
    hint = data.save_hint(run / "hint", samples.triples.hint(shown))
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else "python"
    draw = [python, "sampler.py", "--model", str(run), "--hint", str(hint)]
    draw += ["--prompt", samples.triples.prompt(shown), "--out", "samples"]
    print(
        f"pictures:  {run / 'image_log'}, {run / 'curves.png'}\n"
        f"trained:   {folder / 'trained.safetensors'}\n"
        f"draw:      {shlex.join(draw)}"
    )


# --------------------------------------------------------------------------------------------------------------- CLI
def parse(argv: list[str] | None) -> tuple[Config, str | None, bool]:
    """Flags -> configuration, the run to resume if any, whether to overwrite one.

    Later wins: defaults, demo or resumed run, flags.
    """
    parser = argparse.ArgumentParser(
        description="Train a ControlNet. Without --base and --data: the demo, circles on the tiny base.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--resume", metavar="RUN", help="folder of a run to go on with")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    groups = {}
    for f in dataclasses.fields(Config):
        name, text = f.metadata["group"], f.metadata["help"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        default = f" (default: {f.default})" if f.default != "" else ""
        flag = "--" + f.name.replace("_", "-")
        if f.type is bool or f.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text + default)
        else:
            kind = {"int": int, "float": float, "str": str}[f.type if isinstance(f.type, str) else f.type.__name__]
            group.add_argument(flag, type=kind, choices=f.metadata["choices"], help=text + default)
    given = vars(parser.parse_args(argv))
    resume, overwrite = given.pop("resume", None), given.pop("overwrite", False)
    if resume:
        if overwrite or "out" in given:
            raise CheckpointError("--resume goes on in the run's own folder: no --out, no --overwrite")
        settings = {k: v for k, v in checkpoint.load_run(resume).items() if k in Config.__dataclass_fields__}
        plain = lambda k, v: data.parse_resolution(v) if k == "resolution" else v
        changed = [k for k in FIXED_ON_RESUME if k in given and plain(k, given[k]) != plain(k, settings[k])]
        if changed:
            raise CheckpointError(
                f"{resume}: --{changed[0].replace('_', '-')} cannot change on resume; it was {settings[changed[0]]!r}"
            )
    elif "base" not in given and "data" not in given:
        settings = dict(DEMO)
    elif "base" in given and "data" in given:
        settings = {"out": f"runs/{Path(given['data']).resolve().name}"}
    else:
        raise CheckpointError(
            "give --base (a Stable Diffusion file) and --data (a folder) both, or neither for the demo"
        )
    config = Config(**(settings | given))
    return config, resume, overwrite


def validate(config: Config) -> None:
    """Refuse settings that make no sense, by name."""
    if not config.base or not config.out:
        raise CheckpointError(f"--{'out' if config.base else 'base'} is not set")
    if not 1 <= config.log_steps <= 999:
        raise CheckpointError(f"--log-steps is {config.log_steps}, should be 1 to 999")
    for name in (
        "steps",
        "log_images",
        "batch_size",
        "accumulate_grad_batches",
        "hint_channels",
        "checkpoint_freq",
        "encode_batch_size",
    ):
        if getattr(config, name) < 1:
            raise CheckpointError(f"--{name.replace('_', '-')} is {getattr(config, name)}, should be 1 or more")
    if not 0 <= config.drop_prompt <= 1:
        raise CheckpointError(f"--drop-prompt is {config.drop_prompt}, should be 0 to 1")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError(f"--device {config.device}: this PyTorch sees no GPU; --device cpu works, slowly")


def main(argv: list[str] | None = None) -> None:
    config, resume, overwrite = parse(argv)
    if config.data == DEMO["data"] and not (Path(config.data) / "prompt.json").exists():
        circles.make(config.data)
    try:
        train(config, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        run = resume or config.out
        done = checkpoint.list_checkpoints(run)
        say = (
            f"python train.py --resume {run} goes on from {done[-1].name}" if done else "no checkpoint was written yet"
        )
        sys.exit(f"train.py: stopped; {say}")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, data.DataError) as e:  # a bad input: one line, no traceback
        sys.exit(f"train.py: {e}")
