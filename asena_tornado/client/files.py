"""What browsers load: ``asena.js``, and its types beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..web.http import JsonHandler, Refusal, make_response
from ..web.origins import Hosts, Origins

_HERE = Path(__file__).parent
_KINDS = {"asena.js": "text/javascript", "asena.d.ts": "application/typescript"}


class _FileHandler(JsonHandler):
    """One file, which pages of the allowed origins may import too; browsers ask each time whether it has changed."""

    def initialize(self, file: str, origins: Origins, hosts: Hosts) -> None:
        self._file = file
        self._origins = origins
        self._hosts = hosts

    def allowed(self) -> str:
        """What there is."""
        return "GET, HEAD, OPTIONS"

    def prepare(self) -> None:
        """Refuse a request to a host that is not accepted."""
        try:
            self._hosts.check(self.request.host)
        except Refusal as refusal:
            self.respond(refusal.response)

    def get(self) -> None:
        """Answer with the file, or with 304 where the client has it."""
        origin = self.request.headers.get("Origin")
        if origin is not None and self._origins.listed(origin):
            self.set_header("Access-Control-Allow-Origin", origin)
        self.set_header("Vary", "Origin")
        self.set_header("Cache-Control", "public, no-cache")
        self.set_header("Content-Type", f"{_KINDS[self._file]}; charset=UTF-8")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.finish((_HERE / self._file).read_bytes())

    head = get

    def options(self) -> None:
        """Say which methods there are."""
        self.respond(make_response(None, 204, {"Allow": self.allowed()}))

    def check_xsrf_cookie(self) -> None:
        """Nothing here changes anything."""


def client_paths(path: object) -> tuple[str, str]:
    """Where the script and its types are served, for a ``client_path``. Raises `ConfigurationError`."""
    normal = "/" + path.strip().strip("/") if isinstance(path, str) else ""
    if not re.fullmatch(r"(?:/[\w.~-]+)+\.js", normal, re.ASCII):
        raise ConfigurationError(f'client_path must be a path such as "/asena.js", or None, not {path!r}')
    return normal, normal.removesuffix(".js") + ".d.ts"


def client_routes(path: str, origins: Origins, hosts: Hosts) -> list[Any]:
    """The routes of the script at ``path`` and of its types, for a `tornado.web.Application`."""
    return [
        (re.escape(where), _FileHandler, {"file": file, "origins": origins, "hosts": hosts})
        for where, file in zip(client_paths(path), _KINDS, strict=True)
    ]


__all__ = ["client_paths", "client_routes"]
