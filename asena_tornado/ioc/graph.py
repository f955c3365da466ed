"""All components of a container and what each needs of the others: found, checked and sorted before any is built."""

from __future__ import annotations

import difflib
import inspect
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ..errors import CircularDependencyError, InjectionError
from .inject import Component, Injected, component_of, injected_fields, set_by_hand, shown

UNBUILT = object()  # the instance of a node that has none yet


@dataclass(eq=False, slots=True)
class Node:
    """One component, built or to be built."""

    component: Component
    source: Any  # the class to construct, or the instance
    needed_at: InjectionPoint | None  # why it is here, when it was not listed
    listed_as: type[Any]  # the class before an override
    provided: bool = False
    fields: dict[str, Injected] = field(default_factory=dict)
    needs: dict[str, Node] = field(default_factory=dict)  # by field; references are not in here
    instance: Any = UNBUILT

    @property
    def label(self) -> str:
        """Its name in errors."""
        return self.component.cls.__name__

    @property
    def constructed(self) -> bool:
        """Whether the container makes the instance."""
        return isinstance(self.source, type)


@dataclass(frozen=True, slots=True)
class InjectionPoint:
    """Where a component is needed: a field of another one, or that other one's decorator."""

    node: Node
    field: str | None  # None where the decorator lists it

    def __str__(self) -> str:
        return self.node.label if self.field is None else f"{self.node.label}.{self.field}"

    def path(self) -> str:
        """The fields that lead here from a listed component."""
        steps, point = [str(self)], self.node.needed_at
        while point is not None:
            steps.append(str(point))
            point = point.node.needed_at
        return " -> ".join(reversed(steps))


def _error(what: str, point: InjectionPoint | None) -> InjectionError:
    if point is None:
        return InjectionError(what)
    path = point.path()
    reached = f" (reached by {path})" if path != str(point) else ""
    return InjectionError(f"{point}: {what}{reached}", component=point.node.label, field=point.field)


def _no_component(cls: type[Any], point: InjectionPoint | None = None) -> InjectionError:
    marked = next((mark for base in cls.__mro__[1:] if (mark := component_of(base))), None)
    # Base classes that go with one decorator say so themselves; this module knows none of them.
    decorator = getattr(cls, "__asena_decorator__", None)
    if marked is not None:
        what = (
            f"{cls.__name__} is not a component: its base {marked.cls.__name__} is a @{marked.kind}, but a "
            f"subclass needs a decorator of its own; put @{marked.kind} above {cls.__name__}"
        )
    elif isinstance(decorator, str):
        what = f"{cls.__name__} is not a component: put {decorator} above the class"
    else:
        what = (
            f"{cls.__name__} is not a component: put @Service above the class "
            '(or @WebSocket("/path"), @Controller("/path"), @Middleware(), whichever it is)'
        )
        if point is not None:
            what += f", or list a component that derives from {cls.__name__}"
    return _error(what, point)


def _full_name(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _redefined(old: type[Any], new: type[Any]) -> bool:
    """Whether ``new`` took ``old``'s place when a cell was run again or a module reloaded."""
    return old is not new and _full_name(old) == _full_name(new) and "<locals>" not in old.__qualname__


class Graph:
    """All components of a container and what each needs, checked as far as can be without building any."""

    def __init__(self, listed: Sequence[Any], provided: Mapping[Any, Any], overrides: Mapping[Any, Any]) -> None:
        self.nodes: list[Node] = []
        self._by_class: dict[type[Any], Node] = {}
        self._by_name: dict[str, Node] = {}
        self._by_instance: dict[int, Node] = {}
        self._by_override: dict[Any, Node] = {}
        self._overrides = overrides
        self._later: deque[tuple[InjectionPoint, str]] = deque()

        for key, value in provided.items():
            cls = key if isinstance(key, type) else type(value)
            mark = Component("Provided", key if isinstance(key, str) else key.__name__, cls)
            self._enter(mark, value, provided=True, by_class=isinstance(key, type))
        self._listed = [self._enter(mark_of(source), source) for source in listed]
        for key in overrides:
            if key not in self._by_override and isinstance(key, type):
                node = self._existing(key, None)
                if node is not None:
                    self._replace(node, key)

        bound = 0
        while bound < len(self.nodes) or self._later:
            if bound < len(self.nodes):
                self._bind(self.nodes[bound])
                bound += 1
            else:  # names come last: they find only what is listed or was reached by class
                point, name = self._later.popleft()
                self._need(point, self._named(name, point))
        for key in overrides:
            if key not in self._by_override:
                raise InjectionError(
                    f"override({shown(key)}, …) replaces nothing: no component is listed or injected as "
                    f"{shown(key)}.{self._known()}"
                )
        self.order = self._sorted()

    def _enter(
        self,
        mark: Component,
        source: Any,
        point: InjectionPoint | None = None,
        *,
        provided: bool = False,
        by_name: bool = True,
        by_class: bool = True,
    ) -> Node:
        node = Node(mark, source, point, mark.cls, provided)
        if by_name:
            other = self._by_name.setdefault(mark.name, node)
            if other is not node:
                raise self._clash(mark.name, other, node)
        if by_class:
            self._by_class[mark.cls] = node
        if source is not None and not isinstance(source, type):
            self._by_instance[id(source)] = node
        self.nodes.append(node)
        if by_name:
            for key in (mark.cls, mark.name):
                if key in self._overrides:
                    self._replace(node, key)
        return node

    def _replace(self, node: Node, key: Any) -> None:
        source = self._overrides[key]
        cls = source if isinstance(source, type) else type(source)
        mark = component_of(cls)
        if mark is not None:
            kind, requires = mark.kind, mark.requires
        elif issubclass(cls, node.listed_as) and not node.provided:
            # A fake that derives from a WebSocket is still to be mounted.
            kind, requires = node.component.kind, node.component.requires
        else:
            kind, requires = "Service", ()
        node.component = Component(kind, node.component.name, cls, requires)
        node.source, node.provided = source, False
        self._by_class.setdefault(cls, node)
        self._by_override[key] = node

    def _stand_in(self, key: Any, point: InjectionPoint) -> Node:
        """The node of an override of something that is only injected, and is not a component."""
        node = self._by_override.get(key)
        if node is None:
            named = isinstance(key, (str, type))
            cls = key if isinstance(key, type) else object
            mark = Component("Service", key if isinstance(key, str) else shown(key), cls)
            node = self._enter(mark, None, point, by_name=named, by_class=isinstance(key, type))
            if not named:
                self._replace(node, key)
        return node

    def _bind(self, node: Node) -> None:
        if node.provided:
            return
        cls = node.component.cls
        if node.constructed:
            _check_constructor(cls, node.needed_at)
        for name, injected in injected_fields(cls).items():
            if not node.constructed and set_by_hand(node.source, name):
                continue
            node.fields[name] = injected
            point, target = InjectionPoint(node, name), injected.target
            if isinstance(target, type):
                self._need(point, self._of_class(target, point))
            elif isinstance(target, str):
                self._later.append((point, target))
            elif isinstance(target, Hashable) and target in self._overrides:
                self._need(point, self._stand_in(target, point))
        for required in node.component.requires:
            point = InjectionPoint(node, None)
            if isinstance(required, type):
                self._of_class(required, point)
            elif id(required) not in self._by_instance:
                # It has no name of its own: two namespaces may each require their own RateLimit(…).
                mark = component_of(type(required))
                if mark is None:
                    raise _no_component(type(required), point)
                self._enter(mark, required, point, by_name=False, by_class=False)

    def _need(self, point: InjectionPoint, node: Node) -> None:
        assert point.field is not None
        point.node.needs[point.field] = node

    def _existing(self, cls: type[Any], point: InjectionPoint | None) -> Node | None:
        node = self._by_class.get(cls)
        if node is not None:
            return node
        for node in self._listed:
            # A cell that was not run again still injects the class as it was before.
            if _redefined(cls, node.listed_as):
                return node
        derived = [node for node in self._listed if cls in node.listed_as.__mro__]
        if len(derived) > 1:
            names = ", ".join(node.listed_as.__name__ for node in derived)
            also = f", or list {cls.__name__} too" if component_of(cls) else ""
            what = (
                f"several listed components are of the class {cls.__name__}: {names}; inject one of these instead{also}"
            )
            raise _error(what, point)
        return derived[0] if derived else None

    def _of_class(self, cls: type[Any], point: InjectionPoint) -> Node:
        node = self._existing(cls, point)
        if node is not None:
            return node
        mark = component_of(cls)
        if mark is not None:
            return self._enter(mark, cls, point)
        if cls in self._overrides:
            return self._stand_in(cls, point)
        raise _no_component(cls, point)

    def _named(self, name: str, point: InjectionPoint | None) -> Node:
        node = self._by_name.get(name)
        if node is not None:
            return node
        if name in self._overrides and point is not None:
            return self._stand_in(name, point)
        by_class_name = {node.label: node.component.name for node in self._by_name.values()}
        if name in by_class_name:
            hint = f" The class {name} is a component under the name {by_class_name[name]!r}."
        else:
            close = difflib.get_close_matches(name, [*self._by_name, *by_class_name], n=1)
            hint = f" Did you mean {by_class_name.get(close[0], close[0])!r}?" if close else ""
        raise _error(
            f"no component is named {name!r}.{hint}{self._known()} A name finds only what is listed in "
            "AsenaServer(…) or injected by class somewhere: list the component, or inject its class",
            point,
        )

    def _known(self) -> str:
        names = sorted(self._by_name)
        shown = ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        return f" There is {shown}." if names else " There are none."

    def _clash(self, name: str, first: Node, second: Node) -> InjectionError:
        def described(node: Node) -> str:
            if node.provided:
                what = "what was provided as"
            else:
                what = "the class" if node.constructed else "an instance of"
            by = f" (injected by {node.needed_at.path()})" if node.needed_at else ""
            return f"{what} {_full_name(node.listed_as)}{by}"

        both = f"two components are named {name!r}: {described(first)} and {described(second)}"
        if first.listed_as is second.listed_as:
            way_out = "a server has one of each: pass it once, or derive a class and give it a decorator of its own"
        elif _redefined(first.listed_as, second.listed_as):
            way_out = (
                "the class was defined again after the first was used (a cell re-run, a module reloaded): "
                "run the cells that inject it again too, or inject it by name"
            )
        else:
            way_out = "give one of them another name in its decorator"
        what = f"{both}; {way_out}"
        point = second.needed_at or first.needed_at
        return _error(what, point) if point else InjectionError(what, component=second.label)

    def _sorted(self) -> tuple[Node, ...]:
        sorter: TopologicalSorter[Node] = TopologicalSorter()
        for node in self.nodes:
            sorter.add(node, *node.needs.values())
        try:
            return tuple(node for node in sorter.static_order() if not node.provided)
        except CycleError as error:
            # graphlib lists what is needed before what needs it.
            raise self._circle(list(reversed(error.args[1]))[:-1]) from None

    def _circle(self, circle: list[Node]) -> CircularDependencyError:
        first = min(range(len(circle)), key=lambda index: self.nodes.index(circle[index]))
        circle = circle[first:] + circle[:first]
        steps: list[tuple[Node, str, Node]] = []
        for node, needed in zip(circle, [*circle[1:], circle[0]], strict=True):
            steps.append((node, next(name for name, other in node.needs.items() if other is needed), needed))
        path = " -> ".join([*(f"{node.label}.{name}" for node, name, _ in steps), circle[0].label])
        way_out = (
            "move what both need into a third component, or, where one only sends to the other's sockets, "
            'write Inject(ulak("/path")), which is not a dependency'
        )
        if len(circle) == 1:
            way_out = f"{circle[0].label} needs no injection to reach itself; use self"
        else:
            for node, name, needed in steps:
                reached_by = _websocket_path(needed.component.cls)
                if reached_by is not None:
                    way_out = (
                        f'in {node.label}, write {name}: UlakNamespace = Inject(ulak("{reached_by}")) '
                        f"instead of {node.fields[name]!r}: it reaches the sockets by their path, and is not a "
                        "dependency"
                    )
                    break
        return CircularDependencyError(
            f"these components need each other to be built first: {path}. To break the circle, {way_out}",
            cycle=[*(node.label for node in circle), circle[0].label],
            component=steps[0][0].label,
            field=steps[0][1],
        )

    def find(self, target: Any) -> Node | None:
        """The node that stands for ``target``, or None for a reference."""
        if isinstance(target, str):
            return self._named(target, None)
        if isinstance(target, type):
            node = self._existing(target, None)
            if node is None:
                raise InjectionError(f"no component is of the class {target.__name__}.{self._known()}")
            return node
        return self._by_override.get(target) if isinstance(target, Hashable) else None


def mark_of(source: Any) -> Component:
    """The mark of a class, or of an instance's. Raises `InjectionError` when there is none."""
    cls = source if isinstance(source, type) else type(source)
    mark = component_of(cls)
    if mark is None:
        raise _no_component(cls)
    return mark


def _websocket_path(cls: type[Any]) -> str | None:
    path = getattr(getattr(cls, "__asena_websocket__", None), "path", None)
    return path if isinstance(path, str) else None


def _check_constructor(cls: type[Any], point: InjectionPoint | None) -> None:
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):  # a base class written in C may have none; then the call itself will tell
        return
    if inspect.isabstract(cls):
        raise InjectionError(
            f"{cls.__name__} is abstract and cannot be constructed: list a component that derives from it",
            component=cls.__name__,
        )
    missing = []
    for parameter in signature.parameters.values():
        if isinstance(parameter.default, Injected) and parameter.name not in injected_fields(cls):
            raise InjectionError(
                f"{cls.__name__}: {parameter.default!r} is the default of the constructor's argument "
                f"{parameter.name!r}, where nothing is injected: write it in the class body, "
                f"{parameter.name} = {parameter.default!r}",
                component=cls.__name__,
                field=parameter.name,
            )
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            missing.append(parameter.name)
    if missing:
        needed = f" (it is injected by {point.path()})" if point else ""
        raise InjectionError(
            f"the constructor of {cls.__name__} needs {', '.join(map(repr, missing))}, but a component is "
            f"constructed without arguments{needed}: pass an instance, AsenaServer({cls.__name__}(…)), or "
            f"make a field of it: {missing[0]}: X = Inject(X)",
            component=cls.__name__,
        )


__all__ = ["UNBUILT", "Graph", "InjectionPoint", "Node", "mark_of"]
