"""A fair half for the cell: a server that never lets go of the interpreter lock must not keep it all the time."""

from __future__ import annotations

import threading
import time

_WINDOW = 0.001  # seconds between two looks at who had how much
_SLICE = 0.0002  # seconds of a pause after which it is seen whether the pause is used
_AT_MOST = 0.002  # seconds of one pause: what the clients wait for the cell
_LET_BE = 0.1  # seconds, at most, until a thread that did not use a pause is offered another


class FairShare:
    """Pauses the calling thread when it has had more than half of the time and the main thread wants more than it got.

    The interpreter hands the lock over after a switch interval. That is fair between two threads that compute, and
    unfair to one that lets go of the lock every few microseconds, as it does for each ``write``: it gets those few
    microseconds per interval of the other thread. Whether the main thread is kept waiting or merely sleeps cannot be
    seen from outside, but it shows when there is a pause: one that it does not use makes the next come later.
    """

    def __init__(self) -> None:
        self._clock: int | None = None
        main = threading.main_thread().ident
        # Where the main thread's time is not known (macOS, Windows, a thread that has ended), nothing is done.
        if main is not None and hasattr(time, "pthread_getcpuclockid"):
            try:
                self._clock = time.pthread_getcpuclockid(main)
            except OSError:
                self._clock = None
        self._at = self._own = self._main = 0.0
        self._not_before = 0.0
        self._let_be = _WINDOW

    def pause(self) -> None:
        """Called once per turn of the loop."""
        now = time.perf_counter()
        passed = now - self._at
        if passed < _WINDOW or self._clock is None:
            return
        try:
            own, main = time.thread_time(), time.clock_gettime(self._clock)
            owed = min(2 * (own - self._own) - passed, _AT_MOST)
            if owed > 0 and 0 < main - self._main < passed / 2 and now >= self._not_before:
                if self._offer(owed, self._clock):
                    self._let_be = _WINDOW
                else:
                    self._let_be = min(2 * self._let_be, _LET_BE)
                now, main = time.perf_counter(), time.clock_gettime(self._clock)
                self._not_before = now + self._let_be
            self._at, self._own, self._main = now, own, main
        except OSError:
            self._clock = None  # in a forked child, whose main thread is another

    @staticmethod
    def _offer(owed: float, clock: int) -> bool:
        """Pause for so many seconds, as long as the main thread uses that; return whether it does."""
        until = time.perf_counter() + owed
        while (now := time.perf_counter()) < until:
            before = time.clock_gettime(clock)
            time.sleep(min(_SLICE, until - now))
            if time.clock_gettime(clock) - before < (time.perf_counter() - now) / 2:
                return False
        return True
