"""The gradient as a CUDA graph. Without a GPU: what is around the graph, with one that computes everything again."""

import dataclasses
from collections import Counter

import pytest
import torch

import sampler
import train
from benchmarks.checks import RepeatedGraph
from config import Config, resolve
from ldm import SD15, TINY
from lowvram import estimate, prediction
from lowvram.prediction import BESIDE_GRAPH
from lowvram.process import GIB, peak_memory
from lowvram.tracking import Peak
from tests.conftest import settings
from training.graph import GradientGraph, is_recorded
from training.records import read_metrics


def squares(parameters, calls):
    """accumulate(batch, last) of a small loss; notes the inputs that it saw."""

    def accumulate(batch, last):
        calls.append(batch["x"].tolist())
        loss = sum(((p * batch["x"]) ** 2).sum() for p in parameters)
        loss.backward()
        return loss.detach()

    return accumulate


@pytest.fixture
def two() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))]


def test_gradients_are_summed_over_micro_batches(two):
    calls, unused = [], torch.nn.Parameter(torch.ones(1))
    recorded = RepeatedGraph(squares(two, calls), [*two, unused])
    batches = [{"x": torch.tensor([float(k)])} for k in (1, 2, 3)]
    loss = torch.zeros(())
    for i, batch in enumerate(batches):
        loss += recorded(batch, i == 2)
    assert loss == (1 + 4 + 9) * (1 + 4 + 9)
    assert two[0].grad.tolist() == [2 * 14, 4 * 14] and two[1].grad.tolist() == [6 * 14] and unused.grad is None
    for p in two:  # as `zero_grad` and the optimizer do
        p.grad = None
        p.data.mul_(2)
    assert recorded(batches[1], True) == 4 * 4 * 14 and two[1].grad.tolist() == [2 * 6 * 4]


def test_the_place_of_the_gradients_is_clean_for_the_next_step(two):
    recorded = RepeatedGraph(squares(two, []), two)
    batch = {"x": torch.tensor([1.0])}
    recorded(batch, True)
    two[0].grad.mul_(0.1)  # clipping changes them in place
    for p in two:
        p.grad = None
    recorded(batch, True)
    assert two[0].grad.tolist() == [2, 4]


def test_a_batch_of_other_shapes_is_computed_without(two):
    calls = []
    recorded = RepeatedGraph(squares(two[1:], calls), two[1:])
    recorded({"x": torch.tensor([1.0])}, True)
    two[1].grad, made = None, len(calls)
    recorded({"x": torch.tensor([1.0, 2.0])}, True)
    recorded({"x": torch.tensor([1], dtype=torch.int64)}, True)
    assert calls[made:] == [[1.0, 2.0], [1]] and two[1].grad.tolist() == [6 * (1 + 4) + 6]


def test_a_gradient_that_the_graph_does_not_have_stays(two):
    """Of a parameter that only batches of other shapes use."""
    accumulate = lambda batch, last: squares(two if len(batch["x"]) > 1 else two[:1], [])(batch, last)
    recorded = RepeatedGraph(accumulate, two)
    recorded({"x": torch.tensor([1.0])}, False)
    recorded({"x": torch.tensor([1.0, 1.0])}, False)
    recorded({"x": torch.tensor([1.0])}, True)
    assert two[0].grad.tolist() == [6, 12] and two[1].grad.tolist() == [12]


def test_weights_that_move_to_another_place_are_noticed(two):
    recorded = RepeatedGraph(squares(two, []), two)
    recorded({"x": torch.tensor([1.0])}, True)
    two[0].data = two[0].data * 2
    with pytest.raises(AssertionError, match="weights of the past"):
        recorded({"x": torch.tensor([1.0])}, True)


def test_it_is_recorded_anew_after_its_memory_was_given_up(two, monkeypatch):
    freed, recorded = [], RepeatedGraph(squares(two, []), two)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    recorded.release()
    assert not freed  # there was nothing
    recorded({"x": torch.tensor([1.0])}, True)
    recorded.release()
    assert freed and recorded.graph is None and not recorded.gradients and recorded.loss is None
    for p in two:
        p.grad = None
    assert recorded({"x": torch.tensor([2.0])}, True) == 4 * 14 and two[1].grad.tolist() == [4 * 6]


def test_what_cannot_be_recorded_is_computed_without(two, monkeypatch, capsys):
    """And what was summed before stays."""

    def fail(self, inputs):
        self._forget_gradients()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(GradientGraph, "_record", fail)
    recorded = GradientGraph(squares(two, []), two)
    two[0].grad = torch.tensor([100.0, 100.0])
    for _ in range(2):
        recorded({"x": torch.tensor([1.0])}, True)
    assert two[0].grad.tolist() == [104, 108] and two[1].grad.tolist() == [12]
    said = capsys.readouterr()
    assert (said.out + said.err).count("cannot be recorded as a CUDA graph") == 1
    assert "(operation not permitted when stream is capturing)" in said.out + said.err

    def no_memory(self, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GradientGraph, "_record", no_memory)
    recorded = GradientGraph(squares(two, []), two)
    assert recorded({"x": torch.tensor([1.0])}, True) == 14 and recorded.impossible  # the step alone has room


def test_what_is_said_is_the_cause(two, monkeypatch, capsys):
    """PyTorch raises another error when it ends a record that has failed."""

    def fail(self, inputs):
        try:
            raise RuntimeError("the cause")
        finally:
            raise RuntimeError("capture failed due to an earlier error")

    monkeypatch.setattr(GradientGraph, "_record", fail)
    GradientGraph(squares(two, []), two)({"x": torch.tensor([1.0])}, True)
    said = capsys.readouterr()
    assert "--no-cuda-graph (the cause)" in said.out + said.err


@pytest.mark.parametrize(
    ("preset", "change", "recorded"),
    [
        ("exact", {}, True),
        ("16gb", {}, True),
        ("12gb", {"optimizer": "muon"}, True),
        ("16gb", {"cuda_graph": False}, False),
        ("16gb", {"buckets": True}, False),
        ("16gb", {"cache": False}, False),
        ("16gb", {"stream": True}, False),
        ("16gb", {"gradient_checkpointing": True}, False),
        ("16gb", {"optimizer_on_cpu": True}, False),
        *((name, {}, False) for name in ("8gb", "6gb", "5gb", "4gb")),
    ],
)
def test_where_memory_is_short_nothing_is_recorded(preset, change, recorded):
    config = resolve(Config(base="sd15", out="none", device="cuda:1", **change), preset)
    assert is_recorded(config) is recorded
    assert not is_recorded(dataclasses.replace(config, device="cpu"))


def test_the_prediction_counts_what_lies_beside_the_graph(monkeypatch):
    config = resolve(Config(base="tiny", out="x", resolution="64", batch_size=2, device="cuda"), "16gb")
    with_graph = prediction.predict(config, TINY, (64, 64))["training"]
    without = prediction.predict(dataclasses.replace(config, cuda_graph=False), TINY, (64, 64))["training"]
    beside, hints, activations = with_graph.parts[BESIDE_GRAPH], 2 * 3 * 64 * 64 * 4, 2 * 8 * 64 * 64 * 2
    assert with_graph.total - without.total == beside and BESIDE_GRAPH not in without.parts
    assert beside > hints + 2 * activations  # the first layer of the hint encoder has two such maps at once
    devices = []
    monkeypatch.setattr(estimate, "predict", lambda c, *_: devices.append(c.device) or {"training": with_graph})
    estimate.plan(dataclasses.replace(config, device="cpu"))
    assert set(devices) == {"cuda"}  # a plan is for a GPU, wherever it is made


def test_the_largest_batch_does_not_depend_on_the_batch_that_was_asked(monkeypatch):
    """What lies beside the graph grows with the batch, as activations do."""

    def predict(config, *_):
        growing = {"activations": config.batch_size * 2**26, BESIDE_GRAPH: config.batch_size * 2**24}
        parts = Counter({"frozen UNet": GIB} | growing)
        return {"training": Peak(parts.total(), parts)}

    monkeypatch.setattr(estimate, "predict", predict)
    room = estimate.CUDA_CONTEXT + GIB + 10 * (2**26 + 2**24)
    for batch_size in (1, 10, 64, 1000):
        config = Config(batch_size=batch_size)
        assert estimate.largest_batch(config, TINY, (64, 64), predict(config), room) == 10


def test_after_an_out_of_memory_the_graph_is_the_first_to_go(monkeypatch):
    config = resolve(Config(base="sd15", resolution="512", batch_size=4, device="cuda"), "16gb")
    total = lambda c: 10 * GIB + GIB * c.cuda_graph
    monkeypatch.setattr(estimate, "predict", lambda c, *_: {"training": Peak(total(c))})
    monkeypatch.setattr(estimate, "gpu_memory", lambda device: 10.7 * GIB)
    assert estimate.suggest_flags(config).startswith("--no-cuda-graph takes 10.6 GiB")
    config.cuda_graph = False
    assert estimate.suggest_flags(config).startswith("--batch-size 1")


def test_used_memory_is_what_is_reserved(monkeypatch):
    """The activations of a graph are not allocated between two steps, but nobody else can have their memory."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * GIB)
    assert peak_memory("cuda") == "3.0 GiB"


@pytest.mark.parametrize("change", [{}, {"accumulate_grad_batches": 2, "batch_size": 2, "ema_decay": 0.9}])
def test_a_run_computes_the_same_with_it(change, base, folder, tmp_path, monkeypatch):
    plain = train.train(dataclasses.replace(settings(base, folder, tmp_path / "plain"), **change))
    real, trainers, releases = train.build_trainer, [], []
    monkeypatch.setattr(train, "build_trainer", lambda *parts: trainers.append(real(*parts)) or trainers[-1])
    monkeypatch.setattr(train, "is_recorded", lambda config: True)
    monkeypatch.setattr(train, "GradientGraph", RepeatedGraph)
    release = lambda self: releases.append(self.graph) or GradientGraph.release(self)
    monkeypatch.setattr(RepeatedGraph, "release", release)
    recorded = train.train(dataclasses.replace(settings(base, folder, tmp_path / "recorded"), **change))
    compared = ("step", "loss", "grad_norm", "control_gain", "val_loss")
    plain, recorded = ([{k: e.get(k) for k in compared} for e in read_metrics(run)] for run in (plain, recorded))
    assert plain == recorded
    assert len(releases) == 3 and releases[0] is None and all(releases[1:])  # before each image log
    assert trainers[0].graph is None  # it would keep the trainer, and the trainer it


def test_the_noise_schedule_is_copied_to_a_device_once():
    """A step that is recorded must not wait for a copy."""
    first = sampler.alphas_cumprod(SD15, torch.device("cpu"))
    assert sampler.alphas_cumprod(SD15, torch.device("cpu")) is first
    assert sampler.alphas_cumprod(SD15, torch.device("meta")).is_meta
    assert not torch.equal(sampler.alphas_cumprod(TINY), first)
