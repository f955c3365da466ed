"""The README's programs run, and show what it says they show.

A Python block is a program of its own, or after the line ``<!-- continues -->`` goes on with the one before. Top-level
``await`` works, as in a notebook. ``code  # → text`` says what the code's value looks like; a text block after the line
``<!-- shows: code -->`` does so for a value of several lines, whatever the ids of its sockets are.
"""

import ast
import asyncio
import inspect
import re
import shutil
import socket
import sys
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from asena_tornado import AsenaServer, Client

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"(?:<!-- (?P<comment>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL
)
SHOWN = re.compile(r"^(?P<code>\S.*?)  # → (?P<text>.*)$", re.MULTILINE)
SOCKET_ID = re.compile(r"(?<=<socket )[0-9a-f]{8}\b")


def sources() -> list[tuple[int, str]]:
    """Each program with the line where it begins."""
    found: list[tuple[int, str]] = []
    for block in BLOCK.finditer(README):
        kind, _, code = (block["comment"] or "").partition(": ")
        # Line numbers in a traceback are those of the README.
        line = README.count("\n", 0, block.start("source"))
        if kind in ("continues", "shows"):
            first, before = found.pop()
            more = block["source"] if kind == "continues" else f"_show({code}, {block['source'].rstrip()!r})\n"
            found.append((first, before + "\n" * (line - before.count("\n")) + more))
        elif block["language"] == "python":
            found.append((line, "\n" * line + block["source"]))
    return found


async def run(source: str, module: types.ModuleType) -> list[tuple[str, str]]:
    """Run a program as that module; what its values look like, each with what the README says."""
    shown: list[tuple[str, str]] = []
    source = SHOWN.sub(lambda line: f"_show({line['code']}, {line['text']!r})", source)
    source = source.replace("port=3000", "port=0").replace("3000", str(free_port()))
    module.__dict__["_show"] = lambda value, text: shown.append((repr(value), text))
    running = eval(compile(source, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), module.__dict__)
    if inspect.iscoroutine(running):
        await running
    assert len(shown) == source.count("_show(")
    return shown


async def clean_up(module: types.ModuleType) -> None:
    await end(Client, module, Client.close)
    await end(AsenaServer, module, AsenaServer.aclose)
    # Let the clients read to their ends.
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:
        await asyncio.wait(tasks, timeout=5)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return int(listener.getsockname()[1])


async def end(kind: type[T], module: types.ModuleType, how: Callable[[T], Awaitable[None]]) -> None:
    for value in vars(module).values():
        if isinstance(value, kind):
            await how(value)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Where a program runs; its classes find their names there."""
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("source", [pytest.param(source, id=f"line {line + 1}") for line, source in sources()])
async def test_a_program_in_the_readme_runs(source: str, module: types.ModuleType):
    try:
        shown = await run(source, module)
    finally:
        await clean_up(module)
    for value, text in shown:
        assert SOCKET_ID.sub("…", value) == SOCKET_ID.sub("…", text)


@pytest.mark.browser
async def test_the_page_in_the_readme_talks_to_its_service(module: types.ModuleType):
    playwright = pytest.importorskip("playwright.async_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on PATH")
    (source,) = (source for _, source in sources() if "<script" in source)
    source = source.partition("\nann = ")[0]  # the service and the page, not what a notebook does with them
    try:
        await run(source, module)
        async with playwright.async_playwright() as driver:
            browser = await driver.chromium.launch(
                executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
            )
            pages = []
            for name in ("Ann", "Bob"):
                pages.append(await browser.new_page())
                await pages[-1].goto(module.__dict__["server"].url(f"/?username={name}&room=tech"))
            ann, bob = pages
            await bob.get_by_role("textbox").fill("hi")
            await bob.get_by_role("textbox").press("Enter")
            await bob.get_by_text("Bob: hi").wait_for()  # so he is in the room
            assert await bob.get_by_role("textbox").input_value() == ""
            await ann.get_by_role("textbox").fill("<b>hello</b>")
            await ann.get_by_role("button").click()
            for page in pages:
                await page.get_by_text("Ann: <b>hello</b>").wait_for()
            await browser.close()
    finally:
        await clean_up(module)


def test_each_command_is_there_once():
    """The gate and people copy them from here."""
    for name in ("notebook", "test"):
        assert README.count(f"<!-- command: {name} -->\n```bash\n") == 1


def test_every_file_it_names_exists():
    for name in re.findall(r"\bnotebooks/\w+(?:\.\w+)?|\]\((?!http)([^)#]+)", README):
        assert (ROOT / name).exists(), name
