"""The small client for notebooks and tests, against our server and against one that nobody here wrote."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConnectionClosed,
    EncodeError,
    HandshakeRefused,
    Socket,
    WebSocket,
    connect,
)


@asynccontextmanager
async def serving(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    """A server of the websockets library that treats every client so; its URL."""
    async with serve(handler, "localhost", 0) as server:
        yield f"ws://localhost:{server.sockets[0].getsockname()[1]}/"


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def test_str_bytes_and_json_go_to_and_fro() -> None:
    async with serving(echo) as url, await connect(url) as client:
        for data, back in (("text", "text"), (b"\xff", b"\xff"), ({"a": [1]}, '{"a":[1]}')):
            await client.send(data)
            assert await client.recv() == back
        await client.send([1, 2])
        assert await client.recv_json() == [1, 2]
    assert client.closed
    assert repr(client) == f"<Client {url} closed>"


async def test_the_headers_go_along_with_the_handshake() -> None:
    async def tell(connection: ServerConnection) -> None:
        assert connection.request is not None
        await connection.send(connection.request.headers["Authorization"])

    async with serving(tell) as url:
        client = await connect(url, headers={"Authorization": "Bearer 123"})
        assert await client.recv() == "Bearer 123"


async def test_iteration_ends_when_the_server_closes() -> None:
    async def count(connection: ServerConnection) -> None:
        for i in range(3):
            await connection.send(str(i))

    async with serving(count) as url:
        client = await connect(url)
        assert [message async for message in client] == ["0", "1", "2"]
        assert client.closed
        assert [message async for message in client] == []


async def test_what_came_before_the_end_is_still_received_then_the_end_says_why() -> None:
    async def leave(connection: ServerConnection) -> None:
        await connection.send("one")
        await connection.send("two")
        await connection.close(4001, "enough")

    async with serving(leave) as url:
        client = await connect(url)
        assert [await client.recv(), await client.recv()] == ["one", "two"]
        for attempt in (client.recv(), client.recv_json(), client.send("x")):
            with pytest.raises(ConnectionClosed, match="closed with code 4001: enough") as closed:
                await attempt
            assert (closed.value.code, closed.value.reason) == (4001, "enough")
        await client.close()


async def test_a_cut_connection_is_closed_without_a_code() -> None:
    async def cut(connection: ServerConnection) -> None:
        connection.transport.abort()

    async with serving(cut) as url:
        client = await connect(url)
        with pytest.raises(ConnectionClosed, match="closed without a code"):
            await client.recv()


async def test_every_wait_has_a_time_limit_and_nothing_is_lost_by_it() -> None:
    go_on = asyncio.Event()

    async def hold(connection: ServerConnection) -> None:
        await go_on.wait()
        await connection.send("late")
        await connection.wait_closed()

    async with serving(hold) as url:
        client = await connect(url, timeout=5)
        for limit in (0, 0.01):
            with pytest.raises(TimeoutError, match=rf"no message from {url} within {limit} s"):
                await client.recv(timeout=limit)
        go_on.set()
        assert await client.recv() == "late"
        await client.close()


async def test_a_handshake_nobody_answers_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.05 s"):
            await connect(url, timeout=0.05)


async def test_a_refused_handshake_says_the_status_and_why() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        pass

    async with AsenaServer(Service, port=0) as server:
        with pytest.raises(HandshakeRefused, match="refused the handshake with HTTP 404") as refused:
            await server.connect("/y")
        assert refused.value.status == 404
        with pytest.raises(HandshakeRefused, match="403") as refused:
            await server.connect("/x", headers={"Origin": "http://elsewhere"})
        assert json.loads(refused.value.body)["error"].startswith("the origin 'http://elsewhere' is not allowed")
        url = server.url("/x")
    with pytest.raises(OSError, match="refused"):
        await connect(url)
    for wrong in ("http://localhost/x", "localhost:1/x", "/x"):
        with pytest.raises(ValueError, match="begins with ws:// or wss://"):
            await connect(wrong)


async def test_what_cannot_be_sent_is_an_error_on_the_spot() -> None:
    async with serving(echo) as url, await connect(url) as client:
        with pytest.raises(EncodeError):
            await client.send(object())
        await client.send("still fine")
        assert await client.recv() == "still fine"


async def test_closing_ends_the_wait_for_a_message() -> None:
    async def listen(messages: AsyncIterator[str | bytes]) -> list[str | bytes]:
        return [message async for message in messages]

    async with serving(echo) as url:
        client = await connect(url)
        waiting = asyncio.ensure_future(client.recv())
        listening = asyncio.ensure_future(listen(aiter(client)))
        await asyncio.sleep(0)
        await client.close(3000, "bye")
        with pytest.raises(ConnectionClosed):
            await waiting
        assert await listening == []
        await client.close()


async def test_a_client_that_is_not_read_still_answers_pings_and_the_close() -> None:
    """As in a notebook, where nobody reads between the cells."""
    ponged = asyncio.Event()

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            for i in range(100):
                ws.send(str(i))
            ws.ping()

        def on_pong(self, ws: Socket) -> None:
            assert ws.round_trip_time is not None
            ponged.set()

    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await ponged.wait()
    assert [await client.recv() for _ in range(100)] == [str(i) for i in range(100)]
    with pytest.raises(ConnectionClosed, match="1001"):
        await client.recv()


async def test_a_server_that_closes_at_once_is_noticed() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.send("no")
            ws.close(4000)

    async with AsenaServer(Service, port=0) as server:
        for _ in range(10):
            client = await server.connect("/x")
            assert await client.recv() == "no"
            with pytest.raises(ConnectionClosed, match="4000"):
                await client.recv()


PROGRAM = """
import atexit
atexit.register(lambda: print(*said, f"thread ended: {thread.ended}"))  # registered first, and so called last

from asena_tornado import AsenaServer, AsenaWebSocketService, LiveClient, WebSocket
from asena_tornado.client.plain import client_thread

said = []

@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_close(self, ws, code):
        said.append(f"closed with {code},")

server = AsenaServer(Chat, port=0).start()
client = LiveClient(server.client_url("/chat"))
client.connect().ready(10).result()
thread = client_thread()
"""


def test_the_thread_of_clients_ends_with_the_program_and_after_its_servers() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "closed with 3001, thread ended: True\n"
    assert done.stderr == ""
