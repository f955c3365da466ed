"""What is asked of other nodes, and done for them: finding sockets, sending to them, moving and closing them."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic_core import from_json, to_json

from ..errors import RoomLimitError, RoomNameError, TransportError
from ..websocket.messages import valid_close_code
from .envelope import EnvelopeError, Operation, Reply, Request, message_of
from .nodes import Count

if TYPE_CHECKING:
    from ..websocket.namespace import Namespace
    from ..websocket.sockets import Socket

_LOCATED = 10_000  # sockets of other nodes
_LISTING = 1024 * 1024  # bytes of the descriptions of sockets in one reply


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
    replies: dict[bytes, tuple[Reply, bytes]] = field(default_factory=dict)
    settled: bool = False  # it is known which nodes there are

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
    def unknown_for(self) -> float:
        """Seconds until it is clear which nodes there are; 0 or less when it is."""
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
        replies, missing = await self._ask("sockets", path=path, limit=limit, timeout=timeout)
        for node, (reply, body) in replies.items():
            total += reply.total
            described = self._parsed(body)
            found += [(node.hex(), each) for each in described]
            cut = cut or len(described) < reply.total
        return Listing(found, Count(total, sorted(node.hex() for node in missing)), cut)

    @staticmethod
    def _parsed(body: bytes) -> list[Any]:
        try:
            found = from_json(body) if body else []
        except ValueError:
            return []
        return found if isinstance(found, list) else []

    async def locate(self, path: str | None, socket_id: str, timeout: float) -> bytes | None:
        """The node that holds the socket; None when every node has said that it does not.

        Raises `TransportError` when nobody has it, but not every node has answered.
        """
        if self._local(path, socket_id) is not None:
            return self._peers.id
        replies, missing = await self._ask("find", path=path, socket=socket_id, first=True, timeout=timeout)
        found = next((node for node, (reply, _) in replies.items() if reply.done), None)
        if found is None and missing:
            names = ", ".join(sorted(node.hex()[:8] for node in missing))
            raise TransportError(
                f"it is not known whether there is a socket {socket_id}: no answer from node {names} in {timeout} s"
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
        replies, _ = await self._ask(
            operation, node=node, path=path, socket=socket_id, body=body, timeout=timeout, **details
        )
        if node not in replies:
            self._located.pop(key, None)
            raise TransportError(
                f"node {node.hex()[:8]}, which has the socket {socket_id}, did not answer in {timeout} s"
            )
        reply, _ = replies[node]
        if not reply.done:
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
    ) -> tuple[dict[bytes, tuple[Reply, bytes]], set[bytes]]:
        """The answers of one node, or of all, within ``timeout`` seconds, and who has not answered."""
        reason = self._peers.why_not_ready
        if reason is not None:
            raise TransportError(f"other nodes cannot be asked: {reason}")
        missing = self._peers.alive if node is None else {node}
        question = _Question(missing, first, asyncio.get_running_loop().create_future())
        id = uuid.uuid4().hex
        self._questions[id] = question
        try:
            if not self._peers.ask(node, to_json({"id": id, "operation": operation, **details}), body):
                raise TransportError("other nodes cannot be asked: the transport did not take the question")
            try:
                async with asyncio.timeout(timeout):
                    wait = 0.0 if node is not None else self._peers.unknown_for
                    if wait > 0:
                        await asyncio.wait([question.answered], timeout=wait)
                        question.missing |= self._peers.alive - question.replies.keys()
                    question.settled = True
                    question.look()
                    await question.answered
            except TimeoutError:
                pass
            return question.replies, question.missing
        finally:
            del self._questions[id]

    def lose(self, node: bytes) -> None:
        """The node is gone: it will not answer."""
        for question in self._questions.values():
            question.missing.discard(node)
            question.look()

    def reply(self, node: bytes, reply: Reply, body: bytes) -> None:
        """An answer."""
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

    def request(self, node: bytes, request: Request, body: bytes) -> None:
        """Do what another node asks, and say what came of it."""
        payload = b""
        if request.operation == "sockets":
            total, listed, payload = self._described(request.path, request.limit)
            reply = Reply(id=request.id, done=True, total=total, listed=listed)
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
            if not namespace.send_to(socket, message_of(request.opcode, body)):
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
            if not valid_close_code(request.code) or len(request.reason.encode()) > 123:
                raise EnvelopeError(f"not a valid close code and reason: {request.code} {request.reason!r}")
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
