"""How worker processes load data ahead of the one that needs the data.

PyTorch's DataLoader starts the workers and moves batches between processes. A long run needs more of them:

- Signals go to every process of a job, but the main process alone decides whether to stop: workers ignore them, and
  while workers start, signals wait.
- An exception in a worker comes out in the main process as it was raised, in its own words.
- A worker that dies is one line that says so.
- Workers may be forked or started anew (macOS, Windows, Python 3.14): what they are given is pickled then, so it must
  be small and must not hold open files.
"""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from training.images import DataError, one_line
from training.interruption import SIGNALS

IMPORTABLE = 'a script that trains needs its call under `if __name__ == "__main__":` and its classes above that line'


def load(
    dataset: Any,
    batches: Iterable[Sequence[int]],
    workers: int = 0,
    collate: Callable[[list[Any]], Any] = default_collate,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Iterate over collate([dataset[n] for n in batch]) for each of `batches`, in order.

    `workers` processes load ahead (0: the main process loads). Raises what `dataset` raises, and DataError for a worker
    that died or could not be started.
    """
    if workers:
        check_can_start(dataset)
    loader = DataLoader(
        _Batches(dataset, collate), sampler=batches, batch_size=None, collate_fn=_as_it_is, num_workers=workers,
        pin_memory=pin_memory, prefetch_factor=4 if workers else None, worker_init_fn=_ignore_signals,
    )  # fmt: skip
    with _signals_wait(), _without_death_handler():
        iterator = iter(loader)
    if not workers:
        return _deliver(iterator, lambda: None)
    # Workers that ignore SIGTERM must not be left to the DataLoader, which would wait for them for ever: they are
    # killed when the iterator is gone, however it goes, and at exit before anything waits for them.
    kill = weakref.finalize(iterator, _kill, list(iterator._workers), os.getpid())
    kill.atexit = False  # the next line instead: what is registered last runs first
    atexit.register(kill)
    return _deliver(iterator, iterator._shutdown_workers)


def _deliver(iterator: Iterator[Any], stop: Callable[[], None]) -> Iterator[Any]:
    """The batches of a DataLoader's iterator; raises the exceptions among them. `stop` ends the workers."""
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as e:  # not of the data set: its exceptions are batches
                if isinstance(e, RuntimeError) and not any(words in str(e) for words in ("DataLoader", "ancdata")):
                    raise
                reason = one_line(" ".join(f"{type(e).__name__}: {e}".split()))
                started_anew = "" if start_method() == "fork" else f"; {IMPORTABLE}"
                raise DataError(
                    f"a process that loads data died ({reason}): killed, or out of memory; --workers 0 loads in the "
                    f"main process{started_anew}"
                ) from None
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        stop()


def _kill(workers: list[multiprocessing.Process], parent: int) -> None:
    """Kill those of `workers` that are alive. A forked process has copies of the objects, and leaves the workers be."""
    for worker in workers if os.getpid() == parent else ():
        if worker.is_alive():
            worker.kill()


class _Batches(torch.utils.data.Dataset):
    """Item `numbers` is the collated batch of these items, or the exception that one of them raised."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, numbers: Sequence[int]) -> Any:
        try:
            return self.collate([self.dataset[n] for n in numbers])
        except Exception as error:
            return error if torch.utils.data.get_worker_info() is None else _portable(error)


def _as_it_is(batch: Any) -> Any:
    return batch


def _portable(error: Exception) -> Exception:
    """`error` as it can be sent to another process: itself, or where it cannot be pickled a DataError of its words.

    An error that is no DataError is one of a user's own class, who wants the place: it becomes a note.
    """
    if not isinstance(error, DataError):
        error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return DataError(one_line(f"{type(error).__name__}: {error}"))


def start_method() -> str:
    """How processes are started: fork, spawn or forkserver."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def check_can_start(dataset: Any) -> None:
    """DataError where worker processes cannot be started or cannot be given `dataset`."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # this is a worker that imports the script
        raise DataError(f"a worker process came to the training itself; {IMPORTABLE}")
    if start_method() != "fork":
        try:
            ForkingPickler.dumps(dataset)
        except Exception as e:
            reason = one_line(" ".join(str(e).split()))
            raise DataError(
                f"the data set cannot be sent to worker processes ({reason}): define its classes at the top of a "
                "module, or load with --workers 0"
            ) from e


def _ignore_signals(_: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold signals back: a process that is started meanwhile inherits this, and none can hit it before it ignores
    them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_death_handler() -> Iterator[None]:
    """Take back the handler with which DataLoader raises the death of a worker wherever the main process happens to be,
    in the middle of saving a checkpoint, say. The next batch that the worker owes raises anyway."""
    number = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(number) if number else None
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, before)
