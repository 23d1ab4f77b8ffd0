"""Muon: momentum, made orthogonal. An optimizer for matrices, with AdamW for everything else.

A gradient of a matrix has a few directions that are large and many that are small. Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon) keeps a moving average of the gradient, and replaces its singular values by
ones: the update is the nearest (semi-)orthogonal matrix, which moves all directions alike. The small directions matter
here: what the hint encoder and the zero convolutions learn at first is among them.

    gradient --(1 - 0.95)--> exp_avg --Nesterov--> update U S V^T --Newton-Schulz--> ~ U V^T --rate--> weight

The singular value decomposition is not computed. Five Newton-Schulz steps x <- a x + b (x x^T) x + c (x x^T)^2 x bring
every singular value near 1 (to 0.7 .. 1.2) by products of matrices alone, for which bfloat16 suffices. A convolution is
the matrix (out, in * height * width). Biases and norms' weights are vectors: AdamW moves them.

A matrix keeps one moment instead of AdamW's two.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowvram.optimizer import AdamW, load_moment, make_generator, piece_size, round_stochastically, store_moment

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of the write-up: steep at 0, so that small singular values grow fast


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n,rows,columns) -> (n,rows,columns) `dtype`: the same singular vectors, with singular values between 0.7 and
    1.2, of each matrix.

    Computed in `dtype` by five Newton-Schulz steps. A matrix of zeros stays zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]  # the smaller Gram matrix is the cheaper one
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7).view(-1, 1, 1)  # now no singular value is above 1
    x = by_gram_matrix(x) if uses_gram_matrix(x.shape[1], x.shape[2], dtype) else step_by_step(x)
    return x.mT if tall else x


def step_by_step(x: Tensor) -> Tensor:
    """Newton-Schulz steps of (n,rows,columns), as they are written down."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def by_gram_matrix(x: Tensor) -> Tensor:
    """The same for matrices that are much wider than high: x becomes q x, and each step multiplies q by a polynomial p
    of the Gram matrix, which itself becomes p gram p. So the many columns are read twice, and not ten times."""
    a, b, c = COEFFICIENTS
    gram, q = x @ x.mT, None
    for _ in range(STEPS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        q = p if q is None else p @ q
        gram = p @ gram @ p
    return q @ x


def uses_gram_matrix(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether `orthogonalize` computes matrices by way of their Gram matrix: where that is less work, and not in
    bfloat16, in which the rounding of the Gram matrix adds up (singular values up to 1.6 were seen)."""
    return dtype != torch.bfloat16 and columns >= 3 * rows


def iteration_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the Newton-Schulz steps: bfloat16 on GPUs that know it, otherwise float32."""
    known = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if known else torch.float32


def is_matrix(p: Tensor) -> bool:
    """Whether Muon moves `p`: a matrix, or a convolution, which is the matrix (out, in * height * width)."""
    return p.ndim >= 2


def muon_flops(shapes: Iterable[torch.Size], dtype: torch.dtype = torch.bfloat16) -> int:
    """Floating-point operations with which one step makes updates of these shapes orthogonal in `dtype`."""
    total = 0
    for rows, columns in ((shape[0], shape[1:].numel()) for shape in shapes if len(shape) >= 2):
        small, large = min(rows, columns), max(rows, columns)
        wide, square = 2 * small * small * large, 2 * small**3  # products with all columns, and of two Gram matrices
        if uses_gram_matrix(small, large, dtype):
            total += 2 * wide + (4 * STEPS - 1) * square
        else:
            total += STEPS * (2 * wide + square)
    return total


class Muon(AdamW):
    """Muon for the matrices among the parameters, `AdamW` for the others.

    muon_rate: the learning rate of the matrices, multiplied by sqrt(max(1, rows / columns)); lr: that of the others,
    above 0. The group of the matrices has the ratio of the two as `rate_factor`, for those who set the rates.
    Everything else as for AdamW: `bits` are those of the one moment, bfloat16 weights are rounded stochastically, and
    random numbers are a function of (seed, step, name). chosen(name): whether Muon moves this matrix; all by default.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], lr: float, muon_rate: float, weight_decay: float = 0.01,
        bits: int = 32, seed: int = 0, chosen: Callable[[str], bool] = lambda name: True,
    ):  # fmt: skip
        super().__init__(named, lr, weight_decay, bits, seed)
        (group,) = self.param_groups
        matrices = [p for name, p in named.items() if is_matrix(p) and chosen(name)]
        self.matrices = {id(p) for p in matrices}
        group["params"] = [p for p in group["params"] if id(p) not in self.matrices]
        self.param_groups.append(group | {"params": matrices, "lr": muon_rate, "rate_factor": muon_rate / lr})

    def moments_of(self, p: Tensor) -> tuple[str, ...]:
        return ("exp_avg",) if id(p) in self.matrices else super().moments_of(p)

    def stacks(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The parameters in lists that `update` moves by one call: of the matrices, those of one shape, as many as
        AdamW has in a piece."""
        found = super().stacks([p for p in parameters if id(p) not in self.matrices])
        shapes: dict[tuple, list[nn.Parameter]] = {}
        for p in parameters:
            if id(p) in self.matrices:
                shapes.setdefault((len(p), p.numel(), p.dtype), []).append(p)
        for (_, numel, _), alike in shapes.items():
            count = max(1, piece_size(alike[0].device) // numel)
            found += [alike[i : i + count] for i in range(0, len(alike), count)]
        return found

    def update(
        self, together: Sequence[nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        """Move one of the lists of `stacks` along the gradients, in place."""
        if id(together[0]) not in self.matrices:
            return super().update(together, lr, weight_decay, betas, eps)
        directions = torch.stack([self.momentum(p) for p in together])
        directions = orthogonalize(directions, iteration_dtype(directions.device)).float()
        rate = lr * max(1, directions.shape[1] / directions.shape[2]) ** 0.5
        for p, direction in zip(together, directions, strict=True):
            moved = p.float().mul(1 - lr * weight_decay).sub_(direction.reshape(p.shape), alpha=rate)
            if p.dtype == torch.bfloat16:
                step = self.state[p]["step"]
                moved = round_stochastically(moved, make_generator(p.device, self.seed, step, self.names[id(p)]))
            p.copy_(moved)

    def momentum(self, p: nn.Parameter) -> Tensor:
        """(rows,columns) float32: the moving average of the gradient, brought forward by one step, with the present
        gradient once more (Nesterov)."""
        self.init_state(p)
        state, whole = self.state[p], slice(0, p.numel())
        state["step"] = int(state["step"]) + 1
        gradient = p.grad.reshape(-1).float()
        average = load_moment(state, "exp_avg", whole)
        average.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(average, MOMENTUM)
        store_moment(state, "exp_avg", whole, average)
        return ahead.view(len(p), -1)
