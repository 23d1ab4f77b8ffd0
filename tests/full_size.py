"""A training step at full size, on weights filled by name, through the real commands. Not part of `make test`.

    python tests/full_size.py sd15 --precision fp32 bf16

Writes a Stable Diffusion file of the published keys and shapes, draws a few circles, and trains a ControlNet on them
for some steps with `train.py` in a process of its own; prints seconds per step and peak memory.
"""

import argparse
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint
import circles
import log
from tests.golden.fill import fill

GOLDEN = ROOT / "tests" / "golden"


def write_base(model: str, path: Path) -> None:
    """Every key of the published file (without ControlNet) in its shape, in fp16, scaled down to keep values tame."""
    keys = json.loads(gzip.decompress((GOLDEN / f"{model}_keys.json.gz").read_bytes()))
    parts = ("model.", "first_stage_model.", "cond_stage_model.")
    tensors = {k: fill(k, tuple(shape), 0.5).half() for k, shape in keys.items() if k.startswith(parts)}
    checkpoint.save_safetensors(path, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=("sd15", "sd21"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", help="folder for the files (default: a temporary one, removed at the end)")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp())
    base = work / f"{args.model}.safetensors"
    if not base.exists():
        start = time.time()
        write_base(args.model, base)
        print(f"wrote {base.stat().st_size / 2**30:.2f} GiB in {time.time() - start:.0f} s", flush=True)
    circles.make(work / "circles", 20, args.resolution)
    for precision in args.precision:
        run = work / f"run-{args.model}-{precision}"
        flags = ["--base", base, "--data", work / "circles", "--out", run, "--cache-dir", work / "cache", "--overwrite",
                 "--steps", args.steps, "--batch-size", 1, "--logger-freq", 0, "--precision", precision]  # fmt: skip
        start = time.time()
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"train.py failed ({status})")
        seconds = [1 / entry["images_per_second"] for entry in log.read_metrics(run)][1:]
        print(
            f"{args.model} {args.resolution} px, batch 1, {precision}: {statistics.median(seconds):.2f} s a step "
            f"({min(seconds):.2f} to {max(seconds):.2f}), peak {usage.ru_maxrss / 2**20:.1f} GiB, "
            f"whole command {time.time() - start:.0f} s",
            flush=True,
        )
        shutil.rmtree(run)
    if not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
