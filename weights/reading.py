"""How weights come out of files: every container, one spelling, and nothing that a file holds is executed.

`load_state_dict` returns the tensors of a weight file or of a diffusers folder under the original key names
(`model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*`, `control_model.*`). What a file is, its first
bytes say, and not its name: safetensors (a JSON header and bytes, safe by nature), or one of PyTorch's two formats,
which begin with a pickle. A pickle is inspected (see `weights.pickles`) before `torch.load(weights_only=True)` reads
it. Afterwards each tensor must lie inside its storage. Zip files (PyTorch 1.6 and later) and safetensors are
memory-mapped: tensors are views of the page cache, and weights that are never touched are never loaded.
"""

import io
import itertools
import mmap
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ldm import MODELS
from weights.configs import INDEX, TEXT, CheckpointError, check_fields, is_run, load_json, network_settings
from weights.pickles import MAX_PICKLE, read_program
from weights.spelling import (
    COMPONENTS,
    CONTROL,
    first_text_to_original,
    second_text_to_original,
    to_original,
)

StandIns = list[tuple[type, str]]


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weight file or of a diffusers folder, under their original key names.

    `path`: safetensors or a file of torch.save, under any name; a whole model or a single component, in original or
    diffusers' names. State dicts inside of others (under `state_dict`, `model`, `ema`, ...) are unwrapped, and the
    prefixes of wrappers (`module.` of DistributedDataParallel, `_orig_mod.` of torch.compile) removed. Or a folder: a
    diffusers pipeline (with `model_index.json`) or one component of a pipeline. Tensors are mapped, not copied. Raises
    CheckpointError (one line) for a path that is missing, damaged or unsafe, or that holds no tensors.
    """
    path = Path(path)
    if not path.is_dir():
        return _to_original(path, _read_file(path))
    if not (path / "model_index.json").exists():
        return _to_original(path, _read_component_folder(path))
    check_fields(path / "model_index.json", load_json(path / "model_index.json"), {"_class_name": TEXT})
    if not (path / "unet").is_dir():
        raise CheckpointError(f"{path}: a diffusers folder without a unet/ in it")
    translate = dict.fromkeys(("unet", "vae", "text_encoder", "controlnet"), to_original)
    if (path / "text_encoder_2").is_dir():  # SDXL
        translate |= {"text_encoder": first_text_to_original, "text_encoder_2": second_text_to_original}
    state: dict[str, Tensor] = {}
    for name, function in translate.items():
        if (path / name).is_dir():
            state |= _to_original(path / name, _read_component_folder(path / name), function)
    return state


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file (of a diffusers folder: of its UNet's file); empty for other kinds of file."""
    path = Path(path)
    if path.is_dir():
        path = path / ("unet" if (path / "model_index.json").exists() else "") / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        return {}
    with open(path, "rb") as f:
        if _kind(path, f.read(HEAD)) != "safetensors":
            return {}
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            return f.metadata() or {}
    except safetensors.SafetensorError as e:
        raise _damaged(path, e) from e


# ------------------------------------------------------------------------------------------------------------- names
# What wrappers put into keys: DistributedDataParallel, torch.compile, FSDP, activation checkpointing, DeepSpeed.
WRAPPER = re.compile(r"(^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
MODULE = re.compile(rf"^({'|'.join(re.escape(prefix) for prefix in COMPONENTS.values())})?(?:module\.)+")


def _to_original(
    path: Path, state: dict[str, Tensor], translate: Callable[[dict[str, Tensor]], dict[str, Tensor]] = to_original
) -> dict[str, Tensor]:
    """The tensors of the file `path` under original key names, without the prefixes of wrappers."""
    names = {key: MODULE.sub(r"\1", WRAPPER.sub("", key)) for key in state}
    if len(set(names.values())) == len(state):  # otherwise a prefix tells two tensors apart
        state = {names[key]: value for key, value in state.items()}
    try:
        return _follow_settings(path, translate(state))
    except CheckpointError:
        raise
    except (IndexError, KeyError, RuntimeError, ValueError) as e:
        raise CheckpointError(f"{path}: its keys are a known model's, its shapes are not ({_one_line(e)})") from e


def _follow_settings(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check the `config.json` of a network that diffusers saved. A ControlNet for hints in the order BGR becomes one
    for RGB: the weights of its first convolution change places."""
    kind = next((kind for kind, prefix in COMPONENTS.items() if any(k.startswith(prefix) for k in state)), "")
    settings = network_settings(path, kind) if kind else {}
    first = CONTROL + "input_hint_block.0.weight"
    if settings.get("controlnet_conditioning_channel_order") == "bgr" and first in state:
        state[first] = state[first].flip(1)
    return state


# ------------------------------------------------------------------------------------------------------------- files
def _read_component_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of one component of a diffusers folder, from one file or from an index of several files.

    Full precision is preferred to fp16, safetensors to pickles.
    """
    for variant in ("", ".fp16"):
        for ending in (".safetensors", ".bin"):
            for name in ("diffusion_pytorch_model", "model", "pytorch_model"):
                file, index = folder / f"{name}{variant}{ending}", folder / f"{name}{ending}.index{variant}.json"
                if file.exists():
                    return _read_file(file)
                if index.exists():
                    names = check_fields(index, load_json(index), INDEX, required=INDEX.keys())["weight_map"]
                    check_fields(index, names, dict.fromkeys(names, TEXT), section="weight_map.")
                    shards = sorted({Path(shard).name for shard in names.values()})
                    return {k: v for shard in shards for k, v in _read_file(folder / shard).items()}
    if is_run(folder):
        raise CheckpointError(f"{folder}: the folder of a training run; its weights are in {folder}/checkpoints")
    raise CheckpointError(f"{folder}: a folder without weights, neither of a diffusers component nor of a training run")


HEAD = 512  # bytes at the start of a file that tell what the file is
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first of the pickles in a file before PyTorch 1.6
LEGACY = re.compile(re.escape(LEGACY_MAGIC).replace(b"\x02", rb"[\x02-\x05](?:\x95.{8})?", 1), re.DOTALL)
OTHER_KINDS = {  # first bytes -> what the file is instead of weights, and the way out
    b"version https://git-lfs": "a git-lfs pointer and not the file itself, which `git lfs pull` fetches",
    b"<": "a web page and not the file that should have been downloaded; download the file itself",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"GGUF": "weights in GGUF's quantized format, which cannot be read here",
    b"\x89HDF": "weights in Keras' format, which cannot be read here",
}


def _kind(path: Path, head: bytes) -> str:
    """What a file with the first bytes `head` is: "zip", "legacy" or "safetensors". CheckpointError for the rest."""
    if head.startswith(ZIP_MAGIC):
        return "zip"
    if LEGACY.match(head):
        return "legacy"
    for magic, what in OTHER_KINDS.items():
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic):
            raise CheckpointError(f"{path}: {what}")
    if head[8:9] == b"{":
        return "safetensors"
    if not head.strip(b"\0"):
        raise CheckpointError(f"{path}: {'begins with zeros: a cut download' if head else 'is empty'}")
    if re.fullmatch(rb"[\t\n\r -~]*", head):
        text = " ".join(head[:80].decode().split())
        raise CheckpointError(f"{path}: damaged, or not a weight file but a text, which begins: {text}")
    raise CheckpointError(f"{path}: damaged, or not a weight file: neither safetensors nor written by torch.save")


def _absent(path: Path) -> str:
    """What to say of a file that is not there."""
    if str(path) in MODELS:
        return "no such file; the names of models are for --plan and bench.py, a model to train on is a file"
    return "no such file" + "; `make sd15` downloads it" * (path.name == "v1-5-pruned.ckpt")


def _read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, under the names that the file gives them."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else _absent(path)}")
    readers = {"zip": _read_zip, "legacy": _read_legacy, "safetensors": safetensors.torch.load_file}
    try:
        with open(path, "rb") as f:
            head = f.read(HEAD)
        tensors = readers[_kind(path, head)](path)
    except CheckpointError:
        raise
    except Exception as e:  # damaged in one of a hundred ways: the reason matters less than the file's name
        raise _damaged(path, e) from e
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged, or not a weight file ({type(error).__name__}: {_one_line(error)})")


def _one_line(error: Exception) -> str:
    """The message of an error, without torch's advice around it (which is to read the file unsafely)."""
    text = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation of torch.load")[0]
    return " ".join(text.split())[:200]


def _read_zip(path: Path) -> dict[str, Tensor]:
    """PyTorch's zip format: the pickle `NAME/data.pkl`, and each storage, uncompressed, as `NAME/data/KEY`."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        pickles = [r for r in records if r.filename.endswith("data.pkl") and r.filename.count("/") <= 1]
        if any(r.filename.endswith("/constants.pkl") for r in records):
            raise CheckpointError(f"{path}: a TorchScript program, which would be executed, and not weights")
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: a zip file, but torch.save did not write it (no data.pkl)")
        if pickles[0].file_size > MAX_PICKLE:
            raise CheckpointError(f"{path}: refused, its data.pkl claims {pickles[0].file_size} bytes")
        if any(r.compress_type != zipfile.ZIP_STORED for r in records):
            raise CheckpointError(
                f"{path}: refused, a zip file with compressed contents, which torch.save never writes"
            )
        program, stand_ins, rewritten = read_program(path, io.BytesIO(archive.read(pickles[0])))
    load = lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if rewritten or path.suffix == ".safetensors":  # a file of this name torch.load would give to safetensors
        folder = pickles[0].filename.removesuffix("data.pkl")
        load = lambda: _load_rewritten(path, program, {r.filename.removeprefix(folder): r for r in records})
    try:
        tensors = _read_tensors(path, stand_ins, load)
    except RuntimeError as e:  # of torch's reader, or of a tensor that does not fit into the mapped part of the file
        raise CheckpointError(f"{path}: damaged, a storage is missing or cut short ({_one_line(e)})") from e
    sizes = {0, *(r.file_size for r in records)}  # torch also maps bytes beyond a record's end, if the pickle asks
    if any(tensor.untyped_storage().nbytes() not in sizes for tensor in tensors.values()):
        raise CheckpointError(f"{path}: damaged, a storage is cut short")
    return {
        k: v.clone() if v.data_ptr() % v.itemsize else v for k, v in tensors.items()
    }  # other zip writers: unaligned


def _load_rewritten(path: Path, program: bytes, records: dict[str, zipfile.ZipInfo]) -> Any:
    """What torch.load returns for a zip file whose pickle is `program` instead. Storages are mapped likewise."""
    mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    storages: dict[str, torch.UntypedStorage] = {}
    with open(path, "rb") as f:

        def load_storage(saved: tuple) -> torch.TypedStorage:
            _, storage_class, key, _, _ = saved
            if key not in storages:
                record = records[f"data/{key}"]
                f.seek(record.header_offset + 26)  # the lengths of name and extra field, which precede the content
                start = record.header_offset + 30 + sum(struct.unpack("<HH", f.read(4)))
                storages[key] = mapped[start : start + record.file_size]
            return torch.TypedStorage(wrap_storage=storages[key], dtype=storage_class.dtype, _internal=True)

        if sys.byteorder != "little":
            raise CheckpointError(f"{path}: refused, a pickle of a protocol that torch.load does not read here")
        unpickler = torch._weights_only_unpickler.Unpickler(io.BytesIO(program), encoding="utf-8")
        unpickler.persistent_load = load_storage
        return unpickler.load()


def _read_legacy(path: Path) -> dict[str, Tensor]:
    """The format before PyTorch 1.6: five pickles (magic number, version, system, content, storage keys), storages.

    torch reads from a map of the file, which has no file number, and so does not try its still older tar format.
    """
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        programs = [read_program(path, mapped) for _ in range(5)]
        stand_ins = [pair for _, pairs, _ in programs for pair in pairs]
        file: Any = mapped
        if any(rewritten for _, _, rewritten in programs):  # in memory: rare, and read by torch as a whole anyway
            file = io.BytesIO(b"".join(program for program, _, _ in programs) + mapped[mapped.tell() :])
        file.seek(0)
        return _read_tensors(path, stand_ins, lambda: torch.load(file, map_location="cpu", weights_only=True))


# The names under which trainers keep the state dict of a model, the wanted ones first.
STATE_NAMES = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "controlnet", "params",
    "weights", "ema", "params_ema", "model_ema", "ema_model", "ema_state_dict",
)  # fmt: skip
MAX_REPEATED = 16  # how often tensors may share the bytes of the file


def _read_tensors(path: Path, stand_ins: StandIns, load: Callable[[], Any]) -> dict[str, Tensor]:
    """The tensors of the state dict in what `load` returns, without gradients, hooks or repetition."""
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
        content = load()
    items = dict.items(_find_state(path, content)) if isinstance(content, dict) else ()
    tensors = {k: v.detach() for k, v in items if isinstance(v, Tensor) and isinstance(k, str)}
    storages: dict[int, int] = {}
    for tensor in tensors.values():
        if min(tensor.shape, default=0) < 0:
            raise CheckpointError(f"{path}: refused, a tensor of negative size")
        storage = tensor.untyped_storage()
        if tensor.nbytes > storage.nbytes():  # strides of 0: ten bytes would become terabytes
            raise CheckpointError(f"{path}: refused, a tensor larger than its storage")
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(tensor.nbytes for tensor in tensors.values()) > MAX_REPEATED * sum(storages.values()):
        raise CheckpointError(f"{path}: refused, its tensors repeat the bytes of the file many times over")
    return tensors


def _find_state(path: Path, content: dict) -> dict:
    """The state dict in what a file holds: under a name that trainers use, or the one dictionary of tensors."""
    # Methods of dict, since a pickle can hide those of an OrderedDict. 8 times, since a dictionary may hold itself.
    for _ in range(8):
        named = [name for name in STATE_NAMES if _has_tensors(dict.get(content, name), depth=2)]
        if not named and not _has_tensors(content, depth=1):
            nested = itertools.islice(dict.items(content), 100)
            named = [k for k, v in nested if isinstance(k, str) and _has_tensors(v, depth=2)]
            if len(named) > 1:
                raise CheckpointError(f"{path}: holds several state dicts ({', '.join(named)[:200]}); save one alone")
        if not named:
            break
        content = dict.get(content, named[0])
    return content


def _has_tensors(value: Any, depth: int) -> bool:
    """Whether `value` is a dictionary with tensors in it, or in dictionaries in it down to `depth`."""
    if not isinstance(value, dict) or not depth:
        return False
    first = lambda count: itertools.islice(dict.values(value), count)  # time must not grow with the square of a file
    return any(isinstance(v, Tensor) for v in first(1000)) or any(_has_tensors(v, depth - 1) for v in first(20))
