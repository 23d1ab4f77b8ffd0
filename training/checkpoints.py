"""The checkpoints of a run: saved whole or not at all, restored to the bit, and pruned.

    RUN/checkpoints/step-001000/
        trained.safetensors     all weights that train or ever trained in the run, under their checkpoint names
        average.safetensors     their moving average (with --ema-decay)
        optimizer.safetensors   the state of AdamW, as MOMENT:NAME
        rows.txt                a digest of each row of the data set, to notice rows that change
        state.json              step, samples, configuration, fingerprints of base, VAE and data, loss scale

The model itself is not in there: a run names its base. Reading which runs and checkpoints there are is in
`weights/runs.py`, since drawing and merging need that too.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import data
from config import Config
from lowvram.optimizer import convert_state
from training.distributed import world_size
from training.run_folder import RunFolder
from training.setup import Trainer, zero_grad
from weights.reading import CheckpointError, load_state_dict
from weights.runs import check_checkpoint, list_checkpoints, load_state, run_of, step_of
from weights.writing import write_atomically, write_folder, write_safetensors


def read_state(
    folder: Path, config: Config, origin: dict[str, str], rows: list[str], data_changed: bool = False,
    older_rows: Callable[[], list[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The state.json of the checkpoint `folder`.

    `origin`: fingerprints of base, VAE and data as they are now; `rows`: digests of the rows of the data set, empty for
    a data set that is not on disk; `older_rows` computes them as checkpoints of older versions have them.
    CheckpointError where base or VAE are not those of the run, where rows are not and `data_changed` does not accept
    that, and where the run has more steps than `config` asks for.
    """
    state = load_state(folder)
    for name, path in (("base", config.base), ("vae", config.vae or config.base)):
        if state.get(name, origin[name]) != origin[name]:
            raise CheckpointError(
                f"{path}: not the {name} that {folder} was trained on (its content has another fingerprint)"
            )
    if change := find_changed_rows(folder, state, origin, rows, older_rows):
        if not data_changed:
            raise CheckpointError(
                f"{config.data}: not the data that {folder} was trained on: {change}; --data-changed accepts that"
            )
        print(f"--data-changed: {change}; the order of the samples is another from here on")
    if state["step"] > config.steps:
        raise CheckpointError(f"{folder}: is at step {state['step']}, past --steps {config.steps}")
    return state


def find_changed_rows(
    folder: Path, state: dict[str, Any], origin: dict[str, str], rows: list[str],
    older_rows: Callable[[], list[str]] | None = None,
) -> str:  # fmt: skip
    """How the rows of the data set differ from those of the checkpoint `folder`, in words; empty if they do not."""
    file = folder / "rows.txt"
    if not rows or not file.exists():  # a checkpoint of before there was such a list
        return "" if state.get("data", origin["data"]) == origin["data"] else "the list of its rows is another"
    before = file.read_text().split()
    if older_rows and before and len(before[0]) == 16:  # digests in which the files' paths count too
        rows = older_rows()
    removed, added = data.compare_rows(before, rows)
    return f"{removed} rows were removed and {added} added (a repaired row counts as both)" if removed or added else ""


def set_later_aside(resume: str | Path) -> None:
    """If `resume` is the folder of one checkpoint, move the later checkpoints of its run to RUN/set_aside and say so.
    CheckpointError if the checkpoint is damaged. Nothing happens if `resume` is the folder of a run."""
    chosen, run = Path(resume), run_of(resume)
    if run == chosen:
        return
    if damage := find_damage(chosen):
        raise CheckpointError(f"{damage}; --resume {run} continues from the newest intact checkpoint")
    later = [folder for folder in list_checkpoints(run) if step_of(folder) > step_of(chosen)]
    for folder in later:
        aside = run / "set_aside" / folder.name
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        print(f"{folder.name} is later than {chosen.name} and was moved to {aside}")


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


def save_checkpoint(run_folder: RunFolder, trainer: Trainer, origin: dict[str, str], final: bool = False) -> bool:
    """Write the checkpoint of `trainer.step`, read it back, then prune. False, with a line, if that fails or if the run
    is not healthy (see training/health.py); the older checkpoints stay then. `final`: the run ends with this step.

    The checkpoint holds the whole ControlNet (also the part that does not train under `only_mid_control`), everything
    else that trains, and `locked_weights`. On a full disk the oldest checkpoint makes room, if a later one is intact.
    """
    run, config, health = run_folder.path, trainer.config, trainer.health
    if problem := health.problem(trainer.home.masters.values(), final):
        if final or not health.postponed:
            tqdm.write(f"step {trainer.step}: no checkpoint is written, since {problem}; older ones stay")
        health.postponed = True
        return False
    health.postponed = False
    while True:
        try:
            if not (run / "config.json").exists():  # somebody removed the folder
                run_folder.save_config()
            folder = write_checkpoint(run, trainer, origin)
            break
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT) and make_room(run):
                continue
            tqdm.write(f"step {trainer.step}: the checkpoint could not be written ({e}); older ones stay")
            return False
    if damage := find_damage(folder):
        tqdm.write(
            f"step {trainer.step}: the checkpoint that was written cannot be read back ({damage}); older ones stay"
        )
        return False
    with run_folder.guard("checkpoints"):  # Windows removes no file that another program has open
        prune(run, trainer.step, config.keep_checkpoints, config.keep_every)
    return True


@contextlib.contextmanager
def checkpoint_on_error(run_folder: RunFolder, trainer: Trainer, save: Callable[..., bool]) -> Iterator[None]:
    """While entered, an exception first saves the steps that are done, and leaves its traceback in error.txt.

    An exception that is not one of ours (ValueError, OSError, out of memory) becomes a CheckpointError of one line.
    """
    try:
        yield
    except Exception as e:
        run, trace = run_folder.path, traceback.format_exc()
        with run_folder.guard("error.txt"):
            write_atomically(run / "error.txt", lambda path: path.write_bytes(trace.encode(errors="backslashreplace")))
        zero_grad(trainer)
        newest = max(map(step_of, list_checkpoints(run)), default=0)
        if trainer.between_steps and trainer.step > newest:
            with contextlib.suppress(Exception):  # on a broken device nothing can be saved
                save(final=True)
        newest = max(map(step_of, list_checkpoints(run)), default=0)
        tqdm.write(f"the newest checkpoint of {run} is of step {newest}; --resume continues from there")
        if isinstance(e, (ValueError, OSError, torch.OutOfMemoryError)):
            raise
        reason = " ".join(str(e).split())[:300]
        raise CheckpointError(f"{run}: {type(e).__name__}: {reason} (the traceback is in {run}/error.txt)") from e


def find_damage(folder: Path) -> str:
    """What is wrong with the checkpoint `folder`, in one line; empty if all its files have their checksums."""
    try:
        check_checkpoint(folder)
    except CheckpointError as e:
        return str(e)
    return ""


def make_room(run: Path) -> bool:
    """Remove the oldest checkpoint if a later one is intact. Says whether one was removed."""
    folders = list_checkpoints(run)
    if len(folders) < 2 or find_damage(folders[-1]):
        return False
    tqdm.write(f"the disk is full: {folders[0]} was removed to make room")
    remove_checkpoint(folders[0])
    return True


def write_checkpoint(run: Path, trainer: Trainer, origin: dict[str, str]) -> Path:
    """Write the folder of the checkpoint, whole or not at all, and return it. Raises OSError."""
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
    if trainer.rows:
        files["rows.txt"] = lambda path: path.write_text("\n".join(trainer.rows) + "\n")
    files["state.json"] = lambda path: path.write_text(text)
    folder = run / "checkpoints" / f"step-{trainer.step:06d}"
    write_folder(folder, files)
    return folder


def prune(run: Path, step: int, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` (0: keep all) and those of every `keep_every`-th step (0: none).

    Those after `step`, the one just saved, are damaged ones that a resume passed over: they take nobody's place.
    """
    folders = [folder for folder in list_checkpoints(run) if step_of(folder) <= step]
    for folder in folders[:-keep] if keep else ():
        if not keep_every or step_of(folder) % keep_every:
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Remove the folder of a checkpoint. A kill meanwhile leaves parts of it under another name alone, which the next
    start removes."""
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)
