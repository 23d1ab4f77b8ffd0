"""What is in the folder of a training run.

RUN/config.json                         the run's settings, as train.py resolved them
RUN/checkpoints/step-XXXXXX/            one folder a checkpoint, whole or absent:
    trained.safetensors                 the weights that train, under their names in the model
    average.safetensors                 the moving average of these weights, if the run keeps one
    optimizer.safetensors, state.json   what resuming needs
    checksums.json                      size and CRC-32 of each file, by which damage is noticed
"""

import re
from pathlib import Path
from typing import Any

import safetensors

from weights.configs import CHECKSUMS, RUN, STATE, CheckpointError, check_fields, is_run, load_json
from weights.writing import CHECKSUMS_FILE, checksum


def load_run(run: str | Path) -> dict[str, Any]:
    """The settings of a run (`config.json`); CheckpointError if `run` is not the folder of a training run, and for a
    setting that cannot be."""
    if not is_run(run):
        raise CheckpointError(f"{run}: not the folder of a training run (no config.json of a run in it)")
    path = Path(run) / "config.json"
    return check_fields(path, load_json(path), RUN)


def load_state(folder: str | Path) -> dict[str, Any]:
    """The `state.json` of the checkpoint `folder`: step, samples, the settings of the run, and what resuming needs."""
    path = Path(folder) / "state.json"
    return check_fields(path, load_json(path), STATE, required=("step", "samples", "config"))


def run_of(path: str | Path) -> Path:
    """The folder of the run that `path` is, or to which the checkpoint folder `path` belongs."""
    path = Path(path)
    in_run = path.parent.name == "checkpoints" and (path / "state.json").is_file()
    return path.parent.parent if in_run else path


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from the name of its folder."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(run: str | Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first. Whatever else is in the folder `checkpoints` is left out."""
    folders = (p for p in (Path(run) / "checkpoints").glob("step-*") if re.fullmatch(r"step-[0-9]{1,15}", p.name))
    return sorted((p for p in folders if p.is_dir()), key=lambda p: (step_of(p), p.name))


def newest_checkpoint(run: str | Path, verify: bool = True) -> Path:
    """The folder of a run's newest intact checkpoint; a line is printed for each damaged one that is passed over.

    `verify`: compare the content of every file with its checksum, once in a process (0.7 s a GB).
    """
    for folder in reversed(list_checkpoints(run)):
        try:
            check_checkpoint(folder, verify)
            return folder
        except CheckpointError as e:
            print(f"{folder}: damaged ({e}); going back to the checkpoint before")
    raise CheckpointError(f"{run}: no intact checkpoint in this run")


_verified: dict[Path, list[tuple[str, int, int]]] = {}  # checkpoint -> names, sizes and times of its files when checked


def check_checkpoint(folder: Path, verify: bool = True) -> None:
    """Raise CheckpointError, which names the file, unless all files of a checkpoint are there and intact.

    `verify`: see `newest_checkpoint`. Without it, and for a checkpoint without checksums, the header of each file is
    compared with the file's length.
    """
    load_state(folder)
    sums_file = folder / CHECKSUMS_FILE
    names = {p.name for p in folder.glob("*.safetensors")} | {"trained.safetensors", "optimizer.safetensors"}
    for name in sorted(names):
        _check_header(folder / name)
    if not verify or not sums_file.exists():
        return
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())]
    if _verified.get(folder) == files:
        return
    sums = check_fields(sums_file, load_json(sums_file), {}, required=sorted(names | {"state.json"}))
    for name, wanted in sums.items():
        check_fields(sums_file, wanted, CHECKSUMS, required=CHECKSUMS.keys(), section=f"{name}.")
        try:
            found = checksum(folder / Path(name).name)
        except (OSError, ValueError) as e:  # ValueError: no name that a file can have
            reason = " ".join(str(e).split())
            raise CheckpointError(f"{folder}: {ascii(name)[:100]} cannot be read ({reason})") from e
        if found != wanted:
            raise CheckpointError(f"{folder / name}: its content has changed since it was written")
    _verified[folder] = files


def _check_header(file: Path) -> None:
    if not file.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{file}: not there, or no regular file")
    try:
        with safetensors.safe_open(file, framework="pt"):
            pass  # opening a file compares its header with its length
    except (OSError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{file}: {' '.join(str(e).split())}") from e
