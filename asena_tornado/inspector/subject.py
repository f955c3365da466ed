"""What the inspector looks at: a server, through its door, and in it one namespace or all of them."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Self, TypeVar

from ..cluster import Cluster
from ..errors import NamespaceNotFoundError, ServerStateError
from ..hosting import LoopDoor
from ..ulak.broker import Ulak
from ..websocket.namespace import Namespace, normalize_path
from ..websocket.sockets import Socket
from .receipts import Receipt
from .snapshots import SocketSnapshot, full_id

R = TypeVar("R")

PATIENCE = 5.0  # seconds that a look or an action waits for the server's loop


class Actor(Protocol):
    """What acts on sockets and rooms: the `Inspector`, as the live view sees it."""

    def __getitem__(self, namespace: str) -> Self:
        """The same for one namespace."""
        ...

    def to(self, room: str | Iterable[str], data: object, *, namespace: str | None = None) -> Receipt:
        """Send to everybody in a room, or once to everybody in any of several."""
        ...

    def in_(self, data: object, *, namespace: str | None = None) -> Receipt:
        """Send to everybody in the namespace."""
        ...

    def send(self, id: str, data: object) -> Receipt:
        """Send to the one socket whose id begins with ``id``."""
        ...

    def join(self, id: str, room: str) -> Receipt:
        """Put the socket into the room."""
        ...

    def leave(self, id: str, room: str) -> Receipt:
        """Take the socket out of the room."""
        ...

    def disconnect(self, id: str, code: int = 1000, reason: str = "") -> Receipt:
        """Close the socket."""
        ...


class Inspected(Protocol):
    """A server, as the inspector sees it."""

    @property
    def state(self) -> str:
        """In one word, such as ``"running"``."""
        ...

    @property
    def namespaces(self) -> Mapping[str, Namespace]:
        """The namespaces by their paths."""
        ...

    @property
    def ulak(self) -> Ulak:
        """What sends to the namespaces by their paths."""
        ...

    @property
    def cluster(self) -> Cluster | None:
        """The server's part in the cluster; None for a server without a transport, or while it does not run."""
        ...

    @property
    def inspector(self) -> Actor:
        """What does the actions of a live view."""
        ...


class Subject:
    """A server, and the one namespace of it that is meant; without a path, all of them."""

    def __init__(
        self,
        server: Inspected,
        *,
        door: Callable[[], LoopDoor],
        desk: Callable[[], Desk],
        path: str | None = None,
    ) -> None:
        """``door`` gives the way to the server's loop, or raises `ServerStateError`; ``desk``: see `Desk`."""
        self.server = server
        self.door = door
        self.desk = desk
        self.path = path

    def narrowed(self, path: str) -> Subject:
        """Only this namespace. Raises `NamespaceNotFoundError`."""
        path = normalize_path(path)
        self.chosen(path)
        return Subject(self.server, door=self.door, desk=self.desk, path=path)

    def ask(self, work: Callable[[], R], *, timeout: float = PATIENCE) -> R:
        """Do it on the server's loop, and wait."""
        door = self.door()
        return work() if door.inside() else door.call(work, timeout=timeout)

    @property
    def where(self) -> str:
        """What is looked at, for an error or a title."""
        return self.path or "the server"

    def scope(self) -> list[Namespace]:
        """The namespaces that are meant."""
        return list(self.server.namespaces.values()) if self.path is None else [self.chosen(self.path)]

    def chosen(self, path: str) -> Namespace:
        """The namespace with this path. Raises `NamespaceNotFoundError`."""
        namespaces = self.server.namespaces
        if path in namespaces:
            return namespaces[path]
        raise NamespaceNotFoundError(f"no namespace {path!r}; the namespaces are: {_names(namespaces)}")

    def some(self, path: str | None) -> list[Namespace]:
        """The namespace with this path, else all that are meant."""
        return self.scope() if path is None else [self.one(path)]

    def one(self, path: str | None) -> Namespace:
        """The namespace with this path, else the only one there is. Raises `NamespaceNotFoundError`."""
        if path is not None:
            path = normalize_path(path)
            if self.path not in (None, path):
                raise NamespaceNotFoundError(f"this inspector is for {self.path!r} only, not for {path!r}")
            return self.chosen(path)
        scope = self.scope()
        if len(scope) != 1:
            raise NamespaceNotFoundError(
                f"say which namespace is meant: namespace=… is one of {_names(self.server.namespaces)}"
                if scope
                else "the server has no namespaces"
            )
        return scope[0]

    def socket(self, id: str | SocketSnapshot) -> tuple[Namespace, Socket[Any]]:
        """The one socket whose id is or begins with this, and its namespace. Raises `SocketNotFoundError`."""
        wanted = id if isinstance(id, str) else id.id
        found = {s.id: (n, s) for n in self.scope() for s in n.sockets.values() if s.id.startswith(wanted)}
        return found[full_id(wanted, found, self.where)]


class Desk:
    """What stays when a re-run cell replaces the server: the server behind the live views, and the page's token."""

    def __init__(self, subject: Subject) -> None:
        self.token = secrets.token_urlsafe(32)
        self.widgets: dict[tuple[str | None, bool], Any] = {}
        self._subject = weakref.ref(subject)

    def pass_to(self, subject: Subject) -> None:
        """From now on the views look at this server."""
        self._subject = weakref.ref(subject)

    @property
    def subject(self) -> Subject:
        """The server that is looked at; raises `ServerStateError` when it is gone."""
        subject = self._subject()
        if subject is None:
            raise ServerStateError("the server has stopped")
        return subject


def _names(paths: Iterable[str]) -> str:
    return ", ".join(map(repr, paths)) or "none"


__all__ = ["Actor", "Desk", "Inspected", "Subject"]
