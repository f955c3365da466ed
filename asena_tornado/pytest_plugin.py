"""The pytest plugin: the fixture ``serve`` of `asena_tornado.testing`.

Installed, this module is at the top level, as ``_asena_tornado_pytest``: pytest imports the plugins of all packages
there are, and should not import the whole of this one before a test asks for the fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from asena_tornado.testing import Serve

_SERVE = pytest.StashKey["Serve"]()


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    """What starts servers that end with the test: an ``asena_tornado.testing.Serve``."""
    from asena_tornado.testing import Serve

    made = request.node.stash[_SERVE] = Serve()
    yield made
    made.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """What handlers raise fails the test, or is shown with what fails it."""
    __tracebackhide__ = True
    try:
        result = yield
    except BaseException:
        made = item.stash.get(_SERVE, None)
        if made is not None and (told := made.untold()):
            item.add_report_section("call", "handlers", told)
        raise
    made = item.stash.get(_SERVE, None)
    if made is not None:
        made.finish()
    return result
