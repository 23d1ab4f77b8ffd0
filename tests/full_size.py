"""Everything at full size, on weights filled by name, through the real commands. Not part of `make test`.

python tests/full_size.py sd15        (or sd21, sdxl; about half an hour and 40 GB of disk; --parts picks some of it)

attach    writes a file of the published keys, shapes and size (a pickle with the UNet's moving average, as
          v1-5-pruned.ckpt has it; of SDXL safetensors in float16), attaches a ControlNet, and compares all keys and
          shapes with the inventory
exchange  exports the whole for diffusers and lets diffusers and transformers compute with it, beside our own; of SDXL
          one network at a time, weights in bfloat16 (with --compute fp32 12 GiB of private memory, otherwise less)
step      trains some steps with train.py in each precision; SDXL in bf16 with --memory 6gb, for which 24 GiB suffice
"""

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conditioning import embed_sizes, whole_image
from ldm import MODELS, PRECISIONS, ControlLDM
from tests.conftest import distance
from tests.golden.fill import fill
from toy import circles
from training.records import read_metrics
from weights import ModelSource, load_model, load_state_dict
from weights.source import load_component, strip_prefix
from weights.spelling import CONTROL, TEXT_1, TEXT_2, UNET, VAE
from weights.writing import save_pickle, save_safetensors

GOLDEN = ROOT / "tests" / "golden"
PARTS = ("attach", "exchange", "step")


def base_file(model: str, work: Path) -> Path:
    return work / f"{model}{'.safetensors' if model == 'sdxl' else '.ckpt'}"


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
    """The published file without ControlNet, in fp32 with the moving average, or of SDXL in fp16; small values keep
    outputs tame."""
    parts = ("model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
    shapes = {k: tuple(shape) for k, shape in inventory(model).items() if k.startswith(parts)}
    if model == "sdxl":
        tensors = {k: fill(k, shape, 0.5).reshape(shape).half() for k, shape in shapes.items()}
        return save_safetensors(path, tensors)
    tensors = {k: fill(k, shape, 0.5).reshape(shape) for k, shape in shapes.items()}
    unet = [k for k in tensors if k.startswith("model.")]
    tensors |= {"model_ema." + k.removeprefix("model.").replace(".", ""): tensors[k].clone() for k in unet}
    save_pickle(path, tensors)


def attach(model: str, work: Path) -> None:
    base, merged = base_file(model, work), work / f"{model}_control.safetensors"
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
    if model == "sdxl":  # 19 GB in float32; the exchange loads it network by network
        return
    start = time.time()
    load_model(ModelSource(merged, prediction="eps"))
    print(f"{model} load: {time.time() - start:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------ SDXL, network by network
def our_part(name: str, folder: Path, dtype: torch.dtype, compute: torch.dtype) -> torch.nn.Module:
    """One network of the folder: "unet", "control_model", "vae", "text1" or "text2"."""
    prefixes = {"unet": UNET, "control_model": CONTROL, "vae": VAE, "text1": TEXT_1, "text2": TEXT_2}
    with torch.device("meta"):
        whole = ControlLDM(MODELS["sdxl"])
    encoders = dict(zip(("text1", "text2"), whole.text_encoders, strict=True))
    module = encoders.get(name) or getattr(whole, name)
    load_component(folder, module, strip_prefix(load_state_dict(folder), prefixes[name]), prefixes[name], dtype=dtype)
    if name in ("unet", "control_model"):
        module.compute_dtype = compute
    return module.requires_grad_(False).eval()


def their_part(make: type, folder: Path, compute: torch.dtype) -> torch.nn.Module:
    """A network of diffusers from a folder, its weights mapped and cast one by one."""
    settings = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        module = make.from_config(settings)
    weights = safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")
    module.load_state_dict({k: v.to(compute) for k, v in weights.items()}, assign=True)
    return module.requires_grad_(False).eval()


@torch.no_grad()
def exchange_by_parts(model: str, work: Path, compute: torch.dtype) -> None:
    """Residuals, UNet, both text encoders and the VAE against diffusers and transformers, one network in memory."""
    import diffusers
    import transformers

    merged, folder, bf16 = work / f"{model}_control.safetensors", work / f"{model}_folder", torch.bfloat16
    if not folder.exists():
        state = load_state_dict(merged)
        for key in state:  # zero convolutions would hide what comes before them
            if key.startswith("control_model.") and not state[key].any():
                state[key] = fill(key, tuple(state[key].shape), 0.5)
        filled = merged.with_stem(f"{model}_filled")
        save_safetensors(filled, state)
        seconds, _, private = run("merge.py", "export", filled, folder, "--force", "--dtype", "bf16")
        print(f"{model} export: {seconds:.0f} s, private memory at most {private:.2f} GiB", flush=True)
        filled.unlink()
    far, prompt = {}, "a photograph of an astronaut riding a horse"
    contexts, pooled = [], None
    for number, name in (("", "text1"), ("_2", "text2")):
        ours = our_part(name, folder, torch.float32, torch.float32)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}")
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        context, pooled = ours.encode(ids)
        del ours
        kind = transformers.CLIPTextModelWithProjection if number else transformers.CLIPTextModel
        theirs = kind.from_pretrained(folder / f"text_encoder{number}", dtype=torch.float32)
        found = theirs(ids, output_hidden_states=True)
        far[f"text encoder {number.strip('_') or 1}"] = distance(context, found.hidden_states[-2])
        contexts.append(context)
    far["pooled"] = distance(pooled, found.text_embeds)
    del theirs, found
    generator = torch.Generator().manual_seed(0)
    x, hint = (torch.randn(1, 4, 32, 32, generator=generator), torch.rand(1, 3, 256, 256, generator=generator))
    t, sizes, context = torch.tensor([321]), whole_image((1216, 832)), torch.cat(contexts, dim=-1)
    y, added = torch.cat([pooled, embed_sizes(sizes)], dim=1), {"text_embeds": pooled, "time_ids": sizes}
    residuals = [r.float() for r in our_part("control_model", folder, bf16, compute)(x, hint, t, context, y)]
    inputs = lambda *tensors: [tensor.to(compute) for tensor in tensors]
    control = their_part(diffusers.ControlNetModel, folder / "controlnet", compute)
    down, mid = control(
        *inputs(x), t, *inputs(context, hint), return_dict=False, added_cond_kwargs=added
    )  # fmt: skip
    del control
    far["10 residuals"] = max(distance(a, b) for a, b in zip(residuals, [*down, mid], strict=True))
    eps = our_part("unet", folder, bf16, compute)(x, t, context, control=residuals, y=y)
    unet = their_part(diffusers.UNet2DConditionModel, folder / "unet", compute)
    theirs = unet(
        *inputs(x), t, *inputs(context), added_cond_kwargs=added,
        down_block_additional_residuals=inputs(*residuals[:-1]), mid_block_additional_residual=inputs(residuals[-1])[0],
    ).sample  # fmt: skip
    del unet
    far["UNet"] = distance(eps, theirs)
    vae, image = our_part("vae", folder, torch.float32, torch.float32), torch.tanh(hint)
    theirs = their_part(diffusers.AutoencoderKL, folder / "vae", torch.float32)
    far["VAE encoder"] = distance(vae.moments(image), theirs.encode(image).latent_dist.parameters)
    far["VAE decoder"] = distance(vae.decode(x), theirs.decode(x).sample)
    said = ", ".join(f"{k} {v:.1e}" for k, v in far.items())
    print(f"{model} exchange, UNet and ControlNet in {str(compute).removeprefix('torch.')}: relative distance to "
          f"diffusers {diffusers.__version__}, transformers {transformers.__version__}: {said}; peak resident "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB", flush=True)  # fmt: skip
    in_compute = ("10 residuals", "UNet")
    assert all(v < (3e-2 if k in in_compute and compute == bf16 else 1e-4) for k, v in far.items())


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


def step(model: str, work: Path, precisions: list[str], resolution: int, steps: int, memory: str) -> None:
    base = base_file(model, work)
    if not base.exists():  # in a process of its own, with which the memory that it took ends
        writer = multiprocessing.Process(target=write_base, args=(model, base))
        writer.start()
        writer.join()
    circles.make(work / "circles", 20, resolution)
    for precision in precisions:
        folder = work / f"run-{model}-{precision}"
        flags = ["--base", base, "--data", work / "circles", "--out", folder, "--cache-dir", work / "cache",
                 "--overwrite", "--steps", steps, "--batch-size", 1, "--logger-freq", 0, "--precision", precision,
                 "--prediction", "eps", "--memory", memory]  # fmt: skip
        seconds, resident, private = run("train.py", *flags)
        each = [1 / entry["images_per_second"] for entry in read_metrics(folder)][1:]
        print(
            f"{model} step: {resolution} px, batch 1, --memory {memory}, {precision}: {statistics.median(each):.2f} s "
            f"({min(each):.2f} to {max(each):.2f}, {len(each)} steps), peak {private:.1f} GiB private, "
            f"{resident:.1f} GiB resident; whole command {seconds:.0f} s",
            flush=True,
        )
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=("sd15", "sd21", "sdxl"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--precision", nargs="+", help="of the steps (default: fp32 and bf16; of SDXL bf16)")
    parser.add_argument("--memory", help="preset of the steps (default: fast; of SDXL 6gb)")
    parser.add_argument("--compute", choices=("bf16", "fp32"), default="bf16", help="of SDXL's exchange")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", help="folder for the files (default: a temporary one, removed at the end)")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    try:
        if "attach" in args.parts or "exchange" in args.parts:
            attach(args.model, work)
        if "exchange" in args.parts and args.model == "sdxl":
            exchange_by_parts(args.model, work, PRECISIONS[args.compute])
        elif "exchange" in args.parts:
            exchange(args.model, work)
        if "step" in args.parts:
            precisions = args.precision or (["bf16"] if args.model == "sdxl" else ["fp32", "bf16"])
            memory = args.memory or ("6gb" if args.model == "sdxl" else "fast")
            step(args.model, work, precisions, args.resolution, args.steps, memory)
    finally:
        if not args.work:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
