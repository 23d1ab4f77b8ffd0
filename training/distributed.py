"""How do several processes train one model?

    torchrun --nproc-per-node 4 train.py --base ... --data ...

Every process (*rank*) holds the whole model and computes its own slice of every batch. Before the optimizer's step the
ranks sum their gradients, once a step, after the last micro-batch. A loss is already divided by the number of samples
of the whole step, so the sum over the ranks is the gradient. And since sample n of a run is a function of (seed, n),
two ranks with batch 2 draw the samples that one process with batch 4 draws, and a run can continue with another number
of ranks.

DistributedDataParallel is not used: its wrapper sees only what is called through the wrapper, and the training step
calls the parts of the model by name.
"""

import os
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from config import ConfigError, world_size

BUCKET = 1 << 24  # the largest number of gradient values that are summed at once


class Ranks:
    """This process among the ranks. For a single process (without torchrun) every method is the identity."""

    def __init__(self, device: str = "cpu"):
        """Join the process group. The device "cuda" becomes this rank's GPU. Only rank 0 prints to stdout; every rank
        reports its errors."""
        self.count, self.rank, self.device = world_size(), int(os.environ.get("RANK", 0)), device
        if device == "cuda" and self.count > 1:
            self.device, gpus = f"cuda:{os.environ['LOCAL_RANK']}", torch.cuda.device_count()
            if int(os.environ["LOCAL_RANK"]) >= gpus:
                raise ConfigError(f"there is no {self.device}: torchrun's --nproc-per-node can be up to {gpus} here")
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        if self.count == 1:
            return
        if not dist.is_initialized():  # rank 0 may draw and save for a long time while the others wait
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
        if not self.main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)
            show_bar = tqdm.__init__
            tqdm.__init__ = lambda bar, *args, **settings: show_bar(bar, *args, **(settings | {"disable": True}))

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in buckets of one dtype."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for t in [*tensors, None]:
            size = sum(b.numel() for b in bucket)
            if bucket and (t is None or t.dtype != bucket[0].dtype or size + t.numel() > BUCKET):
                flat = torch.cat([b.reshape(-1) for b in bucket])
                dist.all_reduce(flat)
                for b, summed in zip(bucket, flat.split([b.numel() for b in bucket]), strict=True):
                    b.copy_(summed.view(b.shape))
                bucket = []
            if t is not None:
                bucket.append(t)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; every rank gets the same answer."""
        if self.count == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def min(self, value: float) -> float:
        """The smallest of the ranks' values."""
        if self.count == 1:
            return value
        smallest = torch.tensor([float(value)], dtype=torch.float64, device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return smallest.item()
