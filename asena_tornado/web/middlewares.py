"""Ready-made middleware, to be listed as instances: ``@WebSocket("/chat", middlewares=[RateLimit(10, per=60)])``."""

from __future__ import annotations

import inspect
import ipaddress
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ..errors import ConfigurationError
from .chain import Middleware, MiddlewareService, Next
from .http import Context, Response


@Middleware()
class RateLimit(MiddlewareService):
    """Limits how many handshakes (or requests) a client makes; more are answered with 429 and ``Retry-After``.

    One instance in several places counts for all of them together.
    """

    def __init__(
        self,
        limit: int,
        *,
        per: float = 60.0,  # seconds
        key: Callable[[Context], str] | None = None,
        max_clients: int = 10_000,
    ) -> None:
        """Allow ``limit`` in ``per`` seconds.

        They may come all at once; after that, one more is allowed every ``per / limit`` seconds.

        Args:
            limit: How many.
            per: Seconds.
            key: Tells clients apart, given the `Context`. By default it is the address; of IPv6 addresses, the /64
                network.
            max_clients: How many clients are remembered, those seen last.

        Raises:
            ConfigurationError: A number is too small.
        """
        if limit < 1 or per <= 0 or max_clients < 1:
            raise ConfigurationError("RateLimit needs a limit and max_clients of at least 1, and per > 0")
        self._interval = per / limit
        self._burst = per - self._interval
        self._key = key or _client_address
        self._max_clients = max_clients
        self._clock = time.monotonic
        # The generic cell rate algorithm: one time per client, at which all it has used will be free again.
        self._free_at: OrderedDict[str, float] = OrderedDict()

    async def handle(self, context: Context, next: Next) -> Response | None:
        """Answer with 429 when the client has used up its limit, else let the request pass."""
        key, now = self._key(context), self._clock()
        free_at = max(self._free_at.get(key, now), now)
        wait = free_at - now - self._burst
        if wait > self._interval / 1000:  # a rounding error does not count
            return context.send({"error": "too many requests"}, 429, headers={"Retry-After": math.ceil(wait)})
        self._free_at[key] = free_at + self._interval
        self._free_at.move_to_end(key)
        if len(self._free_at) > self._max_clients:
            self._free_at.popitem(last=False)
        return await next()


def _client_address(context: Context) -> str:
    address = str(context.req.remote_ip)
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4 or parsed.ipv4_mapped is not None:
        return str(getattr(parsed, "ipv4_mapped", None) or parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


@Middleware()
class TokenAuth(MiddlewareService):
    """Lets requests with a valid token pass; others are answered with 401 and ``WWW-Authenticate``.

    The token comes from the header ``Authorization: Bearer …``, or else from the query string, as browsers cannot set
    headers of a handshake.
    """

    def __init__(self, verify: Callable[[str], Any], *, query_parameter: str | None = "token") -> None:
        """Check tokens with ``verify``.

        Args:
            verify: Called with the token, sync or async. It returns what becomes ``ws.data.values`` (and
                ``context.state["user"]``, for controllers), or None for a token that is not valid.
            query_parameter: The name of the token in the query string; None takes it from the header only.

        Raises:
            ConfigurationError: ``verify`` is not callable.
        """
        if not callable(verify):
            raise ConfigurationError(f"TokenAuth takes a function that verifies a token, not {verify!r}")
        self._verify = verify
        self.query_parameter = query_parameter

    async def handle(self, context: Context, next: Next) -> Response | None:
        """Answer with 401 without a valid token, else note what it stands for and let the request pass."""
        token: object = context.bearer_token
        if token is None and self.query_parameter is not None:
            token = context.query.get(self.query_parameter) or None
        if token is None:
            return _unauthorized(context, "a token is needed", "Bearer")
        value = self._verify(token) if isinstance(token, str) else None
        if inspect.isawaitable(value):
            value = await value
        if value is None or value is False:
            return _unauthorized(context, "the token is not valid", 'Bearer error="invalid_token"')
        context.set_websocket_value(value)
        context.state["user"] = value
        return await next()


def _unauthorized(context: Context, message: str, challenge: str) -> Response:
    return context.send({"error": message}, 401, headers={"WWW-Authenticate": challenge})


@Middleware()
class RequestLog(MiddlewareService):
    """Logs each handshake or request when it is answered: method, path, status, time, address.

    The query string is left out, since there may be a token in it.
    """

    def __init__(self, logger: logging.Logger | None = None, *, level: int = logging.INFO) -> None:
        """Log to a logger.

        Args:
            logger: Where to; by default ``asena_tornado.requests``.
            level: The level of the lines.
        """
        self._log = logger or logging.getLogger("asena_tornado.requests")
        self._level = level

    async def handle(self, context: Context, next: Next) -> None:
        """Let the request pass, and log what came of it."""
        started = time.perf_counter()
        outcome: object = "failed"
        try:
            response = await next()
            outcome = "connected" if response is None else response.status
        finally:
            took = 1000 * (time.perf_counter() - started)  # milliseconds
            request = context.req
            self._log.log(
                self._level, "%s %s %s %.1f ms %s", request.method, request.path, outcome, took, request.remote_ip
            )


__all__ = ["RateLimit", "RequestLog", "TokenAuth"]
