"""What can be done with whole checkpoints, without training.

    python merge.py models/v1-5-pruned.ckpt models/control_sd15_ini.safetensors      attach: SD in, SD + ControlNet out
    python merge.py extract runs/fill50k control.safetensors                         the ControlNet alone
    python merge.py info FILE                                                        what is in it

Attaching copies the UNet's encoder into a new ControlNet whose zero convolutions are zero: the result draws exactly
what the input draws, and is where training starts. (`train.py --base` attaches by itself; a merged file is for other
tools, and for looking at.) Tensors pass through under their names; what a command does not know it leaves as it is.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from controlnet import CONTROL, TEXT, UNET, VAE, ControlNet, detect, new_weights

PARTS = {"UNet": UNET, "ControlNet": CONTROL, "VAE": VAE, "text tower": TEXT}


def attach(source: str, hint_channels: int = 3, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """SD -> SD + ControlNet: tensors, metadata, and the names of the weights that are new (not copied)."""
    state = checkpoint.load_state_dict(source)
    if any(k.startswith(CONTROL) for k in state):
        raise CheckpointError(f"{source}: already has a ControlNet; extract takes it out")
    config = detect(source, state)
    with torch.device("meta"):
        names = ControlNet(config.unet, hint_channels, config.hint_widths).state_dict()
    new = new_weights(config.unet, hint_channels, config.hint_widths, seed, config.hint_gain)
    lacking = [k for k in names if k not in new and UNET + k not in state]
    if lacking:
        raise CheckpointError(f"{source}: {len(lacking)} weights of the UNet missing, as {UNET}{lacking[0]}")
    control = {CONTROL + k: new[k] if k in new else state[UNET + k].clone() for k in names}
    return state | control, checkpoint.load_metadata(source), [CONTROL + k for k in new]


def extract(source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The ControlNet of a file or of a run's newest checkpoint, under `control_model.*`, and the file's metadata."""
    path = Path(source)
    if path.is_dir():
        path = checkpoint.newest(path) / "trained.safetensors"
    state = checkpoint.load_state_dict(path)
    control = {k: v for k, v in state.items() if k.startswith(CONTROL)}
    if not control:
        raise CheckpointError(f"{source}: no ControlNet in it")
    decoder = sum(k.startswith(UNET) for k in state)
    if path != Path(source) and decoder:
        print(
            f"note: {source} trained {decoder} tensors of the UNet's decoder too; the ControlNet alone leaves them out"
        )
    return control, checkpoint.load_metadata(path)


def info(source: str) -> list[str]:
    """Lines that say what a file holds: its parts, their sizes and dtypes, its model, its metadata."""
    state = checkpoint.load_state_dict(source)
    lines = []
    for name, prefix in PARTS.items():
        tensors = [v for k, v in state.items() if k.startswith(prefix)]
        dtypes = Counter(str(v.dtype).removeprefix("torch.") for v in tensors)
        size = sum(v.numel() for v in tensors) / 1e6
        lines.append(
            f"{name:11} {size:8.1f} M in {len(tensors)} tensors ({', '.join(dtypes)})" if tensors else f"{name:11} none"
        )
    other = sum(not k.startswith(tuple(PARTS.values())) for k in state)
    lines.append(f"{'other':11} {other} tensors")
    try:
        lines.append(f"{'model':11} {detect(source, state).name}")
    except CheckpointError as e:
        lines.append(f"{'model':11} {str(e).removeprefix(f'{source}: ')}")
    return lines + [f"{k:11} {v}" for k, v in checkpoint.load_metadata(source).items()]


def save(out: str, state: dict[str, Tensor], metadata: dict[str, str], half: bool, force: bool) -> None:
    """Write safetensors, or, where a `.ckpt` is named, a pickle of tensors alone."""
    path = Path(out)
    if path.exists() and not force:
        raise CheckpointError(f"{out}: exists; --force replaces it")
    if not path.parent.is_dir():
        raise CheckpointError(f"{out}: no such folder {path.parent}")
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    if path.suffix in (".ckpt", ".pth", ".pt"):
        checkpoint.write_atomically(
            path, lambda p: torch.save({"state_dict": {k: v.clone() for k, v in state.items()}}, p)
        )
    elif path.suffix == ".safetensors":
        checkpoint.save_safetensors(path, state, metadata)
    else:
        raise CheckpointError(f"{out}: the output is a .safetensors file (or .ckpt)")
    print(f"{out}: {path.stat().st_size / 1e9:.2f} GB")


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in ("attach", "extract", "info", "-h", "--help"):
        argv.insert(0, "attach")  # python merge.py INPUT OUTPUT
    parser = argparse.ArgumentParser(
        description="Attach a ControlNet to a Stable Diffusion file, take one out, look into one."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("attach", help="SD in, SD + ControlNet out (also: merge.py INPUT OUTPUT)")
    p.add_argument("input", help="a Stable Diffusion file")
    p.add_argument("output", help=".safetensors, or .ckpt")
    p.add_argument("--hint-channels", type=int, default=3, help="channels of the hint images (default 3)")
    p.add_argument("--seed", type=int, default=0, help="of the hint encoder's initial weights (default 0)")
    q = commands.add_parser("extract", help="the ControlNet alone, as control_model.*")
    q.add_argument("input", help="a file with a ControlNet, or the folder of a run")
    q.add_argument("output", help=".safetensors, or .ckpt")
    for each in (p, q):
        each.add_argument("--half", action="store_true", help="store fp16")
        each.add_argument("--force", action="store_true", help="replace an existing output")
    commands.add_parser("info", help="say what is in a file").add_argument("input", help="a weight file")
    args = parser.parse_args(argv)
    if args.command == "info":
        print(*info(args.input), sep="\n")
        return
    if Path(args.output).exists() and not args.force:  # before the work
        raise CheckpointError(f"{args.output}: exists; --force replaces it")
    if args.command == "attach":
        state, metadata, new = attach(args.input, args.hint_channels, args.seed)
        copied = sum(k.startswith(CONTROL) for k in state) - len(new)
        kinds = ", ".join(sorted({k.split(".")[1] for k in new}))
        print(f"{copied} tensors of the ControlNet are copies of the UNet's, {len(new)} are new ({kinds})")
    else:
        state, metadata = extract(args.input)
    save(args.output, state, metadata, args.half, args.force)


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, OSError) as e:
        sys.exit(f"merge.py: {e}")
