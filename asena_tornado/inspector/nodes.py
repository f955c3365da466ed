"""The inspector's view of the whole cluster: which node holds which socket, and ways to act on any of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from ..cluster import Cluster, Count, Node
from ..errors import ServerStateError, SocketNotFoundError, TransportError
from ..websocket.messages import encode
from ..websocket.rooms import check_room
from . import markup
from .receipts import Receipt, disconnecting, joined, left, sent_to
from .snapshots import Rooms, Sockets, SocketSnapshot, count
from .subject import Subject

R = TypeVar("R")

_LIMIT = 1000  # sockets of one node that are listed
_ID_LENGTH = 36  # characters of a whole id


@dataclass(frozen=True, slots=True, repr=False)
class NodeSocket(SocketSnapshot):
    """A socket as it was, and the id of the ``node`` that holds it."""

    node: str = field(kw_only=True)


_NODE_SOCKET = TypeAdapter(NodeSocket)


class Nodes(tuple[Node, ...]):
    """The nodes of the cluster, this one first."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join([f"<{count(len(self), 'node')}>", *[f"  {node!r}" for node in self]])

    def _repr_html_(self) -> str:
        rows = [
            (
                node.id[:8],
                node.name + (" (this one)" if node.local else ""),
                ", ".join(f"{path}: {number}" for path, number in node.sockets.items()),
                "" if node.local else f"{node.seen:.1f} s ago",
            )
            for node in self
        ]
        return markup.box(markup.table(("node", "process", "sockets", "heard"), rows))


class ClusterInspector:
    """Looks into the sockets and rooms of all nodes and acts on them; ``inspector.cluster``.

    What asks the other nodes is awaitable, on any loop. A node that does not answer within two seconds is left out,
    and the result says so; one that has died is gone from `nodes` three seconds later.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._path = subject.path

    @property
    def ready(self) -> bool:
        """Whether the other nodes can be reached."""
        return self._cluster.ready

    @property
    def nodes(self) -> Nodes:
        """The nodes that are there, with how many sockets they had at their last heartbeat."""
        return Nodes(self._cluster.nodes)

    async def sockets(self) -> Sockets:
        """Id to `NodeSocket` (a `SocketSnapshot` with its ``node``), at most 1000 of each node.

        ``incomplete`` says why some are missing: there are more of them, or a node did not answer.
        """
        found, total, cut = await self._ask(lambda cluster: cluster.sockets(self._path, limit=_LIMIT))
        snapshots: list[SocketSnapshot] = []
        for node, described in found:
            try:
                snapshots.append(_NODE_SOCKET.validate_python({**described, "node": node}))
            except (ValidationError, TypeError):
                # A node of another version: its socket cannot be shown, the others can.
                self._cluster.rejected += 1
                cut = True
        why = [f"{len(snapshots)} of {int(total)} are listed"] if cut else []
        if not total.complete:
            why.append(total.incomplete)
        return Sockets(snapshots, f"{self._path or 'the servers'} on all nodes", ", ".join(why))

    async def rooms(self) -> Rooms:
        """Room to the `Sockets` in it, on all nodes: of those sockets that `sockets` lists.

        ``incomplete`` says why rooms or members are missing: there are more sockets, or a node did not answer.
        """
        rooms: dict[tuple[str, str], list[SocketSnapshot]] = {}
        sockets = await self.sockets()
        for socket in sockets.values():
            for room in socket.rooms:
                rooms.setdefault((socket.namespace, room), []).append(socket)
        why = f"of the sockets, {sockets.incomplete}" if sockets.incomplete else ""
        return Rooms(((path, room, members) for (path, room), members in rooms.items()), why)

    async def count_sockets(self) -> Count:
        """How many sockets there are on all nodes; ``complete`` says whether every node has answered."""
        return await self._ask(lambda cluster: cluster.count_sockets(self._path))

    async def send(self, id: str | SocketSnapshot, data: object) -> Receipt:
        """Send to one socket, wherever it is."""
        message = encode(data)
        taken, short = await self._act(id, lambda cluster, whole: cluster.send(self._path, whole, message))
        return sent_to(short, taken)

    async def join(self, id: str | SocketSnapshot, room: str) -> Receipt:
        """Put the socket into the room."""
        check_room(room)
        done, short = await self._act(id, lambda cluster, whole: cluster.move(self._path, whole, room, into=True))
        return joined(short, room, done)

    async def leave(self, id: str | SocketSnapshot, room: str) -> Receipt:
        """Take the socket out of the room."""
        check_room(room)
        done, short = await self._act(id, lambda cluster, whole: cluster.move(self._path, whole, room, into=False))
        return left(short, room, done)

    async def disconnect(self, id: str | SocketSnapshot, code: int = 1000, reason: str = "") -> Receipt:
        """Close the socket; ``code`` and ``reason`` as for `Socket.close`."""
        _, short = await self._act(id, lambda cluster, whole: cluster.disconnect(self._path, whole, code, reason))
        return disconnecting(short, code, reason)

    async def _act(
        self, id: str | SocketSnapshot, act: Callable[[Cluster, str], Awaitable[bool | None]]
    ) -> tuple[bool, str]:
        wanted = id if isinstance(id, str) else id.id
        if len(wanted) < _ID_LENGTH:
            listed = await self.sockets()
            if listed.incomplete:
                # The id of one that is not listed may begin in the same way.
                raise TransportError(
                    f"it is not known which socket's id begins with {wanted!r}, as not all are known: "
                    f"{listed.incomplete}. Give the whole id"
                )
            wanted = listed[wanted].id
        done = await self._ask(lambda cluster: act(cluster, wanted))
        if done is None:
            raise SocketNotFoundError(f"no socket on any node has the id {wanted!r}")
        return done, wanted[:8]

    async def _ask(self, work: Callable[[Cluster], Awaitable[R]]) -> R:
        cluster = self._cluster
        return await self._subject.door().acall(lambda: work(cluster))

    @property
    def _cluster(self) -> Cluster:
        cluster = self._subject.server.cluster
        if cluster is None:
            self._subject.door()
            raise ServerStateError(
                'this server has no transport: AsenaServer(…, transport=RedisTransport("redis://…"))'
            )
        return cluster

    def __repr__(self) -> str:
        cluster = self._subject.server.cluster
        return "<no cluster: the server is alone>" if cluster is None else f"{cluster!r}\n{self.nodes!r}"

    def _repr_html_(self) -> str:
        if self._subject.server.cluster is None:
            return markup.box(f"<p>{markup.text(repr(self))}</p>")
        return markup.box(f"<p>{markup.text(repr(self._cluster))}</p>", self.nodes._repr_html_())


__all__ = ["ClusterInspector", "NodeSocket", "Nodes"]
