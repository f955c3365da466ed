"""The two-way index between members and rooms. Pure: it knows neither sockets nor threads."""

from __future__ import annotations

from collections.abc import Hashable, ItemsView, Iterable, Iterator, KeysView, Mapping, Set, ValuesView
from typing import Any, Generic, TypeVar

from ..errors import RoomNameError

Member = TypeVar("Member", bound=Hashable)

_NOBODY: dict[Any, None] = {}
_NOWHERE: dict[str, None] = {}


def check_room(room: object, limit: int | None = None) -> str:
    """Return the room's name. Raises `RoomNameError` if it is empty, not a string, or longer than ``limit`` bytes."""
    if isinstance(room, str) and room:
        if limit is None or 4 * len(room) <= limit:  # a character takes up to four bytes
            return room
        size = len(room) if room.isascii() else len(room.encode(errors="surrogatepass"))
        if size <= limit:
            return room
        raise RoomNameError(
            f"a room's name must be at most {limit} bytes (WebSocketOptions.max_room_name_bytes), "
            f"but {room[:20] + '…'!r} has {size}"
        )
    what = "an empty string" if room == "" else f"{room!r} ({type(room).__name__})"
    raise RoomNameError(f"a room's name must be a non-empty string, not {what}")


class RoomIndex(Generic[Member]):
    """Who is in which room. Members and rooms keep the order in which they joined; empty rooms vanish."""

    __slots__ = ("_members", "_rooms")

    def __init__(self) -> None:
        self._members: dict[str, dict[Member, None]] = {}
        self._rooms: dict[Member, dict[str, None]] = {}

    def join(self, member: Member, room: str) -> bool:
        """Put the member in the room; False if it was there already."""
        members = self._members.setdefault(room, {})
        if member in members:
            return False
        members[member] = None
        self._rooms.setdefault(member, {})[room] = None
        return True

    def leave(self, member: Member, room: str) -> bool:
        """Take the member out of the room; False if it was not there."""
        members = self._members.get(room)
        if members is None or member not in members:
            return False
        del members[member]
        if not members:
            del self._members[room]
        rooms = self._rooms.get(member)
        if rooms is not None:  # else it is being withdrawn
            rooms.pop(room, None)
            if not rooms:
                del self._rooms[member]
        return True

    def withdraw(self, member: Member) -> dict[str, None]:
        """Return the member's rooms and list it as being in none. It still has to `leave` each of them."""
        return self._rooms.pop(member, {})

    def members(self, room: str) -> dict[Member, None]:
        """The room's members, live: not to be changed. Empty for a room that does not exist."""
        return self._members.get(room, _NOBODY)

    def rooms_of(self, member: Member) -> dict[str, None]:
        """The member's rooms, live: not to be changed."""
        return self._rooms.get(member, _NOWHERE)

    def union(self, rooms: Iterable[str]) -> dict[Member, None]:
        """The members of any of the rooms, each once."""
        together: dict[Member, None] = {}
        for room in rooms:
            # A copy is made in one step, so other threads may ask while the loop changes rooms.
            together.update(self.members(room).copy())
        return together

    def clear(self) -> None:
        """Remove everybody from every room."""
        self._members.clear()
        self._rooms.clear()

    def copy(self) -> dict[str, dict[Member, None]]:
        """The rooms there are now, each with its members, live: not to be changed."""
        return self._members.copy()

    @property
    def names(self) -> KeysView[str]:
        """A live, read-only view of the names of all rooms."""
        return self._members.keys()


class MembersView(Set[Member]):
    """A live, read-only view of a room's members, in the order in which they joined.

    Iterating goes over the members that were there when it began, so the body may change the room.
    """

    __slots__ = ("_members",)

    def __init__(self, members: dict[Member, None]) -> None:
        self._members = members

    @classmethod
    def _from_iterable(cls, members: Iterable[Any]) -> Set[Any]:  # & and | make plain sets
        return frozenset(members)

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[Member]:
        return iter(tuple(self._members))

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"<{len(self)} member{'' if len(self) == 1 else 's'}>"


class RoomsView(Mapping[str, MembersView[Member]]):
    """A live, read-only mapping of room to its members. Iterating goes over the rooms there were when it began."""

    __slots__ = ("_index",)

    def __init__(self, index: RoomIndex[Member]) -> None:
        self._index = index

    def __getitem__(self, room: str) -> MembersView[Member]:
        members = self._index.members(room)
        if not members:
            raise KeyError(room)
        return MembersView(members)

    def __contains__(self, room: object) -> bool:
        return room in self._index.names

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._index.names))

    def __len__(self) -> int:
        return len(self._index.names)

    def values(self) -> ValuesView[MembersView[Member]]:
        """The members of each room there is now: a copy, as rooms may vanish while it is iterated over."""
        return dict(self._now()).values()

    def items(self) -> ItemsView[str, MembersView[Member]]:
        """The rooms there are now with their members: a copy, as rooms may vanish while it is iterated over."""
        return dict(self._now()).items()

    def _now(self) -> Iterator[tuple[str, MembersView[Member]]]:
        return ((room, MembersView(members)) for room, members in self._index.copy().items())

    def __repr__(self) -> str:
        shown = ", ".join(f"{room!r}: {len(self._index.members(room))}" for room in tuple(self)[:20])
        return f"<rooms {{{shown}{', …' if len(self) > 20 else ''}}}>"
