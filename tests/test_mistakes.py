"""What is written wrongly is told where it is written, or at the latest at the start, and says what to write."""

from __future__ import annotations

import functools
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel
from tornado.web import Application

from asena_tornado import (
    AsenaError,
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Context,
    Controller,
    Get,
    HookNameWarning,
    Middleware,
    Post,
    Service,
    WebSocket,
)


class Item(BaseModel):
    name: str


def check(context: Any, next: Any) -> None: ...


class Bare:
    pass


# Each is what somebody writes, and what the error says.


def parameter_of_a_path() -> None:
    @Controller("/users")
    class Users:
        @Get("/{id}")
        def get(self, id: int): ...


def parameter_of_a_path_without_a_type() -> None:
    @Controller("/users")
    class Users:
        @Get("/{id}")
        def get(self, id): ...


def parameter_of_a_query() -> None:
    @Controller("/users")
    class Users:
        @Get()
        async def get(self, search: str = ""): ...


def body_as_parameter() -> None:
    @Controller("/items")
    class Items:
        @Post()
        async def add(self, item: Item): ...


def inherited() -> None:
    class Base:
        @Get("/{id}")
        def get(self, id: uuid.UUID): ...

    @Controller("/users")
    class Users(Base):
        pass


def no_self_in_a_controller() -> None:
    @Controller("/users")
    class Users:
        @Get()
        def get(): ...  # type: ignore[misc]  # that is the point


def no_self_in_on_message() -> None:
    @WebSocket("/x")
    class X(AsenaWebSocketService):
        def on_message(): ...  # type: ignore[misc]  # that is the point


def no_self_in_on_open() -> None:
    @WebSocket("/x")
    class X(AsenaWebSocketService):
        async def on_open(): ...  # type: ignore[misc]  # that is the point


def no_self_in_on_start() -> None:
    @Service
    class X:
        def on_start(): ...  # type: ignore[misc]  # that is the point


def no_self_in_handle() -> None:
    @Middleware()
    class X:
        def handle(): ...  # type: ignore[misc]  # that is the point


def function_as_middleware() -> None:
    @WebSocket("/x", middlewares=[check])
    class X(AsenaWebSocketService):
        pass


def function_as_middleware_of_a_controller() -> None:
    Controller("/x", middlewares=[check])


def function_as_middleware_of_a_method() -> None:
    Get("/x", middlewares=[functools.partial(check, 1)])


def middleware_that_is_no_list() -> None:
    WebSocket("/x", middlewares=Bare)  # type: ignore[arg-type]  # that is the point


def function_with_the_decorator() -> None:
    Middleware(check)  # type: ignore[call-overload]  # that is the point


def function_as_service() -> None:
    Service(check)  # type: ignore[call-overload]  # that is the point


def type_in_parentheses() -> None:
    class X(AsenaWebSocketService(Item)):  # type: ignore[misc]  # that is the point
        pass


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (parameter_of_a_path, r"Users.get would get the context as its parameter 'id': write def get\(self, context\)"),
    (parameter_of_a_path_without_a_type, r"context\.params\['id'\]"),
    (parameter_of_a_query, r"context\.query\['search'\]"),
    (body_as_parameter, r"await context\.get_body\(Model\)"),
    (inherited, r"context\.params\['id'\]"),
    (no_self_in_a_controller, r"Users\.get is a method: its first parameter must be self"),
    (no_self_in_on_message, r"X\.on_message is a method: its first parameter must be self"),
    (no_self_in_on_open, r"X\.on_open is a method: its first parameter must be self"),
    (no_self_in_on_start, r"X\.on_start is a method: its first parameter must be self"),
    (no_self_in_handle, r"X\.handle is a method: its first parameter must be self"),
    (
        function_as_middleware,
        r"@WebSocket\('/x'\): check is a function, but middleware must be a class: @Middleware\(\)",
    ),
    (function_as_middleware_of_a_controller, r"@Controller\('/x'\): check is a function"),
    (function_as_middleware_of_a_method, r"@Get\('/x'\): .* is a function, but middleware must be a class"),
    (middleware_that_is_no_list, r"middlewares must be a list, middlewares=\[…\]"),
    (function_with_the_decorator, r"@Middleware goes above a class with handle\(self, context, next\)"),
    (function_as_service, r"@Service goes above a class, not the function check"),
    (type_in_parentheses, r"AsenaWebSocketService\[Item\]"),
]


@pytest.mark.parametrize(("mistake", "says"), MISTAKES, ids=[mistake.__name__ for mistake, _ in MISTAKES])
def test_a_mistake_is_told_where_it_is_written(mistake: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        mistake()


async def test_what_only_looks_like_one_works() -> None:
    @Middleware()
    class Passes:
        async def handle(self, context, next):
            return await next()

    @Controller("/users", middlewares=(Passes,))
    class Users:
        @Get("/{id}")
        def get(self, context: Context):
            return context.params["id"]

        @Get("/{id}/name")
        def name(self, ctx: Any, *, known: int = 1): ...

        @Get()
        def all(self): ...

    @WebSocket("/x")
    class X(AsenaWebSocketService):  # without a [T]: whatever comes
        def __init__(self, greeting: str = "hello") -> None:
            self.greeting = greeting

        @staticmethod
        def on_open(ws):
            ws.send(ws.data.name)

    async with AsenaServer(X("hi"), Users, port=0) as server, await server.connect("/x?name=Ann") as client:
        assert await client.recv() == "Ann"
    with pytest.raises(TypeError, match=r"Y\(\) takes no arguments"):
        type("Y", (AsenaWebSocketService,), {})(1)


# -- mounting


@WebSocket("/x")
class Hello(AsenaWebSocketService):
    def on_open(self, ws):
        ws.send("hello")


def test_mounting_twice_is_an_error() -> None:
    app = Application()
    server = AsenaServer(Hello).mount(app)
    with pytest.raises(ConfigurationError, match="already mounted on this application"):
        server.mount(app)
    server.mount(Application())  # another one may have it, too


async def test_mounting_twice_is_an_error_while_it_runs() -> None:
    app = Application()
    server = AsenaServer(Hello).mount(app)
    with pytest.raises(ConfigurationError, match="already mounted on this application"):
        server.mount(app)
    await server.aclose()
    rules = len(app.default_router.rules)
    server.mount(app)  # that starts it again
    assert len(app.default_router.rules) == rules
    await server.aclose()


# -- names that are nearly a hook's


def service(**methods: Any) -> type[Any]:
    return WebSocket("/x")(type("X", (AsenaWebSocketService,), methods))


def plain(self: Any) -> None: ...


async def waits(self: Any) -> None: ...


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("on_mesage", "on_message"),
        ("on_messages", "on_message"),
        ("onmessage", "on_message"),
        ("onMesage", "on_message"),
        ("on_opne", "on_open"),
        ("on_closed", "on_close"),
        ("on_invalid_mesage", "on_invalid_message"),
        ("on_startup", "on_start"),
        ("on_stopp", "on_stop"),
        ("onStop", "on_stop"),
    ],
)
@pytest.mark.parametrize("function", [plain, waits])
def test_a_name_that_is_nearly_a_hooks_warns_with_the_hook(name: str, hook: str, function: Any) -> None:
    with pytest.warns(
        HookNameWarning, match=rf"X\.{name} is never called by the server: did you mean {hook}\?"
    ) as seen:
        service(**{name: function})
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("decorate", [Service, Service("Named"), Middleware, Middleware(), Controller("/x")])
def test_so_does_every_decorator(decorate: Callable[[type], type]) -> None:
    class X:
        @Get()
        def get(self): ...

        def handle(self, context, next): ...

        def on_startup(self): ...

        async def on_mesage(self): ...  # no hook here

    with pytest.warns(HookNameWarning, match="did you mean on_start") as seen:
        decorate(X)
    assert [warning.filename for warning in seen] == [__file__]


def test_other_names_do_not_warn() -> None:
    class X:
        def on_start(self):
            self.on_step()
            return [self.on_train() for _ in range(3)]

        def on_stop(self): ...

        # Called by the class itself: nobody meant a hook.
        def on_step(self): ...

        def on_train(self): ...

        def _on_startup(self): ...

        async def start(self): ...

        async def open(self): ...

        def on_join(self): ...

        def on_vote(self): ...

        def once(self): ...

        @Post("/x")
        async def on_stopp(self): ...

        on_drains = 3

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Service(X)
        service(on_start=plain, on_stop=waits, on_ping=plain, on_pong=waits, on_join=plain, on_login=waits)


def test_what_is_misspelt_as_elsewhere_is_an_error_still() -> None:
    with pytest.raises(AsenaError, match="on_message"):
        service(onMessage=plain)
