"""Where the optimizer works: beside the model, or on the CPU with fp32 copies of the trained weights.

Trained in fp32, a weight takes 16 bytes: the weight, its gradient and AdamW's two moments. With the optimizer on the
CPU (as in ZeRO-Offload, Ren et al. 2021, arXiv:2101.06840) only the weight stays on the GPU, in the model's precision:

    GPU   weights --forward, backward--> gradient of a weight                              weights
                                             | as soon as it is complete                      ^
    CPU                                      +--> gradients --clip--> AdamW --> fp32 masters -+

`OptimizerInPlace` and `OptimizerOnCPU` have one interface, so the training loop does not ask which it has.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_cpu_storages: weakref.WeakSet = weakref.WeakSet()  # storages that stay in the CPU's memory on purpose


def to_pinned_cpu(t: Tensor) -> Tensor:
    """A copy of `t` in the CPU's memory, pinned where there is a GPU, so that copies between the two need not wait."""
    pinned = torch.cuda.is_available() and not is_fake(t)
    copy = torch.empty_like(t, device="cpu", pin_memory=pinned).copy_(t)
    _cpu_storages.add(copy.untyped_storage())
    return copy


def is_kept_on_cpu(t: Tensor) -> bool:
    """Whether `t` was made by `to_pinned_cpu`, and so must not move to the GPU."""
    return t.untyped_storage() in _cpu_storages


def is_fake(t: Tensor) -> bool:
    """Whether `t` is a fake tensor, with which the memory of a step is predicted."""
    return isinstance(t.data, FakeTensor)


class OptimizerInPlace:
    """The optimizer moves the weights with which the model computes.

    masters: name -> parameter that the optimizer moves (here the model's own).
    device: where the loss must be for the backward pass.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter], device: torch.device | str):
        self.masters, self.device = dict(trainable), torch.device(device)

    def offload_grads(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait_for_grads(self) -> None:
        pass

    def upload_weights(self) -> None:
        pass


class OptimizerOnCPU:
    """The optimizer moves fp32 copies of the trained weights on the CPU.

    masters: name -> fp32 copy, with the gradient that the optimizer uses.
    device: the CPU, where the loss must be for the backward pass: the gradient scaler multiplies the loss and divides
        the gradients by the same tensor.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter]):
        self.trainable, self.device = trainable, torch.device("cpu")
        self.masters = {name: nn.Parameter(to_pinned_cpu(p.detach().float())) for name, p in trainable.items()}
        self._grads = {name: to_pinned_cpu(torch.zeros_like(p)) for name, p in self.masters.items()}
        self._copy_stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def offload_grads(self, last: bool) -> Iterator[None]:
        """While entered, every gradient is copied to the CPU as soon as it is complete, and freed on the GPU.

        A gradient is complete in the `last` backward pass of a step only; before, nothing happens.
        """
        hooks = []
        for name, p in self.trainable.items() if last else ():
            hooks.append(p.register_post_accumulate_grad_hook(lambda p, name=name: self._move_grad(name, p)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _move_grad(self, name: str, p: nn.Parameter) -> None:
        if p.is_cuda:  # copy beside the computation, which need not wait
            self._copy_stream = self._copy_stream or torch.cuda.Stream(p.device)
            self._copy_stream.wait_stream(torch.cuda.current_stream(p.device))
            p.grad.record_stream(self._copy_stream)
        with torch.cuda.stream(self._copy_stream) if self._copy_stream else contextlib.nullcontext():
            self._grads[name].copy_(p.grad, non_blocking=True)
        self.masters[name].grad = self._grads[name]
        p.grad = None

    def wait_for_grads(self) -> None:
        """Copy gradients that are still on the GPU, and wait until all are on the CPU: clipping needs their norm."""
        for name, p in self.trainable.items():
            if p.grad is not None:
                self._move_grad(name, p)
        if self._copy_stream:
            self._copy_stream.synchronize()

    @torch.no_grad()
    def upload_weights(self) -> None:
        """Copy the masters to the model's weights, which round them to their own precision on the GPU."""
        for name, p in self.trainable.items():
            p.copy_(self.masters[name].to(p.device, non_blocking=True))
