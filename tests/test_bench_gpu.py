"""What is to be seen on a GPU, rehearsed: every check notices what it is there for."""

import json
from collections import Counter

import pytest
import torch

import bench
from benchmarks import checks, gpu
from benchmarks.checks import Setting
from benchmarks.figures import Row
from config import GPU_PRESETS
from lowvram import estimate, streaming
from lowvram.tracking import Peak
from weights.writing import save_json


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting("cpu", "tiny", 32, str(tmp_path), against=False)


def test_finished_parts_are_not_made_again(setting, monkeypatch, capsys):
    made = []

    def run_process(setting, name, seconds):
        made.append((name, seconds))
        if name != "broken":
            row = Row(name, "1 s", "2 s", "2.00 times")._asdict()
            save_json(setting.path(f"{name}.json"), {"part": name, "machine": "a GPU", "seconds": 1.0, "rows": [row]})
        return "1 s"

    monkeypatch.setattr(gpu, "run_process", run_process)
    assert gpu.run_all(setting, ["first", "broken"], 2, 1000) == 1
    assert gpu.run_all(setting, ["first", "broken", "last"], 2, 0.5) == 1
    assert [name for name, _ in made] == ["first", "broken", "broken", "last"]
    assert made[0][1] == 120 and made[2][1] == pytest.approx(30, abs=1)  # the shorter of the two limits
    assert gpu.run_all(setting, ["late"], 2, 0) == 1 and made[-1][0] == "last"
    said = capsys.readouterr().out
    assert "first: finished before" in said and "| last | 1 s | 2 s | 2.00 times |  |" in said
    assert "not finished: broken" in said and "late: not begun" in said
    gpu.run_all(setting, ["first", "broken", "last"], 2, 0)
    results = json.loads(setting.path("results.json").read_text())
    assert [result["part"] for result in results] == ["first", "last"]
    assert "tiny, 32 px, on a GPU" in setting.path("table.md").read_text()


def test_a_part_is_a_process_with_a_limit(setting, monkeypatch):
    said = gpu.run_process(setting, "limits", 0.2)
    assert said.startswith("NOT finished after") and not setting.path("limits.json").exists()
    with pytest.raises(SystemExit) as end:
        bench.main(["gpu", "--device", "cpu", "--model", "tiny", "--out", setting.folder, "--parts", "limits"])
    assert end.value.code == 0
    (result,) = json.loads(setting.path("results.json").read_text())
    assert result["machine"].startswith("cpu, torch ") and result["rows"][0]["what"] == "products in fp32"


def test_every_preset_and_precision_is_a_part():
    names = list(gpu.parts())
    for kind in ("memory", "resume"):
        assert {f"{kind}-{name}" for name in ("exact", *GPU_PRESETS)} <= set(names)
    assert {"step-bf16", "step-fp32", "step-tf32", "oom", "streaming", "tutorial", "demo"} <= set(names)
    assert names.index("step-bf16") < names.index("memory-16gb") < names.index("step-fp32")


def test_predictions_are_compared_with_what_is_measured(setting, monkeypatch):
    (row,) = checks.check_memory(setting, "12gb")
    assert row.limit == "within 10%" and 0.9 < float(row.ratio) < 1.1
    monkeypatch.setattr(estimate, "predict", lambda *_: {"training": Peak(2**40)})
    (row,) = checks.check_memory(setting, "12gb")
    assert row.limit == "NOT within 10%"


def test_a_resumed_run_is_compared_bit_by_bit(setting, monkeypatch):
    (row,) = checks.check_resume(setting, "8gb")
    assert row.ours == "every bit is equal" and not torch.are_deterministic_algorithms_enabled()
    real = checks.train.restore_state

    def restore_less(trainer, *args):
        real(trainer, *args)
        next(iter(trainer.ema.values())).add_(1e-3)

    monkeypatch.setattr(checks.train, "restore_state", restore_less)
    (row,) = checks.check_resume(setting, "8gb")
    assert "tensors DIFFER, the first: average.safetensors" in row.ours


def test_streams_that_race_are_noticed(setting, monkeypatch):
    rows = checks.check_streaming(setting)
    assert len(rows) == 3 and all(row.limit == "the same gradients: 0 apart" for row in rows)
    real = streaming.BlockStreamer._copy

    def late(self, key):  # as if the computation had not waited for the copy
        copied = real(self, key)
        next(iter(copied.values())).zero_()
        return copied

    monkeypatch.setattr(streaming.BlockStreamer, "_copy", late)
    assert ["OTHER" in row.limit for row in checks.check_streaming(setting)] == [True, False, True]


def test_an_out_of_memory_proposes_what_trains(setting, monkeypatch):
    need = lambda c, *_: {"training": Peak(c.batch_size * 2**28, Counter(activations=c.batch_size * 2**28))}
    monkeypatch.setattr(estimate, "predict", need)
    message, proposed = checks.check_oom(setting)
    assert "out of memory on cpu with 32x32, batch" in message.ours and proposed.ours == "trains"
    assert proposed.what.startswith("what it proposes, --batch-size 1 --accumulate-grad-batches")


def test_copies_beside_kernels():
    events = {"copies": [(0.0, 1.0), (0.5, 2.0), (5.0, 6.0)], "kernels": [(1.5, 3.0), (2.5, 4.0), (5.0, 5.5)]}
    assert checks.merged(events["copies"]) == [(0.0, 2.0), (5.0, 6.0)]
    assert checks.overlapped(events) == (3.0, 1.0, 3.0)


def test_what_the_sanitizer_finds_is_told(setting, monkeypatch, tmp_path):
    """With a program in its place that runs the steps and says what it is told to say."""
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    run = '"$3" "$4" "$5" && echo'
    for begin, summary, status, told in (
        (run, "0 errors", 0, "0 errors"), ("echo", "2 errors", 0, "2 errors"), ("echo", "0 errors", 3, "NO result"),
    ):  # fmt: skip
        tool.write_text(f'#!/bin/sh\n{begin} "=== ERROR SUMMARY: {summary}"\nexit {status}\n')
        tool.chmod(0o755)
        (row,) = checks.check_sanitizer(setting)
        assert told in row.ours
    tool.unlink()
    (row,) = checks.check_sanitizer(setting)
    assert row.ours == "is not installed here"


def test_a_recorded_step_that_differs_is_noticed(setting, monkeypatch):
    assert [row.ours for row in checks.check_graph(setting)] == ["every bit is equal"] * 3
    real = checks.RepeatedGraph.__call__

    def inexact(self, batch, last):
        loss = real(self, batch, last)
        self.parameters[0].grad.add_(1e-3)
        return loss

    monkeypatch.setattr(checks.RepeatedGraph, "__call__", inexact)
    assert all("APART" in row.ours for row in checks.check_graph(setting))
