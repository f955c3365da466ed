"""TypeScript for what a server's namespaces take and send: declarations only, for either client of the protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .contract import Contract, Mode, Operation, Schemas, Tags, tags_of

_HEAD = """\
// Made by `python -m asena_tornado types`: what is changed here is lost when it is made again.
//
//   import { Centrifuge } from "./asena.js";  // or from "centrifuge"
//   import type { Typed, %s } from "./….d.ts";
//   const client = new Centrifuge(url) as Typed<Centrifuge, %s>;
"""

# What there is of it for every server. `any` is what a namespace has no say in.
_COMMON = """\
/** What a namespace takes and sends. */
export interface Namespace {
  /** Where plain clients connect. */
  path: string;
  /** What the query string has to have. */
  query: unknown;
  /** By the method of a call; "" is for whole messages. */
  calls: {};
  /** The messages that clients send. */
  accepts: unknown;
  /** The messages that clients get, whether from a room or by themselves. */
  sends: unknown;
}

type Call<N extends Namespace, M extends keyof N["calls"]> = N["calls"][M] extends { data: infer D; reply: infer R }
  ? { data: D; reply: R }
  : never;
type Data<D> = {} extends D ? [data?: D] : [data: D];
type Publication<N extends Namespace> = {
  channel: string;
  data: N["sends"];
  info?: { client: string; user: string; connInfo?: any; chanInfo?: any };
  offset?: number;
  tags?: Record<string, string>;
};

interface Listens<Events> {
  on<E extends keyof Events>(event: E, listener: (ctx: Events[E]) => void): this;
  once<E extends keyof Events>(event: E, listener: (ctx: Events[E]) => void): this;
  off<E extends keyof Events>(event: E, listener: (ctx: Events[E]) => void): this;
}
type Changes = { subscribing: any; subscribed: any; unsubscribed: any; join: any; leave: any; error: any };
type Client = {
  rpc(method: string, data: any): Promise<{ data: any }>;
  newSubscription(room: string, options?: any): any;
};
type Emits = "on" | "once" | "off";

/** A subscription of such a client. */
export type TypedSubscription<S, N extends Namespace> = Omit<S, Emits> &
  Listens<Changes & { publication: Publication<N> }>;

/** A client of `asena.js`, or of the npm package `centrifuge`, that knows the namespace it is connected to. */
export type Typed<C extends Client, N extends Namespace> = Omit<
  C,
  Emits | "rpc" | "send" | "newSubscription" | "getSubscription" | "removeSubscription" | "subscriptions"
> &
  Listens<
    Changes & { connecting: any; connected: any; disconnected: any } & {
      message: { data: N["sends"] };
      publication: Publication<N>;
    }
  > & {
    rpc<M extends keyof N["calls"]>(
      method: M,
      ...data: Data<Call<N, M>["data"]>
    ): Promise<{ data: Call<N, M>["reply"] }>;
    send(data: N["accepts"]): Promise<void>;
    newSubscription(
      room: string,
      options?: Parameters<C["newSubscription"]>[1],
    ): TypedSubscription<ReturnType<C["newSubscription"]>, N>;
    getSubscription(room: string): TypedSubscription<ReturnType<C["newSubscription"]>, N> | null;
    removeSubscription(subscription: TypedSubscription<ReturnType<C["newSubscription"]>, N> | null): void;
    subscriptions(): Record<string, TypedSubscription<ReturnType<C["newSubscription"]>, N>>;
  };
"""
# Names that are taken above, and TypeScript's own that a type must not hide.
_TAKEN = (
    "Namespace", "Call", "Data", "Publication", "Listens", "Changes", "Client", "Emits", "TypedSubscription", "Typed",
    "Omit", "Parameters", "Promise", "Record", "ReturnType",
)  # fmt: skip
_PRIMITIVES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}
_REF = "#/$defs/"


def declarations(contracts: Sequence[Contract]) -> str:
    """The text of a ``.d.ts`` file for the namespaces of these contracts."""
    return _Declarations(contracts).text()


class _Declarations:
    def __init__(self, contracts: Sequence[Contract]) -> None:
        self._contracts = contracts
        self._schemas = Schemas((each for one in contracts for each in one.types()), ref_template=_REF + "{model}")
        names = _Names(_TAKEN)
        self._names = {name: names.free(name) for name in self._schemas.named}
        self._bytes = ""  # what they are in the namespace at hand
        self._namespaces = [names.free(contract.name) for contract in contracts]

    def text(self) -> str:
        example = next(iter(self._namespaces), "Chat")
        parts = [_HEAD % (example, example), _COMMON]
        for name, schema in self._schemas.named.items():
            parts.append(self._declaration(self._names[name], schema))
        for name, contract in zip(self._namespaces, self._contracts, strict=True):
            parts.append(self._namespace(name, contract))
        return "\n".join(parts)

    def _declaration(self, name: str, schema: Mapping[str, Any]) -> str:
        doc = _doc(schema.get("description", ""))
        if "properties" in schema:
            return f"{doc}export interface {name} {self._object(schema, '')}\n"
        return f"{doc}export type {name} = {self._type(schema)};\n"

    def _namespace(self, name: str, contract: Contract) -> str:
        # JSON cannot carry bytes: for the protocol they are wrapped.
        self._bytes = "{ base64: string }" if "centrifuge" in contract.protocols else "ArrayBuffer"
        tags = tags_of(contract, self._schemas)
        calls = "".join(
            f"    {call}: {{ data: {data}; reply: {reply} }};\n" for call, data, reply in self._calls(contract, tags)
        )
        accepts = [self._accepted(model, each, tags) for each in contract.operations for model in each.accepts]
        sends = "unknown" if contract.sends is None else self._union(contract.sends, "serialization")
        query = "unknown" if contract.query is None else self._of(contract.query, "validation")
        return (
            f"{_doc(contract.about)}export interface {name} extends Namespace {{\n"
            f"  path: {json.dumps(contract.path)};\n"
            f"  query: {query};\n"
            f"  calls: {{\n{calls}  }};\n"
            f"  accepts: {_joined(accepts)};\n"
            f"  sends: {sends};\n"
            "}\n"
        )

    def _calls(self, contract: Contract, tags: Tags | None) -> Iterable[tuple[str, str, str]]:
        if "centrifuge" not in contract.protocols:
            return
        whole: list[str] = []
        replies: list[str] = []
        for each in contract.operations:
            reply = "unknown" if each.replies is None else self._union(each.replies, "serialization")
            replies.append(reply)
            for model in each.accepts:
                whole.append(self._accepted(model, each, tags))
                if each.name != "on_message" and tags is not None:
                    data = f"Omit<{self._of(model, 'validation')}, {json.dumps(tags.key)}>"
                    for tag in tags.of[model]:
                        yield json.dumps(str(tag)), data, reply
        if whole:
            yield '""', _joined(whole), _joined(replies)

    def _accepted(self, model: Any, operation: Operation, tags: Tags | None) -> str:
        """A message as clients send it: with its tag, even where that has a default."""
        shown = self._of(model, "validation")
        if operation.name == "on_message" or tags is None:
            return shown
        if tags.key in self._schemas.whole(model, "validation").get("required", ()):
            return shown
        return f"{shown} & {{ {_property(tags.key)}: {' | '.join(map(_literal, tags.of[model]))} }}"

    def _union(self, annotations: Iterable[Any], mode: Mode) -> str:
        types = [self._of(each, mode) for each in annotations]
        return _joined(types) if types else "null"

    def _of(self, annotation: Any, mode: Mode) -> str:
        if annotation is Any:
            return "unknown"
        if annotation is str:
            return "string"
        if annotation is bytes:
            return self._bytes
        return self._type(self._schemas.by_type[annotation, mode])

    def _type(self, schema: Any, indent: str = "  ") -> str:
        if not isinstance(schema, Mapping):
            return "unknown"
        if "$ref" in schema:
            return self._names[schema["$ref"].removeprefix(_REF)]
        if "const" in schema or "enum" in schema:
            return " | ".join(_literal(each) for each in schema.get("enum", [schema.get("const")]))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return _joined(self._type(each, indent) for each in schema[key])
        if "allOf" in schema:
            return " & ".join(_grouped(self._type(each, indent)) for each in schema["allOf"])
        kind = schema.get("type")
        if isinstance(kind, list):
            return _joined(self._type({**schema, "type": each}, indent) for each in kind)
        if kind == "array":
            return self._array(schema, indent)
        if kind == "object" and "properties" in schema:
            return self._object(schema, indent)
        if kind == "object":
            return f"Record<string, {self._type(schema.get('additionalProperties', {}), indent)}>"
        return _PRIMITIVES.get(str(kind), "unknown")

    def _array(self, schema: Mapping[str, Any], indent: str) -> str:
        items = schema.get("items", {})
        if not isinstance(items, list):
            return f"{_grouped(self._type(items, indent))}[]"
        parts = [self._type(each, indent) for each in items]
        if schema.get("maxItems") != len(items):
            parts.append(f"...{_grouped(self._type(schema.get('additionalItems', {}), indent))}[]")
        return f"[{', '.join(parts)}]"

    def _object(self, schema: Mapping[str, Any], indent: str) -> str:
        required = schema.get("required", ())
        lines = [
            f"{_doc(field.get('description', ''), indent + '  ')}{indent}  {_property(name)}"
            f"{'' if name in required else '?'}: {self._type(field, indent + '  ')};\n"
            for name, field in schema["properties"].items()
        ]
        if schema.get("additionalProperties") not in (None, False):
            lines.append(f"{indent}  [key: string]: unknown;\n")
        return f"{{\n{''.join(lines)}{indent}}}"


class _Names:
    """Identifiers, each given once."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def free(self, name: str) -> str:
        wanted = re.sub(r"\W+", "_", name.replace("-", ""), flags=re.ASCII).strip("_") or "_"
        wanted = f"_{wanted}" if wanted[0].isdigit() else wanted
        found, number = wanted, 1
        while found in self._taken:
            number += 1
            found = f"{wanted}{number}"
        self._taken.add(found)
        return found


def _joined(types: Iterable[str]) -> str:
    each = list(dict.fromkeys(types))
    return " | ".join(f"({one})" if " & " in one else one for one in each) or "never"


def _grouped(shown: str) -> str:
    """In brackets, where something follows that binds more strongly."""
    return f"({shown})" if " | " in shown or " & " in shown else shown


def _literal(value: Any) -> str:
    return json.dumps(value)


def _property(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_$][\w$]*", name, flags=re.ASCII) else json.dumps(name)


def _doc(text: str, indent: str = "") -> str:
    if not text:
        return ""
    lines = text.replace("*/", "*\\/").splitlines()
    if len(lines) == 1:
        return f"{indent}/** {lines[0]} */\n"
    inner = "".join(f"{indent} * {line}".rstrip() + "\n" for line in lines)
    return f"{indent}/**\n{inner}{indent} */\n"


__all__ = ["declarations"]
