"""What is in the folder of a training run.

RUN/config.json                         the run's settings, as train.py resolved them
RUN/checkpoints/step-XXXXXX/            one folder a checkpoint, whole or absent:
    trained.safetensors                 the weights that train, under their names in the model
    average.safetensors                 the moving average of these weights, if the run keeps one
    optimizer.safetensors, state.json   what resuming needs
"""

from pathlib import Path
from typing import Any

import safetensors

from weights.reading import CheckpointError, is_run, load_json


def load_run(run: str | Path) -> dict[str, Any]:
    """The settings of a run (`config.json`); CheckpointError if `run` is not the folder of a training run."""
    if not is_run(run):
        raise CheckpointError(f"{run}: not the folder of a training run (no config.json of a run in it)")
    return load_json(Path(run) / "config.json")


def list_checkpoints(run: str | Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted(p for p in (Path(run) / "checkpoints").glob("step-*") if p.is_dir() and p.suffix != ".partial")


def newest_checkpoint(run: str | Path) -> Path:
    """The folder of a run's newest intact checkpoint; a line is printed for each damaged one that is passed over."""
    for folder in reversed(list_checkpoints(run)):
        try:
            load_json(folder / "state.json")
            names = {p.name for p in folder.glob("*.safetensors")} | {"trained.safetensors", "optimizer.safetensors"}
            for name in names:
                with safetensors.safe_open(folder / name, framework="pt"):
                    pass  # opening a file compares its header with its length
            return folder
        except (CheckpointError, OSError, safetensors.SafetensorError) as e:
            print(f"{folder}: damaged ({e}); going back to the checkpoint before")
    raise CheckpointError(f"{run}: no intact checkpoint in this run")
