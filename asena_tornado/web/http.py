"""Plain HTTP: requests and responses, origins, and the middleware before handshakes and controllers."""

from __future__ import annotations

import asyncio
import fnmatch
import functools
import inspect
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from http.client import responses as phrases
from types import TracebackType
from typing import Any, TypeVar, overload
from urllib.parse import urlsplit

from pydantic_core import from_json, to_json
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.web import HTTPError, RequestHandler

from ..errors import ConfigurationError, MiddlewareError, bounded, must_propagate, text_of
from ..ioc.inject import component, needs_self
from ..websocket.door import Door, serving
from ..websocket.messages import Invalid, Validator, encode

log = logging.getLogger("asena_tornado")
T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

JSON = "application/json; charset=UTF-8"
_UNSET: Any = object()


class Response:
    """What goes to the client; made by `Context.send` and `Context.json`.

    Attributes:
        status: The HTTP status, 200 to 599.
        body: The body, as bytes.
        headers: The headers. Middleware may add to them: ``response.headers["X-Id"] = "1"``.
    """

    __slots__ = ("body", "headers", "status")

    def __init__(
        self, status: int, body: bytes, headers: Mapping[str, object] | None = None, *, content_type: str | None = None
    ) -> None:
        if not 200 <= status <= 599:
            raise ValueError(f"the status of a response must be between 200 and 599, not {status!r}")
        if status in (204, 304) and content_type is not None:
            raise ValueError(f"a response with status {status} must not have a body")
        self.status = status
        self.body = body
        self.headers = HTTPHeaders()
        for name, value in (headers or {}).items():
            self.headers.add(name, str(value))
        if content_type is not None:
            self.headers.setdefault("Content-Type", content_type)

    def __repr__(self) -> str:
        return f"<Response {self.status}: {len(self.body)} bytes>"


def make_response(body: object, status: int = 200, headers: Mapping[str, object] | None = None) -> Response:
    """The response for what a handler returned, or was given to `Context.send`."""
    if body is None:
        return Response(204 if status == 200 else status, b"", headers)
    if isinstance(body, str):
        kind = "text/plain; charset=UTF-8"
    elif isinstance(body, bytes | bytearray | memoryview):
        kind = "application/octet-stream"
    else:
        kind = JSON
    return Response(status, encode(body).payload, headers, content_type=kind)


Next = Callable[[], Awaitable[Response | None]]


class Answered(Exception):
    """Raised to answer the request there and then."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class Refusal(Answered):
    """The answer is an error, as JSON."""

    def __init__(self, status: int, message: str, *, headers: Mapping[str, object] | None = None, **more: Any) -> None:
        super().__init__(make_response({"error": message, **more}, status, headers))


class Context:
    """One HTTP request, as middleware and controllers see it: a handshake, or a call of a controller.

    Attributes:
        req: Tornado's ``HTTPServerRequest``.
        params: The parameters of a controller's path, by their names.
        state: A dict that middleware and handler share.
    """

    __slots__ = ("_query", "_websocket_value", "params", "req", "state")

    def __init__(
        self,
        request: HTTPServerRequest,
        *,
        query: dict[str, str | list[str]] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        self.req = request
        self.params: Mapping[str, str] = params or {}
        self.state: dict[str, Any] = {}
        self._query = query
        self._websocket_value: Any = _UNSET

    @property
    def headers(self) -> HTTPHeaders:
        """The request's headers; upper and lower case in their names are the same."""
        return self.req.headers

    @property
    def query(self) -> Mapping[str, str | list[str]]:
        """The query string; a name given several times has a list."""
        if self._query is None:
            self._query = parse_query(self.req)
        return self._query

    @property
    def bearer_token(self) -> str | None:
        """The token of ``Authorization: Bearer …`` (RFC 6750 §2.1), or None."""
        scheme, _, token = self.headers.get("Authorization", "").strip().partition(" ")
        return token.strip() or None if scheme.lower() == "bearer" else None

    def send(self, body: object = None, status: int = 200, *, headers: Mapping[str, object] | None = None) -> Response:
        """Make a response, to be returned.

        Args:
            body: ``str`` goes out as plain text, bytes as they are, None as no body (with status 204), anything else as
                JSON.
            status: The HTTP status.
            headers: Headers to add; a ``Content-Type`` among them replaces the one for the type of ``body``.

        Raises:
            EncodeError: ``body`` cannot be written as JSON.
            ValueError: The status is out of range, or does not allow this body.
        """
        return make_response(body, status, headers)

    def json(self, body: object, status: int = 200, *, headers: Mapping[str, object] | None = None) -> Response:
        """Make a response, to be returned, that is JSON whatever the type of ``body``.

        Args:
            body: A string becomes a JSON string here; otherwise what `send` takes.
            status: The HTTP status.
            headers: Headers to add.

        Raises:
            EncodeError: ``body`` cannot be written as JSON.
            ValueError: The status is out of range, or does not allow a body.
        """
        payload = to_json(body) if isinstance(body, str | bytes) else encode(body).payload
        return Response(status, payload, headers, content_type=JSON)

    def set_websocket_value(self, value: object) -> None:
        """Make this ``ws.data.values``, in place of the query string, from which nothing is taken then.

        Args:
            value: Anything that fits the service's type, None included. The last call counts.
        """
        self._websocket_value = value

    def websocket_value(self, default: T) -> tuple[Any, bool]:
        """What was set for ``ws.data.values``, else the ``default``; and whether it is that."""
        unset = self._websocket_value is _UNSET
        return (default if unset else self._websocket_value), unset

    @overload
    async def get_body(self, model: None = None) -> Any: ...
    @overload
    async def get_body(self, model: type[T]) -> T: ...
    async def get_body(self, model: Any = None) -> Any:
        """Return the request's body, parsed as JSON.

        A body that is missing or not JSON is answered with 400. One that ``model`` does not accept is answered with 422
        and pydantic's errors, limited as those of `InvalidMessageError` are. The bytes themselves are
        ``context.req.body``.

        Args:
            model: Anything that pydantic can validate. None takes the JSON as it is.

        Returns:
            The body as a ``model``, or as Python's dicts, lists, strings and numbers.
        """
        body = self.req.body or b""
        if not body.strip():
            raise Refusal(400, "the request has no body; JSON is expected")
        try:
            if model is None:
                return from_json(body, allow_inf_nan=False)
            return _validator(model).json(body)
        except Invalid as invalid:
            if invalid.not_json is None:
                raise Refusal(422, "the body is not valid", errors=invalid.errors) from None
            message = invalid.not_json
        except ValueError as error:
            message = str(error)
        raise Refusal(400, f"the body is not JSON: {message}")

    def __repr__(self) -> str:
        return f"<Context {self.req.method} {self.req.path}>"


@functools.lru_cache(maxsize=64)
def _validator(model: Any) -> Validator:
    return Validator(model)


def parse_query(request: HTTPServerRequest) -> dict[str, str | list[str]]:
    """Name to value, or to the values of a name given several times."""
    query: dict[str, str | list[str]] = {}
    for name, raw in request.query_arguments.items():
        try:
            values = [value.decode() for value in raw]
        except UnicodeDecodeError:
            raise Refusal(400, f"the query parameter {name!r} is not UTF-8") from None
        query[name] = values if len(values) > 1 else values[0]
    return query


class Origins:
    """The pages that may connect: those of the server's own origin, and those of the ``allowed`` ones."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = tuple(origin.rstrip("/").lower() for origin in allowed)

    def check(self, request: HTTPServerRequest, where: str) -> None:
        """Refuse a request that a page from elsewhere makes."""
        origins = request.headers.get_list("Origin")
        if not origins or (len(origins) == 1 and (self.same(origins[0], request.host) or self.listed(origins[0]))):
            return
        shown = repr(", ".join(origins))
        log.warning("%s: refused the origin %s", where, shown)
        raise Refusal(
            403,
            f"the origin {shown} is not allowed; to allow it: AsenaServer(..., allowed_origins=[{shown}])",
        )

    def allow(self, origin: str) -> None:
        """Allow one more, such as where a proxy shows the server to browsers."""
        self._allowed = (*self._allowed, origin.lower())

    def listed(self, origin: str) -> bool:
        """Whether it is among the allowed ones."""
        origin = origin.lower()
        # As it stands first: in a pattern, the brackets of http://[::1] mean something else.
        return origin in self._allowed or any(fnmatch.fnmatchcase(origin, pattern) for pattern in self._allowed)

    @staticmethod
    def same(origin: str, host: str) -> bool:
        """Whether it is the server's own."""
        try:
            parts = urlsplit(origin.lower())
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and bool(parts.netloc) and parts.netloc == host.lower()


_KNOWN_HOSTS = 100  # that are remembered


class Hosts:
    """The names by which requests may call the server, in their header ``Host``.

    A page elsewhere can have its own name stand for this machine (DNS rebinding). To the browser, and to `Origins`,
    it is then of the server's own origin; only the name tells.
    """

    def __init__(self, allowed: Sequence[str] | None) -> None:
        """``allowed``: names or patterns; None leaves it to `serve`."""
        for name in allowed or ():
            given: object = name  # whatever the annotation says
            if not isinstance(given, str) or not _hostname(name) or "/" in name:
                raise ConfigurationError(f'a host is written like "example.com" or "*.example.com", not {name!r}')
        self._allowed = None if allowed is None else tuple(map(_hostname, allowed))
        self._own: frozenset[str] = frozenset()
        self._restricted = allowed is not None
        self._known: set[str] = set()  # hosts as they came that were accepted: looking closely takes its time

    def serve(self, own: Iterable[str | None], *, listeners: Iterable[str], anywhere: bool) -> None:
        """Say what is served: under its ``own`` names, on the addresses of its ``listeners``.

        Unless a list was given, that is restricted on loopback addresses, but not when browsers may come from
        ``anywhere`` by names that cannot be known.
        """
        self._known.clear()
        self._own = frozenset(_hostname(name) for name in own if name)
        self._restricted = self._allowed is not None or (not anywhere and all(map(is_loopback, listeners)))

    def check(self, host: str) -> None:
        """Refuse a request to a host that is not accepted; ``host`` may have a port."""
        if not self._restricted or host in self._known:
            return
        if self._accepts(_hostname(host)):
            if len(self._known) < _KNOWN_HOSTS:
                self._known.add(host)
            return
        name = repr(host if len(host) <= 100 else host[:99] + "…")
        log.warning("refused a request to the host %s", name)
        raise Refusal(421, f"the host {name} is not accepted; to accept it: AsenaServer(..., allowed_hosts=[{name}])")

    def _accepts(self, name: str) -> bool:
        # No page from elsewhere can use a loopback name: browsers ask nobody what it stands for.
        if name in self._own or is_loopback(name):
            return True
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._allowed or ())


_BRACKETED = re.compile(r"\[([0-9a-f:.]+)\](?::\d*)?")


def _hostname(host: str) -> str:
    """The name or address without a port, in the one form that all its spellings share."""
    host = host.lower()
    bracketed = _BRACKETED.fullmatch(host)
    if bracketed is not None:
        host = bracketed[1]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    host = host.removesuffix(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def is_loopback(host: str) -> bool:
    """Whether it names this very machine: ``localhost`` and what is below it, ``127.0.0.0/8``, ``::1``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


# -- middleware


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
    """Middleware in order, and what is behind it. It fails closed: only what every one let pass gets there."""

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


async def answer_to(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of the user's, sync or async, returns or raises by way of an answer."""
    try:
        result = function(*args)
        while inspect.isawaitable(result):
            result = await result
    except Answered as answered:
        return answered.response
    except HTTPError as error:  # as in Tornado's own handlers
        log.info("answered with %s", error)
        message = error.reason or phrases.get(error.status_code, "error")
        return make_response({"error": message}, error.status_code)
    return result


class DiscreetHandler(RequestHandler):
    """A handler that keeps query strings out of what Tornado logs, in ``tornado.access`` or elsewhere.

    There may be a token in it.
    """

    def _request_summary(self) -> str:
        return f"{self.request.method} {self.request.path} ({self.request.remote_ip})"

    def log_exception(
        self, typ: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Without the request, whose repr has the whole address."""
        if isinstance(value, HTTPError):
            super().log_exception(typ, value, tb)
        elif value is not None:
            log.error("%s failed: %s", self._request_summary(), text_of(value), exc_info=bounded(value))

    def decode_argument(self, value: bytes, name: str | None = None) -> str:
        """Tornado would log what cannot be decoded."""
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise HTTPError(400, "%s is not UTF-8", name or "the address") from None


class JsonHandler(DiscreetHandler):
    """Errors as JSON, without a traceback."""

    def allowed(self) -> str:
        """The methods that are possible, for a 405."""
        return "OPTIONS"

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """What Tornado answers by itself."""
        if status_code == 405:
            self.set_header("Allow", self.allowed())
        self.set_header("Content-Type", JSON)
        self.finish(to_json({"error": self._reason}))

    def respond(self, response: Response) -> asyncio.Future[None]:
        """Write the response; done when it has been sent."""
        self.set_status(response.status)
        self.clear_header("Content-Type")
        for name in response.headers:
            self.clear_header(name)
        for name, value in response.headers.get_all():
            self.add_header(name, value)
        return self.finish(response.body or None)
