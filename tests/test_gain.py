"""When the control gain is measured: to a tenth of `logger_freq` until the sudden convergence."""

import contextlib
from types import SimpleNamespace

import pytest

from training import validation
from training.records import Metrics
from training.run_folder import RunFolder
from training.validation import Validation


def measured(monkeypatch, tmp_path, every, steps, gains, stop=None):
    """What is printed and written when `gains(step)` is measured over `steps` steps; from `stop` on by a second object,
    as after a resume."""
    monkeypatch.setattr(validation, "ema_weights", lambda trainer: contextlib.nullcontext())
    monkeypatch.setattr(Validation, "losses", lambda self: (1 - gains(self.trainer.step), 1.0))
    monkeypatch.setattr(Validation, "draw", lambda self, path: drawn.append(path.name))
    printed, drawn, start = [], [], 0
    monkeypatch.setattr(validation.tqdm, "write", printed.append)
    for end in (stop or steps, steps):
        self = Validation.__new__(Validation)
        self.trainer = SimpleNamespace(config=SimpleNamespace(logger_freq=every, device="cpu"), step=start)
        self.run_folder, self.metrics = RunFolder(tmp_path, None, "cpu"), Metrics(tmp_path, start)
        self.history = self.page = None
        self.converged = validation.sudden_convergence(*self.metrics.series("control_gain")) is not None
        for step in range(start, end):
            self.trainer.step = step
            self.measure(step)
        start = end
    self.trainer.step = steps
    self.measure(steps, last=True)
    return self.metrics, printed, drawn


@pytest.mark.parametrize("stop", [None, 70, 175])
def test_the_step_of_the_jump_is_known_to_a_tenth(monkeypatch, tmp_path, stop):
    gains = lambda step: 0.0 if step < 163 else 0.5  # noqa: E731
    metrics, printed, drawn = measured(monkeypatch, tmp_path, 100, 420, gains, stop)
    steps, _ = metrics.series("control_gain")
    assert steps == [*range(0, 190, 10), 200, 300, 400, 420]  # 170 and 180 are above 0.1
    assert metrics.series("val_loss")[0] == [0, 100, 200, 300, 400, 420]  # the curve of the loss keeps its spacing
    assert [line for line in printed if "sudden" in line] == [
        "sudden convergence at step 170: the hint is obeyed (control gain 0.500)"
    ]
    assert len(printed) == 7 and len(set(drawn)) == 6


@pytest.mark.parametrize(("every", "wanted"), [(0, []), (20, [0, 20, 40, 50]), (1000, [0, 50])])
def test_other_frequencies(monkeypatch, tmp_path, every, wanted):
    metrics, _, _ = measured(monkeypatch, tmp_path, every, 50, lambda step: 0.0)
    assert metrics.series("control_gain")[0] == wanted
