"""`UlakClient`: sends to the clients of a cluster, from a process that serves none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..errors import ServerStateError, TransportError, UlakError, UlakErrorCode
from ..hosting import LoopDoor, LoopThread
from ..transports import RedisTransport
from ..ulak.broker import BulkOperation, BulkResult, Ulak
from ..websocket.messages import Message
from ..websocket.namespace import normalize_path, room_names
from .cluster import Cluster

if TYPE_CHECKING:
    from ..transports import Transport
    from ..websocket.namespace import Namespace

R = TypeVar("R")


class _RemoteNamespace:
    """A namespace none of whose sockets are here: what `Ulak` uses of one."""

    def __init__(self, path: str, link: Cluster) -> None:
        self.path = path
        self.link = link
        self.sockets: Mapping[str, Any] = {}

    async def to(self, rooms: tuple[str, ...], message: Message) -> int:
        for room in rooms:
            self.link.check(room, self.path)
        self.link.announce(self.path)
        return self._done(await self.link.publish_from_outside(self.path, rooms, message))

    def room_names(self, rooms: str | Iterable[str]) -> tuple[str, ...]:
        return room_names(rooms)  # the servers may have a lower limit for their length, unknown here

    def kept(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return ()

    def in_(self, message: Message) -> int:
        self.link.check("", self.path)
        self.link.announce(self.path)
        return self._done(self.link.publish(self.path, None, message, ()))

    def _done(self, taken: bool) -> int:
        if not taken:
            reason = self.link.why_not_ready or "it is too slow"
            raise TransportError(f"{self.link.transport!r} did not take the message, or not for every node: {reason}")
        return 0


class UlakClient(Ulak):
    """`Ulak` for a process that serves nothing: a task queue's worker, a cron job, another notebook.

        async with UlakClient("redis://localhost") as ulak:
            await ulak.to("/chat", "tech", {"type": "announcement"})

    Takes a `RedisTransport`'s URL and options, or any other `Transport`; they have to be those of the servers. The
    calls are `Ulak`'s. They return when Redis has the message, always 0: no socket is local. A namespace that no
    server has is no error, just as a room that nobody is in; `to_socket` does ask the servers. Where Redis is not
    reachable, entering raises `TransportError`, and sending `UlakError` with SEND_FAILED. It belongs to one loop at
    a time. In code without a loop use `BlockingUlakClient`.
    """

    def __init__(self, transport: str | Transport = "redis://localhost:6379", **options: Any) -> None:
        super().__init__()
        self._closed = "this UlakClient is not connected: use it in `async with UlakClient(…) as ulak:`"
        self._transport = RedisTransport(transport, **options) if isinstance(transport, str) else transport
        self._cluster: Cluster | None = None

    async def __aenter__(self) -> Self:
        if self._cluster is not None:
            raise ServerStateError("this UlakClient is connected already")
        cluster = Cluster(self._transport, serves=False)
        await cluster.start()
        try:
            await self._transport.sync()
            await cluster.until_somebody_answers()
            reason = cluster.why_not_ready
            if reason is not None:
                raise TransportError(reason)
        except BaseException:
            await cluster.stop()
            raise
        self._cluster = cluster
        self.open(LoopDoor(asyncio.get_running_loop()), ())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        cluster, self._cluster = self._cluster, None
        self.close("this UlakClient is closed")
        if cluster is not None:
            await cluster.stop()

    async def broadcast_all(self, data: object) -> int:
        """Send to everybody in every namespace that one of the servers has."""
        for path in self.get_namespaces():
            await self.broadcast(path, data)
        return 0

    def get_namespaces(self) -> list[str]:
        """The paths of all namespaces of all servers that are known by now."""
        cluster = self._cluster
        return [] if cluster is None else list(dict.fromkeys(path for node in cluster.nodes for path in node.sockets))

    def has_namespace(self, path: str) -> bool:
        """Whether one of the servers has it."""
        return normalize_path(path) in self.get_namespaces()

    def _find(self, path: str) -> Namespace:
        try:
            path = normalize_path(path)
        except ValueError as error:
            raise UlakError(str(error), code=UlakErrorCode.INVALID_NAMESPACE) from error
        self._check_running(path)
        assert self._cluster is not None
        return _RemoteNamespace(path, self._cluster)  # type: ignore[return-value]  # all of a namespace that is used here

    async def _run(self, work: Callable[[], Awaitable[R]]) -> R:
        async def carried() -> R:
            cluster = self._cluster
            before = 0 if cluster is None else cluster.interruptions
            lost = self._lost
            result = await work()
            # A message counts as sent only when the bus has it: this process may end right away.
            try:
                await self._transport.sync()
            except TransportError as error:
                raise UlakError(str(error), code=UlakErrorCode.SEND_FAILED) from error
            # In a work of several messages the connection may have been lost and made again meanwhile.
            if (cluster is not None and cluster.interruptions != before) or self._lost != lost:
                raise UlakError(
                    f"{self._transport!r} was interrupted meanwhile: what was sent before may not have arrived",
                    code=UlakErrorCode.SEND_FAILED,
                )
            return result

        return await super()._run(carried)

    @property
    def _lost(self) -> int:
        """Messages that the transport took and the bus then refused, where the transport counts them."""
        return getattr(self._transport, "lost", 0)

    def __repr__(self) -> str:
        return f"<UlakClient {'connected' if self._cluster else 'not connected'}, by {self._transport!r}>"


class BlockingUlakClient:
    """`UlakClient` for code without a loop: the same calls, each of which waits until it is done.

        with BlockingUlakClient("redis://localhost") as ulak:
            ulak.to("/chat", "tech", {"type": "announcement"})

    It runs a loop on a thread of its own and may be used from several threads.
    """

    def __init__(self, transport: str | Transport = "redis://localhost:6379", **options: Any) -> None:
        self._client = UlakClient(transport, **options)
        self._thread: LoopThread | None = None

    def __enter__(self) -> Self:
        self._thread = LoopThread("asena-ulak").start()
        try:
            self._thread.submit(self._client.__aenter__)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(TransportError):
            self._wait(self._client.__aexit__)
        self._end()

    def _end(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()

    def _wait(self, work: Callable[[], Coroutine[Any, Any, R]]) -> R:
        if self._thread is None:
            raise UlakError(
                "this BlockingUlakClient is not connected: use it in `with BlockingUlakClient(…) as ulak:`",
                code=UlakErrorCode.SERVICE_NOT_INITIALIZED,
            )
        return self._thread.submit(work)

    def broadcast(self, namespace: str, data: object) -> int:
        """Send to everybody in the namespace."""
        return self._wait(lambda: self._client.broadcast(namespace, data))

    def to(self, namespace: str, room: str | Iterable[str], data: object) -> int:
        """Send to everybody in the room, or in any of several rooms, once each."""
        return self._wait(lambda: self._client.to(namespace, room, data))

    def to_many(self, namespace: str, rooms: Iterable[str], data: object) -> int:
        """Send to everybody in any of the rooms, once each."""
        return self._wait(lambda: self._client.to_many(namespace, rooms, data))

    def to_socket(self, namespace: str, socket_id: str, data: object) -> int:
        """Send to one socket. Raises SOCKET_NOT_FOUND when no server has it."""
        return self._wait(lambda: self._client.to_socket(namespace, socket_id, data))

    def broadcast_all(self, data: object) -> int:
        """Send to everybody in every namespace that one of the servers has."""
        return self._wait(lambda: self._client.broadcast_all(data))

    def bulk_send(self, operations: Iterable[BulkOperation | Mapping[str, Any]]) -> BulkResult:
        """Do several operations in order; what is wrong with one is reported in its place."""
        return self._wait(lambda: self._client.bulk_send(operations))

    def count_sockets(self, path: str) -> int:
        """How many sockets are connected to the namespace, on all servers."""
        return self._wait(lambda: self._client.count_sockets(path))

    def get_namespaces(self) -> list[str]:
        """The paths of all namespaces of all servers."""
        return self._client.get_namespaces()

    def has_namespace(self, path: str) -> bool:
        """Whether one of the servers has it."""
        return self._client.has_namespace(path)

    def __repr__(self) -> str:
        return f"<Blocking{repr(self._client)[1:]}"


__all__ = ["BlockingUlakClient", "UlakClient"]
