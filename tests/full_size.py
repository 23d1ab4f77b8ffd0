"""Everything at full size, on weights filled by name, through the real commands. Not part of `make test`.

python tests/full_size.py sd15        (or sd21; about half an hour and 40 GB of disk; --parts picks some of it)

attach    writes a file of the published keys, shapes and size (a pickle with the UNet's moving average, as
          v1-5-pruned.ckpt has it), attaches a ControlNet, and compares all keys and shapes with the inventory
exchange  exports the whole for diffusers and lets diffusers and transformers compute with it, beside our own
step      trains some steps with train.py in each precision
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import distance
from tests.golden.fill import fill
from toy import circles
from training.records import read_metrics
from weights import ModelSource, load_model, load_state_dict
from weights.writing import save_pickle, save_safetensors

GOLDEN = ROOT / "tests" / "golden"
PARTS = ("attach", "exchange", "step")


def inventory(model: str) -> dict[str, list[int]]:
    """Key -> shape of the published files with a ControlNet attached."""
    return json.loads(gzip.decompress((GOLDEN / f"{model}_keys.json.gz").read_bytes()))


def run(*command: object) -> tuple[float, float, float]:
    """Run one of our commands: seconds, peak resident GiB, peak GiB of memory that is its own (not the page cache)."""
    start, private = time.time(), 0.0
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        looked = time.time()
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            own = sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
            private = max(private, own / 2**20)
        except OSError:
            pass
        time.sleep(max(0.1, 50 * (time.time() - looked)))  # a look takes time that the process then lacks
    if status:
        sys.exit(f"{command[0]} failed ({status})")
    return time.time() - start, usage.ru_maxrss / 2**20, private


def write_base(model: str, path: Path) -> None:
    """The published file without ControlNet, in fp32, with the moving average; small values keep outputs tame."""
    parts = ("model.", "first_stage_model.", "cond_stage_model.")
    shapes = {k: tuple(shape) for k, shape in inventory(model).items() if k.startswith(parts)}
    tensors = {k: fill(k, shape, 0.5).reshape(shape) for k, shape in shapes.items()}
    unet = [k for k in tensors if k.startswith("model.")]
    tensors |= {"model_ema." + k.removeprefix("model.").replace(".", ""): tensors[k].clone() for k in unet}
    save_pickle(path, tensors)


def attach(model: str, work: Path) -> None:
    base, merged = work / f"{model}.ckpt", work / f"{model}_control.safetensors"
    if not base.exists():
        start = time.time()
        write_base(model, base)
        print(f"wrote {base.name}, {base.stat().st_size / 1e9:.2f} GB, in {time.time() - start:.0f} s", flush=True)
    seconds, resident, private = run("merge.py", "attach", base, merged, "--force")
    print(
        f"{model} attach: {base.stat().st_size / 1e9:.2f} GB in, {merged.stat().st_size / 1e9:.2f} GB out, "
        f"{seconds:.0f} s, private memory at most {private:.2f} GiB (resident, with mapped pages, {resident:.1f} GiB)"
    )
    state = load_state_dict(merged)
    shapes = {k: list(v.shape) for k, v in state.items() if not k.startswith("model_ema.")}
    wanted = inventory(model)
    buffers = {k for k in wanted if "." not in k}  # the schedule's twelve, which the file that we wrote has not
    assert shapes == {k: v for k, v in wanted.items() if k not in buffers}, "keys or shapes differ from the inventory"
    print(f"{model} keys: {len(shapes)} keys and shapes as in the inventory", flush=True)
    start = time.time()
    load_model(ModelSource(merged, prediction="eps"))
    print(f"{model} load: {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def exchange(model: str, work: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    import diffusers
    import transformers

    merged, folder = work / f"{model}_control.safetensors", work / f"{model}_folder"
    state = load_state_dict(merged)
    for key in state:  # zero convolutions would hide what comes before them
        if key.startswith("control_model.") and not state[key].any():
            state[key] = fill(key, tuple(state[key].shape), 0.5)
    save_safetensors(merged.with_stem(f"{model}_filled"), state)
    merged = merged.with_stem(f"{model}_filled")
    seconds, _, private = run("merge.py", "export", merged, folder, "--force", "--prediction", "eps")
    print(f"{model} export: {seconds:.0f} s, private memory at most {private:.2f} GiB", flush=True)
    ours = load_model(ModelSource(merged, prediction="eps"))
    x, t, hint = torch.randn(1, 4, 16, 16), torch.tensor([321]), torch.rand(1, 3, 128, 128)
    prompt = "a photograph of an astronaut riding a horse"
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    context = ours.encode_prompts(prompt)
    far = {"text encoder": distance(context, text(ids).last_hidden_state)}
    control = diffusers.ControlNetModel.from_pretrained(folder / "controlnet")
    residuals = ours.control_model(x, hint, t, context)
    down, mid = control(x, t, context, controlnet_cond=hint, return_dict=False)
    far["13 residuals"] = max(distance(a, b) for a, b in zip(residuals, [*down, mid], strict=True))
    del control
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    theirs = unet(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    far["UNet"] = distance(ours.unet(x, t, context, residuals), theirs)
    del unet
    vae, image = diffusers.AutoencoderKL.from_pretrained(folder / "vae"), torch.rand(1, 3, 128, 128) * 2 - 1
    far["VAE encoder"] = distance(ours.vae.moments(image), vae.encode(image).latent_dist.parameters)
    far["VAE decoder"] = distance(ours.vae.decode(x), vae.decode(x).sample)
    said = ", ".join(f"{k} {v:.1e}" for k, v in far.items())
    print(f"{model} exchange: relative distance to diffusers {diffusers.__version__}, transformers "
          f"{transformers.__version__}: {said}", flush=True)  # fmt: skip
    assert max(far.values()) < 1e-4
    again = load_state_dict(folder)
    same = sum(torch.equal(v, state[k]) for k, v in again.items())
    assert same == len(again), "a tensor did not come back from the folder as it was"
    print(f"{model} back: all {same} tensors of the folder equal the file's", flush=True)


def step(model: str, work: Path, precisions: list[str], resolution: int, steps: int) -> None:
    base = work / f"{model}.ckpt"
    if not base.exists():
        write_base(model, base)
    circles.make(work / "circles", 20, resolution)
    for precision in precisions:
        folder = work / f"run-{model}-{precision}"
        flags = ["--base", base, "--data", work / "circles", "--out", folder, "--cache-dir", work / "cache",
                 "--overwrite", "--steps", steps, "--batch-size", 1, "--logger-freq", 0, "--precision", precision,
                 "--prediction", "eps"]  # fmt: skip
        seconds, resident, private = run("train.py", *flags)
        each = [1 / entry["images_per_second"] for entry in read_metrics(folder)][1:]
        print(
            f"{model} step: {resolution} px, batch 1, {precision}: {statistics.median(each):.2f} s "
            f"({min(each):.2f} to {max(each):.2f}, {len(each)} steps), peak {private:.1f} GiB private, "
            f"{resident:.1f} GiB resident; whole command {seconds:.0f} s",
            flush=True,
        )
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=("sd15", "sd21"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", help="folder for the files (default: a temporary one, removed at the end)")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    try:
        if "attach" in args.parts or "exchange" in args.parts:
            attach(args.model, work)
        if "exchange" in args.parts:
            exchange(args.model, work)
        if "step" in args.parts:
            step(args.model, work, args.precision, args.resolution, args.steps)
    finally:
        if not args.work:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
