"""From the inbox to the hooks: one task per connection hands its service one message at a time.

Handlers that are concurrent run in tasks beside it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from inspect import isawaitable, iscoroutine
from typing import Any, Protocol

from ..errors import InvalidMessageError, SocketClosedError, bounded, must_propagate
from ..hosting import pass_interrupt_on
from ..websocket.calls import Concurrent
from ..websocket.door import serving
from ..websocket.events import one_line
from ..websocket.namespace import Namespace
from ..websocket.options import WebSocketOptions
from ..websocket.sockets import ReadyState, Socket
from .keepalive import Keepalive

log = logging.getLogger("asena_tornado")

_OPEN = ReadyState.OPEN  # for each message: before Python 3.12 it takes long to find in its enumeration


class Source(Protocol):
    """A connection, as the dispatch sees it."""

    state: ReadyState
    socket: Socket[Any]
    code: int | None  # of the close, once it has begun
    reason: str

    @property
    def peer_is_gone(self) -> bool:
        """Whether the client has sent its last byte."""
        ...

    def hold(self) -> None:
        """Parse no more messages: too many wait here."""
        ...

    def release(self) -> None:
        """Parse what was held back, and read on."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Begin the close handshake."""
        ...

    def handled(self) -> None:
        """``on_close`` has run."""
        ...


class Handling(Protocol):
    """Whose ``hooks`` are asked what a message is, and get it: the namespace, or a protocol's session."""

    @property
    def hooks(self) -> Handlers:
        """The hooks there are now."""
        ...


class Handlers(Protocol):
    """As far as messages are concerned, what `websocket.hooks.Hooks` are."""

    @property
    def message(self) -> Callable[..., Any]:
        """Takes the socket and what `decode` makes of a message."""
        ...

    @property
    def decode(self) -> Callable[[str | bytes], Any]:
        """Makes of a message what `message` takes."""
        ...


class _Beside:
    """What runs beside a connection's task: other hooks, and calls of concurrent handlers. Made when there is any."""

    __slots__ = ("calls", "cleared", "ended", "hooks")

    def __init__(self) -> None:
        self.hooks: set[asyncio.Future[Any]] = set()
        self.calls: set[asyncio.Task[None]] = set()
        self.ended: asyncio.Future[None] | None = None  # for who waits until one of the calls has ended
        self.cleared = False  # nothing that waits is to begin any more


class Dispatch:
    """Runs the hooks for one connection: ``on_open``, then each message in order, then ``on_close``."""

    __slots__ = (
        "_background",
        "_beside",
        "_context",
        "_done",
        "_full",
        "_handling",
        "_inbox",
        "_keepalive",
        "_loop",
        "_most",
        "_most_size",
        "_namespace",
        "_options",
        "_source",
        "_stopping",
        "_task",
        "_timer",
        "_wake",
        "last_error",
        "message_at",
        "messages_in",
        "size",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        source: Source,
        *,
        namespace: Namespace,
        options: WebSocketOptions,
        keepalive: Keepalive,
    ) -> None:
        self._loop = loop
        self._source = source
        self._namespace = namespace
        self._handling: Handling = namespace
        self._options = options
        self._keepalive = keepalive
        self._inbox: deque[str | bytes] = deque()
        self.size = 0  # of what is in the inbox; bytes, or characters of text
        self._most, self._most_size = options.max_queued_messages, options.max_queued_bytes
        self._full = False
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None  # while the task waits for a message
        self._context: contextvars.Context | None = None  # the task's
        self._beside: contextvars.Context | None = None  # that of the hooks that run beside it
        self._stopping = False
        self._done: tuple[Callable[[], None], float] | None = None  # see `when_done`, and the loop's time
        self._timer: asyncio.TimerHandle | None = None
        self._background: _Beside | None = None
        self.messages_in = 0
        self.message_at = loop.time()
        self.last_error: str | None = None

    def start(self) -> None:
        """Run ``on_open``."""
        self._context = contextvars.copy_context()
        self._task = self._loop.create_task(self._serve(), context=self._context)

    # -- what arrives

    @property
    def room(self) -> tuple[int, int]:
        """How many more messages, and of how many bytes, until reading pauses; at least 1 of either."""
        count, size = self._most - len(self._inbox), self._most_size - self.size
        return count if count > 0 else 1, size if size > 0 else 1

    def messages_received(self, messages: list[str | bytes], size: int) -> None:
        """Whole messages, from the parser, of ``size`` in all: no more than there is `room` for."""
        source = self._source
        if source.state is not _OPEN:
            return
        self.messages_in += len(messages)
        if self._namespace.events.watched:
            for data in messages:
                self._show(data)
        self.message_at = self._keepalive.now
        inbox = self._inbox
        inbox.extend(messages)
        self.size += size
        if len(inbox) >= self._most or self.size >= self._most_size:
            if source.peer_is_gone:
                # The last bytes of a client that has gone; there will be no time to handle them all.
                self.size -= len(inbox.pop())
            else:
                self._full = True
                source.hold()
        wake = self._wake
        if wake is not None and not wake.done():  # done: cancelled with the task, which has not run since
            self._wake = None
            wake.set_result(None)

    def _show(self, data: str | bytes) -> None:
        """Show a message to those who watch."""
        self._namespace.events.received(self._source.socket.id, data)

    def notify(self, hook: Callable[..., Any] | None, *args: Any) -> None:
        """Call a hook beside the message handler: it may be what that handler waits for."""
        # A flood of pings must not become a flood of tasks.
        if hook is None or (self._background and len(self._background.hooks) >= self._options.max_queued_messages):
            return
        if self._beside is None:
            # Of its own, as all sockets are read in one context: one client's variables are not another's.
            self._beside = contextvars.Context() if self._context is None else self._context.copy()
        self._beside.run(self._notify, hook, *args)

    def _notify(self, hook: Callable[..., Any], *args: Any) -> None:
        try:
            result = hook(self._source.socket, *args)
        except BaseException as error:  # noqa: BLE001  # a hook's: it goes to on_error
            self._in_background(self._handler_failed(error))
            return
        if result is not None and isawaitable(result):
            task = self._in_background(self._run(lambda: result))
            if iscoroutine(result):
                # Cancelled along with its socket, it may not even have begun: do not warn of it.
                task.add_done_callback(lambda _: result.close())

    # -- the end

    @property
    def waiting(self) -> bool:
        """Whether there are messages that have not been handed over yet."""
        return bool(self._inbox)

    @property
    def pending_calls(self) -> int:
        """How many handlers run."""
        busy = self._task is not None and self._wake is None
        return busy + (0 if self._background is None else len(self._background.calls))

    @property
    def ended(self) -> bool:
        """Whether ``on_close`` has run."""
        return self._task is None

    @property
    def at_work(self) -> list[asyncio.Future[Any]]:
        """The tasks in which a hook runs, or is about to."""
        beside = self._background
        tasks = [] if beside is None else [*beside.hooks, *beside.calls]
        # `_wake` is there while the task waits for a message.
        if self._task is not None and (self._wake is None or self._wake.done() or self._inbox or self._full):
            tasks.append(self._task)
        return tasks

    def clear(self) -> None:
        """Forget the messages that wait."""
        self._inbox.clear()
        self.size = 0
        self._full = False
        if self._background is not None:
            self._background.cleared = True

    def when_done(self, act: Callable[[], None], grace: float) -> None:
        """Act once the handler is done with what has arrived, after ``grace`` seconds at most."""
        self._done = act, self._loop.time() + grace
        if self._wake is not None and not self._inbox:
            if not self._has_calls:
                act()
                return
            self._awake()
        self._timer = self._loop.call_later(grace, self._now_done)

    def _now_done(self) -> None:
        assert self._done is not None
        self._stop_timer()
        self._done[0]()

    def end(self) -> None:
        """No more messages will come. Let the handler finish those that came, within ``handler_grace``."""
        idle = self._wake is not None and not self._has_calls
        self._awake()
        if not idle and not self._stopping and self._task is not None:
            grace = self._options.handler_grace
            if self._done is not None:
                grace = max(0.0, self._done[1] - self._loop.time())  # what is left of it
                self._stop_timer()
            self._timer = self._loop.call_later(grace, self._cancel_late_handler)
        self._stopping = True

    def _awake(self) -> None:
        if self._wake is not None:
            if not self._wake.done():
                self._wake.set_result(None)
            self._wake = None

    def _cancel_late_handler(self) -> None:
        if self._task is not None:
            log.warning(
                "%s: a handler is cancelled: its client is gone, and handler_grace is over", self._source.socket
            )
            self._task.cancel()

    def cancel(self) -> None:
        """Cancel a handler that runs."""
        if self._task is not None:
            self._task.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- the task

    async def _serve(self) -> None:
        serving.set(self._namespace.door)
        try:
            try:
                await self._serve_messages()
            except asyncio.CancelledError:
                # By us, because the client is gone; or from outside, because the loop is going down.
                self._wake = None
                self._source.close(1001, "going away")
                asyncio.current_task().uncancel()  # type: ignore[union-attr]  # a coroutine of a task has one
                await self._cancel_calls()
            self._stop_timer()
            await self._run_on_close()
        finally:
            for task in () if self._background is None else self._background.hooks:
                task.cancel()
            self._task = None
            self._source.handled()

    async def _greet(self) -> None:
        """What comes before the first message: ``on_open``."""
        hook = self._namespace.hooks.open
        if hook is not None:
            await self._run(hook, self._source.socket)

    async def _serve_messages(self) -> None:
        source = self._source
        socket = source.socket
        handling = self._handling
        inbox = self._inbox
        await self._greet()
        while True:
            while inbox or self._full:
                if not inbox:
                    if self._done is not None:
                        break
                    # A chunk may hold thousands of messages: others get their turn in between.
                    await asyncio.sleep(0)
                    self._full = False
                    source.release()
                    continue
                data = inbox.popleft()
                self.size -= len(data)
                hooks = handling.hooks
                try:
                    result = hooks.message(socket, hooks.decode(data))
                    if result is not None:
                        if type(result) is Concurrent:
                            await self._begin(self._handle, result)
                        elif isawaitable(result):
                            await result
                except InvalidMessageError as error:
                    self._note(error)
                    await self._run(self._namespace.hooks.invalid, socket, error)
                except BaseException as error:  # noqa: BLE001  # a hook's: it goes to on_error
                    await self._handler_failed(error)
            if self._done is not None or self._stopping:
                while self._has_calls:
                    await self._one_call_ended()
                if inbox:
                    continue
            if self._done is not None and source.state is ReadyState.OPEN:
                self._now_done()
            if self._stopping:
                return
            self._wake = self._loop.create_future()
            await self._wake

    # -- calls of concurrent handlers

    @property
    def _has_calls(self) -> bool:
        return self._background is not None and bool(self._background.calls)

    async def _begin(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Do the work beside what comes next, once fewer calls than ``max_pending_calls`` run."""
        if self._background is None:
            self._background = _Beside()
        calls = self._background.calls
        while len(calls) >= self._options.max_pending_calls:
            await self._one_call_ended()
            if self._background.cleared:
                return
        task = self._loop.create_task(work(*args))
        calls.add(task)
        task.add_done_callback(self._call_ended)

    def _call_ended(self, task: asyncio.Task[None]) -> None:
        assert self._background is not None
        self._background.calls.discard(task)
        ended, self._background.ended = self._background.ended, None
        if ended is not None and not ended.done():
            ended.set_result(None)

    async def _one_call_ended(self) -> None:
        assert self._background is not None
        ended = self._background.ended = self._loop.create_future()
        await ended

    async def _cancel_calls(self) -> None:
        """Cancel them, and wait for their ends."""
        while self._background is not None and self._background.calls:
            for task in self._background.calls:
                task.cancel()
            try:
                while self._has_calls:
                    await self._one_call_ended()
            except asyncio.CancelledError:
                asyncio.current_task().uncancel()  # type: ignore[union-attr]  # a coroutine of a task has one

    async def _handle(self, call: Concurrent) -> None:
        """Run the handler of a message."""
        socket = self._source.socket
        try:
            result = call.call(socket, call.value)
            if isawaitable(result):
                await result
        except InvalidMessageError as error:
            self._note(error)
            await self._run(self._namespace.hooks.invalid, socket, error)
        except BaseException as error:  # noqa: BLE001  # a hook's: it goes to on_error
            await self._handler_failed(error)

    async def _run_on_close(self) -> None:
        source, namespace = self._source, self._namespace
        hook = namespace.hooks.close
        if hook is None and not namespace.is_releasing(source.socket):
            return
        try:
            while namespace.is_releasing(source.socket):  # noqa: ASYNC110  # every turn of the loop brings it on
                await asyncio.sleep(0)
            async with asyncio.timeout(self._options.on_close_timeout):
                if hook is not None:
                    await self._run(hook, source.socket, source.code or 1006, source.reason)
        except (TimeoutError, asyncio.CancelledError):
            log.error("%s: on_close did not finish within %s s", source.socket, self._options.on_close_timeout)

    async def _run(self, hook: Callable[..., Any], *args: Any) -> None:
        """Call a hook, sync or async; what it raises goes to ``on_error``."""
        try:
            result = hook(*args)
            if result is not None and isawaitable(result):
                await result
        except BaseException as error:  # noqa: BLE001  # a hook's: it goes to on_error
            await self._handler_failed(error)

    async def _handler_failed(self, error: BaseException) -> None:
        if must_propagate(error):
            raise error
        if isinstance(error, KeyboardInterrupt):
            pass_interrupt_on()
        self._note(error)
        socket = self._source.socket
        if isinstance(error, SocketClosedError) and self._source.state is not ReadyState.OPEN:
            log.info("%s: the client went away while its handler was running: %s", socket, error)
        else:
            failure = self._namespace.events.failed(socket.id, error)
            log.error("%s raised %s (%s)", failure.where, failure.error, socket, exc_info=bounded(error))
        try:
            result = self._namespace.hooks.error(socket, error)
            if result is not None and isawaitable(result):
                await result
        except BaseException as second:
            if must_propagate(second):
                raise
            log.error("%s: on_error failed as well", socket, exc_info=bounded(second))
            self._source.close(1011, "internal error")

    def _note(self, error: BaseException) -> None:
        self.last_error = one_line(error)
        self._namespace.events.record("error", self._source.socket.id, detail=self.last_error)

    def _in_background(self, work: Awaitable[Any]) -> asyncio.Future[Any]:
        task = asyncio.ensure_future(work)
        if self._background is None:
            self._background = _Beside()
        self._background.hooks.add(task)
        task.add_done_callback(self._background.hooks.discard)
        return task


__all__ = ["Dispatch", "Source"]
