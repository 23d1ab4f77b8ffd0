"""Ending a run in order when it is interrupted."""

import signal
import threading
from typing import Any


class Interruption:
    """While entered, Ctrl-C and SIGTERM ask the training loop to stop after a checkpoint (`requested`). A second Ctrl-C
    raises KeyboardInterrupt at once."""

    def __init__(self):
        self.requested, self._handlers = False, {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
