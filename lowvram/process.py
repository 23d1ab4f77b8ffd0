"""The memory of this process: how much it held at most, and what it does with memory that it has freed."""

import contextlib
import ctypes
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def disable_malloc_trim() -> None:
    """Keep freed memory in this process instead of returning it to the system.

    By default the GNU C library returns every large block at once, and the system hands it out again, page by page and
    zeroed, in the next step: a quarter of the time of a step of Stable Diffusion's size on the CPU. Systems without
    `mallopt(3)` are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
        mallopt(M_MMAP_MAX, 0)  # take large blocks from the heap too


def peak_memory(device: torch.device | str) -> str:
    """The most memory that this process has used so far, in words: of the GPU if `device` is one, with what PyTorch
    keeps there for later and for a CUDA graph; else of the CPU."""
    return f"{peak_gib(device):.1f} GiB"


def peak_gib(device: torch.device | str) -> float:
    """`peak_memory` as a number, in GiB; NaN for a CPU on Windows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return peak_resident()


def peak_resident() -> float:
    """The most CPU memory, in GiB, that this process has held so far; NaN on Windows, which does not tell."""
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
