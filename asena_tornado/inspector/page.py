"""The live view as a page of its own, behind a token."""

from __future__ import annotations

import hmac
import json
from html import escape
from typing import Any

from ..web.http import DiscreetHandler
from ..web.origins import Hosts
from .view import STATIC, View

_MAX_REQUEST = 1024 * 1024  # bytes
_FILES = {"view.js": "text/javascript", "page.js": "text/javascript", "view.css": "text/css"}


class _Handler(DiscreetHandler):
    """Answers with headers that forbid framing elsewhere, inline scripts, and requests to any other server."""

    def set_default_headers(self) -> None:
        self.set_header(
            "Content-Security-Policy",
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
        )
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")  # the address may hold the token
        self.set_header("Cache-Control", "no-store")
        self.set_header("Cross-Origin-Resource-Policy", "same-origin")

    def initialize(self, view: View, name: str, hosts: Hosts) -> None:
        self._view = view
        self._name = name
        self._hosts = hosts

    def prepare(self) -> None:
        self._hosts.guard(self)

    def _permitted(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._view.desk.token.encode())

    def check_xsrf_cookie(self) -> None:
        """No cookie is used that another page could misuse: the page sends its token itself."""

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(f"{status_code} {self._reason}\n")


class _PageHandler(_Handler):
    """The page itself, which holds no data; without the token it asks for it, with status 403."""

    def get(self) -> None:
        """Answer with the page. Every address in it is relative, so that a prefix in front of the path works."""
        if not self._permitted(self.get_query_argument("token", "")):
            self.set_status(403)
        page = (STATIC / "page.html").read_text(encoding="utf-8")
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.finish(page.replace("{base}", escape(self._name)))


class _FileHandler(_Handler):
    def get(self, file: str) -> None:
        self.set_header("Content-Type", f"{_FILES[file]}; charset=UTF-8")
        self.finish((STATIC / file).read_bytes())


class _AskHandler(_Handler):
    """What the view asks: ``POST`` with ``Authorization: Bearer <token>``."""

    async def post(self) -> None:
        site = self.request.headers.get("Sec-Fetch-Site", "same-origin")
        scheme, _, token = self.request.headers.get("Authorization", "").partition(" ")
        if site not in ("same-origin", "none") or scheme != "Bearer" or not self._permitted(token):
            self.set_status(403)
            self.finish({"error": "the token is missing or wrong"})
            return
        if len(self.request.body) > _MAX_REQUEST:
            self.set_status(413)
            self.finish({"error": "the message is too long to send from here"})
            return
        try:
            request = json.loads(self.request.body)
        except ValueError:
            self.set_status(400)
            self.finish({"error": "not JSON"})
            return
        self.finish(await self._view.answer(request))


def page_routes(path: str, view: View, hosts: Hosts) -> list[Any]:
    """The routes of the page at ``path``, for a `tornado.web.Application`."""
    settings = {"view": view, "name": path.rpartition("/")[2], "hosts": hosts}
    files = "|".join(name.replace(".", r"\.") for name in _FILES)
    return [
        (path, _PageHandler, settings),
        (f"{path}/({files})", _FileHandler, settings),
        (f"{path}/ask", _AskHandler, settings),
    ]


__all__ = ["page_routes"]
