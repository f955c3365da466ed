"""What users write: `Service`, `Inject`, and the mark that a decorator leaves on a class."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_origin, overload, runtime_checkable

from ..errors import ConfigurationError, HookNameWarning, InjectionError

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
_MARKS = ("__asena_routes__", "__asena_on__", "__asena_every__")  # of methods that decorators have found a use for


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
        raise ConfigurationError(f"@{kind} on {cls.__name__}: a name must be a non-empty string, not {name!r}")
    earlier = component_of(cls)
    if earlier is not None and earlier.kind != kind:
        raise ConfigurationError(
            f"{cls.__name__} is already a @{earlier.kind} and cannot also be a @{kind}: keep one of the two"
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
        raise ConfigurationError(f"{cls.__name__}.{name} is a method: its first parameter must be self")


def listed(middlewares: Sequence[Any], decorator: str) -> tuple[Any, ...]:
    """The ``middlewares`` that a decorator was given. Raises `ConfigurationError` for what cannot be middleware."""
    given: object = middlewares  # whatever the annotation says
    if not isinstance(given, list | tuple):
        raise ConfigurationError(f"{decorator}: middlewares must be a list, middlewares=[…], not {given!r}")
    for each in given:
        if inspect.isroutine(each) or isinstance(each, functools.partial):
            raise ConfigurationError(
                f"{decorator}: {getattr(each, '__name__', each)} is a function, but middleware must be a class: "
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
        # A method that the class calls itself is not meant as a hook: the server calls those.
        if (
            _distance(name.lower(), near) <= 2
            and not _calls(cls, name)
            and not any(map(method.__dict__.__contains__, _MARKS))
        ):
            warnings.warn(
                f"{cls.__name__}.{name} is never called by the server: did you mean {near}? "
                "(If it is a method of your own, give it another name, or one that begins with _)",
                HookNameWarning,
                stacklevel=_outside(),
            )


def _calls(cls: type[Any], name: str) -> bool:
    """Whether one of the class's own methods mentions ``name``, and so may call it."""
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
    """How many letters have to be added, left out, changed or swapped with the next to turn one name into the other."""
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

        @Service
        class Orders:
            news: UlakNamespace = Inject(ulak("/orders"))

    Its methods ``on_start`` and ``on_stop``, sync or async, are run on the server's loop, if there are any:
    ``on_start`` when everything injected has started, ``on_stop`` before any of that stops.

    Args:
        name: What it is injected by, as in ``@Service("Orders")``; by default the class's name. ``@Service`` without
            parentheses works, too.

    Raises:
        ConfigurationError: This is not above a class, or the class has another such decorator.
    """
    if isinstance(name, type):
        return component(name, kind="Service")
    if inspect.isroutine(name):
        raise ConfigurationError(f"@Service goes above a class, not the function {name.__name__}")
    return lambda cls: component(cls, kind="Service", name=name)


class Provider(Protocol):
    """The container, as a `Reference` sees it."""

    @overload
    def get(self, target: type[T]) -> T: ...
    @overload
    def get(self, target: str) -> Any: ...
    def get(self, target: Any) -> Any:
        """What ``Inject(target)`` gives."""
        ...


@runtime_checkable
class Reference(Protocol[T_co]):
    """Something to inject that is looked up rather than built, like ``ulak("/path")``; it is not a dependency.

    ``resolve`` is called while the components are being built. It may ``get`` from the container what was
    provided to it, but no component, as nothing promises that one is built by then. To be overridden in
    tests, a reference has to be hashable.
    """

    def resolve(self, container: Provider, /) -> T_co:
        """Return what is injected in place of the reference."""
        ...


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
    """Declare a field of a component that the server fills in.

        @Service
        class Orders:
            chat: ChatSocket = Inject(ChatSocket)

    The value is there after ``__init__``, and so in ``on_start``. A value may be assigned by hand, in a unit test for
    instance; an instance that is passed to the server keeps it.

    Args:
        target: What to inject, one of:

            - a class: the component listed of that class, otherwise the only one listed that derives from it,
                otherwise, if the class is a component, one that is built for this: what is injected need not be listed;
            - ``AsenaServer`` or ``Ulak``: the server that the component runs in, and what sends to its namespaces;
            - the name of a component that is listed, or injected by its class somewhere;
            - a reference such as ``ulak("/path")``, which is not a dependency.
        select: Makes the value from that: ``Inject(Ulak, lambda ulak: ulak.namespace("/chat"))``.

    Raises:
        InjectionError: ``target`` is something else. Reading the field before it was filled in raises it, too.
    """
    return Injected(target, select)


class Injected:
    """What `Inject` returns. It defines no ``__set__``, so a value in the instance hides it."""

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
            raise InjectionError(f"Inject({shown(target)}, …) takes a function as its second argument, not {select!r}")
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
        return f"Inject({shown(self.target)}{', …' if self.select else ''})"


class _NotInjected(InjectionError, AttributeError):
    # Also an AttributeError, so that hasattr(), inspect and a notebook's completion can look at the instance.
    pass


def shown(target: object) -> str:
    """What can be injected, for an error."""
    return target.__name__ if isinstance(target, type) else repr(target)


def injected_fields(cls: type[Any]) -> dict[str, Injected]:
    """The fields of a class that the server fills in, inherited ones included."""
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        found.update(vars(base))
    return {name: value for name, value in found.items() if isinstance(value, Injected)}


def set_by_hand(instance: object, name: str) -> bool:
    """Whether the field of an instance has a value that no container has put there."""
    values: Mapping[str, object] = getattr(instance, "__dict__", {})
    value = values.get(name, _UNSET)
    if value is _UNSET or isinstance(value, Injected):  # a dataclass copies the default into its instances
        return False
    # An earlier server may have injected it; this one has its own to give.
    ours: Any = values.get(_INJECTED, {})
    return value is not ours.get(name, _UNSET)


def fill_in(values: dict[str, Any], name: str, value: object) -> None:
    """Put a value into the ``__dict__`` of an instance, and note that it was not set by hand."""
    # Not setattr: a frozen dataclass, or a __setattr__ of the user's, has no say in this.
    values[name] = value
    values.setdefault(_INJECTED, {})[name] = value


__all__ = [
    "Component",
    "Inject",
    "Injected",
    "Provider",
    "Reference",
    "Service",
    "component",
    "component_of",
    "fill_in",
    "injected_fields",
    "listed",
    "needs_self",
    "set_by_hand",
    "shown",
]
