"""Components and what they need of each other: found, checked, built once and started in order.

Every server has a container of its own. Nothing is registered globally, so a notebook cell that defines a
class again leaves no trace of the old one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import inspect
import logging
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol, TypeVar, get_origin, overload, runtime_checkable

from ..errors import (
    CircularDependencyError,
    ConfigurationError,
    HookNameWarning,
    InjectionError,
    ServerStateError,
    must_propagate,
)

__all__ = [
    "Component",
    "Container",
    "Inject",
    "Reference",
    "Service",
    "component",
    "component_of",
    "listed",
    "needs_self",
]

logger = logging.getLogger("asena_tornado")

T = TypeVar("T")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)
C = TypeVar("C", bound=type[Any])

_MARKER = "__asena_component__"
_INJECTED = "__asena_injected__"
_UNSET = object()


@dataclass(frozen=True, slots=True)
class Component:
    """What a decorator such as ``@Service`` notes about a class.

    ``requires`` lists further component classes or instances (a namespace's middlewares, say) that are built,
    injected and started along with it. Unlike a field they impose no order, so they cannot close a cycle.
    """

    kind: str
    name: str
    cls: type[Any]
    requires: tuple[object, ...] = ()


_HOOKS = ("on_start", "on_stop")


def component(
    cls: C, *, kind: str, name: str | None = None, requires: Sequence[object] = (), hooks: Sequence[str] = ()
) -> C:
    """Mark ``cls`` as a component and return it; what ``Service``, ``WebSocket`` and the other decorators do.

    ``kind`` is the decorator's name, ``name`` what ``Inject("name")`` finds it by (default: the class's). ``hooks``
    are methods that are called besides ``on_start`` and ``on_stop``; a name that is nearly one of them is warned of.
    The mark is not inherited: a subclass needs a decorator of its own. Raises ``ConfigurationError`` for
    what is not a class, for an empty name, and for a class that another decorator has already marked.
    """
    if not isinstance(cls, type):
        raise ConfigurationError(f"@{kind} goes above a class, not {cls!r}")
    given: object = name  # whatever the annotation says
    if given is not None and not (isinstance(given, str) and given.strip()):
        raise ConfigurationError(f"@{kind} on {cls.__name__}: a name is a non-empty string, not {name!r}")
    earlier = component_of(cls)
    if earlier is not None and earlier.kind != kind:
        raise ConfigurationError(
            f"{cls.__name__} is already a @{earlier.kind} and cannot also be a @{kind}; keep one of the two"
        )
    hooks = (*hooks, *_HOOKS)
    for hook in hooks:
        needs_self(cls, hook)
    _warn_of_near_misses(cls, hooks)
    setattr(cls, _MARKER, Component(kind, name or cls.__name__, cls, tuple(requires)))
    return cls


def needs_self(cls: type[Any], name: str) -> None:
    """Raise `ConfigurationError` for a method that is written like a function."""
    method = inspect.getattr_static(cls, name, None)
    if inspect.isfunction(method) and not inspect.signature(method, follow_wrapped=False).parameters:
        raise ConfigurationError(f"{cls.__name__}.{name} is a method: its first parameter is self")


def listed(middlewares: Sequence[Any], decorator: str) -> tuple[Any, ...]:
    """What a decorator was given as ``middlewares``. Raises `ConfigurationError` for what cannot be any."""
    given: object = middlewares  # whatever the annotation says
    if not isinstance(given, list | tuple):
        raise ConfigurationError(f"{decorator}: middlewares is a list, middlewares=[…], not {given!r}")
    for each in given:
        if inspect.isroutine(each) or isinstance(each, functools.partial):
            raise ConfigurationError(
                f"{decorator}: {getattr(each, '__name__', each)} is a function, and middleware is a class: "
                "@Middleware() class Check: async def handle(self, context, next): …"
            )
    return tuple(given)


def _warn_of_near_misses(cls: type[Any], hooks: Sequence[str]) -> None:
    for name, method in vars(cls).items():
        if name.startswith("_") or name in hooks or not inspect.isfunction(method):
            continue
        if not (name.lower().startswith("on") or inspect.iscoroutinefunction(method)):
            continue
        near = min(hooks, key=lambda hook: _distance(name.lower(), hook))
        # Who calls it has not meant a hook: those are called by the server.
        if _distance(name.lower(), near) <= 2 and not _calls(cls, name) and not hasattr(method, "__asena_routes__"):
            warnings.warn(
                f"{cls.__name__}.{name} is never called by the server: did you mean {near}? "
                "(If it is a method of your own, another name avoids this warning, or one that begins with _)",
                HookNameWarning,
                stacklevel=_outside(),
            )


def _calls(cls: type[Any], name: str) -> bool:
    """Whether one of the class's own methods names it."""
    codes = [method.__code__ for method in vars(cls).values() if inspect.isfunction(method)]
    while codes:
        code = codes.pop()
        if name in code.co_names:
            return True
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return False


def _outside() -> int:
    """The ``stacklevel``, for the caller, of the first frame that is not of this package."""
    package, level = __name__.partition(".")[0] + ".", 1
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def _distance(a: str, b: str) -> int:
    """How many letters have to be added, left out, changed or swapped with the next one to make one of the other."""
    if abs(len(a) - len(b)) > 2:
        return 3  # or more
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if earlier and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, earlier[j - 2] + 1)
            row.append(best)
    return row[-1]


def component_of(cls: type[Any]) -> Component | None:
    """The mark that ``cls`` itself carries, or None; one that a base class carries does not count."""
    mark = vars(cls).get(_MARKER)
    if not isinstance(mark, Component):
        return None
    # @dataclass(slots=True) above the decorator copies the class, and the mark with it.
    return mark if mark.cls is cls else dataclasses.replace(mark, cls=cls)


@overload
def Service(name: C, /) -> C: ...
@overload
def Service(name: str | None = None) -> Callable[[C], C]: ...
def Service(name: Any = None) -> Any:
    """Make a class a component: built once per server, without arguments, and injected where it is asked for.

    Written ``@Service``, ``@Service()`` or ``@Service("Name")``; the name defaults to the class's.
    The methods ``on_start`` and ``on_stop``, sync or async, are run if there are any, on the server's loop:
    ``on_start`` once everything injected is there and has started, ``on_stop`` before any of that stops.
    """
    if isinstance(name, type):
        return component(name, kind="Service")
    if inspect.isroutine(name):
        raise ConfigurationError(f"@Service goes above a class, not the function {name.__name__}")
    return lambda cls: component(cls, kind="Service", name=name)


@runtime_checkable
class Reference(Protocol[T_co]):
    """Something to inject that is looked up rather than built, like ``ulak("/path")``; it is no dependency.

    ``resolve`` is called while the components are being built. It may ``get`` from the container what was
    provided to it, but no component, as nothing promises that one is built by then. To be overridden in
    tests, a reference has to be hashable.
    """

    def resolve(self, container: Container, /) -> T_co: ...


@overload
def Inject(target: type[T]) -> T: ...
@overload
def Inject(target: Reference[T]) -> T: ...
@overload
def Inject(target: str) -> Any: ...
@overload
def Inject(target: Callable[..., T]) -> T: ...  # mypy lets no abstract class or protocol be a type[T]
@overload
def Inject(target: type[T], select: Callable[[T], R]) -> R: ...
@overload
def Inject(target: Reference[T], select: Callable[[T], R]) -> R: ...
@overload
def Inject(target: str, select: Callable[[Any], R]) -> R: ...
def Inject(target: Any, select: Callable[[Any], Any] | None = None) -> Any:
    """A field of a component that the server fills in: ``chat: ChatSocket = Inject(ChatSocket)``.

    It is there from after ``__init__`` on, and so in ``on_start``. ``target`` is one of

    - a class: the component listed of that class, else the only one listed that derives from it, else, if the
      class is a component, one that is built for the occasion: what is injected need not be listed;
    - a component's name, which some listed or injected component must bear;
    - a reference such as ``ulak("/path")``, which creates no dependency.

    ``select`` makes the value out of that: ``Inject(Ulak, lambda ulak: ulak.namespace("/chat"))``.

    A value may be assigned by hand (in a unit test, for instance); an instance passed to the server keeps it.
    Raises ``InjectionError`` for any other target. Reading the field before it was filled in raises it too.
    """
    return _Injected(target, select)


class _Injected:
    """The field's stand-in on the class. It defines no ``__set__``, so a value in the instance hides it."""

    def __init__(self, target: Any, select: Callable[[Any], Any] | None) -> None:
        origin = get_origin(target)
        if isinstance(origin, type):  # Repository[User] is built as Repository
            target = origin
        if not isinstance(target, type):
            if component_of(type(target)) is not None:
                name = type(target).__name__
                raise InjectionError(f"Inject() takes the class, Inject({name}), not an instance of {name}")
            if not isinstance(target, (str, Reference)) or target == "":
                raise InjectionError(
                    f'Inject() takes a component class, a component\'s name or ulak("/path"), not {target!r}'
                )
        if select is not None and not callable(select):
            raise InjectionError(f"Inject({_shown(target)}, …) selects with a function, not {select!r}")
        self.target: Any = target
        self.select = select
        self._name = "?"

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type[Any]) -> Any:
        if instance is None:
            return self
        raise _NotInjected(
            f"{owner.__name__}.{self._name} is not injected yet: the instance was constructed by hand, its "
            "server has not started, or this is its __init__(). Pass it to AsenaServer(…) and start that, "
            f"read the field from on_start() on, or set it yourself: instance.{self._name} = …",
            component=owner.__name__,
            field=self._name,
        )

    def __repr__(self) -> str:
        return f"Inject({_shown(self.target)}{', …' if self.select else ''})"


class _NotInjected(InjectionError, AttributeError):
    # Also an AttributeError, so that hasattr(), inspect and a notebook's completion can look at the instance.
    pass


def _shown(target: object) -> str:
    return target.__name__ if isinstance(target, type) else repr(target)


def _injected_fields(cls: type[Any]) -> dict[str, _Injected]:
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        found.update(vars(base))
    return {name: value for name, value in found.items() if isinstance(value, _Injected)}


def _set_by_hand(instance: object, name: str) -> bool:
    values: Mapping[str, object] = getattr(instance, "__dict__", {})
    value = values.get(name, _UNSET)
    if value is _UNSET or isinstance(value, _Injected):  # a dataclass copies the default into its instances
        return False
    # An earlier server may have injected it; this one has its own to give.
    ours: Any = values.get(_INJECTED, {})
    return value is not ours.get(name, _UNSET)


@dataclass(eq=False, slots=True)
class _Node:
    component: Component
    source: Any  # the class to construct, or the instance
    wish: _Wish | None  # why it is here, when it was not listed
    listed_as: type[Any]  # the class before an override
    provided: bool = False
    fields: dict[str, _Injected] = field(default_factory=dict)
    needs: dict[str, _Node] = field(default_factory=dict)  # by field; references are not in here
    instance: Any = _UNSET

    @property
    def label(self) -> str:
        return self.component.cls.__name__

    @property
    def constructed(self) -> bool:
        return isinstance(self.source, type)


@dataclass(frozen=True, slots=True)
class _Wish:
    node: _Node
    field: str | None  # None for what the component requires without a field

    def __str__(self) -> str:
        return self.node.label if self.field is None else f"{self.node.label}.{self.field}"

    def path(self) -> str:
        steps, wish = [str(self)], self.node.wish
        while wish is not None:
            steps.append(str(wish))
            wish = wish.node.wish
        return " -> ".join(reversed(steps))


def _error(what: str, wish: _Wish | None) -> InjectionError:
    if wish is None:
        return InjectionError(what)
    path = wish.path()
    reached = f" (reached by {path})" if path != str(wish) else ""
    return InjectionError(f"{wish}: {what}{reached}", component=wish.node.label, field=wish.field)


def _no_component(cls: type[Any], wish: _Wish | None = None) -> InjectionError:
    marked = next((mark for base in cls.__mro__[1:] if (mark := component_of(base))), None)
    # Base classes that go with one decorator say so themselves; this module knows none of them.
    decorator = getattr(cls, "__asena_decorator__", None)
    if marked is not None:
        what = (
            f"{cls.__name__} is no component: its base {marked.cls.__name__} is a @{marked.kind}, but a "
            f"subclass needs a decorator of its own; put @{marked.kind} above {cls.__name__}"
        )
    elif isinstance(decorator, str):
        what = f"{cls.__name__} is no component; put {decorator} above the class"
    else:
        what = (
            f"{cls.__name__} is no component; put @Service above the class "
            '(or @WebSocket("/path"), @Controller("/path"), @Middleware(), as it may be)'
        )
        if wish is not None:
            what += f", or list a component that derives from {cls.__name__}"
    return _error(what, wish)


def _full_name(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _redefined(old: type[Any], new: type[Any]) -> bool:
    """Whether ``new`` took ``old``'s place when a cell was run again or a module reloaded."""
    return old is not new and _full_name(old) == _full_name(new) and "<locals>" not in old.__qualname__


class _Graph:
    """All components of a container and what each needs, checked as far as can be without building any."""

    def __init__(self, listed: Sequence[Any], provided: Mapping[Any, Any], overrides: Mapping[Any, Any]) -> None:
        self.nodes: list[_Node] = []
        self._by_class: dict[type[Any], _Node] = {}
        self._by_name: dict[str, _Node] = {}
        self._by_instance: dict[int, _Node] = {}
        self._by_override: dict[Any, _Node] = {}
        self._overrides = overrides
        self._later: deque[tuple[_Wish, str]] = deque()

        for key, value in provided.items():
            cls = key if isinstance(key, type) else type(value)
            mark = Component("Provided", key if isinstance(key, str) else key.__name__, cls)
            self._enter(mark, value, provided=True, by_class=isinstance(key, type))
        self._listed = [self._enter(_mark_of(source), source) for source in listed]
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
                wish, name = self._later.popleft()
                self._need(wish, self._named(name, wish))
        for key in overrides:
            if key not in self._by_override:
                raise InjectionError(
                    f"override({_shown(key)}, …) replaces nothing: no component is listed or injected as "
                    f"{_shown(key)}.{self._known()}"
                )
        self.order = self._sorted()

    def _enter(
        self,
        mark: Component,
        source: Any,
        wish: _Wish | None = None,
        *,
        provided: bool = False,
        by_name: bool = True,
        by_class: bool = True,
    ) -> _Node:
        node = _Node(mark, source, wish, mark.cls, provided)
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

    def _replace(self, node: _Node, key: Any) -> None:
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

    def _stand_in(self, key: Any, wish: _Wish) -> _Node:
        """The node of an override for which there is no component, only fields that ask for it."""
        node = self._by_override.get(key)
        if node is None:
            named = isinstance(key, (str, type))
            cls = key if isinstance(key, type) else object
            mark = Component("Service", key if isinstance(key, str) else _shown(key), cls)
            node = self._enter(mark, None, wish, by_name=named, by_class=isinstance(key, type))
            if not named:
                self._replace(node, key)
        return node

    def _bind(self, node: _Node) -> None:
        if node.provided:
            return
        cls = node.component.cls
        if node.constructed:
            _check_constructor(cls, node.wish)
        for name, injected in _injected_fields(cls).items():
            if not node.constructed and _set_by_hand(node.source, name):
                continue
            node.fields[name] = injected
            wish, target = _Wish(node, name), injected.target
            if isinstance(target, type):
                self._need(wish, self._of_class(target, wish))
            elif isinstance(target, str):
                self._later.append((wish, target))
            elif isinstance(target, Hashable) and target in self._overrides:
                self._need(wish, self._stand_in(target, wish))
        for required in node.component.requires:
            wish = _Wish(node, None)
            if isinstance(required, type):
                self._of_class(required, wish)
            elif id(required) not in self._by_instance:
                # It has no name of its own: two namespaces may each require their own RateLimit(…).
                mark = component_of(type(required))
                if mark is None:
                    raise _no_component(type(required), wish)
                self._enter(mark, required, wish, by_name=False, by_class=False)

    def _need(self, wish: _Wish, node: _Node) -> None:
        assert wish.field is not None
        wish.node.needs[wish.field] = node

    def _existing(self, cls: type[Any], wish: _Wish | None) -> _Node | None:
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
            what = f"several listed components are a {cls.__name__}: {names}; inject one of these instead{also}"
            raise _error(what, wish)
        return derived[0] if derived else None

    def _of_class(self, cls: type[Any], wish: _Wish) -> _Node:
        node = self._existing(cls, wish)
        if node is not None:
            return node
        mark = component_of(cls)
        if mark is not None:
            return self._enter(mark, cls, wish)
        if cls in self._overrides:
            return self._stand_in(cls, wish)
        raise _no_component(cls, wish)

    def _named(self, name: str, wish: _Wish | None) -> _Node:
        node = self._by_name.get(name)
        if node is not None:
            return node
        if name in self._overrides and wish is not None:
            return self._stand_in(name, wish)
        by_class_name = {node.label: node.component.name for node in self._by_name.values()}
        if name in by_class_name:
            hint = f" The class {name} is a component under the name {by_class_name[name]!r}."
        else:
            close = difflib.get_close_matches(name, [*self._by_name, *by_class_name], n=1)
            hint = f" Did you mean {by_class_name.get(close[0], close[0])!r}?" if close else ""
        raise _error(
            f"no component is named {name!r}.{hint}{self._known()} A name finds only what is listed in "
            "AsenaServer(…) or injected by class somewhere: list the component, or inject its class",
            wish,
        )

    def _known(self) -> str:
        names = sorted(self._by_name)
        shown = ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        return f" There is {shown}." if names else " There are none."

    def _clash(self, name: str, first: _Node, second: _Node) -> InjectionError:
        def described(node: _Node) -> str:
            if node.provided:
                what = "what was provided as"
            else:
                what = "the class" if node.constructed else "an instance of"
            by = f" (injected by {node.wish.path()})" if node.wish else ""
            return f"{what} {_full_name(node.listed_as)}{by}"

        both = f"two components are named {name!r}: {described(first)} and {described(second)}"
        if first.listed_as is second.listed_as:
            way_out = "a server has one of each: pass it once, or derive a class with a decorator of its own"
        elif _redefined(first.listed_as, second.listed_as):
            way_out = (
                "the class was defined again after the first was used (a cell re-run, a module reloaded): "
                "run the cells that inject it again too, or inject it by name"
            )
        else:
            way_out = "give one of them another name in its decorator"
        what = f"{both}; {way_out}"
        wish = second.wish or first.wish
        return _error(what, wish) if wish else InjectionError(what, component=second.label)

    def _sorted(self) -> tuple[_Node, ...]:
        sorter: TopologicalSorter[_Node] = TopologicalSorter()
        for node in self.nodes:
            sorter.add(node, *node.needs.values())
        try:
            return tuple(node for node in sorter.static_order() if not node.provided)
        except CycleError as error:
            # graphlib lists what is needed before what needs it.
            raise self._circle(list(reversed(error.args[1]))[:-1]) from None

    def _circle(self, circle: list[_Node]) -> CircularDependencyError:
        first = min(range(len(circle)), key=lambda index: self.nodes.index(circle[index]))
        circle = circle[first:] + circle[:first]
        steps: list[tuple[_Node, str, _Node]] = []
        for node, needed in zip(circle, [*circle[1:], circle[0]], strict=True):
            steps.append((node, next(name for name, other in node.needs.items() if other is needed), needed))
        path = " -> ".join([*(f"{node.label}.{name}" for node, name, _ in steps), circle[0].label])
        way_out = (
            "move what both need into a third component, or, where one only sends to the other's sockets, "
            'write Inject(ulak("/path")), which is no dependency'
        )
        if len(circle) == 1:
            way_out = f"{circle[0].label} needs no injection to reach itself; use self"
        else:
            for node, name, needed in steps:
                reached_by = _websocket_path(needed.component.cls)
                if reached_by is not None:
                    way_out = (
                        f'in {node.label}, write {name}: UlakNamespace = Inject(ulak("{reached_by}")) '
                        f"instead of {node.fields[name]!r}: it reaches the sockets by their path, and is no "
                        "dependency"
                    )
                    break
        return CircularDependencyError(
            f"these components need each other to be built first: {path}. To break the circle, {way_out}",
            cycle=[*(node.label for node in circle), circle[0].label],
            component=steps[0][0].label,
            field=steps[0][1],
        )

    def find(self, target: Any) -> _Node | None:
        """The node that stands for ``target``, or None for a reference."""
        if isinstance(target, str):
            return self._named(target, None)
        if isinstance(target, type):
            node = self._existing(target, None)
            if node is None:
                raise InjectionError(f"no component is a {target.__name__}.{self._known()}")
            return node
        return self._by_override.get(target) if isinstance(target, Hashable) else None


def _mark_of(source: Any) -> Component:
    cls = source if isinstance(source, type) else type(source)
    mark = component_of(cls)
    if mark is None:
        raise _no_component(cls)
    return mark


def _websocket_path(cls: type[Any]) -> str | None:
    path = getattr(getattr(cls, "__asena_websocket__", None), "path", None)
    return path if isinstance(path, str) else None


def _check_constructor(cls: type[Any], wish: _Wish | None) -> None:
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
        if isinstance(parameter.default, _Injected) and parameter.name not in _injected_fields(cls):
            raise InjectionError(
                f"{cls.__name__}: {parameter.default!r} is the default of the constructor's argument "
                f"{parameter.name!r}, where nothing is injected; write it in the class body: "
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
        needed = f" (it is injected by {wish.path()})" if wish else ""
        raise InjectionError(
            f"the constructor of {cls.__name__} needs {', '.join(map(repr, missing))}, but a component is "
            f"constructed without arguments{needed}: pass an instance, AsenaServer({cls.__name__}(…)), or "
            f"make a field of it: {missing[0]}: X = Inject(X)",
            component=cls.__name__,
        )


_MOMENT = 0.1  # seconds for an ``on_stop`` when the time is over


class Container:
    """The components of one server.

    ``add`` what is listed, ``provide`` what exists already, ``override`` in tests; then ``build`` makes every
    component, and ``start`` and ``stop`` run their ``on_start`` and ``on_stop``, both on the same event loop.
    """

    def __init__(self, *components: Any) -> None:
        self._listed: list[Any] = []
        self._provided: dict[type[Any] | str, Any] = {}
        self._overrides: dict[Any, Any] = {}
        self._graph: _Graph | None = None
        self._is_built = False
        self._running = False
        self._started: list[_Node] = []
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
        ``InjectionError`` if the class is no component, ``ServerStateError`` once built.
        """
        self._still_open("add")
        origin = get_origin(item)
        if isinstance(origin, type):
            item = origin
        if isinstance(item, (str, types.FunctionType, types.ModuleType)):
            raise InjectionError(f"a component is a class or an instance of it, not {item!r}")
        _mark_of(item)
        if not any(item is other for other in self._listed):
            self._listed.append(item)

    @overload
    def provide(self, key: type[T], instance: T) -> None: ...
    @overload
    def provide(self, key: str, instance: object) -> None: ...
    def provide(self, key: type[Any] | str, instance: object) -> None:
        """Let ``Inject(key)`` give this existing object; a class can then also be asked for by its name.

        It is no component: nothing is injected into it, and it is neither started nor stopped here. Raises
        ``InjectionError`` if the key has another object already, ``ServerStateError`` once built.
        """
        self._still_open("provide")
        if self._provided.setdefault(key, instance) is not instance:
            raise InjectionError(f"{_shown(key)} is already provided")

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
        key = _Injected(target, None).target
        if not isinstance(key, Hashable):
            raise InjectionError(f"{key!r} cannot be overridden: it is not hashable")
        self._overrides[key] = replacement

    def _still_open(self, what: str) -> None:
        if self._graph is not None:
            raise ServerStateError(f"{what}() comes before the start; these components are already built")

    def build(self) -> None:
        """Find, check and construct every component, and fill in its fields. Does nothing the second time.

        Nothing is constructed unless all can be: raises ``InjectionError`` for an unknown name, two
        components with one name, a class that is no component and a constructor that needs arguments, and
        its subclass ``CircularDependencyError`` for a cycle. What a constructor, a reference or a ``select``
        raises comes through, with a note of where.
        """
        if self._is_built:
            return
        self._graph = _Graph(self._listed, self._provided, self._overrides)
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

    def _inject(self, node: _Node) -> None:
        if not node.fields:
            return
        values = getattr(node.instance, "__dict__", None)
        if not isinstance(values, dict):
            raise InjectionError(
                f"{node.label} has no room for {', '.join(node.fields)}: leave out its __slots__, or add "
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
                error.add_note(f"while injecting {_Wish(node, name).path()} = {injected!r}")
                raise
            # Not setattr: a frozen dataclass, or a __setattr__ of the user's, has no say in this.
            values[name] = value
            values.setdefault(_INJECTED, {})[name] = value

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
        key = _Injected(target, None).target
        node = self._graph.find(key)
        if node is None:
            return key.resolve(self)
        if node.instance is _UNSET:
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
            inherited = {id(node.instance) for node in running._started} if running is not None else set()
            for node in self._graph.order:
                try:
                    if id(node.instance) not in inherited:
                        await _run(node, "on_start")
                except BaseException as error:
                    error.add_note(f"raised by {node.label}.on_start(); nothing was left started")
                    await self._stop_started()
                    raise
                self._started.append(node)
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
                inherited = {id(node.instance) for node in successor._started}
                self._started = [node for node in self._started if id(node.instance) not in inherited]
            await self._stop_started(until)

    async def _stop_started(self, until: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        while self._started:
            node = self._started.pop()
            limit = None if until is None else max(until, loop.time() + _MOMENT)
            try:
                async with asyncio.timeout_at(limit) as waiting:
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


def _construct(node: _Node) -> Any:
    try:
        return node.source()
    except Exception as error:
        needed = f", which {node.wish.path()} needs" if node.wish else ""
        error.add_note(f"while constructing {node.label}{needed}")
        raise


async def _run(node: _Node, hook: str) -> None:
    # Looked up on the class, as special methods are: a mock or a proxy has every attribute one asks it for.
    if not hasattr(node.component.cls, hook):
        return
    result = getattr(node.instance, hook)()
    if inspect.isawaitable(result):
        await result
