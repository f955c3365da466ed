"""An application as a user writes it, with what a type checker should know of it; checked by test_typing.py.

Its types are those that somebody gets who installs the package: nothing here is Any but by choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_type

from pydantic import BaseModel

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    BulkOperation,
    BulkResult,
    Client,
    Context,
    Controller,
    Get,
    Inject,
    InvalidMessageError,
    Middleware,
    MiddlewareService,
    Next,
    Post,
    ReadyState,
    Response,
    Service,
    Socket,
    SocketData,
    Ulak,
    UlakError,
    UlakErrorCode,
    UlakNamespace,
    WebSocket,
    WebSocketOptions,
    ulak,
)


class User(BaseModel):
    name: str = "Anonymous"
    room: str = "general"


class Message(BaseModel):
    text: str


@dataclass
class Reader:
    topics: list[str]


@Middleware()
class Authenticated(MiddlewareService):
    async def handle(self, context: Context, next: Next) -> Response | None:
        if context.bearer_token is None:
            return context.send({"error": "Unauthorized"}, 401)
        context.set_websocket_value(User(name=context.bearer_token))
        return await next()


@Service("History")
class History:
    chat: UlakNamespace = Inject(ulak("/chat"))

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def add(self, message: Message) -> None:
        self.messages.append(message)
        assert_type(await self.chat.broadcast(message), int)


@WebSocket("/chat", middlewares=[Authenticated], options=WebSocketOptions(max_sockets=100))
class Chat(AsenaWebSocketService[User]):
    lines: History = Inject(History)

    async def on_open(self, ws: Socket[User]) -> None:
        assert_type(ws.data, SocketData[User])
        assert_type(ws.data.values, User)
        assert_type(ws.data.values.name, str)
        assert_type(ws.rooms, frozenset[str])
        assert_type(ws.ready_state, ReadyState)
        ws.subscribe(ws.data.values.room)
        assert_type(ws.send({"type": "welcome"}), bool)
        assert_type(ws.publish(ws.data.values.room, {"type": "joined"}), int)

    async def on_message(self, ws: Socket[User], message: Message) -> None:
        await self.lines.add(message)
        assert_type(self.to(ws.data.values.room, message, exclude=[ws]), int)

    async def on_invalid_message(self, ws: Socket[User], error: InvalidMessageError) -> None:
        ws.send(error.errors)

    def on_close(self, ws: Socket[User], code: int, reason: str) -> None:
        assert_type(self.sockets, Mapping[str, Socket[User]])
        assert_type(self.get_sockets_by_room("tech"), list[Socket[User]])
        for room, members in self.rooms.items():
            assert_type(room, str)
            for member in members:
                assert_type(member.data.values, User)


@WebSocket("/news")
class News(AsenaWebSocketService[Reader]):
    def on_open(self, ws: Socket[Reader]) -> None:
        assert_type(ws.data.values.topics, list[str])


@Controller("/api")
class Api:
    chat: Chat = Inject(Chat)
    by_name: Any = Inject("Chat")
    ulak: Ulak = Inject(Ulak)
    news: UlakNamespace = Inject(Ulak, lambda ulak: ulak.namespace("/news"))

    @Get("/rooms")
    def rooms(self) -> dict[str, int]:
        return {room: len(members) for room, members in self.chat.rooms.items()}

    @Post("/announcements/{room}", middlewares=[Authenticated])
    async def announce(self, context: Context) -> Response:
        message = await context.get_body(Message)
        assert_type(message, Message)
        assert_type(await self.ulak.to("/chat", context.params["room"], message), int)
        assert_type(await self.ulak.bulk_send([BulkOperation(type="broadcast", namespace="/news", data=1)]), BulkResult)
        return context.json({"success": True})


assert_type(Inject(Chat), Chat)
assert_type(Inject(ulak("/chat")), UlakNamespace)
assert_type(Inject(Ulak), Ulak)
assert_type(Inject(Ulak, lambda ulak: ulak.namespace("/chat")), UlakNamespace)
assert_type(Inject(Chat, lambda chat: chat.lines), History)


async def use() -> None:
    async with AsenaServer(Chat, News, Api, port=0) as server:
        assert_type(server, AsenaServer)
        assert_type(server.ulak.namespace("/chat"), UlakNamespace)
        client = await server.connect("/chat?name=Ann")
        assert_type(client, Client)
        assert_type(await client.recv(), str | bytes)
        try:
            assert_type(await server.ulak.to_socket("/chat", "some id", "hello"), int)
        except UlakError as error:
            assert_type(error.code, UlakErrorCode)
            assert_type(error.namespace, str | None)


def use_from_another_thread(server: AsenaServer) -> None:
    assert_type(server.call(server.ulak.broadcast("/chat", "hello")), int)
    assert_type(server.call(lambda: "done"), str)
    assert_type(AsenaServer(Chat).start(), AsenaServer)


async def mistakes(chat: Chat, ws: Socket[User], namespace: UlakNamespace) -> None:
    """What a type checker has to refuse: an ignore that nothing needs is an error of its own."""
    ws.send(ws.data.values.nmae)  # type: ignore[attr-defined]
    ws.send()  # type: ignore[call-arg]
    ws.subscribe(7)  # type: ignore[arg-type]
    chat.sockets["id"] = ws  # type: ignore[index]
    await namespace.broadcast("/chat", "hello")  # type: ignore[call-arg]
    history: History = Inject(Chat)  # type: ignore[assignment]
    await history.add("hello")  # type: ignore[arg-type]
    BulkOperation(type="shout", namespace="/chat", data=1)  # type: ignore[arg-type]
    AsenaServer(Chat, prot=3000)  # type: ignore[call-arg]
    WebSocket("/x", middleware=[Authenticated])  # type: ignore[call-arg]
