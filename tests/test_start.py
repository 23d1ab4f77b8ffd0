"""What a command does before PyTorch is there: answer --help and wrong flags."""

import subprocess
import sys
from dataclasses import MISSING, fields

import pytest

import config
import flags
import sampler
from drawing import request
from ldm import MODELS
from precision import PRECISIONS
from tests.test_docs import ROOT

ANSWERS = {
    "train.py": ["--help"], "data.py": ["--help"], "sampler.py": ["--help"], "merge.py": ["--help"],
    "play.py": ["--help"], "bench.py": ["--help"],
}  # fmt: skip
REFUSED = {
    "train.py": ["--steps", "0"], "data.py": ["check"], "sampler.py": ["--prompt", "x"], "merge.py": ["export"],
    "play.py": ["--port", "-1"], "bench.py": ["step", "--batch-size", "0"],
}  # fmt: skip
# Runs a program as its command line does, and prints whether PyTorch was imported when it ended.
RUN = """
import atexit, runpy, sys
atexit.register(lambda: print("PyTorch", "torch" in sys.modules))
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN, program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("program", ANSWERS)
def test_help_does_not_wait_for_pytorch(program):
    said = run(program, *ANSWERS[program])
    assert said.returncode == 0 and said.stdout.endswith("PyTorch False\n")
    lines = said.stdout.splitlines()
    assert lines[0].startswith(f"usage: {program} ") and len(lines[0]) <= 80 and lines[1] == ""


@pytest.mark.parametrize("program", REFUSED)
def test_neither_does_a_wrong_flag(program):
    said = run(program, *REFUSED[program])
    assert said.returncode == 2 and said.stdout == "PyTorch False\n" and "error: " in said.stderr.splitlines()[-1]


def test_names_that_the_flags_repeat():
    """The flags know number formats and solvers without importing what computes with them."""
    assert tuple(PRECISIONS) == config.PRECISIONS
    assert tuple(MODELS) == flags.MODELS
    assert (tuple(sampler.SOLVERS), sampler.SPACINGS) == (request.SOLVERS, request.SPACINGS)


def test_a_row_in_the_table_makes_a_solver_a_choice(monkeypatch):
    drawn = ["--model", "x", "--prompt", "y", "--solver", "heun"]
    with pytest.raises(SystemExit):
        sampler.parse(drawn)
    monkeypatch.setitem(sampler.SOLVERS, "heun", sampler.ddim_step)
    asked = sampler.parse(drawn)
    assert (asked.solver, asked.device) == ("heun", config.default_device())
    assert request.parse_flags(drawn, None)["solver"] == "heun"  # before PyTorch is there, any name passes


def test_a_default_that_depends_on_the_machine_is_told_in_words():
    texts = {f.name: f.metadata["help"] for f in fields(config.Config) if f.default_factory is not MISSING}
    assert texts.keys() == {"device", "workers"} and all("(default: " in text for text in texts.values())
