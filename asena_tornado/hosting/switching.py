"""The interpreter's switch interval, short while somebody serves on a thread beside a cell."""

from __future__ import annotations

import os
import sys
import threading
import weakref


class SwitchInterval:
    """Keeps ``sys.setswitchinterval`` at the shortest that anybody wants, and puts it back in the end.

    What the user sets counts: a shorter interval is left as it is, and so is one that is set in the meantime, until all
    requests are over.
    """

    def __init__(self) -> None:
        # Reentrant, as a signal's handler or the garbage collector may strike while it is held.
        self._lock = threading.RLock()
        self._wanted: dict[weakref.ref[object], float] = {}
        self._before = 0.0
        self._ours: float | None = None  # what we have set, as the interpreter tells it: it counts in microseconds

    def request(self, owner: object, seconds: float | None) -> None:
        """Keep the interval at ``seconds`` at most while ``owner`` lives; None requests nothing."""
        with self._lock:
            if seconds is None:
                self._wanted.pop(weakref.ref(owner), None)
            else:
                self._wanted[weakref.ref(owner, self._gone)] = seconds
            self._adjust()

    def release(self, owner: object) -> None:
        """End the owner's request."""
        self.request(owner, None)

    def _gone(self, owner: weakref.ref[object]) -> None:
        with self._lock:
            self._wanted.pop(owner, None)
            self._adjust()

    def _adjust(self) -> None:
        current = sys.getswitchinterval()
        if self._ours is None:
            if not self._wanted:
                return
            self._before = current
        elif current != self._ours:
            # Somebody has set another one since: theirs stays.
            if not self._wanted:
                self._ours = None
            return
        if not self._wanted:
            _set(self._before)
            self._ours = None
            return
        shortest = min(self._before, *self._wanted.values())
        if shortest != current:
            _set(shortest)
        self._ours = sys.getswitchinterval()

    def forget(self) -> None:
        """In a forked child, which has none of the threads: put it back."""
        self._lock = threading.RLock()
        self._wanted.clear()
        self._adjust()


def _set(seconds: float) -> None:
    # It is cut off to whole microseconds, and what is read back may be a little below one.
    sys.setswitchinterval(seconds + 0.5e-6)


switching = SwitchInterval()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=switching.forget)
