"""How weights go to files: safetensors and JSON, whole or absent.

A writer fills a temporary file beside the wanted one, flushes it to the disk, and renames it: whatever kills the
process, under the final name stands the complete new file or what stood there before. Folders are written likewise.
A pickle is written only where a user names a `.ckpt`.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it, and rename it to `path`."""
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


def write_folder(path: str | Path, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Make the folder `path` from functions that each write one file (name -> function): all files or no folder."""
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


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, half: bool = False
) -> None:
    """Write tensors (of any device and memory order) and metadata to a safetensors file, atomically.

    `half`: floating-point weights are stored as fp16 (see `half_dtype`).
    """
    write_atomically(path, lambda partial: write_safetensors(partial, tensors, metadata or {}, half))


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], half: bool = False
) -> None:
    """Write a safetensors file one tensor at a time, so that mapped tensors larger than the memory can be written.

    The format: 8 bytes with the length of a JSON header (dtypes, shapes, offsets), the header, the bytes. The widest
    dtypes come first, which keeps every tensor aligned. Long writes show a progress bar.
    """
    dtypes = {k: half_dtype(k, v) if half else v.dtype for k, v in tensors.items()}
    order = sorted(tensors, key=lambda k: (-dtypes[k].itemsize, k))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        t = tensors[name]
        start, end = end, end + t.numel() * dtypes[name].itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtypes[name]], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f, _progress_bar(path, end) as bar:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            t = tensors[name].detach().to("cpu", dtypes[name]).contiguous()
            f.write(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
            bar.update(t.nbytes)


def half_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor in an fp16 file: fp16 for floating-point weights, its own for all other tensors.

    Integers, and the buffers of the noise schedule (top-level names, as `alphas_cumprod`), keep their precision.
    """
    return torch.float16 if tensor.is_floating_point() and "." in name else tensor.dtype


def save_pickle(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors alone as `{"state_dict": ...}` in PyTorch's zip format, atomically; loads with `weights_only`."""

    def with_own_storage(t: Tensor) -> Tensor:  # torch.save writes whole storages, and a mapped one is the whole file
        flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return torch.from_numpy(flat.numpy()).view(t.dtype).view(t.shape)

    def write(partial: Path) -> None:
        state = {k: with_own_storage(v) for k, v in tensors.items()}
        with open(partial, "wb") as f, _progress_bar(path, sum(t.nbytes for t in tensors.values())) as bar:
            torch.save({"state_dict": state}, CallbackIOWrapper(bar.update, f, "write"))

    write_atomically(path, write)


def save_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def _flush(path: Path) -> None:
    """Push the bytes of a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _progress_bar(path: str | Path, size: int) -> tqdm:
    """A progress bar for writing `size` bytes, shown if that takes a while."""
    name = Path(path).name.removeprefix(".").split(".")[0]
    return tqdm(total=size, desc=f"writing {name}", unit="B", unit_scale=True, disable=None if size > 5e8 else True)
