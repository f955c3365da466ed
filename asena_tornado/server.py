"""`AsenaServer`: puts services, rooms, connections and a loop together, and takes them down again."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import html
import inspect
import logging
import math
import os
import socket as sockets
import ssl
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args, overload
from urllib.parse import urlsplit

from tornado.web import Application

from .client.files import client_paths, client_routes
from .client.plain import Client, connect
from .cluster import Cluster, Gap
from .connection import Endpoint, Front, FrontServer, quarter_of_memory, websocket_routes
from .errors import ConfigurationError, NamespaceNotFoundError, PortInUseError, ServerStateError, must_propagate
from .hosting import (
    AFTER_CANCEL,
    LoopDoor,
    LoopKind,
    LoopThread,
    Reach,
    beside,
    held_up_at,
    hold,
    in_cell,
    in_empty_context,
    interruptible,
    listen,
    lock_within,
    new_event_loop,
    queue,
    reach,
    run_nested,
    running_loop,
    show_in_cells,
    switching,
    turn,
    until_signaled,
    wait_for,
    waking,
)
from .inspector import Desk, Inspector, Subject, View, page_routes
from .schema import Contract, contract_of, declarations, document, document_routes, paths_of_documents
from .site import CENTRIFUGE_SUFFIX, PATIENCE, STOP_TIMEOUT, Site
from .takeover import Leftovers, retire, take_over
from .transports import Transport
from .ulak.broker import Ulak
from .web.controllers import ControllerHandler
from .web.http import Refusal
from .web.origins import Hosts, Origins
from .websocket.namespace import Namespace, normalize_path
from .websocket.options import WebSocketOptions

log = logging.getLogger("asena_tornado")
R = TypeVar("R")

Hosting = Literal["thread", "kernel", "caller", "app"]
State = Literal["new", "starting", "running", "stopping", "stopped", "replaced"]

# Seconds for clients that may run in the very thread that waits for the stop, as in a cell, and so cannot answer.
_HASTE = 0.1
_SLACK = 2.0  # seconds after a time limit at which a caller gives up on a loop that does not answer
_FOREVER = 1e7  # seconds; the longest wait that can be asked for
_MAX_HEADER_SIZE = 16 * 1024  # bytes


class AsenaServer:
    """A server for WebSocket services, wherever its loop is to live.

    Start it with `start` (a notebook, a REPL, a test), `run` (a script), ``async with`` or `serve` (an async program),
    or `mount` (an existing Tornado application):

        server = AsenaServer(ChatSocket, port=3000).start()
        server.inspector  # who is connected, in which rooms

    Each client takes a file descriptor. Where ``ulimit -n`` allows no more, that is logged once, and new connections
    wait until others have closed.
    """

    def __init__(
        self,
        *components: Any,
        port: int = 3000,
        address: str | None = "localhost",
        options: WebSocketOptions | None = None,
        allowed_origins: Sequence[str] = (),
        allowed_hosts: Sequence[str] | None = None,
        max_body_size: int = 1024 * 1024,  # bytes
        max_buffered_bytes: int | None = None,
        ssl_options: ssl.SSLContext | None = None,
        public_url: str | None = None,
        transport: Transport | None = None,
        on_gap: Callable[[Gap], object] | None = None,
        client_path: str | None = "/asena.js",
        inspector_path: str | None = None,
        inspector_read_only: bool = False,
        asyncapi_path: str | None = None,
        asyncapi_page: str | None = None,
        asyncapi_info: Mapping[str, Any] | None = None,
        loop: LoopKind = "auto",
        switch_interval: float | None = 0.00002,  # seconds
    ) -> None:
        """Make a server; nothing is built and nothing listens before it starts.

        Args:
            *components: Classes decorated with `WebSocket`, `Controller` or `Service`, or instances of them. What they
                inject comes along and need not be listed.
            port: Where to listen, 0 to 65535; 0 picks a free port. Not used when mounted.
            address: Host name or IP address to listen on; None listens on every interface.
            options: Limits and times of every namespace that brings none of its own.
            allowed_origins: Origins of pages that may connect besides the server's own, such as
                ``"https://example.com"``. ``*`` in one matches anything.
            allowed_hosts: Names by which requests may call the server (``Host``), without ports, such as
                ``"example.com"`` or ``"*.example.com"``; others are answered with 421. ``["*"]`` accepts any. Loopback
                names are always accepted. By default, a server on a loopback address accepts those, ``address`` and the
                host of ``public_url``, which a list adds to: otherwise a page could have its own name stand for this
                machine and talk to the server (DNS rebinding). On other addresses, and mounted, any name is accepted
                until a list is given.
            max_body_size: Bytes that the body of a request to a controller may have; a larger one is answered with 413.
            max_buffered_bytes: Bytes that may wait in the whole server, for clients to take them and for handlers; what
                waits for many clients counts once. Beyond it, the slowest clients are cut off (1013). None means a
                quarter of the memory there is.
            ssl_options: For TLS, an ``ssl.SSLContext`` of the server's side: ``ssl.create_default_context(
                ssl.Purpose.CLIENT_AUTH)``, with a certificate loaded by its ``load_cert_chain``.
            public_url: Where browsers reach the server when that is not where it listens, such as behind a proxy;
                ``{port}`` in it stands for the port.
            transport: What connects the server with other nodes, such as ``RedisTransport("redis://localhost")``. None
                means that it is alone.
            on_gap: Called with a `Gap` when messages of another node are known to be lost.
            client_path: Where to serve ``asena.js``, the client for pages, with its types beside it (``/asena.d.ts``);
                pages of the ``allowed_origins`` may import it, too. None switches it off.
            inspector_path: Where to serve the live inspector as a page, such as ``"/inspector"``. It asks for a token:
                see `inspector_url`.
            inspector_read_only: Whether that page can only look and not act.
            asyncapi_path: Where to serve the AsyncAPI document, such as ``"/asyncapi.json"``, to everybody.
            asyncapi_page: Where to serve a page of it to read, such as ``"/docs"``, to everybody.
            asyncapi_info: What the document says of the whole, as its Info Object: ``{"title": "Auction", "version":
                "1.2.0", "description": "…"}``.
            loop: The event loop that `start` and `run` make: ``"asyncio"`` or ``"uvloop"``. ``"auto"`` is asyncio's for
                `start`, as that stays live beside a cell that computes, and for `run` uvloop's where it is installed.
            switch_interval: Seconds that the interpreter's switch interval is set to while the server runs on a thread,
                at most: see `start`. None leaves it alone.

        Raises:
            ConfigurationError: An argument cannot work; the message says why.
            InjectionError: A component has no decorator.
        """
        if isinstance(allowed_origins, str):
            raise ConfigurationError(f"allowed_origins must be a list: [{allowed_origins!r}]")
        if isinstance(allowed_hosts, str):
            raise ConfigurationError(f"allowed_hosts must be a list: [{allowed_hosts!r}]")
        if not isinstance(options, WebSocketOptions | None):
            raise ConfigurationError(f"options takes a WebSocketOptions(…), not {options!r}")
        given: object = port  # whatever the annotation says
        if not isinstance(given, int) or not 0 <= port <= 65535:
            raise ConfigurationError(f"port must be a number from 0 (any free one) to 65535, not {port!r}")
        if max_body_size < 0:
            raise ConfigurationError(f"max_body_size must be a number of bytes, not {max_body_size}")
        if max_buffered_bytes is not None and max_buffered_bytes < 1:
            raise ConfigurationError(f"max_buffered_bytes must be a number of bytes, or None, not {max_buffered_bytes}")
        if loop not in get_args(LoopKind):
            raise ConfigurationError(f'loop must be "auto", "asyncio" or "uvloop", not {loop!r}')
        given = switch_interval
        if given is not None and not (type(given) in (int, float) and 1e-6 <= given < math.inf):
            raise ConfigurationError(f"switch_interval must be a number of seconds, or None, not {switch_interval!r}")
        self._wanted_port = port
        self._port: int | None = None
        self._address = address
        self._options = options or WebSocketOptions()
        self._origins = Origins(allowed_origins)
        self._hosts = Hosts(allowed_hosts)
        self._max_body_size = max_body_size
        self._site = Site(
            components,
            options=self._options,
            origins=self._origins,
            hosts=self._hosts,
            max_body_size=max_body_size,
            max_buffered_bytes=max_buffered_bytes or quarter_of_memory(),
            transport=transport,
            on_gap=on_gap,
            until_running=self._until_running,
        )
        self._site.container.provide(AsenaServer, self)
        self._ssl = ssl_options
        self._public_url = public_url
        self._inspector_path = None if inspector_path is None else normalize_path(inspector_path)
        if self._inspector_path in self._site.paths:
            raise ConfigurationError(
                f"{self._inspector_path!r} is a namespace already; give the inspector another path"
            )
        self._client_path = client_path
        self._check_client_path()
        self._asyncapi_paths = paths_of_documents(
            asyncapi_path, asyncapi_page, taken=(*self._site.websocket_paths, self._inspector_path)
        )
        self._asyncapi_info = dict(asyncapi_info or {})
        self._inspector_read_only = inspector_read_only
        self._loop: LoopKind = loop
        self._switch_interval = switch_interval
        self._subject = Subject(self, door=self._open_door, desk=lambda: self._desk)
        self._desk = Desk(self._subject)
        self._state: State = "new"
        self._hosting: Hosting | None = None
        self._door: LoopDoor | None = None
        self._thread: LoopThread | None = None
        self._http: FrontServer | None = None
        self._listeners: list[sockets.socket] = []
        self._retiring: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._failure: BaseException | None = None
        self._lifeline: Any = None
        self._mounted: weakref.WeakSet[Application] = weakref.WeakSet()
        # Starting and stopping from several threads at once takes turns.
        self._lock = threading.RLock()

    # -- what it is and where

    @property
    def state(self) -> State:
        """``"new"``, ``"starting"``, ``"running"``, ``"stopping"``, ``"stopped"`` or ``"replaced"``."""
        self._notice_the_end()
        return self._state

    def _notice_the_end(self) -> None:
        """If the loop has ended without a stop, so has the server: log it, and release what the server had."""
        door = self._door
        if self._state not in ("starting", "running", "stopping") or door is None:
            return
        if not door.loop.is_closed() and (self._thread is None or not self._thread.ended):
            return
        if not self._lock.acquire(blocking=False):
            return  # somebody starts or stops it just now, and will see
        try:
            if self._door is not door or self._state not in ("starting", "running", "stopping"):
                return
            log.error("the loop of %s has ended without a stop", ", ".join(self._site.paths) or "a server")
            door.shut()
            self._forget_connections()
            self._http = None
            self._retiring = self._closing = None
            self._give_up("the server's loop has ended without a stop: call server.start() again")
        finally:
            self._lock.release()

    def _forget_connections(self) -> None:
        """Close the descriptors, now that no loop is left that could do it in an orderly way."""
        for namespace in self._site.namespaces.values():
            for socket in (*namespace.sockets.values(), *namespace.leaving):
                socket._connection.abandon()
            namespace.forget_everybody()
        self._site.stop_reading()

    @property
    def port(self) -> int:
        """The port it listens on; with ``port=0``, known once it has started.

        Raises:
            ServerStateError: It is not known yet.
        """
        if self._port is not None:
            return self._port
        if self._wanted_port == 0:
            raise ServerStateError(
                "with port=0, the port is known once the server has started: call server.start() first"
            )
        return self._wanted_port

    @property
    def namespaces(self) -> Mapping[str, Namespace]:
        """The namespaces by their paths. Builds the components, if that has not happened yet."""
        self._site.build()
        return dict(self._site.namespaces)

    @property
    def ulak(self) -> Ulak:
        """The `Ulak` of this server, which sends to any namespace by its path."""
        return self._site.ulak

    def url(self, path: str = "/") -> str:
        """Return where a browser finds a path: ``ws(s)://…`` for a namespace, ``http(s)://…`` otherwise.

        That is the address it listens on, unless ``public_url`` says otherwise, or the notebook's surroundings do: the
        environment variable ``ASENA_PUBLIC_URL``, JupyterHub, or a proxy that is known.

        Args:
            path: The path, with or without its leading slash; a query string may follow.

        Raises:
            ServerStateError: The port is not known yet.
        """
        return self._address_of(path, self._reach().base)

    def client_url(self, path: str) -> str:
        """Return where Centrifuge clients connect to a namespace: the SDKs, ``asena.js``, `LiveClient`.

            client = LiveClient(server.client_url("/chat"))

        Args:
            path: The path of the namespace; a query string may follow.

        Raises:
            NamespaceNotFoundError: There is no such namespace.
            ConfigurationError: It is for plain clients only.
            ServerStateError: The port is not known yet.
        """
        bare, question, query = path.partition("?")
        normal = normalize_path(bare)
        self._site.build()
        if normal not in self._site.namespaces:
            known = ", ".join(self._site.namespaces) or "none"
            raise NamespaceNotFoundError(f"there is no namespace {normal!r} (known: {known})")
        if not self._site.speaks_centrifuge(normal):
            raise ConfigurationError(
                f'{normal!r} is for plain clients only: @WebSocket({normal!r}, protocols=("plain", "centrifuge"))'
            )
        return self.url(normal + CENTRIFUGE_SUFFIX + question + query)

    def _address_of(self, path: str, base: str) -> str:
        path = path if path.startswith("/") else f"/{path}"
        if path.partition("?")[0] in self._site.websocket_paths:
            base = base.replace("http", "ws", 1)
        return base + path

    def _reach(self) -> Reach:
        return reach(self.port, self._local_base(), template=self._public_url)

    def _local_base(self) -> str:
        host = self._address or "localhost"
        if host in ("0.0.0.0", "::"):
            host = "localhost"
        return f"http{'s' if self._ssl else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def inspector(self) -> Inspector:
        """A view of the live sockets and rooms, with ways to act on them. See `Inspector`."""
        return Inspector(self._subject)

    @property
    def inspector_url(self) -> str:
        """Where the inspector's page is, with the token that opens it. Whoever has this can act on every socket.

        Raises:
            ConfigurationError: The server has no ``inspector_path``.
            ServerStateError: The port is not known yet.
        """
        if self._inspector_path is None:
            raise ConfigurationError('there is no inspector page: AsenaServer(..., inspector_path="/inspector")')
        return self.url(f"{self._inspector_path}?token={self._desk.token}")

    def asyncapi(self) -> dict[str, Any]:
        """Return the AsyncAPI 3.0 document of this server: what its namespaces take, answer and send.

        It is made of decorators, annotations and docstrings: each handler is a receive operation, with what it returns
        as the reply; ``@WebSocket(…, sends=Bid | Sold)`` declares what is sent. Its schemas are JSON Schema draft-07.
        Clients of the Centrifuge protocol find their address in the channel's ``x-centrifuge``, and the methods of
        their calls in the operation's ``x-rpc-methods``. Builds the components, if that has not happened yet.

        Raises:
            ConfigurationError: A type cannot be expressed as JSON Schema, or an annotation cannot be resolved.
        """
        base = None
        if self._hosting != "app" and (self._port is not None or self._wanted_port):
            base = self._reach().base.replace("http", "ws", 1)
        return document(
            self._contracts(),
            info=self._asyncapi_info,
            base=base,
            centrifuge_suffix=CENTRIFUGE_SUFFIX,
        )

    def typescript(self) -> str:
        """Return TypeScript declarations for the messages of this server: a ``.d.ts`` file.

        For each namespace there is a type, such as ``Auction``, and ``new Centrifuge(url) as Typed<Centrifuge,
        Auction>`` is a client whose calls, messages and publications have types; ``asena.js`` and the npm package
        ``centrifuge`` both do.

        Raises:
            ConfigurationError: As for `asyncapi`.
        """
        return declarations(self._contracts())

    def _contracts(self) -> list[Contract]:
        return [contract_of(namespace.hooks.service) for namespace in self.namespaces.values()]

    @property
    def cluster(self) -> Cluster | None:
        """This server's part in the cluster; None without a transport, or while it does not run."""
        return self._site.cluster

    @property
    def ready(self) -> bool:
        """Whether it runs and, if it has a transport, reaches the other nodes. A load balancer may ask for it."""
        return self.state == "running" and (self.cluster is None or self.cluster.ready)

    # -- starting

    def start(self, *, hosting: Literal["thread", "kernel"] = "thread") -> Self:
        """Start, and return the server once it listens. Starting a server that runs changes nothing.

        A server of this process that was started the same way on the same port is *replaced*: its connections and rooms
        pass to this one without the clients noticing, ``on_open`` is not called again, and the old server object is
        done. That is what running a notebook cell again does. If this server cannot start, the old one goes on. Clients
        of a namespace that no longer exists are closed with 1012, and so are sockets whose values no longer fit the
        service's type.

        With ``hosting="thread"`` it serves from a daemon thread with a loop of its own, and stays live while a cell
        computes. To that end the interpreter's switch interval (``sys.setswitchinterval``) is at most the server's
        ``switch_interval`` until the last such server has stopped, and then what it was before. A shorter interval that
        you have set is kept, and so is one that you set while servers run. C code that holds the interpreter lock still
        stops the server while it runs, garbage collection included: after your imports, ``gc.collect(); gc.freeze()``
        makes that shorter.

        With ``hosting="kernel"`` it serves on the loop that is already running in this thread: handlers share the
        thread with the cells, and wait while one runs. There, await `aclose` instead of calling `stop`, or install
        ``nest-asyncio2`` for calls that block. (``nest_asyncio``, its predecessor, loses queued cells on ipykernel 7
        and is refused.) A cell that stops that loop, as by ``IOLoop.current().stop()``, ends the kernel.

        Args:
            hosting: ``"thread"`` or ``"kernel"``.

        Returns:
            The server itself.

        Raises:
            PortInUseError: Something else listens on the port.
            ServerStateError: It runs with another hosting, was replaced by a newer server, or there is no running
                loop for ``"kernel"``.
            InjectionError: A component cannot be built; `CircularDependencyError` for components that need each other.
            Exception: What a component's constructor or ``on_start`` raises.
        """
        if hosting not in ("thread", "kernel"):
            raise ConfigurationError(f'hosting must be "thread" or "kernel", not {hosting!r}')
        # A loop that runs here must not wait for long: it may be what the other one waits for.
        patience = -1.0 if running_loop() is None or in_cell() else _SLACK
        with lock_within(self._lock, patience), turn(self._wanted_port, timeout=patience):
            if self.state in ("starting", "running"):
                if self._hosting != hosting:
                    raise ServerStateError(f"the server is already running (hosting={self._hosting!r}): stop it first")
                return self
            self._begin(hosting)
            try:
                old = self._predecessor()
                if hosting == "thread" and old is not None:
                    assert old._thread is not None
                    old._await_answer()
                    old._thread.submit(lambda: self._replace(old))
                elif hosting == "thread":
                    self._thread = LoopThread(f"asena-{self._wanted_port}", self._loop)
                    self._thread.start().submit(self._open)
                else:
                    loop = running_loop()
                    if loop is None:
                        raise ServerStateError(
                            'hosting="kernel" needs a loop that is already running, as in a notebook; '
                            "elsewhere use server.start() or server.run()"
                        )
                    in_empty_context(lambda: self._open_in_background(old))
            except concurrent.futures.CancelledError:
                self._give_up()
                raise ServerStateError("the server was stopped while it was starting") from None
            except BaseException:
                if self._state == "running" and hosting == "thread":
                    # Interrupted when it had just started: what was started is stopped.
                    self._stop_and_wait(STOP_TIMEOUT, time.monotonic() + STOP_TIMEOUT)
                else:
                    self._give_up()
                raise
        return self

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, or until `stop` is called; then drain and return. For scripts.

        A second signal ends the draining. Where nothing has configured `logging`, messages of level INFO are shown.

        Raises:
            ServerStateError: A loop runs in this thread, or the server runs already.
            PortInUseError: Something else listens on the port.
            Exception: As for `start`.
        """
        if running_loop() is not None:
            raise ServerStateError(
                "run() blocks and needs a thread without a running loop; in a notebook use server.start(), "
                "in an async program await server.serve()"
            )
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.INFO)
        with asyncio.Runner(loop_factory=lambda: new_event_loop(self._loop, beside=beside())) as runner:
            runner.run(until_signaled(self.serve))

    async def serve(self) -> None:
        """Serve on the caller's loop until `stop` is called or this is cancelled; then drain.

        Raises:
            ServerStateError: The server runs already.
            PortInUseError: Something else listens on the port.
            Exception: As for `start`.
        """
        async with self:
            log.info("serving %s at %s", ", ".join(self._site.paths) or "nothing", self.url())
            await self._stopped.wait()

    async def __aenter__(self) -> Self:
        with self._lock:
            if self.state in ("starting", "running"):
                raise ServerStateError(f"the server is already running (hosting={self._hosting!r}): stop it first")
            self._begin("caller")
        try:
            # A task of its own, so that what listens is not tied to the caller's context.
            await in_empty_context(lambda: asyncio.get_running_loop().create_task(self._open()))
        except BaseException:
            self._give_up()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def mount(self, app: Application) -> Self:
        """Add the routes to an existing Tornado application.

        Components start on the application's loop: at once if it runs already, else with the first request. They stop
        with `aclose`, or when ``asyncio.run`` ends. The port and the address are the application's business, so `port`
        and `url` do not know them.

        Args:
            app: The application.

        Returns:
            The server itself.

        Raises:
            ConfigurationError: The server is mounted on this application already.
        """
        if app not in self._mounted:
            app.add_handlers(r".*", self.routes())
            self._mounted.add(app)
        elif self._state not in ("new", "stopped") or (self._state == "new" and running_loop() is None):
            raise ConfigurationError("this server is already mounted on this application")
        if self._state == "stopped":
            self._state = "new"
        if running_loop() is not None and self._state == "new":
            self._begin("app")
            in_empty_context(self._open_in_background)
        return self

    def routes(self) -> list[Any]:
        """Return the routes, to be put into ``tornado.web.Application([...])``; otherwise like `mount`."""
        site = self._site
        site.build()
        self._check_client_path()
        hosts = self._hosts
        routes: list[Any] = [websocket_routes(path, self._find_endpoint(path), hosts) for path in site.websocket_paths]
        if self._inspector_path is not None:
            view = View(self._desk, read_only=self._inspector_read_only)
            routes += page_routes(self._inspector_path, view, hosts)
        if self._client_path is not None:
            routes += client_routes(self._client_path, self._origins, hosts)
        routes += document_routes(self._asyncapi_paths, self.asyncapi, hosts)
        return [*routes, site.controllers.rule] if site.controllers else routes

    def _check_client_path(self) -> None:
        """Raise `ConfigurationError` where something else, as far as is known, has the path of ``asena.js``."""
        for path in () if self._client_path is None else client_paths(self._client_path):
            if path in self._site.websocket_paths:
                other = "a namespace"
            elif self._site.controllers.has(path):
                other = "the path of a controller's method"
            elif path == self._inspector_path:
                other = "the inspector's path"
            else:
                continue
            raise ConfigurationError(
                f"{path!r} is {other} already: give asena.js another path with client_path=, or None to leave it out"
            )

    def _find_endpoint(self, path: str) -> Callable[[], Awaitable[Endpoint]]:
        async def find() -> Endpoint:
            await self._until_running()
            return self._site.endpoints[path]

        return find

    async def _until_running(self) -> None:
        if self._state == "new":
            self._begin("app")
            in_empty_context(self._open_in_background)
        if self._state == "starting" and self._opening is not None:
            await asyncio.wait([self._opening])
        if self._state != "running":
            raise Refusal(503, "the server is not running", headers={"Retry-After": "1"})

    def _begin(self, hosting: Hosting) -> None:
        if self._state == "stopping":
            raise ServerStateError("the server is still stopping; wait for stop() to return")
        if self._state == "replaced":
            raise ServerStateError(f"{self._was_replaced()}, or make another AsenaServer")
        show_in_cells(log)
        self._door = None  # not that of an earlier start
        self._hosting = hosting
        self._state = "starting"
        self._failure = None
        self._stopped = asyncio.Event()

    def _give_up(self, why: str = "the server could not start") -> None:
        self._state = "stopped"
        _running.discard(self)
        switching.release(self)
        self._site.end(why)
        if self._http is not None:
            self._http.stop()
            self._http = None
        self._end_thread()  # which may still be about to listen, or to watch sockets
        self._site.stop_reading()
        self._stop_listening()
        self._opening = None

    def _prepare(self) -> None:
        """Do everything that needs no waiting, on the loop's thread."""
        self._site.build()
        self._check_address()
        if self._hosting != "app":
            self._listeners = listen(self._wanted_port, self._address)
            self._port = self._listeners[0].getsockname()[1]
        door = LoopDoor(asyncio.get_running_loop())
        self._site.open(door)
        self._door = door

    async def _open(self) -> None:
        """Open in a task of its own, which a stop cancels."""
        self._opening = asyncio.current_task()
        try:
            if self._door is None or self._door.is_shut:
                self._prepare()
            http = self._make_http() if self._listeners else None
            await self._site.start()
            if self._state != "starting":
                # The thread that waited for the start was interrupted, and has given it up meanwhile.
                await self._site.stop()
                raise asyncio.CancelledError
        except BaseException:
            if self._door is not None:
                self._door.shut()
            self._stop_listening()
            raise
        self._listen(http)

    def _open_in_background(self, old: AsenaServer | None = None) -> None:
        """Open on the loop that runs this code; what has to be awaited goes on in a task."""
        if old is None:
            self._prepare()
        else:
            self._site.build()
            self._check_address()
            self._door, self._port = old._door, old._port

        async def finish() -> None:
            try:
                async with queue(self._wanted_port):
                    # Those that began before may have changed who that is.
                    before = None if old is None else self._predecessor()
                    await (self._open() if before is None else self._replace(before))
            except BaseException as error:
                self._give_up()
                if must_propagate(error):
                    raise  # stopped while it was starting
                self._failure = error
                log.exception("the server could not start")
            else:
                self._lifeline = _until_loop_ends(self)
                await anext(self._lifeline)

        self._opening = asyncio.get_running_loop().create_task(finish())

    # -- replacing a server of the same process, as a notebook cell does when it is run again

    def _predecessor(self) -> AsenaServer | None:
        """The running server whose port this one is about to take."""
        for old in list(_running):
            if (
                old._port == self._wanted_port
                and old._address == self._address
                and old._hosting in ("thread", "kernel")
            ):
                wanted = "asyncio" if self._loop == "auto" else self._loop
                other_loop = old._door is not None and self._hosting == "thread" and old._door.kind != wanted
                if (
                    old._hosting != self._hosting
                    or (self._hosting == "kernel" and old._door_is_elsewhere())
                    or other_loop
                ):
                    how = f"hosting={old._hosting!r}"
                    if old._hosting == self._hosting and old._door is not None and other_loop:
                        how = f"loop={old._door.kind!r}"
                    raise PortInUseError(
                        f"port {old._port} is served by an earlier server of this process ({how}); "
                        "stop that one first, or start this one the same way to replace it",
                        port=self._wanted_port,
                        address=self._address,
                    )
                return old
        return None

    def _await_answer(self) -> None:
        """Wait until the loop hears us. Raises `ServerStateError` when it is held up for too long."""
        assert self._thread is not None
        try:
            self._thread.submit(_nothing, timeout=STOP_TIMEOUT)
        except TimeoutError:
            raise ServerStateError(
                f"the earlier server on port {self._port} did not answer within {STOP_TIMEOUT:g} s and goes on; "
                f"what holds up its loop: {held_up_at(self._thread.ident)}"
            ) from None

    def _door_is_elsewhere(self) -> bool:
        return self._door is None or self._door.loop is not running_loop()

    async def _replace(self, old: AsenaServer) -> None:
        """Take the old server's place, on its loop. Whatever fails before the switch leaves it as it was."""
        assert old._door is not None
        self._check_address()
        own, self._desk = self._desk, old._desk  # the views and the page go on with that one
        # Duplicates, because a server closes the sockets that it stops listening on.
        listeners: list[sockets.socket] = []
        try:
            listeners.extend(listener.dup() for listener in old._listeners)
            http = self._make_http()
            leftovers = await take_over(self._site, old._site, old._door, lambda: self._check_still_wanted(old))
        except BaseException:
            self._desk = own
            for listener in listeners:
                listener.close()
            raise
        # Nothing waits from here on: the listeners and the endpoints change along with the site.
        self._door, self._port, self._listeners = old._door, old._port, listeners
        self._thread, old._thread = old._thread, None
        self._desk.pass_to(self._subject)
        self._listen(http)
        old_http, old._http, old._listeners = old._http, None, []
        if old_http is not None and self._http is not None:
            self._http.inherit(old_http)
        old._state = "replaced"
        switching.release(old)
        old._stopped.set()
        _running.discard(old)
        self._retiring = asyncio.get_running_loop().create_task(self._retire(old, old_http, leftovers))

    def _check_still_wanted(self, old: AsenaServer) -> None:
        """Raise right before the switch unless both servers still want it."""
        if self._state != "starting":
            # The thread that waited for the start was interrupted, and has given it up meanwhile.
            raise asyncio.CancelledError
        if old._state != "running" or old._closing is not None:
            raise ServerStateError(
                "the server that this one was to replace has stopped in the meantime: start this one again"
            )

    async def _retire(self, old: AsenaServer, http: FrontServer | None, leftovers: Leftovers) -> None:
        """End what is left of the old server."""
        before, old._retiring = old._retiring, None
        if before is not None:
            await before
        await retire(leftovers, self._site)
        if http is not None:
            await http.front.dismiss()
        old._door = None

    def _check_address(self) -> None:
        """Raise `ConfigurationError` for an invalid ``public_url``, while there is still nothing to undo."""
        reach(self._wanted_port, "", template=self._public_url)

    def _make_http(self) -> FrontServer:
        """Everything about HTTP that could fail; it does not listen yet."""
        app = Application(
            self.routes(),
            log_function=_log_request,
            default_handler_class=ControllerHandler,
            default_handler_args={"controllers": None, "max_body_size": self._max_body_size},
        )
        return FrontServer(
            Front(app, lambda path: self._site.endpoints.get(path), self._hosts),
            ssl_options=self._ssl,
            idle_connection_timeout=self._options.handshake_timeout,
            body_timeout=self._options.handshake_timeout,
            max_header_size=_MAX_HEADER_SIZE,
            max_body_size=self._max_body_size,
        )

    def _listen(self, http: FrontServer | None) -> None:
        """From here on clients are accepted. Nothing here fails."""
        if beside():
            switching.request(self, self._switch_interval)
            for listener in self._listeners:
                hold(listener)  # and with it what it accepts
        if http is not None:
            self._http = http
            http.add_sockets(self._listeners)
            found = self._reach()
            self._origins.allow(found.origin)
            self._hosts.serve(
                (self._address, urlsplit(found.base).hostname),
                listeners=[listener.getsockname()[0] for listener in self._listeners],
                anywhere=found.anywhere,
            )
        self._state = "running"
        _running.add(self)

    # -- stopping

    def stop(self, *, timeout: float = STOP_TIMEOUT) -> None:
        """Stop, and return when that is done: the opposite of `start`, from any thread.

        It stops accepting, closes every socket with 1001, runs every ``on_close``, stops the components and frees the
        port. Handlers that run may finish, for ``handler_grace`` seconds; clients that do not answer the close are cut
        off. Where the loop itself is held up, by a handler that blocks it, this returns soon after ``timeout`` all the
        same, and logs what holds it up. Stopping a stopped server changes nothing. From a handler it returns at once,
        and the server stops as soon as it can.

        Args:
            timeout: Seconds after which what still runs is cancelled.
        """
        if self.state in ("new", "replaced"):
            return
        door = self._door
        inside = False
        with contextlib.suppress(ServerStateError):  # it has stopped by itself meanwhile
            inside = door is not None and not door.is_shut and door.inside()
        if door is not None and not door.is_shut:
            if inside:
                if self._site.handling or (self._thread is not None and self._thread.current):
                    self._close_soon(timeout)
                else:
                    run_nested(door.loop, self.aclose(timeout=timeout), "await server.aclose()")
                return
            if self._site.handling:
                # In a thread that a handler waits for, as `asyncio.to_thread` has it.
                door.run(self._close_soon, timeout)
                return
        timeout = min(timeout, _FOREVER)
        deadline = time.monotonic() + timeout + _SLACK
        with lock_within(self._lock, timeout + _SLACK), turn(self._port, timeout=timeout + _SLACK):
            self._stop_and_wait(timeout, deadline)

    def _stop_and_wait(self, timeout: float, deadline: float) -> None:
        door = self._door
        if self.state in ("starting", "running", "stopping") and door is not None:
            patience = PATIENCE if running_loop() is None else _HASTE
            # Not in the caller's context, which may be that of another server's handler.
            stopping = in_empty_context(
                lambda: asyncio.run_coroutine_threadsafe(self._aclose(timeout, patience), door.loop)
            )
            try:
                with interruptible():
                    stopping.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self._leave_behind(timeout, door)
                return
        self._end_thread(max(AFTER_CANCEL, deadline - time.monotonic()))

    async def aclose(self, *, timeout: float = STOP_TIMEOUT) -> None:
        """Stop like `stop`, awaitable from any loop. In a handler it returns at once.

        Args:
            timeout: Seconds after which what still runs is cancelled.
        """
        door = self._door
        if self.state in ("new", "stopped", "replaced") or door is None:
            return
        if threading.get_ident() == door.thread:
            await self._aclose(timeout, PATIENCE)
            return
        if self._site.handling:
            door.run(self._close_soon, timeout)
            return
        stopping = in_empty_context(
            lambda: asyncio.run_coroutine_threadsafe(self._aclose(timeout, PATIENCE), door.loop)
        )
        try:
            with waking():
                async with asyncio.timeout(timeout + _SLACK):
                    await asyncio.shield(asyncio.wrap_future(stopping))
        except TimeoutError:
            self._leave_behind(timeout, door)
            return
        self._end_thread()

    async def _aclose(self, timeout: float, patience: float) -> None:
        self._close_soon(timeout, patience)
        # A handler that waited here would wait for its own end.
        if not self._site.handling and self._closing is not None:
            await asyncio.shield(self._closing)

    def _leave_behind(self, timeout: float, door: LoopDoor) -> None:
        """Let it stop when its loop is free again, and log that: nothing more can be done about a blocked thread."""
        if self._state == "running":
            self._state = "stopping"
        log.error(
            "%s has not stopped within %g s and is left behind; what holds up its loop: %s",
            self,
            timeout,
            held_up_at(door.thread),
        )

    def _close_soon(self, timeout: float, patience: float = PATIENCE) -> None:
        if self._closing is None and self._state in ("starting", "running", "stopping"):
            loop = asyncio.get_running_loop()
            self._closing = in_empty_context(lambda: loop.create_task(self._close(timeout, patience)))

    def _end_thread(self, timeout: float = 5.0) -> None:
        thread = self._thread
        if thread is not None:
            if not thread.stop(timeout=timeout):
                log.error("the thread of %s goes on; what holds it up: %s", self, held_up_at(thread.ident))
            if not thread.current:
                self._thread = None

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    async def _close(self, timeout: float, patience: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await wait_for(self._opening, deadline, "the start")
        if self._retiring is not None:
            await wait_for(self._retiring, loop.time() + timeout / 2, "the end of the server that this one replaced")
        self._state = "stopping"
        _running.discard(self)
        try:
            self._site.refuse_handshakes()
            if self._http is not None:
                self._http.stop()
            await self._site.drain(deadline, patience)
            if self._http is not None:
                await _close_http(self._http)
            ending = loop.create_task(self._site.stop(deadline))
            await wait_for(ending, max(deadline, loop.time()) + AFTER_CANCEL, "stopping its components")
        finally:
            assert self._door is not None
            self._door.shut()
            self._site.end("the server has stopped: call server.start() again")
            self._stop_listening()
            self._http = None
            self._opening = self._closing = self._retiring = None
            self._state = "stopped"
            switching.release(self)
            self._stopped.set()
            if self._thread is not None:
                # The thread that waits in stop() ends this one; after a stop from a handler, none waits.
                self._door.loop.call_later(0.05, self._thread.stop)

    # -- working with it

    @overload
    def call(self, work: Awaitable[R], *, timeout: float | None = 30.0) -> R: ...
    @overload
    def call(self, work: Callable[[], Coroutine[Any, Any, R]], *, timeout: float | None = 30.0) -> R: ...
    @overload
    def call(self, work: Callable[[], R], *, timeout: float | None = 30.0) -> R: ...
    def call(self, work: Callable[[], Any] | Awaitable[Any], *, timeout: float | None = 30.0) -> Any:
        """Run a function or coroutine on the server's loop and return its result; from any other thread.

        Args:
            work: A function without arguments, a coroutine function without arguments, or a coroutine.
            timeout: Seconds to wait for the result; None waits as long as it takes.

        Returns:
            What the function or coroutine returns.

        Raises:
            TimeoutError: It took longer than ``timeout``; it is cancelled, as it is when the wait is interrupted.
            ServerStateError: The server does not run, or this is its own loop already.
            Exception: What ``work`` raises.
        """
        function: Callable[[], Any] = work if callable(work) else lambda: work
        try:
            door = self._open_door()
            if not door.inside():
                return door.call(function, timeout=timeout)
            if self._hosting == "thread" or self._site.handling:
                raise ServerStateError("this already is the server's own loop: call the function, or await it")
            result = function()
            if isinstance(result, Awaitable):
                return run_nested(door.loop, result, "await it instead")
            return result
        finally:
            # A coroutine that never began would be complained about where it is collected, far from the error.
            if inspect.iscoroutine(work) and inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
                work.close()

    async def connect(
        self,
        path: str = "/",
        *,
        headers: Mapping[str, str] | None = None,
        subprotocols: Sequence[str] = (),
        timeout: float = 10.0,
        ssl_options: Any = None,
    ) -> Client:
        """Connect a client to this server: ``await server.connect("/chat?username=Ann")``.

        Args:
            path: A namespace's path, with a query string if need be.
            headers: Headers of the handshake.
            subprotocols: WebSocket subprotocols to offer, the preferred one first.
            timeout: Seconds, for the handshake and as the default of every later wait of the client.
            ssl_options: An ``ssl.SSLContext`` of the client's side, for a server with TLS.

        Returns:
            The connected `Client`.

        Raises:
            ServerStateError: The server does not run.
            HandshakeRefused: The server answered with plain HTTP, such as 401 or 404.
            TimeoutError: The handshake took longer than ``timeout``.
        """
        self._open_door()
        url = self._address_of(path, self._local_base())
        if url.startswith("http"):
            url = "ws" + url.removeprefix("http")
        return await connect(url, headers=headers, subprotocols=subprotocols, timeout=timeout, ssl_options=ssl_options)

    def override(self, target: Any, replacement: Any) -> Self:
        """Use ``replacement`` wherever ``target`` would be injected; for tests, before the start.

            server = AsenaServer(WeatherSocket, port=0).override(Weather, FakeWeather())

        Args:
            target: What `Inject` takes: a component's class, its name, or ``ulak("/path")``. What it replaces is never
                constructed.
            replacement: An instance of anything, or a class that is constructed without arguments. It needs no
                decorator. Its own injected fields are filled in, and its ``on_start`` and ``on_stop`` run.

        Returns:
            The server itself.

        Raises:
            InjectionError: ``target`` cannot be injected. At the start, it is also raised if nothing asks for
                ``target``.
            ServerStateError: The components are built already.
        """
        self._site.container.override(target, replacement)
        return self

    def _open_door(self) -> LoopDoor:
        self._notice_the_end()
        if self._failure is not None:
            raise ServerStateError(f"the server could not start: {self._failure}") from self._failure
        if self._state == "replaced":
            raise ServerStateError(self._was_replaced())
        if self._door is None or self._state == "new":
            raise ServerStateError("the server is not running: call server.start() first")
        if self._state == "stopped":
            raise ServerStateError("the server has stopped: call server.start() again")
        return self._door

    def _was_replaced(self) -> str:
        return (
            f"this server was replaced by a newer one on port {self._port}, as when a cell is run again: "
            "use the newer one"
        )

    def __repr__(self) -> str:
        where = f" at {self.url()}" if self._state in ("starting", "running") and self._hosting != "app" else ""
        away = ", other nodes out of reach" if self._state == "running" and not self.ready else ""
        return f"<AsenaServer {self._state}{where}{away}: {', '.join(self._site.paths) or 'no namespaces'}>"

    def _repr_html_(self) -> str:
        namespaces = self._site.namespaces if self._state == "running" and self._hosting != "app" else {}
        rows = "".join(
            f"<tr><td><code>{html.escape(self.url(path))}</code></td>"
            f"<td>{html.escape(type(namespace.hooks.service).__name__)}</td>"
            f"<td>{len(namespace.sockets)} sockets</td></tr>"
            for path, namespace in namespaces.items()
        )
        table = f"<table>{rows}</table>" if rows else ""
        note = self._reach().note if rows else ""
        return f"<div>{html.escape(repr(self))}{table}{f'<small>{html.escape(note)}</small>' if note else ''}</div>"


async def _nothing() -> None:
    """Returns as soon as the loop runs it."""


async def _close_http(http: FrontServer) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            await http.close_all_connections()


async def _until_loop_ends(server: AsenaServer) -> Any:
    """Closes the server when the loop shuts its asynchronous generators down, as ``asyncio.run`` does at its end."""
    door = server._door
    try:
        yield
    finally:
        if server._door is door:  # it has not been started anew on another loop
            await server.aclose()


def _log_request(handler: Any) -> None:
    log.debug("%s %s", handler.get_status(), handler.request.path)  # there may be a token in the query


_running: weakref.WeakSet[AsenaServer] = weakref.WeakSet()


def _stop_all() -> None:
    """At the interpreter's end: send close frames, instead of cutting the connections."""
    for server in list(_running):
        if server._hosting == "thread":
            with contextlib.suppress(Exception):
                server.stop(timeout=2)


def _close_in_child() -> None:
    """A forked child must not keep the parent's port and connections open, nor wait for its threads."""
    for server in list(_running):
        for listener in server._listeners:
            os.close(listener.detach())
        server._forget_connections()
        server._lock = threading.RLock()
        # Nor may it try to stop what only the parent has.
        if server._door is not None:
            server._door.shut_in_child()
        server._listeners, server._http, server._thread, server._state = [], None, None, "stopped"
        _running.discard(server)


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)

__all__ = ["AsenaServer"]
