"""Train a ControlNet: the whole loop, top to bottom.

    python train.py                                             the demo: circles on the tiny base that ships
    python train.py --base sd15.safetensors --data data/fill50k --out runs/fill50k
    python train.py --resume runs/fill50k                       go on where it stopped
    torchrun --nproc-per-node 4 train.py --base ... --data ...  on four GPUs

One step is in `engine.py`. Whatever is frozen is computed once (`frozen.py`); whatever is random is a function of
(seed, sample number), so a run that was stopped and resumed is the run that was not. A run is a folder: `config.json`,
`metrics.jsonl`, `curves.png`, `image_log/`, `checkpoints/`.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import circles
import data
import frozen
import log
import memory
from checkpoint import CheckpointError
from config import DEMO, Config, parse
from controlnet import ControlLDM, computed_in, use_tf32
from engine import Engine, assemble, diffusion_loss, learning_rate
from parallel import Ranks
from plan import describe, plan, settle, what_fits
from watch import Watch, report

__all__ = ["Config", "diffusion_loss", "train"]


# -------------------------------------------------------------------------------------------------------------- data
@dataclass
class Prepared:
    """The data set as the loop reads it."""

    samples: data.Samples
    validation: list[int]  # indices of the held-out items
    uncond: Tensor  # (77,D): the context of the empty prompt


def prepare(config: Config, model: ControlLDM, dataset: data.Fill50K | Sequence[dict[str, Any]]) -> Prepared:
    """Settle the data set's size, hold out the validation items, and fill the caches; VAE and text tower, in the
    precision of the run, are in memory only as long as they are needed."""
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
    for part in (model.vae, model.text):
        part.to(config.device, computed_in(config.precision, config.device))
    with torch.no_grad():
        uncond = model.encode_prompts("")[0].float().cpu()
        if config.cache:
            once = frozen.freeze(model, triples, config.cache_dir, config.encode_batch_size)
            frozen.rest(model)
    factor = model.vae.factor
    shape = (model.config.unet.in_channels, size[1] // factor, size[0] // factor)
    chance = data.Chance(
        model.config.timesteps, **{f.name: getattr(config, f.name) for f in dataclasses.fields(data.Chance)[1:]}
    )
    return Prepared(data.Samples(triples, train, config.seed, shape, chance, once), validation, uncond)


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
    """The model that `config` describes, with a ControlNet, on the CPU; of a run to resume, with its newest weights."""
    return ControlLDM.from_file(
        resume or config.base, attach=True, hint_channels=config.hint_channels, prediction=config.prediction,
        seed=config.seed, base=config.base if resume else None, control=None if resume else config.control,
        vae=config.vae, ema=config.ema, clip_skip=config.clip_skip, zero_terminal_snr=config.zero_terminal_snr,
        averaged=False,
    )  # fmt: skip


def reopen(folder: Path, config: Config, origin: dict[str, str]) -> dict[str, Any]:
    """The state of the checkpoint `folder`. CheckpointError when base or data are not those that the run began with."""
    state = checkpoint.load_json(folder / "state.json")
    for name, path in (("base", config.base), ("vae", config.vae or config.base), ("data", config.data)):
        if state.get(name, origin[name]) != origin[name]:
            raise CheckpointError(f"{path}: not the {name} that {folder} was trained on (its content is another)")
    if state["step"] >= config.steps:
        raise CheckpointError(f"{folder}: is at step {state['step']}; --steps {config.steps} asks for no more")
    return state


def restore(engine: Engine, folder: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """Bring `engine` to the checkpoint `folder` (its weights came with the model). Returns the weights that trained
    once and are locked now."""
    checkpoint.restore_training(folder, engine.masters, engine.optimizer, engine.scaler, memory.adopt)
    engine.steps = state["step"]
    if engine.average and (folder / "average.safetensors").exists():
        kept = checkpoint.load_state_dict(folder / "average.safetensors")
        for name in engine.average.keys() & kept.keys():
            engine.average[name].copy_(kept[name])
    before = checkpoint.load_state_dict(folder / "trained.safetensors")
    return {k: v for k, v in before.items() if k not in engine.trained}


def save(run: Path, engine: Engine, carried: dict[str, Tensor], state: dict[str, Any]) -> bool:
    """Write the checkpoint of `state["step"]`: all of the ControlNet (also what does not train in this mode), the
    decoder if it trains, and `carried`. False, with a line, if the disk does not take it; older ones stay."""
    config, model = engine.config, engine.model
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("control_model.")} | carried | engine.masters
    metadata = {"config": model.config.to_json(), "step": str(state["step"]), "sd_locked": json.dumps(config.sd_locked)}
    state = state | {"config": dataclasses.asdict(config), "ranks": engine.ranks.count}
    files = {"trained": weights} | ({"average": engine.average} if engine.average else {})
    try:
        checkpoint.save_training(
            run, files, metadata, engine.masters, engine.optimizer, engine.scaler, state, config.keep_checkpoints,
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
    asked = config.device  # what is found out goes into the run's copy of the settings
    ranks = Ranks(config.device)
    if dataset is not None and len(dataset) and not config.resolution:
        height, width = np.shape(dataset[0]["jpg"])[:2]
        config = dataclasses.replace(config, resolution=f"{width}x{height}")
    config = settle(dataclasses.replace(config, device=ranks.device), ranks)
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
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with telling_what_fits(config, run):
        return fit(config, run, folder, dataset, ranks, asked)


@contextlib.contextmanager
def telling_what_fits(config: Config, run: Path) -> Iterator[None]:
    """Out of the GPU's memory: say what was going on, and what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        kept = [f" (its last checkpoint, {p.name}, is whole)" for p in checkpoint.list_checkpoints(run)[-1:]]
        raise CheckpointError(
            f"{run}{''.join(kept)}: out of memory on {config.device} with {config.resolution}, batch "
            f"{config.batch_size} x {config.accumulate_grad_batches}, {describe(config)}; "
            f"{memory.used(config.device)} were used; "
            f"{what_fits(config)} (--plan tells more)"
        ) from e


def fit(
    config: Config, run: Path, folder: Path | None, dataset: data.Fill50K | Sequence, ranks: Ranks, asked: str
) -> Path:
    """The run itself, from the checkpoint `folder` if there is one. `asked`: the device as the user named it."""
    use_tf32(config.precision == "tf32")
    memory.keep_freed()
    model = load(config, run if folder else None)
    config.prediction = model.config.prediction
    origin = {
        "base": frozen.fingerprint(model.unet, ("input_blocks.",)),
        "vae": frozen.fingerprint(model.vae, frozen.VAE_ENCODER),
        "data": getattr(dataset, "fingerprint", ""),
    }
    state = reopen(folder, config, origin) if folder else {"step": 0, "samples": 0}
    prepared = prepare(config, model, dataset)
    engine = assemble(config, model, ranks)
    carried = restore(engine, folder, state) if folder else {}
    first, consumed, saved, skipped = state["step"], state["samples"], state["step"], 0
    record = None
    if ranks.main:
        open_run(run, dataclasses.replace(config, device=asked), anew=not folder)
        metrics = log.Metrics(run, first, config.tensorboard)
        watch = Watch(config, model, prepared.samples, prepared.validation, prepared.uncond, engine.loss)
        record = log.Meter(run, metrics, config.logger_freq, watch.losses, watch.draw, engine.averaged)
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
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} images/s, {memory.used(config.device)}{record.last}")
                bar.update()
                if (step + 1) % config.checkpoint_freq == 0 and save(run, engine, carried, state):
                    saved = step + 1
        if record:
            if state["step"] > saved and save(run, engine, carried, state):  # at the end, or asked to stop
                saved = state["step"]
            if state["step"] == config.steps:
                record.measure(config.steps, last=True)
    if record:
        report(run, saved, metrics, prepared.samples, prepared.validation[0], config.steps)
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
        f"{config.resolution}, {config.batch} a step, {config.precision} ({config.memory}), on {config.device}; "
        f"steps {step} to {config.steps}"
    )


# --------------------------------------------------------------------------------------------------------------- CLI
def main(argv: list[str] | None = None) -> None:
    asked = parse(argv)
    if asked.plan:
        speeds = [e["images_per_second"] for e in log.read_metrics(asked.resume or "") if "images_per_second" in e]
        return print(plan(asked.config, asked.vram, asked.rate or (statistics.median(speeds) if speeds else None)))
    if asked.config.data == DEMO["data"] and not (Path(DEMO["data"]) / "prompt.json").exists():
        circles.make(DEMO["data"])
    train(asked.config, resume=asked.resume, overwrite=asked.overwrite)


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, data.DataError) as e:  # a bad input: one line, no traceback
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped at once; --resume goes on from the last checkpoint, caches keep what they have")
