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
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flags import parse_merge as parse
from training.console import protect_output, run_program

if __name__ == "__main__":  # --help and wrong flags are answered before the imports below, which take seconds
    protect_output()
    parse(sys.argv[1:])

import torch
from torch import Tensor

from controlnet import new_weights
from ldm import PRECISIONS, ControlLDM, ModelConfig
from sampler import noise_schedule
from weights.clients import bare_names, lost_in_pickle, modelspec, notes, size_in_words, widen_hint
from weights.configs import CheckpointError, is_run, load_json, metadata_config
from weights.control import read_control
from weights.control_depth import written
from weights.detect import detect_model, distilled, measured_prediction, model_of_weights, pools_globally
from weights.diffusers_folder import common_dtype, control_folder, diffusers_folder
from weights.kinds import refuse_other_kinds
from weights.original import markers, missing_buffers
from weights.reading import load_metadata, load_state_dict
from weights.runs import load_run, load_state, newest_checkpoint
from weights.source import (
    ModelSource,
    add_unet_weights,
    check_matches_unet,
    check_networks,
    merge_sources,
    missing_weights,
    read_model,
    strip_prefix,
    unet_key,
    whole_control,
)
from weights.spelling import COMPONENTS, CONTROL, DIFFERENCE, TEXT, TEXT_1, TEXT_2, UNET
from weights.writing import save_pickle, save_safetensors, stored_dtype, write_folder, write_safetensors

State = dict[str, Tensor]


# ----------------------------------------------------------------------------------------------------------- commands
def attach(source: ModelSource) -> tuple[State, ModelConfig, list[str]]:
    """A Stable Diffusion model with a new ControlNet, its configuration, and the keys of the weights that are new.

    All other weights of the ControlNet are copies. Follows the original's tool_add_control.py: the original loads the
    result strictly, so the buffers that it asks for are added where the model lacks them.
    """
    (state, config), hint_channels = read_model(source), source.hint_channels
    if hint_channels < 1:
        raise CheckpointError(f"--hint-channels is {hint_channels}, should be 1 or more")
    if any(k.startswith(CONTROL) for k in state):
        raise CheckpointError(f"{source.path}: already has a ControlNet; extract takes it out")
    with torch.device("meta"):
        whole = ControlLDM(config, hint_channels)
    needed = {k: v for k, v in whole.unet.state_dict().items() if not k.startswith(("output_blocks.", "out."))}
    if misfits := [k for k, v in needed.items() if UNET + k not in state or state[UNET + k].shape != v.shape]:
        raise CheckpointError(
            f"{source.path}: {len(misfits)} weights of the UNet missing or of another shape, as {UNET}{misfits[0]}"
        )
    names = whole.control_model.state_dict()
    new = new_weights(config.control_unet, hint_channels, config.hint_widths, source.seed, config.hint_gain)
    control = {CONTROL + k: new[k] if k in new else state[UNET + k] for k in names}
    schedule = noise_schedule(config.linear_start, config.linear_end, config.timesteps, config.zero_terminal_snr)
    return markers(config) | state | control | missing_buffers(state, *schedule), config, [CONTROL + k for k in new]


def extract(path: str | Path) -> tuple[State, Path]:
    """The ControlNet of a file, a folder or a run's newest checkpoint (its moving average, if the run keeps one), and
    the file or folder that it was in."""
    file = Path(path)
    if is_run(file):
        file = newest_checkpoint(file) / "trained.safetensors"
        decoder = sum(k.startswith(UNET) for k in load_state_dict(file))
        if decoder:
            print(
                f"note: {path} trained the UNet's decoder too ({decoder} tensors), so the ControlNet alone is not the "
                "whole result; `merge.py export` writes all of it"
            )
    return read_control(path)[0], file


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
        check_networks(state, detect_model(path, state), lambda prefix, path=path: path)
    trained = merge_sources(ModelSource(control, base=from_base, ema=run["ema"])) if run else load_state_dict(control)
    control_weights = {k: v for k, v in trained.items() if k.startswith(CONTROL)}
    if not control_weights:
        raise CheckpointError(f"{control}: no ControlNet in it")
    refuse_other_kinds(control, control_weights)
    control_weights |= {k: trained[k] for k in (DIFFERENCE,) if k in trained}
    for path, state in models:
        check_matches_unet(control, control_weights, path, state)
    control_weights = whole_control(control, control_weights, from_base, old)
    out = {k: v for k, v in new.items() if not k.startswith(CONTROL)}
    same = lambda a, b: torch.equal(a.float(), b.float())  # not all formats can be compared as they are
    for key, value in ({k: v for k, v in trained.items() if k.startswith(UNET)} | control_weights).items():
        origin = unet_key(key) if key.startswith(CONTROL) else key
        if origin in old and origin in new:
            if same(value, old[origin]):
                value = new[origin]
            elif not same(old[origin], new[origin]):
                value = (value.float() + new[origin].float() - old[origin].float()).to(value.dtype)
        out[key] = value
    return out


def info(source: str) -> list[str]:
    """Lines that say what a file, folder or run holds: components, sizes, dtypes, missing weights, model, metadata."""
    path, lines = Path(source), []
    if is_run(path):
        path = newest_checkpoint(path)
    if (path / "state.json").exists():  # a training checkpoint
        saved = load_state(path)
        lines.append(f"{path}: step {saved['step']}, {saved['samples']} samples, trained with")
        lines += [f"    {k:24} {v}" for k, v in saved["config"].items()]
        path = path / "trained.safetensors"
    state = load_state_dict(path)

    def size(name: str, tensors: list[Tensor]) -> str:
        dtypes = ", ".join(Counter(str(v.dtype).removeprefix("torch.") for v in tensors))
        number = f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"
        return f"{name:12} {sum(v.numel() for v in tensors) / 1e6:8.1f} M in {number} ({dtypes})"

    kinds = COMPONENTS | {"average": "model_ema."}
    is_sdxl = any(k.startswith((TEXT_1, TEXT_2)) for k in state)
    for name, prefix in kinds.items():
        tensors = [v for k, v in state.items() if k.startswith(prefix)]
        told = prefix not in ((TEXT,) if is_sdxl else (TEXT_1, TEXT_2))
        lines += [size(name, tensors)] if tensors else [f"{name:12} none"] * told
    unknown = [v for k, v in state.items() if not k.startswith(tuple(kinds.values()))]
    lines += [size("other", unknown)] if unknown else []
    if DIFFERENCE in state:
        lines.append(f"{'control':12} is its difference to the UNet of a base, without which it cannot be drawn with")
    try:
        prefix = UNET if strip_prefix(state, UNET + "input_blocks.") else CONTROL
        config = detect_model(path, state, prefix)
        name = config.name
        if "config" not in load_metadata(path) and name in ("sd21", "sd21_v"):
            measured = prefix == UNET and measured_prediction(state)
            name += " (to judge by its weights)" if measured else " or sd21_v (nothing in it tells which)"
        if config.text2:
            name += f", {config.prediction}-prediction" + (f", distilled ({word})" if (word := distilled(path)) else "")
        if config.control_depth:
            name += f", the ControlNet's transformers with {written(config.control_depth)} blocks"
        lines += [f"{'model':12} {name}", *(f"{'missing':12} {line}" for line in missing_weights(path, state, config))]
    except CheckpointError as e:
        lines.append(f"{'model':12} {str(e).removeprefix(f'{path}: ')}")
    return lines + [line for name, text in load_metadata(path).items() for line in describe_metadata(name, text)]


def describe_metadata(name: str, text: str) -> list[str]:
    """Lines for one entry of a file's metadata, an object of JSON with a line for each field."""
    printable = lambda value: str(value)[:1500] if str(value)[:1500].isprintable() else ascii(str(value)[:1500])
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return [f"{printable(name):12} {printable(text)}"]
    nested = {f"{k}.{inner}": v for k, group in fields.items() if isinstance(group, dict) for inner, v in group.items()}
    flat = {k: v for k, v in fields.items() if not isinstance(v, dict)} | nested
    return [f"{printable(name)}:", *(f"    {printable(k):28} {printable(v)}" for k, v in list(flat.items())[:60])]


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
        config = load_json(path / "config.json") if (path / "config.json").exists() else {}
        if not (path / "model_index.json").exists() and not (isinstance(config, dict) and "_class_name" in config):
            raise CheckpointError(f"{out}: a folder, but not of diffusers' kind; --force does not remove it")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{out}: no such folder {path.parent}")
    if folder == (path.suffix in FILE_ENDINGS):
        raise CheckpointError(f"{out}: the output is {'a folder' if folder else 'a .safetensors file (or .ckpt)'}")


def save(out: str, state: State, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Write safetensors, or, where a `.ckpt` is named, a pickle of tensors alone. `dtype`: None keeps each tensor's."""
    path = Path(out)
    if path.suffix == ".safetensors":
        save_safetensors(path, state, without_stale(metadata), dtype)
    else:
        tell_lost(out, state, metadata)
        save_pickle(path, {k: v.to(stored_dtype(k, v, dtype)) for k, v in state.items()})
    print(f"{out}: {size_in_words(path.stat().st_size)}")


def without_stale(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of an input without what the output's tensors make false: the checksum of the input's."""
    return {k: v for k, v in metadata.items() if not k.startswith("modelspec.hash")}


def tell_lost(out: str, state: State, metadata: Mapping[str, str]) -> None:
    """Print what of the metadata a pickle of tensors alone will not tell its readers."""
    if not (config := metadata_config(out, metadata.get("config", ""))):
        return
    try:
        by_weights = model_of_weights(out, state)
    except CheckpointError:
        by_weights = None
    if lost := lost_in_pickle(state, config, by_weights):
        print(f"note: {out}: a .ckpt cannot say what its weights do not show: {', '.join(lost)}; .safetensors can")


def save_folder(out: str, files: Mapping[str, Any], metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Write a diffusers folder (file name -> JSON, text, or tensors), all of it or nothing, in one precision: `dtype`,
    or the one that holds all of its weights."""
    tensors = [v for name, content in files.items() if name.endswith(".safetensors") for v in content.values()]
    dtype = dtype or common_dtype(tensors)
    write_tensors = lambda tensors, path: write_safetensors(path, tensors, {"format": "pt", **metadata}, dtype)
    write_text = lambda text, path: path.write_text(
        text if isinstance(text, str) else json.dumps(text, indent=2) + "\n", encoding="utf-8"
    )
    writers = {name: write_tensors if name.endswith(".safetensors") else write_text for name in files}
    write_folder(out, {name: partial(writers[name], content) for name, content in files.items()}, checksums=False)
    size = sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file())
    print(f"{out}: a diffusers folder, {size_in_words(size)} in {str(dtype).removeprefix('torch.')}")


def with_global_pool(metadata: Mapping[str, str], pooled: bool) -> dict[str, str]:
    """The metadata of a file whose ControlNet averages its residuals over the image, or not."""
    if config := metadata_config("", metadata.get("config", "")):
        return {**metadata, "config": dataclasses.replace(config, global_pool=pooled).to_json()}
    return {**metadata, "global_pool": json.dumps(pooled)}


# --------------------------------------------------------------------------------------------------------------- CLI
def main(argv: list[str] | None = None) -> None:
    args = parse(list(sys.argv[1:] if argv is None else argv))
    if args.command == "info":
        print(*info(args.input), sep="\n")
        return
    folder = args.command == "export" and Path(args.output).suffix not in FILE_ENDINGS
    folder = folder or getattr(args, "format", "") == "diffusers"
    check_output(args.output, args.force, folder)
    inputs = [getattr(args, name, None) for name in ("input", "base", "from_base", "to_base", "control", "difference")]
    if any(path and os.path.realpath(path) == os.path.realpath(args.output) for path in inputs):
        raise CheckpointError(f"{args.output}: is an input; write to another place")
    commands = {"attach": run_attach, "extract": run_extract, "transfer": run_transfer, "export": run_export}
    content, state, metadata, config = commands[args.command](args, folder)
    metadata = {**metadata, **({} if folder else modelspec(config, state))}
    dtype = PRECISIONS[args.dtype] if args.dtype else None
    (save_folder if folder else save)(args.output, content, metadata, dtype)
    for note in notes(args.output, state, config, folder) if args.command in ("extract", "export") else ():
        print(f"note: {args.output}: {note}")


# What a command writes: the files of a folder or the tensors of a file; the tensors in original names; the metadata;
# the model's configuration, if it is known.
Output = tuple[dict[str, Any], State, dict[str, str], ModelConfig | None]


def run_attach(args: argparse.Namespace, folder: bool) -> Output:
    """`merge.py attach`. `folder`, here and below: the output is a folder for diffusers."""
    options = {name: getattr(args, name) for name in ("vae", "ema", "hint_channels", "seed", "control_depth")}
    source = ModelSource(args.input, **options)
    state, config, new = attach(source)
    metadata = load_metadata(args.input)
    if Path(args.input).is_dir():  # beside the weights the folder says what they cannot
        metadata["config"] = config.to_json()
    copied = sum(k.startswith(CONTROL) for k in state) - len(new)
    modules = ", ".join(sorted({k.split(".")[1] for k in new}))
    print(f"{copied} tensors of the ControlNet are copies of the UNet's, {len(new)} are new ({modules})")
    return state, state, metadata, config


def run_extract(args: argparse.Namespace, folder: bool) -> Output:
    """`merge.py extract`."""
    state, path = extract(args.input)
    if DIFFERENCE in state and (folder or args.difference):
        raise CheckpointError(f"{args.input}: holds differences already; merge.py export --control makes it whole")
    if folder and (args.difference or args.bare):
        what = "differences are" if args.difference else "--bare is"
        raise CheckpointError(f"{what} Automatic1111's and ComfyUI's form; diffusers has none")
    pooled = pools_globally(path)
    metadata = with_global_pool(load_metadata(path), pooled)
    try:
        config = dataclasses.replace(detect_model(path, state, CONTROL), global_pool=pooled)
    except CheckpointError:
        if folder:
            raise
        config = None
    if args.difference and config and config.control_depth:
        raise CheckpointError(f"{args.input}: a ControlNet that is smaller than its UNet has no difference to it")
    if args.hint_channels:
        state = widen_hint(path, state, args.hint_channels)
    if folder:
        return control_folder(path, state, config), state, metadata, config
    ema = is_run(args.input) and load_run(args.input).get("ema", False)
    state = difference(state, args.difference, ema) if args.difference else state
    return bare_names(state) if args.bare else state, state, metadata, config


def run_transfer(args: argparse.Namespace, folder: bool) -> Output:
    """`merge.py transfer`."""
    state = transfer(args.from_base, args.control, args.to_base)
    path = newest_checkpoint(args.control) / "trained.safetensors" if is_run(args.control) else args.control
    metadata, config = load_metadata(args.to_base), None
    if Path(args.to_base).is_dir():  # beside the weights the folder says what they cannot
        config = read_model(args.to_base)[1]
        state, metadata["config"] = markers(config) | state, config.to_json()
    return state, state, with_global_pool(metadata, pools_globally(path)), config


def run_export(args: argparse.Namespace, folder: bool) -> Output:
    """`merge.py export`."""
    options = {name: getattr(args, name) for name in ("base", "control", "vae", "ema", "prediction")}
    state, config = read_model(ModelSource(args.input, **options))
    content = diffusers_folder(args.input, state, config) if folder else markers(config) | state
    return content, state, {"config": config.to_json()}, config


if __name__ == "__main__":
    run_program("merge.py", main, leaner="a computer with more memory, or other programs closed, may do it")
