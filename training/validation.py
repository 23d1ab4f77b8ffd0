"""Does the model converge? The control gain and the image log, on a validation batch that never changes.

A ControlNet learns suddenly: for thousands of steps nothing is to be seen, then within a few hundred the hint is
obeyed. Two measurements tell. The first is the *control gain*,

    control_gain = 1 - loss(right hints) / loss(hints of other samples),

which is 0 as long as the hint makes no difference. The second is a grid of images drawn from the validation hints. Both
use held-out items, fixed noise and fixed timesteps, so that successive measurements differ by the weights alone.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import data
from sampler import Control, Sampling, sample
from training.cache import prepare_batch
from training.history import History
from training.records import (
    Metrics,
    hint_image,
    save_curves,
    save_grid,
    sudden_convergence,
    to_uint8,
    turned_at,
)
from training.run_folder import RunFolder
from training.setup import Trainer, ema_weights, resting_weights


def held_out(count: int, wanted: int) -> range:
    """The items of a data set of `count` that are kept for validation: the last `wanted` ones, a tenth of a small data
    set, and never less than two."""
    return range(count - max(2, min(wanted, count // 10)), count)


class Validation:
    """Measures and draws every `logger_freq` steps (0: never), with the moving average of the weights if there is one.
    Until the sudden convergence the gain alone is measured ten times as often, so that its step is known to a tenth of
    `logger_freq` (with the demo's 100: to 10 steps). A `logger_freq` below 100 is often enough by itself.

    items: the held-out items of the data set; uncond: context (1,77,D) and pooled (1,P) or None of an empty
    negative prompt; loss_fn(model, batch) ->
    (B,). Measurements go to `metrics` and `curves.png` of the run's folder, images to its `image_log/`.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: data.Samples,
        items: list[int],
        uncond: tuple[Tensor, Tensor | None],
        loss_fn: Callable[..., Tensor],
        run_folder: RunFolder,
        metrics: Metrics,
        history: History | None = None,
        page: Any = None,
    ):
        self.trainer, self.samples, self.items, self.uncond = trainer, samples, items, uncond
        self.loss_fn, self.run_folder, self.metrics = loss_fn, run_folder, metrics
        self.history, self.page = history, page
        self.last_gain = ""  # for the progress bar
        self.converged = sudden_convergence(*metrics.series("control_gain")) is not None
        self.groups = group_positions([samples.shape_of(i) for i in items])  # images of one size, by position in items
        self.batches = self._fixed_batches()

    def _fixed_batches(self) -> list[dict[str, Any]]:
        """All items, repeated until there are at least 16 samples, at timesteps spread evenly over the schedule. Images
        of different sizes lie in batches of their own, which follow each other."""
        config, model_config = self.trainer.config, self.trainer.model.config
        items = [self.samples.item(i) for i in self.items]
        rounds = max(1, math.ceil(16 / len(items)))
        count = rounds * len(items)
        generator = torch.Generator().manual_seed(data.derive_seed("validation", config.seed))
        batches = []
        for r in range(rounds):
            for positions in self.groups:
                shape = (2, len(positions), *self.samples.shape_of(self.items[positions[0]]))
                noise, posterior_noise = torch.randn(shape, generator=generator)
                numbers = r * len(items) + torch.tensor(positions)
                timesteps = ((numbers + 0.5) * model_config.timesteps / count).long()
                fixed = {"timesteps": timesteps, "noise": noise, "posterior_noise": posterior_noise}
                batch = torch.utils.data.default_collate([items[k] for k in positions]) | fixed
                if len(positions) == 1:  # no other sample has this size: the hint of the next one is brought to it
                    batch["other_hint"] = self._resized_hint(items[(positions[0] + 1) % len(items)], batch["hint"])
                batches.append(batch)
        return batches

    def _resized_hint(self, item: dict[str, Any], hint: Tensor) -> Tensor:
        """The hint of `item`, scaled and cut to the size of `hint` (1,C,H,W)."""
        array = item["hint"].numpy().transpose(1, 2, 0)
        resample = data.RESAMPLE[self.trainer.config.hint_resample]
        return data.to_tensor(data.resize(array, tuple(hint.shape[:1:-1]), resample))[None]

    def record(self, step: int, **values: float) -> None:
        """Write what was measured at `step` to the metrics."""
        with self.run_folder.guard("metrics.jsonl"):
            self.metrics.add(step, **values)

    def measure(self, step: int, last: bool = False) -> None:
        """Measure and draw, if `step` is due or the `last` one. After a resume only what is missing is made."""
        every, grid = self.trainer.config.logger_freq, f"image_log/step-{step:06d}.png"
        if not every:
            return
        whole = last or step % every == 0
        if not whole and (self.converged or every < 100 or step % (every // 10)):
            return
        with ema_weights(self.trainer):
            if step not in self.metrics.series("control_gain")[0]:
                self.measure_gain(step, whole)
            if not whole:
                return
            if not (self.run_folder.path / grid).exists():
                with self.run_folder.guard(grid):
                    self.draw(self.run_folder.path / grid)
        with self.run_folder.guard("curves.png"):
            save_curves(self.run_folder.path / "curves.png", self.metrics)
        if self.history:
            with self.run_folder.guard("history.jsonl"):
                self.history.measure(step, self.trainer.config.device)
        if self.page:
            with self.run_folder.guard("report.html"):
                self.page.write()

    def measure_gain(self, step: int, whole: bool = True) -> None:
        """Measure the control gain, write it, and tell the sudden convergence once. A `whole` measurement has the two
        losses beside it and is printed."""
        right, other = self.losses()
        gain = 1 - right / other
        losses = dict(val_loss=right, val_loss_other_hints=other) if whole else {}
        self.record(step, **losses, control_gain=gain)
        self.last_gain = f", control gain {gain:.3f}"
        if whole:
            lowest = turned_at(*self.metrics.series("val_loss"))
            turned = f"; the validation loss has risen since step {lowest}" if lowest is not None else ""
            tqdm.write(f"step {step}: validation loss {right:.4f}, control gain {gain:.3f}{turned}")
        jump = sudden_convergence(*self.metrics.series("control_gain"))
        if jump is not None and not self.converged:
            self.converged = True
            tqdm.write(f"sudden convergence at step {jump}: the hint is obeyed (control gain {gain:.3f})")

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        """The mean loss with the right hints, and with the hints of other samples."""
        config, sums = self.trainer.config, [0.0, 0.0]
        for fixed in self.batches:
            batch = prepare_batch(self.trainer.model, fixed, config.device, config.encode_batch_size)
            other_hint = batch.pop("other_hint", batch["hint"].roll(1, dims=0))
            for k, hint in enumerate((batch["hint"], other_hint)):
                hinted = batch | {"hint": hint}
                for i in range(0, len(hint), config.batch_size):
                    part = {name: values[i : i + config.batch_size] for name, values in hinted.items()}
                    sums[k] += self.loss_fn(self.trainer.model, part).sum().item()
        count = sum(len(fixed["timesteps"]) for fixed in self.batches)
        return sums[0] / count, sums[1] / count

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Save a grid with a row for each item: control, prediction, ground truth, reconstruction, prompt. Items whose
        images have one size stand together."""
        config, model, dataset = self.trainer.config, self.trainer.model, self.samples.dataset
        if self.trainer.graph:  # drawing needs the memory that it keeps
            self.trainer.graph.release()
        shown, batches, drawn = [], [], []
        for positions, whole in zip(self.groups, self.batches, strict=False):  # the first round
            items = [self.items[k] for k in positions if k < config.log_images]
            if items:
                fixed = {name: values[: len(items)] for name, values in whole.items()}
                batches.append(prepare_batch(model, fixed, config.device, config.encode_batch_size))
                drawn += self._sample(batches[-1], first=len(shown))
                shown += items
        resting_device = model.vae.post_quant_conv.weight.device  # after caching the VAE's decoder is on the CPU
        decode = lambda latents: [to_uint8(model.decode(z))[0] for some in latents for z in some.split(1)]
        with resting_weights(self.trainer):
            for part in model.vae.decoding:
                part.to(config.device)
            pictures, reconstructed = decode(drawn), decode(batch["latents"] for batch in batches)
            for part in model.vae.decoding:
                part.to(resting_device)
        save_grid(
            path,
            {
                "control": [hint_image(h) for batch in batches for h in batch["hint"]],
                "prediction": pictures,
                "ground truth": [to_uint8(data.to_tensor(dataset.target(i))[None])[0] for i in shown],
                "reconstruction": reconstructed,
            },
            [dataset.prompt(i) for i in shown],
        )

    def _sample(self, batch: dict[str, Tensor], first: int) -> list[Tensor]:
        """Draw with the hints of a batch, `batch_size` at a time: latents. `first`: the number of the first image."""
        config, model = self.trainer.config, self.trainer.model
        hint, context = batch["hint"], batch["context"]
        size = tuple(side * model.vae.factor for side in batch["latents"].shape[:1:-1])
        settings = Sampling(config.log_steps, scale=config.guidance or None, seed=config.seed)
        drawn = []
        for i in range(0, len(hint), config.batch_size):
            part = slice(i, i + config.batch_size)
            count = len(hint[part])
            negative, pooled = (None if x is None else x.to(context).expand(count, *x.shape[1:]) for x in self.uncond)
            y = (
                {"y": batch["y"][part], "negative_y": model.make_y(pooled, batch["sizes"][part])}
                if "y" in batch
                else {}
            )
            controls = [Control(model.control_model, hint[part])]
            drawn.append(sample(model, context[part], negative, controls, size, settings, first=first + i, **y))
        return drawn


def group_positions(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The positions of equal `shapes`, one list for each shape, in the order in which they come."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, shape in enumerate(shapes):
        groups.setdefault(tuple(shape), []).append(position)
    return list(groups.values())
