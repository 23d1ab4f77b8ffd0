"""What `--memory` names, which preset is taken, and how fast each is reckoned to be."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train
from config import GPU_PRESETS, PRESETS, Config, resolve
from ldm import TINY
from lowvram import estimate, prediction, speed
from lowvram.muon import Muon
from lowvram.offload import to_pinned_cpu
from lowvram.optimizer import AdamW
from lowvram.speed import COMMON, Machine, Operation, seconds
from lowvram.tracking import Peak, measure
from tests.test_train import config, equal, weights  # noqa: F401 (config is a fixture)
from training.distributed import Ranks
from weights.runs import load_run
from weights.writing import save_json

GIB = 2**30
# The least that has every part of a step: predictions of it are quick.
SMALL = dataclasses.replace(
    TINY,
    unet=dataclasses.replace(TINY.unet, channel_mult=(1, 2), attention_resolutions=(2,)),
    vae=dataclasses.replace(TINY.vae, ch=8, ch_mult=(1, 1, 1, 1)),
)


def test_the_old_name_of_exact(config):  # noqa: F811
    """Runs and commands that say `fast` mean what they meant: fp32 throughout."""
    old, new = (resolve(config, name) for name in ("fast", "exact"))
    assert (old.precision, old.optimizer_bits, old.trained_weights, old.memory) == ("fp32", 32, "fp32", "fast")
    assert dataclasses.replace(old, memory="exact") == new and "fast" not in GPU_PRESETS
    assert set(GPU_PRESETS) == set(PRESETS) - {"exact", "fast"}


def test_a_run_that_says_fast_goes_on(config, tmp_path):  # noqa: F811
    whole = train.train(dataclasses.replace(config, steps=4))
    assert load_run(whole)["memory"] == "exact"  # on a CPU
    run = train.train(dataclasses.replace(config, out=str(tmp_path / "old"), steps=2, memory="fast"))
    assert load_run(run)["memory"] == "fast"
    train.main(["--resume", str(run), "--steps", "4"])
    assert equal(weights(run), weights(whole))
    save_json(run / "config.json", load_run(run) | {"memory": "exact"})
    train.main(["--resume", str(run), "--steps", "5", "--memory", "fast"])
    assert load_run(run)["memory"] == "fast"


def test_auto_never_takes_fp32_on_a_gpu(config, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**14, 10**14))
    monkeypatch.setattr(estimate, "validate", lambda config: None)
    chosen = estimate.choose_preset(dataclasses.replace(config, device="cuda", resolution="32"), Ranks())
    assert (chosen.memory, chosen.precision, chosen.trained_weights) == ("16gb", "bf16", "fp32")
    assert "--memory 16gb: the fastest preset that fits" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- what a step computes
def operations(function) -> list[Operation]:
    return measure(lambda tracker: function(), {}).operations


def test_operations_of_a_convolution_are_counted():
    with FakeTensorMode():
        conv, x = torch.nn.Conv2d(8, 16, 3, padding=1), torch.empty(2, 8, 10, 10, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            conv(x).sum().backward()
        found = operations(lambda: conv(x).sum().backward())
    assert sum(o.flops for o in found) == counter.get_total_flops() > 0
    forward = found[0]
    assert forward.bytes == 4 * (x.numel() + sum(p.numel() for p in conv.parameters()) + 2 * 16 * 100)


@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (lambda a: a + a, 3), (lambda a: a.t().view(10, 100)[:, 1:], 0), (lambda a: torch.empty_like(a), 0),
        (lambda a: a.mul_(2), 2), (lambda a: a.to(torch.bfloat16), 1.5), (lambda a: torch.empty_like(a).copy_(a), 2),
    ],
)  # fmt: skip
def test_bytes_that_are_read_and_written(function, moved):
    with FakeTensorMode():
        a = torch.empty(10, 100).t().contiguous()
        found = operations(lambda: function(a))
    assert sum(o.bytes for o in found) == moved * a.nbytes


def test_attention_and_copies_over_the_link():
    with FakeTensorMode():
        q, k = torch.empty(2, 3, 50, 8, requires_grad=True), torch.empty(2, 3, 7, 8)
        attention = torch.nn.functional.scaled_dot_product_attention
        found = operations(lambda: attention(q, k, k).sum().backward())
        assert sum(o.flops for o in found) == 7 * 2 * 2 * 3 * 50 * 7 * 8  # two products of matrices, and five back
        there = to_pinned_cpu(torch.empty(64, dtype=torch.bfloat16))
        copied = operations(lambda: torch.empty(64).copy_(there))
        assert [(o.place, o.bytes) for o in copied] == [("link", 128)]  # in the format that needs less
        assert [o.place for o in operations(lambda: there.mul_(2))] == ["cpu"]


def test_seconds_of_the_roofline():
    machine = Machine("m", dict(fp32=10.0, tf32=20.0, bf16=40.0, fp16=80.0), 100.0, 5.0, 2.0, begin=0.5)
    bf16, fp32 = torch.bfloat16, torch.float32
    work = [Operation("gpu", bf16, 40.0, 0.0, 2.0), Operation("gpu", fp32, 0.0, 300.0), Operation("gpu", fp32, 1, 1)]
    assert seconds(work, machine, "bf16") == 2 * 1 + 3 + 0.5
    assert seconds([Operation("gpu", fp32, 80.0, 0.0)], machine, "fp32") == 8.0
    assert seconds([Operation("gpu", fp32, 80.0, 0.0)], machine, "fp16") == 4.0  # tf32
    assert seconds([Operation("gpu", torch.float16, 80.0, 0.0)], machine, "fp16") == 1.0
    beside = [*work, Operation("link", bf16, 0.0, 10.0), Operation("cpu", fp32, 0.0, 6.0)]
    assert seconds(beside, machine, "bf16") == 5.5 + 3.0  # the copy is hidden, the optimizer on the CPU is not
    assert seconds([*beside, Operation("link", bf16, 0.0, 50.0)], machine, "bf16") == 12.0 + 3.0


def test_micro_batches_and_the_rest_of_the_optimizer_are_counted():
    def flop_and_bytes(**settings):
        config = resolve(Config(base="x", device="cpu", batch_size=1, **settings), "12gb")  # noqa: F811
        found = estimate.predict(config, SMALL, (64, 64))["training"].operations
        return sum(o.times * o.flops for o in found), [o for o in found if o.times > 1]

    (one, optimizer), (five, _) = flop_and_bytes(), flop_and_bytes(accumulate_grad_batches=5)
    assert five == pytest.approx(5 * one) and optimizer and all(o.flops == 0 for o in optimizer)


def test_what_an_update_of_the_largest_parameter_stands_for():
    """AdamW reads and writes all numbers; Muon's products count for its matrices."""
    shapes = {"a": (8, 4), "b": (4, 4), "c": (6,), "d": (2,)}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    (group,) = AdamW(parameters, 1e-3).param_groups
    assert prediction.share_of_largest(group, parameters["a"]) == (32 + 16 + 6 + 2) / 32
    vectors, matrices = Muon(parameters, 1e-3, 0.02).param_groups
    assert prediction.share_of_largest(vectors, parameters["c"]) == 8 / 6
    products = 2 * 4 * 4 * 8 + 4**3, 2 * 4 * 4 * 4 + 4**3
    assert prediction.share_of_largest(matrices, parameters["a"]) == pytest.approx(sum(products) / products[0])


def test_presets_are_ordered_by_speed():
    """On a machine where what is moved and computed decides; this model is so small that beginning would."""
    machine = dataclasses.replace(COMMON, begin=0.0)
    took = []
    for name in ("exact", "16gb", "12gb", "8gb", "4gb"):  # each takes more than a second
        unset = Config(base="x", device="cpu", batch_size=4)
        filled = resolve(unset, name)
        took.append(
            seconds(estimate.predict(filled, SMALL, (128, 128))["training"].operations, machine, filled.precision)
        )
    assert took[1:] == sorted(took[1:]) and took[0] > 1.3 * took[1]


def test_the_rates_of_a_machine_are_measured():
    machine = speed.measure_machine("cpu")
    assert set(machine.flops) == set(COMMON.flops)
    assert all(rate > 0 for rate in (*machine.flops.values(), machine.memory, machine.link, machine.cpu_memory))
    assert 0 < machine.begin < 1e-3 and torch.get_float32_matmul_precision() == "highest"


# ------------------------------------------------------------------------------------------------------------ the plan
def test_the_largest_batch(config, monkeypatch):  # noqa: F811
    """The one that fits into the memory, where the next larger one does not."""
    base, slope = 3 * GIB, GIB // 2
    peak = lambda n: {"training": Peak(base + slope * n, {"activations": slope * n + GIB}), "drawing": Peak(2 * GIB)}
    monkeypatch.setattr(estimate, "predict", lambda c, *_: peak(c.batch_size))
    largest = lambda b, gib: estimate.largest_batch(
        dataclasses.replace(config, batch_size=b), TINY, (64, 64), peak(b), gib * GIB + estimate.CUDA_CONTEXT
    )
    for b in (1, 4, 30):
        assert [largest(b, gib) for gib in (1, 3.4, 3.6, 5.9, 24.1)] == [0, 0, 1, 5, 42]
    assert largest(4, 1.9) == 0  # what draws does not fit


def test_the_largest_batch_of_a_model():
    config = resolve(Config(base="x", device="cpu", batch_size=2), "16gb")  # noqa: F811
    peaks = lambda n: estimate.predict(dataclasses.replace(config, batch_size=n), SMALL, (64, 64))
    largest = estimate.largest_batch(config, SMALL, (64, 64), peaks(2), 1.5 * GIB)
    fits = lambda n: estimate.largest_peak(peaks(n)) + estimate.CUDA_CONTEXT <= 1.5 * GIB
    assert largest > 100 and fits(int(0.97 * largest)) and not fits(int(1.03 * largest))


def test_predictions_of_another_process_are_the_same(config, monkeypatch):  # noqa: F811
    unset = dataclasses.replace(config, batch_size=2)
    monkeypatch.setattr(estimate, "GPU_PRESETS", ())
    one, both = (estimate.predict_presets(unset, SMALL, (64, 64), None, n)[0] for n in (1, 2))
    assert list(one) == list(both) == ["exact"]
    for name, peaks in one.items():
        assert peaks.keys() == both[name].keys()
        assert all((peak.total, peak.parts) == (both[name][k].total, both[name][k].parts) for k, peak in peaks.items())


def test_the_plan_has_a_line_for_every_preset(config, monkeypatch):  # noqa: F811
    need = {name: 10 - i for i, name in enumerate(("exact", *GPU_PRESETS))}
    work = lambda name: [Operation("gpu", torch.float32, 1e12, 0.0, 2.0 if name in ("exact", "4gb") else 1.0)]
    monkeypatch.setattr(
        estimate, "predict", lambda c, *_: {"training": Peak(need[c.memory] * GIB, Counter(), work(c.memory))}
    )
    monkeypatch.setattr(estimate, "largest_batch", lambda c, *_: need[c.memory] + 70)
    lines = estimate.plan(dataclasses.replace(config, resolution="64"), vram=9).splitlines()
    table = [line.split() for line in lines if line.split()[:1] and line.split()[0] in PRESETS]
    assert [row[:4] for row in table] == [
        ["exact", "10.00", "0.50", "80"], ["16gb", "9.00", "1.00", "79"], ["12gb", "8.00", "1.00", "78"],
        ["8gb", "7.00", "1.00", "77"], ["6gb", "6.00", "1.00", "76"], ["5gb", "5.00", "1.00", "75"],
        ["4gb", "4.00", "0.50", "74"],
    ]  # fmt: skip
    assert "--memory 12gb is the fastest preset that fits" in lines[-1]
    assert any("RTX 3060" in line for line in lines)
    assert "largest batch" not in estimate.plan(dataclasses.replace(config, resolution="64"))
