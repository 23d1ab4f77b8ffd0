"""How fast is a training step on this machine, and how much memory does it take?

    python bench.py step --model sd15 --resolution 256 --precision bf16

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
import time

import torch
from torch import nn

import train
from controlnet import MODELS, PRECISIONS, ControlLDM


def random_model(name: str, device: str) -> ControlLDM:
    """A model of MODELS with small random weights and no zeros, VAE and text tower left on the meta device."""
    with torch.device("meta"):
        model = ControlLDM(MODELS[name])
    for part in (model.unet, model.control_model):
        part.to_empty(device=device)
        for p in part.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    return model


def measure_step(config: train.Config, name: str, repeat: int) -> dict:
    """Seconds of `repeat` steps after one to warm up, and the peak memory (CPU: of this process; CUDA: allocated)."""
    torch.manual_seed(0)
    model = random_model(name, config.device)
    engine = train.assemble(config, model)
    unet, side = model.config.unet, int(config.resolution) // 8
    sample = {
        "moments": torch.randn(config.batch_size, 8, side, side),
        "context": torch.randn(config.batch_size, 77, unet.context_dim),
        "hint": torch.rand(config.batch_size, 3, 8 * side, 8 * side),
        "timestep": torch.randint(1000, (config.batch_size,)),
        "noise": torch.randn(config.batch_size, 4, side, side),
        "posterior": torch.randn(config.batch_size, 4, side, side),
    }
    batches, seconds = itertools.repeat(sample), []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        engine.step(batches, config.learning_rate)  # ends by reading the loss: the device is done
        seconds.append(time.perf_counter() - start)
    cuda = config.device.startswith("cuda")
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "step", help="time and memory of a training step", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", choices=tuple(MODELS), default="tiny", help="whose shapes")
    p.add_argument("--resolution", help="side of the images in pixels (default: the model's)")
    p.add_argument("--batch-size", type=int, default=1, help="samples at once")
    p.add_argument("--accumulate-grad-batches", type=int, default=1, help="micro-batches a step")
    p.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="of the computation")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    p.add_argument("--repeat", type=int, default=5, help="steps that are measured, after one to warm up")
    p.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    args = parser.parse_args(argv)
    config = train.Config(
        resolution=args.resolution or str(MODELS[args.model].resolution),
        batch_size=args.batch_size,
        accumulate_grad_batches=args.accumulate_grad_batches,
        precision=args.precision,
        device=args.device,
    )
    if int(config.resolution) % MODELS[args.model].multiple:
        sys.exit(f"bench.py: --resolution is a multiple of {MODELS[args.model].multiple} for {args.model}")
    result = measure_step(config, args.model, args.repeat)
    print(json.dumps(result) if args.json else "\n".join(f"{k:18} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
