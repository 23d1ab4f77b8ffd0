"""Solvers, guidance, and the command line that draws."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import drawing.draw
import drawing.loading
import sampler
from ldm import SD15, TINY, ControlLDM
from sampler import Control, Sampling
from weights import CheckpointError, ModelSource, load_model
from weights.writing import save_safetensors


def test_timesteps_for_every_count():
    for steps in range(1, 1000):
        t = sampler.ddim_timesteps(steps)
        assert len(t) == steps == len(set(t.tolist())) and t.min() >= 1 and t.max() <= 999
        if 1000 % steps == 0:
            assert t.tolist() == list(range(1, 1000, 1000 // steps))
    with pytest.raises(ValueError):
        sampler.ddim_timesteps(0)


def gaussian(mean: float, deviation: float, alphas: torch.Tensor) -> sampler.EpsModel:
    """The exact eps of data that is normal with this mean and deviation."""

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alphas[t].double().view(-1, 1, 1, 1)
        return (x - a.sqrt() * mean) * (1 - a).sqrt() / (a * deviation**2 + 1 - a)

    return eps


def test_solvers_reach_the_exact_solution():
    """For normal data the flow from noise to data is known; DPM-Solver++ is nearer to it than DDIM."""
    alphas = sampler.alphas_cumprod(SD15)
    mean, deviation = 1.5, 0.3
    x = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    spread = lambda a: (a * deviation**2 + 1 - a).sqrt()
    last, eps = alphas[0].double(), gaussian(mean, deviation, alphas)

    def error(solver, steps: int) -> float:
        first = alphas[sampler.ddim_timesteps(steps)[-1]].double()
        exact = last.sqrt() * mean + (x - first.sqrt() * mean) * spread(last) / spread(first)
        return (solver(eps, x, steps) - exact).abs().max().item()

    ddim, dpm = ([error(f, steps) for steps in (50, 100, 200)] for f in (sampler.ddim, sampler.dpmpp_2m))
    assert ddim[0] < 0.15 and all(b < a for a, b in zip(ddim, dpm, strict=True))
    assert ddim[2] > 0.48 * ddim[1] and dpm[2] < 0.42 * dpm[1]  # twice the steps: half the error, or less than that
    noisy = sampler.ddim(eps, x, 200, eta=1.0)
    assert abs(noisy.mean().item() - last.sqrt().item() * mean) < 0.05
    assert abs(noisy.std().item() - spread(last).item()) < 0.05


def test_v_prediction_is_the_same_model():
    """A model that says v is turned into one that says eps."""
    x0, noise = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    a = sampler.alphas_cumprod()[torch.tensor([1, 500, 999])]
    x, v = sampler.q_sample(x0, noise, a), sampler.velocity(x0, noise, a)
    b = a.view(-1, 1, 1, 1)
    assert torch.allclose(b.sqrt() * v + (1 - b).sqrt() * x, noise, atol=1e-5)
    assert torch.allclose(b.sqrt() * x - (1 - b).sqrt() * v, x0, atol=1e-4)


@pytest.fixture(scope="module")
def steered(base) -> ControlLDM:
    """A model whose ControlNet says something, and whose UNet says eps."""
    model = load_model(ModelSource(base, attach=True, prediction="eps"))
    with torch.no_grad():
        for p in model.control_model.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return model


@torch.no_grad()
def test_guidance_settings(steered):
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    c, n, hint = torch.randn(1, 77, 64), torch.randn(1, 77, 64), torch.rand(1, 3, 64, 64)
    close = lambda a, b: torch.allclose(a, b, atol=1e-4)
    net = steered.control_model

    def eps(scale: float, hint=None, guess_mode: bool = False, **control) -> torch.Tensor:
        controls = [] if hint is None else [Control(net, hint, **control)]
        return sampler.make_cfg_model(steered, c, n, controls, scale, guess_mode)(x, t)

    plain, controlled = steered.predict(x, t, c), steered.predict(x, t, c, hint)
    assert close(eps(scale=1.0), plain) and close(eps(scale=1.0, hint=hint), controlled)
    assert not close(plain, controlled)
    negative = steered.predict(x, t, n, hint)
    assert close(eps(scale=3.0, hint=hint), negative + 3 * (controlled - negative))
    assert close(eps(scale=3.0, hint=hint, strength=0.0), eps(scale=3.0))
    assert close(eps(scale=3.0, hint=hint, start=0.6), eps(scale=3.0))  # t = 500 is half the way
    assert close(eps(scale=3.0, hint=hint, end=0.4), eps(scale=3.0))
    assert close(eps(scale=3.0, hint=hint, start=0.4, end=0.6), eps(scale=3.0, hint=hint))
    residuals = steered.control_model(x, hint, t, c)
    last = len(residuals) - 1
    guess = steered.unet(x, t, c, [r * 0.5 * 0.825 ** (last - i) for i, r in enumerate(residuals)])
    unprompted = steered.unet(x, t, n)
    assert close(eps(scale=2.0, hint=hint, strength=0.5, guess_mode=True), unprompted + 2 * (guess - unprompted))
    config = steered.config
    steered.config = dataclasses.replace(config, prediction="v")
    a = sampler.alphas_cumprod(steered.config)[500]
    assert close(eps(scale=1.0, hint=hint), a.sqrt() * controlled + (1 - a).sqrt() * x)
    steered.config = config
    twice = sampler.make_cfg_model(steered, c, n, [Control(net, hint, 0.25), Control(net, hint, 0.75)], 1.0)(x, t)
    assert close(twice, controlled)  # the residuals of several ControlNets are added
    net.only_mid_control = True
    only = eps(scale=1.0, hint=hint)
    assert close(only, steered.predict(x, t, c, hint)) and not close(only, controlled)
    net.only_mid_control = False
    both = [r * 1 for r in residuals[:-1]] + [residuals[-1] * 2]
    assert all(map(torch.equal, sampler.add_residuals(residuals[-1:], residuals), both))


def test_the_hint_is_read_once(steered, monkeypatch):
    seen, read = [], steered.control_model.embed_hint
    monkeypatch.setattr(steered.control_model, "embed_hint", lambda hint: seen.append(hint) or read(hint))
    context = torch.randn(2, 77, steered.config.text.width)
    controls = [Control(steered.control_model, torch.rand(1, 3, 64, 64))]
    sampler.sample(steered, context[:1], context[1:], controls, (64, 64), Sampling(steps=4, scale=2.0))
    assert len(seen) == 1


def test_image_does_not_depend_on_the_batch(steered):
    c = steered.encode_prompts(["a", "b", "c"])
    n = steered.encode_prompts([""]).expand_as(c)
    settings = Sampling(steps=3, seed=5, eta=0.5)
    together = sampler.sample(steered, c, n, [], (64, 64), settings)
    third = sampler.sample(steered, c[2:], n[2:], [], (64, 64), settings, first=2)
    assert torch.allclose(together[2:], third, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_command_line(base, tmp_path, capsys):
    model = load_model(ModelSource(base, attach=True, hint_channels=1))
    file = tmp_path / "m.safetensors"
    save_safetensors(file, model.state_dict(), {"config": TINY.to_json()})
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(tmp_path / "hint.png")
    out = tmp_path / "out"
    args = ["--model", str(file), "--prompt", "red circle", "--hint", str(tmp_path / "hint.png"), "--steps", "2"]
    sampler.main([*args, "--num", "3", "--batch-size", "2", "--out", str(out), "--solver", "dpm", "--guess-mode"])
    assert "70x50 becomes 64x64" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["0000.png", "0001.png", "0002.png", "grid.png"]
    with Image.open(out / "0002.png") as image:
        assert image.size == (64, 64)
    with pytest.raises(ValueError, match="no such image"):
        sampler.main([*args, "--hint", str(tmp_path / "nothing.png"), "--out", str(out)])
    with pytest.raises(CheckpointError, match="has no ControlNet"):
        sampler.main([*args, "--model", str(base), "--out", str(out)])
    sampler.main(
        [
            "--model",
            str(base),
            "--prompt",
            "x",
            "--num",
            "1",
            "--steps",
            "1",
            "--resolution",
            "32x64",
            "--out",
            str(out),
        ]
    )
    with Image.open(out / "0000.png") as image:
        assert image.size == (32, 64)


def test_pictures_much_larger_than_a_run_trained_on_are_told(evil_run, tmp_path, capsys):
    """A photo as hint has many megapixels, which no GPU draws."""
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(tmp_path / "hint.png")
    args = [
        "--model", str(evil_run), "--hint", str(tmp_path / "hint.png"), "--prompt", "x", "--steps", "1", "--num", "1",
    ]  # fmt: skip
    for more, told in (([], True), (["--resolution", "96x64"], False), (["--resolution", "32"], False)):
        sampler.main([*args, *more, "--out", str(tmp_path / "out"), "--overwrite"])
        line = "drawn at 96x64, the size of the hint, though trained at 32x32: --resolution 32x32 takes less"
        assert (line in capsys.readouterr().out) == told
    sampler.main([*args[:2], *args[4:], "--out", str(tmp_path / "out"), "--overwrite"])
    assert "drawn at 128x128, the size of the model, though trained at 32x32" in capsys.readouterr().out


def test_a_hint_is_read_as_the_run_read_its_hints_and_what_is_cut_is_told(base, tmp_path, capsys, monkeypatch):
    model = load_model(ModelSource(base, attach=True, hint_channels=1))
    run, seen = tmp_path / "m.safetensors", []
    save_safetensors(run, model.state_dict(), {"config": TINY.to_json()})
    ink = np.zeros((32, 64, 2), np.uint8)
    ink[10:20, :, 1] = 255
    Image.fromarray(ink).save(tmp_path / "ink.png")
    Image.fromarray(np.full((64, 64), 8000, np.uint16)).save(tmp_path / "depth.png")

    def sample(model, context, negative, controls, size, settings, **_):  # noqa: ANN001, ANN003, ANN202
        seen.append(controls[0].hint[0])
        return torch.zeros(len(context), 4, size[1] // 8, size[0] // 8)

    monkeypatch.setattr(drawing.draw, "sample", sample)
    monkeypatch.setattr(drawing.loading, "is_run", lambda path: True)
    settings = {}
    monkeypatch.setattr(drawing.loading, "load_run", lambda path: settings)
    out = ["--out", str(tmp_path / "out"), "--num", "1"]
    args = ["--model", str(run), "--prompt", "red circle", *out, "--hint"]
    sampler.main([*args, str(tmp_path / "ink.png"), "--resolution", "32"])
    assert "ink.png: is 64x32, the images 32x32: 50% of the hint is cut off" in capsys.readouterr().out
    assert seen[-1][0, 0, 0] == 1 and seen[-1][0, 15, 0] == 0
    settings.update(hint_ground="black", hint_scale=8000.0)
    sampler.main([*args, str(tmp_path / "depth.png"), "--negative-prompt", "very " * 80])
    said = capsys.readouterr().out
    assert seen[-1].min() == 1 and "cut off" in said and "--negative-prompt has 80 tokens" in said
    sampler.main([*args, str(tmp_path / "depth.png"), "--hint-scale", "16000"])
    assert abs(seen[-1].max() - 0.5) < 0.01 and not capsys.readouterr().out.count("cut off")
    sampler.main([*args, str(tmp_path / "ink.png"), "--hint-scale", "0"])
    assert not seen[-1].any()  # black ink on the run's black ground
