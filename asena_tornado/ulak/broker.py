"""`Ulak` (Turkish: courier) carries messages to namespaces by their path.

It knows namespaces and not services, so what sends through it depends on no service. That breaks the circle of a
domain service and a WebSocket service that need each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, field_serializer

from ..errors import (
    ConfigurationError,
    EncodeError,
    RoomNameError,
    ServerStateError,
    TransportError,
    UlakError,
    UlakErrorCode,
)
from ..ioc.inject import Provider, Reference
from ..websocket.door import Door
from ..websocket.messages import Message, encode
from ..websocket.namespace import AddressedHere, Namespace, normalize_path

R = TypeVar("R")

_SHOWN_PATHS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkOperation:
    """One operation of `Ulak.bulk_send`, which checks it.

    Attributes:
        type: ``"broadcast"``; ``"room"``, which needs ``room``; or ``"socket"``, which needs ``socket_id``.
        namespace: The path of the namespace.
        data: What to send.
        room: One room, or several (once to each socket).
        socket_id: The id of one socket.
    """

    type: Literal["broadcast", "room", "socket"]
    namespace: str
    data: Any
    room: str | Sequence[str] | None = None
    socket_id: str | None = None


class BulkOutcome(BaseModel):
    """What became of one operation of a `BulkResult`.

    Attributes:
        ok: Whether it was done.
        addressed: How many local sockets it was sent to.
        error: Why it was not done, or None.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    ok: bool
    addressed: int = 0
    error: UlakError | None = None

    @field_serializer("error")
    def _error_as_data(self, error: UlakError | None) -> dict[str, str | None] | None:
        if error is None:
            return None
        return {"code": error.code, "namespace": error.namespace, "message": str(error)}


class BulkResult(BaseModel):
    """What became of the operations of `Ulak.bulk_send`; pydantic writes it as JSON.

    Attributes:
        total: How many operations there were.
        succeeded: How many were done.
        failed: How many were not.
        results: A `BulkOutcome` each, in the order of the operations.
    """

    model_config = ConfigDict(frozen=True)

    total: int
    succeeded: int
    failed: int
    results: tuple[BulkOutcome, ...]

    def __repr__(self) -> str:
        error = next((outcome.error for outcome in self.results if outcome.error is not None), None)
        return f"<BulkResult: {self.succeeded} of {self.total} done{f'; first error: {error}' if error else ''}>"


class Ulak:
    """Sends to the namespaces of a server by their paths: ``server.ulak``, or ``ulak: Ulak = Inject(Ulak)``.

    The sending calls can be awaited on any loop: the server's, a notebook's, another thread's. They return how many
    local sockets are addressed; where the server has a transport it is an `Addressed`, whose ``carried`` tells whether
    the other nodes get it, too.

    What goes wrong is an `UlakError`. Its ``code`` says what, its ``__cause__`` why. All sending calls raise these
    codes:

    - NAMESPACE_NOT_FOUND: there is no namespace with this path.
    - INVALID_NAMESPACE: the path is not valid.
    - INVALID_MESSAGE: the data cannot be encoded, or the room's name is not valid.
    - SERVICE_NOT_INITIALIZED: the server does not run, or `dispose` was called.
    """

    def __init__(self) -> None:
        self._namespaces: dict[str, Namespace] = {}
        self._door: Door | None = None
        self._closed = "the server is not running: call server.start() first"  # said while there is no door
        self._disposed = False

    # -- sending

    async def broadcast(self, namespace: str, data: object) -> int:
        """Send to everybody in the namespace.

        Args:
            namespace: Its path.
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.

        Returns:
            How many local sockets are addressed.

        Raises:
            UlakError: As for every call, and BROADCAST_FAILED when the delivery itself fails.
        """
        return await self._run(self._broadcast(namespace, data))

    async def to(self, namespace: str, room: str | Iterable[str], data: object) -> int:
        """Send to everybody in a room, or once to everybody in any of several rooms.

        Args:
            namespace: The path of the rooms' namespace.
            room: The room's name, or several names.
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.

        Returns:
            How many local sockets are addressed.

        Raises:
            UlakError: As for every call, and SEND_FAILED when the delivery itself fails.
        """
        return await self._run(self._to(namespace, room, data))

    async def to_many(self, namespace: str, rooms: Iterable[str], data: object) -> int:
        """Send once to everybody in any of the rooms, of which there is at least one; otherwise like `to`."""
        return await self._run(self._to(namespace, rooms, data))

    async def to_socket(self, namespace: str, socket_id: str, data: object) -> int:
        """Send to one socket, on whichever node it is.

        Args:
            namespace: The path of the socket's namespace.
            socket_id: The whole id.
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.

        Returns:
            1.

        Raises:
            UlakError: As for every call; SOCKET_NOT_FOUND when no socket has the id; SEND_FAILED when too much waits
                for its client already, or when the other nodes, which may have it, cannot be asked.
        """
        return await self._run(self._to_socket(namespace, socket_id, data))

    async def broadcast_all(self, data: object) -> int:
        """Send to everybody in every namespace.

        Args:
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.

        Returns:
            How many local sockets are addressed.

        Raises:
            UlakError: As for every call, and BROADCAST_FAILED after all namespaces have been tried.
        """
        self._check_running()
        message = _encode(data)
        deliveries = [self._broadcast(path, message) for path in self._namespaces]
        outcomes = await self._run(lambda: _outcomes(deliveries))
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return sum(outcome.addressed for outcome in outcomes)

    async def bulk_send(self, operations: Iterable[BulkOperation | Mapping[str, Any]]) -> BulkResult:
        """Do several operations in order; what is wrong with one does not keep the others from being done.

        Args:
            operations: A `BulkOperation` each, or mappings with its fields.

        Returns:
            What became of each, in the same order.

        Raises:
            UlakError: When nothing can be done: SERVICE_NOT_INITIALIZED, or INVALID_MESSAGE for a single operation in
                place of a list.
        """
        self._check_running()
        if isinstance(operations, BulkOperation | Mapping):
            raise UlakError("bulk_send takes a list of operations", code=UlakErrorCode.INVALID_MESSAGE)
        # Checked and encoded on the caller's thread; then the loop does all of them in one turn.
        planned: list[_Delivery | BulkOutcome] = []
        for operation in operations:
            try:
                planned.append(self._planned(operation))
            except UlakError as error:
                planned.append(BulkOutcome(ok=False, error=error))
        results = await self._run(lambda: _outcomes(planned))
        succeeded = sum(outcome.ok for outcome in results)
        return BulkResult(total=len(results), succeeded=succeeded, failed=len(results) - succeeded, results=results)

    # -- namespaces

    def namespace(self, path: str) -> UlakNamespace:
        """Return the same calls for one namespace, which has to exist only when they are used.

        Raises:
            UlakError: INVALID_NAMESPACE when the path is not valid.
        """
        return UlakNamespace(self, path)

    def get_namespaces(self) -> list[str]:
        """Return the paths of all namespaces."""
        return list(self._namespaces)

    def has_namespace(self, path: str) -> bool:
        """Return whether there is a namespace with this path.

        Raises:
            UlakError: INVALID_NAMESPACE when the path is not valid.
        """
        return _valid(path) in self._namespaces

    def get_socket_count(self, path: str) -> int:
        """Return how many local sockets are connected to the namespace.

        Raises:
            UlakError: There is no such namespace, or the server does not run.
        """
        return len(self._find(path).sockets)

    async def count_sockets(self, path: str) -> int:
        """Return how many sockets are connected to the namespace, on all nodes that answer within two seconds.

        Raises:
            UlakError: There is no such namespace, or the server does not run.
        """
        namespace = self._find(path)

        async def count() -> int:
            link = namespace.link
            return len(namespace.sockets) if link is None else await link.count_sockets(namespace.path)

        return await self._run(_Delivery(namespace.path, UlakErrorCode.SEND_FAILED, count))

    def register_namespace(self, namespace: Namespace) -> None:
        """Make the namespace reachable, as the server does.

        Raises:
            UlakError: NAMESPACE_ALREADY_EXISTS when another one has its path.
        """
        if self._namespaces.setdefault(namespace.path, namespace) is not namespace:
            raise UlakError(
                f"another namespace is registered as {namespace.path!r}: call unregister_namespace() with it first",
                code=UlakErrorCode.NAMESPACE_ALREADY_EXISTS,
                namespace=namespace.path,
            )

    def unregister_namespace(self, path: str) -> None:
        """Make the namespace unreachable through Ulak; its service and its clients carry on."""
        del self._namespaces[self._find(path).path]

    def dispose(self) -> None:
        """Let go of all namespaces for good. From then on, calls that need one raise SERVICE_NOT_INITIALIZED."""
        self.close("this Ulak is disposed")
        self._disposed = True

    def open(self, door: Door, namespaces: Iterable[Namespace]) -> None:
        """Begin: called by the server as it starts."""
        if not self._disposed:
            self._door = door
            for namespace in namespaces:
                self.register_namespace(namespace)

    def close(self, reason: str) -> None:
        """Let go of all namespaces; from here on, sending raises the reason. Called by the server."""
        self._door = None
        self._namespaces.clear()
        if not self._disposed:
            self._closed = reason

    def __repr__(self) -> str:
        return f"<Ulak: {_shown(self._namespaces) or 'no namespaces'}>"

    # -- from a call to its delivery

    def _broadcast(self, path: str, data: object) -> _Delivery:
        namespace = self._find(path)
        message = _encode(data, namespace.path)
        return _Delivery(namespace.path, UlakErrorCode.BROADCAST_FAILED, lambda: namespace.in_(message))

    def _to(self, path: str, rooms: str | Iterable[str], data: object) -> _Delivery:
        namespace = self._find(path)
        try:
            names = namespace.room_names(rooms)
        except RoomNameError as error:
            raise UlakError(str(error), code=UlakErrorCode.INVALID_MESSAGE, namespace=namespace.path) from error
        if not names:
            raise UlakError(
                "the list of rooms is empty: name a room, or use broadcast() to reach everybody",
                code=UlakErrorCode.INVALID_MESSAGE,
                namespace=namespace.path,
            )
        message = _encode(data, namespace.path)

        def deliver() -> int:
            count = namespace.to(names, message)
            if isinstance(count, AddressedHere) and (kept := namespace.kept(names)):
                rooms = ", ".join(map(repr, kept))
                raise TransportError(f"nobody in {rooms} gets it, as the history cannot be reached at the moment")
            return count

        return _Delivery(namespace.path, UlakErrorCode.SEND_FAILED, deliver)

    def _to_socket(self, path: str, socket_id: str, data: object) -> _Delivery:
        namespace = self._find(path)
        message = _encode(data, namespace.path)

        async def deliver() -> int:
            socket = namespace.sockets.get(socket_id)
            if socket is not None:
                taken: bool | None = namespace.send_to(socket, message)
            elif namespace.link is not None:
                taken = await namespace.link.send(namespace.path, socket_id, message)
            else:
                taken = None
            if taken is None:
                raise UlakError(
                    f"no socket of {namespace.path!r} has the id {socket_id!r}: it may have disconnected",
                    code=UlakErrorCode.SOCKET_NOT_FOUND,
                    namespace=namespace.path,
                )
            if not taken:
                raise UlakError(
                    f"{socket or socket_id} did not take the message: its client reads too slowly, and no more may "
                    "wait for it (WebSocketOptions.max_buffered_bytes)",
                    code=UlakErrorCode.SEND_FAILED,
                    namespace=namespace.path,
                )
            return 1

        return _Delivery(namespace.path, UlakErrorCode.SEND_FAILED, deliver)

    def _planned(self, given: object) -> _Delivery:
        operation = _operation(given)
        if operation.type == "broadcast":
            return self._broadcast(operation.namespace, operation.data)
        if operation.type == "room" and operation.room is not None:
            return self._to(operation.namespace, operation.room, operation.data)
        if operation.type == "socket" and operation.socket_id is not None:
            return self._to_socket(operation.namespace, operation.socket_id, operation.data)
        needed = {"room": "a room", "socket": "a socket_id"}.get(operation.type)
        raise UlakError(
            f"an operation of type {operation.type!r} needs {needed}"
            if needed
            else f"{operation.type!r} is not a type of operation: use 'broadcast', 'room' or 'socket'",
            code=UlakErrorCode.INVALID_MESSAGE,
            namespace=operation.namespace,
        )

    def _find(self, path: str) -> Namespace:
        path = _valid(path)
        self._check_running(path)
        namespace = self._namespaces.get(path)
        if namespace is None:
            verb = "are" if len(self._namespaces) > 1 else "is"
            raise UlakError(
                f"no namespace {path!r}; there {verb} {_shown(self._namespaces) or 'none'}",
                code=UlakErrorCode.NAMESPACE_NOT_FOUND,
                namespace=path,
            )
        return namespace

    def _check_running(self, path: str | None = None) -> Door:
        if self._door is None:
            raise UlakError(self._closed, code=UlakErrorCode.SERVICE_NOT_INITIALIZED, namespace=path)
        return self._door

    async def _run(self, work: Callable[[], Awaitable[R]]) -> R:
        door = self._check_running()
        try:
            return await (work() if door.inside() else door.acall(work))
        except ServerStateError as error:  # it stops just now
            raise UlakError(str(error), code=UlakErrorCode.SERVICE_NOT_INITIALIZED) from error


class UlakNamespace:
    """One namespace as `Ulak` reaches it: the same calls, without the path; ``chat = Inject(ulak("/chat"))``."""

    __slots__ = ("_ulak", "path")

    def __init__(self, ulak: Ulak, path: str) -> None:
        self._ulak = ulak
        self.path = _valid(path)

    async def broadcast(self, data: object) -> int:
        """Send to everybody; see `Ulak.broadcast`."""
        return await self._ulak.broadcast(self.path, data)

    async def to(self, room: str | Iterable[str], data: object) -> int:
        """Send to the room; see `Ulak.to`."""
        return await self._ulak.to(self.path, room, data)

    async def to_many(self, rooms: Iterable[str], data: object) -> int:
        """Send to the rooms, once to each socket; see `Ulak.to_many`."""
        return await self._ulak.to_many(self.path, rooms, data)

    async def to_socket(self, socket_id: str, data: object) -> int:
        """Send to one socket; see `Ulak.to_socket`."""
        return await self._ulak.to_socket(self.path, socket_id, data)

    def get_socket_count(self) -> int:
        """Return how many local sockets are connected."""
        return self._ulak.get_socket_count(self.path)

    async def count_sockets(self) -> int:
        """Return how many sockets are connected, on all nodes; see `Ulak.count_sockets`."""
        return await self._ulak.count_sockets(self.path)

    def __repr__(self) -> str:
        return f"<UlakNamespace {self.path}>"


def ulak(path: str) -> Reference[UlakNamespace]:
    """Name a namespace to inject, without depending on its service: ``chat: UlakNamespace = Inject(ulak("/chat"))``.

    Args:
        path: The path. Whether there is such a namespace matters only when it is used.

    Raises:
        UlakError: INVALID_NAMESPACE when the path is not valid.
    """
    return _NamespaceReference(_valid(path))


@dataclass(frozen=True, slots=True)
class _NamespaceReference:
    path: str

    def resolve(self, container: Provider, /) -> UlakNamespace:
        return container.get(Ulak).namespace(self.path)

    def __repr__(self) -> str:
        return f'ulak("{self.path}")'


@dataclass(frozen=True, slots=True)
class _Delivery:
    """A checked call, to be made on the server's loop."""

    path: str
    failure: UlakErrorCode
    deliver: Callable[[], int | Awaitable[int]]

    async def __call__(self) -> int:
        try:
            result = self.deliver()
            return await result if isawaitable(result) else result
        except (UlakError, ServerStateError):
            raise
        except RoomNameError as error:  # a name that a transport cannot carry
            raise UlakError(str(error), code=UlakErrorCode.INVALID_MESSAGE, namespace=self.path) from error
        except Exception as error:  # whatever a connection or a transport comes up with
            raise UlakError(
                f"the delivery to {self.path!r} failed: {type(error).__name__}: {error}",
                code=self.failure,
                namespace=self.path,
            ) from error


async def _outcomes(planned: Iterable[_Delivery | BulkOutcome]) -> tuple[BulkOutcome, ...]:
    outcomes = []
    for each in planned:
        try:
            outcomes.append(each if isinstance(each, BulkOutcome) else BulkOutcome(ok=True, addressed=await each()))
        except UlakError as error:
            outcomes.append(BulkOutcome(ok=False, error=error))
    return tuple(outcomes)


def _operation(given: object) -> BulkOperation:
    if isinstance(given, BulkOperation):
        return given
    if not isinstance(given, Mapping):
        what = f"a bulk operation must be a BulkOperation or a mapping with its fields, not {type(given).__name__}"
        raise UlakError(what, code=UlakErrorCode.INVALID_MESSAGE)
    try:
        return BulkOperation(**{"namespace": None, **given})
    except TypeError as error:
        what = str(error).removeprefix("BulkOperation.__init__() ")
        raise UlakError(f"not a valid bulk operation: {what}", code=UlakErrorCode.INVALID_MESSAGE) from error


def _valid(path: object) -> str:
    try:
        return normalize_path(path)
    except ConfigurationError as error:
        raise UlakError(
            str(error),
            code=UlakErrorCode.INVALID_NAMESPACE,
            namespace=path if isinstance(path, str) else None,
        ) from error


def _encode(data: object, path: str | None = None) -> Message:
    try:
        return encode(data)
    except EncodeError as error:
        raise UlakError(str(error), code=UlakErrorCode.INVALID_MESSAGE, namespace=path) from error


def _shown(paths: Iterable[str]) -> str:
    paths = list(paths)
    more = f" and {len(paths) - _SHOWN_PATHS} more" if len(paths) > _SHOWN_PATHS else ""
    return ", ".join(map(repr, paths[:_SHOWN_PATHS])) + more


__all__ = ["BulkOperation", "BulkOutcome", "BulkResult", "Ulak", "UlakNamespace", "ulak"]
