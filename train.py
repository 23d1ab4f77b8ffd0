"""Train a ControlNet: the loss, the step and the loop, top to bottom.

    python train.py                                             the demo: circles on the tiny base model that ships
    python train.py --base sd15.safetensors --data data/fill50k --out runs/fill50k
    python train.py --resume runs/fill50k                       continue where the run stopped
    python train.py --report runs/fill50k                       write the page of the run again
    torchrun --nproc-per-node 4 train.py --base ... --data ...  on four GPUs

`diffusion_loss` is the objective, `train` puts the parts together, `training_loop` is the loop. What is frozen is
computed once (`training/cache.py`); what is random is a function of (seed, sample number), so a run that was stopped
and resumed equals the run that was not stopped, bit for bit. A run is a folder: `config.json`, `metrics.jsonl`,
`report.html`, `curves.png`, `image_log/`, `checkpoints/`. Follows Zhang et al. 2023 (arXiv:2302.05543).
"""

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from config import DEMO, Config, check_device, parse, parse_flags
from training.console import protect_output, run_program

if __name__ == "__main__":  # --help and wrong flags are answered before the imports below, which take seconds
    protect_output()
    parse_flags(None)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from ldm import ControlLDM, use_tf32
from lowvram.estimate import choose_preset, explain_oom, plan
from lowvram.process import disable_malloc_trim, peak_memory
from report.page import RunPage, write_report
from sampler import alphas_cumprod, alphas_tensor, q_sample, velocity
from toy import circles
from training.cache import VAE_ENCODER, fingerprint, prepare_batch
from training.checkpoints import (
    checkpoint_on_error,
    read_state,
    restore_state,
    save_checkpoint,
    set_later_aside,
)
from training.distributed import Ranks
from training.graph import GradientGraph, is_recorded
from training.health import cause_of_failure
from training.history import History, dataset_facts, machine
from training.interruption import Interruption
from training.preparation import build_samples, fit_hint_encoder, open_dataset
from training.records import Metrics, read_metrics
from training.run_folder import RunFolder
from training.setup import Trainer, build_trainer, loading_formats, update_ema, zero_grad
from training.summary import print_summary, print_trial, report
from training.validation import Validation
from weights import CheckpointError, ModelSource, load_model
from weights.runs import list_checkpoints, load_state, newest_checkpoint, run_of
from weights.source import unet_weights

__all__ = ["Config", "diffusion_loss", "train"]


# -------------------------------------------------------------------------------------------------------------- loss
def diffusion_loss(
    model: ControlLDM, batch: dict[str, Tensor], min_snr_gamma: float = 0.0, huber: float = 0.0
) -> Tensor:
    """The loss of each sample, (B,) float32: the mean squared error of the steered UNet's prediction.

    `batch`: latents (B,4,h,w), scaled; context (B,77,D); hint (B,C,8h,8w) in [0,1]; timesteps (B,) int64; noise
    (B,4,h,w); for SDXL y (B,2816). The target is the noise, or the velocity for v models. Nothing of the locked encoder
    requires a gradient, so it leaves no graph; of the locked decoder autograd keeps what the gradient of the residuals
    needs.
    `min_snr_gamma`: weigh timesteps as Hang et al. 2023 (arXiv:2303.09556); 0: all alike. `huber`: from this error on
    the loss grows linearly; 0: squared everywhere. (It is twice Huber's loss: equal to the square for small errors.)
    """
    latents, noise, timesteps, context = (batch[name] for name in ("latents", "noise", "timesteps", "context"))
    alphas = alphas_cumprod(model.config, latents.device)[timesteps]  # (B,)
    x_t = q_sample(latents, noise, alphas)
    y = {"y": batch["y"]} if "y" in batch else {}
    residuals = model.control_model(x_t, batch["hint"], timesteps, context, **y)
    predicted = model.unet(x_t, timesteps, context, control=residuals, **y).float()
    predicts_v = model.config.prediction == "v"
    target = (velocity(latents, noise, alphas) if predicts_v else noise).float()
    if huber:
        error = 2 * F.huber_loss(predicted, target, reduction="none", delta=huber)
    else:
        error = F.mse_loss(predicted, target, reduction="none")
    loss = error.flatten(1).mean(1)
    if min_snr_gamma:
        snr = alphas / (1 - alphas)
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1 if predicts_v else snr)
    return loss


def compiled_loss(dynamic: bool = False) -> Callable[..., Tensor]:
    """`diffusion_loss` with kernels made by torch.compile, in which the noise schedule is a constant. `dynamic`: for
    images of several sizes."""
    torch.compiler.assume_constant_result(alphas_tensor)
    return torch.compile(diffusion_loss, dynamic=dynamic)


def accumulate_gradient(
    trainer: Trainer, loss_fn: Callable[..., Tensor], batch: dict[str, Tensor], last: bool
) -> Tensor:
    """Add the gradient of a micro-batch to that of the step, in which every loss is divided by the samples of the whole
    step. Returns its part of the step's loss, (). `last`: the gradients are complete afterwards."""
    loss = loss_fn(trainer.model, batch).sum() / trainer.config.batch
    with trainer.home.offload_grads(last):
        trainer.scaler.scale(loss.to(trainer.home.device)).backward()
    return loss.detach()


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step `step` (from 0): it rises in the warm-up, then stays or falls to 2% in `lr_steps`. A
    function of settings and step alone: a resumed run has the rates of a run that was not stopped."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = min(1.0, step / (config.lr_steps or config.steps))
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * warm * (0.02 + 0.98 * factors[config.lr_schedule])


# ---------------------------------------------------------------------------------------------------------- the loop
def training_loop(
    trainer: Trainer,
    loader: Iterator[dict[str, Any] | list[dict[str, Any]]],
    loss_fn: Callable[..., Tensor],
    ranks: Ranks,
    validation: Validation | None,
    save: Callable[..., bool],
    interruption: Interruption,
) -> int:
    """Make all steps from `trainer.step` to `config.steps`. Returns the last step that was saved.

    loader: micro-batches, each a batch as a dictionary, or several of them with images of different sizes;
    loss_fn(model, batch) -> (B,); validation: on rank 0 alone; save: writes a checkpoint and says whether it could;
    interruption: a signal stops the loop after a checkpoint.
    """
    config, model, optimizer, scaler = trainer.config, trainer.model, trainer.optimizer, trainer.scaler
    home, health = trainer.home, trainer.health
    masters = home.masters.values()  # the weights that the optimizer moves
    accumulate = functools.partial(accumulate_gradient, trainer, loss_fn)
    if is_recorded(config) and not trainer.graph:
        trainer.graph = GradientGraph(accumulate, trainer.trainable.values())
    accumulate = trainer.graph or accumulate
    saved, skipped, error = trainer.step, 0, None
    with tqdm(total=config.steps, initial=trainer.step, desc="training", unit="step", disable=None) as bar:
        while trainer.step < config.steps:
            if validation:  # on rank 0 alone
                validation.measure(trainer.step)
            started = time.perf_counter()

            # The gradient, summed over micro-batches.
            loss = torch.zeros((), device=config.device)
            for i in range(config.accumulate_grad_batches):
                try:
                    micro_batch = next(loader)
                except Exception as e:  # a file is gone, a worker died: end in order, on all ranks
                    error = e
                if stopping := ranks.any(interruption.requested or error is not None):
                    break
                parts = micro_batch if isinstance(micro_batch, list) else [micro_batch]
                for k, samples in enumerate(parts, 1):  # one part, unless images have several sizes
                    batch = prepare_batch(model, samples, config.device, config.encode_batch_size)
                    last = i + 1 == config.accumulate_grad_batches and k == len(parts)
                    # gradients are final after the last part, unless the ranks have yet to sum them
                    loss += accumulate(batch, last and ranks.count == 1)
            if stopping:
                zero_grad(trainer)
                break

            # The sum over the ranks.
            ranks.sum([*(p.grad for p in trainer.trainable.values() if p.grad is not None), loss])

            # Clipping, on the gradients as they are without the scale of fp16.
            home.wait_for_grads()
            scaler.unscale_(optimizer)
            with_grad = [p for p in masters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad])
            loss, grad_norm = loss.item(), norm.item()
            if config.clip_grad_norm and not grad_norm <= config.clip_grad_norm:  # a norm that is nan included
                torch.nn.utils.clip_grads_with_norm_(with_grad, config.clip_grad_norm, norm)

            # The step of the optimizer, unless loss or gradient are not finite (an enabled scaler sees to that itself,
            # and lowers its scale).
            rate = learning_rate(config, trainer.step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate_factor", 1.0)
            finite = math.isfinite(loss + grad_norm)
            trainer.between_steps = False
            if finite or scaler.is_enabled():
                scaler.step(optimizer)
            if finite:
                update_ema(trainer)
            scaler.update()
            home.upload_weights()
            zero_grad(trainer)
            trainer.step += 1
            trainer.samples += config.batch
            trainer.between_steps = True

            # Records, checkpoints, and the end of a run that diverged.
            skipped = 0 if finite else skipped + 1
            health.observe(loss, finite or (scaler.is_enabled() and math.isfinite(loss)))  # fp16 overflows now and then
            if skipped > config.max_skipped:
                raise CheckpointError(
                    f"{skipped} steps in a row had a loss or gradient that is not finite (now step {trainer.step}); "
                    f"the last checkpoint is of step {saved}; {cause_of_failure(model)}"
                )
            if validation:
                speed = config.batch / (time.perf_counter() - started)
                measured = dict(loss=loss, grad_norm=grad_norm, learning_rate=rate, images_per_second=round(speed, 4))
                validation.record(trainer.step, **measured)
                used = peak_memory(config.device)
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} images/s, {used}{validation.last_gain}")
                bar.update()
                if (trainer.step % config.checkpoint_freq == 0 or health.postponed) and save():
                    saved = trainer.step

        if validation and trainer.step > saved and save(final=True):  # at the end, or when stopped
            saved = trainer.step
        if validation and trainer.step == config.steps:
            validation.measure(config.steps, last=True)
    if error:
        raise error
    return saved


# ---------------------------------------------------------------------------------------------------- the parts of it
def train(
    config: Config,
    dataset: Sequence[dict[str, Any]] | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    data_changed: bool = False,
) -> Path:
    """Train as `config` says and return the run's folder.

    `dataset`: any array-like of dict(jpg (H,W,3) float32 in [-1,1], txt, hint (H,W,C) float32 in [0,1]), instead of the
    folder `config.data`; further keys reach the batch of the loss under their own names. `resume`: the folder of a run
    to continue, which is then also where the results go, or one of its checkpoints. `overwrite`: start anew in a folder
    that holds a run. `data_changed`: accept on resume that rows of the data set are others. Raises CheckpointError,
    DataError or ConfigError, one line each, for what cannot be trained on or saved.
    """
    check_device(config.device)
    ranks, device_flag = Ranks(config.device), config.device
    if dataset is not None and len(dataset) and not (config.resolution or config.buckets):
        height, width = np.shape(dataset[0]["jpg"])[:2]
        config = dataclasses.replace(config, resolution=f"{width}x{height}")
    config = choose_preset(dataclasses.replace(config, device=ranks.device), ranks)
    run = run_of(resume) if resume else Path(config.out)
    run_folder = RunFolder(run, config, device_flag)
    owner = run_folder.lock() if ranks.main else contextlib.nullcontext()
    with Interruption() as interruption, owner, explain_oom(config, run):
        folder = find_checkpoint(run, resume, overwrite, ranks)
        config.lr_steps = schedule_length(config, folder)
        set_process_options(config)
        dataset = open_dataset(config, dataset, run)  # before the model: a bad row is told before gigabytes are read
        source = model_source(config, run if resume else None)
        model = load_model(source, **loading_formats(config))
        config.prediction = model.config.prediction
        unrounded = None if model.unet.dtype == torch.float32 else unet_weights(source)
        origin = {
            "base": fingerprint(model.unet, ("input_blocks.",), unrounded),
            "vae": fingerprint(model.vae, VAE_ENCODER),
            "data": getattr(dataset, "fingerprint", ""),
        }
        rows = dataset.row_digests() if isinstance(dataset, data.FolderDataset) else []
        older_rows = functools.partial(dataset.row_digests, True) if rows else None
        state = read_state(folder, config, origin, rows, data_changed, older_rows) if folder else None
        if state:
            config.bucket_batch = state["config"].get("bucket_batch", 0)  # the order of the samples stays as it was
        samples, validation_items, uncond = build_samples(config, model, dataset)
        if config.normalize_hint_encoder and not folder:
            fit_hint_encoder(model.control_model, samples)
        trainer = build_trainer(config, model)
        trainer.rows = rows
        if folder:
            restore_state(trainer, folder, state)
        loss_fn = compiled_loss(config.buckets) if config.compile else diffusion_loss
        validation = None
        if ranks.main:
            run_folder.prepare(anew=not folder)
            run_folder.remove_later_images(trainer.step)
            metrics = Metrics(run, trainer.step, config.tensorboard)
            history, page = History(run), RunPage(run, metrics)
            with run_folder.guard("history.jsonl"):
                facts = dataset_facts(config, samples, validation_items)
                history.start(trainer.step, data=facts, machine=machine(config.device))
            validation = Validation(  # with the plain loss: compiling it without gradients too takes minutes more
                trainer, samples, validation_items, uncond, diffusion_loss, run_folder, metrics, history, page
            )
            print_summary(trainer, samples, len(validation_items))
        end = trainer.samples + (config.steps - trainer.step) * config.batch
        loader = data.batches(
            samples, trainer.samples, end, config.batch_size, config.workers, "cuda" in config.device, ranks.rank,
            ranks.count, data.group_by_size,
        )  # fmt: skip
        weighted_loss = functools.partial(loss_fn, min_snr_gamma=config.min_snr_gamma, huber=config.huber)
        save = functools.partial(save_checkpoint, run_folder, trainer, origin)
        interruption.begin_loop()
        with checkpoint_on_error(run_folder, trainer, save) if ranks.main else contextlib.nullcontext():
            saved = training_loop(trainer, loader, weighted_loss, ranks, validation, save, interruption)
        trainer.graph = None  # it knows the trainer: together they would keep their memory
        if ranks.main:
            report(run, saved, config.steps, metrics, samples, validation_items[0], model.config.name)
            with run_folder.guard("report.html"):
                page.write(last=True)
            if saved < trainer.step:
                raise CheckpointError(f"{run}: step {trainer.step} could not be saved; the last one saved is {saved}")
    return run


def find_checkpoint(run: Path, resume: str | Path | None, overwrite: bool, ranks: Ranks) -> Path | None:
    """The checkpoint with which to continue, or None for a new run. CheckpointError if the folder of a new run holds
    another run already."""
    if resume:
        if ranks.main:
            set_later_aside(resume)
        ranks.any(False)  # the other ranks wait for rank 0 here
        return newest_checkpoint(run)
    if not overwrite and (done := list_checkpoints(run)):
        raise CheckpointError(
            f"{run} holds a run (at {done[-1].name}): --resume {run} continues it, --out FOLDER puts the new run "
            "elsewhere, --overwrite starts anew"
        )
    return None


def schedule_length(config: Config, folder: Path | None) -> int:
    """The number of steps over which the learning rate falls: a part of the run, which more --steps do not stretch.

    Says what happens to the rate where a resumed run has another length, or more steps than its schedule."""
    if not folder:
        return config.lr_steps or config.steps
    state = load_state(folder)
    before = state["config"].get("lr_steps") or state["config"]["steps"]
    length = config.lr_steps or before
    if config.lr_schedule == "constant":
        return length
    rates = [learning_rate(dataclasses.replace(config, lr_steps=n), state["step"]) for n in (before, config.steps)]
    if length != before:
        rates[1] = learning_rate(dataclasses.replace(config, lr_steps=length), state["step"])
        print(f"--lr-steps is {length} instead of {before}: learning rate {rates[1]:.3g} instead of {rates[0]:.3g}")
    elif config.steps > length:
        print(
            f"the learning rate has fallen to {rates[0]:.3g} by step {length} and stays there; --lr-steps "
            f"{config.steps} would stretch the schedule (learning rate {rates[1]:.3g} now)"
        )
    return length


def set_process_options(config: Config) -> None:
    """Switch determinism, tf32 and the behaviour of malloc for the whole process."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    use_tf32(config.precision != "fp32")
    disable_malloc_trim()


def model_source(config: Config, resume: Path | None) -> ModelSource:
    """Which model to train: the base with a ControlNet, or the run to resume with the weights of its newest checkpoint
    (not their average)."""
    return ModelSource(
        resume or config.base, base=config.base if resume else "", control="" if resume else config.control,
        vae=config.vae, ema=config.ema, use_run_ema=False, prediction=config.prediction, clip_skip=config.clip_skip,
        zero_terminal_snr=config.zero_terminal_snr, attach=True, hint_channels=config.hint_channels, seed=config.seed,
        control_depth="" if resume else config.control_depth,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- CLI
def main(argv: list[str] | None = None) -> None:
    command = parse(argv)
    if command.report:
        return print(f"page:      {write_report(command.report, command.config.out)}")
    if command.plan:
        entries = read_metrics(command.resume) if command.resume else []
        speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
        rate = command.rate or (statistics.median(speeds) if speeds else None)
        return print(plan(command.config, command.vram, rate, processes=os.cpu_count() or 1))
    if command.config.data == DEMO["data"] and not data.is_dataset(DEMO["data"]):
        circles.make(DEMO["data"])
    if command.trial:
        print_trial(command.config)
    train(command.config, None, command.resume, command.overwrite, command.data_changed)


if __name__ == "__main__":
    run_program(
        "train.py",
        main,
        interrupted="ended by Ctrl-C; --resume continues from the last checkpoint",
        leaner="a smaller --resolution or --batch-size takes less (--plan tells how much)",
    )
