"""Live rooms in Python: in a notebook, in a Tornado application, and on more than one machine."""

from .broker import BulkOperation, BulkResult, Ulak, UlakNamespace, ulak
from .client import Client, connect
from .cluster import BlockingUlakClient, Gap, UlakClient
from .container import Inject, Service
from .controllers import Controller, Delete, Get, Patch, Post, Put
from .errors import (
    AsenaError,
    BackpressureError,
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
    TransportError,
    UlakError,
    UlakErrorCode,
)
from .events import HandlerError
from .http import Context, Middleware, MiddlewareService, Next, Response
from .inspector import Inspector
from .middlewares import RateLimit, RequestLog, TokenAuth
from .namespace import Addressed
from .options import WebSocketOptions
from .server import AsenaServer
from .service import AsenaWebSocketService, WebSocket
from .sockets import ReadyState, Socket, SocketData
from .transports import LocalTransport, RedisTransport, Transport

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
    "CircularDependencyError",
    "Client",
    "ConfigurationError",
    "ConnectionClosed",
    "Context",
    "Controller",
    "Delete",
    "EncodeError",
    "Gap",
    "Get",
    "HandlerError",
    "HandshakeRefused",
    "HookNameWarning",
    "Inject",
    "InjectionError",
    "Inspector",
    "InvalidMessageError",
    "LocalTransport",
    "Middleware",
    "MiddlewareError",
    "MiddlewareService",
    "NamespaceNotFoundError",
    "Next",
    "Patch",
    "PortInUseError",
    "Post",
    "Put",
    "RateLimit",
    "ReadyState",
    "RedisTransport",
    "RequestLog",
    "Response",
    "RoomLimitError",
    "RoomNameError",
    "ServerStateError",
    "Service",
    "Socket",
    "SocketClosedError",
    "SocketData",
    "SocketNotFoundError",
    "TokenAuth",
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
    "ulak",
]
