"""Muon: the update is the formula, PyTorch's own agrees on matrices, and a resumed run is the run not stopped."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
from config import Config, ConfigError, resolve
from ldm import TINY
from lowvram import estimate
from lowvram.estimate import plan, predict
from lowvram.muon import COEFFICIENTS, Muon, muon_flops, orthogonalize
from tests.test_memory import descend
from tests.test_parallel import torchrun
from tests.test_train import config, equal, losses, weights  # noqa: F401 (config is a fixture)
from weights import load_state_dict
from weights.runs import newest_checkpoint


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 7), (7, 1), (1, 1), (8, 40), (40, 8)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):  # what the steps do to a singular value
        a, b, c = COEFFICIENTS
        s = a * s + b * s**3 + c * s**5
    found = orthogonalize(matrix[None], torch.float64)[0]
    assert torch.allclose(found, u * s @ v, atol=1e-9)
    assert (orthogonalize(matrix.float()[None])[0] - found).abs().max() < 1e-4
    assert torch.linalg.matrix_norm(found, 2) < 1.3
    assert orthogonalize(torch.zeros(1, *shape)).abs().sum() == 0


def test_matrices_of_one_shape_are_made_orthogonal_together():
    matrices = (
        torch.randn(3, 6, 30, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1e-9, 1.0, 1e6])[:, None, None]
    )
    together = orthogonalize(matrices)
    for matrix, found in zip(matrices, together, strict=True):
        assert torch.allclose(orthogonalize(matrix[None])[0], found, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (4, 40), (40, 4), (9, 9)])
def test_flops_are_those_that_are_computed(shape, dtype):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(1, *shape), dtype)
    assert counter.get_total_flops() == muon_flops([torch.Size(shape), torch.Size((5,))], dtype)


def formula(gradients, start, rate, decay) -> torch.Tensor:
    """Muon in float64, written down directly, with the singular value decomposition."""
    w, average = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for g in gradients:
        average = 0.95 * average + 0.05 * g.double()
        ahead = 0.05 * g.double() + 0.95 * average
        u, s, v = torch.linalg.svd(ahead.flatten(1), full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rows, columns = ahead.flatten(1).shape
        w = w * (1 - rate * decay) - rate * max(1, rows / columns) ** 0.5 * (u * s @ v).view(w.shape)
    return w


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (12, 3, 3, 3), (4, 5, 1, 1)])
def test_steps_are_the_formula(shape):
    generator = torch.Generator().manual_seed(1)
    start, gradients = torch.randn(shape, generator=generator), torch.randn((4, *shape), generator=generator)
    for memory_format in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
        p = nn.Parameter(start.clone(memory_format=memory_format) if len(shape) == 4 else start.clone())
        optimizer = Muon({"p": p}, 1e-3, 0.02, 0.1)
        for g in gradients:
            p.grad = g.clone(memory_format=torch.preserve_format)
            optimizer.step()
        assert (p.detach() - formula(gradients, start, 0.02, 0.1)).abs().max() < 2e-5


def test_pytorch_s_own_agrees_on_matrices():
    generator = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(24, 16, generator=generator), torch.randn(5, 24, 16, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (Muon({"p": ours}, 1e-3, 0.02, 0.1), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1))
    for g in gradients:
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # PyTorch's iterates in bfloat16


def test_vectors_move_by_adamw_at_their_own_rate():
    named = {"matrix": nn.Parameter(torch.ones(4, 4)), "bias": nn.Parameter(torch.ones(4))}
    alone = nn.Parameter(torch.ones(4))
    optimizer = Muon(named, 1e-2, 0.5, 0.0)
    torchs = torch.optim.AdamW([alone], lr=1e-2, weight_decay=0.0)
    for p in (*named.values(), alone):
        p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
    optimizer.step()
    torchs.step()
    assert torch.allclose(named["bias"], alone, atol=1e-7)
    assert [group.get("rate_factor", 1.0) for group in optimizer.param_groups] == [1.0, 50.0]
    assert "exp_avg_sq" in optimizer.state[named["bias"]] and "exp_avg_sq" not in optimizer.state[named["matrix"]]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_moment_in_fewer_bits_comes_as_near(bits):
    error = lambda result: (result[0] - result[1]).square().mean().sqrt().item()
    whole = descend(lambda named: Muon(named, 1e-3, 0.02, 0.0))
    lean = descend(lambda named: Muon(named, 1e-3, 0.02, 0.0, bits))
    assert error(lean) < 1.1 * error(whole)


def test_the_rate_of_the_matrices_follows_the_schedule(config, monkeypatch):  # noqa: F811
    seen = []
    step = Muon.step
    monkeypatch.setattr(Muon, "step", lambda self: seen.append([g["lr"] for g in self.param_groups]) or step(self))
    settings = dict(optimizer="muon", muon_rate=0.05, warmup_steps=2, lr_schedule="cosine")
    train.train(dataclasses.replace(config, **settings))
    rates = [train.learning_rate(dataclasses.replace(config, **settings), n) for n in range(4)]
    assert seen == [[rate, pytest.approx(50 * rate)] for rate in rates]
    with pytest.raises(ConfigError, match="--learning-rate has to be above 0"):
        train.train(dataclasses.replace(config, optimizer="muon", learning_rate=0.0))


@pytest.mark.parametrize(
    "change",
    [
        {"channels_last": True},
        {"memory": "6gb", "ema_decay": 0.9},
        {"memory": "4gb", "accumulate_grad_batches": 2, "batch_size": 2},
    ],
)
def test_resumed_equals_never_stopped(config, change, tmp_path):  # noqa: F811
    config = dataclasses.replace(config, **change, optimizer="muon", steps=5, checkpoint_freq=2, keep_checkpoints=0)
    whole, stopped = train.train(config), tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for later in ("step-000004", "step-000005"):
        shutil.rmtree(stopped / "checkpoints" / later)
    train.train(train.parse(["--resume", str(stopped)]).config, resume=stopped)
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert equal(*(load_state_dict(newest_checkpoint(run) / file) for run in (whole, stopped)))
    moments = load_state_dict(newest_checkpoint(whole) / "optimizer.safetensors")
    weight = "control_model.zero_convs.0.0.weight"
    assert any(k.endswith(weight) for k in moments) and f"exp_avg_sq:{weight}" not in moments
    adamw = train.train(dataclasses.replace(config, optimizer="adamw", out=str(tmp_path / "adamw")))
    assert not equal(weights(whole), weights(adamw))
    with pytest.raises(ConfigError, match="--optimizer cannot change on resume"):
        train.parse(["--resume", str(stopped), "--optimizer", "adamw"])


def test_accumulation_and_ranks_give_the_same_run(config, tmp_path):  # noqa: F811
    config.steps, config.optimizer = 3, "muon"
    one = train.train(dataclasses.replace(config, batch_size=4, out=str(tmp_path / "one")))
    split = dataclasses.replace(config, batch_size=1, accumulate_grad_batches=4, out=str(tmp_path / "split"))
    assert losses(train.train(split)) == pytest.approx(losses(one), rel=1e-4)
    done = torchrun(
        2, "--base", config.base, "--data", config.data, "--cache-dir", config.cache_dir, "--out",
        str(tmp_path / "ranks"), "--steps", "3", "--batch-size", "2", "--optimizer", "muon", "--learning-rate",
        str(config.learning_rate), "--logger-freq", "0", "--workers", "0", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "ranks") == pytest.approx(losses(one), rel=1e-4)


def test_the_plan_knows_its_memory_and_arithmetic(monkeypatch):
    adamw = resolve(Config(base="tiny", out="x", memory="fast", device="cpu", resolution="64", batch_size=1), "fast")
    muon = dataclasses.replace(adamw, optimizer="muon")
    state = [predict(c, TINY, (64, 64))["training"].parts["optimizer state"] for c in (adamw, muon)]
    assert 0.5 * state[0] < state[1] < 0.51 * state[0]
    monkeypatch.setattr(estimate, "GPU_PRESETS", ())  # the predictions of presets take seconds each
    assert "Muon" in plan(muon)
