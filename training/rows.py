"""A row of a data set: one (target, hint, prompt) triple, and what a list of rows may say.

Nothing in such a list is trusted: whatever is wrong with a row becomes the row's `problem`, one line that names the
place. No path leads out of the folder of the data set, and no link does unless links are to be followed.
"""

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from training.files import DataError, File, one_line
from training.images import Size, same_aspect

EMPTY = "the prompt is empty"
ROLES = ("target", "hint", "prompt")
FIELDS = ("source", "target", "prompt")  # Fill50K's names: `source` is the hint
# Names of what a row and a sample hold (see `data.Samples`): a further key of a row cannot take one of them.
RESERVED = {
    *FIELDS, "jpg", "txt", "hint", "sizes", "moments", "latents", "context", "pooled", "y", "noise", "posterior_noise",
    "timesteps",
}  # fmt: skip
VALUES = (np.ndarray, np.generic, int, float, str)  # kinds of values that further keys may have
IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".tga", ".ppm", ".pgm", ".npy",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One triple of a data set; `where` is its place as error messages name it: "ROOT/prompt.json, line 3".

    A row with a `problem` other than EMPTY cannot be used; its files may be empty paths.
    """

    where: str
    hint: File = Path()
    target: File = Path()
    prompt: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def readable(self) -> bool:
        return self.problem in ("", EMPTY)


def check_whole(entry: dict[str, Any]) -> None:
    """DataError for a text, or a name of one, that has half of a character."""
    for name, value in entry.items():
        for text in (name, value) if isinstance(value, str) else (name,):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as e:
                raise DataError(f"{one_line(name)} has half of a character ({one_line(text[e.start])})") from e


def check_texts(entry: Any, columns: dict[str, str]) -> None:
    """DataError unless `entry` is a dict with the texts that `columns` (role -> name) names, all of whole characters,
    and those of the images can be paths."""
    names = [columns[role] for role in ("hint", "target", "prompt")]
    missing = [k for k in names if not isinstance(entry, dict) or not isinstance(entry.get(k), str)]
    if missing:
        raise DataError(f"lacks the text {' and '.join(map(one_line, missing))}")
    check_whole(entry)
    for name in names[:2]:
        if "\0" in entry[name] or not entry[name].strip():
            raise DataError(f"{name} is {one_line(repr(entry[name]))}, which is no path")


def inside_of(root: Path) -> Callable[[str], bool]:
    """A function that tells whether the place that a path leads to, links followed, is in the folder `root`."""
    real_root = os.path.realpath(root)
    return lru_cache(maxsize=None)(lambda path: Path(os.path.realpath(path)).is_relative_to(real_root))


def find_file(root: Path, name: str, inside: Callable[[str], bool] | None) -> Path:
    """The path of the file that a row calls `name`, relative to the folder `root`; Windows' backslashes are understood.

    DataError for a path outside of the folder, and for a link that leads out of it. `inside`: whether the place that a
    path leads to is in the folder (None: links are followed).
    """
    if os.sep != "\\":
        if "\\" in name and not os.path.lexists(root / name):
            name = name.replace("\\", "/")
        if re.match(r"[A-Za-z]:/", name):
            raise DataError(f"{one_line(name)} leaves the folder (a drive of Windows)")
    path = root / name
    suspicious = ".." in name or os.path.isabs(name) or os.sep == "\\"
    if suspicious and not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise DataError(f"{one_line(path)} leaves the folder")
    if inside and not inside(os.fspath(path) if os.path.islink(path) else os.path.dirname(path)):
        real = one_line(os.path.realpath(path))
        raise DataError(f"{one_line(path)} is a link that leaves the folder (to {real}); --follow-links allows it")
    return path


def further_keys(item: dict[str, Any], known: Collection[str], kinds: tuple[type, ...] = VALUES) -> dict[str, Any]:
    """The further keys of an item whose values, of one of the `kinds`, can be put together to a batch. DataError for a
    number that no tensor holds."""
    extra = {k: v for k, v in item.items() if k not in known and isinstance(v, kinds)}
    for name, value in extra.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise DataError(f"{one_line(name)} is a whole number beyond 64 bits")
    return extra


def keys_of_all(rows: Sequence[Row]) -> set[str]:
    """The further keys that all readable `rows` have, with values of one kind: texts, or numbers."""
    rows = [row for row in rows if row.readable]
    common = set.intersection(*(set(row.extra) for row in rows)) if rows else set()
    return {k for k in common if len({isinstance(row.extra[k], str) for row in rows}) == 1}


def check_aspects(row: Row, hint: Size, target: Size) -> None:
    """DataError, without the row's place, if the two images of a row have different aspect ratios."""
    if not same_aspect(hint, target):
        raise DataError(
            f"{row.hint.name} is {hint[0]}x{hint[1]} but {row.target.name} is {target[0]}x{target[1]} "
            f"({one_line(row.hint)}, {one_line(row.target)}); hint and target must have the same aspect ratio"
        )
