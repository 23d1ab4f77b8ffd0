"""What brings the sudden convergence forward? A grid of settings and seeds on the tiny model, as a table and a figure.

    python -m toy.convergence run batch muon --seeds 3       train every setting of these groups; done ones are skipped
    python -m toy.convergence run all --task keypoints       the same on another kind of hint
    python -m toy.convergence table                          the table of everything that was run, in Markdown
    python -m toy.convergence figure docs/convergence.svg    the samples that each setting took to a control gain of 0.8
    python -m toy.convergence curves docs/jump.svg adamw muon-0.02     the control gain over the samples
    python -m toy.convergence events adamw                   is the jump one event? (by timestep, by validation sample)

Every run has the demo's settings with AdamW but for what its row names, a budget of BUDGET samples, and the demo's
learning rate schedule over these samples. The control gain is measured every 160 samples. A run is judged by the
overlap of what it draws for held-out hints with the right discs. A run that fails counts as failed and stays in the
table.

    runs/convergence/TASK/SETTING-SEED/outcome.json          what the table reads
    runs/convergence/TASK/SETTING-SEED/gains.jsonl           losses of each validation sample, at each measurement
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from config import DEMO, TINY_BASE, Config, number
from ldm import TINY, ControlLDM, ModelConfig
from lowvram.estimate import flops, trained_shapes
from lowvram.muon import muon_flops
from toy import circles
from toy.charts import bar_chart, line_chart
from toy.variants import VARIANTS, logit_normal_timesteps
from training.console import run_program
from training.records import read_metrics
from training.setup import Trainer, build_trainer, ema_weights
from training.validation import Validation
from weights import load_model, load_state_dict
from weights.writing import save_json, save_safetensors, write_atomically

ROOT = Path("runs/convergence")
BUDGET = 3200  # samples of a run: 400 steps of the demo's batch
PAIRS = 2000  # of a data set
# What every setting starts from: the demo's settings as they were when the grid was run, with AdamW at the rate that
# suits it. (What the grid found went into the demo.)
BASELINE = DEMO | dict(optimizer="adamw", learning_rate=2e-3, timestep_bias=0.7, drop_prompt=0.1)
MUON = dict(optimizer="muon", muon_rate=0.02)
LEVELS = (0.5, 0.8, 0.9)  # of the control gain
# Group -> setting -> what differs from BASELINE. `hint_gain`, `budget`, `logit_normal` and `variant` (a name in
# toy/variants.py) are no settings of Config.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {"adamw": {}},
    "muon": {f"muon-{rate:g}": dict(MUON, muon_rate=rate) for rate in (0.02, 0.01, 0.04, 0.005)},
    "batch": {f"adamw-batch-{n}": dict(batch_size=n) for n in (2, 4, 16, 32)},
    "batch-rate": {  # the rate grows with the root of the batch
        f"adamw-batch-{n}-rate": dict(batch_size=n, learning_rate=2e-3 * (n / 8) ** 0.5) for n in (2, 32)
    },
    "muon-long": {"muon-8800-samples": dict(MUON, budget=8800)},
    "muon-batch": {f"muon-batch-{n}": dict(MUON, batch_size=n) for n in (2, 4, 16, 32)},
    "rate": {f"adamw-rate-{rate:g}": dict(learning_rate=rate) for rate in (1e-3, 4e-3, 8e-3)},
    "warm-up": {f"adamw-warm-up-{n}": dict(warmup_steps=n) for n in (0, 100)},
    "schedule": {"adamw-constant": dict(lr_schedule="constant"), "muon-constant": dict(MUON, lr_schedule="constant")},
    "hint-gain": {f"adamw-hint-gain-{gain:g}": dict(hint_gain=gain) for gain in (1.0, 2.0)},
    "muon-hint-gain": {"muon-hint-gain-1": dict(MUON, hint_gain=1.0)}
    | {"muon-normalized-hint-encoder": dict(MUON, normalize_hint_encoder=True)},
    "timesteps": {f"adamw-bias-{bias:g}": dict(timestep_bias=bias) for bias in (1.0, 0.4, 0.25)}
    | {"adamw-logit-normal": dict(logit_normal=True)},
    "even": {"adamw-random-timesteps": dict(even_timesteps=False)}
    | {"muon-random-timesteps": dict(MUON, even_timesteps=False)},
    "loss": {"adamw-min-snr-5": dict(min_snr_gamma=5.0), "adamw-no-clipping": dict(clip_grad_norm=0.0)},
    "dropout": {f"adamw-drop-prompt-{p:g}": dict(drop_prompt=p) for p in (0.0, 0.5)},
    "average": {"adamw-ema-0.99": dict(ema_decay=0.99), "muon-ema-0.99": dict(MUON, ema_decay=0.99)},
    "hint": {"adamw-hint-at-levels": dict(variant="hint-at-levels")}
    | {"adamw-normalized-hint-encoder": dict(normalize_hint_encoder=True)},
    "zero": {f"adamw-zero-convolutions-{k:g}": dict(variant=f"zero-convolutions-{k:g}") for k in (0.2, 5.0)},
    "muon-timesteps": {f"muon-bias-{bias:g}": dict(MUON, timestep_bias=bias) for bias in (1.0, 0.4)}
    | {"muon-min-snr-5": dict(MUON, min_snr_gamma=5.0)},
    "muon-others": {"muon-drop-prompt-0": dict(MUON, drop_prompt=0.0)}
    | {f"muon-{name}": dict(MUON, variant=name) for name in ("hint-at-levels", "zero-convolutions-5")},
    "muon-parts": {name: dict(MUON, variant=name) for name in ("muon-hint-encoder", "muon-all-but-hint-encoder")},
}  # fmt: skip


class Recorder(Validation):
    """Validation that also writes the loss of every sample, with the right hint and with another."""

    def losses(self) -> tuple[float, float]:
        seen, loss_fn = [], self.loss_fn

        def recording(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            losses = loss_fn(model, batch)
            seen.append((batch["timesteps"].tolist(), losses.tolist()))
            return losses

        self.loss_fn = recording
        try:
            result = super().losses()
        finally:
            self.loss_fn = loss_fn
        # each batch is measured with the right hints, then with the others
        chunk = -(-len(self.items) // self.trainer.config.batch_size)
        halves = [[], []]
        for k, (timesteps, losses) in enumerate(seen):
            halves[k // chunk % 2] += zip(timesteps, losses, strict=True)
        rows = [(t, right, other) for (t, right), (_, other) in zip(*halves, strict=True)]
        with open(self.run_folder.path / "gains.jsonl", "a") as file:
            file.write(json.dumps({"step": self.trainer.step, "samples": rows}) + "\n")
        return result


def settings_of(name: str, changes: dict[str, Any], task: str, seed: int) -> Config:
    """The configuration of a run: the demo's, the `changes`, and as many steps as the budget of samples allows."""
    changes = dict(changes)
    budget, gain = changes.pop("budget", BUDGET), changes.pop("hint_gain", None)
    for own_name in ("variant", "logit_normal"):
        changes.pop(own_name, None)
    base = str(TINY_BASE) if gain is None else str(base_with_gain(gain))
    batch = changes.get("batch_size", BASELINE["batch_size"])
    steps = budget // batch
    warm_up = changes.pop("warmup_steps", BASELINE["warmup_steps"]) * BASELINE["batch_size"] // batch
    own = dict(
        base=base, data=f"data/convergence/{task}", out=str(ROOT / task / f"{name}-{seed}"), steps=steps, seed=seed,
        warmup_steps=warm_up, logger_freq=max(1, 160 // batch), checkpoint_freq=steps, log_images=1, log_steps=1,
        device="cpu",
    )  # fmt: skip
    return Config(**(BASELINE | own | changes))


def base_with_gain(gain: float) -> Path:
    """The tiny base, whose new ControlNets get this `hint_gain`."""
    path = ROOT / f"base-gain-{gain:g}.safetensors"
    if not path.exists():
        config: ModelConfig = dataclasses.replace(TINY, hint_gain=gain)
        save_safetensors(path, load_state_dict(TINY_BASE), {"config": config.to_json()})
    return path


def run_one(name: str, changes: dict[str, Any], task: str, seed: int, count: int) -> dict[str, Any]:
    """Train and judge one run, and write its outcome. `count`: held-out hints to judge by."""
    config = settings_of(name, changes, task, seed)
    folder, failed = Path(config.out), ""
    (folder / "gains.jsonl").unlink(missing_ok=True)
    trainers: list[Trainer] = []

    def build_changed(*args: Any) -> Trainer:
        trainers.append(build_trainer(*args))
        if "variant" in changes:
            VARIANTS[changes["variant"]](trainers[0])
        return trainers[0]

    train.Validation, train.build_trainer = Recorder, build_changed
    distribution = logit_normal_timesteps() if "logit_normal" in changes else contextlib.nullcontext()
    try:
        with distribution:
            train.train(config, overwrite=True)
    except (ValueError, OSError) as e:
        failed = str(e)
    finally:
        train.Validation, train.build_trainer = Validation, build_trainer
    entries = read_metrics(folder)
    if entries and entries[-1]["step"] < config.steps and "in a row" not in failed:
        sys.exit(
            f"{folder}: stopped at step {entries[-1]['step']}; the same command goes on with this run from its start"
        )
    took = [config.batch_size / e["images_per_second"] for e in entries if "images_per_second" in e]
    outcome = {
        "name": name, "task": task, "seed": seed, "changes": changes, "failed": failed, "batch": config.batch_size,
        "steps": config.steps, "flops": flops_of(config), "threads": torch.get_num_threads(),
        "gains": [(e["step"], e["control_gain"]) for e in entries if "control_gain" in e],
        "seconds": config.steps * statistics.median(took or [0.0]),  # the mean would tell of other work too
    }  # fmt: skip
    if not failed:
        model = trainers[0].model
        model.cond_stage_model = load_model(config.base).cond_stage_model  # the run released it
        with ema_weights(trainers[0]):
            outcome |= judge(model, task, count)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "outcome.json", outcome)
    return outcome


def flops_of(config: Config) -> int:
    """Floating-point operations of one step, the optimizer's orthogonal updates included."""
    per_image = flops(config, TINY, (TINY.resolution, TINY.resolution))
    muon = muon_flops(trained_shapes(config, TINY), torch.float32) if config.optimizer == "muon" else 0
    return per_image * config.batch_size + muon


def judge(model: ControlLDM, task: str, count: int) -> dict[str, float]:
    """Mean overlap with the discs of held-out hints, and the fraction of images with both colours right."""
    shown = circles.held_out(count)
    drawn = circles.draw_all(model, shown, True, TINY.resolution, 20, kind=task)
    verdicts = [circles.measure(image, circle) for image, circle in zip(drawn, shown, strict=True)]
    return {
        "iou": float(np.mean([v.iou for v in verdicts])),
        "colors": float(np.mean([v.color_right and v.background_right for v in verdicts])),
    }


# -------------------------------------------------------------------------------------------------------------- table
def reached(gains: Sequence[tuple[int, float]], level: float) -> float | None:
    """The step at which the control gain first was `level`, interpolated between measurements; None if never."""
    for (a, low), (b, high) in zip(gains, gains[1:], strict=False):
        if high >= level:
            return b if low >= level else a + (b - a) * (level - low) / (high - low)
    return None


def spread(values: Sequence[float | None], digits: int = 0) -> str:
    """The mean of `values` with the lowest and the highest; how many never came where some are None."""
    there = [v for v in values if v is not None]
    if not there:
        return "never"
    mean, low, high = statistics.mean(there), min(there), max(there)
    missing = f", {len(values) - len(there)} never" if len(there) < len(values) else ""
    extremes = f" ({low:.{digits}f} to {high:.{digits}f}{missing})" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{extremes}"


def outcomes_of(task: str) -> dict[str, list[dict[str, Any]]]:
    """The outcomes of everything that was run on a task, by setting, in the order of GROUPS."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for group in GROUPS.values() for name in group}
    for file in sorted((ROOT / task).glob("*/outcome.json")):
        outcome = json.loads(file.read_text())
        found.setdefault(outcome["name"], []).append(outcome)
    return {name: outcomes for name, outcomes in found.items() if outcomes}


def table(task: str) -> list[str]:
    """Everything that was run on a task, as the lines of a Markdown table."""
    columns = ["setting", "seeds", "failed", *(f"samples to gain {level}" for level in LEVELS), "steps to gain 0.8"]
    columns += ["TFLOP to gain 0.8", "seconds to gain 0.8", "final gain", "IoU", "colours"]
    rows = [columns, ["---"] * len(columns)]
    rows += [row(name, outcomes) for name, outcomes in outcomes_of(task).items()]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def row(name: str, outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of one setting's row, from the outcomes of its seeds."""
    good = [o | {"seconds_a_step": o["seconds"] / o["steps"]} for o in outcomes if not o["failed"]]
    ends = ([o["gains"][-1][1] for o in good], 3), ([o["iou"] for o in good], 3), ([o["colors"] for o in good], 2)

    def until(level: float, key: str = "", unit: float = 1.0) -> list[float | None]:
        """What it took each seed to reach a control gain: steps, or steps times the outcome's `key`, in `unit`s."""
        steps = ((o, reached(o["gains"], level)) for o in good)
        return [None if step is None else step * (o[key] if key else 1) / unit for o, step in steps]

    return [
        name, str(len(outcomes)), str(len(outcomes) - len(good)), *(spread(until(level, "batch")) for level in LEVELS),
        spread(until(0.8)), spread(until(0.8, "flops", 1e12), 1),
        spread(until(0.8, "seconds_a_step")), *(spread(values, digits) for values, digits in ends),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- figure and events
def figure(task: str) -> str:
    """A bar chart (SVG) of the samples that each setting took to a control gain of 0.8: bars are means over the seeds,
    lines go from the fastest to the slowest seed. A setting that did not come there with every seed is hatched."""
    bars = []
    for name, outcomes in outcomes_of(task).items():
        samples = [reached(o["gains"], 0.8) for o in outcomes]
        there = [step * o["batch"] for step, o in zip(samples, outcomes, strict=True) if step is not None]
        bars.append((name, there, len(there) < len(outcomes)))
    title = f"Samples to a control gain of 0.8 ({task} hints); red: over the seeds"
    return bar_chart(title, bars, f"not within {BUDGET} samples")


def curves(task: str, settings: Sequence[str]) -> str:
    """The control gain over the samples (SVG) of each of the `settings`: the mean over the seeds, and in a paler colour
    from the lowest to the highest. Raises ValueError for a setting that was not run, or of which every run failed."""
    lines, found = {}, outcomes_of(task)
    for name in settings:
        if name not in found:
            raise ValueError(f"{name} was not run on {task} hints; `run` makes it")
        gains = [[(step * o["batch"], gain) for step, gain in o["gains"]] for o in found[name] if not o["failed"]]
        if not gains:
            raise ValueError(f"every run of {name} on {task} hints failed, and there is no curve to draw")
        lines[name] = [
            (points[0][0], [gain for _, gain in points]) for points in zip(*gains, strict=True)
        ]  # samples, gain of each seed
    return line_chart(f"Control gain over the samples ({task} hints)", lines)


@dataclasses.dataclass
class Jump:
    """When a run began to obey: the final control gain, and the step at which half of it was reached, of each band of
    timesteps and of all together ("all"); and that step of each validation sample. What ends at a gain of 0.1 or less
    has none."""

    bands: dict[str, tuple[float, float | None]]
    samples: list[float]
    count: int  # of the validation samples


def jump_of(run: Path) -> Jump:
    """Read from a run's folder when its timesteps and its validation samples jumped."""
    entries = [json.loads(line) for line in (run / "gains.jsonl").read_text().splitlines()]
    losses = np.array([e["samples"] for e in entries])  # (measurements, samples, 3): timestep, right hint, other hint
    steps, timesteps = [e["step"] for e in entries], losses[0, :, 0]
    gain = lambda chosen: 1 - losses[:, chosen, 1].sum(1) / losses[:, chosen, 2].sum(1)
    curve = lambda series: list(zip(steps, series.tolist(), strict=True))
    half = lambda series: reached(curve(series), series[-1] / 2) if series[-1] > 0.1 else None
    chosen = {f"{low} to {low + 199}": (timesteps >= low) & (timesteps < low + 200) for low in range(0, 1000, 200)}
    chosen["all"] = np.ones(len(timesteps), dtype=bool)
    series = {name: gain(samples) for name, samples in chosen.items() if samples.any()}
    each = [gain([i]) for i in range(len(timesteps))]
    return Jump(
        {name: (float(values[-1]), half(values)) for name, values in series.items()},
        [step for values in each if (step := half(values)) is not None],
        len(timesteps),
    )


def events(*runs: Path) -> list[str]:
    """Is the jump one event? When the control gain of each band of timesteps, and of each validation sample, first was
    half of its final value, as the lines of a Markdown table: the mean over the runs, with the lowest and highest."""
    jumps = [jump_of(run) for run in runs]
    lines = ["| timesteps | final gain | step of half of it |", "|---|---|---|"]
    for name in dict.fromkeys(name for jump in jumps for name in jump.bands):
        gains, steps = zip(*(jump.bands[name] for jump in jumps if name in jump.bands), strict=True)
        lines.append(f"| {name} | {spread(gains, 3)} | {spread(steps)} |")
    for run, jump in zip(runs, jumps, strict=True):
        text = f"{run.name}: {len(jump.samples)} of {jump.count} validation samples end above a gain of 0.1"
        if jump.samples:
            low, middle, high = np.percentile(jump.samples, [0, 50, 100])
            text += f"; each was at half of its own final gain between steps {low:.0f} and {high:.0f}, the middle one"
            text += f" at {middle:.0f}"
        lines += ["", f"{text}."]
    return lines


# ---------------------------------------------------------------------------------------------------------------- CLI
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m toy.convergence", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "run",
        help="train what is not done yet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["groups, and the settings in them:", *(f"  {k}: {', '.join(v)}" for k, v in GROUPS.items())]),
    )
    p.add_argument("groups", nargs="+", choices=["all", *GROUPS], metavar="GROUP", help="all, or groups of settings")
    p.add_argument(
        "--seeds", type=number(int, 1, 100), default=3, help="seeds of each setting, counted from 0 (default 3)"
    )
    p.add_argument("--count", type=number(int, 1, 1000), default=32, help="held-out hints to judge by (default 32)")
    t = commands.add_parser("table", help="print the table of what was run")
    f = commands.add_parser("figure", help="draw what was run as an SVG file")
    c = commands.add_parser("curves", help="draw the control gain of some settings over the samples as an SVG file")
    for command in (f, c):
        command.add_argument("file", help="file to write")
    c.add_argument("settings", nargs="+", metavar="SETTING", help="name of a setting that was run")
    e = commands.add_parser("events", help="tell when each timestep and each validation sample jumped")
    e.add_argument("setting", help="name of a setting that was run")
    for command in (p, t, f, c, e):
        command.add_argument(
            "--task", choices=tuple(circles.HINTS), default="outline", help="kind of the hints (default outline)"
        )
    args = parser.parse_args(argv)
    if args.command == "table":
        return print("\n".join(table(args.task)))
    if args.command == "figure":
        return write_atomically(args.file, lambda path: path.write_text(figure(args.task)))
    if args.command == "curves":
        return write_atomically(args.file, lambda path: path.write_text(curves(args.task, args.settings)))
    if args.command == "events":
        runs = sorted((ROOT / args.task).glob(f"{args.setting}-[0-9]*/gains.jsonl"))
        runs = [run.parent for run in runs if run.parent.name.removeprefix(f"{args.setting}-").isdecimal()]
        if not runs:
            raise FileNotFoundError(f"{ROOT / args.task}: holds no run of {args.setting}; `run` makes it")
        return print("\n".join(events(*runs)))
    folder = Path("data/convergence") / args.task
    if not (folder / "prompt.json").exists():
        circles.make(folder, PAIRS, kind=args.task)
    groups = GROUPS if "all" in args.groups else args.groups
    for seed in range(args.seeds):
        for name, changes in ((n, c) for group in groups for n, c in GROUPS[group].items()):
            if not (ROOT / args.task / f"{name}-{seed}" / "outcome.json").exists():
                with contextlib.redirect_stdout(sys.stderr):
                    outcome = run_one(name, changes, args.task, seed, args.count)
                figures = (
                    f"gain {outcome['gains'][-1][1]:.3f}, IoU {outcome.get('iou', 0):.3f}" if outcome["gains"] else ""
                )
                print(f"{args.task} {name} seed {seed}: {outcome['failed'] or figures}", flush=True)


if __name__ == "__main__":
    run_program("toy.convergence", main)
