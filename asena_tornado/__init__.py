"""Live rooms in Python: in a notebook, in a Tornado application, and on more than one machine."""

from .client.live import LiveClient
from .client.plain import Client, connect
from .cluster import BlockingUlakClient, Count, Gap, UlakClient
from .errors import (
    AsenaError,
    BackpressureError,
    CallError,
    CircularDependencyError,
    ConfigurationError,
    ConnectionClosed,
    EncodeError,
    HandshakeRefused,
    HookNameWarning,
    InjectionError,
    InvalidMessageError,
    MiddlewareError,
    NamespaceNotFoundError,
    PortInUseError,
    RoomLimitError,
    RoomNameError,
    ServerStateError,
    SocketClosedError,
    SocketNotFoundError,
    TokenExpired,
    TransportError,
    UlakError,
    UlakErrorCode,
)
from .inspector.inspector import Inspector
from .ioc.every import every
from .ioc.inject import Inject, Service
from .server import AsenaServer
from .transports import LocalTransport, RedisTransport, Transport
from .ulak.broker import BulkOperation, BulkResult, Ulak, UlakNamespace, ulak
from .web.chain import Middleware, MiddlewareService, Next
from .web.controllers import Controller, Delete, Get, Patch, Post, Put
from .web.http import Context, Response
from .web.middlewares import RateLimit, RequestLog, TokenAuth
from .websocket.events import HandlerError
from .websocket.history import History, HistoryEntry, Position, RoomOptions
from .websocket.hooks import SubscribeRequest, Subscription
from .websocket.namespace import Addressed
from .websocket.options import WebSocketOptions
from .websocket.service import AsenaWebSocketService, WebSocket, on
from .websocket.sockets import ReadyState, Socket, SocketData

__version__ = "0.1.0"

__all__ = [
    "Addressed",
    "AsenaError",
    "AsenaServer",
    "AsenaWebSocketService",
    "BackpressureError",
    "BlockingUlakClient",
    "BulkOperation",
    "BulkResult",
    "CallError",
    "CircularDependencyError",
    "Client",
    "ConfigurationError",
    "ConnectionClosed",
    "Context",
    "Controller",
    "Count",
    "Delete",
    "EncodeError",
    "Gap",
    "Get",
    "HandlerError",
    "HandshakeRefused",
    "History",
    "HistoryEntry",
    "HookNameWarning",
    "Inject",
    "InjectionError",
    "Inspector",
    "InvalidMessageError",
    "LiveClient",
    "LocalTransport",
    "Middleware",
    "MiddlewareError",
    "MiddlewareService",
    "NamespaceNotFoundError",
    "Next",
    "Patch",
    "PortInUseError",
    "Position",
    "Post",
    "Put",
    "RateLimit",
    "ReadyState",
    "RedisTransport",
    "RequestLog",
    "Response",
    "RoomLimitError",
    "RoomNameError",
    "RoomOptions",
    "ServerStateError",
    "Service",
    "Socket",
    "SocketClosedError",
    "SocketData",
    "SocketNotFoundError",
    "SubscribeRequest",
    "Subscription",
    "TokenAuth",
    "TokenExpired",
    "Transport",
    "TransportError",
    "Ulak",
    "UlakClient",
    "UlakError",
    "UlakErrorCode",
    "UlakNamespace",
    "WebSocket",
    "WebSocketOptions",
    "__version__",
    "connect",
    "every",
    "on",
    "ulak",
]
