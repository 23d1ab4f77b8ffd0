"""Several processes train as one: the same samples, the same gradients, the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import train
from config import ConfigError
from tests.test_train import config, losses, weights  # noqa: F401 (config is a fixture)
from training.distributed import Ranks
from training.records import read_metrics
from weights import ModelSource, load_model
from weights.runs import newest_checkpoint

ROOT = Path(__file__).parent.parent


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def apart(a, b, start) -> float:
    """How far `a` and `b` are apart, in parts of the way that `a` went from `start`. (Adam moves a weight whose
    gradient is all rounding as far as any other, so single weights differ.)"""
    distance = lambda x, y: sum((x[k] - y[k]).abs().sum().item() for k in x)
    return distance(a, b) / distance(a, start)


def test_ranks_take_turns_at_the_batches(monkeypatch):
    class Numbers(torch.utils.data.Dataset):
        def __getitem__(self, n):
            return n

    both = [[b.tolist() for b in data.batches(Numbers(), 6, 18, 2, rank=r, ranks=2)] for r in (0, 1)]
    assert both == [[[6, 7], [10, 11], [14, 15]], [[8, 9], [12, 13], [16, 17]]]


def test_more_ranks_than_gpus_are_told(monkeypatch):
    for name, value in {"WORLD_SIZE": "65", "RANK": "64", "LOCAL_RANK": "64"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="there is no cuda:64: torchrun's --nproc-per-node can be up to"):
        Ranks("cuda")


def test_two_ranks_equal_one_and_a_run_goes_on_with_another_number(config, tmp_path):  # noqa: F811
    shared = [
        "--base", config.base, "--data", config.data, "--cache-dir", config.cache_dir, "--learning-rate", "1e-4",
        "--logger-freq", "2", "--log-steps", "2", "--workers", "0", "--device", "cpu", "--clip-grad-norm", "1",
    ]  # fmt: skip
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train.train(train.parse([*shared, "--out", one, "--steps", "6", "--batch-size", "4"])[0])
    done = torchrun(2, *shared, "--out", two, "--steps", "4", "--batch-size", "1", "--accumulate-grad-batches", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training a ControlNet") == 1  # only one of them speaks
    state = json.loads((newest_checkpoint(two) / "state.json").read_text())
    assert (state["step"], state["samples"], state["ranks"]) == (4, 16, 2)
    assert losses(two) == pytest.approx(losses(one)[:4], rel=1e-4)
    resumed = train.parse(["--resume", two, "--steps", "6", "--batch-size", "4", "--accumulate-grad-batches", "1"])[0]
    train.train(resumed, resume=two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert apart(weights(one), weights(two), load_model(ModelSource(config.base, attach=True)).state_dict()) < 0.02
    gains = [[e["control_gain"] for e in read_metrics(r) if "control_gain" in e] for r in (one, two)]
    assert gains[1] == pytest.approx(gains[0], abs=1e-4) and len(gains[0]) == 4


def test_a_rank_that_fails_ends_the_run_with_its_message(config):  # noqa: F811
    rows = (Path(config.data) / "prompt.json").read_text().splitlines()
    broken = Path(config.out).parent / "broken"
    for side in ("source", "target"):
        (broken / side).mkdir(parents=True)
        for file in (Path(config.data) / side).iterdir():
            (broken / side / file.name).write_bytes(file.read_bytes())
    (broken / "prompt.json").write_text("\n".join(rows))
    order = data.Samples(data.FolderDataset(broken), range(22), 0, (4, 4, 4))
    (broken / "source" / f"{order.index(3)}.png").write_bytes(b"no picture")  # of the second batch: rank 1's
    done = torchrun(
        2, "--base", config.base, "--data", str(broken), "--out", config.out, "--cache-dir", config.cache_dir,
        "--steps", "4", "--batch-size", "2", "--logger-freq", "0", "--workers", "0", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode != 0 and f"{order.index(3)}.png: not a readable image" in done.stderr
