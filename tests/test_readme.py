"""The README's programs run, and show what it says they show.

A Python block is a program of its own, or after the line ``<!-- continues -->`` goes on with the one before. Top-level
``await`` works, as in a notebook. ``code  # → text`` says what the code's value looks like.
"""

import ast
import asyncio
import inspect
import re
import socket
import sys
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tornado.ioloop import IOLoop

from asena_tornado import AsenaServer, Client

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"(?:<!-- (?P<comment>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL
)
SHOWN = re.compile(r"^(?P<code>\S.*?)  # → (?P<text>.*)$", re.MULTILINE)


def programs() -> list[Any]:
    found: list[tuple[int, str]] = []
    for block in BLOCK.finditer(README):
        if block["language"] == "python":
            # Line numbers in a traceback are those of the README.
            line = README.count("\n", 0, block.start("source"))
            if block["comment"] == "continues":
                first, before = found.pop()
                found.append((first, before + "\n" * (line - before.count("\n")) + block["source"]))
            else:
                found.append((line, "\n" * line + block["source"]))
    return [pytest.param(source, id=f"line {line + 1}") for line, source in found]


@pytest.mark.parametrize("source", programs())
def test_a_program_in_the_readme_runs(source: str, io_loop: IOLoop, monkeypatch: pytest.MonkeyPatch):
    shown: list[tuple[str, str]] = []
    source, claims = SHOWN.subn(lambda line: f"_show({line['code']}, {line['text']!r})", source)
    source = source.replace("port=3000", "port=0").replace("3000", str(free_port()))
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__["_show"] = lambda value, text: shown.append((repr(value), text))
    run = asyncio.get_event_loop().run_until_complete  # of io_loop
    try:
        running = eval(compile(source, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), module.__dict__)
        if inspect.iscoroutine(running):
            run(running)
    finally:
        run(end(Client, module, Client.close))
        run(end(AsenaServer, module, AsenaServer.aclose))
        run(rest())
    assert len(shown) == claims
    for value, text in shown:
        assert value == text


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return int(listener.getsockname()[1])


async def end(kind: type[T], module: types.ModuleType, how: Callable[[T], Awaitable[None]]) -> None:
    for value in vars(module).values():
        if isinstance(value, kind):
            await how(value)


async def rest() -> None:
    """Let the clients read to their ends."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:
        await asyncio.wait(tasks, timeout=5)


def test_each_command_is_there_once():
    """The gate and people copy them from here."""
    for name in ("notebook", "test"):
        assert README.count(f"<!-- command: {name} -->\n```bash\n") == 1


def test_every_file_it_names_exists():
    for name in re.findall(r"\bnotebooks/\w+(?:\.\w+)?|\]\((?!http)([^)#]+)", README):
        assert (ROOT / name).exists(), name
