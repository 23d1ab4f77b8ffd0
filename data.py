"""Where (hint, target, prompt) triples come from, and how they get to the training loop.

On disk a data set is Fill50K's layout: `prompt.json`, one JSON object a line, with `source` (the hint image), `target`
and `prompt`. In memory it is any array-like of `dict(jpg, txt, hint)`: jpg (H,W,3) float32 in [-1,1], txt a string,
hint (H,W,C) float32 in [0,1]. The asymmetric ranges are the ControlNet tutorial's.

    folder --Fill50K-->  image(i), hint(i), prompt(i), key(i)  <--Triples-- your own array-like
                              |
                              +-- frozen.py: latents and contexts, computed once, kept on disk
                              |
                           Samples: sample n of a run, all its randomness a function of (seed, n) --> DataLoader

    python data.py show DIR 1234       the length, one pair's prompt and shapes, and the pair as a picture
    python data.py check DIR           every problem of every row, at once
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

RESAMPLE = {"area": Image.Resampling.BOX, "nearest": Image.Resampling.NEAREST}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class DataError(ValueError):
    """Something in a data set that cannot be trained on; the message names the file, the line and what to do."""


# ------------------------------------------------------------------------------------------------------------ images
def read_image(path: str | Path, channels: int | None = 3) -> np.ndarray:
    """(H,W,channels) uint8. Pictures give 1, 3 or 4 channels; `.npy` files ((H,W,C), uint8 or float in [0,1]) any.

    `channels` None takes what is there (pictures: 3).
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            array = array[..., None] if array.ndim == 2 else array
            if array.dtype != np.uint8:
                if array.dtype.kind != "f" or array.min() < 0 or array.max() > 1:
                    span = f"{array.dtype} from {array.min()} to {array.max()}"
                    raise DataError(f"{path}: holds {span}; give uint8, or floats in [0, 1]")
                array = (array * 255).round().astype(np.uint8)
            if array.ndim != 3 or channels not in (None, array.shape[2]):
                raise DataError(f"{path}: is {array.shape}, should be (height, width, {channels})")
            return array
        with Image.open(path) as image:
            return _pixels(image, path, channels or 3)
    except Exception as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, e: Exception) -> "DataError":
    """What a decoder's exception (there are many kinds) becomes: one line with the file's name."""
    if isinstance(e, DataError):
        return e
    return DataError(
        f"{path}: no such image" if isinstance(e, FileNotFoundError) else f"{path}: not a readable image ({e})"
    )


def _pixels(image: Image.Image, path: Path, channels: int) -> np.ndarray:
    if channels not in MODES:
        raise DataError(
            f"{path}: a picture has 1, 3 or 4 channels; for {channels} give .npy files of (height, width, {channels})"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, as depth maps have; Pillow's own conversion would clip them
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    array = np.asarray(image.convert(MODES[channels]))
    return array[..., None] if array.ndim == 2 else array


def save_hint(stem: Path, hint: np.ndarray) -> Path:
    """Save a hint (H,W,C) in [0,1] so that `read_image` reads it back: as `.png`, or `.npy` where a picture cannot."""
    array, channels = (hint * 255).round().astype(np.uint8), hint.shape[2]
    path = stem.with_suffix(".png" if channels in MODES else ".npy")
    if channels in MODES:
        Image.fromarray(array[..., 0] if channels == 1 else array).save(path)
    else:
        np.save(path, array)
    return path


def resize(array: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """(H,W,C) -> (height,width,C), same dtype: scaled to cover `size` (width, height), and its middle cut out."""
    height, width = array.shape[:2]
    if (width, height) == tuple(size):
        return array
    scale = min(width / size[0], height / size[1])  # source pixels a target pixel
    w, h = size[0] * scale, size[1] * scale
    box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
    if array.dtype == np.uint8 and array.shape[2] in (3, 4):
        return np.asarray(Image.fromarray(array).resize(size, resample, box=box))
    planes = [
        Image.fromarray(np.ascontiguousarray(array[..., c])).resize(size, resample, box=box)
        for c in range(array.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def parse_resolution(text: str) -> tuple[int, int]:
    """ "512" -> (512, 512), "512x768" -> (512, 768): width, height."""
    try:
        sides = [int(side) for side in str(text).lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise DataError(f"a resolution is N or WxH (512, 512x768), not {text!r}")
    return sides[0], sides[-1]


def fit_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The size nearest to `size` (width, height) whose sides `multiple` divides, at least one multiple each."""
    return tuple(max(multiple, round(side / multiple) * multiple) for side in size)


def same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Have two sizes (width, height) the same aspect ratio, to within the rounding of a pixel?"""
    return abs(a[0] * b[1] - b[0] * a[1]) < max(*a, *b)


# ---------------------------------------------------------------------------------------------------- data-set layouts
EMPTY = "the prompt is empty"


@dataclass(frozen=True)
class Row:
    """One line of prompt.json; `line` counts from 1."""

    line: int
    source: Path
    target: Path
    prompt: str


def read_rows(root: str | Path) -> tuple[list[Row], list[str]]:
    """The rows of `root`/prompt.json and the problems that reading them alone shows (no image is opened)."""
    root = Path(root)
    file = root / "prompt.json"
    if not file.is_file():
        hint = (
            "no such folder"
            if not root.is_dir()
            else "no prompt.json in it: one JSON object a line, with source, target, prompt"
        )
        raise DataError(f"{root}: {hint}")
    rows, problems = [], []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            problems.append(f"{where}: not UTF-8 text")
            continue
        except json.JSONDecodeError as e:
            problems.append(f"{where}: not JSON ({e.msg} at column {e.colno})")
            continue
        wrong = [
            k
            for k in ("source", "target", "prompt")
            if not isinstance(entry, dict) or not isinstance(entry.get(k), str)
        ]
        if wrong:
            problems.append(f"{where}: lacks the text {' and '.join(wrong)}")
            continue
        paths = [root / entry["source"], root / entry["target"]]
        outside = [str(p) for p in paths if os.path.relpath(p, root).startswith("..")]
        if outside:
            problems.append(f"{where}: {outside[0]} leaves the folder")
            continue
        if not entry["prompt"].strip():
            problems.append(f"{where}: {EMPTY}")
        rows.append(Row(number, *paths, entry["prompt"]))
    return rows, problems


class Fill50K:
    """A folder in Fill50K's layout as an array-like of `dict(jpg, txt, hint)`.

    `size` (width, height): every pair is scaled to cover it and the same middle is cut out of both (None: as it is).
    The target is scaled with antialiasing; the hint by area, or `nearest` for label maps. With `strict`, bad rows raise
    DataError (an empty prompt is allowed in training); without, they are left out and told of in `problems`.
    """

    def __init__(
        self,
        root: str | Path,
        size: tuple[int, int] | None = None,
        hint_channels: int | None = 3,
        hint_resample: str = "area",
        strict: bool = True,
    ):
        self.root, self.size, self.hint_channels = Path(root), size, hint_channels
        self.hint_filter = RESAMPLE[hint_resample]
        self.rows, self.problems = read_rows(root)
        self.fingerprint = digest((self.root / "prompt.json").read_bytes()).hex()  # of the rows
        self._matched: set[int] = set()  # items whose two sizes were compared before
        bad = [p for p in self.problems if not p.endswith(EMPTY)]
        if bad and strict:
            more = f" (and {len(bad) - 1} more: python data.py check {root})" if len(bad) > 1 else ""
            raise DataError(bad[0] + more)
        if not self.rows and (strict or not self.problems):
            raise DataError(f"{root}: prompt.json has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.parts(i)

    def parts(self, i: int, image: bool = True) -> dict[str, Any]:
        """Item i, without its `jpg` unless `image`."""
        return dict(txt=self.prompt(i), hint=self.hint(i)) | (dict(jpg=self.image(i)) if image else {})

    def prompt(self, i: int) -> str:
        return self.rows[i].prompt

    def sizes(self, i: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) of hint and target as they are on disk; DataError if their aspect ratios differ."""
        row = self.rows[i]
        hint, target = (_size_of(path, row, self.root) for path in (row.source, row.target))
        if not same_shape(hint, target):
            raise DataError(
                f"{self.root / 'prompt.json'}, line {row.line}: {row.source.name} is {hint[0]}x{hint[1]} but "
                f"{row.target.name} is {target[0]}x{target[1]} ({row.source}, {row.target}); hint and target must have "
                "the same aspect ratio"
            )
        return hint, target

    def image(self, i: int) -> np.ndarray:
        """Target i: (H,W,3) float32 in [-1,1]."""
        array = self._load(i, self.rows[i].target, 3, Image.Resampling.LANCZOS)
        return array.astype(np.float32) / 127.5 - 1

    def hint(self, i: int) -> np.ndarray:
        """Hint i: (H,W,hint_channels) float32 in [0,1]."""
        return self._load(i, self.rows[i].source, self.hint_channels, self.hint_filter).astype(np.float32) / 255

    def key(self, i: int) -> bytes:
        """What target i depends on: the bytes of its file and the size it is brought to."""
        try:
            content = self.rows[i].target.read_bytes()
        except OSError as e:
            raise DataError(f"{self.root / 'prompt.json'}, line {self.rows[i].line}: {e.filename}: {e.strerror}") from e
        return digest(content, self.size)

    def _load(self, i: int, path: Path, channels: int, resample: Image.Resampling) -> np.ndarray:
        if i not in self._matched:
            self.sizes(i)
            self._matched.add(i)
        try:
            array = read_image(path, channels)
        except DataError as e:
            raise DataError(f"{self.root / 'prompt.json'}, line {self.rows[i].line}: {e}") from e
        return array if self.size is None else resize(array, self.size, resample)


def _size_of(path: Path, row: Row, root: Path) -> tuple[int, int]:
    try:
        if path.suffix == ".npy":
            height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
            return width, height
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # the orientation tag: a quarter turn
            return image.size[::-1] if turned else image.size
    except Exception as e:
        raise DataError(f"{root / 'prompt.json'}, line {row.line}: {_unreadable(path, e)}") from e


class Triples:
    """Your own array-like of `dict(jpg, txt, hint)` with the methods that training asks for.

    Items whose sides are not `size` (width, height) are scaled and cut like files. Raises DataError naming the item
    when shapes or ranges are not the documented ones.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        size: tuple[int, int],
        hint_channels: int = 3,
        hint_resample: str = "area",
    ):
        self.dataset, self.size, self.hint_channels = dataset, size, hint_channels
        self.hint_filter = RESAMPLE[hint_resample]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.parts(i)

    def parts(self, i: int, image: bool = True) -> dict[str, Any]:
        """Item i, without its `jpg` unless `image`; asked for once, so that random items stay whole."""
        item = self.dataset[i]
        lacking = [k for k in ("jpg", "txt", "hint") if k not in item]
        if lacking:
            raise DataError(f"item {i} of the data set lacks {lacking[0]!r} (it needs jpg, txt and hint)")
        jpg = self._array(i, "jpg", item["jpg"], 3, -1.0)
        hint = self._array(i, "hint", item["hint"], self.hint_channels, 0.0)
        a, b = jpg.shape[1::-1], hint.shape[1::-1]
        if not same_shape(a, b):
            raise DataError(
                f"item {i} of the data set: jpg is {a[0]}x{a[1]} but hint is {b[0]}x{b[1]}; same aspect ratio needed"
            )
        parts = dict(txt=str(item["txt"]), hint=resize(hint, self.size, self.hint_filter))
        return parts | (dict(jpg=resize(jpg, self.size, Image.Resampling.LANCZOS).clip(-1, 1)) if image else {})

    def image(self, i: int) -> np.ndarray:
        return self[i]["jpg"]

    def hint(self, i: int) -> np.ndarray:
        return self[i]["hint"]

    def prompt(self, i: int) -> str:
        return str(self.dataset[i]["txt"])

    def key(self, i: int) -> bytes:
        return digest(self[i]["jpg"].tobytes(), self.size)

    @staticmethod
    def _array(i: int, name: str, value: Any, channels: int, low: float) -> np.ndarray:
        array = np.asarray(value, dtype=np.float32)
        if array.ndim != 3 or array.shape[2] != channels:
            raise DataError(f"item {i} of the data set: {name} is {array.shape}, should be (height, width, {channels})")
        if array.min() < low - 1e-3 or array.max() > 1 + 1e-3:
            span = f"{array.min():.3g}..{array.max():.3g}"
            raise DataError(f"item {i} of the data set: {name} spans {span}, should lie in [{low:g}, 1]")
        return array


def digest(*parts: Any) -> bytes:
    """16 bytes that stand for `parts` (bytes, or anything whose repr says all)."""
    h = hashlib.blake2b(digest_size=16)
    for p in parts:
        p = p if isinstance(p, bytes) else repr(p).encode()
        h.update(len(p).to_bytes(8, "little") + p)
    return h.digest()


def mix(*parts: Any) -> int:
    """A seed (63 bits) that is a function of `parts`: streams of different parts are independent."""
    return int.from_bytes(digest(*parts)[:8], "little") >> 1


# -------------------------------------------------------------------------------------------------------- to the loop
@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(mix("order", seed, epoch)).permutation(count)


@dataclass(frozen=True)
class Chance:
    """What is random about a sample, beyond its noise: settings of the training of the same names."""

    timesteps: int = 1000  # how many there are
    timestep_bias: float = 1.0
    even_timesteps: bool = False
    min_timestep: int = 0
    max_timestep: int = 0  # 0: the last
    drop_prompt: float = 0.0
    drop_hint: float = 0.0
    noise_offset: float = 0.0

    def timestep(self, u: float) -> int:
        """u, uniform in [0,1) -> a timestep of the allowed range, low + (high - low) * u^bias rounded down."""
        low, high = self.min_timestep, self.max_timestep or self.timesteps - 1
        return min(high, low + int((high - low + 1) * u**self.timestep_bias))


class Once(Protocol):
    """What was computed once for a data set (`frozen.Frozen` is it), by item."""

    def moments(self, i: int) -> Tensor: ...

    def context(self, i: int, prompt: str) -> Tensor: ...


class Samples(torch.utils.data.Dataset):
    """Sample n of a run, n counting over all its steps, ranks and micro-batches.

    Its item and everything random about it depend on (seed, n) alone, so neither the split into batches nor an
    interruption changes what sample n is. Each is a dict of CPU tensors: hint (C,H,W), noise and posterior (4,h,w),
    timestep (), and `moments` (2z,h,w) and `context` (77,D) from what is computed once, or `image` (3,H,W) and
    `prompt` without that.
    """

    def __init__(
        self,
        triples: Fill50K | Triples,
        indices: Sequence[int],
        seed: int,
        latent_shape: tuple[int, int, int],
        chance: Chance = Chance(),
        frozen: Once | None = None,
    ):
        self.triples, self.indices, self.seed, self.latent_shape = triples, list(indices), seed, latent_shape
        self.chance, self.frozen = chance, frozen

    def index(self, n: int) -> int:
        """Which item of the data set sample n is: every epoch goes through all of them in an order of its own."""
        epoch, position = divmod(n, len(self.indices))
        return self.indices[_order(self.seed, epoch, len(self.indices))[position]]

    def item(self, i: int, dropped: bool = False) -> dict[str, Any]:
        """The part of a sample that is not random, but for whether its prompt is `dropped` (empty instead)."""
        parts = self.triples.parts(i, image=self.frozen is None) | ({"txt": ""} if dropped else {})
        hint = {"hint": to_tensor(parts["hint"])}
        if self.frozen is None:
            return hint | {"image": to_tensor(parts["jpg"]), "prompt": parts["txt"]}
        return hint | {"moments": self.frozen.moments(i), "context": self.frozen.context(i, parts["txt"])}

    def __getitem__(self, n: int) -> dict[str, Any]:
        chance, generator = self.chance, torch.Generator().manual_seed(mix("sample", self.seed, n))
        u = torch.rand((), generator=generator, dtype=torch.float64).item()
        if chance.even_timesteps:  # successive samples fill the range evenly: steps of the golden ratio
            u = (mix("timesteps", self.seed) / 2**63 + n * 0.6180339887498949) % 1.0
        noise, posterior = (torch.randn(self.latent_shape, generator=generator) for _ in range(2))
        prompt_at, hint_at = torch.rand(2, generator=generator).tolist()
        offset = torch.randn((self.latent_shape[0], 1, 1), generator=generator)
        sample = self.item(self.index(n), prompt_at < chance.drop_prompt)
        if hint_at < chance.drop_hint:
            sample["hint"] = torch.zeros_like(sample["hint"])
        noise = noise + chance.noise_offset * offset
        return sample | {"timestep": torch.tensor(chance.timestep(u)), "noise": noise, "posterior": posterior}


def to_tensor(array: np.ndarray) -> Tensor:
    """(H,W,C) array -> (C,H,W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def batches(
    samples: Samples,
    start: int,
    stop: int,
    batch: int,
    workers: int = 0,
    pin: bool = False,
    rank: int = 0,
    count: int = 1,
) -> Iterator[dict]:
    """Samples start..stop-1 in order, `batch` at a time, collated; loaded ahead by `workers` processes.

    Of `count` ranks each takes every `count`-th batch.
    """
    mine = [n for first in range(start + rank * batch, stop, batch * count) for n in range(first, first + batch)]
    loader = torch.utils.data.DataLoader(
        samples, batch_size=batch, sampler=mine, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None, worker_init_fn=_ignore_interrupts if workers else None,
    )  # fmt: skip
    return iter(loader)


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches all processes; whether to stop is the main one's to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------------------- CLI
def show(root: str, number: int, out: str | Path) -> None:
    """Print the data set's length and pair `number`'s prompt and shapes; save the pair side by side."""
    dataset = Fill50K(root, hint_channels=None)
    if not -len(dataset) <= number < len(dataset):
        raise DataError(f"{root}: has rows 0..{len(dataset) - 1}, no {number}")
    item = dataset[number]
    print(len(dataset), item["txt"], item["jpg"].shape, item["hint"].shape, sep="\n")
    hint, target = (item["hint"] * 255).round().astype(np.uint8), ((item["jpg"] + 1) * 127.5).round().astype(np.uint8)
    hint = hint[..., :3] if hint.shape[2] > 2 else hint[..., :1].repeat(3, 2)
    hint = resize(hint, target.shape[1::-1], RESAMPLE["nearest"])
    Image.fromarray(np.concatenate([hint, target], axis=1)).save(out)
    print(f"hint and target in {out}")


def check(root: str) -> tuple[int, list[str]]:
    """How many rows of `root` can be read, and all problems of all rows."""
    dataset = Fill50K(root, hint_channels=None, strict=False)
    problems = dataset.problems
    for i in tqdm(range(len(dataset)), desc=f"checking {root}", unit="row", disable=None):
        for read in (dataset.image, dataset.hint):
            try:
                read(i)
            except DataError as e:
                problems.append(str(e))
    return len(dataset), list(dict.fromkeys(problems))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look at a data set, or check all of it.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("show", help="print one pair's prompt and shapes, and save it as a picture")
    p.add_argument("dir", help="a folder with prompt.json")
    p.add_argument("number", nargs="?", type=int, default=0, help="which pair, from 0")
    p.add_argument("--out", default="pair.png", help="where to save hint and target side by side (default pair.png)")
    p = commands.add_parser("check", help="read every row and report all problems; exit status 1 if there are any")
    p.add_argument("dir", help="a folder with prompt.json")
    args = parser.parse_args(argv)
    if args.command == "show":
        show(args.dir, args.number, args.out)
        return 0
    rows, problems = check(args.dir)
    for problem in problems:
        print(problem)
    print(f"{args.dir}: {rows} rows, {len(problems)} problem{'s' * (len(problems) != 1)}")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, OSError) as e:
        sys.exit(f"data.py: {e}")
