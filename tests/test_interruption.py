"""Whatever ends a run, it can be continued, and then it is the run that nothing had ended."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
import training.checkpoints
from ldm import TINY
from tests.test_train import config, equal, losses, weights  # noqa: F401 (config is a fixture)
from training.records import read_metrics
from weights import CheckpointError, load_state_dict
from weights.runs import list_checkpoints, newest_checkpoint
from weights.writing import save_safetensors

ROOT = Path(__file__).parent.parent


def flags(config) -> list[str]:  # noqa: F811
    return [
        "--base", config.base, "--data", config.data, "--out", config.out, "--cache-dir", config.cache_dir, "--steps",
        "24", "--batch-size", "2", "--accumulate-grad-batches", "2", "--learning-rate", "1e-3", "--logger-freq", "0",
        "--checkpoint-freq", "1", "--workers", "0", "--device", "cpu", "--seed", "5", "--memory", "6gb",
        "--ema-decay", "0.9", "--channels-last",
    ]  # fmt: skip


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.time() + 120
    while len(read_metrics(run)) < step:
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.02)


@pytest.fixture
def whole(config, tmp_path):  # noqa: F811
    """The same run, not interrupted."""
    settings, *_ = train.parse([*flags(config), "--out", str(tmp_path / "whole"), "--checkpoint-freq", "24"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train.train(settings)
    torch.set_num_threads(threads)


def test_killed_at_any_moment_and_resumed_equals_never_stopped(config, whole):  # noqa: F811
    """Killed (as by the machine) again and again, with a checkpoint at every step, so also while one is written; with
    everything that has a state: 8-bit moments, stochastic rounding, a moving average, weights in channels_last."""
    run, chance = Path(config.out), random.Random(0)
    arguments = flags(config)
    for kill in range(3):
        process = start(*arguments)
        wait_for_step(run, 3 + 6 * kill, process)
        time.sleep(chance.random() * 0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        arguments = ["--resume", str(run)]
    resumed, *_ = train.parse(arguments)
    train.train(resumed, resume=run)
    assert equal(weights(run), weights(whole)) and losses(run) == losses(whole)
    for file in ("optimizer", "average"):
        a, b = (load_state_dict(newest_checkpoint(r) / f"{file}.safetensors") for r in (run, whole))
        assert equal(a, b), file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_says_how_to_go_on_and_ends_well(config, whole, number):  # noqa: F811
    run = Path(config.out)
    process = start(*flags(config), "--checkpoint-freq", "1000")
    wait_for_step(run, 7, process)
    process.send_signal(number)
    said = process.communicate()[0]
    step = json.loads((newest_checkpoint(run) / "state.json").read_text())["step"]
    assert process.returncode == 0 and 7 <= step < 24, said
    assert f"stopped at step {step} of 24" in said and f"train.py --resume {run}" in said
    train.train(train.parse(["--resume", str(run)])[0], resume=run)
    assert equal(weights(run), weights(whole)) and losses(run) == losses(whole)


def test_what_is_not_finite_is_skipped_and_counted(config, monkeypatch):  # noqa: F811
    config.steps, config.max_skipped, config.checkpoint_freq = 6, 2, 1
    real, bad = train.diffusion_loss, {2, 4}
    calls = []

    def sometimes(*args, **settings):
        calls.append(1)
        return real(*args, **settings) * (float("nan") if len(calls) in bad else 1.0)

    monkeypatch.setattr(train, "diffusion_loss", sometimes)
    run = train.train(config)
    assert all(v.isfinite().all() for v in weights(run).values())
    assert [str(loss) == "nan" for loss in losses(run)] == [False, True, False, True, False, False]
    bad |= set(range(3, 100))
    calls.clear()
    with pytest.raises(CheckpointError, match="3 steps in a row.*not finite.*last checkpoint is of step 1"):
        train.train(config, overwrite=True)
    assert all(v.isfinite().all() for v in weights(run).values())


def test_a_base_that_is_not_finite_is_told_as_the_cause(config):  # noqa: F811
    config.steps, config.max_skipped = 6, 2
    state = load_state_dict(config.base)
    name = "output_blocks.1.0.in_layers.2.bias"
    state[f"model.diffusion_model.{name}"][3] = float("inf")
    config.base = str(Path(config.out).parent / "broken.safetensors")
    save_safetensors(config.base, state, {"config": TINY.to_json()})
    with pytest.raises(
        CheckpointError, match=rf"3 steps in a row.*{re.escape(name)} holds numbers that are not finite"
    ):
        train.train(config)


def test_a_full_disk_costs_a_checkpoint_not_the_run(config, monkeypatch, capsys):  # noqa: F811
    config.steps, config.checkpoint_freq = 3, 1
    real = training.checkpoints.write_folder

    def full(path, files):
        if path.name == "step-000002":
            raise OSError(28, "No space left on device")
        real(path, files)

    monkeypatch.setattr(training.checkpoints, "write_folder", full)
    run = train.train(config)
    assert [p.name for p in list_checkpoints(run)] == ["step-000001", "step-000003"]
    assert "step 2: the checkpoint could not be written" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_passed_over(config, capsys):  # noqa: F811
    config.checkpoint_freq, config.keep_checkpoints = 1, 0
    run = train.train(config)
    before = losses(run), {k: v.clone() for k, v in weights(run).items()}  # not mapped from what is damaged now
    newest = newest_checkpoint(run) / "trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert newest_checkpoint(run).name == "step-000003" and "damaged" in capsys.readouterr().out
    train.train(train.parse(["--resume", str(run)])[0], resume=run)
    assert losses(run) == before[0] and equal(weights(run), before[1])


def test_old_checkpoints_are_pruned_but_some(config):  # noqa: F811
    config.steps, config.checkpoint_freq, config.keep_checkpoints, config.keep_every = 7, 1, 2, 3
    run = train.train(config)
    assert [int(p.name[5:]) for p in list_checkpoints(run)] == [3, 6, 7]
