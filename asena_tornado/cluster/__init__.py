"""The nodes that share their rooms: who is there, what travels between them, and what gets lost."""

from .client import BlockingUlakClient, UlakClient
from .cluster import Cluster
from .nodes import Count, Gap, Node

__all__ = ["BlockingUlakClient", "Cluster", "Count", "Gap", "Node", "UlakClient"]
