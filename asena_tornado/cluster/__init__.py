"""The nodes that share their rooms: who is there, what travels between them, and what gets lost."""

from .client import BlockingUlakClient, UlakClient
from .cluster import Cluster, Gap, Node

__all__ = ["BlockingUlakClient", "Cluster", "Gap", "Node", "UlakClient"]
