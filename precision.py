"""Number formats: which there are, what a device computes in, and what happens to numbers that overflow.

float16 and bfloat16 have 16 bits. float16 has the finer steps and ends at 65504; bfloat16 reaches as far as float32.
"""

import torch
from torch import Tensor

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_tf32(on: bool) -> None:
    """Let a GPU round the factors of float32 products to 10 bits of mantissa, or not. A setting of the process."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def compute_dtype_for(precision: str, device: torch.device | str) -> torch.dtype:
    """The dtype in which `device` computes where weights are kept in PRECISIONS[precision].

    The two dtypes are equal, except on a CPU without instructions for the short one: that CPU computes in float32,
    since it would take a hundred times as long with bfloat16 or float16.
    """
    dtype = PRECISIONS[precision]
    probes = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if torch.device(device).type != "cpu" or dtype not in probes:
        return dtype
    supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, probes[dtype])()
    return dtype if supported else torch.float32


class NotFiniteError(ValueError):
    """Numbers that overflowed where none may; the message says which, and what to do."""


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are finite. Tensors without content (of memory predictions, on the meta device) are."""
    return type(x) is not Tensor or x.is_meta or bool(torch.isfinite(x).all())


def check_finite(x: Tensor, what: str) -> None:
    """Raise NotFiniteError, which begins with `what`, unless all numbers of `x` are finite."""
    if is_finite(x):
        return
    causes = {torch.float16: "float16 ends at 65504, which was passed; --precision bf16 or fp32 reaches further"}
    cause = causes.get(x.dtype, "the weights or what they were given are damaged, or training diverged")
    raise NotFiniteError(f"{what} ({str(x.dtype).removeprefix('torch.')}): not finite; {cause}")
