"""Changes to a training run that are worth a measurement and no flag: parts of the grid of `toy.convergence`.

A variant changes the `Trainer` before the first step. Its run is judged with the model that trained, in memory, since a
model with more parts than the others is not one that `load_model` builds.
"""

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from controlnet import ControlNet
from layers import Conv3x3, zero_module
from lowvram.muon import Muon
from training.randomness import SampleRandomness
from training.setup import Trainer
from unet import Downsample


def faster_zero_convolutions(factor: float) -> Callable[[Trainer], None]:
    """The zero convolutions, and the hint encoder's last convolution, which starts at zero too, learn at `factor` times
    the rate of the others."""

    def change(trainer: Trainer) -> None:
        names = ("control_model.zero_convs.", "control_model.middle_block_out.", "control_model.input_hint_block.14.")
        chosen = {id(p) for name, p in trainer.home.masters.items() if name.startswith(names)}
        for group in list(trainer.optimizer.param_groups):
            faster = [p for p in group["params"] if id(p) in chosen]
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            ratio = factor * group.get("rate_factor", 1.0)
            if faster:
                trainer.optimizer.add_param_group(group | {"params": faster, "rate_factor": ratio})

    return change


def muon_for(chosen: Callable[[str], bool]) -> Callable[[Trainer], None]:
    """Muon moves the matrices whose names are `chosen`, AdamW all other parameters."""

    def change(trainer: Trainer) -> None:
        config = trainer.config
        rates = config.learning_rate, config.muon_rate
        trainer.optimizer = Muon(
            trainer.home.masters, *rates, config.weight_decay, config.optimizer_bits, config.seed, chosen
        )

    return change


def in_hint_encoder(name: str) -> bool:
    """Whether a parameter belongs to the hint encoder."""
    return ".input_hint_block." in name


class HintAtLevels(nn.Module):
    """Adds what the hint encoder has found to the features of each coarser level too: the input of its last
    convolution, averaged to the size of the level and brought to its channels by a convolution that starts at zero."""

    def __init__(self, control_model: ControlNet):
        super().__init__()
        starts = [i for i, block in enumerate(control_model.input_blocks) if isinstance(block[0], Downsample)]
        width, channels = control_model.hint_widths[-1], control_model.skip_channels
        self.convolutions = nn.ModuleDict({str(i): zero_module(Conv3x3(width, channels[i])) for i in starts})
        self.found: Tensor | None = None

    def attach(self, control_model: ControlNet) -> None:
        """Add to the outputs of the blocks from now on."""

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.found = output

        control_model.input_hint_block[-2].register_forward_hook(keep)
        for i in self.convolutions:
            control_model.input_blocks[int(i)].register_forward_hook(functools.partial(self.add, i))

    def add(self, i: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The output of input block `i` with the hint added, which guidance asks for twice."""
        found = F.adaptive_avg_pool2d(self.found, output.shape[2:]).repeat(len(output) // len(self.found), 1, 1, 1)
        return output + self.convolutions[i](found)


def hint_at_levels(trainer: Trainer) -> None:
    """The hint reaches the coarser levels of the ControlNet directly."""
    control_model = trainer.model.control_model
    levels = HintAtLevels(control_model)
    levels.attach(control_model)
    control_model.hint_levels = levels  # part of the model from now on
    first = trainer.optimizer.param_groups[0]
    for name, p in levels.named_parameters(prefix="control_model.hint_levels"):
        trainer.trainable[name] = trainer.home.masters[name] = p
        trainer.optimizer.add_param_group({k: v for k, v in first.items() if k != "params"} | {"params": [p]})


@contextlib.contextmanager
def logit_normal_timesteps() -> Iterator[None]:
    """While entered, timesteps are 1000 / (1 + exp(-n)) of a normally distributed n, few at both ends of the schedule
    (Esser et al. 2024, arXiv:2403.03206), instead of 1000 u^bias."""
    original, normal = SampleRandomness.timestep, statistics.NormalDist()

    def timestep(randomness: SampleRandomness, u: float) -> int:
        n = normal.inv_cdf(min(max(u, 1e-9), 1 - 1e-9))
        return int(randomness.timesteps / (1 + math.exp(-n)))

    SampleRandomness.timestep = timestep
    try:
        yield
    finally:
        SampleRandomness.timestep = original


VARIANTS: dict[str, Callable[[Trainer], None]] = {
    "zero-convolutions-5": faster_zero_convolutions(5.0),
    "zero-convolutions-0.2": faster_zero_convolutions(0.2),
    "hint-at-levels": hint_at_levels,
    "muon-hint-encoder": muon_for(in_hint_encoder),
    "muon-all-but-hint-encoder": muon_for(lambda name: not in_hint_encoder(name)),
}
