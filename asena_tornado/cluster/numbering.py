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
_STRANGE = 4096  # nodes of which it is remembered that they were forgotten
_REFUSALS = 8  # of a mark, by a bus that takes others, before it is given up
_IN_A_ROW = 100  # marks refused one after the other: the bus takes nothing at the moment

LATE, UNWANTED = -1, -2  # instead of a number of missing messages

_Marks = dict[tuple[str, int], tuple["Numbers", int]]  # by channel and epoch: the numbers, and what was unmarked


class Numbers:
    """A publisher's numbers in one channel."""

    __slots__ = ("epoch", "last", "turn", "unmarked")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch  # the publisher's total when it began to count; another one after it has forgotten
        self.last = 0
        self.turn = 0  # when it was used last
        self.unmarked = 0  # the first number that no mark covers yet, or 0 when every number is covered


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
        self._sent: _Marks = {}  # marks that the bus may not have
        self._confirming: _Marks = {}  # those of them whose arrival is being confirmed
        self._refusals: dict[str, int] = {}  # how often a mark was refused
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
        self._refusals.pop(channel, None)
        if self._fresh.pop(channel, None) is not None:
            if self._mark(channel, numbers):
                self._remember(channel, numbers)
            else:
                self._unaccounted(channel, numbers.last - numbers.unmarked + 1)

    def _remember(self, channel: str, numbers: Numbers) -> None:
        """A mark is under way. The bus may lose it, and then all is due again that no confirmed mark covers."""
        key = (channel, numbers.epoch)
        earlier = self._sent.get(key)
        self._sent[key] = (numbers, earlier[1] if earlier is not None else numbers.unmarked or numbers.last + 1)

    def _mark_now(self, channel: str, numbers: Numbers) -> bool:
        if not self._mark(channel, numbers):
            return False
        self._remember(channel, numbers)
        self._fresh.pop(channel, None)
        numbers.unmarked = 0
        return True

    def quiet(self, *, all: bool = False, ready: bool = True) -> Iterator[None]:
        """Mark the channels to which nothing was published lately, or all; an item for each that was looked at.

        Ends when the bus takes nothing; what is left is due the next time. A channel that alone is refused, again and
        again by a bus that is ``ready``, is given up: its messages are unaccounted for.
        """
        in_a_row = 0
        for channel, numbers in list(self._fresh.items()):
            yield
            if not all and numbers.turn >= self.turn - 1:
                continue
            if self._fresh.get(channel) is not numbers:
                continue  # forgotten or marked meanwhile
            if self._mark_now(channel, numbers):
                in_a_row = 0
                continue
            in_a_row += 1
            if not ready or in_a_row == _IN_A_ROW:
                return
            del self._fresh[channel]
            tries = self._refusals.get(channel, 0) + 1
            if tries < _REFUSALS:
                self._refusals[channel] = tries
                self._fresh[channel] = numbers  # behind the others
            else:
                self._refusals.pop(channel, None)
                self._unaccounted(channel, numbers.last - numbers.unmarked + 1)
                numbers.unmarked = 0

    @property
    def unmarked(self) -> int:
        """Channels with something that no mark covers yet."""
        return len(self._fresh)

    @property
    def unconfirmed(self) -> bool:
        """Whether there are marks that may not have reached the bus."""
        return bool(self._sent)

    def confirm(self) -> None:
        """All marks that were sent so far are to be confirmed: by `confirmed`, or not: `repeat`."""
        self._confirming, self._sent = self._sent, {}

    def confirmed(self) -> None:
        """The bus has the marks that were sent before `confirm`."""
        if self._refusals:
            for channel, _ in self._confirming:
                self._refusals.pop(channel, None)
        self._confirming = {}

    def repeat(self) -> None:
        """The bus may have lost the marks that it has not confirmed: they are due again."""
        # Where there are two of one channel, the older one counts: it covers what the newer one covers, and more.
        lost, self._sent, self._confirming = {**self._sent, **self._confirming}, {}, {}
        for (channel, _), (numbers, unmarked) in lost.items():
            if self._channels.get(channel) is numbers:
                numbers.unmarked = unmarked
                self._fresh[channel] = numbers
            else:
                self._unaccounted(channel, numbers.last - unmarked + 1)

    def remembers(self, since: int) -> bool:
        """Whether no channel is forgotten that was used since this turn."""
        return not self._forgotten_at or self._forgotten_at < since

    def remark(self, since: int) -> Iterator[bool]:
        """Mark all channels used since this turn, for somebody who was away; an item for each.

        False for one that was not taken: it is due with the quiet ones.
        """
        for channel, numbers in reversed(list(self._channels.items())):
            if numbers.turn < since:
                return
            if self._channels.get(channel) is not numbers:
                continue  # forgotten meanwhile, and marked then
            taken = self._mark_now(channel, numbers)
            if not taken and not numbers.unmarked:
                numbers.unmarked = numbers.last + 1  # nobody else needs it
                self._fresh[channel] = numbers
            yield taken


class Incoming:
    """What one node has received, per channel and publisher: what is missing, and what comes too late.

    Where a publisher has been silent in a channel, counting begins with the first of its numbers that arrives: what it
    published before this node subscribed is not missed. But where it is known to have published nothing there before,
    as it says in heartbeats how much it has published in all, counting begins with 1.
    """

    def __init__(self, here: Callable[[bytes], bool]) -> None:
        self._here = here  # whether a node is known to be there
        self._channels: dict[str, _Channel] = {}
        self._of_node: dict[bytes, set[str]] = {}  # the channels where a node's numbers are remembered
        self._totals: dict[bytes, deque[tuple[float, int]]] = {}  # of each node, as it told them, and when
        self._strange: OrderedDict[bytes, None] = OrderedDict()  # nodes that were known once, and forgotten
        # Of nodes that have not told of themselves yet, per channel: what is missing if it was published since then.
        self._unclear: dict[bytes, dict[str, int]] = {}

    @property
    def channels(self) -> list[str]:
        """Those that are subscribed to."""
        return list(self._channels)

    def subscribe(self, channel: str, settled_at: float) -> None:
        """``settled_at``: when (of ``time.monotonic``) the subscription has taken effect for certain."""
        if channel not in self._channels:
            self._channels[channel] = _Channel(settled_at)

    def unsubscribe(self, channel: str) -> None:
        """Nothing is counted there any more."""
        of_channel = self._channels.pop(channel, None)
        if of_channel is not None:
            for node in of_channel.last:
                self._left(node, channel)

    def _left(self, node: bytes, channel: str) -> None:
        channels = self._of_node[node]
        channels.discard(channel)
        if not channels:
            del self._of_node[node]

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
        return self._begin(channel, of_channel, node, epoch, number, number - 1)

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
        return self._begin(channel, of_channel, node, epoch, number, number)

    def _begin(self, channel: str, of_channel: _Channel, node: bytes, epoch: int, number: int, before: int) -> int:
        """The first number of an epoch: how many of those ``before`` are missing."""
        new = node not in of_channel.last
        of_channel.last[node] = [epoch, number]
        if not new:
            return before  # all later than what arrived last
        self._of_node.setdefault(node, set()).add(channel)
        missing = 0
        if before and node not in self._totals and len(self._unclear) < _PUBLISHERS:
            self._unclear.setdefault(node, {})[channel] = before
        for at, total in self._totals.get(node, ()):
            if at >= of_channel.settled_at:
                # It had published so much when the subscription had taken effect.
                missing = before if epoch > total else 0
                break
        if len(of_channel.last) > _PUBLISHERS:
            # Rather a node that is gone than one that is here.
            gone = next((each for each in of_channel.last if not self._here(each)), next(iter(of_channel.last)))
            del of_channel.last[gone]
            self._left(gone, channel)
            of_channel.settled_at = monotonic()  # of whom it was, is not remembered: it begins like a new one
        return missing

    def told(self, node: bytes, total: int) -> None:
        """The node has published so many messages, to all channels together."""
        self._totals_of(node).append((monotonic(), total))

    def told_of_start(self, node: bytes, at: float) -> list[tuple[str, int]]:
        """A node unknown until now had published nothing at this time (of ``time.monotonic``).

        Returns how many are missing in which channels, of what came from it before this was known.
        """
        unclear = self._unclear.pop(node, {})
        if node in self._strange:  # some of its numbers had arrived, and are forgotten
            return []
        self._totals_of(node).append((at, 0))
        return [
            (channel, before)
            for channel, before in unclear.items()
            if channel in self._of_node.get(node, ()) and at >= self._channels[channel].settled_at
        ]

    def _totals_of(self, node: bytes) -> deque[tuple[float, int]]:
        totals = self._totals.get(node)
        if totals is None:
            totals = self._totals[node] = deque(maxlen=_TOTALS)
            if len(self._totals) > _PUBLISHERS:
                del self._totals[next(iter(self._totals))]
        return totals

    def forget_node(self, node: bytes) -> None:
        """It is gone for good."""
        self._totals.pop(node, None)
        self._unclear.pop(node, None)
        for channel in self._of_node.pop(node, ()):
            del self._channels[channel].last[node]
        self._strange[node] = None
        if len(self._strange) > _STRANGE:
            self._strange.popitem(last=False)


class _Channel:
    __slots__ = ("last", "settled_at")

    def __init__(self, settled_at: float) -> None:
        self.settled_at = settled_at
        self.last: dict[bytes, list[int]] = {}  # epoch and number, by publisher


__all__ = ["LATE", "UNWANTED", "Incoming", "Numbers", "Outgoing"]
