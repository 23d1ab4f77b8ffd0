"""The gradient of a micro-batch as a CUDA graph: recorded once, then started as a whole.

A step of Stable Diffusion is some four thousand short operations. A fast GPU finishes each before Python has begun the
next one, and waits. A CUDA graph is a record of the operations with the places in memory that they read and write; to
start it takes one call:

    record    inputs (places that stay) --> forward and backward pass --> loss, gradients (places that stay)
    replay    copy a micro-batch to the inputs; start the record; read loss and gradients

What is recorded computes the same numbers, and reads the weights where the optimizer moves them. Python does not run at
a replay: a number that changes from step to step has to be a tensor of the batch, or it stays what it was. The record
keeps the memory of its activations, so nothing is recorded where memory is short (`is_recorded`), and the record is
given up while images are drawn. See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config

WARM_UPS = 2  # passes before the record: libraries and torch.compile prepare themselves, which cannot be recorded


def is_recorded(config: Config) -> bool:
    """Whether a run records the gradient: with CUDA, where activations are kept, weights and optimizer are in the GPU's
    memory, latents come from the cache, and all images have one size. `config` is resolved."""
    lean = config.gradient_checkpointing or config.optimizer_on_cpu or config.stream
    return "cuda" in config.device and config.cuda_graph and config.cache and not lean and not config.buckets


class GradientGraph:
    """`accumulate(batch, last)` as a CUDA graph: it adds the gradient of a micro-batch to `p.grad` of each of
    `parameters` and returns its part of the loss.

    The first batch is recorded. A batch of other shapes is computed without the graph. So are all batches if the record
    fails or finds no memory, which is said once.
    """

    def __init__(self, accumulate: Callable[[dict[str, Tensor], bool], Tensor], parameters: Iterable[nn.Parameter]):
        self.accumulate, self.parameters = accumulate, list(parameters)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None  # on which it is recorded, each time
        self.inputs: dict[str, Tensor] = {}
        self.loss: Tensor | None = None
        self.gradients: list[Tensor | None] = []  # where the graph writes them, for each of `parameters`
        self.impossible = False

    def __call__(self, batch: dict[str, Tensor], last: bool) -> Tensor:
        if self.graph is None and not self.impossible:
            self._try_to_record(batch)
        if self.graph is None or shapes(batch) != shapes(self.inputs):
            return self.accumulate(batch, last)
        for name, place in self.inputs.items():
            place.copy_(batch[name])
        before = [p.grad.clone() if p.grad is g and g is not None else p.grad for p, g in self._pairs()]
        self.graph.replay()
        for (p, g), sum_before in zip(self._pairs(), before, strict=True):
            p.grad = g if sum_before is None else sum_before if g is None else sum_before.add_(g)
        return self.loss

    def release(self) -> None:
        """Free the memory of the record. The next call records anew."""
        if self.graph is not None:
            self.graph, self.inputs, self.loss, self.gradients = None, {}, None, []
            torch.cuda.empty_cache()

    def _pairs(self) -> Iterable[tuple[nn.Parameter, Tensor | None]]:
        return zip(self.parameters, self.gradients, strict=True)

    def _try_to_record(self, batch: dict[str, Tensor]) -> None:
        kept = [p.grad for p in self.parameters]
        try:
            self._record({name: t.clone() for name, t in batch.items()})
        except RuntimeError as e:  # torch.OutOfMemoryError too: without the record the step may have room
            self.impossible, reason = True, str(e.__context__ or e).strip().partition("\n")[0]
            tqdm.write(
                "the step cannot be recorded as a CUDA graph, and is computed without one, as by --no-cuda-graph "
                f"({reason})"
            )
        for p, grad in zip(self.parameters, kept, strict=True):
            p.grad = grad

    def _record(self, inputs: dict[str, Tensor]) -> None:
        device = next(iter(inputs.values())).device
        self.stream, graph = self.stream or torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # what another stream has freed cannot be used on this one
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                self._forget_gradients()
                self.accumulate(inputs, True)
            self._forget_gradients()  # the pass that is recorded makes new ones, in the memory of the graph
            # thread_local: the thread that pins batches in memory may go on
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                loss = self.accumulate(inputs, True)
        torch.cuda.current_stream(device).wait_stream(self.stream)
        self.graph, self.inputs, self.loss = graph, inputs, loss
        self.gradients = [p.grad for p in self.parameters]

    def _forget_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None


def shapes(batch: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of a batch."""
    return {name: (t.shape, t.dtype) for name, t in batch.items()}
