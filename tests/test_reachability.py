"""The address for the browser: a template, JupyterHub, a Jupyter server elsewhere, or plain localhost."""

from __future__ import annotations

from pathlib import Path

import pytest
import websockets

from asena_tornado import AsenaServer, AsenaWebSocketService, ConfigurationError, Socket, WebSocket
from asena_tornado.hosting import reach


@WebSocket("/echo")
class Echo(AsenaWebSocketService[None]):
    def on_message(self, ws: Socket[None], message: str) -> None:
        ws.send(message)


def test_outside_of_notebooks_it_is_where_the_server_listens() -> None:
    assert reach(3000, "http://localhost:3000", template=None, environ={}).base == "http://localhost:3000"


def test_a_template_wins_and_names_the_port() -> None:
    environ = {"ASENA_PUBLIC_URL": "https://other.example/{port}/", "JUPYTERHUB_SERVICE_PREFIX": "/user/ann/"}
    given = reach(3000, "http://localhost:3000", template="https://example.com/proxy/{port}", environ=environ)
    assert given.base == "https://example.com/proxy/3000"
    assert given.origin == "https://example.com"
    assert reach(3000, "http://localhost:3000", template=None, environ=environ).base == "https://other.example/3000"


@pytest.mark.parametrize("template", ["example.com/{port}", "https://", "https://example.com/{host}", "ws://x/{port}"])
def test_an_invalid_template_is_an_error_that_says_how_to_write_it(template: str) -> None:
    with pytest.raises(ConfigurationError, match=r"https://example\.com/proxy"):
        reach(3000, "http://localhost:3000", template=template, environ={})


def test_on_a_jupyterhub_it_is_below_the_users_prefix() -> None:
    environ = {"JUPYTERHUB_SERVICE_PREFIX": "/user/ann/", "JUPYTERHUB_PUBLIC_URL": "https://hub.example/user/ann/"}
    assert reach(3000, "http://localhost:3000", template=None, environ=environ).base == (
        "https://hub.example/user/ann/proxy/3000"
    )
    del environ["JUPYTERHUB_PUBLIC_URL"]
    unknown = reach(3000, "http://localhost:3000", template=None, environ=environ)
    assert "/user/ann/proxy/3000" in unknown.note
    assert "public_url" in unknown.note


def test_where_nothing_can_be_known_it_says_so() -> None:
    unknown = reach(3000, "http://localhost:3000", template=None, environ={"JPY_PARENT_PID": "1"})
    assert unknown.base == "http://localhost:3000"
    assert "otherwise set public_url=" in unknown.note


def test_a_jupyter_server_on_another_machine_is_the_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jupyter_core")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    described = tmp_path / "jpserver-7.json"
    environ = {"JPY_PARENT_PID": "7"}
    described.write_text('{"url": "http://gpu.example:8888/lab/", "pid": 7}')
    assert reach(3000, "http://localhost:3000", template=None, environ=environ).base == (
        "http://gpu.example:8888/lab/proxy/3000"
    )
    described.write_text('{"url": "http://localhost:8888/", "pid": 7}')
    assert reach(3000, "http://localhost:3000", template=None, environ=environ).base == "http://localhost:3000"


async def test_the_server_shows_that_address_and_lets_its_pages_connect() -> None:
    async with AsenaServer(Echo, port=0, public_url="https://hub.example/user/ann/proxy/{port}") as server:
        assert server.url("/echo") == f"wss://hub.example/user/ann/proxy/{server.port}/echo"
        assert server.url("/") == f"https://hub.example/user/ann/proxy/{server.port}/"
        assert server.url("/echo") in server._repr_html_()
        client = await server.connect("/echo")
        await client.send("the library's own client goes the short way")
        assert await client.recv() == "the library's own client goes the short way"
        await client.close()
        local = f"ws://localhost:{server.port}/echo"
        async with websockets.connect(local, origin=websockets.Origin("https://hub.example")) as page:
            await page.send("hello")
            assert await page.recv() == "hello"
