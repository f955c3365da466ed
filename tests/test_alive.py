"""A server beside a thread that computes: the switch interval, the loop, and who lets go of the interpreter lock."""

import asyncio
import gc
import os
import random
import signal
import sys
import textwrap
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from subprocess import PIPE, Popen
from typing import Any

import pytest
from tornado.ioloop import IOLoop
from websockets.sync.client import connect

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Context,
    Controller,
    Get,
    LocalTransport,
    PortInUseError,
    Service,
    WebSocket,
)
from asena_tornado.hosting import held
from asena_tornado.hosting.switching import SwitchInterval

SHORT = 0.00002  # seconds, as is the default of AsenaServer


@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_open(self, ws: Any) -> None:
        ws.subscribe("all")

    def on_message(self, ws: Any, message: str) -> None:
        self.to("all", message)


@pytest.fixture(autouse=True)
def interval() -> Iterator[float]:
    """What it is before, and has to be again."""
    before = sys.getswitchinterval()
    yield before
    assert sys.getswitchinterval() == before, "put back by whoever has changed it"


def short() -> bool:
    return sys.getswitchinterval() == pytest.approx(SHORT)


# -- the switch interval


def test_the_switch_interval_is_short_while_a_server_runs(interval: float) -> None:
    server = AsenaServer(Echo, port=0)
    assert sys.getswitchinterval() == interval
    for _ in range(2):
        server.start()
        assert short()
        server.stop()
        assert sys.getswitchinterval() == interval


def test_the_last_of_several_servers_puts_it_back(interval: float) -> None:
    servers = [AsenaServer(Echo, port=0, switch_interval=seconds).start() for seconds in (SHORT, 0.001, None)]
    assert short()
    servers[0].stop()
    assert sys.getswitchinterval() == pytest.approx(0.001), "the shortest of what is left"
    servers[1].stop()
    assert sys.getswitchinterval() == interval
    servers[2].stop()


def test_it_stays_short_when_a_server_is_replaced(interval: float) -> None:
    old = AsenaServer(Echo, port=0).start()
    new = AsenaServer(Echo, port=old.port).start()
    assert old.state == "replaced"
    assert short()
    newest = AsenaServer(Echo, port=old.port, switch_interval=None).start()
    assert sys.getswitchinterval() == interval, "the newest wants nothing"
    newest.stop()
    assert new.state == "replaced"


def test_a_start_that_fails_leaves_it_alone(interval: float) -> None:
    class Fails(Echo):
        def on_start(self) -> None:
            raise LookupError("no database")

    with pytest.raises(LookupError):
        AsenaServer(WebSocket("/fails")(Fails), port=0).start()
    assert sys.getswitchinterval() == interval


@pytest.mark.parametrize("seconds", [0.00001, 0.000005])
def test_a_shorter_one_of_the_users_is_respected(interval: float, seconds: float) -> None:
    sys.setswitchinterval(seconds)
    try:
        with AsenaServer(Echo, port=0):
            assert sys.getswitchinterval() == pytest.approx(seconds)
        assert sys.getswitchinterval() == pytest.approx(seconds)
    finally:
        sys.setswitchinterval(interval)


def test_one_that_is_set_meanwhile_stays(interval: float) -> None:
    with AsenaServer(Echo, port=0):
        sys.setswitchinterval(0.01)
        with AsenaServer(Echo, port=0):
            assert sys.getswitchinterval() == pytest.approx(0.01)
    assert sys.getswitchinterval() == pytest.approx(0.01)
    # That was the user's word on those servers; the next one begins anew.
    with AsenaServer(Echo, port=0):
        assert short()
    assert sys.getswitchinterval() == pytest.approx(0.01)
    sys.setswitchinterval(interval)


async def test_nothing_changes_where_the_loop_is_the_main_threads(interval: float) -> None:
    async with AsenaServer(Echo, port=0) as server:
        assert sys.getswitchinterval() == interval
        assert not any(isinstance(listener, held.HeldSocket) for listener in server._listeners)


def test_a_start_that_is_interrupted_leaves_nothing_behind(interval: float) -> None:
    """The interrupt strikes while on_start computes on the server's thread, which goes on from there."""
    go_on, begun, stopped = threading.Event(), threading.Event(), threading.Event()

    @Service
    class Slow:
        def on_start(self) -> None:
            begun.set()
            go_on.wait(20)

        def on_stop(self) -> None:
            stopped.set()

    main = threading.get_ident()

    def interrupt() -> None:
        begun.wait(20)
        signal.pthread_kill(main, signal.SIGINT)

    server = AsenaServer(Echo, Slow, port=0)
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        server.start()
    interrupting.join()
    go_on.set()
    assert stopped.wait(20)
    assert (server.state, sys.getswitchinterval()) == ("stopped", interval)
    with server.start():
        assert says(server, "hello") == "hello"


@pytest.mark.filterwarnings("ignore:unclosed", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_servers_that_are_garbage_no_longer_shorten_the_switch_interval(interval: float) -> None:
    def lose() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(AsenaServer(Echo, port=0).__aenter__())
        assert short()
        loop.close()

    thread = threading.Thread(target=lose)
    thread.start()
    thread.join()
    IOLoop(make_current=False).close()  # Tornado keeps closed loops until it makes the next one
    gc.collect()
    assert sys.getswitchinterval() == interval


def test_a_loop_of_ones_own_on_another_thread_counts_as_well(interval: float) -> None:
    server = AsenaServer(Echo, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while server.state != "running":
        time.sleep(0.001)
    try:
        assert short()
    finally:
        server.stop()
        thread.join()


def test_a_forked_child_has_what_was_before() -> None:
    source = """
    import os, sys, warnings
    from asena_tornado import AsenaServer
    warnings.simplefilter("ignore")  # that forking a process with threads is a risk
    before = sys.getswitchinterval()
    server = AsenaServer(port=0).start()
    if os.fork() == 0:
        ok = sys.getswitchinterval() == before
        with AsenaServer(port=0):
            ok = ok and sys.getswitchinterval() < before
        os._exit(0 if ok and sys.getswitchinterval() == before else 1)
    assert os.wait()[1] == 0
    assert sys.getswitchinterval() < before
    server.stop()
    assert sys.getswitchinterval() == before
    """
    with Popen([sys.executable, "-c", textwrap.dedent(source)], stderr=PIPE, text=True) as process:
        _, complaints = process.communicate(timeout=30)
        assert (process.returncode, complaints) == (0, "")


@pytest.mark.parametrize("seed", range(20))
def test_the_switch_interval_against_a_model(interval: float, seed: int) -> None:
    """Owners come and go, and the user sets one in between: then that stays until everybody has gone."""
    rng = random.Random(seed)
    switching = SwitchInterval()
    wanted: dict[object, float] = {}
    owners = [type("Owner", (), {})() for _ in range(3)]
    base, overruled = interval, False
    try:
        for _ in range(200):
            owner = rng.choice(owners)
            match rng.choice(["request", "request", "release", "vanish", "set"]):
                case "request":
                    seconds = rng.choice([0.0002, 0.001, 0.05])
                    switching.request(owner, seconds)
                    wanted[owner] = seconds
                case "release":
                    switching.release(owner)
                    wanted.pop(owner, None)
                case "vanish":
                    wanted.pop(owner, None)
                    owners[owners.index(owner)] = type("Owner", (), {})()
                    del owner
                case "set" if rng.random() < 0.2:
                    base = rng.randrange(100, 20_000) / 1e6  # hardly ever what it is already
                    overruled = bool(wanted)
                    sys.setswitchinterval(base)
            if not wanted:
                overruled = False
            expected = base if overruled else min([base, *wanted.values()])
            assert sys.getswitchinterval() == pytest.approx(expected, abs=2e-6), seed
    finally:
        for owner in owners:
            switching.release(owner)
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("seconds", [0, -1, 1e-9, float("inf"), float("nan"), True, "0.1"])
def test_nonsense_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="switch_interval must be a number of seconds, or None, not"):
        AsenaServer(Echo, switch_interval=seconds)


# -- the loop


def says(server: AsenaServer, text: str) -> str:
    with connect(server.url("/echo")) as client:
        client.send(text)
        return str(client.recv(timeout=10))


@pytest.mark.parametrize("kind", ["auto", "asyncio", "uvloop"])
def test_the_loop_of_a_thread_can_be_chosen(kind: Any) -> None:
    if kind == "uvloop":
        pytest.importorskip("uvloop")
    with AsenaServer(Echo, port=0, loop=kind) as server:
        assert says(server, "hello") == "hello"
        module = server.call(lambda: type(server._open_door().loop).__module__)
        assert module.startswith("uvloop") == (kind == "uvloop"), "auto is not uvloop beside a thread that computes"
        with AsenaServer(Echo, port=server.port, loop=kind) as again:
            assert says(again, "a re-run") == "a re-run"


@pytest.mark.parametrize(("kind", "uvloops"), [("auto", True), ("asyncio", False), ("uvloop", True)])
def test_the_loop_of_run_can_be_chosen(kind: str, uvloops: bool) -> None:
    pytest.importorskip("uvloop")
    source = f"""
    import asyncio
    from asena_tornado import AsenaServer, Service
    @Service
    class Tells:
        async def on_start(self):
            print(type(asyncio.get_running_loop()).__module__, flush=True)
    AsenaServer(Tells, port=0, loop={kind!r}).run()
    """
    with Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("uvloop") == uvloops
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0


def test_a_uvloop_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    server = AsenaServer(Echo, port=0, loop="uvloop")
    with pytest.raises(ConfigurationError, match=r"asena_tornado\[speed\]"):
        server.start()
    assert server.state == "stopped"
    with pytest.raises(ConfigurationError, match='loop must be "auto", "asyncio" or "uvloop", not \'trio\''):
        AsenaServer(Echo, loop="trio")  # type: ignore[arg-type]


def test_another_loop_cannot_take_over() -> None:
    pytest.importorskip("uvloop")
    with AsenaServer(Echo, port=0) as server:
        with pytest.raises(PortInUseError, match="loop='asyncio'"):
            AsenaServer(Echo, port=server.port, loop="uvloop").start()
        assert says(server, "still here") == "still here"
    with AsenaServer(Echo, port=0, loop="uvloop") as server, pytest.raises(PortInUseError, match="loop='uvloop'"):
        AsenaServer(Echo, port=server.port).start()


# -- who lets go of the lock

# Methods of Python's own sockets and epolls that do not: they ask the system nothing, or do not let go for it.
_HARMLESS = {"fileno", "gettimeout", "detach", "setsockopt", "getsockopt", "poll"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere accepting lets go of the lock")
def test_only_the_wait_for_events_lets_go_of_the_lock() -> None:
    """The whole way of a client, and of a request, as the interpreter's profiler sees it on the server's thread."""

    @Controller("/api")
    class Api:
        @Get()
        def get(self, context: Context) -> dict[str, str]:
            return {"it": "works"}

    seen: Counter[str] = Counter()

    def note(_frame: object, event: str, called: Any) -> None:
        if event == "c_call":
            owner = getattr(called, "__self__", None)
            kind = type(owner).__name__ if owner is not None else ""
            seen[f"{getattr(called, '__module__', None) or kind}.{called.__name__}"] += 1

    with AsenaServer(Echo, Api, port=0, transport=LocalTransport("alive")) as server:
        server.call(lambda: sys.setprofile(note))
        for _ in range(3):
            assert says(server, "hello") == "hello"
            assert urllib.request.urlopen(server.url("/api")).read() == b'{"it":"works"}'
        server.call(lambda: sys.setprofile(None))
    assert seen["epoll.poll"]
    assert seen["HeldSocket.fileno"]
    systemic = [name.split(".") for name in seen if name.startswith(("HeldSocket", "socket", "_socket", "epoll"))]
    assert {name for _, name in systemic} - _HARMLESS - {"inet_ntop"} == set()
    assert not {"posix.urandom", "posix.close", "posix.read", "posix.write"} & set(seen)


@pytest.fixture
def without_a_c_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    held._event_layout.cache_clear()
    monkeypatch.setattr(held, "libc", None)
    yield
    held._event_layout.cache_clear()


@pytest.mark.usefixtures("without_a_c_library")
def test_it_works_without_a_c_library() -> None:
    with AsenaServer(Echo, port=0) as server:
        assert says(server, "hello") == "hello"
        assert not any(isinstance(listener, held.HeldSocket) for listener in server._listeners)


def test_descriptors_and_threads_are_given_back() -> None:
    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0, threading.active_count()

    with AsenaServer(Echo, port=0) as server:
        says(server, "warm")
    before = left()
    for _ in range(5):
        with AsenaServer(Echo, port=0) as server:
            says(server, "hello")
    # Fewer are possible: a thread of an earlier test may have ended meanwhile.
    assert all(now <= then for now, then in zip(left(), before, strict=True))
