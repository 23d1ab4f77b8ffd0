"""How fast, how much memory, against whom?

    python bench.py step --model sd15 --resolution 256 --against diffusers
    python bench.py sample --model tiny --against diffusers
    python bench.py memory --model sd15 --batch-size 1 4        what each preset takes
    python bench.py data --resolution 128                       samples a second, from PNG and from the cache

Random weights of the real shapes, so nothing is downloaded. Our step is train.py's own, on cached latents and contexts;
diffusers' is that of its train_controlnet.py: VAE and text encoder at every step, AdamW, clipping. Each contender is a
process of its own, which makes one step (or image) when it is asked; they are asked in turns, A B A B, so that what
else goes on in the machine meets both, and the ratio is taken pair by pair.
"""

import argparse
import contextlib
import functools
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import circles
import data
import engine
import exchange
import frozen
import log
import memory
import merge
import plan
import sampler
from checkpoint import CheckpointError
from config import PRESETS, Config, add_flags, resolve, validate
from controlnet import MODELS, PRECISIONS, ControlLDM, computed_in, use_tf32

GIB = 2**30


# ---------------------------------------------------------------------------------------------------------- contenders
def random_model(name: str) -> ControlLDM:
    """A model of MODELS with small random weights and no zeros."""
    with torch.device("meta"):
        model = ControlLDM(MODELS[name])
    model.to_empty(device="cpu").requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    return model


def our_step(config: Config, name: str) -> tuple[Callable[[], None], engine.Engine]:
    """Our step, on a batch that is there, and the engine that makes it."""
    model, side = random_model(name), int(config.resolution)
    if config.cache:
        frozen.rest(model)
    else:
        for part in (model.vae, model.text):
            part.to(config.device, computed_in(config.precision, config.device))
    made = engine.assemble(config, model)
    sample = plan.fake_batch(config, MODELS[name], (side, side))
    sample = {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in sample.items()}
    if not config.cache:
        sample = {k: v for k, v in sample.items() if k != "context"} | {"prompt": ["a circle"] * config.batch_size}
    batches = itertools.repeat(sample)
    return lambda: made.step(batches, config.learning_rate), made


def diffusers_step(config: Config, name: str) -> tuple[Callable[[], None], None]:
    """The step of diffusers' train_controlnet.py, with its defaults, on images and prompts that are there."""
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    shapes, side, dtype, device = MODELS[name], int(config.resolution), PRECISIONS[config.precision], config.device
    unet = UNet2DConditionModel.from_config(exchange.unet_config(shapes.unet, side // 8, False))
    control = ControlNetModel.from_config(exchange.control_config(shapes.unet, 3, shapes.hint_widths)).train()
    vae = AutoencoderKL.from_config(exchange.vae_config(shapes.vae, shapes.scale_factor, side))
    text = CLIPTextModel(CLIPTextConfig(**exchange.text_config(shapes.text)))
    for part in (unet, vae, text):
        part.requires_grad_(False).to(device, dtype)
    control.to(device)
    if config.gradient_checkpointing:
        control.enable_gradient_checkpointing()
    noise = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(control.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    images, hints = (torch.rand(config.batch_size, 3, side, side, device=device) for _ in range(2))
    ids = torch.randint(1000, (config.batch_size, 77), device=device)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)

    def step() -> None:
        for _ in range(config.accumulate_grad_batches):
            latents = vae.encode(images.to(dtype)).latent_dist.sample() * shapes.scale_factor
            eps = torch.randn_like(latents)
            t = torch.randint(0, 1000, (len(images),), device=device)
            noisy = noise.add_noise(latents.float(), eps.float(), t).to(dtype)
            context = text(ids, return_dict=False)[0]
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                down, mid = control(noisy, t, context, controlnet_cond=hints.to(dtype), return_dict=False)
            said = unet(
                noisy, t, context, down_block_additional_residuals=[d.to(dtype) for d in down],
                mid_block_additional_residual=mid.to(dtype), return_dict=False,
            )[0]  # fmt: skip
            loss = F.mse_loss(said.float(), eps.float()) / config.accumulate_grad_batches
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    return step, None


def our_image(config: Config, name: str) -> tuple[Callable[[], None], None]:
    """Our sampler's image: DDIM in `config.log_steps` steps, guidance, control."""
    side = int(config.resolution)
    model, hint = random_model(name), torch.rand(1, 3, side, side)
    model.to(config.device, computed_in(config.precision, config.device))

    def draw() -> None:
        context = model.encode_prompts(["a circle", ""])
        latents = sampler.sample(model, context[:1], context[1:], hint, (side, side), config.log_steps, GUIDANCE)
        log.to_uint8(model.decode(latents))

    return torch.no_grad()(draw), None


def diffusers_image(config: Config, name: str) -> tuple[Callable[[], None], None]:
    """The image of diffusers' pipeline, with the same weights."""
    from diffusers import StableDiffusionControlNetPipeline

    side, dtype = int(config.resolution), PRECISIONS[config.precision]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        merge.save_folder(
            f"{folder}/model", merge.diffusers_folder(random_model(name).state_dict(), MODELS[name]), {}, False
        )
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(f"{folder}/model", dtype=dtype)
    pipeline.to(config.device).set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=config.log_steps, guidance_scale=GUIDANCE, width=side, height=side)
    hint = torch.rand(1, 3, side, side)
    return lambda: pipeline("a circle", image=hint, **settings), None


GUIDANCE = 7.5
CONTENDERS = {
    "step": {"ours": our_step, "diffusers": diffusers_step},
    "image": {"ours": our_image, "diffusers": diffusers_image},
}


def serve(what: str, who: str, name: str, config: Config) -> None:
    """A contender's process: for each line that comes in, it makes a step or an image, or says what a step is made of,
    the rate of the machine, or its peak memory; one line of JSON out."""
    torch.manual_seed(0)
    use_tf32(config.precision == "tf32")
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)
    if who == "ours":
        memory.keep_freed()  # as train.py and sampler.py
    make, made = CONTENDERS[what][who](config, name)
    most = 0.0
    for line in sys.stdin:
        forget_peak(config.device)
        start = time.perf_counter()
        if line.strip() == "make":
            make()
            wait(config.device)
            answer = time.perf_counter() - start
            most = max(most, peak(config.device))
        elif line.strip() == "breakdown":
            answer = breakdown(made, make)
        elif line.strip() == "rate":
            answer = product_rate(config)
        else:
            answer = most
        print(json.dumps(answer), flush=True)


def forget_peak(device: str) -> None:
    """Count the most memory anew (on the CPU only Linux does)."""
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> float:
    """The most GiB since then: on a GPU allocated, on the CPU resident."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated() / GIB
    try:
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / GIB
    except (OSError, TypeError):  # another system's
        return memory.most_resident()


class Contender:
    """A contender's process, from outside."""

    def __init__(self, what: str, who: str, name: str, config: Config):
        command = [sys.executable, __file__, "serve", what, who, name, json.dumps(asdict(config))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> float | dict:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("bench.py: a contender ended; its message is above (memory?)")
        return json.loads(answer)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def race(what: str, config: Config, name: str, repeat: int, warm: int, against: bool) -> Iterator[tuple]:
    """Ours, the seconds that it took `repeat` times after `warm` to warm up, the machine's rate after each, the peak
    GiB (CPU: resident; CUDA: allocated), and, `against` diffusers in turns with it, the rows of a table that compare.
    """
    contenders = {who: Contender(what, who, name, config) for who in (CONTENDERS[what] if against else ["ours"])}
    seconds, rates = {who: [] for who in contenders}, []
    for turn in range(warm + repeat):
        took = {who: contender.ask("make") for who, contender in contenders.items()}
        rate = contenders["ours"].ask("rate") if what == "step" else None
        if turn >= warm:
            rates.append(rate)
            for who in contenders:
                seconds[who].append(took[who])
    most = {who: contender.ask("peak") for who, contender in contenders.items()}
    rows = {}
    if against:
        pairs = sorted(b / a for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True))
        rows = {
            "diffusers, seconds": spread(seconds["diffusers"]),
            "diffusers, peak GiB": f"{most['diffusers']:.2f}",
            "times as fast": f"{statistics.median(pairs):.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f}, pair by pair)",
            "of their memory": f"{most['ours'] / most['diffusers']:.2f}",
        }
    try:
        yield contenders["ours"], seconds["ours"], rates, most["ours"], rows
    finally:
        for contender in contenders.values():
            contender.end()


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


# ---------------------------------------------------------------------------------------------------------------- step
def product_rate(config: Config) -> float:
    """Operations a second in products of large matrices, in the precision of the run: the machine's limit."""
    side, dtype = 8192 if "cuda" in config.device else 2048, computed_in(config.precision, config.device)
    a, b = (torch.randn(side, side, device=config.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        wait(config.device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[1:])


def wait(device: str) -> None:
    if "cuda" in device:
        torch.cuda.synchronize(device)


def breakdown(made: engine.Engine, step: Callable[[], None]) -> dict[str, float]:
    """Seconds of the parts of a step. Waiting for the GPU after each makes the whole a little slower than it is."""
    model, device = made.model, made.config.device
    parts = {
        "batch to the device": (frozen, "inputs"), "of it VAE": (model.vae, "moments"),
        "of it text": (model.text, "forward"),
        "ControlNet": (model.control_model, "forward"), "UNet, encoder": (model.unet, "encode"),
        "UNet, decoder": (model.unet, "decode"), "backward": (torch.Tensor, "backward"),
        "optimizer and clipping": (made, "update"),
    }  # fmt: skip
    spent = dict.fromkeys(parts, 0.0)
    with contextlib.ExitStack() as stack:
        for label, (owner, name) in parts.items():
            stack.enter_context(clocked(owner, name, label, spent, device))
        start = time.perf_counter()
        step()
        wait(device)
        spent["the rest"] = time.perf_counter() - start - sum(v for k, v in spent.items() if not k.startswith("of it"))
    return spent


@contextlib.contextmanager
def clocked(owner: object, name: str, label: str, spent: dict[str, float], device: str) -> Iterator[None]:
    """While it is entered, calls of `owner.name` are timed."""
    real, own = getattr(owner, name), name in vars(owner)

    @functools.wraps(real)
    def timed(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        out = real(*args, **kwargs)
        wait(device)
        spent[label] += time.perf_counter() - start
        return out

    setattr(owner, name, timed)
    yield
    setattr(owner, name, real) if own else delattr(owner, name)


def measure_step(config: Config, name: str, repeat: int, against: bool) -> dict:
    """Seconds and peak memory of our step, the fraction of the machine's limit, what it is made of, and diffusers'."""
    side = int(config.resolution)
    need = plan.flops(config, MODELS[name], (side, side)) * config.batch
    with race("step", config, name, repeat, 2, against) as (ours, seconds, rates, peak, comparison):
        parts = {} if config.compile else ours.ask("breakdown")  # its clocks would have all compiled anew
    size = f"{name}, {side} px, batch {config.batch_size} x {config.accumulate_grad_batches}, {config.precision}"
    return {
        "model": size,
        "machine": machine(config),
        "seconds a step": spread(seconds),
        "images a second": f"{config.batch / statistics.median(seconds):.3f}",
        "TFLOP a step": f"{need / 1e12:.3f}",
        "products, TFLOP/s": spread([rate / 1e12 for rate in rates]),
        "fraction of the limit": spread([need / rate / s for s, rate in zip(seconds, rates, strict=True)]),
        **{f"    {k}": f"{v:.3f}" for k, v in parts.items() if v > 0},
        "peak memory, GiB": f"{peak:.2f}",
        **comparison,
    }


def machine(config: Config) -> str:
    if "cuda" in config.device:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


# -------------------------------------------------------------------------------------------------------------- sample
def measure_sample(config: Config, name: str, repeat: int, against: bool) -> dict:
    """Seconds an image of our sampler, and of diffusers' pipeline."""
    with race("image", config, name, repeat, 1, against) as (_, seconds, _, peak, comparison):
        return {
            "model": f"{name}, {config.resolution} px, {config.log_steps} steps, {config.precision}",
            "machine": machine(config),
            "seconds an image": spread(seconds),
            "peak memory, GiB": f"{peak:.2f}",
            **comparison,
        }


# ------------------------------------------------------------------------------------------------------ memory and data
def memory_table(name: str, side: int, batches: list[int], repeat: int) -> str:
    """What each preset takes, as a table: predicted for each batch size; with `repeat` the seconds of a step relative
    to `fast`, and on CUDA the measured memory."""
    cuda, first = torch.cuda.is_available(), {}
    rows = [["preset", *(f"batch {b}: predicted GiB" for b in batches)]]
    for b in batches if repeat else ():
        rows[0] += [f"batch {b}: measured GiB"] * cuda + [f"batch {b}: time"]
    for preset in PRESETS:
        configs = [resolve(Config(base=name, resolution=str(side), batch_size=b), preset) for b in batches]
        row = [preset]
        row += [f"{plan.largest(plan.predict(c, MODELS[name], (side, side))) / GIB:.2f}" for c in configs]
        for c in configs if repeat else ():
            with race("step", c, name, repeat, 1, False) as (_, seconds, _, peak, _):
                row += [f"{peak:.2f}"] * cuda
                median = statistics.median(seconds)
                row.append(f"{median / first.setdefault(c.batch_size, median):.2f} x")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def measure_data(side: int, workers: int, count: int = 256) -> dict:
    """Samples a second that the loader gives for circles: from PNG files (a run without cache) and from the cache."""
    result = {"images": f"{count} of {side} px, {workers} workers"}
    with tempfile.TemporaryDirectory() as folder:
        circles.make(folder, count, side)
        pairs = data.Fill50K(folder, (side, side))
        model = ControlLDM(MODELS["tiny"], hint_channels=None).requires_grad_(False)
        with torch.no_grad():
            once = frozen.freeze(model, pairs, f"{folder}/cache", 8)
        for source, kept in (("PNG", None), ("the cache", once)):
            samples = data.Samples(pairs, range(count), 0, (4, side // 8, side // 8), frozen=kept)
            start = time.perf_counter()
            for _ in data.batches(samples, 0, 2 * count, 8, workers):
                pass
            result[f"samples a second from {source}"] = f"{2 * count / (time.perf_counter() - start):.0f}"
    return result


# --------------------------------------------------------------------------------------------------------------- CLI
STEP = {  # the settings of train.py that a step's time depends on
    "device", "batch_size", "accumulate_grad_batches", "precision", "memory", "cache", "channels_last", "compile",
    "gradient_checkpointing", "attention_slice", "optimizer_bits", "trained_weights", "optimizer_on_cpu", "stream",
    "ema_decay", "only_mid_control", "sd_locked",
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    cuda = torch.cuda.is_available()

    def add(name: str, text: str, **shared: object) -> Callable[..., None]:
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--resolution", type=int, help="side of the images in pixels (default: the model's)")
        sub.set_defaults(json=False, **shared)
        return sub.add_argument

    as_json = dict(action="store_true", help="JSON instead of a table")
    shapes = dict(choices=tuple(MODELS), help="whose shapes")
    flag = add("step", "a training step: time, memory, fraction of the machine's limit, breakdown")
    flag("--model", default="tiny", **shapes)
    flag("--json", **as_json)
    flag("--against", choices=("diffusers",), help="its step in turns with ours")
    flag("--repeat", type=int, default=5, help="steps that are measured, after two to warm up")
    add_flags(commands.choices["step"], STEP)
    flag = add("sample", "seconds an image of the sampler")
    flag("--model", default="tiny", **shapes)
    flag("--json", **as_json)
    flag("--against", choices=("diffusers",), help="its pipeline in turns with ours, on the same weights")
    flag("--steps", type=int, default=20, help="denoising steps")
    flag("--precision", choices=tuple(PRECISIONS), default="fp32", help="of the computation")
    flag("--device", default="cuda" if cuda else "cpu", help="where to compute")
    flag("--repeat", type=int, default=3, help="images that are measured, after one to warm up")
    flag = add("memory", "the presets: predicted memory, and measured where there is a GPU")
    flag("--model", default="sd15", **shapes)
    flag("--batch-size", type=int, nargs="+", default=[1, 4], help="one or more")
    flag("--repeat", type=int, default=0, help="steps to measure with each preset; 0: predict only")
    flag = add("data", "samples a second of the loader", model="tiny")
    flag("--json", **as_json)
    flag("--workers", type=int, default=0, help="processes that load")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    side = args.resolution or MODELS[args.model].resolution
    if side % MODELS[args.model].multiple:
        sys.exit(f"bench.py: --resolution is a multiple of {MODELS[args.model].multiple} for {args.model}")
    if getattr(args, "against", None) and not (find_spec("diffusers") and find_spec("transformers")):
        sys.exit("bench.py: --against diffusers needs it: pip install -r requirements-dev.txt")
    if args.command == "memory":
        print(memory_table(args.model, side, args.batch_size, args.repeat))
        return
    if args.command == "data":
        result = measure_data(side, args.workers)
    elif args.command == "sample":
        settings = dict(precision=args.precision, device=args.device, log_steps=args.steps)
        config = Config(base=args.model, out="none", resolution=str(side), **settings)
        result = measure_sample(config, args.model, args.repeat, bool(args.against))
    else:
        settings = dict(device="cuda" if torch.cuda.is_available() else "cpu", clip_grad_norm=1.0)
        settings |= {name: value for name, value in vars(args).items() if name in STEP}
        config = Config(base=args.model, out="none", resolution=str(side), **settings)
        config = resolve(config, "fast" if config.memory == "auto" else config.memory)
        validate(config)
        result = measure_step(config, args.model, args.repeat, bool(args.against))
    print(json.dumps(result) if args.json else "\n".join(f"{k:32} {v}" for k, v in result.items()))


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["serve"]:
            serve(*sys.argv[2:5], Config(**json.loads(sys.argv[5])))
        else:
            main()
    except CheckpointError as e:
        sys.exit(f"bench.py: {e}")
