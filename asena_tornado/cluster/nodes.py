"""Who is there: the nodes, how they make themselves known, and what is said about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Self

from .envelope import Heartbeat

DEAD_AFTER = 3  # heartbeats without one
_FORGOTTEN_AFTER = 600  # heartbeats: until then a node that comes back is told what was missed meanwhile


@dataclass(frozen=True, slots=True)
class Node:
    """One server of the cluster.

    ``sockets``: how many it holds, per namespace. ``seen``: seconds since it was last heard.
    """

    id: str
    name: str
    sockets: Mapping[str, int]
    seen: float
    local: bool = False

    def __repr__(self) -> str:
        where = ", ".join(f"{path} {count}" for path, count in self.sockets.items()) or "no namespaces"
        return f"<node {self.id[:8]} {self.name}{' (this one)' if self.local else ''}: sockets {where}>"


@dataclass(frozen=True, slots=True)
class Gap:
    """``missed`` messages that ``node`` published to ``room`` of ``namespace`` (None: to everybody) did not arrive.

    A message to several rooms counts once for each of them. ``certain``: this is known. False: up to ``missed``
    messages to rooms of the namespace, or any number where that is 0, may not have arrived; the node published to
    more rooms than it can remember.
    """

    node: str
    namespace: str
    room: str | None
    missed: int
    certain: bool = True


class Count(int):
    """A number of sockets on all nodes, and whether it is ``complete``.

    ``missing``: ids of the nodes that did not answer in time, and whose sockets are not counted.
    """

    missing: tuple[str, ...]

    def __new__(cls, value: int, missing: Iterable[str] = ()) -> Self:
        self = super().__new__(cls, value)
        self.missing = tuple(missing)
        return self

    @property
    def complete(self) -> bool:
        """Whether every node has answered."""
        return not self.missing

    def __repr__(self) -> str:
        if self.complete:
            return super().__repr__()
        return f"<at least {int(self)}: no answer from {', '.join(id[:8] for id in self.missing)}>"


class Known:
    """What is known of another node."""

    __slots__ = ("alive", "heard_at", "name", "serves", "silent", "sockets", "unaccounted")

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.alive = True
        self.unaccounted: dict[str, int] = dict(heartbeat.unaccounted)
        self.hear(heartbeat)

    def hear(self, heartbeat: Heartbeat) -> dict[str, int]:
        """It is there. Per namespace, how many more messages it cannot account for than the last time."""
        self.name = heartbeat.name
        self.serves = heartbeat.serves
        self.sockets = heartbeat.sockets
        self.heard_at = monotonic()
        self.silent = 0  # heartbeats of our own since it was heard: while we stand still, nobody else is silent
        self.alive = True
        before, self.unaccounted = self.unaccounted, dict(heartbeat.unaccounted)
        more = {path: count - before.get(path, 0) for path, count in self.unaccounted.items()}
        return {path: count for path, count in more.items() if count > 0}


class Membership:
    """The other nodes, as far as they were heard."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._known

    def __iter__(self) -> Iterator[Known]:
        """The servers that are there."""
        return (known for known in list(self._known.values()) if known.alive and known.serves)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def alive(self) -> set[bytes]:
        """The ids of the servers that are there."""
        return {id for id, known in self._known.items() if known.alive and known.serves}

    def is_alive(self, node: bytes) -> bool:
        """Whether it is there."""
        known = self._known.get(node)
        return known is not None and known.alive

    def gone_for(self, node: bytes) -> float | None:
        """Seconds since a server that counts as gone was heard; None for all others."""
        known = self._known.get(node)
        return None if known is None or known.alive or not known.serves else monotonic() - known.heard_at

    def hear(self, node: bytes, heartbeat: Heartbeat) -> tuple[Known, dict[str, int], bool]:
        """Take note. What is known of it now, `Known.hear`'s result, and whether it is new."""
        known = self._known.get(node)
        if known is None:
            known = self._known[node] = Known(heartbeat)
            return known, {}, True
        return known, known.hear(heartbeat), False

    def pop(self, node: bytes) -> None:
        """It has said goodbye."""
        self._known.pop(node, None)

    def pulse(self, *, ready: bool) -> tuple[list[bytes], list[bytes]]:
        """One interval has passed: those that are gone now, and those gone for so long that they are forgotten.

        While nothing arrives at all (``ready`` is False), it proves nothing that a node is not heard.
        """
        gone: list[bytes] = []
        forgotten: list[bytes] = []
        for node, known in list(self._known.items()):
            if ready or not known.alive:
                known.silent += 1
            if known.alive and known.silent > DEAD_AFTER:
                known.alive = False
                gone.append(node)
            elif known.silent > _FORGOTTEN_AFTER:
                del self._known[node]
                forgotten.append(node)
        return gone, forgotten

    def expect_all(self) -> None:
        """After a pause in which nobody could be heard: each gets its time again to make itself heard."""
        for known in self._known.values():
            if known.alive:
                known.silent = 0

    def nodes(self) -> list[Node]:
        """The servers that are there."""
        now = monotonic()
        return [
            Node(id.hex(), known.name, known.sockets, now - known.heard_at)
            for id, known in list(self._known.items())
            if known.alive and known.serves
        ]


__all__ = ["Count", "Gap", "Known", "Membership", "Node"]
