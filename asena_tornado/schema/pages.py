"""The AsyncAPI document over HTTP: as JSON, and as a page to read, which needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from html import escape
from typing import Any

from ..errors import ConfigurationError
from ..web.http import DiscreetHandler
from ..web.origins import Hosts
from ..websocket.namespace import normalize_path

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #888; --in: light-dark(#0a7d43, #5fd99a);
  --out: light-dark(#1f6feb, #8ab4ff) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; color: CanvasText;
  background: Canvas }
h1 { margin: 0 } h2 { margin: 3rem 0 0; border-top: 1px solid var(--line); padding-top: 1.5rem }
h3 { margin: 1.75rem 0 .25rem } h4 { margin: .75rem 0 .25rem }
nav a { margin-right: 1rem } p { margin: .25rem 0 } .dim { opacity: .7 }
code, pre { font: .875em/1.5 ui-monospace, monospace; background: var(--soft); border-radius: 4px }
code { padding: .1em .3em; overflow-wrap: anywhere }
pre { padding: .75rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }
.tag { font-size: .75rem; font-weight: 600; padding: .1rem .5rem; border: 1px solid; border-radius: 1rem;
  vertical-align: middle }
.receive { color: var(--in) } .send { color: var(--out) }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line) }
section section { margin-left: 1rem }
"""
_POLICY = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_ACTIONS = {"receive": "clients send", "send": "clients get"}


def paths_of_documents(
    path: str | None, page: str | None, *, taken: Collection[str | None]
) -> tuple[str | None, str | None]:
    """The paths as they are served. Raises `ConfigurationError` for one that is ``taken``."""
    paths = tuple(None if each is None else normalize_path(each) for each in (path, page))
    for name, each in zip(("asyncapi_path", "asyncapi_page"), paths, strict=True):
        if each is not None and (each in taken or paths.count(each) > 1):
            raise ConfigurationError(f"{each!r} is taken already; give {name} another path")
    return paths[0], paths[1]


class _Handler(DiscreetHandler):
    def initialize(self, document: Callable[[], dict[str, Any]], hosts: Hosts, as_page: bool) -> None:
        self._document = document
        self._hosts = hosts
        self._as_page = as_page

    def set_default_headers(self) -> None:
        self.set_header(
            "Content-Security-Policy",
            f"default-src 'none'; style-src 'sha256-{_POLICY}'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'self'",
        )
        self.set_header("X-Content-Type-Options", "nosniff")

    def prepare(self) -> None:
        self._hosts.guard(self)

    def get(self) -> None:
        """Answer with the document."""
        document = self._document()
        if self._as_page:
            self.set_header("Content-Type", "text/html; charset=UTF-8")
            self.finish(page_of(document))
        else:
            self.set_header("Content-Type", "application/vnd.aai.asyncapi+json;version=3.0.0")
            self.finish(json.dumps(document, indent=2, ensure_ascii=False).encode())


def document_routes(
    paths: tuple[str | None, str | None], document: Callable[[], dict[str, Any]], hosts: Hosts
) -> list[Any]:
    """The routes of the document and of its page, where they have a path, for a `tornado.web.Application`."""
    return [
        (path, _Handler, {"document": document, "hosts": hosts, "as_page": as_page})
        for path, as_page in zip(paths, (False, True), strict=True)
        if path is not None
    ]


def page_of(document: Mapping[str, Any]) -> str:
    """The document as a page of HTML."""
    return "".join(_Page(document).html())


class _Page:
    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._named: list[str] = []  # types that have been mentioned

    def html(self) -> Iterator[str]:
        document = self._document
        info, channels = document["info"], document["channels"]
        title = escape(str(info["title"]))
        yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        yield f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
        yield f"<header><h1>{title}</h1><p class=dim>version {escape(str(info['version']))}, AsyncAPI "
        yield f"{escape(document['asyncapi'])}</p>{_prose(info.get('description', ''))}"
        yield "<nav>"
        for key, channel in channels.items():
            yield f'<a href="#{escape(key)}">{escape(channel["address"])}</a>'
        yield "</nav></header><main>"
        for key, channel in channels.items():
            yield from self._channel(key, channel)
        yield from self._types()
        yield "</main></html>"

    def _channel(self, key: str, channel: Mapping[str, Any]) -> Iterator[str]:
        yield f'<section id="{escape(key)}"><h2><code>{escape(channel["address"])}</code></h2>'
        yield f"<p class=dim>{escape(channel['title'])}</p>{_about(channel)}"
        server = self._document.get("servers", {}).get("default")
        base = f"{server['protocol']}://{server['host']}{server.get('pathname', '')}" if server else ""
        yield f"<p>WebSocket clients: <code>{escape(base + channel['address'])}</code></p>"
        if live := channel.get("x-centrifuge"):
            yield f"<p>Centrifuge clients: <code>{escape(base + live['address'])}</code></p>"
        if query := channel["bindings"]["ws"].get("query"):
            yield "<h3>Query string</h3>" + self._fields(query)
        operations = [each for each in self._document["operations"].values() if self._find(each["channel"]) is channel]
        if operations and (security := operations[0].get("security")):
            yield f"<h3>Authentication</h3><p>{' or '.join(_scheme(self._find(each)) for each in security)}</p>"
        for each in operations:
            yield from self._operation(each)
        yield "</section>"

    def _operation(self, operation: Mapping[str, Any]) -> Iterator[str]:
        action = operation["action"]
        yield f"<section><h3>{escape(operation['title'])} <span class='tag {action}'>{_ACTIONS[action]}</span></h3>"
        yield _about(operation)
        if methods := operation.get("x-rpc-methods"):
            calls = (f"<code>rpc({escape(json.dumps(each))}, …)</code>" for each in methods)
            yield f"<p>Centrifuge clients may call it: {', '.join(calls)}</p>"
        for each in operation["messages"]:
            yield from self._message(each)
        if reply := operation.get("reply"):
            yield "<h4>Reply</h4>"
            for each in reply["messages"]:
                yield from self._message(each)
        yield "</section>"

    def _message(self, reference: Mapping[str, str]) -> Iterator[str]:
        message = self._find(self._find(reference))
        kind = message.get("contentType", "application/json")
        note = "" if kind == "application/json" else f" <span class=dim>{escape(kind)}</span>"
        yield f"<h4>{escape(message['title'])}{note}</h4>{_about(message)}"
        schema = self._find(message["payload"])
        if "allOf" in schema:  # the message, and that it needs its tag
            more = schema["allOf"][-1].get("required", ())
            schema = self._find(schema["allOf"][0])
            schema = {**schema, "required": [*schema.get("required", ()), *more]}
        if "properties" in schema:
            yield self._fields(schema)
        elif kind == "application/json":
            yield f"<p><code>{self._type(schema)}</code></p>"

    def _fields(self, schema: Mapping[str, Any]) -> str:
        required = schema.get("required", ())
        rows = "".join(
            f"<tr><td><code>{escape(name)}</code>{'' if name in required else ' <span class=dim>optional</span>'}</td>"
            f"<td><code>{self._type(field)}</code></td><td>{_prose(field.get('description', ''))}"
            f"{_default(field)}</td></tr>"
            for name, field in schema["properties"].items()
        )
        return f"<div class=wide><table><tr><th>Field<th>Type<th></tr>{rows}</table></div>" if rows else ""

    def _type(self, schema: Any) -> str:
        """What a value is, as TypeScript would have it, in HTML; named types are explained further down."""
        if not isinstance(schema, Mapping):
            return "any"
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in self._named:
                self._named.append(name)
            return f'<a href="#type.{escape(name)}">{escape(name)}</a>'
        if "const" in schema or "enum" in schema:
            return " | ".join(escape(json.dumps(each)) for each in schema.get("enum", [schema.get("const")]))
        for key, between in (("anyOf", " | "), ("oneOf", " | "), ("allOf", " &amp; ")):
            if key in schema:
                return between.join(self._type(each) for each in schema[key])
        kind = schema.get("type", "any")
        if kind == "array":
            items = schema.get("items", {})
            if isinstance(items, list):
                return f"[{', '.join(self._type(each) for each in items)}]"
            inner = self._type(items)
            return f"({inner})[]" if " | " in inner else f"{inner}[]"
        if kind == "object" and "properties" not in schema:
            return f"Record&lt;string, {self._type(schema.get('additionalProperties', {}))}&gt;"
        limits = ", ".join(f"{name} {schema[name]}" for name in _LIMITS if name in schema)
        shown = f"{kind} ({schema['format']})" if "format" in schema else str(kind)
        return escape(f"{shown} ({limits})" if limits else shown)

    def _types(self) -> Iterator[str]:
        """The types that were named, and those that these name."""
        if self._named:
            yield "<section><h2>Types</h2>"
        for name in self._named:  # which grows
            schema = self._document["components"]["schemas"][name]
            yield f'<h3 id="type.{escape(name)}">{escape(name)}</h3>{_prose(schema.get("description", ""))}'
            yield self._fields(schema) if "properties" in schema else f"<p><code>{self._type(schema)}</code></p>"
        if self._named:
            yield "</section>"

    def _find(self, reference: Mapping[str, Any]) -> Any:
        """What a reference stands for; anything else is itself."""
        path = reference.get("$ref")
        if path is None:
            return reference
        found: Any = self._document
        for part in path.removeprefix("#/").split("/"):
            found = found[part]
        return found


_LIMITS = (
    "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern",
    "minItems", "maxItems",
)  # fmt: skip


def _scheme(scheme: Mapping[str, Any]) -> str:
    if scheme["type"] == "http":
        return "<code>Authorization: Bearer …</code>"
    return f"<code>?{escape(scheme['name'])}=…</code>"


def _about(told: Mapping[str, Any]) -> str:
    return _prose(told.get("summary", "")) + _prose(told.get("description", ""))


def _prose(text: str) -> str:
    return "".join(f"<p>{escape(each)}</p>" for each in text.split("\n\n") if each.strip())


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field or "const" in field:
        return ""
    return f"<p class=dim>default <code>{escape(json.dumps(field['default']))}</code></p>"


__all__ = ["document_routes", "page_of", "paths_of_documents"]
