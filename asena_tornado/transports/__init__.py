"""What carries messages between nodes: the `Transport` contract, and the transports there are."""

from .contract import Entries, Entry, EntryReceiver, Receiver, Transport, TransportHistory
from .local import LocalTransport
from .redis import RedisTransport

__all__ = [
    "Entries",
    "Entry",
    "EntryReceiver",
    "LocalTransport",
    "Receiver",
    "RedisTransport",
    "Transport",
    "TransportHistory",
]
