"""From a folder of photos to a data set: `python data.py hints PHOTOS OUT --kind canny`.

    PHOTOS/cats/a.jpg  -> decode -> scale down -+-> OUT/target/cats/a.jpg         the photo itself if it need not change
                                                +-> OUT/source/cats/a.jpg.png     the hint: training/annotators.py
    PHOTOS/cats/a.txt  ----------------------------> OUT/prompt.json              a line for each photo, written last

    OUT/hints.json      how the hints are made: a folder takes hints of one kind and one set of parameters
    OUT/made.jsonl      which photos are done: an entry for each (`training.verify.Memory`)

Every file is written whole or not at all, so the command may be stopped in any way and given again: what is done is not
done again, and the result is the same, byte for byte. A photo that changed (its size or its time) is done again. Names
keep their folders and endings, so `a.jpg`, `a.png` and `cats/a.jpg` have a hint each.
"""

import argparse
import contextlib
import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.annotators import ANNOTATORS, annotate, complete
from training.images import (
    MAX_MEGAPIXELS,
    DataError,
    Reading,
    Size,
    decode,
    endings,
    is_plain,
    one_line,
    read_bytes,
    resize,
    save_picture,
    save_whole,
)
from training.loading import load
from training.locks import take_lock
from training.tables import BYTE_ORDER_MARKS
from training.verify import Memory

PROMPT_SOURCES = ("captions", "names")  # where prompts come from; anything else is the prompt
CAPTIONS = (".txt", ".caption")
SETTINGS, MADE, LOCK = "hints.json", "made.jsonl", ".lock"
FOLLOW = "--follow-links follows it"
VERSION = 1  # of what a photo and the parameters give: other pixels need another number


@dataclass(frozen=True)
class Recipe:
    """How a photo becomes a pair. `parameters`: all of the annotator `kind`, as `training.annotators.complete` gives
    them. `size`: larger photos are scaled down until they just cover it, uncut (None: photos keep their sizes)."""

    kind: str
    parameters: dict[str, float]
    size: Size | None = None
    max_megapixels: float = MAX_MEGAPIXELS

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, for `hints.json`."""
        size = list(self.size) if self.size else None
        return {"kind": self.kind, "parameters": self.parameters, "size": size, "version": VERSION}

    def __str__(self) -> str:
        values = [f"{name} {value:g}" for name, value in self.parameters.items()]
        size = f"photos scaled to {self.size[0]}x{self.size[1]}" if self.size else "photos not scaled"
        return f"{self.kind} ({', '.join([*values, size])})"

    def read(self, path: Path, content: bytes) -> tuple[np.ndarray, bool]:
        """The photo in the `content` of the file `path`, (H,W,3) uint8, and whether it was scaled. Raises DataError."""
        photo = decode(path, Reading(3, "white", max_pixels=self.max_megapixels * 1e6), content).array
        native = photo.shape[1::-1]
        size = scaled_size(native, self.size or native)
        return resize(photo, size, Image.Resampling.LANCZOS), size != native

    def hint(self, photo: np.ndarray) -> np.ndarray:
        """The hint of a photo (H,W,3): (H,W,3) or, in shades of gray, (H,W) uint8."""
        hint = annotate(self.kind, photo, **self.parameters)
        return hint[..., 0] if hint.shape[2] == 1 else hint


def scaled_size(native: Size, wanted: Size) -> Size:
    """The size (width, height) to which a photo is scaled down: it covers `wanted` and keeps its aspect ratio to within
    a pixel. A photo that does not cover `wanted` keeps its size.

    What is left over at both ends together is an even number of pixels: the middle of size `wanted` is cut out of thin
    lines without touching them, where half a pixel more would blur all of them.
    """
    scale = max(wanted[0] / native[0], wanted[1] / native[1])
    if scale >= 1:
        return native
    return tuple(w + 2 * max(0, round((n * scale - w) / 2)) for n, w in zip(native, wanted, strict=True))


# ----------------------------------------------------------------------------------------------------------- the photos
class Found(NamedTuple):
    """What a folder holds: photos, by their paths relative to the folder, sorted, with "/"; one line for each link that
    is not followed and each name that cannot be used; and how many other files there are, by ending."""

    names: list[str]
    problems: list[str]
    others: Counter[str]


def find_photos(root: Path, follow_links: bool = False) -> Found:
    """The photos in the folder `root` and the folders in it, hidden ones left out.

    `follow_links`: links to folders are followed, and links to files wherever they lead; without, to files in `root`.
    """
    names, problems, others, seen = [], [], Counter(), set()
    real_root = os.path.realpath(root)
    unreadable = lambda e: problems.append(f"{one_line(e.filename)}: {e.strerror}")
    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=follow_links):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        problems += [
            f"{one_line(Path(folder, name))}: a link to a folder; {FOLLOW}" for name in links if not follow_links
        ]
        for path in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
            ending = path.suffix.lower()
            if ending not in endings():
                others.update([ending] if ending not in CAPTIONS else [])
            elif problem := _unusable(path, None if follow_links else real_root):
                problems.append(f"{one_line(path)}: {problem}")
            else:
                names.append(path.relative_to(root).as_posix())
    return Found(sorted(names), problems, others)


def _unusable(path: Path, real_root: str | None) -> str:
    """What keeps a photo from being used that shows without reading it, or "". `real_root`: where its file must be."""
    if real_root and not Path(os.path.realpath(path)).is_relative_to(real_root):
        return f"a link that leaves the folder; {FOLLOW}"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name is not text in UTF-8; rename it"
    return ""


def prompt_for(photo: Path, prompts: str) -> str:
    """The prompt of a photo. `prompts`: "captions" for the text of a file beside it, "names" for the words of its file
    name, and otherwise the prompt itself. Raises DataError where there is none."""
    if prompts == "captions":
        return read_caption(photo)
    if prompts == "names":
        name = re.sub(r"[\s_-]*\(?\d+\)?$", "", photo.stem)  # "red_car_012", "red car (12)"
        words = name if " " in name else re.sub("[_-]", " ", name)
        if not words.strip():
            raise DataError(f"{one_line(photo)}: its name has no words for a prompt")
        return " ".join(words.split())
    return prompts


def read_caption(photo: Path) -> str:
    """The text beside `a.jpg`, in one line: that of `a.jpg.txt`, `a.txt`, `a.jpg.caption` or `a.caption`."""
    for ending in CAPTIONS:
        for file in (photo.with_name(photo.name + ending), photo.with_suffix(ending)):
            if not file.is_file():
                continue
            content = read_bytes(file)
            encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
            try:
                words = content.decode(encoding).split()
            except UnicodeDecodeError as e:
                raise DataError(f"{one_line(file)}: not text in {encoding.upper()} (byte {e.start} is wrong)") from e
            if not words:
                raise DataError(f"{one_line(file)}: the caption is empty")
            return " ".join(words)
    raise DataError(f"{one_line(photo)}: no caption beside it ({photo.stem}.txt or {photo.stem}.caption)")


# ------------------------------------------------------------------------------------------------------------- one pair
class Made(NamedTuple):
    """What came of a photo: its file's size and time (ns), the target's name in the data set, whether the photo was
    scaled, whether the hint is all of one colour; or the problem in one line."""

    stamp: list[int]
    target: str = ""
    scaled: bool = False
    blank: bool = False
    problem: str = ""


@dataclass
class _Work:
    """Item k: photo k of `names` is made a pair in the folder `out`, and comes as a `Made`."""

    root: Path
    names: list[str]
    out: Path
    recipe: Recipe

    def __getitem__(self, k: int) -> Made:
        path, stamp = self.root / self.names[k], []
        try:
            stamp = read_stamp(path)
            return self._make(self.names[k], stamp, read_bytes(path, self.recipe.max_megapixels * 1e6))
        except DataError as e:
            return Made(stamp, problem=str(e))
        except OSError as e:
            if e.errno not in (errno.ENAMETOOLONG, errno.ENOENT):  # a full disk, say, ends the work
                raise
            return Made(stamp, problem=f"{one_line(path)}: {e.strerror}")

    def _make(self, name: str, stamp: list[int], content: bytes) -> Made:
        photo, scaled = self.recipe.read(self.root / name, content)
        hint = self.recipe.hint(photo)
        save_png(self.out / hint_name(name), hint)
        # A copy, not a hard link: an edit of the photo would change the target, and the hint would no longer fit.
        copied = not scaled and is_plain(Path(name), content, self.recipe.max_megapixels * 1e6)
        targets = {copied: target_name(name, copied) for copied in (True, False)}
        (self.out / targets[not copied]).unlink(missing_ok=True)  # of the photo as it was before
        if copied:
            save_whole(self.out / targets[True], lambda partial: partial.write_bytes(content))
        else:
            save_png(self.out / targets[False], photo)
        return Made(stamp, targets[copied], scaled, bool((hint == hint[0, 0]).all()))


def read_stamp(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns of a file."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def save_png(path: Path, picture: np.ndarray) -> None:
    """Save a picture, whole or not at all, with little compression: a tenth larger, in a third of the time."""
    save_whole(path, lambda partial: Image.fromarray(picture).save(partial, compress_level=1))


def hint_name(name: str) -> str:
    """The hint's file of the photo `name`, relative to the data set. The whole name is kept: stems may be alike."""
    return f"source/{name}.png"


def target_name(name: str, copied: bool) -> str:
    """The target's file of the photo `name`, relative to the data set: `a.jpg` if copied and `a.jpg.png` if not.

    A photo that is itself called `a.jpg.png` becomes `a.jpg.png.png` either way, so no two are the same.
    """
    path = Path(name)
    if not copied:
        return f"target/{name}.png"
    return f"target/{name}{path.suffix if Path(path.stem).suffix.lower() in endings() else ''}"


# -------------------------------------------------------------------------------------------------------- the data set
def make_dataset(
    root: str | Path,
    out: str | Path,
    recipe: Recipe,
    prompts: str = "captions",
    workers: int | None = None,
    follow_links: bool = False,
) -> tuple[int, list[str]]:
    """Make the photos in the folder `root` a data set in the folder `out`. Returns the number of its rows, and a line
    for each photo that is not in it.

    `prompts` as in `prompt_for`; `workers`: processes (None: one for each CPU, at most 8). Prints what should be known.
    Raises DataError if nothing can be made, and for a folder `out` that holds something else.
    """
    root, out = Path(root), Path(out)
    found = find_photos(root, follow_links)
    if found.others:
        kinds = ", ".join(f"{ending or 'no ending'} {count}" for ending, count in found.others.most_common(5))
        print(f"{root}: files that are no photos that can be read are left out: {kinds}")
    if not found.names:
        none = f"{root}: no photos in it (files with the endings of pictures, .jpg or .png for example)"
        raise DataError(found.problems[0] if found.problems else none)
    texts, without_prompt = _prompts(root, found.names, prompts)
    if prompts not in PROMPT_SOURCES:
        print(f"the prompt of all photos: {one_line(prompts)}")
    with _owned(root, out, recipe):
        made = _make_all(_Work(root, list(texts), out, recipe), workers)
        bad = [one.problem for one in made.values() if one.problem]
        rows = {name: one for name, one in made.items() if not one.problem}
        if not rows:
            raise DataError(f"{bad[0]} (and so all {len(bad)} photos)" if bad[1:] else bad[0])
        lines = [
            json.dumps({"source": hint_name(name), "target": one.target, "prompt": texts[name]}, ensure_ascii=False)
            for name, one in rows.items()
        ]
        text = "\n".join(lines) + "\n"
        save_whole(out / "prompt.json", lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))
    _tell(out, recipe, list(rows.values()))
    return len(rows), found.problems + without_prompt + bad


def _prompts(root: Path, names: list[str], prompts: str) -> tuple[dict[str, str], list[str]]:
    """The prompts of the photos that have one, and a line for each of the others. DataError if none has one."""
    texts, problems = {}, []
    for name in names:
        try:
            texts[name] = prompt_for(root / name, prompts)
        except DataError as e:
            problems.append(str(e))
    if not texts:
        others = "--prompts names takes file names, --prompts TEXT one text for all"
        raise DataError(f"none of {len(names)} photos has a prompt, the first: {problems[0]}; {others}")
    return texts, problems


def _make_all(work: _Work, workers: int | None) -> dict[str, Made]:
    """What came of all photos: of those that are done already as it is remembered, the others are made now."""
    memory = Memory(work.out / MADE)
    before = {name: memory.get(name) for name in work.names}
    before = {name: Made(*entry) for name, entry in before.items() if entry}
    done = {name: one for name, one in before.items() if _is_done(work, name, one)}
    todo = [name for name in work.names if name not in done]
    workers = default_workers() if workers is None else workers
    results = load(
        _Work(work.root, todo, work.out, work.recipe),
        ([k] for k in range(len(todo))),
        workers if len(todo) > 8 else 0,
        collate=list,
    )
    bar = tqdm(total=len(work.names), initial=len(done), desc=f"{work.recipe.kind} hints", unit="photo", disable=None)
    with contextlib.closing(results), bar:
        for name, (one,) in zip(todo, results, strict=True):
            done[name] = one
            if not one.problem:
                memory.add(name, list(one))
                memory.flush()  # whatever comes, this photo is done
            bar.update()
    return {name: done[name] for name in work.names}


def _is_done(work: _Work, name: str, one: Made) -> bool:
    """Whether the pair of a photo is there and the photo is as it was then."""
    try:
        files = [os.path.getsize(work.out / file) for file in (hint_name(name), one.target)]
        return all(files) and read_stamp(work.root / name) == one.stamp
    except OSError:
        return False


def default_workers() -> int:
    """One process for each CPU that this one may use, at most 8; none beside the main process if there is one CPU."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, count) if count > 1 else 0


def _tell(out: Path, recipe: Recipe, rows: list[Made]) -> None:
    if scaled := sum(one.scaled for one in rows):
        size = f"{recipe.size[0]}x{recipe.size[1]}"
        print(f"{out}: {scaled} of {len(rows)} photos are scaled down to cover {size} (--size sets it, 0 keeps them)")
    if blank := sum(one.blank for one in rows):
        print(f"{out}: {blank} of {len(rows)} hints are all of one colour: {recipe} finds nothing in these photos")


# ------------------------------------------------------------------------------------------------ one folder, one kind
@contextlib.contextmanager
def _owned(root: Path, out: Path, recipe: Recipe) -> Iterator[None]:
    """While entered, this process alone writes to the folder `out`, which holds hints of this recipe or nothing yet."""
    real_root, real_out = (Path(os.path.realpath(path)) for path in (root, out))
    if real_out.is_relative_to(real_root) or real_root.is_relative_to(real_out):
        raise DataError(f"{out}: the photos ({root}) and the data set need two folders, none inside the other")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file, but a folder of photos becomes a folder")
    out.mkdir(parents=True, exist_ok=True)
    lock = take_lock(out / LOCK)
    if lock is None:
        raise DataError(f"{out}: another process makes hints in this folder")
    with lock:
        try:
            check_settings(out, recipe, str(real_root))
            for pattern in (".*.partial*", "source/**/.*.partial*", "target/**/.*.partial*"):
                for leftover in out.glob(pattern):  # of a process that was killed
                    leftover.unlink(missing_ok=True)
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows cannot remove an open file; it stays, unlocked
                (out / LOCK).unlink(missing_ok=True)


def check_settings(out: Path, recipe: Recipe, photos: str) -> None:
    """Write `hints.json` to a new folder, or compare it: DataError if the folder holds hints of another recipe, of
    another folder of photos that is still there, or something else."""
    file, settings = out / SETTINGS, recipe.settings() | {"photos": photos}
    before = None
    if file.exists():
        try:
            before = json.loads(read_bytes(file))
            made_by = Recipe(before["kind"], before["parameters"], before["size"])
            same = before | {"photos": photos} == settings
            line = f"{out}: holds hints of {made_by}, not of {recipe}; name another folder"
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{file}: does not say how the hints were made; name another folder") from e
        if not same:
            raise DataError(
                line if str(made_by) != str(recipe) else f"{out}: was made by another version of this program"
            )
        if before["photos"] != photos and os.path.isdir(before["photos"]):
            raise DataError(f"{out}: holds hints of the photos in {one_line(before['photos'])}; name another folder")
    elif others := [name for name in os.listdir(out) if not name.startswith(".")]:
        raise DataError(f"{out}: holds {one_line(min(others))}, which this command did not make; name a new folder")
    if before != settings:
        save_whole(file, lambda partial: partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------- the command
def make_hint(photo: str | Path, out: str | Path, recipe: Recipe) -> None:
    """Make the hint of one photo the picture file `out`, which must not exist. Raises DataError."""
    if os.path.lexists(out):
        raise DataError(f"{out}: exists already; name another file for the hint of {photo}")
    photo = Path(photo)
    pixels, _ = recipe.read(photo, read_bytes(photo, recipe.max_megapixels * 1e6))
    hint = recipe.hint(pixels)
    save_picture(out, hint)
    print(f"saved the hint, {hint.shape[1]}x{hint.shape[0]}, as {out}")


def run(args: argparse.Namespace, size: Size | None) -> int:
    """The command `data.py hints` with its arguments parsed; returns the exit status: 1 if a photo was left out."""
    names = dict.fromkeys(p.name for annotator in ANNOTATORS.values() for p in annotator.parameters)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = Recipe(args.kind, complete(args.kind, given), size, args.max_megapixels)
    if not args.max_megapixels > 0 or (args.workers or 0) < 0:
        raise DataError("--max-megapixels must be above 0, --workers at least 0")
    if os.path.isfile(args.photos):
        make_hint(args.photos, args.out, recipe)
        return 0
    if not os.path.isdir(args.photos):
        raise DataError(f"{args.photos}: no such folder or photo")
    try:
        rows, problems = make_dataset(args.photos, args.out, recipe, args.prompts, args.workers, args.follow_links)
    except KeyboardInterrupt:
        print(f"{args.out}: stopped; what is done is kept, and the same command makes the rest")
        return 130
    for problem in problems:
        print(problem)
    print(f"{args.out}: {rows} rows, {len(problems)} photo{'s' * (len(problems) != 1)} left out")
    return 1 if problems else 0
