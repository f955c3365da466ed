"""The address under which a *browser* reaches a server, which is not always the one it listens on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigurationError

TEMPLATE_VARIABLE = "ASENA_PUBLIC_URL"
_LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "::1", "[::1]", ""))


@dataclass(frozen=True, slots=True)
class Reach:
    """``base``: an ``http(s)://`` address without a trailing slash. ``note``: what a person has to know about it.

    ``anywhere``: whether browsers come through a hub, under a name that cannot be known here.
    """

    base: str
    note: str = ""
    anywhere: bool = False

    @property
    def origin(self) -> str:
        """The origin of pages served from there."""
        parts = urlsplit(self.base)
        return f"{parts.scheme}://{parts.netloc}"


def reach(port: int, local: str, *, template: str | None, environ: Mapping[str, str] | None = None) -> Reach:
    """Where browsers find the server that listens at ``local`` (``http://localhost:3000``).

    In this order: ``template`` or ``$ASENA_PUBLIC_URL`` (with ``{port}`` in it, if the port is part of it);
    JupyterHub, behind jupyter-server-proxy; a Jupyter server on another machine, likewise; else ``local``.
    Where it cannot be known, the note says so. Raises `ConfigurationError` for an invalid template.
    """
    environ = os.environ if environ is None else environ
    template = template or environ.get(TEMPLATE_VARIABLE)
    if template:
        return Reach(_filled(template, port))
    prefix = environ.get("JUPYTERHUB_SERVICE_PREFIX")
    if prefix:
        public = environ.get("JUPYTERHUB_PUBLIC_URL")
        path = f"{prefix.rstrip('/')}/proxy/{port}"
        if public:
            return Reach(f"{public.rstrip('/')}/proxy/{port}", _proxy_note())
        return Reach(
            local,
            f"on this JupyterHub, browsers find it at {path} below the hub's own address; to see the whole "
            f"address here, set public_url= or ${TEMPLATE_VARIABLE}.{_proxy_note(' ')}",
            anywhere=True,
        )
    jupyter = _jupyter_server(environ.get("JPY_PARENT_PID"))
    if jupyter is not None:
        url = str(jupyter.get("url", "")).rstrip("/")
        if urlsplit(url).hostname not in _LOCAL_HOSTS:
            return Reach(f"{url}/proxy/{port}", _proxy_note())
    elif "JPY_PARENT_PID" in environ:
        return Reach(
            local,
            "right if the browser runs on this machine; otherwise set public_url= or "
            f"${TEMPLATE_VARIABLE} to the address that browsers use",
        )
    return Reach(local)


def _filled(template: str, port: int) -> str:
    try:
        base = template.format(port=port).rstrip("/")
    except (KeyError, IndexError, ValueError):
        base = ""
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigurationError(
            f"{template!r} is not an address: write it like 'https://example.com/proxy/{{port}}', "
            "where {port} becomes the server's port"
        )
    return base


def _proxy_note(before: str = "") -> str:
    if find_spec("jupyter_server_proxy") is not None:
        return ""
    return f"{before}It needs jupyter-server-proxy beside the Jupyter server: pip install jupyter-server-proxy"


def _jupyter_server(pid: str | None) -> Mapping[str, Any] | None:
    """The Jupyter server that started this kernel, if it can be found."""
    if pid is None or find_spec("jupyter_core") is None:
        return None
    from jupyter_core.paths import jupyter_runtime_dir

    try:
        # Where every Jupyter server describes itself. Its own package would tell the same, after a slow import.
        described: Mapping[str, Any] = json.loads((Path(jupyter_runtime_dir()) / f"jpserver-{pid}.json").read_text())
    except (OSError, ValueError):
        return None
    return described
