"""The interpreter's switch interval, short while somebody serves on a thread beside a cell."""

from __future__ import annotations

import os
import sys
import threading


class SwitchInterval:
    """Keeps ``sys.setswitchinterval`` at the shortest of what is wanted, and puts it back in the end.

    What the user has set counts: a shorter interval is left as it is, and so is one that is set meanwhile, until
    everybody has let go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: dict[object, float] = {}
        self._before = 0.0
        self._ours: float | None = None  # what we have set, as the interpreter tells it: it counts in microseconds

    def hold(self, owner: object, seconds: float | None) -> None:
        """From now on at most ``seconds``, for this owner; None wants nothing. Later calls replace earlier ones."""
        with self._lock:
            if seconds is None:
                self._wanted.pop(owner, None)
            else:
                self._wanted[owner] = seconds
            self._adjust()

    def release(self, owner: object) -> None:
        """The owner needs it no more."""
        self.hold(owner, None)

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
        self._lock = threading.Lock()
        self._wanted.clear()
        self._adjust()


def _set(seconds: float) -> None:
    # It is cut off to whole microseconds, and what is read back may be a little below one.
    sys.setswitchinterval(seconds + 0.5e-6)


switching = SwitchInterval()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=switching.forget)
