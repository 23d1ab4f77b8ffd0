"""What a run tells its user at the start and at the end."""

import os
import sys
from pathlib import Path

import data
from config import Config
from flag_types import flag_words
from training.console import shell_line
from training.records import Metrics, sudden_convergence, turned_at
from training.run_folder import hint_flags
from training.setup import Trainer
from weights.runs import list_checkpoints, load_run, newest_checkpoint, step_of

FEW = 1000  # samples, of which a network learns each by heart sooner than what they have in common
# When the hint begins to be obeyed, by the first word of a model's name; the figures for Stable Diffusion are those of
# the ControlNet tutorial and of its author (github.com/lllyasviel/ControlNet, issue 198), for steps of 4 samples or so.
CONVERGES = {
    "tiny": "the tiny base takes 50 to 300 steps of 8 samples",
    "sd15": "Stable Diffusion 1.5 takes 3000 to 7000 steps of 4 samples",
    "sd21": "Stable Diffusion 2 takes 6000 to 9000 steps of 4 samples",
    "sdxl": "SDXL takes more than the 3000 to 7000 steps of Stable Diffusion 1.5, and larger batches",
}


def print_trial(config: Config) -> None:
    """Print what a run is that names a data set and no base model."""
    print(
        f"no --base is given: {config.data} is tried on the tiny base model at {config.resolution} px, with the "
        f"settings of the demo unless a flag says otherwise ({config.steps} steps), for minutes on a CPU"
        f"{'; half of the samples are mirrored, unless --no-flip is given' if config.flip else ''}. Where hints and "
        "targets belong together, the control gain jumps; pictures stay coarse. Then: --base FILE"
    )


def describe_amount(config: Config, count: int, held_out: int) -> list[str]:
    """Lines about what the asked steps are on `count` samples, and what is to be known if these are few."""
    epochs = config.steps * config.batch / count
    seen = f"each sample is seen {epochs:.3g} times" if epochs >= 1 else f"{epochs:.0%} of the samples are seen"
    lines = [f"{config.steps} steps of {config.batch} samples are {epochs:.3g} epochs: {seen}"]
    if count < FEW and epochs >= 5:
        flips = "" if config.flip or config.directional_hints else "; --flip doubles them, if left and right are alike"
        lines += [
            f"{count} samples are few, and sooner or later known by heart: the validation loss (of {held_out} other "
            "pairs) turns then, which is told, and the control gain falls. The best weights are those before: "
            f"--keep-checkpoints 0 --checkpoint-freq {max(1, config.logger_freq)} keeps them{flips}",
        ]
    return lines


def print_summary(trainer: Trainer, samples: data.Samples, held_out: int) -> None:
    """Print about the training that begins: what is trained on what, and what the asked steps mean."""
    config = trainer.config
    millions = sum(p.numel() for p in trainer.trainable.values()) / 1e6
    decoder = "" if config.sd_locked else " and the UNet's decoder"
    print(
        f"{trainer.model.config.name}: training a ControlNet{decoder} of {millions:.1f} M parameters on "
        f"{len(samples.indices)} samples of {'about ' if config.buckets else ''}{config.resolution}, {config.batch} a "
        f"step, {config.precision} ({config.memory}), on {config.device}; steps {trainer.step} to {config.steps}"
    )
    if trainer.step >= config.steps:
        print(f"all {config.steps} steps are made already; --steps with a larger number trains on")
        return
    for line in describe_amount(config, len(samples.indices), held_out):
        print(line)


def report(
    run: Path, saved: int, steps: int, metrics: Metrics, samples: data.Samples, item: int, model: str = ""
) -> None:
    """Print what became of a run that has saved step `saved` of `steps`, where it is, and how to continue it or draw
    with it. The hint of `item` is saved for the example. model: the name of the model that was trained."""
    measured_at, gains = metrics.series("control_gain")
    jump = sudden_convergence(measured_at, gains)
    if jump is not None:
        print(f"sudden convergence at step {jump}; control gain now {gains[-1]:.3f}")
    elif gains:
        usual = next((text for name, text in CONVERGES.items() if model.startswith(name)), CONVERGES["sd15"])
        print(f"the hint is not obeyed yet (control gain {gains[-1]:.3f}); {usual}")
    lowest = turned_at(*metrics.series("val_loss"))
    if lowest is not None and (kept := list_checkpoints(run)):
        nearest = min(kept, key=lambda folder: abs(step_of(folder) - lowest))
        print(f"the validation loss was lowest at step {lowest}; the nearest checkpoint that was kept is {nearest}")
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else "python"
    if saved == 0:
        print(f"stopped before the first checkpoint: {run} has nothing to resume from")
        return
    if saved < steps:
        print(f"stopped at step {saved} of {steps}; to continue: {python} train.py --resume {shell_line([str(run)])}")
        return
    hint = data.save_hint(run / "hint", samples.dataset.hint(item))
    draw = [python, "sampler.py", "--model", str(run), *hint_flags(hint, load_run(run).get("hint_scale", 0))]
    draw += [*flag_words("--prompt", samples.dataset.prompt(item)), "--out", f"samples/{run.name}"]
    pictures = ", ".join(str(path) for path in (run / "image_log", run / "curves.png") if path.exists())
    print(f"page:      {run / 'report.html'}")
    if pictures:
        print(f"pictures:  {pictures}")
    print(f"trained:   {newest_checkpoint(run) / 'trained.safetensors'}\ndraw:      {shell_line(draw)}")
