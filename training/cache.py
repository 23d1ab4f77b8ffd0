"""Latents and contexts computed once: what the frozen VAE and text encoder make of a data set, kept on disk.

In ControlNet training the VAE and the text encoder never change, so neither do their outputs for an image or a prompt.
`build_cache` computes the outputs for a whole data set and keeps them under `data/.cache`; the loop then needs neither
model. A row is found by a key of everything that it depends on (the encoder's weights, the image's bytes, the size; the
prompt): a changed input is encoded again, never silently reused, and runs share the rows that they have in common. The
cache holds the moments of the VAE's posterior, not a sample: the posterior is sampled anew at every training step.

    data/.cache/latents-WEIGHTS/512x512.{bin,keys,lock}      WEIGHTS: the fingerprint of the encoder's weights
    data/.cache/contexts-WEIGHTS/prompts.{bin,keys,lock}
"""

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import ArrayDataset, DataError, FolderDataset, digest, to_tensor
from ldm import ControlLDM

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everything but Windows
    msvcrt = None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path` among processes, waiting until it is free; a system without file locks has none to hold."""
    with open(path, "a") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file releases the lock
        while msvcrt and not fcntl:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                break
            except OSError as e:
                if e.errno != errno.EDEADLK:  # the code for "not within ten seconds"
                    raise
        try:
            yield
        finally:
            if msvcrt and not fcntl:
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


class RowCache:
    """Rows of equal shape on disk, found by key.

    Two files that only grow: `NAME.bin` holds the rows; `NAME.keys` the 16-byte key of each row, written after the row.
    Whatever an interruption left half-written is cut off at the next start. Writers hold a lock, so that several runs
    can share a cache.
    """

    def __init__(self, folder: str | Path, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
        self.folder, self.shape, self.dtype = Path(folder), tuple(shape), dtype
        self.row_bytes = int(np.prod(shape)) * dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows_file, self.keys_file = self.folder / f"{name}.bin", self.folder / f"{name}.keys"
        self.lock_file = self.folder / f"{name}.lock"
        self._map: np.memmap | None = None
        self.index: dict[bytes, int] = {}
        self._read_index()

    def _read_index(self) -> None:
        keys = self.keys_file.read_bytes() if self.keys_file.exists() else b""
        stored = self.rows_file.stat().st_size // self.row_bytes if self.rows_file.exists() else 0
        count = min(len(keys) // 16, stored)
        self.index = {keys[16 * i : 16 * i + 16]: i for i in range(count)}
        self._count, self._map = count, None

    def fill(self, keys: Sequence[bytes], compute: Callable[[list[int]], Tensor], batch_size: int, name: str) -> None:
        """Compute and store the rows of those `keys` that are missing, `batch_size` at a time.

        `compute(positions)` returns the rows (len(positions), *shape) for these positions in `keys`. `name` is for the
        progress bar and for messages. Raises DataError if the disk has too little room.
        """
        if all(key in self.index for key in keys):
            return
        with locked(self.lock_file):
            self._read_index()  # another run may have filled some rows meanwhile
            missing = list({key: i for i, key in enumerate(keys) if key not in self.index}.values())
            need, free = len(missing) * self.row_bytes, shutil.disk_usage(self.folder).free
            if need > free:
                raise DataError(
                    f"{self.folder}: the cache of {name} needs {need / 2**30:.1f} GiB, the disk has "
                    f"{free / 2**30:.1f}; point --cache-dir elsewhere, or train with --no-cache"
                )
            with (
                open(self.rows_file, "ab") as rows_file,
                open(self.keys_file, "ab") as keys_file,
                tqdm(total=len(missing), desc=f"caching {name}", unit="row", disable=None) as bar,
            ):
                rows_file.truncate(self._count * self.row_bytes)
                keys_file.truncate(self._count * 16)
                for start in range(0, len(missing), batch_size):
                    positions = missing[start : start + batch_size]
                    rows = compute(positions).to("cpu", self.dtype).contiguous()
                    assert rows.shape == (len(positions), *self.shape), (rows.shape, self.shape)
                    rows_file.write(rows.view(torch.uint8).numpy().tobytes())
                    rows_file.flush()
                    keys_file.write(b"".join(keys[i] for i in positions))
                    keys_file.flush()
                    bar.update(len(positions))
            self._read_index()

    def __getitem__(self, key: bytes) -> Tensor:
        if self._map is None:
            self._map = np.memmap(self.rows_file, np.uint8, "r", shape=(self._count, self.row_bytes))
        return torch.from_numpy(np.array(self._map[self.index[key]])).view(self.dtype).view(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}  # a worker process maps the file itself instead of getting a copy of it


VAE_ENCODER = ("encoder.", "quant_conv.")  # key prefixes of the VAE's weights that latents depend on


@dataclass(frozen=True)
class CachedEncodings:
    """The cached moments and contexts of one data set; `i` counts its items."""

    latents: RowCache
    keys: list[bytes]  # of the items' targets
    contexts: RowCache

    def moments(self, i: int) -> Tensor:
        """Mean and log-variance of target i's latents: (2z,h,w), unscaled."""
        return self.latents[self.keys[i]]

    def context(self, i: int, prompt: str) -> Tensor:
        """Context (77,D) of `prompt`, which is item i's or empty. DataError if item i had another prompt before."""
        key = digest(prompt)
        if key not in self.contexts.index:
            raise DataError(f"item {i} of the data set has another prompt each time: use --no-cache (cache=False)")
        return self.contexts[key]


def fingerprint(module: nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """A name of 16 hex digits for the weights of `module` whose keys start with one of `prefixes`.

    The name depends on the values, shapes and dtypes of these weights and on the module's configuration.
    """
    digests = []
    for name, p in module.state_dict().items():
        if name.startswith(prefixes):
            flat = p.detach().cpu().contiguous().reshape(-1)
            digests.append(digest(flat.view(torch.uint8).numpy().tobytes(), str(p.dtype), tuple(p.shape)))
    return digest(*digests, repr(module.config)).hex()[:16]


def build_cache(
    model: ControlLDM, dataset: FolderDataset | ArrayDataset, cache_dir: str | Path, batch_size: int
) -> CachedEncodings:
    """Encode all targets (`batch_size` at a time) and prompts of `dataset` that are not yet cached under `cache_dir`.

    Raises DataError if the data set gives other items each time or the disk has too little room.
    """
    cache_dir, vae, text = Path(cache_dir), model.vae, model.text
    dtype, (width, height) = vae.quant_conv.weight.dtype, dataset.size
    reading = tqdm(range(len(dataset)), desc="reading targets", unit="image", disable=None, leave=False)
    keys = [dataset.key(i) for i in reading]
    prompts = [dataset.prompt(i) for i in range(len(dataset))]
    if any((dataset.key(i), dataset.prompt(i)) != (keys[i], prompts[i]) for i in range(min(8, len(keys)))):
        raise DataError("the data set gives another item each time it is asked for one: use --no-cache (cache=False)")

    def encode_targets(positions: list[int]) -> Tensor:
        images = torch.stack([to_tensor(dataset.target(i)) for i in positions])
        return vae.moments(images.to(vae.quant_conv.weight.device, dtype))

    shape = (2 * model.config.vae.z_channels, height // vae.factor, width // vae.factor)
    latents = RowCache(cache_dir / f"latents-{fingerprint(vae, VAE_ENCODER)}", f"{width}x{height}", shape, dtype)
    latents.fill(keys, encode_targets, batch_size, "latents")
    unique = list(dict.fromkeys(["", *prompts]))  # the empty prompt takes the place of dropped ones
    contexts = RowCache(cache_dir / f"contexts-{fingerprint(text)}", "prompts", (77, model.config.text.width), dtype)
    encode_prompts = lambda positions: model.encode_prompts([unique[i] for i in positions])
    contexts.fill([digest(prompt) for prompt in unique], encode_prompts, 64, "prompts")
    return CachedEncodings(latents, keys, contexts)


def release_encoders(model: ControlLDM) -> None:
    """Free the memory of text encoder and VAE encoder once everything is cached; they cannot be used afterwards.

    The VAE's decoder moves to the CPU, where it waits for the next image log.
    """
    for module in (model.text, model.vae.encoder, model.vae.quant_conv):
        module.to("meta")
    for module in model.vae.decoding:
        module.cpu()


@torch.no_grad()
def prepare_batch(model: ControlLDM, batch: dict[str, Any], device: str, encode_batch_size: int) -> dict[str, Tensor]:
    """Turn a batch of samples (`data.Samples`) into the batch that the loss takes, on `device`.

    latents (B,4,h,w), scaled, sampled from the posterior with the batch's posterior_noise; context (B,77,D); hint
    (B,C,H,W); timesteps (B,); noise (B,4,h,w); and every further tensor of the batch. Moments and contexts come from
    the batch if it has them; otherwise targets (`encode_batch_size` at a time) and prompts are encoded here.
    """
    tensors = {
        name: value.to(device, torch.float32 if value.dtype == torch.float64 else value.dtype, non_blocking=True)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    if "moments" in tensors:
        moments = tensors.pop("moments")
    else:
        images = tensors.pop("target").to(model.vae.quant_conv.weight.dtype)
        moments = torch.cat([model.vae.moments(few) for few in images.split(encode_batch_size)])
    if "context" not in tensors:
        tensors["context"] = model.encode_prompts(batch["prompt"])
    tensors["latents"] = model.sample_latents(moments.float(), tensors.pop("posterior_noise"))
    return tensors
