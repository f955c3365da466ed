"""A fair half for the cell: a server that never lets go of the interpreter lock by itself must not keep it."""

from __future__ import annotations

import threading
import time

_WINDOW = 0.001  # seconds between two looks at who had how much
_LONG_AGO = 0.02  # seconds after which the last look says nothing any more
_AT_MOST = 0.002  # seconds of one pause: what the clients wait for the cell


class FairShare:
    """Pauses the calling thread when it has had more than half of the time and the main thread wants more than it got.

    The interpreter hands the lock over after a switch interval. That is fair between two threads that compute, and
    unfair to one that lets go of the lock every few microseconds, as for each ``write``: it gets these few for each
    interval of the other. Who computes little by its own choice is not held up by anybody: it used no time at all
    in most of the windows.
    """

    def __init__(self) -> None:
        main = threading.main_thread().ident
        # Where the main thread's time cannot be told (macOS, Windows), nothing is done.
        known = main is not None and hasattr(time, "pthread_getcpuclockid")
        self._clock = time.pthread_getcpuclockid(main) if known else None  # type: ignore[arg-type]  # then main is known
        self._at = 0.0
        self._own = 0.0
        self._main = 0.0

    def pause(self) -> None:
        """Called once per turn of the loop."""
        now = time.perf_counter()
        passed = now - self._at
        if passed < _WINDOW or self._clock is None:
            return
        own, main = time.thread_time(), time.clock_gettime(self._clock)
        if passed < _LONG_AGO:
            ours = own - self._own
            owed = min(2 * ours - passed, _AT_MOST)
            if owed > 0 and 0 < main - self._main < passed / 2:
                time.sleep(owed)
                now, main = time.perf_counter(), time.clock_gettime(self._clock)
        self._at, self._own, self._main = now, own, main
