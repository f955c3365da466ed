"""Measure how alive a server is while a cell computes, in a real Jupyter kernel.

    python -m tests.benchmarks.alive [--quick] [--cells pure …] [--variants all none …] [--seconds 3]

For every variant a kernel of its own starts a server with `start()`. Then one cell after the other computes, and this
process is all of the clients: one that sends an echo after the other, a room of 100 to which one of them publishes, one
that connects and goes again, and 100 that echo as fast as they can. Times are milliseconds; a broadcast ends when the
last member has it. Between two of anything there is a pause of 5 ms, as between people.

What the cell loses is measured in its own steps: with 100 silent clients and under the load of the 100 that echo,
against the same cell before there was a server; and, as such steps swing with the machine, in the share of a core that
the server's thread uses while the clients are silent. What the cell waits at most for its turn is the longest gap
between two looks at the clock in a loop of pure Python, while a room of so many as --crowd says is published to.

Variants: `all` is as installed; `-held`, `-interval` and `-loop` are without one of the measures (system calls that
hold the interpreter lock, the short switch interval, the loop that takes the lock once per turn); `none` has none.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import queue
import re
import resource
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.load import PATIENCE, Client, LoadError, Wire, connect, message_frame, text
from tests.benchmarks.load import Case as LoadCase

DOCUMENT = "json.dumps([{'id': i, 'name': f'{i}', 'tags': ['a', 'b']} for i in range(2_000)])"

# What a cell repeats. A step is short: in between it looks whether it is to end.
CELLS: dict[str, tuple[str, str]] = {
    "sleep": ("", "time.sleep(0.01)"),
    "pure": ("", "sum(i * i for i in range(1_000))"),
    "often": ("import os", "sum(i * i for i in range(1_000)); os.stat(chr(46))"),
    "stat": ("import os", "sum(i * i for i in range(300)); os.stat('.')"),
    "waitpid": (
        "import os, subprocess; child = subprocess.Popen(['sleep', '1000'])",
        "spin(0.0005); os.waitpid(child.pid, os.WNOHANG)",
    ),
    "printing": ("", "sum(i * i for i in range(30_000)); print(steps, end='\\r')"),
    "writing": (
        "import hashlib, tempfile; file = tempfile.TemporaryFile(); block = b'x' * 100_000",
        "hashlib.sha256(block).digest(); file.seek(0); file.write(block); file.flush(); sum(i * i for i in range(500))",
    ),
    "matmul": ("import numpy; a = numpy.random.rand(500, 500)", "a @ a"),
    "numpy-steps": (
        "import numpy; a = numpy.random.rand(10_000)",
        "b = a * 2 + 1; c = numpy.sqrt(b).sum(); d = b[b > 1.5].mean()",
    ),
    "pandas": (
        "import pandas; frame = pandas.DataFrame({'key': [i % 100 for i in range(10**5)], 'value': 1.5})",
        "frame.groupby('key').value.agg(['mean', 'sum', 'max'])",
    ),
    "json": ("import json; document = " + DOCUMENT, "json.loads(document)"),
    # The same without the pauses of the garbage collection, which holds the lock while it looks at what is imported.
    "json-frozen": ("import gc, json; gc.collect(); gc.freeze(); document = " + DOCUMENT, "json.loads(document)"),
    "regex": (
        "import re; prose = 'the quick brown fox jumps over the lazy dog 12345 ' * 500",
        "re.findall(r'(\\w+) (\\d+)', prose)",
    ),
}

SERVICES = """
import asyncio, gc, sys, threading, time
from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket, WebSocketOptions

enough = threading.Event()
steps, since, longest = 0, time.monotonic(), 0.0

def spin(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass

@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_message(self, ws, message: bytes):
        ws.send(message)

@WebSocket("/room")
class Room(AsenaWebSocketService):
    def on_open(self, ws):
        ws.subscribe("everyone")
        ws.send(b"ready")

    def on_message(self, ws, message: bytes):
        self.to("everyone", message)

@WebSocket("/cell")
class Cell(AsenaWebSocketService):
    def on_message(self, ws, message: str):
        global longest
        if message == "enough":
            enough.set()
        ws.send({
            "steps": steps, "seconds": time.monotonic() - since, "longest": longest, "server": time.thread_time(),
        })
        longest = 0.0

options = WebSocketOptions(ping_timeout=None)
"""

START = "server = AsenaServer(Echo, Room, Cell, port=0, options=options{arguments}).start(); print(server.url('/'))"

# Without held calls: as where the C library cannot be found.
NOTHING_HELD = "import asena_tornado.hosting.held as held; held.libc = None"

VARIANTS: dict[str, tuple[str, str]] = {
    "all": ("", ""),
    "-held": (NOTHING_HELD, ""),
    "-interval": ("", ", switch_interval=None"),
    "-loop": ("", ", loop='uvloop'"),
    "none": (NOTHING_HELD, ", switch_interval=None, loop='uvloop'"),
}

BUSY = """
{setup}
enough.clear()
steps, since, longest = 0, time.monotonic(), 0.0
print("busy")
while not enough.is_set() and time.monotonic() - since < {limit}:
    {step}
    steps += 1
gc.unfreeze()
"""

LOOKING = """
enough.clear()
steps, since, longest = 0, time.monotonic(), 0.0
print("busy")
last = time.perf_counter()
while not enough.is_set() and time.monotonic() - since < {limit}:
    now = time.perf_counter()
    if now - last > longest:
        longest = now - last
    last = now
    steps += 1
"""

# Before there is a server: steps per second.
ALONE = """
{setup}
def go():
    steps, since = 0, time.perf_counter()
    while time.perf_counter() - since < {seconds}:
        {step}
        steps += 1
    return steps / (time.perf_counter() - since)
sys.stderr.write(f"alone {{go()}}\\n")
gc.unfreeze()
"""

LIMIT = 120  # seconds after which a cell ends by itself
PAUSE = 0.005  # seconds


class Kernel:
    """A kernel of our own; what its cells print is read, which keeps it from piling up."""

    def __init__(self) -> None:
        from jupyter_client.manager import KernelManager

        self._directory = Path(tempfile.mkdtemp(prefix="asena-"))
        self._manager = KernelManager(transport="ipc", ip=str(self._directory / "k"))
        self._manager.start_kernel(env=os.environ | {"IPYTHONDIR": str(self._directory / "ipython")})
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    def send(self, source: str) -> str:
        return str(self._client.execute(textwrap.dedent(source), store_history=False))

    def read(self, id: str, until: str | None = None) -> str:
        """What the cell prints, until that text is there, or its end."""
        said = ""
        while True:
            try:
                message = self._client.get_iopub_msg(timeout=PATIENCE)
            except queue.Empty:
                raise LoadError(f"the kernel says nothing any more; so far: {said[-500:]}") from None
            if message["parent_header"].get("msg_id") != id:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                said = (said + content["text"])[-10_000:]
                if until is not None and until in said:
                    return said
            elif kind == "error":
                raise LoadError(f"{content['ename']}: {content['evalue']}")
            elif kind == "status" and content["execution_state"] == "idle":
                return said

    def run(self, source: str) -> str:
        return self.read(self.send(source))

    def close(self) -> None:
        self._manager.shutdown_kernel(now=True)
        self._client.stop_channels()
        self._manager.cleanup_resources()
        shutil.rmtree(self._directory, ignore_errors=True)


@dataclass
class Row:
    """What was seen with one cell. Times are milliseconds."""

    cell: str
    variant: str
    echo: tuple[float, float] = (0.0, 0.0)  # median, 99th percentile
    broadcast: tuple[float, float] = (0.0, 0.0)
    handshake: tuple[float, float] = (0.0, 0.0)
    rate: float = 0.0  # echoed messages per second, of 100 clients
    silent: float = 0.0  # the cell's speed with silent clients, 1.0 is that without a server
    server: float = 0.0  # the share of a core that the server's thread uses then
    loaded: float = 0.0  # the cell's speed while 100 clients echo
    longest: float = 0.0  # the longest that the cell waited for its turn, in a crowd
    error: str = ""


def percentiles(times: list[float]) -> tuple[float, float]:
    times = sorted(times)
    return times[len(times) // 2] * 1e3, times[min(len(times) - 1, int(len(times) * 0.99))] * 1e3


def timed(act: Callable[[], None], seconds: float, least: int) -> tuple[float, float]:
    """Median and 99th percentile of doing it again and again, for as many seconds and at least so often."""
    times: list[float] = []
    act()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < least:
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
        if times[-1] > 10:
            break
        time.sleep(PAUSE)
    return percentiles(times)


class Load:
    """The clients. The room and the echoing hundred stay connected from cell to cell."""

    def __init__(self, port: int, members: int) -> None:
        self._port = port
        self._payload = text(64)
        self._frame = message_frame("websocket", "echo", self._payload)
        size = len(self._payload) + 2
        self.one = connect(1, LoadCase("", "", "echo", "echo", ""), port, "websocket")[0]
        self.control = Client(port, "cell")
        self.control.request()
        self.control.accept()
        self.room = Wire(connect(members, LoadCase("", "", "fan-out", "room", ""), port, "websocket"), size)
        self.hundred = Wire(connect(100, LoadCase("", "", "echo", "echo", ""), port, "websocket"), size)

    def ask(self, what: str = "steps") -> dict[str, float]:
        """What the cell has done so far."""
        frame = bytearray(message_frame("websocket", "cell", what.encode()))
        frame[0] = 0x81  # text
        self.control.sock.sendall(frame)
        answer: dict[str, float] = json.loads(self.control.receive())
        return answer

    def shares(self, during: Callable[[], None]) -> tuple[float, float]:
        """The cell's steps per second meanwhile, and the share of a core that the server's thread used."""
        before = self.ask()
        during()
        after = self.ask()
        seconds = after["seconds"] - before["seconds"]
        return (after["steps"] - before["steps"]) / seconds, (after["server"] - before["server"]) / seconds

    def echo(self) -> None:
        self.one.send(self._payload)
        self.one.receive()

    def broadcast(self) -> None:
        due = self.room.total + len(self.room.fds)
        self.room.send(self.room.fds[0], self._frame)
        patience = time.monotonic() + PATIENCE
        while self.room.total < due:
            self.room.receive(0.5)
            if time.monotonic() > patience:
                raise LoadError("a broadcast did not reach everybody")

    def handshake(self) -> None:
        client = Client(self._port, "echo")
        client.request()
        client.accept()
        client.sock.close()

    def flood(self, seconds: float) -> float:
        """Messages per second, when each client sends the next when it has the last."""
        wire = self.hundred
        for fd in wire.fds:
            wire.send(fd, self._frame)
        began, before = time.perf_counter(), wire.total
        while (passed := time.perf_counter() - began) < seconds:
            for fd, k in wire.receive(0.05):
                wire.send(fd, self._frame * k)
        rate = (wire.total - before) / passed
        due = wire.total + len(wire.fds)
        patience = time.monotonic() + PATIENCE
        while wire.total < due and time.monotonic() < patience:
            wire.receive(0.1)
        return rate


def measure(kernel: Kernel, load: Load, variant: str, cell: str, alone: float, options: argparse.Namespace) -> Row:
    setup, step = CELLS[cell]
    row = Row(cell, variant)
    busy = kernel.send(BUSY.format(setup=setup, step=step, limit=LIMIT))
    kernel.read(busy, "busy")
    try:
        seconds, least = options.seconds, 20 if options.quick else 100
        speed, row.server = load.shares(lambda: time.sleep(seconds))
        row.silent = speed / alone
        row.echo = timed(load.echo, seconds, least)
        row.broadcast = timed(load.broadcast, seconds, least)
        row.handshake = timed(load.handshake, seconds, least)

        def flood() -> None:
            row.rate = load.flood(seconds)

        row.loaded = load.shares(flood)[0] / alone
    except (LoadError, OSError) as error:
        row.error = f"{type(error).__name__}: {error}"
    load.ask("enough")
    kernel.read(busy)
    return row


def crowd(kernel: Kernel, load: Load, variant: str, options: argparse.Namespace) -> Row:
    """How long a cell of pure Python waits for its turn while a crowd is published to."""
    row = Row(f"looking, room of {len(load.room.fds):,}", variant)
    busy = kernel.send(LOOKING.format(limit=LIMIT))
    kernel.read(busy, "busy")
    load.ask()
    row.broadcast = timed(load.broadcast, options.seconds * 2, 5)
    row.longest = load.ask()["longest"] * 1e3
    load.ask("enough")
    kernel.read(busy)
    return row


def variant_rows(variant: str, options: argparse.Namespace) -> Iterator[Row]:
    prepare, arguments = VARIANTS[variant]
    kernel = Kernel()
    try:
        kernel.run(SERVICES + prepare)
        alone = {}
        for cell in options.cells:
            setup, step = CELLS[cell]
            said = kernel.run(ALONE.format(setup=setup, step=step, seconds=options.seconds))
            found = re.search(r"alone ([\d.]+)", said)
            assert found is not None, said
            alone[cell] = float(found[1])
        url = kernel.run(START.format(arguments=arguments)).strip()
        port = int(url.rstrip("/").rpartition(":")[2])
        load = Load(port, 100)
        for cell in options.cells:
            yield measure(kernel, load, variant, cell, alone[cell], options)
        if options.crowd:
            yield crowd(kernel, Load(port, options.crowd), variant, options)
    finally:
        kernel.close()


def table(rows: list[Row]) -> str:
    lines = [
        "| cell | variant | echo p50 / p99, ms | broadcast to 100 | handshake | echoes/s | silent | server | loaded |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def pair(times: tuple[float, float]) -> str:
        return f"{times[0]:.1f} / {times[1]:.1f}" if any(times) else "–"

    for row in rows:
        if row.error:
            lines.append(f"| {row.cell} | {row.variant} | {row.error} |")
            continue
        if row.longest:
            lines.append(
                f"| {row.cell} | {row.variant} | – | {pair(row.broadcast)} | – | – | "
                f"waits at most {row.longest:.1f} ms | | |"
            )
            continue
        lines.append(
            f"| {row.cell} | {row.variant} | {pair(row.echo)} | {pair(row.broadcast)} | {pair(row.handshake)} "
            f"| {row.rate:,.0f} | {row.silent:.0%} | {row.server:.2%} | {row.loaded:.0%} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.alive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cells", nargs="+", default=["*"], metavar="CELL", help=f"wildcards, or of: {', '.join(CELLS)}"
    )
    parser.add_argument("--variants", nargs="+", default=["all", "none"], choices=VARIANTS, help="(all none)")
    parser.add_argument("--seconds", type=float, help="of each measurement (3)")
    parser.add_argument("--crowd", type=int, default=0, help="also a room of so many, and how long a cell waits for it")
    parser.add_argument("--quick", action="store_true", help="0.3 s each: does everything work?")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    options = parser.parse_args()
    options.seconds = options.seconds or (0.3 if options.quick else 3.0)
    options.cells = [name for name in CELLS if any(fnmatch.fnmatch(name, each) for each in options.cells)]
    return options


def main() -> None:
    options = parse()
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    rows: list[Row] = []
    with contextlib.suppress(KeyboardInterrupt):
        for variant in options.variants:
            for row in variant_rows(variant, options):
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
    print(f"\nPython {platform.python_version()}, {os.cpu_count()} cores, {options.seconds:g} s each\n\n{table(rows)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "alive.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
