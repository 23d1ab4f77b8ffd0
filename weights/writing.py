"""How weights go to files: safetensors and JSON, whole or absent.

A writer fills a temporary file beside the wanted one, flushes it to the disk, and renames it: whatever kills the
process, under the final name stands the complete new file or what stood there before. Folders are written likewise.
A pickle is written only where a user names a `.ckpt`.
"""

import contextlib
import json
import os
import shutil
import struct
import zlib
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


CHECKSUMS_FILE = "checksums.json"  # in a folder: file -> its size and CRC-32
Checksum = dict[str, int | str]


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> Any:
    """Let `write` fill a temporary file beside `path`, flush it, and rename it to `path`. Returns what `write` did."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        result = write(partial)
        partial.chmod(0o644)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return result


def write_folder(path: str | Path, files: Mapping[str, Callable[[Path], Any]], checksums: bool = True) -> None:
    """Make the folder `path` from functions that each write one file (name -> function): all files or no folder.

    A folder that is there already is replaced. `checksums`: size and CRC-32 of every file go to `checksums.json`; a
    function that returns the checksum of what it wrote, as `write_safetensors` does, saves reading the file again.
    """
    path = Path(path)
    partial, replaced = path.with_name(path.name + ".partial"), path.with_name(path.name + ".replaced")
    if replaced.exists() and not path.exists():  # a kill came between the two renames below
        replaced.rename(path)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    sums: dict[str, Checksum] = {}
    try:
        for name, write in files.items():
            result = write_atomically(partial / name, write)
            if checksums:
                sums[name] = result if isinstance(result, dict) else checksum(partial / name)
        if checksums:
            save_json(partial / CHECKSUMS_FILE, sums)
        if path.exists():  # the same step saved again after a resume
            path.rename(replaced)
        partial.rename(path)
        _flush(path.parent)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


class ChecksumWriter:
    """A new binary file that keeps the CRC-32 of what is written to it.

    CRC-32 notices every damage of up to 32 neighbouring bits, and of the rest all but one in 4 billion. On two CPU
    cores it adds 0.5 s to the writing of a GB (SHA-256: 0.6 to 3 s). It is no protection against forgery.
    """

    def __init__(self, path: str | Path):
        self.file = open(path, "wb")  # noqa: SIM115 (closed on exit)
        self.bytes = self.crc = 0

    def __enter__(self) -> "ChecksumWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.bytes += len(data)

    def checksum(self) -> Checksum:
        return {"bytes": self.bytes, "crc32": f"{self.crc:08x}"}


def checksum(path: str | Path) -> Checksum:
    """The size and the CRC-32 of a file, as `checksums.json` has them. Reads in pieces of 8 MiB."""
    size = crc = 0
    with open(path, "rb") as f:
        while piece := f.read(8 << 20):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def save_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors (of any device and memory order) and metadata to a safetensors file, atomically.

    `dtype`: the precision of floating-point weights in the file (see `stored_dtype`); None: their own.
    """
    write_atomically(path, lambda partial: write_safetensors(partial, tensors, metadata or {}, dtype))


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> Checksum:
    """Write a safetensors file one tensor at a time, so that mapped tensors larger than the memory can be written.

    The format: 8 bytes with the length of a JSON header (dtypes, shapes, offsets), the header, the bytes. The widest
    dtypes come first, which keeps every tensor aligned. Long writes show a progress bar. Returns the file's checksum.
    """
    dtypes = {k: stored_dtype(k, v, dtype) for k, v in tensors.items()}
    order = sorted(tensors, key=lambda k: (-dtypes[k].itemsize, k))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        t = tensors[name]
        start, end = end, end + t.numel() * dtypes[name].itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtypes[name]], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with ChecksumWriter(path) as f, _progress_bar(path, end) as bar:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            t = tensors[name].detach().to("cpu", dtypes[name]).contiguous()
            f.write(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
            bar.update(t.nbytes)
    return f.checksum()


def stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor has in a file of precision `dtype`: `dtype` for floating-point weights, else its own.

    Integers, and the buffers of the noise schedule (top-level names, as `alphas_cumprod`), keep their precision.
    """
    return dtype if dtype and tensor.is_floating_point() and "." in name else tensor.dtype


def save_pickle(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors alone as `{"state_dict": ...}` in PyTorch's zip format, atomically; loads with `weights_only`."""

    def with_own_storage(t: Tensor) -> Tensor:  # torch.save writes whole storages, and a mapped one is the whole file
        flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return torch.from_numpy(flat.numpy()).view(t.dtype).view(t.shape)

    def write(partial: Path) -> None:
        state = {k: with_own_storage(v) for k, v in tensors.items()}
        with open(partial, "wb") as f, _progress_bar(path, sum(t.nbytes for t in tensors.values())) as bar:
            try:
                torch.save({"state_dict": state}, CallbackIOWrapper(bar.update, f, "write"))
            except RuntimeError as e:  # torch's writer hides that the disk is full
                raise e.__context__ if isinstance(e.__context__, OSError) else e  # noqa: B904

    write_atomically(path, write)


def save_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def _flush(path: Path) -> None:
    """Push the bytes of a file to the disk; of a folder, the names in it, where the system can (Windows cannot)."""
    is_folder = path.is_dir()
    with contextlib.suppress(*[OSError] if is_folder else []):
        fd = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes only what is open for writing
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _progress_bar(path: str | Path, size: int) -> tqdm:
    """A progress bar for writing `size` bytes, shown if that takes a while."""
    name = Path(path).name.removeprefix(".").split(".")[0]
    return tqdm(total=size, desc=f"writing {name}", unit="B", unit_scale=True, disable=None if size > 5e8 else True)
