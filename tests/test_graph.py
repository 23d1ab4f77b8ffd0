"""The gradient as a CUDA graph. Without a GPU: what is around the graph, with one that computes everything again."""

import dataclasses

import pytest
import torch

import sampler
import train
from benchmarks.checks import RepeatedGraph
from config import Config, resolve
from ldm import SD15, TINY
from lowvram import estimate, prediction
from lowvram.process import GIB
from tests.conftest import settings
from training import graph
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
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(GradientGraph, "_record", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        GradientGraph(squares(two, []), two)({"x": torch.tensor([1.0])}, True)


@pytest.mark.parametrize(
    ("preset", "change", "recorded"),
    [
        ("exact", {}, True),
        ("16gb", {}, True),
        ("12gb", {"optimizer": "muon"}, True),
        ("16gb", {"cuda_graph": False}, False),
        ("16gb", {"buckets": True}, False),
        ("16gb", {"gradient_checkpointing": True}, False),
        ("16gb", {"optimizer_on_cpu": True}, False),
        *((name, {}, False) for name in ("8gb", "6gb", "5gb", "4gb")),
    ],
)
def test_where_memory_is_short_nothing_is_recorded(preset, change, recorded):
    config = resolve(Config(base="sd15", out="none", device="cuda:1", **change), preset)
    assert is_recorded(config) is recorded
    assert not is_recorded(dataclasses.replace(config, device="cpu"))


def test_the_prediction_counts_what_lies_beside_the_graph():
    config = resolve(Config(base="tiny", resolution="64", batch_size=2, device="cuda"), "16gb")
    with_graph = prediction.predict(config, TINY, (64, 64))["training"]
    without = prediction.predict(dataclasses.replace(config, cuda_graph=False), TINY, (64, 64))["training"]
    beside = with_graph.parts["beside the CUDA graph"]
    assert with_graph.total - without.total == beside > 2 * 3 * 64 * 64 * 4  # more than the hints, which are inputs
    assert "beside the CUDA graph" not in without.parts
    page = estimate.plan(Config(base="tiny", out="x", resolution="64", batch_size=2, device="cpu", memory="16gb"))
    assert f"training  {with_graph.total / GIB:6.2f} GiB predicted" in page  # a plan is for a GPU, wherever it is made


@pytest.mark.parametrize("change", [{}, {"accumulate_grad_batches": 2, "batch_size": 2, "ema_decay": 0.9}])
def test_a_run_computes_the_same_with_it(change, base, folder, tmp_path, monkeypatch):
    plain = train.train(dataclasses.replace(settings(base, folder, tmp_path / "plain"), **change))
    real, made = train.build_trainer, []

    def build_trainer(config, model):
        trainer = real(config, model)
        accumulate = lambda *batch: train.accumulate_gradient(trainer, train.diffusion_loss, *batch)
        trainer.graph = RepeatedGraph(accumulate, trainer.trainable.values())
        made.append(trainer.graph)
        return trainer

    releases = []
    monkeypatch.setattr(train, "build_trainer", build_trainer)
    monkeypatch.setattr(
        RepeatedGraph, "release", lambda self: releases.append(self.graph) or graph.GradientGraph.release(self)
    )
    recorded = train.train(dataclasses.replace(settings(base, folder, tmp_path / "recorded"), **change))
    compared = ("step", "loss", "grad_norm", "control_gain", "val_loss")
    plain, recorded = ([{k: e.get(k) for k in compared} for e in read_metrics(run)] for run in (plain, recorded))
    assert plain == recorded
    assert len(releases) == 3 and releases[0] is None and all(releases[1:])  # before each image log


def test_the_noise_schedule_is_copied_to_a_device_once():
    """A step that is recorded must not wait for a copy."""
    first = sampler.alphas_cumprod(SD15, torch.device("cpu"))
    assert sampler.alphas_cumprod(SD15, torch.device("cpu")) is first
    assert not torch.equal(sampler.alphas_cumprod(TINY), first)
