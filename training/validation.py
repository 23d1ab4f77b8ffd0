"""Does the model converge? The control gain and the image log, on a validation batch that never changes.

A ControlNet learns suddenly: for thousands of steps nothing is to be seen, then within a few hundred the hint is
obeyed. Two measurements tell. The first is the *control gain*,

    control_gain = 1 - loss(right hints) / loss(hints of other samples),

which is 0 as long as the hint makes no difference. The second is a grid of images drawn from the validation hints. Both
use held-out items, fixed noise and fixed timesteps, so that successive measurements differ by the weights alone.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import data
from sampler import Control, Sampling, sample
from training.cache import prepare_batch
from training.history import History
from training.records import Metrics, hint_image, save_curves, save_grid, sudden_convergence, to_uint8
from training.run_folder import RunFolder
from training.setup import Trainer, ema_weights


def held_out(count: int, wanted: int) -> range:
    """The items of a data set of `count` that are kept for validation: the last `wanted` ones, a tenth of a small data
    set, and never less than two."""
    return range(count - max(2, min(wanted, count // 10)), count)


class Validation:
    """Measures and draws every `logger_freq` steps (0: never), with the moving average of the weights if there is one.

    items: the held-out items of the data set; uncond (77,D): the context of the empty prompt; loss_fn(model, batch) ->
    (B,). Measurements go to `metrics` and `curves.png` of the run's folder, images to its `image_log/`; `history` notes
    the memory, and `page.write()` writes the page of the run.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: data.Samples,
        items: list[int],
        uncond: Tensor,
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
        self.batches = self._fixed_batches()

    def _fixed_batches(self) -> list[dict[str, Any]]:
        """All items, repeated until there are at least 16 samples, at timesteps spread evenly over the schedule."""
        config, model_config = self.trainer.config, self.trainer.model.config
        items = [self.samples.item(i) for i in self.items]
        rounds = max(1, math.ceil(16 / len(items)))
        count = rounds * len(items)
        generator = torch.Generator().manual_seed(data.derive_seed("validation", config.seed))
        batches = []
        for r in range(rounds):
            numbers = torch.arange(r * len(items), (r + 1) * len(items))
            noise, posterior_noise = torch.randn((2, len(items), *self.samples.latent_shape), generator=generator)
            timesteps = ((numbers + 0.5) * model_config.timesteps / count).long()
            fixed = {"timesteps": timesteps, "noise": noise, "posterior_noise": posterior_noise}
            batches.append(torch.utils.data.default_collate(items) | fixed)
        return batches

    def record(self, step: int, **values: float) -> None:
        """Write what was measured at `step` to the metrics."""
        with self.run_folder.guard("metrics.jsonl"):
            self.metrics.add(step, **values)

    def measure(self, step: int, last: bool = False) -> None:
        """Measure and draw, if `step` is due or the `last` one. After a resume only what is missing is made."""
        every, grid = self.trainer.config.logger_freq, f"image_log/step-{step:06d}.png"
        if not every or (step % every and not last):
            return
        with ema_weights(self.trainer):
            if step not in self.metrics.series("control_gain")[0]:
                self.measure_gain(step)
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

    def measure_gain(self, step: int) -> None:
        """Measure the losses and the control gain, write and print them, and tell the sudden convergence once."""
        right, other = self.losses()
        gain = 1 - right / other
        self.record(step, val_loss=right, val_loss_other_hints=other, control_gain=gain)
        self.last_gain = f", control gain {gain:.3f}"
        tqdm.write(f"step {step}: validation loss {right:.4f}, control gain {gain:.3f}")
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
            for k, hint in enumerate((batch["hint"], batch["hint"].roll(1, dims=0))):
                hinted = batch | {"hint": hint}
                for i in range(0, len(hint), config.batch_size):
                    part = {name: values[i : i + config.batch_size] for name, values in hinted.items()}
                    sums[k] += self.loss_fn(self.trainer.model, part).sum().item()
        count = sum(len(fixed["timesteps"]) for fixed in self.batches)
        return sums[0] / count, sums[1] / count

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Save a grid with a row for each item: control, prediction, ground truth, reconstruction, prompt."""
        config, model, dataset = self.trainer.config, self.trainer.model, self.samples.dataset
        shown = self.items[: config.log_images]
        fixed = {name: values[: len(shown)] for name, values in self.batches[0].items()}
        batch = prepare_batch(model, fixed, config.device, config.encode_batch_size)
        latents, hint, context = (batch[name] for name in ("latents", "hint", "context"))
        size = tuple(side * model.vae.factor for side in latents.shape[:1:-1])
        settings = Sampling(config.log_steps, scale=config.guidance or None, seed=config.seed)
        drawn = []
        for i in range(0, len(shown), config.batch_size):
            part = slice(i, i + config.batch_size)
            negative = self.uncond.to(context).expand_as(context[part])
            controls = [Control(model.control_model, hint[part])]
            drawn.append(sample(model, context[part], negative, controls, size, settings, first=i))
        resting_device = model.vae.post_quant_conv.weight.device  # after caching the VAE's decoder is on the CPU
        for part in model.vae.decoding:
            part.to(config.device)
        decode = lambda z: to_uint8(torch.cat([model.decode(one) for one in z.split(1)]))
        save_grid(
            path,
            {
                "control": [hint_image(h) for h in hint],
                "prediction": decode(torch.cat(drawn)),
                "ground truth": [to_uint8(data.to_tensor(dataset.target(i))[None])[0] for i in shown],
                "reconstruction": decode(latents),
            },
            [dataset.prompt(i) for i in shown],
        )
        for part in model.vae.decoding:
            part.to(resting_device)
