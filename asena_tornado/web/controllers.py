"""Controllers: classes whose methods answer plain HTTP, and their place in a Tornado application."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel
from tornado.httputil import HTTPServerRequest
from tornado.iostream import StreamClosedError
from tornado.routing import Matcher, Rule
from tornado.web import stream_request_body

from ..errors import ConfigurationError
from ..ioc.inject import component, listed, needs_self
from ..websocket.door import CLOSED_DOOR, Door
from .chain import Chain
from .http import Answered, Context, JsonHandler, Refusal, Response, answer_to, make_response
from .origins import Hosts, Origins

log = logging.getLogger("asena_tornado")
C = TypeVar("C", bound=type[Any])
F = TypeVar("F", bound=Callable[..., Any])

_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))
# What is too large is read to its end all the same, up to here: a client that is cut off while it still sends does
# not get to read the answer (RFC 9112 §9.6).
_DRAINED = 16 * 1024 * 1024  # bytes


@dataclass(frozen=True, slots=True)
class _Mark:
    """What `Get` and its like note about a method."""

    method: str
    path: str
    middlewares: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ControllerSpec:
    """What `Controller` notes about a class."""

    path: str
    middlewares: tuple[Any, ...]


def Controller(path: str = "/", *, name: str | None = None, middlewares: Sequence[Any] = ()) -> Callable[[C], C]:
    """Make a class a component whose methods answer HTTP requests below ``path``.

        @Controller("/api/orders")
        class Orders:
            @Get("/{customer}")
            def of(self, context: Context):
                return {"customer": context.params["customer"]}

    Args:
        path: What the paths of its methods begin with.
        name: What it is injected by; by default the class's name.
        middlewares: Classes or instances with ``handle(self, context, next)``, run in order before each of its methods.

    Raises:
        ConfigurationError: The path, the class or one of its methods cannot work.
    """
    _segments(path, "@Controller")
    chain = listed(middlewares, f"@Controller({path!r})")

    def decorate(cls: C) -> C:
        for method, mark in _marks(cls):
            needs_self(cls, method)
            _takes_context(cls, method, mark)
        marks = [mark for _, mark in _marks(cls)]
        if not marks:
            raise ConfigurationError(f'{cls!r} has no routes: put @Get("/…"), @Post("/…"), … above its methods')
        required = (*chain, *(middleware for mark in marks for middleware in mark.middlewares))
        cls.__asena_controller__ = ControllerSpec(path, chain)
        return component(cls, kind="Controller", name=name, requires=required)

    return decorate


class _Verb(Protocol):
    def __call__(self, path: str = "/", *, middlewares: Sequence[Any] = ()) -> Callable[[F], F]: ...


def _verb(method: str) -> _Verb:
    def decorator(path: str = "/", *, middlewares: Sequence[Any] = ()) -> Callable[[F], F]:
        _segments(path, f"@{method.capitalize()}")
        chain = listed(middlewares, f"@{method.capitalize()}({path!r})")

        def decorate(function: F) -> F:
            marks = (*getattr(function, "__asena_routes__", ()), _Mark(method, path, chain))
            function.__asena_routes__ = marks  # type: ignore[attr-defined]  # an attribute of decorated methods only
            return function

        return decorate

    decorator.__name__ = decorator.__qualname__ = method.capitalize()
    decorator.__doc__ = f"""Let a controller's method answer {method} requests.

    The method, sync or async, takes the `Context` and returns a `Response`, or what `Context.send` takes.

    Args:
        path: What follows the controller's path. ``{{name}}`` stands for one part of it, which is then in
            ``context.params``: ``"/users/{{id}}"``.
        middlewares: Classes or instances with ``handle(self, context, next)``, run after the controller's.

    Raises:
        ConfigurationError: The path or the middleware cannot work.
    """
    return decorator


Get = _verb("GET")
Post = _verb("POST")
Put = _verb("PUT")
Patch = _verb("PATCH")
Delete = _verb("DELETE")


def _segments(path: object, decorator: str) -> tuple[str, ...]:
    """The parts of a path between its slashes; a parameter is still in its braces."""
    if not isinstance(path, str):
        raise ConfigurationError(f'{decorator} takes a path, {decorator}("/users"), not {path!r}')
    stripped = path.strip().strip("/")
    segments = tuple(stripped.split("/")) if stripped else ()
    for segment in segments:
        parameter = segment.startswith("{") and segment.endswith("}")
        if segment.startswith(":"):
            wrong = f"write the parameter as {{{segment[1:]}}}"
        elif parameter and not segment[1:-1].isidentifier():
            wrong = f"{segment[1:-1]!r} is not a valid name for a parameter"
        elif not parameter and any(c in "{}?#" for c in segment):
            wrong = (
                "a parameter must be one whole part of the path, as in '/users/{id}', and '?' and '#' are not allowed"
            )
        elif not segment:
            wrong = "it has two slashes in a row"
        else:
            continue
        raise ConfigurationError(f"{decorator}({path!r}): {wrong}")
    return segments


def _marks(cls: type[Any]) -> Iterator[tuple[str, _Mark]]:
    for name, function in inspect.getmembers_static(cls):
        for mark in getattr(function, "__asena_routes__", ()):
            yield name, mark


def _takes_context(cls: type[Any], name: str, mark: _Mark) -> None:
    """Raise `ConfigurationError` for ``def get(self, id: int)``, which would get the context as its ``id``."""
    function = inspect.getattr_static(cls, name)
    if not inspect.isfunction(function):
        return
    parameters = list(inspect.signature(function).parameters.values())[1:]
    first = parameters[0] if parameters else None
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        return
    kind = first.annotation
    if isinstance(kind, str):
        kind = function.__globals__.get(kind, kind)
    wrong = (
        kind.__name__ in _NO_CONTEXT or issubclass(kind, BaseModel) if isinstance(kind, type) else kind in _NO_CONTEXT
    )
    if wrong or f"{{{first.name}}}" in _segments(mark.path, ""):
        raise ConfigurationError(
            f"{cls.__name__}.{name} would get the context as its parameter {first.name!r}: write "
            f"def {name}(self, context), and take context.params[{first.name!r}] for a part of the path, "
            f"context.query[{first.name!r}], or await context.get_body(Model)"
        )


# Types that no context has: they are meant for a parameter of the path or the query, or for a body.
_NO_CONTEXT = ("int", "str", "float", "bool", "bytes", "list", "dict", "UUID", "HTTPServerRequest")


@dataclass(frozen=True, slots=True)
class _Route:
    method: str
    segments: tuple[str, ...]
    handler: Callable[[Context], Any]
    chain: Chain
    label: str

    def matches(self, parts: Sequence[str]) -> bool:
        return all(part if s[0] == "{" else part == s for s, part in zip(self.segments, parts, strict=True))

    def params(self, parts: Sequence[str]) -> dict[str, str]:
        return {s[1:-1]: part for s, part in zip(self.segments, parts, strict=True) if s[0] == "{"}


class Controllers(Matcher):
    """Every route of a server's controllers, as one rule of a `tornado.web.Application`."""

    def __init__(
        self,
        *,
        origins: Origins,
        hosts: Hosts,
        max_body_size: int,
        ready: Callable[[], Awaitable[object]],
    ) -> None:
        """``max_body_size``: bytes. ``ready`` is awaited first, and may raise a `Refusal`."""
        self._origins = origins
        self._hosts = hosts
        self._ready = ready
        self._routes: dict[int, list[_Route]] = {}  # by how many parts the path has
        self._requests: set[asyncio.Task[Any]] = set()
        self.max_body_size = max_body_size
        self.door: Door = CLOSED_DOOR  # of the server, while it runs

    def add(self, controller: object, instances: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        """Add the routes of a controller; ``instances`` gives those of the middlewares that decorators list.

        Raises `ConfigurationError` when two methods answer the same requests.
        """
        cls = type(controller)
        spec: ControllerSpec = cls.__asena_controller__  # type: ignore[attr-defined]  # a decorated class, or derived
        for name, mark in _marks(cls):
            path = "/" + "/".join(part for part in (spec.path.strip().strip("/"), mark.path.strip().strip("/")) if part)
            segments = _segments(path, f"{cls.__name__}.{name}")
            parameters = [s for s in segments if s[0] == "{"]
            if len(set(parameters)) < len(parameters):
                raise ConfigurationError(f"{cls.__name__}.{name}: two parameters of {path!r} have the same name")
            label = f"{mark.method} {path} ({cls.__name__}.{name})"
            chain = Chain(instances((*spec.middlewares, *mark.middlewares)), label)
            route = _Route(mark.method, segments, _handler(getattr(controller, name), label), chain, label)
            routes = self._routes.setdefault(len(segments), [])
            for other in routes:
                if other.method == route.method and _shape(other) == _shape(route):
                    raise ConfigurationError(f"two methods answer the same requests: {other.label} and {label}")
            routes.append(route)
            # The more literal, the earlier: /users/me before /users/{id}.
            routes.sort(key=lambda route: [s[0] == "{" for s in route.segments])

    def __bool__(self) -> bool:
        return bool(self._routes)

    def has(self, path: str) -> bool:
        """Whether a method answers at this very path."""
        routes, parts = self.find(path)
        return any(route.segments == tuple(parts) for route in routes)

    @property
    def rule(self) -> Rule:
        """What a `tornado.web.Application` takes as a route."""
        return Rule(self, ControllerHandler, {"controllers": self, "max_body_size": self.max_body_size})

    def find(self, path: str) -> tuple[list[_Route], list[str]]:
        """The routes for a path as it came, best first, and the path's parts."""
        if not path.startswith("/"):
            return [], []
        parts = path[1:].split("/")
        if not parts[-1]:
            parts.pop()
        try:
            parts = [unquote(part, errors="strict") for part in parts]
        except UnicodeDecodeError:
            return [], []
        return [route for route in self._routes.get(len(parts), ()) if route.matches(parts)], parts

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        """Tornado's question: whether this is for a controller."""
        return {} if self.find(request.path)[0] else None

    async def answer(self, request: HTTPServerRequest) -> Response:
        """The response, whatever happens."""
        origin = request.headers.get("Origin")
        try:
            response = await self._answer(request, origin)
        except Answered as answered:
            response = answered.response
        if origin is not None and self._origins.listed(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers.add("Vary", "Origin")
        return response

    async def _answer(self, request: HTTPServerRequest, origin: str | None) -> Response:
        self._hosts.check(request.host)
        routes, parts = self.find(request.path)
        methods = _by_method(routes)
        if request.method == "OPTIONS":
            return self._options(request, methods)
        route = methods.get(request.method or "")
        if route is None:
            raise Refusal(405, f"{request.method} is not allowed here", headers={"Allow": _allow(methods)})
        if request.method not in _SAFE_METHODS:
            self._origins.check(request, route.label)
        await self._ready()
        context = Context(request, params=route.params(parts))

        async def last() -> Response:
            result = await answer_to(route.handler, context)
            return result if isinstance(result, Response) else make_response(result)

        response = await route.chain.run(context, last, self.door)
        assert response is not None  # last() has one
        return response

    @staticmethod
    def _options(request: HTTPServerRequest, methods: Mapping[str, _Route]) -> Response:
        headers = {"Allow": _allow(methods)}
        if "Access-Control-Request-Method" in request.headers:  # a browser asks for a page from elsewhere
            headers["Access-Control-Allow-Methods"] = ", ".join(methods)
            headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "")
            headers["Access-Control-Max-Age"] = "600"
        return make_response(None, 204, headers)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around a request; `drain` waits for those."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            yield
        finally:
            self._requests.discard(task)

    async def drain(self, deadline: float) -> None:
        """Wait for the requests under way until ``deadline`` (loop time), then cancel them."""
        if self._requests:
            wait = max(0.0, deadline - asyncio.get_running_loop().time())
            _, late = await asyncio.wait(tuple(self._requests), timeout=wait)
            for task in late:
                log.warning("a request that did not finish in time is cancelled")
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1)


def _by_method(routes: Sequence[_Route]) -> dict[str, _Route]:
    methods = {route.method: route for route in reversed(routes)}
    if "GET" in methods:
        methods.setdefault("HEAD", methods["GET"])
    return methods


def _allow(methods: Iterable[str]) -> str:
    return ", ".join(sorted({*methods, "OPTIONS"}))


def _shape(route: _Route) -> list[str]:
    return ["{}" if s[0] == "{" else s for s in route.segments]


def _handler(method: Callable[..., Any], label: str) -> Callable[[Context], Any]:
    """The method as a function of the context, which the method may leave out."""
    signature = inspect.signature(method)
    for takes, handler in (((None,), method), ((), lambda _: method())):
        try:
            signature.bind(*takes)
        except TypeError:
            continue
        return handler
    raise ConfigurationError(f"{label} must take the context and nothing else: path parameters are in context.params")


@stream_request_body
class ControllerHandler(JsonHandler):
    """One request to a controller, or to a path where there is none. Reads the body itself."""

    def initialize(self, max_body_size: int, controllers: Controllers | None = None) -> None:
        """Take what the route was given; without ``controllers`` every request is answered with 404."""
        self._controllers = controllers
        self._limit = max_body_size
        self._body: list[bytes] = []
        self._received = 0

    def allowed(self) -> str:
        """The methods of the routes that this path has."""
        routes = self._controllers.find(self.request.path)[0] if self._controllers is not None else ()
        return _allow(_by_method(routes))

    def prepare(self) -> None:
        """Refuse a body that is announced as too long, before it is read."""
        # The limits of Tornado's HTTP server end the connection without an answer.
        self.request.connection.set_max_body_size(sys.maxsize)  # type: ignore[union-attr]  # HTTP1Connection has it
        try:
            declared = int(self.request.headers.get("Content-Length", "0"))
        except ValueError:  # Tornado refuses that next
            return
        waits = self.request.headers.get("Expect", "").lower() == "100-continue"
        if declared > self._limit and (waits or declared > self._limit + _DRAINED):
            self._refuse_body()

    def data_received(self, chunk: bytes) -> None:
        """Keep a piece of the body, up to the limit; a little more is read, so that the client sees the refusal."""
        self._received += len(chunk)
        if self._received <= self._limit:
            self._body.append(chunk)
        elif self._received > self._limit + _DRAINED and not self._finished:
            self._refuse_body()

    def _refuse_body(self) -> asyncio.Future[None]:
        refusal = Refusal(413, f"the body is larger than {self._limit} bytes", headers={"Connection": "close"})
        return self.respond(refusal.response)

    async def _serve(self) -> None:
        if self._finished:
            return
        with contextlib.suppress(StreamClosedError):
            if self._received > self._limit:
                await self._refuse_body()
            elif self._controllers is None:
                await self.respond(Refusal(404, "not found").response)
            else:
                self.request.body = b"".join(self._body)
                with self._controllers.running():
                    await self.respond(await self._controllers.answer(self.request))

    get = head = post = put = patch = delete = options = _serve

    # Pages from elsewhere are refused by our own rule, as they are for handshakes.

    def check_xsrf_cookie(self) -> None:
        """Do nothing: the origin is checked instead."""

    def check_trusted_origin(self, origin: str) -> bool:
        """Left to `Controllers.answer`."""
        return True
