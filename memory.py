"""How does it fit a small GPU?

A ControlNet for Stable Diffusion 1.5 has 361 M weights. Trained in the plain way each takes 16 bytes: itself, its
gradient, AdamW's two moments, all fp32; beside them lies the frozen UNet, 860 M weights, and what the way back needs of
the way there. This module has what makes each of these smaller, and what tells beforehand how large they will be:

    AdamW      moments in 8 or 16 bits a number, weights in bfloat16 with stochastic rounding
    Offload    fp32 weights, moments and the optimizer's step on the CPU; gradients travel while they are made
    Stream     frozen blocks stay in the CPU's memory and come over one ahead of their use
    measure    the peak memory of a step, from fake tensors: no GPU, no weights

The other two tricks, computing again instead of keeping and attention in slices, are in `unet.py` (`again`). The
moments follow Dettmers et al. 2022 (arXiv:2110.02861) in their blocks, not in their code; see `Code`.
"""

import contextlib
import ctypes
import hashlib
import resource
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.adamw import adamw
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
BLOCK = 256  # numbers that share a scale
SMALL = 4096  # moments of tensors with fewer numbers stay fp32: nothing to win, and norms' weights matter


# ------------------------------------------------------------------------------------------------- 8 bits for a number
@dataclass(frozen=True)
class Code:
    """How numbers are kept in 8 bits: as float16 with the exponent and the first three bits of the mantissa alone.

    The largest magnitude of a block becomes `largest`. With 1, the exponent's first bit is always 0; the sign takes its
    place. Numbers without a sign can have the whole exponent.
    """

    dtype: torch.dtype
    largest: float


FIRST = Code(torch.int8, 1.0)  # the mean of gradients: +-6%, down to 14 octaves below the largest, from 18 on 0
SECOND = Code(torch.uint8, 2.0**15)  # of their squares: 29 octaves, and none below
DROPPED = 7  # bits of a float16's mantissa that are not kept
SIGN = 1 << 14  # where int8 looks for it when those are gone
DROPPED_32 = 20  # bits of a float32's mantissa that are not kept
DROPPED_16 = 16  # the same when it becomes a bfloat16
OFFSET = 112 << 23  # what exponents of float32 are above those of float16
NORMAL = 8  # the lowest code of a float16 that is not subnormal


def in_blocks(x: Tensor) -> Tensor:
    """(n,) -> (n/256,256), filled up with zeros."""
    return (nn.functional.pad(x, (0, -x.numel() % BLOCK)) if x.numel() % BLOCK else x).view(-1, BLOCK)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """First moments, float32 (n,) -> their codes (n,) int8 and the largest magnitude of each block of 256, float32."""
    blocks = in_blocks(x)
    scale = torch.maximum(blocks.amax(1), -blocks.amin(1))
    half = (blocks * (FIRST.largest / scale.clamp(min=1e-30))[:, None]).half()
    bits = half.view(-1)[: x.numel()].view(torch.int16)
    bits.sub_(bits >> 15, alpha=SIGN)  # of a negative number -1
    return bits.add_(1 << DROPPED - 1).bitwise_right_shift_(DROPPED).to(FIRST.dtype), scale


def quantize_squares(x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same of second moments, which have no sign: codes uint8.

    With `noise`, random int32 (n,) in [0, 2^20), they are rounded up or down so that the mean is right. They change by
    a thousandth a step, which rounding to the nearest of levels 12% apart would never let happen; nor would float16 on
    the way. Nor are they rounded to zero: they are divided by.
    """
    blocks = in_blocks(x)
    scale = blocks.amax(1)
    bits = (blocks * (SECOND.largest / scale.clamp(min=1e-30))[:, None]).view(-1)[: x.numel()].view(torch.int32)
    bits.add_(1 << DROPPED_32 - 1 if noise is None else noise).sub_(OFFSET).bitwise_right_shift_(DROPPED_32)
    return bits.clamp_(min=NORMAL).to(SECOND.dtype), scale


def dequantize(codes: Tensor, scale: Tensor, code: Code) -> Tensor:
    """What was kept of moments, (n,) float32."""
    bits = codes.short().mul_(1 << DROPPED)
    half = (bits.bitwise_and_(~SIGN) if code is FIRST else bits).view(torch.float16)
    return in_blocks(half.float()).mul_((scale / code.largest)[:, None]).view(-1)[: codes.numel()]


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down with probabilities that make the mean right.

    Rounding to the nearest would lose every update below a 256th of the weight, which at a rate of 1e-5 is all of them.
    """
    bits = x.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=x.device, dtype=torch.int32)
    rounded = ((bits + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in less memory: PyTorch's, on moments kept in another way.

    `named`: the parameters by name; those in bfloat16 are rounded stochastically; gradients may have any precision.
    `bits` of a moment: 8 (and 4 bytes a block of 256), 16 (bfloat16) or 32. What is random is a function of seed, step
    and name, so a run that is resumed rounds as one that was not stopped. Moments are kept flat, in the order of the
    shape, and updated in pieces, so that what is in between takes no memory to speak of.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], lr: float, weight_decay: float = 0.01, bits: int = 8, seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    ):  # fmt: skip
        super().__init__(named.values(), dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.names, self.bits, self.seed = {id(p): name for name, p in named.items()}, bits, seed
        self.drawn: tuple = (0, None)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, **{k: group[k] for k in ("lr", "weight_decay", "betas", "eps")})

    def begin(self, p: nn.Parameter) -> None:
        """Make the state of a parameter that has none."""
        if not self.state[p]:
            self.state[p] |= {"step": 0} | new_moments(p.numel(), p.device, self.bits)

    def update(self, p: nn.Parameter, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> None:
        """The step of one parameter."""
        self.begin(p)
        state = self.state[p]
        t = state["step"] = int(state["step"]) + 1
        noise = self.noise(t, p.device) if self.bits != 32 else None
        brain = p.dtype == torch.bfloat16
        generator = generator_for(p.device, self.seed, t, self.names[id(p)]) if brain else None
        weights, gradient, piece = p.detach().reshape(-1), p.grad.reshape(-1), piece_on(p.device)
        for start in range(0, p.numel(), piece):
            part = slice(start, min(start + piece, p.numel()))
            g, w = gradient[part].float(), weights[part].float()
            m, v = read(state, "exp_avg", part), read(state, "exp_avg_sq", part)
            done = torch.full((), t - 1.0, device=p.device)  # steps
            adamw(
                [w], [g], [m], [v], [], [done], fused=True, amsgrad=False, maximize=False, lr=lr,
                weight_decay=weight_decay, beta1=betas[0], beta2=betas[1], eps=eps,
            )  # fmt: skip
            write(state, "exp_avg", part, m)
            write(state, "exp_avg_sq", part, v, noise)
            if brain:
                weights[part] = round_stochastically(w, generator)
        if not p.is_contiguous():  # its order in memory is not that of the shape: they were a copy
            p.copy_(weights.view(p.shape))

    def noise(self, t: int, device: torch.device) -> Tensor:
        """The random numbers of step `t` that second moments are rounded with: the same for every piece, which does no
        harm, since what is rounded is another."""
        if self.drawn[:2] != (t, device):
            generator, dropped = generator_for(device, self.seed, t), DROPPED_32 if self.bits == 8 else DROPPED_16
            shape = (piece_on(device),)
            made = torch.randint(1 << dropped, shape, generator=generator, device=device, dtype=torch.int32)
            self.drawn = t, device, made
        return self.drawn[2]


def piece_on(device: torch.device) -> int:
    """How many numbers AdamW updates at once: what the cache of a CPU holds; more where each call costs more."""
    return 1 << (19 if device.type == "cpu" else 23)


def generator_for(device: torch.device, *parts: object) -> torch.Generator:
    """Random numbers that are a function of `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


CODES = {"exp_avg": FIRST, "exp_avg_sq": SECOND}  # AdamW's moments, in torch's names, and how they are coded


def new_moments(count: int, device: torch.device, bits: int) -> dict[str, Tensor]:
    """The moments of `count` numbers before the first step: fp32, with `bits` 16 bfloat16, with 8 codes and scales."""
    if bits != 8 or count < SMALL:
        dtype = torch.bfloat16 if bits == 16 and count >= SMALL else torch.float32
        return {name: torch.zeros(count, dtype=dtype, device=device) for name in CODES}
    codes = {f"{name}.bits": torch.zeros(count, dtype=code.dtype, device=device) for name, code in CODES.items()}
    return codes | {f"{name}.scale": torch.zeros(-(-count // BLOCK), device=device) for name in CODES}


def read(state: Mapping[str, Tensor], name: str, part: slice) -> Tensor:
    """Numbers `part` (from a multiple of 256) of a moment, float32: a view, or what is kept of them."""
    if name in state:
        return state[name][part].float()
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    return dequantize(state[f"{name}.bits"][part], state[f"{name}.scale"][blocks], CODES[name])


def write(state: Mapping[str, Tensor], name: str, part: slice, x: Tensor, noise: Tensor | None = None) -> None:
    """Put numbers `part` of a moment back as it is kept; what is kept in fp32 was changed in place. With `noise`,
    random int32 as wide as the bits that are dropped, second moments are rounded stochastically, and `x` is lost."""
    second, kept = CODES[name] is SECOND, state.get(name)
    noise = noise[: len(x)] if second and noise is not None else None
    if kept is None:
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        codes, scale = quantize_squares(x, noise) if second else quantize(x)
        state[f"{name}.bits"][part], state[f"{name}.scale"][blocks] = codes, scale
    elif kept.dtype == torch.bfloat16 and noise is not None:
        kept.view(torch.int16)[part] = x.view(torch.int32).add_(noise).bitwise_right_shift_(DROPPED_16)
    elif kept.dtype == torch.bfloat16:
        kept[part] = x


def adopt(saved: Mapping[str, Tensor], p: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A parameter's state from a checkpoint, in the form that `optimizer` keeps it, whichever form it was saved in: to
    the bit where that is the same."""
    whole = slice(0, p.numel())
    saved = {k: v.reshape(-1).to(p.device) for k, v in saved.items()}
    if not isinstance(optimizer, AdamW):  # torch's: in the parameter's shape and memory order
        plain = {k: torch.empty_like(p, dtype=torch.float32).copy_(read(saved, k, whole).view(p.shape)) for k in CODES}
        return {"step": saved["step"].reshape(()).clone()} | plain
    state = new_moments(p.numel(), p.device, optimizer.bits)
    for name in CODES:
        if name in state:
            state[name].copy_(read(saved, name, whole))
        elif name in saved:
            write(state, name, whole, saved[name])
        else:
            state |= {k: saved[k].clone() for k in (f"{name}.bits", f"{name}.scale")}
    return {"step": int(saved["step"])} | state


# ---------------------------------------------------------------------------------------------------------- CPU memory
def keep_freed() -> None:
    """Let this process keep the memory that it frees. By default the GNU C library returns every large block to the
    system, which fetches it again, page by page and zeroed, in the next step: a quarter of a step of Stable Diffusion's
    size on the CPU. (`mallopt(3)`; where there is none nothing happens.)"""
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)  # never shrink the heap
        mallopt(mmap_max, 0)  # and take large blocks from it too


def host(t: Tensor) -> Tensor:
    """A copy of `t` in the CPU's memory, pinned where there is a GPU, so that copies to and fro need not wait."""
    pinned = torch.cuda.is_available() and not is_fake(t)
    copy = torch.empty_like(t, device="cpu", pin_memory=pinned).copy_(t)
    on_host.add(copy.untyped_storage())
    return copy


def is_fake(t: Tensor) -> bool:
    """Is it one of those with which `measure` computes nothing?"""
    return isinstance(t.data, FakeTensor)


def is_on_host(t: Tensor) -> bool:
    """Is it a tensor that `host` made?"""
    return t.untyped_storage() in on_host


on_host: weakref.WeakSet = weakref.WeakSet()  # storages that lie in the CPU's memory by intent


class Offload:
    """The optimizer's home on the CPU: an fp32 copy (`masters`, by name) of what trains, and its gradient.

    During the last backward of a step (`arriving`) every gradient travels as soon as it is whole, and is freed where it
    was made. The update waits for all of them, since clipping needs their norm; `send` brings the new weights back.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]):
        self.trained, self.side = trained, None
        self.masters = {name: nn.Parameter(host(p.detach().float())) for name, p in trained.items()}
        self.grads = {name: host(torch.zeros_like(p)) for name, p in self.masters.items()}

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """While it is entered, gradients go to the CPU as they are made."""
        hooks = []
        for name, p in self.trained.items():
            hooks.append(p.register_post_accumulate_grad_hook(lambda p, name=name: self._take(name, p)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, name: str, p: nn.Parameter) -> None:
        if p.is_cuda:  # beside the computation, which need not wait
            self.side = self.side or torch.cuda.Stream(p.device)
            self.side.wait_stream(torch.cuda.current_stream(p.device))
            p.grad.record_stream(self.side)
        with torch.cuda.stream(self.side) if self.side else contextlib.nullcontext():
            self.grads[name].copy_(p.grad, non_blocking=True)
        self.masters[name].grad = self.grads[name]
        p.grad = None

    def arrive(self) -> None:
        """Bring what has not travelled yet, and wait until all is there."""
        for name, p in self.trained.items():
            if p.grad is not None:
                self._take(name, p)
        if self.side:
            self.side.synchronize()

    @torch.no_grad()
    def send(self) -> None:
        """The weights go back to where the model computes, and take the precision that they have there, there."""
        for name, p in self.trained.items():
            p.copy_(self.masters[name].to(p.device, non_blocking=True))


class Stream:
    """Frozen blocks whose weights stay in the CPU's memory. As `fetch` of a UNet: block -> how to call it in `compute`.

    When a block is called, its weights come over, and beside its computation those of the block that came next the last
    time the same two blocks were called in a row: after one step it knows the way down, up and, with gradient
    checkpointing, back. Weights are held for their block's own computation alone, so the way back has to compute its
    blocks again: streaming needs gradient checkpointing.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device | str, compute: torch.dtype):
        self.device, self.compute = torch.device(device), compute
        self.blocks = {id(block): block for block in blocks}
        self.weights = {}
        for key, block in self.blocks.items():
            self.weights[key] = {name: host(p.detach()) for name, p in block.named_parameters()}
            for name, p in block.named_parameters():
                p.data = self.weights[key][name]
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.follows: dict[tuple[int, int], int] = {}
        self.last = (0, 0)
        self.ahead: dict[int, dict[str, Tensor]] = {}
        self.begun: deque[torch.cuda.Event] = deque()  # of the blocks that the GPU may not have finished

    def __call__(self, block: nn.Module) -> Callable[..., Tensor]:
        if id(block) not in self.blocks:
            return block
        return lambda *inputs: torch.func.functional_call(block, self._take(id(block)), inputs)

    def _take(self, key: int) -> dict[str, Tensor]:
        weights = self.ahead.pop(key, None) or self._bring(key)
        self.follows[self.last] = key
        self.last = (self.last[1], key)
        if self.side:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.side)
            for w in weights.values():
                w.record_stream(current)
            self.begun.append(current.record_event())
            if len(self.begun) > 2:  # else the CPU runs ahead and asks for all blocks' memory at once
                self.begun.popleft().synchronize()
        coming = self.follows.get(self.last)
        self.ahead = {coming: self._bring(coming)} if coming else {}
        return weights

    def _bring(self, key: int) -> dict[str, Tensor]:
        with torch.cuda.stream(self.side) if self.side else contextlib.nullcontext():
            return {k: torch.empty_like(w, device=self.device, dtype=self.compute).copy_(w, non_blocking=True)
                    for k, w in self.weights[key].items()}  # fmt: skip


# ------------------------------------------------------------------------------------------------- what will it take?
@dataclass
class Peak:
    """The most memory that was live at once, in bytes, and what it consisted of."""

    total: int = 0
    parts: Counter = field(default_factory=Counter)


class Live(TorchDispatchMode):
    """While it is entered, counts the storages that are alive, by kind; `peak` is the most there was.

    `known`: kind -> tensors that exist already. What is made is an "activation", until `label` says otherwise. What
    lies in the CPU's memory by intent (`host`) does not count.
    """

    def __init__(self, known: Mapping[str, Iterable[Tensor]]):
        super().__init__()
        self.kinds: dict[int, tuple[str, int]] = {}
        self.live, self.peak = Counter(), Peak()
        for kind, tensors in known.items():
            for t in tensors:
                self.label(t, kind)

    def label(self, t: Tensor, kind: str) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if is_on_host(t) or (key in self.kinds and self.kinds[key][0] == kind):
            return
        size = -(-storage.nbytes() // 512) * 512  # CUDA's allocator gives multiples of 512 bytes
        if key in self.kinds:
            self.live[self.kinds[key][0]] -= size
        else:
            weakref.finalize(storage, self._gone, key)
        self.kinds[key] = kind, size
        self.live[kind] += size
        total = sum(self.live.values())
        if total > self.peak.total:
            self.peak = Peak(total, Counter(self.live))

    def _gone(self, key: int) -> None:
        kind, size = self.kinds.pop(key)
        self.live[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.kinds:
                self.label(t, "activations")
        return out


def measure(function: Callable[[Live], None], known: Mapping[str, Iterable[Tensor]]) -> Peak:
    """The peak memory of `function`, which is given the counter to label what it makes. `known`: kind -> tensors that
    are there before. With fake tensors nothing is computed and nothing allocated."""
    live = Live(known)
    with live:
        function(live)
    return live.peak


def used(device: torch.device | str) -> str:
    """What this process has used at most so far, in words: of the GPU's memory, or of the CPU's."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB"
    return f"{most_resident():.1f} GiB"


def most_resident() -> float:
    """The most GiB of the CPU's memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
