"""`Site`: what a server serves, wherever its loop lives: components, namespaces, controllers, Ulak, cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from .cluster import Cluster, Gap
from .connection import Endpoint, Ledger, Outbox
from .errors import ConfigurationError
from .hosting import LoopDoor
from .inspector import SocketSnapshot
from .ioc.container import Container
from .ioc.inject import component_of
from .transports import LocalTransport, Transport, TransportHistory
from .ulak.broker import Ulak
from .web.chain import Chain
from .web.controllers import Controllers
from .web.origins import Hosts, Origins
from .websocket.door import serving
from .websocket.history import OwnHistories
from .websocket.namespace import Namespace
from .websocket.options import WebSocketOptions
from .websocket.service import AsenaWebSocketService, bind, hooks_of, spec_of
from .websocket.sockets import ProtocolName

log = logging.getLogger("asena_tornado")

# Seconds for the clients to answer a close before the connection ends without it.
PATIENCE = 1.0
STOP_TIMEOUT = 10.0  # seconds
_LAST_CHANCE = 0.5  # seconds for what is cancelled, when the time is over
CENTRIFUGE_SUFFIX = "/connection/websocket"  # of a namespace's path: Centrifugo's customary one
_CLOSE_BATCH = 500  # sockets told to go per turn of the loop, so that others are served in between


class Site:
    """The components of one server and what they serve. Built once; opened for each start, on its loop."""

    def __init__(
        self,
        components: Sequence[Any],
        *,
        options: WebSocketOptions,
        origins: Origins,
        hosts: Hosts,
        max_body_size: int,
        max_buffered_bytes: int,
        transport: Transport | None,
        on_gap: Callable[[Gap], object] | None,
        until_running: Callable[[], Awaitable[object]],
    ) -> None:
        """``until_running`` is awaited by controllers."""
        self.container = Container(*components)
        self.ulak = Ulak()
        self.container.provide(Ulak, self.ulak)
        self.paths = _listed_paths(components)
        self.namespaces: dict[str, Namespace] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.cluster: Cluster | None = None
        self.built = False
        self._options = options
        self._origins = origins
        self._hosts = hosts
        self._max_body_size = max_body_size
        self.max_buffered_bytes = max_buffered_bytes
        self._until_running = until_running
        self.transport: Transport = transport or LocalTransport()
        self.on_gap = on_gap
        self.controllers = self._no_controllers()
        self._middleware: dict[str, Chain] = {}  # by the namespace's path
        self._protocols: dict[str, tuple[ProtocolName, ...]] = {}  # likewise
        self._subprotocols: dict[str, tuple[str, ...]] = {}  # likewise
        self._door: LoopDoor | None = None
        self.outbox: Outbox | None = None

    def build(self) -> None:
        """Build the components and their namespaces, once. Raises `InjectionError` and `ConfigurationError`."""
        if self.built:
            return
        self.container.build()
        namespaces: dict[str, Namespace] = {}
        controllers = self._no_controllers()
        for mark, instance in self.container.components:
            if isinstance(instance, AsenaWebSocketService):
                spec = spec_of(mark.cls)
                if spec.path in namespaces:
                    other = type(namespaces[spec.path].hooks.service).__name__
                    raise ConfigurationError(f"two services for {spec.path!r}: {other} and {spec.name}")
                namespace = Namespace(
                    spec.path, hooks_of(instance), options=spec.options or self._options, rules=spec.rules
                )
                namespaces[spec.path] = namespace
                self._protocols[spec.path] = spec.protocols
                self._subprotocols[spec.path] = spec.subprotocols
                if instance._namespace is None:
                    bind(instance, namespace)
                if spec.middlewares:
                    where = f"the handshake of {spec.path}"
                    self._middleware[spec.path] = Chain(self._instances(spec.middlewares), where)
            elif mark.kind == "Controller":
                controllers.add(instance, self._instances)
        for path in namespaces:
            if controllers.has(path):
                raise ConfigurationError(
                    f"{path!r} is the path of a namespace and of a controller: give one of them another path"
                )
            if (parent := path.removesuffix(CENTRIFUGE_SUFFIX)) != path and "centrifuge" in self._protocols.get(
                parent, ()
            ):
                raise ConfigurationError(
                    f"Centrifuge clients of {parent!r} connect at {path!r}, which is another namespace: give that "
                    f'another path, or {parent!r} protocols=("plain",)'
                )
        if not isinstance(getattr(self.transport, "history", None), TransportHistory):
            for namespace in namespaces.values():
                if namespace.remembers:
                    raise ConfigurationError(
                        f"rooms of {namespace.path!r} are to have a history, but {self.transport!r} keeps none: it "
                        "needs a TransportHistory as its attribute history. Or take history_size out of the RoomOptions"
                    )
        self.namespaces, self.controllers = namespaces, controllers
        self.paths = tuple(namespaces)
        self.built = True

    def _no_controllers(self) -> Controllers:
        return Controllers(
            origins=self._origins,
            hosts=self._hosts,
            max_body_size=self._max_body_size,
            ready=self._until_running,
        )

    def _instances(self, middlewares: Sequence[Any]) -> list[Any]:
        """What is listed in a decorator, as the container has it."""
        return [self.container.get(each) if isinstance(each, type) else each for each in middlewares]

    # -- opening and closing

    def open(self, door: LoopDoor) -> None:
        """Let namespaces and Ulak send through the door, on its loop; needs no waiting."""
        self.build()
        for namespace in self.namespaces.values():
            service = namespace.hooks.service
            other = service._namespace
            if other is not None and other is not namespace and other.is_open:
                raise ConfigurationError(
                    f"this {type(service).__name__} serves another server already; pass the class, so that each "
                    "server makes an instance of its own, or another instance"
                )
            bind(service, namespace)
        self.outbox = Outbox(door.loop, Ledger(door.loop, self.max_buffered_bytes))
        self.open_namespaces(door)

    def open_namespaces(self, door: LoopDoor) -> None:
        """Let the namespaces that there are now send through the door, and take handshakes for them."""
        assert self.outbox is not None
        self._door = self.controllers.door = door
        self.endpoints = {}
        for path, namespace in self.namespaces.items():
            namespace.open(door, self.outbox)
            for protocol in self._protocols[path]:
                endpoint = Endpoint(
                    door.loop,
                    namespace,
                    outbox=self.outbox,
                    origins=self._origins,
                    middleware=self._middleware.get(path),
                    protocol=protocol,
                    subprotocols=self._subprotocols[path],
                )
                if protocol == "plain" or len(self._protocols[path]) == 1:
                    self.endpoints[path] = endpoint
                if protocol == "centrifuge":
                    self.endpoints[path + CENTRIFUGE_SUFFIX] = endpoint
        self.ulak.open(door, self.namespaces.values())
        if self.is_alone:
            self._keep_histories()

    @property
    def is_alone(self) -> bool:
        """Whether there are no other nodes."""
        return isinstance(self.transport, LocalTransport) and self.transport.hub is None

    def _keep_histories(self) -> None:
        """Let the namespaces remember what their rules say, in the memory of this server, and nothing else."""
        assert isinstance(self.transport, LocalTransport)
        keeper = self.transport.history
        for namespace in self.namespaces.values():
            old, rules = namespace.histories, namespace.rules
            if rules is None or not rules.remember:
                namespace.remember(None)
            elif isinstance(old, OwnHistories) and old.keeper is keeper:
                old.rules = rules
            else:
                namespace.remember(OwnHistories(namespace, rules, keeper))
        keeper.memory.limit(self._allowed)
        keeper.memory.held = self._held

    def _allowed(self, key: tuple[str, str]) -> tuple[int, float] | None:
        """How much a room may remember, and for how many seconds."""
        path, room = key
        namespace = self.namespaces.get(path)
        rule = None if namespace is None or namespace.rules is None else namespace.rules.history(room)
        return None if rule is None else (rule.history_size, rule.history_ttl)

    def _held(self, key: tuple[str, str]) -> bool:
        """Whether a room has members, who know its offset."""
        path, room = key
        return path in self.namespaces and bool(self.namespaces[path].members(room))

    async def start(self) -> None:
        """Join the cluster and run every ``on_start``. If one raises, nothing is left started."""
        try:
            self.cluster = await self.new_cluster(self.namespaces)
            await self.container.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self, deadline: float | None = None) -> None:
        """Run every ``on_stop`` and leave the cluster; what still runs at ``deadline`` (loop time) is cancelled."""
        token = serving.set(self._door)
        try:
            await self.container.stop(until=deadline)
        finally:
            serving.reset(token)
        cluster, self.cluster = self.cluster, None
        if cluster is not None:
            await cluster.stop()
            cluster.serve({})

    @property
    def websocket_paths(self) -> tuple[str, ...]:
        """Where clients can connect, by either protocol."""
        more = [path + CENTRIFUGE_SUFFIX for path in self.paths if self.speaks_centrifuge(path)]
        return (*self.paths, *more)

    def speaks_centrifuge(self, path: str) -> bool:
        """Whether Centrifuge clients can connect to the namespace. Before `build`: as far as is known."""
        return "centrifuge" in self._protocols.get(path, ())

    def refuse_handshakes(self) -> None:
        """From here on new clients are told that the server stops."""
        for endpoint in self.endpoints.values():
            endpoint.closing = True

    async def drain(self, deadline: float, patience: float) -> None:
        """Let handlers and requests end, and close every socket with 1001, until ``deadline`` (loop time) at most."""
        await close_sockets(list(self.namespaces.values()), deadline, patience, 1001, "the server is stopping")
        await self.controllers.drain(deadline)

    def end(self, why: str) -> None:
        """End sending: from here on, Ulak raises ``why``, and taps end."""
        for namespace in self.namespaces.values():
            namespace.events.end()
            namespace.remember(None)
        if self.is_alone:
            assert isinstance(self.transport, LocalTransport)
            self.transport.history.close()
        self.ulak.close(why)
        self.stop_reading()

    def stop_reading(self) -> None:
        """Close what watches the sockets; from any thread, also in a forked child, whose sockets are its parent's."""
        if self.outbox is not None:
            self.outbox.close()

    @property
    def handling(self) -> bool:
        """Whether the calling code runs inside this site, such as in a handler."""
        return self._door is not None and serving.get() is self._door

    async def new_cluster(self, namespaces: Mapping[str, Namespace]) -> Cluster | None:
        """Join the other nodes with these namespaces; None for a server without a transport."""
        if self.is_alone:
            return None
        cluster = Cluster(self.transport, on_gap=self.on_gap, describe=SocketSnapshot.of)
        cluster.serve(namespaces)
        try:
            await cluster.start()
        except BaseException:
            cluster.serve({})
            raise
        return cluster


async def close_sockets(
    namespaces: Sequence[Namespace], deadline: float, patience: float, code: int, reason: str
) -> None:
    """Close every socket once its handler is done, and wait until each ``on_close`` has run.

    Those that are left at ``deadline`` (loop time) are cut off.
    """
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()

    def look() -> None:
        if all(namespace.empty for namespace in namespaces):
            gone.set()

    look()
    for namespace in namespaces:
        # Time has to be left for the close handshakes.
        grace = max(0.0, min(namespace.options.handler_grace, (deadline - loop.time()) / 2))
        everyone = [*namespace.sockets.values(), *namespace.leaving]
        for i in range(0, len(everyone), _CLOSE_BATCH):
            for socket in everyone[i : i + _CLOSE_BATCH]:
                socket._connection.close_when_done(code, reason, grace=grace, patience=patience)
            await asyncio.sleep(0)
        namespace.when_empty(look)
    try:
        async with asyncio.timeout_at(deadline):
            await gone.wait()
    except asyncio.CancelledError:
        for namespace in namespaces:
            for socket in namespace.leaving + list(namespace.sockets.values()):
                socket._connection.cut_off()
        raise
    except TimeoutError:
        left = [socket for namespace in namespaces for socket in namespace.leaving]
        log.warning("%s sockets did not close in time and are cut off", len(left))
        # Once for what runs, and once more for the on_close that runs then.
        for seconds in (_LAST_CHANCE, _LAST_CHANCE / 5):
            for socket in left:
                socket._connection.cut_off()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await gone.wait()
        for namespace in namespaces:
            # A handler that does not let itself be cancelled must not count for the next start.
            namespace.abandon()


def _listed_paths(components: Sequence[Any]) -> tuple[str, ...]:
    """The paths of the listed services; two services on one path are an error as early as here."""
    found: dict[str, str] = {}
    for item in components:
        cls = item if isinstance(item, type) else type(item)
        if issubclass(cls, AsenaWebSocketService) and component_of(cls) is not None:
            spec = spec_of(cls)
            if found.setdefault(spec.path, cls.__name__) != cls.__name__:
                raise ConfigurationError(
                    f"two services for {spec.path!r}: {found[spec.path]} and {cls.__name__}; "
                    "give one of them another path"
                )
    return tuple(found)
