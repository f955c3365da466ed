"""The nodes that share their rooms: what one of them knows of the others, and asks of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from ..errors import RoomLimitError, RoomNameError, TransportError, must_propagate
from ..websocket.messages import Message, valid_close_code
from .contract import Transport
from .envelope import (
    Arrivals,
    Beat,
    Envelope,
    EnvelopeError,
    Kind,
    Reply,
    Request,
    Sequences,
    is_from,
    message_header,
    message_of,
    pack,
    parse,
    parse_message_header,
    unpack,
)

if TYPE_CHECKING:
    from ..websocket.namespace import Namespace
    from ..websocket.sockets import Socket

log = logging.getLogger("asena_tornado")

HEARTBEAT = 1.0  # seconds between signs of life
_DEAD_AFTER = 3  # heartbeats without one
_FORGOTTEN_AFTER = 600.0  # seconds: until then a node that comes back is told what was missed meanwhile
_ANNOUNCED = 256  # channels in a heartbeat; more when somebody comes back
_ANNOUNCED_TO_NEWCOMERS = 2048
_ANNOUNCED_TIMES = 3
_REMEMBERED = 4096  # messages to several rooms, which may arrive once more through another channel
_LOCATED = 10_000  # sockets of other nodes

_REFUSED = "refused: "  # how the reply of a node begins that may not do what was asked
_NODES = "nodes"  # the channel of every node; a namespace's begin with "/"


def channel_of(path: str, room: str | None) -> str:
    """The channel for a room, or for everybody in the namespace. "#" is not in a path: no two rooms share one."""
    return path if room is None else f"{path}#{room}"


@dataclass(frozen=True, slots=True)
class Node:
    """One server of the cluster. ``sockets``: how many it holds, per namespace. ``seen``: heard so many seconds ago."""

    id: str
    name: str
    sockets: Mapping[str, int]
    seen: float
    local: bool = False

    def __repr__(self) -> str:
        where = ", ".join(f"{path} {count}" for path, count in self.sockets.items()) or "no namespaces"
        return f"<node {self.id[:8]} {self.name}{' (this one)' if self.local else ''}: sockets {where}>"


@dataclass(frozen=True, slots=True)
class Gap:
    """``missed`` messages that ``node`` published to ``room`` of ``namespace`` (None: to everybody) did not come."""

    node: str
    namespace: str
    room: str | None
    missed: int


@dataclass(slots=True)
class _Known:
    name: str
    sockets: dict[str, int]
    seen: float
    alive: bool = True


@dataclass(slots=True)
class _Question:
    """A request under way: who has still to answer."""

    missing: set[bytes]
    first: bool  # the first that says "done" is enough
    answered: asyncio.Future[None]
    replies: dict[bytes, tuple[Reply, bytes]] = field(default_factory=dict)
    settled: bool = False  # the nodes that there are are known

    def look(self) -> None:
        """Whether that is all."""
        enough = self.first and any(reply.done for reply, _ in self.replies.values())
        if not self.answered.done() and (enough or (self.settled and not self.missing)):
            self.answered.set_result(None)


class Cluster:
    """One node's part in it. Everything happens on the loop that starts it.

    ``transport``: what carries messages. ``on_gap``: called with each `Gap`. ``describe``: what to tell other nodes
    of a socket, as something for JSON. ``serves``: whether it is one of the nodes, or only talks to them.

    Messages go to a channel per room, to which the nodes subscribe that have members there; one per namespace; one
    for all nodes, with heartbeats and questions; and one per node, with answers. What arrives is delivered to local
    sockets and never published again. A node that dies is gone from `nodes` three seconds later.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        on_gap: Callable[[Gap], object] | None = None,
        describe: Callable[[Socket[Any]], object] | None = None,
        serves: bool = True,
    ) -> None:
        self.transport = transport
        self.on_gap = on_gap
        self.missed = 0  # messages of other nodes known to be lost
        self.late = 0  # messages that came twice, or after later ones, and were dropped
        self.rejected = 0  # envelopes that were malformed or foreign
        self._namespaces: Mapping[str, Namespace] = {}
        self._describe = describe
        self._serves = serves
        self._id = uuid.uuid4().bytes
        self._name = f"{platform.node()}:{os.getpid()}"
        self._known: dict[bytes, _Known] = {}
        self._sequences = Sequences()
        self._arrivals = Arrivals()
        self._subscribed: set[str] = set()
        self._announce: OrderedDict[str, int] = OrderedDict()  # channels used lately, and in how many beats to say so
        self._copies = 0  # messages to several rooms, numbered
        self._delivered: OrderedDict[tuple[bytes, int], None] = OrderedDict()
        self._questions: dict[str, _Question] = {}
        self._located: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._knows_all_at = 0.0
        self._met = asyncio.Event()
        self._warned_at = 0.0

    # -- coming and going

    async def start(self) -> None:
        """Connect, and begin to receive. Raises what `Transport.start` raises."""
        self._subscribe(_NODES)
        self._subscribe(self._own_channel)
        await self.transport.start(self)
        loop = asyncio.get_running_loop()
        # Whoever is there answers a greeting at once; and beats within one interval in any case.
        self._knows_all_at = monotonic() + 1.2 * HEARTBEAT
        self._beat(hello=True)
        self._task = loop.create_task(self._keep_beating())

    def serve(self, namespaces: Mapping[str, Namespace]) -> None:
        """Connect these namespaces, and no others any more, with those of the same path on other nodes."""
        for path, namespace in self._namespaces.items():
            if path not in namespaces:
                namespace.link = None
                for room in namespace.index.names:
                    self._unsubscribe(channel_of(path, room))
                self._unsubscribe(path)
        self._namespaces = namespaces
        for path, namespace in namespaces.items():
            namespace.link = self
            self._subscribe(path)
            for room in namespace.index.names:
                self._subscribe(channel_of(path, room))

    async def stop(self) -> None:
        """Say goodbye and disconnect. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        self._beat(bye=True)
        for question in self._questions.values():
            if not question.answered.done():
                question.answered.set_exception(TransportError("the server is stopping"))
        await self.transport.stop()

    @property
    def ready(self) -> bool:
        """Whether other nodes can be reached."""
        return self._task is not None and self.transport.ready

    # -- what is published here

    def publish(self, path: str, rooms: tuple[str, ...] | None, message: Message, excluded: tuple[str, ...]) -> bool:
        """Hand the message to the other nodes; False if they do not get it, or not all of it."""
        if rooms is None:
            channels = [path]
        else:
            rooms = tuple(dict.fromkeys(rooms))
            channels = [channel_of(path, room) for room in rooms]
        copy = 0
        if len(channels) > 1:
            copy = self._copies = self._copies + 1
        header = message_header(path, rooms, excluded, message.opcode)
        taken = True
        for channel in channels:
            number = self._sequences.next(channel)
            self._announce.pop(channel, None)
            self._announce[channel] = _ANNOUNCED_TIMES
            payload = pack(self._id, number, Kind.MESSAGE, header, message.payload, copy=copy)
            if not self.transport.publish(channel, payload):
                taken = False
        while len(self._announce) > _ANNOUNCED:
            self._announce.popitem(last=False)
        return taken

    def join(self, path: str, room: str) -> None:
        """The room has its first local member."""
        self._subscribe(channel_of(path, room))

    def leave(self, path: str, room: str) -> None:
        """The room has no local member any more."""
        self._unsubscribe(channel_of(path, room))

    @staticmethod
    def check(room: str) -> None:
        """Raise `RoomNameError` for what cannot name a channel."""
        if not room.isascii():
            try:
                room.encode()
            except UnicodeEncodeError as error:
                raise RoomNameError(f"a room shared between nodes needs a name in Unicode: {error}") from None

    def _subscribe(self, channel: str) -> None:
        self._subscribed.add(channel)
        self.transport.subscribe(channel)

    def _unsubscribe(self, channel: str) -> None:
        self._subscribed.discard(channel)
        self._arrivals.forget_channel(channel)
        self.transport.unsubscribe(channel)

    # -- what arrives

    def message_received(self, channel: str, payload: bytes) -> None:
        """Whatever another node published."""
        if is_from(payload, self._id):
            return
        try:
            envelope = unpack(payload)
            if envelope.kind == Kind.MESSAGE:
                self._message(channel, envelope)
            elif channel not in (_NODES, self._own_channel):
                raise EnvelopeError(f"kind {envelope.kind} has no business in {channel!r}")
            elif envelope.kind == Kind.BEAT:
                self._beat_received(envelope.node, parse(Beat, envelope.header))
            elif envelope.kind == Kind.REQUEST:
                self._request(envelope.node, parse(Request, envelope.header), envelope.body)
            elif envelope.kind == Kind.REPLY:
                self._reply(envelope.node, parse(Reply, envelope.header), envelope.body)
            else:
                raise EnvelopeError(f"unknown kind {envelope.kind}")
        except EnvelopeError as error:
            self.rejected += 1
            self._warn("dropped an envelope from %r: %s", channel, error)
        except Exception:  # the edge: one message must not end the receiving of all others
            log.exception("a message from %r could not be delivered", channel)

    def _message(self, channel: str, envelope: Envelope) -> None:
        header = parse_message_header(envelope.header)
        path, rooms = header.path, header.rooms
        if channel not in ([path] if rooms is None else [channel_of(path, room) for room in rooms]):
            raise EnvelopeError(f"it says that it is for {path!r}, {rooms}")
        message = message_of(header.opcode, envelope.body)
        if channel not in self._subscribed:
            return  # it was on its way when the last member left
        missed = self._arrivals.arrived(channel, envelope.node, envelope.sequence)
        if missed is None:
            self.late += 1
            return
        if missed:
            self._gap(envelope.node, channel, missed)
        if envelope.copy:
            key = (envelope.node, envelope.copy)
            if key in self._delivered:
                return
            self._delivered[key] = None
            if len(self._delivered) > _REMEMBERED:
                self._delivered.popitem(last=False)
        namespace = self._namespaces.get(path)
        if namespace is not None:
            namespace.deliver(rooms, message, header.excluded)

    def ready_changed(self, ready: bool, reason: str) -> None:
        """Back again: ask everybody how far they have come, which shows what was missed."""
        if self._task is None:
            return  # not begun yet, or ended
        for namespace in self._namespaces.values():
            namespace.events.record("back" if ready else "away", detail=reason)
        if ready:
            self._beat(hello=True)

    def _gap(self, node: bytes, channel: str, missed: int) -> None:
        self.missed += missed
        path, _, room = channel.partition("#")
        if path in self._namespaces:
            self._namespaces[path].events.record(
                "gap",
                rooms=(room,) if room else (),
                detail=f"{missed} message(s) of node {node.hex()[:8]} did not come",
            )
        gap = Gap(node.hex(), path, room or None, missed)
        self._warn("%s message(s) of node %s to %r did not arrive", missed, gap.node[:8], channel)
        if self.on_gap is not None:
            try:
                self.on_gap(gap)
            except BaseException as error:  # the user's own code
                if must_propagate(error):
                    raise
                log.exception("on_gap failed")

    def _warn(self, text: str, *args: object) -> None:
        """Once a second at most: whoever floods the channels must not flood the log as well."""
        now = monotonic()
        level = logging.DEBUG
        if now - self._warned_at > 1:
            self._warned_at = now
            level = logging.WARNING
        log.log(level, text, *args)

    # -- signs of life

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            self._beat()
            now = monotonic()
            for node, known in list(self._known.items()):
                if known.alive and now - known.seen > _DEAD_AFTER * HEARTBEAT:
                    # While nothing arrives at all, that nobody is heard proves nothing.
                    log.log(logging.WARNING if self.ready else logging.DEBUG, "node %s is gone", node.hex()[:8])
                    self._lose(node)
                elif not known.alive and now - known.seen > _FORGOTTEN_AFTER:
                    del self._known[node]
                    self._arrivals.forget_node(node)

    def _lose(self, node: bytes) -> None:
        known = self._known.get(node)
        if known is not None:
            known.alive = False
        for question in self._questions.values():
            question.missing.discard(node)
            question.look()

    def _beat(self, *, hello: bool = False, bye: bool = False, to: bytes | None = None) -> None:
        if not (self._serves or hello or bye):
            return
        if to is not None:
            sequences = self._sequences.recent(_ANNOUNCED_TO_NEWCOMERS)
        else:
            sequences = self._sequences.latest(self._announce)
        beat = {
            "name": self._name,
            "sockets": {path: len(namespace.sockets) for path, namespace in self._namespaces.items()},
            "sequences": sequences,
            "serves": self._serves,
            "hello": hello,
            "bye": bye,
        }
        taken = self._send(_NODES if to is None else _node_channel(to), Kind.BEAT, to_json(beat))
        if taken and to is None:
            for channel, times in list(self._announce.items()):
                if times == 1:
                    del self._announce[channel]
                else:
                    self._announce[channel] = times - 1

    def _beat_received(self, node: bytes, beat: Beat) -> None:
        if beat.bye:
            self._lose(node)
            self._known.pop(node, None)
            self._arrivals.forget_node(node)
            return
        for channel, number in beat.sequences.items():
            if channel in self._subscribed:
                missed = self._arrivals.announced(channel, node, number)
                if missed:
                    self._gap(node, channel, missed)
        if beat.hello and self._serves:
            self._beat(to=node)
        if beat.serves:
            self._met.set()
            self._known[node] = _Known(beat.name, beat.sockets, monotonic())

    # -- the cluster in view

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are there, this one first."""
        now = monotonic()
        own = {path: len(namespace.sockets) for path, namespace in list(self._namespaces.items())}
        others = [
            Node(id.hex(), known.name, known.sockets, now - known.seen)
            for id, known in list(self._known.items())
            if known.alive
        ]
        return (Node(self._id.hex(), self._name, own, 0.0, local=True), *others) if self._serves else tuple(others)

    async def until_somebody_answers(self) -> None:
        """Return when a node is known, or when it is clear that there is none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._knows_all_at - monotonic())):
                await self._met.wait()

    async def count_sockets(self, path: str | None = None, *, timeout: float = 2.0) -> int:
        """How many sockets there are in the namespace, or in all of them, on all nodes."""
        _, total = await self.sockets(path, limit=0, timeout=timeout)
        return total

    async def sockets(
        self, path: str | None = None, *, limit: int = 1000, timeout: float = 2.0
    ) -> tuple[list[tuple[str, Any]], int]:
        """The sockets on all nodes, each as (node id, description), and how many there are.

        At most ``limit`` descriptions per node. A node that does not answer within ``timeout`` seconds is left out.
        """
        found: list[tuple[str, Any]] = []
        total = 0
        if self._serves:
            number, described = self._described(path, limit)
            found += [(self._id.hex(), each) for each in from_json(described)]
            total += number
        for node, (reply, body) in (await self._ask("sockets", path=path, limit=limit, timeout=timeout)).items():
            total += reply.total
            try:
                found += [(node.hex(), each) for each in (from_json(body) if body else ())]
            except (ValueError, TypeError):
                self.rejected += 1
        return found, total

    async def locate(self, path: str | None, socket_id: str, *, timeout: float = 2.0) -> str | None:
        """The id of the node that holds the socket, or None."""
        if self._local(path, socket_id) is not None:
            return self._id.hex()
        replies = await self._ask("find", path=path, socket=socket_id, first=True, timeout=timeout)
        return next((node.hex() for node, (reply, _) in replies.items() if reply.done), None)

    # -- sockets of other nodes

    async def send(self, path: str | None, socket_id: str, message: Message, *, timeout: float = 2.0) -> bool | None:
        """Send to a socket wherever it is: whether it was taken, or None when nobody has it."""
        return await self._act("send", path, socket_id, body=message.payload, opcode=message.opcode, timeout=timeout)

    async def move(
        self, path: str | None, socket_id: str, room: str, *, into: bool, timeout: float = 2.0
    ) -> bool | None:
        """Put a socket into the room, or take it out: whether that changed anything, or None when nobody has it."""
        return await self._act("join" if into else "leave", path, socket_id, room=room, timeout=timeout)

    async def disconnect(
        self, path: str | None, socket_id: str, code: int = 1000, reason: str = "", *, timeout: float = 2.0
    ) -> bool | None:
        """Close a socket: True, or None when nobody has it. Raises ``ValueError`` as `Socket.close` does."""
        if not valid_close_code(code) or len(reason.encode()) > 123:
            raise ValueError(f"no code and reason that a close frame may carry: {code}, {reason!r}")
        return await self._act("disconnect", path, socket_id, code=code, reason=reason, timeout=timeout)

    async def _act(
        self, operation: str, path: str | None, socket_id: str, *, timeout: float, body: bytes = b"", **details: Any
    ) -> bool | None:
        request = Request(id="here", operation=operation, path=path, socket=socket_id, **details)  # type: ignore[arg-type]  # pydantic checks it
        local = self._do(request, body)
        if local.done:
            return not local.error
        key = (path or "", socket_id)
        node = self._located.get(key)
        if node is None or node not in self._known:
            found = await self.locate(path, socket_id, timeout=timeout)
            if found is None:
                return None
            node = bytes.fromhex(found)
            self._located[key] = node
            if len(self._located) > _LOCATED:
                self._located.popitem(last=False)
        replies = await self._ask(
            operation, node=node, path=path, socket=socket_id, body=body, timeout=timeout, **details
        )
        if node not in replies:
            self._located.pop(key, None)
            raise TransportError(
                f"node {node.hex()[:8]}, which has the socket {socket_id}, did not answer in {timeout} s"
            )
        reply, _ = replies[node]
        if not reply.done:
            self._located.pop(key, None)
            return None
        if reply.error.startswith(_REFUSED):
            raise RoomLimitError(reply.error.removeprefix(_REFUSED))
        return not reply.error

    async def _ask(
        self,
        operation: str,
        *,
        timeout: float,
        node: bytes | None = None,
        first: bool = False,
        body: bytes = b"",
        **details: Any,
    ) -> dict[bytes, tuple[Reply, bytes]]:
        """The answers of one node, or of all; of those that answer within ``timeout`` seconds."""
        if not self.ready:
            raise TransportError(f"{self.transport!r} is not ready: other nodes cannot be asked")
        loop = asyncio.get_running_loop()
        missing = {id for id, known in self._known.items() if known.alive} if node is None else {node}
        question = _Question(missing, first, loop.create_future())
        id = uuid.uuid4().hex
        self._questions[id] = question
        header = to_json({"id": id, "operation": operation, **details})
        try:
            if not self._send(_NODES if node is None else _node_channel(node), Kind.REQUEST, header, body):
                raise TransportError(f"{self.transport!r} did not take the question")
            try:
                async with asyncio.timeout(timeout):
                    wait = 0.0 if node is not None else self._knows_all_at - monotonic()
                    if wait > 0 and not first:
                        await asyncio.sleep(wait)
                        question.missing |= {
                            id for id, known in self._known.items() if known.alive and id not in question.replies
                        }
                    elif wait > 0:
                        await asyncio.wait([question.answered], timeout=wait)
                    question.settled = True
                    question.look()
                    await question.answered
            except TimeoutError:
                pass
            return question.replies
        finally:
            del self._questions[id]

    def _request(self, node: bytes, request: Request, body: bytes) -> None:
        if not self._serves:
            return
        payload = b""
        if request.operation == "sockets":
            number, payload = self._described(request.path, request.limit)
            reply = Reply(id=request.id, done=True, total=number)
        else:
            try:
                reply = self._do(request, body)
            except (RoomNameError, RoomLimitError) as error:
                reply = Reply(id=request.id, done=True, error=_REFUSED + str(error))
        self._send(_node_channel(node), Kind.REPLY, to_json(reply), payload)

    def _reply(self, node: bytes, reply: Reply, body: bytes) -> None:
        question = self._questions.get(reply.id)
        if question is not None:
            question.replies[node] = (reply, body)
            question.missing.discard(node)
            question.look()

    def _do(self, request: Request, body: bytes) -> Reply:
        """Do it with a local socket. ``error``: it is here, but nothing came of it."""
        socket = self._local(request.path, request.socket)
        if socket is None:
            return Reply(id=request.id, done=False)
        namespace = socket._namespace
        error = ""
        if request.operation == "send":
            if not namespace.send_to(socket, message_of(request.opcode, body)):
                error = "not taken"
        elif request.operation == "join":
            if not request.room:
                raise EnvelopeError("a room without a name")
            if socket.is_subscribed(request.room):
                error = "was in it already"
            else:
                socket.subscribe(request.room)
        elif request.operation == "leave":
            if socket.is_subscribed(request.room):
                socket.unsubscribe(request.room)
            else:
                error = "was not in it"
        elif request.operation == "disconnect":
            if not valid_close_code(request.code) or len(request.reason.encode()) > 123:
                raise EnvelopeError(f"no way to close a socket: {request.code} {request.reason!r}")
            socket.close(request.code, request.reason)
        return Reply(id=request.id, done=True, error=error)

    def _local(self, path: str | None, socket_id: str) -> Socket[Any] | None:
        for namespace in self._namespaces.values() if path is None else self._mounted(path):
            socket = namespace.sockets.get(socket_id)
            if socket is not None:
                return socket
        return None

    def _mounted(self, path: str) -> Iterable[Namespace]:
        namespace = self._namespaces.get(path)
        return () if namespace is None else (namespace,)

    def _described(self, path: str | None, limit: int) -> tuple[int, bytes]:
        scope = list(self._namespaces.values() if path is None else self._mounted(path))
        sockets = islice((socket for namespace in scope for socket in namespace.sockets.values()), max(0, limit))
        described = [self._describe(socket) for socket in sockets] if self._describe is not None else []
        return sum(len(n.sockets) for n in scope), to_json(described, inf_nan_mode="null", fallback=repr)

    def _send(self, channel: str, kind: Kind, header: bytes, body: bytes = b"") -> bool:
        return self.transport.publish(channel, pack(self._id, 0, kind, header, body))

    @property
    def _own_channel(self) -> str:
        return _node_channel(self._id)

    def __repr__(self) -> str:
        state = "ready" if self.ready else "not ready"
        others = sum(known.alive for known in self._known.values())
        return f"<Cluster {state}: this node and {others} other{'' if others == 1 else 's'}, by {self.transport!r}>"


def _node_channel(node: bytes) -> str:
    return f"node:{node.hex()}"


__all__ = ["Cluster", "Gap", "Node"]
