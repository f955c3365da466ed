"""`Cluster`: one node among those that share their rooms."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import to_json

from ..errors import RoomNameError, TransportError, must_propagate
from ..transports import Transport
from ..websocket.messages import Message, valid_close_code
from ..websocket.namespace import Namespace, NamespaceObserver
from .envelope import (
    VERSION,
    Envelope,
    EnvelopeError,
    Heartbeat,
    Kind,
    Reply,
    Request,
    VersionError,
    is_from,
    message_header,
    message_of,
    pack,
    parse,
    parse_message_header,
    unpack,
)
from .nodes import DEAD_AFTER, Count, Gap, Known, Membership, Node
from .numbering import LATE, UNWANTED, Incoming, Numbers, Outgoing
from .remote import Listing, Remote

if TYPE_CHECKING:
    from ..websocket.sockets import Socket

log = logging.getLogger("asena_tornado")

HEARTBEAT = 1.0  # seconds between heartbeats
_DOUBTFUL = 15.0  # seconds before a connection was found broken in which messages may have been lost already
_MARKS = 1000  # that are sent before everything else on the loop has its turn
_REMEMBERED = 4096  # messages to several rooms, which may arrive once more through another channel
_SEVERAL = 8  # rooms; a message to more of them is sent once, to every node that has the namespace
_NAME = 200  # characters of a node's name

_NODES = "nodes"  # the channel of every node; a namespace's begin with "/"


def channel_of(path: str, room: str | None) -> str:
    """The channel for a room, or for everybody in the namespace. "#" is not in a path: no two rooms share one."""
    return path if room is None else f"{path}#{room}"


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
        self.id = uuid.uuid4().bytes
        self._serves = serves
        self._name = f"{platform.node()}:{os.getpid()}"[-_NAME:]
        self._namespaces: Mapping[str, Namespace] = {}
        self._interests: dict[str, _Interest] = {}  # by namespace
        self._members = Membership()
        self._remote = Remote(self, describe)
        self._outgoing = Outgoing(self._mark, self._cannot_account)
        self._incoming = Incoming(self._members.is_alive)
        self._copies = 0  # messages to several rooms, numbered
        self._delivered: OrderedDict[tuple[bytes, int], None] = OrderedDict()
        self._unaccounted: dict[str, int] = {}  # by namespace
        self._told: dict[str, int] = {}  # of that, what a heartbeat has said
        self._foreign: dict[bytes, tuple[int, float]] = {}  # nodes of other releases: version, and heard when
        self._complained: set[bytes] = set()  # about which of them the log has been told
        self._strangers = False  # somebody shares the channels who seems to be another application
        self._task: asyncio.Task[None] | None = None
        self._confirming: asyncio.Task[None] | None = None
        self._was_ready = False  # the transport, as it was told last
        self._reason = ""  # why the transport is not ready
        self._knows_all_at = 0.0
        self._pulse_at = 0.0  # when the last turn of `_keep_beating` began
        self._doubt_from: float | None = None  # when messages may have begun to be lost
        self._met = asyncio.Event()
        self._warned_at = 0.0

    # -- coming and going

    async def start(self) -> None:
        """Connect, and begin to receive. Raises what `Transport.start` raises."""
        self._subscribe(_NODES)
        self._subscribe(self._own_channel)
        await self.transport.start(self)
        self._was_ready = self.transport.ready
        # Whoever is there answers a greeting at once; and sends a heartbeat within one interval in any case.
        self._knows_all_at = monotonic() + 1.2 * HEARTBEAT
        self._pulse_at = monotonic()
        self._beat(hello=True)
        self._task = asyncio.get_running_loop().create_task(self._keep_beating())

    def serve(self, namespaces: Mapping[str, Namespace]) -> None:
        """Connect these namespaces, and no others any more, with those of the same path on other nodes."""
        for path, namespace in self._namespaces.items():
            if namespaces.get(path) is not namespace:
                namespace.link = None
                namespace.unobserve(self._interests.pop(path))
            if path not in namespaces:
                for room in namespace.index.names:
                    self._unsubscribe(channel_of(path, room))
                self._unsubscribe(path)
        self._namespaces = self._remote.namespaces = namespaces
        for path, namespace in namespaces.items():
            namespace.link = self
            if path not in self._interests:
                self._interests[path] = _Interest(self, path)
                namespace.observe(self._interests[path])
            self._subscribe(path)
            for room in namespace.index.names:
                self._subscribe(channel_of(path, room))

    async def stop(self) -> None:
        """Say goodbye and disconnect. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        if self._confirming is not None:
            self._confirming.cancel()
            self._outgoing.repeat()
        for _ in self._outgoing.quiet(all=True):
            pass
        self._beat(bye=True)
        if self._outgoing.unmarked:
            log.error(
                "%r: stopped while not ready; what was published last to %s room(s) may not have reached other nodes, "
                "and they cannot be told",
                self.transport,
                self._outgoing.unmarked,
            )
        self._remote.stop()
        await self.transport.stop()

    @property
    def ready(self) -> bool:
        """Whether other nodes can be reached, and understand this one."""
        return self._task is not None and self.transport.ready and not self._foreign

    @property
    def why_not_ready(self) -> str | None:
        """Why other nodes cannot be reached, or None."""
        if self._task is None:
            return "not started"
        if not self.transport.ready:
            return f"{self.transport!r} is not ready{': ' if self._reason else ''}{self._reason}"
        if self._foreign:
            versions = ", ".join(sorted({str(version) for version, _ in self._foreign.values()}))
            return (
                f"{len(self._foreign)} node(s) run a release that does not understand this one (format {versions}, "
                f"here {VERSION}): run the same release everywhere"
            )
        return None

    # -- what is published here

    def publish(self, path: str, rooms: tuple[str, ...] | None, message: Message, excluded: tuple[str, ...]) -> bool:
        """Hand the message to the other nodes; False if they do not get it, or not all of it."""
        if rooms is None:
            channels = [path]
        elif len(rooms) == 1:
            channels = [channel_of(path, rooms[0])]
        else:
            rooms = tuple(dict.fromkeys(rooms))
            channels = [channel_of(path, room) for room in rooms] if len(rooms) <= _SEVERAL else [path]
        copy = 0
        if len(channels) > 1:
            copy = self._copies = self._copies + 1
        header = message_header(path, rooms, excluded, message.opcode, message.is_json)
        taken = not self._foreign
        for channel in channels:
            numbers = self._outgoing.next(channel)
            payload = pack(
                self.id,
                Kind.MESSAGE,
                header,
                message.payload,
                epoch=numbers.epoch,
                sequence=numbers.last,
                copy=copy,
            )
            if not self.transport.publish(channel, payload):
                taken = False
        return taken

    @staticmethod
    def check(room: str) -> None:
        """Raise `RoomNameError` for what cannot name a channel."""
        if not room.isascii():
            try:
                room.encode()
            except UnicodeEncodeError as error:
                raise RoomNameError(f"a room shared between nodes needs a name in Unicode: {error}") from None

    def subscribe(self, path: str, room: str) -> None:
        """The room has its first local member."""
        self._subscribe(channel_of(path, room))

    def unsubscribe(self, path: str, room: str) -> None:
        """The room has no local member any more."""
        self._unsubscribe(channel_of(path, room))

    def _subscribe(self, channel: str) -> None:
        self._incoming.subscribe(channel, monotonic() + HEARTBEAT)
        self.transport.subscribe(channel)

    def _unsubscribe(self, channel: str) -> None:
        self._incoming.unsubscribe(channel)
        self.transport.unsubscribe(channel)

    # -- what arrives

    def message_received(self, channel: str, payload: bytes) -> None:
        """Whatever another node published."""
        if is_from(payload, self.id):
            return
        try:
            envelope = unpack(payload)
            kind = envelope.kind
            if kind == Kind.MESSAGE:
                self._message(channel, envelope)
            elif kind == Kind.MARK:
                self._marked(channel, envelope)
            elif channel not in (_NODES, self._own_channel):
                raise EnvelopeError(f"kind {kind} does not belong in {channel!r}")
            elif kind == Kind.HEARTBEAT:
                self._heartbeat(envelope.node, parse(Heartbeat, envelope.header))
            elif kind == Kind.REQUEST:
                request = parse(Request, envelope.header)
                if self._serves:
                    self._remote.request(envelope.node, request, envelope.body)
            elif kind == Kind.REPLY:
                self._remote.reply(envelope.node, parse(Reply, envelope.header), envelope.body)
            elif envelope.version <= VERSION:
                raise EnvelopeError(f"unknown kind {kind}")
        except VersionError as error:
            if error.node != self.id:
                self.rejected += 1
                self._not_understood(error)
        except EnvelopeError as error:
            self.rejected += 1
            self._warn("dropped an envelope from %r: %s", channel, error)
        except Exception:  # the edge: one message must not end the receiving of all others
            log.exception("a message from %r could not be delivered", channel)

    def _message(self, channel: str, envelope: Envelope) -> None:
        header = parse_message_header(envelope.header)
        path, rooms = header.path, header.rooms
        if channel != path and (rooms is None or channel not in [channel_of(path, room) for room in rooms]):
            raise EnvelopeError(f"it says that it is for {path!r}, {rooms}")
        message = message_of(header.opcode, envelope.body, header.is_json)
        missed = self._incoming.arrived(channel, envelope.node, envelope.epoch, envelope.sequence)
        if missed:
            if missed == UNWANTED:
                return  # it was on its way when the last member left
            if missed == LATE:
                self.late += 1
                return
            self._lost(envelope.node, channel, missed)
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

    def _marked(self, channel: str, envelope: Envelope) -> None:
        missed = self._incoming.marked(channel, envelope.node, envelope.epoch, envelope.sequence)
        if missed:
            self._lost(envelope.node, channel, missed)

    def _not_understood(self, error: VersionError) -> None:
        if error.node not in self._foreign and self.ready:
            self._record("away", str(error))
        if error.node not in self._complained:
            if len(self._complained) < _REMEMBERED:
                self._complained.add(error.node)
            log.error(
                "node %s runs another release of asena_tornado, and does not understand this one: %s. Nothing passes "
                "between them: run the same release everywhere",
                error.node.hex()[:8],
                error,
            )
        self._foreign[error.node] = (error.version, monotonic())

    def ready_changed(self, ready: bool, reason: str) -> None:
        """Back again: those who were there meanwhile mark how far they have come, which shows what was missed."""
        self._reason = "" if ready else reason
        if self._task is None:
            return  # not begun yet, or ended
        if ready == self._was_ready:
            return
        self._was_ready = ready
        now = monotonic()
        if not ready:
            # It may have been broken long before it was found to be; longer still if this process stood still.
            doubt_from = min(now, self._pulse_at) - _DOUBTFUL
            self._doubt_from = doubt_from if self._doubt_from is None else min(self._doubt_from, doubt_from)
        self._record("back" if ready else "away", reason)
        if ready:
            self._members.expect_all()
            self._knows_all_at = now + 1.2 * HEARTBEAT
            self._outgoing.repeat()
            self._beat(hello=True, away=None if self._doubt_from is None else now - self._doubt_from)

    def _record(self, kind: Literal["away", "back"], detail: str) -> None:
        for namespace in self._namespaces.values():
            namespace.events.record(kind, detail=detail)

    def _lost(self, node: bytes, channel: str, missed: int) -> None:
        path, _, room = channel.partition("#")
        self.missed += missed
        self._gap(Gap(node.hex(), path, room or None, missed), f"{missed} message(s)")

    def _gap(self, gap: Gap, what: str) -> None:
        if gap.namespace in self._namespaces:
            self._namespaces[gap.namespace].events.record(
                "gap",
                rooms=() if gap.room is None else (gap.room,),
                detail=f"{what} of node {gap.node[:8]} did not arrive",
            )
        where = gap.namespace if gap.room is None else f"{gap.namespace} {gap.room}"
        self._warn("%s of node %s to %r did not arrive", what, gap.node[:8], where)
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

    # -- heartbeats and marks

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            now = monotonic()
            if now - self._pulse_at > 2 * HEARTBEAT:
                # This process stood still; if a connection broke meanwhile, that will be found out just now.
                self._doubt_from = min(self._doubt_from or now, self._pulse_at - _DOUBTFUL)
                self._members.expect_all()
            elif self._doubt_from is not None and self.transport.ready and now > self._knows_all_at:
                self._doubt_from = None
            self._pulse_at = now
            try:
                if self._serves or self._told != self._unaccounted:
                    self._beat()
                self._look_for_the_dead(now)
                await self._send_marks()
            except Exception:  # the edge: without heartbeats this node would be taken for dead
                log.exception("%r: a heartbeat failed", self)

    def _look_for_the_dead(self, now: float) -> None:
        gone, forgotten = self._members.pulse(ready=self.transport.ready)
        for node in gone:
            log.warning("node %s is gone: no heartbeat for %g s", node.hex()[:8], DEAD_AFTER * HEARTBEAT)
            self._remote.lose(node)
        for node in forgotten:
            self._incoming.forget_node(node)
        for node, (_, heard_at) in list(self._foreign.items()):
            if now - heard_at > DEAD_AFTER * HEARTBEAT:
                del self._foreign[node]
                if self.ready:
                    self._record("back", "every node understands this one")

    async def _send_marks(self) -> None:
        """Mark the channels that have fallen silent, again and again until the bus is known to have the marks."""
        self._outgoing.turn += 1
        for number, _ in enumerate(self._outgoing.quiet(), 1):
            if number % _MARKS == 0:
                await asyncio.sleep(0)
        if self._outgoing.unconfirmed and (self._confirming is None or self._confirming.done()):
            self._confirming = asyncio.get_running_loop().create_task(self._confirm())

    async def _confirm(self) -> None:
        marks = self._outgoing.sent()
        try:
            await self.transport.sync()
        except TransportError:
            self._outgoing.repeat()
        else:
            self._outgoing.confirm(marks)

    def _mark(self, channel: str, numbers: Numbers) -> bool:
        payload = pack(self.id, Kind.MARK, b"", epoch=numbers.epoch, sequence=numbers.last)
        return self.transport.publish(channel, payload)

    def _cannot_account(self, channel: str, count: int) -> None:
        if count > 0:
            path = channel.partition("#")[0]
            self._unaccounted[path] = self._unaccounted.get(path, 0) + count

    def _beat(
        self,
        *,
        hello: bool = False,
        away: float | None = None,
        bye: bool = False,
        to: bytes | None = None,
        unsure: bool = False,
    ) -> bool:
        unaccounted = dict(self._unaccounted)
        heartbeat = {
            "name": self._name,
            "sockets": {path: len(namespace.sockets) for path, namespace in self._namespaces.items()},
            "serves": self._serves,
            "hello": hello,
            "away": away,
            "bye": bye,
            "total": self._outgoing.total,
            "unaccounted": unaccounted,
            "unsure": unsure,
        }
        taken = self._send(_NODES if to is None else _node_channel(to), Kind.HEARTBEAT, to_json(heartbeat))
        if taken and to is None:
            self._told = unaccounted
        return taken

    def _heartbeat(self, node: bytes, heartbeat: Heartbeat) -> None:
        gone_for = self._members.gone_for(node)
        known, unaccounted, new = self._members.hear(node, heartbeat)
        for path, count in unaccounted.items():
            if path in self._namespaces:
                self._gap(Gap(node.hex(), path, None, count, certain=False), f"up to {count} message(s) to rooms")
        if heartbeat.unsure:
            for path in heartbeat.sockets.keys() & self._namespaces.keys():
                self._gap(Gap(node.hex(), path, None, 0, certain=False), "an unknown number of messages to rooms")
        if heartbeat.bye:
            self._remote.lose(node)
            self._members.pop(node)
            self._incoming.forget_node(node)
            return
        self._incoming.told(node, heartbeat.total)
        if heartbeat.serves:
            self._met.set()
            if new:
                self._look_for_strangers(node, known)
            if gone_for is not None:
                # Neither side's connection need have been broken, if the bus itself was in two parts.
                self._beat(hello=True, away=gone_for + _DOUBTFUL, to=node)
        if heartbeat.hello:
            unsure = False
            if heartbeat.away is not None:
                unsure = not self._outgoing.remark(self._outgoing.turn - int(heartbeat.away / HEARTBEAT) - 2)
            if self._serves or unsure:
                self._beat(to=node, unsure=unsure)

    def _look_for_strangers(self, node: bytes, known: Known) -> None:
        if self._strangers or not self._serves or not known.sockets or not self._namespaces:
            return
        if known.sockets.keys().isdisjoint(self._namespaces):
            self._strangers = True
            log.warning(
                "node %s (%s) shares this server's channels, but none of its namespaces (it has %s). If it is another "
                "application, their rooms mix as soon as they have a namespace in common: give each application a "
                "prefix of its own, as in RedisTransport(…, prefix=…)",
                node.hex()[:8],
                known.name,
                ", ".join(list(known.sockets)[:5]),
            )

    # -- the cluster in view

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are there, this one first. While the transport is not ready, those that were there before."""
        if not self._serves:
            return tuple(self._members.nodes())
        own = {path: len(namespace.sockets) for path, namespace in list(self._namespaces.items())}
        return (Node(self.id.hex(), self._name, own, 0.0, local=True), *self._members.nodes())

    @property
    def alive(self) -> set[bytes]:
        """The ids of the other nodes that are there."""
        return self._members.alive

    @property
    def unknown_for(self) -> float:
        """Seconds until it is clear which nodes there are; 0 or less when it is."""
        return self._knows_all_at - monotonic()

    async def until_somebody_answers(self) -> None:
        """Return when a node is known, or when it is clear that there is none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self.unknown_for)):
                await self._met.wait()

    async def count_sockets(self, path: str | None = None, *, timeout: float = 2.0) -> Count:
        """How many sockets there are in the namespace, or in all of them, on all nodes.

        Says which nodes did not answer within ``timeout`` seconds. Raises `TransportError` when none can be asked.
        """
        return (await self.sockets(path, limit=0, timeout=timeout)).total

    async def sockets(self, path: str | None = None, *, limit: int = 1000, timeout: float = 2.0) -> Listing:
        """The sockets on all nodes, at most ``limit`` (and 1 MiB of descriptions) of each."""
        return await self._remote.sockets(path, limit, timeout, serves=self._serves)

    async def locate(self, path: str | None, socket_id: str, *, timeout: float = 2.0) -> str | None:
        """The id of the node that holds the socket; None when every node has said that it does not.

        Raises `TransportError` when a node has not answered within ``timeout`` seconds.
        """
        node = await self._remote.locate(path, socket_id, timeout)
        return None if node is None else node.hex()

    # -- sockets of other nodes

    async def send(self, path: str | None, socket_id: str, message: Message, *, timeout: float = 2.0) -> bool | None:
        """Send to a socket wherever it is: whether it was taken, or None when nobody has it."""
        return await self._remote.act(
            "send", path, socket_id, timeout, message.payload, opcode=message.opcode, is_json=message.is_json
        )

    async def move(
        self, path: str | None, socket_id: str, room: str, *, into: bool, timeout: float = 2.0
    ) -> bool | None:
        """Put a socket into the room, or take it out: whether that changed anything, or None when nobody has it."""
        return await self._remote.act("join" if into else "leave", path, socket_id, timeout, room=room)

    async def disconnect(
        self, path: str | None, socket_id: str, code: int = 1000, reason: str = "", *, timeout: float = 2.0
    ) -> bool | None:
        """Close a socket: True, or None when nobody has it. Raises ``ValueError`` as `Socket.close` does."""
        if not valid_close_code(code) or len(reason.encode()) > 123:
            raise ValueError(f"not a valid close code and reason: {code}, {reason!r}")
        return await self._remote.act("disconnect", path, socket_id, timeout, code=code, reason=reason)

    def ask(self, node: bytes | None, request: bytes, body: bytes) -> bool:
        """Send a question to a node, or to all; whether the transport took it."""
        return self._send(_NODES if node is None else _node_channel(node), Kind.REQUEST, request, body)

    def answer(self, node: bytes, reply: bytes, body: bytes) -> None:
        """Answer a node's question."""
        self._send(_node_channel(node), Kind.REPLY, reply, body)

    def _send(self, channel: str, kind: Kind, header: bytes, body: bytes = b"") -> bool:
        return self.transport.publish(channel, pack(self.id, kind, header, body))

    @property
    def _own_channel(self) -> str:
        return _node_channel(self.id)

    def __repr__(self) -> str:
        reason = self.why_not_ready
        state = "ready" if reason is None else f"not ready ({reason})"
        others = len(self._members)
        return f"<Cluster {state}: this node and {others} other{'' if others == 1 else 's'}, by {self.transport!r}>"


class _Interest(NamespaceObserver):
    """Keeps the node subscribed to those rooms of one namespace that have members here."""

    def __init__(self, cluster: Cluster, path: str) -> None:
        self._cluster = cluster
        self._path = path

    def joined(self, socket: Socket[Any], room: str, *, first: bool) -> None:
        """Subscribe with the first member."""
        if first:
            self._cluster.subscribe(self._path, room)

    def left(self, socket: Socket[Any], room: str, *, last: bool, released: bool) -> None:
        """Unsubscribe with the last."""
        if last:
            self._cluster.unsubscribe(self._path, room)


def _node_channel(node: bytes) -> str:
    return f"node:{node.hex()}"


__all__ = ["HEARTBEAT", "Cluster", "channel_of"]
