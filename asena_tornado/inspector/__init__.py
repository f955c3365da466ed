"""Looking into a running server and acting on it: snapshots, their display, and `Inspector`, which takes them."""

from .inspector import Inspector
from .page import page_routes
from .snapshots import Events, Namespaces, NamespaceSnapshot, Receipt, Rooms, Sockets, SocketSnapshot
from .view import Desk, View
from .widget import LiveView

__all__ = [
    "Desk",
    "Events",
    "Inspector",
    "LiveView",
    "NamespaceSnapshot",
    "Namespaces",
    "Receipt",
    "Rooms",
    "SocketSnapshot",
    "Sockets",
    "View",
    "page_routes",
]
