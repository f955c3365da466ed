"""A small chat with a page to talk in: what ``python -m asena_tornado demo`` serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, StringConstraints

from .ioc.inject import Service
from .server import AsenaServer
from .web.controllers import Controller, Get
from .web.http import Context, Response
from .websocket.service import AsenaWebSocketService, WebSocket
from .websocket.sockets import Socket

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)]
_HEADERS = {
    "Content-Type": "text/html; charset=UTF-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Person(BaseModel):
    """Who somebody is, as they say when they connect."""

    username: Name = "Anonymous"
    room: Name = "general"


class Said(BaseModel):
    """What somebody says."""

    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]


@WebSocket("/chat")
class Chat(AsenaWebSocketService[Person]):
    """A room per name; everybody in it sees who is there and what is said."""

    def on_open(self, ws: Socket[Person]) -> None:
        """Put the newcomer into the room, and show everybody in it who is there."""
        ws.subscribe(ws.data.room)
        self._tell_who_is_there(ws.data.room)

    def on_message(self, ws: Socket[Person], message: Said) -> None:
        """Pass on what somebody says, under the name they came with."""
        self.to(ws.data.room, {"type": "message", "username": ws.data.username, "text": message.text})

    def on_close(self, ws: Socket[Person]) -> None:
        """Show everybody left in the room who is still there."""
        self._tell_who_is_there(ws.data.room)

    def _tell_who_is_there(self, room: str) -> None:
        people = sorted(ws.data.username for ws in self.get_sockets_by_room(room))
        self.to(room, {"type": "people", "people": people})


@Controller("/")
class Page:
    """The page to talk in."""

    @Get("/")
    def page(self, context: Context) -> Response:
        """Answer with ``demo.html``, which may load nothing but ``asena.js``, and be framed by nobody."""
        page = (Path(__file__).parent / "demo.html").read_text(encoding="utf-8")
        return context.send(page, headers=_HEADERS)


def demo_server(port: int, *, announce: Callable[[str], object]) -> AsenaServer:
    """The demo's server, not started yet; ``announce`` gets the two addresses when it listens."""

    @Service
    class Announcement:
        def on_start(self) -> None:
            announce(f"Chat:       {server.url('/')}\nInspector:  {server.inspector_url}\nCtrl+C stops it.")

    server = AsenaServer(Chat, Page, Announcement, port=port, inspector_path="/inspector")
    return server
