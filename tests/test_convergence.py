"""The instrument that measures convergence: what its rows say, and that a run leaves what the table reads."""

import dataclasses
import json
import xml.etree.ElementTree

import numpy as np
import pytest

from toy import circles, convergence
from toy.circles import HINTS, Circle
from toy.variants import VARIANTS, logit_normal_timesteps
from training.randomness import SampleRandomness


@pytest.mark.parametrize(
    ("gains", "level", "step"),
    [
        ([(0, 0.0), (10, 0.4), (20, 0.8)], 0.5, 12.5),
        ([(0, 0.0), (10, 0.5), (20, 0.4)], 0.5, 10),
        ([(0, 0.0), (10, 0.6), (20, 0.4), (30, 0.9)], 0.5, 10 * 0.5 / 0.6),
        ([(0, 0.0), (10, 0.4)], 0.5, None),
        ([], 0.5, None),
    ],
)
def test_when_a_gain_was_reached(gains, level, step):
    assert convergence.reached(gains, level) == (None if step is None else pytest.approx(step))


def test_the_table_hides_no_run(monkeypatch, tmp_path):
    monkeypatch.setattr(convergence, "ROOT", tmp_path)
    fine = dict(failed="", batch=8, steps=20, flops=2e12, seconds=10.0, iou=0.9, colors=1.0)
    outcomes = [
        dict(name="adamw", seed=0, gains=[(0, 0.0), (10, 0.6), (20, 0.85)], **fine),
        dict(name="adamw", seed=1, gains=[(0, 0.0), (10, 0.2), (20, 0.4)], **fine),
        dict(name="adamw", seed=2, gains=[(0, 0.0)], failed="not finite", batch=8, flops=2e12),
        dict(name="adamw-rate-0.008", seed=0, gains=[], failed="the loss is not finite", batch=8, flops=2e12),
    ]
    for o in outcomes:
        folder = tmp_path / "outline" / f"{o['name']}-{o['seed']}"
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(json.dumps(o))
    demo, rate = convergence.table("outline")[2:]
    assert demo.startswith("| adamw | 3 | 1 | 67 (67 to 67, 1 never) | 144 (144 to 144, 1 never) | never | 18")
    assert (
        "36.0 (36.0 to 36.0, 1 never) | 9 (9 to 9, 1 never) | 0.625 (0.400 to 0.850) | 0.900 (0.900 to 0.900)" in demo
    )
    assert (
        rate == "| adamw-rate-0.008 | 1 | 1 | never | never | never | never | never | never | never | never | never |"
    )


def test_settings_keep_the_budget_and_scale_the_warm_up():
    names = [name for group in convergence.GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    demo = convergence.settings_of("adamw", {}, "outline", 3)
    large = convergence.settings_of("batch-32", dict(batch_size=32), "outline", 3)
    assert demo.steps * demo.batch_size == large.steps * large.batch_size == convergence.BUDGET
    assert (demo.warmup_steps, large.warmup_steps, demo.seed) == (20, 5, 3)
    assert demo.logger_freq * 8 == large.logger_freq * 32 == 160
    assert convergence.settings_of("x", dict(budget=800), "outline", 0).steps == 100


def test_a_run_leaves_what_the_table_reads(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    circles.make("data/convergence/keypoints", 40, 32, kind="keypoints")
    settings_of = convergence.settings_of
    small = lambda *args: dataclasses.replace(settings_of(*args), resolution="32", batch_size=4, validation=4)  # noqa: E731
    monkeypatch.setattr(convergence, "settings_of", small)
    changes = dict(optimizer="muon", hint_gain=2.0, budget=16)
    outcome = convergence.run_one("muon-0.02", changes, "keypoints", 0, 1)
    assert 0 <= outcome["iou"] < 1 and outcome["colors"] in (0, 1)  # it was drawn and judged
    assert outcome["seconds"] > 0
    assert not outcome["failed"] and [step for step, _ in outcome["gains"]] == [0, 2]
    lines = (tmp_path / "runs/convergence/keypoints/muon-0.02-0/gains.jsonl").read_text().splitlines()
    samples = [json.loads(line)["samples"] for line in lines]
    assert [len(rows) for rows in samples] == [16, 16]
    for rows, (_, gain) in zip(samples, outcome["gains"], strict=True):
        right, other = (sum(row[k] for row in rows) for k in (1, 2))
        assert 1 - right / other == pytest.approx(gain, abs=1e-6)
    assert convergence.table("keypoints")[2].startswith("| muon-0.02 | 1 | 0 |")


def test_events_and_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(convergence, "ROOT", tmp_path)
    run = tmp_path / "outline" / "demo-0"
    run.mkdir(parents=True)
    late = lambda step, jump: 1.0 if step < jump else 0.2
    entries = [{"step": s, "samples": [(100, late(s, 30), 1.0), (700, late(s, 10), 1.0)]} for s in range(0, 50, 10)]
    (run / "gains.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    lines = convergence.events(run)
    assert lines[2:5] == ["| 0 to 199 | 0.800 | 25 |", "| 600 to 799 | 0.800 | 5 |", "| all | 0.800 | 10 |"]
    assert "between steps 5 and 25" in lines[-1]
    later = tmp_path / "outline" / "demo-1"
    later.mkdir()
    entries = [{"step": s, "samples": [(100, 1.0, 1.0), (700, late(s, 30), 1.0)]} for s in range(0, 50, 10)]
    (later / "gains.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    both = convergence.events(run, later)
    assert both[3] == "| 600 to 799 | 0.800 (0.800 to 0.800) | 15 (5 to 25) |"
    assert both[2] == "| 0 to 199 | 0.400 (0.000 to 0.800) | 25 (25 to 25, 1 never) |" and "1 of 2" in both[-1]
    entries = [{"step": s, "samples": [(100, 1.0, 1.0)]} for s in (0, 10)]
    (later / "gains.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    assert convergence.events(later)[-1] == "demo-1: 0 of 1 validation samples end above a gain of 0.1."
    outcome = dict(name="adamw", seed=0, gains=[(0, 0.0), (100, 0.9)], failed="", batch=8)
    (run / "outcome.json").write_text(json.dumps(outcome))
    xml.etree.ElementTree.fromstring(convergence.figure("outline"))
    assert ">711<" in convergence.figure("outline")  # 8 * 100 * 0.8 / 0.9
    outcome |= dict(seed=1, gains=[(0, 0.0), (100, 0.5)])
    (later / "outcome.json").write_text(json.dumps(outcome))
    drawn = convergence.curves("outline", ["adamw"])
    xml.etree.ElementTree.fromstring(drawn)
    assert 'd="M40.0 300.0L740.0 118.0" fill="none"' in drawn  # the mean of 0.9 and 0.5 after 800 samples
    assert 'd="M40.0 300.0L740.0 66.0L740.0 170.0L40.0 300.0Z"' in drawn
    with pytest.raises(ValueError, match="muon-0.02 was not run on outline hints"):
        convergence.curves("outline", ["muon-0.02"])
    failed = outcome | dict(name="adamw-rate-0.008", failed="the loss was not finite", gains=[])
    (later / "outcome.json").write_text(json.dumps(failed))
    with pytest.raises(ValueError, match="every run of adamw-rate-0.008 on outline hints failed"):
        convergence.curves("outline", ["adamw-rate-0.008"])


def test_hints_show_the_circle():
    circle = Circle(0.5, 0.5, 0.25, "red", "blue")
    for kind in HINTS:
        hint, target = circle.draw(64, kind)
        assert hint.shape == target.shape == (64, 64, 3) and hint.dtype == np.uint8
        assert np.array_equal(target, circle.draw(64)[1])
    layout = circle.draw(64, "layout")[0][..., 0]
    assert np.array_equal(layout[::4, ::4].repeat(4, 0).repeat(4, 1), layout)
    assert layout.mean() / 255 == pytest.approx(np.pi * 0.25**2, abs=0.01)
    dots = circle.draw(128, "keypoints")[0][..., 0]
    centers = [(64, 64), (64, 96), (96, 64), (32, 64), (64, 32)]
    assert all(dots[y, x] == 255 for x, y in centers) and 0 < (dots > 0).mean() < 0.02


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_train(monkeypatch, tmp_path, name):
    """A variant trains in a run as the grid makes it, and each parameter belongs to one group of the optimizer."""
    monkeypatch.chdir(tmp_path)
    circles.make("data/convergence/outline", 24, 32)
    settings_of, trainers = convergence.settings_of, []
    small = lambda *args: dataclasses.replace(settings_of(*args), resolution="32", batch_size=4, validation=2)  # noqa: E731
    monkeypatch.setattr(convergence, "settings_of", small)
    keep = lambda model, *args: trainers.append(model) or {"iou": 0.5, "colors": 0.5}  # noqa: E731
    monkeypatch.setattr(convergence, "judge", keep)
    build = convergence.build_trainer

    def checked(*args):
        trainer = build(*args)
        trainers.append(trainer)
        return trainer

    monkeypatch.setattr(convergence, "build_trainer", checked)
    changes = dict(convergence.MUON if name.startswith("muon") else {}, variant=name, budget=24)
    outcome = convergence.run_one(name, changes, "outline", 0, 4)
    assert not outcome["failed"]
    trainer, model = trainers
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, trainer.home.masters.values()))
    parts = dict(model.control_model.named_parameters())
    first = parts["input_hint_block.0.weight"]
    if name == "hint-at-levels":
        added = [p for part, p in parts.items() if part.startswith("hint_levels.") and part.endswith("weight")]
        assert len(added) == 2 and all(p.abs().max() > 0 for p in added)
    if name.startswith("muon"):
        moved = [id(p) in trainer.optimizer.matrices for p in (first, parts["zero_convs.0.0.weight"])]
        assert moved == [name == "muon-hint-encoder", name != "muon-hint-encoder"]
    if name.startswith("zero"):
        rates = {g["rate_factor"] for g in trainer.optimizer.param_groups if "rate_factor" in g}
        assert rates == {float(name.split("-")[-1])}


def test_logit_normal_timesteps():
    randomness = SampleRandomness(timestep_bias=0.4)
    us = (np.arange(1000) + 0.5) / 1000
    with logit_normal_timesteps():
        timesteps = np.array([randomness.timestep(u) for u in us])
    assert abs(np.median(timesteps) - 500) < 5 and timesteps.max() < 1000
    assert abs(np.mean(timesteps < 268.9) - 0.1587) < 0.002  # one standard deviation below the median
    assert randomness.timestep(0.5) == int(1000 * 0.5**0.4)
