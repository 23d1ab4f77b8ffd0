"""Where (target, hint, prompt) triples come from, and how they get to the training loop.

On disk a data set has one of five layouts (`training/layouts.py`), such as Fill50K's: a folder with `prompt.json`, one
JSON object a line with `source` (the hint image), `target` and `prompt`. In memory it is any array-like of `dict(jpg,
txt, hint)`: jpg is the target, (H,W,3) float32 in [-1,1]; txt the prompt; hint (H,W,C) float32 in [0,1]. The asymmetric
ranges are those of the ControlNet tutorial. Further keys of an item (a class number, say) go through to the loss under
their own names.

    FolderDataset(any layout)     -+->  target(i), hint(i), prompt(i), key(i)
    ArrayDataset(your array-like) -+          |
                                              +-- training/cache.py encodes targets and prompts once
                                              |
                                    Samples: sample n of a run, all its randomness a function of (seed, n)
                                              |
                                    batches: a DataLoader, whose batches are dictionaries

    python data.py show DATA 1234      print the length, one pair's prompt and shapes, and save the pair as a picture
    python data.py check DATA          report every problem of every row at once, and what else one should know
    python data.py hints PHOTOS DATA --kind canny   make photos a data set: see training/photos.py
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flags import parse_data
from training.console import protect_output, run_program, shell_line

if __name__ == "__main__":  # --help and wrong flags are answered before the imports below, which take seconds
    protect_output()
    parse_data(None)

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from lowvram.process import disable_malloc_trim
from training import images, inspection, layouts, photos, verify
from training.buckets import Framed, bucket_sizes, choose_size, frame_keys
from training.buckets import fit_size as fit_size
from training.buckets import parse_resolution as parse_resolution
from training.files import MAX_MEGAPIXELS, DataError, File, read_bytes
from training.images import RESAMPLE, Reading, Size, resize
from training.images import fraction_cut as fraction_cut
from training.images import read_image as read_image
from training.images import same_aspect as same_aspect
from training.images import save_hint as save_hint
from training.inspection import show as show
from training.layouts import LAYOUTS as LAYOUTS
from training.layouts import Row as Row
from training.layouts import find_list as find_list
from training.layouts import is_dataset as is_dataset
from training.layouts import read_json_lines as read_json_lines
from training.layouts import read_rows as read_rows
from training.loading import load
from training.order import BucketOrder, shuffled
from training.randomness import SampleRandomness, derive_seed, digest
from training.rows import RESERVED, VALUES, check_aspects, further_keys, keys_of_all


# ----------------------------------------------------------------------------------------------------------- data sets
@dataclass(eq=False)
class FolderDataset(Framed):
    """A data set on disk in any of the layouts as an array-like of `dict(jpg, txt, hint)`.

    `size`: every pair is scaled to cover it, and the same middle is cut out of both images (None: images stay as they
    are), unless `framings` says otherwise. Targets are scaled with antialiasing; hints by area, or `nearest` for label
    maps. `hint_channels`, `hint_ground`, `hint_scale` and `max_megapixels` as in `training.images.Reading`; targets are
    laid on white. `follow_links`: links may lead out of the folder. Keys that every row has beside the three fields are
    keys of the items, too. With `strict`, rows that cannot be parsed raise DataError (an empty prompt is allowed in
    training); without, they keep their numbers, are listed in `problems`, and raise DataError when they are asked for.
    `columns`, `hints` and `index_dir` as in `training.layouts.read_rows`.
    """

    root: str | Path
    size: Size | None = None
    hint_channels: int | None = 3
    hint_resample: str = "area"
    strict: bool = True
    hint_ground: str = "auto"
    hint_scale: float = 0.0
    follow_links: bool = False
    max_megapixels: float = MAX_MEGAPIXELS
    columns: str = ""
    hints: str | Path = ""
    index_dir: str | Path | None = None

    def __post_init__(self):
        self.layout = layouts.detect(self.root, self.hints)
        self.rows, self.remark = layouts.read_layout(self.layout, self.follow_links, self.columns, self.index_dir)
        self.facts: list[tuple[verify.FileFacts, verify.FileFacts] | None] = []  # of the rows, once they are verified
        self.fingerprint = digest(*layouts.content(self.layout, self.rows)).hex()  # of the rows
        self._extra_keys = keys_of_all(self.rows)
        self.compared: set[File] = set()  # targets of rows whose two sizes are known to agree
        bad = [f"{row.where}: {row.problem}" for row in self.rows if not row.readable]
        if bad and self.strict:
            more = f" (and {len(bad) - 1} more: {self.check_command})" if len(bad) > 1 else ""
            raise DataError(bad[0] + more)
        if not self.rows:
            raise DataError(f"{self.root}: {self.layout} has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.load_item(i)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"facts": []}  # worker processes need none

    def __str__(self) -> str:
        return f"{self.root}: {self.layout}, {len(self)} rows{'; ' * bool(self.remark)}{self.remark}"

    @property
    def check_command(self) -> str:
        """The command that tells everything about this data set."""
        flags = [("--hints", self.hints), ("--columns", self.columns)]
        words = [word for flag, value in flags if value for word in (flag, str(value))]
        return shell_line(["python", "data.py", "check", str(self.root), *words])

    @property
    def problems(self) -> list[str]:
        """The problems of rows that show without opening any image, one line of text each."""
        return [f"{row.where}: {row.problem}" for row in self.rows if row.problem]

    def without(self, numbers: Collection[int]) -> "FolderDataset":
        """This data set without the rows of these numbers."""
        kept = copy.copy(self)
        keep = sorted(set(range(len(self))) - set(numbers))
        kept.rows = [self.rows[i] for i in keep]
        kept.facts = [self.facts[i] for i in keep] if self.facts else []
        kept._extra_keys = keys_of_all(kept.rows)
        return kept

    def row_digests(self, with_paths: bool = False) -> list[str]:
        """A digest of each row's prompt, further keys, and files' content, 20 hex digits: alike in every layout.

        `with_paths`: digests of 16 digits, as older checkpoints have them, in which the files' paths in the folder
        count too.
        """
        return [digest(*self._identity(i, with_paths)).hex()[: 16 if with_paths else 20] for i in range(len(self))]

    def _identity(self, i: int, with_paths: bool) -> Iterator[Any]:
        row = self.rows[i]
        for file, content in zip((row.hint, row.target), self.contents(i), strict=True):
            if with_paths and isinstance(file, Path) and file.is_relative_to(self.layout.folder):
                yield file.relative_to(self.layout.folder).as_posix()
            yield content
        yield from (row.prompt, sorted(row.extra.items()))

    def contents(self, i: int) -> tuple[str, str]:
        """Digests of the content of row i's hint and target file, as the verification found them or read now."""
        if self.facts and self.facts[i]:
            return tuple(fact.content for fact in self.facts[i])
        return tuple(verify.hexdigest(self._named(i, read_bytes, path)) for path in self._files(i))

    def readings(self) -> tuple[Reading, Reading]:
        """How hints and how targets are read."""
        bound, class_numbers = self.max_megapixels * 1e6, self.hint_channels == 1 and self.hint_resample == "nearest"
        hint = Reading(self.hint_channels, self.hint_ground, self.hint_scale, class_numbers, bound)
        return hint, Reading(3, "white", max_pixels=bound)

    def load_item(self, i: int, target: bool = True, variant: int = 0, raw: bool = False) -> dict[str, Any]:
        """Item i: dict(txt, hint, jpg, further keys of its row); without `target` no jpg; `raw`: pixels in uint8."""
        item = {k: v for k, v in self.rows[i].extra.items() if k in self._extra_keys}
        item |= self.told_sizes(self.framing(i, variant)) | dict(txt=self.prompt(i), hint=self.hint(i, variant, raw))
        return item | (dict(jpg=self.target(i, variant, raw)) if target else {})

    def prompt(self, i: int) -> str:
        """The prompt of item i."""
        return self.rows[i].prompt

    def sizes(self, i: int) -> tuple[Size, Size]:
        """(width, height) of hint and target as they are on disk; DataError if their aspect ratios differ."""
        hint, target = (self._named(i, images.size_on_disk, path, self.max_megapixels * 1e6) for path in self._files(i))
        self._named(i, check_aspects, self.rows[i], hint, target)
        return hint, target

    def native_sizes(self) -> list[Size]:
        """(width, height) of all targets as they are on disk, as the verification found them or read now."""
        if self.facts:
            return [(target.width, target.height) for _, target in self.facts]
        return [self.sizes(i)[1] for i in range(len(self))]

    def target(self, i: int, variant: int = 0, raw: bool = False) -> np.ndarray:
        """Target i: (H,W,3) float32 in [-1,1]; `raw`: uint8, a quarter of the memory."""
        pixels = self._read(i, 1, Image.Resampling.LANCZOS, variant)
        return pixels if raw else pixels.astype(np.float32) / 127.5 - 1

    def hint(self, i: int, variant: int = 0, raw: bool = False) -> np.ndarray:
        """Hint i: (H,W,hint_channels) float32 in [0,1]; `raw`: uint8."""
        pixels = self._read(i, 0, RESAMPLE[self.hint_resample], variant)
        return pixels if raw else pixels.astype(np.float32) / 255

    def key(self, i: int, variant: int = 0) -> bytes:
        """16 bytes that change when the pixels of target i may change: a digest of its file and of how it is framed."""
        content = self._named(i, read_bytes, self._files(i)[1])
        return digest(content, self.size_of(i), *self.framing(i, variant).deviation)

    def _read(self, i: int, side: int, resample: Image.Resampling, variant: int) -> np.ndarray:
        path = self._files(i)[side]
        if self.rows[i].target not in self.compared:
            self.sizes(i)
            self.compared.add(self.rows[i].target)
        array = self._named(i, images.decode, path, self.readings()[side]).array
        framing = self.framing(i, variant, array.shape[1::-1])
        return resize(array, framing.size, resample, framing.position, framing.flipped)

    def _files(self, i: int) -> tuple[File, File]:
        """Hint and target file of row i. DataError for a row that could not be parsed."""
        row = self.rows[i]
        if not row.readable:
            raise DataError(f"{row.where}: {row.problem}")
        return row.hint, row.target

    def _named(self, i: int, read: Any, *arguments: Any) -> Any:
        """read(*arguments), with the place of row i before the message of a DataError."""
        try:
            return read(*arguments)
        except DataError as e:
            raise DataError(f"{self.rows[i].where}: {e}") from e


def compare_rows(before: Iterable[str], now: Iterable[str]) -> tuple[int, int]:
    """How many rows were removed and how many added between two lists of `row_digests`, whatever their order; a changed
    row counts as both."""
    before, now = Counter(before), Counter(now)
    return (before - now).total(), (now - before).total()


@dataclass(eq=False)
class ArrayDataset(Framed):
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

    def load_item(self, i: int, target: bool = True, variant: int = 0, raw: bool = False) -> dict[str, Any]:
        """Item i, checked and resized, with its further keys; without jpg if `target` is False. `raw` has no effect.

        `dataset[i]` is called once, so that the parts belong together even if the data set makes random items.
        """
        item = self._item(i)
        jpg = self._checked(i, "jpg", item["jpg"], 3, -1.0)
        hint = self._checked(i, "hint", item["hint"], self.hint_channels, 0.0)
        a, b = jpg.shape[1::-1], hint.shape[1::-1]
        if not same_aspect(a, b):
            raise DataError(
                f"item {i} of the data set: jpg is {a[0]}x{a[1]} but hint is {b[0]}x{b[1]}; same aspect ratio needed"
            )
        framing = self.framing(i, variant, a)
        framed = (framing.size, framing.position, framing.flipped)
        known = self.told_sizes(framing) | dict(txt=str(item["txt"]))
        known["hint"] = resize(hint, framed[0], RESAMPLE[self.hint_resample], *framed[1:])
        if target:
            known["jpg"] = resize(jpg, framed[0], Image.Resampling.LANCZOS, *framed[1:]).clip(-1, 1)
        try:
            return frame_keys(further_keys(item, RESERVED, (*VALUES, Tensor)), framing, self.hint_resample) | known
        except DataError as e:
            raise DataError(f"item {i} of the data set: {e}") from e

    def native_sizes(self) -> list[Size]:
        """(width, height) of all targets as they are, for which every item is loaded."""
        return [np.shape(self._item(i)["jpg"])[1::-1] for i in range(len(self))]

    def target(self, i: int, variant: int = 0, raw: bool = False) -> np.ndarray:
        return self.load_item(i, variant=variant)["jpg"]

    def hint(self, i: int, variant: int = 0, raw: bool = False) -> np.ndarray:
        return self.load_item(i, variant=variant)["hint"]

    def prompt(self, i: int) -> str:
        return str(self.dataset[i]["txt"])

    def key(self, i: int, variant: int = 0) -> bytes:
        return digest(self.target(i, variant).tobytes(), self.size_of(i))

    def _item(self, i: int) -> dict[str, Any]:
        item = self.dataset[i]
        missing = [k for k in ("jpg", "txt", "hint") if k not in item]
        if missing:
            raise DataError(f"item {i} of the data set lacks {missing[0]!r} (it needs jpg, txt and hint)")
        return item

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
@dataclass(eq=False)
class Samples(torch.utils.data.Dataset):
    """Sample n of a run, where n counts over all steps, ranks and micro-batches.

    The item of a sample and everything random about the sample depend on (seed, n) alone, so neither the split into
    batches nor an interruption changes what sample n is. A sample is a dict of CPU tensors: hint (C,H,W) (of files
    uint8), noise and posterior_noise (4,h,w), timesteps () int64; then with `encodings` moments (2z,h,w) and context
    (77,D), without target (3,H,W), as the hint, and prompt (a string); and the further keys of the item, with `sizes`
    (6,): how it is framed. With an `order` items have several sizes, and `latent_shape` is that of `dataset.size`.
    """

    dataset: FolderDataset | ArrayDataset
    indices: Sequence[int]
    seed: int
    latent_shape: tuple[int, int, int]
    randomness: SampleRandomness = SampleRandomness()
    encodings: Any = None  # training.cache.CachedEncodings: has moments(i, variant) and context(i, prompt)
    order: BucketOrder | None = None

    def index(self, n: int) -> int:
        """The number of sample n's item: every epoch goes through all `indices` in an order of its own."""
        epoch, position = divmod(n, len(self.indices))
        order = self.order.epoch(epoch) if self.order else shuffled(self.seed, epoch, len(self.indices))
        return self.indices[order[position]]

    def shape_of(self, i: int) -> tuple[int, int, int]:
        """The shape of item i's latents."""
        if not self.order:
            return self.latent_shape
        factor = self.dataset.size[0] // self.latent_shape[2]
        width, height = self.dataset.size_of(i)
        return self.latent_shape[0], height // factor, width // factor

    def item(self, i: int, drop_prompt: bool = False, variant: int = 0) -> dict[str, Any]:
        """What samples of item i have in common: all but noise and timesteps. `drop_prompt` takes the empty prompt;
        `variant`: see `training.buckets.Framings`."""
        which = {"variant": variant} if variant else {}
        item = self.dataset.load_item(i, target=self.encodings is None, raw=True, **which)
        jpg, prompt, hint = item.pop("jpg", None), item.pop("txt"), item.pop("hint")
        prompt = "" if drop_prompt else prompt
        item["hint"] = to_tensor(hint)
        if self.encodings is None:
            return item | {"target": to_tensor(jpg), "prompt": prompt}
        return item | {"moments": self.encodings.moments(i, **which), "context": self.encodings.context(i, prompt)}

    def __getitem__(self, n: int) -> dict[str, Any]:
        randomness, generator = self.randomness, torch.Generator().manual_seed(derive_seed("sample", self.seed, n))
        u = torch.rand((), generator=generator, dtype=torch.float64).item()
        if randomness.even_timesteps:  # successive samples fill the range evenly: steps of the golden ratio
            u = (derive_seed("timesteps", self.seed) / 2**63 + n * 0.6180339887498949) % 1.0
        i, variant = self.index(n), derive_seed("variant", self.seed, n) % self.dataset.variants
        noise, posterior_noise = (torch.randn(self.shape_of(i), generator=generator) for _ in range(2))
        u_prompt, u_hint = torch.rand(2, generator=generator).tolist()
        offset = torch.randn((self.latent_shape[0], 1, 1), generator=generator)
        sample = self.item(i, u_prompt < randomness.drop_prompt, variant)
        if u_hint < randomness.drop_hint:
            sample["hint"] = torch.zeros_like(sample["hint"])
        noise = noise + randomness.noise_offset * offset
        timesteps = torch.tensor(randomness.timestep(u))
        return sample | {"timesteps": timesteps, "noise": noise, "posterior_noise": posterior_noise}


def to_tensor(array: np.ndarray) -> Tensor:
    """Turn an array (H,W,C) into a tensor (C,H,W)."""
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def batches(
    samples: Samples,
    start: int,
    stop: int,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    ranks: int = 1,
    collate: Callable[[list[dict[str, Any]]], Any] = default_collate,
) -> Iterator[Any]:
    """Iterate over samples start..stop-1 in order, `batch_size` at a time, put together by `collate`: to a dictionary,
    or by `group_by_size` to several.

    `workers` processes load ahead (0: the main process loads). Each of `ranks` ranks gets every `ranks`-th batch.
    """
    starts = range(start + rank * batch_size, stop, batch_size * ranks)
    return load(samples, (range(n, n + batch_size) for n in starts), workers, collate, pin_memory)


def group_by_size(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put samples together to batches of images of one size, in the order in which the sizes come."""
    groups: dict[torch.Size, list] = {}
    for sample in samples:
        groups.setdefault(sample["hint"].shape, []).append(sample)
    return [default_collate(group) for group in groups.values()]


# --------------------------------------------------------------------------------------------------------------- CLI
def check(
    root: str, workers: int | None = None, sheet: str = "", seed: int = 0, size: Size | None = None,
    buckets: Sequence[Size] = (), **settings: Any,
) -> tuple[int, list[str]]:  # fmt: skip
    """The number of rows of the data set `root` that can be parsed, and all problems of all rows, images included.

    Prints the layout, and what is no problem but should be known. The other arguments: see `inspection.check`.
    `settings`: of FolderDataset.
    """
    dataset = FolderDataset(root, hint_channels=None, strict=False, **settings)
    return inspection.check(dataset, workers, sheet, seed, size, buckets)


def main(argv: list[str] | None = None) -> int:
    args = parse_data(argv)
    if args.command == "hints":
        return photos.run(args, None if args.size == "0" else parse_resolution(args.size))
    names = ("hint_scale", "follow_links", "max_megapixels", "hints", "columns")
    settings = {name: getattr(args, name) for name in names}
    if args.command == "show":
        inspection.show(FolderDataset(args.data, hint_channels=None, **settings), args.number, args.out)
        return 0
    wanted = args.resolution or ("512" if args.buckets else "")
    size = choose_size(wanted, (0, 0), args.multiple) if wanted else None
    buckets = bucket_sizes(size, args.multiple) if args.buckets else ()
    disable_malloc_trim()  # images come and go: this halves the time
    rows, problems = check(
        args.data, verify.processes(True), args.sheet, abs(args.seed), size=size, buckets=buckets, **settings
    )
    for problem in problems:
        print(problem)
    print(f"{args.data}: {rows} rows, {len(problems)} problem{'s' * (len(problems) != 1)}")
    return 1 if problems else 0


if __name__ == "__main__":
    run_program("data.py", main)
