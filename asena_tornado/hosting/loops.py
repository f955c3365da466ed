"""Where a loop lives, on a thread of its own or nested in another; and the one way in from other threads."""

from __future__ import annotations

import _thread
import asyncio
import concurrent.futures
import contextlib
import contextvars
import inspect
import logging
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from time import monotonic
from typing import Any, Literal, TypeVar

from ..errors import BackpressureError, ConfigurationError, ServerStateError, must_propagate
from .held import HeldLoop, wait_precisely
from .kernel import in_cell, waking, why_not_nested

log = logging.getLogger("asena_tornado")
R = TypeVar("R")

# Bytes of messages that other threads have handed over and the loop has not got to yet, and what each call counts for.
MAX_POSTED = 64 * 1024 * 1024
_CALL_SIZE = 500
PATIENCE = 30.0  # seconds that a thread waits for room

LoopKind = Literal["auto", "asyncio", "uvloop"]


class LoopDoor:
    """The way to one running loop from any thread. A server's state changes only on that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called on the loop's own thread."""
        self.loop = loop
        self.thread = threading.get_ident()
        self._posted: deque[tuple[Callable[..., object], tuple[Any, ...], int]] = deque()
        self._weight = 0  # bytes that are posted
        self._lock = threading.Lock()  # for `_weight`
        self._room = threading.Condition(self._lock)  # notified when there is room again
        self._woken = False
        self._shut = False

    def inside(self) -> bool:
        """Whether the caller is on the loop's thread. Raises `ServerStateError` once the server has stopped."""
        if self._shut:
            raise ServerStateError("the server has stopped: call server.start() again")
        return threading.get_ident() == self.thread

    def run(self, function: Callable[..., object], *args: Any, size: int = 0) -> None:
        """Call on the loop: now if inside, else soon, in the order of this thread's calls.

        ``size``: bytes that the arguments keep in memory. While `MAX_POSTED` bytes wait, the call waits, too. It raises
        `BackpressureError` where waiting would hold up another loop, or when it takes longer than `PATIENCE`.
        """
        if self.inside():
            function(*args)
            return
        size += _CALL_SIZE
        with self._lock:  # not `_room`: an interrupt in its __enter__ would leave the lock taken
            if self._weight > MAX_POSTED:
                self._wait_for_room()
            self._weight += size
        self._posted.append((function, args, size))
        # One wake-up serves all that is posted before it is heard: waking costs a system call.
        if not self._woken:
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._run_posted)
            except RuntimeError as error:
                raise ServerStateError("the server's event loop is closed") from error

    def _wait_for_room(self) -> None:
        if running_loop() is not None and not in_cell():
            raise BackpressureError(
                "other threads send faster than the server's loop can follow, and waiting would hold up this "
                "thread's own loop: now and then, await something that follows the server, such as server.ulak"
            )
        if not self._room.wait_for(lambda: self._shut or self._weight <= MAX_POSTED // 2, PATIENCE):
            raise BackpressureError(
                f"the server's loop has not caught up within {PATIENCE:g} s with what other threads send: "
                "is a handler blocking it?"
            )
        self.inside()  # raises, if it is the stop that ended the wait

    def _run_posted(self) -> None:
        # Before emptying: what is posted from here on wakes again, at worst for nothing.
        self._woken = False
        done = 0
        try:
            for _ in range(len(self._posted)):
                function, args, size = self._posted.popleft()
                done += size
                try:
                    function(*args)
                except BaseException as error:
                    if must_propagate(error):
                        raise
                    log.exception("a call from another thread failed")
                if done > MAX_POSTED // 8:
                    # Threads that wait for room need not wait until all of it is done.
                    self._make_room(done)
                    done = 0
        finally:
            self._make_room(done)

    def _make_room(self, size: int) -> None:
        with self._room:
            self._weight -= size
            if self._weight <= MAX_POSTED // 2:
                self._room.notify_all()

    def call(self, work: Callable[[], R | Awaitable[R]], *, timeout: float | None) -> R:
        """Run on the loop and wait for the result, from another thread.

        Raises what ``work`` raises; ``TimeoutError`` after ``timeout`` seconds. When the wait ends early, by the
        time limit or KeyboardInterrupt, what was waited for is cancelled.
        """
        if self.inside():
            raise ServerStateError(
                "this would wait for the thread it runs on: use the awaitable form (await …) on the server's own loop"
            )
        return _wait(lambda: self._in_turn(work), self.loop, timeout)

    async def acall(self, work: Callable[[], R | Awaitable[R]]) -> R:
        """Run on the loop and await the result, from any loop.

        Raises `ServerStateError` when the server stops before there is one.
        """
        if self.inside():
            return await _complete(work)
        completion = _boxed(lambda: self._in_turn(work))
        try:
            future = asyncio.run_coroutine_threadsafe(completion, self.loop)
        except RuntimeError as error:
            completion.close()
            raise ServerStateError("the server's event loop is closed") from error
        try:
            with waking():
                return _unboxed(await asyncio.wrap_future(future))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._shut or (task is not None and task.cancelling()):
                raise
            raise ServerStateError("the server stopped before this was done") from None

    async def _in_turn(self, work: Callable[[], R | Awaitable[R]]) -> R:
        # What the calling thread posted earlier comes first, even if the loop was not woken for it yet.
        self._run_posted()
        return await _complete(work)

    @property
    def kind(self) -> LoopKind:
        """Whose loop it is."""
        return "uvloop" if type(self.loop).__module__.startswith("uvloop") else "asyncio"

    def shut(self) -> None:
        """Let no more calls pass."""
        self._shut = True
        with self._room:
            self._room.notify_all()

    def shut_in_child(self) -> None:
        """The same in a forked child, where a thread that is not there may have held the lock."""
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self.shut()

    @property
    def is_shut(self) -> bool:
        """Whether `shut` was called."""
        return self._shut


def _wait(work: Callable[[], Coroutine[Any, Any, R]], loop: asyncio.AbstractEventLoop, timeout: float | None) -> R:
    """Run on the loop and wait; whatever ends the wait early cancels the work.

    An interrupt may strike between any two lines here. A plain lock stands it; `threading.Condition`, and so a
    concurrent future, may stay locked for ever.
    """
    given_up = False
    task: asyncio.Task[R | _Raised] | None = None
    done = threading.Lock()
    done.acquire()

    def begin() -> None:
        nonlocal task
        if not given_up:
            task = loop.create_task(_boxed(work))
            task.add_done_callback(lambda _: done.release())

    def give_up() -> None:
        nonlocal given_up
        given_up = True
        if task is not None:
            task.cancel()

    deadline = None if timeout is None else monotonic() + timeout
    try:
        loop.call_soon_threadsafe(begin)
        while not done.acquire(timeout=1.0 if deadline is None else max(0.0, min(1.0, deadline - monotonic()))):
            if loop.is_closed():
                raise ServerStateError("the server's event loop has ended before this was done")
            if deadline is not None and monotonic() >= deadline:
                raise TimeoutError(f"the server's loop did not answer within {timeout} s: is a handler blocking it?")
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the work with it
            loop.call_soon_threadsafe(give_up)
        raise
    assert task is not None
    if task.cancelled():
        raise concurrent.futures.CancelledError  # asyncio's would not be an Exception; there is no task here to cancel
    return _unboxed(task.result())


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise an interrupt as ``KeyboardInterrupt`` and nothing else.

    One that strikes while `threading.Condition` takes its lock back comes out as a RuntimeError about that lock.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


class _Raised:
    """An exception that would end the loop if a task raised it; it is raised where the result is waited for."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _boxed(work: Callable[[], Coroutine[Any, Any, R]]) -> R | _Raised:
    try:
        return await work()
    except (SystemExit, KeyboardInterrupt) as error:
        return _Raised(error)


def _unboxed(result: R | _Raised) -> R:
    if isinstance(result, _Raised):
        raise result.error
    return result


async def _complete(work: Callable[[], R | Awaitable[R]]) -> R:
    result = work()
    if inspect.isawaitable(result):
        return await result
    return result


class LoopThread:
    """A daemon thread with a loop of its own, which only `stop` ends, whatever its callbacks raise."""

    def __init__(self, name: str, kind: LoopKind = "auto") -> None:
        """Nothing runs yet, so that an interrupted `start` loses nothing."""
        self.loop: asyncio.AbstractEventLoop
        self.door: LoopDoor
        self._kind: LoopKind = kind
        self.ended = False  # the loop runs no more, and never will
        self._ready = threading.Lock()  # taken until the loop runs, or cannot
        self._ready.acquire()
        self._stopping = False
        self._failure: BaseException | None = None
        # A daemon, because any other thread would delay the kernel's shutdown and keep atexit from running.
        # A new thread starts in an empty context, so what handlers print goes to the latest cell.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> LoopThread:
        """Start the thread and return once its loop runs. Raises `ConfigurationError` if uvloop is not installed."""
        # Another thread starts it, as an interrupt in `Thread.start` may leave a thread that hangs before it has begun.
        _thread.start_new_thread(self._thread.start, ())
        self._ready.acquire()
        if self._failure is not None:
            raise self._failure
        return self

    def _run(self) -> None:
        try:
            # Made here, where no interrupt strikes.
            self.loop = new_event_loop(self._kind, beside=True)
            self.door = LoopDoor(self.loop)
        except BaseException as error:  # noqa: BLE001  # a callback's: the loop goes on
            self._failure = error
            self._ready.release()
            return
        asyncio.set_event_loop(self.loop)
        wait_precisely()
        broken = False
        self._ready.release()
        try:
            while not self._stopping:
                try:
                    self.loop.run_forever()
                except Exception:
                    # No callback's, as those are caught before: the loop itself cannot go on.
                    log.exception("the server's loop has failed, and ends")
                    broken = True
                    break
                except BaseException as error:
                    log.exception("%s in a callback of the server's loop, which goes on", type(error).__name__)
                else:
                    if not self._stopping:
                        log.error("a callback has called stop() on the server's loop, which goes on: use server.stop()")
        finally:
            try:
                if not broken:
                    self.loop.run_until_complete(_cancel_others())
                    self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            finally:
                asyncio.set_event_loop(None)
                self.ended = True
                with contextlib.suppress(*((Exception,) if broken else ())):
                    self.loop.close()

    def submit(self, work: Callable[[], Coroutine[Any, Any, R]], *, timeout: float | None = None) -> R:
        """Run on the loop and wait; a wait that is interrupted, or over ``timeout`` seconds, cancels it."""
        return in_empty_context(lambda: _wait(work, self.loop, timeout))

    def stop(self, *, timeout: float = 5.0) -> bool:
        """End the loop and the thread; waits ``timeout`` seconds at most, and not at all on the thread itself.

        Whether the thread has ended, or is the caller's.
        """
        self._stopping = True  # also for a thread whose start was interrupted, and which is only about to run
        with contextlib.suppress(RuntimeError, AttributeError):  # it has ended already, or never began
            self.loop.call_soon_threadsafe(self.loop.stop)
        if self.current:
            return True
        if self._thread.is_alive():
            with interruptible():
                self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def current(self) -> bool:
        """Whether the caller is on this thread."""
        return threading.current_thread() is self._thread

    @property
    def ident(self) -> int | None:
        """The thread's, as ``threading.get_ident`` tells it."""
        return self._thread.ident


async def _cancel_others() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    if tasks:
        # Tasks that go on although they were cancelled are left behind: nothing must keep the loop from ending.
        done, _ = await asyncio.wait(tasks, timeout=1)
        await asyncio.gather(*done, return_exceptions=True)  # which takes note of what they raised


def new_event_loop(kind: LoopKind = "auto", *, beside: bool = False) -> asyncio.AbstractEventLoop:
    """A loop that can watch a plain socket.

    ``"auto"`` is uvloop's where that is installed (the extra ``speed``), else asyncio's; ``beside`` a thread that
    computes it is asyncio's, as uvloop takes the interpreter lock anew for each of its callbacks. Raises
    `ConfigurationError` if uvloop is not installed.
    """
    if kind == "uvloop" or (kind == "auto" and not beside and sys.platform != "win32"):
        try:
            import uvloop
        except ImportError:
            if kind == "uvloop":
                raise ConfigurationError("loop=\"uvloop\" needs uvloop: pip install 'asena_tornado[speed]'") from None
        else:
            return uvloop.new_event_loop()
    return HeldLoop() if beside else asyncio.SelectorEventLoop()


def beside() -> bool:
    """Whether the main thread is somebody else's, such as a cell's, and may compute while this one serves."""
    return threading.current_thread() is not threading.main_thread()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def in_empty_context(function: Callable[[], R]) -> R:
    """Call it in an empty context: what listens or accepts must not be tied to the cell it was started from."""
    return contextvars.Context().run(function)


def run_nested(loop: asyncio.AbstractEventLoop, work: Awaitable[R], instead: str) -> R:
    """Wait for ``work`` on the very loop that runs the caller; possible only where loops may nest.

    Raises `ServerStateError` that names ``instead``, what can be awaited.
    """
    problem = why_not_nested(loop)
    if problem is not None:
        if inspect.iscoroutine(work):
            work.close()
        raise ServerStateError(f"a loop cannot wait for itself: {instead}; {problem}")
    return loop.run_until_complete(work)
