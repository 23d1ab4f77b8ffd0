"""How weights come out of files: every container, one spelling, and nothing that a file holds is executed.

`load_state_dict` returns the tensors of a weight file or of a diffusers folder under the original key names
(`model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*`, `control_model.*`). A file is safetensors (a
JSON header and bytes, safe by nature) or PyTorch's: a `.ckpt`, `.pth` or `.bin` is a pickle, and a pickle is a program
that names functions and calls them. Two guards stand before such a program:

    names     `_inspect_pickle` reads the program without executing it. Every name in it must be one that weights need
              or that we replace by an inert object; any other name is refused, and the message says which.
    loader    `torch.load(weights_only=True)` executes what is left, with an unpickler that knows those names alone.

Afterwards each tensor must lie inside its storage. Zip files (PyTorch 1.6 and later) and safetensors are memory-mapped:
tensors are views of the page cache, and weights that are never touched are never loaded.
"""

import json
import mmap
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from weights.spelling import to_original


class CheckpointError(ValueError):
    """A file that cannot be used; the message names the file and says why, in one line."""


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weight file or of a diffusers folder, under their original key names.

    `path`: `.safetensors`, or `.ckpt`/`.pth`/`.pt`/`.bin` in PyTorch's zip or its older format, whole models or single
    components, in original or diffusers' names; a state dict nested under the key `state_dict` is unwrapped. Or a
    folder: a diffusers pipeline (with `model_index.json`) or one component of a pipeline. safetensors and zip files
    are memory-mapped, not copied. Raises CheckpointError (one line) for a path that is missing, damaged or unsafe, or
    that holds no tensors.
    """
    path = Path(path)
    if not path.is_dir():
        return to_original(_read_file(path))
    if not (path / "model_index.json").exists():
        return to_original(_read_component_folder(path))
    if not (path / "unet").is_dir():
        raise CheckpointError(f"{path}: a diffusers folder without a unet/ in it")
    state: dict[str, Tensor] = {}
    for name in ("unet", "vae", "text_encoder", "controlnet"):
        if (path / name).is_dir():
            state |= to_original(_read_component_folder(path / name))
    return state


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file (of a diffusers folder: of its UNet's file); empty for other kinds of file."""
    path = Path(path)
    if path.is_dir():
        path = path / ("unet" if (path / "model_index.json").exists() else "") / "diffusion_pytorch_model.safetensors"
    if path.suffix != ".safetensors" or not path.exists():
        return {}
    with safetensors.safe_open(path, framework="pt") as f:
        return f.metadata() or {}


def load_json(path: str | Path) -> Any:
    """The content of a JSON file; CheckpointError if the file is not readable as JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from e


def load_prediction(path: str | Path) -> str | None:
    """ "eps" or "v" if `path` is a diffusers folder whose scheduler says so, else None: weights alone cannot tell."""
    file = Path(path) / "scheduler" / "scheduler_config.json"
    names = {"epsilon": "eps", "v_prediction": "v"}
    return names.get(load_json(file).get("prediction_type", "epsilon")) if file.exists() else None


def is_run(path: str | Path) -> bool:
    """Whether `path` is the folder of a training run. (A diffusers folder has a `config.json` too, of another kind.)"""
    file = Path(path) / "config.json"
    return file.is_file() and "base" in load_json(file)


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
                    shards = set(load_json(index).get("weight_map", {}).values())
                    return {k: v for shard in sorted(shards) for k, v in _read_file(folder / Path(shard).name).items()}
    if is_run(folder):
        raise CheckpointError(f"{folder}: the folder of a training run; its weights are in {folder}/checkpoints")
    raise CheckpointError(f"{folder}: a folder without weights, neither of a diffusers component nor of a training run")


ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first of the pickles in a file before PyTorch 1.6


def _read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, under the names that the file gives them."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with open(path, "rb") as f:
            head = f.read(len(LEGACY_MAGIC))
        if head.startswith(ZIP_MAGIC):
            tensors = _read_zip(path)
        elif head == LEGACY_MAGIC:
            tensors = _read_legacy(path)
        else:
            raise ValueError("torch.save wrote neither of its formats here")
    except CheckpointError:
        raise
    except Exception as e:  # damaged in one of a hundred ways: the reason matters less than the file's name
        raise CheckpointError(f"{path}: damaged, or not a weight file ({type(e).__name__}: {_one_line(e)})") from e
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors


def _one_line(error: Exception) -> str:
    """The message of an error, without torch's advice around it (which is to read the file unsafely)."""
    text = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation of torch.load")[0]
    return " ".join(text.split())[:200]


def _read_zip(path: Path) -> dict[str, Tensor]:
    """PyTorch's zip format: the pickle `NAME/data.pkl`, and each storage, uncompressed, as `NAME/data/KEY`."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        pickles = [r for r in records if r.filename.endswith("data.pkl") and r.filename.count("/") <= 1]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: a zip file, but torch.save did not write it (no data.pkl)")
        if pickles[0].file_size > MAX_PICKLE:
            raise CheckpointError(f"{path}: refused, its data.pkl claims {pickles[0].file_size} bytes")
        if any(r.compress_type != zipfile.ZIP_STORED for r in records):
            raise CheckpointError(
                f"{path}: refused, a zip file with compressed contents, which torch.save never writes"
            )
        with archive.open(pickles[0]) as f:
            stand_ins = _inspect_pickle(path, f)
    try:
        tensors = _torch_load(path, path, stand_ins, mmap=True)
    except RuntimeError as e:  # of torch's reader, or of a tensor that does not fit into the mapped part of the file
        raise CheckpointError(f"{path}: damaged, a storage is missing or cut short ({_one_line(e)})") from e
    sizes = {0, *(r.file_size for r in records)}  # torch also maps bytes beyond a record's end, if the pickle asks
    if any(tensor.untyped_storage().nbytes() not in sizes for tensor in tensors.values()):
        raise CheckpointError(f"{path}: damaged, a storage is cut short")
    return {
        k: v.clone() if v.data_ptr() % v.itemsize else v for k, v in tensors.items()
    }  # other zip writers: unaligned


def _read_legacy(path: Path) -> dict[str, Tensor]:
    """The format before PyTorch 1.6: five pickles (magic number, version, system, content, storage keys), storages.

    torch reads from a map of the file, which has no file number, and so does not try its still older tar format.
    """
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        stand_ins = [pair for _ in range(5) for pair in _inspect_pickle(path, mapped)]
        mapped.seek(0)
        return _torch_load(path, mapped, stand_ins)


def _torch_load(path: Path, file: Any, stand_ins: list[tuple[type, str]], **options: Any) -> dict[str, Tensor]:
    """The tensors of the state dict that torch.load finds in `file`, without gradients, hooks or repetition."""
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
        content = torch.load(file, map_location="cpu", weights_only=True, **options)
    for _ in range(8):  # a dictionary may hold itself; dict.get, since a pickle can hide the method of an OrderedDict
        if not isinstance(content, dict) or not isinstance(dict.get(content, "state_dict"), dict):
            break
        content = dict.get(content, "state_dict")
    items = dict.items(content) if isinstance(content, dict) else ()
    tensors = {k: v.detach() for k, v in items if isinstance(v, Tensor) and isinstance(k, str)}
    for tensor in tensors.values():
        if min(tensor.shape, default=0) < 0:
            raise CheckpointError(f"{path}: refused, a tensor of negative size")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # strides of 0: ten bytes would become terabytes
            raise CheckpointError(f"{path}: refused, a tensor larger than its storage")
    return tensors


# ----------------------------------------------------------------------------------------------------------- pickles
class _Inert:
    """Takes the place of a class or function that we do not load: accepts all arguments, does and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any):
        pass


DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NEEDED_NAMES = {  # what weights consist of; torch.load knows all of these, and more that we refuse
    "collections.OrderedDict", "builtins.set", "__builtin__.set", "_codecs.encode", "torch.Size", "torch.device",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in DTYPES), *(f"torch.{name}Storage" for name in STORAGES),
}  # fmt: skip
INERT_NAMES = {  # what trainers leave beside the weights
    "argparse.Namespace", "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
}  # fmt: skip
INERT_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.")
MAX_PICKLE = 8 << 20  # bytes; the pickle in Stable Diffusion's largest file has 400 thousand
MAX_TUPLE = 1000  # values in a tuple with all tuples inside it: hashing shared tuples would take exponential time


def _inspect_pickle(path: Path, file: Any) -> list[tuple[type, str]]:
    """Stand-ins for those names in a pickle that torch.load does not know, found without executing the pickle.

    Leaves `file` after the pickle. Raises CheckpointError for a name that weights do not need, for a call of something
    without a name, and for what would take memory or time out of proportion to the file.
    """
    names: set[str] = set()
    stack: list[int | str] = []  # a name for a function or class, "name()" for a result, otherwise the size of a tuple
    memo: dict[int, int | str] = {}
    marks: list[int] = []
    start = file.tell()
    for opcode, argument, position in pickletools.genops(file):
        if position - start > MAX_PICKLE:
            raise CheckpointError(f"{path}: refused, a pickle of more than {MAX_PICKLE} bytes")
        if opcode.proto > 3:
            raise CheckpointError(
                f"{path}: refused, a pickle of protocol {opcode.proto}; torch.save's default, protocol 2, can be read"
            )
        if opcode.name == "MARK":
            marks.append(len(stack))
            continue
        if "PUT" in opcode.name:
            memo[argument] = stack[-1]
            continue
        to_mark = pickletools.markobject in opcode.stack_before  # takes all values since the last MARK as well
        first = (marks.pop() + 2 if to_mark else len(stack)) - len(opcode.stack_before)
        values, stack[first:] = stack[first:], []
        result: int | str = 1
        if "GET" in opcode.name:
            result = memo[argument]
        elif opcode.name == "GLOBAL":
            result = argument.replace(" ", ".")
            names.add(result)
        elif opcode.name in ("REDUCE", "NEWOBJ"):
            if values[0] not in names:
                raise CheckpointError(f"{path}: refused, its pickle calls something that has no name")
            result = f"{values[0]}()"
        elif opcode.name == "BUILD" and str(values[0]).startswith("torch"):
            raise CheckpointError(f"{path}: refused, its pickle sets the state of a tensor")
        elif "TUPLE" in opcode.name:
            result = 1 + sum(v if isinstance(v, int) else 1 for v in values)
            if result > MAX_TUPLE:
                raise CheckpointError(f"{path}: refused, its pickle holds a tuple of more than {MAX_TUPLE} values")
        stack += [result] * len(opcode.stack_after)
    inert = {name for name in names if name in INERT_NAMES or name.startswith(INERT_PACKAGES)}
    if unknown := sorted(names - NEEDED_NAMES - inert):
        raise CheckpointError(
            f"{path}: refused, its pickle asks for {unknown[0][:100]}, which no weights need and which could run code"
        )
    return [(_Inert, name) for name in inert]
