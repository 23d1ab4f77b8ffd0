"""A run never loses its result: exceptions, signals, full disks, divergence, two owners, restarts."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import config as config_module
import data
import sampler
import train
import training.checkpoints
from config import Config, ConfigError, default_device, validate
from tests.test_interruption import flags, start, wait_for_step
from tests.test_train import Own, config, equal, losses, weights  # noqa: F401 (config is a fixture)
from training.health import FINITE_STEPS, Health
from training.interruption import SIGNALS, Interrupted, Interruption
from training.records import Metrics, read_metrics
from training.run_folder import RunFolder
from weights import CheckpointError
from weights.runs import list_checkpoints

ROOT = Path(__file__).parent.parent


def steps_of(run) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(run)]


def resume(run, *more: str):
    command = train.parse(["--resume", str(run), *more])
    return train.train(command.config, None, command.resume, command.overwrite, command.data_changed)


# -------------------------------------------------------------------------------------------------------- exceptions
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        data.DataError("row 3 is gone"),
        RuntimeError("two\nlines"),
        RuntimeError("a name with half of a character: \udcff"),
        KeyError("k"),
    ],
)
def test_an_exception_in_the_loop_saves_the_steps_first(config, monkeypatch, error):  # noqa: F811
    calls, real = [], train.diffusion_loss

    def failing(*args, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return real(*args, **settings)

    monkeypatch.setattr(train, "diffusion_loss", failing)
    config.checkpoint_freq = 1000
    with pytest.raises((CheckpointError, OSError, data.DataError)) as e:
        train.train(config)
    assert "\n" not in str(e.value) and steps_of(config.out) == [3]
    assert type(error).__name__ in (Path(config.out) / "error.txt").read_text()
    monkeypatch.setattr(train, "diffusion_loss", real)
    resumed = weights(resume(config.out))
    whole = train.train(dataclasses.replace(config, out=config.out + "-whole"))
    assert equal(resumed, weights(whole))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_costs_the_steps_since_then_only(config, folder, tmp_path, workers):  # noqa: F811
    config.data = str(shutil.copytree(folder, tmp_path / "data"))
    pairs = data.FolderDataset(config.data)
    order = data.Samples(pairs, range(22), 0, (4, 4, 4))
    config.steps, config.batch_size, config.workers, config.checkpoint_freq = 20, 1, workers, 1000
    gone = Path(config.data) / "source" / f"{order.index(15)}.png"
    prepare = RunFolder.prepare

    def vanish(self, anew):
        prepare(self, anew)
        gone.unlink()

    with pytest.MonkeyPatch.context() as m:
        m.setattr(RunFolder, "prepare", vanish)
        with pytest.raises((data.DataError, OSError)) as e:
            train.train(config)
    assert gone.name in str(e.value) and "\n" not in str(e.value)
    assert steps_of(config.out) == [15]


# ----------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [s for s in SIGNALS if s != signal.SIGINT])
def test_a_signal_to_the_whole_process_group_saves(config, number):  # noqa: F811
    run = Path(config.out)
    process = start(*flags(config), "--checkpoint-freq", "1000", "--workers", "2")
    wait_for_step(run, 3, process)
    os.killpg(process.pid, number)
    said = process.communicate()[0]
    assert process.returncode == 0 and "to continue" in said, said
    assert steps_of(run) and steps_of(run)[-1] >= 3


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_loop_a_signal_ends_with_a_line(number):
    with Interruption() as interruption:
        with pytest.raises(Interrupted, match=f"{signal.Signals(number).name} before the first step"):
            os.kill(os.getpid(), number)
        interruption.begin_loop()
        os.kill(os.getpid(), number)
        assert interruption.requested


# -------------------------------------------------------------------------------------------------------------- disk
def test_metrics_that_a_full_disk_refused_are_written_later(config, monkeypatch, capsys):  # noqa: F811
    real = Metrics._write

    def full(self):
        if self.lines[-1]["step"] in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    monkeypatch.setattr(Metrics, "_write", full)
    run = train.train(config)
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2, 3, 4]
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl could not be written") == 1 and "can be written again" in said


def test_pictures_that_cannot_be_written_do_not_end_the_run(config, monkeypatch, capsys):  # noqa: F811
    config.logger_freq = 2

    def full(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(training.validation, "save_grid", full)
    monkeypatch.setattr(training.validation, "save_curves", full)
    assert steps_of(train.train(config)) == [4]
    assert "curves.png could not be written (Read-only file system)" in capsys.readouterr().out


def test_the_last_step_that_cannot_be_saved_is_a_failure(config, monkeypatch):  # noqa: F811
    config.checkpoint_freq, real = 2, training.checkpoints.write_folder

    def full(path, files):
        if path.name == "step-000004":
            raise OSError(errno.EACCES, "Permission denied")
        real(path, files)

    monkeypatch.setattr(training.checkpoints, "write_folder", full)
    with pytest.raises(CheckpointError, match="step 4 could not be saved; the last one saved is 2"):
        train.train(config)
    assert steps_of(config.out) == [2]


def test_a_full_disk_takes_the_oldest_checkpoint_of_several(config, monkeypatch, capsys):  # noqa: F811
    config.checkpoint_freq, config.keep_checkpoints, real = 1, 0, training.checkpoints.write_folder

    def full(path, files):
        if len(steps_of(config.out)) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, files)

    monkeypatch.setattr(training.checkpoints, "write_folder", full)
    train.train(config)
    assert steps_of(config.out) == [3, 4] and "removed to make room" in capsys.readouterr().out


def test_a_run_folder_that_was_removed_is_made_again(config, monkeypatch):  # noqa: F811
    config.steps, config.checkpoint_freq, real = 4, 2, train.learning_rate

    def remove(settings, step):
        if step == 1:
            shutil.rmtree(config.out)
        return real(settings, step)

    monkeypatch.setattr(train, "learning_rate", remove)
    run = train.train(config)
    assert steps_of(run) == [2, 4] and len(read_metrics(run)) == 4
    monkeypatch.undo()
    resume(run, "--steps", "5")


# -------------------------------------------------------------------------------------------------- good checkpoints
def test_bad_steps_do_not_push_out_good_checkpoints(config, monkeypatch):  # noqa: F811
    real, calls = train.diffusion_loss, []

    def diverging(*args, **settings):
        calls.append(1)
        return real(*args, **settings) * (float("inf") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(train, "diffusion_loss", diverging)
    config.steps, config.checkpoint_freq, config.keep_checkpoints = 12, 1, 2
    with pytest.raises(CheckpointError, match="could not be saved"):
        train.train(config)
    assert steps_of(config.out) == [2, 3]


def test_health():
    good, bad = [torch.ones(3)], [torch.tensor([1.0, float("nan")])]
    health = Health()
    for _ in range(200):
        health.observe(0.1, True)
    assert health.problem(good) is None and "weights" in health.problem(bad)
    health.observe(float("nan"), False)
    assert "finite" in health.problem(good) and "finite" in health.problem(good, final=True)
    health.observe(0.1, True)
    assert health.problem(good) and health.problem(good, final=True) is None
    for _ in range(FINITE_STEPS):
        health.observe(0.1, True)
    assert health.problem(good) is None
    for _ in range(50):
        health.observe(100.0, True)
    assert "times its lowest" in health.problem(good, final=True)


def test_a_checkpoint_that_cannot_be_read_back_prunes_nothing(config, monkeypatch):  # noqa: F811
    config.checkpoint_freq, config.keep_checkpoints, real = 1, 1, training.checkpoints.write_folder

    def damaging(path, files):
        real(path, files)
        if path.name == "step-000003":
            (path / "trained.safetensors").write_bytes(b"damaged")

    monkeypatch.setattr(training.checkpoints, "write_folder", damaging)
    train.train(config)
    assert steps_of(config.out)[-1] == 4
    monkeypatch.undo()
    config.steps, config.out = 3, config.out + "-b"
    monkeypatch.setattr(training.checkpoints, "write_folder", damaging)
    with pytest.raises(CheckpointError, match="step 3 could not be saved"):
        train.train(config)
    assert 2 in steps_of(config.out)


def test_resume_from_an_older_checkpoint_sets_later_ones_aside(config, capsys):  # noqa: F811
    config.checkpoint_freq, config.keep_checkpoints = 1, 0
    run = train.train(config)
    whole = weights(run)
    resume(run / "checkpoints" / "step-000002")
    assert "step-000003 is later than step-000002" in capsys.readouterr().out
    assert steps_of(run) == [1, 2, 3, 4] and equal(weights(run), whole)
    assert sorted(p.name for p in (run / "set_aside").iterdir()) == ["step-000003", "step-000004"]
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", ["3", "4"])
def test_the_image_log_of_a_resumed_run_is_its_own(config, steps):  # noqa: F811
    """Pictures of steps that another continuation had made are of other weights."""
    config.checkpoint_freq, config.logger_freq, config.keep_checkpoints = 1, 1, 0
    run = train.train(config)
    grid = lambda step: run / f"image_log/step-{step:06d}.png"
    before = {step: grid(step).read_bytes() for step in range(5)}
    (run / "image_log/step-by-step.png").write_bytes(b"of the user")
    resume(run / "checkpoints/step-000002", "--learning-rate", "0.1", "--steps", steps)
    assert all(grid(step).read_bytes() == before[step] for step in range(3))
    assert grid(3).read_bytes() != before[3] and grid(4).exists() == (steps == "4")
    assert (run / "image_log/step-by-step.png").exists()


def test_a_run_without_pictures_names_none(config, capsys):  # noqa: F811
    config.logger_freq, config.steps = 0, 1
    train.train(config)
    told = capsys.readouterr().out
    assert "trained:" in told and "pictures:" not in told


# ---------------------------------------------------------------------------------------------------------- restarts
def test_a_finished_run_makes_what_a_kill_cost(config, capsys):  # noqa: F811
    config.logger_freq = 4
    run = train.train(config)
    (run / "image_log" / "step-000004.png").unlink()
    lines = [entry for entry in read_metrics(run) if not (entry["step"] == 4 and "control_gain" in entry)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    gain = read_metrics(resume(run))[-1]
    assert gain["step"] == 4 and "control_gain" in gain and (run / "image_log" / "step-000004.png").exists()
    told = capsys.readouterr().out
    assert "draw:" in told and "all 4 steps are made already; --steps with a larger number trains on" in told
    with pytest.raises(CheckpointError, match="is at step 4, past --steps 3"):
        resume(run, "--steps", "3")


def test_starting_anew_leaves_nothing_of_the_old_run(config):  # noqa: F811
    config.logger_freq = 2
    first = read_metrics(train.train(config))
    second = read_metrics(train.train(dataclasses.replace(config, seed=1), overwrite=True))
    assert len(second) == len(first) and second[0]["val_loss"] != first[0]["val_loss"]
    assert [entry["step"] for entry in second] == [0, 1, 2, 2, 3, 4, 4]


def _hold(path: str, settings: Config, locked, release) -> None:
    with RunFolder(Path(path), settings, "cpu").lock():
        locked.set()
        release.wait(60)


def test_a_run_has_one_owner(config):  # noqa: F811
    context = multiprocessing.get_context("spawn")
    locked, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(config.out, config, locked, release))
    other.start()
    assert locked.wait(60)
    with pytest.raises(CheckpointError, match=f"is being trained by process {other.pid} on "):
        train.train(config)
    other.kill()  # its death releases the lock
    other.join()
    run = train.train(config)
    assert not (run / ".lock").exists()


def test_a_longer_run_keeps_its_schedule(config, capsys):  # noqa: F811
    config.lr_schedule, config.steps = "cosine", 10
    run = train.train(config)
    rates = lambda: {e["step"]: e["learning_rate"] for e in read_metrics(run) if "loss" in e}
    before = rates()
    resume(run, "--steps", "12")
    assert rates()[12] == pytest.approx(0.02 * 1e-3) and rates()[10] == before[10]
    assert "--lr-steps 12 would stretch" in capsys.readouterr().out
    resume(run, "--steps", "14", "--lr-steps", "28")
    assert rates()[13] == pytest.approx(1e-3 * (0.02 + 0.98 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 12 / 28)))))
    assert "--lr-steps is 28 instead of 10" in capsys.readouterr().out
    settings = json.loads((run / "config.json").read_text())
    assert settings["lr_steps"] == 28


def test_rows_that_changed_are_counted_and_can_be_accepted(config, folder, tmp_path, capsys):  # noqa: F811
    config.data, config.checkpoint_freq = str(shutil.copytree(folder, tmp_path / "data")), 2
    run = train.train(config)
    file = Path(config.data) / "prompt.json"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(reversed(lines[2:])))  # another order is no change of rows
    shutil.copy(Path(config.data) / "source" / "3.png", Path(config.data) / "source" / "4.png")  # one repaired
    with pytest.raises(CheckpointError, match="3 rows were removed and 1 added .*--data-changed"):
        resume(run, "--steps", "5")
    resume(run, "--steps", "5", "--data-changed")
    assert "--data-changed: 3 rows were removed and 1 added" in capsys.readouterr().out
    resume(run, "--steps", "6")  # the new rows are those of the run now
    for old in (run / "checkpoints").iterdir():  # as before there was a list of rows
        (old / "rows.txt").unlink()
        (old / "checksums.json").unlink()
    file.write_text("\n".join(lines[3:]))
    with pytest.raises(CheckpointError, match="the list of its rows is another.*--data-changed"):
        resume(run, "--steps", "7")


# ------------------------------------------------------------------------------------------------------------- flags
RANGES = {
    "clip_grad_norm": -1.0, "min_snr_gamma": -1.0, "keep_checkpoints": -1, "steps": 0, "batch_size": 0,
    "learning_rate": float("nan"), "weight_decay": float("inf"), "drop_prompt": 1.5, "huber": -0.1, "workers": 257,
    "max_timestep": 1000, "timestep_bias": 0.0, "hint_channels": 0, "clip_skip": 0, "seed": 2**64, "guidance": -1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_every_number_has_a_range(config, name, capsys):  # noqa: F811
    flag, value = "--" + name.replace("_", "-"), RANGES[name]
    settings = dataclasses.replace(config, precision="fp32", trained_weights="fp32", optimizer_bits=32, **{name: value})
    with pytest.raises(ConfigError, match=f"{flag} is .*should be"):
        validate(settings)
    with pytest.raises(SystemExit):
        train.parse(["--base", "x", "--data", "y", f"{flag}={value}"])
    assert f"argument {flag}: is {value}, should be" in capsys.readouterr().err


def test_all_number_settings_have_a_lower_bound():
    for f in dataclasses.fields(Config):
        if isinstance(f.default, (int, float)) and not isinstance(f.default, bool):
            assert f.metadata["low"] > float("-inf"), f.name


@pytest.mark.parametrize(
    "value", [{"steps": "10"}, {"cache": 1}, {"learning_rate": None}, {"base": 3}, {"huber": True}]
)
def test_settings_of_the_wrong_type_are_named(config, value):  # noqa: F811
    settings = dataclasses.replace(config, precision="fp32", trained_weights="fp32", optimizer_bits=32, **value)
    with pytest.raises(ConfigError, match="--" + next(iter(value)).replace("_", "-") + " is .*should be of type"):
        validate(settings)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps:7", ""])
def test_a_device_that_is_not_there_is_one_line(config, device, capsys):  # noqa: F811
    with pytest.raises(ConfigError, match="--device"):
        train.train(dataclasses.replace(config, device=device))
    with pytest.raises(SystemExit):
        sampler.parse(["--model", "x", "--prompt", "y", "--device", device])
    assert "argument --device:" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--num", "--batch-size", "--steps", "--clip-skip"])
def test_the_sampler_s_numbers_have_ranges(flag, capsys):
    with pytest.raises(SystemExit):
        sampler.parse(["--model", "x", "--prompt", "y", flag, "0"])
    assert f"argument {flag}: is 0, should be" in capsys.readouterr().err


@pytest.mark.parametrize(("cuda", "mps", "wanted"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_default_device_is_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    assert default_device() == wanted == config_module.device(wanted)
