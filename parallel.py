"""How do several processes train one model?

    torchrun --nproc-per-node 4 train.py --base ... --data ...

Every process (*rank*) holds the whole model and computes its own slice of every batch; before the optimizer moves, the
ranks add up their gradients, once a step, after the last micro-batch. Since a loss is already divided by the number of
samples of the whole step, the sum of the ranks' gradients is the gradient. And since sample n of a run is a function of
(seed, n), two ranks with batch 2 draw the samples that one process with batch 4 draws, and a run can go on with another
number of ranks.

No wrapper is around the model: a wrapper sees only what is called through it, and here parts are called by name.
"""

import functools
import os
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

BUCKET = 1 << 24  # gradients are added up in pieces of at most so many numbers


def world_size() -> int:
    """How many ranks there are: what torchrun says, otherwise 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Ranks:
    """This process among the others. Alone (without torchrun) nothing here does anything."""

    def __init__(self, device: str = "cpu"):
        """Join the others; plain "cuda" becomes this rank's GPU. Only rank 0 speaks; errors are told by all."""
        self.count, self.rank, self.device = world_size(), int(os.environ.get("RANK", 0)), device
        if device == "cuda" and self.count > 1:
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        if self.count == 1:
            return
        if not dist.is_initialized():  # rank 0 may draw and save for long while the others wait
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
        if not self.main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open to the end)
            tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)

    @property
    def main(self) -> bool:
        """Is this the rank that writes and speaks?"""
        return self.rank == 0

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.count == 1:
            return
        pile: list[Tensor] = []
        for t in [*tensors, None]:
            if pile and (t is None or t.dtype != pile[0].dtype or sum(p.numel() for p in pile) + t.numel() > BUCKET):
                flat = torch.cat([p.reshape(-1) for p in pile])
                dist.all_reduce(flat)
                for p, piece in zip(pile, flat.split([p.numel() for p in pile]), strict=True):
                    p.copy_(piece.view(p.shape))
                pile = []
            if t is not None:
                pile.append(t)

    def any(self, flag: bool) -> bool:
        """Is `flag` true on any rank? All get the same answer."""
        if self.count == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def least(self, value: float) -> float:
        """The smallest of the ranks' values."""
        if self.count == 1:
            return value
        smallest = torch.tensor([float(value)], dtype=torch.float64, device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return smallest.item()
