"""Does it converge? What a run measures and draws of itself, on a validation batch that never changes.

ControlNets learn suddenly: for thousands of steps nothing is to be seen, then within a few hundred the hint is obeyed.
Two things tell: the loss with the right hints beside the loss with the hints of other samples (`log.Meter` makes the
control gain of it), and a grid of pictures. Both are of held-out items with fixed noise and timesteps.
"""

import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import data
import frozen
import log
import sampler
from config import Config
from controlnet import ControlLDM


class Watch:
    """The fixed validation batch of items `validation`. `loss`: as `train.diffusion_loss`; `uncond` (77,D): the context
    of the empty prompt."""

    def __init__(
        self,
        config: Config,
        model: ControlLDM,
        samples: data.Samples,
        validation: list[int],
        uncond: Tensor,
        loss: Callable[..., Tensor],
    ):
        self.config, self.model, self.samples, self.validation = config, model, samples, validation
        self.uncond, self.loss = uncond, loss
        items = [samples.item(i) for i in validation]
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
        config, sums = self.config, [0.0, 0.0]
        for batch in self.batches:
            latents, context, hint, timesteps, noise = frozen.inputs(
                self.model, batch, config.device, config.encode_batch_size
            )
            for k, given in enumerate((hint, hint.roll(1, dims=0))):
                whole = (latents, context, given, timesteps, noise)
                for part in zip(*(x.split(config.batch_size) for x in whole), strict=True):
                    sums[k] += self.loss(self.model, *part, config.only_mid_control).sum().item()
        count = sum(len(batch["timestep"]) for batch in self.batches)
        return sums[0] / count, sums[1] / count

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Save the grid of the validation items: control, prediction, ground truth, reconstruction, prompt."""
        config, model, triples = self.config, self.model, self.samples.triples
        count = min(config.log_images, len(self.validation))
        chosen = self.validation[:count]
        batch = {k: v[:count] for k, v in self.batches[0].items()}
        latents, context, hint, _, _ = frozen.inputs(model, batch, config.device, config.encode_batch_size)
        size = tuple(side * model.vae.factor for side in latents.shape[:1:-1])
        drawn = []
        for i in range(0, count, config.batch_size):
            part = slice(i, i + config.batch_size)
            negative = self.uncond.to(context).expand_as(context[part])
            drawn.append(
                sampler.sample(
                    model, context[part], negative, hint[part], size, config.log_steps, config.guidance or None,
                    config.seed, i, only_mid_control=config.only_mid_control,
                )
            )  # fmt: skip
        home = model.vae.post_quant_conv.weight.device  # after caching the VAE rests on the CPU
        for part in model.vae.decoding:
            part.to(config.device)
        log.save_grid(
            path,
            {
                "control": [log.hint_image(h) for h in hint],
                "prediction": log.to_uint8(torch.cat([model.decode(z) for x in drawn for z in x.split(1)])),
                "ground truth": [log.to_uint8(data.to_tensor(triples.image(i))[None])[0] for i in chosen],
                "reconstruction": log.to_uint8(torch.cat([model.decode(z) for z in latents.split(1)])),
            },
            [triples.prompt(i) for i in chosen],
        )
        for part in model.vae.decoding:
            part.to(home)


def report(run: Path, saved: int, metrics: log.Metrics, samples: data.Samples, shown: int, wanted: int) -> None:
    """Say what came of a run that has saved step `saved` of `wanted`, where it is, and how to go on or draw with it."""
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
    hint = data.save_hint(run / "hint", samples.triples.hint(shown))
    draw = [python, "sampler.py", "--model", str(run), "--hint", str(hint)]
    draw += ["--prompt", samples.triples.prompt(shown), "--out", "samples"]
    print(
        f"pictures:  {run / 'image_log'}, {run / 'curves.png'}\n"
        f"trained:   {checkpoint.newest(run) / 'trained.safetensors'}\n"
        f"draw:      {shlex.join(draw)}"
    )
