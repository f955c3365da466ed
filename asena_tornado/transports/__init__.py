"""Between nodes: what carries messages (`Transport`), and the cluster that uses it."""

from .client import BlockingUlakClient, UlakClient
from .cluster import Cluster, Gap, Node
from .contract import Receiver, Transport
from .local import LocalTransport
from .redis import RedisTransport

__all__ = [
    "BlockingUlakClient",
    "Cluster",
    "Gap",
    "LocalTransport",
    "Node",
    "Receiver",
    "RedisTransport",
    "Transport",
    "UlakClient",
]
