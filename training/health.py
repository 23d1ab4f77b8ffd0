"""Is the run healthy enough for a checkpoint that may push out older ones?

A run that has produced numbers that are not finite, or has diverged, must not replace its good checkpoints by bad ones.
A checkpoint therefore waits until the last steps were finite, and as long as the mean loss is far above its best.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

FINITE_STEPS = 10  # steps in a row that have to be finite
DIVERGED = 10.0  # times the lowest mean loss
DECAY = 0.99  # of the mean loss: about the last 100 steps


class Health:
    """Watches the losses of the steps of a run."""

    def __init__(self):
        self.finite_steps = FINITE_STEPS
        self.postponed = False  # a checkpoint is due
        self.steps, self.mean, self.lowest = 0, 0.0, math.inf

    def observe(self, loss: float, finite: bool) -> None:
        """Take note of a step: its loss, and whether loss and gradient were finite."""
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not math.isfinite(loss):
            return
        self.steps += 1
        self.mean = DECAY * self.mean + (1 - DECAY) * loss
        if self.steps >= 100:  # before that the mean is of few steps
            self.lowest = min(self.lowest, self.mean)

    def problem(self, weights: Iterable[Tensor], final: bool = False) -> str | None:
        """Why a checkpoint should wait, in words; None if it need not. `final`: the run ends, and cannot wait for more
        finite steps."""
        if self.finite_steps < (1 if final else FINITE_STEPS):
            return f"not all of the last {FINITE_STEPS} steps were finite"
        if self.mean > DIVERGED * self.lowest:
            return f"the mean loss, {self.mean:.3g}, is more than {DIVERGED:g} times its lowest, {self.lowest:.3g}"
        if not all(bool(torch.isfinite(w).all()) for w in weights):
            return "the weights are not finite"
        return None


def cause_of_failure(model: nn.Module) -> str:
    """After steps without a finite loss or gradient: the likely cause and the way out, in words. Weights that do not
    train tell: those of a broken base are the same as before the run."""
    for name, p in model.named_parameters():
        if not (p.requires_grad or p.is_meta or bool(torch.isfinite(p).all())):  # meta: a text encoder that is done
            return f"the base's {name} holds numbers that are not finite, so no training can start from this base"
    return "a lower --learning-rate or --precision fp32 may help"
