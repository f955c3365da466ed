"""What carries messages between nodes: the `Transport` contract, which knows channels and bytes and nothing else."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable


class Receiver(Protocol):
    """Who a transport reports to, on the loop that started it."""

    def message_received(self, channel: str, payload: bytes) -> None:
        """Something was published to a channel that is subscribed to. Never raises."""
        ...

    def ready_changed(self, ready: bool, reason: str) -> None:
        """`Transport.ready` has changed, or the reason why it is False.

        While it was False, messages may have been lost in either direction; the receiver finds out which. ``reason``
        says why it is not ready, in words for a person who has to repair it; empty when it is.
        """
        ...


class Entry(NamedTuple):
    """What was published to a channel with a history: its number, when (of ``time.time``), and the bytes."""

    offset: int
    at: float
    payload: bytes


class Entries(NamedTuple):
    """Some of a channel's history; ``offset`` is the number of the last entry that was ever added, 0 for none."""

    epoch: str
    offset: int
    entries: list[Entry]


class EntryReceiver(Protocol):
    """Who is told of the entries of a channel's history, on the loop that started the transport."""

    def __call__(self, epoch: str, offset: int, at: float, payload: bytes | None) -> None:
        """An entry was added, at this time (of ``time.time``). Never raises.

        ``payload`` is None where there was no room for it on the way: it can be read.
        """
        ...


@runtime_checkable
class TransportHistory(Protocol):
    """What a transport has as its ``history`` if it keeps what is published; without, rooms cannot remember.

    Each channel has a history of its own, from 1 on in an epoch: a text that is new whenever the numbers are lost. It
    is one for all nodes: what several of them publish at once gets numbers one after the other, and arrives everywhere
    in the order of the numbers, at the node that has published it as well; except for what is lost on the way. Between
    two channels there is no order, and `Transport.publish` is not concerned.
    """

    def publish(self, channel: str, payload: bytes, *, size: int, ttl: float) -> bool:
        """Add the payload to the channel's history, and hand it to everybody who follows the channel.

        Of the history, the last ``size`` entries are kept, each for ``ttl`` seconds; its epoch and offset for much
        longer. False if it was not taken, as with `Transport.publish`: then nobody gets it, and it has no number.
        """
        ...

    def follow(self, channel: str, receiver: EntryReceiver) -> None:
        """Receive the channel's new entries from soon on; `Transport.sync` tells when.

        `Transport.stop` forgets it. Where some may be lost, `Receiver.ready_changed` is called afterwards.
        """
        ...

    def unfollow(self, channel: str) -> None:
        """Receive them no more; a few may still come. Idempotent."""
        ...

    async def read(
        self, channel: str, *, since: int | None = None, limit: int | None = None, reverse: bool = False
    ) -> Entries:
        """Return the entries after ``since``, oldest first; reversed, those before it, newest first; without holes.

        They are at most ``limit``; 0 asks for the position only. What this node has published before is among them.
        Raises `TransportError` when the history cannot be reached.
        """
        ...


class Transport(Protocol):
    """Publish and subscribe among the nodes of one application; write your own for another message bus.

    Everything is called on one loop, the one that awaited `start`, and nothing here may block it. What has to hold:

    - A message is delivered **at most once** to each node that has subscribed to its channel.
    - What one node publishes arrives in the order in which it was published, in all channels together; except for
      what is lost. Losing is allowed (a broken connection, a queue that is full); reordering is not.
    - Whether a node receives its own messages is left open: they are recognised and dropped.
    - Memory is bounded: a bus that is slow or away makes `publish` return False, it does not make a queue grow.
    - A lost connection is restored without being asked, with every subscription, and not more often than every few
      seconds when that keeps failing.
    - A channel's name is a str that UTF-8 can encode, of 1 to 4096 bytes, with any characters, also spaces, "*", "#"
      and control characters. A bus that knows fewer has to encode it.
    - A payload is of any bytes, from none to at least 1,000,000. What is too large for the bus is not cut, but
      refused: `publish` returns False.
    - Two transports that connect the same channels in the same way are equal (``==``) and have the same hash. When a
      cell is run again, the new server takes over the connection of a transport that is equal.

    ``tests/test_transports.py`` says the same as tests. Run it against your own transport:
    ``pytest tests/test_transports.py --transport package.module:make``, where ``make(name)`` returns a new transport;
    those made with one name belong together, and to no others.

    A transport that also keeps what is published has it in an attribute ``history``: see `TransportHistory`.
    """

    @property
    def ready(self) -> bool:
        """Whether messages go out and come in at the moment, as far as that can be known: not just connected."""
        ...

    async def start(self, receiver: Receiver) -> None:
        """Connect. Raises `ConfigurationError` for what can never work (an address, a password).

        Raises `ServerStateError` when it is started already. While a `stop` is under way, waits for its end.

        A bus that is merely away is no error: then `ready` is False, `Receiver.ready_changed` has been told why, and
        becomes True later. It returns within a few seconds in any case. When it has become ready it has not called
        `Receiver.ready_changed` at all: that is for what changes afterwards.
        """
        ...

    async def stop(self) -> None:
        """Deliver what was published before, as far as that is possible soon; disconnect; forget every channel.

        Idempotent, also while another call is under way. `start` begins anew, with what is subscribed to from here on.
        """
        ...

    def publish(self, channel: str, payload: bytes) -> bool:
        """Queue the payload for the channel's subscribers.

        False if it was not taken and is lost: before `start` and after `stop`, while the bus is known to be away or
        not to accept it, or when too much is waiting. True is no promise: the connection may still break.
        """
        ...

    def subscribe(self, channel: str) -> None:
        """Receive the channel's messages from soon on; `sync` tells when.

        Idempotent: one that is subscribed to already stays so, and delivers once. May be called before `start`, which
        then subscribes.
        """
        ...

    def unsubscribe(self, channel: str) -> None:
        """Receive them no more; a few may still come. Idempotent. The last of several calls in a row counts."""
        ...

    async def sync(self) -> None:
        """Return once the bus has all that was published, and honours all that was subscribed to, before the call.

        Raises `TransportError` when the connection is lost before, when there is none, or when the bus did not accept
        what was published.
        """
        ...
