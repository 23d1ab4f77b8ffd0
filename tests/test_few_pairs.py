"""A few hundred pairs: tried on the tiny base, told what the steps mean, and told when to stop."""

import dataclasses
from pathlib import Path

import pytest

import config as config_module
import train
from config import DEMO, Config, ConfigError, parse, resolve, validate
from ldm import MODELS, TINY
from lowvram.estimate import model_and_size
from tests.test_buckets import write_pairs
from tests.test_train import config  # noqa: F401 (a fixture)
from training.summary import CONVERGES, describe_amount
from training.validation import Validation


def test_data_alone_is_tried_on_the_tiny_base(folder, tmp_path, monkeypatch, capsys):
    command = parse(["--data", str(folder)])
    own = dict(data=str(folder), out="runs/circles-tiny", resolution="128")
    assert command.trial and command.config == Config(**(DEMO | own))
    changed = parse(["--data", str(folder), "--steps", "7", "--resolution", "64", "--out", "x", "--flip"])
    assert (changed.config.steps, changed.config.resolution, changed.config.out) == (7, "64", "x")
    assert parse(["--plan", "--data", str(folder)]).plan and model_and_size(command.config) == (TINY, (128, 128))
    directional = parse(["--data", str(folder), "--directional-hints"]).config  # --flip was not asked for
    validate(resolve(directional, "exact"))
    assert not directional.flip and command.config.flip
    assert not parse([]).trial and not parse(["--base", "b", "--data", "d"]).trial
    with pytest.raises(ConfigError, match="give both --base .* and --data .*; --data alone tries the data on the tiny"):
        parse(["--base", "b"])
    trained = []
    monkeypatch.setattr(train, "train", lambda asked, *rest: trained.append(asked.base))
    train.main(["--data", str(folder)])
    told = capsys.readouterr().out
    assert trained == [str(config_module.TINY_BASE)] and told.count("\n") == 1
    assert (
        "no --base is given" in told
        and f"{folder} is tried on the tiny base" in told
        and f"({DEMO['steps']} steps)" in told
    )
    train.main([])
    assert not capsys.readouterr().out


def test_what_the_steps_are_is_said(config):  # noqa: F811
    many = describe_amount(dataclasses.replace(config, steps=10_000, batch_size=4), 49_992, 8)
    assert many == ["10000 steps of 4 samples are 0.8 epochs: 80% of the samples are seen"]
    few = dataclasses.replace(config, steps=1100, batch_size=4, accumulate_grad_batches=2, logger_freq=50)
    first, advice = describe_amount(few, 284, 16)
    assert first == "1100 steps of 8 samples are 31 epochs: each sample is seen 31 times"
    assert "of 16 other pairs" in advice and "--checkpoint-freq 50" in advice and "--flip doubles" in advice
    for change in (dict(flip=True), dict(directional_hints=True)):
        assert "--flip" not in describe_amount(dataclasses.replace(few, **change), 284, 16)[1]
    assert len(describe_amount(dataclasses.replace(few, steps=100), 284, 16)) == 1


def test_the_end_speaks_of_the_model_that_was_trained(config, capsys, tmp_path):  # noqa: F811
    config.logger_freq = 2
    train.train(config)
    told = capsys.readouterr().out
    assert "the hint is not obeyed yet" in told and CONVERGES["tiny"] in told and "Stable Diffusion" not in told
    assert f"--out samples/{Path(config.out).name}" in told  # of its own, so that no other run's pictures are lost
    assert all(any(model.startswith(name) for name in CONVERGES) for model in MODELS)


def test_a_run_says_when_its_validation_loss_has_turned(config, capsys, monkeypatch):  # noqa: F811
    """Measured after each step: lowest at step 2, then up. The end names the nearest checkpoint that was kept."""
    losses = iter([0.5, 0.45, 0.4, 0.42, 0.44, 0.46, 0.48, 0.5, 0.52])
    monkeypatch.setattr(Validation, "losses", lambda self: (next(losses), 0.8))
    monkeypatch.setattr(Validation, "draw", lambda self, path: None)
    config = dataclasses.replace(config, steps=7, logger_freq=1, checkpoint_freq=2, keep_checkpoints=0)
    run = train.train(config)
    told = capsys.readouterr().out.splitlines()
    lines = [line for line in told if line.startswith("step ")]
    turned = ["risen since step 2" in line for line in lines]
    assert turned == [False] * 6 + [True] * 2
    (last,) = [line for line in told if "was lowest at step 2" in line]
    assert str(run / "checkpoints/step-000002") in last


def test_hints_of_another_size_are_told_of_once(tmp_path, config, capsys):  # noqa: F811
    write_pairs(tmp_path / "d", [(64, 64)] * 4, 2)
    train.train(dataclasses.replace(config, data=str(tmp_path / "d"), steps=1))
    line = (
        f"4 of 4 hints have another size than their target and are resized to it; the first: {tmp_path}/d/prompt.json"
    )
    told = capsys.readouterr().out
    assert told.count(line) == 1 and "line 1, 128x128 for 64x64" in told
