"""Looking into a running server and acting on it: snapshots, their display, and `Inspector`, which takes them."""

from .inspector import Inspector
from .nodes import ClusterInspector, Nodes, NodeSocket
from .page import page_routes
from .snapshots import Events, Namespaces, NamespaceSnapshot, Receipt, Rooms, Sockets, SocketSnapshot
from .view import Desk, View
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
    "View",
    "page_routes",
]
