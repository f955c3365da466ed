"""`Cluster`: one node among those that share their rooms."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from inspect import isawaitable
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import to_json

from ..errors import RoomNameError, TransportError, must_propagate
from ..transports import Transport, TransportHistory
from ..websocket.history import Numbered, RoomRules
from ..websocket.messages import Message, check_close
from ..websocket.namespace import Namespace, NamespaceObserver
from . import nodes
from .envelope import (
    VERSION,
    Departed,
    Envelope,
    EnvelopeError,
    Heartbeat,
    Kind,
    MessageHeader,
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
from .histories import SharedHistories
from .nodes import DEAD_AFTER, Count, Departures, Gap, Known, Membership, Node
from .numbering import LATE, UNWANTED, Incoming, Numbers, Outgoing
from .remote import Listing, Remote

if TYPE_CHECKING:
    from ..websocket.sockets import Socket

log = logging.getLogger("asena_tornado")

HEARTBEAT = 1.0  # seconds between heartbeats
_DOUBTFUL = 15.0  # seconds before a connection was found broken in which messages may have been lost already
_MARKS = 1000  # that are looked at before everything else on the loop has its turn
_MARKS_AT_ONCE = 20_000  # as a node stops: so many are sent before the bus is asked whether it has them
_PATIENCE = 30  # heartbeats after which a bus that does not say whether it has the marks is told them again
_GOODBYE = 2.0  # seconds that stopping waits for the bus to take them
_COMPLAINTS = 4096  # nodes of other releases that the log is told of
_GROUPED = 100_000  # sockets of which it is remembered that they have got a message to several rooms
_SEVERAL = 8  # rooms; a message to more of them is sent once, to every node that has the namespace
_NAME = 200  # characters of a node's name
_CHANNEL = 4096  # bytes of a channel's name, as `Transport` promises
# Bytes of a heartbeat that list namespaces, and those with something unaccounted for; all of it stays under 1 kB.
_LISTED, _LISTED_UNACCOUNTED = 400, 200
_ASK_AGAIN = 5.0  # seconds for which a node without namespaces takes other nodes' rooms to have the same options
_PATIENT = 2.0  # seconds that it waits for an answer
_SENT_TO = 100  # namespaces that a node without any of its own remembers to have sent to
_KINDS = frozenset(Kind)

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
        store = getattr(transport, "history", None)
        self._store = store if isinstance(store, TransportHistory) else None
        self.on_gap = on_gap
        self.missed = 0  # messages of other nodes known to be lost
        self.late = 0  # messages that came twice, or after later ones, and were dropped
        self.rejected = 0  # envelopes that were malformed or foreign
        self.interruptions = 0  # how often the transport has ceased to be ready
        self._serves = serves
        self._describe = describe
        self._name = f"{platform.node()}:{os.getpid()}"[-_NAME:]
        self._namespaces: Mapping[str, Namespace] = {}
        self._interests: dict[str, _Interest] = {}  # by namespace
        self._sent_to: dict[str, int] = {}  # namespaces, by a node that has none itself
        self._foreign: dict[bytes, tuple[int, float]] = {}  # nodes of other releases: version, and heard when
        self._complained: set[bytes] = set()  # about which of them the log has been told
        self._strangers = False  # somebody shares the channels who seems to be another application
        self._task: asyncio.Task[None] | None = None
        self._confirming: asyncio.Task[None] | None = None
        self._meeting: asyncio.Task[None] | None = None
        self._handling: set[asyncio.Future[Any]] = set()  # what `on_gap` has returned to be awaited
        self._warned_at = 0.0
        self._begin()

    def _begin(self) -> None:
        """Be a new node, about which nobody knows anything, and which knows nobody."""
        self.id = uuid.uuid4().bytes
        self._members = Membership()
        self._departures = Departures()
        self._remote = Remote(self, self._describe)
        self._remote.namespaces = self._namespaces
        self._outgoing = Outgoing(self._mark, self._cannot_account)
        self._incoming = Incoming(self._members.is_alive)
        self._copies = 0  # messages to several rooms, numbered
        self._asked: dict[str, tuple[RoomRules, float]] = {}  # what rooms have, and when a node has said so
        self._groups = 0  # messages to several rooms of which some have a history, numbered
        # Who has got such a message already, by its node and number: the parts of it come one by one.
        self._got: OrderedDict[tuple[bytes, int], set[str]] = OrderedDict()
        self._got_size = 0
        self._delivered: dict[bytes, int] = {}  # by node, of its messages to several rooms the one delivered last
        self._unaccounted: dict[str, int] = {}  # by namespace; "": in any
        self._told: tuple[int, dict[str, int]] = (0, {})  # the total, and of these, what a heartbeat has said last
        self._beat_at = 0.0  # when that was
        self._beats = 0
        self._next_listed = 0  # the namespace with which the next heartbeat begins
        self._were_away: dict[bytes, int] = {}  # nodes to be told what they missed: everything since this turn
        self._came_back: dict[bytes, tuple[float, float]] = {}  # nodes that were away: until when, and since when
        self._started_at = 0.0
        self._was_ready = False  # the transport, as it was told last
        self._reason = ""  # why the transport is not ready
        self.settled = False  # it is clear which nodes there are
        self._pulse_at = 0.0  # when the last turn of `_keep_beating` began
        self._doubt_from: float | None = None  # when messages may have begun to be lost
        self._back_at = 0.0  # when the transport became ready again
        self._met = asyncio.Event()  # somebody, or it is clear that there is nobody
        self._ended = False

    # -- coming and going

    async def start(self) -> None:
        """Connect, and begin to receive. Raises what `Transport.start` raises."""
        if self._ended:
            channels = [channel for channel in self._incoming.channels if channel.startswith("/")]
            self._begin()
            for channel in channels:
                self._subscribe(channel)
            for namespace in self._namespaces.values():
                self._share_histories(namespace)
        self._subscribe(_NODES)
        self._subscribe(self._own_channel)
        self._started_at = monotonic()
        await self.transport.start(self)
        self._was_ready = self.transport.ready
        self._pulse_at = monotonic()
        self._task = asyncio.get_running_loop().create_task(self._keep_beating())
        self._greet()

    def _greet(self, away: float | None = None) -> None:
        """Whoever is there answers a greeting at once; and sends a heartbeat within one interval in any case."""
        self.settled = False
        self._beat(hello=True, away=away)
        if self._meeting is not None:
            self._meeting.cancel()
        self._meeting = asyncio.get_running_loop().create_task(self._meet())

    async def _meet(self) -> None:
        for _ in range(12):  # in small steps: while this process stands still, nobody's answer is read
            await asyncio.sleep(HEARTBEAT / 10)
        self.settled = True
        self._met.set()
        self._remote.settle()

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
            self._share_histories(namespace)
            self._subscribe(path)
            for room in namespace.index.names:
                self._subscribe(channel_of(path, room))
        for node, known in self._members:
            self._look_for_strangers(node, known)

    def _share_histories(self, namespace: Namespace) -> None:
        old, rules = namespace.histories, namespace.rules
        if rules is None or not rules.remember or self._store is None:
            namespace.remember(None)
            return
        if not isinstance(old, SharedHistories) or old.host is not self:
            namespace.remember(histories := SharedHistories(namespace, rules, self, self._store))
        else:
            histories = old
        histories.obey(rules)

    async def stop(self) -> None:
        """Say goodbye and disconnect. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        self._ended = True
        tasks = [each for each in (task, self._confirming, self._meeting) if each is not None]
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        self._outgoing.repeat()
        await self._tell_those_who_were_away()
        for number, _ in enumerate(self._outgoing.quiet(all=True, ready=False), 1):
            if number % _MARKS == 0:
                await asyncio.sleep(0)
            if number % _MARKS_AT_ONCE == 0 and not await self._has_reached_the_bus():
                break
        if not self._beat(bye=True) and await self._has_reached_the_bus():
            self._beat(bye=True)
        if self._outgoing.unmarked:
            log.error(
                "%r: stopped, and could not tell the other nodes what was published last to %s room(s): what of it "
                "did not arrive, they will never know",
                self.transport,
                self._outgoing.unmarked,
            )
        for namespace in self._namespaces.values():
            if isinstance(namespace.histories, SharedHistories):
                namespace.histories.close()
        self._remote.stop()
        await self.transport.stop()
        if self._handling:
            await asyncio.wait(self._handling, timeout=_GOODBYE)
            for handling in list(self._handling):
                handling.cancel()

    async def _has_reached_the_bus(self) -> bool:
        try:
            await asyncio.wait_for(self.transport.sync(), _GOODBYE)
        except (TransportError, TimeoutError):
            return False
        return True

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

    def publish_and_keep(
        self, path: str, kept: tuple[str, ...], others: tuple[str, ...], message: Message, excluded: tuple[str, ...]
    ) -> bool:
        """Hand the message to all nodes, this one included, for some rooms with a history, and others without.

        It comes back for those with a history. False if it does not, for some: then their members get it nowhere.
        """
        namespace = self._namespaces.get(path)
        histories = None if namespace is None else namespace.histories
        if namespace is None or not isinstance(histories, SharedHistories):
            return False
        group = 0
        if len(kept) + len(others) > 1:
            group = self._groups = self._groups + 1
        taken = self._keep(path, histories.rules, kept, message, excluded, group)
        if others:
            self._deliver_part(namespace, (self.id, group), others, message, excluded)
            taken = self.publish(path, others, message, excluded, group) and taken
        return taken

    def _keep(
        self,
        path: str,
        rules: RoomRules,
        rooms: tuple[str, ...],
        message: Message,
        excluded: tuple[str, ...],
        group: int,
    ) -> bool:
        store, taken = self._store, not self._foreign
        for room in rooms:
            options = rules.history(room)
            header = message_header(path, (room,), excluded, message.opcode, message.is_json, message.info, group)
            payload = pack(self.id, Kind.MESSAGE, header, message.payload)
            if (
                options is None
                or store is None
                or not store.publish(
                    channel_of(path, room), payload, size=options.history_size, ttl=options.history_ttl
                )
            ):
                taken = False
        return taken

    async def publish_from_outside(self, path: str, rooms: tuple[str, ...], message: Message) -> bool:
        """Do the same for a node without namespaces: the nodes that have this one know which rooms have a history."""
        rules, at = self._asked.get(path, (None, -_ASK_AGAIN))
        if monotonic() - at >= _ASK_AGAIN:
            said = await self._remote.rules(path, _PATIENT)
            if said is not None:  # else what was said last holds: without it, nothing would be kept
                rules = said
                if len(self._asked) >= _SENT_TO:
                    self._asked.clear()
                self._asked[path] = (rules, monotonic())
        rooms = tuple(dict.fromkeys(rooms))
        kept = () if rules is None else tuple(room for room in rooms if rules.history(room) is not None)
        if rules is None or not kept:
            return self.publish(path, rooms, message, ())
        group = 0
        if len(rooms) > 1:
            group = self._groups = self._groups + 1
        taken = self._keep(path, rules, kept, message, (), group)
        if others := tuple(room for room in rooms if room not in kept):
            taken = self.publish(path, others, message, (), group) and taken
        return taken

    def _deliver_part(
        self,
        namespace: Namespace,
        group: tuple[bytes, int],
        rooms: tuple[str, ...] | None,
        message: Message,
        excluded: tuple[str, ...],
    ) -> None:
        """Deliver a message to several rooms, of which each part comes by itself, once to each socket."""
        got = self._got.get(group)
        if got is None:
            got = self._got[group] = set()
        namespace.deliver(rooms, message, (*excluded, *got) if got else excluded)
        before = len(got)
        got.update(socket.id for room in rooms or () for socket in namespace.members(room))
        self._got_size += len(got) - before
        while (self._got_size > _GROUPED and len(self._got) > 1) or len(self._got) > _GROUPED:
            _, gone = self._got.popitem(last=False)
            self._got_size -= len(gone)

    def deliver_kept(self, namespace: Namespace, envelope: Envelope, header: MessageHeader, message: Numbered) -> None:
        """A message to a room with a history has come back."""
        if header.group:
            self._deliver_part(namespace, (envelope.node, header.group), header.rooms, message, header.excluded)
        else:
            namespace.deliver(header.rooms, message, header.excluded)

    def history_lost(self, path: str, room: str, missed: int, why: str) -> None:
        """Messages to a room with a history did not arrive, and nobody has them any more."""
        self.missed += missed
        what = f"{missed} message(s)" if missed else "perhaps some messages"
        self._tell_gap(Gap("", path, room, missed, certain=missed > 0), what, f"did not arrive, and {why}")

    def publish(
        self, path: str, rooms: tuple[str, ...] | None, message: Message, excluded: tuple[str, ...], group: int = 0
    ) -> bool:
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
        header = message_header(path, rooms, excluded, message.opcode, message.is_json, message.info, group)
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

    def announce(self, path: str) -> None:
        """A node that only sends is about to publish to this namespace.

        It sends no heartbeats while it is idle; so that others can tell whether they miss the first of its messages,
        it says beforehand how many there were until now.
        """
        if len(self._sent_to) < _SENT_TO:
            self._sent_to[path] = 0
        if monotonic() - self._beat_at > HEARTBEAT:
            self._beat()

    @staticmethod
    def check(room: str, path: str = "") -> None:
        """Raise `RoomNameError` for what cannot name a channel."""
        if not room.isascii():
            try:
                room.encode()
            except UnicodeEncodeError as error:
                raise RoomNameError(f"a room shared between nodes needs a name in Unicode: {error}") from None
        if 3 * (len(path) + len(room)) >= _CHANNEL and len(channel_of(path, room).encode()) > _CHANNEL:
            raise RoomNameError(
                f"a room shared between nodes needs a name that has, with its namespace's, at most {_CHANNEL - 1} "
                f"bytes; {room[:20]!r}… has {len(room.encode())}"
            )

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
            elif kind not in _KINDS:
                if envelope.version <= VERSION:
                    raise EnvelopeError(f"unknown kind {kind}")
            elif channel not in (_NODES, self._own_channel):
                raise EnvelopeError(f"kind {kind} does not belong in {channel!r}")
            elif kind == Kind.HEARTBEAT:
                self._heartbeat(envelope.node, parse(Heartbeat, envelope.header))
            elif kind == Kind.REQUEST:
                request = parse(Request, envelope.header)
                if self._serves:
                    self._remote.request(envelope.node, request, envelope.body, newer=envelope.version > VERSION)
            else:
                self._remote.reply(envelope.node, parse(Reply, envelope.header), envelope.body)
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
        if channel != path and not (
            rooms and (channel == f"{path}#{rooms[0]}" or any(channel == channel_of(path, room) for room in rooms[1:]))
        ):
            raise EnvelopeError(f"it says that it is for {path!r}, {rooms}")
        message = message_of(header.opcode, envelope.body, header.is_json, header.info)
        missed = self._incoming.arrived(channel, envelope.node, envelope.epoch, envelope.sequence)
        if missed:
            if missed == UNWANTED:
                return  # it was on its way when the last member left
            if missed == LATE:
                self.late += 1
                return
            self._lost(envelope.node, channel, missed)
        if envelope.copy:
            # One node's messages arrive in their order, in all channels together: so do all copies of each.
            if envelope.copy <= self._delivered.get(envelope.node, 0):
                return
            self._delivered[envelope.node] = envelope.copy
        namespace = self._namespaces.get(path)
        if namespace is None:
            return
        if header.group:
            self._deliver_part(namespace, (envelope.node, header.group), rooms, message, header.excluded)
        else:
            namespace.deliver(rooms, message, header.excluded)

    def _marked(self, channel: str, envelope: Envelope) -> None:
        missed = self._incoming.marked(channel, envelope.node, envelope.epoch, envelope.sequence)
        if missed:
            self._lost(envelope.node, channel, missed)

    def _not_understood(self, error: VersionError) -> None:
        if error.node not in self._foreign and self.ready:
            self._record("away", str(error))
        if error.node not in self._complained and len(self._complained) < _COMPLAINTS:
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
            self.interruptions += 1
            # It may have been broken long before it was found to be; longer still if this process stood still.
            self._doubt(min(now, self._pulse_at) - _DOUBTFUL)
        self._record("back" if ready else "away", reason)
        if ready:
            self._back_at = now
            self._members.expect_all(owing=self._doubt_from is not None)
            self._outgoing.repeat()
            self._greet(away=None if self._doubt_from is None else now - self._doubt_from)
            for namespace in self._namespaces.values():
                if isinstance(namespace.histories, SharedHistories):
                    namespace.histories.check()

    def _doubt(self, since: float) -> None:
        """Messages may have been lost since then."""
        since = max(since, self._started_at)
        self._doubt_from = since if self._doubt_from is None else min(self._doubt_from, since)

    def _record(self, kind: Literal["away", "back"], detail: str) -> None:
        for namespace in self._namespaces.values():
            namespace.events.record(kind, detail=detail)

    def _lost(self, node: bytes, channel: str, missed: int) -> None:
        path, _, room = channel.partition("#")
        self.missed += missed
        self._gap(Gap(node.hex(), path, room or None, missed), f"{missed} message(s)")

    def _gap(self, gap: Gap, what: str) -> None:
        self._tell_gap(gap, f"{what} of node {gap.node[:8]}", "did not arrive")

    def _tell_gap(self, gap: Gap, what: str, became: str) -> None:
        if gap.namespace in self._namespaces:
            self._namespaces[gap.namespace].events.record(
                "gap",
                rooms=() if gap.room is None else (gap.room,),
                detail=f"{what} {became}",
            )
        where = gap.namespace if gap.room is None else f"{gap.namespace} {gap.room}"
        self._warn("%s to %r %s", what, where, became)
        if self.on_gap is not None:
            try:
                result = self.on_gap(gap)
                if isawaitable(result):
                    task = asyncio.ensure_future(_handle(result))
                    self._handling.add(task)
                    task.add_done_callback(self._handling.discard)
            except BaseException as error:  # the user's own code
                if must_propagate(error):
                    raise
                log.exception("on_gap failed")

    def _perhaps(self, node: str, paths: tuple[str, ...], why: str) -> None:
        """An unknown number of a node's messages to these namespaces (none: to any) did not arrive, if any."""
        for path in list(self._namespaces):
            if not paths or path in paths:
                self._gap(Gap(node, path, None, 0, certain=False), f"perhaps some messages, as {why},")

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
                self._doubt(self._pulse_at - _DOUBTFUL)
                self._members.expect_all()
            elif self._doubt_from is not None and self.transport.ready and self.settled:
                self._doubt_from = None
            self._pulse_at = now
            self._beats += 1
            try:
                news = self._told != (self._outgoing.total, self._unaccounted)
                if self._serves or news or self._beats % nodes.STILL_HERE == 0:
                    self._beat()
                self._look_for_the_dead(now)
                await self._send_marks()
            except Exception:  # the edge: without heartbeats this node would be taken for dead
                log.exception("%r: a heartbeat failed", self)

    def _look_for_the_dead(self, now: float) -> None:
        gone, forgotten = self._members.pulse(ready=self.transport.ready)
        for node, known in gone:
            if known.serves:
                log.warning("node %s is gone: no heartbeat for %g s", node.hex()[:8], DEAD_AFTER * HEARTBEAT)
            self._remote.lose(node)
            self._departed(node, known, published=True)  # perhaps since it was heard last
        for other, (until, since) in list(self._came_back.items()):
            if now > until or not self._members.is_alive(other):
                del self._came_back[other]
            elif gone:  # those may have been there, unknown to it, while it was away
                self._beat(to=other, departed_since=since)
        for node in forgotten:
            self._forget(node)
        for node, (_, heard_at) in list(self._foreign.items()):
            if now - heard_at > DEAD_AFTER * HEARTBEAT:
                del self._foreign[node]
                if self.ready:
                    self._record("back", "every node understands this one")

    def _departed(self, node: bytes, known: Known, *, published: bool) -> None:
        """It has said goodbye, or is silent for too long. What it published while this node was away is not known."""
        if known.owes:
            known.owes = False
            self._perhaps(node.hex(), known.paths, "it went away while this node was cut off")
        self._departures.add(node, known.paths, published=published)

    def _forget(self, node: bytes) -> None:
        self._incoming.forget_node(node)
        self._delivered.pop(node, None)

    def _told_of_departures(self, departed: tuple[Departed, ...], *, more: bool) -> None:
        """While this node was away, nodes were there that it has never heard of."""
        for each in departed:
            node = bytes.fromhex(each.node)
            if node == self.id or node in self._members or node in self._departures:
                continue
            self._departures.add(node, each.paths, published=True)
            self._perhaps(each.node, each.paths, "it came and went while this node was cut off")
        if more:
            self._perhaps("", (), "nodes came and went while this node was cut off")

    async def _send_marks(self) -> None:
        """Mark the channels that have fallen silent, again and again until the bus is known to have the marks."""
        self._outgoing.turn += 1
        await self._tell_those_who_were_away()
        for number, _ in enumerate(self._outgoing.quiet(ready=self.transport.ready), 1):
            if number % _MARKS == 0:
                await asyncio.sleep(0)
        if self._outgoing.unconfirmed and (self._confirming is None or self._confirming.done()):
            self._confirming = asyncio.get_running_loop().create_task(self._confirm())

    async def _tell_those_who_were_away(self) -> None:
        """Mark every channel used meanwhile, for all of them together."""
        if not self._were_away:
            return
        told, self._were_away = self._were_away, {}
        refused = 0
        for number, taken in enumerate(self._outgoing.remark(min(told.values())), 1):
            refused = 0 if taken else refused + 1
            if refused == _MARKS:
                break
            if number % _MARKS == 0:
                await asyncio.sleep(0)
        if refused and (refused == _MARKS or not self.transport.ready):
            self._were_away = {**told, **self._were_away}
            return
        for node in told:
            self._beat(to=node, accounted=True)

    async def _confirm(self) -> None:
        self._outgoing.confirm()
        try:
            async with asyncio.timeout(_PATIENCE * HEARTBEAT):
                await self.transport.sync()
        except (TransportError, TimeoutError):
            self._outgoing.repeat()
        else:
            self._outgoing.confirmed()

    def _mark(self, channel: str, numbers: Numbers) -> bool:
        payload = pack(self.id, Kind.MARK, b"", epoch=numbers.epoch, sequence=numbers.last)
        return self.transport.publish(channel, payload)

    def _cannot_account(self, channel: str, count: int) -> None:
        if count > 0:
            path = channel.partition("#")[0]
            if (
                path not in self._unaccounted
                and sum(len(each) + 12 for each in self._unaccounted) > _LISTED_UNACCOUNTED
            ):
                path = ""
            self._unaccounted[path] = self._unaccounted.get(path, 0) + count

    def _some_sockets(self) -> dict[str, int]:
        """How many there are in as many namespaces as a heartbeat may list: the next time in others."""
        paths = list(self._namespaces if self._serves else self._sent_to)
        listed: dict[str, int] = {}
        size = 0
        for number in range(len(paths)):
            path = paths[(self._next_listed + number) % len(paths)]
            size += len(path) + 12
            if size > _LISTED and listed:
                break
            listed[path] = len(self._namespaces[path].sockets) if self._serves else 0
        self._next_listed = (self._next_listed + len(listed)) % max(1, len(paths))
        return listed

    @property
    def _number_of_namespaces(self) -> int:
        if self._serves:
            return len(self._namespaces)
        number = len(self._sent_to)
        return number if number < _SENT_TO else number + 1  # there may be more

    def _beat(
        self,
        *,
        hello: bool = False,
        away: float | None = None,
        bye: bool = False,
        to: bytes | None = None,
        unsure: bool = False,
        accounted: bool = False,
        departed_since: float | None = None,
    ) -> bool:
        unaccounted = dict(self._unaccounted)
        total = self._outgoing.total
        now = monotonic()
        heartbeat: dict[str, object] = {
            "name": self._name,
            "sockets": self._some_sockets(),
            "namespaces": self._number_of_namespaces,
            "serves": self._serves,
            "age": round(now - self._started_at, 3),
            "total": total,
            "unaccounted": unaccounted,
        }
        if hello:
            heartbeat |= {"hello": True, "away": away}
        if departed_since is not None:
            departed, more = self._departures.since(departed_since)
            heartbeat |= {"departed": [each.model_dump() for each in departed], "more_departed": more}
        heartbeat |= {name: True for name, on in (("bye", bye), ("unsure", unsure), ("accounted", accounted)) if on}
        taken = self._send(_NODES if to is None else _node_channel(to), Kind.HEARTBEAT, to_json(heartbeat))
        if taken and to is None:
            self._told = (total, unaccounted)
            self._beat_at = now
        return taken

    def _heartbeat(self, node: bytes, heartbeat: Heartbeat) -> None:
        now = monotonic()
        # When it was there already, earlier rather than later: this may have been under way for a while.
        started_at = now - heartbeat.age - HEARTBEAT
        gone_for = self._members.gone_for(node)
        known, unaccounted, new = self._members.hear(node, heartbeat, started=started_at > self._started_at)
        for path, count in unaccounted.items():
            for each in self._namespaces if path == "" else (path,) if path in self._namespaces else ():
                self._gap(Gap(node.hex(), each, None, count, certain=False), f"up to {count} message(s) to rooms")
        if heartbeat.unsure:
            self._perhaps(node.hex(), known.paths, "it has forgotten rooms")
        if heartbeat.departed or heartbeat.more_departed:
            self._told_of_departures(heartbeat.departed, more=heartbeat.more_departed)
        if new and self._doubt_from is not None and heartbeat.total:
            # Did it come while this node was away? At a goodbye it is the last chance to say so: rather once too often.
            known.owes = (started_at if heartbeat.bye else now - heartbeat.age) < self._back_at
        if heartbeat.accounted:
            known.owes = False
        if heartbeat.bye:
            self._remote.lose(node)
            self._departed(node, known, published=heartbeat.total > 0)
            self._members.pop(node)
            self._forget(node)
            return
        self._departures.discard(node)
        if new:
            for channel, missed in self._incoming.told_of_start(node, started_at):
                self._lost(node, channel, missed)
        self._incoming.told(node, heartbeat.total)
        if heartbeat.serves:
            self._met.set()
            self._look_for_strangers(node, known)
            if gone_for is not None:
                # Neither side's connection need have been broken, if the bus itself was in two parts.
                self._beat(hello=True, away=gone_for + _DOUBTFUL, to=node)
        if heartbeat.hello:
            away = heartbeat.away
            if away is None:
                if self._serves:
                    self._beat(to=node)
                return
            since = self._outgoing.turn - int(min(away, 1e9) / HEARTBEAT) - 2
            self._were_away[node] = min(since, self._were_away.get(node, since))
            # A node that died just now, unknown to this one, is found out to be gone later.
            self._came_back[node] = (now + 2 * (nodes.STILL_HERE + DEAD_AFTER) * HEARTBEAT, now - away)
            self._beat(to=node, unsure=not self._outgoing.remembers(since), departed_since=now - away)

    def _look_for_strangers(self, node: bytes, known: Known) -> None:
        if self._strangers or not self._serves or not known.paths or not self._namespaces:
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

    async def until_somebody_answers(self) -> None:
        """Return when a node is known, or when it is clear that there is none."""
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
        check_close(code, reason)
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


async def _handle(result: Awaitable[object]) -> None:
    try:
        await result
    except Exception:  # the user's own code
        log.exception("on_gap failed")


def _node_channel(node: bytes) -> str:
    return f"node:{node.hex()}"


__all__ = ["HEARTBEAT", "Cluster", "channel_of"]
