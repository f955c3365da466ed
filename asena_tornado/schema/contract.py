"""What a service takes, answers and sends, read from its decorator, annotations and docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import get_type_hints

from ..errors import ConfigurationError
from ..web.middlewares import TokenAuth
from ..websocket.calls import marked
from ..websocket.messages import parts_of, shown_type
from ..websocket.service import AsenaWebSocketService, spec_of, types_of

Mode = Literal["validation", "serialization"]
_NO_SCHEMA = (Any, str, bytes)
_NO_TYPES = (None, type(None), Any, object, dict)


@dataclass(frozen=True)
class Operation:
    """A handler.

    ``accepts``: the types of the messages it is for; `Any` is one, for a handler without annotation. ``replies``: those
    of what it returns; none if it returns None; None if it does not say.
    """

    name: str
    accepts: tuple[Any, ...]
    replies: tuple[Any, ...] | None
    about: str


@dataclass(frozen=True)
class Contract:
    """What one namespace takes and sends.

    ``query``: the type of the query string's values; None if nothing is said of it. ``auth``: its middlewares that ask
    for a token. ``sends``: the types of what is sent, or None if it is not declared.
    """

    path: str
    name: str
    about: str
    protocols: tuple[str, ...]
    query: Any
    auth: tuple[TokenAuth, ...]
    operations: tuple[Operation, ...]
    sends: tuple[Any, ...] | None

    def types(self) -> Iterator[tuple[Any, Mode]]:
        """Every type that has a schema, with what for."""
        if self.query is not None:
            yield self.query, "validation"
        for operation in self.operations:
            yield from ((each, "validation") for each in operation.accepts if each not in _NO_SCHEMA)
            yield from ((each, "serialization") for each in operation.replies or () if each not in _NO_SCHEMA)
        yield from ((each, "serialization") for each in self.sends or () if each not in _NO_SCHEMA)


def contract_of(service: AsenaWebSocketService[Any]) -> Contract:
    """Read the contract of a service.

    Raises:
        ConfigurationError: An annotation cannot be resolved, or JSON Schema cannot express it.
    """
    spec, cls = spec_of(service), type(service)
    message_type, values_type, sent = types_of(service)
    auth = tuple(each for each in spec.middlewares if isinstance(each, TokenAuth))
    query = None
    if not auth and values_type not in _NO_TYPES and not isinstance(values_type, TypeVar):
        query = values_type  # else they are what the token stands for
        _check(query, "validation", f"the values of {cls.__name__}")
    accepted: dict[str, list[Any]] = {}
    for name, model, _ in marked(cls):
        accepted.setdefault(name, []).append(model)
    if cls.on_message is not AsenaWebSocketService.on_message:
        accepted["on_message"] = [message_type]
    operations = [_operation(cls, name, annotations) for name, annotations in accepted.items()]
    sends = None if sent is None else types_of_messages((sent,))
    for each in sends or ():
        _check(each, "serialization", f"sends of {cls.__name__}")
    return Contract(spec.path, spec.name, _about(cls), spec.protocols, query, auth, tuple(operations), sends)


def _operation(cls: type, name: str, annotations: Sequence[Any]) -> Operation:
    method = inspect.unwrap(getattr(cls, name))
    accepts, replies = types_of_messages(annotations), _replies(cls, method)
    for each in accepts:
        _check(each, "validation", f"the message of {cls.__name__}.{name}")
    for each in replies or ():
        _check(each, "serialization", f"the reply of {cls.__name__}.{name}")
    return Operation(name, accepts, replies, _about(method))


def _replies(cls: type, method: Any) -> tuple[Any, ...] | None:
    annotations = getattr(method, "__annotations__", {})
    if "return" not in annotations:
        return None
    annotation = annotations["return"]
    if isinstance(annotation, str):
        try:
            annotation = get_type_hints(method, localns=dict(vars(cls)), include_extras=True)["return"]
        except Exception as error:
            raise ConfigurationError(
                f"{cls.__name__}.{method.__name__}: {annotation!r}, the type of what it returns, cannot be resolved "
                f"({error}); define what it names at module level"
            ) from error
    if annotation in (None, type(None)):
        return ()
    return types_of_messages((annotation,))


def types_of_messages(annotations: Iterable[Any]) -> tuple[Any, ...]:
    """The types of messages, without their unions: each is a message of its own."""
    found: list[Any] = []
    for annotation in annotations:
        if annotation in (inspect.Parameter.empty, Any, object):
            found.append(Any)
        else:
            # What a plain type is annotated with counts; a union's own annotation, such as its discriminator, does not.
            parts = parts_of(annotation)
            found += [annotation] if len(parts) == 1 else [part for part in parts if part is not type(None)]
    return tuple(dict.fromkeys(found))


def _check(annotation: Any, mode: Mode, where: str) -> None:
    if annotation is Any:
        return
    try:
        TypeAdapter(annotation).json_schema(mode=mode)
    except Exception as error:  # pydantic raises several kinds, for one cause: the type
        raise ConfigurationError(
            f"{where}: JSON Schema cannot express {shown_type(annotation)} ({error}); give the field another type, or "
            "say what it is with pydantic's WithJsonSchema"
        ) from error


def _about(documented: Any) -> str:
    """The docstring, which must not be a base class's."""
    text = vars(documented).get("__doc__") if isinstance(documented, type) else documented.__doc__
    return inspect.cleandoc(text) if text else ""


class _Generator(GenerateJsonSchema):
    """What is sent has every field, whether or not that has a default; pydantic does not say so of itself."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        if self.mode == "serialization" and field["type"] != "typed-dict-field":
            return not field.get("serialization_exclude") and "serialization_exclude_if" not in field
        return super().field_is_required(field, total)


class Schemas:
    """The JSON Schemas of many types, which refer to each other's by name; draft-07, which AsyncAPI builds on."""

    def __init__(self, wanted: Iterable[tuple[Any, Mode]], *, ref_template: str) -> None:
        each = list(dict.fromkeys(wanted))
        made, together = TypeAdapter.json_schemas(
            [(index, mode, TypeAdapter(annotation)) for index, (annotation, mode) in enumerate(each)],
            ref_template=ref_template,
            schema_generator=_Generator,
        )
        self.by_type: dict[tuple[Any, Mode], dict[str, Any]] = {
            key: draft07(made[index, key[1]]) for index, key in enumerate(each)
        }
        self.named: dict[str, dict[str, Any]] = {
            name: draft07(schema) for name, schema in together.get("$defs", {}).items()
        }

    def whole(self, annotation: Any, mode: Mode) -> dict[str, Any]:
        """The schema itself, where only its name would be."""
        schema = self.by_type[annotation, mode]
        reference = schema.get("$ref")
        return self.named[reference.rpartition("/")[2]] if reference else schema


_BY_NAME = ("properties", "patternProperties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONE = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")


def draft07(schema: Any) -> Any:
    """The same in JSON Schema draft-07, for what pydantic writes in that of 2020-12."""
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME:
            made[key] = {name: draft07(each) for name, each in value.items()}
        elif key in _LISTS:
            made[key] = [draft07(each) for each in value]
        else:
            made[key] = draft07(value) if key in _ONE else value
    if "prefixItems" in made:
        rest = made.pop("items", True)
        made["items"] = made.pop("prefixItems")
        made["additionalItems"] = rest
    if isinstance(made.get("discriminator"), Mapping):
        made["discriminator"] = made["discriminator"]["propertyName"]  # as AsyncAPI has it
    if "$ref" in made and len(made) > 1:
        # There, what stands beside a reference does not count.
        made["allOf"] = [{"$ref": made.pop("$ref")}, *made.get("allOf", ())]
    return made


@dataclass(frozen=True)
class Tags:
    """How the messages of a namespace's handlers are told apart: the property, and what it is for each model."""

    key: str
    of: Mapping[Any, tuple[Any, ...]]


def tags_of(contract: Contract, schemas: Schemas) -> Tags | None:
    """The tags of the models of `on`; None if the service has none."""
    models = [each for operation in contract.operations if operation.name != "on_message" for each in operation.accepts]
    constants = {
        model: {
            name: tuple(field["enum"] if "enum" in field else (field["const"],))
            for name, field in schemas.whole(model, "validation").get("properties", {}).items()
            if "const" in field or "enum" in field
        }
        for model in models
    }
    for name in constants[models[0]] if models else ():
        if all(name in each for each in constants.values()):
            return Tags(name, {model: each[name] for model, each in constants.items()})
    return None


def name_of(annotation: Any) -> str:
    """What a message of the type is called."""
    if annotation is Any:
        return "Any"
    if annotation is str:
        return "Text"
    if annotation is bytes:
        return "Binary"
    name = shown_type(annotation) if get_origin(annotation) is None or not get_args(annotation) else str(annotation)
    return str(getattr(annotation, "__name__", name)) if isinstance(annotation, type) else name


__all__ = [
    "Contract",
    "Mode",
    "Operation",
    "Schemas",
    "Tags",
    "contract_of",
    "draft07",
    "name_of",
    "tags_of",
    "types_of_messages",
]
