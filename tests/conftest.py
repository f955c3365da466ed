import asyncio
import inspect
from collections.abc import Iterator

import pytest
from tornado.ioloop import IOLoop


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """The loop a test runs on: pytest-tornasync's fixture, without the calls that are deprecated."""
    loop = IOLoop(make_current=False)
    asyncio.set_event_loop(loop.asyncio_loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close(all_fds=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every async test runs on io_loop, also one that does not name it."""
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and inspect.iscoroutinefunction(item.obj)
            and "io_loop" not in item.fixturenames
        ):
            item.fixturenames.insert(0, "io_loop")
