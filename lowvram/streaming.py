"""Frozen weights stay in the CPU's memory and come to the GPU one block ahead of their use.

    GPU computes      block 1   block 2   block 3   ...   block 3, 2, 1 again in the backward pass
    weights copied    block 2   block 3   block 4   ...

A block of SDXL, with up to ten blocks in its transformer, comes in parts (`unet.parts`).

The order is not written down: after every two calls in a row, the block that was called next is remembered, and from
the second step on it is the one to copy ahead. (Two calls tell the downward from the backward pass; one would not.)
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lowvram.offload import to_pinned_cpu


class BlockStreamer:
    """Calls `blocks` with their frozen parameters copied from the CPU to `device`, in `compute_dtype`.

    Parameters that require a gradient (a LoRA inside a frozen block) stay where they are, and a block without frozen
    parameters is called as it is. The copies live for the computation of their block alone, so the backward pass has to
    compute the block again: streaming needs gradient checkpointing.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device | str, compute_dtype: torch.dtype):
        self.device, self.compute_dtype = torch.device(device), compute_dtype
        self.weights: dict[int, dict[str, Tensor]] = {}  # id of a block -> its frozen parameters, on the CPU
        for block in blocks:
            frozen = {name: p for name, p in block.named_parameters() if not p.requires_grad}
            for p in frozen.values():
                p.data = to_pinned_cpu(p.detach())
            if frozen:
                self.weights[id(block)] = {name: p.data for name, p in frozen.items()}
        self.copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.next_block: dict[tuple[int, int], int] = {}  # the last two blocks called -> the one that came next
        self.last_two = (0, 0)
        self.ahead: dict[int, dict[str, Tensor]] = {}  # the block to come -> its weights on `device`
        self.started: deque[torch.cuda.Event] = deque()  # of the blocks that the GPU may not have finished

    def __call__(self, block: nn.Module) -> Callable[..., Tensor]:
        """`block` as a function of its inputs that fetches its weights when it is called."""
        if id(block) not in self.weights:
            return block
        return lambda *inputs: torch.func.functional_call(block, self._fetch(id(block)), inputs)

    def _fetch(self, key: int) -> dict[str, Tensor]:
        """The weights of block `key` on `device`; the copy of the next block's begins."""
        weights = self.ahead.pop(key, None) or self._copy(key)
        self.next_block[self.last_two] = key
        self.last_two = (self.last_two[1], key)
        if self.copy_stream:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.copy_stream)
            for w in weights.values():
                w.record_stream(current)
            self.started.append(current.record_event())
            if len(self.started) > 2:  # else the CPU runs ahead and asks for all blocks' memory at once
                self.started.popleft().synchronize()
        coming = self.next_block.get(self.last_two)
        self.ahead = {coming: self._copy(coming)} if coming else {}
        return weights

    def _copy(self, key: int) -> dict[str, Tensor]:
        with torch.cuda.stream(self.copy_stream) if self.copy_stream else contextlib.nullcontext():
            return {
                name: torch.empty_like(w, device=self.device, dtype=self.compute_dtype).copy_(w, non_blocking=True)
                for name, w in self.weights[key].items()
            }
