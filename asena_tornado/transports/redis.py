"""`RedisTransport`: Redis (or Valkey) carries the messages, by publish and subscribe."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, ServerStateError, TransportError
from .contract import Receiver
from .streams import RedisHistory, Scripted

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection, ConnectionPool

log = logging.getLogger("asena_tornado")

_TICK = 0.25  # seconds between looks at what the connections do
_PROBE = 1.0  # seconds between messages to ourselves
_SLOW = 1.0  # seconds without a byte after which Redis does not count as ready
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 2.0  # seconds between attempts to connect
_LASTED = 2.0  # seconds after which a session has worked, and the next attempt need not wait
_BATCH_BYTES = 256 * 1024  # of one pipeline, so that its answer comes within a fraction of the time limit
_BATCH_MESSAGES = 1000
_TURN = 100  # messages taken in before everything else on the loop has its turn
_PATIENCE = 3.0  # seconds that starting waits for a Redis that does not answer
_DRAIN = 1.0  # seconds that stopping waits for what was published before
_DENIED_FOR = 5.0  # seconds in which nothing is published to a channel that Redis has refused; then it is tried again
_DENIED = 1000  # of such channels, remembered
_UNRETURNED = 2  # messages to ourselves that do not come back, one after the other, before that is believed


class RedisTransport:
    """Redis carries the rooms: ``AsenaServer(…, transport=RedisTransport("redis://localhost"))``.

    Needs redis-py (``pip install 'asena_tornado[redis]'``) and the commands PUBLISH, SUBSCRIBE, UNSUBSCRIBE and PING,
    so any server that speaks Redis' protocol will do. It has to be the primary: what is published on a replica does
    not reach the clients of its primary. To notice a replica it needs one of HELLO, ROLE and INFO as well; without a
    right to any of them it trusts the URL. Order, loss and everything else: see `Transport`.

    Rooms with a history need more of it: see `transports.streams.RedisHistory`.

    It is `ready` once a message of its own has come back through Redis, and makes sure of that once a second.

    Args:
        url: ``redis://[[user]:password@]host[:port]``, ``rediss://`` for TLS (redis-py's options, such as
            ``?ssl_ca_certs=…``, may follow) or ``unix://path``.
        prefix: of every channel's name. Applications that share a Redis need different ones, as the number of a
            database does not separate channels.
        timeout: seconds without a byte from Redis after which a connection counts as lost, while it owes an answer.
            A shorter pause delays messages but loses none. Time in which this process itself stood still does not
            count.
        max_pending_bytes: what may wait for a slow Redis. Past it `publish` refuses, counts (`refused`) and logs. A
            message that is larger by itself is always refused.

    Raises:
        ConfigurationError: when the URL is malformed, when redis-py does not know one of its options, when another
            argument is out of range, and without redis-py.
    """

    def __init__(
        self,
        url: str = "redis://localhost:6379",
        *,
        prefix: str = "asena",
        timeout: float = 10.0,
        max_pending_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        if not prefix:
            raise ConfigurationError("prefix must not be empty: it keeps applications on one Redis apart")
        if timeout <= 0 or max_pending_bytes <= 0:
            raise ConfigurationError("timeout (seconds) and max_pending_bytes must be positive")
        self.prefix = prefix
        self.timeout = timeout
        self.max_pending_bytes = max_pending_bytes
        self.refused = 0  # messages not taken: Redis away, or not accepting them, or too much waiting
        self.lost = 0  # messages taken, but not known to have reached Redis when a connection broke
        self._url = url
        self._pool = _pool(url, timeout)
        self._start = f"{prefix}:".encode()
        self.history = RedisHistory(self)
        self._receiver: Receiver | None = None
        self._started = False
        self._tried: asyncio.Future[None] | None = None  # done when it is known whether it works
        self._watching: asyncio.Task[None] | None = None
        self._publisher = _Line("publisher", self)
        self._subscriber = _Line("subscriber", self)
        self._refusal = ""  # why Redis does not accept what is published
        self._denied: dict[bytes, float] = {}  # channels that it refuses, and until when to believe it
        self._complained: set[bytes] = set()  # of which the log has been told
        self._suspects: dict[bytes, str] = {}  # channels of messages refused since the last probe, and why
        self._refused_last = ""  # why it refused a message last
        self._hindered = True  # the publisher is not up, or one of these: not every message can be taken
        self._ready = False
        self._told = ""  # the reason why it is not, as the receiver knows it
        self._overflowing = False
        # Published and waiting for the next pipeline: finished commands.
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._taken = self._settled = 0  # commands ever queued, and those answered or lost
        self._in_flight = 0
        self._work = asyncio.Event()
        # Channels wanted, and those whose state at Redis has to be brought in line.
        self._wanted: dict[bytes, None] = {}
        self._changed: dict[bytes, None] = {}
        self._held: set[bytes] = set()
        self._asked = asyncio.Event()  # something is to be written to the subscriber's connection
        self._pings = self._pongs = 0
        # Messages to ourselves, numbered.
        self._loop_channel = self._start + f"loop:{uuid.uuid4().hex}".encode()
        self._probe_due = False
        self._probes = 0  # sent
        self._accepted = 0  # the last that Redis has accepted
        self._returned = 0  # the last that came back
        self._fresh_from = 0  # the first of those sent while both of today's connections stood
        self._check: tuple[int, int] | None = None  # the last one accepted, and a ping sent to the subscriber after it
        self._unreturned = 0  # how many had not come back, one after the other, when such a ping was answered
        self._role_commands = list(_ROLE_COMMANDS)  # those that may tell whether this connection's Redis is the primary
        self._stopping: asyncio.Task[None] | None = None
        self._waiting: list[tuple[_Line, int, asyncio.Future[None]]] = []

    # -- the contract

    @property
    def ready(self) -> bool:
        """Whether what is published comes back: both connections stand, Redis accepts it, and is not silent."""
        return self._ready

    async def start(self, receiver: Receiver) -> None:
        """Connect; an address where nobody answers is tried again and again in the background.

        Raises `ConfigurationError` when Redis refuses the user or password, or has no such database.
        """
        if self._stopping is not None:
            await asyncio.shield(self._stopping)
        if self._receiver is not None:
            raise ServerStateError("this RedisTransport is in use by another server: give each one of its own")
        self._receiver = receiver
        loop = asyncio.get_running_loop()
        self._work, self._asked = asyncio.Event(), asyncio.Event()
        self._tried = loop.create_future()
        self.history.open()
        self._fresh_from = self._probes + 1
        self._wanted[self._loop_channel] = None
        try:
            self._publisher.start(self._publish_session)
            self._subscriber.start(self._subscribe_session)
            self._watching = loop.create_task(self._watch())
            await asyncio.wait([self._tried], timeout=_PATIENCE)
            # What is found out from now on is no reason to give up: whoever runs Redis may repair it.
            self._first_attempt_over()
            self._tried.result()
        except BaseException:
            await self.stop()
            raise
        self._started = True
        if not self._ready:
            reason = self._reason or "no answer"
            log.warning("%r: not ready yet, sending locally until it is: %s", self, reason)
            self._tell(reason)

    async def stop(self) -> None:
        """Send what waits, for at most a second, and disconnect."""
        if self._stopping is None:
            if self._receiver is None:
                return
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        # What is subscribed to from here on is for the next start.
        self._wanted.clear()
        self._changed.clear()
        try:
            if self._publisher.up:
                with contextlib.suppress(TransportError, TimeoutError):
                    await asyncio.wait_for(self._reached(self._publisher, self._taken), _DRAIN)
            self._receiver = None
            self._started = self._ready = False
            if self._watching is not None:
                self._watching.cancel()
                await asyncio.wait([self._watching])
            await asyncio.gather(self._publisher.stop(), self._subscriber.stop(), self.history.close())
        finally:
            self._stopping = None

    def publish(self, channel: str, payload: bytes) -> bool:
        """Queue it for the pipeline of this turn of the loop."""
        name = self._start + channel.encode()
        # What redis-py's pack_command makes of it, at a tenth of the cost.
        command = b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(payload), payload)
        return self._queue(name, command, len(payload))

    def _queue(self, name: bytes, command: bytes, size: int) -> bool:
        """Take a finished command that publishes ``size`` bytes to the channel of this name."""
        if self._hindered and not self._accepts(name):
            self.refused += 1
            return False
        if self._pending_bytes + len(command) > self.max_pending_bytes:
            self.refused += 1
            if not self._overflowing:
                self._overflowing = True
                log.error(
                    "%r: a message of %s bytes reaches local sockets only: %s. At most %s bytes may wait for Redis "
                    "(max_pending_bytes)",
                    self,
                    size,
                    f"too slow: {self._pending_bytes} wait already" if self._pending_bytes else "it is too large",
                    self.max_pending_bytes,
                )
            return False
        self._pending.append(command)
        self._pending_bytes += len(command)
        self._taken += 1
        self._work.set()
        return True

    def subscribe(self, channel: str) -> None:
        """Subscribe with this turn's other changes."""
        self._want(self._start + channel.encode())

    def _want(self, name: bytes) -> None:
        self._wanted[name] = None
        self._change(name)

    def unsubscribe(self, channel: str) -> None:
        """Unsubscribe with this turn's other changes."""
        self._unwant(self._start + channel.encode())

    def _unwant(self, name: bytes) -> None:
        self._wanted.pop(name, None)
        self._change(name)

    async def sync(self) -> None:
        """Wait for Redis' answers.

        Raises `TransportError` when it is not reachable, has not accepted something, or sends nothing for ``timeout``
        seconds.
        """
        if not (self._publisher.up and self._subscriber.up) or self._refusal:
            raise TransportError(f"{self!r} is not reachable: {self._reason or 'not started'}")
        lost = self.lost
        await self._reached(self._publisher, self._taken)
        if self.lost != lost:
            raise TransportError(f"{self!r} did not accept what was published: {self._reason or self._refused_last}")
        if not self._subscriber.up:
            raise TransportError(f"{self!r} is not reachable: {self._reason}")
        await self._reached(self._subscriber, self._ping_subscriber())

    async def _flushed(self) -> None:
        """Return once Redis has all that was published before. Raises `TransportError` when it cannot be reached."""
        if not self._publisher.up or self._refusal:
            raise TransportError(f"{self!r} is not reachable: {self._reason or 'not started'}")
        await self._reached(self._publisher, self._taken)

    def _accepts(self, name: bytes) -> bool:
        """Whether a message to the channel can be taken at the moment."""
        if not self._publisher.up or self._refusal:
            return False
        if name in self._denied:
            if asyncio.get_running_loop().time() < self._denied[name]:
                return False
            del self._denied[name]
            self._look_hindered()
        return True

    def _look_hindered(self) -> None:
        self._hindered = not self._publisher.up or bool(self._refusal or self._denied)

    # -- publishing

    async def _publish_session(self, connection: AbstractConnection) -> None:
        """Pipelines, one after the other: what is published while one is under way makes the next."""
        line = self._publisher
        self._role_commands = list(_ROLE_COMMANDS)
        await self._probe(connection)
        if self.history.used:
            await self._load(connection)
        line.set_up(True)
        while True:
            while not self._pending and not self._probe_due:
                self._overflowing = False
                self._work.clear()
                await self._work.wait()
            if self._probe_due:
                await self._probe(connection)
            if self.history.load_due:
                await self._load(connection)
            batch: list[bytes] = []
            size = 0
            while self._pending and size < _BATCH_BYTES and len(batch) < _BATCH_MESSAGES:
                batch.append(self._pending.popleft())
                size += len(batch[-1])
            if not batch:
                continue
            self._in_flight = len(batch)
            with line.owed():
                await _send(connection, b"".join(batch))
                unknown: list[Scripted] = []
                for command in batch:
                    refusal = await self._answer(connection)
                    if refusal.startswith("NOSCRIPT") and isinstance(command, Scripted):
                        unknown.append(command)  # somebody has made Redis forget the script
                        continue
                    self._in_flight -= 1
                    if refusal:
                        self.lost += 1
                        self._refuse_message(command, refusal)
                for scripted in unknown:
                    await _send(connection, scripted.whole)
                    refusal = await self._answer(connection)
                    self._in_flight -= 1
                    if refusal:
                        self.lost += 1
                        self._refuse_message(scripted, refusal)
            # Until here they count as waiting: a Redis that does not answer must not be fed without end.
            self._pending_bytes -= size
            self._settled += len(batch)
            self._wake(line, self._settled)

    async def _load(self, connection: AbstractConnection) -> None:
        """Let Redis know the script. If that is not allowed, each message brings it along."""
        self.history.load_due = False
        with self._publisher.owed():
            await _send(connection, self.history.load)
            if refusal := await self._answer(connection):
                log.warning("%r: the script for histories was not loaded: %s", self, refusal)

    async def _probe(self, connection: AbstractConnection) -> None:
        """Publish a message to ourselves, and see that this is a primary."""
        self._probe_due = False
        self._probes = number = self._probes + 1
        with self._publisher.owed():
            replica = await self._is_replica(connection)
            await _send(connection, _command(b"PUBLISH", self._loop_channel, b"%d" % number))
            refusal = await self._answer(connection)
        if not refusal and replica:
            refusal = "READONLY: it is a replica; what is published there does not reach the clients of its primary"
        suspects, self._suspects = self._suspects, {}
        if not refusal:
            self._accepted = number
            for name, reason in suspects.items():  # it does accept messages, just not these
                self._deny(name, reason)
            if self._subscriber.up:
                self._check = (number, self._ping_subscriber())
        self._refuse(refusal)

    async def _is_replica(self, connection: AbstractConnection) -> bool:
        """Whether it is known to be one, by the first of several commands that it knows and we may use."""
        from redis.exceptions import ResponseError

        while self._role_commands:
            await _send(connection, self._role_commands[0])
            try:
                answer = await connection.read_response(disable_decoding=True)
            except ResponseError:
                del self._role_commands[0]
                continue
            if isinstance(answer, bytes):  # INFO: lines of text
                return re.search(rb"^role:slave\r?$", answer, re.MULTILINE) is not None
            if isinstance(answer, list) and len(answer) > 1 and answer[0] in (b"master", b"slave", b"sentinel"):
                return bool(answer[0] == b"slave")  # ROLE
            pairs = dict(zip(answer[::2], answer[1::2], strict=False)) if isinstance(answer, list) else {}
            return pairs.get(b"role") in (b"replica", b"slave")  # HELLO
        return False

    async def _answer(self, connection: AbstractConnection) -> str:
        """Read the answer to a PUBLISH: why it was not accepted, or an empty string."""
        from redis.exceptions import ResponseError

        try:
            await connection.read_response()
        except ResponseError as error:
            # redis-py drops the word that Redis begins with.
            name = {
                "NoPermissionError": "NOPERM",
                "NoScriptError": "NOSCRIPT",
                "OutOfMemoryError": "OOM",
                "ReadOnlyError": "READONLY",
            }
            return " ".join(filter(None, (name.get(type(error).__name__), str(error))))
        return ""

    def _refuse_message(self, command: bytes, reason: str) -> None:
        """Redis did not accept a message: because of its channel, or it accepts none."""
        self._refused_last = reason
        name = command.channel if isinstance(command, Scripted) else command.split(b"\r\n", 5)[4]
        if reason.startswith("NOPERM") and "channel" in reason:
            self._deny(name, reason)
            return
        if len(self._suspects) < _DENIED:
            self._suspects[name] = reason
        self._probe_due = True
        self._refuse(reason)

    def _deny(self, name: bytes, reason: str) -> None:
        """Take nothing for this channel for a while: all others are well, and so is the node."""
        self._denied[name] = asyncio.get_running_loop().time() + _DENIED_FOR
        if len(self._denied) > _DENIED:
            del self._denied[next(iter(self._denied))]
        self._look_hindered()
        if name in self._complained or len(self._complained) == _DENIED:
            return
        self._complained.add(name)
        kept = name.startswith(b"{")
        start = name[: len(self._start) + kept].decode()
        log.error(
            "%r: Redis does not accept what is published to the channel %r, which reaches %s: %s%s",
            self,
            name[:200].decode(errors="replace"),
            "nobody, as it cannot be kept" if kept else "local sockets only",
            reason,
            f". Allow its user every channel{' and key' if kept else ''} that begins with {start!r}"
            if reason.startswith("NOPERM")
            else "",
        )

    def _refuse(self, reason: str) -> None:
        if reason != self._refusal:
            self._refusal = reason
            self._look_hindered()
            if reason:
                log.error("%r does not accept what is published: %s", self, reason)
                self._first_attempt_over()
            self._look_ready()

    def _drop_pending(self) -> None:
        """The publisher's connection is gone: what waited is lost, not sent late."""
        lost = self._in_flight + len(self._pending)
        self._in_flight = 0
        self.lost += lost
        self._pending.clear()
        self._pending_bytes = 0
        self._settled = self._taken

    # -- subscribing

    async def _subscribe_session(self, connection: AbstractConnection) -> None:
        """Everything that is wanted is asked for again; then changes are written while messages are read."""
        self._pongs = self._pings  # older pings will not be answered any more
        self._held.clear()
        self._changed = dict.fromkeys(self._wanted)
        self._ping_subscriber()
        loop = asyncio.get_running_loop()
        work = [loop.create_task(each) for each in (self._read(connection), self._write(connection))]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _read(self, connection: AbstractConnection) -> None:
        line = self._subscriber
        start = len(self._start)
        followed, entries = self.history.followed, b"{" + self._start
        turn = 0
        while True:
            answer = await connection.read_response(disable_decoding=True)
            line.heard = True  # also when it came long ago: then it is we who are slow
            if isinstance(answer, list) and answer[0] == b"message":
                if answer[1] == self._loop_channel:
                    self._probe_returned(answer[2])
                elif (receiver := followed.get(answer[1])) is not None:
                    self.history.arrived(receiver, answer[2])
                elif self._receiver is not None and not answer[1].startswith(entries):
                    self._receiver.message_received(answer[1][start:].decode(errors="replace"), answer[2])
            else:
                # To a ping: ["pong", number] when something is subscribed to, else the number itself.
                pong = answer[1] if isinstance(answer, list) and answer[0] == b"pong" else answer
                if isinstance(pong, bytes) and pong.isdigit():
                    self._pongs = int(pong)
                    if not line.up:
                        line.set_up(True)
                    if self._check is not None and self._pongs >= self._check[1]:
                        self._look_whether_it_came_back(self._check[0])
                    self._wake(line, self._pongs)
            turn += 1
            if turn == _TURN:
                turn = 0
                await asyncio.sleep(0)

    def _probe_returned(self, number: bytes) -> None:
        if number.isdigit():
            self._returned = max(self._returned, int(number))
            self._unreturned = 0
            self._look_ready()

    def _look_whether_it_came_back(self, probe: int) -> None:
        """Redis answers a ping that came after it took the probe. What has not come back before, never will.

        While much is waiting to be read here, the answer has to wait too: being behind is no reason to be not ready.
        """
        self._check = None
        if self._returned >= probe:
            return
        self._unreturned += 1
        if self._unreturned >= _UNRETURNED and self._fresh_from <= self._returned:
            self._fresh_from = self._accepted + 1  # until then it is not ready
        self._look_ready()

    async def _write(self, connection: AbstractConnection) -> None:
        written = 0
        while True:
            # Taken first: a ping is written after every subscription that was wanted before it.
            ping = self._pings
            changed, self._changed = self._changed, {}
            add = [name for name in changed if name in self._wanted and name not in self._held]
            drop = [name for name in changed if name not in self._wanted and name in self._held]
            self._held.update(add)
            self._held.difference_update(drop)
            for verb, names in ((b"SUBSCRIBE", add), (b"UNSUBSCRIBE", drop)):
                for i in range(0, len(names), _BATCH_MESSAGES):
                    await _send(connection, _command(verb, *names[i : i + _BATCH_MESSAGES]))
            if written != ping:
                written = ping
                await _send(connection, _command(b"PING", b"%d" % written))
            if not self._changed and written == self._pings:
                self._asked.clear()
                await self._asked.wait()

    def _change(self, name: bytes) -> None:
        self._changed[name] = None
        self._asked.set()

    def _ping_subscriber(self) -> int:
        self._pings += 1
        self._asked.set()
        return self._pings

    # -- both

    async def _watch(self) -> None:
        """Notices connections that are dead without saying so, and asks for signs of life."""
        loop = asyncio.get_running_loop()
        probe_at = loop.time() + _PROBE
        while True:
            await asyncio.sleep(_TICK)
            self._publisher.tick(owes=self._publisher.owes)
            self._subscriber.tick(owes=self._pongs < self._pings)
            if loop.time() >= probe_at:
                probe_at = loop.time() + _PROBE
                if self._subscriber.connected:
                    self._ping_subscriber()
                if self._publisher.up:
                    self._probe_due = True
                    self._work.set()
                self._look_ready()

    async def _reached(self, line: _Line, number: int) -> None:
        """Wait until the line has settled this much. Raises `TransportError` when it breaks before."""
        if (self._settled if line is self._publisher else self._pongs) >= number:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((line, number, future))
        await future

    def _wake(self, line: _Line, number: int) -> None:
        if not self._waiting:
            return
        left = []
        for entry in self._waiting:
            if entry[2].done():
                continue
            if entry[0] is line and entry[1] <= number:
                entry[2].set_result(None)
            else:
                left.append(entry)
        self._waiting = left

    def _line_changed(self, line: _Line) -> None:
        self._look_hindered()
        if not line.up:
            self._check = None
            self._unreturned = 0
            if line is self._publisher:
                self._drop_pending()
            # Whatever happened to Redis, the publisher is to find out now; and only what it sends from now on counts.
            self._fresh_from = self._probes + 1
            self._probe_due = True
            self._work.set()
            error = TransportError(f"{self!r}: the connection was lost: {self._reason}")
            for waiting, _, future in self._waiting:
                if waiting is line and not future.done():
                    future.set_exception(error)
            self._waiting = [entry for entry in self._waiting if entry[0] is not line]
            self._first_attempt_over()
        elif line is self._subscriber:
            self._probe_due = True  # the last one was sent before anybody here could receive it
            self._work.set()
        self._look_ready()

    def _first_attempt_over(self) -> None:
        if self._tried is not None and not self._tried.done():
            self._tried.set_result(None)

    def _look_ready(self) -> None:
        ready = (
            self._receiver is not None
            and not self._refusal
            and self._returned >= self._fresh_from
            and all(line.up and not line.slow for line in (self._publisher, self._subscriber))
        )
        reason = "" if ready else self._reason or "no answer yet"
        if ready == self._ready:
            if reason != self._told:
                self._tell(reason)
            return
        self._ready = ready
        if ready:
            log.info("%r is ready", self)
            self._first_attempt_over()
        else:
            log.warning("%r is not ready: %s", self, reason)
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        self._told = reason
        if self._receiver is not None and self._started:
            self._receiver.ready_changed(self._ready, reason)

    @property
    def _reason(self) -> str:
        """Why it is not ready."""
        for line in (self._publisher, self._subscriber):
            if line.reason:
                return line.reason
        if self._refusal:
            return self._refusal
        if self._returned < self._fresh_from and self._publisher.up and self._subscriber.up:
            if self._unreturned:
                return "what is published does not come back: do both connections reach the same Redis?"
            return "its first message has not come back yet"
        return ""

    def __eq__(self, other: object) -> bool:
        """Whether the other one connects to the same channels in the same way."""
        return isinstance(other, RedisTransport) and self._configuration == other._configuration

    def __hash__(self) -> int:
        return hash(self._configuration)

    @property
    def _configuration(self) -> tuple[object, ...]:
        return (self._url, self.prefix, self.timeout, self.max_pending_bytes)

    def __repr__(self) -> str:
        kwargs = self._pool.connection_kwargs  # the URL itself may hold a password
        where = kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}"
        return f"<RedisTransport {where} {self.prefix!r}>"


class _Line:
    """One connection to Redis, made again whenever it breaks, for as long as the transport runs.

    A connection that owes an answer and sends nothing is slow after a while, and later broken. Silence is counted in
    ticks of our own loop: while that stands still, as beside a handler that blocks it, nothing is counted, and what
    came meanwhile is read before anything is.
    """

    def __init__(self, name: str, transport: RedisTransport) -> None:
        self._name = name
        self._transport = transport
        self._task: asyncio.Task[None] | None = None
        self._session: asyncio.Task[None] | None = None
        self.connected = False
        self.up = False  # it works
        self.slow = False
        self.reason = ""  # why it is not up, or slow
        self.owes = False  # Redis has been asked something, and has not answered yet
        self.heard = False  # something arrived, or was read, since the last tick
        self._silent = 0.0  # seconds

    def start(self, session: Callable[[AbstractConnection], Coroutine[Any, Any, None]]) -> None:
        """Connect, in the background."""
        self._task = asyncio.get_running_loop().create_task(self._keep(session))

    async def stop(self) -> None:
        """Disconnect."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            self.set_up(False)

    async def _keep(self, session: Callable[[AbstractConnection], Coroutine[Any, Any, None]]) -> None:
        from redis.exceptions import RedisError

        loop = asyncio.get_running_loop()
        timeout = self._transport.timeout
        wait = 0.0
        while True:
            connection: AbstractConnection | None = None
            began = loop.time()
            worked = False
            try:
                connection = self._transport._pool.make_connection()  # type: ignore[no-untyped-call]
                async with asyncio.timeout(timeout):
                    await connection.connect()
                self._listen_to(connection)
                self._session = loop.create_task(session(connection))
                try:
                    # A cancellation that is seen here is of this task: the watch cancels the session only.
                    await asyncio.wait([self._session])
                finally:
                    worked = self.up
                    self._session.cancel()
                if self._session.cancelled():
                    raise TimeoutError
                self._session.result()
            except TimeoutError:
                self._down(f"no answer within {timeout:g} s")
            except (RedisError, OSError) as error:
                tried = self._transport._tried
                if _hopeless(error) and tried is not None and not tried.done():
                    tried.set_exception(ConfigurationError(f"{self._transport!r} refuses: {error}"))
                    return
                self._down(str(error) or type(error).__name__)
            except Exception as error:  # the edge: whatever it is, the node goes on and says so
                log.exception("%r: the %s failed", self._transport, self._name)
                self._down(f"{type(error).__name__}: {error}")
            finally:
                self.connected = False
                if connection is not None:
                    with contextlib.suppress(RedisError, OSError, TimeoutError):
                        await connection.disconnect(nowait=True)
            # Only a session that worked for a while is a reason to hurry.
            if worked and loop.time() - began > _LASTED:
                wait = 0.0
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(max(_FIRST_WAIT, wait * 2), _LONGEST_WAIT)

    def _listen_to(self, connection: AbstractConnection) -> None:
        """Notice each byte that arrives, also of a message that takes long."""
        self.connected = True
        self.heard, self._silent = True, 0.0
        reader = connection._reader  # redis-py has no public way to it
        if reader is not None:
            feed = reader.feed_data

            def feed_and_hear(data: bytes) -> None:
                self.heard = True
                feed(data)

            reader.feed_data = feed_and_hear  # type: ignore[method-assign, assignment]

    def _down(self, reason: str) -> None:
        self.reason = reason
        self.set_up(False)

    def set_up(self, up: bool) -> None:
        """It works from now on, or no more."""
        self.up = up
        self.slow = False
        if up:
            self.reason = ""
        self._transport._line_changed(self)

    @contextlib.contextmanager
    def owed(self) -> Iterator[None]:
        """Around a question and its answer."""
        self.owes = True
        self._silent = 0.0
        try:
            yield
        finally:
            self.owes = False

    def tick(self, *, owes: bool) -> None:
        """A moment has passed: slow after a second of silence, broken after the transport's ``timeout``."""
        if not self.connected:
            return
        if self.heard or not owes:
            self.heard, self._silent = False, 0.0
            if self.slow:
                self.slow = False
                self.reason = ""
                self._transport._look_ready()
            return
        self._silent += _TICK
        if self._silent >= self._transport.timeout:
            if self._session is not None:
                self._session.cancel()
        elif self._silent >= _SLOW and not self.slow:
            self.slow = True
            self.reason = f"no answer for more than {_SLOW} s"
            self._transport._look_ready()


def _pool(url: str, timeout: float) -> ConnectionPool:
    """redis-py's understanding of the URL. Nothing connects yet."""
    try:
        from redis.asyncio import ConnectionPool
    except ImportError:
        raise ConfigurationError("RedisTransport needs redis-py: pip install 'asena_tornado[redis]'") from None
    try:
        # Attempts are repeated by us: a command that redis-py repeated could be published twice. RESP2, because
        # there the two kinds of connection need no telling apart of answers and pushed messages.
        pool = ConnectionPool.from_url(url, protocol=2, socket_timeout=None, socket_connect_timeout=timeout)
    except (ValueError, TypeError) as error:
        # What it complains of may be a piece of a password with a slash in it.
        why = (
            ". In a user's name and a password, every character but letters and digits has to be percent-encoded, "
            "as %2F for a slash"
            if "@" in url
            else f": {error}"
        )
        raise ConfigurationError(
            f"RedisTransport cannot use this URL{why}. It looks like redis://[[user]:password@]host[:port], "
            "rediss://… for TLS, or unix://path"
        ) from None
    kwargs = pool.connection_kwargs
    if int(kwargs.get("protocol") or 2) != 2 or kwargs.get("socket_timeout") is not None:
        raise ConfigurationError(
            "RedisTransport cannot use a URL with protocol or socket_timeout: it speaks RESP2, and how long Redis may "
            "be silent is its own argument: RedisTransport(…, timeout=…)"
        )
    try:
        pool.make_connection()  # type: ignore[no-untyped-call]  # this is where it says what options it does not know
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"RedisTransport cannot use an option in this URL, after the question mark: {error}. redis-py's Connection "
            "names those that there are"
        ) from None
    return pool


def _hopeless(error: Exception) -> bool:
    """Whether Redis would say the same again tomorrow: to a wrong password, or a database that it does not have."""
    from redis.exceptions import AuthenticationError

    return isinstance(error, AuthenticationError) or "db index" in str(error).lower()


def _command(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


_ROLE_COMMANDS = (_command(b"HELLO", b"2"), _command(b"ROLE"), _command(b"INFO", b"replication"))


async def _send(connection: AbstractConnection, data: bytes) -> None:
    await connection.send_packed_command([data], check_health=False)


__all__ = ["RedisTransport"]
