"""What can be set: every setting of a training run in one dataclass, which is also the command line and `config.json`.

A field of `Config` is a flag of the same name (`batch_size`, `--batch-size`). Beside its default stand its group, its
help text, and its choices or its range. Later sources win: defaults, then the demo or the resumed run, then flags.

The functions that need PyTorch import it themselves: `--help` and a wrong flag are answered without it.
"""

import argparse
import dataclasses
import math
import re
import types
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from flag_types import (
    INF,
    ConfigError,
    check_device,
    default_device,
    default_workers,
    flag_name,
    in_words,
    number,
    world_size,
)
from flag_types import device as device
from lowvram.presets import GPU_PRESETS as GPU_PRESETS
from lowvram.presets import PRESETS, allowed_weight_dtypes
from lowvram.presets import resolve as resolve
from training.files import MAX_MEGAPIXELS
from training.layouts import COLUMNS_HELP, DATA_HELP, HINTS_HELP, short_name

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # the keys of `precision.PRECISIONS`
TINY_BASE = Path(__file__).parent / "models" / "tiny_sd.safetensors"


def setting(
    default: Any, group: str, text: str, choices: Sequence[Any] | None = None, low: float = -INF, high: float = INF
) -> Any:
    """A field of `Config`: its default, its group in --help, its help text, and its choices or its range.

    `default`: a value, or a function whose result is the default; the help text then has to say which it is.
    """
    metadata = dict(group=group, help=text, choices=choices, low=low, high=high)
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


@dataclass
class Config:
    """Every setting of a run; each is a flag of the same name. Defaults are those of the ControlNet tutorial.

    A setting about memory that is None comes from the preset `memory` (see `resolve`).
    """

    base: str = setting(
        "", "model and data",
        "Stable Diffusion file or diffusers folder to train on, with a ControlNet or without one (with --plan also the "
        "name of a known model: sd15, sd21, ...)",
    )  # fmt: skip
    data: str = setting("", "model and data", DATA_HELP)
    hints: str = setting("", "model and data", HINTS_HELP)
    columns: str = setting("", "model and data", COLUMNS_HELP)
    out: str = setting("", "model and data", "folder of the run (default: runs/ and the name of the data set)")
    resolution: str = setting("", "model and data", "size of the images, N or WxH (default: that of the first target)")
    buckets: bool = setting(
        False, "model and data",
        "train images of many shapes: each at the size, of about the area of --resolution (default: the model's), that "
        "cuts least of it",
    )  # fmt: skip
    bucket_batch: int = setting(
        0, "model and data", "with --buckets: samples of one size that follow each other; 0: those of a step", low=0
    )
    crops: int = setting(
        1, "model and data",
        "positions at which an image that has to be cut is cut; 1: the middle, 4: the middle and 3 random ones",
        low=1, high=64,
    )  # fmt: skip
    flip: bool = setting(False, "model and data", "exchange left and right in half of the samples, hint and target")
    directional_hints: bool = setting(
        False, "model and data",
        "hints tell left from right (by text, or colours of left and right limbs): --flip is refused",
    )  # fmt: skip
    hint_channels: int = setting(
        3, "model and data", "channels of the hint images: 1, 3 or 4; any number from .npy files", low=1, high=1024
    )
    hint_resample: str = setting(
        "area", "model and data", "filter that resizes hints; nearest is for label maps", ("area", "nearest")
    )
    hint_ground: str = setting(
        "auto", "model and data", "what transparent hints are laid on; auto: the ground on which they can be seen",
        ("auto", "black", "white"),
    )  # fmt: skip
    hint_scale: float = setting(
        0.0, "model and data",
        "value of the hint files that becomes white, for depth in mm or class numbers; 0: the largest of the format",
        low=0,
    )  # fmt: skip
    skip_bad_rows: bool = setting(
        False, "model and data", "train without the rows whose files cannot be read, instead of refusing the data set"
    )
    follow_links: bool = setting(False, "model and data", "follow links in the data folder that lead out of it")
    max_megapixels: float = setting(
        MAX_MEGAPIXELS, "model and data", "largest image that is decoded, in megapixels", low=1e-6
    )
    prediction: str = setting(
        "auto", "model and data", "what the UNet predicts; SD 2.1 at 768 px needs v, which its file does not say",
        ("auto", "eps", "v"),
    )  # fmt: skip
    control: str = setting(
        "", "model and data", "file or folder of a ControlNet to start from (default: a new ControlNet)"
    )
    vae: str = setting("", "model and data", "file or folder of a VAE that replaces the base's")
    ema: bool = setting(False, "model and data", "use the moving average of the base's UNet (model_ema.*)")
    clip_skip: int = setting(
        1, "model and data", "2 leaves out the last layer of the text encoder, as some SD 1.x models expect", low=1
    )

    sd_locked: bool = setting(
        True, "what trains", "--no-sd-locked trains the decoder of the UNet too; use a learning rate of 2e-6 then"
    )
    control_depth: str = setting(
        "", "what trains",
        "transformer blocks that a new ControlNet keeps: full, mid, small, or a number for each level from the finest "
        "(SDXL: 0,2,10 is full); fewer train faster in less memory",
    )  # fmt: skip
    normalize_hint_encoder: bool = setting(
        False, "what trains",
        "scale the initial weights of a new ControlNet's hint encoder so that the data set's hints pass all of its "
        "layers with variance 1; off: the original's initialisation",
    )  # fmt: skip
    only_mid_control: bool = setting(
        False, "what trains", "use the residual of the middle block alone: faster, weaker control"
    )

    steps: int = setting(10_000, "optimization", "optimizer steps of the whole run", low=1)
    batch_size: int = setting(
        4, "optimization", "samples that one GPU computes at once (a micro-batch)", low=1, high=65536
    )
    accumulate_grad_batches: int = setting(
        1, "optimization", "micro-batches in a step: 4 make the batch of a step 4 times as large", low=1
    )
    optimizer: str = setting(
        "adamw", "optimization", "muon: matrices and convolutions move by orthogonal updates, the rest by AdamW",
        ("adamw", "muon"),
    )  # fmt: skip
    learning_rate: float = setting(1e-5, "optimization", "learning rate of AdamW", low=0)
    muon_rate: float = setting(
        5e-4, "optimization",
        "learning rate of Muon, on the schedule of --learning-rate; 0.02 in the demo, for the tiny base", low=0,
    )  # fmt: skip
    warmup_steps: int = setting(0, "optimization", "steps over which the learning rate rises from 0", low=0)
    lr_steps: int = setting(
        0, "optimization", "steps over which the learning rate falls; 0: --steps, and on resume as before", low=0
    )
    lr_schedule: str = setting(
        "constant", "optimization", "learning rate after the warm-up", ("constant", "linear", "cosine")
    )
    weight_decay: float = setting(1e-2, "optimization", "weight decay of AdamW", low=0)
    clip_grad_norm: float = setting(
        0.0, "optimization", "largest norm of the gradient; a longer one is scaled down; 0: no clipping", low=0
    )
    ema_decay: float = setting(
        0.0, "optimization",
        "decay of a moving average of the trained weights (0.999), which draws and is exported; 0: no average",
        low=0, high=0.99999,
    )  # fmt: skip
    channels_last: bool = setting(
        False, "optimization", "keep weights and activations in the channels_last memory format"
    )
    compile: bool = setting(
        False, "optimization",
        "compile the loss with torch.compile: minutes at the start; fastest together with --channels-last",
    )  # fmt: skip
    cuda_graph: bool = setting(
        True, "optimization",
        "on an NVIDIA GPU, record the forward and backward pass and start it as a whole; not where activations are "
        "computed again, with the optimizer on the CPU, with --buckets or with --no-cache",
    )  # fmt: skip
    deterministic: bool = setting(
        False, "optimization", "use deterministic GPU kernels: two equal runs give equal bits; slower"
    )
    seed: int = setting(
        0, "optimization",
        "seed of all randomness, together with the number of the sample", low=-(2**63), high=2**63 - 1,
    )  # fmt: skip
    device: str = setting(
        default_device, "optimization",
        "device that computes: cuda, cuda:1, mps or cpu (default: the first of these that is there)",
    )  # fmt: skip

    memory: str = setting(
        "auto", "memory",
        "preset for the settings below; auto: the fastest that fits the GPU, exact without CUDA", ("auto", *PRESETS),
    )  # fmt: skip
    precision: str | None = setting(
        None, "memory", "number format of the computation and of frozen weights", PRECISIONS
    )
    gradient_checkpointing: bool | None = setting(
        None, "memory", "compute activations again in the backward pass instead of keeping them: a third slower"
    )
    trained_weights: str | None = setting(
        None, "memory", "number format of the weights that train; bf16 is rounded stochastically",
        ("fp32", "bf16", "fp16"),
    )  # fmt: skip
    optimizer_bits: int | None = setting(
        None, "memory", "bits of each moment of AdamW; below 32 gradients are kept in bf16", (32, 16, 8)
    )
    optimizer_on_cpu: bool | None = setting(
        None, "memory", "keep optimizer, moments and fp32 weights in CPU memory (16 bytes a trained weight)"
    )
    stream: bool | None = setting(
        None, "memory", "keep frozen blocks in CPU memory and copy each to the GPU when it is needed"
    )
    encode_batch_size: int | None = setting(None, "memory", "images that the VAE encodes at once", low=1)
    attention_slice: int = setting(
        0, "memory", "queries that attend at once, for GPUs without a fused attention kernel; 0: all", low=0
    )

    drop_prompt: float = setting(
        0.0, "samples and loss", "fraction of the prompts that is emptied (the paper: 0.5)", low=0, high=1
    )
    drop_hint: float = setting(0.0, "samples and loss", "fraction of the hints that is blacked out", low=0, high=1)
    timestep_bias: float = setting(
        1.0, "samples and loss", "timesteps are 1000 u^bias with u in [0,1): below 1 more of high noise", low=1e-6
    )
    even_timesteps: bool = setting(
        False, "samples and loss", "spread timesteps evenly over successive samples instead of drawing them"
    )
    min_timestep: int = setting(0, "samples and loss", "lowest timestep", low=0, high=999)
    max_timestep: int = setting(0, "samples and loss", "highest timestep; 0: the last one", low=0, high=999)
    noise_offset: float = setting(
        0.0, "samples and loss", "scale of extra noise that is constant over each channel (0.1); 0: none", low=0
    )
    min_snr_gamma: float = setting(
        0.0, "samples and loss", "gamma of the min-SNR weights of timesteps (5); 0: equal weights", low=0
    )
    zero_terminal_snr: bool = setting(
        False, "samples and loss", "stretch the noise schedule to end in pure noise; for v models (Lin et al. 2023)"
    )
    huber: float = setting(
        0.0, "samples and loss", "error from which the loss grows linearly (Huber loss); 0: squared error", low=0
    )

    cache: bool = setting(
        True, "data loading", "compute the outputs of VAE and text encoder once; --no-cache: at every step"
    )
    cache_dir: str = setting("data/.cache", "data loading", "folder of the cache, which runs share")
    workers: int = setting(
        default_workers, "data loading",
        "processes that load images ahead; 0: none (default: 2 beside a GPU, otherwise 0)", low=0, high=256,
    )  # fmt: skip

    logger_freq: int = setting(
        300, "logging", "steps between image logs and measurements of the control gain; 0: never", low=0
    )
    checkpoint_freq: int = setting(
        1000, "logging", "steps between checkpoints (the last step always writes one)", low=1
    )
    keep_checkpoints: int = setting(2, "logging", "newest checkpoints that are kept; 0: all", low=0)
    keep_every: int = setting(
        0, "logging", "of older checkpoints those of every N-th step are kept too; 0: none", low=0
    )
    max_skipped: int = setting(
        30, "logging", "steps in a row without a finite loss and gradient after which the run ends", low=0
    )
    validation: int = setting(8, "logging", "samples held out for validation (a tenth of a small data set)", low=1)
    log_images: int = setting(4, "logging", "validation samples that are drawn in the image log", low=1)
    log_steps: int = setting(50, "logging", "denoising steps of the image log", low=1, high=999)
    guidance: float = setting(
        0.0, "logging", "guidance scale of the image log; 0: the model's own (9 for Stable Diffusion)", low=0
    )
    tensorboard: bool = setting(False, "logging", "write the metrics for TensorBoard too (the package must be there)")

    @property
    def batch(self) -> int:
        """Samples in a step, over all micro-batches and ranks."""
        return self.batch_size * self.accumulate_grad_batches * world_size()


# How the weights move: `--recipe`. The tutorial's is the default; docs/convergence.md has what the other one buys.
RECIPES = {
    "tutorial": dict(
        optimizer="adamw", warmup_steps=0, lr_schedule="constant", weight_decay=1e-2, clip_grad_norm=0.0,
        even_timesteps=False,
    ),
    "fast": dict(
        optimizer="muon", warmup_steps=20, lr_schedule="cosine", weight_decay=0.0, clip_grad_norm=1.0,
        even_timesteps=True,
    ),
}  # fmt: skip
# `python train.py` without flags.
DEMO = RECIPES["fast"] | dict(
    base=str(TINY_BASE), data="data/circles", out="runs/demo", steps=480, batch_size=8, learning_rate=2e-3,
    muon_rate=0.02, timestep_bias=0.6, logger_freq=100, log_steps=10, validation=16, channels_last=True,
    drop_prompt=0.0, flip=True,
)  # fmt: skip
# `base`, `vae`, `data`, `hints` and `columns` may be others on resume, for the same weights and the same rows.
FIXED_ON_RESUME = (
    "resolution", "hint_channels", "hint_resample", "hint_ground", "hint_scale", "prediction", "control", "ema",
    "clip_skip", "seed", "validation", "zero_terminal_snr", "optimizer", "buckets", "bucket_batch",
    "control_depth", "normalize_hint_encoder",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ command line
class CommandLine(NamedTuple):
    """What a command line asks for."""

    config: Config
    resume: str | None  # folder of the run to continue
    overwrite: bool
    data_changed: bool  # accept on resume that rows of the data set are others
    plan: bool  # print what training would take, and train nothing
    vram: float | None  # memory of the GPU that is planned for, GiB
    rate: float | None  # images that this GPU trains on in a second
    trial: bool = False  # no base was named: the data is tried on the tiny one
    report: list[str] | None = None  # folders of runs of which a page is written; nothing trains


def written_flag(name: str, value: Any) -> str:
    """A setting as one writes it on a command line: --batch-size 4, --no-cache."""
    if isinstance(value, bool):
        return flag_name(name if value else f"no_{name}")
    return f"{flag_name(name)} {value:g}" if isinstance(value, float) else f"{flag_name(name)} {value}"


def field_type(name: str) -> type:
    """The type of a setting: bool, int, float or str (without the None that a preset fills in)."""
    hint = get_type_hints(Config)[name]
    return next(kind for kind in get_args(hint) if kind is not types.NoneType) if get_args(hint) else hint


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] = Config.__dataclass_fields__) -> None:
    """Give `parser` the settings `names` as flags, in groups. A flag that is not given leaves no attribute."""
    groups = {}
    for f in dataclasses.fields(Config):
        if f.name not in names:
            continue
        group_name, text, choices = (f.metadata[k] for k in ("group", "help", "choices"))
        group = groups.get(group_name) or groups.setdefault(group_name, parser.add_argument_group(group_name))
        told = f.default in ("", dataclasses.MISSING)  # by the help text, where there is something to tell
        default = "" if told else f" (default: {'of the preset' if f.default is None else f.default})"
        kind, settings = field_type(f.name), dict(help=text + default, default=argparse.SUPPRESS)
        if kind is bool:
            settings |= dict(action=argparse.BooleanOptionalAction)
        elif kind is str or choices:
            settings |= dict(type=kind, choices=choices)
        else:
            settings |= dict(type=number(kind, f.metadata["low"], f.metadata["high"]), metavar="N")
        group.add_argument(flag_name(f.name), **settings)


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags that are given to train.py, and their values."""
    parser = argparse.ArgumentParser(
        usage="train.py [--base FILE --data FOLDER | --resume RUN] [settings]",
        description="Train a ControlNet. Without --base and --data: the demo, circles on the tiny base model. With "
        "--data alone: your own data on the tiny base model, as the demo trains.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder, or from one checkpoint of it")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    parser.add_argument(
        "--data-changed", action="store_true", help="with --resume: accept that rows were removed, repaired or appended"
    )
    parser.add_argument(
        "--report", nargs="+", metavar="RUN",
        help="write RUN/report.html from what the run left, or a page that compares several (--out: its file); "
        "train nothing",
    )  # fmt: skip
    rows = (f"{name}: {' '.join(written_flag(k, v) for k, v in row.items())}" for name, row in RECIPES.items())
    parser.add_argument(
        "--recipe", choices=RECIPES, metavar="NAME",
        help=f"settings for how the weights move, each also a flag ({'; '.join(rows)}; default: tutorial, for the tiny "
        "base model fast)",
    )  # fmt: skip
    plan_group = parser.add_argument_group("planning")
    positive = number(float, 1e-9)
    plan_group.add_argument(
        "--plan", action="store_true", help="print the memory, arithmetic, disk and time of the run; train nothing"
    )
    plan_group.add_argument(
        "--vram", type=positive, metavar="GIB",
        help="with --plan: memory of the GPU; names the fastest preset that fits",
    )  # fmt: skip
    plan_group.add_argument(
        "--rate", type=positive, metavar="N", help="with --plan: images a second, from which the time follows"
    )
    add_flags(parser)
    return vars(parser.parse_args(argv))


def parse(argv: list[str] | None) -> CommandLine:
    """Flags -> what is asked for. Later sources win: defaults, demo or resumed run, recipe, flags."""
    from ldm import TINY

    given = parse_flags(argv)
    once = ("resume", "overwrite", "data_changed", "plan", "vram", "rate", "report")  # flags that are no settings
    resume, overwrite, data_changed, plan, vram, rate, report = (given.pop(k, None) for k in once)
    if report:
        if given.keys() - {"out"} or resume or overwrite or data_changed or plan:
            raise ConfigError("--report writes a page and trains nothing: it goes with --out FILE alone")
        return CommandLine(Config(out=given.get("out", "")), None, False, False, False, None, None, report=report)
    if "recipe" in given:
        if resume:
            raise ConfigError("--recipe belongs to a new run; a resumed run keeps its settings")
        given = RECIPES[given.pop("recipe")] | given
    trial = not resume and "data" in given and "base" not in given
    if (vram or rate) and not plan:
        raise ConfigError("--vram and --rate belong to --plan, which is not given")
    if resume:
        if overwrite or "out" in given:
            raise ConfigError("--resume continues in the folder of the run: leave out --out and --overwrite")
        settings = resumed_settings(resume, given)
    elif "base" not in given and "data" not in given:
        settings = dict(DEMO)
    elif trial:
        settings = DEMO | {"out": f"runs/{short_name(given['data'])}-tiny", "resolution": str(TINY.resolution)}
        settings["flip"] = not given.get("directional_hints")
    elif "base" in given and plan:  # a plan needs no data
        settings = {"out": "runs/plan"}
    elif "base" in given and "data" in given:
        settings = {"out": f"runs/{short_name(given['data'])}"}
    else:
        raise ConfigError(
            "give both --base (a Stable Diffusion file) and --data (a folder); --data alone tries the data on the tiny "
            "base model, and neither is the demo"
        )
    config = Config(**(settings | given))
    return CommandLine(config, resume, bool(overwrite), bool(data_changed), bool(plan), vram, rate, trial)


def resumed_settings(run: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that is continued with the flags `given`. ConfigError for a flag that cannot change."""
    from training.buckets import parse_resolution
    from weights.runs import load_run, run_of

    settings = {k: v for k, v in load_run(run_of(run)).items() if k in Config.__dataclass_fields__}
    settings = dict(buckets=False) | settings  # a run from before there were buckets has none
    if "memory" in given:
        settings = {k: v for k, v in settings.items() if k not in PRESETS["exact"]}
    plain = lambda name, value: parse_resolution(value) if name == "resolution" else value
    for name in FIXED_ON_RESUME:
        if name in given and name in settings and plain(name, given[name]) != plain(name, settings[name]):
            raise ConfigError(f"{run}: {flag_name(name)} cannot change on resume; it was {settings[name]!r}")
    for f in dataclasses.fields(Config):  # what config.json says has the types and ranges of the flags
        if f.name in settings and f.name not in given:
            try:
                check_value(f, settings[f.name])
            except ConfigError as e:
                raise ConfigError(f"{run_of(run) / 'config.json'}: {e}") from e
    return settings


# ------------------------------------------------------------------------------------------------------------- checks
def validate(config: Config) -> None:
    """Raise ConfigError, which names the flag, for a setting of the wrong type or out of its range, and for settings
    that exclude each other. `config` is resolved."""
    for f in dataclasses.fields(config):
        check_value(f, getattr(config, f.name))
    if not config.base or not config.out:
        raise ConfigError(f"--{'out' if config.base else 'base'} is not set")
    from weights.configs import is_run

    if is_run(config.base):
        raise ConfigError(
            f"--base {config.base} is the folder of a run: `python merge.py export {config.base} FILE` makes a base of "
            f"it, and --resume {config.base} goes on with the run"
        )
    if config.min_timestep > (config.max_timestep or 999):
        raise ConfigError(f"--min-timestep is {config.min_timestep}, above --max-timestep {config.max_timestep}")
    if config.stream and not config.gradient_checkpointing:
        raise ConfigError("--stream holds the weights of one block at a time: it needs --gradient-checkpointing")
    if config.trained_weights not in allowed_weight_dtypes(config.precision):
        raise ConfigError(
            f"--trained-weights {config.trained_weights} does not go with --precision {config.precision}; "
            f"{' or '.join(allowed_weight_dtypes(config.precision))} does"
        )
    if config.trained_weights == "fp16" and not config.optimizer_on_cpu:
        raise ConfigError("--trained-weights fp16 needs --optimizer-on-cpu, which updates them in fp32; or use bf16")
    if config.flip and config.directional_hints:
        raise ConfigError(
            "--flip would exchange left and right in hints that tell them apart (--directional-hints): leave one out"
        )
    if config.bucket_batch and not config.buckets:
        raise ConfigError(f"--bucket-batch {config.bucket_batch} belongs to --buckets, which is not given")
    if config.optimizer == "muon" and not config.learning_rate:
        raise ConfigError("--optimizer muon moves biases and norms by AdamW: --learning-rate has to be above 0")
    if config.compile and config.stream:
        raise ConfigError("--compile and --stream exclude each other: compiled kernels need their weights in place")
    if config.tensorboard and not find_spec("tensorboard"):
        raise ConfigError("--tensorboard: the package is not installed; pip install tensorboard, or leave the flag out")
    check_device(config.device)


def check_value(f: dataclasses.Field, value: Any) -> None:
    """ConfigError unless `value` has the type of the field `f`, and is one of its choices or in its range."""
    kind, (choices, low, high) = field_type(f.name), (f.metadata[k] for k in ("choices", "low", "high"))
    if value is None and f.default is None:
        return
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise ConfigError(f"{flag_name(f.name)} is {value!r}, should be of type {kind.__name__}")
    if kind is str and re.search("[\0\ud800-\udfff]", value):  # safetensors opens no such path
        raise ConfigError(f"{flag_name(f.name)} is {value!r}, should be UTF-8 text")
    if choices and value not in choices:
        raise ConfigError(f"{flag_name(f.name)} is {value!r}, should be one of {', '.join(map(str, choices))}")
    if kind in (int, float) and not (low <= value <= high and math.isfinite(value)):
        raise ConfigError(f"{flag_name(f.name)} is {value}, should be {in_words(low, high)}")
