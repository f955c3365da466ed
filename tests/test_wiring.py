"""Components in a running server: when they are built, started and stopped, and what their mistakes look like there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    CircularDependencyError,
    ConfigurationError,
    Controller,
    Get,
    Inject,
    InjectionError,
    Middleware,
    MiddlewareService,
    Next,
    Response,
    ServerStateError,
    Service,
    Socket,
    WebSocket,
    connect,
)


class Diary:
    """What happened, by component."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def component(self, name: str, **fields: Any) -> type[Any]:
        def on_start(component: Any) -> None:
            self.entries.append(f"{name} starts")

        async def on_stop(component: Any) -> None:
            await asyncio.sleep(0)
            self.entries.append(f"{name} stops")

        return Service(type(name, (), {"on_start": on_start, "on_stop": on_stop, **fields}))


@asynccontextmanager
async def hosted(server: AsenaServer, hosting: str) -> AsyncIterator[str]:
    """Serves in one of the ways there are; gives the base of its WebSocket URLs."""
    if hosting == "mounted":
        app = Application([])
        server.mount(app)
        listener, port = bind_unused_port()
        http = HTTPServer(app)
        http.add_socket(listener)
        try:
            yield f"ws://127.0.0.1:{port}"
        finally:
            await server.aclose()
            http.stop()
            await http.close_all_connections()
        return
    if hosting == "here":
        await server.__aenter__()
    else:
        server.start(hosting=hosting)  # type: ignore[arg-type]  # one of the two
    try:
        yield f"ws://localhost:{server.port}"
    finally:
        await server.aclose()


every_hosting = pytest.mark.parametrize("hosting", ["here", "thread", "mounted"])


@every_hosting
async def test_a_component_is_given_the_server_it_runs_in(hosting):
    @Service
    class Addresses:
        server: AsenaServer = Inject(AsenaServer)

        def on_start(self) -> None:
            self.state_at_start = self.server.state

    @WebSocket("/chat")
    class Chat(AsenaWebSocketService):
        server: AsenaServer = Inject(AsenaServer)
        addresses: Addresses = Inject(Addresses)

        def on_open(self, ws: Socket) -> None:
            ws.send([len(self.server.inspector.sockets), self.addresses.state_at_start])

    first, second = AsenaServer(Chat, port=0), AsenaServer(Chat, port=0)
    async with hosted(first, hosting) as base, hosted(second, "here"):
        async with await connect(f"{base}/chat") as client:
            assert await client.recv_json() == [1, "starting"]
        mine, other = (server.namespaces["/chat"].hooks.service for server in (first, second))
        assert (mine.server, mine.addresses.server) == (first, first)
        assert (other.server, other.addresses.server) == (second, second)


@every_hosting
async def test_components_start_before_the_first_client_and_stop_after_the_last_on_close(hosting):
    diary = Diary()
    Database = diary.component("Database")
    Users = diary.component("Users", database=Inject(Database))

    @WebSocket("/chat")
    class Chat(AsenaWebSocketService):
        users = Inject(Users)

        def on_open(self, ws: Socket) -> None:
            diary.entries.append("client comes")
            ws.send("welcome")

        async def on_close(self, ws: Socket) -> None:
            await asyncio.sleep(0)
            diary.entries.append("client goes")

    server = AsenaServer(Chat, port=0)
    async with hosted(server, hosting) as base:
        client = await connect(f"{base}/chat")
        await client.recv()
        stopping = asyncio.create_task(server.aclose())
        async for _ in client:  # until the server closes
            pass
        await stopping
    assert diary.entries == [
        "Database starts",
        "Users starts",
        "client comes",
        "client goes",
        "Users stops",
        "Database stops",
    ]


@pytest.mark.parametrize("hosting", ["here", "thread"])
async def test_a_server_that_starts_again_starts_the_same_instances_again(hosting):
    diary = Diary()
    Database = diary.component("Database")
    server = AsenaServer(Database(), port=0)
    for _ in range(2):
        async with hosted(server, hosting):
            diary.entries.append("up")
    assert diary.entries == ["Database starts", "up", "Database stops"] * 2


async def test_hooks_run_on_the_servers_loop():
    @Service
    class Looking:
        def on_start(self) -> None:
            self.loop = asyncio.get_running_loop()

        async def on_stop(self) -> None:
            assert asyncio.get_running_loop() is self.loop

    looking = Looking()
    with AsenaServer(looking, port=0) as server:
        assert looking.loop is not asyncio.get_running_loop()
        assert server.call(asyncio.get_running_loop) is looking.loop
    async with AsenaServer(looking, port=0):
        assert looking.loop is asyncio.get_running_loop()


async def test_what_is_only_injected_is_served_like_what_is_listed():
    @WebSocket("/chat")
    class Chat(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.send("welcome")

    @Service
    class Announcer:
        chat: Chat = Inject(Chat)

    @Controller("/api")
    class Api:
        announcer: Announcer = Inject(Announcer)

        @Get("/announce")
        def announce(self) -> int:
            return self.announcer.chat.in_("hello")

    async with AsenaServer(Api, port=0) as server, await server.connect("/chat") as client:
        assert await client.recv() == "welcome"
        response = await AsyncHTTPClient().fetch(server.url("/api/announce"))
        assert response.body == b"1"
        assert await client.recv() == "hello"


async def test_the_same_instance_is_injected_everywhere():
    @Service("Settings")
    class Settings: ...

    @Middleware()
    class Checks(MiddlewareService):
        settings: Settings = Inject(Settings)

        async def handle(self, context: Any, next: Next) -> Response | None:
            context.state["settings"] = self.settings
            context.set_websocket_value({"settings": self.settings})
            return await next()

    @WebSocket("/chat", middlewares=[Checks])
    class Chat(AsenaWebSocketService):
        settings = Inject("Settings")

        def on_open(self, ws: Socket) -> None:
            ws.send(ws.data.values["settings"] is self.settings)

    async with AsenaServer(Chat, port=0) as server, await server.connect("/chat") as client:
        assert await client.recv_json() is True


async def test_two_servers_share_no_components():
    @Service
    class Counter:
        def __init__(self) -> None:
            self.count = 0

    @WebSocket("/count")
    class Counting(AsenaWebSocketService):
        counter: Counter = Inject(Counter)

        def on_open(self, ws: Socket) -> None:
            self.counter.count += 1
            ws.send(self.counter.count)

    async with (
        AsenaServer(Counting, port=0) as one,
        AsenaServer(Counting, port=0) as two,
        await one.connect("/count") as first,
        await two.connect("/count") as second,
    ):
        assert (await first.recv_json(), await second.recv_json()) == (1, 1)


# Mistakes


def circle() -> Any:
    @Service
    class First:
        other = Inject("Second")

    @Service
    class Second:
        other = Inject(First)

    return [First, Second]


def unknown_name() -> Any:
    @Service
    class Users:
        mail = Inject("Mial")

    return [Users]


def one_name_twice() -> Any:
    @Service("Mail")
    class SmtpMail: ...

    @Service("Mail")
    class FakeMail: ...

    return [SmtpMail, FakeMail]


def no_component() -> Any:
    class Mail: ...

    @Service
    class Users:
        mail = Inject(Mail)

    return [Users]


def one_path_twice() -> Any:
    @WebSocket("/chat")
    class Chat(AsenaWebSocketService): ...

    @WebSocket("chat")
    class OtherChat(AsenaWebSocketService): ...

    @Service
    class Users:
        other = Inject(OtherChat)

    return [Chat, Users]


@every_hosting
@pytest.mark.parametrize(
    ("components", "kind", "says"),
    [
        (circle, CircularDependencyError, "First.other -> Second.other -> First"),
        (unknown_name, InjectionError, "Users.mail: no component is named 'Mial'"),
        (one_name_twice, InjectionError, "two components are named 'Mail'"),
        (no_component, InjectionError, "Users.mail: Mail is not a component: put @Service above the class"),
        (one_path_twice, ConfigurationError, "two services for '/chat'"),
    ],
)
async def test_a_mistake_is_an_error_at_start_before_anything_listens(components, kind, says, hosting):
    server = AsenaServer(*components(), port=0)
    with pytest.raises(kind, match=says):
        await hosted(server, hosting).__aenter__()
    with pytest.raises(ServerStateError, match="with port=0, the port is known once the server has started"):
        server.port  # noqa: B018


@pytest.mark.parametrize("hosting", ["here", "thread"])
async def test_a_component_that_cannot_start_stops_those_that_had_and_frees_the_port(hosting):
    diary = Diary()
    Database = diary.component("Database")

    @Service
    class Mail:
        database = Inject(Database)
        broken = True

        async def on_start(self) -> None:
            if self.broken:
                raise ConnectionError("no mail server")

    mail = Mail()
    server = AsenaServer(mail, port=0)
    with pytest.raises(ConnectionError, match="no mail server") as failure:
        await hosted(server, hosting).__aenter__()
    assert failure.value.__notes__ == ["raised by Mail.on_start(); the components that had started were stopped"]
    assert diary.entries == ["Database starts", "Database stops"]
    assert server.state == "stopped"
    with socket.socket() as again:
        again.bind(("127.0.0.1", server.port))
    mail.broken = False
    async with hosted(server, hosting):
        assert "running" in repr(server)


async def test_a_component_that_cannot_stop_is_logged_and_keeps_nothing_from_stopping(caplog):
    diary = Diary()
    Database = diary.component("Database")

    @Service
    class Mail:
        database = Inject(Database)

        def on_stop(self) -> None:
            raise ConnectionError("the mail server is gone")

    async with AsenaServer(Mail, port=0) as server:
        pass
    assert "Mail.on_stop() failed" in caplog.text
    assert diary.entries == ["Database starts", "Database stops"]
    assert server.state == "stopped"


# Replacing components in a test


@Service
class Mail:
    def send(self, to: str) -> str:
        raise ConnectionError("a test sends no mail")


@Controller("/invitations")
class Invitations:
    mail: Mail = Inject(Mail)

    @Get("/{guest}")
    def invite(self, context: Any) -> str:
        return self.mail.send(context.params["guest"])


class FakeMail:
    def send(self, to: str) -> str:
        return f"would have written to {to}"


@pytest.mark.parametrize("target", [Mail, "Mail"])
@pytest.mark.parametrize("replacement", [FakeMail, FakeMail()])
async def test_a_component_is_replaced_by_class_or_name_with_a_class_or_an_instance(target, replacement):
    async with AsenaServer(Invitations, port=0).override(target, replacement) as server:
        response = await AsyncHTTPClient().fetch(server.url("/invitations/ann"))
        assert response.body == b"would have written to ann"


async def test_replacing_comes_before_the_start_and_has_to_replace_something():
    async with AsenaServer(Invitations, port=0) as server:
        with pytest.raises(ServerStateError, match="override"):
            server.override(Mail, FakeMail)
    with pytest.raises(InjectionError, match="replaces nothing"):
        await AsenaServer(port=0).override(Mail, FakeMail).__aenter__()
