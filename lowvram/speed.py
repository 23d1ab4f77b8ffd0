"""How fast is a step on a GPU? Reckoned from what the step computes and moves, without making it.

The roofline (Williams et al. 2009, doi:10.1145/1498765.1498785): an operation takes as long as its arithmetic does at
the rate of the GPU's processors, or its reading and writing at the rate of the GPU's memory, whichever is longer; and
never less than the GPU takes to begin an operation. The operations of a step are noted while its memory is predicted
(`lowvram/prediction.py`); a `Machine` says the rates.

    GPU    sum over operations of max(FLOPs / rate of the number format, bytes / rate of the memory, begin)
    link   bytes of streamed weights and offloaded gradients / rate of the link; the GPU computes meanwhile
    CPU    bytes of an optimizer on the CPU / rate of its memory; the GPU waits

    seconds of a step = max(GPU, link) + CPU

The order of presets comes out right where their differences are large (recomputation, the link, fp32 products); seconds
do not, since kernels reach a half to nine tenths of these rates.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ldm import PRECISIONS, use_tf32
from lowvram.offload import is_kept_on_cpu

aten = torch.ops.aten
# How fake tensors, which are on the CPU, attend: the number of matrix products, and which argument the queries are.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: (2, 0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (5, 1),
}
COPIES = (aten.copy_, aten._to_copy)


# ---------------------------------------------------------------------------------------------------------- machines
@dataclass(frozen=True)
class Machine:
    """The rates of a GPU and of the computer around it."""

    name: str
    flops: dict[str, float]  # precision -> operations a second in products of large matrices
    memory: float  # bytes a second that the GPU's memory reads and writes
    link: float  # bytes a second between the CPU's memory and the GPU's
    cpu_memory: float  # bytes a second that the CPU's memory reads and writes
    begin: float = 5e-6  # seconds that the shortest operation takes


# For a plan without a GPU: NVIDIA's figures of a card of the middle, which many have. Ratios matter here, not seconds.
COMMON = Machine(
    "RTX 3060", dict(fp32=12.7e12, tf32=12.7e12, bf16=25.5e12, fp16=25.5e12), memory=360e9, link=12e9, cpu_memory=25e9
)


def measure_machine(device: str) -> Machine:
    """The rates of the GPU `device`, measured in some seconds."""
    cuda = torch.device(device).type == "cuda"
    side, count = (8192, 1 << 28) if cuda else (256, 1 << 20)
    wait = (lambda: torch.cuda.synchronize(device)) if cuda else lambda: None
    flops = {}
    for precision in PRECISIONS:
        use_tf32(precision == "tf32")
        a, b = (torch.randn(side, side, device=device).to(PRECISIONS[precision]) for _ in range(2))
        flops[precision] = 2 * side**3 / shortest(lambda: a @ b, wait)  # noqa: B023
    use_tf32(False)
    here, there = (torch.empty(count, dtype=torch.uint8, device=where) for where in ("cpu", device))
    here = here.pin_memory() if cuda else here
    other, few = torch.empty_like(there), torch.zeros(16, device=device)
    return Machine(
        torch.cuda.get_device_name(device) if cuda else "this CPU",
        flops,
        memory=2 * count / shortest(lambda: other.copy_(there), wait),
        link=count / shortest(lambda: there.copy_(here), wait),
        cpu_memory=2 * count / shortest(lambda: here.clone(), wait),
        begin=shortest(lambda: [few.add_(1) for _ in range(1000)], wait) / 1000,
    )


def shortest(function: Callable[[], Any], wait: Callable[[], None], repeat: int = 4) -> float:
    """Seconds of the shortest of some calls of `function`, the first aside; `wait` waits for the device."""
    seconds = []
    for _ in range(repeat):
        wait()
        start = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - start)
    return max(min(seconds[1:]), 1e-9)


# -------------------------------------------------------------------------------------------------------------- work
class Operation(NamedTuple):
    """What an operation computes and moves, and how often a step has it."""

    place: str  # "gpu", "link" (a copy between CPU and GPU) or "cpu"
    dtype: torch.dtype  # of its floating-point inputs
    flops: float  # of matrix products, convolutions and attention
    bytes: float  # that are read and written
    times: float = 1.0


def operation(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Operation | None:
    """What `out = func(*args, **kwargs)`, an operation of PyTorch, computed and moved; None for a view and for memory
    that was only reserved.

    Tensors that are kept on the CPU on purpose (`to_pinned_cpu`) tell copies between CPU and GPU, and what the CPU
    computes, from the rest.
    """
    inputs, outputs = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out))
    packet, known = func._overloadpacket, {t.untyped_storage()._cdata for t in inputs}
    made = [t for t in outputs if t.untyped_storage()._cdata not in known]
    if "empty" in func.name() or not (made or func._schema.is_mutable):
        return None
    is_copy, on_cpu = packet in COPIES, any(is_kept_on_cpu(t) for t in (*inputs, *made))
    moved = sum(t.nbytes for t in (*inputs, *made))
    if func._schema.is_mutable and not is_copy:  # reads and writes
        moved += sum(t.nbytes for t in inputs)
    elif is_copy and on_cpu:  # formats are changed where they need less
        moved = min(t.nbytes for t in (*inputs, *made))
    place = "gpu" if not on_cpu else "link" if is_copy else "cpu"
    dtype = next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)
    return Operation(place, dtype, flops_of(packet, args, kwargs, out), moved)


def flops_of(packet: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> float:
    """The floating-point operations of matrix products, convolutions and attention; 0 for everything else."""
    if packet in ATTENTION:
        products, first = ATTENTION[packet]
        q, k = args[first : first + 2]  # (B,heads,N,C), (B,heads,M,C)
        return products * 2 * math.prod(q.shape) * k.shape[2]
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def seconds(operations: Sequence[Operation], machine: Machine, precision: str) -> float:
    """The seconds of a step of these operations on `machine`. `precision`: that of the run; what stays in float32 is
    then multiplied as tf32, except in fp32 itself."""
    spent = dict.fromkeys(("gpu", "link", "cpu"), 0.0)
    half = precision if precision in ("bf16", "fp16") else "bf16"
    for o in operations:
        if o.place == "gpu":
            rate = machine.flops["fp32" if precision == "fp32" else "tf32" if o.dtype == torch.float32 else half]
            spent["gpu"] += o.times * max(o.flops / rate, o.bytes / machine.memory, machine.begin)
        else:
            spent[o.place] += o.times * o.bytes / (machine.link if o.place == "link" else machine.cpu_memory)
    return max(spent["gpu"], spent["link"]) + spent["cpu"]
