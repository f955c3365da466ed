"""The Tornado edge: from the HTTP handshake to frames, and from messages to bytes on the wire."""

from .handshake import Endpoint, Front, FrontServer, Refusal, websocket_routes
from .ledger import Ledger, quarter_of_memory
from .outbox import Outbox

__all__ = ["Endpoint", "Front", "FrontServer", "Ledger", "Outbox", "Refusal", "quarter_of_memory", "websocket_routes"]
