"""How noise is added to latents, and how it is removed again.

Adding noise is one line: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, where a_t falls from almost 1 (t=0) to almost 0
(t=999). Removing it asks the UNet at a few timesteps, from high to low, for the noise in x_t, and steps towards the
clean latents. DDIM (Song et al. 2020, arXiv:2010.02502) is a first-order solver; DPM-Solver++ 2M (Lu et al. 2022,
arXiv:2211.01095) is of second order and needs 10 to 20 steps where DDIM needs 20 to 50. Classifier-free guidance (Ho &
Salimans 2022, arXiv:2207.12598) asks twice, with the prompt and with the negative prompt, in one batch, and
extrapolates from the negative prediction through the prompted one.

    x_T --+--> eps_model (UNet, ControlNets, guidance) --> eps --> solver step --+--> x_0
          +------------------ once for every timestep <--------------------------+

    python sampler.py --model runs/demo --prompt "red circle with blue background" --hint circle.png --out samples
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from clip_text import MAX_TOKENS
from config import default_device, device, number
from controlnet import ControlNet
from ldm import PRECISIONS, SD15, ControlLDM, ModelConfig, compute_dtype_for, use_tf32
from lowvram.process import disable_malloc_trim
from training.console import protect_output
from training.images import save_picture
from training.records import hint_image, save_grid, to_uint8
from weights import CheckpointError, ModelSource, load_model
from weights.runs import is_run, load_run

EpsModel = Callable[[Tensor, Tensor], Tensor]  # (x (B,4,h,w), t (B,) int64) -> eps (B,4,h,w)


# ---------------------------------------------------------------------------------------------------- noise schedule
def alphas_cumprod(config: ModelConfig = SD15, device: torch.device | str = "cpu") -> Tensor:
    """The noise schedule of a model, (timesteps,) float32: the fraction of the signal's power at each timestep.

    `noise_schedule` in the precision of training and drawing.
    """
    return _alphas(config.linear_start, config.linear_end, config.timesteps, config.zero_terminal_snr).to(device)


@torch.compiler.assume_constant_result
def _alphas(start: float, end: float, timesteps: int, zero_terminal: bool) -> Tensor:
    return torch.from_numpy(noise_schedule(start, end, timesteps, zero_terminal)[1]).float()


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


# ----------------------------------------------------------------------------------------------------------- solvers
@dataclass(frozen=True)
class SolverStep:
    """What a solver knows when it steps from one timestep to the next lower one."""

    x: Tensor  # (B,4,h,w), the noisy latents at this timestep
    eps: Tensor  # the predicted noise in x
    x0: Tensor  # the clean latents that eps implies
    t_next: int  # the next timestep; 0 at the last step
    alpha: float  # `alphas_cumprod` at this timestep
    alpha_next: float  # and at the next one
    last: bool  # this is the last step: it ends at `alphas_cumprod[0]`, almost without noise
    previous: "SolverStep | None"  # the step before, for multistep solvers
    eta: float  # 0: deterministic, 1: as random as DDPM; for solvers that draw noise
    noise: Callable[[], Tensor]  # draws standard normal noise of the shape of x
    predict: Callable[[Tensor, int], Tensor]  # (x, timestep) -> eps, for solvers that evaluate the model once more


def ddim_step(step: SolverStep) -> Tensor:
    """DDIM: go to alpha_next along the predicted noise; with eta > 0 a part of it is fresh noise."""
    a, a_next = step.alpha, step.alpha_next
    sigma = step.eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    x = math.sqrt(a_next) * step.x0 + math.sqrt(max(0.0, 1 - a_next - sigma**2)) * step.eps
    return x + sigma * step.noise() if sigma > 0 else x


def dpmpp_2m_step(step: SolverStep) -> Tensor:
    """DPM-Solver++ (2M): a second-order step in the log signal-to-noise ratio, from this x0 and the one before.

    The first step and the last one, which is long in that ratio, are of first order.
    """
    log_snr = lambda a: 0.5 * (math.log(a) - math.log1p(-a))  # log(sqrt(a) / sqrt(1-a))
    lam, h = log_snr(step.alpha), log_snr(step.alpha_next) - log_snr(step.alpha)
    direction = step.x0
    if step.previous and not step.last:
        direction = step.x0 + h / (2 * (lam - log_snr(step.previous.alpha))) * (step.x0 - step.previous.x0)
    scale = math.sqrt((1 - step.alpha_next) / (1 - step.alpha))
    return scale * step.x - math.sqrt(step.alpha_next) * math.expm1(-h) * direction


SOLVERS: dict[str, Callable[[SolverStep], Tensor]] = {"ddim": ddim_step, "dpm": dpmpp_2m_step}


def denoise(
    solver: str, eps_model: EpsModel, x_T: Tensor, steps: int, alphas: Tensor | None = None, eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None, progress: Callable[[Iterable], Iterable] = iter,
    trailing: bool = False, on_step: Callable[[SolverStep], object] | None = None,
) -> Tensor:  # fmt: skip
    """Denoise x_T (B,4,h,w), standard normal, in `steps` steps of a solver of SOLVERS. Returns latents (B,4,h,w).

    `alphas`: the noise schedule, Stable Diffusion's by default. `eta`: see SolverStep; the noise comes from
    `generators`, one a sample, on the CPU. `progress` wraps the list of steps (tqdm). `trailing`: see
    `ddim_timesteps`. The last step ends at alphas[0]. `on_step` is called with each step before it is made: `step.x0`
    shows the picture that forms, and whatever the function raises ends the drawing.
    """
    alphas = (alphas_cumprod() if alphas is None else alphas).cpu().double()
    timesteps = ddim_timesteps(steps, len(alphas), trailing)
    predict = lambda x, t: eps_model(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
    noise = lambda: _noise(x_T.shape, generators).to(x_T)
    x, previous = x_T, None
    for i in progress(range(steps - 1, -1, -1)):
        t, t_next = int(timesteps[i]), int(timesteps[i - 1]) if i > 0 else 0
        alpha, alpha_next = float(alphas[t]), float(alphas[t_next])
        eps = predict(x, t)
        x0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        step = SolverStep(x, eps, x0, t_next, alpha, alpha_next, i == 0, previous, eta, noise, predict)
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


def starting_noise(shape: Sequence[int], seed: int, first: int = 0) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal noise (B,4,h,w) for the images first, first + 1, ... of a seed, and the generators to draw more.

    The noise of image i is a function of (seed, i), however many images are drawn at once.
    """
    generators = [torch.Generator().manual_seed(data.derive_seed("image", seed, first + i)) for i in range(shape[0])]
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


def make_cfg_model(
    model: ControlLDM,
    context: Tensor,
    negative: Tensor,
    controls: Sequence[Control] = (),
    scale: float = 9.0,
    guess_mode: bool = False,
) -> EpsModel:
    """The function that a solver calls for the noise: UNet, prompts, ControlNets and classifier-free guidance in one.

    context, negative (B,77,D): the prompts and the negative prompts. The residuals of several ControlNets are added.
    eps = negative + scale * (prompted - negative), both computed in one batch; at scale 1 the prompted one alone.
    `guess_mode` leaves the hints out of the negative half and multiplies residual i of 13 by 0.825**(12-i), so that the
    hint can do without a prompt. A ControlNet with `global_pool` always leaves the negative half alone, and is not
    weakened.
    """
    alphas = alphas_cumprod(model.config, model.device)
    guided = scale != 1.0  # the batch of the UNet has two halves: prompts and negative prompts
    contexts = torch.cat([context, negative]) if guided else context
    twice = lambda x: torch.cat([x, x])
    embeddings = [control.net.embed_hint(control.hint) for control in controls]  # once for all steps

    def residuals(x: Tensor, t: Tensor) -> list[Tensor] | None:
        progress = 1 - t[0].item() / len(alphas)  # 0: noise, 1: image
        total = []
        for control, embedding in zip(controls, embeddings, strict=True):
            if control.start <= progress <= control.end:
                both_halves = guided and not (guess_mode or control.net.global_pool)
                inputs = map(twice, (x, embedding, t)) if both_halves else (x, embedding, t)
                found = control.net.residuals(*inputs, contexts if both_halves else context)
                found = scale_residuals(found, control, guess_mode and not control.net.global_pool)
                if guided and not both_halves:
                    found = [torch.cat([r, torch.zeros_like(r)]) for r in found]
                total = add_residuals(total, found)
        return total

    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        x2, t2 = (twice(x), twice(t)) if guided else (x, t)
        out = model.unet(x2, t2, contexts, control=residuals(x, t)).to(x.dtype)
        if model.config.prediction == "v":
            a = alphas[t2].view(-1, 1, 1, 1)
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
    on_step: Callable[[SolverStep], object] | None = None,
) -> Tensor:
    """Draw a batch of images. Returns scaled latents (B,4,height/8,width/8), which `model.decode` turns into images.

    context, negative (B,77,D); size (width, height), multiples of `model.config.multiple`; `first`: the number of the
    batch's first image (see `starting_noise`). `on_step`: see `denoise`.
    """
    width, height = size
    shape = (len(context), model.config.unet.in_channels, height // model.vae.factor, width // model.vae.factor)
    x, generators = starting_noise(shape, settings.seed, first)
    scale = model.config.guidance if settings.scale is None else settings.scale
    eps_model = make_cfg_model(model, context, negative, controls, scale, settings.guess_mode)
    return denoise(
        settings.solver, eps_model, x.to(model.device), settings.steps, alphas_cumprod(model.config), settings.eta,
        generators, progress, model.config.zero_terminal_snr, on_step,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- CLI
def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw images with a trained ControlNet (or with a Stable Diffusion model alone).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, count, fraction = parser.add_argument, number(int, 1), number(float, 0, 1)
    add("--model", required=True, help="folder of a training run, Stable Diffusion file, or diffusers folder")
    add("--base", default="", help="with a run: another base model than its own, or where that is now")
    add("--control", default="", help="with a Stable Diffusion file: file or folder of a ControlNet")
    add("--vae", default="", help="file or folder of a VAE that replaces the model's")
    add("--ema", action="store_true", help="use the moving average of the base's UNet (model_ema.*)")
    add("--clip-skip", type=count, help="2 leaves out the last layer of the text encoder")
    add("--prompt", required=True, help="what the images show")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--hint", help="hint image (.png, .jpg, ...; .npy for other than 1, 3 or 4 channels); without it no control")
    add("--num", type=count, default=4, help="number of images")
    add("--batch-size", type=count, default=4, help="images drawn at once")
    add("--steps", type=number(int, 1, 999), default=20, help="denoising steps")
    add("--solver", choices=tuple(SOLVERS), default="ddim", help="dpm (DPM-Solver++ 2M) needs fewer steps")
    add("--eta", type=fraction, default=0.0, help="fresh noise in each DDIM step: 0 none, 1 as much as DDPM")
    add("--scale", type=number(float, 0), help="guidance scale, 1 for no guidance (default: the model's own, 9 for SD)")
    add("--strength", type=number(float), default=1.0, help="factor of the ControlNet's residuals, 0 for no control")
    add("--guess-mode", action="store_true", help="let the hint lead, with little or no prompt")
    add("--control-start", type=fraction, default=0.0, help="fraction of the steps at which control begins")
    add("--control-end", type=fraction, default=1.0, help="fraction of the steps at which control ends")
    add("--only-mid-control", action=argparse.BooleanOptionalAction, default=None,
        help="use the residual of the middle block alone (default: as the run was trained)")  # fmt: skip
    add("--resolution", default="", help="size of the images, N or WxH (default: the hint's)")
    add("--hint-resample", choices=tuple(data.RESAMPLE),
        help="filter that resizes the hint; nearest is for label maps (default: as the run, or area)")  # fmt: skip
    add("--hint-ground", choices=("auto", "black", "white"),
        help="what a transparent hint is laid on (default: as the run, or where it can be seen)")  # fmt: skip
    add("--hint-scale", type=number(float, 0),
        help="value of the hint file that becomes white; 0: its format's largest (default: as the run)")  # fmt: skip
    add("--prediction", choices=("auto", "eps", "v"), default="auto",
        help="what the UNet predicts: v for SD 2.1 at 768 px, which auto judges by the weights")  # fmt: skip
    add("--seed", type=int, default=0, help="equal seeds draw equal images")
    add("--device", type=device, default=default_device(), help="device that computes: cuda, cuda:1, mps or cpu")
    add("--precision", choices=tuple(PRECISIONS), default="fp32", help="number format of weights and computation")
    add("--out", default="samples", help="folder for 0000.png, ... and grid.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = load_run(args.model) if is_run(args.model) else {}
    model = load_model(
        ModelSource(
            args.model, base=args.base, control=args.control, vae=args.vae, ema=args.ema, prediction=args.prediction,
            clip_skip=args.clip_skip,
        )
    )  # fmt: skip
    use_tf32(args.precision == "tf32")
    disable_malloc_trim()
    model.to(args.device, compute_dtype_for(args.precision, args.device))
    hint = None
    if args.hint:
        if model.control_model is None:
            raise CheckpointError(f"{args.model}: has no ControlNet, so a hint has no effect; --control FILE gives one")
        channels, resample = model.control_model.hint_channels, args.hint_resample or run.get("hint_resample", "area")
        hint = data.read_image(
            args.hint, channels, ground=args.hint_ground or run.get("hint_ground", "auto"),
            scale=run.get("hint_scale", 0.0) if args.hint_scale is None else args.hint_scale,
            class_numbers=channels == 1 and resample == "nearest",
        )  # fmt: skip
        if args.only_mid_control is not None:
            model.control_model.only_mid_control = args.only_mid_control
    for flag, prompt in (("--prompt", args.prompt), ("--negative-prompt", args.negative_prompt)):
        (count,) = model.tokenizer.count([prompt])
        if count > MAX_TOKENS - 2:
            print(f"{flag} has {count} tokens; the text encoder reads {MAX_TOKENS - 2}, the rest is cut off")
    native = hint.shape[1::-1] if hint is not None else (model.config.resolution,) * 2
    size = data.choose_size(args.resolution, native, model.config.multiple)
    if hint is not None:
        if not data.same_aspect(native, size):
            shapes = f"{native[0]}x{native[1]}, the images {size[0]}x{size[1]}"
            print(f"{args.hint}: is {shapes}: {data.fraction_cut(native, size):.0%} of the hint is cut off")
        hint = data.resize(hint, size, data.RESAMPLE[resample])
        hint = data.to_tensor(hint.astype(np.float32) / 255)
    images = draw(args, model, hint, size)
    columns = {"hint": [hint_image(hint)]} if hint is not None else {}
    save_grid(Path(args.out) / "grid.png", columns | {f"{i:04d}": [im] for i, im in enumerate(images)}, [args.prompt])
    print(f"{len(images)} image{'s' * (len(images) != 1)} and grid.png in {args.out}")


@torch.no_grad()
def draw(args: argparse.Namespace, model: ControlLDM, hint: Tensor | None, size: tuple[int, int]) -> list[np.ndarray]:
    """Draw the images that the command line asks for and save each when it is finished. hint (C,H,W) in [0,1]."""
    out, images = Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    settings = Sampling(args.steps, args.solver, args.eta, args.scale, args.guess_mode, args.seed)
    context, negative = model.encode_prompts([args.prompt, args.negative_prompt]).split(1)
    with tqdm(total=args.num * args.steps, desc="drawing", unit="step", disable=None) as bar:
        for first in range(0, args.num, args.batch_size):
            count = min(args.batch_size, args.num - first)
            each = lambda x: x.expand(count, *x.shape[1:])  # noqa: B023

            def progress(steps: Iterable) -> Iterable:
                for step in steps:
                    yield step
                    bar.update(count)  # noqa: B023

            controls = []
            if hint is not None:
                batch_hint = each(hint[None].to(model.device))
                controls = [
                    Control(model.control_model, batch_hint, args.strength, args.control_start, args.control_end)
                ]
            latents = sample(model, each(context), each(negative), controls, size, settings, first, progress)
            for i, image in enumerate(to_uint8(model.decode(latents)), first):
                save_picture(out / f"{i:04d}.png", image)
                images.append(image)
    return images


if __name__ == "__main__":
    protect_output()
    try:
        main()
    except (ValueError, OSError) as e:  # a bad input: one line, no traceback
        sys.exit(f"sampler.py: {data.one_line(e)}")
