"""How fast, how much memory, against whom?

    python bench.py table                                       the figures that matter most, in five minutes
    python bench.py step --model sd15 --resolution 256 --against diffusers
    python bench.py sample --model tiny --against diffusers
    python bench.py memory --model sd15 --batch-size 1 4        what each preset takes
    python bench.py data --resolution 512 --workers 0 2         samples a second, and what an H100 would take
    python bench.py gpu --out runs/gpu                          all that has to be seen on a GPU, part by part

Models have random weights of the real shapes, so nothing is downloaded. Both sides run in processes of their own, in
turns, and the ratio is taken pair by pair. `benchmarks/` has what is measured and how.
"""

import argparse
import json
import sys
from importlib.util import find_spec

from flags import STEP_SETTINGS, parse_bench
from training.console import protect_output, run_program

if __name__ == "__main__" and sys.argv[1:2] not in (["serve"], ["part"]):  # which are processes that it starts itself
    protect_output()
    parse_bench(None)  # --help and wrong flags are answered before the imports below, which take seconds

from benchmarks import gpu
from benchmarks.checks import Setting
from benchmarks.figures import measure_sample, measure_step, memory_table
from benchmarks.loader import measure_data
from benchmarks.table import print_table
from benchmarks.workers import serve
from config import Config, check_device, default_device, resolve, validate
from ldm import MODELS


def parse(argv: list[str] | None) -> argparse.Namespace:
    """What a command line asks for (see `flags.parse_bench`)."""
    return parse_bench(argv, tuple(gpu.parts()))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    side = args.resolution or MODELS[args.model].resolution
    if side % MODELS[args.model].multiple:
        sys.exit(f"bench.py: --resolution must be a multiple of {MODELS[args.model].multiple} for {args.model}")
    installed = bool(find_spec("diffusers") and find_spec("transformers"))
    if getattr(args, "against", None) and not installed:
        sys.exit("bench.py: --against diffusers needs that package: pip install -r requirements-dev.txt")
    if args.command == "memory":
        print(memory_table(args.model, side, args.batch_size, args.repeat))
        return
    if args.command in ("gpu", "table"):
        args.device = getattr(args, "device", None) or default_device()
        check_device(args.device)
    if args.command == "table":
        print_table(args.device, installed, args.minutes)
        return
    if args.command == "gpu":
        setting = Setting(args.device, args.model, side, args.out, installed)
        sys.exit(1 if gpu.run_all(setting, args.parts or gpu.parts(), args.minutes, args.budget) else 0)
    if args.command == "data":
        result = measure_data(side, args.workers, args.count, args.rows)
    else:
        settings = {k: v for k, v in vars(args).items() if k in STEP_SETTINGS | {"log_steps"}}
        config = Config(base=args.model, out="none", resolution=str(side), clip_grad_norm=1.0, **settings)
        config = resolve(config, "exact" if config.memory == "auto" else config.memory)
        validate(config)
        measure = measure_step if args.command == "step" else measure_sample
        result = measure(config, args.model, args.repeat, bool(args.against))
    print(json.dumps(result) if args.json else "\n".join(f"{k:32} {v}" for k, v in result.items()))


def run() -> None:
    """Measure, or be one of the processes that `main` starts."""
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:5], Config(**json.loads(sys.argv[5])))
    elif sys.argv[1:2] == ["part"]:
        gpu.run_part(*sys.argv[2:])
    else:
        main()


if __name__ == "__main__":
    run_program("bench.py", run)
