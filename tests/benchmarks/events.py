"""What recording events costs on the way of a message: without the test for it, with nobody looking, and watched.

Run it: ``python tests/benchmarks/events.py``. Prints nanoseconds per call, the best of several rounds.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import textwrap
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket, connect
from asena_tornado.connection import Outbox, connection
from asena_tornado.connection.dispatch import Dispatch
from asena_tornado.websocket.messages import encode
from asena_tornado.websocket.namespace import Namespace

CALLS, ROUNDS = 20_000, 15


@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_message(self, ws: Any, message: str) -> None:
        pass


def without_test(function: Any) -> Any:
    """The same function without its lines that record events."""
    source = textwrap.dedent(inspect.getsource(function))
    bare = re.sub(
        r"^ *if (self\._events\.watched|events\.watched|self\._listeners):\n( +for .*\n)?.*\n",
        "",
        source,
        flags=re.MULTILINE,
    )
    assert bare != source
    names: dict[str, Any] = {}
    exec(bare, function.__globals__, names)
    return names[function.__name__]


def best(call: Callable[[], object], after: Callable[[], object]) -> float:
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append(time.perf_counter() - start)
        after()
    return min(found) / CALLS * 1e9


async def main() -> None:
    async with AsenaServer(Chat, port=0) as server, await connect(server.url("/chat")):
        namespace = server.namespaces["/chat"]
        [socket] = namespace.sockets.values()
        line, outbox = cast(connection.Connection, socket._connection), namespace.outbox
        assert isinstance(outbox, Outbox)
        message = encode("x" * 64)
        text = "x" * 64

        def forget() -> None:
            line._dispatch._inbox.clear()
            line._dispatch.size = 0
            line._parser._held = line._dispatch._full = False
            line.owed, line.owed_counts, line.owed_size = None, [], 0
            outbox._open, outbox._dirty = None, []

        ways: dict[str, tuple[Any, tuple[Any, ...], Any]] = {
            "receive": (Dispatch.messages_received, ([text], len(text)), line._dispatch),
            "send to one": (connection.Connection.send, (message,), line),
            "send to a room": (Namespace._deliver, (None, message, None), namespace),
        }
        line._limit = 1 << 60
        for name, (method, arguments, owner) in ways.items():
            bare = partial(without_test(method), owner, *arguments)
            real = partial(method, owner, *arguments)
            namespace.events.watched = False
            namespace.listen(namespace.events, False)
            times = [best(bare, forget), best(real, forget)]
            namespace.events.watch(60)
            times.append(best(real, forget))
            labels = zip(("without", "nobody looks", "watched"), times, strict=True)
            print(f"{name:15}", "   ".join(f"{label} {each:5.0f} ns" for label, each in labels))


if __name__ == "__main__":
    asyncio.run(main())
