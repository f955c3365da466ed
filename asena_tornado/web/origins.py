"""Who may ask: pages of which origins, and by which names of the server."""

from __future__ import annotations

import fnmatch
import ipaddress
import logging
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from tornado.httputil import HTTPServerRequest
from tornado.web import RequestHandler

from ..errors import ConfigurationError
from .http import Refusal

log = logging.getLogger("asena_tornado")


class Origins:
    """The pages that may connect: those of the server's own origin, and those of the ``allowed`` ones."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = tuple(origin.rstrip("/").lower() for origin in allowed)

    def check(self, request: HTTPServerRequest, where: str) -> None:
        """Refuse a request that a page from elsewhere makes."""
        origins = request.headers.get_list("Origin")
        if not origins or (len(origins) == 1 and (self.same(origins[0], request.host) or self.listed(origins[0]))):
            return
        shown = repr(", ".join(origins))
        log.warning("%s: refused the origin %s", where, shown)
        raise Refusal(
            403,
            f"the origin {shown} is not allowed; to allow it: AsenaServer(..., allowed_origins=[{shown}])",
        )

    def allow(self, origin: str) -> None:
        """Allow one more, such as where a proxy shows the server to browsers."""
        self._allowed = (*self._allowed, origin.lower())

    def listed(self, origin: str) -> bool:
        """Whether it is among the allowed ones."""
        origin = origin.lower()
        # As it stands first: in a pattern, the brackets of http://[::1] mean something else.
        return origin in self._allowed or any(fnmatch.fnmatchcase(origin, pattern) for pattern in self._allowed)

    @staticmethod
    def same(origin: str, host: str) -> bool:
        """Whether it is the server's own."""
        try:
            parts = urlsplit(origin.lower())
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and bool(parts.netloc) and parts.netloc == host.lower()


_KNOWN_HOSTS = 100  # that are remembered


class Hosts:
    """The names by which requests may call the server, in their header ``Host``.

    A page elsewhere can have its own name stand for this machine (DNS rebinding). To the browser, and to `Origins`,
    it is then of the server's own origin; only the name tells.
    """

    def __init__(self, allowed: Sequence[str] | None) -> None:
        """``allowed``: names or patterns; None leaves it to `serve`."""
        for name in allowed or ():
            given: object = name  # whatever the annotation says
            if not isinstance(given, str) or not _hostname(name) or "/" in name:
                raise ConfigurationError(f'a host is written like "example.com" or "*.example.com", not {name!r}')
        self._allowed = None if allowed is None else tuple(map(_hostname, allowed))
        self._own: frozenset[str] = frozenset()
        self._restricted = allowed is not None
        self._known: set[str] = set()  # accepted hosts as they were written, as parsing one takes time

    def serve(self, own: Iterable[str | None], *, listeners: Iterable[str], anywhere: bool) -> None:
        """Say what is served: under its ``own`` names, on the addresses of its ``listeners``.

        Unless a list was given, that is restricted on loopback addresses, but not when browsers may come from
        ``anywhere`` by names that cannot be known.
        """
        self._known.clear()
        self._own = frozenset(_hostname(name) for name in own if name)
        self._restricted = self._allowed is not None or (not anywhere and all(map(is_loopback, listeners)))

    def guard(self, handler: RequestHandler) -> None:
        """Answer a request to a host that is not accepted; for a handler's ``prepare``."""
        try:
            self.check(handler.request.host)
        except Refusal as refusal:
            handler.set_status(refusal.response.status)
            handler.set_header("Content-Type", refusal.response.headers["Content-Type"])
            handler.finish(refusal.response.body)

    def check(self, host: str) -> None:
        """Refuse a request to a host that is not accepted; ``host`` may have a port."""
        if not self._restricted or host in self._known:
            return
        if self._accepts(_hostname(host)):
            if len(self._known) < _KNOWN_HOSTS:
                self._known.add(host)
            return
        name = repr(host if len(host) <= 100 else host[:99] + "…")
        log.warning("refused a request to the host %s", name)
        raise Refusal(421, f"the host {name} is not accepted; to accept it: AsenaServer(..., allowed_hosts=[{name}])")

    def _accepts(self, name: str) -> bool:
        # No page from elsewhere can use a loopback name: browsers ask nobody what it stands for.
        if name in self._own or is_loopback(name):
            return True
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._allowed or ())


_BRACKETED = re.compile(r"\[([0-9a-f:.]+)\](?::\d*)?")


def _hostname(host: str) -> str:
    """The name or address without a port, in the one form that all its spellings share."""
    host = host.lower()
    bracketed = _BRACKETED.fullmatch(host)
    if bracketed is not None:
        host = bracketed[1]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    host = host.removesuffix(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def is_loopback(host: str) -> bool:
    """Whether it names this very machine: ``localhost`` and what is below it, ``127.0.0.0/8``, ``::1``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


__all__ = ["Hosts", "Origins"]
