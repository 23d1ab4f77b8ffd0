"""What can be done with whole checkpoints, without training.

    python merge.py models/v1-5-pruned.ckpt models/control_sd15_ini.safetensors      attach: SD in, SD + ControlNet out
    python merge.py extract runs/fill50k control.safetensors                         the ControlNet alone
    python merge.py transfer --from-base A --control A_CONTROL --to-base B OUT       carried over to another base model
    python merge.py export runs/fill50k exported/                                    a folder for diffusers' pipelines
    python merge.py info FILE                                                        what a file holds

Attaching copies the UNet's encoder into a new ControlNet whose zero convolutions are zero: the result draws exactly
what the input draws, and is where training starts. (`train.py --base` attaches by itself; a merged file is for other
tools, and for looking at.) An input is a file or a diffusers folder, or, where a ControlNet is read, the folder of a
run. Tensors keep their names, and tensors that a command does not know pass through unchanged, except for a UNet's
moving average, which is left out (`--ema` takes it in place of the weights). Files are mapped, and safetensors written
one tensor at a time: tensors that only pass through take no memory.
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

from controlnet import ControlNet, new_weights
from weights.diffusers_folder import control_folder, diffusers_folder
from weights.reading import CheckpointError, is_run, load_json, load_metadata, load_state_dict
from weights.runs import load_run, newest_checkpoint
from weights.source import (
    COMPONENTS,
    ModelSource,
    add_unet_weights,
    check_matches_unet,
    detect_model,
    merge_sources,
    missing_weights,
    read_component,
    read_model,
    strip_prefix,
    unet_key,
)
from weights.spelling import CONTROL, DIFFERENCE, UNET
from weights.writing import half_dtype, save_pickle, save_safetensors, write_folder, write_safetensors

State = dict[str, Tensor]


# ----------------------------------------------------------------------------------------------------------- commands
def attach(source: ModelSource) -> tuple[State, list[str]]:
    """A Stable Diffusion model with a new ControlNet, and the keys of the weights that are new (not copied)."""
    state, hint_channels = merge_sources(source), source.hint_channels
    if hint_channels < 1:
        raise CheckpointError(f"--hint-channels is {hint_channels}, should be 1 or more")
    if any(k.startswith(CONTROL) for k in state):
        raise CheckpointError(f"{source.path}: already has a ControlNet; extract takes it out")
    config = detect_model(source.path, state)
    with torch.device("meta"):
        names = ControlNet(config.unet, hint_channels, config.hint_widths).state_dict()
    new = new_weights(config.unet, hint_channels, config.hint_widths, source.seed, config.hint_gain)
    missing = [k for k in names if k not in new and UNET + k not in state]
    if missing:
        raise CheckpointError(f"{source.path}: {len(missing)} weights of the UNet missing, as {UNET}{missing[0]}")
    control = {CONTROL + k: new[k] if k in new else state[UNET + k] for k in names}
    return state | control, [CONTROL + k for k in new]


def extract(path: str | Path) -> tuple[State, Path]:
    """The ControlNet of a file, a folder or a run's newest checkpoint, and the file or folder that it was in."""
    file = Path(path)
    if is_run(file):
        file = newest_checkpoint(file) / "trained.safetensors"
        decoder = sum(k.startswith(UNET) for k in load_state_dict(file))
        if decoder:
            print(
                f"note: {path} trained the UNet's decoder too ({decoder} tensors), so the ControlNet alone is not the "
                "whole result; `merge.py export` writes all of it"
            )
    return read_component(file, CONTROL), file


def difference(control: State, base: str, ema: bool = False) -> State:
    """A ControlNet as its difference to the UNet of `base`, the form that Automatic1111 and ComfyUI read.

    `ema`: the difference to that UNet's moving average, for a ControlNet that began as a copy of the average.
    """
    state = merge_sources(ModelSource(base, ema=ema))
    check_matches_unet("the ControlNet", control, base, state)
    return add_unet_weights(control, state, sign=-1) | {DIFFERENCE: torch.ones(1)}


def transfer(from_base: str, control: str, to_base: str) -> State:
    """The model `to_base` with a ControlNet that was trained on `from_base`.

    What `to_base` has more than `from_base` is added to the weights of ControlNet and UNet wherever both models have
    them; VAE, text encoder and everything else are those of `to_base`. Follows the original's
    tool_transfer_control.py. Where nothing was trained the sum is the weight of `to_base` itself.
    """
    run = load_run(control) if is_run(control) else {}
    old, new = merge_sources(ModelSource(from_base, ema=run.get("ema", False))), merge_sources(to_base)
    models = ((from_base, old), (to_base, new))
    for path, state in models:
        detect_model(path, state)
    trained = merge_sources(ModelSource(control, base=from_base, ema=run["ema"])) if run else load_state_dict(control)
    control_weights = {k: v for k, v in trained.items() if k.startswith(CONTROL)}
    if not control_weights:
        raise CheckpointError(f"{control}: no ControlNet in it")
    for path, state in models:
        check_matches_unet(control, control_weights, path, state)
    if DIFFERENCE in trained:
        control_weights = add_unet_weights(control_weights, old)
    out = dict(new)
    for key, value in ({k: v for k, v in trained.items() if k.startswith(UNET)} | control_weights).items():
        origin = unet_key(key) if key.startswith(CONTROL) else key
        if origin in old and origin in new:
            if torch.equal(value, old[origin]):
                value = new[origin]
            elif not torch.equal(old[origin], new[origin]):
                value = (value.float() + new[origin].float() - old[origin].float()).to(value.dtype)
        out[key] = value
    return out


def info(source: str) -> list[str]:
    """Lines that say what a file, folder or run holds: components, sizes, dtypes, missing weights, model, metadata."""
    path, lines = Path(source), []
    if is_run(path):
        path = newest_checkpoint(path)
    if (path / "state.json").exists():  # a training checkpoint
        saved = load_json(path / "state.json")
        lines.append(f"{path}: step {saved['step']}, {saved['samples']} samples, trained with")
        lines += [f"    {k:24} {v}" for k, v in saved["config"].items()]
        path = path / "trained.safetensors"
    state = load_state_dict(path)

    def size(name: str, tensors: list[Tensor]) -> str:
        dtypes = ", ".join(Counter(str(v.dtype).removeprefix("torch.") for v in tensors))
        return f"{name:12} {sum(v.numel() for v in tensors) / 1e6:8.1f} M in {len(tensors)} tensors ({dtypes})"

    kinds = COMPONENTS | {"average": "model_ema."}
    for name, prefix in kinds.items():
        tensors = [v for k, v in state.items() if k.startswith(prefix)]
        lines += [size(name, tensors)] if tensors else [f"{name:12} none"]
    unknown = [v for k, v in state.items() if not k.startswith(tuple(kinds.values()))]
    lines += [size("other", unknown)] if unknown else []
    try:
        config = detect_model(path, state, UNET if strip_prefix(state, UNET + "input_blocks.") else CONTROL)
        name = "sd21 or sd21_v (no file can tell which)" if config.name == "sd21" else config.name
        lines += [f"{'model':12} {name}", *(f"{'missing':12} {line}" for line in missing_weights(state, config))]
    except CheckpointError as e:
        lines.append(f"{'model':12} {str(e).removeprefix(f'{path}: ')}")
    return lines + [f"{k:12} {v}" for k, v in load_metadata(path).items()]


# ---------------------------------------------------------------------------------------------------------- the output
FILE_ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt")


def check_output(out: str, force: bool, folder: bool) -> None:
    """Refuse, before the work, an output that cannot be written or that would remove files which are not ours."""
    path = Path(out)
    if path.exists() and not force:
        raise CheckpointError(f"{out}: exists; --force replaces it")
    if path.exists() and path.is_dir() != folder:
        exists, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise CheckpointError(f"{out}: exists as a {exists}, but the output is a {wanted}")
    if path.is_dir() and any(path.iterdir()):
        config = path / "config.json"
        if not (path / "model_index.json").exists() and not (config.exists() and "_class_name" in load_json(config)):
            raise CheckpointError(f"{out}: a folder, but not of diffusers' kind; --force does not remove it")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{out}: no such folder {path.parent}")
    if folder == (path.suffix in FILE_ENDINGS):
        raise CheckpointError(f"{out}: the output is {'a folder' if folder else 'a .safetensors file (or .ckpt)'}")


def save(out: str, state: State, metadata: Mapping[str, str], half: bool) -> None:
    """Write safetensors, or, where a `.ckpt` is named, a pickle of tensors alone."""
    path = Path(out)
    if path.suffix == ".safetensors":
        save_safetensors(path, state, metadata, half)
    else:
        if "config" in metadata:
            print(f"note: {out}: a .ckpt cannot say what the model is (v-prediction, clip-skip, a shape of its own)")
        save_pickle(path, {k: v.to(half_dtype(k, v)) for k, v in state.items()} if half else state)
    print(f"{out}: {path.stat().st_size / 1e9:.2f} GB")


def save_folder(out: str, files: Mapping[str, Any], metadata: Mapping[str, str], half: bool) -> None:
    """Write a diffusers folder (file name -> JSON, text, or tensors), all of it or nothing."""
    write_tensors = lambda tensors, path: write_safetensors(path, tensors, {"format": "pt", **metadata}, half)
    write_text = lambda text, path: path.write_text(
        text if isinstance(text, str) else json.dumps(text, indent=2) + "\n"
    )
    writers = {name: write_tensors if name.endswith(".safetensors") else write_text for name in files}
    write_folder(out, {name: partial(writers[name], content) for name, content in files.items()})
    size = sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file())
    print(f"{out}: a diffusers folder, {size / 1e9:.2f} GB")


# --------------------------------------------------------------------------------------------------------------- CLI
def parse(argv: list[str]) -> argparse.Namespace:
    commands = ("attach", "extract", "transfer", "export", "info", "-h", "--help")
    if argv and argv[0] not in commands:
        argv = ["attach", *argv]  # python merge.py INPUT OUTPUT
    parser = argparse.ArgumentParser(description="Attach, extract, carry over and export ControlNets; look into files.")
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("attach", help="add a new ControlNet to a Stable Diffusion model (also: merge.py INPUT OUTPUT)")
    p.add_argument("input", help="a Stable Diffusion file or diffusers folder")
    p.add_argument("output", help="the file to write: .safetensors or .ckpt")
    p.add_argument("--hint-channels", type=int, default=3, help="number of channels of the hint images (default 3)")
    p.add_argument("--seed", type=int, default=0, help="seed of the hint encoder's initial weights (default 0)")
    q = sub.add_parser("extract", help="write the ControlNet alone")
    q.add_argument("input", help="a file with a ControlNet, a diffusers folder, or the folder of a run")
    q.add_argument("output", help="the file to write: .safetensors or .ckpt; with --format diffusers a folder")
    q.add_argument(
        "--format", choices=("original", "diffusers"), default="original",
        help="original: keys control_model.* as Automatic1111 and ComfyUI read them (default); diffusers: a folder",
    )  # fmt: skip
    q.add_argument(
        "--difference", metavar="BASE", help="write the difference to the UNet of the model BASE (not for diffusers)"
    )
    r = sub.add_parser("transfer", help="carry a ControlNet over to another base model")
    r.add_argument("--from-base", required=True, help="the base model on which the ControlNet was trained")
    r.add_argument("--control", required=True, help="that model with its ControlNet, the ControlNet alone, or a run")
    r.add_argument("--to-base", required=True, help="the base model to which the ControlNet is carried over")
    r.add_argument("output", help="the file to write, the second model with the ControlNet: .safetensors or .ckpt")
    s = sub.add_parser("export", help="write a whole model as a folder for diffusers or as one file")
    s.add_argument("input", help="a Stable Diffusion file with or without ControlNet, a diffusers folder, or a run")
    s.add_argument("output", help="the folder, or the .safetensors or .ckpt file, to write")
    s.add_argument("--base", default="", help="with a run: the base model, if it has moved or another one is wanted")
    s.add_argument("--control", default="", help="file or folder of a ControlNet to put into the model")
    s.add_argument(
        "--prediction",
        choices=("auto", "eps", "v"),
        default="auto",
        help="what the UNet predicts (v: SD 2.1 at 768 px)",
    )
    for each in (p, s):
        each.add_argument("--vae", default="", help="file or folder of a VAE that replaces the model's VAE")
        each.add_argument("--ema", action="store_true", help="use the moving average of the UNet (model_ema.*)")
    for each in (p, q, r, s):
        each.add_argument("--half", action="store_true", help="store the weights in fp16")
        each.add_argument("--force", action="store_true", help="replace an existing output")
    sub.add_parser("info", help="say what a file, folder or run holds").add_argument("input", help="where to look")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(list(sys.argv[1:] if argv is None else argv))
    if args.command == "info":
        print(*info(args.input), sep="\n")
        return
    folder = args.command == "export" and Path(args.output).suffix not in FILE_ENDINGS
    folder = folder or getattr(args, "format", "") == "diffusers"
    check_output(args.output, args.force, folder)
    inputs = [getattr(args, name, None) for name in ("input", "base", "from_base", "to_base", "control", "difference")]
    if any(path and Path(path).resolve() == Path(args.output).resolve() for path in inputs):
        raise CheckpointError(f"{args.output}: is an input; write to another place")
    if args.command == "attach":
        source = ModelSource(args.input, vae=args.vae, ema=args.ema, hint_channels=args.hint_channels, seed=args.seed)
        state, new = attach(source)
        metadata = load_metadata(args.input)
        copied = sum(k.startswith(CONTROL) for k in state) - len(new)
        modules = ", ".join(sorted({k.split(".")[1] for k in new}))
        print(f"{copied} tensors of the ControlNet are copies of the UNet's, {len(new)} are new ({modules})")
    elif args.command == "extract":
        state, path = extract(args.input)
        metadata = load_metadata(path)
        if DIFFERENCE in state and (folder or args.difference):
            raise CheckpointError(f"{args.input}: holds differences already; merge.py export --control makes it whole")
        if folder and args.difference:
            raise CheckpointError("differences are Automatic1111's and ComfyUI's form; diffusers has none")
        files = control_folder(state, detect_model(path, state, CONTROL)) if folder else {}
        ema = is_run(args.input) and load_run(args.input).get("ema", False)
        state = difference(state, args.difference, ema) if args.difference else state
    elif args.command == "transfer":
        state, metadata = transfer(args.from_base, args.control, args.to_base), load_metadata(args.to_base)
    else:
        options = {name: getattr(args, name) for name in ("base", "control", "vae", "ema", "prediction")}
        state, config = read_model(ModelSource(args.input, **options))
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
