"""`Receipt`: the result of an action, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, repr=False)
class Receipt:
    """The result of an action: how many ``sockets`` took it, how many were too slow (``dropped``), and a sentence."""

    sockets: int
    sentence: str
    dropped: int = 0

    def __repr__(self) -> str:
        return self.sentence


def sent_to(socket: str, taken: bool) -> Receipt:
    """For a message to one socket; ``socket`` says which."""
    if taken:
        return Receipt(1, f"sent to {socket}")
    return Receipt(0, f"not sent to {socket}, which is too slow to take it", 1)


def joined(socket: str, room: str, done: bool, members: str = "") -> Receipt:
    """For a socket put into a room; ``members`` says how many the room has now."""
    if done:
        return Receipt(1, f"{socket} joined {room!r}{_now(members)}")
    return Receipt(0, f"{socket} was in {room!r} already")


def left(socket: str, room: str, done: bool, members: str = "") -> Receipt:
    """For a socket taken out of a room; ``members`` says how many the room has now."""
    if done:
        return Receipt(1, f"{socket} left {room!r}{_now(members)}")
    return Receipt(0, f"{socket} was not in {room!r}")


def disconnecting(socket: str, code: int, reason: str) -> Receipt:
    """For a socket that is being closed."""
    return Receipt(1, f"{socket} is being closed with {code}{f': {reason}' if reason else ''}")


def _now(members: str) -> str:
    return f", which has {members} now" if members else ""


__all__ = ["Receipt", "disconnecting", "joined", "left", "sent_to"]
