"""What can be done with whole checkpoints, without training.

    python merge.py models/v1-5-pruned.ckpt models/control_sd15_ini.safetensors      attach: SD in, SD + ControlNet out
    python merge.py extract runs/fill50k control.safetensors                         the ControlNet alone
    python merge.py transfer --from-base A --control A_CONTROL --to-base B OUT       carried over to another model
    python merge.py export runs/fill50k exported/                                    a folder that diffusers assembles
    python merge.py info FILE                                                        what is in it

Attaching copies the UNet's encoder into a new ControlNet whose zero convolutions are zero: the result draws exactly
what the input draws, and is where training starts. (`train.py --base` attaches by itself; a merged file is for other
tools, and for looking at.) An input is a file or a diffusers folder, or, where a ControlNet is read, the folder of a
run. Tensors pass through under their names; what a command does not know it leaves as it is, but for a UNet's moving
average, which is left out (`--ema` takes it in place of the weights). Files are mapped, and safetensors written one
tensor at a time: what only passes through takes no memory.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import exchange
from checkpoint import CheckpointError, load_json
from clip_text import clip_spelling, tokenizer_files
from controlnet import (
    CONTROL,
    DIFFERENCE,
    TEXT,
    UNET,
    VAE,
    ControlLDM,
    ControlNet,
    ModelConfig,
    add_encoder,
    check_twins,
    detect,
    gather,
    hint_widths,
    new_weights,
    part,
    read_model,
    take,
    twin,
)  # fmt: skip

PARTS = {"UNet": UNET, "ControlNet": CONTROL, "VAE": VAE, "text tower": TEXT}
State = dict[str, Tensor]


# ----------------------------------------------------------------------------------------------------------- commands
def attach(
    source: str, hint_channels: int = 3, seed: int = 0, vae: str | None = None, ema: bool = False
) -> tuple[State, list[str]]:
    """SD -> SD + ControlNet, and the names of the weights that are new (not copied)."""
    state = gather(source, vae=vae, ema=ema)
    if hint_channels < 1:
        raise CheckpointError(f"--hint-channels is {hint_channels}, should be 1 or more")
    if any(k.startswith(CONTROL) for k in state):
        raise CheckpointError(f"{source}: already has a ControlNet; extract takes it out")
    config = detect(source, state)
    with torch.device("meta"):
        names = ControlNet(config.unet, hint_channels, config.hint_widths).state_dict()
    new = new_weights(config.unet, hint_channels, config.hint_widths, seed, config.hint_gain)
    lacking = [k for k in names if k not in new and UNET + k not in state]
    if lacking:
        raise CheckpointError(f"{source}: {len(lacking)} weights of the UNet missing, as {UNET}{lacking[0]}")
    control = {CONTROL + k: new[k] if k in new else state[UNET + k] for k in names}
    return state | control, [CONTROL + k for k in new]


def extract(source: str) -> tuple[State, Path]:
    """The ControlNet of a file, a folder or a run's newest checkpoint, and the file or folder that it was in."""
    path = Path(source)
    if checkpoint.is_run(path):
        path = checkpoint.newest(path) / "trained.safetensors"
        decoder = sum(k.startswith(UNET) for k in checkpoint.load_state_dict(path))
        if decoder:
            print(
                f"note: {source} trained the UNet's decoder too ({decoder} tensors), so the ControlNet alone is not "
                "the whole result; `merge.py export` writes all of it"
            )
    return take(path, CONTROL), path


def difference(control: State, base: str, ema: bool = False) -> State:
    """A ControlNet as what it has more than the UNet of `base`, in the form that Automatic1111 and ComfyUI read. `ema`:
    than that UNet's moving average, where the ControlNet began as a copy of it."""
    state = gather(base, ema=ema)
    check_twins("the ControlNet", control, base, state)
    return add_encoder(control, state, sign=-1) | {DIFFERENCE: torch.ones(1)}


def transfer(from_base: str, control: str, to_base: str) -> State:
    """A ControlNet trained on one base, carried over to another: what the other has more than the first is added to the
    weights of ControlNet and UNet wherever both have them; VAE, text tower and the rest come from the other.

    Follows the original's tool_transfer_control.py. Where nothing was trained the sum is the other's weight itself.
    """
    run = checkpoint.load_run(control) if checkpoint.is_run(control) else {}
    a, b = gather(from_base, ema=run.get("ema", False)), gather(to_base)
    for path, state in ((from_base, a), (to_base, b)):
        detect(path, state)
    trained = gather(control, base=from_base, ema=run["ema"]) if run else checkpoint.load_state_dict(control)
    steering = {k: v for k, v in trained.items() if k.startswith(CONTROL)}
    if not steering:
        raise CheckpointError(f"{control}: no ControlNet in it")
    for path, state in ((from_base, a), (to_base, b)):
        check_twins(control, steering, path, state)
    if DIFFERENCE in trained:
        steering = add_encoder(steering, a)
    decoder = {k: v for k, v in trained.items() if k.startswith(UNET)}
    out = dict(b)
    for key, value in (decoder | steering).items():
        origin = twin(key) if key.startswith(CONTROL) else key
        if origin in a and origin in b:
            if torch.equal(value, a[origin]):
                value = b[origin]
            elif not torch.equal(a[origin], b[origin]):
                value = (value.float() + b[origin].float() - a[origin].float()).to(value.dtype)
        out[key] = value
    return out


def control_folder(control: State, config: ModelConfig) -> dict[str, Any]:
    """A ControlNet's diffusers folder: file name -> text, or tensors."""
    own = part(control, CONTROL)
    table = exchange.control_table(*exchange.unet_levels(config.unet))
    channels = own["input_hint_block.0.weight"].shape[1]
    return {
        "config.json": exchange.control_config(config.unet, channels, hint_widths(own)),
        "diffusion_pytorch_model.safetensors": exchange.to_diffusers(own, table),
    }


def diffusers_folder(state: State, config: ModelConfig) -> dict[str, Any]:
    """A whole model's diffusers folder: file name -> JSON, text, or tensors."""
    unet_table = exchange.unet_table(*exchange.unet_levels(config.unet))
    vae_table = exchange.vae_table(len(config.vae.ch_mult), config.vae.num_res_blocks)
    control = {k: v for k, v in state.items() if k.startswith(CONTROL)}
    lacking = missing(state, config, whole=True)
    if lacking:
        raise CheckpointError(f"not a whole model: {lacking[0]}")
    weights, side = "diffusion_pytorch_model.safetensors", config.resolution
    upcast = config.unet.use_linear_in_transformer and config.prediction == "v"
    schedule = (config.linear_start, config.linear_end, config.timesteps, config.prediction, config.zero_terminal_snr)
    files = {
        "model_index.json": exchange.model_index(bool(control)),
        "scheduler/scheduler_config.json": exchange.scheduler_config(*schedule),
        "unet/config.json": exchange.unet_config(config.unet, side // config.vae_factor, upcast),
        f"unet/{weights}": exchange.to_diffusers(part(state, UNET), unet_table),
        "vae/config.json": exchange.vae_config(config.vae, config.scale_factor, side),
        f"vae/{weights}": exchange.to_diffusers(part(state, VAE), vae_table),
        "text_encoder/config.json": exchange.text_config(config.text),
        "text_encoder/model.safetensors": exchange.text_to_transformers(
            part(state, TEXT), config.text.layers - config.text.penultimate
        ),
    }
    files |= {f"tokenizer/{name}": text for name, text in tokenizer_files(config.pad).items()}
    return files | ({f"controlnet/{k}": v for k, v in control_folder(control, config).items()} if control else {})


def info(source: str) -> list[str]:
    """Lines that say what a file, folder or run holds: parts, sizes, dtypes, what is missing, model, metadata."""
    path, lines = Path(source), []
    if checkpoint.is_run(path):
        path = checkpoint.newest(path)
    if (path / "state.json").exists():  # a training checkpoint
        saved = checkpoint.load_json(path / "state.json")
        lines.append(f"{path}: step {saved['step']}, {saved['samples']} samples, trained with")
        lines += [f"    {k:24} {v}" for k, v in saved["config"].items()]
        path = path / "trained.safetensors"
    state = checkpoint.load_state_dict(path)
    count = lambda name, tensors: (
        f"{name:11} {sum(v.numel() for v in tensors) / 1e6:8.1f} M in {len(tensors)} tensors "
        f"({', '.join(Counter(str(v.dtype).removeprefix('torch.') for v in tensors))})"
    )
    kinds = PARTS | {"average": "model_ema."}
    for name, prefix in kinds.items():
        tensors = [v for k, v in state.items() if k.startswith(prefix)]
        lines += [count(name, tensors)] if tensors else [f"{name:11} none"]
    rest = [v for k, v in state.items() if not k.startswith(tuple(kinds.values()))]
    lines += [count("other", rest)] if rest else []
    try:
        config = detect(path, state, UNET if part(state, UNET + "input_blocks.") else CONTROL)
        name = "sd21, or sd21_v (which of the two no file can tell)" if config.name == "sd21" else config.name
        lines += [f"{'model':11} {name}", *(f"{'missing':11} {line}" for line in missing(state, config))]
    except CheckpointError as e:
        lines.append(f"{'model':11} {str(e).removeprefix(f'{path}: ')}")
    return lines + [f"{k:11} {v}" for k, v in checkpoint.load_metadata(path).items()]


def missing(state: State, config: ModelConfig, whole: bool = False) -> list[str]:
    """A line for each part that is not all there; parts that are not there at all count if the model is to be `whole`
    (but a ControlNet it need not have)."""
    control = part(state, CONTROL)
    channels = control["input_hint_block.0.weight"].shape[1] if "input_hint_block.0.weight" in control else 3
    with torch.device("meta"):
        wanted, lines = ControlLDM(config, channels).state_dict(), []
    for name, prefix in PARTS.items():
        own, names = part(state, prefix), part(wanted, prefix)
        own, names = (clip_spelling(own), clip_spelling(names)) if prefix == TEXT else (own, names)
        lacking = [k for k, v in names.items() if k not in own or own[k].shape != v.shape]
        if lacking and (own or (whole and prefix != CONTROL)):
            lines.append(f"{len(lacking)} of {len(names)} tensors of the {name} (or in another shape), as {lacking[0]}")
    return lines


# ---------------------------------------------------------------------------------------------------------- the output
FILES = (".safetensors", ".ckpt", ".pth", ".pt")


def check_output(out: str, force: bool, folder: bool) -> None:
    """Refuse, before the work, an output that cannot be written or that would replace what is not ours to replace."""
    path = Path(out)
    if path.exists() and not force:
        raise CheckpointError(f"{out}: exists; --force replaces it")
    if path.exists() and path.is_dir() != folder:
        raise CheckpointError(f"{out}: is a {'folder' if path.is_dir() else 'file'}, the output is the other")
    if path.is_dir() and any(path.iterdir()):
        kind = path / "config.json"
        if not (path / "model_index.json").exists() and not (kind.exists() and "_class_name" in load_json(kind)):
            raise CheckpointError(f"{out}: a folder, but not of diffusers' kind; --force does not remove it")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{out}: no such folder {path.parent}")
    if folder == (path.suffix in FILES):
        raise CheckpointError(f"{out}: the output is {'a folder' if folder else 'a .safetensors file (or .ckpt)'}")


def save(out: str, state: State, metadata: Mapping[str, str], half: bool) -> None:
    """Write safetensors, or, where a `.ckpt` is named, a pickle of tensors alone."""
    path = Path(out)
    if path.suffix == ".safetensors":
        checkpoint.save_safetensors(path, state, metadata, half)
    else:
        if "config" in metadata:
            print(f"note: {out}: a .ckpt cannot say what the model is (v-prediction, clip-skip, a shape of its own)")
        state = {k: v.to(checkpoint.halved(k, v)) for k, v in state.items()} if half else state
        checkpoint.save_pickle(path, state)
    print(f"{out}: {path.stat().st_size / 1e9:.2f} GB")


def save_folder(out: str, files: Mapping[str, Any], metadata: Mapping[str, str], half: bool) -> None:
    """Write a diffusers folder, all of it or nothing."""
    tensors = lambda value, p: checkpoint.write_safetensors(p, value, {"format": "pt", **metadata}, half)
    text = lambda value, p: p.write_text(value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")
    checkpoint.write_folder(
        out, {k: partial(tensors if k.endswith(".safetensors") else text, v) for k, v in files.items()}
    )
    size = sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file())
    print(f"{out}: a diffusers folder, {size / 1e9:.2f} GB")


# --------------------------------------------------------------------------------------------------------------- CLI
def parse(argv: list[str]) -> argparse.Namespace:
    commands = ("attach", "extract", "transfer", "export", "info", "-h", "--help")
    if argv and argv[0] not in commands:
        argv = ["attach", *argv]  # python merge.py INPUT OUTPUT
    parser = argparse.ArgumentParser(description="Attach, extract, carry over, export ControlNets; look into files.")
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("attach", help="SD in, SD + ControlNet out (also: merge.py INPUT OUTPUT)")
    p.add_argument("input", help="a Stable Diffusion file or diffusers folder")
    p.add_argument("output", help=".safetensors, or .ckpt")
    p.add_argument("--hint-channels", type=int, default=3, help="channels of the hint images (default 3)")
    p.add_argument("--seed", type=int, default=0, help="of the hint encoder's initial weights (default 0)")
    q = sub.add_parser("extract", help="the ControlNet alone")
    q.add_argument("input", help="a file with a ControlNet, a diffusers folder, or the folder of a run")
    q.add_argument("output", help=".safetensors, .ckpt, or for --format diffusers a folder")
    q.add_argument(
        "--format", choices=("original", "diffusers"), default="original",
        help="control_model.* as Automatic1111 and ComfyUI read it (default), or a folder for diffusers",
    )  # fmt: skip
    q.add_argument(
        "--difference", metavar="BASE", help="write what it has more than the UNet of BASE (not for diffusers)"
    )
    r = sub.add_parser("transfer", help="carry a ControlNet over to another base model")
    r.add_argument("--from-base", required=True, help="the model that the ControlNet was trained on")
    r.add_argument("--control", required=True, help="that model with its ControlNet, the ControlNet alone, or a run")
    r.add_argument("--to-base", required=True, help="the model to carry it to")
    r.add_argument("output", help="that model with the ControlNet: .safetensors, or .ckpt")
    s = sub.add_parser("export", help="a whole model: a folder for diffusers, or one file")
    s.add_argument("input", help="a Stable Diffusion file, with ControlNet or without, a diffusers folder, or a run")
    s.add_argument("output", help="a folder to make, or a .safetensors or .ckpt file")
    s.add_argument("--base", help="with a run: another base than its own, or where that is now")
    s.add_argument("--control", help="a ControlNet's file or folder to put in")
    s.add_argument("--prediction", choices=("auto", "eps", "v"), default="auto", help="v for SD 2.1 at 768 px")
    for each in (p, s):
        each.add_argument("--vae", help="a VAE's file or folder to put in the place of the model's")
        each.add_argument("--ema", action="store_true", help="take the UNet's moving average (model_ema.*)")
    for each in (p, q, r, s):
        each.add_argument("--half", action="store_true", help="store fp16")
        each.add_argument("--force", action="store_true", help="replace an existing output")
    sub.add_parser("info", help="say what is in a file, folder or run").add_argument("input", help="where to look")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(list(sys.argv[1:] if argv is None else argv))
    if args.command == "info":
        print(*info(args.input), sep="\n")
        return
    folder = args.command == "export" and Path(args.output).suffix not in FILES
    folder = folder or getattr(args, "format", "") == "diffusers"
    check_output(args.output, args.force, folder)
    inputs = [getattr(args, name, None) for name in ("input", "base", "from_base", "to_base", "control", "difference")]
    if any(x and Path(x).resolve() == Path(args.output).resolve() for x in inputs):
        raise CheckpointError(f"{args.output}: is an input; write to another place")
    if args.command == "attach":
        state, new = attach(args.input, args.hint_channels, args.seed, args.vae, args.ema)
        metadata = checkpoint.load_metadata(args.input)
        copied = sum(k.startswith(CONTROL) for k in state) - len(new)
        kinds = ", ".join(sorted({k.split(".")[1] for k in new}))
        print(f"{copied} tensors of the ControlNet are copies of the UNet's, {len(new)} are new ({kinds})")
    elif args.command == "extract":
        state, path = extract(args.input)
        metadata = checkpoint.load_metadata(path)
        if DIFFERENCE in state and (folder or args.difference):
            raise CheckpointError(f"{args.input}: holds differences already; merge.py export --control makes it whole")
        if folder and args.difference:
            raise CheckpointError("differences are Automatic1111's and ComfyUI's form; diffusers has none")
        files = control_folder(state, detect(path, state, CONTROL)) if folder else {}
        ema = checkpoint.is_run(args.input) and checkpoint.load_run(args.input).get("ema", False)
        state = difference(state, args.difference, ema) if args.difference else state
    elif args.command == "transfer":
        state, metadata = transfer(args.from_base, args.control, args.to_base), checkpoint.load_metadata(args.to_base)
    else:
        options = {k: getattr(args, k) for k in ("base", "control", "vae", "ema", "prediction")}
        state, config = read_model(args.input, **options)
        metadata = {"config": config.to_json()}
        files = diffusers_folder(state, config) if folder else {}
    if folder:
        save_folder(args.output, files, metadata, args.half)
    else:
        save(args.output, state, metadata, args.half)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"merge.py: {e}")
