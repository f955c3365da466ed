"""The AsyncAPI 3.0 document of a server's namespaces: https://www.asyncapi.com/docs/reference/specification/v3.0.0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ..web.middlewares import TokenAuth
from .contract import Contract, Mode, Schemas, Tags, name_of, tags_of

DIALECT = "http://json-schema.org/draft-07/schema#"
_SCHEMAS = "#/components/schemas/"
_DEFAULT_INFO = {"title": "WebSocket API", "version": "1.0.0"}


def document(
    contracts: Sequence[Contract],
    *,
    info: Mapping[str, Any] | None = None,
    base: str | None = None,
    centrifuge_suffix: str,
) -> dict[str, Any]:
    """Make the document.

    Args:
        contracts: Those of the namespaces.
        info: Of the Info Object, such as ``title``, ``version`` and ``description``.
        base: Where clients connect, such as ``wss://example.com/prefix``; None if that is not known.
        centrifuge_suffix: What follows a path where clients of the Centrifuge protocol connect.
    """
    return _Document(contracts, centrifuge_suffix).made({**_DEFAULT_INFO, **(info or {})}, base)


class _Document:
    def __init__(self, contracts: Sequence[Contract], centrifuge_suffix: str) -> None:
        self._contracts = contracts
        self._suffix = centrifuge_suffix
        self._schemas = Schemas((each for one in contracts for each in one.types()), ref_template=_SCHEMAS + "{model}")
        self._security: dict[str, dict[str, Any]] = {}
        self._channels: dict[str, dict[str, Any]] = {}
        self._operations: dict[str, dict[str, Any]] = {}

    def made(self, info: dict[str, Any], base: str | None) -> dict[str, Any]:
        for contract in self._contracts:
            self._add(contract)
        if base is not None:
            for channel in self._channels.values():
                channel["servers"] = [{"$ref": "#/servers/default"}]
        components = {
            "schemas": {name: {"$schema": DIALECT, **schema} for name, schema in self._schemas.named.items()},
            "securitySchemes": self._security,
        }
        return {
            "asyncapi": "3.0.0",
            "info": info,
            "defaultContentType": "application/json",
            **({} if base is None else {"servers": {"default": _server(base)}}),
            "channels": self._channels,
            "operations": self._operations,
            "components": {name: each for name, each in components.items() if each},
        }

    def _add(self, contract: Contract) -> None:
        key = _free(contract.path.strip("/").replace("/", "."), self._channels)
        at = f"#/channels/{key}"
        messages: dict[str, dict[str, Any]] = {}
        self._channels[key] = {
            "address": contract.path,
            "title": contract.name,
            **_told(contract.about),
            "messages": messages,
            "bindings": {"ws": self._binding(contract)},
        }
        if "centrifuge" in contract.protocols:
            self._channels[key]["x-centrifuge"] = {"address": contract.path + self._suffix}
        security = [{"$ref": f"#/components/securitySchemes/{name}"} for name in self._secured(contract.auth)]
        common: dict[str, Any] = {"channel": {"$ref": at}, **({"security": security} if security else {})}
        tags = tags_of(contract, self._schemas)

        def refs(types: Iterable[Any], mode: Mode, tags: Tags | None = None) -> list[dict[str, str]]:
            return [{"$ref": f"{at}/messages/{self._message(messages, each, mode, tags)}"} for each in types]

        for each in contract.operations:
            operation: dict[str, Any] = {
                "action": "receive",
                **common,
                "title": each.name,
                **_told(each.about),
                "messages": refs(each.accepts, "validation", None if each.name == "on_message" else tags),
            }
            if each.replies:
                operation["reply"] = {"channel": {"$ref": at}, "messages": refs(each.replies, "serialization")}
            if "centrifuge" in contract.protocols and each.name != "on_message" and tags is not None:
                operation["x-rpc-methods"] = [str(tag) for model in each.accepts for tag in tags.of[model]]
            self._operations[_free(f"{key}.{each.name}", self._operations)] = operation
        if contract.sends:
            self._operations[_free(f"{key}.send", self._operations)] = {
                "action": "send",
                **common,
                "title": "send",
                "messages": refs(contract.sends, "serialization"),
            }

    def _binding(self, contract: Contract) -> dict[str, Any]:
        binding: dict[str, Any] = {"method": "GET", "bindingVersion": "0.1.0"}
        if contract.query is not None:
            query = self._schemas.whole(contract.query, "validation")
            if query.get("type") == "object":
                binding["query"] = {"properties": {}, **query}
        return binding

    def _secured(self, auth: Sequence[TokenAuth]) -> list[str]:
        names = []
        for each in auth:
            self._security["bearer"] = {"type": "http", "scheme": "bearer"}
            names.append("bearer")
            if each.query_parameter is not None:
                name = _key(f"query.{each.query_parameter}")
                self._security[name] = {"type": "httpApiKey", "in": "query", "name": each.query_parameter}
                names.append(name)
        return list(dict.fromkeys(names))

    def _message(
        self, messages: dict[str, dict[str, Any]], annotation: Any, mode: Mode, tags: Tags | None = None
    ) -> str:
        """The key of the type's message among the channel's, to which it is added."""
        message: dict[str, Any] = {"name": name_of(annotation), "title": name_of(annotation)}
        if annotation is str:
            message |= {"contentType": "text/plain", "payload": {"type": "string"}}
        elif annotation is bytes:
            message |= {"contentType": "application/octet-stream", "payload": {"type": "string", "format": "binary"}}
        elif annotation is Any:
            message["payload"] = {"title": "Any JSON"}
        else:
            payload, whole = self._schemas.by_type[annotation, mode], self._schemas.whole(annotation, mode)
            message |= _told(whole.get("description", ""))
            if tags is not None and tags.key not in whole.get("required", ()):
                # Even if it has a default: without it, nobody would know what the message is.
                payload = {"allOf": [payload, {"required": [tags.key]}]}
            message["payload"] = payload if "$ref" in payload else {"$schema": DIALECT, **payload}
        for key, known in messages.items():
            if known == message:
                return key
        key = _free(message["name"], messages)
        messages[key] = message
        return key


def _server(base: str) -> dict[str, Any]:
    parts = urlsplit(base)
    path = parts.path.rstrip("/")
    return {"host": parts.netloc, "protocol": parts.scheme, **({"pathname": path} if path else {})}


def _told(about: str) -> dict[str, str]:
    """A docstring as a summary and, if it has more to say, a description."""
    summary, _, rest = about.partition("\n\n")
    return {
        **({"summary": " ".join(summary.split())} if summary else {}),
        **({"description": rest.strip()} if rest.strip() else {}),
    }


def _key(name: str) -> str:
    """The name as a key that references can have in them."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_") or "_"


def _free(name: str, taken: Mapping[str, object]) -> str:
    key, number = _key(name), 1
    while key in taken:
        number += 1
        key = f"{_key(name)}_{number}"
    return key


__all__ = ["DIALECT", "document"]
