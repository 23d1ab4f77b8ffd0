"""How noise is added to latents, and how it is removed again.

Adding noise is one line: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, where a_t falls from almost 1 (t=0) to almost 0
(t=999). Removing it asks the UNet at a few timesteps, from high to low, for the noise in x_t, and steps towards the
clean latents. DDIM (Song et al. 2020, arXiv:2010.02502) and Euler's method (Karras et al. 2022, arXiv:2206.00364) are
solvers of first order; DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095) is of second order and needs 10 to 20 steps
where DDIM needs 20 to 50. Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) asks twice, with the prompt
and with the negative prompt, in one batch, and extrapolates from the negative prediction through the prompted one.

    x_T --+--> eps_model (UNet, ControlNets, guidance) --> eps --> solver step --+--> x_0
          +-------------- once for every step of the schedule <------------------+

    python sampler.py --model runs/demo --prompt "red circle with blue background" --hint circle.png --out samples

The command line is in `drawing/`.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

if __name__ == "__main__":  # --help and wrong flags are answered before the imports below, which take seconds
    from drawing.request import parse_flags
    from training.console import protect_output

    protect_output()
    parse_flags(None, solvers=None)

import numpy as np
import torch
from torch import Tensor

import data
from controlnet import ControlNet
from ldm import SD15, ControlLDM, ModelConfig

EpsModel = Callable[[Tensor, Tensor], Tensor]  # (x (B,4,h,w), t (B,) int64 or float32) -> eps (B,4,h,w)
Schedule = Sequence[tuple[float, float]]  # see `make_schedule`
_alphas: dict[tuple, Tensor] = {}  # what `alphas_tensor` returned


# ---------------------------------------------------------------------------------------------------- noise schedule
def alphas_cumprod(config: ModelConfig = SD15, device: torch.device | str = "cpu") -> Tensor:
    """The noise schedule of a model, (timesteps,) float32: the fraction of the signal's power at each timestep.

    `noise_schedule` in the precision of training and drawing.
    """
    schedule = config.linear_start, config.linear_end, config.timesteps, config.zero_terminal_snr
    return alphas_tensor(*schedule, device)


def alphas_tensor(start: float, end: float, timesteps: int, zero_terminal: bool, device: Any) -> Tensor:
    """The cumulated alphas of `noise_schedule`, (timesteps,) float32, which are copied to `device` once."""
    if (key := (start, end, timesteps, zero_terminal, device)) not in _alphas:
        _alphas[key] = torch.from_numpy(noise_schedule(start, end, timesteps, zero_terminal)[1]).float().to(device)
    return _alphas[key]


def noise_schedule(start: float, end: float, timesteps: int, zero_terminal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Betas and their cumulated alphas, each (timesteps,) float64. Training, drawing and export share this function.

    Betas are linear in their square roots, from `start` to `end`. `zero_terminal`: see `zero_terminal_snr`.
    """
    betas = np.linspace(start**0.5, end**0.5, timesteps, dtype=np.float64) ** 2
    alphas = np.cumprod(1 - betas)
    if zero_terminal:
        alphas = zero_terminal_snr(alphas)
        betas = 1 - alphas / np.append(1.0, alphas[:-1])
    return betas, alphas


def zero_terminal_snr(alphas: np.ndarray) -> np.ndarray:
    """Stretch a schedule so that it ends in pure noise and starts as before (Lin et al. 2023, arXiv:2305.08891,
    algorithm 1). The last value is 2^-24 instead of 0, since solvers divide by it."""
    roots = np.sqrt(alphas)
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return np.maximum(roots**2, 2.0**-24)


def q_sample(x0: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """Noisy latents x_t, float32. x0, noise (B,4,h,w); alphas (B,): `alphas_cumprod` at the timestep of each sample."""
    a = alphas.view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def velocity(x0: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """The target of v-prediction (Salimans & Ho 2022, arXiv:2202.00512): sqrt(a) noise - sqrt(1-a) x0."""
    a = alphas.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * x0


def ddim_timesteps(steps: int, total: int = 1000, trailing: bool = False) -> np.ndarray:
    """`steps` distinct timesteps in 1..total-1, ascending. `trailing`: the last one is total - 1, where a schedule with
    zero terminal SNR has to start.

    Where `steps` divides `total` the timesteps are the original's, range(0, total, total // steps) + 1. For other
    numbers of steps the original's formula gives too many values or runs past the end; they are spread evenly instead.
    """
    if not 1 <= steps < total:
        raise ValueError(f"sampling takes 1 to {total - 1} steps, not {steps}")
    if trailing:
        return np.round(np.arange(1, steps + 1) * total / steps).astype(np.int64) - 1
    if total % steps == 0:
        return np.arange(0, total, total // steps) + 1
    return np.arange(steps) * total // steps + 1


SPACINGS = ("leading", "trailing", "linspace", "karras")


def make_schedule(alphas: Tensor, steps: int, spacing: str = "leading", clean_end: bool = False) -> Schedule:
    """(timestep, alpha) of each of `steps` steps, from noise to image, and as a last entry where the last step ends.

    alphas (timesteps,): the model's noise schedule. Spacings, which say where the steps are:

    leading   the original's DDIM, from below the last timestep to 1 (`ddim_timesteps`); ends at alphas[0]
    trailing  the same from the last timestep on; ends at alphas[0]
    linspace  evenly from the last timestep to 0, as k-diffusion takes them; ends without noise, at alpha 1
    karras    evenly in sigma^(1/7), sigma = sqrt((1-alpha)/alpha) being the noise in units of the signal: more steps at
              little noise (Karras et al. 2022, equation 5); ends at alpha 1

    The timesteps of the last two are no whole numbers: log sigma is interpolated between the model's timesteps.
    `clean_end`: the first two end at alpha 1 as well.
    """
    known, every = alphas.cpu().double().numpy(), np.arange(len(alphas))
    whole = ddim_timesteps(steps, len(alphas), trailing=spacing == "trailing")[::-1]
    if spacing in ("leading", "trailing"):
        return [(int(t), float(known[t])) for t in whole] + [(0, 1.0 if clean_end else float(known[0]))]
    log_sigmas = 0.5 * (np.log1p(-known) - np.log(known))
    timesteps = np.linspace(len(alphas) - 1, 0, steps)
    if spacing == "karras":
        most, least = np.exp(log_sigmas[[-1, 0]] / 7)
        timesteps = np.interp(7 * np.log(np.linspace(most, least, steps)), log_sigmas, every)
    between = 1 / (1 + np.exp(2 * np.interp(timesteps, every, log_sigmas)))
    return list(zip(timesteps.tolist(), between.tolist(), strict=True)) + [(0, 1.0)]


def alphas_at(alphas: Tensor, timesteps: Tensor) -> Tensor:
    """The noise schedule `alphas` at `timesteps` (B,). Between whole timesteps log sigma is interpolated."""
    if not timesteps.is_floating_point():
        return alphas[timesteps]
    low = timesteps.floor().long()
    high = (low + 1).clamp(max=len(alphas) - 1)
    return torch.lerp(alphas[low].logit(), alphas[high].logit(), timesteps - low).sigmoid()


# ----------------------------------------------------------------------------------------------------------- solvers
@dataclass(frozen=True)
class SolverStep:
    """What a solver knows when it steps from one timestep to the next lower one."""

    x: Tensor  # (B,4,h,w), the noisy latents at this timestep
    eps: Tensor  # the predicted noise in x
    x0: Tensor  # the clean latents that eps implies
    t_next: float  # the next timestep; 0 at the last step
    alpha: float  # `alphas_cumprod` at this timestep
    alpha_next: float  # and at the next one
    last: bool  # this is the last step: it ends almost or entirely without noise
    previous: "SolverStep | None"  # the step before, for multistep solvers
    eta: float  # 0: deterministic, 1: as random as DDPM; for solvers that draw noise
    noise: Callable[[], Tensor]  # draws standard normal noise of the shape of x
    predict: Callable[[Tensor, float], Tensor]  # (x, timestep) -> eps, for solvers that evaluate the model once more
    number: int = 0  # of this step: 1, 2, ...
    steps: int = 0  # how many there are


def ddim_step(step: SolverStep) -> Tensor:
    """DDIM: go to alpha_next along the predicted noise; with eta > 0 a part of it is fresh noise."""
    a, a_next = step.alpha, step.alpha_next
    sigma = step.eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    x = math.sqrt(a_next) * step.x0 + math.sqrt(max(0.0, 1 - a_next - sigma**2)) * step.eps
    return x + sigma * step.noise() if sigma > 0 else x


def euler_step(step: SolverStep) -> Tensor:
    """Euler's method along the predicted noise. In units of the signal, x/sqrt(alpha) moves by eps times the change of
    sigma: that is DDIM's step without fresh noise. What users know as Euler differs from DDIM by its schedule."""
    return ddim_step(dataclasses.replace(step, eta=0.0))


def euler_ancestral_step(step: SolverStep) -> Tensor:
    """Euler's method down to less noise than the next timestep has; fresh noise makes up for the rest. The share of
    fresh noise is DDPM's, so that this is DDIM's step with eta 1."""
    return ddim_step(dataclasses.replace(step, eta=1.0))


def dpmpp_2m_step(step: SolverStep) -> Tensor:
    """DPM-Solver++ (2M): a second-order step in the log signal-to-noise ratio, from this x0 and the one before.

    The first step and the last one, which is long in that ratio, are of first order.
    """
    if step.alpha_next == 1:  # there the ratio is infinite, and the step of first order ends at x0
        return step.x0
    log_snr = lambda a: 0.5 * (math.log(a) - math.log1p(-a))  # log(sqrt(a) / sqrt(1-a))
    lam, h = log_snr(step.alpha), log_snr(step.alpha_next) - log_snr(step.alpha)
    direction = step.x0
    if step.previous and not step.last:
        direction = step.x0 + h / (2 * (lam - log_snr(step.previous.alpha))) * (step.x0 - step.previous.x0)
    scale = math.sqrt((1 - step.alpha_next) / (1 - step.alpha))
    return scale * step.x - math.sqrt(step.alpha_next) * math.expm1(-h) * direction


SOLVERS: dict[str, Callable[[SolverStep], Tensor]] = {
    "ddim": ddim_step, "dpm": dpmpp_2m_step, "euler": euler_step, "euler_a": euler_ancestral_step,
}  # fmt: skip
K_DIFFUSION = ("euler", "euler_a")  # solvers that users know from k-diffusion, with its schedule


def denoise(
    solver: str, eps_model: EpsModel, x_T: Tensor, steps: int, alphas: Tensor | None = None, eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None, progress: Callable[[Iterable], Iterable] = iter,
    trailing: bool = False, schedule: Schedule | None = None, on_step: Callable[[SolverStep], object] | None = None,
) -> Tensor:  # fmt: skip
    """Denoise x_T (B,4,h,w) by a solver of SOLVERS, in `steps` steps or along `schedule`. Returns latents (B,4,h,w).

    x_T is standard normal, or noisy latents as the first entry of the schedule says. `alphas`: the noise schedule,
    Stable Diffusion's by default, and `trailing` (see `make_schedule`) where no `schedule` is given. `eta`: see
    SolverStep; the noise comes from `generators`, one a sample, on the CPU. `progress` wraps the list of steps (tqdm).
    `on_step` is called with each step before it is made: `step.x0` shows the picture that forms, and whatever the
    function raises ends the drawing.
    """
    if schedule is None:
        alphas = alphas_cumprod() if alphas is None else alphas
        schedule = make_schedule(alphas, steps, "trailing" if trailing else "leading")

    def predict(x: Tensor, t: float) -> Tensor:
        dtype = torch.int64 if isinstance(t, int) else torch.float32
        return eps_model(x, torch.full((len(x),), t, dtype=dtype, device=x.device))

    noise = lambda: _noise(x_T.shape, generators).to(x_T)
    x, previous, count = x_T, None, len(schedule) - 1
    for i in progress(range(count)):
        (t, alpha), (t_next, alpha_next) = schedule[i], schedule[i + 1]
        eps = predict(x, t)
        x0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        last = i == count - 1
        step = SolverStep(x, eps, x0, t_next, alpha, alpha_next, last, previous, eta, noise, predict, i + 1, count)
        if on_step:
            on_step(step)
        x = SOLVERS[solver](step)
        previous = dataclasses.replace(step, previous=None)  # one step back is enough, and keeps no others alive
    return x


def ddim(eps_model: EpsModel, x_T: Tensor, steps: int, **settings: object) -> Tensor:
    """`denoise` by DDIM."""
    return denoise("ddim", eps_model, x_T, steps, **settings)


def dpmpp_2m(eps_model: EpsModel, x_T: Tensor, steps: int, **settings: object) -> Tensor:
    """`denoise` by DPM-Solver++ (2M)."""
    return denoise("dpm", eps_model, x_T, steps, **settings)


def starting_noise(
    shape: Sequence[int], seed: int, first: int = 0, images: Sequence[tuple[int, int]] | None = None
) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal noise (B,4,h,w) for the images first, first + 1, ... of a seed, and the generators to draw more.

    The noise of image i is a function of (seed, i), however many images are drawn at once. `images`: the (seed, i) of
    each, where they are not successive images of one seed.
    """
    images = [(seed, first + i) for i in range(shape[0])] if images is None else images
    generators = [torch.Generator().manual_seed(data.derive_seed("image", *image)) for image in images]
    return _noise(shape, generators), generators


def _noise(shape: Sequence[int], generators: Sequence[torch.Generator] | None) -> Tensor:
    if generators is None:
        return torch.randn(shape)
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators])


# ---------------------------------------------------------------------------------------------------------- guidance
@dataclass(frozen=True)
class Control:
    """A ControlNet with its hint, as guidance takes a list of them."""

    net: ControlNet
    hint: Tensor  # (B,C,8h,8w) in [0,1]
    strength: float = 1.0  # multiplies all residuals
    start: float = 0.0  # fraction of the way from noise to image at which control begins
    end: float = 1.0  # and at which it ends
    guess_mode: bool = False  # let this hint lead, with little or no prompt (see `make_cfg_model`)


def make_cfg_model(
    model: ControlLDM,
    context: Tensor,
    negative: Tensor,
    controls: Sequence[Control] = (),
    scale: float = 9.0,
    guess_mode: bool = False,
    y: Tensor | None = None,
    negative_y: Tensor | None = None,
) -> EpsModel:
    """The function that a solver calls for the noise: UNet, prompts, ControlNets and classifier-free guidance in one.

    context, negative (B,77,D): the prompts and the negative prompts; y, negative_y: what `ControlLDM.make_y` makes for
    them, where the model needs it (negative_y None: as y). The residuals of several ControlNets are added.
    eps = negative + scale * (prompted - negative), both computed in one batch; at scale 1 the prompted one alone. Guess
    mode, of one `Control` or here of all, leaves the hint out of the negative half and multiplies residual i of 13 by
    0.825**(12-i), so that the hint can do without a prompt. A ControlNet with `global_pool` always leaves the negative
    half alone, and is not weakened.
    """
    alphas = alphas_cumprod(model.config, model.device)
    guided = scale != 1.0  # the batch of the UNet has two halves: prompts and negative prompts
    contexts = torch.cat([context, negative]) if guided else context
    only_y = {} if y is None else {"y": y}
    both_ys = {"y": torch.cat([y, y if negative_y is None else negative_y])} if guided and only_y else only_y
    twice = lambda x: torch.cat([x, x])
    embeddings = [control.net.embed_hint(control.hint) for control in controls]  # once for all steps

    def residuals(x: Tensor, t: Tensor) -> list[Tensor] | None:
        progress = 1 - t[0].item() / len(alphas)  # 0: noise, 1: image
        total = []
        for control, embedding in zip(controls, embeddings, strict=True):
            if control.start <= progress <= control.end:
                guess = guess_mode or control.guess_mode
                both_halves = guided and not (guess or control.net.global_pool)
                inputs = map(twice, (x, embedding, t)) if both_halves else (x, embedding, t)
                prompted = (contexts, both_ys) if both_halves else (context, only_y)
                found = control.net.residuals(*inputs, prompted[0], **prompted[1])
                found = scale_residuals(found, control, guess and not control.net.global_pool)
                if guided and not both_halves:
                    found = [torch.cat([r, torch.zeros_like(r)]) for r in found]
                total = add_residuals(total, found)
        return total

    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        x2, t2 = (twice(x), twice(t)) if guided else (x, t)
        out = model.unet(x2, t2, contexts, control=residuals(x, t), **both_ys).to(x.dtype)
        if model.config.prediction == "v":
            a = alphas_at(alphas, t2).view(-1, 1, 1, 1)
            out = a.sqrt() * out + (1 - a).sqrt() * x2
        if not guided:
            return out
        prompted, unprompted = out.chunk(2)
        return unprompted + scale * (prompted - unprompted)

    return eps_model


def scale_residuals(residuals: list[Tensor], control: Control, guess_mode: bool) -> list[Tensor]:
    """The residuals of a ControlNet times its strength; in guess mode the shallow ones are weakened."""
    last = len(control.net.zero_convs)  # 12: the number of the middle block's residual
    first = last - len(residuals) + 1
    weaken = lambda i: 0.825 ** (last - i) if guess_mode else 1.0
    return [r * (control.strength * weaken(i)) for i, r in enumerate(residuals, first)]


def add_residuals(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """The sum of two lists of residuals; a list of the middle block's residual alone is added to the last of the other
    list."""
    sums = [y if x is None else x if y is None else x + y for x, y in zip_longest(reversed(a), reversed(b))]
    return sums[::-1]


# ----------------------------------------------------------------------------------------------------------- drawing
@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    steps: int = 20
    solver: str = "ddim"
    eta: float = 0.0
    scale: float | None = None  # guidance; None: the model's own
    guess_mode: bool = False
    seed: int = 0
    spacing: str = "auto"  # one of SPACINGS; auto: `usual_spacing`
    denoise: float = 1.0  # with a picture to start from: the fraction of the steps, the last ones, that is made


def usual_spacing(solver: str, config: ModelConfig) -> str:
    """The spacing of the steps that users expect of a solver: k-diffusion's for its solvers, else the original's, from
    the last timestep on where the schedule of the model ends in pure noise."""
    return "linspace" if solver in K_DIFFUSION else "trailing" if config.zero_terminal_snr else "leading"


def schedule_for(settings: Sampling, config: ModelConfig) -> Schedule:
    """The schedule of these settings for a model. The solvers of k-diffusion end without noise."""
    spacing = usual_spacing(settings.solver, config) if settings.spacing == "auto" else settings.spacing
    return make_schedule(alphas_cumprod(config), settings.steps, spacing, settings.solver in K_DIFFUSION)


@torch.no_grad()
def sample(
    model: ControlLDM,
    context: Tensor,
    negative: Tensor,
    controls: Sequence[Control],
    size: tuple[int, int],
    settings: Sampling = Sampling(),
    first: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    images: Sequence[tuple[int, int]] | None = None,
    init: Tensor | None = None,
    on_step: Callable[[SolverStep], object] | None = None,
    y: Tensor | None = None,
    negative_y: Tensor | None = None,
) -> Tensor:
    """Draw a batch of images. Returns scaled latents (B,4,height/8,width/8), which `model.decode` turns into images.

    context, negative, y, negative_y: see `make_cfg_model`; size (width, height), multiples of `model.config.multiple`;
    hints of another size are brought to it. `first`: the number of the batch's first image, or `images`: the (seed,
    number) of each (see `starting_noise`). init (B,4,height/8,width/8): scaled latents to start from. They get as much
    noise as the first of the last `settings.denoise * settings.steps` steps expects, at least one, and only these steps
    are made. `on_step`: see `denoise`.
    """
    width, height = size
    shape = (len(context), model.config.unet.in_channels, height // model.vae.factor, width // model.vae.factor)
    x, generators = starting_noise(shape, settings.seed, first, images)
    scale = model.config.guidance if settings.scale is None else settings.scale
    controls = [dataclasses.replace(control, hint=fit_hint(control.hint, size)) for control in controls]
    eps_model = make_cfg_model(model, context, negative, controls, scale, settings.guess_mode, y, negative_y)
    schedule, x = schedule_for(settings, model.config), x.to(model.device)
    if init is not None:
        schedule = schedule[-1 - max(1, round(settings.denoise * settings.steps)) :]
        x = q_sample(init.to(x), x, torch.full((len(x),), schedule[0][1], device=x.device))
    return denoise(
        settings.solver, eps_model, x, settings.steps, eta=settings.eta, generators=generators, progress=progress,
        schedule=schedule, on_step=on_step,
    )  # fmt: skip


def fit_hint(hint: Tensor, size: tuple[int, int]) -> Tensor:
    """The hint (B,C,H,W), scaled by area to cover `size` (width, height); the same middle is cut out of all."""
    if hint.shape[-1:-3:-1] == tuple(size):
        return hint
    arrays = hint.float().cpu().permute(0, 2, 3, 1).numpy()
    fitted = [data.to_tensor(data.resize(array, size, data.RESAMPLE["area"])) for array in arrays]
    return torch.stack(fitted).to(hint)


# ------------------------------------------------------------------------------------------------------ command line
def parse(argv: Sequence[str] | None = None) -> Any:
    """What the command line asks for, a `drawing.request.Request`."""
    from drawing.request import parse

    return parse(argv, tuple(SOLVERS))


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for (see `drawing.command`)."""
    from drawing.command import main

    main(argv)


if __name__ == "__main__":
    from drawing.command import run_command

    sys.exit(run_command())
