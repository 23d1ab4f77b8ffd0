"""What a command does before PyTorch is there: answer --help and wrong flags."""

import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
import torch

import config
import flags
import sampler
from drawing import request
from ldm import MODELS
from precision import PRECISIONS
from tests.test_docs import ROOT
from training.console import exit_status

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


def test_loading_a_model_imports_no_compiler():
    """Drawing numbers on the meta device would import it, which takes more than a second."""
    code = "import sys, config, weights; weights.load_model(config.TINY_BASE); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("change", [{}, {"optimizer": "adamw"}])
def test_a_step_imports_no_compiler(change):
    """PyTorch's optimizers import it at their first step, which takes three seconds at every start."""
    code = (
        "import sys, torch, weights; from config import *; from training.setup import build_trainer\n"
        f"config = resolve(Config(**DEMO | {change} | dict(device='cpu')), 'exact')\n"
        "trainer = build_trainer(config, weights.load_model(weights.ModelSource(TINY_BASE, attach=True)))\n"
        "for p in trainer.home.masters.values(): p.grad = torch.ones_like(p)\n"
        "before = [p.clone() for p in trainer.home.masters.values()]\n"
        "trainer.optimizer.step()\n"
        "print(any(torch.equal(p, q) for p, q in zip(before, trainer.home.masters.values())))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\nFalse\n", done.stderr


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


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


ENDS = {  # an exception -> the line that a program ends with
    ValueError("a\nb"): r"x.py: a\nb",
    FileNotFoundError(2, "No such file or directory", "a"): "x.py: [Errno 2] No such file or directory: 'a'",
    KeyboardInterrupt(): "x.py: stopped",
    KeyboardInterrupt("step 3 is saved"): "x.py: step 3 is saved",
    MemoryError(): "x.py: the computer ran out of memory; less",
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has"): (
        "x.py: the device ran out of memory (1.50 GiB more were asked for); less"
    ),
}


@pytest.mark.parametrize("error", ENDS, ids=repr)
def test_what_ends_a_program_is_one_line(error):
    assert exit_status("x.py", raising(error), leaner="less") == ENDS[error]


def test_memory_that_the_computer_lacks_is_told_in_one_line():
    said = exit_status("x.py", lambda: torch.empty(2**55), leaner="less")
    assert said == f"x.py: the computer ran out of memory ({2**57 / 2**30:.2f} GiB more were asked for); less"


def test_a_mistake_in_the_code_keeps_its_traceback():
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("a"), TypeError("a")):
        with pytest.raises(type(error)):
            exit_status("x.py", raising(error))
    assert exit_status("x.py", lambda: None) == 0 and exit_status("x.py", lambda: 1) == 1
