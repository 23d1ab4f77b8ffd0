"""What a run tells its user at the start and at the end."""

import os
import shlex
import sys
from pathlib import Path

import data
from training.records import Metrics, sudden_convergence
from training.setup import Trainer
from weights.runs import newest_checkpoint


def print_summary(trainer: Trainer, samples: data.Samples) -> None:
    """Print one line about the training that begins."""
    config = trainer.config
    millions = sum(p.numel() for p in trainer.trainable.values()) / 1e6
    decoder = "" if config.sd_locked else " and the UNet's decoder"
    print(
        f"{trainer.model.config.name}: training a ControlNet{decoder} of {millions:.1f} M parameters on "
        f"{len(samples.indices)} samples of {config.resolution}, {config.batch} a step, {config.precision} "
        f"({config.memory}), on {config.device}; steps {trainer.step} to {config.steps}"
    )


def report(run: Path, saved: int, steps: int, metrics: Metrics, samples: data.Samples, item: int) -> None:
    """Print what became of a run that has saved step `saved` of `steps`, where it is, and how to continue it or draw
    with it. The hint of `item` is saved for the example."""
    measured_at, gains = metrics.series("control_gain")
    jump = sudden_convergence(measured_at, gains)
    if jump is not None:
        print(f"sudden convergence at step {jump}; control gain now {gains[-1]:.3f}")
    elif gains:
        print(f"the hint is not obeyed yet (control gain {gains[-1]:.3f}); Stable Diffusion takes 3000 to 7000 steps")
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else "python"
    if saved == 0:
        print(f"stopped before the first checkpoint: {run} has nothing to resume from")
        return
    if saved < steps:
        print(f"stopped at step {saved} of {steps}; to continue: {python} train.py --resume {shlex.quote(str(run))}")
        return
    hint = data.save_hint(run / "hint", samples.dataset.hint(item))
    draw = [python, "sampler.py", "--model", str(run), "--hint", str(hint)]
    draw += ["--prompt", samples.dataset.prompt(item), "--out", "samples"]
    print(
        f"page:      {run / 'report.html'}\n"
        f"pictures:  {run / 'image_log'}, {run / 'curves.png'}\n"
        f"trained:   {newest_checkpoint(run) / 'trained.safetensors'}\n"
        f"draw:      {shlex.join(draw)}"
    )
