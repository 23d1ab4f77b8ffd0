"""Folder pairs: images with a caption beside each, and hints of the same names in another folder.

    photos/a/1.jpg    the target
    photos/a/1.txt    its prompt (or .caption)
    edges/a/1.png     its hint, in the folder that --hints names

This is how kohya's trainers lay out their data. A file's name without its ending, with the folder it is in, says what
belongs together; rows come in the order of these names, numbers by their value.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from training.files import DataError, natural_order, one_line, read_bytes
from training.rows import EMPTY, IMAGE_ENDINGS, Row, find_file, inside_of
from training.tables import read_text

CAPTION_ENDINGS = (".txt", ".caption")
MAX_CAPTION_PIXELS = 1 << 16  # a caption may have as many bytes as an image of so many pixels: 1 MiB


@dataclass
class _Names:
    """The files of a folder and its sub-folders by their names without ending, and the links that were not followed."""

    images: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    links: list[str] = field(default_factory=list)


def read_pairs(root: Path, hints: Path, follow_links: bool = False, ending: str = "") -> tuple[list[Row], int]:
    """The rows of the images in the folder `root`, and how many hints in the folder `hints` belong to none of them.

    `follow_links`: links may lead out of the folders, and links to folders are entered. `ending`: of the captions, such
    as "txt"; "": one of CAPTION_ENDINGS. DataError if one of the folders cannot be read or is the other one.
    """
    real_root, real_hints = (os.path.realpath(folder) for folder in (root, hints))
    if real_root == real_hints:
        raise DataError(f"{hints}: is the folder of the targets itself; --hints names the folder of their hints")
    endings = (f".{ending.lstrip('.').lower()}",) if ending else CAPTION_ENDINGS
    there = _list_names(root, endings, follow_links, real_hints)
    there_hints = _list_names(hints, (), follow_links, real_root)
    inside = [None if follow_links else inside_of(folder) for folder in (root, hints)]
    rows = []
    for name in there.links:
        link = one_line(root / name)
        rows.append(Row(f"{root}, {one_line(name)}", problem=f"{link} is a link to a folder; --follow-links enters it"))
    if not there.images and not rows:
        raise DataError(f"{root}: no images in it (files that end in {', '.join(IMAGE_ENDINGS)})")
    caption_kinds = f" ({' or '.join(endings)})"
    for name in sorted(there.images, key=natural_order):
        where = f"{root}, {one_line(name)}"
        try:
            target = find_file(root, _only("target", there.images[name]), inside[0])
            hint = _only("hint", there_hints.images.get(name), f" in {one_line(hints)}")
            hint = find_file(hints, hint, inside[1])
            caption = _only("caption", there.captions.get(name), caption_kinds)
            prompt = _read_caption(find_file(root, caption, inside[0]))
        except DataError as e:
            rows.append(Row(where, problem=str(e)))
            continue
        rows.append(Row(where, hint, target, prompt, problem="" if prompt else EMPTY))
    return rows, len(there_hints.images.keys() - there.images.keys())


def _only(what: str, found: list[str] | None, place: str = "") -> str:
    """The only one of the files `found`. DataError if there is none, or more than one."""
    is_caption = what == "caption"
    if not found:
        raise DataError(f"has no {what}{place}{'; an empty file stands for no prompt' if is_caption else ''}")
    if len(found) > 1:
        choice = f"; --columns prompt={Path(found[0]).suffix[1:]} takes one" if is_caption else ""
        names = " and ".join(one_line(Path(name).name) for name in sorted(found))
        raise DataError(f"has {len(found)} {what}s{place}: {names}{choice}")
    return found[0]


def _read_caption(path: Path) -> str:
    content = read_bytes(path, MAX_CAPTION_PIXELS)
    try:
        return read_text(content)
    except DataError as e:
        raise DataError(f"{one_line(path)}: {e}") from e


def _list_names(root: Path, endings: tuple[str, ...], follow_links: bool, without: str) -> _Names:
    """The images, and the captions with `endings`, of the folder `root` but for the real folder `without` in it."""
    names = _Names()
    for name, is_folder_link in _walk(root, follow_links, without):
        stem, suffix = os.path.splitext(name)
        if is_folder_link:
            names.links.append(name)
        elif suffix.lower() in IMAGE_ENDINGS:
            names.images[stem].append(name)
        elif suffix.lower() in endings:
            names.captions[stem].append(name)
    return names


def _walk(root: Path, follow_links: bool, without: str) -> Iterator[tuple[str, bool]]:
    """Paths of files in `root` relative to it, with slashes, and whether each is a link to a folder, not entered.
    Hidden files and folders are left out. No folder is entered twice, so that links in a circle come to an end."""
    seen, waiting = {without}, [""]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(root / folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: natural_order(entry.name))
        except OSError as e:
            raise DataError(f"{one_line(root / folder)}: {e.strerror or e}") from e
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield name, False
            elif entry.is_symlink() and not follow_links:
                yield name, True
            else:
                waiting.append(name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example
        return False
