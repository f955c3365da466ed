"""Methods of components that run again and again, from the component's start to its stop."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ConfigurationError, bounded, must_propagate

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("asena_tornado")

_MARK = "__asena_every__"


def every(seconds: float) -> Callable[[F], F]:
    """Run a method of a component again and again, on the server's loop, from its start to its stop.

        @WebSocket("/clock")
        class Clock(AsenaWebSocketService):
            @every(1)
            def tick(self):
                self.in_(time.time())

    It first runs ``seconds`` after ``on_start``. The method may be async; a run that takes longer than ``seconds``
    delays the next one, so that runs do not overlap. What a run raises is logged, and the next one comes. A run that is
    under way when the component stops is cancelled, before ``on_stop``.

    Args:
        seconds: From the begin of one run to the begin of the next, in seconds; more than 0.

    Raises:
        ConfigurationError: ``seconds`` is not such a number, or what is decorated is not a method without arguments.
    """
    number: object = seconds  # whatever the annotation says
    if not isinstance(number, int | float) or isinstance(number, bool) or not (math.isfinite(number) and number > 0):
        raise ConfigurationError(f"@every takes a number of seconds that is more than 0, not {number!r}")

    def decorate(method: F) -> F:
        if not inspect.isfunction(method):
            raise ConfigurationError(f"@every goes above a method, not {method!r}")
        parameters = [*inspect.signature(method).parameters.values()]
        if not parameters or any(p.default is p.empty and p.kind not in _VARIADIC for p in parameters[1:]):
            raise ConfigurationError(f"@every: {method.__qualname__} is called with self and nothing else")
        setattr(method, _MARK, float(seconds))
        return method

    return decorate


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Ticking:
    """The tasks that run one component's methods."""

    def __init__(self, instance: object) -> None:
        """Begin, on the running loop."""
        loop = asyncio.get_running_loop()
        cls = type(instance)
        names = dict.fromkeys(name for base in reversed(cls.__mro__) for name in vars(base))
        marked = [(name, getattr(inspect.getattr_static(cls, name), _MARK, None)) for name in names]
        self._tasks = [
            loop.create_task(_keep_running(getattr(instance, name), seconds, f"{cls.__name__}.{name}"))
            for name, seconds in marked
            if seconds is not None
        ]

    def cancel(self) -> None:
        """Run nothing more, and cancel what runs."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """The same, and wait for its end."""
        self.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _keep_running(method: Callable[[], Any], seconds: float, name: str) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        # Behind time, as after a loop that stood still, it does not catch up on what it has missed.
        due = max(due + seconds, loop.time())
        await asyncio.sleep(due - loop.time())
        try:
            result = method()
            if inspect.isawaitable(result):
                await result
        except BaseException as error:
            if must_propagate(error):
                raise
            logger.error("%s() raised %s; it goes on", name, type(error).__name__, exc_info=bounded(error))


__all__ = ["Ticking", "every"]
