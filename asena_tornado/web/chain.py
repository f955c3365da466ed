"""Middleware: what users write, and the chain that runs it before handshakes and controllers."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, TypeVar, overload

from ..errors import ConfigurationError, MiddlewareError, bounded, must_propagate, text_of
from ..ioc.inject import component, needs_self
from ..websocket.door import Door, serving
from .http import Answered, Context, Response, answer_to, make_response

log = logging.getLogger("asena_tornado")

C = TypeVar("C", bound=type[Any])
Next = Callable[[], Awaitable[Response | None]]


class MiddlewareService:
    """A base class for middleware. It is optional: what counts is the decorator `Middleware`.

    ``handle(context, next)``, sync or async, does one of three things: it lets the request pass with ``return await
    next()``, it answers by returning ``context.send(…)``, or it returns nothing without calling ``next``, which refuses
    the request with 403. ``await next()`` returns the response of what comes after, or None when a handshake may go on.
    """

    __asena_decorator__ = "@Middleware()"

    # Open, so that overriding it as a plain function or as a coroutine type-checks.
    def handle(self, *args: Any, **kwargs: Any) -> Any:
        """Pass, answer or refuse."""
        raise NotImplementedError(f"{type(self).__name__} needs a method handle(self, context, next)")


@overload
def Middleware(name: C, /) -> C: ...
@overload
def Middleware(name: str | None = None) -> Callable[[C], C]: ...
def Middleware(name: Any = None) -> Any:
    """Make a class with ``handle(self, context, next)`` middleware, for ``middlewares=[…]``.

        @Middleware()
        class Auth(MiddlewareService):
            async def handle(self, context: Context, next: Next) -> Response | None:
                if context.bearer_token != "secret":
                    return context.send({"error": "Unauthorized"}, 401)
                context.set_websocket_value({"username": "Ann"})
                return await next()

    Like a `Service`, it is built once per server, and other components can be injected into it. It fails closed: a
    request that a middleware neither lets pass nor answers is refused with 403, and one in which it raises is answered
    with 500.

    Args:
        name: What it is injected by; by default the class's name. ``@Middleware`` without parentheses works, too.

    Raises:
        ConfigurationError: The class has no ``handle``.
    """

    def decorate(cls: C) -> C:
        if getattr(cls, "handle", None) in (None, MiddlewareService.handle):
            raise ConfigurationError(f"@Middleware() on {cls!r}: it needs a method handle(self, context, next)")
        needs_self(cls, "handle")
        return component(cls, kind="Middleware", name=None if name is cls else name)

    if inspect.isroutine(name):
        raise ConfigurationError(
            f"@Middleware goes above a class with handle(self, context, next), not the function {name.__name__}"
        )
    return decorate(name) if isinstance(name, type) else decorate


class _Next:
    """The ``next`` of one middleware: runs the rest of the chain, once, when it is awaited."""

    __slots__ = ("_rest", "called", "response", "state")

    def __init__(self, rest: Callable[[], Awaitable[Response | None]]) -> None:
        self._rest = rest
        self.response: Response | None = None
        self.called = 0
        self.state = "waiting"

    def __call__(self) -> _Next:
        self.called += 1
        if self.called > 1:
            raise MiddlewareError("next() was called twice")
        return self

    def __await__(self) -> Generator[Any, None, Response | None]:
        if not self.called:
            raise MiddlewareError("next is a function: await next()")
        return self._wait().__await__()

    async def _wait(self) -> Response | None:
        if self.state == "waiting":
            self.state = "running"
            try:
                self.response = await self._rest()
            except BaseException:
                self.state = "failed"
                raise
            self.state = "done"
        elif self.state != "done":
            raise MiddlewareError(f"next() was awaited when it {_STATES[self.state]}")
        return self.response

    def end(self) -> None:
        """The middleware has decided: a ``next`` kept for later can no longer be called."""
        if self.state == "waiting":
            self.state = "over"


_STATES = {
    "running": "was still running",
    "failed": "had failed",
    "over": "was too late: the middleware had returned",
}


class Chain:
    """Runs middleware in order, and then what it guards. It fails closed: only what all of them let pass gets there."""

    def __init__(self, middlewares: Sequence[Any], where: str) -> None:
        """``middlewares``: instances. ``where`` says in the log whose they are."""
        self._where = where
        self._links: list[tuple[str, Callable[..., Any]]] = []
        for middleware in middlewares:
            name, handle = type(middleware).__name__, getattr(middleware, "handle", None)
            try:
                inspect.signature(handle).bind(None, None)  # type: ignore[arg-type]  # None raises what is caught
            except TypeError:
                raise ConfigurationError(
                    f"{name} cannot be middleware of {where}: it needs a method handle(self, context, next)"
                ) from None
            self._links.append((name, handle))  # type: ignore[arg-type]  # it has a signature

    async def run(
        self, context: Context, last: Callable[[], Awaitable[Response | None]], door: Door
    ) -> Response | None:
        """The response; None if that is what ``last`` returned and no middleware has put one in its place.

        ``door``: that of the server. What raises is logged and answered with 500.
        """
        token = serving.set(door)
        try:
            response: Response | None = await self._step(0, context, last)
            return response
        except Answered as answered:
            return answered.response
        except BaseException as error:
            if must_propagate(error):
                raise
            log.error("%s failed: %s", self._where, text_of(error), exc_info=bounded(error))
            return make_response({"error": "internal error"}, 500)
        finally:
            serving.reset(token)

    async def _step(self, index: int, context: Context, last: Callable[[], Awaitable[Response | None]]) -> Any:
        if index == len(self._links):
            return await answer_to(last)
        name, handle = self._links[index]
        next = _Next(functools.partial(self._step, index + 1, context, last))
        result = await answer_to(handle, context, next)
        # Once more, for middleware that caught the error which the second call had raised.
        if next.called > 1:
            raise MiddlewareError(f"{name} called next() twice")
        if (result is None or result is True) and next.called and next.state == "waiting":
            return await next  # called by a plain function, which cannot await it
        next.end()
        if isinstance(result, Response):
            return result
        if result is False or (result is None and not next.called):
            log.info("%s: %s refused: it neither called next() nor returned a response", self._where, name)
            return make_response({"error": "forbidden"}, 403)
        if result is None or (result is True and next.called):
            if next.state == "done":
                return next.response
            raise MiddlewareError(f"{name} returned nothing although next() {_STATES[next.state]}")
        raise MiddlewareError(
            f"{name}.handle returned {result if result is True else type(result)!r}; it must return a response, "
            "context.send(…) or context.json(…), or nothing after await next()"
        )


__all__ = ["Chain", "Middleware", "MiddlewareService", "Next"]
