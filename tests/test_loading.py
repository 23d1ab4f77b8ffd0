"""Worker processes: signals, exceptions, deaths, and every way in which processes are started."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import DataError
from training import loading
from training.cache import RowCache

ROOT = Path(__file__).parent.parent
METHODS = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])


class Items(torch.utils.data.Dataset):
    """Item n is n; item `bad` raises `error`."""

    def __init__(self, bad=None, error=None):
        self.bad, self.error = bad, error

    def __getitem__(self, n):
        if n == self.bad:
            raise self.error
        return torch.tensor([n, os.getpid()])


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def numbers(loader) -> list[list[int]]:
    return [batch[:, 0].tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [DataError("row 5: no such image"), KeyError("depth"), Unpicklable(1, 2)])
def test_an_exception_reaches_the_main_process_as_it_is(workers, error):
    loader = data.batches(Items(5, error), 0, 100, 2, workers)
    assert [next(loader)[:, 0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    expected = DataError if workers and isinstance(error, Unpicklable) else type(error)
    with pytest.raises(expected) as told:
        next(loader)
    words = "Unpicklable: 1 2" if expected is DataError and isinstance(error, Unpicklable) else str(error)
    assert str(told.value) == words
    if workers and expected is KeyError:  # a user's own class: where it was
        assert "test_loading.py" in told.value.__notes__[0]


def test_items_that_do_not_go_together_are_one_exception():
    class Ragged(Items):
        def __getitem__(self, n):
            return torch.zeros(n)

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
            next(data.batches(Ragged(), 0, 4, 2, workers))


def test_workers_ignore_signals_and_end_all_the_same():
    loader = data.batches(Items(), 0, 10_000, 2, 2)
    pids = {next(loader)[0, 1].item() for _ in range(4)}
    assert len(pids) == 2 and os.getpid() not in pids
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        for pid in pids:
            os.kill(pid, number)
    assert [next(loader)[0, 0].item() for _ in range(20)] == list(range(8, 48, 2))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    del loader
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_was_killed_is_one_line_when_its_batch_is_due():
    handler = signal.getsignal(signal.SIGCHLD)
    loader = data.batches(Items(), 0, 10_000, 2, 1)
    os.kill(next(loader)[0, 1].item(), signal.SIGKILL)
    assert signal.getsignal(signal.SIGCHLD) is handler  # nothing is raised in the middle of a step
    with pytest.raises(
        DataError, match=r"a process that loads data died .*killed, or out of memory; --workers 0"
    ) as told:
        numbers(loader)
    assert "\n" not in str(told.value)


def test_a_billion_steps_start_at_once():
    """A list of their numbers would not fit into memory."""
    assert next(data.batches(Items(), 0, 4 * 10**9, 4))[:, 0].tolist() == [0, 1, 2, 3]


SCRIPT = """
    import multiprocessing, os, sys, numpy as np
    sys.path.insert(0, ROOT)
    import data

    class Gradients:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            if i == 3 and "bad" in sys.argv:
                raise data.DataError("item 3 is bad")
            ramp = np.linspace(0, 1, 16, dtype=np.float32)[None, :, None].repeat(16, 0)
            return dict(jpg=np.repeat(2 * ramp * (i / 7) - 1, 3, 2), txt="a gradient", hint=ramp)

    def run(dataset):
        samples = data.Samples(data.ArrayDataset(dataset, (16, 16), 1), range(8), 0, (4, 2, 2))
        return sum(len(batch["prompt"]) for batch in data.batches(samples, 0, 8, 2, 1))

    multiprocessing.set_start_method(sys.argv[1], force=True)
    if __name__ == "__main__" and "guarded" in sys.argv:
        print(run(Gradients()))
        sys.argv.append("bad")
    if __name__ == "__main__" or "unguarded" in sys.argv:
        try:
            run(Gradients())
        except data.DataError as e:
            sys.exit(f"DataError: {e}")
"""


def run_script(tmp_path, *arguments: str) -> str:
    script = tmp_path / "own.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("ROOT", repr(str(ROOT))))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    return done.stdout + done.stderr


@METHODS
def test_a_class_of_the_script_is_loaded_however_processes_start(method, tmp_path):
    assert run_script(tmp_path, method, "guarded") == "8\nDataError: item 3 is bad\n"


def test_a_script_without_its_guard_is_told_and_does_not_hang(tmp_path):
    worker, main = run_script(tmp_path, "spawn", "unguarded").splitlines()
    assert "a worker process came to the training itself" in worker and "__main__" in worker
    assert "a process that loads data died" in main and "__main__" in main


def test_what_cannot_be_sent_to_a_worker_is_told_before_one_starts(monkeypatch):
    monkeypatch.setattr(loading, "start_method", lambda: "spawn")
    local = Items()
    local.function = lambda: None
    with pytest.raises(DataError, match="cannot be sent to worker processes .*--workers 0") as told:
        data.batches(local, 0, 4, 2, 1)
    assert "\n" not in str(told.value)


def test_workers_are_sent_neither_rows_of_the_cache_nor_its_index(folder, tmp_path):
    keys = [data.digest(i) for i in range(5000)]
    row_cache = RowCache(tmp_path, "c", (8,))
    row_cache.fill(keys, lambda at: torch.arange(len(at) * 8.0).view(-1, 8), 5000, "things")
    assert row_cache[keys[1]][0] == 8
    sent = pickle.dumps(row_cache)
    assert len(sent) < 1000 and torch.equal(pickle.loads(sent)[keys[4999]], row_cache[keys[4999]])
    dataset = data.FolderDataset(folder)
    before = len(pickle.dumps(dataset))
    data.verify.find_bad_rows(dataset, workers=0)
    dataset[0]
    assert len(pickle.dumps(dataset)) < before + 1000


def test_loading_works_in_a_thread():
    """Signals belong to the main thread; a notebook may train in another."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(numbers(data.batches(Items(), 0, 4, 2, 1))))
    thread.start()
    thread.join()
    assert found == [[0, 1], [2, 3]]


def test_an_exception_does_not_leave_workers_that_are_waited_for(tmp_path):
    """The main process ends by an exception while its loader is alive."""
    script = tmp_path / "own.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport data, torch\n"
        "class Items(torch.utils.data.Dataset):\n    def __getitem__(self, n): return n\n"
        "loader = data.batches(Items(), 0, 10**6, 2, 2)\nnext(loader)\nraise SystemExit('ended')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stderr == "ended\n"


def test_numpy_items_are_batched():
    class Arrays(Items):
        def __getitem__(self, n):
            return {"x": np.full(2, n)}

    assert next(data.batches(Arrays(), 0, 2, 2))["x"].tolist() == [[0, 0], [1, 1]]
