"""Latents and contexts computed once: what the frozen VAE and text encoder make of a data set, kept on disk.

In ControlNet training the VAE and the text encoder never change, so neither do their outputs for an image or a prompt.
`build_cache` computes the outputs for a whole data set and keeps them under `data/.cache`; the loop then needs neither
model. A row is found by a key of everything that it depends on (the encoder's weights, the image's bytes, the size; the
prompt): a changed input is encoded again, never silently reused, and runs share the rows that they have in common. The
cache holds the moments of the VAE's posterior, not a sample: the posterior is sampled anew at every training step.

    data/.cache/latents-WEIGHTS/512x512.{bin,keys,sums,lock}      WEIGHTS: the fingerprint of the encoder's weights;
                                                                  a file for each size (`training/buckets.py`)
    data/.cache/contexts-WEIGHTS/prompts.{bin,keys,sums,lock}

A convolution over another number of images may take another path, and the last bits of its result differ. So images
are always encoded `--encode-batch-size` at a time, the last batch filled up, and the file's name says the number
(512x512-4; 8, with which caches were made before names said it, goes without).
"""

import functools
import itertools
import operator
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import ArrayDataset, DataError, FolderDataset, digest, to_tensor
from ldm import ControlLDM, ModelConfig
from precision import NotFiniteError
from training.images import Size
from training.loading import load
from training.locks import locked
from training.verify import MANY, Memory


class RowCache:
    """Rows of equal shape on disk, found by key.

    Three files that only grow: `NAME.bin` holds the rows, `NAME.sums` a checksum of each with its key, and `NAME.keys`
    the 16-byte keys. A key is written last; whatever an interruption left before that is cut off at the next start.
    Rows without a checksum, of a cache from before there were any, are trusted once and get one. `fill` checks all rows
    that it is asked for and computes damaged ones anew; reading checks a row again, which takes 0.03 ms for the latents
    of an image of 512x512. Rows are read and not mapped, so a file that shrinks is an error and no crash. Writers hold
    a lock, so that several runs can share a cache.
    """

    def __init__(self, folder: str | Path, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
        self.folder, self.name, self.shape, self.dtype = Path(folder), name, tuple(shape), dtype
        self.row_bytes = int(np.prod(shape)) * dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows_file, self.keys_file = self.folder / f"{name}.bin", self.folder / f"{name}.keys"
        self.sums_file, self.lock_file = self.folder / f"{name}.sums", self.folder / f"{name}.lock"
        self._read_index()

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process opens the files itself instead of getting a copy
        return RowCache, (self.folder, self.name, self.shape, self.dtype)

    def _read_index(self) -> None:
        for file in (self.keys_file, self.sums_file, self.rows_file):
            if file.exists() and not file.is_file():
                raise DataError(f"{file}: no regular file; remove it, or point --cache-dir elsewhere")
        keys, sums = (file.read_bytes() if file.exists() else b"" for file in (self.keys_file, self.sums_file))
        stored = self.rows_file.stat().st_size // self.row_bytes if self.rows_file.exists() else 0
        self._count = min(len(keys) // 16, stored)
        self.index = {keys[16 * i : 16 * i + 16]: i for i in range(self._count)}
        self._sums = [sums[i : i + 4] for i in range(0, 4 * min(len(sums) // 4, self._count), 4)]
        self._open_file: BinaryIO | None = None

    def fill(
        self,
        keys: Sequence[bytes],
        compute: Callable[[Any], Tensor],
        batch_size: int,
        name: str,
        read: Callable[[list[list[int]]], Iterable[Any]] = iter,
    ) -> None:
        """Compute and store the rows of those `keys` that are missing or damaged, `batch_size` at a time.

        `compute(positions)` returns the rows (len(positions), *shape) for these positions in `keys`. With `read`, which
        iterates over what it reads for each batch of positions, `compute` gets that instead. `name` is for the progress
        bar and for messages. Raises DataError if the disk has too little room.
        """
        wanted = self._not_intact({key: i for i, key in enumerate(keys)}, name)
        if not wanted and len(self._sums) == self._count:
            return
        with locked(self.lock_file):
            self._read_index()  # another run may have filled some rows meanwhile
            wanted = self._not_intact(wanted, name)
            new = sum(key not in self.index for key in wanted)
            check_room(self.folder, new * self.row_bytes, name)
            if new < len(wanted):
                print(f"{self.rows_file}: {len(wanted) - new} rows are damaged (another checksum) and computed anew")
            try:
                self._compute(wanted, compute, batch_size, name, read)
            finally:
                self._read_index()

    def _not_intact(self, wanted: dict[bytes, int], name: str) -> dict[bytes, int]:
        """Those of `wanted` (key -> position) whose rows are missing or damaged."""
        bar = tqdm(wanted.items(), desc=f"checking {name}", unit="row", disable=None, delay=2, leave=False)
        return {key: i for key, i in bar if key not in self.index or not self._is_intact(key)}

    def _is_intact(self, key: bytes) -> bool:
        try:
            self._read(key)
            return True
        except DataError:
            return False

    def _compute(self, wanted: dict[bytes, int], compute: Callable, batch_size: int, name: str, read: Callable) -> None:
        """Compute rows and write each to the place of its key, or to the end; give a checksum to rows without one."""
        order, count = list(wanted), self._count
        with (
            _open_to_change(self.rows_file) as rows_file,
            _open_to_change(self.sums_file) as sums_file,
            _open_to_change(self.keys_file) as keys_file,
            tqdm(total=len(order), desc=f"caching {name}", unit="row", disable=None if order else True) as bar,
        ):
            for file, size in ((rows_file, self.row_bytes), (sums_file, 4), (keys_file, 16)):
                file.truncate(min(count * size, os.fstat(file.fileno()).st_size))
            for number in range(len(self._sums), count):
                keys_file.seek(16 * number)
                _write_row(sums_file, number, checksum(keys_file.read(16), self._read_row(number)))
            batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            inputs = read([[wanted[key] for key in keys] for keys in batches])
            for keys, some in zip(batches, inputs, strict=True):
                new = []
                rows = compute(some).to("cpu", self.dtype).contiguous()
                assert rows.shape == (len(keys), *self.shape), (rows.shape, self.shape)
                for key, row in zip(keys, rows.view(torch.uint8).numpy(), strict=True):
                    number = self.index.get(key, count + len(new))
                    _write_row(rows_file, number, row.tobytes())
                    _write_row(sums_file, number, checksum(key, row.tobytes()))
                    new += [] if key in self.index else [key]
                rows_file.flush()
                sums_file.flush()
                keys_file.seek(16 * count)
                keys_file.write(b"".join(new))
                keys_file.flush()
                count += len(new)
                bar.update(len(keys))

    def __getitem__(self, key: bytes) -> Tensor:
        """The row of `key`. DataError if it is damaged or gone."""
        return torch.frombuffer(self._read(key), dtype=self.dtype).view(self.shape)

    def _read(self, key: bytes) -> bytearray:
        number = self.index[key]
        content = self._read_row(number)
        if number < len(self._sums) and self._sums[number] != checksum(key, content):
            raise DataError(f"{self.rows_file}: row {number} is damaged (another checksum); {START_AGAIN}")
        return content

    def _read_row(self, number: int) -> bytearray:
        try:
            if self._open_file is None:
                self._open_file = open(self.rows_file, "rb", buffering=0)  # noqa: SIM115 (open as long as the cache)
            if hasattr(os, "pread"):  # forked processes share the position in the file
                content = os.pread(self._open_file.fileno(), self.row_bytes, number * self.row_bytes)
            else:
                self._open_file.seek(number * self.row_bytes)
                content = self._open_file.read(self.row_bytes)
        except OSError as e:
            raise DataError(f"{self.rows_file}: row {number} cannot be read ({e.strerror}); {START_AGAIN}") from e
        if len(content) < self.row_bytes:
            raise DataError(f"{self.rows_file}: row {number} is gone, the file was cut under the run; {START_AGAIN}")
        return bytearray(content)


def check_room(folder: Path, need: int, name: str) -> None:
    """DataError unless the disk of `folder` has room for `need` bytes more."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder}: the cache of {name} needs {need / 2**30:.1f} GiB, the disk has {free / 2**30:.1f}; point "
            "--cache-dir elsewhere, or train with --no-cache"
        )


START_AGAIN = "the next start (--resume RUN) computes it anew"


def checksum(key: bytes, row: bytes) -> bytes:
    """The checksum of a row and its key, 4 bytes: CRC-32."""
    return zlib.crc32(row, zlib.crc32(key)).to_bytes(4, "little")


def _open_to_change(path: Path) -> BinaryIO:
    """The file, made if it is missing, to be read and written anywhere."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b")


def _write_row(file: BinaryIO, number: int, content: bytes) -> None:
    """Write the row of this number of a file of rows that are as long as `content`."""
    file.seek(number * len(content))
    file.write(content)


PROMPTS_AT_ONCE = 64  # that the text encoders encode
VAE_ENCODER = ("encoder.", "quant_conv.")  # key prefixes of the VAE's weights that latents depend on


@dataclass(frozen=True)
class CachedEncodings:
    """The cached moments and contexts of one data set; `i` counts its items."""

    latents: dict[Size, RowCache]  # by the size of the images
    keys: list[bytes]  # of the items' targets, all variants of an item after each other
    contexts: RowCache
    sizes: list[Size]  # of the items' images
    variants: int = 1

    def moments(self, i: int, variant: int = 0) -> Tensor:
        """Mean and log-variance of target i's latents: (2z,h,w), unscaled."""
        return self.latents[self.sizes[i]][self.keys[i * self.variants + variant]]

    def context(self, i: int, prompt: str) -> Tensor:
        """Context (77,D) of `prompt`, which is item i's or empty; of SDXL (77*D+P,), with the pooled vector at the end.
        DataError if item i had another prompt before."""
        key = digest(prompt)
        if key not in self.contexts.index:
            raise DataError(f"item {i} of the data set has another prompt each time: use --no-cache (cache=False)")
        return self.contexts[key]


def fingerprint(
    module: nn.Module, prefixes: tuple[str, ...] = ("",), weights: Mapping[str, Tensor] | None = None
) -> str:
    """A name of 16 hex digits for the weights of `module` whose keys start with one of `prefixes`.

    The name depends on the values, shapes and dtypes of these weights and on the module's configuration. `weights`:
    those of the module before they were rounded, whose name as float32 is wanted.
    """
    digests = []
    for name, p in module.state_dict().items():
        if name.startswith(prefixes):
            p = p if weights is None else weights.get(name, p).float()
            flat = p.detach().cpu().contiguous().reshape(-1)
            digests.append(digest(flat.view(torch.uint8).numpy().tobytes(), str(p.dtype), tuple(p.shape)))
    return digest(*digests, repr(module.config)).hex()[:16]


def build_cache(
    model: ControlLDM, dataset: FolderDataset | ArrayDataset, cache_dir: str | Path, batch_size: int, workers: int = 0
) -> CachedEncodings:
    """Encode all targets (`batch_size` at a time) and prompts of `dataset` that are not yet cached under `cache_dir`.
    `workers` processes read the targets ahead.

    Raises DataError if the data set gives other items each time or the disk has too little room.
    """
    cache_dir, text, variants = Path(cache_dir), model.text, dataset.variants
    keys = target_keys(dataset, cache_dir)
    prompts = [dataset.prompt(i) for i in range(len(dataset))]
    first = keys[: 8 * variants : variants]
    if any((dataset.key(i), dataset.prompt(i)) != (key, prompts[i]) for i, key in enumerate(first)):
        raise DataError("the data set gives another item each time it is asked for one: use --no-cache (cache=False)")
    unique = list(dict.fromkeys(["", *prompts]))  # the empty prompt takes the place of dropped ones

    def encode_prompts(positions: list[int]) -> Tensor:
        context, pooled = model.encode_text([unique[i] for i in positions])
        return context if pooled is None else torch.cat([context.flatten(1), pooled], dim=1)

    dtype = next(text.parameters()).dtype
    contexts = RowCache(cache_dir / f"contexts-{fingerprint(text)}", "prompts", text_shape(model.config), dtype)
    contexts.fill([digest(prompt) for prompt in unique], encode_prompts, PROMPTS_AT_ONCE, "prompts")
    text.cpu()  # so that encoding images has the GPU for itself: those of SDXL have 1.5 GB in bfloat16
    folder = cache_dir / f"latents-{fingerprint(model.vae, VAE_ENCODER)}"
    latents = cache_latents(model, dataset, folder, batch_size, keys, workers)
    sizes = [dataset.size_of(i) for i in range(len(dataset))]
    return CachedEncodings(latents, keys, contexts, sizes, variants)


def text_shape(config: ModelConfig) -> tuple[int, ...]:
    """The shape of what is cached of a prompt: the context (77,D), or for SDXL (77*D+P,), context and pooled vector."""
    width = config.unet.context_dim
    return (77 * width + config.pooled,) if config.pooled else (77, width)


@dataclass
class _Targets:
    """Item n is the target (3,H,W), of files uint8, at a position in `target_keys`."""

    dataset: FolderDataset | ArrayDataset
    positions: list[int]

    def __getitem__(self, n: int) -> Tensor:
        i, variant = divmod(self.positions[n], self.dataset.variants)
        return to_tensor(self.dataset.target(i, variant, raw=True))

    def read(self, workers: int, batches: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """The positions and the targets (B,3,H,W) of each batch. `workers` processes read ahead if they are many, image
        by image, since what waits between processes takes shared memory."""
        singles = [[n] for numbers in batches for n in numbers]
        images = load(self, singles, workers if len(singles) >= MANY else 0, operator.itemgetter(0))
        for numbers in batches:
            yield [self.positions[n] for n in numbers], torch.stack(list(itertools.islice(images, len(numbers))))


def cache_latents(
    model: ControlLDM,
    dataset: FolderDataset | ArrayDataset,
    folder: Path,
    batch_size: int,
    keys: list[bytes],
    workers: int = 0,
) -> dict[Size, RowCache]:
    """The caches of the moments of all targets, by the size of the images. keys: those of `target_keys`."""
    vae, weight, variants = model.vae, model.vae.quant_conv.weight, dataset.variants
    suffix = "" if batch_size == 8 else f"-{batch_size}"
    targets: dict[Size, _Targets] = {}
    for position in range(len(keys)):
        targets.setdefault(dataset.size_of(position // variants), _Targets(dataset, [])).positions.append(position)

    def encode(read: tuple[list[int], Tensor]) -> Tensor:
        positions, images = read
        filling = images[-1:].expand(batch_size - len(images), -1, -1, -1)
        try:
            images = torch.cat([images, filling]).to(weight.device)
            return model.encode_images(scale_targets(images))[: len(positions)]
        except NotFiniteError as e:
            items = ", ".join(str(position // variants) for position in positions)
            raise DataError(f"targets {items} of the data set: {e}") from e

    latents, need = {}, 0
    for (width, height), of_size in targets.items():
        shape = (2 * model.config.vae.z_channels, height // vae.factor, width // vae.factor)
        rows = latents[width, height] = RowCache(folder, f"{width}x{height}{suffix}", shape, weight.dtype)
        need += len({keys[p] for p in of_size.positions} - rows.index.keys()) * rows.row_bytes
    check_room(folder, need, "latents")
    for size, of_size in targets.items():
        wanted = [keys[p] for p in of_size.positions]
        latents[size].fill(wanted, encode, batch_size, "latents", read=functools.partial(of_size.read, workers))
    return latents


def target_keys(dataset: FolderDataset | ArrayDataset, cache_dir: Path) -> list[bytes]:
    """`dataset.key(i)` of all items, and of each variant of them. For files whose content the verification knows, the
    keys are remembered beside it, so that a second start reads no target."""
    memory = Memory(cache_dir / "verified.jsonl")
    keys = []
    for i in tqdm(range(len(dataset)), desc="reading targets", unit="image", disable=None, leave=False):
        content = dataset.contents(i)[1] if getattr(dataset, "facts", None) else ""
        for variant in range(dataset.variants):
            deviation = dataset.framing(i, variant).deviation if content else ()
            name = f"key {content} {dataset.size_of(i)}{f' {deviation}' if deviation else ''}"
            known = memory.get(name) if content else None
            keys.append(bytes.fromhex(known) if known else dataset.key(i, variant) if variant else dataset.key(i))
            if content:
                memory.add(name, keys[-1].hex())
    memory.flush()
    return keys


def release_encoders(model: ControlLDM) -> None:
    """Free the memory of text encoder and VAE encoder once everything is cached; they cannot be used afterwards.

    The VAE's decoder moves to the CPU, where it waits for the next image log.
    """
    for module in (model.text, model.vae.encoder, model.vae.quant_conv):
        module.to("meta")
    for module in model.vae.decoding:
        module.cpu()


def scale_targets(targets: Tensor) -> Tensor:
    """Targets of bytes in [-1,1], as those of floats are already."""
    return targets.float() / 127.5 - 1 if targets.dtype == torch.uint8 else targets


@torch.no_grad()
def prepare_batch(model: ControlLDM, batch: dict[str, Any], device: str, encode_batch_size: int) -> dict[str, Tensor]:
    """Turn a batch of samples (`data.Samples`) into the batch that the loss takes, on `device`.

    latents (B,4,h,w), scaled, sampled from the posterior with the batch's posterior_noise; context (B,77,D); hint
    (B,C,H,W) and, where validation has one, other_hint; timesteps (B,); noise (B,4,h,w); for SDXL y (B,2816), from
    pooled and sizes; every further tensor of the batch. Moments and contexts come from the batch if it has them;
    otherwise targets (`encode_batch_size` at a time) and prompts are encoded here. Bytes become floats here, since the
    way to the GPU is shorter for a quarter of them.
    """
    tensors = {
        name: value.to(device, torch.float32 if value.dtype == torch.float64 else value.dtype, non_blocking=True)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    for name in ("hint", "other_hint"):
        if name in tensors and tensors[name].dtype == torch.uint8:
            tensors[name] = tensors[name].float() / 255
    if "moments" in tensors:
        moments = tensors.pop("moments")
    else:
        targets = scale_targets(tensors.pop("target")).split(encode_batch_size)
        moments = torch.cat([model.encode_images(few) for few in targets])
    if "context" not in tensors:
        tensors["context"], tensors["pooled"] = model.encode_text(batch["prompt"])
    elif model.config.pooled:
        rows, pooled = tensors["context"], model.config.pooled  # a row is context and pooled vector, see `build_cache`
        tensors["context"], tensors["pooled"] = rows[:, :-pooled].unflatten(1, (77, -1)), rows[:, -pooled:]
    y = model.make_y(tensors.pop("pooled", None), tensors.get("sizes"))
    if y is not None:
        tensors["y"] = y
    tensors["latents"] = model.sample_latents(moments.float(), tensors.pop("posterior_noise"))
    return tensors
