"""Which pictures does a request ask for? One prompt, a grid of strengths and seeds, or the rows of a list.

The rows of a list come from folders of hints, from a file of prompts, or from both:

    --hints FOLDER --prompt P         a row for each image in the folder, in the order of its numbers and letters
    --hints FOLDER --prompts FILE     the same with a line of the file each, or with the `prompt` of a JSON object
                                      each, whose `source` names the hint
    --hints DATA_SET                  the rows of the data set, with their prompts
    --prompts FILE                    a row for each prompt; a --hint is the same for all

A picture has the name of its hint. A ControlNet after the first takes the hint of that name from its own folder.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

from PIL import Image

import data
from drawing.loading import ImageFile
from drawing.request import ControlRequest, Request
from ldm import ModelConfig
from training.files import File
from training.images import DataError, Size, one_line, read_bytes

CELLS = 40  # of a contact sheet


@dataclass(frozen=True)
class Picture:
    """One picture to draw: whatever is not the same for all pictures of a request."""

    name: str  # of its file, without .png
    prompt: str
    seed: int
    number: int  # of the image among those of the seed
    size: Size  # (width, height), multiples of the model's
    hints: tuple[ImageFile, ...] = ()  # for each ControlNet
    strengths: tuple[float, ...] = ()  # for each ControlNet
    init: ImageFile | None = None


@dataclass(frozen=True)
class Row:
    """A row of a list: the name of its pictures, its prompt, and for each ControlNet the path of its hint."""

    name: str
    prompt: str
    hints: tuple[Path, ...] = ()


def plan(request: Request, config: ModelConfig) -> list[Picture]:
    """All pictures that `request` asks for, in order, for a model of this configuration. Raises DataError.

    Prints a line where a wanted size cannot be kept, and where a part of a hint or of the first picture is cut off.
    """
    init = ImageFile.look_at(request.init) if request.init is not None else None
    look_at, choose = lru_cache(ImageFile.look_at), lru_cache(partial(data.choose_size, request.resolution))
    count = request.num or (1 if request.is_list else 4)
    the_row = [Row("", request.prompt, tuple(Path(c.hint) for c in request.controls if c.hint is not None))]
    pictures = []
    for row in list_rows(request) if request.is_list else the_row:
        hints = tuple(map(look_at, row.hints))
        native = (init or hints[0]).size if init or hints else (config.resolution,) * 2
        size = choose(native, config.multiple)
        make = partial(Picture, prompt=row.prompt, size=size, hints=hints, init=init)
        strengths = tuple(c.strength for c in request.controls)
        if request.is_grid:
            pictures += grid(request, make)
            continue
        for number in range(request.first, request.first + count):
            name = f"{number:04d}" if not request.is_list else f"{row.name}-{number}" if count > 1 else row.name
            pictures.append(make(name=name, seed=request.seed, number=number, strengths=strengths))
    tell_what_is_cut(pictures)
    names = unique([p.name for p in pictures], taken=sheet_names(request, len(pictures)))
    return [dataclasses.replace(p, name=name) for p, name in zip(pictures, names, strict=True)]


def grid(request: Request, make: Callable[..., Picture]) -> Iterable[Picture]:
    """The pictures of a grid, row by row: a seed a row, a strength a column."""
    columns = [c.strengths or (c.strength,) for c in request.controls]
    for seed, strengths in product(request.seeds or (request.seed,), product(*columns)):
        varied = [s for s, c in zip(strengths, request.controls, strict=True) if c.strengths]
        name = "_".join([f"seed{seed}", *(f"strength{s:.10g}" for s in varied)])
        yield make(name=name, seed=seed, number=request.first, strengths=strengths)


def sheet_names(request: Request, count: int) -> list[str]:
    """The names, without .png, of the tables of `count` pictures: grid, or contact, contact-2, ... for a list."""
    if not request.is_list:
        return ["grid"]
    return [f"contact-{i}" if i > 1 else "contact" for i in range(1, 1 + math.ceil(count / CELLS))]


def request_of(request: Request, picture: Picture) -> Request:
    """The request for `picture` alone, one of those of `request`; its `command_line` makes the same picture again.

    The same but for the last bits of a number, which depend on how many pictures are computed at once.
    """
    controls = tuple(
        dataclasses.replace(control, hint=str(file.path), hints=None, strength=strength, strengths=())
        for control, file, strength in zip(request.controls, picture.hints, picture.strengths, strict=True)
    )
    alone = dict(prompt=picture.prompt, prompts=None, num=1, first=picture.number, seed=picture.seed, seeds=())
    return dataclasses.replace(request, controls=controls, overwrite=False, **alone)


# ------------------------------------------------------------------------------------------------------------- lists
def list_rows(request: Request) -> list[Row]:
    """The rows of the list that `request` names. Raises DataError."""
    folders = [hints_in(c.hints) if c.hints is not None else None for c in request.controls]
    leading = next((folder for folder in folders if folder is not None), None)
    prompts = read_prompts(request.prompts) if request.prompts is not None else None
    if leading is None:
        wanted = [(f"{i:04d}", prompt) for i, (_, prompt) in enumerate(prompts)]
    else:
        wanted = _with_prompts(request, leading, prompts)
    return [Row(name, prompt, tuple(_hint(name, *pair) for pair in zip(request.controls, folders, strict=True)))
            for name, prompt in wanted]  # fmt: skip


def _hint(name: str, control: ControlRequest, folder: dict[str, tuple[Path, str | None]] | None) -> Path:
    """The hint of the row `name` for a ControlNet: from its folder, or the one that is the same for all rows."""
    if folder is None:
        return Path(control.hint)
    if name not in folder:
        raise DataError(f"{control.hints}: has no hint of the name {one_line(name)}")
    return folder[name][0]


def _with_prompts(
    request: Request, hints: dict[str, tuple[Path, str | None]], prompts: list[tuple[str, str]] | None
) -> list[tuple[str, str]]:
    """(name, prompt) of each row, for `hints` in a folder and the `prompts` of a file."""
    if prompts is None:
        if request.prompt is None and any(prompt is None for _, prompt in hints.values()):
            raise DataError("--hints: is no data set, which would have prompts; --prompt or --prompts FILE gives them")
        return [(name, own if request.prompt is None else request.prompt) for name, (_, own) in hints.items()]
    if prompts[0][0]:
        if strange := [name for name, _ in prompts if name not in hints]:
            raise DataError(f"{request.prompts}: names the hint {one_line(strange[0])}, which is not among the --hints")
        return prompts
    if len(prompts) not in (1, len(hints)):
        raise DataError(f"{request.prompts}: has {len(prompts)} prompts for {len(hints)} hints; give one for each")
    return [(name, prompts[i % len(prompts)][1]) for i, name in enumerate(hints)]


def hints_in(folder: str) -> dict[str, tuple[File, str | None]]:
    """The hints in a folder: name -> file, and the prompt if the folder is a data set. Raises DataError."""
    root = Path(folder)
    if data.is_dataset(root):
        rows = data.read_rows(root)
        if bad := [row for row in rows if not row.readable]:
            raise DataError(f"{bad[0].where}: {bad[0].problem}")
        found = [(row.hint, row.prompt) for row in rows]
    elif not root.is_dir():
        raise DataError(f"{one_line(folder)}: no such folder of hints")
    else:
        Image.init()
        endings = {*Image.registered_extensions(), ".npy"}
        files = [p for p in root.iterdir() if p.suffix.lower() in endings and not p.name.startswith(".")]
        found = [(path, None) for path in sorted(files, key=_natural)]
    if not found:
        raise DataError(f"{one_line(folder)}: no images in it")
    return dict(zip(unique([path.stem for path, _ in found]), found, strict=True))


def _natural(path: Path) -> list[str | tuple[int, str]]:
    """A key that sorts 2.png before 10.png."""
    return [(int(part), part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path.name))]


def read_prompts(file: str) -> list[tuple[str, str]]:
    """(name of the hint, or empty; prompt) of each row of a file: lines of text, or JSON objects in a `.json` file.

    Raises DataError.
    """
    path, rows = Path(file), []
    if not path.exists():
        raise DataError(f"{one_line(file)}: no such file of prompts")
    if path.suffix.lower() in (".json", ".jsonl"):
        for place, entry in data.read_json_lines(path):
            if isinstance(entry, DataError):
                raise DataError(f"{one_line(file)}, {place}: {entry}")
            entry = entry if isinstance(entry, dict) else {}
            prompt, source = entry.get("prompt"), entry.get("source", "")
            if not isinstance(prompt, str) or not isinstance(source, str):
                raise DataError(f"{one_line(file)}, {place}: lacks the text prompt (and source, the name of its hint)")
            if re.search("[\ud800-\udfff]", prompt):
                raise DataError(f"{one_line(file)}, {place}: the prompt has half of a character")
            rows.append((Path(source.replace("\\", "/")).stem, prompt))
    else:
        try:
            lines = read_bytes(path).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as e:
            raise DataError(f"{one_line(file)}: not UTF-8 text (byte {e.start} is wrong)") from e
        rows = [("", line.strip()) for line in lines if line.strip()]
    if not rows:
        raise DataError(f"{one_line(file)}: no prompts in it")
    if len({bool(name) for name, _ in rows}) > 1:
        raise DataError(f"{one_line(file)}: some rows have a source, the name of their hint, and some have none")
    return rows


# ------------------------------------------------------------------------------------------------------------- helpers
def unique(names: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """The names, with -2, -3, ... after those that are taken or were there before. Upper and lower case count as one,
    as for the file systems of Windows and macOS."""
    used, repeats, result = set(taken), Counter(), []
    for name in names:
        free = name
        while free.casefold() in used:
            repeats[name.casefold()] += 1
            free = f"{name}-{repeats[name.casefold()] + 1}"
        used.add(free.casefold())
        result.append(free)
    return result


def tell_what_is_cut(pictures: Iterable[Picture], most: int = 3) -> None:
    """Print a line for each hint, and for the picture to start from, of which a part is cut off; at most `most`."""
    lines = {}
    for p in pictures:
        for file in (*p.hints, *([p.init] if p.init else ())):
            if not data.same_aspect(file.size, p.size):
                shapes = f"{file.size[0]}x{file.size[1]}, the images {p.size[0]}x{p.size[1]}"
                what = "the picture" if file is p.init else "the hint"
                cut = data.fraction_cut(file.size, p.size)
                lines[f"{file.path}: is {shapes}: {cut:.0%} of {what} is cut off"] = None
    for line in list(lines)[:most]:
        print(line)
    if len(lines) > most:
        print(f"... and of {len(lines) - most} others")
