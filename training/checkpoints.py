"""The checkpoints of a run: saved whole or not at all, restored to the bit, and pruned.

    RUN/checkpoints/step-001000/
        trained.safetensors     all weights that train or ever trained in the run, under their checkpoint names
        average.safetensors     their moving average (with --ema-decay)
        optimizer.safetensors   the state of AdamW, as MOMENT:NAME
        state.json              step, samples, configuration, fingerprints of base, VAE and data, loss scale

The model itself is not in there: a run names its base. Reading which runs and checkpoints there are is in
`weights/runs.py`, since drawing and merging need that too.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from lowvram.optimizer import convert_state
from training.distributed import world_size
from training.setup import Trainer
from weights.reading import CheckpointError, load_json, load_state_dict
from weights.runs import list_checkpoints
from weights.writing import write_folder, write_safetensors


def read_state(folder: Path, config: Config, origin: dict[str, str]) -> dict[str, Any]:
    """The state.json of the checkpoint `folder`.

    `origin`: fingerprints of base, VAE and data as they are now. CheckpointError where one is not that of the run, and
    where the run has all of its steps already.
    """
    state = load_json(folder / "state.json")
    for name, path in (("base", config.base), ("vae", config.vae or config.base), ("data", config.data)):
        if state.get(name, origin[name]) != origin[name]:
            raise CheckpointError(
                f"{path}: not the {name} that {folder} was trained on (its content has another fingerprint)"
            )
    if state["step"] >= config.steps:
        raise CheckpointError(f"{folder}: is at step {state['step']}; --steps {config.steps} asks for no more")
    return state


def restore_state(trainer: Trainer, folder: Path, state: dict[str, Any]) -> None:
    """Bring a new `trainer` to the checkpoint `folder`, whose state.json is `state`."""
    weights = load_state_dict(folder / "trained.safetensors")
    masters = trainer.home.masters
    with torch.no_grad():
        for name in masters.keys() & weights.keys():
            masters[name].copy_(weights[name])
    trainer.home.upload_weights()
    trainer.locked_weights = {name: w for name, w in weights.items() if name not in trainer.trainable}
    restore_optimizer(trainer, folder)
    if state["scaler"] and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(state["scaler"])
    if trainer.ema and (folder / "average.safetensors").exists():
        average = load_state_dict(folder / "average.safetensors")
        for name in trainer.ema.keys() & average.keys():
            trainer.ema[name].copy_(average[name])
    trainer.step, trainer.samples = state["step"], state["samples"]


def restore_optimizer(trainer: Trainer, folder: Path) -> None:
    """Give the optimizer its saved moments, in the format that it keeps. Parameters without any start afresh."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_state_dict(folder / "optimizer.safetensors").items():
        kind, name = key.split(":", 1)
        moments.setdefault(name, {})[kind] = value
    for name, p in trainer.home.masters.items():
        if name not in moments:
            continue
        try:
            trainer.optimizer.state[p] = convert_state(moments[name], p, trainer.optimizer)
        except KeyError as e:
            raise CheckpointError(
                f"{folder / 'optimizer.safetensors'}: has no {e} of {name}, which this version keeps; a new run can "
                f"start from the weights: --control {folder / 'trained.safetensors'}"
            ) from e
    fresh = len(trainer.trainable.keys() - moments.keys())
    if fresh:
        print(f"{fresh} of {len(trainer.trainable)} trained tensors did not train before; their moments start at 0")


def save_checkpoint(run: Path, trainer: Trainer, origin: dict[str, str]) -> bool:
    """Write the checkpoint of `trainer.step`, then prune. False, with a line, if the disk does not take the files; the
    older checkpoints stay then.

    The checkpoint holds the whole ControlNet (also the part that does not train under `only_mid_control`), everything
    else that trains, and `locked_weights`.
    """
    try:
        write_checkpoint(run, trainer, origin)
    except OSError as e:
        tqdm.write(f"step {trainer.step}: the checkpoint could not be written ({e}); older ones stay")
        return False
    prune(run, trainer.config.keep_checkpoints, trainer.config.keep_every)
    return True


def write_checkpoint(run: Path, trainer: Trainer, origin: dict[str, str]) -> None:
    """Write the folder of the checkpoint, whole or not at all. Raises OSError."""
    config, masters = trainer.config, trainer.home.masters
    whole = trainer.model.state_dict()
    control = {name: tensor for name, tensor in whole.items() if name.startswith("control_model.")}
    names = {id(p): name for name, p in masters.items()}
    moments = {
        f"{kind}:{names[id(p)]}": torch.as_tensor(v, dtype=None if isinstance(v, Tensor) else torch.float32)
        for p, entry in trainer.optimizer.state.items()
        for kind, v in entry.items()
    }
    state = origin | dict(
        step=trainer.step, samples=trainer.samples, config=dataclasses.asdict(config),
        ranks=world_size(), scaler=trainer.scaler.state_dict(),
    )  # fmt: skip
    text = json.dumps(state, indent=2) + "\n"
    step, locked = str(trainer.step), json.dumps(config.sd_locked)
    metadata = {"config": trainer.model.config.to_json(), "step": step, "sd_locked": locked}
    weights = functools.partial(write_safetensors, metadata=metadata)
    files = {"trained.safetensors": lambda path: weights(path, control | trainer.locked_weights | masters)}
    if trainer.ema:
        files["average.safetensors"] = lambda path: weights(path, trainer.ema)
    files["optimizer.safetensors"] = lambda path: write_safetensors(path, moments, {})
    files["state.json"] = lambda path: path.write_text(text)
    write_folder(run / "checkpoints" / f"step-{trainer.step:06d}", files)


def prune(run: Path, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` (0: keep all) and those of every `keep_every`-th step (0: none)."""
    for folder in list_checkpoints(run)[:-keep] if keep else ():
        if not keep_every or int(folder.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(folder)
