"""Plain HTTP: requests as our users see them, responses, and how Tornado's handlers give these."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from http.client import responses as phrases
from types import TracebackType
from typing import Any, TypeVar, overload

from pydantic_core import from_json, to_json
from tornado.httputil import HTTPHeaders, HTTPInputError, HTTPServerRequest
from tornado.web import HTTPError, RequestHandler

from ..errors import TokenExpired, bounded, text_of
from ..websocket.messages import Invalid, Validator, encode

log = logging.getLogger("asena_tornado")
T = TypeVar("T")

JSON = "application/json; charset=UTF-8"
_UNSET: Any = object()


class Response:
    """What goes to the client; made by `Context.send` and `Context.json`.

    Attributes:
        status: The HTTP status, 200 to 599.
        body: The body, as bytes.
        headers: The headers. Middleware may add to them: ``response.headers["X-Id"] = "1"``.
    """

    __slots__ = ("body", "expired", "headers", "status")

    def __init__(
        self, status: int, body: bytes, headers: Mapping[str, object] | None = None, *, content_type: str | None = None
    ) -> None:
        if not 200 <= status <= 599:
            raise ValueError(f"the status of a response must be between 200 and 599, not {status!r}")
        if status in (204, 304) and content_type is not None:
            raise ValueError(f"a response with status {status} must not have a body")
        self.status = status
        self.body = body
        self.expired = False  # it refuses a token that was valid: another may be had
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
        connect_data: What a Centrifuge client connects with as its ``data``, as plain JSON data; None elsewhere.
    """

    __slots__ = ("_headers", "_query", "_token", "_websocket_value", "connect_data", "params", "req", "state")

    def __init__(
        self,
        request: HTTPServerRequest,
        *,
        query: dict[str, str | list[str]] | None = None,
        params: Mapping[str, str] | None = None,
        token: str | None = None,
        connect_data: Any = None,
        more_headers: Mapping[str, str] | None = None,
    ) -> None:
        """``token``, ``connect_data``, ``more_headers``: what a Centrifuge client connects with."""
        self.req = request
        self.connect_data = connect_data
        self._token = token
        self._headers = _with(request.headers, more_headers) if more_headers else None
        self.params: Mapping[str, str] = params or {}
        self.state: dict[str, Any] = {}
        self._query = query
        self._websocket_value: Any = _UNSET

    @property
    def headers(self) -> HTTPHeaders:
        """The request's headers; upper and lower case in their names are the same.

        A Centrifuge client, which cannot set any in a browser, can give some as it connects. They do not replace real
        ones, and ``Cookie``, ``Host``, ``Origin`` and those of proxies are never taken from there.
        """
        return self.req.headers if self._headers is None else self._headers

    @property
    def query(self) -> Mapping[str, str | list[str]]:
        """The query string; a name given several times has a list."""
        if self._query is None:
            self._query = parse_query(self.req)
        return self._query

    @property
    def bearer_token(self) -> str | None:
        """The token that a Centrifuge client connects with, else that of ``Authorization: Bearer …`` (RFC 6750 §2.1).

        None if there is neither.
        """
        if self._token is not None:
            return self._token
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


# What a client must not make up: who asks, and from where.
_REAL_ONLY = re.compile(r"cookie|host|origin|forwarded|x-forwarded-.*|x-real-ip|x-scheme", re.IGNORECASE)


def _with(headers: HTTPHeaders, more: Mapping[str, str]) -> HTTPHeaders:
    together = headers.copy()
    for name, value in more.items():
        if name not in headers and not _REAL_ONLY.fullmatch(name.replace("_", "-").strip()):
            try:
                together.add(name, value)
            except HTTPInputError:
                log.debug("a client connects with a header that is none")
    return together


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


def expired(error: TokenExpired) -> Response:
    """The answer to somebody whose token is no longer valid (RFC 6750 §3.1)."""
    challenge = 'Bearer error="invalid_token", error_description="the token has expired"'
    response = make_response({"error": str(error) or "token expired"}, 401, {"WWW-Authenticate": challenge})
    response.expired = True
    return response


async def answer_to(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of the user's, sync or async, returns or raises by way of an answer."""
    try:
        result = function(*args)
        while inspect.isawaitable(result):
            result = await result
    except Answered as answered:
        return answered.response
    except TokenExpired as error:
        return expired(error)
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
        """Log the error without the request, whose repr has the whole address."""
        if isinstance(value, HTTPError):
            super().log_exception(typ, value, tb)
        elif value is not None:
            log.error("%s failed: %s", self._request_summary(), text_of(value), exc_info=bounded(value))

    def decode_argument(self, value: bytes, name: str | None = None) -> str:
        """Decode, without the log line in which Tornado would quote what cannot be decoded."""
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise HTTPError(400, "%s is not UTF-8", name or "the address") from None


class JsonHandler(DiscreetHandler):
    """A handler that writes errors as JSON, without a traceback."""

    def allowed(self) -> str:
        """The methods that the path has, for the header ``Allow`` of a 405."""
        return "OPTIONS"

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Write an error that Tornado found by itself."""
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
