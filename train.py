"""Train a ControlNet: the whole loop, top to bottom.

    python train.py                                             the demo: circles on the tiny base that ships
    python train.py --base sd15.safetensors --data data/fill50k --out runs/fill50k
    python train.py --resume runs/fill50k                       go on where it stopped
    torchrun --nproc-per-node 4 train.py --base ... --data ...  on four GPUs

A step draws latents, noise them to a random timestep, lets the ControlNet steer the locked UNet, and compares what the
UNet says with the noise. Whatever is frozen is computed once (`frozen.py`); whatever is random is a function of
(seed, sample number), so a run that was stopped and resumed is the run that was not. A run is a folder: `config.json`,
`metrics.jsonl`, `curves.png`, `image_log/`, `checkpoints/`. Follows Zhang et al. 2023 (arXiv:2302.05543).
"""

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from config import DEMO, Config, parse, validate
from controlnet import PRECISIONS, ControlLDM
from parallel import Ranks


# -------------------------------------------------------------------------------------------------------------- loss
def diffusion_loss(
    model: ControlLDM,
    latents: Tensor,
    context: Tensor,
    hint: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    only_mid_control: bool = False,
    min_snr_gamma: float = 0.0,
    huber: float = 0.0,
) -> Tensor:
    """Per-sample loss (B,), float32: the mean square of what the steered UNet gets wrong.

    latents (B,4,h,w), scaled; context (B,77,D); hint (B,C,8h,8w) in [0,1]; timesteps (B,) int64; noise (B,4,h,w). The
    target is the noise, or the velocity for v models. The locked encoder has no parameter that requires a gradient and
    so leaves no graph behind; of the locked decoder only what its activations' gradient needs is kept.
    `min_snr_gamma`: weigh timesteps as Hang et al. 2023 (arXiv:2303.09556), 0 not at all. `huber`: from this error on
    the loss grows linearly (twice Huber's, so that it begins as the square), 0 never.
    """
    alphas = sampler.alphas_cumprod(model.config, latents.device)[timesteps]
    x_t = sampler.q_sample(latents, noise, alphas)
    predicted = model.predict(x_t, timesteps, context, hint, only_mid_control).float()
    v = model.config.prediction == "v"
    target = sampler.velocity(latents, noise, alphas) if v else noise
    wrong = F.mse_loss(predicted, target.float(), reduction="none")
    if huber:
        wrong = 2 * F.huber_loss(predicted, target.float(), reduction="none", delta=huber)
    loss = wrong.flatten(1).mean(1)
    if min_snr_gamma:
        snr = alphas / (1 - alphas)
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1 if v else snr)
    return loss


def learning_rate(config: Config, step: int) -> float:
    """The rate of step `step` (from 0): rises over the warm-up; constant, or down to a fiftieth on a line or a cosine.

    A function of settings and step alone, so a resumed run has the rates of one that was not stopped.
    """
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    way = step / config.steps
    left = {"constant": 1.0, "linear": 1 - way, "cosine": 0.5 * (1 + math.cos(math.pi * way))}[config.lr_schedule]
    return rate * (0.02 + 0.98 * left)


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
    chance = data.Chance(
        model.config.timesteps, **{f.name: getattr(config, f.name) for f in dataclasses.fields(data.Chance)[1:]}
    )
    return Prepared(data.Samples(triples, train, config.seed, shape, chance, once), validation, uncond)


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


# ---------------------------------------------------------------------------------------------------------- one step
@dataclass
class Engine:
    """What a step needs: the model, which of its parameters train, and what moves them."""

    config: Config
    model: ControlLDM
    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    ranks: Ranks

    def step(
        self, batches: Iterator[dict[str, Any]], rate: float, stop: Callable[[], bool] = lambda: False
    ) -> tuple[float, float] | None:
        """One step at learning rate `rate` on `accumulate_grad_batches` of `batches`: mean loss of the samples, norm of
        the gradient. With a loss or gradient that is not finite the weights stay. None, with no trace, if `stop()`."""
        config, total = self.config, torch.zeros((), device=self.config.device)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for _ in range(config.accumulate_grad_batches):
            batch = to_device(self.model, next(batches), config.device)
            with self.autocast:
                losses = diffusion_loss(self.model, *batch, config.only_mid_control, config.min_snr_gamma, config.huber)
            loss = losses.sum() / config.batch
            self.scaler.scale(loss).backward()
            total += loss.detach()
            if self.ranks.any(stop()):
                self.optimizer.zero_grad(set_to_none=True)
                return None
        self.ranks.add_up([*(p.grad for p in self.trained.values() if p.grad is not None), total])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), config.clip_grad_norm or math.inf)
        if self.scaler.is_enabled() or math.isfinite(total.item() + norm.item()):
            self.scaler.step(self.optimizer)  # an enabled scaler looks for infinities itself, and lowers its scale
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item(), norm.item()


def assemble(config: Config, model: ControlLDM, ranks: Ranks | None = None) -> Engine:
    """Make `model` ready to train as `config` says. Frozen weights live in the precision that they are used in; trained
    ones stay fp32 under autocast."""
    trained, dtype, kind = choose_trained(model, config), PRECISIONS[config.precision], torch.device(config.device).type
    for name, p in model.named_parameters():
        if not p.requires_grad and not name.startswith("control_model."):
            p.data = p.data.to(dtype)
    model.unet.recompute = model.control_model.recompute = config.gradient_checkpointing
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    autocast = torch.autocast(kind, dtype, enabled=dtype != torch.float32)
    return Engine(config, model, trained, optimizer, scaler, autocast, ranks or Ranks())


# ------------------------------------------------------------------------------------------------------- interruption
class Interruption:
    """While it is entered, Ctrl-C and SIGTERM ask the loop to end in order; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.asked, self.before = False, {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


# ---------------------------------------------------------------------------------------------------------- the loop
def load(config: Config, resume: Path | None) -> ControlLDM:
    """The model that `config` describes, with a ControlNet; of a run to resume, with its newest weights."""
    return ControlLDM.from_file(
        resume or config.base, attach=True, hint_channels=config.hint_channels, prediction=config.prediction,
        seed=config.seed, base=config.base if resume else None, control=None if resume else config.control,
        vae=config.vae, ema=config.ema, clip_skip=config.clip_skip,
    ).to(config.device)  # fmt: skip


def restore(engine: Engine, folder: Path, origin: dict[str, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Bring `engine` to the checkpoint `folder`: its state, and the weights that were trained once and are locked now.

    Raises CheckpointError when base or data are not those that the run began with.
    """
    config, trained = engine.config, engine.trained
    state = checkpoint.restore_training(folder, trained, engine.optimizer, engine.scaler)
    for name, path in (("base", config.base), ("vae", config.vae or config.base), ("data", config.data)):
        if state.get(name, origin[name]) != origin[name]:
            raise CheckpointError(f"{path}: not the {name} that {folder} was trained on (its content is another)")
    if state["step"] >= config.steps:
        raise CheckpointError(f"{folder}: is at step {state['step']}; --steps {config.steps} asks for no more")
    before = checkpoint.load_state_dict(folder / "trained.safetensors")
    return state, {k: v for k, v in before.items() if k not in trained}


def save(run: Path, engine: Engine, carried: dict[str, Tensor], state: dict[str, Any]) -> bool:
    """Write the checkpoint of `state["step"]`: all of the ControlNet (also what does not train in this mode), the
    decoder if it trains, and `carried`. False, with a line, if the disk does not take it; older ones stay."""
    config, model = engine.config, engine.model
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("control_model.")} | carried | engine.trained
    metadata = {"config": model.config.to_json(), "step": str(state["step"]), "sd_locked": json.dumps(config.sd_locked)}
    state = state | {"config": dataclasses.asdict(config), "ranks": engine.ranks.count}
    try:
        checkpoint.save_training(
            run, weights, metadata, engine.trained, engine.optimizer, engine.scaler, state, config.keep_checkpoints,
            config.keep_every,
        )  # fmt: skip
    except OSError as e:
        tqdm.write(f"step {state['step']}: the checkpoint could not be written ({e}); older ones stay")
        return False
    return True


def train(
    config: Config,
    dataset: Sequence[dict[str, Any]] | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Train as `config` says and return the run's folder.

    `dataset`: any array-like of dict(jpg (H,W,3) float32 in [-1,1], txt, hint (H,W,C) float32 in [0,1]), instead of the
    folder `config.data`. `resume`: a run's folder to go on with; it is then also where the results go. `overwrite`:
    start anew in a folder that holds a run. Ctrl-C or SIGTERM end it early, with a checkpoint. Raises CheckpointError
    or DataError, one line each, for what cannot be trained on.
    """
    config, asked = dataclasses.replace(config), config.device  # what is found out goes into the run's copy
    validate(config)
    ranks = Ranks(config.device)
    config.device = ranks.device
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
    model = load(config, run if resume else None)
    config.prediction = model.config.prediction
    origin = {
        "base": frozen.fingerprint(model.unet, ("input_blocks.",)),
        "vae": frozen.fingerprint(model.vae, frozen.VAE_ENCODER),
        "data": getattr(dataset, "fingerprint", ""),
    }
    engine = assemble(config, model, ranks)
    state, carried = restore(engine, folder, origin) if folder else ({"step": 0, "samples": 0}, {})
    prepared = prepare(config, model, dataset)
    first, consumed, saved, skipped = state["step"], state["samples"], state["step"], 0
    record = None
    if ranks.main:
        open_run(run, dataclasses.replace(config, device=asked), anew=not resume)
        metrics = log.Metrics(run, first)
        watch = Watch(config, model, prepared, engine.autocast)
        record = log.Meter(run, metrics, config.logger_freq, watch.losses, watch.draw)
        announce(config, model, engine.trained, prepared, first)
    last = consumed + (config.steps - first) * config.batch
    loader = data.batches(
        prepared.samples, consumed, last, config.batch_size, config.workers, "cuda" in config.device, ranks.rank,
        ranks.count,
    )  # fmt: skip

    bar = tqdm(total=config.steps, initial=first, desc="training", unit="step", disable=None)
    with Interruption() as interruption, bar:
        for step in range(first, config.steps):
            if record:
                record.measure(step)
            start, rate = time.perf_counter(), learning_rate(config, step)
            result = engine.step(loader, rate, lambda: interruption.asked)
            if result is None:
                break
            loss, norm = result
            consumed += config.batch
            state = origin | {"step": step + 1, "samples": consumed}
            skipped = 0 if math.isfinite(loss + norm) else skipped + 1
            if skipped > config.max_skipped:
                raise CheckpointError(
                    f"{run}: {skipped} steps in a row had a loss or gradient that is not finite (now step {step + 1}); "
                    f"the last checkpoint is of step {saved}; a lower --learning-rate or --precision fp32 may help"
                )
            if record:
                speed = config.batch / (time.perf_counter() - start)
                values = dict(loss=loss, grad_norm=norm, learning_rate=rate, images_per_second=round(speed, 4))
                metrics.add(step + 1, **values)
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} images/s{record.last}")
                bar.update()
                if (step + 1) % config.checkpoint_freq == 0 and save(run, engine, carried, state):
                    saved = step + 1
        if record:
            if state["step"] > saved and save(run, engine, carried, state):  # at the end, or asked to stop
                saved = state["step"]
            if state["step"] == config.steps:
                record.measure(config.steps, last=True)
    if record:
        report(run, saved, metrics, prepared, config.steps)
    return run


def open_run(run: Path, config: Config, anew: bool) -> None:
    """Make the run's folder and write its settings. `anew`: what a run that was stopped before its first checkpoint, or
    that is to be overwritten, left there, goes."""
    run.mkdir(parents=True, exist_ok=True)
    for leftover in ("checkpoints", "image_log") if anew else ():
        shutil.rmtree(run / leftover, ignore_errors=True)
    checkpoint.save_json(run / "config.json", dataclasses.asdict(config))


def announce(config: Config, model: ControlLDM, trained: dict, prepared: Prepared, step: int) -> None:
    """One line on what is about to happen."""
    millions = sum(p.numel() for p in trained.values()) / 1e6
    count, decoder = len(prepared.samples.indices), "" if config.sd_locked else " and the unlocked decoder"
    print(
        f"{model.config.name}: training a ControlNet{decoder} of {millions:.1f} M parameters on {count} samples of "
        f"{config.resolution}, {config.batch} a step, {config.precision}, on {config.device}; "
        f"steps {step} to {config.steps}"
    )


def report(run: Path, saved: int, metrics: log.Metrics, prepared: Prepared, wanted: int) -> None:
    """What came of it, where it is, and how to go on or draw with it."""
    steps, gains = metrics.series("control_gain")
    at = log.sudden_convergence(steps, gains)
    if at is not None:
        print(f"sudden convergence at step {at}; control gain now {gains[-1]:.3f}")
    elif gains:
        print(f"the hint is not obeyed yet (control gain {gains[-1]:.3f}); Stable Diffusion takes 3000 to 7000 steps")
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else "python"
    if saved == 0:
        print(f"stopped before the first checkpoint: nothing to go on with in {run}")
        return
    if saved < wanted:
        print(f"stopped at step {saved} of {wanted}; this goes on: {python} train.py --resume {shlex.quote(str(run))}")
        return
    samples, shown = prepared.samples, prepared.validation[0]
    hint = data.save_hint(run / "hint", samples.triples.hint(shown))
    draw = [python, "sampler.py", "--model", str(run), "--hint", str(hint)]
    draw += ["--prompt", samples.triples.prompt(shown), "--out", "samples"]
    print(
        f"pictures:  {run / 'image_log'}, {run / 'curves.png'}\n"
        f"trained:   {checkpoint.newest(run) / 'trained.safetensors'}\n"
        f"draw:      {shlex.join(draw)}"
    )


# --------------------------------------------------------------------------------------------------------------- CLI
def main(argv: list[str] | None = None) -> None:
    config, resume, overwrite = parse(argv)
    if config.data == DEMO["data"] and not (Path(config.data) / "prompt.json").exists():
        circles.make(config.data)
    train(config, resume=resume, overwrite=overwrite)


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, data.DataError) as e:  # a bad input: one line, no traceback
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped at once; --resume goes on from the last checkpoint, caches keep what they have")
