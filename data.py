"""Where (target, hint, prompt) triples come from, and how they get to the training loop.

On disk a data set is a folder in one of the `LAYOUTS`, such as Fill50K's: `prompt.json`, one JSON object a line with
`source` (the hint image), `target` and `prompt`. In memory it is any array-like of `dict(jpg, txt, hint)`: jpg is the
target, (H,W,3) float32 in [-1,1]; txt the prompt; hint (H,W,C) float32 in [0,1]. The asymmetric ranges are those of the
ControlNet tutorial. Further keys of an item (a class number, say) go through to the loss under their own names.

    FolderDataset(folder)         -+->  target(i), hint(i), prompt(i), key(i)
    ArrayDataset(your array-like) -+          |
                                              +-- training/cache.py encodes targets and prompts once
                                              |
                                    Samples: sample n of a run, all its randomness a function of (seed, n)
                                              |
                                    batches: a DataLoader, whose batches are dictionaries

    python data.py show DIR 1234       print the length, one pair's prompt and shapes, and save the pair as a picture
    python data.py check DIR           report every problem of every row at once
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training.images import RESAMPLE, DataError, Size, read_image, resize, size_on_disk
from training.images import save_hint as save_hint


# ------------------------------------------------------------------------------------------------------- image sizes
def parse_resolution(text: str) -> Size:
    """Parse "512" into (512, 512) and "512x768" into (512, 768): width, height in pixels."""
    try:
        sides = [int(side) for side in str(text).lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise DataError(f"a resolution is N or WxH (512, 512x768), not {text!r}")
    return sides[0], sides[-1]


def fit_size(size: Size, multiple: int) -> Size:
    """The size nearest to `size` (width, height) whose sides are multiples of `multiple`, at least one each."""
    return tuple(max(multiple, round(side / multiple) * multiple) for side in size)


def choose_size(resolution: str, native: Size, multiple: int) -> Size:
    """The size to compute with: `resolution` ("512", "512x768"), or `native` if that is empty, by `fit_size`.

    Prints a line if the wanted size cannot be kept.
    """
    wanted = parse_resolution(resolution) if resolution else tuple(native)
    size = fit_size(wanted, multiple)
    if size != wanted:
        sizes = f"{wanted[0]}x{wanted[1]} becomes {size[0]}x{size[1]}"
        print(f"{sizes}: this UNet needs sides that are multiples of {multiple} pixels")
    return size


def same_aspect(a: Size, b: Size) -> bool:
    """Whether two sizes (width, height) have the same aspect ratio, to within the rounding of a pixel."""
    return abs(a[0] * b[1] - b[0] * a[1]) < max(*a, *b)


# ---------------------------------------------------------------------------------------------------- data-set layouts
EMPTY = "the prompt is empty"
FIELDS = ("source", "target", "prompt")


@dataclass(frozen=True)
class Row:
    """One triple of a folder; `where` is its place as error messages name it: "ROOT/prompt.json, line 3"."""

    where: str
    hint: Path
    target: Path
    prompt: str
    extra: dict[str, Any] = field(default_factory=dict)


def read_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Read a file of one JSON object a line: yield ("line 3", the object), or a DataError in place of the object."""
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            entry = DataError("not UTF-8 text")
        except json.JSONDecodeError as e:
            entry = DataError(f"not JSON ({e.msg} at column {e.colno})")
        yield f"line {number}", entry


# A folder has a layout if it holds the file of this name, which lists its triples. The reader of a layout yields the
# place of each triple in the file and a dict with the FIELDS (paths relative to the folder) and any further keys.
LAYOUTS = {"prompt.json": (read_json_lines, "one JSON object a line, with source, target and prompt")}


def find_list(root: str | Path) -> Path:
    """The file in the folder `root` that lists its triples. Raises DataError if there is none."""
    for name in LAYOUTS:
        if (Path(root) / name).is_file():
            return Path(root) / name
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder")
    raise DataError(f"{root}: no {' or '.join(f'{name} in it: {form}' for name, (_, form) in LAYOUTS.items())}")


def is_dataset(root: str | Path) -> bool:
    """Whether `root` is a folder in one of the layouts."""
    return any((Path(root) / name).is_file() for name in LAYOUTS)


def read_rows(root: str | Path) -> tuple[list[Row], list[str]]:
    """The rows of the folder `root`, and the problems that show without opening any image, one line of text each."""
    root, file = Path(root), find_list(root)
    rows, problems = [], []
    for place, entry in LAYOUTS[file.name][0](file):
        where = f"{file}, {place}"
        if isinstance(entry, DataError):
            problems.append(f"{where}: {entry}")
            continue
        missing = [k for k in FIELDS if not isinstance(entry, dict) or not isinstance(entry.get(k), str)]
        if missing:
            problems.append(f"{where}: lacks the text {' and '.join(missing)}")
            continue
        hint, target = root / entry["source"], root / entry["target"]
        outside = [p for p in (hint, target) if not Path(os.path.abspath(p)).is_relative_to(os.path.abspath(root))]
        if outside:
            problems.append(f"{where}: {outside[0]} leaves the folder")
            continue
        if not entry["prompt"].strip():
            problems.append(f"{where}: {EMPTY}")
        rows.append(Row(where, hint, target, entry["prompt"], _extra(entry, FIELDS)))
    return rows, problems


def _extra(item: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The further keys of an item, as far as their values can be put together to a batch."""
    kinds = (Tensor, np.ndarray, np.generic, int, float, str)
    return {k: v for k, v in item.items() if k not in known and isinstance(v, kinds)}


@dataclass(eq=False)
class FolderDataset:
    """A folder in one of the layouts as an array-like of `dict(jpg, txt, hint)`.

    `size`: every pair is scaled to cover it, and the same middle is cut out of both images (None: images stay as they
    are). Targets are scaled with antialiasing; hints by area, or `nearest` for label maps. `hint_channels` as in
    `read_image`. Keys that every row has beside the three fields are keys of the items, too. With `strict`, bad rows
    raise DataError (an empty prompt is allowed in training); without, they are left out and listed in `problems`.
    """

    root: str | Path
    size: Size | None = None
    hint_channels: int | None = 3
    hint_resample: str = "area"
    strict: bool = True

    def __post_init__(self):
        file = find_list(self.root)
        self.rows, self.problems = read_rows(self.root)
        self.fingerprint = digest(file.read_bytes()).hex()  # of the rows
        self._extra_keys = set.intersection(*(set(row.extra) for row in self.rows)) if self.rows else set()
        self._compared: set[int] = set()  # items whose two sizes are known to agree
        bad = [p for p in self.problems if not p.endswith(EMPTY)]
        if bad and self.strict:
            more = f" (and {len(bad) - 1} more: python data.py check {self.root})" if len(bad) > 1 else ""
            raise DataError(bad[0] + more)
        if not self.rows and (self.strict or not self.problems):
            raise DataError(f"{self.root}: {file.name} has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.load_item(i)

    def load_item(self, i: int, target: bool = True) -> dict[str, Any]:
        """Item i: dict(txt, hint, jpg and the further keys of its row); without jpg if `target` is False."""
        extra = {k: v for k, v in self.rows[i].extra.items() if k in self._extra_keys}
        return extra | dict(txt=self.prompt(i), hint=self.hint(i)) | (dict(jpg=self.target(i)) if target else {})

    def prompt(self, i: int) -> str:
        """The prompt of item i."""
        return self.rows[i].prompt

    def sizes(self, i: int) -> tuple[Size, Size]:
        """(width, height) of hint and target as they are on disk; DataError if their aspect ratios differ."""
        row = self.rows[i]
        try:
            hint, target = size_on_disk(row.hint), size_on_disk(row.target)
        except DataError as e:
            raise DataError(f"{row.where}: {e}") from e
        if not same_aspect(hint, target):
            raise DataError(
                f"{row.where}: {row.hint.name} is {hint[0]}x{hint[1]} but {row.target.name} is {target[0]}x{target[1]} "
                f"({row.hint}, {row.target}); hint and target must have the same aspect ratio"
            )
        return hint, target

    def target(self, i: int) -> np.ndarray:
        """Target i: (H,W,3) float32 in [-1,1]."""
        return self._read(i, self.rows[i].target, 3, Image.Resampling.LANCZOS) / 127.5 - 1

    def hint(self, i: int) -> np.ndarray:
        """Hint i: (H,W,hint_channels) float32 in [0,1]."""
        return self._read(i, self.rows[i].hint, self.hint_channels, RESAMPLE[self.hint_resample]) / 255

    def key(self, i: int) -> bytes:
        """16 bytes that change when the pixels of target i may change: a digest of its file and of `size`."""
        try:
            content = self.rows[i].target.read_bytes()
        except OSError as e:
            raise DataError(f"{self.rows[i].where}: {e.filename}: {e.strerror}") from e
        return digest(content, self.size)

    def _read(self, i: int, path: Path, channels: int | None, resample: Image.Resampling) -> np.ndarray:
        if i not in self._compared:
            self.sizes(i)
            self._compared.add(i)
        try:
            array = read_image(path, channels)
        except DataError as e:
            raise DataError(f"{self.rows[i].where}: {e}") from e
        return (array if self.size is None else resize(array, self.size, resample)).astype(np.float32)


@dataclass(eq=False)
class ArrayDataset:
    """Your own array-like of `dict(jpg, txt, hint)` with the methods of FolderDataset that training calls.

    Items that are not of `size` are scaled and cut as files are. Raises DataError naming the item when its shapes or
    ranges are not the documented ones.
    """

    dataset: Sequence[dict[str, Any]]
    size: Size
    hint_channels: int = 3
    hint_resample: str = "area"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.load_item(i)

    def load_item(self, i: int, target: bool = True) -> dict[str, Any]:
        """Item i, checked and resized, with its further keys as they are; without jpg if `target` is False.

        `dataset[i]` is called once, so that the parts belong together even if the data set makes random items.
        """
        item = self.dataset[i]
        missing = [k for k in ("jpg", "txt", "hint") if k not in item]
        if missing:
            raise DataError(f"item {i} of the data set lacks {missing[0]!r} (it needs jpg, txt and hint)")
        jpg = self._checked(i, "jpg", item["jpg"], 3, -1.0)
        hint = self._checked(i, "hint", item["hint"], self.hint_channels, 0.0)
        a, b = jpg.shape[1::-1], hint.shape[1::-1]
        if not same_aspect(a, b):
            raise DataError(
                f"item {i} of the data set: jpg is {a[0]}x{a[1]} but hint is {b[0]}x{b[1]}; same aspect ratio needed"
            )
        known = dict(txt=str(item["txt"]), hint=resize(hint, self.size, RESAMPLE[self.hint_resample]))
        if target:
            known["jpg"] = resize(jpg, self.size, Image.Resampling.LANCZOS).clip(-1, 1)
        return _extra(item, ("jpg", "txt", "hint")) | known

    def target(self, i: int) -> np.ndarray:
        return self[i]["jpg"]

    def hint(self, i: int) -> np.ndarray:
        return self[i]["hint"]

    def prompt(self, i: int) -> str:
        return str(self.dataset[i]["txt"])

    def key(self, i: int) -> bytes:
        return digest(self[i]["jpg"].tobytes(), self.size)

    @staticmethod
    def _checked(i: int, name: str, value: Any, channels: int, low: float) -> np.ndarray:
        array = np.asarray(value, dtype=np.float32)
        if array.ndim != 3 or array.shape[2] != channels:
            raise DataError(f"item {i} of the data set: {name} is {array.shape}, should be (height, width, {channels})")
        if array.min() < low - 1e-3 or array.max() > 1 + 1e-3:
            values = f"{array.min():.3g}..{array.max():.3g}"
            raise DataError(f"item {i} of the data set: {name} spans {values}, should lie in [{low:g}, 1]")
        return array


# ------------------------------------------------------------------------------------------------ samples for the loop
def digest(*parts: Any) -> bytes:
    """A hash of 16 bytes of `parts`: bytes as they are, anything else by its repr."""
    h = hashlib.blake2b(digest_size=16)
    for p in parts:
        p = p if isinstance(p, bytes) else repr(p).encode()
        h.update(len(p).to_bytes(8, "little") + p)
    return h.digest()


def derive_seed(*parts: Any) -> int:
    """A seed of 63 bits that is a function of `parts`; different parts give independent random streams."""
    return int.from_bytes(digest(*parts)[:8], "little") >> 1


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(derive_seed("order", seed, epoch)).permutation(count)


@dataclass(frozen=True)
class SampleRandomness:
    """How the random parts of a sample are distributed. `timesteps` is the length of the model's noise schedule; the
    other fields are the training settings of the same names."""

    timesteps: int = 1000
    timestep_bias: float = 1.0
    even_timesteps: bool = False
    min_timestep: int = 0
    max_timestep: int = 0  # 0: the last timestep of the schedule
    drop_prompt: float = 0.0
    drop_hint: float = 0.0
    noise_offset: float = 0.0

    def timestep(self, u: float) -> int:
        """Map u, uniform in [0,1), to a timestep of the allowed range: low + (high - low) * u^bias, rounded down."""
        low, high = self.min_timestep, self.max_timestep or self.timesteps - 1
        return min(high, low + int((high - low + 1) * u**self.timestep_bias))


@dataclass(eq=False)
class Samples(torch.utils.data.Dataset):
    """Sample n of a run, where n counts over all steps, ranks and micro-batches.

    The item of a sample and everything random about the sample depend on (seed, n) alone, so neither the split into
    batches nor an interruption changes what sample n is. A sample is a dict of CPU tensors: hint (C,H,W), noise and
    posterior_noise (4,h,w), timesteps () int64; then with `encodings` moments (2z,h,w) and context (77,D), without
    target (3,H,W) and prompt (a string); and the further keys of the item.
    """

    dataset: FolderDataset | ArrayDataset
    indices: Sequence[int]
    seed: int
    latent_shape: tuple[int, int, int]
    randomness: SampleRandomness = SampleRandomness()
    encodings: Any = None  # training.cache.CachedEncodings: has moments(i) and context(i, prompt)

    def index(self, n: int) -> int:
        """The number of sample n's item: every epoch goes through all `indices` in an order of its own."""
        epoch, position = divmod(n, len(self.indices))
        return self.indices[_order(self.seed, epoch, len(self.indices))[position]]

    def item(self, i: int, drop_prompt: bool = False) -> dict[str, Any]:
        """What samples of item i have in common: all but noise and timesteps. `drop_prompt` takes the empty prompt."""
        item = self.dataset.load_item(i, target=self.encodings is None)
        jpg, prompt, hint = item.pop("jpg", None), item.pop("txt"), item.pop("hint")
        prompt = "" if drop_prompt else prompt
        item["hint"] = to_tensor(hint)
        if self.encodings is None:
            return item | {"target": to_tensor(jpg), "prompt": prompt}
        return item | {"moments": self.encodings.moments(i), "context": self.encodings.context(i, prompt)}

    def __getitem__(self, n: int) -> dict[str, Any]:
        randomness, generator = self.randomness, torch.Generator().manual_seed(derive_seed("sample", self.seed, n))
        u = torch.rand((), generator=generator, dtype=torch.float64).item()
        if randomness.even_timesteps:  # successive samples fill the range evenly: steps of the golden ratio
            u = (derive_seed("timesteps", self.seed) / 2**63 + n * 0.6180339887498949) % 1.0
        noise, posterior_noise = (torch.randn(self.latent_shape, generator=generator) for _ in range(2))
        u_prompt, u_hint = torch.rand(2, generator=generator).tolist()
        offset = torch.randn((self.latent_shape[0], 1, 1), generator=generator)
        sample = self.item(self.index(n), u_prompt < randomness.drop_prompt)
        if u_hint < randomness.drop_hint:
            sample["hint"] = torch.zeros_like(sample["hint"])
        noise = noise + randomness.noise_offset * offset
        timesteps = torch.tensor(randomness.timestep(u))
        return sample | {"timesteps": timesteps, "noise": noise, "posterior_noise": posterior_noise}


def to_tensor(array: np.ndarray) -> Tensor:
    """Turn an array (H,W,C) into a tensor (C,H,W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def batches(
    samples: Samples,
    start: int,
    stop: int,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[dict[str, Any]]:
    """Iterate over samples start..stop-1 in order, collated to batches of `batch_size`.

    `workers` processes load ahead (0: the main process loads). Each of `ranks` ranks gets every `ranks`-th batch.
    """
    starts = range(start + rank * batch_size, stop, batch_size * ranks)
    loader = torch.utils.data.DataLoader(
        samples, batch_size=batch_size, sampler=[n for first in starts for n in range(first, first + batch_size)],
        num_workers=workers, pin_memory=pin_memory, prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_interrupts if workers else None,
    )  # fmt: skip
    return iter(loader)


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches every process, but only the main process decides whether to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------------------- CLI
def show(root: str, number: int, out: str | Path) -> None:
    """Print the data set's length and the prompt and shapes of pair `number`; save the pair side by side as `out`."""
    dataset = FolderDataset(root, hint_channels=None)
    if not -len(dataset) <= number < len(dataset):
        raise DataError(f"{root}: has rows 0..{len(dataset) - 1}, no {number}")
    item = dataset[number]
    print(len(dataset), item["txt"], item["jpg"].shape, item["hint"].shape, sep="\n")
    hint, target = (item["hint"] * 255).round().astype(np.uint8), ((item["jpg"] + 1) * 127.5).round().astype(np.uint8)
    hint = hint[..., :3] if hint.shape[2] > 2 else hint[..., :1].repeat(3, 2)
    hint = resize(hint, target.shape[1::-1], RESAMPLE["nearest"])
    Image.fromarray(np.concatenate([hint, target], axis=1)).save(out)
    print(f"saved hint and target side by side as {out}")


def check(root: str) -> tuple[int, list[str]]:
    """The number of rows of the folder `root` that can be parsed, and all problems of all rows, images included."""
    dataset = FolderDataset(root, hint_channels=None, strict=False)
    problems = dataset.problems
    for i in tqdm(range(len(dataset)), desc=f"checking {root}", unit="row", disable=None):
        for read in (dataset.target, dataset.hint):
            try:
                read(i)
            except DataError as e:
                problems.append(str(e))
    return len(dataset), list(dict.fromkeys(problems))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look at one pair of a data set, or check all pairs.")
    commands = parser.add_subparsers(dest="command", required=True)
    folder = f"the data set: a folder with {' or '.join(LAYOUTS)}"
    p = commands.add_parser("show", help="print one pair's prompt and shapes, and save the pair as a picture")
    p.add_argument("dir", help=folder)
    p.add_argument("number", nargs="?", type=int, default=0, help="number of the pair, counted from 0 (default 0)")
    p.add_argument("--out", default="pair.png", help="picture file for hint and target side by side (default pair.png)")
    p = commands.add_parser("check", help="read every row and report all problems; exit status 1 if there are any")
    p.add_argument("dir", help=folder)
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
