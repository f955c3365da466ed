"""What carries messages between nodes: the `Transport` contract, which knows channels and bytes and nothing else."""

from __future__ import annotations

from typing import Protocol


class Receiver(Protocol):
    """Who a transport reports to, on the loop that started it."""

    def message_received(self, channel: str, payload: bytes) -> None:
        """Something was published to a channel that is subscribed to. Never raises."""
        ...

    def ready_changed(self, ready: bool, reason: str) -> None:
        """`Transport.ready` has changed. Whatever was published in between may be missing: at most once."""
        ...


class Transport(Protocol):
    """Publish and subscribe among the nodes of one application; write your own for another message bus.

    Everything is called on one loop, the one that awaited `start`, and nothing here may block it. What has to hold:

    - A message is delivered **at most once** to each node that has subscribed to its channel.
    - What one node publishes arrives in the order in which it was published, in all channels together; except for
      what is lost. Losing is allowed (a broken connection, a queue that is full); reordering is not.
    - Whether a node receives its own messages is left open: they are recognised and dropped.
    - Memory is bounded: a bus that is slow or away makes `publish` return False, it does not make a queue grow.
    - A lost connection is restored without being asked, with every subscription.

    ``tests/test_transports.py`` says the same as tests, for every transport.
    """

    @property
    def ready(self) -> bool:
        """Whether messages go out and come in at the moment."""
        ...

    async def start(self, receiver: Receiver) -> None:
        """Connect. Raises `ConfigurationError` for what can never work (an address, a password).

        A bus that is merely away is no error: then `ready` is False and becomes True later.
        """
        ...

    async def stop(self) -> None:
        """Deliver what was published before, as far as that is possible soon; disconnect; forget every channel.

        Idempotent. `start` begins anew.
        """
        ...

    def publish(self, channel: str, payload: bytes) -> bool:
        """Queue the payload for the channel's subscribers; False if it was not taken and is lost."""
        ...

    def subscribe(self, channel: str) -> None:
        """Receive the channel's messages from soon on; `sync` tells when."""
        ...

    def unsubscribe(self, channel: str) -> None:
        """Receive them no more; a few may still come."""
        ...

    async def sync(self) -> None:
        """Return once the bus has all that was published, and honours all that was subscribed to, before the call.

        Raises `TransportError` when the connection is lost before, or when there is none.
        """
        ...
