"""The Tornado edge: from the HTTP handshake to frames, and from messages to bytes on the wire."""

from .front import Front, FrontServer
from .handshake import Endpoint, websocket_routes
from .ledger import Ledger, quarter_of_memory
from .outbox import Outbox

__all__ = ["Endpoint", "Front", "FrontServer", "Ledger", "Outbox", "quarter_of_memory", "websocket_routes"]
