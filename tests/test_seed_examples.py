"""Every code example of the original's guide to WebSockets, in its order, as a Python user would write it.

The guide has two editions. The newer one is written here as one writes Python: models instead of interfaces, data
instead of JSON by hand. The early one has no rooms of its own yet and is kept as literal as Python allows.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from unittest.mock import ANY

import pytest
from pydantic import BaseModel
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from typing_extensions import TypedDict
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    CircularDependencyError,
    ConnectionClosed,
    Context,
    Controller,
    Inject,
    InvalidMessageError,
    Middleware,
    MiddlewareService,
    Next,
    Post,
    Response,
    Service,
    Socket,
    UlakNamespace,
    WebSocket,
    ulak,
)

log = logging.getLogger("example")


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "example")


def now() -> datetime:
    return datetime.now(UTC)


# The newer edition


async def test_creating_a_websocket_service(caplog):
    @WebSocket("/chat", name="ChatSocket")
    class ChatSocket(AsenaWebSocketService):
        async def on_open(self, ws: Socket) -> None:
            log.info("client connected: %s", ws.id)
            ws.send("Welcome to chat!")

        async def on_message(self, ws: Socket, message: str) -> None:
            log.info("received: %s", message)
            ws.send(f"Echo: {message}")

        async def on_close(self, ws: Socket) -> None:
            log.info("client disconnected: %s", ws.id)

    async with AsenaServer(ChatSocket, port=0) as server, connect(server.url("/chat")) as client:
        assert await client.recv() == "Welcome to chat!"
        await client.send("hello")
        assert await client.recv() == "Echo: hello"
    connected, received, disconnected = (record.message for record in caplog.records if record.name == "example")
    assert received == "received: hello"
    assert disconnected.removeprefix("client disconnected: ") == connected.removeprefix("client connected: ")


async def test_websocket_lifecycle_methods_on_open():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_open(self, ws: Socket) -> None:
            log.info("new connection: %s", ws.id)
            ws.send({"type": "welcome", "message": "Connected!"})

    async with AsenaServer(ChatSocket, port=0) as server, connect(server.url("/chat")) as client:
        assert json.loads(await client.recv()) == {"type": "welcome", "message": "Connected!"}


async def test_websocket_lifecycle_methods_on_message():
    class Message(BaseModel):
        type: str

    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: Message) -> None:
            if message.type == "ping":
                ws.send({"type": "pong"})

    async with AsenaServer(ChatSocket, port=0) as server, connect(server.url("/chat")) as client:
        await client.send('{"type": "something else"}')
        await client.send('{"type": "ping"}')
        assert json.loads(await client.recv()) == {"type": "pong"}


async def test_websocket_lifecycle_methods_on_close(caplog):
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_close(self, ws: Socket, code: int, reason: str) -> None:
            log.info("client disconnected: %s, %s %s", ws.id, code, reason)

    async with AsenaServer(ChatSocket, port=0) as server, connect(server.url("/chat")) as client:
        await client.close(4000, "bye")
    assert caplog.records[-1].message.endswith(", 4000 bye")


async def test_socket_api_ws_send():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.send("Hello client!")
            ws.send({"type": "update", "data": {"count": 42}})

    async with AsenaServer(ChatSocket, port=0) as server, connect(server.url("/chat")) as client:
        assert await client.recv() == "Hello client!"
        assert json.loads(await client.recv()) == {"type": "update", "data": {"count": 42}}


async def test_socket_api_ws_id():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.send(f"Socket ID: {ws.id}")

    async with (
        AsenaServer(ChatSocket, port=0) as server,
        connect(server.url("/chat")) as ann,
        connect(server.url("/chat")) as bob,
    ):
        assert await ann.recv() != await bob.recv()


async def test_socket_api_ws_data(caplog):
    class UserData(BaseModel):
        user_id: int
        username: str

    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService[UserData]):
        async def on_open(self, ws: Socket[UserData]) -> None:
            log.info("user connected: %s", ws.data.username)
            ws.send(ws.data.values)

    async with (
        AsenaServer(ChatSocket, port=0) as server,
        connect(server.url("/chat?user_id=7&username=Ann")) as client,
    ):
        assert json.loads(await client.recv()) == {"user_id": 7, "username": "Ann"}
    assert caplog.records[-1].message == "user connected: Ann"


# The chat of the sections about rooms


class ChatData(BaseModel):
    username: str = "Anonymous"
    room: str = "general"


class ChatMessage(BaseModel):
    type: Literal["message"] = "message"
    message: str


@WebSocket("/chat")
class RoomChat(AsenaWebSocketService[ChatData]):
    # Subscribing to Rooms
    async def on_open(self, ws: Socket[ChatData]) -> None:
        ws.subscribe(ws.data.room)
        ws.send({"type": "welcome", "message": f"Welcome to {ws.data.room}, {ws.data.username}!"})
        ws.publish(ws.data.room, {"type": "user_joined", "username": ws.data.username, "timestamp": now()})

    # Publishing Messages
    async def on_message(self, ws: Socket[ChatData], message: ChatMessage) -> None:
        ws.publish(
            ws.data.room,
            {"type": "message", "username": ws.data.username, "message": message.message, "timestamp": now()},
        )

    async def on_invalid_message(self, ws: Socket[ChatData], error: InvalidMessageError) -> None:
        ws.send({"type": "error", "message": "Invalid message format"})

    # Unsubscribing from Rooms
    async def on_close(self, ws: Socket[ChatData]) -> None:
        ws.publish(ws.data.room, {"type": "user_left", "username": ws.data.username})
        ws.unsubscribe(ws.data.room)  # not needed: a socket that is gone is in no room


async def test_built_in_room_management_subscribing_to_rooms():
    async with (
        AsenaServer(RoomChat, port=0) as server,
        await server.connect("/chat?username=Ann&room=tech") as ann,
        await server.connect("/chat") as elsewhere,
    ):
        assert await ann.recv_json() == {"type": "welcome", "message": "Welcome to tech, Ann!"}
        assert await elsewhere.recv_json() == {"type": "welcome", "message": "Welcome to general, Anonymous!"}
        async with await server.connect("/chat?username=Bob&room=tech") as bob:
            assert await bob.recv_json() == {"type": "welcome", "message": "Welcome to tech, Bob!"}
            joined = await ann.recv_json()
    assert joined == {"type": "user_joined", "username": "Bob", "timestamp": ANY}
    assert datetime.fromisoformat(joined["timestamp"]) <= now()


async def test_built_in_room_management_publishing_messages():
    async with (
        AsenaServer(RoomChat, port=0) as server,
        await server.connect("/chat?username=Ann") as ann,
        await server.connect("/chat?username=Bob") as bob,
    ):
        await ann.recv()
        assert (await ann.recv_json())["type"] == "user_joined"
        await bob.recv()
        await ann.send({"type": "message", "message": "hi"})
        assert await bob.recv_json() == {"type": "message", "username": "Ann", "message": "hi", "timestamp": ANY}
        await ann.send("this is not JSON")
        assert await ann.recv_json() == {"type": "error", "message": "Invalid message format"}


async def test_built_in_room_management_unsubscribing_from_rooms():
    async with (
        AsenaServer(RoomChat, port=0) as server,
        await server.connect("/chat?username=Ann") as ann,
    ):
        await ann.recv()
        async with await server.connect("/chat?username=Bob") as bob:
            await bob.recv()
        assert [(await ann.recv_json())["type"] for _ in range(2)] == ["user_joined", "user_left"]


async def test_built_in_room_management_accessing_room_members():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService[ChatData]):
        def on_open(self, ws: Socket[ChatData]) -> None:
            ws.subscribe(ws.data.room)
            ws.send("welcome")

        async def on_message(self, ws: Socket[ChatData], message: str) -> None:
            members = self.get_sockets_by_room(ws.data.room)
            assert set(members) == set(self.rooms[ws.data.room])
            ws.send({"type": "room_info", "total_users": len(members)})

    async with (
        AsenaServer(ChatSocket, port=0) as server,
        await server.connect("/chat") as ann,
        await server.connect("/chat") as bob,
        await server.connect("/chat?room=elsewhere") as eve,
    ):
        for client in (ann, bob, eve):
            assert await client.recv() == "welcome"
        await ann.send("how many are we?")
        assert await ann.recv_json() == {"type": "room_info", "total_users": 2}


async def test_broadcasting_broadcast_to_all_clients():
    @WebSocket("/notifications")
    class NotificationSocket(AsenaWebSocketService):
        def broadcast_notification(self, notification: Any) -> None:
            self.in_(notification)

        def get_connected_users(self) -> list[str]:
            return list(self.sockets)

    notifications = NotificationSocket()
    async with (
        AsenaServer(notifications, port=0) as server,
        await server.connect("/notifications") as ann,
        await server.connect("/notifications") as bob,
    ):
        notifications.broadcast_notification({"text": "lunch"})
        assert [await client.recv_json() for client in (ann, bob)] == [{"text": "lunch"}] * 2
        assert len(notifications.get_connected_users()) == 2


async def test_broadcasting_broadcast_to_specific_room():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService[ChatData]):
        def on_open(self, ws: Socket[ChatData]) -> None:
            ws.subscribe(ws.data.room)

        def notify_room(self, room: str, notification: Any) -> None:
            self.to(room, notification)

        def send_announcement(self, room: str, message: str) -> None:
            self.to(room, {"type": "announcement", "message": message, "timestamp": now()})

    chat = ChatSocket()
    async with (
        AsenaServer(chat, port=0) as server,
        await server.connect("/chat?room=tech") as ann,
        await server.connect("/chat?room=art") as bob,
    ):
        chat.notify_room("tech", ["for tech"])
        chat.send_announcement("art", "for art")
        assert await ann.recv_json() == ["for tech"]
        assert await bob.recv_json() == {"type": "announcement", "message": "for art", "timestamp": ANY}


async def test_broadcasting_private_messages():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.send(ws.id)

        def send_private_message(self, target_socket_id: str, message: str) -> None:
            target = self.sockets.get(target_socket_id)
            if target:
                target.send({"type": "private_message", "message": message})

    chat = ChatSocket()
    async with (
        AsenaServer(chat, port=0) as server,
        await server.connect("/chat") as ann,
        await server.connect("/chat") as bob,
    ):
        ann_id = str(await ann.recv())
        await bob.recv()
        chat.send_private_message("nobody", "lost")
        chat.send_private_message(ann_id, "psst")
        chat.in_("end")
        assert await ann.recv_json() == {"type": "private_message", "message": "psst"}
        assert await bob.recv() == "end"


# The middleware of the sections about middleware


@Middleware()
class WsAuthMiddleware(MiddlewareService):
    async def handle(self, context: Context, next: Next) -> Response | None:
        token = context.query.get("token") or context.bearer_token
        if not token:
            return context.send({"error": "Unauthorized"}, 401)
        if token != "valid-token":
            return context.send({"error": "Invalid token"}, 401)
        context.set_websocket_value({"user_id": "123", "username": "john_doe"})
        return await next()


class UserData(BaseModel):
    user_id: str
    username: str


@WebSocket("/private", middlewares=[WsAuthMiddleware])
class PrivateSocket(AsenaWebSocketService[UserData]):
    async def on_open(self, ws: Socket[UserData]) -> None:
        user = ws.data.values
        log.info("authenticated user connected: %s", user.username)
        ws.send({"type": "authenticated", "user_id": user.user_id, "username": user.username})

    async def on_message(self, ws: Socket[UserData], message: str) -> None:
        log.info("message from %s: %s", ws.data.values.username, message)
        ws.send("heard")


@pytest.mark.parametrize(("path", "error"), [("/private", "Unauthorized"), ("/private?token=stolen", "Invalid token")])
async def test_websocket_middleware_creating_websocket_middleware(path, error):
    async with AsenaServer(PrivateSocket, port=0) as server:
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.url(path))
        assert refused.value.response.status_code == 401
        assert json.loads(refused.value.response.body or b"") == {"error": error}
        assert not server.namespaces["/private"].sockets


async def test_websocket_middleware_using_middleware_in_websocket(caplog):
    async with (
        AsenaServer(PrivateSocket, port=0) as server,
        await server.connect("/private?token=valid-token") as client,
    ):
        assert await client.recv_json() == {"type": "authenticated", "user_id": "123", "username": "john_doe"}
        await client.send("hello")
        assert await client.recv() == "heard"
    assert "message from john_doe: hello" in caplog.messages


async def test_websocket_middleware_multiple_middleware(caplog):
    @Middleware()
    class WsLoggingMiddleware(MiddlewareService):
        async def handle(self, context: Context, next: Next) -> Response | None:
            log.info("handshake of %s", context.query.get("token"))
            return await next()

    @Middleware()
    class WsRateLimitMiddleware(MiddlewareService):
        def __init__(self) -> None:
            self.left = 1

        async def handle(self, context: Context, next: Next) -> Response | None:
            log.info("%s left", self.left)
            if not self.left:
                return context.send({"error": "Too many connections"}, 429)
            self.left -= 1
            return await next()

    @WebSocket("/admin", middlewares=[WsLoggingMiddleware, WsAuthMiddleware, WsRateLimitMiddleware])
    class AdminSocket(AsenaWebSocketService[UserData]):
        async def on_open(self, ws: Socket[UserData]) -> None:
            ws.send({"type": "admin-welcome", "user": ws.data.values, "permissions": ["read", "write", "delete"]})

    async with AsenaServer(AdminSocket, port=0) as server:
        async with connect(server.url("/admin?token=valid-token")) as client:
            assert json.loads(await client.recv()) == {
                "type": "admin-welcome",
                "user": {"user_id": "123", "username": "john_doe"},
                "permissions": ["read", "write", "delete"],
            }
        for token, status in (("stolen", 401), ("valid-token", 429)):
            with pytest.raises(InvalidStatus) as refused:
                await connect(server.url(f"/admin?token={token}"))
            assert refused.value.response.status_code == status
    assert caplog.messages == [
        "handshake of valid-token",
        "1 left",
        "handshake of stolen",
        "handshake of valid-token",
        "0 left",
    ]


async def test_websocket_middleware_client_side_example():
    async with AsenaServer(PrivateSocket, port=0) as server:
        async with connect(server.url("/private?token=valid-token")) as client:
            assert json.loads(await client.recv())["type"] == "authenticated"
        headers = {"Authorization": "Bearer valid-token"}
        async with connect(server.url("/private"), additional_headers=headers) as client:
            assert json.loads(await client.recv())["type"] == "authenticated"


async def test_using_websocket_in_services():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService[ChatData]):
        def on_open(self, ws: Socket[ChatData]) -> None:
            ws.subscribe(ws.data.room)

    @Service("NotificationService")
    class NotificationService:
        chat_socket: ChatSocket = Inject(ChatSocket)

        async def send_system_message(self, room: str, message: str) -> None:
            self.chat_socket.to(room, {"type": "system_message", "message": message, "timestamp": now()})

        async def notify_all_users(self, message: str) -> None:
            self.chat_socket.in_({"type": "notification", "message": message})

    notifications = NotificationService()
    async with (
        AsenaServer(notifications, port=0) as server,
        await server.connect("/chat?room=tech") as ann,
        await server.connect("/chat") as bob,
    ):
        await notifications.send_system_message("tech", "rebooting")
        await notifications.notify_all_users("back again")
        assert await ann.recv_json() == {"type": "system_message", "message": "rebooting", "timestamp": ANY}
        for client in (ann, bob):
            assert await client.recv_json() == {"type": "notification", "message": "back again"}


# Real-World Example: Notification System


@dataclass
class NotificationData:
    user_id: str


class NotificationRequest(BaseModel):
    type: str


@WebSocket("/ws/notifications")
class NotificationSocket(AsenaWebSocketService[NotificationData]):
    async def on_open(self, ws: Socket[NotificationData]) -> None:
        ws.subscribe(f"user:{ws.data.user_id}")
        ws.subscribe("announcements")
        ws.send({"type": "connected", "message": "Connected to notification system"})

    async def on_message(self, ws: Socket[NotificationData], message: NotificationRequest) -> None:
        if message.type == "ping":
            ws.send({"type": "pong"})

    async def on_invalid_message(self, ws: Socket[NotificationData], error: InvalidMessageError) -> None:
        log.error("invalid message format")

    # No on_close: a socket that is gone has left its rooms.


@Service("UserService")
class UserService:
    notification_socket: NotificationSocket = Inject(NotificationSocket)

    async def update_user_profile(self, user_id: str, data: Any) -> None:
        # ... update the user in the database
        self.notification_socket.to(
            f"user:{user_id}",
            {"type": "profile_updated", "message": "Your profile has been updated", "timestamp": now()},
        )

    async def send_global_announcement(self, message: str) -> None:
        self.notification_socket.to("announcements", {"type": "announcement", "message": message, "timestamp": now()})


@Controller("/admin")
class AdminController:
    notification_socket: NotificationSocket = Inject(NotificationSocket)

    @Post("/announcement")
    async def send_announcement(self, context: Context) -> Response:
        body = await context.get_body()
        self.notification_socket.to(
            "announcements", {"type": "announcement", "message": body["message"], "timestamp": now()}
        )
        return context.json({"success": True})


async def test_notification_system_websocket_service(caplog):
    async with (
        AsenaServer(NotificationSocket, port=0) as server,
        await server.connect("/ws/notifications?user_id=7") as client,
    ):
        assert await client.recv_json() == {"type": "connected", "message": "Connected to notification system"}
        assert set(server.namespaces["/ws/notifications"].rooms) == {"user:7", "announcements"}
        await client.send("not JSON")
        await client.send({"type": "ping"})
        assert await client.recv_json() == {"type": "pong"}
        await client.close()
        assert not server.namespaces["/ws/notifications"].rooms
    assert caplog.messages == ["invalid message format"]


async def test_notification_system_using_websocket_from_a_service():
    users = UserService()
    async with (
        AsenaServer(users, port=0) as server,
        await server.connect("/ws/notifications?user_id=7") as seven,
        await server.connect("/ws/notifications?user_id=8") as eight,
    ):
        await seven.recv()
        await eight.recv()
        await users.update_user_profile("7", {"name": "Ann"})
        await users.send_global_announcement("lunch")
        assert [(await seven.recv_json())["type"] for _ in range(2)] == ["profile_updated", "announcement"]
        assert await eight.recv_json() == {"type": "announcement", "message": "lunch", "timestamp": ANY}


async def test_notification_system_using_from_a_controller():
    async with (
        AsenaServer(AdminController, port=0) as server,
        await server.connect("/ws/notifications?user_id=7") as client,
    ):
        await client.recv()
        request = HTTPRequest(
            server.url("/admin/announcement"),
            "POST",
            headers={"Content-Type": "application/json"},
            body=json.dumps({"message": "lunch"}),
        )
        response = await AsyncHTTPClient().fetch(request)
        assert json.loads(response.body) == {"success": True}
        assert await client.recv_json() == {"type": "announcement", "message": "lunch", "timestamp": ANY}


async def test_error_handling():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            try:
                data = json.loads(message)
                if not data.get("type"):
                    raise ValueError("Message type is required")
                match data["type"]:
                    case "ping":
                        ws.send({"type": "pong"})
                    case other:
                        raise ValueError(f"Unknown message type: {other}")
            except Exception as error:
                ws.send({"type": "error", "message": str(error)})

    async with AsenaServer(ChatSocket, port=0) as server, connect(server.url("/chat")) as client:
        for message, answer in (
            ('{"type": "ping"}', {"type": "pong"}),
            ('{"text": "hi"}', {"type": "error", "message": "Message type is required"}),
            ('{"type": "dance"}', {"type": "error", "message": "Unknown message type: dance"}),
            ("not JSON", {"type": "error", "message": "Expecting value: line 1 column 1 (char 0)"}),
        ):
            await client.send(message)
            assert json.loads(await client.recv()) == answer


async def test_best_practices_1_use_built_in_room_management():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_open(self, ws: Socket) -> None:
            ws.subscribe("room-1")
            ws.publish("room-1", "Hello room!")

        async def on_close(self, ws: Socket) -> None:
            ws.unsubscribe("room-1")

    async with (
        AsenaServer(ChatSocket, port=0) as server,
        await server.connect("/chat") as ann,
        await server.connect("/chat"),
    ):
        assert await ann.recv() == "Hello room!"

    class ByHand(AsenaWebSocketService):
        def __init__(self) -> None:
            self.rooms = {}  # type: ignore[assignment,misc]  # the mistake under test

    with pytest.raises(AttributeError, match="rooms"):
        ByHand()


async def test_best_practices_2_use_broadcasting_methods():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("room-1")
            ws.send("welcome")

        def on_message(self, ws: Socket, message: str) -> None:
            self.to("room-1", "Message to room")
            self.in_("Message to all")
            ws.publish("room-1", "Message from user")
            # What the three above spare one; it works, too.
            for socket in self.sockets.values():
                socket.send("one by one")

    async with (
        AsenaServer(ChatSocket, port=0) as server,
        await server.connect("/chat") as ann,
        await server.connect("/chat") as bob,
    ):
        for client in (ann, bob):
            assert await client.recv() == "welcome"
        await ann.send("go")
        assert [await ann.recv() for _ in range(3)] == ["Message to room", "Message to all", "one by one"]
        assert [await bob.recv() for _ in range(4)] == [
            "Message to room",
            "Message to all",
            "Message from user",
            "one by one",
        ]


async def test_best_practices_3_let_asena_handle_cleanup():
    refused = []

    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("room-1")
            ws.subscribe("room-2")
            ws.send("welcome")

        async def on_close(self, ws: Socket) -> None:
            ws.unsubscribe("room-1")
            assert ws.id not in self.sockets
            try:
                del self.sockets[ws.id]  # type: ignore[attr-defined]  # the mistake under test
            except TypeError as error:
                refused.append(error)

    chat = ChatSocket()
    async with AsenaServer(chat, port=0) as server, await server.connect("/chat") as client:
        await client.recv()
        await client.close()
        assert not chat.sockets
        assert not chat.rooms
    assert len(refused) == 1


def test_breaking_circular_dependencies_the_problem():
    @Service("UserService")
    class UserService:
        notification_ws = Inject("NotificationWebSocket")

    @WebSocket("/notifications")
    class NotificationWebSocket(AsenaWebSocketService):
        user_service: UserService = Inject(UserService)

    with pytest.raises(CircularDependencyError) as refused:
        AsenaServer(NotificationWebSocket, UserService, port=0).start()
    message = str(refused.value)
    assert "NotificationWebSocket.user_service -> UserService.notification_ws -> NotificationWebSocket" in message
    assert 'write notification_ws: UlakNamespace = Inject(ulak("/notifications"))' in message


async def test_breaking_circular_dependencies_the_solution_ulak_message_broker():
    class User(BaseModel):
        id: str
        name: str
        email: str

    class NewUser(BaseModel):
        name: str
        email: str

    @Service("UserService")
    class UserService:
        notifications: UlakNamespace = Inject(ulak("/notifications"))

        async def create_user(self, name: str, email: str) -> User:
            user = await self._save_user(name, email)
            await self.notifications.broadcast({"type": "user_created", "user": user})
            return user

        async def notify_user(self, user_id: str, message: str) -> None:
            await self.notifications.to(f"user:{user_id}", {"type": "notification", "message": message})

        async def _save_user(self, name: str, email: str) -> User:
            return User(id="123", name=name, email=email)

    @WebSocket("/notifications")
    class NotificationWebSocket(AsenaWebSocketService):
        user_service: UserService = Inject(UserService)

        async def on_message(self, ws: Socket, message: NewUser) -> None:
            user = await self.user_service.create_user(message.name, message.email)
            ws.subscribe(f"user:{user.id}")
            await self.user_service.notify_user(user.id, "welcome")

    async with (
        AsenaServer(NotificationWebSocket, port=0) as server,
        await server.connect("/notifications") as ann,
        await server.connect("/notifications") as bob,
    ):
        await ann.send({"name": "Ann", "email": "ann@example.com"})
        created = {"type": "user_created", "user": {"id": "123", "name": "Ann", "email": "ann@example.com"}}
        assert await ann.recv_json() == created
        assert await bob.recv_json() == created
        assert await ann.recv_json() == {"type": "notification", "message": "welcome"}


# The early edition


async def test_early_creating_a_websocket_service(caplog):
    @WebSocket(path="/chat", name="ChatSocket")
    class ChatSocket(AsenaWebSocketService[None]):
        async def on_open(self, ws: Socket[None]) -> None:
            log.info("client connected: %s", ws.id)
            ws.send("Welcome to chat!")

        async def on_message(self, ws: Socket[None], message: str) -> None:
            log.info("received: %s", message)
            ws.send(f"Echo: {message}")

        async def on_close(self, ws: Socket[None]) -> None:
            log.info("client disconnected: %s", ws.id)

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        assert await client.recv() == "Welcome to chat!"
        await client.send("hello")
        assert await client.recv() == "Echo: hello"
    assert len(caplog.messages) == 3


async def test_early_websocket_lifecycle_methods_on_open():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_open(self, ws: Socket) -> None:
            log.info("new connection: %s", ws.id)
            ws.send(json.dumps({"type": "welcome", "message": "Connected!"}))

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        assert await client.recv_json() == {"type": "welcome", "message": "Connected!"}


async def test_early_websocket_lifecycle_methods_on_message():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            data = json.loads(message)
            if data["type"] == "ping":
                ws.send(json.dumps({"type": "pong"}))

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        await client.send({"type": "ping"})
        assert await client.recv_json() == {"type": "pong"}


async def test_early_websocket_lifecycle_methods_on_close(caplog):
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_close(self, ws: Socket) -> None:
            log.info("client disconnected: %s", ws.id)
            # clean-up

    chat = ChatSocket()
    async with AsenaServer(chat, port=0) as server, await server.connect("/chat"):
        (socket_id,) = chat.sockets
    assert caplog.messages == [f"client disconnected: {socket_id}"]


async def test_early_socket_api_ws_send():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_open(self, ws: Socket) -> None:
            ws.send("Hello client!")
            ws.send(json.dumps({"type": "update", "data": {"count": 42}}))

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        assert await client.recv() == "Hello client!"
        assert await client.recv_json() == {"type": "update", "data": {"count": 42}}


async def test_early_socket_api_ws_id(caplog):
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_open(self, ws: Socket) -> None:
            log.info("socket ID: %s", ws.id)
            ws.send(ws.id)

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        socket_id = str(await client.recv())
    assert caplog.messages == [f"socket ID: {socket_id}"]


async def test_early_socket_api_ws_data(caplog):
    class UserData(TypedDict):
        user_id: str
        username: str

    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService[UserData]):
        async def on_open(self, ws: Socket[UserData]) -> None:
            log.info("user connected: %s", ws.data.username)
            ws.send(ws.data.values["user_id"])

    async with (
        AsenaServer(ChatSocket, port=0) as server,
        await server.connect("/chat?user_id=7&username=Ann") as client,
    ):
        assert await client.recv() == "7"
    assert caplog.messages == ["user connected: Ann"]


class User:
    def __init__(self, username: str, socket: Socket[ChatData]) -> None:
        self.username = username
        self.socket = socket


@WebSocket("/chat", name="ChatSocket")
class ChatByHand(AsenaWebSocketService[ChatData]):
    """Rooms by hand. They cannot be called ``rooms``: that name shows the built-in ones."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.members: dict[str, set[str]] = {}  # room -> socket ids

    async def on_open(self, ws: Socket[ChatData]) -> None:
        username, room = ws.data.username, ws.data.room
        self.users[ws.id] = User(username, ws)
        self.members.setdefault(room, set()).add(ws.id)
        self.broadcast_to_room(
            room,
            {"type": "user_joined", "username": username, "room": room, "total_users": len(self.members[room])},
            exclude_id=ws.id,
        )
        ws.send(
            {
                "type": "welcome",
                "message": f"Welcome to {room}, {username}!",
                "users": sorted(self.users[id].username for id in self.members[room]),
            }
        )

    async def on_message(self, ws: Socket[ChatData], message: str) -> None:
        user, room = self.users[ws.id], ws.data.room
        try:
            data = json.loads(message)
            if data["type"] == "message":
                self.broadcast_to_room(
                    room,
                    {"type": "message", "username": user.username, "message": data["message"], "timestamp": now()},
                )
            if data["type"] == "typing":
                self.broadcast_to_room(room, {"type": "typing", "username": user.username}, exclude_id=ws.id)
        except (ValueError, LookupError, TypeError):
            ws.send({"type": "error", "message": "Invalid message format"})

    async def on_close(self, ws: Socket[ChatData]) -> None:
        user, room = self.users.pop(ws.id), ws.data.room
        self.members[room].discard(ws.id)
        self.broadcast_to_room(
            room, {"type": "user_left", "username": user.username, "total_users": len(self.members[room])}
        )
        if not self.members[room]:
            del self.members[room]

    def broadcast_to_room(self, room: str, message: Any, exclude_id: str | None = None) -> None:
        for socket_id in self.members.get(room, ()):
            if socket_id != exclude_id:
                self.users[socket_id].socket.send(message)


async def test_early_complete_chat_example():
    chat = ChatByHand()
    async with AsenaServer(chat, port=0) as server, await server.connect("/chat?username=Ann&room=tech") as ann:
        assert await ann.recv_json() == {"type": "welcome", "message": "Welcome to tech, Ann!", "users": ["Ann"]}
        async with await server.connect("/chat?username=Bob&room=tech") as bob:
            assert (await bob.recv_json())["users"] == ["Ann", "Bob"]
            joined = {"type": "user_joined", "username": "Bob", "room": "tech", "total_users": 2}
            assert await ann.recv_json() == joined
            await bob.send({"type": "typing"})
            await bob.send({"type": "message", "message": "hi"})
            assert await ann.recv_json() == {"type": "typing", "username": "Bob"}
            said = {"type": "message", "username": "Bob", "message": "hi", "timestamp": ANY}
            assert await ann.recv_json() == said
            assert await bob.recv_json() == said
            await bob.send("[]")
            assert await bob.recv_json() == {"type": "error", "message": "Invalid message format"}
        assert await ann.recv_json() == {"type": "user_left", "username": "Bob", "total_users": 1}
    assert (chat.users, chat.members) == ({}, {})


async def test_early_client_side_connection():
    seen = []
    async with AsenaServer(ChatByHand, port=0) as server:
        async with connect(server.url("/chat")) as ws:
            await ws.send(json.dumps({"type": "message", "message": "Hello everyone!"}))
            async with connect(server.url("/chat?username=Bob")) as bob:
                await bob.recv()
            async for raw in ws:
                data = json.loads(raw)
                if data["type"] == "message":
                    seen.append(f"{data['username']}: {data['message']}")
                if data["type"] == "user_joined":
                    seen.append(f"{data['username']} joined the chat")
                if data["type"] == "user_left":
                    await ws.close()
            seen.append("disconnected from chat")
        with pytest.raises(InvalidStatus):
            await connect(server.url("/no-such-chat").replace("http", "ws"))
    assert seen == ["Anonymous: Hello everyone!", "Bob joined the chat", "disconnected from chat"]


async def test_early_client_side_connection_with_custom_data():
    username, room = "John", "tech"
    async with (
        AsenaServer(ChatByHand, port=0) as server,
        connect(server.url(f"/chat?username={username}&room={room}")) as client,
    ):
        assert json.loads(await client.recv())["message"] == "Welcome to tech, John!"


async def test_early_broadcasting_broadcast_to_all_clients():
    @WebSocket("/notifications")
    class NotificationSocket(AsenaWebSocketService):
        def __init__(self) -> None:
            self.connected: dict[str, Socket] = {}

        async def on_open(self, ws: Socket) -> None:
            self.connected[ws.id] = ws

        async def on_close(self, ws: Socket) -> None:
            del self.connected[ws.id]

        def broadcast_notification(self, notification: Any) -> None:
            message = json.dumps(notification)
            for socket in self.connected.values():
                socket.send(message)

    notifications = NotificationSocket()
    async with (
        AsenaServer(notifications, port=0) as server,
        await server.connect("/notifications") as ann,
        await server.connect("/notifications") as bob,
    ):
        notifications.broadcast_notification("lunch")
        assert [await client.recv_json() for client in (ann, bob)] == ["lunch", "lunch"]
    assert notifications.connected == {}


async def test_early_broadcasting_selective_broadcasting():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.send("welcome")

        def broadcast_to_users(self, user_ids: Iterable[str], message: str) -> None:
            for socket in self.sockets.values():
                if socket.data.user_id in user_ids:
                    socket.send(message)

    chat = ChatSocket()
    async with (
        AsenaServer(chat, port=0) as server,
        await server.connect("/chat?user_id=1") as one,
        await server.connect("/chat?user_id=2") as two,
        await server.connect("/chat?user_id=3") as three,
    ):
        for client in (one, two, three):
            await client.recv()
        chat.broadcast_to_users(["1", "3"], "for one and three")
        chat.broadcast_to_users(["1", "2", "3"], "for all")
        assert [await client.recv() for client in (one, two, three)] == [
            "for one and three",
            "for all",
            "for one and three",
        ]


class AuthenticatedData(BaseModel):
    token: str | None = None


@Service
class AuthService:
    async def verify_token(self, token: str) -> str:
        await asyncio.sleep(0)  # it asks somebody
        if token != "valid-token":
            raise PermissionError(token)
        return "user 7"


@WebSocket("/private", name="PrivateSocket")
class PrivateSocketByHand(AsenaWebSocketService[AuthenticatedData]):
    auth_service: AuthService = Inject(AuthService)

    async def on_open(self, ws: Socket[AuthenticatedData]) -> None:
        token = ws.data.values.token
        if not token:
            ws.send({"type": "error", "message": "Unauthorized"})
            ws.close()
            return
        try:
            user = await self.auth_service.verify_token(token)
            ws.send({"type": "authenticated", "user_id": user})
        except PermissionError:
            ws.send({"type": "error", "message": "Invalid token"})
            ws.close()


@pytest.mark.parametrize(
    ("path", "answer", "closes"),
    [
        ("/private?token=valid-token", {"type": "authenticated", "user_id": "user 7"}, False),
        ("/private?token=stolen", {"type": "error", "message": "Invalid token"}, True),
        ("/private", {"type": "error", "message": "Unauthorized"}, True),
    ],
)
async def test_early_authentication(path, answer, closes):
    async with AsenaServer(PrivateSocketByHand, port=0) as server, await server.connect(path) as client:
        assert await client.recv_json() == answer
        if closes:
            with pytest.raises(ConnectionClosed) as closed:
                await client.recv()
            assert closed.value.code == 1000


async def test_early_room_channel_management():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def __init__(self) -> None:
            self.channels: dict[str, set[Socket]] = {}

        def join_room(self, socket: Socket, room_id: str) -> None:
            self.channels.setdefault(room_id, set()).add(socket)

        def leave_room(self, socket: Socket, room_id: str) -> None:
            self.channels.get(room_id, set()).discard(socket)

        def broadcast_to_room(self, room_id: str, message: str, exclude_socket: Socket | None = None) -> None:
            for socket in self.channels.get(room_id, ()):
                if socket is not exclude_socket:
                    socket.send(message)

    chat = ChatSocket()
    async with AsenaServer(chat, port=0) as server, await server.connect("/chat") as ann:
        (ann_socket,) = chat.sockets.values()
        async with await server.connect("/chat") as bob:
            (bob_socket,) = set(chat.sockets.values()) - {ann_socket}
            for socket in (ann_socket, bob_socket):
                chat.join_room(socket, "tech")
            chat.broadcast_to_room("tech", "from Ann", ann_socket)
            chat.leave_room(bob_socket, "tech")
            chat.broadcast_to_room("tech", "to Ann alone")
            chat.broadcast_to_room("nowhere", "to nobody")
            bob_socket.send("end")
            assert await ann.recv() == "to Ann alone"
            assert [await bob.recv(), await bob.recv()] == ["from Ann", "end"]


async def test_early_error_handling():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            try:
                data = json.loads(message)
                if not data.get("type"):
                    raise ValueError("Message type is required")
                if data["type"] != "ping":
                    raise ValueError(f"Unknown message type: {data['type']}")
                ws.send(json.dumps({"type": "pong"}))
            except Exception as error:
                ws.send(json.dumps({"type": "error", "message": str(error) or "Unknown error"}))

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        await client.send({"type": "dance"})
        assert await client.recv_json() == {"type": "error", "message": "Unknown message type: dance"}
        await client.send({"type": "ping"})
        assert await client.recv_json() == {"type": "pong"}


async def test_early_best_practices_1_use_json_for_messages():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_open(self, ws: Socket) -> None:
            ws.send({"type": "update", "data": {"count": 42}})  # structured
            ws.send("update:42")  # a raw string: it arrives as it is

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        assert await client.recv_json() == {"type": "update", "data": {"count": 42}}
        assert await client.recv() == "update:42"


async def test_early_best_practices_2_handle_errors_gracefully():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            try:
                data = json.loads(message)
                ws.send(data)
            except ValueError:
                ws.send(json.dumps({"type": "error", "message": "Invalid format"}))

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        await client.send("}")
        assert await client.recv_json() == {"type": "error", "message": "Invalid format"}
        await client.send([1])
        assert await client.recv_json() == [1]


async def test_early_best_practices_3_clean_up_on_close():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def __init__(self) -> None:
            self.users: dict[str, Socket] = {}
            self.members: dict[str, set[str]] = {"tech": set()}

        def on_open(self, ws: Socket) -> None:
            self.users[ws.id] = ws
            self.members["tech"].add(ws.id)

        async def on_close(self, ws: Socket) -> None:
            del self.users[ws.id]
            for room in self.members.values():
                room.discard(ws.id)

    chat = ChatSocket()
    async with AsenaServer(chat, port=0) as server, await server.connect("/chat"):
        assert len(chat.members["tech"]) == 1
    assert (chat.users, chat.members) == ({}, {"tech": set()})


async def test_early_best_practices_4_validate_messages():
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            data = json.loads(message)
            if not isinstance(data.get("type"), str) or not data["type"]:
                ws.send(json.dumps({"type": "error", "message": "Invalid message"}))
                return
            ws.send(f"processed {data['type']}")

    async with AsenaServer(ChatSocket, port=0) as server, await server.connect("/chat") as client:
        await client.send({"type": 7})
        assert await client.recv_json() == {"type": "error", "message": "Invalid message"}
        await client.send({"type": "ping"})
        assert await client.recv() == "processed ping"
