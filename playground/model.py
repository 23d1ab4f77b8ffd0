"""The model with which the page draws: loaded once, with its ControlNets and how their hints are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
from controlnet import ControlNet
from ldm import ControlLDM, compute_dtype_for, use_tf32
from lowvram.process import disable_malloc_trim
from playground.hints import ValidationHints, describe_annotators
from sampler import SOLVERS, SPACINGS
from training.history import read_history
from training.images import Reading, Size
from weights import ModelSource, load_control, load_model
from weights.runs import is_run, load_run

DRAWABLE = (1, 3)  # channels of hints that can be drawn in a browser


@dataclass(frozen=True)
class Choices:
    """What `play.py` was started with."""

    model: str
    base: str = ""
    controls: tuple[str, ...] = ()
    vae: str = ""
    device: str = "cpu"
    precision: str = "fp32"


@dataclass(frozen=True)
class OfferedControl:
    """A ControlNet that the page offers. `path`: where it comes from; of the model's own ControlNet the model."""

    path: str
    net: ControlNet
    reading: Reading  # of files
    resample: str

    @property
    def drawable(self) -> bool:
        """Whether its hints can be drawn in a browser, which then sends what is drawn: 0 to 255, whatever the scale of
        the files is. Other hints come as the files that they are."""
        return self.net.hint_channels in DRAWABLE


@dataclass(frozen=True)
class LoadedModel:
    """The model on its device, its ControlNets, and the hints of its run."""

    choices: Choices
    model: ControlLDM
    controls: tuple[OfferedControl, ...]
    hints: ValidationHints
    size: Size  # (width, height) of the pictures if nothing else is asked for

    def describe(self) -> dict[str, Any]:
        """What the page needs to know, as JSON has it."""
        prompts = [{"number": i, "prompt": self.hints.prompt(i)} for i in self.hints.numbers]
        offered = prompts if self.controls and self.controls[0].drawable else []
        return {
            "name": self.choices.model,
            "kind": self.model.config.name,
            "device": self.choices.device,
            "size": f"{self.size[0]}x{self.size[1]}",
            "multiple": self.model.config.multiple,
            "guidance": self.model.config.guidance,
            "solvers": list(SOLVERS),
            "spacings": ["auto", *SPACINGS],
            "annotators": describe_annotators(),
            "controls": [
                {
                    "name": control.path,
                    "channels": control.net.hint_channels,
                    "drawable": control.drawable,
                }
                for control in self.controls
            ],
            "hints": offered,
            "note": self.hints.note,
            "paper": self.hints.paper() if offered else "black",
        }


def load(choices: Choices) -> LoadedModel:
    """Load what `choices` name and move it to its device. Raises CheckpointError.

    The first ControlNet is the model's own, if it has one; in a model that is no run the first of `choices.controls`
    takes its place. The others are ControlNets for the same base.
    """
    run = load_run(choices.model) if is_run(choices.model) else {}
    joined, *others = ("", *choices.controls) if run or not choices.controls else choices.controls
    model = load_model(ModelSource(choices.model, base=choices.base, control=joined, vae=choices.vae))
    nets = [(joined or choices.model, model.control_model)] if model.control_model else []
    nets += [(path, load_control(path, model, choices.model)) for path in others]
    use_tf32(choices.precision != "fp32")
    disable_malloc_trim()
    dtype = compute_dtype_for(choices.precision, choices.device)
    for module in (model, *(net for _, net in nets)):
        module.to(choices.device, dtype)
    model.vae.to(model.config.vae_dtype(dtype))
    size = data.parse_resolution(run.get("resolution") or str(model.config.resolution))
    controls = tuple(_offered(path, net) for path, net in nets)
    size = data.fit_size(size, model.config.multiple)
    return LoadedModel(choices, model, controls, ValidationHints(run, held_out_count(choices.model)), size)


def held_out_count(run: str) -> int | None:
    """How many pairs a run held out, as it noted at its last start; None if it did not."""
    facts = [entry["data"] for entry in read_history(run) if isinstance(entry.get("data"), dict)]
    counts = [fact["validation"] for fact in facts if isinstance(fact.get("validation"), int)]
    return counts[-1] if counts else None


def _offered(path: str, net: ControlNet) -> OfferedControl:
    """A ControlNet whose hints are read as in its training."""
    run = load_run(path) if is_run(path) else {}
    resample = run.get("hint_resample", "area")
    reading = Reading(
        net.hint_channels, run.get("hint_ground", "auto"), run.get("hint_scale", 0.0),
        class_numbers=net.hint_channels == 1 and resample == "nearest",
    )  # fmt: skip
    return OfferedControl(path, net, reading, resample)


def missing_model(path: str) -> str:
    """What to do where there is no model at `path`; empty if there is something."""
    if Path(path).exists():
        return ""
    if Path(path) == Path("runs/demo"):
        return "runs/demo: there is no run yet; `make train` trains one in about 2 minutes"
    return f"{path}: there is no such run, file or folder; `make train` trains the demo, --model names another run"
