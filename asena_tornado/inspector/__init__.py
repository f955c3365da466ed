"""Looking into a running server and acting on it: snapshots, their display, and `Inspector`, which takes them."""

from .inspector import Inspector
from .nodes import ClusterInspector, Nodes, NodeSocket
from .page import page_routes
from .receipts import Receipt
from .snapshots import Events, Namespaces, NamespaceSnapshot, Rooms, Sockets, SocketSnapshot
from .subject import Desk, Subject
from .view import View
from .widget import LiveView

__all__ = [
    "ClusterInspector",
    "Desk",
    "Events",
    "Inspector",
    "LiveView",
    "NamespaceSnapshot",
    "Namespaces",
    "NodeSocket",
    "Nodes",
    "Receipt",
    "Rooms",
    "SocketSnapshot",
    "Sockets",
    "Subject",
    "View",
    "page_routes",
]
