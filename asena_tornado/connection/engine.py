"""Which engine this is: the compiled part is used where it is installed, and Python does the same where it is not.

`_engine.c` has what costs most per message: cutting whole messages out of what a client sent, receiving, and sending
the same bytes to a room. It is optional: installing goes on without a compiler, and the environment variable
`ASENA_TORNADO_PURE`, set to 1, switches it off, both while installing and later.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Protocol

# Bumped together with that of `_engine.c` whenever what one expects of the other changes.
_VERSION = 1


class Sends(Protocol):
    """Sends to one descriptor, as ``socket.send`` does."""

    def __call__(self, data: bytes, /) -> int:
        """Send what the system takes now; how many bytes that is."""
        ...

    def stop(self) -> None:
        """Send no more: the descriptor may soon be another's. What is sent fails."""
        ...


class Compiled(Protocol):
    """What `_engine.c` has."""

    VERSION: int

    def Sender(self, fd: int, /) -> Sends:
        """Sends to the descriptor."""
        ...

    def send_all(self, senders: list[Sends], data: bytes, /) -> list[tuple[int, int, int]]:
        """Send the bytes by each ``Sender``; (index, bytes taken, errno or 0) of each that did not take them all."""
        ...

    def receive(self, fd: int, /) -> bytes:
        """As ``recv`` of the descriptor's socket."""
        ...

    def whole_messages(
        self, data: bytes, pos: int, max_size: int, most: int, most_size: int, /
    ) -> tuple[list[str | bytes], int, int]:
        """As `frames.whole_messages_in_python`."""
        ...


def _find() -> tuple[Compiled | None, str]:
    """The compiled part, if it is to be used, and what to call the engine."""
    if os.environ.get("ASENA_TORNADO_PURE", "0") not in ("", "0"):
        return None, "pure Python, because ASENA_TORNADO_PURE is set"
    if os.name != "posix":
        return None, f"pure Python, because the compiled part is not for {os.name}"
    try:
        module: Any = importlib.import_module("._engine", __package__)
    except ModuleNotFoundError:
        return None, "pure Python, because it was installed without the compiled part, as happens without a C compiler"
    except ImportError as error:
        return None, f"pure Python, because the compiled part cannot be loaded: {error}"
    if module.VERSION != _VERSION:
        return None, "pure Python, because the compiled part is of another version: install asena_tornado again"
    return module, "compiled"


compiled, description = _find()

__all__ = ["Compiled", "Sends", "compiled", "description"]
