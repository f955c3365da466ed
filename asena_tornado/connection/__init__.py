"""The Tornado edge: from the HTTP handshake to frames, and from messages to bytes on the wire."""

from .handshake import Endpoint, Front, FrontServer, Refusal, websocket_routes
from .outbox import Outbox

__all__ = ["Endpoint", "Front", "FrontServer", "Outbox", "Refusal", "websocket_routes"]
