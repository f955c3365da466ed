"""``python -m asena_tornado demo`` and ``--version``; with ``module:server``: ``serve``, ``asyncapi``, ``types``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from . import __version__
from .connection.engine import description
from .demo import demo_server
from .errors import AsenaError
from .server import AsenaServer


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says; exits with 2 for a command that cannot work, with 1 when the server cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m asena_tornado",
        description="Live WebSocket rooms.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the version in one line
    )
    parser.add_argument("--version", action="version", version=f"asena_tornado {__version__} (engine: {description})")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a small chat with a page to talk in, and the inspector beside it")
    demo.add_argument("--port", type=int, default=3000, help="the port, by default 3000; 0 picks a free one")
    serve = commands.add_parser("serve", help="run a server that a module of yours makes; Ctrl+C stops it")
    serve.add_argument(
        "target", metavar="module:server", help="such as app:server, for server = AsenaServer(…) in app.py"
    )
    asyncapi = commands.add_parser("asyncapi", help="print the AsyncAPI document of a server, which is not started")
    asyncapi.add_argument("target", metavar="module:server", help="such as app:server")
    asyncapi.add_argument("--yaml", action="store_true", help="as YAML instead of JSON")
    types = commands.add_parser("types", help="print TypeScript for the messages of a server, which is not started")
    types.add_argument("target", metavar="module:server", help="such as app:server")
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            server = demo_server(options.port, announce=lambda text: print(text, flush=True))
        else:
            server = _find(options.target)
        if options.command == "asyncapi":
            print(_yaml(server.asyncapi()) if options.yaml else json.dumps(server.asyncapi(), indent=2))
            return
        if options.command == "types":
            print(server.typescript(), end="")
            return
    except (AsenaError, LookupError) as error:
        parser.error(str(error))
    try:
        server.run()
    except AsenaError as error:
        sys.exit(f"error: {error}")


def _yaml(document: dict[str, Any]) -> str:
    try:
        import yaml
    except ImportError:
        raise LookupError("--yaml needs PyYAML: pip install 'asena_tornado[yaml]'") from None
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True)).rstrip()


def _find(target: str) -> AsenaServer:
    """The server that ``module:server`` names; raises ``LookupError`` that says what is there instead."""
    name, _, attribute = target.partition(":")
    if not name or not attribute:
        raise LookupError(f"{target!r} does not name a server: write module:server, such as app:server")
    module = _module(name)
    servers = [each for each, value in vars(module).items() if isinstance(value, AsenaServer)]
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = f"its servers: {', '.join(servers)}" if servers else "it has no AsenaServer"
            raise LookupError(f"{name} has no {attribute!r}; {there}")
        found = getattr(found, part)
    if not isinstance(found, AsenaServer):
        there = f"; the servers there: {', '.join(servers)}" if servers else ""
        raise LookupError(f"{target} is not an AsenaServer, but of type {type(found).__name__!r}{there}")
    if found.state != "new":
        raise LookupError(f"{target} is already started by its module: leave starting to this command")
    return found


def _module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise LookupError(f"{name!r} is not the name of a module: write it as in an import, such as package.app")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:  # the package it should be in
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        found = None
    if found is None:
        hint = "; write it without .py" if name.endswith(".py") else ""
        raise LookupError(f"there is no module {name!r}, neither in {here} nor installed{hint}")
    # Whatever goes wrong in there is the module's own, and shown as such.
    return importlib.import_module(name)


if __name__ == "__main__":
    main()
