"""System calls that hold the interpreter lock do what Python's own do, and hold it."""

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asena_tornado.hosting import fairness, held
from asena_tornado.hosting.held import HeldLoop, HeldSocket, hold

needs_posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such calls")
needs_epoll = pytest.mark.skipif(not hasattr(select, "epoll"), reason="this system has no epoll")


@pytest.fixture(params=["held", "without a C library"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As it is, and as where no C library is found: everything is Python's own then."""
    held._event_layout.cache_clear()
    if request.param == "without a C library":
        monkeypatch.setattr(held, "libc", None)
    yield str(request.param)
    held._event_layout.cache_clear()


def outcome(act: Callable[[], Any]) -> Any:
    """What came of it: a value, or the kind of error with its number."""
    try:
        return act()
    except OSError as error:
        return type(error), error.args
    except (TypeError, ValueError, OverflowError, BufferError) as error:
        return type(error)


class Pair:
    """Two ends of a connection within the kernel, where nothing is ever on its way: the same calls see the same."""

    def __init__(self, *, held: bool) -> None:
        self.end, self.peer = socket.socketpair()
        self.end.setblocking(False)
        self.peer.setblocking(False)
        self.buffer = bytearray(1000)
        if held:
            hold(self.end)

    def close(self) -> None:
        self.end.close()
        self.peer.close()


def operation(rng: random.Random) -> tuple[str, Callable[[Pair], Any]]:
    """Something to do to a pair."""
    data = rng.randbytes(rng.choice([0, 1, 10, 1000, 50_000]))
    kinds: list[Callable[[bytes], Any]] = [bytes, bytearray, memoryview, lambda b: memoryview(b + b"xy")[: len(b)]]
    kind = rng.choice(kinds)
    size = rng.choice([1, 7, 1000, 65_536])

    def recv_into(pair: Pair) -> Any:
        return outcome(lambda: pair.end.recv_into(pair.buffer, min(size, 1000))), bytes(pair.buffer)

    common: list[tuple[str, Callable[[Pair], Any]]] = [
        ("send", lambda pair: outcome(lambda: pair.end.send(kind(data)))),
        ("sendmsg", lambda pair: outcome(lambda: pair.end.sendmsg([kind(data[:9]), b"and", kind(data[:1000])]))),
        ("recv", lambda pair: outcome(lambda: pair.end.recv(size))),
        ("recv_into", recv_into),
        ("peer sends", lambda pair: outcome(lambda: pair.peer.send(data))),
        ("peer receives", lambda pair: outcome(lambda: pair.peer.recv(size))),
    ]
    rare: list[tuple[str, Callable[[Pair], Any]]] = [
        ("peek", lambda pair: outcome(lambda: pair.end.recv(size, socket.MSG_PEEK))),
        ("receive a negative number", lambda pair: outcome(lambda: pair.end.recv(-1))),
        ("receive nothing", lambda pair: outcome(lambda: pair.end.recv(0))),
        ("receive too many", lambda pair: outcome(lambda: pair.end.recv_into(pair.buffer, 1001))),
        ("receive into nothing", lambda pair: outcome(lambda: pair.end.recv_into(bytearray()))),
        ("receive into bytes", lambda pair: outcome(lambda: pair.end.recv_into(b"abc"))),
        ("send text", lambda pair: outcome(lambda: pair.end.send("text"))),  # type: ignore[arg-type]
        ("peer shuts writing", lambda pair: outcome(lambda: pair.peer.shutdown(socket.SHUT_WR))),
        ("peer closes", lambda pair: outcome(pair.peer.close)),
        ("shut writing", lambda pair: outcome(lambda: pair.end.shutdown(socket.SHUT_WR))),
        ("shut nonsense", lambda pair: outcome(lambda: pair.end.shutdown(77))),
        ("shut nothing", lambda pair: outcome(lambda: pair.end.shutdown(None))),  # type: ignore[arg-type]
        ("set nothing", lambda pair: outcome(lambda: pair.end.setblocking(None))),  # type: ignore[arg-type]
        ("receive a float", lambda pair: outcome(lambda: pair.end.recv(1.5))),  # type: ignore[arg-type]
        ("receive far too many", lambda pair: outcome(lambda: pair.end.recv(1 << 70))),
        ("send every other byte", lambda pair: outcome(lambda: pair.end.send(memoryview(data)[::2]))),
        ("send in gaps", lambda pair: outcome(lambda: pair.end.sendmsg([memoryview(b"abcdef")[::2]]))),
        ("set non-blocking", lambda pair: outcome(lambda: pair.end.setblocking(False))),
        ("time out", lambda pair: outcome(lambda: pair.end.settimeout(0.001))),
        ("close", lambda pair: outcome(pair.end.close)),
        ("detach", lambda pair: outcome(lambda: os.close(pair.end.detach()))),
    ]
    return rng.choice(common if rng.random() < 0.95 else rare)


@needs_posix
@pytest.mark.parametrize("seed", range(40))
def test_held_sockets_do_what_pythons_own_do(seed: int) -> None:
    rng = random.Random(seed)
    with contextlib.closing(Pair(held=False)) as own, contextlib.closing(Pair(held=True)) as other:
        assert isinstance(other.end, HeldSocket)
        done = []
        for _ in range(200):
            name, act = operation(rng)
            done.append(name)
            assert act(other) == act(own), (seed, done)
        assert other.end.fileno() == -1 or other.end.gettimeout() == own.end.gettimeout()


@needs_posix
def test_a_client_that_does_not_read_gets_the_rest_later() -> None:
    data = random.Random(1).randbytes(3_000_000)
    with contextlib.closing(Pair(held=True)) as pair:
        sent, received = 0, b""
        while len(received) < len(data):
            with contextlib.suppress(BlockingIOError):
                while sent < len(data):
                    sent += pair.end.send(memoryview(data)[sent:])
            received += pair.peer.recv(70_000)
        assert received == data


@needs_posix
def test_a_descriptor_that_was_given_out_again_is_not_touched() -> None:
    pair = Pair(held=True)
    number = pair.end.fileno()
    send, recv, close = pair.end.send, pair.end.recv, pair.end.close
    pair.close()
    fresh, peer = socket.socketpair()
    try:
        assert number in (fresh.fileno(), peer.fileno())
        for call in (lambda: send(b"for somebody else"), lambda: recv(10)):
            with pytest.raises(OSError) as error:  # noqa: PT011  # the number says it
                call()
            assert error.value.errno == errno.EBADF
        close()
        fresh.send(b"still open")
        assert peer.recv(100) == b"still open"
    finally:
        fresh.close()
        peer.close()


@needs_posix
def test_a_reset_is_reported_as_pythons_own_calls_do() -> None:
    found = []
    for held_one in (False, True):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        server.setblocking(False)
        if held_one:
            hold(server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        select.select([server], [], [])
        found.append([outcome(lambda: server.recv(10)), outcome(lambda: server.send(b"x")), outcome(server.close)])  # noqa: B023
    assert found[0] == found[1]
    assert found[0][0][0] is ConnectionResetError
    assert found[0][1][0] is BrokenPipeError


@needs_posix
def test_an_interrupted_call_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEP 475 has it: also where the C library says that a signal came in between."""

    class Interrupted:
        def __getattr__(self, name: str) -> Callable[..., int]:
            def call(*_: object) -> int:
                ctypes.set_errno(errno.EINTR)
                return -1

            return call

    with contextlib.closing(Pair(held=True)) as pair:
        monkeypatch.setattr(held, "libc", Interrupted())
        assert pair.end.send(b"there") == 5
        assert pair.peer.recv(10) == b"there"
        pair.peer.send(b"and back")
        assert pair.end.recv(3) == b"and"
        buffer = bytearray(10)
        assert pair.end.recv_into(buffer) == 5
        assert buffer[:5] == b" back"
        with contextlib.ExitStack() as stack:
            stack.callback(monkeypatch.undo)
            listener = stack.enter_context(hold(socket.create_server(("127.0.0.1", 0))))
            listener.setblocking(False)
            with socket.create_connection(listener.getsockname()) as client:
                select.select([listener], [], [])
                accepted, peer = listener.accept()
                monkeypatch.undo()
                with accepted:
                    assert peer == client.getsockname()


@needs_posix
def test_what_another_process_has_made_blocking_blocks_nobody() -> None:
    """Whether it blocks belongs to what the descriptor stands for, and that may be shared with a child."""
    with contextlib.closing(Pair(held=True)) as pair, hold(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        for sock in (pair.end, listener):
            os.set_blocking(sock.fileno(), True)
        with pytest.raises(BlockingIOError):
            pair.end.recv(10)
        with pytest.raises(BlockingIOError):
            pair.end.recv_into(bytearray(10))
        with contextlib.suppress(BlockingIOError):
            while pair.end.send(bytes(100_000)):
                continue
        with pytest.raises(BlockingIOError):
            listener.accept()
        pair.end.setblocking(False)
        assert not os.get_blocking(pair.end.fileno())


@needs_posix
def test_a_buffer_can_change_its_size_after_an_error() -> None:
    buffer = bytearray(10)
    with contextlib.closing(Pair(held=True)) as pair:
        try:
            pair.end.recv_into(buffer)
        except BlockingIOError:
            buffer.extend(b"more")
    assert len(buffer) == 14


@needs_posix
def test_an_error_keeps_neither_what_was_sent_nor_the_buffer() -> None:
    """Somebody may keep the error for long, as Tornado's streams do."""

    class Bytes(bytearray):
        pass

    buffer, data = Bytes(10), Bytes(10)
    gone = [weakref.ref(buffer), weakref.ref(data)]
    errors: list[OSError] = []
    with contextlib.closing(Pair(held=True)) as pair:
        try:
            pair.end.recv_into(buffer)
        except BlockingIOError as error:
            errors.append(error)
        pair.peer.close()
        try:
            pair.end.send(data)
        except BrokenPipeError as error:
            errors.append(error)
    del buffer, data
    assert len(errors) == 2
    assert [ref() for ref in gone] == [None, None]


@needs_posix
def test_closing_after_a_reset_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(held=True)
    real = held.libc

    class Reset:
        def __init__(self, number: int) -> None:
            self.number = number

        def close(self, fd: int) -> int:
            real.close(fd)
            ctypes.set_errno(self.number)
            return -1

    monkeypatch.setattr(held, "libc", Reset(errno.ECONNRESET))
    pair.end.close()
    hold(pair.peer)
    monkeypatch.setattr(held, "libc", Reset(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        pair.peer.close()


@needs_posix
def test_a_datagram_is_not_cut() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with a, b:
        assert type(hold(a)) is socket.socket


@pytest.mark.parametrize("address", [("127.0.0.1", 0), ("::1", 0)])
def test_accepting_gives_the_address_and_a_held_socket(address: tuple[str, int], way: str) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        listener = hold(socket.create_server(address, family=family))
    except OSError:
        pytest.skip(f"no {address[0]} on this machine")
    with listener:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        with socket.create_connection(listener.getsockname()[:2]) as client:
            select.select([listener], [], [])
            accepted, peer = listener.accept()
            with accepted:
                assert peer == client.getsockname()
                assert (accepted.family, accepted.type, accepted.proto) == (family, client.type, listener.proto)
                assert not accepted.get_inheritable()
                accepted.setblocking(False)  # as whoever takes it does
                assert not os.get_blocking(accepted.fileno())
                client.sendall(b"hello")
                select.select([accepted], [], [])
                assert accepted.recv(10) == b"hello"


def test_only_plain_sockets_are_held() -> None:
    class Special(socket.socket):
        pass

    with Special() as special:
        assert type(hold(special)) is Special


def test_random_bytes_are_random(way: str) -> None:
    assert len({held.random_bytes(16) for _ in range(100)}) == 100
    assert all(len(held.random_bytes(size)) == size for size in (0, 1, 100))


# -- who runs meanwhile


class Meanwhile:
    """A thread that computes: it counts, and now and then it lets go of the lock by itself."""

    def __init__(self) -> None:
        self.count = 0
        self._over = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over:
            self.count += 1
            if not self.count % 10_000:
                time.sleep(0)

    def __enter__(self) -> "Meanwhile":
        self._before = sys.getswitchinterval()
        self._thread.start()
        # From now on nobody is made to give way, only who lets go does.
        sys.setswitchinterval(3600)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        sys.setswitchinterval(self._before)
        self._thread.join()

    def runs_during(self, act: Callable[[], object]) -> bool:
        """Whether it comes to run while this is done, many times over: who lets go of the lock often loses the race."""
        # Who already waits for the lock still counts by the old interval: let it have its turn first.
        for _ in range(3):
            before = self.count
            for _ in range(3000):
                act()
            if self.count == before:
                return False
        return True


@needs_posix
def test_nobody_else_runs_during_a_held_call() -> None:
    with contextlib.closing(Pair(held=True)) as pair, Meanwhile() as meanwhile:
        buffer = bytearray(100)

        def there_and_back() -> None:
            pair.end.send(b"there")
            # On the peer, too, nothing of Python's own is called: it would let go.
            held.libc.recv(pair.peer.fileno(), ctypes.create_string_buffer(100), 100, 0)
            held.libc.send(pair.peer.fileno(), b"back", 4, 0)
            pair.end.recv_into(buffer)
            with contextlib.suppress(BlockingIOError):
                pair.end.recv(100)

        assert not meanwhile.runs_during(there_and_back)
        assert buffer.startswith(b"back")
        assert not meanwhile.runs_during(lambda: held.random_bytes(16))


@needs_posix
@needs_epoll
def test_nobody_else_runs_while_a_held_loop_looks() -> None:
    """Only a wait for events lets go of the lock."""
    with contextlib.closing(HeldLoop()) as loop, contextlib.closing(Pair(held=True)) as pair:
        fd = pair.end.fileno()
        loop.add_reader(fd, lambda: None)
        pair.peer.send(b"x")

        def turn() -> None:
            loop.call_soon(loop.stop)
            loop.run_forever()
            loop.remove_reader(fd)
            loop.add_reader(fd, lambda: None)

        with Meanwhile() as meanwhile:
            assert not meanwhile.runs_during(turn)


# -- the loop


def test_a_held_loop_is_a_loop(way: str) -> None:
    """Readers and writers come and go, callbacks of other threads are heard, timers fire, transports work."""

    async def main() -> list[object]:
        loop = asyncio.get_running_loop()
        heard: list[object] = []
        server = await asyncio.start_server(lambda reader, writer: echo(reader, writer), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        big = random.Random(1).randbytes(2_000_000)
        writer.write(big)
        writer.write_eof()
        heard.append(await reader.read() == big)
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        woken = asyncio.Event()
        threading.Thread(target=lambda: loop.call_soon_threadsafe(woken.set)).start()
        heard.append(await woken.wait())
        heard.append(await asyncio.to_thread(lambda: 7))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print('out')", stdout=asyncio.subprocess.PIPE
        )
        heard.append(await process.communicate())
        with contextlib.closing(Pair(held=True)) as pair:
            await asyncio.gather(loop.sock_sendall(pair.end, big), drain(pair.peer, len(big)))
            loop.call_soon(pair.peer.send, b"x")
            heard.append(await loop.sock_recv(pair.end, 10))
        return heard

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        await writer.drain()
        writer.close()

    async def drain(sock: socket.socket, size: int) -> None:
        while size:
            size -= len(await asyncio.get_running_loop().sock_recv(sock, 65_536))

    with asyncio.Runner(loop_factory=HeldLoop) as runner:
        assert runner.run(main()) == [True, True, 7, (b"out\n", None), b"x"]


@needs_posix
@needs_epoll
def test_more_ready_descriptors_than_one_look_finds_are_all_served() -> None:
    pairs = [Pair(held=False) for _ in range(300)]
    layout = held._event_layout()
    assert layout is not None
    poll = held.HeldEpoll(layout)
    try:
        for pair in pairs:
            poll.register(pair.end.fileno(), select.EPOLLIN)
            pair.peer.send(b"x")
        served = set()
        while found := poll.poll(0):
            for fd, events in found:
                assert events == select.EPOLLIN
                served.add(fd)
                poll.unregister(fd)
        assert served == {pair.end.fileno() for pair in pairs}
        # Errors are those of select.epoll.
        plain = select.epoll()
        for each in (poll, plain):
            for act in (lambda: each.unregister(pairs[0].end.fileno()), lambda: each.modify(99_999, 1)):  # noqa: B023
                with pytest.raises(OSError) as error:  # noqa: PT011
                    act()
                assert error.value.errno in (errno.ENOENT, errno.EBADF)
        plain.close()
        assert poll.poll(0.001) == []
    finally:
        poll.close()
        for pair in pairs:
            pair.close()


def test_macos_events_are_read_as_its_kernel_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call itself exists on macOS only; this one takes and gives the same bytes."""
    kevent = struct.Struct("=QhHIqQ")  # uintptr_t, int16_t, uint16_t, uint32_t, intptr_t, void *
    registered: list[tuple[Any, ...]] = []
    ready: list[tuple[int, int]] = []
    waits: list[float | None] = []

    class Library:
        def kevent(self, fd: int, changes: Any, count: int, events: Any, most: int, wait: Any) -> int:
            assert (fd, list(wait)) == (5, [0, 0])
            registered.extend(kevent.iter_unpack(bytes(changes)))
            if any(change[0] == 999 for change in registered):
                ctypes.set_errno(errno.EBADF)
                return -1
            found = ready[:most]
            for at, (ident, filter) in enumerate(found):
                ctypes.memmove(ctypes.byref(events, at * kevent.size), kevent.pack(ident, filter, 0, 0, 1, 0), 32)
            return len(found)

    class Kqueue:
        def fileno(self) -> int:
            return 5

        def control(self, changes: object, most: int, timeout: float | None) -> list[object]:
            waits.append(timeout)
            return []

        def close(self) -> None:
            pass

    class Change:
        def __init__(self, ident: int, filter: int, flags: int) -> None:
            self.ident, self.filter, self.flags, self.fflags, self.data = ident, filter, flags, 0, 0

    monkeypatch.setattr(select, "kqueue", Kqueue, raising=False)
    monkeypatch.setattr(held, "libc", Library())
    queue = held.HeldKqueue()
    assert list(queue.control([Change(7, -1, 1)], 0, 0)) == []
    assert registered == [(7, -1, 1, 0, 0, 0)]
    assert queue.control(None, 10, None) == []
    assert waits == [None], "with nothing to find it waits"
    ready += [(7, -1), (8, -2)]
    assert [(each.ident, each.filter) for each in queue.control(None, 10, None)] == ready
    assert [(each.ident, each.filter) for each in queue.control(None, 1, 0)] == ready[:1]
    assert waits == [None]
    with pytest.raises(OSError, match="Bad file") as error:
        queue.control([Change(999, -1, 1)], 0, 0)
    assert error.value.errno == errno.EBADF


# -- a fair half


class Clocks:
    """What the clocks say, who pauses, and how much of a pause the main thread uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, wants: float) -> None:
        self.now = self.own = self.main = 100.0
        self.wants = wants
        self.paused = 0.0
        for name, clock in {
            "perf_counter": lambda: self.now,
            "thread_time": lambda: self.own,
            "clock_gettime": lambda _: self.main,
            "sleep": self._sleep,
        }.items():
            monkeypatch.setattr(time, name, clock)

    def _sleep(self, seconds: float) -> None:
        self.paused += seconds
        self.now += seconds
        self.main += seconds * self.wants

    def pass_by(self, seconds: float, *, own: float, main: float) -> None:
        self.now += seconds
        self.own += own
        self.main += main


needs_clock = pytest.mark.skipif(
    not hasattr(time, "pthread_getcpuclockid"), reason="this system cannot tell the main thread's time"
)


@needs_clock
@pytest.mark.parametrize(
    ("seconds", "own", "main", "paused"),
    [
        (0.002, 0.0018, 0.0001, 0.0016),  # it kept the cell waiting: as long as makes it even
        (0.002, 0.0018, 0.0, 0),  # the cell wants nothing
        (0.002, 0.0018, 0.0015, 0),  # the cell has what it wants, on another core
        (0.002, 0.0009, 0.0001, 0),  # it had less than half itself
        (0.0005, 0.0005, 0.0001, 0),  # too short to tell
        (0.05, 0.045, 0.005, 0.002),  # never for long, as clients wait
        (1.0, 0.1, 0.1, 0),  # it waited itself
    ],
)
def test_a_server_that_had_more_than_half_of_the_time_pauses(
    monkeypatch: pytest.MonkeyPatch, seconds: float, own: float, main: float, paused: float
) -> None:
    clocks = Clocks(monkeypatch, wants=0.9)
    share = fairness.FairShare()
    share.pause()
    clocks.pass_by(seconds, own=own, main=main)
    share.pause()
    assert clocks.paused == pytest.approx(paused)


@needs_clock
def test_a_thread_that_mostly_sleeps_gets_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses little time because it wants little: it is offered a pause ever more rarely."""
    clocks = Clocks(monkeypatch, wants=0.05)
    share = fairness.FairShare()
    for _ in range(1000):
        share.pause()
        clocks.pass_by(0.002, own=0.0018, main=0.0001)
    assert clocks.paused < 0.01 * (clocks.now - 100)
    # And the next one that computes is given its half again.
    clocks.wants, clocks.paused, before = 0.9, 0.0, clocks.now
    for _ in range(1000):
        share.pause()
        clocks.pass_by(0.002, own=0.0018, main=0.0001)
    assert clocks.paused > 0.3 * (clocks.now - before)


@needs_clock
def test_a_clock_that_is_gone_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: int) -> float:
        raise OSError(errno.EINVAL, "Invalid argument")

    share = fairness.FairShare()
    monkeypatch.setattr(time, "clock_gettime", gone)
    share.pause()
    share.pause()
    monkeypatch.setattr(time, "pthread_getcpuclockid", gone)
    fairness.FairShare().pause()


@needs_posix
@needs_epoll
def test_every_turn_of_a_held_loop_is_fair_and_its_transports_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []
    monkeypatch.setattr(fairness.FairShare, "pause", lambda share: pauses.append(share))

    async def main() -> None:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert isinstance(writer.get_extra_info("socket")._sock, HeldSocket)
        before = len(pauses)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(pauses) - before >= 10
        writer.close()
        server.close()

    with asyncio.Runner(loop_factory=HeldLoop) as runner:
        runner.run(main())


# -- forks


@needs_posix
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_go_on_with_held_sockets_of_its_own() -> None:
    with contextlib.closing(Pair(held=True)) as pair:
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            try:
                mine = Pair(held=True)
                mine.end.send(b"x")
                ok = mine.peer.recv(5) == b"x" and pair.end.send(b"from the child") == 14
                os._exit(0 if ok else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert pair.peer.recv(100) == b"from the child"
