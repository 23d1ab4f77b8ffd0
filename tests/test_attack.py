"""Small attacks (`tests/attack.py` makes long ones), and what the programs do on systems that lack parts of Linux."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

import train
from tests import attack, fuzz_inputs, fuzzing
from tests.attack import Process, Victim
from tests.fuzz_inputs import READERS, copy_corpus, make_corpus, run_flags, save_micro_model
from toy import circles
from training.console import protect_output
from training.records import _wrap, read_metrics, save_grid
from weights.runs import list_checkpoints

ROOT = Path(__file__).parent.parent
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks this process")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("attack") / "corpus")


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Victim:
    return Victim(tmp_path_factory.mktemp("victim"), steps=4).make()


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A run of its own for the test: 4 steps that are done, the checkpoints of the last two."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def finished(victim) -> Path:
    train.main(victim.flags(victim.folder / "run"))
    return victim.folder / "run"


def names(run: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


# ----------------------------------------------------------------------------------------------------- small attacks
@forks
def test_kills(tmp_path):
    figures = attack.kills(minutes=10, seed=0, runs=2, forked=True, root=tmp_path)
    assert not figures.bad, figures.kept
    assert figures.attempts >= 12


@forks
def test_damaged_files_and_odd_flags(tmp_path, corpus):
    figures = fuzzing.fuzz(120, seed=0, root=tmp_path, corpus=corpus)
    assert not figures.bad, figures.kept
    assert figures.attempts == 120 and figures.peak < 4


@forks
def test_a_disk_that_fills_up(tmp_path):
    figures = attack.disk(2, seed=0, forked=True, root=tmp_path)
    if figures is None:
        pytest.skip("a tmpfs cannot be mounted here")
    assert not figures.bad, figures.kept


@pytest.mark.parametrize("name", READERS)
def test_the_readers_accept_what_is_sound(tmp_path, corpus, name):
    """So that the fuzzer attacks what stands behind the first check."""
    reader = READERS[name]
    copy_corpus(corpus, tmp_path / "work", reader.names)
    sound = [p for p in (tmp_path / "work").glob(reader.damaged[0]) if p.suffix != ".pickle"]
    file = sound[0].relative_to(tmp_path / "work").as_posix()
    assert fuzz_inputs.outcome(lambda: reader.call(tmp_path / "work", file)) == ("ok", "")


def raise_(error: Exception) -> None:
    raise error


@forks
def test_the_fuzzer_finds(tmp_path, corpus, monkeypatch):
    """Each kind of finding, of readers that are made to fail."""
    calls = {
        "traceback": lambda *_: {}["x"],
        "lines": lambda *_: raise_(ValueError("two\nlines")),
        "hang": lambda *_: time.sleep(60),
        "crash": lambda *_: os.kill(os.getpid(), 9),
        "memory": lambda *_: bytearray(1 << 40),
    }
    for name, call in calls.items():
        monkeypatch.setitem(READERS, name, fuzz_inputs.Reader(("data",), ("data/prompt.json",), call))
    monkeypatch.setattr(fuzzing, "LIMIT", 0.5)
    found = {name: fuzzing.fuzz(2, 0, (name,), root=tmp_path, corpus=corpus, say=lambda _: None) for name in calls}
    counts = {name: (f.attempts, f.tracebacks, f.hangs, f.crashes) for name, f in found.items()}
    assert counts == {
        "traceback": (2, 2, 0, 0), "lines": (2, 2, 0, 0), "hang": (2, 0, 2, 0), "crash": (2, 0, 0, 2),
        "memory": (2, 2, 0, 0),
    }  # fmt: skip
    assert "fuzz --seed 0 --only 1" in (tmp_path / "crash-0-1" / "finding.txt").read_text()


# ----------------------------------------------------------------------------------------------- what the attacks found
def test_a_damaged_later_checkpoint_takes_nobodys_place(run):
    shutil.copytree(run / "checkpoints" / "step-000004", run / "checkpoints" / "step-000020")
    (run / "checkpoints" / "step-000020" / "state.json").write_text("{")
    train.main(["--resume", str(run), "--steps", "5", "--keep-checkpoints", "1"])
    assert names(run) == ["step-000005", "step-000020"]


def test_metrics_that_are_no_numbers(run):
    """Somebody edited the file: what is no number is left out, and the run goes on."""
    with open(run / "metrics.jsonl", "a") as f:
        for value in ("null", '"x"', "[]", "true", "9" * 400, "1e400"):
            f.write(f'{{"step": 4, "loss": {value}, "control_gain": {value}}}\n')
    train.main(["--resume", str(run), "--steps", "6"])
    assert [entry["step"] for entry in read_metrics(run) if "loss" in entry][-1] == 6
    assert all(isinstance(v, (int, float)) for entry in read_metrics(run) for v in entry.values())


def test_what_a_killed_training_left_half_written_is_removed(run):
    (run / ".curves.77.partial.png").write_bytes(b"half")
    (run / "image_log" / ".step-000003.77.partial.png").write_bytes(b"half")
    (run / "checkpoints" / "step-000099.partial").mkdir()
    train.main(["--resume", str(run), "--steps", "5"])
    assert not [path for path in run.rglob("*") if "partial" in path.name]


@forks
def test_workers_do_not_keep_the_lock_of_a_killed_training(victim, tmp_path):
    """They outlive it by some seconds, in which the run can be resumed already."""
    run = tmp_path / "run"
    process = Process([*victim.flags(run), "--steps", "1000", "--workers", "2"], tmp_path / "log", forked=True)
    deadline = time.monotonic() + 60
    while not list_checkpoints(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.signal(9, group=False)
    assert process.wait() == -9
    step = int(names(run)[-1].removeprefix("step-"))
    train.main(["--resume", str(run), "--steps", str(step + 1), "--workers", "0"])
    assert names(run)[-1] == f"step-{step + 1:06d}"


def test_output_that_nobody_reads_and_letters_that_the_console_lacks(tmp_path):
    """A pipe whose reader has ended (`| head`), and a console in an old encoding, as on Windows."""
    victim = Victim(tmp_path / "victim", steps=1).make()
    file = victim.folder / "data" / "prompt.json"
    rows = [json.loads(line) | {"prompt": "круг 円 \U0001f98a"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *victim.flags(tmp_path / "run")], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        process.stdout.close()
        process.stdout = None
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert names(tmp_path / "run") == ["step-000001"]


def test_letters_that_the_console_lacks_become_escapes(monkeypatch, tmp_path):
    with open(tmp_path / "output.txt", "w", encoding="cp1252") as output:
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        monkeypatch.setattr(sys, "stdout", output)
        protect_output()
        print("круг, é")
        monkeypatch.undo()
    assert (tmp_path / "output.txt").read_bytes().strip() == rb"\u043a\u0440\u0443\u0433, " + "é".encode("cp1252")


def test_a_long_prompt_without_spaces_is_drawn(tmp_path):
    """As prompts in Chinese and Japanese are; each line of the picture holds as much as fits."""
    save_grid(tmp_path / "grid.png", {"hint": [np.zeros((32, 32, 3), np.uint8)]}, ["a" * 5000])
    font = ImageFont.load_default(size=11)
    lines = _wrap("a" * 1000, font, 96)
    assert "".join(lines) == "a" * 1000
    assert all(font.getlength(line) <= 96 < font.getlength(line + "a") for line in lines[:-1])


def test_overwriting_a_run_whose_checkpoints_are_on_another_disk(victim, run, tmp_path):
    disk = tmp_path / "disk"
    shutil.move(run / "checkpoints", disk)
    (run / "checkpoints").symlink_to(disk)
    train.main([*victim.flags(run), "--overwrite", "--steps", "2"])
    assert (run / "checkpoints").is_symlink()
    assert sorted(p.name for p in disk.iterdir()) == ["step-000001", "step-000002"]


# ---------------------------------------------------------------------------------------------------- other systems
NOT_LINUX = """
import ctypes, multiprocessing, os, signal, sys

sys.modules["fcntl"] = sys.modules["resource"] = None
import torch  # this one was built for Linux
for module, missing in (
    (os, ("fork", "forkpty", "register_at_fork", "mkfifo", "setsid", "killpg")),
    (signal, ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "pthread_sigmask", "set_wakeup_fd")),
):
    for name in missing:
        if hasattr(module, name):
            delattr(module, name)
open_file = os.open


def no_folders(path, *arguments, **settings):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *arguments, **settings)


os.open = no_folders


def no_library(name, *arguments, **settings):
    raise TypeError("no C library of that name")


ctypes.CDLL = no_library
"""
IMPORT_ALL = """
import importlib
for name in MODULES:
    importlib.import_module(name)
import data, train
train.main(FLAGS)
train.main(["--resume", "run", "--steps", "3"])
print("all done")
"""


def test_windows(tmp_path):
    """Every module is imported and two steps are trained without what Windows lacks; paths have backslashes."""
    save_micro_model(tmp_path / "base.safetensors")
    circles.make(tmp_path / "data", count=4, size=32)
    file = tmp_path / "data" / "prompt.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {side: row[side].replace("/", "\\") for side in ("source", "target")} for row in rows]
    file.write_text("".join(json.dumps(row) + "\r\n" for row in rows), encoding="utf-8-sig")
    files = [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if p.parent.name not in ("tests", "docs", ".venv")]
    files = [p for p in files if p.parent == ROOT or p.with_name("__init__.py").exists()]
    parts = [p.relative_to(ROOT).with_suffix("").parts for p in files]
    modules = sorted(".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts)
    assert {"train", "sampler", "merge", "data", "bench", "training.run_folder"} <= set(modules)
    script = f"{NOT_LINUX}\nMODULES, FLAGS = {modules!r}, {run_flags(Path('.'))!r}\n{IMPORT_ALL}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "all done" in done.stdout, done.stderr[-2000:]
    assert names(tmp_path / "run")[-1] == "step-000003"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_class_of_the_readme_with_workers_that_are_not_forked(tmp_path, method):
    """As on macOS and Windows (spawn), and on Linux with Python 3.14 (forkserver)."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    base = save_micro_model(tmp_path / "base.safetensors")
    changes = {"512": "32", "1000": "24", "999": "23", "models/v1-5-pruned.ckpt": str(base), "runs/gradients": "run"}
    for old, new in changes.items():
        assert old in example
        example = example.replace(old, new)
    settings = "config.steps, config.batch_size, config.workers, config.device, config.logger_freq = 2, 2, 1, 'cpu', 0"
    example = example.replace("    train.train(config", f"    {settings}\n    train.train(config")
    assert settings in example
    example = example.replace('if __name__ == "__main__":', 'print("imported")\nif __name__ == "__main__":', 1)
    start = f'    import multiprocessing\n    multiprocessing.set_start_method("{method}")\n    {settings}'
    (tmp_path / "mine.py").write_text(example.replace(f"    {settings}", start), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("imported") == 2  # once for the worker, which does not train
    assert names(tmp_path / "run") == ["step-000002"]
