"""AdamW with moments in 8 or 16 bits and weights in bfloat16 that are rounded stochastically.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) keeps two moments a weight, the mean of the gradients (`exp_avg`) and
of their squares (`exp_avg_sq`): in fp32 8 bytes. In 8 bits they take 2, with one fp32 scale for each block of 256
numbers, as in Dettmers et al. 2022 (arXiv:2110.02861); the 8 bits are the upper ones of a float16, not their code book:

    float16                 s eeeee mmmmmmmmmm      s sign, e exponent, m mantissa
    exp_avg     (int8)      s  eeee mmm             scaled to |x| <= 1, so the first bit of the exponent is always 0
    exp_avg_sq  (uint8)       eeeee mmm             scaled to x <= 2^15; squares have no sign

So a mean is kept to +-6% over 14 octaves below the largest of its block (and is 0 from the 18th on), a square over 29
octaves; a square never becomes 0, since the step is divided by its root. Squares change by a thousandth a step, much
less than the distance of two codes: they, like bfloat16 weights, are rounded up or down at random so that the mean is
right.
"""

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BLOCK_SIZE = 256  # numbers that share a scale
MIN_QUANTIZED = 4096  # moments of smaller tensors stay fp32: there is nothing to win, and norms' weights matter


@dataclass(frozen=True)
class MomentFormat:
    """How a moment is kept in 8 bits: the type of its codes, and what the largest magnitude of a block is scaled to."""

    dtype: torch.dtype
    largest: float


EXP_AVG = MomentFormat(torch.int8, 1.0)
EXP_AVG_SQ = MomentFormat(torch.uint8, 2.0**15)
MOMENTS = {"exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}  # in torch's names

FP16_DROPPED_BITS = 7  # lower bits of a float16 that a code leaves out
FP32_DROPPED_BITS = 20  # lower bits of a float32 that a code leaves out
BF16_DROPPED_BITS = 16  # lower bits of a float32 that a bfloat16 leaves out
SIGN_BIT = 1 << 14  # of a float16: the first bit of the exponent, where `exp_avg` keeps its sign
EXPONENT_OFFSET = 127 - 15 << 23  # difference of the exponents' biases of float32 and float16, in float32's place
SMALLEST_NORMAL = 8  # the lowest code of a float16 that is not subnormal


def to_blocks(x: Tensor) -> Tensor:
    """(n,) -> (ceil(n/256),256), filled up with zeros."""
    return (nn.functional.pad(x, (0, -x.numel() % BLOCK_SIZE)) if x.numel() % BLOCK_SIZE else x).view(-1, BLOCK_SIZE)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """First moments, float32 (n,) -> codes (n,) int8, and the largest magnitude of each block of 256, float32."""
    blocks = to_blocks(x)
    scale = torch.maximum(blocks.amax(1), -blocks.amin(1))
    half = (blocks * (EXP_AVG.largest / scale.clamp(min=1e-30))[:, None]).half()
    bits = half.view(-1)[: x.numel()].view(torch.int16)
    bits.sub_(bits >> 15, alpha=SIGN_BIT)  # bits >> 15 is -1 for a negative number, so its SIGN_BIT is set
    return bits.add_(1 << FP16_DROPPED_BITS - 1).bitwise_right_shift_(FP16_DROPPED_BITS).to(EXP_AVG.dtype), scale


def quantize_squares(x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Second moments, float32 (n,), not negative -> codes (n,) uint8, and the largest of each block of 256, float32.

    `noise`: random int32 (n,) in [0, 2^20) for stochastic rounding; without it codes are rounded to the nearest.
    """
    blocks = to_blocks(x)
    scale = blocks.amax(1)
    # rounded from float32: by way of float16 the small changes would be lost before the noise is added
    bits = (blocks * (EXP_AVG_SQ.largest / scale.clamp(min=1e-30))[:, None]).view(-1)[: x.numel()].view(torch.int32)
    bits.add_(1 << FP32_DROPPED_BITS - 1 if noise is None else noise)
    bits.sub_(EXPONENT_OFFSET).bitwise_right_shift_(FP32_DROPPED_BITS)
    return bits.clamp_(min=SMALLEST_NORMAL).to(EXP_AVG_SQ.dtype), scale


def dequantize(codes: Tensor, scale: Tensor, moment_format: MomentFormat) -> Tensor:
    """Codes (n,) and scales (ceil(n/256),) -> moments (n,) float32."""
    bits = codes.short().mul_(1 << FP16_DROPPED_BITS)
    half = (bits.bitwise_and_(~SIGN_BIT) if moment_format is EXP_AVG else bits).view(torch.float16)
    return to_blocks(half.float()).mul_((scale / moment_format.largest)[:, None]).view(-1)[: codes.numel()]


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, rounded up or down with probabilities that make the mean right.

    Rounding to the nearest would lose every update below a 256th of the weight: at a learning rate of 1e-5, all.
    """
    bits = x.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=x.device, dtype=torch.int32)
    rounded = ((bits + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


class QuickStart(torch.optim.Optimizer):
    """Base class of optimizers that leave out PyTorch's wrapper of a method, which would import what `torch.compile`
    needs (3 s at each start) to tell it to leave the method alone. The optimizer is never compiled here."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)


class FusedAdamW(QuickStart, torch.optim.AdamW):
    """PyTorch's fused AdamW: weights and moments in float32."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        inspect.unwrap(torch.optim.AdamW.step)(self)


class AdamW(QuickStart):
    """PyTorch's AdamW on moments that are kept in fewer bits.

    named: parameters by name. Those in bfloat16 are rounded stochastically; gradients may have any precision.
    bits: of a moment; 8 (and 4 bytes a block of 256), 16 (bfloat16) or 32.
    seed: random numbers are a function of (seed, step, name), so a resumed run rounds as one that was not stopped.

    Moments are flat, in the order of the parameter's shape. A parameter is updated a piece at a time, so that the fp32
    numbers in between take little memory.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], lr: float, weight_decay: float = 0.01, bits: int = 8, seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    ):  # fmt: skip
        super().__init__(named.values(), dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.names, self.bits, self.seed = {id(p): name for name, p in named.items()}, bits, seed
        self._noise: tuple[int, torch.device | None, Tensor | None] = (0, None, None)  # step, device, random numbers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            settings = {k: group[k] for k in ("lr", "weight_decay", "betas", "eps")}
            for together in self.stacks([p for p in group["params"] if p.grad is not None]):
                self.update(together, **settings)

    def stacks(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The parameters in lists that `update` moves by one call: all small ones together, the others one by one."""
        small = [p for p in parameters if p.numel() < MIN_QUANTIZED and p.dtype == torch.float32 and p.is_contiguous()]
        chosen = {id(p) for p in small}
        return [small] * bool(small) + [[p] for p in parameters if id(p) not in chosen]

    def moments_of(self, p: Tensor) -> tuple[str, ...]:
        """The names of the moments that are kept of a parameter."""
        return tuple(MOMENTS)

    def init_state(self, p: nn.Parameter) -> None:
        """Give a parameter that has no state yet that of step 0."""
        if not self.state[p]:
            self.state[p] |= {"step": 0} | zero_moments(p.numel(), p.device, self.bits, self.moments_of(p))

    def update(
        self, together: Sequence[nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        """Move one of the lists of `stacks` along the gradients, in place."""
        numbers = dict(lr=lr, weight_decay=weight_decay, beta1=betas[0], beta2=betas[1], eps=eps)
        if len(together) > 1:
            self.update_small(together, numbers)
        else:
            self.update_large(together[0], numbers)

    def update_small(self, together: Sequence[nn.Parameter], numbers: dict[str, float]) -> None:
        """Move contiguous fp32 parameters whose moments are fp32 too, by one call of PyTorch's AdamW."""
        for p in together:
            self.init_state(p)
        states = [self.state[p] for p in together]
        steps_done = torch.tensor([float(state["step"]) for state in states], device=together[0].device).unbind()
        adamw(
            [p.detach().view(-1) for p in together], [p.grad.reshape(-1).float() for p in together],
            *([state[name] for state in states] for name in MOMENTS), [], list(steps_done), fused=True, amsgrad=False,
            maximize=False, **numbers,
        )  # fmt: skip
        for state in states:
            state["step"] = int(state["step"]) + 1

    def update_large(self, p: nn.Parameter, numbers: dict[str, float]) -> None:
        """Move one parameter, a piece at a time."""
        self.init_state(p)
        state = self.state[p]
        step = state["step"] = int(state["step"]) + 1
        noise = self._squares_noise(step, p.device) if self.bits != 32 else None
        is_bf16 = p.dtype == torch.bfloat16
        generator = make_generator(p.device, self.seed, step, self.names[id(p)]) if is_bf16 else None
        weights, gradient, size = p.detach().reshape(-1), p.grad.reshape(-1), piece_size(p.device)
        for start in range(0, p.numel(), size):
            piece = slice(start, min(start + size, p.numel()))
            g, w = gradient[piece].float(), weights[piece].float()
            m, v = load_moment(state, "exp_avg", piece), load_moment(state, "exp_avg_sq", piece)
            steps_done = torch.full((), step - 1.0, device=p.device)
            adamw([w], [g], [m], [v], [], [steps_done], fused=True, amsgrad=False, maximize=False, **numbers)
            store_moment(state, "exp_avg", piece, m)
            store_moment(state, "exp_avg_sq", piece, v, noise)
            if is_bf16:
                weights[piece] = round_stochastically(w, generator)
        if not p.is_contiguous():  # then reshape(-1) made a copy
            p.copy_(weights.view(p.shape))

    def _squares_noise(self, step: int, device: torch.device) -> Tensor:
        """The random numbers with which second moments are rounded at `step`. Every piece gets the same: what they are
        added to differs, so no harm is done."""
        if self._noise[:2] != (step, device):
            dropped = FP32_DROPPED_BITS if self.bits == 8 else BF16_DROPPED_BITS
            generator, shape = make_generator(device, self.seed, step), (piece_size(device),)
            numbers = torch.randint(1 << dropped, shape, generator=generator, device=device, dtype=torch.int32)
            self._noise = step, device, numbers
        return self._noise[2]


def piece_size(device: torch.device) -> int:
    """How many numbers AdamW updates at once: what a CPU's cache holds; on a GPU more, since each call costs more."""
    return 1 << (19 if device.type == "cpu" else 23)


def make_generator(device: torch.device, *key: object) -> torch.Generator:
    """A random number generator on `device` whose numbers are a function of `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def zero_moments(
    count: int, device: torch.device, bits: int, names: Sequence[str] = tuple(MOMENTS)
) -> dict[str, Tensor]:
    """The moments of `count` numbers before the first step: fp32, bfloat16 if `bits` is 16, codes and scales if 8."""
    if bits != 8 or count < MIN_QUANTIZED:
        dtype = torch.bfloat16 if bits == 16 and count >= MIN_QUANTIZED else torch.float32
        return {name: torch.zeros(count, dtype=dtype, device=device) for name in names}
    codes = {f"{name}.bits": torch.zeros(count, dtype=MOMENTS[name].dtype, device=device) for name in names}
    return codes | {f"{name}.scale": torch.zeros(-(-count // BLOCK_SIZE), device=device) for name in names}


def load_moment(state: Mapping[str, Tensor], name: str, piece: slice) -> Tensor:
    """Numbers `piece` (its start a multiple of 256) of the moment `name` as float32; of an fp32 moment, a view."""
    if name in state:
        return state[name][piece].float()
    blocks = slice(piece.start // BLOCK_SIZE, -(-piece.stop // BLOCK_SIZE))
    return dequantize(state[f"{name}.bits"][piece], state[f"{name}.scale"][blocks], MOMENTS[name])


def store_moment(state: Mapping[str, Tensor], name: str, piece: slice, x: Tensor, noise: Tensor | None = None) -> None:
    """Put `x`, float32, back as numbers `piece` of the moment `name`. (An fp32 moment was changed in place.)

    `noise`: random int32, at least as many, of as many bits as are dropped: second moments are rounded stochastically
    with it, which overwrites `x`.
    """
    is_squares, kept = MOMENTS[name] is EXP_AVG_SQ, state.get(name)
    noise = noise[: len(x)] if is_squares and noise is not None else None
    if kept is None:
        blocks = slice(piece.start // BLOCK_SIZE, -(-piece.stop // BLOCK_SIZE))
        codes, scale = quantize_squares(x, noise) if is_squares else quantize(x)
        state[f"{name}.bits"][piece], state[f"{name}.scale"][blocks] = codes, scale
    elif kept.dtype == torch.bfloat16 and noise is not None:
        kept.view(torch.int16)[piece] = x.view(torch.int32).add_(noise).bitwise_right_shift_(BF16_DROPPED_BITS)
    elif kept.dtype == torch.bfloat16:
        kept[piece] = x


def convert_state(saved: Mapping[str, Tensor], p: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of parameter `p` from a checkpoint, in the form that `optimizer` keeps; bit for bit where the form is
    that in which it was saved. Raises KeyError for a moment that `saved` has in no form."""
    whole = slice(0, p.numel())
    saved = {k: v.reshape(-1).to(p.device) for k, v in saved.items()}
    if not isinstance(optimizer, AdamW):  # torch's, whose moments have the parameter's shape and memory format
        fp32 = {name: load_moment(saved, name, whole).view(p.shape) for name in MOMENTS}
        fp32 = {name: torch.empty_like(p, dtype=torch.float32).copy_(moment) for name, moment in fp32.items()}
        return {"step": saved["step"].reshape(()).clone()} | fp32
    names = optimizer.moments_of(p)
    state = zero_moments(p.numel(), p.device, optimizer.bits, names)
    for name in names:
        if name in state:
            state[name].copy_(load_moment(saved, name, whole))
        elif name in saved:
            store_moment(state, name, whole, load_moment(saved, name, whole))
        else:
            state |= {k: saved[k].clone() for k in (f"{name}.bits", f"{name}.scale")}
    return {"step": int(saved["step"])} | state
