"""What carries messages between nodes: the `Transport` contract, and the transports there are."""

from .contract import Receiver, Transport
from .local import LocalTransport
from .redis import RedisTransport

__all__ = ["LocalTransport", "Receiver", "RedisTransport", "Transport"]
