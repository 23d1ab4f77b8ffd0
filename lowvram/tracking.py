"""What is alive in a step, and what does the step compute? Counted while its operations run.

`MemoryTracker` sees every operation of PyTorch before and after it runs. On fake tensors, which have shapes and no
content, that predicts what a GPU would hold (`lowvram/prediction.py`); on real ones it measures.
"""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram.offload import is_kept_on_cpu
from lowvram.speed import Operation, operation


@dataclass
class Peak:
    """The most memory that was alive at once, in bytes, and its parts by kind; and what was computed on the way."""

    total: int = 0
    parts: Counter = field(default_factory=Counter)
    operations: list[Operation] = field(default_factory=list)


class MemoryTracker(TorchDispatchMode):
    """While entered, counts the bytes of the storages that are alive, by kind; `peak` is the most there was. Notes the
    operations; `times`: how often the step has those that come.

    known: kind -> tensors that exist already. Whatever is made is an "activation" until `label` says otherwise. Tensors
    that are kept on the CPU on purpose (`to_pinned_cpu`) do not count.
    """

    def __init__(self, known: Mapping[str, Iterable[Tensor]]):
        super().__init__()
        self.storages: dict[int, tuple[str, int]] = {}  # of each that is alive: kind, bytes
        self.live, self.peak = Counter(), Peak()
        self.operations, self.times = [], 1.0
        for kind, tensors in known.items():
            for t in tensors:
                self.label(t, kind)

    def label(self, t: Tensor, kind: str) -> None:
        """Count the storage of `t` as `kind`."""
        storage = t.untyped_storage()
        key = storage._cdata
        if is_kept_on_cpu(t) or (key in self.storages and self.storages[key][0] == kind):
            return
        size = -(-storage.nbytes() // 512) * 512  # CUDA's allocator gives multiples of 512 bytes
        if key in self.storages:
            self.live[self.storages[key][0]] -= size
        else:
            weakref.finalize(storage, self._freed, key)
        self.storages[key] = kind, size
        self.live[kind] += size
        total = sum(self.live.values())
        if total > self.peak.total:
            self.peak = Peak(total, Counter(self.live))

    def _freed(self, key: int) -> None:
        kind, size = self.storages.pop(key)
        self.live[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # half of all calls
            return out
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.storages:
                self.label(t, "activations")
        if done := operation(func, args, kwargs, out):
            self.operations.append(done._replace(times=self.times))
        return out


def measure(function: Callable[[MemoryTracker], None], known: Mapping[str, Iterable[Tensor]]) -> Peak:
    """The peak memory of `function`, which is given the tracker to label what it makes.

    known: kind -> tensors that exist before. With fake tensors nothing is computed and nothing is allocated.
    """
    tracker = MemoryTracker(known)
    with tracker:
        function(tracker)
    return dataclasses.replace(tracker.peak, operations=tracker.operations)
