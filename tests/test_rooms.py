"""The two-way index between members and rooms, compared with the simplest thing that could be right."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asena_tornado.errors import RoomNameError
from asena_tornado.websocket.rooms import MembersView, RoomIndex, RoomsView, check_room

members = st.integers(0, 4)
rooms = st.sampled_from("abc")


class Index(RuleBasedStateMachine):
    """A set of pairs is what the index is about."""

    def __init__(self) -> None:
        super().__init__()
        self.index: RoomIndex[int] = RoomIndex()
        self.pairs: dict[tuple[int, str], None] = {}

    @rule(member=members, room=rooms)
    def join(self, member: int, room: str) -> None:
        assert self.index.join(member, room) is ((member, room) not in self.pairs)
        self.pairs[member, room] = None

    @rule(member=members, room=rooms)
    def leave(self, member: int, room: str) -> None:
        assert self.index.leave(member, room) is ((member, room) in self.pairs)
        self.pairs.pop((member, room), None)

    @rule(some=st.lists(rooms))
    def union(self, some: list[str]) -> None:
        assert set(self.index.union(some)) == {member for member, room in self.pairs if room in some}

    @invariant()
    def agrees(self) -> None:
        for room in "abc":
            assert list(self.index.members(room)) == [m for m, r in self.pairs if r == room], "in order of joining"
        for member in range(5):
            assert list(self.index.rooms_of(member)) == [r for m, r in self.pairs if m == member]
        assert set(self.index.names) == {room for _, room in self.pairs}, "empty rooms vanish"
        assert set(self.index._rooms) == {member for member, _ in self.pairs}, "and so do members without rooms"


TestIndex = Index.TestCase
TestIndex.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


@pytest.fixture
def index() -> RoomIndex[str]:
    index: RoomIndex[str] = RoomIndex()
    for member, room in (("ann", "a"), ("bob", "a"), ("bob", "b")):
        index.join(member, room)
    return index


def test_the_rooms_are_a_live_read_only_mapping(index: RoomIndex[str]) -> None:
    view = RoomsView(index)
    assert {room: set(view[room]) for room in view} == {"a": {"ann", "bob"}, "b": {"bob"}}
    assert list(view["a"]) == ["ann", "bob"]
    assert "a" in view
    assert "c" not in view
    with pytest.raises(KeyError):
        view["c"]
    assert view.get("c") is None
    with pytest.raises(TypeError):
        view["c"] = set()  # type: ignore[index]  # that is the point
    index.leave("bob", "b")
    assert list(view) == ["a"]
    assert view["a"] | {"eve"} == {"ann", "bob", "eve"}


def test_the_body_of_a_loop_may_change_what_it_goes_over(index: RoomIndex[str]) -> None:
    view = RoomsView(index)
    for room in view:
        for member in view[room]:
            index.leave(member, room)
    assert len(view) == 0


def test_rooms_may_vanish_while_their_items_are_gone_through(index: RoomIndex[str]) -> None:
    view = RoomsView(index)
    seen = []
    for room, members in view.items():
        seen.append((room, len(members)))
        index.leave("bob", "b")
    assert seen == [("a", 2), ("b", 0)]
    assert [list(members) for members in view.values()] == [["ann", "bob"]]


def test_reprs_are_bounded(index: RoomIndex[str]) -> None:
    assert repr(RoomsView(index)) == "<rooms {'a': 2, 'b': 1}>"
    assert repr(MembersView(index.members("a"))) == "<2 members>"
    for i in range(10_000):
        index.join("ann", f"room {i}")
    assert len(repr(RoomsView(index))) < 500


@pytest.mark.parametrize(
    ("room", "shown"),
    [("", "an empty string"), (None, "None"), (7, "7 .int."), (b"a", "b'a' .bytes."), (["a"], ".*list")],
)
def test_a_room_is_named_by_a_non_empty_string(room: object, shown: str) -> None:
    with pytest.raises(RoomNameError, match=f"must be a non-empty string, not {shown}"):
        check_room(room)
    assert check_room(" ") == " "
