"""How fast is a training step on this machine, and how much memory does it take?

    python bench.py step --model sd15 --resolution 256 --precision bf16
    python bench.py memory --model sd15 --batch-size 1 4        what each preset takes
    python bench.py data --resolution 128                       samples a second, from PNG and from the cache

Random weights of the real shapes, so nothing is downloaded. The step is train.py's own, on cached latents and contexts:
ControlNet forward and backward, locked UNet forward, its decoder's activations backward, AdamW.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import sys
import tempfile
import time

import torch
from torch import nn

import circles
import data
import engine
import frozen
import plan
from config import PRESETS, Config, resolve
from controlnet import MODELS, PRECISIONS, ControlLDM


def random_model(name: str) -> ControlLDM:
    """A model of MODELS with small random weights and no zeros, VAE and text tower left on the meta device."""
    with torch.device("meta"):
        model = ControlLDM(MODELS[name])
    for part in (model.unet, model.control_model):
        part.to_empty(device="cpu")
        for p in part.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    return model


def measure_step(config: Config, name: str, repeat: int) -> dict:
    """Seconds of `repeat` steps after one to warm up, and the peak memory (CPU: of this process; CUDA: allocated)."""
    torch.manual_seed(0)
    cuda, side = config.device.startswith("cuda"), int(config.resolution)
    made = engine.assemble(config, random_model(name))
    shapes = plan.fake_batch(config, MODELS[name], (side, side))
    sample = {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in shapes.items()}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    batches, seconds = itertools.repeat(sample), []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        made.step(batches, config.learning_rate)  # ends by reading the loss: the device is done
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "model": name,
        "resolution": int(config.resolution),
        "batch": config.batch,
        "precision": config.precision,
        "seconds": round(statistics.median(seconds[1:]), 3),
        "fastest": round(min(seconds[1:]), 3),
        "slowest": round(max(seconds[1:]), 3),
        "images_per_second": round(config.batch / statistics.median(seconds[1:]), 3),
        "peak_gib": round(peak / 2**30, 2),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def memory_table(name: str, resolution: int, batches: list[int], repeat: int) -> str:
    """What each preset takes, as a table: predicted for each batch size; measured, with the seconds of a step relative
    to `fast`, where there is a GPU (or, times alone, with `repeat` above 0)."""
    shapes, size, cuda = MODELS[name], (resolution, resolution), torch.cuda.is_available()
    rows = [["preset", *(f"batch {b}, predicted GiB" for b in batches)]]
    rows[0] += [
        f"batch {b}, {what}" for b in batches for what in (("measured GiB",) if cuda else ()) + ("time",)
    ] * bool(repeat)
    first: dict[int, float] = {}
    for preset in PRESETS:
        configs = {b: resolve(Config(base=name, resolution=str(resolution), batch_size=b), preset) for b in batches}
        row = [preset]
        for b in batches:
            row.append(f"{plan.predict(configs[b], shapes, size)['training'].total / 2**30:.2f}")
        for b in batches if repeat else ():
            seen = measure_step(configs[b], name, repeat)
            row += [str(seen["peak_gib"])] if cuda else []
            row.append(f"{seen['seconds'] / first.setdefault(b, seen['seconds']):.2f} x")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def measure_data(resolution: int, count: int = 256, workers: int = 0) -> dict:
    """Samples a second that the loader gives for circles: from PNG files (a run without cache) and from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        circles.make(folder, count, resolution)
        pairs = data.Fill50K(folder, (resolution, resolution))
        model = ControlLDM(MODELS["tiny"], hint_channels=None).requires_grad_(False)
        rates = {}
        for source in ("png", "cache"):
            once = frozen.freeze(model, pairs, f"{folder}/cache", 8) if source == "cache" else None
            samples = data.Samples(pairs, range(count), 0, (4, resolution // 8, resolution // 8), frozen=once)
            start = time.perf_counter()
            for _ in data.batches(samples, 0, 2 * count, 8, workers):
                pass
            rates[f"samples_per_second_from_{source}"] = round(2 * count / (time.perf_counter() - start), 1)
    return {"resolution": resolution, "workers": workers} | rates


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, text: commands.add_parser(
        name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p = add("step", "time and memory of a training step")
    p.add_argument("--model", choices=tuple(MODELS), default="tiny", help="whose shapes")
    p.add_argument("--resolution", type=int, help="side of the images in pixels (default: the model's)")
    p.add_argument("--batch-size", type=int, default=1, help="samples at once")
    p.add_argument("--accumulate-grad-batches", type=int, default=1, help="micro-batches a step")
    p.add_argument("--precision", choices=tuple(PRECISIONS), help="of the computation (default: the preset's)")
    p.add_argument("--memory", choices=tuple(PRESETS), default="fast", help="preset")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    p.add_argument("--repeat", type=int, default=5, help="steps that are measured, after one to warm up")
    p.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    p = add("memory", "the presets: predicted memory, and measured where there is a GPU")
    p.add_argument("--model", choices=tuple(MODELS), default="sd15", help="whose shapes")
    p.add_argument("--resolution", type=int, help="side of the images in pixels (default: the model's)")
    p.add_argument("--batch-size", type=int, nargs="+", default=[1, 4], help="one or more")
    p.add_argument("--repeat", type=int, default=0, help="steps to measure with each preset; 0: predict only")
    p = add("data", "samples a second of the loader, from PNG and from the cache")
    p.add_argument("--resolution", type=int, default=128, help="side of the images in pixels")
    p.add_argument("--workers", type=int, default=0, help="processes that load")
    args = parser.parse_args(argv)
    if args.command == "data":
        print("\n".join(f"{k:32} {v}" for k, v in measure_data(args.resolution, workers=args.workers).items()))
        return
    shapes = MODELS[args.model]
    side = args.resolution or shapes.resolution
    if side % shapes.multiple:
        sys.exit(f"bench.py: --resolution is a multiple of {shapes.multiple} for {args.model}")
    if args.command == "memory":
        print(memory_table(args.model, side, args.batch_size, args.repeat))
        return
    config = Config(
        resolution=str(side),
        batch_size=args.batch_size,
        accumulate_grad_batches=args.accumulate_grad_batches,
        precision=args.precision,
        device=args.device,
    )
    result = measure_step(resolve(config, args.memory), args.model, args.repeat)
    print(json.dumps(result) if args.json else "\n".join(f"{k:18} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
