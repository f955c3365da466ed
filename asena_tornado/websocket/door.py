"""The way to a server's loop, and whether the current code is a part of that server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from ..errors import ServerStateError

R = TypeVar("R")


class Door(Protocol):
    """The way to the loop, from whichever thread (see `hosting`)."""

    def inside(self) -> bool:
        """Whether the caller is on the loop's thread."""
        ...

    def run(self, function: Callable[..., object], *args: Any, size: int = 0) -> None:
        """Call on the loop: now if inside, else soon, in the order of this thread's calls."""
        ...

    async def acall(self, work: Callable[[], R | Awaitable[R]]) -> R:
        """Run on the loop and await the result, from any loop."""
        ...


class _ClosedDoor:
    """Before the server starts, and after it has stopped."""

    def inside(self) -> bool:
        raise ServerStateError("the server is not running: call server.start() first")

    def run(self, function: Callable[..., object], *args: Any, size: int = 0) -> None:
        self.inside()

    async def acall(self, work: Callable[[], R | Awaitable[R]]) -> R:
        self.inside()
        raise NotImplementedError  # inside() has raised


CLOSED_DOOR = _ClosedDoor()

# The door of the server that the current code is a part of: a handler, middleware, a controller, an ``on_stop``.
serving: ContextVar[Door | None] = ContextVar("serving", default=None)

__all__ = ["CLOSED_DOOR", "Door", "serving"]
