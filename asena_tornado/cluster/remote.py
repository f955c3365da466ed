"""What is asked of other nodes, and done for them: finding sockets, sending to them, moving and closing them."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, get_args

from pydantic_core import from_json, to_json

from ..errors import RoomLimitError, RoomNameError, TransportError
from ..websocket.history import RoomRules
from ..websocket.messages import check_close
from .envelope import EnvelopeError, Operation, Reply, Request, message_of
from .nodes import Count

if TYPE_CHECKING:
    from ..websocket.namespace import Namespace
    from ..websocket.sockets import Socket

_LOCATED = 10_000  # sockets of other nodes
_LISTING = 1024 * 1024  # bytes of the descriptions of sockets in one reply
_TICK = 0.1  # seconds: what counts at most of a pause, in which nobody's answer was read
_OPERATIONS = frozenset(get_args(Operation))


class Listing(NamedTuple):
    """Sockets of all nodes, each as (node id, description).

    ``total``: how many there are. ``cut``: whether some are not listed, because there are too many.
    """

    sockets: list[tuple[str, Any]]
    total: Count
    cut: bool


@dataclass(slots=True)
class _Question:
    """A request under way: who has still to answer."""

    missing: set[bytes]
    first: bool  # the first that says "done" is enough
    answered: asyncio.Future[None]
    settled: bool  # it is known which nodes there are
    replies: dict[bytes, tuple[Reply, bytes]] = field(default_factory=dict)

    @property
    def failed(self) -> dict[bytes, str]:
        """Who has answered that it cannot do this, and why."""
        return {node: reply.error for node, (reply, _) in self.replies.items() if not reply.done and reply.error}

    def look(self) -> None:
        """Whether that is all."""
        enough = self.first and any(reply.done for reply, _ in self.replies.values())
        if not self.answered.done() and (enough or (self.settled and not self.missing)):
            self.answered.set_result(None)


class Peers(Protocol):
    """The way to the other nodes."""

    id: bytes  # this node's own

    @property
    def alive(self) -> set[bytes]:
        """The other nodes."""
        ...

    @property
    def settled(self) -> bool:
        """Whether it is clear which nodes there are; `Remote.settle` is called as soon as it is."""
        ...

    @property
    def why_not_ready(self) -> str | None:
        """Why other nodes cannot be asked, if they cannot."""
        ...

    def ask(self, node: bytes | None, request: bytes, body: bytes) -> bool:
        """Send the question to a node, or to all; whether the transport took it."""
        ...

    def answer(self, node: bytes, reply: bytes, body: bytes) -> None:
        """Send the reply."""
        ...


class Remote:
    """Asks other nodes, and answers them. ``namespaces``: those here, by path; ``describe``: a socket, for JSON."""

    def __init__(self, peers: Peers, describe: Callable[[Socket[Any]], object] | None) -> None:
        self.namespaces: Mapping[str, Namespace] = {}
        self._peers = peers
        self._describe = describe
        self._questions: dict[str, _Question] = {}
        self._located: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    # -- asking

    async def sockets(self, path: str | None, limit: int, timeout: float, *, serves: bool) -> Listing:
        """Everybody's sockets, at most ``limit`` of each node."""
        found: list[tuple[str, Any]] = []
        total = 0
        cut = False
        if serves:
            total, listed, own = self._described(path, limit)
            found += [(self._peers.id.hex(), each) for each in from_json(own)]
            cut = listed < total
        question = await self._ask("sockets", path=path, limit=limit, timeout=timeout)
        for node, (reply, body) in question.replies.items():
            total += reply.total
            described = self._parsed(body)
            found += [(node.hex(), each) for each in described]
            cut = cut or len(described) < reply.total
        missing = sorted(node.hex() for node in question.missing | question.failed.keys())
        return Listing(found, Count(total, missing, settled=question.settled), cut)

    @staticmethod
    def _parsed(body: bytes) -> list[Any]:
        try:
            found = from_json(body) if body else []
        except ValueError:
            return []
        return found if isinstance(found, list) else []

    async def rules(self, path: str, timeout: float) -> RoomRules | None:
        """Which options the rooms of a namespace have, as one of the nodes knows that has it; None if nobody has it."""
        question = await self._ask("rules", path=path, first=True, timeout=timeout)
        for reply, body in question.replies.values():
            if reply.done:
                try:
                    return RoomRules.load(from_json(body))
                except (TypeError, ValueError):
                    continue
        return None

    async def locate(self, path: str | None, socket_id: str, timeout: float) -> bytes | None:
        """The node that holds the socket; None when every node has said that it does not.

        Raises `TransportError` when nobody has it, but not every node has answered.
        """
        if self._local(path, socket_id) is not None:
            return self._peers.id
        question = await self._ask("find", path=path, socket=socket_id, first=True, timeout=timeout)
        found = next((node for node, (reply, _) in question.replies.items() if reply.done), None)
        if found is None:
            if question.missing:
                names = ", ".join(sorted(node.hex()[:8] for node in question.missing))
                raise TransportError(
                    f"node {names} did not answer within {timeout:g} s, so socket {socket_id} may exist there"
                )
            for node, error in question.failed.items():
                raise TransportError(f"node {node.hex()[:8]} cannot say whether it has socket {socket_id}: {error}")
            if not question.settled:
                raise TransportError(
                    "it is not known yet which nodes there are, as this one has just come, or come back; so socket "
                    f"{socket_id} may exist on a node that has not answered within {timeout:g} s: try again in a second"
                )
        return found

    async def act(
        self, operation: Operation, path: str | None, socket_id: str, timeout: float, body: bytes = b"", **details: Any
    ) -> bool | None:
        """Do something with a socket wherever it is: whether anything came of it, or None when there is no such."""
        local = self._do(Request(id="here", operation=operation, path=path, socket=socket_id, **details), body)
        if local.done:
            return not local.error
        key = (path or "", socket_id)
        node = self._located.get(key)
        if node is None or node not in self._peers.alive:
            self._located.pop(key, None)
            node = await self.locate(path, socket_id, timeout)
            if node is None or node == self._peers.id:
                return None
            self._located[key] = node
            if len(self._located) > _LOCATED:
                self._located.popitem(last=False)
        question = await self._ask(
            operation, node=node, path=path, socket=socket_id, body=body, timeout=timeout, **details
        )
        if node not in question.replies:
            self._located.pop(key, None)
            raise TransportError(
                f"node {node.hex()[:8]}, which has the socket {socket_id}, did not answer within {timeout:g} s"
            )
        reply, _ = question.replies[node]
        if not reply.done:
            if reply.error:
                raise TransportError(f"node {node.hex()[:8]}, which has the socket {socket_id}: {reply.error}")
            self._located.pop(key, None)
            return None
        if reply.refused:
            raise RoomLimitError(reply.error)
        return not reply.error

    async def _ask(
        self,
        operation: Operation,
        *,
        timeout: float,
        node: bytes | None = None,
        first: bool = False,
        body: bytes = b"",
        **details: Any,
    ) -> _Question:
        """Ask one node, or all; who has answered within ``timeout`` seconds, and who has not."""
        reason = self._peers.why_not_ready
        if reason is not None:
            raise TransportError(f"other nodes cannot be asked: {reason}")
        missing = self._peers.alive if node is None else {node}
        settled = node is not None or self._peers.settled
        question = _Question(missing, first, asyncio.get_running_loop().create_future(), settled)
        id = uuid.uuid4().hex
        self._questions[id] = question
        try:
            if not self._peers.ask(node, to_json({"id": id, "operation": operation, **details}), body):
                raise TransportError("other nodes cannot be asked: the transport did not take the question")
            question.look()
            left = timeout
            while left > 0 and not question.answered.done():
                await asyncio.wait([question.answered], timeout=min(left, _TICK))
                left -= _TICK
            if question.answered.done():
                question.answered.result()
            elif node is None:
                question.missing |= self._peers.alive - question.replies.keys()
            return question
        finally:
            del self._questions[id]

    def settle(self) -> None:
        """It is clear now which nodes there are: all of them have to answer what is under way."""
        for question in self._questions.values():
            if not question.settled:
                question.settled = True
                question.missing |= self._peers.alive - question.replies.keys()
                question.look()

    def lose(self, node: bytes) -> None:
        """The node is gone: it will not answer."""
        for question in self._questions.values():
            question.missing.discard(node)
            question.look()

    def reply(self, node: bytes, reply: Reply, body: bytes) -> None:
        """A node has answered a question."""
        question = self._questions.get(reply.id)
        if question is not None:
            question.replies[node] = (reply, body)
            question.missing.discard(node)
            question.look()

    def stop(self) -> None:
        """Whoever waits for an answer is told that none will come."""
        for question in self._questions.values():
            if not question.answered.done():
                question.answered.set_exception(TransportError("the server is stopping"))

    # -- answering

    def request(self, node: bytes, request: Request, body: bytes, *, newer: bool) -> None:
        """Do what another node asks, and say what came of it. ``newer``: the node runs a later release."""
        payload = b""
        if request.operation not in _OPERATIONS:
            if not newer:
                raise EnvelopeError(f"unknown operation {request.operation[:50]!r}")
            error = f"its release is older and does not know how to {request.operation[:50]!r}: run the same everywhere"
            reply = Reply(id=request.id, done=False, error=error)
        elif request.operation == "sockets":
            total, listed, payload = self._described(request.path, request.limit)
            reply = Reply(id=request.id, done=True, total=total, listed=listed)
        elif request.operation == "rules":
            scope = self._scope(request.path)
            reply = Reply(id=request.id, done=bool(scope))
            if scope:
                payload = to_json(scope[0].rules.dump() if scope[0].rules is not None else [])
        else:
            try:
                reply = self._do(request, body)
            except (RoomNameError, RoomLimitError) as error:
                reply = Reply(id=request.id, done=True, error=str(error), refused=True)
        self._peers.answer(node, to_json(reply), payload)

    def _do(self, request: Request, body: bytes) -> Reply:
        """Do it with a local socket. ``error``: it is here, but nothing came of it."""
        socket = self._local(request.path, request.socket)
        if socket is None:
            return Reply(id=request.id, done=False)
        namespace = socket._namespace
        error = ""
        if request.operation == "send":
            if not namespace.send_to(socket, message_of(request.opcode, body, request.is_json)):
                error = "not taken"
        elif request.operation == "join":
            if not request.room:
                raise EnvelopeError("the request to join names no room")
            if socket.is_subscribed(request.room):
                error = "was in it already"
            else:
                socket.subscribe(request.room)
        elif request.operation == "leave":
            if socket.is_subscribed(request.room):
                socket.unsubscribe(request.room)
            else:
                error = "was not in it"
        elif request.operation == "disconnect":
            try:
                check_close(request.code, request.reason)
            except ValueError as invalid:
                raise EnvelopeError(str(invalid)) from None
            socket.close(request.code, request.reason)
        return Reply(id=request.id, done=True, error=error)

    def _local(self, path: str | None, socket_id: str) -> Socket[Any] | None:
        for namespace in self._scope(path):
            socket = namespace.sockets.get(socket_id)
            if socket is not None:
                return socket
        return None

    def _scope(self, path: str | None) -> list[Namespace]:
        if path is None:
            return list(self.namespaces.values())
        namespace = self.namespaces.get(path)
        return [] if namespace is None else [namespace]

    def _described(self, path: str | None, limit: int) -> tuple[int, int, bytes]:
        """How many sockets there are, how many of them are described, and the descriptions: a list as JSON."""
        scope = self._scope(path)
        described: list[bytes] = []
        size = 0
        if self._describe is not None and limit > 0:
            for socket in islice((socket for namespace in scope for socket in namespace.sockets.values()), limit):
                one = to_json(self._describe(socket), inf_nan_mode="null", fallback=repr)
                size += len(one) + 1
                if size > _LISTING:
                    break
                described.append(one)
        return sum(len(each.sockets) for each in scope), len(described), b"[" + b",".join(described) + b"]"


__all__ = ["Listing", "Peers", "Remote"]
