"""What can be set: every setting of a run, as one dataclass that is the command line, and as `config.json`.

A field of `Config` is a flag of the same name (`batch_size`, `--batch-size`), with a group and a sentence of help
beside its default. Later wins: defaults, then the demo or the resumed run, then flags.
"""

import argparse
import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

import checkpoint
import data
import parallel
from checkpoint import CheckpointError
from controlnet import PRECISIONS

TINY_BASE = Path(__file__).parent / "models" / "tiny_sd.safetensors"
# `--memory`: what each setting about memory is, unless it is given by itself. From the fastest to the leanest.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": dict(
        precision="fp32", gradient_checkpointing=False, trained_weights="fp32", optimizer_bits=32,
        optimizer_on_cpu=False, stream=False, encode_batch_size=8,
    ),
    "8gb": dict(
        precision="bf16", gradient_checkpointing=True, trained_weights="fp32", optimizer_bits=8,
        optimizer_on_cpu=False, stream=False, encode_batch_size=2,
    ),
    "6gb": dict(
        precision="bf16", gradient_checkpointing=True, trained_weights="bf16", optimizer_bits=8,
        optimizer_on_cpu=False, stream=False, encode_batch_size=1,
    ),
    "4gb": dict(
        precision="bf16", gradient_checkpointing=True, trained_weights="bf16", optimizer_bits=32,
        optimizer_on_cpu=True, stream=True, encode_batch_size=1,
    ),
}  # fmt: skip


def setting(default: Any, group: str, text: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass
class Config:
    """Every setting of a run; each is a flag of the same name. Defaults are the ControlNet tutorial's."""

    base: str = setting(
        "",
        "what to train",
        "Stable Diffusion file to attach a ControlNet to, or one that has it (a plan also takes sd15, sd21, ...)",
    )
    data: str = setting("", "what to train", "folder with prompt.json, source/ and target/ (Fill50K's layout)")
    out: str = setting("", "what to train", "the run's folder (default: runs/ and the data folder's name)")
    resolution: str = setting("", "what to train", "size of the images, N or WxH (default: the first target's)")
    hint_channels: int = setting(3, "what to train", "channels of the hint images: 1, 3, 4; others from .npy files")
    hint_resample: str = setting(
        "area", "what to train", "how hints are resized; nearest is for label maps", ("area", "nearest")
    )
    prediction: str = setting(
        "auto", "what to train", "v for SD 2.1 at 768 px, which its file cannot tell", ("auto", "eps", "v")
    )
    control: str = setting("", "what to train", "a ControlNet's file or folder to go on from (default: a new one)")
    vae: str = setting("", "what to train", "a VAE's file or folder to take for the base's")
    ema: bool = setting(False, "what to train", "take the base UNet's moving average (model_ema.*) for its weights")
    clip_skip: int = setting(1, "what to train", "2 leaves out the text tower's last layer, as some SD 1.x models want")

    sd_locked: bool = setting(True, "what is trained", "off: the UNet's decoder trains too; use a rate of 2e-6 then")
    only_mid_control: bool = setting(False, "what is trained", "steer through the middle block alone: fast, weak")

    steps: int = setting(10_000, "optimisation", "optimizer steps in all")
    batch_size: int = setting(4, "optimisation", "samples that are computed at once (a micro-batch)")
    accumulate_grad_batches: int = setting(
        1, "optimisation", "micro-batches a step: 4 of them are a batch 4 times as large"
    )
    learning_rate: float = setting(1e-5, "optimisation", "of AdamW")
    warmup_steps: int = setting(0, "optimisation", "steps over which the learning rate rises from 0")
    lr_schedule: str = setting(
        "constant", "optimisation", "of the learning rate after that", ("constant", "linear", "cosine")
    )
    weight_decay: float = setting(1e-2, "optimisation", "of AdamW")
    clip_grad_norm: float = setting(0.0, "optimisation", "largest norm of the gradient; 0 turns clipping off")
    ema_decay: float = setting(
        0.0, "optimisation", "keep a moving average of what trains, to draw and export (0.999); 0: none"
    )
    channels_last: bool = setting(
        False, "optimisation", "keep the channels of images and weights side by side in memory"
    )
    compile: bool = setting(False, "optimisation", "let torch.compile make the kernels: minutes first, then faster")
    deterministic: bool = setting(False, "optimisation", "on a GPU: the same run twice gives the same bits; slower")
    seed: int = setting(0, "optimisation", "all randomness is a function of it and of the sample's number")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "optimisation", "where to compute")

    memory: str = setting(
        "auto", "memory", "a preset for what follows; auto: the first of them that fits the GPU", ("auto", *PRESETS)
    )
    precision: str | None = setting(None, "memory", "of the computation, and of frozen weights", tuple(PRECISIONS))
    gradient_checkpointing: bool | None = setting(
        None, "memory", "keep less for the way back and compute it again: a third slower, much leaner"
    )
    trained_weights: str | None = setting(
        None,
        "memory",
        "of what trains; bf16 is rounded stochastically where the GPU moves it",
        ("fp32", "bf16", "fp16"),
    )
    optimizer_bits: int | None = setting(
        None, "memory", "of each of AdamW's moments; below 32 gradients wait for it in bf16", (32, 16, 8)
    )
    optimizer_on_cpu: bool | None = setting(
        None, "memory", "optimizer, its state and fp32 weights stay in the CPU's memory (16 bytes a trained weight)"
    )
    stream: bool | None = setting(None, "memory", "frozen blocks stay in the CPU's memory and come when needed")
    encode_batch_size: int | None = setting(None, "memory", "images that the VAE encodes at once")
    attention_slice: int = setting(
        0, "memory", "attend from so many positions at once, where attention has no fused kernel; 0: all"
    )

    drop_prompt: float = setting(0.0, "what a step sees", "part of the prompts that is emptied (the paper: 0.5)")
    drop_hint: float = setting(0.0, "what a step sees", "part of the hints that is blacked out")
    timestep_bias: float = setting(1.0, "what a step sees", "t = 1000 u^bias: below 1 more high-noise timesteps")
    even_timesteps: bool = setting(False, "what a step sees", "spread timesteps evenly over successive samples")
    min_timestep: int = setting(0, "what a step sees", "lowest timestep")
    max_timestep: int = setting(0, "what a step sees", "highest timestep; 0: the last")
    noise_offset: float = setting(0.0, "what a step sees", "adds so much noise that is equal all over a channel (0.1)")
    min_snr_gamma: float = setting(0.0, "what a step sees", "weighs timesteps by min-SNR with this gamma (5); 0: alike")
    zero_terminal_snr: bool = setting(
        False, "what a step sees", "for v models: end the schedule in pure noise (Lin et al. 2023)"
    )
    huber: float = setting(0.0, "what a step sees", "from this error on the loss grows linearly; 0: always the square")

    cache: bool = setting(True, "frozen work", "compute the VAE's and text tower's outputs once; off: at every step")
    cache_dir: str = setting("data/.cache", "frozen work", "where they are kept; runs share them")
    workers: int = setting(
        2 if torch.cuda.is_available() else 0, "frozen work", "processes that load samples ahead; 0: none"
    )

    logger_freq: int = setting(
        300, "watching", "steps between image logs and measurements of the control gain; 0: never"
    )
    checkpoint_freq: int = setting(1000, "watching", "steps between checkpoints (there is always one at the end)")
    keep_checkpoints: int = setting(2, "watching", "how many of the newest are kept; 0: all")
    keep_every: int = setting(0, "watching", "of older ones, those of every so many steps are kept; 0: none")
    max_skipped: int = setting(
        30, "watching", "steps in a row with a loss or gradient that is not finite, then it ends"
    )
    validation: int = setting(8, "watching", "samples held out to watch (of small data sets a tenth, at least 2)")
    log_images: int = setting(4, "watching", "of these, how many are drawn in the image log")
    log_steps: int = setting(50, "watching", "denoising steps of the image log")
    guidance: float = setting(0.0, "watching", "guidance scale of the image log; 0: what suits the model (9 for SD)")
    tensorboard: bool = setting(False, "watching", "write the metrics for TensorBoard too, if it is installed")

    @property
    def batch(self) -> int:
        """Samples a step, over all ranks."""
        return self.batch_size * self.accumulate_grad_batches * parallel.world_size()


# What `python train.py` alone does.
DEMO = dict(
    base=str(TINY_BASE),
    data="data/circles",
    out="runs/demo",
    steps=1100,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=20,
    lr_schedule="cosine",
    timestep_bias=0.4,
    even_timesteps=True,
    weight_decay=0.0,
    clip_grad_norm=1.0,
    logger_freq=100,
    log_steps=10,
    validation=16,
    channels_last=True,
    drop_prompt=0.1,
)
# `base`, `vae` and `data` may be other paths on resume, to the same weights and the same rows.
FIXED_ON_RESUME = (
    "resolution", "hint_channels", "hint_resample", "prediction", "control", "ema", "clip_skip", "seed", "validation",
    "zero_terminal_snr",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- flags
class Asked(NamedTuple):
    """What a command line asks for."""

    config: Config
    resume: str | None  # the run to go on with
    overwrite: bool
    plan: bool  # tell what it would take, train nothing
    vram: float | None  # of the GPU that is planned for, GiB
    rate: float | None  # images a second that it makes


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] = Config.__dataclass_fields__) -> None:
    """Give `parser` the settings `names` as flags in groups; what is not given leaves no trace in what it returns."""
    groups = {}
    for f in dataclasses.fields(Config):
        if f.name not in names:
            continue
        name, text = f.metadata["group"], f.metadata["help"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        default = f" (default: {'of the preset' if f.default is None else f.default})" if f.default != "" else ""
        kind = type(PRESETS["fast"].get(f.name, f.default))
        settings = dict(help=text + default, default=argparse.SUPPRESS)
        if kind is bool:
            settings |= dict(action=argparse.BooleanOptionalAction)
        else:
            settings |= dict(type=kind, choices=f.metadata["choices"])
        group.add_argument("--" + f.name.replace("_", "-"), **settings)


def parse(argv: list[str] | None) -> Asked:
    """Flags -> what is asked for. Later wins: defaults, demo or resumed run, flags."""
    parser = argparse.ArgumentParser(
        description="Train a ControlNet. Without --base and --data: the demo, circles on the tiny base.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--resume", metavar="RUN", help="folder of a run to go on with")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    about = parser.add_argument_group("what it would take")
    about.add_argument("--plan", action="store_true", help="tell memory, arithmetic, disk and time, and train nothing")
    about.add_argument(
        "--vram", type=float, metavar="GIB", help="with --plan: memory of the GPU, to name the fastest preset that fits"
    )
    about.add_argument("--rate", type=float, metavar="N", help="with --plan: images a second, to tell the time")
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    resume, overwrite, plan, vram, rate = (given.pop(k, None) for k in ("resume", "overwrite", "plan", "vram", "rate"))
    if (vram or rate) and not plan:
        raise CheckpointError("--vram and --rate are questions for --plan")
    if resume:
        if overwrite or "out" in given:
            raise CheckpointError("--resume goes on in the run's own folder: no --out, no --overwrite")
        settings = {k: v for k, v in checkpoint.load_run(resume).items() if k in Config.__dataclass_fields__}
        if "memory" in given:
            settings = {k: v for k, v in settings.items() if k not in PRESETS["fast"]}
        plain = lambda k, v: data.parse_resolution(v) if k == "resolution" else v
        changed = [k for k in FIXED_ON_RESUME if k in given and plain(k, given[k]) != plain(k, settings[k])]
        if changed:
            raise CheckpointError(
                f"{resume}: --{changed[0].replace('_', '-')} cannot change on resume; it was {settings[changed[0]]!r}"
            )
    elif "base" not in given and "data" not in given:
        settings = dict(DEMO)
    elif "base" in given and plan:  # a plan needs no data
        settings = {"out": "runs/plan"}
    elif "base" in given and "data" in given:
        settings = {"out": f"runs/{Path(given['data']).resolve().name}"}
    else:
        raise CheckpointError(
            "give --base (a Stable Diffusion file) and --data (a folder) both, or neither for the demo"
        )
    return Asked(Config(**(settings | given)), resume, bool(overwrite), bool(plan), vram, rate)


def resolve(config: Config, preset: str) -> Config:
    """`config` with what is not given by itself filled in from `preset`, as far as it goes together with what is given.
    GPUs that do not know bf16 compute in fp16, to which trained weights can be brought if the CPU moves them."""
    filled = {k: v for k, v in PRESETS[preset].items() if getattr(config, k) is None}
    gpu = "cuda" in config.device and torch.cuda.is_available()
    if filled.get("precision") == "bf16" and gpu and not torch.cuda.is_bf16_supported(False):
        filled["precision"] = "fp16"
    whole = dataclasses.replace(config, **filled, memory=preset)
    if "trained_weights" in filled and whole.trained_weights not in go_together(whole.precision):
        half = whole.precision == "fp16" and whole.optimizer_on_cpu
        whole.trained_weights = "fp16" if half else "fp32"
    if "stream" in filled and (config.compile or not whole.gradient_checkpointing):
        whole.stream = False
    return whole


def go_together(precision: str) -> tuple[str, ...]:
    """What trained weights can be kept in when a step is computed in `precision`."""
    return ("fp32", "fp16") if precision == "fp16" else ("fp32", "bf16")


def validate(config: Config) -> None:
    """Refuse settings that make no sense, by name."""
    if not config.base or not config.out:
        raise CheckpointError(f"--{'out' if config.base else 'base'} is not set")
    if not 1 <= config.log_steps <= 999:
        raise CheckpointError(f"--log-steps is {config.log_steps}, should be 1 to 999")
    for name in (
        "steps",
        "log_images",
        "batch_size",
        "accumulate_grad_batches",
        "hint_channels",
        "checkpoint_freq",
        "encode_batch_size",
    ):
        if getattr(config, name) < 1:
            raise CheckpointError(f"--{name.replace('_', '-')} is {getattr(config, name)}, should be 1 or more")
    for name in ("drop_prompt", "drop_hint", "ema_decay"):
        if not 0 <= getattr(config, name) <= (1 if name != "ema_decay" else 0.99999):
            raise CheckpointError(f"--{name.replace('_', '-')} is {getattr(config, name)}, should be 0 to 1")
    if not 0 <= config.min_timestep <= (config.max_timestep or 999) <= 999 or config.timestep_bias <= 0:
        raise CheckpointError(
            f"--min-timestep {config.min_timestep}, --max-timestep {config.max_timestep}, --timestep-bias "
            f"{config.timestep_bias}: 0 <= min <= max <= 999 and a bias above 0 are needed"
        )
    if config.stream and not config.gradient_checkpointing:
        raise CheckpointError("--stream holds weights for one block at a time: it needs --gradient-checkpointing")
    if config.trained_weights not in go_together(config.precision):
        raise CheckpointError(
            f"--trained-weights {config.trained_weights} does not go with --precision {config.precision}, only "
            f"{' or '.join(go_together(config.precision))} does"
        )
    if config.trained_weights == "fp16" and not config.optimizer_on_cpu:
        raise CheckpointError("--trained-weights fp16 needs --optimizer-on-cpu, which moves them in fp32; or take bf16")
    if config.compile and config.stream:
        raise CheckpointError("--compile and --stream exclude each other: compiled kernels need their weights in place")
    if config.tensorboard and not find_spec("tensorboard"):
        raise CheckpointError("--tensorboard: the package is not there; pip install tensorboard, or leave the flag out")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError(f"--device {config.device}: this PyTorch sees no GPU; --device cpu works, slowly")
