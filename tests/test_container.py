"""Components: how they are found, checked, built once, injected, started and stopped."""

from __future__ import annotations

import asyncio
import inspect
import logging
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, assert_type
from unittest.mock import Mock

import pytest

from asena_tornado.errors import (
    CircularDependencyError,
    ConfigurationError,
    InjectionError,
    ServerStateError,
)
from asena_tornado.ioc.container import Container
from asena_tornado.ioc.inject import Component, Inject, Provider, Reference, Service, component, component_of

T = TypeVar("T")


def websocket(path: str, **options: Any) -> Callable[[type[T]], type[T]]:
    """What @WebSocket does, as far as the container is concerned."""

    def mark(cls: type[T]) -> type[T]:
        cls.__asena_websocket__ = types.SimpleNamespace(path=path)  # type: ignore[attr-defined]
        return component(cls, kind="WebSocket", **options)

    return mark


class Courier:
    """Stands for Ulak."""

    def namespace(self, path: str) -> str:
        return f"namespace {path}"


@dataclass(frozen=True)
class CourierTo:
    path: str

    def resolve(self, container: Provider) -> str:
        return container.get(Courier).namespace(self.path)


def courier(path: str) -> Reference[str]:
    return CourierTo(path)


def built(*components: Any) -> Container:
    container = Container(*components)
    container.build()
    return container


def refusal(*components: Any) -> InjectionError:
    with pytest.raises(InjectionError) as caught:
        built(*components)
    return caught.value


# Marking classes


def test_a_service_is_named_after_its_class_unless_told_otherwise():
    @Service
    class Bare: ...

    @Service()
    class Called: ...

    @Service("Users")
    class Positional: ...

    @Service(name="Mail")
    class Keyword: ...

    assert component_of(Bare) == Component("Service", "Bare", Bare)
    assert component_of(Called) == Component("Service", "Called", Called)
    assert component_of(Positional) == Component("Service", "Users", Positional)
    assert component_of(Keyword) == Component("Service", "Mail", Keyword)


def test_a_subclass_of_a_component_needs_a_decorator_of_its_own_and_the_error_says_so():
    @Service
    class Email: ...

    class FastEmail(Email): ...

    assert component_of(FastEmail) is None
    with pytest.raises(InjectionError, match=r"FastEmail is not a component: its base Email is a @Service.*above Fast"):
        Container(FastEmail)


def test_an_undecorated_class_is_an_error_that_names_the_decorator_to_add():
    class Email: ...

    class ChatSocket:
        __asena_decorator__ = '@WebSocket("/path")'

    @Service
    class UserService:
        email = Inject(Email)

    with pytest.raises(InjectionError, match=r"Email is not a component: put @Service above the class"):
        Container(Email())
    with pytest.raises(InjectionError, match=r'not a component: put @WebSocket\("/path"\) above the class$'):
        Container(ChatSocket)
    error = refusal(UserService)
    assert str(error).startswith("UserService.email: Email is not a component: put @Service above the class")
    assert (error.component, error.field) == ("UserService", "email")


@pytest.mark.parametrize("thing", ["ChatSocket", lambda: None, logging])
def test_what_is_neither_class_nor_instance_is_refused(thing):
    with pytest.raises(InjectionError, match="a component must be a class or an instance of one, not"):
        Container(thing)


@pytest.mark.parametrize("name", ["", "  ", 7])
def test_a_component_needs_a_proper_name(name):
    with pytest.raises(ConfigurationError, match=r"@Service on Nameless: a name must be a non-empty string"):

        @Service(name)
        class Nameless: ...


def test_a_decorator_for_classes_refuses_anything_else():
    with pytest.raises(ConfigurationError, match="@Service goes above a class"):

        @Service()  # type: ignore[type-var]  # the mistake under test
        def function(): ...


def test_two_kinds_on_one_class_are_refused_as_the_one_would_hide_the_other():
    with pytest.raises(ConfigurationError, match="ChatSocket is already a @WebSocket and cannot also be a @Serv"):

        @Service
        @websocket("/chat")
        class ChatSocket: ...


def test_a_dataclass_with_slots_above_the_decorator_is_still_a_component():
    @dataclass(slots=True)
    @Service
    class Settings:
        size: int = 3

    assert built(Settings).get(Settings).size == 3


# Injecting


def test_what_is_injected_need_not_be_listed_and_is_built_once():
    constructed = []

    @Service
    class Database:
        def __init__(self):
            constructed.append(self)

    @Service
    class Users:
        database = Inject(Database)

    @Service
    class Orders:
        users = Inject(Users)
        database = Inject(Database)

    container = built(Orders)
    orders = container.get(Orders)
    assert constructed == [orders.database]
    assert orders.users.database is orders.database


def test_components_come_in_dependency_order():
    @Service
    class Database: ...

    @Service
    class Users:
        database = Inject(Database)

    @Service
    class Orders:
        users = Inject("Users")

    container = built(Orders, Users)
    assert [mark.name for mark, _ in container.components] == ["Database", "Users", "Orders"]
    assert all(type(instance) is mark.cls for mark, instance in container.components)


def test_two_containers_share_nothing():
    @Service
    class Database: ...

    @Service
    class Users:
        database = Inject(Database)

    one, other = built(Users), built(Users)
    assert one.get(Users) is not other.get(Users)
    assert one.get(Database) is not other.get(Database)


def test_injection_by_name_finds_what_is_listed_or_reached_by_class():
    @Service("Mail")
    class Email: ...

    @Service
    class Users:
        mail = Inject("Mail")

    @Service
    class Orders:
        email = Inject(Email)

    container = built(Users, Orders)
    assert container.get(Users).mail is container.get("Mail") is container.get(Email)


def test_fields_of_base_classes_are_injected_and_can_be_replaced():
    @Service
    class Email: ...

    @Service
    class Sms: ...

    class Notifier:
        first: Any = Inject(Email)
        second: Any = Inject(Email)
        third: Any = Inject(Email)

    @Service
    class Loud(Notifier):
        second = Inject(Sms)
        third = None

    loud = built(Loud).get(Loud)
    assert isinstance(loud.first, Email)
    assert isinstance(loud.second, Sms)
    assert loud.third is None


def test_fields_are_there_in_on_start_but_not_yet_in_the_constructor():
    @Service
    class Email: ...

    @Service
    class Hasty:
        email = Inject(Email)

        def __init__(self):
            self.email  # noqa: B018 - the mistake under test

    with pytest.raises(
        InjectionError, match=r"Hasty.email is not injected yet.*read the field from on_start\(\) on"
    ) as caught:
        built(Hasty)
    assert "while constructing Hasty" in caught.value.__notes__


def test_a_component_constructed_by_hand_explains_its_empty_fields_and_takes_values():
    @Service
    class Email: ...

    @Service
    class Users:
        email: Any = Inject(Email)

    users = Users()
    with pytest.raises(
        InjectionError, match=r"Users.email is not injected yet: the instance was constructed by hand"
    ) as e:
        users.email  # noqa: B018 - the access is under test
    assert (e.value.component, e.value.field) == ("Users", "email")
    assert not hasattr(users, "email")  # so that a notebook's completion and inspect can look at it
    assert dict(inspect.getmembers(users)).get("email") is None

    users.email = "by hand"
    assert users.email == "by hand"


def test_a_class_in_use_shows_what_it_injects():
    @Service
    class Users:
        socket = Inject("ChatSocket")
        path = Inject(Courier, lambda it: it.namespace("/chat"))

    assert repr(Users.socket) == "Inject('ChatSocket')"
    assert repr(vars(Users)["path"]) == "Inject(Courier, …)"


def test_an_instance_is_taken_as_it_is():
    @Service
    class Email: ...

    @Service
    class Users:
        email = Inject(Email)

        def __init__(self, table: str) -> None:
            self.table = table

    users = Users("people")
    container = built(users)
    assert container.get(Users) is users
    assert isinstance(users.email, Email)


def test_an_instance_keeps_the_fields_that_were_set_by_hand_and_builds_nothing_for_them():
    @Service
    class Email:
        def __init__(self):
            raise AssertionError("the real one was built")

    @Service
    class Users:
        email: Any = Inject(Email)

    users = Users()
    users.email = "fake"
    container = built(users)
    assert users.email == "fake"
    assert len(container.components) == 1


def test_an_instance_used_by_a_second_server_gets_what_is_injected_there():
    @Service
    class Users:
        courier = Inject(Courier)

    users, couriers = Users(), [Courier(), Courier()]
    for mine in couriers:
        container = Container(users)
        container.provide(Courier, mine)
        container.build()
        assert users.courier is mine


def test_dataclasses_frozen_or_not_are_injected_into():
    @Service
    class Email: ...

    @Service
    @dataclass(frozen=True)
    class Users:
        table: str = "people"
        email: Any = Inject(Email)  # noqa: RUF009 - hidden by what is injected

    assert isinstance(built(Users).get(Users).email, Email)
    assert built(Users(email="fake")).get(Users).email == "fake"


def test_a_class_without_room_for_its_fields_is_told_so():
    class Base:
        __slots__ = ()

    @Service
    class Email: ...

    @Service
    class Users(Base):
        __slots__ = ()
        email = Inject(Email)

    error = refusal(Users)
    assert "Users cannot hold email: leave out its __slots__" in str(error)


def test_listing_the_same_thing_twice_changes_nothing():
    @Service
    class Email: ...

    email = Email()
    assert len(built(Email, Email).components) == 1
    assert len(built(email, email).components) == 1


def test_a_generic_component_is_found_by_its_alias():
    @Service
    class Repository(Generic[T]): ...

    @Service
    class Users:
        repository: Repository[int] = Inject(Repository[int])

    for container in (built(Users), built(Users, Repository[int])):
        assert container.get(Users).repository is container.get(Repository)
        assert len(container.components) == 2


def test_the_only_listed_component_that_derives_from_the_class_stands_for_it():
    class Storage(ABC):
        @abstractmethod
        def load(self) -> str: ...

    @Service
    class Disk(Storage):
        def load(self) -> str:
            return "from disk"

    @Service
    class Users:
        storage: Storage = Inject(Storage)

    container = built(Users, Disk)
    assert container.get(Users).storage.load() == "from disk"
    assert container.get(Storage) is container.get(Disk)


def test_a_listed_component_stands_for_its_own_class_even_where_others_derive_from_it():
    @Service
    class Email: ...

    @Service
    class FastEmail(Email): ...

    @Service
    class Users:
        email = Inject(Email)

    assert type(built(Users, FastEmail).get(Users).email) is FastEmail
    assert type(built(Users, FastEmail, Email).get(Users).email) is Email


def test_several_that_derive_from_the_class_are_an_error_that_names_them():
    @Service
    class Email: ...

    @Service
    class FastEmail(Email): ...

    @Service
    class SafeEmail(Email): ...

    @Service
    class Users:
        email = Inject(Email)

    error = refusal(Users, FastEmail, SafeEmail)
    assert str(error) == (
        "Users.email: several listed components are of the class Email: FastEmail, SafeEmail; "
        "inject one of these instead, or list Email too"
    )


def test_a_class_that_a_cell_defined_again_takes_the_place_of_the_old_one():
    cell = "@Service\nclass ChatSocket:\n    version = {}\n"
    notebook: dict[str, Any] = {"Service": Service, "Inject": Inject, "__name__": "__main__"}
    exec(cell.format(1), notebook)
    exec("@Service\nclass Users:\n    chat = Inject(ChatSocket)\n", notebook)
    exec(cell.format(2), notebook)  # only this cell is run again

    container = built(notebook["ChatSocket"], notebook["Users"])
    assert container.get("Users").chat.version == 2
    assert len(container.components) == 2


def test_two_definitions_of_one_class_that_are_both_injected_are_explained():
    notebook: dict[str, Any] = {"Service": Service, "Inject": Inject, "__name__": "__main__"}
    for user in ("Users", "Orders"):
        exec("@Service\nclass Chat: ...\n", notebook)
        exec(f"@Service\nclass {user}:\n    chat = Inject(Chat)\n", notebook)

    error = refusal(notebook["Users"], notebook["Orders"])
    assert "two components are named 'Chat'" in str(error)
    assert "run the cells that inject it again too" in str(error)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (42, r"Inject\(\) takes a component class, a component's name or ulak\(\"/path\"\), not 42"),
        ("", r"Inject\(\) takes a component class"),
        (courier, r"Inject\(\) takes a component class.*not <function courier"),
        (None, r"Inject\(\) takes a component class"),
    ],
)
def test_inject_refuses_what_it_cannot_look_up(target, message):
    with pytest.raises(InjectionError, match=message):
        Inject(target)


def test_inject_refuses_an_instance_and_a_select_that_cannot_be_called():
    @Service
    class Email: ...

    with pytest.raises(InjectionError, match=r"takes the class, Inject\(Email\), not an instance of Email"):
        Inject(Email())  # type: ignore[call-overload]  # the mistake under test
    with pytest.raises(InjectionError, match=r"Inject\(Email, …\) takes a function as its second argument, not 'name'"):
        Inject(Email, "name")  # type: ignore[call-overload]  # the mistake under test


# Provided objects, references, expressions


def test_a_provided_object_is_injected_by_class_and_name_and_is_not_a_component():
    class Started(Courier):
        def on_start(self):
            raise AssertionError("the container does not own it")

    @Service
    class Users:
        by_class = Inject(Courier)
        by_name = Inject("Courier")
        size = Inject("size")

    container, mine = Container(Users), Started()
    container.provide(Courier, mine)
    container.provide("size", 3)
    asyncio.run(container.start())
    users = container.get(Users)
    assert users.by_class is users.by_name is mine
    assert users.size == 3
    assert [mark.name for mark, _ in container.components] == ["Users"]


def test_a_key_is_provided_once():
    container, mine = Container(), Courier()
    container.provide(Courier, mine)
    container.provide(Courier, mine)
    with pytest.raises(InjectionError, match="Courier is already provided"):
        container.provide(Courier, Courier())


def test_a_component_with_the_name_of_a_provided_object_is_an_error():
    @Service("Courier")
    class Letter: ...

    container = Container(Letter)
    container.provide(Courier, Courier())
    with pytest.raises(InjectionError, match=r"two components are named 'Courier': what was provided as .*Courier and"):
        container.build()


def test_an_expression_selects_what_is_injected():
    @Service
    class Email:
        courier = Inject(Courier)
        sender = "post@example.org"

    @Service
    class Users:
        sender = Inject(Email, lambda email: email.sender)
        chat = Inject(Courier, lambda it: it.namespace("/chat"))
        inner = Inject("Email", lambda email: email.courier)
        length = Inject(courier("/chat"), len)

    container = Container(Users)
    container.provide(Courier, Courier())
    container.build()
    users = container.get(Users)
    assert users.sender == "post@example.org"
    assert users.chat == "namespace /chat"
    assert users.inner is container.get(Courier)  # what it selects from has its own fields by then
    assert users.length == len("namespace /chat")


def test_an_expression_that_fails_says_which_field_it_is():
    @Service
    class Email: ...

    @Service
    class Users:
        sender = Inject("Email", lambda email: email.missing)

    with pytest.raises(AttributeError, match="missing") as caught:
        built(Users, Email)
    assert caught.value.__notes__ == ["while injecting Users.sender = Inject('Email', …)"]


def test_a_reference_is_resolved_and_creates_no_dependency():
    @Service
    class Users:
        chat = Inject(courier("/chat"))

    @websocket("/chat")
    class ChatSocket:
        users = Inject(Users)

    container = Container(ChatSocket)
    container.provide(Courier, Courier())
    container.build()
    assert container.get(ChatSocket).users.chat == "namespace /chat"
    assert container.get(courier("/news")) == "namespace /news"


def test_a_reference_to_a_component_that_is_not_built_by_then_fails_clearly():
    class Early:
        def resolve(self, container: Provider) -> object:
            return container.get("Users")

    @Service
    class Email:
        users = Inject(Early())

    @Service
    class Users:
        email = Inject(Email)

    with pytest.raises(InjectionError, match="Users is not built yet") as caught:
        built(Users)
    assert "while injecting Users.email -> Email.users = Inject(" in caught.value.__notes__[0]


def test_type_checkers_see_the_type_of_what_is_injected():
    class Storage(ABC):
        @abstractmethod
        def load(self) -> str: ...

    @Service
    class Email:
        sender = "post@example.org"

    @Service
    class Users:
        email = Inject(Email)
        declared: Email = Inject(Email)
        storage = Inject(Storage)
        sender = Inject(Email, lambda email: email.sender)
        chat = Inject(courier("/chat"))
        size = Inject(courier("/chat"), lambda text: len(text))
        named = Inject("Email")

    def checked(users: Users, container: Container) -> None:
        assert_type(users.email, Email)
        assert_type(users.declared, Email)
        assert_type(users.storage, Storage)
        assert_type(users.sender, str)
        assert_type(users.chat, str)
        assert_type(users.size, int)
        assert_type(users.named, Any)
        assert_type(container.get(Email), Email)
        assert_type(container.get(courier("/chat")), str)
        assert_type(container.get("Email"), Any)

    assert callable(checked)


# What cannot be built


def test_an_unknown_name_is_an_error_that_names_the_field_and_suggests_a_close_one():
    @Service
    class EmailService: ...

    @Service
    class UserService:
        email = Inject("EmailServce")

    error = refusal(UserService, EmailService)
    assert str(error).startswith("UserService.email: no component is named 'EmailServce'. Did you mean 'EmailService'?")
    assert "There is 'EmailService', 'UserService'." in str(error)
    assert (error.component, error.field) == ("UserService", "email")


def test_an_unknown_name_that_is_a_class_name_is_told_the_right_one():
    @Service("Mail")
    class EmailService: ...

    @Service
    class UserService:
        email = Inject("EmailService")

    assert "The class EmailService is a component under the name 'Mail'." in str(refusal(UserService, EmailService))


def test_an_error_deep_down_shows_the_path_to_it():
    @Service
    class Email:
        relay = Inject("Relay")

    @Service
    class Users:
        email = Inject(Email)

    @Service
    class Admin:
        users = Inject(Users)

    error = refusal(Admin)
    assert str(error).startswith("Email.relay: no component is named 'Relay'.")
    assert str(error).endswith("(reached by Admin.users -> Users.email -> Email.relay)")


def test_two_components_with_one_name_are_an_error_that_names_both():
    @Service("Mail")
    class Email: ...

    @Service("Mail")
    class Letter: ...

    @Service
    class Post:
        letter = Inject(Letter)

    message = str(refusal(Email, Post))
    assert "two components are named 'Mail'" in message
    assert f"the class {Email.__module__}.{Email.__qualname__} and the class" in message
    assert f"{Letter.__qualname__} (injected by Post.letter)" in message
    assert "give one of them another name in its decorator" in message


def test_two_instances_of_one_class_are_an_error():
    @Service
    class Email: ...

    assert "a server has one of each" in str(refusal(Email(), Email()))
    assert "the class" in str(refusal(Email, Email()))


def test_a_constructor_that_needs_arguments_is_an_error_that_shows_the_ways_out():
    @Service
    class Email:
        def __init__(self, host: str, *, port: int, tls: bool = True) -> None: ...

    @Service
    class Users:
        email = Inject(Email)

    assert str(refusal(Users)) == (
        "the constructor of Email needs 'host', 'port', but a component is constructed without arguments "
        "(it is injected by Users.email): pass an instance, AsenaServer(Email(…)), or make a field of it: "
        "host: X = Inject(X)"
    )
    assert refusal(Email).component == "Email"
    assert len(built(Users, Email("localhost", port=25)).components) == 2


def test_inject_as_the_default_of_an_argument_is_an_error():
    @Service
    class Email: ...

    @Service
    class Users:
        def __init__(self, email: Email = Inject(Email)) -> None: ...  # noqa: B008 - the mistake under test

    assert "write it in the class body, email = Inject(Email)" in str(refusal(Users))


def test_an_abstract_component_is_not_constructed():
    @Service
    class Storage(ABC):
        @abstractmethod
        def load(self) -> str: ...

    assert "Storage is abstract and cannot be constructed: list a component that derives" in str(refusal(Storage))


def test_what_a_constructor_raises_comes_through_with_a_note():
    @Service
    class Email:
        def __init__(self):
            raise OSError("no route to host")

    @Service
    class Users:
        email = Inject(Email)

    with pytest.raises(OSError, match="no route to host") as caught:
        built(Users)
    assert caught.value.__notes__ == ["while constructing Email, which Users.email needs"]


def test_nothing_is_constructed_if_something_cannot_be():
    @Service
    class Email:
        def __init__(self):
            raise AssertionError("built in vain")

    @Service
    class Users:
        email = Inject(Email)
        relay = Inject("Relay")

    assert "'Relay'" in str(refusal(Users))


# Circles


def test_a_cycle_is_printed_and_ulak_suggested_with_the_path_at_hand():
    @Service
    class UserService:
        socket: Any = Inject("NotificationSocket")

    @websocket("/notifications")
    class NotificationSocket:
        users = Inject(UserService)

    with pytest.raises(CircularDependencyError) as caught:
        built(NotificationSocket, UserService)
    error = caught.value
    assert str(error) == (
        "these components need each other to be built first: "
        "NotificationSocket.users -> UserService.socket -> NotificationSocket. To break the circle, "
        'in UserService, write socket: UlakNamespace = Inject(ulak("/notifications")) instead of '
        "Inject('NotificationSocket'): it reaches the sockets by their path, and is not a dependency"
    )
    assert error.cycle == ("NotificationSocket", "UserService", "NotificationSocket")
    assert (error.component, error.field) == ("NotificationSocket", "users")


def test_a_cycle_among_services_suggests_a_third_component_or_ulak():
    @Service
    class A:
        b: Any = Inject("B")

    @Service
    class B:
        c: Any = Inject("C")

    @Service
    class C:
        a = Inject(A)

    @Service
    class Entry:
        c = Inject(C)

    with pytest.raises(CircularDependencyError, match=r'third component.*Inject\(ulak\("/path"\)\)') as caught:
        built(Entry, A, B)
    assert "first: A.b -> B.c -> C.a -> A." in str(caught.value)
    assert caught.value.cycle == ("A", "B", "C", "A")


def test_a_component_that_injects_itself_is_a_cycle():
    @Service
    class Lonely:
        me: Any = Inject("Lonely")

    with pytest.raises(CircularDependencyError, match=r"Lonely.me -> Lonely\..*use self") as caught:
        built(Lonely)
    assert caught.value.cycle == ("Lonely", "Lonely")


def test_what_a_component_requires_is_built_with_it_but_closes_no_cycle():
    @component_kind("Middleware")
    class Authentication:
        users: Any = Inject("Users")

    @component_kind("Middleware")
    class RateLimit:
        users: Any = Inject("Users")

        def __init__(self, limit: int) -> None:
            self.limit = limit

    strict, lax = RateLimit(1), RateLimit(100)

    @websocket("/chat", requires=[Authentication, strict])
    class ChatSocket: ...

    @websocket("/news", requires=[Authentication, lax, lax])
    class NewsSocket: ...

    @Service
    class Users:
        chat = Inject(ChatSocket)
        news = Inject(NewsSocket)

    container = built(Users)
    users = container.get(Users)
    assert container.get(Authentication).users is users
    assert strict.users is lax.users is users
    assert sorted(mark.name for mark, _ in container.components) == [
        "Authentication",
        "ChatSocket",
        "NewsSocket",
        "RateLimit",
        "RateLimit",
        "Users",
    ]


def component_kind(kind: str) -> Callable[[type[T]], type[T]]:
    return lambda cls: component(cls, kind=kind)


def test_what_a_component_requires_has_to_be_a_component_too():
    class Plain: ...

    for required in (Plain, Plain()):

        @websocket("/chat", requires=[required])
        class ChatSocket: ...

        assert str(refusal(ChatSocket)).startswith("ChatSocket: Plain is not a component")


# Overrides


@pytest.fixture
def mail():
    """A service that needs a mailer, which needs a relay; neither may be built in a test."""

    def forbidden(self):
        raise AssertionError(f"{type(self).__name__} was built")

    @Service
    class Relay:
        __init__ = forbidden

    @Service("Mail")
    class Email:
        relay = Inject(Relay)
        __init__ = forbidden

    @Service
    class Users:
        email: Any = Inject(Email)
        named: Any = Inject("Mail")

    return types.SimpleNamespace(Users=Users, Email=Email, Relay=Relay)


@pytest.mark.parametrize("by", ["class", "name"])
@pytest.mark.parametrize("listed", [True, False])
def test_an_override_takes_the_place_of_a_component_that_is_then_never_built(mail, by, listed):
    fake = Mock()
    container = Container(mail.Users, *([mail.Email] if listed else []))
    container.override(mail.Email if by == "class" else "Mail", fake)
    container.build()
    users = container.get(mail.Users)
    assert users.email is users.named is fake
    assert container.get(mail.Email) is container.get("Mail") is fake
    assert [(mark.name, instance) for mark, instance in container.components] == [
        ("Mail", fake),
        ("Users", users),
    ]


async def test_an_override_with_a_class_is_constructed_injected_started_and_stopped(mail):
    log = []

    class FakeEmail:
        courier = Inject(Courier)

        def on_start(self):
            log.append(f"start with {self.courier.namespace('/chat')}")

        async def on_stop(self):
            log.append("stop")

    container = Container(mail.Users)
    container.provide(Courier, Courier())
    container.override(mail.Email, FakeEmail)
    await container.start()
    await container.stop()
    assert isinstance(container.get(mail.Users).email, FakeEmail)
    assert log == ["start with namespace /chat", "stop"]


def test_the_last_override_of_a_target_counts(mail):
    container = Container(mail.Users)
    container.override(mail.Email, "first")
    container.override(mail.Email, "last")
    container.build()
    assert container.get(mail.Users).email == "last"


def test_an_override_by_a_base_class_replaces_what_stands_for_it():
    class Storage: ...

    @Service
    class Disk(Storage):
        def __init__(self):
            raise AssertionError("built")

    @Service
    class Users:
        storage = Inject(Storage)

    container = Container(Users, Disk)
    container.override(Storage, "fake")
    container.build()
    assert container.get("Users").storage == container.get("Disk") == "fake"


def test_an_override_can_supply_what_is_only_injected():
    class Protocol: ...

    @Service
    class Users:
        by_class: Any = Inject(Protocol)
        by_name = Inject("Mail")
        chat = Inject(courier("/chat"))

    container = Container(Users)
    container.override(Protocol, "a")
    container.override("Mail", "b")
    container.override(courier("/chat"), "c")
    container.build()
    users = container.get(Users)
    assert (users.by_class, users.by_name, users.chat) == ("a", "b", "c")
    assert container.get(courier("/chat")) == "c"


def test_an_override_replaces_a_provided_object_for_references_too():
    class FakeCourier(Courier):
        def namespace(self, path: str) -> str:
            return f"fake {path}"

    @Service
    class Users:
        chat = Inject(courier("/chat"))

    container = Container(Users)
    container.provide(Courier, Courier())
    container.override(Courier, FakeCourier())
    container.build()
    assert container.get(Users).chat == "fake /chat"


def test_an_override_has_its_own_kind_or_that_of_its_base_and_the_name_of_what_it_replaces():
    @websocket("/chat")
    class ChatSocket: ...

    class FakeSocket(ChatSocket): ...

    @websocket("/fake", name="Fake")
    class Decorated: ...

    for fake, kind in ((FakeSocket, "WebSocket"), (Decorated, "WebSocket"), (object(), "Service")):
        container = Container(ChatSocket)
        container.override(ChatSocket, fake)
        container.build()
        assert [(mark.kind, mark.name) for mark, _ in container.components] == [(kind, "ChatSocket")]


def test_an_override_of_nothing_is_an_error_that_names_what_there_is(mail):
    class Unrelated: ...

    for target, shown in (
        ("Mial", "'Mial'"),
        (Unrelated, "Unrelated"),
        (courier("/x"), "CourierTo(path='/x')"),
    ):
        container = Container(mail.Users)
        container.override(target, Mock())
        with pytest.raises(InjectionError) as caught:
            container.build()
        assert f"override({shown}, …) replaces nothing" in str(caught.value)
        assert "There is 'Mail', 'Relay', 'Users'." in str(caught.value)


def test_a_reference_that_is_not_hashable_cannot_be_overridden():
    @dataclass
    class Unhashable:
        path: str = "/chat"

        def resolve(self, container: Provider) -> str:
            return self.path

    with pytest.raises(InjectionError, match="cannot be overridden: it is not hashable"):
        Container().override(Unhashable(), "fake")


# Starting and stopping


def recorder(log: list[str]) -> tuple[type[Any], type[Any], type[Any]]:
    """Three services in a row, A needs B needs C, that log what is done to them."""

    class Logged:
        def on_start(self) -> None:
            log.append(f"start {type(self).__name__}")

        async def on_stop(self) -> None:
            log.append(f"stop {type(self).__name__}")

    @Service
    class C(Logged): ...

    @Service
    class B(Logged):
        c = Inject(C)

        async def on_start(self) -> None:  # type: ignore[override]  # either way will do
            assert self.c is not None
            await asyncio.sleep(0)
            super().on_start()

        def on_stop(self) -> None:  # type: ignore[override]
            log.append("stop B")

    @Service
    class A(Logged):
        b = Inject(B)

    return A, B, C


async def test_start_runs_in_dependency_order_and_stop_in_reverse_each_once():
    log: list[str] = []
    container = Container(*recorder(log))
    await asyncio.gather(container.start(), container.start())
    await container.start()
    assert log == ["start C", "start B", "start A"]
    log.clear()
    await asyncio.gather(container.stop(), container.stop())
    await container.stop()
    assert log == ["stop A", "stop B", "stop C"]


async def test_a_stop_without_a_start_does_nothing():
    log: list[str] = []
    container = Container(*recorder(log))
    await container.stop()
    assert log == []


async def test_a_stopped_container_starts_again_with_the_same_instances():
    log: list[str] = []
    container = Container(*recorder(log))
    await container.start()
    before = container.components
    await container.stop()
    await container.start()
    assert container.components == before
    assert log.count("start A") == 2


async def test_a_failing_on_start_stops_what_had_started_and_names_the_component():
    log: list[str] = []
    _, b, _ = recorder(log)

    @Service
    class Failing:
        before = Inject(b)

        async def on_start(self):
            raise OSError("no database")

    container = Container(Failing)
    with pytest.raises(OSError, match="no database") as caught:
        await container.start()
    assert caught.value.__notes__ == ["raised by Failing.on_start(); the components that had started were stopped"]
    assert log == ["start C", "start B", "stop B", "stop C"]
    assert container.get(b) is container.get(Failing).before

    log.clear()
    await container.stop()
    assert log == []


async def test_a_cancelled_start_stops_what_had_started():
    log: list[str] = []
    _, b, _ = recorder(log)
    waiting = asyncio.Event()

    @Service
    class Endless:
        before = Inject(b)

        async def on_start(self):
            waiting.set()
            await asyncio.Event().wait()

    start = asyncio.create_task(Container(Endless).start())
    await waiting.wait()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert log == ["start C", "start B", "stop B", "stop C"]


async def test_every_on_stop_runs_and_failures_are_logged(caplog):
    log: list[str] = []
    _, b, _ = recorder(log)

    @Service
    class Failing:
        before = Inject(b)

        def on_stop(self):
            raise OSError("disk full")

    @Service
    class Cancelling:
        failing = Inject(Failing)

        async def on_stop(self):
            task = asyncio.create_task(asyncio.Event().wait())
            task.cancel()
            await task

    container = Container(Cancelling)
    await container.start()
    log.clear()
    await container.stop()
    assert log == ["stop B", "stop C"]
    assert [record.getMessage() for record in caplog.records] == [
        "Cancelling.on_stop() failed",
        "Failing.on_stop() failed",
    ]
    assert {record.name for record in caplog.records} == {"asena_tornado"}
    assert "disk full" in caplog.text


async def test_after_a_cancelled_stop_another_one_carries_on():
    log: list[str] = []
    _, b, _ = recorder(log)
    waiting = asyncio.Event()

    @Service
    class Endless:
        before = Inject(b)

        async def on_stop(self):
            waiting.set()
            await asyncio.Event().wait()

    container = Container(Endless)
    await container.start()
    log.clear()
    stop = asyncio.create_task(container.stop())
    await waiting.wait()
    stop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stop
    await container.stop()
    assert log == ["stop B", "stop C"]


async def test_a_mock_or_a_proxy_is_not_asked_for_hooks_its_class_does_not_have():
    @Service
    class Email: ...

    @Service
    class Users:
        email = Inject(Email)

    fake, container = Mock(), Container(Users)
    container.override(Email, fake)
    await container.start()
    await container.stop()
    assert fake.mock_calls == []


# States


def test_before_the_build_there_is_nothing_and_after_it_nothing_is_added():
    @Service
    class Email: ...

    container = Container(Email)
    assert list(container.components) == []
    assert repr(container) == "<Container: 1 component, not built>"
    with pytest.raises(ServerStateError, match="no components before the start"):
        container.get(Email)

    container.build()
    container.build()
    assert len(container.components) == 1
    assert repr(container) == "<Container: 1 component, built>"
    for late in (
        lambda: container.add(Email),
        lambda: container.provide("size", 3),
        lambda: container.override(Email, Mock()),
    ):
        with pytest.raises(ServerStateError, match="before the start"):
            late()


def test_a_failed_build_can_be_put_right():
    @Service
    class Email: ...

    @Service
    class Users:
        email = Inject("Email")

    container = Container(Users)
    with pytest.raises(InjectionError):
        container.build()
    container.add(Email)
    container.build()
    assert isinstance(container.get(Users).email, Email)


def test_get_of_what_is_not_there_names_what_there_is():
    @Service
    class Email: ...

    container = built(Email)
    with pytest.raises(InjectionError, match=r"no component is of the class Courier. There is 'Email'."):
        container.get(Courier)
    with pytest.raises(InjectionError, match=r"no component is named 'Emial'. Did you mean 'Email'"):
        container.get("Emial")
