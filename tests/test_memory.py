"""The tricks for small GPUs: each saves what it says, and none changes what is learned."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import config as config_module
import data
import train
from config import GPU_PRESETS, PRESETS, Config, ConfigError, resolve
from layers import Linear, zero_module
from ldm import TINY, ControlLDM
from lowvram import estimate, prediction, tracking
from lowvram.optimizer import (
    EXP_AVG,
    EXP_AVG_SQ,
    AdamW,
    FusedAdamW,
    convert_state,
    dequantize,
    load_moment,
    quantize,
    quantize_squares,
    round_stochastically,
    store_moment,
)  # fmt: skip
from lowvram.streaming import BlockStreamer
from tests.test_train import config, equal, losses, weights  # noqa: F401 (config is a fixture)
from training import setup
from training.cache import prepare_batch
from training.distributed import Ranks
from training.interruption import Interruption
from training.setup import Trainer, build_trainer, zero_grad
from weights import CheckpointError, ModelSource, load_model, load_state_dict
from weights.runs import load_run, newest_checkpoint
from weights.writing import save_safetensors

# ------------------------------------------------------------------------------------------------- 8 bits for a number
HELD = {8: ("exp_avg.bits", "exp_avg_sq.bits"), 16: ("exp_avg", "exp_avg_sq")}  # where moments are kept


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    """Of magnitudes over six decades, as gradients have, with zeros and signs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g) * 10 ** (6 * torch.rand(count, generator=g) - 6)
    x[::17] = 0
    return x


def test_codes_keep_numbers_to_a_few_percent():
    x = numbers(3000)
    codes, scale = quantize(x)
    back = dequantize(codes, scale, EXP_AVG)
    assert codes.dtype == torch.int8 and len(scale) == 12
    largest = scale.repeat_interleave(256)[:3000]
    near = x.abs() > largest * 2**-14
    assert near.sum() > 1500 and ((back - x).abs()[near] <= 0.064 * x.abs()[near] + largest[near] * 2**-20).all()
    assert ((back - x).abs()[~near] <= largest[~near] * 2**-17.9).all() and (back[x == 0] == 0).all()
    again = quantize(back)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scale)  # what was rounded once stays


def test_second_moments_round_so_that_the_mean_is_right_and_never_to_zero():
    v, random = numbers(1000).square(), torch.Generator().manual_seed(1)
    noise = lambda: torch.randint(1 << 20, (1000,), generator=random, dtype=torch.int32)
    back = lambda *noise: dequantize(*quantize_squares(v, *noise), EXP_AVG_SQ)
    mean = torch.stack([back(noise()) for _ in range(400)]).mean(0)
    largest = torch.nn.functional.pad(v, (0, 24)).view(-1, 256).amax(1).repeat_interleave(256)[:1000]
    large = v > largest * 2**-28.5
    assert (
        ((mean / v - 1).abs()[large] < 0.02).all()
        and (mean > 0).all()
        and (mean[v == 0] <= largest[v == 0] * 2**-28.99).all()
    )
    assert ((back() / v - 1).abs()[large] > 0.02).any()  # rounding to the nearest alone is off by more


@pytest.mark.parametrize("bits", [8, 16])
def test_second_moments_follow_changes_of_a_thousandth(bits):
    """Squares that stay the same, a fifth above what the moments are: less than one in 5000 a step."""
    p = torch.nn.Parameter(torch.zeros(256 * 32))
    optimizer = AdamW({"p": p}, lr=0.0, bits=bits)
    first = torch.arange(p.numel()) % 256 == 0  # the largest of each block, which keep its scale
    seen = []
    for square, steps in ((1.0, 1), (1.2, 1500)):
        p.grad = torch.where(first, 32.0, square**0.5)
        for _ in range(steps):
            optimizer.step()
            state = optimizer.state[p]
            if square == 1.0:  # as if it had been so for ever
                store_moment(state, "exp_avg_sq", slice(0, p.numel()), p.grad.square())
                assert all(p.numel() * bits / 8 == v.nbytes for k, v in state.items() if k in HELD[bits])
        seen.append(load_moment(state, "exp_avg_sq", slice(0, p.numel()))[~first].mean().item())
    assert seen[0] == pytest.approx(1.0) and seen[1] == pytest.approx(1.2 - 0.2 * 0.999**1500, rel=0.01)


def test_stochastic_rounding_keeps_the_mean():
    x = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way between two numbers of bfloat16
    rounded = round_stochastically(x, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7} and abs(rounded.mean().item() - x[0].item()) < 5e-5
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -1.0])
    kept = round_stochastically(odd, torch.Generator().manual_seed(0))
    assert torch.equal(kept.float().nan_to_num(7), odd.nan_to_num(7))


def descend(optimizer_of, dtype=torch.float32, steps=300) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise a badly scaled quadratic from noisy gradients; returns where it came to, and the minimum."""
    generator = torch.Generator().manual_seed(0)
    wanted, scale = torch.randn(80, 64, generator=generator), 10 ** (3 * torch.rand(80, 64, generator=generator) - 2)
    p = torch.nn.Parameter(torch.zeros(80, 64, dtype=dtype))
    optimizer = optimizer_of({"p": p})
    for _ in range(steps):
        noise = 0.3 * torch.randn(80, 64, generator=generator)
        p.grad = (scale * (p.detach().float() - wanted + noise)).to(dtype)
        optimizer.step()
    return p.detach().float(), wanted


@pytest.mark.parametrize("bits", [8, 16])
def test_adamw_equals_that_of_torch_and_fewer_bits_come_as_near(bits):
    torchs = descend(lambda named: torch.optim.AdamW(named.values(), lr=0.02, weight_decay=0.1))
    fused = descend(lambda named: FusedAdamW(named.values(), 0.02, 0.1))
    assert torch.allclose(torchs[0], fused[0], atol=1e-6)
    error = lambda result: (result[0] - result[1]).square().mean().sqrt().item()
    same = descend(lambda named: AdamW(named, 0.02, 0.1, bits=32))
    assert torch.allclose(torchs[0], same[0], atol=1e-5)
    fewer = descend(lambda named: AdamW(named, 0.02, 0.1, bits=bits))
    assert not torch.equal(fewer[0], same[0]) and error(fewer) < 1.1 * error(torchs) < 0.2
    brain = descend(lambda named: AdamW(named, 0.02, 0.1, bits=bits), torch.bfloat16)
    assert error(brain) < 1.2 * error(torchs)


def test_small_updates_of_bfloat16_weights_are_not_lost():
    p = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = AdamW({"p": p}, lr=1e-5, weight_decay=0)
    for _ in range(100):  # 1e-3 in all; a single step is a 390th of what bfloat16 can tell beside 1
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(1 - 1e-3, abs=1e-4)


@pytest.mark.parametrize(("bits", "part"), [(8, 0.26), (16, 0.501)])
def test_a_lean_state_takes_its_part_and_changes_form_both_ways(bits, part):
    p = torch.nn.Parameter(torch.randn(40, 128, 3, 3).to(memory_format=torch.channels_last))
    lean, full = AdamW({"p": p}, 1e-3, bits=bits), torch.optim.AdamW([p], 1e-3)
    for optimizer in (lean, full):
        p.grad = torch.randn_like(p)
        optimizer.step()
    size = lambda o: sum(v.nbytes for v in o.state[p].values() if isinstance(v, torch.Tensor))
    assert size(lean) < part * size(full)
    stored = lambda o: {k: torch.as_tensor(v).float() if k == "step" else v for k, v in o.state[p].items()}
    there = convert_state(stored(lean), p, full)
    assert there["exp_avg"].stride() == p.stride()
    back = convert_state(there, p, lean)
    assert back["step"] == 1 and all(torch.equal(back[k], v) for k, v in lean.state[p].items() if k != "step")
    same = convert_state(stored(full), p, full)
    assert all(torch.equal(same[k], v) for k, v in full.state[p].items())


def test_a_state_in_16_bits_becomes_one_in_8():
    p = torch.nn.Parameter(torch.randn(64, 128))
    sixteen, eight = AdamW({"p": p}, 1e-3, bits=16), AdamW({"p": p}, 1e-3, bits=8)
    p.grad = torch.randn_like(p)
    sixteen.step()
    saved = {k: torch.as_tensor(v) for k, v in sixteen.state[p].items()}
    converted, whole = convert_state(saved, p, eight), slice(0, p.numel())
    for name in ("exp_avg", "exp_avg_sq"):
        before, after = load_moment(saved, name, whole), load_moment(converted, name, whole)
        assert f"{name}.bits" in converted and torch.allclose(
            before, after, rtol=0.07, atol=before.abs().max() * 2**-14
        )


# ------------------------------------------------------------------------------------------------------- the whole step
def random_batch(config) -> dict[str, torch.Tensor]:  # noqa: F811
    """What the loader would give for images of 64x64, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    batch = prediction.fake_batch(config, TINY, (64, 64))
    return {k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v for k, v in batch.items()}


def new_trainer(config) -> Trainer:  # noqa: F811
    return build_trainer(config, load_model(ModelSource(config.base, attach=True)))


def backward(trainer: Trainer, last: bool = True) -> torch.Tensor:
    """Add the gradient of a micro-batch; returns its part of the loss."""
    config = trainer.config  # noqa: F811
    batch = prepare_batch(trainer.model, random_batch(config), config.device, config.encode_batch_size)
    loss = train.diffusion_loss(trainer.model, batch).sum() / config.batch
    with trainer.home.offload_grads(last):
        trainer.scaler.scale(loss.to(trainer.home.device)).backward()
    return loss.detach()


def real_step(trainer: Trainer) -> float:
    """A step of the training loop; returns the norm of the gradient."""
    trainer.config.steps, norms = trainer.step + 1, []
    record = lambda step, **measured: norms.append(measured["grad_norm"])
    validation = SimpleNamespace(measure=lambda *_, **__: None, record=record, last_gain="")
    loader = (random_batch(trainer.config) for _ in itertools.count())
    save = lambda **_: True
    train.training_loop(trainer, loader, train.diffusion_loss, Ranks(), validation, save, Interruption())
    return norms[0]


LEAN = dict.fromkeys(PRESETS["fast"])


@pytest.mark.parametrize("change", [dict(optimizer_on_cpu=True), dict(stream=True, gradient_checkpointing=True)])
def test_where_weights_and_optimizer_lie_changes_nothing(config, change, tmp_path):  # noqa: F811
    plain = train.train(dataclasses.replace(config, gradient_checkpointing="stream" in change))
    moved = train.train(dataclasses.replace(config, out=str(tmp_path / "moved"), **change))
    assert losses(plain) == losses(moved) and equal(weights(plain), weights(moved))


@pytest.mark.parametrize("preset", ["8gb", "6gb", "4gb"])
def test_presets_train_as_the_fast_one_does(config, preset, tmp_path):  # noqa: F811
    config = dataclasses.replace(config, steps=6)  # noqa: F811
    fast = train.train(config)
    lean = train.train(dataclasses.replace(config, **LEAN, memory=preset, out=str(tmp_path / preset)))
    for a, b in zip(losses(fast), losses(lean), strict=True):
        assert a != b and a == pytest.approx(b, rel=0.02)
    kinds = {v.dtype for v in weights(lean).values()}
    assert kinds == ({torch.bfloat16} if preset == "6gb" else {torch.float32})
    kept = load_state_dict(newest_checkpoint(lean) / "optimizer.safetensors")
    assert any(".bits:" in k for k in kept) == (preset != "4gb")


@pytest.mark.parametrize("known", [True, False])
def test_a_cpu_without_bf16_keeps_weights_in_it_and_computes_in_fp32(config, monkeypatch, capsys, known):  # noqa: F811
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: known)
    lean = estimate.choose_preset(dataclasses.replace(config, **LEAN, memory="6gb"), Ranks())
    model = new_trainer(lean).model
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16} and lean.trained_weights == "bf16"
    assert model.unet.dtype == (torch.bfloat16 if known else torch.float32)
    assert ("no instructions for bf16" in capsys.readouterr().out) != known


def test_the_preset_may_change_on_resume(config):  # noqa: F811
    run, step = train.train(dataclasses.replace(config, **LEAN, memory="8gb")), config.steps
    for preset in ("fast", "4gb", "6gb", "8gb"):
        step += 2
        asked = config_module.parse(["--resume", str(run), "--memory", preset, "--steps", str(step)])
        train.train(asked.config, resume=asked.resume)
        assert load_run(run)["optimizer_bits"] == PRESETS[preset]["optimizer_bits"]
    assert len(losses(run)) == step and all(loss < 2 * losses(run)[0] for loss in losses(run))


def test_a_state_of_another_form_is_told_of(config):  # noqa: F811
    run = train.train(dataclasses.replace(config, **LEAN, memory="8gb"))
    path = newest_checkpoint(run) / "optimizer.safetensors"
    state = {k.replace(".bits:", ".codes:"): v.clone() for k, v in load_state_dict(path).items()}
    save_safetensors(path, state, {})
    (path.parent / "checksums.json").unlink()  # as before there were checksums
    asked = config_module.parse(["--resume", str(run), "--steps", "9"])
    with pytest.raises(
        CheckpointError, match="optimizer.safetensors: has no 'exp_avg.bits' of control_model.*--control"
    ):
        train.train(asked.config, resume=asked.resume)


@pytest.mark.parametrize(("bits", "wait_in"), [(32, torch.float32), (16, torch.bfloat16), (8, torch.bfloat16)])
def test_gradients_wait_for_a_lean_optimizer_in_bf16(config, bits, wait_in):  # noqa: F811
    """And are those of fp32 but for rounding, also when two micro-batches add up."""
    config = dataclasses.replace(  # noqa: F811
        resolve(config, "fast"), optimizer_bits=bits, accumulate_grad_batches=2, clip_grad_norm=1e-3, learning_rate=1e-3
    )
    lean, plain = new_trainer(config), new_trainer(dataclasses.replace(config, optimizer_bits=32))
    for last in (False, True):
        assert backward(lean, last) == backward(plain, last)
    trainable = lean.trainable
    for name, p in trainable.items():
        exact = plain.trainable[name].grad
        assert p.grad.dtype == wait_in and ((p.grad - exact).abs() <= exact.abs() * 2**-7).all()
    before = {k: p.detach().clone() for k, p in trainable.items()}
    for trainer in (lean, plain):
        zero_grad(trainer)
    norm, exact = real_step(lean), real_step(plain)
    assert norm == pytest.approx(exact, rel=0.01) and all(p.grad is None for p in trainable.values())
    moved = sum(not torch.equal(p, before[k]) for k, p in trainable.items())
    assert moved > 0.9 * len(before)


def test_offloaded_gradients_leave_as_they_are_made(config):  # noqa: F811
    config = dataclasses.replace(resolve(config, "fast"), optimizer_on_cpu=True, accumulate_grad_batches=2)  # noqa: F811
    trainer = new_trainer(config)
    trainable, home = trainer.trainable, trainer.home
    backward(trainer, last=False)
    whole = {k: p.grad.clone() for k, p in trainable.items()}
    assert all(p.grad is None for p in home.masters.values())
    backward(trainer, last=True)
    assert all(p.grad is None for p in trainable.values())
    home.wait_for_grads()
    assert all(torch.allclose(home.masters[k].grad, 2 * g, atol=1e-6) for k, g in whole.items())


def test_a_stream_brings_the_next_block_while_one_is_computed(config, monkeypatch):  # noqa: F811
    copied, real = [], BlockStreamer._copy
    monkeypatch.setattr(BlockStreamer, "_copy", lambda self, key: copied.append(key) or real(self, key))
    trainer = new_trainer(dataclasses.replace(resolve(config, "fast"), stream=True, gradient_checkpointing=True))
    unet = trainer.model.unet
    streamer, count, known = unet.weight_streamer, [], []
    for _ in range(3):
        copied.clear()
        before = dict(streamer.next_block)
        backward(trainer)
        count.append(len(copied))
        known.append(streamer.next_block == before)
    blocks, decoder = len(streamer.weights), len(unet.output_blocks)
    # the encoder, the decoder, and the decoder again in the backward pass
    assert count[2] == blocks + decoder and known == [False, False, True]
    assert len(streamer.ahead) == 1


class LoRA(Linear):
    """A linear layer with an update of low rank that trains while the layer itself is frozen."""

    def __init__(self, layer: Linear, rank: int = 2):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.lora_down = Linear(layer.in_features, rank, bias=False)
        self.lora_up = zero_module(Linear(rank, layer.out_features, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.lora_up(self.lora_down(x))


@pytest.fixture
def lora(monkeypatch) -> None:
    """A LoRA in the frozen decoder's cross-attention trains with the ControlNet, in every model that is made."""
    build, select = ControlLDM.__init__, setup.select_trainable

    def build_with_lora(self, *args, **kwargs) -> None:
        build(self, *args, **kwargs)
        for name, module in list(self.unet.output_blocks.named_modules()):
            if name.endswith("attn2"):
                module.to_q = LoRA(module.to_q)

    def select_with_lora(model: ControlLDM, config: Config) -> dict[str, torch.nn.Parameter]:  # noqa: F811
        extra = {name: p.requires_grad_(True) for name, p in model.named_parameters() if ".lora_" in name}
        return select(model, config) | {name: p.requires_grad_(True) for name, p in extra.items()}

    monkeypatch.setattr(ControlLDM, "__init__", build_with_lora)
    monkeypatch.setattr(setup, "select_trainable", select_with_lora)
    monkeypatch.setattr(estimate, "select_trainable", select_with_lora)


def lora_trainer(config) -> Trainer:  # noqa: F811
    """A trainer of a model with LoRAs in which nothing is zero, the same model at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = ControlLDM(TINY)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05) if p.ndim > 1 else torch.nn.init.ones_(p)
    return build_trainer(config, model)


def test_a_lora_in_a_streamed_block_trains_as_without_streaming(config, lora):  # noqa: F811
    config = dataclasses.replace(resolve(config, "fast"), gradient_checkpointing=True)  # noqa: F811
    plain, streamed = lora_trainer(config), lora_trainer(dataclasses.replace(config, stream=True))
    unet = streamed.model.unet
    for block in unet.output_blocks:
        names = {name for name, _ in block.named_parameters() if ".lora_" not in name}
        assert unet.weight_streamer.weights[id(block)].keys() == names
    for _ in range(3):  # from the second pass on blocks are copied ahead
        backward(plain)
        backward(streamed)
    loras = [name for name in plain.trainable if ".lora_" in name]
    assert len(loras) > 4
    for name, p in plain.trainable.items():
        assert torch.equal(p.grad, streamed.trainable[name].grad)
        assert p.grad.any() or ".lora_" not in name


@pytest.mark.parametrize("preset", ("exact", *GPU_PRESETS))
def test_a_lora_trains_under_every_preset_and_the_plan_sees_it(config, lora, preset):  # noqa: F811
    config = resolve(dataclasses.replace(config, **LEAN, learning_rate=1e-2), preset)  # noqa: F811
    trainer = lora_trainer(config)
    trainable = trainer.trainable
    before = {name: p.detach().clone() for name, p in trainable.items() if ".lora_" in name}
    real_step(trainer)
    assert before and not any(torch.equal(p, trainable[name]) for name, p in before.items())
    peak = estimate.predict(config, TINY, (32, 32))["training"]
    assert peak.parts["trained UNet"] >= sum(p.nbytes for p in before.values())


def test_attention_in_slices(config, monkeypatch):  # noqa: F811
    model = load_model(ModelSource(config.base, attach=True))
    rows, real = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, *a: rows.append(q.shape[2]) or real(q, *a)
    )
    seen, gradients = [], []
    for size in (0, 5):
        trainer = build_trainer(dataclasses.replace(resolve(config, "fast"), attention_slice=size), model)
        rows.clear()
        backward(trainer)
        seen.append(max(rows))
        gradients.append({k: p.grad for k, p in trainer.trainable.items()})
        zero_grad(trainer)
    assert seen == [16, 5]
    assert all(torch.allclose(g, gradients[1][k], atol=1e-6) for k, g in gradients[0].items())


# ----------------------------------------------------------------------------------------------------------- the plan
def test_the_prediction_is_what_a_real_step_holds(config, monkeypatch):  # noqa: F811
    """The same count on real tensors, made by the real step; and each preset takes less than the one before."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # as on a GPU
    totals = []
    for preset in ("exact", *GPU_PRESETS):
        lean = resolve(dataclasses.replace(config, **LEAN, batch_size=2, learning_rate=1e-4), preset)
        predicted = estimate.predict(lean, TINY, (64, 64))["training"].total - prediction.WORKSPACE
        trainer = new_trainer(lean)
        real_step(trainer)
        state = [v for e in trainer.optimizer.state.values() for v in e.values() if isinstance(v, torch.Tensor)]
        frozen = [p for p in trainer.model.unet.parameters() if not p.requires_grad]
        known = {"weights": [*trainer.trainable.values(), *frozen]}
        known |= {} if lean.optimizer_on_cpu else {"state": state}
        real = tracking.measure(lambda tracker, trainer=trainer: real_step(trainer), known)
        assert predicted == pytest.approx(real.total, rel=0.03), preset
        totals.append(predicted)
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0] / 3


def test_plan_as_text(config, base, folder, monkeypatch):  # noqa: F811
    asked = config_module.parse([
        "--plan", "--base", str(base), "--data", str(folder), "--resolution", "64", "--vram", "16", "--rate", "10",
        "--steps", "3600", "--memory", "6gb",
    ])  # fmt: skip
    monkeypatch.setattr(estimate, "largest_batch", lambda *_: 7)
    monkeypatch.setattr(estimate, "GPU_PRESETS", ("16gb", "4gb"))  # whose predictions take seconds each
    said = estimate.plan(asked.config, asked.vram, asked.rate)
    assert "tiny at 64x64, batch 4 x 1, --memory 6gb: bf16, gradient checkpointing" in said
    assert "--memory 16gb is the fastest preset that fits" in said and "0.4 h for 3600 steps at 10 images/s" in said
    assert "disk, cache" in said and "TFLOP a step" in said and "frozen UNet" not in said.splitlines()[0]
    monkeypatch.setattr(estimate, "predict", lambda *_: {"training": tracking.Peak(2**30)})
    monkeypatch.setattr(estimate, "flops", lambda *_: 10**12)
    none = estimate.plan(dataclasses.replace(asked.config, memory="auto"), vram=1)
    assert "none of the presets fits" in none and "--memory 4gb" in none


def test_plan_of_a_run_takes_the_speed_that_it_had(config, monkeypatch, capsys):  # noqa: F811
    run = train.train(config)
    monkeypatch.setattr(train.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(estimate, "predict", lambda *_: {"training": tracking.Peak(2**30)})
    monkeypatch.setattr(train, "read_metrics", lambda run: [{"step": 1, "images_per_second": 2.0}])
    train.main(["--plan", "--resume", str(run), "--steps", "3600"])
    assert "2.0 h for 3600 steps at 2 images/s" in capsys.readouterr().out


def test_the_plan_leaves_no_trace(config):  # noqa: F811
    """Fake tensors must not come to lie in what is kept for real runs."""
    estimate.predict(resolve(dataclasses.replace(config, channels_last=True), "fast"), TINY, (64, 64))
    assert losses(train.train(config))


def test_the_arithmetic_is_what_the_layers_need():
    with FakeTensorMode():
        conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            conv(torch.empty(2, 8, 10, 10))
    assert counter.get_total_flops() == 2 * 2 * 16 * 100 * 8 * 9
    config = Config(base="x")  # noqa: F811
    one = estimate.flops(config, TINY, (64, 64))
    assert one == estimate.flops(dataclasses.replace(config, batch_size=7, gradient_checkpointing=True), TINY, (64, 64))
    assert 3.5 < estimate.flops(config, TINY, (128, 128)) / one < 5  # four times the positions, not of prompts


def test_out_of_memory_says_what_would_fit(config, monkeypatch):  # noqa: F811
    config.checkpoint_freq, calls, real = 1, [], train.prepare_batch

    def sometimes(*args):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(train, "prepare_batch", sometimes)
    monkeypatch.setattr(estimate, "predict", lambda *_: {"training": tracking.Peak(2**30)})
    monkeypatch.setattr(estimate, "gpu_memory", lambda device: 2 * 2**30)
    with pytest.raises(CheckpointError, match="step-000002, is whole.*32x32, batch 4 x 1, fp32.*--batch-size 1 --acc"):
        train.train(config)
    assert newest_checkpoint(config.out).name == "step-000002"
    monkeypatch.setattr(estimate, "gpu_memory", lambda device: 10)
    size = lambda c, *_: {"training": tracking.Peak(c.batch_size * (1 if c.stream else 3))}
    monkeypatch.setattr(estimate, "predict", size)
    assert "the leanest is --memory 4gb --batch-size 1" in estimate.suggest_flags(resolve(config, "fast"))


def test_auto_takes_the_first_preset_that_fits(config, monkeypatch):  # noqa: F811
    need = {"16gb": 9, "12gb": 8, "8gb": 7, "6gb": 5, "5gb": 4, "4gb": 3}
    monkeypatch.setattr(estimate, "predict", lambda c, *_: {"training": tracking.Peak(need[c.out])})
    monkeypatch.setattr(estimate, "resolve", lambda c, name: dataclasses.replace(c, out=name))
    for room, wanted in ((9, "16gb"), (8, "12gb"), (7.5, "8gb"), (3, "4gb"), (2, None)):
        assert estimate.fastest_preset(config, TINY, (64, 64), room + estimate.CUDA_CONTEXT)[0] == wanted
    monkeypatch.undo()
    assert estimate.choose_preset(config, Ranks()).optimizer_bits == 32  # without a GPU there is nothing to fit


def test_what_is_given_beside_a_preset_wins(config, monkeypatch):  # noqa: F811
    """And what the preset would fill in gives way where the two do not go together."""
    free = dataclasses.replace(config, **LEAN)
    six = resolve(dataclasses.replace(free, precision="fp32"), "6gb")
    assert (six.precision, six.trained_weights, six.optimizer_bits, six.memory) == ("fp32", "bf16", 8, "6gb")
    four = resolve(dataclasses.replace(free, gradient_checkpointing=False), "4gb")
    assert (four.stream, four.optimizer_on_cpu) == (False, True)
    for name in ("is_available", "is_bf16_supported"):  # a GPU from before bfloat16
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: name == "is_available")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    old = {name: resolve(dataclasses.replace(free, device="cuda"), name) for name in PRESETS}
    assert [c.precision for c in old.values()] == ["fp32", "fp32"] + 6 * ["fp16"]
    assert [c.trained_weights for c in old.values()] == 7 * ["fp32"] + ["fp16"]
    for c in old.values():
        config_module.validate(c)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(stream=True), "--stream.*needs --gradient-checkpointing"),
        (dict(trained_weights="fp16"), "--trained-weights fp16 does not go with --precision fp32"),
        (dict(precision="fp16", trained_weights="bf16"), "--precision fp16; fp32 or fp16 does"),
        (dict(precision="fp16", trained_weights="fp16"), "fp16 needs --optimizer-on-cpu"),
        (dict(stream=True, gradient_checkpointing=True, compile=True), "--compile and --stream exclude"),
    ],
)
def test_settings_that_exclude_each_other(config, change, match):  # noqa: F811
    with pytest.raises(ConfigError, match=match):
        train.train(dataclasses.replace(config, **change))


def test_after_caching_only_what_draws_is_kept_in_memory(config, folder):  # noqa: F811
    model, whole = (load_model(ModelSource(config.base, attach=True)) for _ in range(2))
    config.cache = True
    train.build_samples(resolve(config, "fast"), model, data.FolderDataset(folder))
    gone = {name.split(".")[1] for name, p in model.named_parameters() if p.device.type == "meta"}
    assert gone == {"transformer", "encoder", "quant_conv"}
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(model.decode(z), whole.decode(z))
