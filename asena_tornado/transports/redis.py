"""`RedisTransport`: Redis (or Valkey) carries the messages, by publish and subscribe."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, ServerStateError, TransportError
from .contract import Receiver

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection, ConnectionPool

log = logging.getLogger("asena_tornado")

_IDLE = 1.0  # seconds between pings of a silent connection
_SLOW = 1.0  # seconds without an answer after which Redis does not count as ready
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 2.0  # seconds between attempts to connect
_BATCH_BYTES = 256 * 1024  # of one pipeline, so that its answer comes within a fraction of the time limit
_BATCH_MESSAGES = 1000
_TURN = 100  # messages taken in before everything else on the loop has its turn
_PATIENCE = 3.0  # seconds that starting waits for a Redis that does not answer
_DRAIN = 1.0  # seconds that stopping waits for what was published before


class RedisTransport:
    """Redis carries the rooms: ``AsenaServer(…, transport=RedisTransport("redis://localhost"))``.

    ``url``: ``redis://[[user]:password@]host[:port]``, ``rediss://`` for TLS (redis-py's options, such as
    ``?ssl_ca_certs=…``, may follow) or ``unix://path``. ``prefix``: of every channel's name; applications that
    share a Redis need different ones, as databases do not separate channels. ``timeout``: seconds without an answer
    after which a connection counts as lost; a shorter pause delays messages but loses none. ``max_pending_bytes``:
    what may wait for a slow Redis; past it `publish` refuses, counts (`refused`) and logs.

    Needs redis-py (``pip install 'asena_tornado[redis]'``) and nothing but PUBLISH, SUBSCRIBE and PING, so any
    server that speaks Redis' protocol will do. Order, loss and everything else: see `Transport`.
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
        self.refused = 0  # messages not taken: Redis away, or too much waiting
        self.lost = 0  # messages taken, but not known to have reached Redis when a connection broke
        self._url = url
        self._pool = _pool(url, timeout)
        self._start = f"{prefix}:".encode()
        self._receiver: Receiver | None = None
        self._publisher = _Line("publisher", self)
        self._subscriber = _Line("subscriber", self)
        self._ready = False
        self._overflowing = False
        # Published and waiting for the next pipeline: finished commands.
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._taken = self._settled = 0  # commands ever queued, and those answered or lost
        self._work = asyncio.Event()
        # Channels wanted, and those whose state at Redis has to be brought in line.
        self._wanted: dict[bytes, None] = {}
        self._changed: dict[bytes, None] = {}
        self._held: set[bytes] = set()
        self._asked = asyncio.Event()  # something is to be written to the subscriber's connection
        self._pings = 0
        self._waiting: list[tuple[_Line, int, asyncio.Future[None]]] = []

    # -- the contract

    @property
    def ready(self) -> bool:
        """Whether both connections stand, every channel is subscribed to, and Redis answers within a second."""
        return self._ready

    async def start(self, receiver: Receiver) -> None:
        """Connect; an address where nobody answers is tried again and again in the background."""
        if self._receiver is not None:
            raise ServerStateError("this RedisTransport is in use by another server: give each one of its own")
        self._receiver = receiver
        self._work, self._asked = asyncio.Event(), asyncio.Event()
        try:
            await asyncio.gather(
                self._publisher.start(self._publish_session), self._subscriber.start(self._subscribe_session)
            )
        except BaseException:
            await self.stop()
            raise
        if not self._ready:
            log.warning("%r: not reachable yet; sending locally until it is", self)

    async def stop(self) -> None:
        """Send what waits, for at most a second, and disconnect."""
        if self._receiver is None:
            return
        if self._publisher.up:
            with contextlib.suppress(TransportError, TimeoutError):
                await asyncio.wait_for(self._reached(self._publisher, self._taken), _DRAIN)
        self._receiver = None
        self._ready = False
        await asyncio.gather(self._publisher.stop(), self._subscriber.stop())
        self._wanted.clear()
        self._changed.clear()

    def publish(self, channel: str, payload: bytes) -> bool:
        """Queue it for the pipeline of this turn of the loop."""
        if not self._publisher.up:
            self.refused += 1
            return False
        name = self._start + channel.encode()
        # What redis-py's pack_command makes of it, at a tenth of the cost.
        command = b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(payload), payload)
        if self._pending_bytes + len(command) > self.max_pending_bytes and self._pending:
            self.refused += 1
            if not self._overflowing:
                self._overflowing = True
                log.error(
                    "%r: too slow: %s bytes wait already; what is published now reaches local sockets only",
                    self,
                    self._pending_bytes,
                )
            return False
        self._pending.append(command)
        self._pending_bytes += len(command)
        self._taken += 1
        self._work.set()
        return True

    def subscribe(self, channel: str) -> None:
        """Subscribe with this turn's other changes."""
        name = self._start + channel.encode()
        self._wanted[name] = None
        self._change(name)

    def unsubscribe(self, channel: str) -> None:
        """Unsubscribe with this turn's other changes."""
        name = self._start + channel.encode()
        self._wanted.pop(name, None)
        self._change(name)

    async def sync(self) -> None:
        """Wait for Redis' answers; raises `TransportError` after ``timeout`` seconds at the latest."""
        if not (self._publisher.up and self._subscriber.up):
            raise TransportError(f"{self!r} is not reachable: {self._reason or 'not started'}")
        try:
            async with asyncio.timeout(self.timeout):
                await self._reached(self._publisher, self._taken)
                if self._subscriber.up:
                    await self._reached(self._subscriber, self._ping_subscriber())
        except TimeoutError:
            raise TransportError(f"{self!r} did not answer within {self.timeout} s") from None

    # -- publishing

    async def _publish_session(self, connection: AbstractConnection) -> None:
        """Pipelines, one after the other: what is published while one is under way makes the next."""
        line = self._publisher
        await self._ping_publisher(connection)
        line.set_up(True)
        while True:
            if not self._pending:
                self._overflowing = False
                self._work.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_IDLE):
                        await self._work.wait()
                if not self._pending:
                    await self._ping_publisher(connection)
                    continue
            batch: list[bytes] = []
            size = 0
            while self._pending and size < _BATCH_BYTES and len(batch) < _BATCH_MESSAGES:
                batch.append(self._pending.popleft())
                size += len(batch[-1])
            line.in_flight = len(batch)
            async with line.asking(self.timeout):
                await _send(connection, b"".join(batch))
                for _ in batch:
                    await self._read_answer(connection)
                    line.in_flight -= 1
            # Until here they count as waiting: a Redis that does not answer must not be fed without end.
            self._pending_bytes -= size
            self._settle(len(batch))

    async def _ping_publisher(self, connection: AbstractConnection) -> None:
        async with self._publisher.asking(self.timeout):
            await _send(connection, _command(b"PING"))
            await connection.read_response()

    async def _read_answer(self, connection: AbstractConnection) -> None:
        from redis.exceptions import ResponseError

        try:
            await connection.read_response()
        except ResponseError as error:
            self.lost += 1
            log.error("%r refuses to publish: %s", self, error)

    def _drop_pending(self) -> None:
        """The publisher's connection is gone: what waited is lost, not sent late."""
        lost = self._publisher.in_flight + len(self._pending)
        self._publisher.in_flight = 0
        self.lost += lost
        self._pending.clear()
        self._pending_bytes = 0
        self._settled = self._taken

    def _settle(self, count: int) -> None:
        self._settled += count
        self._wake(self._publisher, self._settled)

    # -- subscribing

    async def _subscribe_session(self, connection: AbstractConnection) -> None:
        """Everything that is wanted is asked for again; then changes are written while messages are read."""
        line = self._subscriber
        line.answered = self._pings  # older pings will not be answered any more
        self._held.clear()
        self._changed = dict.fromkeys(self._wanted)
        self._ping_subscriber()
        loop = asyncio.get_running_loop()
        work = [loop.create_task(each) for each in (self._read(connection), self._write(connection), self._watch())]
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
        turn = 0
        while True:
            answer = await connection.read_response(disable_decoding=True)
            if isinstance(answer, list) and answer[0] == b"message":
                if self._receiver is not None:
                    self._receiver.message_received(answer[1][start:].decode(errors="replace"), answer[2])
            else:
                # To a ping: ["pong", number] when something is subscribed to, else the number itself.
                pong = answer[1] if isinstance(answer, list) and answer[0] == b"pong" else answer
                if isinstance(pong, bytes) and pong.isdigit():
                    line.answered = int(pong)
                    line.heard()
                    if not line.up:
                        line.set_up(True)
                    self._wake(line, line.answered)
            turn += 1
            if turn == _TURN:
                turn = 0
                await asyncio.sleep(0)

    async def _write(self, connection: AbstractConnection) -> None:
        written = 0
        while True:
            changed, self._changed = self._changed, {}
            add = [name for name in changed if name in self._wanted and name not in self._held]
            drop = [name for name in changed if name not in self._wanted and name in self._held]
            self._held.update(add)
            self._held.difference_update(drop)
            for verb, names in ((b"SUBSCRIBE", add), (b"UNSUBSCRIBE", drop)):
                for i in range(0, len(names), _BATCH_MESSAGES):
                    await _send(connection, _command(verb, *names[i : i + _BATCH_MESSAGES]))
            if written != self._pings:
                written = self._pings
                await _send(connection, _command(b"PING", b"%d" % written))
            if not self._changed and written == self._pings:
                self._asked.clear()
                await self._asked.wait()

    async def _watch(self) -> None:
        """Notices a connection that is dead without saying so, and a Redis that has stopped."""
        line = self._subscriber
        while True:
            sent = self._ping_subscriber()
            await asyncio.sleep(_IDLE)
            if line.answered < sent:
                line.be_slow()
            if line.silent_for() > self.timeout:
                raise TimeoutError

    def _change(self, name: bytes) -> None:
        self._changed[name] = None
        self._asked.set()

    def _ping_subscriber(self) -> int:
        self._pings += 1
        self._asked.set()
        return self._pings

    # -- both

    async def _reached(self, line: _Line, number: int) -> None:
        """Wait until the line has settled this much."""
        if (self._settled if line is self._publisher else line.answered) >= number:
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
        if not line.up:
            if line is self._publisher:
                self._drop_pending()
            else:
                self._work.set()  # whatever happened to Redis, the publisher is to find out now
            error = TransportError(f"{self!r}: the connection was lost: {self._reason}")
            for waiting, _, future in self._waiting:
                if waiting is line and not future.done():
                    future.set_exception(error)
            self._waiting = [entry for entry in self._waiting if entry[0] is not line]
        self._look_ready()

    def _look_ready(self) -> None:
        ready = self._receiver is not None and all(
            line.up and not line.slow for line in (self._publisher, self._subscriber)
        )
        if ready != self._ready:
            self._ready = ready
            reason = self._reason
            if ready:
                log.info("%r is ready", self)
            else:
                log.warning("%r is not ready: %s", self, reason)
            if self._receiver is not None:
                self._receiver.ready_changed(ready, reason)

    @property
    def _reason(self) -> str:
        """Why it is not ready."""
        return next((line.reason for line in (self._publisher, self._subscriber) if line.reason), "")

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
    """One connection to Redis, made again whenever it breaks, for as long as the transport runs."""

    def __init__(self, name: str, transport: RedisTransport) -> None:
        self._name = name
        self._transport = transport
        self._task: asyncio.Task[None] | None = None
        self.up = False
        self.slow = False
        self.reason = ""  # why it is not up, or slow
        self.in_flight = 0
        self.answered = 0
        self._heard_at = 0.0

    async def start(self, session: Callable[[AbstractConnection], Awaitable[None]]) -> None:
        """Returns after the first attempt, or three seconds; raises `ConfigurationError` if none can succeed."""
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tried = first
        self._task = asyncio.get_running_loop().create_task(self._keep(session))
        done, _ = await asyncio.wait([first], timeout=_PATIENCE)
        if done:
            first.result()
        else:
            first.cancel()  # the attempt goes on; whatever comes of it is no error of the start any more

    async def stop(self) -> None:
        """Disconnect."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            self.set_up(False)

    async def _keep(self, session: Callable[[AbstractConnection], Awaitable[None]]) -> None:
        from redis.exceptions import AuthenticationError, RedisError

        timeout = self._transport.timeout
        wait = 0.0
        while True:
            connection: AbstractConnection = self._transport._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(timeout):
                    await connection.connect()  # type: ignore[no-untyped-call]
                self.heard()
                wait = 0.0
                await session(connection)
            except TimeoutError:
                self._down(f"no answer within {timeout} s")
            except (RedisError, OSError) as error:
                if isinstance(error, AuthenticationError) and not self._tried.done():
                    self._tried.set_exception(ConfigurationError(f"{self._transport!r} refuses: {error}"))
                    return
                self._down(str(error) or type(error).__name__)
            except Exception as error:  # the edge: whatever it is, the node goes on and says so
                log.exception("%r: the %s failed", self._transport, self._name)
                self._down(f"{type(error).__name__}: {error}")
            finally:
                with contextlib.suppress(RedisError, OSError, TimeoutError):
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(max(_FIRST_WAIT, wait * 2), _LONGEST_WAIT)

    def _down(self, reason: str) -> None:
        self.reason = reason
        self.set_up(False)
        self._first_attempt_over()

    def set_up(self, up: bool) -> None:
        """Tell the transport."""
        self.up = up
        self.slow = False
        if up:
            self.reason = ""
        self._transport._line_changed(self)
        if up:
            self._first_attempt_over()

    def _first_attempt_over(self) -> None:
        if not self._tried.done():
            self._tried.set_result(None)

    @contextlib.asynccontextmanager
    async def asking(self, timeout: float) -> AsyncIterator[None]:
        """Around a question and its answer: slow after a second, ``TimeoutError`` after ``timeout``."""
        warning = asyncio.get_running_loop().call_later(_SLOW, self.be_slow)
        try:
            async with asyncio.timeout(timeout):
                yield
        finally:
            warning.cancel()
        self.heard()

    def heard(self) -> None:
        """Redis has answered."""
        self._heard_at = asyncio.get_running_loop().time()
        if self.slow:
            self.slow = False
            self.reason = ""
            self._transport._look_ready()

    def silent_for(self) -> float:
        """Seconds since Redis was heard."""
        return asyncio.get_running_loop().time() - self._heard_at

    def be_slow(self) -> None:
        """Redis lets us wait."""
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
        return ConnectionPool.from_url(url, protocol=2, socket_timeout=None, socket_connect_timeout=timeout)
    except (ValueError, TypeError) as error:
        # What it complains of may be a piece of a password with a slash in it.
        why = (
            "; of a password, what is no letter or number is written as %2F and the like"
            if "@" in url
            else f": {error}"
        )
        raise ConfigurationError(
            f"RedisTransport cannot use this URL{why}. It looks like redis://[[user]:password@]host[:port], "
            "rediss://… for TLS, or unix://path"
        ) from None


def _command(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


async def _send(connection: AbstractConnection, data: bytes) -> None:
    await connection.send_packed_command([data], check_health=False)


__all__ = ["RedisTransport"]
