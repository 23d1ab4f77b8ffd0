"""How weights come from files and go to files: safe readers, atomic writers, run folders.

The file format is the original key names (`model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*`,
`control_model.*`), whatever container they come in. Two rules hold everywhere:

- Nothing that is read runs code. A `.ckpt` is a pickle, and a pickle is a program: it names functions and calls them.
  Our unpickler resolves a short list of names, each to a harmless function of this module, and refuses the rest.
- Files are whole or absent. Writers fill a temporary name, flush it to the disk, and rename.

Reading maps the file where it can: tensors are views of the page cache, and weights that are never touched are never
loaded.
"""

import functools
import json
import math
import mmap
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

import exchange


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it and says why, in one line."""


# ----------------------------------------------------------------------------------------------------------- reading
def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weight file or of a diffusers folder, under their original key names.

    `path`: `.safetensors`, or `.ckpt`/`.pth`/`.pt`/`.bin` in PyTorch's zip or its older format, whole models or single
    parts, in original or diffusers' names; a state dict nested under the key `state_dict` is unwrapped. Or a folder: a
    diffusers pipeline (with `model_index.json`) or one part of it. safetensors and zip files are memory-mapped, not
    copied. Raises CheckpointError (one line) for what is missing, damaged, unsafe or holds no tensors.
    """
    path = Path(path)
    if not path.is_dir():
        return exchange.to_original(_read_file(path))
    if not (path / "model_index.json").exists():
        return exchange.to_original(_read_part(path))
    if not (path / "unet").is_dir():
        raise CheckpointError(f"{path}: a diffusers folder without a unet/ in it")
    state: dict[str, Tensor] = {}
    for name in ("unet", "vae", "text_encoder", "controlnet"):
        if (path / name).is_dir():
            state |= exchange.to_original(_read_part(path / name))
    return state


def _read_part(folder: Path) -> dict[str, Tensor]:
    """The tensors of one part of a diffusers folder: one file or an index of several; full precision before fp16,
    safetensors before pickles."""
    for variant in ("", ".fp16"):
        for ending in (".safetensors", ".bin"):
            for name in ("diffusion_pytorch_model", "model", "pytorch_model"):
                file, index = folder / f"{name}{variant}{ending}", folder / f"{name}{ending}.index{variant}.json"
                if file.exists():
                    return _read_file(file)
                if index.exists():
                    shards = set(load_json(index).get("weight_map", {}).values())
                    return {k: v for shard in sorted(shards) for k, v in _read_file(folder / Path(shard).name).items()}
    kind = "is the folder of a training run" if is_run(folder) else "a folder without weights (diffusers' or a run's)"
    raise CheckpointError(f"{folder}: {kind}")


def _read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, under the names that they have there."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with open(path, "rb") as f:
        head = f.read(16)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = _read_zip(path) if head[:4] == b"PK\x03\x04" else _read_legacy(path)
    except CheckpointError:
        raise
    except Exception as e:  # damaged in one of a hundred ways: the reason matters less than the file's name
        raise CheckpointError(f"{path}: damaged, or not a weight file ({type(e).__name__}: {e})") from e
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of the UNet's in a diffusers folder; empty for files of other kinds."""
    path = Path(path)
    if path.is_dir():
        path = path / ("unet" if (path / "model_index.json").exists() else "") / "diffusion_pytorch_model.safetensors"
    if path.suffix != ".safetensors" or not path.exists():
        return {}
    with safetensors.safe_open(path, framework="pt") as f:
        return f.metadata() or {}


def load_json(path: str | Path) -> Any:
    """What a JSON file says; CheckpointError if it is not one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from e


def load_prediction(path: str | Path) -> str | None:
    """ "eps" or "v" where a diffusers folder's scheduler says which; weights alone cannot tell."""
    file = Path(path) / "scheduler" / "scheduler_config.json"
    kinds = {"epsilon": "eps", "v_prediction": "v"}
    return kinds.get(load_json(file).get("prediction_type", "epsilon")) if file.exists() else None


class _Inert:
    """What a class that we do not load becomes: an object that accepts everything and does nothing. Hashable."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any):
        pass


class _Call:
    """A function that a pickle may call but not alter (the pickle language can set attributes of what it holds)."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any):
        raise pickle.UnpicklingError("a function with a state")


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """A view of a storage; torch refuses one that would reach past its end, and we one that repeats it."""
    if math.prod(size) > storage.numel():
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return storage.as_strided(size, stride, offset)


def _numpy_scalar(dtype: np.dtype, data: bytes) -> Any:
    if dtype.hasobject:
        raise pickle.UnpicklingError("a numpy scalar of objects")
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _numpy_dtype(name: str, *_: Any) -> np.dtype:
    dtype = np.dtype(str(name))
    if dtype.hasobject:
        raise pickle.UnpicklingError("a numpy dtype of objects")
    return dtype


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return str(text).encode("latin1" if encoding in ("latin1", "latin-1") else "utf-8")


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
# Every name that a pickle may use, and the harmless thing that it gets. (`torch` names are added below.)
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): _Call(_encode),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *_: data),
    ("numpy.core.multiarray", "scalar"): _Call(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Call(_numpy_scalar),
    ("numpy", "dtype"): _Call(_numpy_dtype),
    **{("torch", name): dtype for name, dtype in (STORAGES | DTYPES).items()},
}


class _SafeUnpickler(pickle.Unpickler):
    """Resolves the names in ALLOWED and nothing else; names of pytorch_lightning become inert objects."""

    def __init__(self, file: Any, path: Path, storage: Callable[..., Tensor] | None = None):
        super().__init__(file, encoding="latin1")
        self.path, self.storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "pytorch_lightning" or module.startswith("pytorch_lightning."):
            return _Inert
        raise CheckpointError(
            f"{self.path}: refused, its pickle asks for {module}.{name}, which no weights need and which could run code"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        if self.storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise CheckpointError(f"{self.path}: refused, a persistent id that is no tensor storage")
        _, dtype, key, _, count = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(count, int) or count < 0:
            raise CheckpointError(f"{self.path}: refused, a storage of no known type")
        return self.storage(dtype, str(key), count)


def _map_file(path: Path) -> mmap.mmap:
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # private: nothing we do reaches the file


def _view(buffer: mmap.mmap, dtype: torch.dtype, offset: int, count: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if offset % dtype.itemsize:
        return torch.frombuffer(bytearray(buffer[offset : offset + count * dtype.itemsize]), dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)


def _read_zip(path: Path) -> Any:
    """PyTorch's zip format: `NAME/data.pkl`, and each storage, stored uncompressed, as `NAME/data/KEY`."""
    buffer = _map_file(path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        main = [name for name in entries if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(main) != 1:
            raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote (no data.pkl)")
        if entries[main[0]].file_size > 1 << 30:
            raise CheckpointError(f"{path}: refused, its data.pkl claims {entries[main[0]].file_size} bytes")
        prefix = main[0].removesuffix("data.pkl")
        views: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in views:
                info = entries.get(f"{prefix}data/{key}")
                if info is None or info.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: damaged, storage {key} is missing or compressed")
                name_length, extra_length = struct.unpack_from("<HH", buffer, info.header_offset + 26)
                start = info.header_offset + 30 + name_length + extra_length
                if count * dtype.itemsize > info.file_size or start + info.file_size > len(buffer):
                    raise CheckpointError(f"{path}: damaged, storage {key} is cut short")
                views[key] = _view(buffer, dtype, start, count)
            return views[key]

        with archive.open(main[0]) as f:
            return _SafeUnpickler(f, path, storage).load()


def _read_legacy(path: Path) -> Any:
    """The format before PyTorch 1.6: five pickles in a row (magic, version, system, object, storage keys), then, for
    each key, the number of elements and the elements. The storages come last: they are made first and filled then."""
    made: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in made:
            if count * dtype.itemsize > size:
                raise CheckpointError(f"{path}: damaged, storage {key} claims more bytes than the file has")
            made[key] = torch.empty(count, dtype=dtype)
        return made[key]

    size = path.stat().st_size
    with open(path, "rb") as f:
        if _SafeUnpickler(f, path).load() != 0x1950A86A20F9469CFC6C:
            raise CheckpointError(f"{path}: not a weight file that torch.save wrote")
        _SafeUnpickler(f, path).load()  # protocol version
        _SafeUnpickler(f, path).load()  # byte order and integer sizes of the writer
        content = _SafeUnpickler(f, path, storage).load()
        for key in _SafeUnpickler(f, path).load():
            tensor = made[str(key)]
            (count,) = struct.unpack("<q", f.read(8))
            data = f.read(count * tensor.element_size())
            if count != tensor.numel() or len(data) != count * tensor.element_size():
                raise CheckpointError(f"{path}: damaged, storage {key} is cut short")
            if count:
                tensor.copy_(torch.frombuffer(bytearray(data), dtype=tensor.dtype))
    return content


# ----------------------------------------------------------------------------------------------------------- writing
def _flush(path: Path) -> None:
    """Push a file's (or a folder's) bytes to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it, and rename it: `path` is whole or as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.chmod(0o644)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, half: bool = False
) -> None:
    """Write tensors (any device and memory order; with `half` real numbers as fp16) and string metadata, atomically."""
    write_atomically(path, lambda p: write_safetensors(p, tensors, metadata or {}, half))


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], half: bool = False
) -> None:
    """One tensor at a time, so that a file larger than the memory can be made of mapped ones; long writes show a bar.

    The format: 8 bytes with the length of a JSON header (types, shapes, places), the header, the bytes. The widest
    types come first, which keeps every tensor aligned.
    """
    kinds = {k: halved(k, v) if half else v.dtype for k, v in tensors.items()}
    order = sorted(tensors, key=lambda k: (-kinds[k].itemsize, k))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        t = tensors[name]
        start, end = end, end + t.numel() * kinds[name].itemsize
        header[name] = {"dtype": SAFETENSORS[kinds[name]], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f, _bar(path, end) as bar:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            t = tensors[name].detach().to("cpu", kinds[name]).contiguous()
            f.write(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
            bar.update(t.nbytes)


def halved(name: str, tensor: Tensor) -> torch.dtype:
    """The type in which a file of fp16 holds a tensor: weights are halved, the schedule's buffers (top-level names, as
    `alphas_cumprod`) and whole numbers are not."""
    return torch.float16 if tensor.is_floating_point() and "." in name else tensor.dtype


def save_pickle(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors alone, as `{"state_dict": ...}`, in PyTorch's zip format, atomically. Loads with `weights_only`."""

    def alone(t: Tensor) -> Tensor:  # torch.save writes whole storages, and a mapped tensor's is the whole file
        flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return torch.from_numpy(flat.numpy()).view(t.dtype).view(t.shape)

    def write(p: Path) -> None:
        with open(p, "wb") as f, _bar(path, sum(t.nbytes for t in tensors.values())) as bar:
            torch.save(
                {"state_dict": {k: alone(v) for k, v in tensors.items()}}, CallbackIOWrapper(bar.update, f, "write")
            )

    write_atomically(path, write)


def _bar(path: str | Path, size: int) -> tqdm:
    """A progress bar for writing `size` bytes, if that takes a while."""
    name = Path(path).name.removeprefix(".").split(".")[0]
    return tqdm(total=size, desc=f"writing {name}", unit="B", unit_scale=True, disable=None if size > 5e8 else True)


def save_json(path: str | Path, value: Any) -> None:
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


# ------------------------------------------------------------------------------------------------------- run folders
def write_folder(path: str | Path, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Make folder `path` from functions that write its files: all of them are there, or the folder is not."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, write in files.items():
            write_atomically(partial / name, write)
        if path.exists():  # the same step saved again after a resume
            shutil.rmtree(path)
        partial.replace(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def list_checkpoints(run: str | Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    return sorted(p for p in (Path(run) / "checkpoints").glob("step-*") if p.is_dir() and p.suffix != ".partial")


def is_run(path: str | Path) -> bool:
    """Is it the folder of a training run? (A diffusers folder may have a `config.json` too, of another kind.)"""
    file = Path(path) / "config.json"
    return file.is_file() and "base" in load_json(file)


def load_run(run: str | Path) -> dict[str, Any]:
    """A run's configuration, as train.py wrote it to `config.json`."""
    if not is_run(run):
        raise CheckpointError(f"{run}: not the folder of a training run (no config.json of one in it)")
    return load_json(Path(run) / "config.json")


def newest(run: str | Path) -> Path:
    """The newest whole checkpoint of a run; one that is damaged is passed over, with a line that says so."""
    for folder in reversed(list_checkpoints(run)):
        try:
            load_json(folder / "state.json")
            written = {p.name for p in folder.glob("*.safetensors")} | {"trained.safetensors", "optimizer.safetensors"}
            for name in written:
                with safetensors.safe_open(folder / name, framework="pt"):
                    pass  # opening compares the header with the file's length
            return folder
        except (CheckpointError, OSError, safetensors.SafetensorError) as e:
            print(f"{folder}: damaged ({e}); going back to the one before")
    raise CheckpointError(f"{run}: no whole checkpoint in it")


def save_training(
    run: str | Path,
    files: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: dict[str, Any],
    keep: int,
    every: int = 0,
) -> Path:
    """Write `checkpoints/step-XXXXXX` of a run, whole or not at all, then drop all but the newest `keep` (0: none) and
    those of every `every` steps (0: none).

    `files`, by name, are weights, each with `metadata`; the optimizer's state of `trained`, keyed by parameter name,
    goes to `optimizer.safetensors`; `state` (with `step`) and the scaler's to `state.json`.
    """
    names = {id(p): name for name, p in trained.items()}
    moments = {
        f"{k}:{names[id(p)]}": torch.as_tensor(v, dtype=None if isinstance(v, Tensor) else torch.float32)
        for p, entry in optimizer.state.items()
        for k, v in entry.items()
    }
    text = json.dumps(state | {"scaler": scaler.state_dict()}, indent=2) + "\n"
    folder = Path(run) / "checkpoints" / f"step-{state['step']:06d}"
    write_folder(
        folder,
        {
            **{
                f"{name}.safetensors": functools.partial(write_safetensors, tensors=weights, metadata=metadata)
                for name, weights in files.items()
            },
            "optimizer.safetensors": lambda p: write_safetensors(p, moments, {}),
            "state.json": lambda p: p.write_text(text),
        },
    )
    for old in list_checkpoints(run)[:-keep] if keep else ():
        if not every or int(old.name.removeprefix("step-")) % every:
            shutil.rmtree(old)
    return folder


def restore_training(
    folder: Path,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    adopt: Callable[[dict[str, Tensor], Tensor, torch.optim.Optimizer], dict[str, Any]],
) -> None:
    """Bring optimizer and scaler back to a checkpoint (the weights come with the model).

    `adopt(state, p, optimizer)` makes the saved state of a parameter the optimizer's own. Those that did not train then
    start afresh.
    """
    grown = load_json(folder / "state.json")["scaler"]
    if grown and scaler.is_enabled():
        scaler.load_state_dict(grown)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_state_dict(folder / "optimizer.safetensors").items():
        kind, name = key.split(":", 1)
        moments.setdefault(name, {})[kind] = value
    for name, p in trained.items():
        if name in moments:
            try:
                optimizer.state[p] = adopt(moments[name], p, optimizer)
            except KeyError as e:
                raise CheckpointError(
                    f"{folder / 'optimizer.safetensors'}: no {e} of {name}, which this version keeps; a new run can "
                    f"begin with these weights: --control {folder / 'trained.safetensors'}"
                ) from e
    fresh = len(trained.keys() - moments.keys())
    if fresh:
        print(f"{fresh} of {len(trained)} trained tensors did not train before; their optimizer state starts afresh")
