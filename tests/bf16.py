"""Train as train.py does, with what a GPU's bfloat16 would compute: `python tests/bf16.py [train.py's flags]`.

For CPUs without instructions for bfloat16, which take a hundred times as long with it. Products (convolutions,
matrices, attention) are computed as tensor cores do: factors of 8 bits (but attention's weights, within it), sums in
float32, one rounding of what comes out. All else in bfloat16 is PyTorch's own.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import ldm
import lowvram.estimate
import train
import training.setup

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten.convolution_backward.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}  # fmt: skip


class TensorCores(TorchDispatchMode):
    """While it is entered, products of bfloat16 tensors are summed in float32 and rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        short = lambda x: isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16
        if func not in PRODUCTS or not any(map(short, args)):
            return func(*args, **kwargs)
        long = lambda x: x.float() if short(x) else x
        kept = 1 if "attention" in func.__name__ and "backward" not in func.__name__ else None  # logsumexp is float32
        out = func(*map(long, args), **{k: long(v) for k, v in kwargs.items()})
        if isinstance(out, torch.Tensor):
            return out.bfloat16()
        return tuple(x if i == kept or x is None else x.bfloat16() for i, x in enumerate(out))


def main(argv: list[str] | None = None) -> None:
    for module in (lowvram.estimate, train, training.setup):
        module.compute_dtype_for = lambda name, device: ldm.PRECISIONS[name]
    with TensorCores():
        train.main(argv)


if __name__ == "__main__":
    main()
