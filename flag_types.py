"""Which values may a flag have: numbers of a range, devices that are there; and what is said of one that it may not.

Every command of the project parses its flags with these. The functions that need PyTorch import it themselves, so that
`--help` and a wrong number are answered without it.
"""

import argparse
import math
import os
from collections.abc import Callable

INF = math.inf


class ConfigError(ValueError):
    """A setting that cannot be; the message names the flag, its value and what to do, in one line."""


def default_device() -> str:
    """The device that computes if none is named: a GPU by CUDA, a GPU by MPS (Apple), otherwise the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def default_workers() -> int:
    """How many processes load samples if no number is given: 2 beside a GPU."""
    return 2 if default_device() == "cuda" else 0


def world_size() -> int:
    """The number of processes that train together: what torchrun says, otherwise 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device(name: str) -> str:
    """`name`, if it is a device that this PyTorch can compute on. Otherwise raises argparse.ArgumentTypeError."""
    import torch

    try:
        kind, index = torch.device(name).type, torch.device(name).index or 0
    except RuntimeError:
        kind, index = "", 0
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there:
        raise argparse.ArgumentTypeError(f"{name!r} is not a device; cpu, cuda, cuda:1 and mps are")
    if index >= there[kind]:
        found = f"{there[kind]} of them" if there[kind] else "none"
        raise argparse.ArgumentTypeError(f"{name}: this PyTorch sees {found}; --device cpu works everywhere, slowly")
    return name


def check_device(name: str) -> None:
    """ConfigError unless `name` is a device that this PyTorch can compute on."""
    try:
        device(name)
    except argparse.ArgumentTypeError as e:
        raise ConfigError(f"--device {e}") from e


def number(kind: type, low: float = -INF, high: float = INF) -> Callable[[str], float]:
    """A type for argparse: a number of type `kind` (int or float) from `low` to `high`."""

    def parse_number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"is {text}, should be {in_words(low, high)}")
        return value

    parse_number.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse_number


def in_words(low: float, high: float) -> str:
    """A range for messages: "1 or more", "0 to 1"."""
    return "a finite number" if low == -INF else f"{low:g} or more" if high == INF else f"{low:g} to {high:g}"


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def flag_words(flag: str, value: str) -> list[str]:
    """A flag and its value as words of a command line; as one word where the value would be taken for a flag."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]
