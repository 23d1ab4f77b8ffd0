"""How noise is added and how it is removed again.

Adding takes one line: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, where a_t falls from almost 1 (t=0) to almost 0
(t=999). Removing asks the UNet, at a few timesteps from high to low, what the noise is, and steps towards the clean
latents: DDIM (Song et al. 2020, arXiv:2010.02502) to first order, DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095)
to second, which needs 10 to 20 steps where DDIM needs 20 to 50. Guidance (Ho & Salimans 2022, arXiv:2207.12598) asks
twice, with the prompt and with the negative prompt, in one batch, and exaggerates the difference.

    python sampler.py --model runs/demo --prompt "red circle with blue background" --hint circle.png --out samples
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import log
import memory
from checkpoint import CheckpointError
from controlnet import PRECISIONS, SD15, ControlLDM, ModelConfig, computed_in, use_tf32

EpsModel = Callable[[Tensor, Tensor], Tensor]  # (x (B,4,h,w), t (B,) int64) -> eps (B,4,h,w)


# ---------------------------------------------------------------------------------------------------------- schedule
def alphas_cumprod(config: ModelConfig = SD15, device: torch.device | str = "cpu") -> Tensor:
    """(timesteps,) float32: how much of the signal's power is left at each timestep. Betas linear in square root."""
    return _alphas(config.linear_start, config.linear_end, config.timesteps, config.zero_terminal_snr).to(device)


@torch.compiler.assume_constant_result
def _alphas(start: float, end: float, timesteps: int, zero_terminal: bool) -> Tensor:
    alphas = np.cumprod(1 - np.linspace(start**0.5, end**0.5, timesteps, dtype=np.float64) ** 2)
    return torch.from_numpy(zero_terminal_snr(alphas) if zero_terminal else alphas).float()


def zero_terminal_snr(alphas: np.ndarray) -> np.ndarray:
    """Stretch a schedule so that it begins where it began and ends in pure noise (Lin et al. 2023, arXiv:2305.08891,
    algorithm 1). The last value is 2^-24, next to nothing, for solvers that divide by it."""
    roots = np.sqrt(alphas)
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return np.maximum(roots**2, 2.0**-24)


def q_sample(x0: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """Noisy latents x_t, float32. x0, noise (B,4,h,w); alphas (B,): `alphas_cumprod` at each sample's timestep."""
    a = alphas.view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def velocity(x0: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """The target of v-prediction (Salimans & Ho 2022, arXiv:2202.00512): sqrt(a) noise - sqrt(1-a) x0."""
    a = alphas.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * x0


def ddim_timesteps(steps: int, total: int = 1000, trailing: bool = False) -> np.ndarray:
    """`steps` distinct timesteps in 1..total-1, ascending. `trailing`: the last is total - 1, which a schedule of zero
    terminal SNR begins to draw from.

    Where `steps` divides `total` they are the original's, range(0, total, total // steps) + 1. Its formula gives too
    many values or runs past the end for other counts; those are spread evenly instead.
    """
    if not 1 <= steps < total:
        raise ValueError(f"sampling takes 1 to {total - 1} steps, not {steps}")
    if trailing:
        return np.round(np.arange(1, steps + 1) * total / steps).astype(np.int64) - 1
    if total % steps == 0:
        return np.arange(0, total, total // steps) + 1
    return np.arange(steps) * total // steps + 1


# ----------------------------------------------------------------------------------------------------------- solvers
def starting_noise(shape: Sequence[int], seed: int, first: int = 0) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal noise of `shape` (B,4,h,w) for images first, first + 1, ... of a seed, and the generators that
    can go on: what image i gets depends on (seed, i) alone, not on how many are drawn at once."""
    generators = [torch.Generator().manual_seed(data.mix("image", seed, first + i)) for i in range(shape[0])]
    return _noise(shape, generators), generators


def _noise(shape: Sequence[int], generators: Sequence[torch.Generator] | None) -> Tensor:
    if generators is None:
        return torch.randn(shape)
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators])


def ddim(
    eps_model: EpsModel,
    x_T: Tensor,
    steps: int,
    eta: float = 0.0,
    alphas: Tensor | None = None,
    generators: Sequence[torch.Generator] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    trailing: bool = False,
) -> Tensor:
    """Denoise x_T (B,4,h,w), standard normal, in `steps` steps; returns latents of the same shape.

    `eta` 0 is deterministic, 1 is as random as DDPM (noise from `generators`, one a sample, on the CPU). `alphas`: the
    schedule, Stable Diffusion's by default. `progress` wraps the list of steps (tqdm). `trailing`: see
    `ddim_timesteps`. The last step ends at alphas[0].
    """
    alphas = (alphas_cumprod() if alphas is None else alphas).cpu().double()
    timesteps = ddim_timesteps(steps, len(alphas), trailing)
    x = x_T
    for i in progress(range(steps - 1, -1, -1)):
        t = int(timesteps[i])
        a, a_prev = float(alphas[t]), float(alphas[timesteps[i - 1]] if i > 0 else alphas[0])
        eps = eps_model(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(a_prev) * x0 + math.sqrt(max(0.0, 1 - a_prev - sigma**2)) * eps
        if sigma > 0:
            x = x + sigma * _noise(x.shape, generators).to(x)
    return x


def dpm_solver(
    eps_model: EpsModel,
    x_T: Tensor,
    steps: int,
    alphas: Tensor | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    trailing: bool = False,
) -> Tensor:
    """DPM-Solver++ (2M): as `ddim`, with a second-order step in the log signal-to-noise ratio; deterministic.

    The first step and the last, which is a long one in that ratio, are of first order.
    """
    alphas = (alphas_cumprod() if alphas is None else alphas).cpu().double()
    timesteps = ddim_timesteps(steps, len(alphas), trailing)
    x, x0_before, lam_before = x_T, None, 0.0
    log_snr = lambda a: 0.5 * (math.log(a) - math.log1p(-a))  # log(sqrt(a) / sqrt(1-a))
    for i in progress(range(steps - 1, -1, -1)):
        t = int(timesteps[i])
        a, a_next = float(alphas[t]), float(alphas[timesteps[i - 1]] if i > 0 else alphas[0])
        lam, lam_next = log_snr(a), log_snr(a_next)
        eps = eps_model(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        step = lam_next - lam
        direction = x0
        if x0_before is not None and i > 0:
            direction = x0 + step / (2 * (lam - lam_before)) * (x0 - x0_before)
        x = math.sqrt((1 - a_next) / (1 - a)) * x - math.sqrt(a_next) * math.expm1(-step) * direction
        x0_before, lam_before = x0, lam
    return x


# ---------------------------------------------------------------------------------------------------------- guidance
def guided(
    model: ControlLDM,
    context: Tensor,
    negative: Tensor,
    hint: Tensor | None = None,
    scale: float = 9.0,
    strength: float = 1.0,
    guess_mode: bool = False,
    start: float = 0.0,
    end: float = 1.0,
    only_mid_control: bool = False,
) -> EpsModel:
    """The eps model that a solver calls: model, prompts, hint and guidance in one function.

    context, negative (B,77,D): the prompts and the negative prompts; hint (B,C,8h,8w) in [0,1] or None.
    eps = negative + scale * (prompted - negative), both computed in one batch; at scale 1 the prompted one alone.
    `strength` multiplies all residuals. `guess_mode` leaves the hint out of the negative half and scales residual i of
    13 by strength * 0.825**(12-i), so that the hint can do without a prompt. Control is on from fraction `start` to
    fraction `end` of the way from noise to image.
    """
    alphas = alphas_cumprod(model.config, model.device)
    two = scale != 1.0
    both = torch.cat([context, negative]) if two else context
    control_model = model.control_model if hint is not None else None
    guided_by = control_model.read_hint(hint) if control_model else None  # once for all steps

    def residuals(x: Tensor, t: Tensor) -> list[Tensor] | None:
        done = 1 - t[0].item() / len(alphas)
        if control_model is None or not start <= done <= end:
            return None
        double = two and not guess_mode
        x, t = (torch.cat([x, x]), torch.cat([t, t])) if double else (x, t)
        read = torch.cat([guided_by, guided_by]) if double else guided_by
        control = control_model.residuals(x, read, t, both if double else context, only_mid_control)
        last = len(control_model.zero_convs)  # 12: the residual of the middle block
        first = last - len(control) + 1
        control = [
            r * (strength * 0.825 ** (last - i) if guess_mode else strength) for i, r in enumerate(control, first)
        ]
        return [torch.cat([r, torch.zeros_like(r)]) for r in control] if two and guess_mode else control

    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        x2, t2 = (torch.cat([x, x]), torch.cat([t, t])) if two else (x, t)
        out = model.unet(x2, t2, both, residuals(x, t), only_mid_control).to(x.dtype)
        if model.config.prediction == "v":
            a = alphas[t2].view(-1, 1, 1, 1)
            out = a.sqrt() * out + (1 - a).sqrt() * x2
        if not two:
            return out
        prompted, unprompted = out.chunk(2)
        return unprompted + scale * (prompted - unprompted)

    return eps_model


@torch.no_grad()
def sample(
    model: ControlLDM,
    context: Tensor,
    negative: Tensor,
    hint: Tensor | None,
    size: tuple[int, int],
    steps: int = 20,
    scale: float | None = None,
    seed: int = 0,
    first: int = 0,
    solver: str = "ddim",
    eta: float = 0.0,
    progress: Callable[[Iterable], Iterable] = iter,
    **control: float | bool,
) -> Tensor:
    """Draw a batch of images: latents (B,4,height/8,width/8), scaled; `model.decode` paints them.

    context, negative (B,77,D); hint (B,C,height,width) in [0,1] or None; size (width, height), multiples of
    `model.config.multiple`; `scale` None is the model's own; `first` is the number of the batch's first image (see
    `starting_noise`); `control` are the settings of `guided`.
    """
    width, height = size
    shape = (len(context), model.config.unet.in_channels, height // model.vae.factor, width // model.vae.factor)
    x, generators = starting_noise(shape, seed, first)
    scale = model.config.guidance if scale is None else scale
    hint = None if hint is None else hint.to(model.device)
    eps_model = guided(model, context, negative, hint, scale, **control)
    alphas, trailing = alphas_cumprod(model.config), model.config.zero_terminal_snr
    if solver == "dpm":
        return dpm_solver(eps_model, x.to(model.device), steps, alphas, progress, trailing)
    return ddim(eps_model, x.to(model.device), steps, eta, alphas, generators, progress, trailing)


# --------------------------------------------------------------------------------------------------------------- CLI
def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw images with a trained ControlNet (or a plain Stable Diffusion model).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="the folder of a training run, or a Stable Diffusion file or diffusers folder")
    add("--base", help="with a run: another base file than the one it was trained on, or where that is now")
    add("--control", help="with a Stable Diffusion file: a ControlNet's file or folder to steer it with")
    add("--vae", help="a VAE's file or folder to take for the model's")
    add("--ema", action="store_true", help="take the UNet's moving average (model_ema.*) for its weights")
    add("--clip-skip", type=int, help="2 leaves out the text tower's last layer, as some SD 1.x models want")
    add("--prompt", required=True, help="what to draw")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--hint", help="the hint image (.png, .jpg, ...; .npy for other than 1, 3 or 4 channels); none: no control")
    add("--num", type=int, default=4, help="how many images")
    add("--batch-size", type=int, default=4, help="how many at once")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--solver", choices=("ddim", "dpm"), default="ddim", help="dpm (DPM-Solver++ 2M) needs fewer steps")
    add("--eta", type=float, default=0.0, help="ddim's randomness: 0 none, 1 as DDPM")
    add("--scale", type=float, help="guidance scale, 1 turns it off (default: what suits the model, 9 for SD)")
    add("--strength", type=float, default=1.0, help="control strength, 0 turns it off")
    add("--guess-mode", action="store_true", help="let the hint lead, with little or no prompt")
    add("--control-start", type=float, default=0.0, help="fraction of the way at which control begins")
    add("--control-end", type=float, default=1.0, help="fraction of the way at which control ends")
    add("--only-mid-control", action=argparse.BooleanOptionalAction, default=None,
        help="use the middle block's residual alone (default: as the run was trained)")  # fmt: skip
    add("--resolution", help="size of the images, N or WxH (default: the hint's)")
    add("--hint-resample", choices=tuple(data.RESAMPLE), help="nearest: for label maps (default: as the run, or area)")
    add(
        "--prediction",
        choices=("auto", "eps", "v"),
        default="auto",
        help="v for SD 2.1 at 768 px, which the file cannot tell",
    )
    add("--seed", type=int, default=0, help="the same seed draws the same images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--precision", choices=tuple(PRECISIONS), default="fp32", help="of the weights")
    add("--out", default="samples", help="folder for 0000.png, ... and grid.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = checkpoint.load_run(args.model) if checkpoint.is_run(args.model) else {}
    model = ControlLDM.from_file(
        args.model, prediction=args.prediction, base=args.base, control=args.control, vae=args.vae, ema=args.ema,
        clip_skip=args.clip_skip,
    )  # fmt: skip
    use_tf32(args.precision == "tf32")
    memory.keep_freed()
    model.to(args.device, computed_in(args.precision, args.device))
    hint = None
    if args.hint:
        if model.control_model is None:
            raise CheckpointError(
                f"{args.model}: no ControlNet in it, so a hint has no effect; attach or train one first"
            )
        hint = data.read_image(args.hint, model.control_model.hint_channels)
    if args.resolution:
        wanted = data.parse_resolution(args.resolution)
    else:
        wanted = (hint.shape[1], hint.shape[0]) if hint is not None else (model.config.resolution,) * 2
    size = data.fit_size(wanted, model.config.multiple)
    if size != wanted:
        multiple = model.config.multiple
        print(f"{wanted[0]}x{wanted[1]} becomes {size[0]}x{size[1]}: this UNet needs sides that {multiple} divides")
    if hint is not None:
        hint = data.resize(hint, size, data.RESAMPLE[args.hint_resample or run.get("hint_resample", "area")])
        hint = data.to_tensor(hint.astype(np.float32) / 255)
    only_mid = run.get("only_mid_control", False) if args.only_mid_control is None else args.only_mid_control

    out, images = Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tqdm(total=args.num * args.steps, desc="drawing", unit="step", disable=None) as bar:
        context, negative = model.encode_prompts([args.prompt, args.negative_prompt]).split(1)
        for first in range(0, args.num, args.batch_size):
            count = min(args.batch_size, args.num - first)
            each = lambda x: x.expand(count, *x.shape[1:])  # noqa: B023

            def progress(steps: Iterable) -> Iterable:
                for step in steps:
                    yield step
                    bar.update(count)  # noqa: B023

            latents = sample(
                model, each(context), each(negative), None if hint is None else each(hint[None]), size,
                args.steps, args.scale, args.seed, first, args.solver, args.eta, progress,
                strength=args.strength, guess_mode=args.guess_mode, start=args.control_start, end=args.control_end,
                only_mid_control=only_mid,
            )  # fmt: skip
            for i, image in enumerate(log.to_uint8(model.decode(latents)), first):
                Image.fromarray(image).save(out / f"{i:04d}.png")
                images.append(image)
    columns = {"hint": [log.hint_image(hint)]} if hint is not None else {}
    log.save_grid(out / "grid.png", columns | {f"{i:04d}": [im] for i, im in enumerate(images)}, [args.prompt])
    print(f"{len(images)} images and grid.png in {out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a bad input: one line, no traceback
        sys.exit(f"sampler.py: {e}")
