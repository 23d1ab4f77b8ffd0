"""The bricks of the models: PyTorch's layers, with the same numbers, that keep less memory or run faster.

Every difference from PyTorch's own layer has one of three reasons:

    precision   A layer casts its own weights to the dtype of its input. Weights that train stay in float32 while the
                step computes in bfloat16, and the cast carries their gradient back to float32.
    memory      Autograd keeps the input of a convolution even where the weights are frozen and nobody will ask for
                their gradient; `Conv2d` does not. `GatedGELU` keeps its input alone. `checkpointed` keeps only the
                inputs of a whole block and computes the block again in the backward pass.
    speed       On a CPU some convolutions are faster as one product of matrices (`Conv3x3`, `Conv1x1`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero, so that it starts as the function 0. Returns the module."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def config_repr(*later: str) -> Callable[[Any], str]:
    """The `__repr__` of a configuration (a dataclass), as dataclasses write it, but without those of the fields `later`
    that have their default: caches and runs are known by a digest of this text, also those from before these fields."""

    def text(self: Any) -> str:
        fields = [f for f in dataclasses.fields(self) if f.name not in later or getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"

    return text


class Addition(nn.Module):
    """Base class for modules that Stable Diffusion's files do not have: a LoRA, the embedding of a second condition.

    Built inside of one of the models, an Addition is part of every model of that kind: it trains if
    `training.setup.select_trainable` names its parameters, is saved with a run and loaded with it. A file without its
    weights is no error; they start as `reset_parameters` sets them, from the seed of the model's source.
    """

    def reset_parameters(self) -> None:
        """Initialise all parameters, also those of children."""
        raise NotImplementedError


def checkpointed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, keeping only `inputs` for the backward pass, which computes the function a second time.

    Gradient checkpointing: Chen et al. 2016 (arXiv:1604.06174). The function must not draw random numbers.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


# ----------------------------------------------------------------------------- layers that cast their own weights
def _cast(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight or bias in the dtype of the input `x`; the parameter itself where the dtypes agree."""
    return None if parameter is None else parameter.to(x.dtype)


class Linear(nn.Linear):
    """(...,in_features) -> (...,out_features)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _cast(self.weight, x), _cast(self.bias, x))


class GroupNorm(nn.GroupNorm):
    """(B,C,h,w) -> (B,C,h,w)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, _cast(self.weight, x), _cast(self.bias, x), self.eps)


class LayerNorm(nn.LayerNorm):
    """(...,C) -> (...,C)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, _cast(self.weight, x), _cast(self.bias, x), self.eps)


class _FrozenConv2d(torch.autograd.Function):
    """A convolution whose weights do not train. The gradient of its input needs the weights alone, so the input is not
    kept. (PyTorch keeps the input, which only the gradient of the weights would need.)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (input_shape, stride, padding) = ctx.saved_tensors, ctx.geometry
        return nn.grad.conv2d_input(input_shape, weight, grad, stride, padding), None, None, None, None


class Conv2d(nn.Conv2d):
    """A convolution that keeps its input for the backward pass only if its weights train."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _cast(self.weight, x), _cast(self.bias, x)
        if x.requires_grad and not (weight.requires_grad or bias.requires_grad):
            return _FrozenConv2d.apply(x, weight, bias, self.stride, self.padding)
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class Conv3x3(Conv2d):
    """A 3x3 convolution over an image with a border of zeros. (B,c_in,h,w) -> (B,c_out,h/stride,w/stride)

    On a CPU a convolution from a small map to many channels is computed as one product of matrices: the unfolded input
    (what the kernel covers at each position) is then smaller than the weights, which a convolution routine would first
    copy into a memory order of its own.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__(c_in, c_out, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = (-(-side // self.stride[0]) for side in x.shape[2:])  # of the output
        small = 2 * len(x) * h * w < self.out_channels
        if not (small and x.device.type == "cpu" and self.weight.is_contiguous()):
            return super().forward(x)
        columns = F.unfold(x, 3, padding=1, stride=self.stride).transpose(0, 1).flatten(1)  # (9*c_in,B*h*w)
        weight, bias = _cast(self.weight, x), _cast(self.bias, x)
        out = torch.addmm(bias[:, None], weight.flatten(1), columns)  # BLAS is fastest with the weights on the left
        return out.unflatten(1, (len(x), h, w)).transpose(0, 1)


class Conv1x1(Conv2d):
    """A 1x1 convolution: the same linear map of the channels at every position. (B,c_in,h,w) -> (B,c_out,h,w)

    On a CPU and without gradients it is computed as a product of matrices, which on small maps takes a third of the
    time. (With gradients every sample of the batch would make a weight gradient of its own.)
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        weight, bias = _cast(self.weight, x).flatten(1), _cast(self.bias, x)
        if x.is_contiguous(memory_format=torch.channels_last):
            return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
        weight = weight.expand(len(x), -1, -1)
        return torch.baddbmm(bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


# ------------------------------------------------------------------------------------------------------------- gate
class GatedGELU(torch.autograd.Function):
    """(...,2C) -> (...,C): the first half times the exact GELU of the second half.

    Only the input is kept; the backward pass computes the GELU a second time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        if torch.compiler.is_compiling():  # which cannot write into a part of a tensor, and fuses these operations
            return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1)
        grad_x = torch.empty_like(x)
        grad_value, grad_gate = grad_x.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=grad_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return grad_x
