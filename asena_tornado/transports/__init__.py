"""Between nodes: what carries messages (`Transport`), and the cluster that uses it."""

from .cluster import Cluster, Gap, Node
from .contract import Receiver, Transport
from .local import LocalTransport
from .redis import RedisTransport

__all__ = ["Cluster", "Gap", "LocalTransport", "Node", "Receiver", "RedisTransport", "Transport"]
