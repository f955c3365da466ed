"""The live view's questions and answers, and the page that asks them over HTTP."""

import asyncio
import json
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from websockets.asyncio.client import ClientConnection, connect

from asena_tornado import AsenaServer, AsenaWebSocketService, ConfigurationError, Socket, WebSocket
from asena_tornado.inspector import Desk, View


@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_open(self, ws: Socket) -> None:
        ws.subscribe(str(ws.data.query.get("room", "general")))
        ws.send("welcome")

    def on_message(self, ws: Socket, message: str) -> None:
        ws.send(message)


@WebSocket("/news")
class News(AsenaWebSocketService):
    def on_open(self, ws: Socket) -> None:
        ws.send("welcome")


async def welcomed(server: AsenaServer, path: str = "/chat") -> ClientConnection:
    client = await connect(server.url(path))
    assert await client.recv() == "welcome"
    return client


async def fetch(url: str, **options: Any) -> HTTPResponse:
    return await AsyncHTTPClient().fetch(HTTPRequest(url, **options), raise_error=False)


async def ask(server: AsenaServer, request: object, *, token: str | None = None, **headers: str) -> HTTPResponse:
    token = token or server.inspector_url.partition("token=")[2]
    return await fetch(
        server.url("/inspector/ask"),
        method="POST",
        body=request if isinstance(request, str) else json.dumps(request),
        headers={"Authorization": f"Bearer {token}", **headers},
    )


# -- the page


async def test_there_is_no_page_unless_asked_for() -> None:
    async with AsenaServer(Chat, port=0) as server:
        assert (await fetch(server.url("/inspector"))).code == 404
        assert (await fetch(server.url("/inspector/ask"), method="POST", body="{}")).code == 404
        with pytest.raises(ConfigurationError, match="inspector_path="):
            _ = server.inspector_url


async def test_nothing_is_told_or_done_without_the_token() -> None:
    async with AsenaServer(Chat, port=0, inspector_path="/inspector") as server:
        ann = await welcomed(server)
        assert (await fetch(server.url("/inspector"))).code == 403
        assert (await fetch(server.url("/inspector?token=wrong"))).code == 403
        for response in (
            await ask(server, {"do": "look"}, token="wrong"),
            await ask(server, {"do": "publish", "data": "x"}, token="wrong"),
            await fetch(server.url("/inspector/ask"), method="POST", body='{"do": "look"}'),
            await fetch(f"{server.inspector_url.replace('?', '/ask?')}", method="POST", body='{"do": "look"}'),
        ):
            assert response.code == 403
            assert b"general" not in response.body
        await ann.send("nothing came before this")
        assert await ann.recv() == "nothing came before this"
        await ann.close()


async def test_each_server_has_a_token_of_its_own_and_the_address_holds_it() -> None:
    one, other = (AsenaServer(Chat, port=3000, inspector_path="inspector") for _ in range(2))
    assert one.inspector_url.startswith("http://localhost:3000/inspector?token=")
    assert len(one.inspector_url.partition("token=")[2]) >= 32
    assert one.inspector_url != other.inspector_url


async def test_another_sites_page_is_refused_even_with_the_token() -> None:
    async with AsenaServer(Chat, port=0, inspector_path="/inspector") as server:
        response = await ask(server, {"do": "look"}, **{"Sec-Fetch-Site": "cross-site"})
        assert response.code == 403
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_the_page_runs_nothing_inline_and_names_only_relative_addresses() -> None:
    async with AsenaServer(Chat, port=0, inspector_path="/deep/inspector") as server:
        response = await fetch(server.inspector_url)
        page = response.body.decode()
        assert response.code == 200
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert 'src="inspector/page.js"' in page
        assert 'href="/' not in page
        assert "onclick" not in page
        for file in ("page.js", "view.js", "view.css"):
            assert (await fetch(server.url(f"/deep/inspector/{file}"))).code == 200
        assert (await fetch(server.url("/deep/inspector/page.py"))).code == 404


async def test_an_invalid_request_is_refused_and_the_view_goes_on() -> None:
    async with AsenaServer(Chat, port=0, inspector_path="/inspector", max_body_size=4 * 1024 * 1024) as server:
        assert (await ask(server, "no json")).code == 400
        assert (await ask(server, json.dumps({"data": "x" * 2_000_000}))).code == 413
        assert "error" in json.loads((await ask(server, {"do": "dance"})).body)
        assert "error" in json.loads((await ask(server, ["look"])).body)
        assert json.loads((await ask(server, {"do": "look"})).body)["state"] == "running"


async def test_a_path_that_is_taken_is_an_error_at_once() -> None:
    with pytest.raises(ConfigurationError, match="'/chat' is a namespace"):
        AsenaServer(Chat, inspector_path="/chat")


def test_the_page_stays_open_when_a_re_run_cell_replaces_the_server() -> None:
    with AsenaServer(Chat, port=0, inspector_path="/inspector") as old:
        again = AsenaServer(Chat, port=old.port, inspector_path="/inspector")
        address = old.inspector_url
        with again:
            assert old.state == "replaced"
            assert again.inspector_url == address
            assert json.loads(asyncio.run(ask(again, {"do": "look"})).body)["state"] == "running"


# -- what is asked and answered


async def look(server: AsenaServer, **what: Any) -> dict[str, Any]:
    return await View(server._desk).answer({"do": "look", **what})


async def test_a_look_tells_of_namespaces_rooms_sockets_and_events() -> None:
    async with AsenaServer(Chat, News, port=0) as server:
        clients = [await welcomed(server, "/chat?room=tech"), await welcomed(server), await welcomed(server, "/news")]
        answer = await look(server)
        assert [(n["path"], n["sockets"]) for n in answer["namespaces"]] == [("/chat", 2), ("/news", 1)]
        assert {(r["room"], r["sockets"]) for r in answer["rooms"]} == {("tech", 1), ("general", 1)}
        assert [s["values"] for s in answer["sockets"]] == ["room: tech", "", ""]
        assert answer["total"] == 3
        assert [e["kind"] for e in answer["events"]].count("connected") == 3
        in_room = await look(server, namespace="/chat", room="tech")
        assert [s["values"] for s in in_room["sockets"]] == ["room: tech"]
        assert json.dumps(answer)
        for client in clients:
            await client.close()


async def test_events_are_told_once() -> None:
    async with AsenaServer(Chat, port=0) as server:
        ann = await welcomed(server)
        last = (await look(server))["events"][-1]["number"]
        assert (await look(server, since=last))["events"] == []
        await ann.send("hello")
        await ann.recv()
        fresh = (await look(server, since=last))["events"]
        assert [e["kind"] for e in fresh] == ["received", "sent"]
        assert (await look(server, since=last, messages=False))["events"] == []
        await ann.close()


async def test_a_search_finds_by_id_room_value_and_address() -> None:
    async with AsenaServer(Chat, port=0) as server:
        clients = [await welcomed(server, f"/chat?room=room{i}&name=Name{i}") for i in range(5)]
        ids = [s["id"] for s in (await look(server))["sockets"]]
        for search, found in ((ids[2][:13], [2]), ("NAME3", [3]), ("room4 name4", [4]), ("room4 name3", [])):
            answer = await look(server, search=search)
            assert [ids.index(s["id"]) for s in answer["sockets"]] == found
            assert answer["total"] == len(found)
        for client in clients:
            await client.close()


async def test_answers_are_pages_of_bounded_size_however_many_there_are() -> None:
    """The crowd is one real client under ten thousand names."""
    async with AsenaServer(Chat, port=0) as server:
        ann = await welcomed(server)
        namespace = server.namespaces["/chat"]
        [socket] = namespace.sockets.values()
        crowd: list[Any] = []
        for i in range(10_000):
            extra: Socket[Any] = Socket(namespace, socket.data, f"10.0.0.{i}")
            extra._connection = socket._connection
            crowd.append(extra)
            namespace._everyone[extra] = None
            namespace.index.join(extra, f"room {i}")
        try:
            answer = await look(server, offset=5000)
            assert (answer["total"], answer["offset"], len(answer["sockets"])) == (10_001, 5000, 50)
            assert (answer["rooms_total"], len(answer["rooms"])) == (10_001, 100)
            assert len(json.dumps(answer)) < 100_000
            beyond = await look(server, offset=1_000_000)
            assert (beyond["offset"], len(beyond["sockets"])) == (10_000, 1)
            searched = await look(server, search="10.0.0.9999")
            assert searched["total"] == 1
            assert searched["again"] > 0  # seconds: what costs more is asked for less often
            assert "error" in await look(server, limit=10_000)
        finally:
            for extra in crowd:
                del namespace._everyone[extra]
                namespace.index.leave(extra, next(iter(namespace.index.rooms_of(extra))))
        await ann.close()


async def test_actions_reach_the_clients_and_answer_with_a_receipt() -> None:
    async with AsenaServer(Chat, News, port=0) as server:
        ann = await welcomed(server)
        view = View(server._desk)
        [id] = server.inspector.sockets
        sent = await view.answer({"do": "send", "socket": id, "data": {"to": "you"}})
        assert sent == {"receipt": f"sent to {id[:8]} in /chat"}
        assert json.loads(await ann.recv()) == {"to": "you"}
        await view.answer({"do": "join", "socket": id, "room": "vip"})
        await view.answer({"do": "publish", "namespace": "/chat", "room": "vip", "data": "vips"})
        assert await ann.recv() == "vips"
        await view.answer({"do": "leave", "socket": id, "room": "vip"})
        left = await view.answer({"do": "publish", "namespace": "/chat", "room": "vip", "data": "x"})
        assert left["receipt"].startswith("sent to nobody")
        await view.answer({"do": "publish", "namespace": "/chat", "data": "all"})
        assert await ann.recv() == "all"
        assert "'/chat', '/news'" in (await view.answer({"do": "publish", "data": "x"}))["error"]
        assert "error" in await view.answer({"do": "send", "socket": "nobody", "data": "x"})
        await view.answer({"do": "disconnect", "socket": id, "reason": "enough"})
        await ann.wait_closed()
        assert (ann.close_code, ann.close_reason) == (1000, "enough")


async def test_a_read_only_view_looks_but_does_not_act() -> None:
    async with AsenaServer(Chat, port=0, inspector_path="/inspector", inspector_read_only=True) as server:
        ann = await welcomed(server)
        [id] = server.inspector.sockets
        for request in (
            {"do": "publish", "data": "x"},
            {"do": "send", "socket": id, "data": "x"},
            {"do": "join", "socket": id, "room": "x"},
            {"do": "leave", "socket": id, "room": "general"},
            {"do": "disconnect", "socket": id},
        ):
            assert json.loads((await ask(server, request)).body) == {"error": "this view is read-only"}
        answer = json.loads((await ask(server, {"do": "look"})).body)
        assert answer["read_only"] is True
        assert answer["sockets"][0]["rooms"] == ["general"]
        await ann.send("nothing came before this")
        assert await ann.recv() == "nothing came before this"
        await ann.close()


async def test_a_view_for_one_namespace_neither_tells_of_nor_reaches_another() -> None:
    async with AsenaServer(Chat, News, port=0) as server:
        ann = await welcomed(server)
        [id] = server.inspector.sockets
        view = View(server._desk, namespace="/news")
        answer = await view.answer({"do": "look"})
        assert ([n["path"] for n in answer["namespaces"]], answer["total"]) == (["/news"], 0)
        assert "error" in await view.answer({"do": "disconnect", "socket": id})
        assert "error" in await view.answer({"do": "publish", "namespace": "/chat", "data": "x"})
        await ann.close()


async def test_a_view_says_that_the_server_has_stopped_or_is_gone() -> None:
    server = AsenaServer(Chat, port=0)
    async with server:
        view = View(server._desk)
    assert (await view.answer({"do": "look"}))["state"] == "stopped"
    desk = Desk(AsenaServer(Chat)._subject)
    assert (await View(desk).answer({"do": "look"}))["state"] == "stopped"
