"""What `python data.py show` and `check` tell of a data set.

Beside the problems of its files (`training/verify.py`) that is what is no error, but seldom meant: pairs that are there
twice, hints that say nothing or everything, kinds of files and what is made of them, sizes; and a contact sheet, a
picture of some rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.files import DataError, File, one_line
from training.images import KINDS, RESAMPLE, Size, resize, save_picture
from training.rows import EMPTY, Row
from training.verify import FileFacts, find_bad_rows, good_rows, remarks, resized_hints

Fact = tuple[Row, FileFacts, FileFacts]  # a row, and what is known of its hint and its target


# ------------------------------------------------------------------------------------------------------------ commands
def show(dataset: Any, number: int, out: str | Path) -> None:
    """Print a `data.FolderDataset`'s length and the prompt and shapes of pair `number`; save the pair side by side as
    the picture file `out`."""
    if not -len(dataset) <= number < len(dataset):
        raise DataError(f"{dataset.root}: has rows 0..{len(dataset) - 1}, no {number}")
    item = dataset[number]
    print(len(dataset), item["txt"], item["jpg"].shape, item["hint"].shape, sep="\n")
    hint, target = hint_picture(item["hint"]), target_picture(item["jpg"])
    hint = resize(hint, target.shape[1::-1], RESAMPLE["nearest"])
    save_picture(out, np.concatenate([hint, target], axis=1))
    print(f"saved hint and target side by side as {out}", dataset, sep="\n")


def check(
    dataset: Any, workers: int | None, sheet: str, seed: int, size: Size | None = None, buckets: Sequence[Size] = ()
) -> tuple[int, list[str]]:
    """The number of rows of a `data.FolderDataset` that can be parsed, and all problems of all rows, images included.

    Prints the layout, and what is no problem but should be known. `workers`: processes that read images (None: as many
    as can be forked). `sheet`: picture file for 12 random rows of this `seed`; "": none. What is told depends on the
    `size` to which images are brought (None: that of the first target), or on the sizes `buckets`.
    """
    print(dataset)
    bad = find_bad_rows(dataset, workers=workers)
    empty = {i: f"{row.where}: {EMPTY}" for i, row in enumerate(dataset.rows) if row.problem == EMPTY and i not in bad}
    usable = [i for i in range(len(dataset)) if i not in bad]
    if usable:
        target = dataset.facts[usable[0]][1]
        size = size or (target.width, target.height)
        for line in (*remarks(dataset, size, buckets), *resized_hints(dataset), *oddities(dataset)):
            print(f"{dataset.root}: {line}")
    if sheet and usable:
        print(f"saved {save_sheet(sheet, dataset, usable, seed)} random rows as {sheet}")
    problems = bad | empty
    return sum(row.readable for row in dataset.rows), [problems[i] for i in sorted(problems)]


# ------------------------------------------------------------------------------------------- what is seldom meant
def oddities(dataset: Any) -> list[str]:
    """Lines about a `data.FolderDataset` after `verify.find_bad_rows`."""
    rows = good_rows(dataset)
    hints = [(row.hint, hint) for row, hint, _ in rows]
    targets = [(row.target, target) for row, _, target in rows]
    kinds = (*_about_kinds(hints, "hints"), *_about_kinds(targets, "targets"))
    return [*_about_duplicates(rows), *_about_hints(rows), *kinds, *_about_sizes(rows)]


def _count(rows: list[Fact], which: Callable[[Fact], bool], what: str) -> list[str]:
    """A line about those of `rows` for which `which` is true, with the first of them; none if there are none."""
    found = [row for row, hint, target in rows if which((row, hint, target))]
    if not found:
        return []
    return [f"{len(found)} of {len(rows)} hints are {what} (the first: {one_line(found[0].hint)})"]


def _about_hints(rows: list[Fact]) -> list[str]:
    return [
        *_count(rows, lambda fact: fact[1].one_colour, "all one colour: they say nothing"),
        *_count(rows, lambda fact: fact[1].pixels == fact[2].pixels, "equal to their target: they say everything"),
    ]


def _about_duplicates(rows: list[Fact]) -> list[str]:
    """Pairs that are there more than once, and targets that are there with several hints."""
    first_pair: dict[tuple[str, str], Row] = {}
    first_target: dict[str, tuple[Row, str]] = {}
    pairs, targets = [], []
    for row, hint, target in rows:
        pair = (target.pixels, hint.pixels)
        before, its_hint = first_target.setdefault(target.pixels, (row, hint.pixels))
        if first_pair.setdefault(pair, row) is not row:
            pairs.append((row, first_pair[pair]))
        elif its_hint != hint.pixels:
            targets.append((row, before))
    lines = []
    for found, what in ((pairs, "repeat the target and the hint"), (targets, "repeat the target, with another hint,")):
        if found:
            later, earlier = found[0]
            names = f"{one_line(later.target)} is {one_line(earlier.target)}"
            if later.target == earlier.target:
                names = f"{later.where} and {earlier.where}, {one_line(later.target)}"
            lines.append(f"{len(found)} of {len(rows)} rows {what} of an earlier row (the first: {names})")
    return lines


def _about_kinds(files: list[tuple[File, FileFacts]], name: str) -> Iterator[str]:
    """How many files are something else than RGB of 8 bits, and what is made of them."""
    counts = Counter(kind for _, facts in files for kind in facts.kinds.split(",") if kind)
    for kind, count in counts.most_common():
        first = next(file for file, facts in files if kind in facts.kinds.split(","))
        what, made = KINDS[kind]
        yield f"{count} of {len(files)} {name} are {what}: {made} (the first: {one_line(first)})"


def _about_sizes(rows: list[Fact]) -> list[str]:
    sizes = Counter((target.width, target.height) for *_, target in rows)
    common = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sizes.most_common(5))
    more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    lines = [f"sizes of the targets: {common}{more}"] if rows else []
    other = sum((hint.width, hint.height) != (target.width, target.height) for _, hint, target in rows)
    return lines + ([f"{other} of {len(rows)} hints have another size than their target"] if other else [])


# ------------------------------------------------------------------------------------------------------- contact sheet
def save_sheet(path: str | Path, dataset: Any, usable: list[int], seed: int, count: int = 12, side: int = 224) -> int:
    """Save a picture of `count` random ones of the `usable` rows of a `data.FolderDataset`: hint, target, and the
    number and prompt. Equal seeds choose equal rows. Returns how many are shown."""
    from training.records import save_grid  # here, since processes that load data import this module

    order = np.random.default_rng([seed, len(usable)]).permutation(len(usable))[:count]
    shown = sorted(usable[k] for k in order)
    columns: dict[str, list[np.ndarray]] = {"hint": [], "target": []}
    for i in shown:
        item = dataset.load_item(i)
        columns["hint"].append(_thumbnail(hint_picture(item["hint"]), (side, side)))
        columns["target"].append(_thumbnail(target_picture(item["jpg"]), (side, side)))
    save_grid(path, columns, [f"{i}: {one_line(dataset.prompt(i))}" for i in shown])
    return len(shown)


def hint_picture(hint: np.ndarray) -> np.ndarray:
    """A hint (H,W,C) in [0,1] as (H,W,3) uint8: the first three channels, or the first one in gray."""
    pixels = (hint * 255).round().astype(np.uint8)
    return pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1].repeat(3, 2)


def target_picture(target: np.ndarray) -> np.ndarray:
    """A target (H,W,3) in [-1,1] as (H,W,3) uint8."""
    return ((target + 1) * 127.5).round().astype(np.uint8)


def _thumbnail(picture: np.ndarray, size: Size) -> np.ndarray:
    """The picture (H,W,3) uint8 scaled to fit into `size`, in the middle of a gray ground."""
    image = Image.fromarray(picture)
    scale = min(size[0] / image.width, size[1] / image.height)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    sheet = Image.new("RGB", size, (235, 235, 235))
    sheet.paste(fitted, ((size[0] - fitted.width) // 2, (size[1] - fitted.height) // 2))
    return np.asarray(sheet)
