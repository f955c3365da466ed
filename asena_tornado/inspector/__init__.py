"""Looking into a running server and acting on it: snapshots, their display, and `Inspector`, which takes them."""

from .inspector import Inspector
from .snapshots import Events, Namespaces, NamespaceSnapshot, Receipt, Rooms, Sockets, SocketSnapshot

__all__ = ["Events", "Inspector", "NamespaceSnapshot", "Namespaces", "Receipt", "Rooms", "SocketSnapshot", "Sockets"]
