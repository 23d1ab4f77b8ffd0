"""Ending a run in order when a signal asks for it.

Ctrl-C sends SIGINT, cluster schedulers and service managers send SIGTERM, SIGUSR1 or SIGHUP, a closing console on
Windows SIGBREAK. All mean the same here: in the training loop, finish the step, save a checkpoint and end; before the
loop, end with one line. A second Ctrl-C ends the process at once.
"""

import signal
import threading
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)
)


class Interrupted(KeyboardInterrupt):
    """A signal arrived where nothing has to be saved; the message says which."""


class Interruption:
    """While entered, the signals of SIGNALS end the run in order.

    Between `begin_loop` and the end a signal only sets `requested`, which the training loop looks at. Before that it
    raises Interrupted. Handlers can be set in the main thread alone; in another thread nothing happens.
    """

    def __init__(self):
        self.requested, self.in_loop, self._handlers = False, False, {}

    def begin_loop(self) -> None:
        """From now on the training loop decides when to stop."""
        self.in_loop = True

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if not self.in_loop:
            raise Interrupted(f"ended by {name} before the first step; caches keep what they have")
        if self.requested and number == signal.SIGINT:
            raise Interrupted("ended at once by a second Ctrl-C; --resume continues from the last checkpoint")
        self.requested = True
