"""Who is there: the nodes, how they make themselves known, and what is said about them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Self

from .envelope import Departed, Heartbeat

DEAD_AFTER = 3  # heartbeats of our own without one of its: between two and three seconds
STILL_HERE = 60  # heartbeats after which a node that only sends, and has nothing to send, says that it is there
_FORGOTTEN_AFTER = 600  # heartbeats: until then a node that comes back is told what was missed meanwhile
_DEPARTED = 1000  # nodes that are gone, remembered
_DEPARTED_FOR = 600.0  # seconds for which they are
_LISTED = 50  # of them, in one answer
_PATHS = 3  # namespaces of each


@dataclass(frozen=True, slots=True)
class Node:
    """One server of the cluster.

    ``sockets``: how many it holds, per namespace. ``seen``: seconds since it was last heard. ``unlisted``: how many
    more namespaces it has, of which it has not told yet: with very many it tells of some in each heartbeat.
    """

    id: str
    name: str
    sockets: Mapping[str, int]
    seen: float
    local: bool = False
    unlisted: int = 0

    def __repr__(self) -> str:
        where = ", ".join(f"{path} {count}" for path, count in self.sockets.items()) or "no namespaces"
        more = f" and {self.unlisted} more" if self.unlisted else ""
        return f"<node {self.id[:8]} {self.name}{' (this one)' if self.local else ''}: sockets {where}{more}>"


@dataclass(frozen=True, slots=True)
class Gap:
    """``missed`` messages that ``node`` published to ``room`` of ``namespace`` (None: to everybody) did not arrive.

    A message to several rooms counts once for each of them. ``certain``: this is known. False: up to ``missed``
    messages to any rooms of the namespace may not have arrived, or any number where ``missed`` is 0. It happens when
    the node published to more rooms than it can remember, when the bus refuses a room, and when the node went away
    while this one was cut off. ``node`` is empty for several such nodes that nobody can name any more, and
    where messages to a room with a history can no longer be had; ``missed`` is 0 where the whole history was lost.
    """

    node: str
    namespace: str
    room: str | None
    missed: int
    certain: bool = True


class Count(int):
    """A number of sockets on all nodes, and whether it is ``complete``.

    ``missing``: ids of the nodes that did not answer in time, and whose sockets are not counted. ``settled``: False
    when this node has just come, or come back, and did not know yet which nodes there are.
    """

    missing: tuple[str, ...]
    settled: bool

    def __new__(cls, value: int, missing: Iterable[str] = (), *, settled: bool = True) -> Self:
        """A number that says what it leaves out."""
        self = super().__new__(cls, value)
        self.missing = tuple(missing)
        self.settled = settled
        return self

    @property
    def complete(self) -> bool:
        """Whether every node has answered."""
        return self.settled and not self.missing

    @property
    def incomplete(self) -> str:
        """Why it is not complete; empty when it is."""
        why = [] if self.settled else ["it is not known yet which nodes there are"]
        if self.missing:
            why.append(f"no answer from {', '.join(id[:8] for id in self.missing)}")
        return ", ".join(why)

    def __repr__(self) -> str:
        if self.complete:
            return super().__repr__()
        return f"<Count: at least {int(self)}: {self.incomplete}>"


class Known:
    """What is known of another node."""

    __slots__ = (
        "alive",
        "heard_at",
        "name",
        "namespaces",
        "owes",
        "serves",
        "silent",
        "sockets",
        "total",
        "unaccounted",
    )

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.alive = True
        self.owes = False  # this node was away, and has not been told by the other one what it missed
        self.unaccounted: dict[str, int] = {}
        self.sockets: Mapping[str, int] = {}
        self.hear(heartbeat)

    def hear(self, heartbeat: Heartbeat) -> dict[str, int]:
        """It is there. Per namespace, how many more messages it cannot account for than the last time."""
        self.name = heartbeat.name
        self.serves = heartbeat.serves
        self.total = heartbeat.total
        self.namespaces = max(heartbeat.namespaces, len(heartbeat.sockets))
        sockets = {path: count for path, count in self.sockets.items() if path not in heartbeat.sockets}
        sockets.update(heartbeat.sockets)
        while len(sockets) > self.namespaces:
            del sockets[next(iter(sockets))]  # the one that it has not told of for longest
        self.sockets = sockets
        self.heard_at = monotonic()
        self.silent = 0  # heartbeats of our own since it was heard: while we stand still, nobody else is silent
        self.alive = True
        before, self.unaccounted = self.unaccounted, dict(heartbeat.unaccounted)
        more = {path: count - before.get(path, 0) for path, count in self.unaccounted.items()}
        return {path: count for path, count in more.items() if count > 0}

    @property
    def paths(self) -> tuple[str, ...]:
        """The namespaces that it may have published to; none: they are not known, or not all."""
        return () if self.namespaces > len(self.sockets) else tuple(self.sockets)


class Membership:
    """The other nodes, as far as they were heard."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._known

    def __iter__(self) -> Iterator[tuple[bytes, Known]]:
        """The servers that are there, with their ids."""
        return ((id, known) for id, known in list(self._known.items()) if known.alive and known.serves)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def alive(self) -> set[bytes]:
        """The ids of the servers that are there."""
        return {id for id, _ in self}

    def is_alive(self, node: bytes) -> bool:
        """Whether it is there."""
        known = self._known.get(node)
        return known is not None and known.alive

    def gone_for(self, node: bytes) -> float | None:
        """Seconds since a server that counts as gone was heard; None for all others."""
        known = self._known.get(node)
        return None if known is None or known.alive or not known.serves else monotonic() - known.heard_at

    def get(self, node: bytes) -> Known | None:
        """What is known of it."""
        return self._known.get(node)

    def hear(self, node: bytes, heartbeat: Heartbeat, *, started: bool) -> tuple[Known, dict[str, int], bool]:
        """Take note. What is known of it now, `Known.hear`'s result, and whether it is new.

        ``started``: if it is new to us, that is because it has just started.
        """
        known = self._known.get(node)
        if known is None:
            known = self._known[node] = Known(heartbeat)
            return known, dict(heartbeat.unaccounted) if started else {}, True
        return known, known.hear(heartbeat), False

    def pop(self, node: bytes) -> None:
        """It has said goodbye."""
        self._known.pop(node, None)

    def pulse(self, *, ready: bool) -> tuple[list[tuple[bytes, Known]], list[bytes]]:
        """One interval has passed: those that are gone now, and those gone for so long that they are forgotten.

        While nothing arrives at all (``ready`` is False), it proves nothing that a node is not heard.
        """
        gone: list[tuple[bytes, Known]] = []
        forgotten: list[bytes] = []
        for node, known in list(self._known.items()):
            present = known.alive or known.owes
            if ready or not present:
                known.silent += 1
            # One that only sends is often silent; not when it owes an answer.
            limit = DEAD_AFTER if known.serves or known.owes else 2 * STILL_HERE + DEAD_AFTER
            if present and known.silent >= limit:
                known.alive = False
                gone.append((node, known))
            elif known.silent > _FORGOTTEN_AFTER:
                del self._known[node]
                forgotten.append(node)
        return gone, forgotten

    def expect_all(self, *, owing: bool = False) -> None:
        """Nobody could be heard for a while: start counting again how long each node has been silent.

        ``owing``: messages may have been missed meanwhile, and each owes a word about that. A node that only sends is
        silent while it has nothing to send, so of those nobody is left out.
        """
        for known in self._known.values():
            if known.alive or (owing and not known.serves):
                known.silent = 0
                known.owes = known.owes or owing

    def nodes(self) -> list[Node]:
        """The servers that are there."""
        now = monotonic()
        return [
            Node(
                id.hex(),
                known.name,
                known.sockets,
                now - known.heard_at,
                unlisted=known.namespaces - len(known.sockets),
            )
            for id, known in self
        ]


class Departures:
    """The nodes that came to an end lately, remembered for those that are cut off at the moment."""

    def __init__(self) -> None:
        # When, whether it had published anything, and its namespaces.
        self._left: OrderedDict[bytes, tuple[float, bool, tuple[str, ...]]] = OrderedDict()
        self._forgotten_at = float("-inf")  # when the one left that was forgotten last

    def __contains__(self, node: object) -> bool:
        return node in self._left

    def add(self, node: bytes, paths: tuple[str, ...], *, published: bool) -> None:
        """It has said goodbye, or is silent for too long. ``published``: anything, as far as can be known."""
        now = monotonic()
        self._left.pop(node, None)
        self._left[node] = (now, published, paths if len(paths) <= _PATHS else ())
        while len(self._left) > _DEPARTED or next(iter(self._left.values()))[0] < now - _DEPARTED_FOR:
            _, (at, had_published, _) = self._left.popitem(last=False)
            if had_published:
                self._forgotten_at = at

    def discard(self, node: bytes) -> None:
        """It is there after all."""
        self._left.pop(node, None)

    def since(self, at: float) -> tuple[list[Departed], bool]:
        """Those that left since then (of ``time.monotonic``) and had published, and whether there are more."""
        found = [
            Departed(node=node.hex(), paths=paths)
            for node, (left_at, published, paths) in self._left.items()
            if left_at >= at and published
        ]
        return found[-_LISTED:], len(found) > _LISTED or self._forgotten_at >= at


__all__ = ["Count", "Departures", "Gap", "Known", "Membership", "Node"]
