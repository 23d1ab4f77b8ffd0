"""Drawings wait in a line, since the device draws one picture at a time.

    request thread                     worker thread (one)
    --------------                     -------------------
    submit(drawing) -> Job  ---------> draw(drawing, job.show)
    job.next(seconds)       <--------- show(event): steps, pictures
    job.cancel()            ---------> the next `show` raises Cancelled

A request thread that ends, whatever the reason, cancels its job: nothing is drawn for a browser that is gone. A slow
browser does not hold up the device: of the steps that it has not fetched yet the newest is kept alone.
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from playground.hints import RequestError
from training.images import one_line

MOST_WAITING = 16
Event = dict[str, Any]  # what the browser is told, with a key "event" that says of what kind it is


class Cancelled(Exception):
    """Nobody waits for this drawing any more."""


class Job:
    """A drawing in the line, and what there is to tell of it."""

    def __init__(self, drawing: Any):
        self.drawing = drawing
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._cancelled = False

    def show(self, event: Event) -> None:
        """Called by whoever draws. Raises Cancelled if the job was cancelled."""
        with self._changed:
            if self._cancelled:
                raise Cancelled
            if self._events and self._events[-1]["event"] == event["event"] == "step":
                event = {"preview": self._events.pop().get("preview")} | event
            self._events.append(event)
            self._changed.notify()

    def next(self, seconds: float) -> Event | None:
        """The next event, or None if there is none within `seconds`. The last event is "done" or "error"."""
        with self._changed:
            self._changed.wait_for(lambda: self._events, seconds)
            return self._events.popleft() if self._events else None

    def cancel(self) -> None:
        """Nobody waits for the job any more: it leaves the line, or ends with its next step."""
        with self._changed:
            self._cancelled, self.drawing = True, None  # what the drawing holds in memory is free at once
            self._events.clear()

    @property
    def cancelled(self) -> bool:
        return self._cancelled


class Line:
    """The line of drawings and the thread that draws them. `draw(drawing, show)` draws one, and calls show(event)."""

    def __init__(self, draw: Callable[[Any, Callable[[Event], None]], None], most: int = MOST_WAITING):
        self._draw, self._most = draw, most
        self._jobs: list[Job] = []  # the first is being drawn
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._worker.start()

    def submit(self, drawing: Any) -> Job:
        """Put a drawing at the end of the line. RequestError if the line is too long."""
        with self._changed:
            self._jobs[1:] = [job for job in self._jobs[1:] if not job.cancelled]
            if len(self._jobs) > self._most:
                raise RequestError(f"{self._most} drawings are waiting already; try again when some are done.")
            job = Job(drawing)
            self._jobs.append(job)
            self._changed.notify()
            return job

    def place(self, job: Job) -> int:
        """How many drawings come before the job: 0 if it is being drawn or done."""
        with self._changed:
            before = self._jobs[: self._jobs.index(job)] if job in self._jobs else []
            return len([other for other in before if not other.cancelled])

    def __len__(self) -> int:
        """How many drawings are in the line, the one that is being drawn included."""
        with self._changed:
            return len([job for job in self._jobs if not job.cancelled])

    def close(self, seconds: float = 10.0) -> None:
        """Cancel everything and end the worker; wait for that, `seconds` at most."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.cancel()
            self._changed.notify()
        self._worker.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job = self._jobs[0]
            self._draw_job(job)
            with self._changed:
                self._jobs.pop(0)
            del job  # its hints and pictures are freed while the line is empty

    def _draw_job(self, job: Job) -> None:
        """Draw a job. Whatever goes wrong becomes its last event: the worker goes on with the next job."""
        drawing = job.drawing
        try:
            if job.cancelled:
                return
            self._draw(drawing, job.show)
            last = {"event": "done"}
        except Cancelled:
            return
        except (ValueError, OSError) as e:
            last = {"event": "error", "message": one_line(e)}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            last = {"event": "error", "message": "The device ran out of memory; a smaller picture takes less."}
        except Exception as e:  # a mistake in the code: told in the terminal, and the page stays usable
            traceback.print_exc(file=sys.stderr)
            last = {"event": "error", "message": f"The drawing failed ({type(e).__name__}); the terminal says more."}
        try:
            job.show(last)
        except Cancelled:
            return
