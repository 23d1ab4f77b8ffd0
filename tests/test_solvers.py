"""Schedules and solvers against k-diffusion's formulas, written here in float64, and against diffusers' schedulers."""

import dataclasses
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DISABLE_TELEMETRY": "1"}

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import sampler
from ldm import SD15, TINY
from sampler import Sampling
from tests.conftest import distance
from weights import load_model

ALPHAS = sampler.alphas_cumprod(SD15)
KNOWN = ((1 - ALPHAS.double()) / ALPHAS.double()).sqrt().numpy()  # sigma of every timestep
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def model_eps(x: Tensor) -> Tensor:
    """A prediction that is no linear function of x, and does not look at the timestep."""
    return torch.tanh(1.5 * x) + 0.3 * x.flip(-1)


# ---------------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 25])
@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_schedules_of_k_diffusion(steps, spacing):
    """get_sigmas and get_sigmas_karras, with sigma and timestep interpolated in log sigma."""
    if spacing == "linspace":
        timesteps = np.linspace(999, 0, steps)
        sigmas = np.exp(np.interp(timesteps, np.arange(1000), np.log(KNOWN)))
    else:
        ramp, most, least = np.linspace(0, 1, steps), KNOWN[-1] ** (1 / 7), KNOWN[0] ** (1 / 7)
        sigmas = (most + ramp * (least - most)) ** 7
        timesteps = np.interp(np.log(sigmas), np.log(KNOWN), np.arange(1000))
    schedule = sampler.make_schedule(ALPHAS, steps, spacing)
    assert len(schedule) == steps + 1 and schedule[-1] == (0, 1.0)
    ours = np.array(schedule[:-1])
    assert np.abs(ours[:, 0] - timesteps).max() < 1e-9
    assert np.abs(np.sqrt((1 - ours[:, 1]) / ours[:, 1]) / sigmas - 1).max() < 1e-9
    assert ours[0, 0] == pytest.approx(999) and all(isinstance(t, float) for t, _ in schedule[:-1])


@pytest.mark.parametrize("steps", [1, 6, 20, 999])
def test_schedules_of_the_original(steps):
    """Whole timesteps, the alphas at them, and an end at alphas[0]: ddim and dpm keep them unless told otherwise."""
    for spacing, trailing in (("leading", False), ("trailing", True)):
        timesteps = sampler.ddim_timesteps(steps, 1000, trailing)[::-1].tolist()
        schedule = sampler.make_schedule(ALPHAS, steps, spacing)
        assert schedule == [(t, ALPHAS[t].double().item()) for t in [*timesteps, 0]]
        assert all(type(t) is int for t, _ in schedule)
        assert sampler.make_schedule(ALPHAS, steps, spacing, clean_end=True) == [*schedule[:-1], (0, 1.0)]
    for spacing in sampler.SPACINGS:
        with pytest.raises(ValueError, match="1 to 999 steps"):
            sampler.make_schedule(ALPHAS, 0, spacing)


def test_each_solver_has_the_spacing_that_users_expect():
    zero = dataclasses.replace(TINY, zero_terminal_snr=True)
    usual = {solver: sampler.usual_spacing(solver, SD15) for solver in sampler.SOLVERS}
    assert usual == {"ddim": "leading", "dpm": "leading", "euler": "linspace", "euler_a": "linspace"}
    assert [sampler.usual_spacing(s, zero) for s in ("ddim", "euler")] == ["trailing", "linspace"]
    for spacing in ("trailing", "linspace", "karras"):  # all start where there is no signal
        assert sampler.make_schedule(sampler.alphas_cumprod(zero), 5, spacing)[0][1] == pytest.approx(2**-24, rel=1e-6)


def test_alphas_between_timesteps():
    t = torch.tensor([0.0, 0.25, 998.5, 999.0, 123.0])
    sigmas = np.exp(np.interp(t.numpy(), np.arange(1000), np.log(KNOWN)))
    wanted = torch.from_numpy(1 / (1 + sigmas**2))
    assert torch.allclose(sampler.alphas_at(ALPHAS, t).double(), wanted, atol=1e-7, rtol=1e-5)
    whole = torch.tensor([0, 7, 999])
    assert torch.equal(sampler.alphas_at(ALPHAS, whole), ALPHAS[whole])


def test_the_model_is_asked_at_the_timesteps_of_the_schedule():
    asked = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return model_eps(x)

    for spacing, dtype in (("karras", torch.float32), ("leading", torch.int64)):
        asked.clear()
        schedule = sampler.make_schedule(ALPHAS, 5, spacing)
        sampler.denoise("dpm", eps, torch.randn(2, 4, 4, 4), 5, schedule=schedule)
        assert [t.dtype for t in asked] == [dtype] * 5 and all(t.shape == (2,) for t in asked)
        assert torch.allclose(torch.stack(asked)[:, 0].double(), torch.tensor(schedule)[:-1, 0].double(), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ solvers
def k_diffusion(solver: str, x: Tensor, sigmas: list[float], noises: list[Tensor]) -> Tensor:
    """The loops of sample_euler, sample_euler_ancestral and sample_dpmpp_2m, x in units of the signal."""
    before = None
    for i, (s, s_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        denoised = x - s * model_eps(x / (s**2 + 1) ** 0.5)
        d = (x - denoised) / s
        if solver == "euler":
            x = x + d * (s_next - s)
        elif solver == "euler_a":
            up = min(s_next, (s_next**2 * (s**2 - s_next**2) / s**2) ** 0.5)
            down = (s_next**2 - up**2) ** 0.5
            x = x + d * (down - s)
            x = x + noises[i] * up if s_next > 0 else x
        else:
            t, t_next = -np.log(s), -np.log(s_next) if s_next else np.inf
            h, direction = t_next - t, denoised
            if before is not None and s_next > 0:
                r = (t - -np.log(sigmas[i - 1])) / h
                direction = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * before
            x = s_next / s * x - np.expm1(-h) * direction
        before = denoised
    return x


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
@pytest.mark.parametrize("solver", ["euler", "euler_a", "dpm"])
def test_solvers_are_those_of_k_diffusion(solver, spacing, monkeypatch):
    x, steps = torch.randn(2, 4, 6, 6, dtype=torch.float64), 9
    noises = [torch.randn_like(x) for _ in range(steps)]
    queue = iter(noises)
    monkeypatch.setattr(sampler, "_noise", lambda shape, generators: next(queue))
    schedule = sampler.make_schedule(ALPHAS, steps, spacing)
    ours = sampler.denoise(solver, lambda x, t: model_eps(x), x, steps, schedule=schedule)
    sigmas = [((1 - a) / a) ** 0.5 for _, a in schedule]
    theirs = k_diffusion(solver, x / schedule[0][1] ** 0.5, sigmas, noises)
    assert distance(ours, theirs) < 1e-12
    assert solver == "euler_a" or next(queue) is noises[0]  # the others draw no noise


def draw_with(scheduler: diffusers.SchedulerMixin, x: Tensor, steps: int, ancestral: bool) -> Tensor:
    """Draw by a scheduler of diffusers. x is in the units in which the scheduler keeps its samples."""
    scheduler.set_timesteps(steps)
    more = dict(generator=torch.Generator().manual_seed(5)) if ancestral else {}
    for t in scheduler.timesteps:
        eps = model_eps(scheduler.scale_model_input(x, t))
        x = scheduler.step(eps, t, x, **more).prev_sample
    return x


@pytest.mark.parametrize(
    ("solver", "spacing", "scheduler"),
    [
        ("euler", "linspace", diffusers.EulerDiscreteScheduler(**BETAS)),
        ("euler", "karras", diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)),
        ("euler", "trailing", diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")),
        ("euler", "leading", diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)),
        ("euler_a", "linspace", diffusers.EulerAncestralDiscreteScheduler(**BETAS)),
        ("dpm", "karras", diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)),
    ],
)
@pytest.mark.parametrize("steps", [10, 28])  # with these, linspace's timesteps are whole: diffusers interpolates sigma
def test_solvers_are_those_of_diffusers(solver, spacing, scheduler, steps):
    steps = 20 if steps == 28 and spacing in ("leading", "trailing") else steps  # a divisor of 1000
    x, schedule = torch.randn(1, 4, 8, 8), sampler.schedule_for(Sampling(steps, solver, spacing=spacing), SD15)
    ancestral = solver == "euler_a"
    generators = [torch.Generator().manual_seed(5)] if ancestral else None
    ours = sampler.denoise(solver, lambda x, t: model_eps(x), x, steps, schedule=schedule, generators=generators)
    theirs = draw_with(scheduler, x if solver == "dpm" else x / schedule[0][1] ** 0.5, steps, ancestral)
    assert distance(ours, theirs) < 1e-4  # they count in float32, with betas of float32
    timesteps = np.array(schedule)[:-1, 0]
    timesteps = timesteps.round() if solver == "dpm" else timesteps  # its model is asked at whole timesteps
    # diffusers rounds some timesteps the other way
    assert np.abs(timesteps - scheduler.timesteps.numpy()).max() < (1.01 if solver == "dpm" else 0.01)


@torch.no_grad()
def test_the_v_model_draws_alike_in_diffusers():
    """The shipped model predicts v; with Karras spacing it is asked between timesteps, where v becomes eps by alpha."""
    model = load_model("models/tiny_sd.safetensors")
    context, negative = model.encode_prompts(["gold circle with navy background", ""]).split(1)
    settings = Sampling(steps=6, solver="euler", spacing="karras", scale=1.0, seed=3)
    ours = sampler.sample(model, context, negative, [], (64, 64), settings)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=TINY.linear_start, beta_end=TINY.linear_end, beta_schedule="scaled_linear",
        prediction_type="v_prediction", use_karras_sigmas=True,
    )  # fmt: skip
    scheduler.set_timesteps(6)
    x = sampler.starting_noise((1, 4, 8, 8), 3)[0]
    x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        v = model.unet(scheduler.scale_model_input(x, t), t[None], context)
        x = scheduler.step(v, t, x).prev_sample
    assert distance(ours, x) < 1e-3


@torch.no_grad()
def test_v_becomes_eps_by_the_alpha_between_timesteps(monkeypatch):
    model, x, v = load_model("models/tiny_sd.safetensors"), torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    monkeypatch.setattr(type(model.unet), "forward", lambda self, x, t, context, control=None: v)
    alphas, context = sampler.alphas_cumprod(model.config), torch.zeros(1, 77, 64)
    for t in (0.5, 700.25):
        eps = sampler.make_cfg_model(model, context, context, scale=1.0)(x, torch.tensor([t]))
        sigmas = ((1 - alphas) / alphas).sqrt().numpy()
        a = 1 / (1 + np.exp(np.interp(t, np.arange(1000), np.log(sigmas))) ** 2)
        assert torch.allclose(eps, a**0.5 * v + (1 - a) ** 0.5 * x, atol=1e-5)


# --------------------------------------------------------------------------------------------------- sample's settings
@pytest.fixture(scope="module")
def tiny():
    return load_model("models/tiny_sd.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_images_do_not_depend_on_the_batch(tiny, solver):
    context = tiny.encode_prompts(["red circle with blue background"]).expand(3, -1, -1)
    settings = Sampling(steps=3, solver=solver, eta=0.5, scale=1.0)
    images = [(7, 0), (0, 5), (7, 1)]
    draw = lambda part: sampler.sample(tiny, context[part], context[part], [], (32, 32), settings, images=images[part])
    together = draw(slice(0, 3))
    for i in range(3):
        assert torch.allclose(together[i : i + 1], draw(slice(i, i + 1)), atol=1e-4)
    again = sampler.sample(tiny, context[:1], context[:1], [], (32, 32), dataclasses.replace(settings, seed=7), first=1)
    assert torch.allclose(again, together[2:], atol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=0.1)


@torch.no_grad()
def test_each_step_is_shown_and_can_end_the_drawing(tiny):
    context, seen = tiny.encode_prompts(["red circle with blue background"]), []
    settings = Sampling(steps=4, solver="dpm", scale=1.0)
    plain = sampler.sample(tiny, context, context, [], (32, 32), settings)
    shown = sampler.sample(tiny, context, context, [], (32, 32), settings, on_step=seen.append)
    assert torch.equal(plain, shown) and [(s.number, s.steps) for s in seen] == [(i, 4) for i in (1, 2, 3, 4)]
    assert torch.allclose(seen[-1].x0, plain, atol=0.1)  # what is shown at last is nearly the result
    assert not torch.allclose(seen[0].x0, plain, atol=0.1)

    class Cancelled(Exception):
        pass

    def cancel(step: sampler.SolverStep) -> None:
        seen.append(step)
        if step.number == 2:
            raise Cancelled

    seen.clear()
    with pytest.raises(Cancelled):
        sampler.sample(tiny, context, context, [], (32, 32), settings, on_step=cancel)
    assert len(seen) == 2


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["auto", "karras"])
@pytest.mark.parametrize(("fraction", "made"), [(1.0, 10), (0.62, 6), (0.3, 3), (0.0, 1)])
def test_image_to_image(tiny, spacing, fraction, made):
    """The last steps of the schedule, from the picture with the noise that the first of them expects."""
    context, init, seen = tiny.encode_prompts(["red circle with blue background"]), torch.randn(1, 4, 4, 4), []
    settings = Sampling(steps=10, scale=1.0, seed=9, spacing=spacing, denoise=fraction)
    latents = sampler.sample(tiny, context, context, [], (32, 32), settings, init=init, on_step=seen.append)
    alphas = sampler.alphas_cumprod(tiny.config)
    schedule = sampler.make_schedule(alphas, 10, "leading" if spacing == "auto" else spacing)[-1 - made :]
    assert [s.alpha for s in seen] == [alpha for _, alpha in schedule[:-1]]
    noise = sampler.starting_noise((1, 4, 4, 4), 9)[0]
    first = schedule[0][1]
    assert torch.allclose(seen[0].x, first**0.5 * init + (1 - first) ** 0.5 * noise, atol=1e-6)
    assert fraction or (latents - init).norm() < 0.3 * init.norm()
    ignored = sampler.sample(tiny, context, context, [], (32, 32), settings)  # without init all steps are made
    assert torch.equal(
        ignored, sampler.sample(tiny, context, context, [], (32, 32), dataclasses.replace(settings, denoise=1.0))
    )
