"""How fast, how much memory, against whom?

    python bench.py step --model sd15 --resolution 256 --against diffusers
    python bench.py sample --model tiny --against diffusers
    python bench.py memory --model sd15 --batch-size 1 4        what each preset takes
    python bench.py data --resolution 128                       samples a second, from PNG and from the cache

Models have random weights of the real shapes, so nothing is downloaded. Our step is that of train.py, on cached latents
and contexts; diffusers' step is that of its train_controlnet.py: VAE and text encoder at every step, AdamW, clipping.
Each of the two runs in a process of its own, a worker, which makes one step (or image) when it is asked. The workers
are asked in turns, A B A B, so that other load on the machine meets both, and the ratio is taken pair by pair.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import data
import merge
import train
from config import PRESETS, Config, ConfigError, add_flags, resolve, validate
from ldm import MODELS, PRECISIONS, ControlLDM, compute_dtype_for, use_tf32
from lowvram import estimate
from lowvram.process import GIB, disable_malloc_trim, peak_resident
from sampler import Control, Sampling, sample
from toy import circles
from training import cache
from training.distributed import Ranks
from training.interruption import Interruption
from training.records import to_uint8
from training.setup import build_trainer
from weights import CheckpointError, diffusers_folder

GUIDANCE = 7.5
H100_FLOPS = 0.5 * 989e12  # a second: half of the dense bf16 rate in the data sheet of the H100 SXM


# ------------------------------------------------------------------------------------------------- what is measured
def random_model(name: str) -> ControlLDM:
    """A model of MODELS with small random weights, none of them zero."""
    with torch.device("meta"):
        model = ControlLDM(MODELS[name])
    model.to_empty(device="cpu").requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    return model


class OurStep:
    """A step of the loop in train.py, on one batch again and again."""

    def __init__(self, config: Config, name: str):
        model, side = random_model(name), int(config.resolution)
        if config.cache:
            cache.release_encoders(model)
        else:
            for part in (model.vae, model.text):
                part.to(config.device, compute_dtype_for(config.precision, config.device))
        batch = estimate.fake_batch(config, MODELS[name], (side, side))
        batch = {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in batch.items()}
        if not config.cache:
            batch = {k: v for k, v in batch.items() if k != "context"} | {"prompt": ["a circle"] * config.batch_size}
        self.trainer, self.batches = build_trainer(config, model), itertools.repeat(batch)
        self.loss = train.compiled_loss() if config.compile else train.diffusion_loss

    def __call__(self) -> None:
        self.trainer.config.steps = self.trainer.step + 1
        with contextlib.redirect_stderr(io.StringIO()):  # where the loop shows no progress bar
            train.training_loop(self.trainer, self.batches, self.loss, Ranks(), None, lambda: True, Interruption())


def diffusers_step(config: Config, name: str) -> Callable[[], None]:
    """The step of diffusers' train_controlnet.py, with its defaults, on images and prompts that are made beforehand."""
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    shapes, side, dtype, device = MODELS[name], int(config.resolution), PRECISIONS[config.precision], config.device
    unet = UNet2DConditionModel.from_config(diffusers_folder.unet_config(shapes.unet, side // 8, False))
    control_config = diffusers_folder.control_config(shapes.unet, 3, shapes.hint_widths)
    control = ControlNetModel.from_config(control_config).train()
    vae = AutoencoderKL.from_config(diffusers_folder.vae_config(shapes.vae, shapes.scale_factor, side))
    text = CLIPTextModel(CLIPTextConfig(**diffusers_folder.text_config(shapes.text)))
    for part in (unet, vae, text):
        part.requires_grad_(False).to(device, dtype)
    control.to(device)
    if config.gradient_checkpointing:
        control.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(control.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    images, hints = (torch.rand(config.batch_size, 3, side, side, device=device) for _ in range(2))
    ids = torch.randint(1000, (config.batch_size, 77), device=device)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)

    def step() -> None:
        for _ in range(config.accumulate_grad_batches):
            latents = vae.encode(images.to(dtype)).latent_dist.sample() * shapes.scale_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (len(images),), device=device)
            x_t = scheduler.add_noise(latents.float(), noise.float(), t).to(dtype)
            context = text(ids, return_dict=False)[0]
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                down, mid = control(x_t, t, context, controlnet_cond=hints.to(dtype), return_dict=False)
            eps = unet(
                x_t, t, context, down_block_additional_residuals=[d.to(dtype) for d in down],
                mid_block_additional_residual=mid.to(dtype), return_dict=False,
            )[0]  # fmt: skip
            loss = F.mse_loss(eps.float(), noise.float()) / config.accumulate_grad_batches
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    return step


def our_image(config: Config, name: str) -> Callable[[], None]:
    """An image of our sampler: DDIM in `config.log_steps` steps, with guidance and control."""
    side = int(config.resolution)
    model, hint = random_model(name), torch.rand(1, 3, side, side)
    model.to(config.device, compute_dtype_for(config.precision, config.device))

    settings = Sampling(config.log_steps, scale=GUIDANCE)

    def draw() -> None:
        context = model.encode_prompts(["a circle", ""])
        controls = [Control(model.control_model, hint)]
        latents = sample(model, context[:1], context[1:], controls, (side, side), settings)
        to_uint8(model.decode(latents))

    return torch.no_grad()(draw)


def diffusers_image(config: Config, name: str) -> Callable[[], None]:
    """An image of diffusers' pipeline, with the same weights."""
    from diffusers import StableDiffusionControlNetPipeline

    side, dtype = int(config.resolution), PRECISIONS[config.precision]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        files = diffusers_folder.diffusers_folder(name, random_model(name).state_dict(), MODELS[name])
        merge.save_folder(f"{folder}/model", files, {}, False)
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(f"{folder}/model", dtype=dtype)
    pipeline.to(config.device).set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=config.log_steps, guidance_scale=GUIDANCE, width=side, height=side)
    hint = torch.rand(1, 3, side, side)
    return lambda: pipeline("a circle", image=hint, **settings)


TASKS = {
    "step": {"ours": OurStep, "diffusers": diffusers_step},
    "image": {"ours": our_image, "diffusers": diffusers_image},
}


# ----------------------------------------------------------------------------------------------------------- workers
def serve(task: str, who: str, name: str, config: Config) -> None:
    """The process of a worker: answers each line of stdin with a line of JSON on stdout.

    run: seconds of one step or image. breakdown: seconds of the parts of a step. rate: operations a second in products
    of matrices. peak: most GiB of memory so far.
    """
    torch.manual_seed(0)
    use_tf32(config.precision != "fp32")
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)
    if who == "ours":
        disable_malloc_trim()  # as train.py and sampler.py do
    function, peak = TASKS[task][who](config, name), 0.0
    for line in sys.stdin:
        reset_peak(config.device)
        if line.strip() == "run":
            start = time.perf_counter()
            function()
            synchronize(config.device)
            answer = time.perf_counter() - start
            peak = max(peak, peak_since_reset(config.device))
        elif line.strip() == "breakdown":
            answer = breakdown(function)
        elif line.strip() == "rate":
            answer = matmul_rate(config)
        else:
            answer = peak
        print(json.dumps(answer), flush=True)


def reset_peak(device: str) -> None:
    """Start to count the peak memory anew. (On a CPU only Linux can.)"""
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset(device: str) -> float:
    """The most GiB since `reset_peak`: of a GPU allocated, of the CPU resident."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated() / GIB
    try:
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / GIB
    except (OSError, TypeError):  # not Linux
        return peak_resident()


def ask(worker: subprocess.Popen, question: str) -> float | dict[str, float]:
    """The answer of a worker's process to one of the questions that `serve` knows."""
    print(question, file=worker.stdin, flush=True)
    answer = worker.stdout.readline()
    if not answer:
        sys.exit("bench.py: a worker process ended; its error is printed above (out of memory?)")
    return json.loads(answer)


class Comparison(NamedTuple):
    """What `compare` measured."""

    seconds: list[float]  # of each of our runs
    rates: list[float]  # operations a second of the machine, measured after each step
    parts: dict[str, float]  # seconds of the parts of our step
    rows: dict[str, str]  # of the report: peak memory, and the comparison with diffusers


def compare(task: str, config: Config, name: str, repeat: int, warmup: int, against: bool) -> Comparison:
    """Run `task` `warmup` + `repeat` times, in turns with diffusers if `against`, and measure the last `repeat` runs.

    Peak memory is that allocated on a GPU, or resident on a CPU.
    """
    seconds, rates, parts = {who: [] for who in (TASKS[task] if against else ["ours"])}, [], {}
    with contextlib.ExitStack() as stack:  # which ends the processes
        workers = {}
        for who in seconds:
            command = [sys.executable, __file__, "serve", task, who, name, json.dumps(asdict(config))]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            workers[who] = stack.enter_context(worker)
        for turn in range(warmup + repeat):
            taken = {who: ask(worker, "run") for who, worker in workers.items()}
            rate = ask(workers["ours"], "rate") if task == "step" else 0.0
            if turn >= warmup:
                rates.append(rate)
                for who in workers:
                    seconds[who].append(taken[who])
        peaks = {who: ask(worker, "peak") for who, worker in workers.items()}
        if task == "step" and not config.compile:  # timed functions would be compiled anew
            parts = ask(workers["ours"], "breakdown")
    rows = {"peak memory, GiB": f"{peaks['ours']:.2f}"}
    if against:
        ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True))
        rows |= {
            "diffusers, seconds": spread(seconds["diffusers"]),
            "diffusers, peak GiB": f"{peaks['diffusers']:.2f}",
            "times as fast": f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, pair by pair)",
            "fraction of their memory": f"{peaks['ours'] / peaks['diffusers']:.2f}",
        }
    return Comparison(seconds["ours"], rates, parts, rows)


def spread(values: list[float]) -> str:
    """Median, minimum and maximum in words."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


# -------------------------------------------------------------------------------------------------------------- step
def matmul_rate(config: Config) -> float:
    """Operations a second in products of large matrices, in the precision of the run: the limit of the machine."""
    side, dtype = 8192 if "cuda" in config.device else 2048, compute_dtype_for(config.precision, config.device)
    a, b = (torch.randn(side, side, device=config.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        synchronize(config.device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[1:])


def synchronize(device: str) -> None:
    if "cuda" in device:
        torch.cuda.synchronize(device)


def breakdown(step: OurStep) -> dict[str, float]:
    """Seconds of the parts of our step. Waiting for the GPU after each part makes the step a little slower."""
    trainer, model, device = step.trainer, step.trainer.model, step.trainer.config.device
    parts = {
        "batch to the device": [(train, "prepare_batch")], "of which VAE": [(model.vae, "moments")],
        "of which text encoder": [(model.text, "forward")], "ControlNet": [(model.control_model, "forward")],
        "UNet, encoder": [(model.unet, "encode")], "UNet, decoder": [(model.unet, "decode")],
        "backward": [(torch.Tensor, "backward")],
        "optimizer and clipping": [
            (trainer.home, "wait_for_grads"), (trainer.scaler, "unscale_"), (nn.utils, "get_total_norm"),
            (nn.utils, "clip_grads_with_norm_"), (trainer.scaler, "step"), (trainer.home, "upload_weights"),
        ],
    }  # fmt: skip
    spent = dict.fromkeys(parts, 0.0)
    with contextlib.ExitStack() as stack:
        for label, functions in parts.items():
            for owner, name in functions:
                stack.enter_context(timed(owner, name, label, spent, device))
        start = time.perf_counter()
        step()
        synchronize(device)
        total = time.perf_counter() - start
    return spent | {"everything else": total - sum(v for k, v in spent.items() if not k.startswith("of which"))}


@contextlib.contextmanager
def timed(owner: object, name: str, label: str, spent: dict[str, float], device: str) -> Iterator[None]:
    """While entered, the seconds of calls of `owner.name` are added to `spent[label]`."""
    function, is_own = getattr(owner, name), name in vars(owner)

    @functools.wraps(function)
    def timed_function(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        out = function(*args, **kwargs)
        synchronize(device)
        spent[label] += time.perf_counter() - start
        return out

    setattr(owner, name, timed_function)
    yield
    setattr(owner, name, function) if is_own else delattr(owner, name)


def measure_step(config: Config, name: str, repeat: int, against: bool) -> dict[str, str]:
    """Time and memory of our step, its fraction of the machine's limit, its parts, and diffusers' step beside it."""
    side = int(config.resolution)
    flop = estimate.flops(config, MODELS[name], (side, side)) * config.batch
    result = compare("step", config, name, repeat, 2, against)
    fractions = [flop / rate / s for s, rate in zip(result.seconds, result.rates, strict=True)]
    return {
        "model": f"{name}, {side} px, batch {config.batch_size} x {config.accumulate_grad_batches}, {config.precision}",
        "machine": machine(config),
        "seconds a step": spread(result.seconds),
        "images a second": f"{config.batch / statistics.median(result.seconds):.3f}",
        "TFLOP a step": f"{flop / 1e12:.3f}",
        "matrix products, TFLOP/s": spread([rate / 1e12 for rate in result.rates]),
        "fraction of the limit": spread(fractions),
        **{f"    {label}": f"{seconds:.3f}" for label, seconds in result.parts.items() if seconds > 0},
        **result.rows,
    }


def machine(config: Config) -> str:
    """The device and the version of PyTorch, in words."""
    if "cuda" in config.device:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------ images, presets and data
def measure_sample(config: Config, name: str, repeat: int, against: bool) -> dict[str, str]:
    """Seconds an image of our sampler, and of diffusers' pipeline."""
    result = compare("image", config, name, repeat, 1, against)
    return {
        "model": f"{name}, {config.resolution} px, {config.log_steps} steps, {config.precision}",
        "machine": machine(config),
        "seconds an image": spread(result.seconds),
        **result.rows,
    }


def memory_table(name: str, side: int, batch_sizes: list[int], repeat: int) -> str:
    """The memory of each preset as a table: predicted for each batch size. With `repeat` also the time of a step
    relative to `fast` and, on a GPU, the measured memory."""
    cuda, fast = torch.cuda.is_available(), {}
    rows = [["preset", *(f"batch {b}: predicted GiB" for b in batch_sizes)]]
    for b in batch_sizes if repeat else ():
        rows[0] += [f"batch {b}: measured GiB"] * cuda + [f"batch {b}: time"]
    for preset in PRESETS:
        configs = [resolve(Config(base=name, resolution=str(side), batch_size=b), preset) for b in batch_sizes]
        peaks = [estimate.largest_peak(estimate.predict(c, MODELS[name], (side, side))) for c in configs]
        row = [preset, *(f"{peak / GIB:.2f}" for peak in peaks)]
        for c in configs if repeat else ():
            result = compare("step", c, name, repeat, 1, False)
            median = statistics.median(result.seconds)
            row += [result.rows["peak memory, GiB"]] * cuda
            row.append(f"{median / fast.setdefault(c.batch_size, median):.2f} x")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def write_layouts(folder: Path, count: int, side: int) -> dict[str, dict[str, str]]:
    """The same circles in each layout under `folder`: words for the layout -> arguments of `data.FolderDataset`."""
    circles.make(folder, count, side)
    rows = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    table = "".join(f"{row['target']},{row['source']},{row['prompt']}\n" for row in rows)
    (folder / "pairs.csv").write_text("target,hint,prompt\n" + table)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for i, row in enumerate(rows):
            caption = (folder / row["target"]).with_suffix(".txt")
            caption.write_text(row["prompt"])
            for name, file in ((f"{i}.png", row["target"]), (f"{i}.hint.png", row["source"]), (f"{i}.txt", caption)):
                shard.add(folder / file, name)
    return {
        "": dict(root=str(folder)),
        " in a table (CSV)": dict(root=str(folder / "pairs.csv")),
        " in two folders": dict(root=str(folder / "target"), hints=str(folder / "source")),
        " in a tar shard": dict(root=str(folder / "shard.tar")),
    }


def measure_data(side: int, workers: int, count: int = 256) -> dict[str, str]:
    """Samples of circles that the loader gives in a second, from PNG in each layout (a run without cache) and from
    the cache (a run with it, which reads hints alone), and what a fast GPU asks for."""
    result = {"images": f"{count} of {side} px, {workers} workers"}

    def rate(dataset: data.FolderDataset, encodings: cache.CachedEncodings | None) -> str:
        samples = data.Samples(dataset, range(count), 0, (4, side // 8, side // 8), encodings=encodings)
        start = time.perf_counter()
        for _ in data.batches(samples, 0, 2 * count, 8, workers):
            pass
        return f"{2 * count / (time.perf_counter() - start):.0f}"

    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in write_layouts(Path(folder), count, side).items():
            dataset = data.FolderDataset(size=(side, side), **arguments)
            result[f"samples a second from PNG{name}"] = rate(dataset, None)
        dataset = data.FolderDataset(folder, (side, side))
        model = ControlLDM(MODELS["tiny"], hint_channels=None).requires_grad_(False)
        with torch.no_grad():
            result["samples a second from the cache"] = rate(
                dataset, cache.build_cache(model, dataset, f"{folder}/cache", 8)
            )
    size = data.fit_size((side, side), MODELS["sd15"].multiple)
    needed = H100_FLOPS / estimate.flops(Config(base="sd15", out="-"), MODELS["sd15"], size)
    result["samples a second that SD 1.5 needs on an H100 at half of its bf16 rate"] = f"{needed:.0f}"
    return result


# --------------------------------------------------------------------------------------------------------------- CLI
STEP_SETTINGS = {  # the settings of train.py on which the time of a step depends
    "device", "batch_size", "accumulate_grad_batches", "precision", "memory", "cache", "channels_last", "compile",
    "gradient_checkpointing", "attention_slice", "optimizer_bits", "trained_weights", "optimizer_on_cpu", "stream",
    "ema_decay", "only_mid_control", "sd_locked",
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the speed and memory of training and drawing.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, text: str, **defaults: object) -> Callable[..., argparse.Action]:
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--resolution", type=int, help="side of the images in pixels (default: the model's)")
        command.set_defaults(json=False, **defaults)
        return command.add_argument

    as_json = dict(action="store_true", help="print JSON instead of a table")
    models = dict(choices=tuple(MODELS), help="model whose shapes are measured, with random weights")
    flag = add_command("step", "a training step: its time, memory, parts, and fraction of the machine's limit")
    flag("--model", default="tiny", **models)
    flag("--json", **as_json)
    flag("--against", choices=("diffusers",), help="measure the step of this library too, in turns with ours")
    flag("--repeat", type=int, default=5, help="steps that are measured, after two that are not")
    add_flags(commands.choices["step"], STEP_SETTINGS)
    flag = add_command("sample", "the time of an image of the sampler")
    flag("--model", default="tiny", **models)
    flag("--json", **as_json)
    flag("--against", choices=("diffusers",), help="measure this library's pipeline too, on the same weights")
    flag("--steps", type=int, default=20, dest="log_steps", metavar="N", help="denoising steps")
    add_flags(commands.choices["sample"], {"precision", "device"})
    flag("--repeat", type=int, default=3, help="images that are measured, after one that is not")
    flag = add_command("memory", "the presets: memory as predicted and, on a GPU, as measured")
    flag("--model", default="sd15", **models)
    flag("--batch-size", type=int, nargs="+", default=[1, 4], help="one or more batch sizes")
    flag("--repeat", type=int, default=0, help="steps that are measured with each preset; 0: only predict")
    flag = add_command("data", "the samples that the loader gives in a second", model="tiny")
    flag("--json", **as_json)
    flag("--workers", type=int, default=0, help="processes that load samples; 0: the main process loads")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    side = args.resolution or MODELS[args.model].resolution
    if side % MODELS[args.model].multiple:
        sys.exit(f"bench.py: --resolution must be a multiple of {MODELS[args.model].multiple} for {args.model}")
    if getattr(args, "against", None) and not (find_spec("diffusers") and find_spec("transformers")):
        sys.exit("bench.py: --against diffusers needs that package: pip install -r requirements-dev.txt")
    if args.command == "memory":
        print(memory_table(args.model, side, args.batch_size, args.repeat))
        return
    if args.command == "data":
        result = measure_data(side, args.workers)
    else:
        settings = {k: v for k, v in vars(args).items() if k in STEP_SETTINGS | {"log_steps"}}
        config = Config(base=args.model, out="none", resolution=str(side), clip_grad_norm=1.0, **settings)
        config = resolve(config, "exact" if config.memory == "auto" else config.memory)
        validate(config)
        measure = measure_step if args.command == "step" else measure_sample
        result = measure(config, args.model, args.repeat, bool(args.against))
    print(json.dumps(result) if args.json else "\n".join(f"{k:32} {v}" for k, v in result.items()))


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["serve"]:
            serve(*sys.argv[2:5], Config(**json.loads(sys.argv[5])))
        else:
            main()
    except (CheckpointError, ConfigError) as e:
        sys.exit(f"bench.py: {e}")
