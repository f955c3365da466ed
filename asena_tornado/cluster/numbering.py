"""How lost messages are noticed: the numbers a node gives to what it publishes, and those that another has received.

Each message to a channel carries the next number of its publisher there, so a later message shows that an earlier one
is missing. When a channel falls silent its publisher sends a *mark* with the last number, on the channel itself: only
nodes with members there receive it, and heartbeats stay small. Marks are sent again to whoever was away.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from time import monotonic

_CHANNELS = 100_000  # whose numbers a publisher remembers
_PUBLISHERS = 1000  # of one channel, whose numbers a receiver remembers
_TOTALS = 64  # heartbeats of a node whose totals a receiver remembers

LATE, UNWANTED = -1, -2  # instead of a number of missing messages


class Numbers:
    """How far one publisher has come in one channel."""

    __slots__ = ("epoch", "last", "turn", "unmarked")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch  # the publisher's total when it began to count; another one after it has forgotten
        self.last = 0
        self.turn = 0  # when it was used last
        self.unmarked = 0  # the first number that no mark tells of yet; 0: there is none


class Outgoing:
    """Numbers what one node publishes, per channel, from 1, and knows which channels need a mark.

    ``mark`` is called with a channel and its `Numbers`, and says whether the transport has taken the mark.
    ``unaccounted`` is called with a channel and how many of its messages other nodes may have missed without ever
    hearing of it. Channels not used for long are forgotten, and begin again in another epoch.
    """

    def __init__(self, mark: Callable[[str, Numbers], bool], unaccounted: Callable[[str, int], None]) -> None:
        self.total = 0
        self.turn = 1  # advances with each heartbeat
        self._mark = mark
        self._unaccounted = unaccounted
        self._channels: OrderedDict[str, Numbers] = OrderedDict()  # the one used last is last
        self._fresh: dict[str, Numbers] = {}  # those with something unmarked
        self._sent: dict[str, tuple[Numbers, int]] = {}  # marked, but the bus may not have it: what was unmarked
        self._forgotten_at = 0  # the turn in which the channel forgotten last was used

    def next(self, channel: str) -> Numbers:
        """The channel's numbers, counted one further."""
        self.total += 1
        numbers = self._channels.get(channel)
        if numbers is None:
            numbers = self._channels[channel] = Numbers(self.total)
            if len(self._channels) > _CHANNELS:
                self._forget()
        else:
            self._channels.move_to_end(channel)
        numbers.last += 1
        numbers.turn = self.turn
        if not numbers.unmarked:
            numbers.unmarked = numbers.last
            self._fresh[channel] = numbers
        return numbers

    def _forget(self) -> None:
        channel, numbers = self._channels.popitem(last=False)
        self._forgotten_at = numbers.turn
        if self._fresh.pop(channel, None) is not None:
            if self._mark(channel, numbers):
                self._sent.setdefault(channel, (numbers, numbers.unmarked))
            else:
                self._unaccounted(channel, numbers.last - numbers.unmarked + 1)

    def quiet(self, *, all: bool = False) -> Iterator[bool]:
        """Mark the channels to which nothing was published lately, or all; an item for each that was taken.

        Ends at the first that is not taken: the others are due the next time.
        """
        for channel, numbers in list(self._fresh.items()):
            if not all and numbers.turn >= self.turn - 1:
                continue
            if self._fresh.get(channel) is not numbers:
                continue  # forgotten meanwhile
            if not self._mark(channel, numbers):
                return
            del self._fresh[channel]
            earlier = self._sent.get(channel)
            self._sent[channel] = (numbers, earlier[1] if earlier is not None else numbers.unmarked)
            numbers.unmarked = 0
            yield True

    @property
    def unmarked(self) -> int:
        """Channels with something that no mark tells of yet."""
        return len(self._fresh)

    @property
    def unconfirmed(self) -> bool:
        """Whether there are marks that may not have reached the bus."""
        return bool(self._sent)

    def sent(self) -> dict[str, tuple[Numbers, int]]:
        """The marks that may not have reached the bus, for `confirm`."""
        return dict(self._sent)

    def confirm(self, marks: dict[str, tuple[Numbers, int]]) -> None:
        """The bus has these."""
        for channel, mark in marks.items():
            if self._sent.get(channel) is mark:
                del self._sent[channel]

    def repeat(self) -> None:
        """The bus may have lost what it had not confirmed: those marks are due again."""
        sent, self._sent = self._sent, {}
        for channel, (numbers, unmarked) in sent.items():
            if self._channels.get(channel) is numbers:
                numbers.unmarked = unmarked
                self._fresh[channel] = numbers
            else:
                self._unaccounted(channel, numbers.last - unmarked + 1)

    def remark(self, since: int) -> bool:
        """All channels used since this turn need a mark, for somebody who was away. False if some are forgotten."""
        for channel in reversed(self._channels):
            numbers = self._channels[channel]
            if numbers.turn < since:
                break
            if not numbers.unmarked:
                numbers.unmarked = numbers.last + 1  # nobody else needs it
                self._fresh[channel] = numbers
        return not self._forgotten_at or self._forgotten_at < since


class Incoming:
    """What one node has received, per channel and publisher: what is missing, and what comes too late.

    Where a publisher has been silent in a channel, counting begins with its first number: who subscribes later has
    missed nothing. Unless all its numbers there are known to be of a time when the channel was subscribed to.
    """

    def __init__(self, here: Callable[[bytes], bool]) -> None:
        self._here = here  # whether a node is known to be there
        self._channels: dict[str, _Channel] = {}
        self._totals: dict[bytes, deque[tuple[float, int]]] = {}  # of each node, as it told them, and when

    def subscribe(self, channel: str, settled_at: float) -> None:
        """``settled_at``: when (of ``time.monotonic``) the subscription has taken effect for certain."""
        if channel not in self._channels:
            self._channels[channel] = _Channel(settled_at)

    def unsubscribe(self, channel: str) -> None:
        """Nothing is counted there any more."""
        self._channels.pop(channel, None)

    def arrived(self, channel: str, node: bytes, epoch: int, number: int) -> int:
        """How many are missing just before this one.

        `LATE` when this one is a duplicate or comes too late, `UNWANTED` when the channel is not subscribed to.
        """
        of_channel = self._channels.get(channel)
        if of_channel is None:
            return UNWANTED
        last = of_channel.last.get(node)
        if last is not None and last[0] == epoch:
            missed = number - last[1] - 1
            if missed < 0:
                return LATE
            last[1] = number
            return missed
        if last is not None and last[0] > epoch:
            return LATE
        return self._begin(of_channel, node, epoch, number, number - 1)

    def marked(self, channel: str, node: bytes, epoch: int, number: int) -> int:
        """The node says that it has published up to this number: how many of those did not arrive."""
        of_channel = self._channels.get(channel)
        if of_channel is None:
            return 0
        last = of_channel.last.get(node)
        if last is not None and last[0] == epoch:
            missed = max(0, number - last[1])
            last[1] += missed
            return missed
        if last is not None and last[0] > epoch:
            return 0
        return self._begin(of_channel, node, epoch, number, number)

    def _begin(self, of_channel: _Channel, node: bytes, epoch: int, number: int, before: int) -> int:
        """The first number of an epoch: how many of those ``before`` are missing."""
        new = node not in of_channel.last
        of_channel.last[node] = [epoch, number]
        if new and len(of_channel.last) > _PUBLISHERS:
            # Those that come and go without a word, rather than those that stay.
            del of_channel.last[
                next((each for each in of_channel.last if not self._here(each)), next(iter(of_channel.last)))
            ]
        if not new:
            return before  # all later than what arrived last
        for at, total in self._totals.get(node, ()):
            if at >= of_channel.settled_at:
                # It had published so much when the subscription had taken effect.
                return before if epoch > total else 0
        return 0

    def told(self, node: bytes, total: int) -> None:
        """The node has published so many messages, to all channels together."""
        totals = self._totals.get(node)
        if totals is None:
            totals = self._totals[node] = deque(maxlen=_TOTALS)
            if len(self._totals) > _PUBLISHERS:
                del self._totals[next(iter(self._totals))]
        totals.append((monotonic(), total))

    def forget_node(self, node: bytes) -> None:
        """It is gone for good."""
        self._totals.pop(node, None)
        for of_channel in self._channels.values():
            of_channel.last.pop(node, None)


class _Channel:
    __slots__ = ("last", "settled_at")

    def __init__(self, settled_at: float) -> None:
        self.settled_at = settled_at
        self.last: dict[bytes, list[int]] = {}  # epoch and number, by publisher


__all__ = ["LATE", "UNWANTED", "Incoming", "Numbers", "Outgoing"]
