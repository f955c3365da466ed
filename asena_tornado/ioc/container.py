"""Components and what they need of each other: built once and started in order.

Every server has a container of its own. Nothing is registered globally, so a notebook cell that defines a
class again leaves no trace of the old one.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import types
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, get_origin, overload

from ..errors import InjectionError, ServerStateError, must_propagate
from .every import Ticking
from .graph import UNBUILT, Graph, InjectionPoint, Node, mark_of
from .inject import Component, Injected, Reference, fill_in, shown

logger = logging.getLogger("asena_tornado")

T = TypeVar("T")

_MOMENT = 0.1  # seconds for an ``on_stop`` when the time is over


class Container:
    """The components of one server.

    ``add`` what is listed, ``provide`` what exists already, ``override`` in tests; then ``build`` makes every
    component, and ``start`` and ``stop`` run their ``on_start`` and ``on_stop``, both on the same event loop. In
    between, the methods run that `every` has marked.
    """

    def __init__(self, *components: Any) -> None:
        self._listed: list[Any] = []
        self._provided: dict[type[Any] | str, Any] = {}
        self._overrides: dict[Any, Any] = {}
        self._graph: Graph | None = None
        self._is_built = False
        self._running = False
        self._started: list[Node] = []
        self._ticking: dict[int, Ticking] = {}  # by the identity of the component, which may not be hashable
        self._lock = asyncio.Lock()
        for item in components:
            self.add(item)

    def __repr__(self) -> str:
        state = "running" if self._running else "built" if self._is_built else "not built"
        count = len(self.components) if self._is_built else len(self._listed)
        return f"<Container: {count} component{'' if count == 1 else 's'}, {state}>"

    def add(self, item: Any) -> None:
        """List a component: its class, or an instance of it.

        Listing the same one again changes nothing. An instance keeps the fields that were set by hand. Raises
        ``InjectionError`` if the class is not a component, ``ServerStateError`` once built.
        """
        self._still_open("add")
        origin = get_origin(item)
        if isinstance(origin, type):
            item = origin
        if isinstance(item, (str, types.FunctionType, types.ModuleType)):
            raise InjectionError(f"a component must be a class or an instance of one, not {item!r}")
        mark_of(item)
        if not any(item is other for other in self._listed):
            self._listed.append(item)

    @overload
    def provide(self, key: type[T], instance: T) -> None: ...
    @overload
    def provide(self, key: str, instance: object) -> None: ...
    def provide(self, key: type[Any] | str, instance: object) -> None:
        """Let ``Inject(key)`` give this existing object; a class can then also be asked for by its name.

        It is not a component: nothing is injected into it, and it is neither started nor stopped here. Raises
        ``InjectionError`` if the key has another object already, ``ServerStateError`` once built.
        """
        self._still_open("provide")
        if self._provided.setdefault(key, instance) is not instance:
            raise InjectionError(f"{shown(key)} is already provided")

    def override(self, target: Any, replacement: Any) -> None:
        """Put ``replacement`` where ``target`` would be; for tests.

        ``target`` is whatever ``Inject`` takes; what it replaces is never constructed. ``replacement`` is an
        instance of anything, or a class to construct without arguments. It needs no decorator; its own
        injected fields are filled in, and its ``on_start`` and ``on_stop`` run. It has the name of what it
        replaces, and its kind too if it derives from that. The last override of a target counts.

        Raises ``InjectionError`` if the target cannot be injected at all, and so does ``build`` if nothing is
        listed or injected as that; ``ServerStateError`` once built.
        """
        self._still_open("override")
        key = Injected(target, None).target
        if not isinstance(key, Hashable):
            raise InjectionError(f"{key!r} cannot be overridden: it is not hashable")
        self._overrides[key] = replacement

    def _still_open(self, what: str) -> None:
        if self._graph is not None:
            raise ServerStateError(f"call {what}() before the start: these components are already built")

    def build(self) -> None:
        """Find, check and construct every component, and fill in its fields. Does nothing the second time.

        Nothing is constructed unless all can be: raises ``InjectionError`` for an unknown name, two
        components with one name, a class that is not a component and a constructor that needs arguments, and
        its subclass ``CircularDependencyError`` for a cycle. What a constructor, a reference or a ``select``
        raises comes through, with a note of where.
        """
        if self._is_built:
            return
        self._graph = Graph(self._listed, self._provided, self._overrides)
        try:
            for node in self._graph.nodes:
                if not node.constructed or node.provided:
                    node.instance = node.source
            for node in self._graph.order:
                if node.constructed:
                    node.instance = _construct(node)
                self._inject(node)
        except BaseException:
            self._graph = None
            raise
        self._is_built = True

    def _inject(self, node: Node) -> None:
        if not node.fields:
            return
        values = getattr(node.instance, "__dict__", None)
        if not isinstance(values, dict):
            raise InjectionError(
                f"{node.label} cannot hold {', '.join(node.fields)}: leave out its __slots__, or add "
                "'__dict__' to them",
                component=node.label,
                field=next(iter(node.fields)),
            )
        for name, injected in node.fields.items():
            needed = node.needs.get(name)
            try:
                value = injected.target.resolve(self) if needed is None else needed.instance
                if injected.select is not None:
                    value = injected.select(value)
            except Exception as error:
                error.add_note(f"while injecting {InjectionPoint(node, name).path()} = {injected!r}")
                raise
            fill_in(values, name, value)

    @property
    def components(self) -> tuple[tuple[Component, Any], ...]:
        """Every component with its instance, each after those it needs; empty until built."""
        if self._graph is None or not self._is_built:
            return ()
        return tuple((node.component, node.instance) for node in self._graph.order)

    @overload
    def get(self, target: type[T]) -> T: ...
    @overload
    def get(self, target: Reference[T]) -> T: ...
    @overload
    def get(self, target: str) -> Any: ...
    @overload
    def get(self, target: Callable[..., T]) -> T: ...
    def get(self, target: Any) -> Any:
        """What ``Inject(target)`` gives, once built.

        Raises ``ServerStateError`` before that, ``InjectionError`` if there is no such component.
        """
        if self._graph is None:
            raise ServerStateError("there are no components before the start")
        key = Injected(target, None).target
        node = self._graph.find(key)
        if node is None:
            return key.resolve(self)
        if node.instance is UNBUILT:
            raise InjectionError(f"{node.label} is not built yet", component=node.label)
        return node.instance

    async def start(self, *, running: Container | None = None) -> None:
        """Build, then run every ``on_start`` in order. Does nothing while started.

        ``running`` is the container that this one takes over from: an instance that runs there goes on running.

        If one raises, those that had started are stopped, in reverse, and its exception comes through with a
        note that names the component.
        """
        async with self._lock:
            if self._running:
                return
            self.build()
            assert self._graph is not None
            for node in self._graph.order:
                try:
                    if running is None or not running.runs(node.instance):
                        await _run(node, "on_start")
                except BaseException as error:
                    error.add_note(f"raised by {node.label}.on_start(); the components that had started were stopped")
                    if running is not None:
                        self._leave_to(running)
                    await self._stop_started()
                    raise
                self._started.append(node)
                if running is None or not running.runs(node.instance):
                    self._ticking[id(node.instance)] = Ticking(node.instance)
            self._running = True

    async def stop(self, *, successor: Container | None = None, until: float | None = None) -> None:
        """Run ``on_stop`` of everything that started, in reverse. Does nothing when stopped.

        What runs in ``successor``, too, goes on running there. At ``until`` (loop time) the one that runs is
        cancelled, and those that are left have a moment each.

        Every one is run: what one raises is logged and not raised, since a server has to get through its
        stop. When this call is cancelled, another one carries on with those that are left.
        """
        async with self._lock:
            self._running = False
            if successor is not None:
                self._leave_to(successor)
            await self._stop_started(until)

    def runs(self, instance: object) -> bool:
        """Whether the instance has started here, and not stopped."""
        return any(node.instance is instance for node in self._started)

    def stop_ticking(self, successor: Container) -> None:
        """Run the methods that `every` has marked no more, except those of what runs in ``successor``, too."""
        self._leave_to(successor)
        for ticking in self._ticking.values():
            ticking.cancel()

    def _leave_to(self, other: Container) -> None:
        """Forget what runs in the other one, too: it goes on there."""
        kept = [node for node in self._started if other.runs(node.instance)]
        for node in kept:
            if (ticking := self._ticking.pop(id(node.instance), None)) is not None:
                other._ticking[id(node.instance)] = ticking
            self._started.remove(node)

    async def _stop_started(self, until: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        while self._started:
            node = self._started.pop()
            limit = None if until is None else max(until, loop.time() + _MOMENT)
            try:
                async with asyncio.timeout_at(limit) as waiting:
                    if (ticking := self._ticking.pop(id(node.instance), None)) is not None:
                        await ticking.stop()
                    await _run(node, "on_stop")
            except TimeoutError:
                if waiting.expired():
                    logger.error("%s.on_stop() did not finish in time and was cancelled", node.label)
                else:
                    logger.exception("%s.on_stop() failed", node.label)
            except BaseException as error:
                # `self.task.cancel(); await self.task` in an on_stop ends in a CancelledError, too: that is not ours.
                if must_propagate(error):
                    raise
                logger.exception("%s.on_stop() failed", node.label)


def _construct(node: Node) -> Any:
    try:
        return node.source()
    except Exception as error:
        needed = f", which {node.needed_at.path()} needs" if node.needed_at else ""
        error.add_note(f"while constructing {node.label}{needed}")
        raise


async def _run(node: Node, hook: str) -> None:
    # Looked up on the class, as special methods are: a mock or a proxy has every attribute one asks it for.
    if not hasattr(node.component.cls, hook):
        return
    result = getattr(node.instance, hook)()
    if inspect.isawaitable(result):
        await result


__all__ = ["Container"]
