"""What is computed once: the frozen VAE's latents and the frozen text tower's contexts, kept on disk.

In ControlNet training the VAE and the text tower never change, so what they make of an image or a prompt never does
either. `freeze` computes it for a whole data set and keeps it under `data/.cache`; the loop then needs neither. A row
is found by a key of all it depends on (the encoder's weights, the image's bytes, the size; the prompt): a changed input
is computed anew, never silently reused, and runs share what they have in common. Kept are the moments of the VAE's
posterior, not a draw from it: the posterior is drawn from anew at every step, as without the cache.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from controlnet import ControlLDM
from data import DataError, Fill50K, Triples, digest, to_tensor


class Cache:
    """Rows of equal shape on disk, found by key: what the frozen VAE or text tower made of an input.

    Two files that only grow: `NAME.bin` holds the rows, `NAME.keys` the 16-byte key of each, written after its row.
    What an interruption left half-written is cut off at the next start. Writers hold a lock, so runs can share a cache.
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

    def fill(self, keys: Sequence[bytes], compute: Callable[[list[int]], Tensor], batch: int, what: str) -> None:
        """Compute the rows whose keys are not there yet: `compute(positions in keys) -> (len, *shape)`.

        Raises DataError when the disk cannot hold them. Shows a progress bar named `what`.
        """
        if all(key in self.index for key in keys):
            return
        with self._locked():
            self._read_index()  # another run may have filled some meanwhile
            missing = list({key: i for i, key in enumerate(keys) if key not in self.index}.values())
            need, free = len(missing) * self.row_bytes, shutil.disk_usage(self.folder).free
            if need > free:
                raise DataError(
                    f"{self.folder}: the cache of {what} needs {need / 2**30:.1f} GiB, the disk has "
                    f"{free / 2**30:.1f}; point --cache-dir elsewhere, or train with --no-cache"
                )
            with open(self.rows_file, "ab") as rows, open(self.keys_file, "ab") as names:
                rows.truncate(self._count * self.row_bytes)
                names.truncate(self._count * 16)
                with tqdm(total=len(missing), desc=f"caching {what}", unit="row", disable=None) as bar:
                    for start in range(0, len(missing), batch):
                        chunk = missing[start : start + batch]
                        made = compute(chunk).to("cpu", self.dtype).contiguous()
                        assert made.shape == (len(chunk), *self.shape), (made.shape, self.shape)
                        rows.write(made.view(torch.uint8).numpy().tobytes())
                        rows.flush()
                        names.write(b"".join(keys[i] for i in chunk))
                        names.flush()
                        bar.update(len(chunk))
            self._read_index()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.lock_file, "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def __getitem__(self, key: bytes) -> Tensor:
        if self._map is None:
            self._map = np.memmap(self.rows_file, np.uint8, "r", shape=(self._count, self.row_bytes))
        return torch.from_numpy(np.array(self._map[self.index[key]])).view(self.dtype).view(self.shape)


VAE_ENCODER = ("encoder.", "quant_conv.")  # the part of the VAE that latents depend on


@dataclass(frozen=True)
class Frozen:
    """What was computed for a data set, by item."""

    latents: Cache
    keys: list[bytes]
    contexts: Cache

    def moments(self, i: int) -> Tensor:
        """(2z,h,w): mean and log-variance of target i's latents, unscaled."""
        return self.latents[self.keys[i]]

    def context(self, i: int, prompt: str) -> Tensor:
        """(77,D): the context of item i's prompt."""
        key = digest(prompt)
        if key not in self.contexts.index:
            raise DataError(f"item {i} of the data set has another prompt each time: use --no-cache (cache=False)")
        return self.contexts[key]


def fingerprint(module: nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """A short name for the weights of `module` that start with one of `prefixes`, with their precision and shapes."""
    h = []
    for name, p in module.state_dict().items():
        if name.startswith(prefixes):
            plain = p.detach().cpu().contiguous().reshape(-1)
            h.append(digest(plain.view(torch.uint8).numpy().tobytes(), str(p.dtype), tuple(p.shape)))
    return digest(*h, repr(module.config)).hex()[:16]


def freeze(model: ControlLDM, triples: Fill50K | Triples, root: str | Path, batch: int) -> Frozen:
    """Latent moments of every target and the context of every prompt, from disk under `root` or computed now, `batch`
    images at a time. Raises DataError for a data set that gives other items each time."""
    root, vae, text = Path(root), model.vae, model.text
    dtype, (width, height) = vae.quant_conv.weight.dtype, triples.size
    reading = tqdm(range(len(triples)), desc="reading targets", unit="image", disable=None, leave=False)
    keys = [triples.key(i) for i in reading]
    again = range(min(8, len(keys)))
    prompts = [triples.prompt(i) for i in range(len(triples))]
    if any((triples.key(i), triples.prompt(i)) != (keys[i], prompts[i]) for i in again):
        raise DataError("the data set gives another item each time it is asked for one: use --no-cache (cache=False)")

    def encode(positions: list[int]) -> Tensor:
        images = torch.stack([to_tensor(triples.image(i)) for i in positions])
        return vae.moments(images.to(vae.quant_conv.weight.device, dtype))

    shape = (2 * model.config.vae.z_channels, height // vae.factor, width // vae.factor)
    weights = fingerprint(vae, VAE_ENCODER)
    latents = Cache(root / f"latents-{weights}", f"{width}x{height}", shape, dtype)
    latents.fill(keys, encode, batch, "latents")
    unique = list(dict.fromkeys(["", *prompts]))  # the empty one, for prompts that are dropped
    contexts = Cache(root / f"contexts-{fingerprint(text)}", "prompts", (77, model.config.text.width), dtype)
    encode_text = lambda positions: model.encode_prompts([unique[i] for i in positions])
    contexts.fill([digest(p) for p in unique], encode_text, 64, "prompts")
    return Frozen(latents, keys, contexts)


def rest(model: ControlLDM) -> None:
    """All is in the cache: free the memory of what encodes, which is not needed again, and let the VAE's decoder wait
    in the CPU's for the next picture."""
    for part in (model.text, model.vae.encoder, model.vae.quant_conv):
        part.to("meta")
    for part in model.vae.decoding:
        part.cpu()


@torch.no_grad()
def inputs(
    model: ControlLDM, batch: dict[str, Any], device: str, at_once: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A batch of samples -> latents, context, hint, timesteps, noise, as the loss takes them: what was computed once
    from the cache, otherwise from the prompt and the image, `at_once` of them; the posterior is drawn from here."""
    move = lambda x: x.to(device, non_blocking=True)
    if "moments" in batch:
        moments = move(batch["moments"])
    else:
        images = move(batch["image"]).to(model.vae.quant_conv.weight.dtype)
        moments = torch.cat([model.vae.moments(few) for few in images.split(at_once)])
    context = move(batch["context"]) if "context" in batch else model.encode_prompts(batch["prompt"])
    latents = model.latents(moments.float(), move(batch["posterior"]))
    return latents, context, move(batch["hint"]), move(batch["timestep"]), move(batch["noise"])
