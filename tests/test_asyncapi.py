"""The AsyncAPI document: what it says, that the official parser takes it, and how it is served."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from asena_tornado import AsenaServer, AsenaWebSocketService, ConfigurationError, Socket, WebSocket, on
from asena_tornado.demo import demo_server
from asena_tornado.schema.contract import draft07
from asena_tornado.testing import Serve
from tests.contract_app import server
from tests.npm import installed

DOCUMENT = server.asyncapi()

PARSE = """
const { Parser } = require(process.argv[1])
const { document, diagnostics } = await new Parser().parse(require('fs').readFileSync(0, 'utf8'))
const said = diagnostics.filter(each => each.severity < 2).map(each => each.path.join('.') + ': ' + each.message)
const names = messages => messages.all().map(each => each.name())
console.log(JSON.stringify({
  said,
  channels: document && document.channels().all().map(each => [each.address(), names(each.messages())]),
  operations: document && document.operations().all().map(each => [
    each.id(), each.action(), names(each.messages()), each.reply() ? names(each.reply().messages()) : null,
    each.security().flatMap(all => all.all().map(one => one.scheme().type())),
  ]),
}))
"""


@pytest.fixture(scope="session")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What AsyncAPI's own parser makes of a document."""
    packages = installed(tmp_path_factory, "npm-asyncapi", "@asyncapi/parser@3")

    def parse(document: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(
            ["node", "-e", f"(async () => {{ {PARSE} }})()", str(packages / "@asyncapi" / "parser")],
            input=json.dumps(document), capture_output=True, text=True, timeout=50, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    return parse


@pytest.mark.js
def test_the_official_parser_finds_everything_and_has_no_complaints(parser: Callable[..., dict[str, Any]]):
    found = parser(DOCUMENT)
    assert found["said"] == []
    assert found["channels"] == [
        ["/auction", ["Bid", "Page[Lot]", "Withdraw", "Bid", "Sold"]],
        ["/admin/console", ["Bid", "Withdraw", "Text", "Binary"]],
        ["/any", ["Any"]],
        ["/raw", ["Binary"]],
    ]
    assert found["operations"] == [
        ["auction.bid", "receive", ["Bid"], ["Page[Lot]"], []],
        ["auction.withdraw", "receive", ["Withdraw"], None, []],
        ["auction.send", "send", ["Bid", "Sold"], None, []],
        ["admin.console.on_message", "receive", ["Bid", "Withdraw"], ["Text"], ["http", "httpApiKey"]],
        ["admin.console.send", "send", ["Text", "Binary"], None, ["http", "httpApiKey"]],
        ["any.on_message", "receive", ["Any"], None, []],
        ["raw.on_message", "receive", ["Binary"], None, []],
    ]


@pytest.mark.js
def test_the_official_parser_takes_the_demos_document_and_an_empty_one(parser: Callable[..., dict[str, Any]]):
    for each in (demo_server(3000, announce=print), AsenaServer(port=0)):
        assert parser(each.asyncapi())["said"] == []


@pytest.mark.js
def test_the_official_parser_would_notice_a_mistake(parser: Callable[..., dict[str, Any]]):
    broken = json.loads(json.dumps(DOCUMENT))
    broken["operations"]["auction.bid"]["messages"] = [{"$ref": "#/channels/auction/messages/Nothing"}]
    assert any("Nothing" in each or "messages" in each for each in parser(broken)["said"])


def test_what_comes_in_and_what_goes_out_have_schemas_of_their_own():
    messages = DOCUMENT["channels"]["auction"]["messages"]
    schemas = DOCUMENT["components"]["schemas"]
    (received,) = DOCUMENT["operations"]["auction.bid"]["messages"]
    sent = DOCUMENT["operations"]["auction.send"]["messages"][0]

    def last(reference: dict[str, str]) -> str:
        return reference["$ref"].rpartition("/")[2]

    needs_tag = messages[last(received)]["payload"]
    assert needs_tag["allOf"][1] == {"required": ["type"]}, "although it has a default"
    taken, given = schemas[last(needs_tag["allOf"][0])], schemas[last(messages[last(sent)]["payload"])]
    assert taken["required"] == ["amount"]
    assert given["required"] == ["type", "amount", "tags"]
    assert {"type": "number", "exclusiveMinimum": 0} in taken["properties"]["amount"]["anyOf"]
    assert given["properties"]["amount"]["type"] == "string"
    assert {each["$schema"] for each in schemas.values()} == {"http://json-schema.org/draft-07/schema#"}


def test_docstrings_query_addresses_and_calls_are_told():
    channel, operation = DOCUMENT["channels"]["auction"], DOCUMENT["operations"]["auction.bid"]
    assert (channel["summary"], channel["description"]) == ("A live auction.", "Everybody sees every bid.")
    assert operation["summary"] == "Bid for the lot."
    query = channel["bindings"]["ws"]["query"]
    assert query["properties"]["name"]["minLength"] == 1
    assert query["required"] == ["name"]
    assert "query" not in DOCUMENT["channels"]["admin.console"]["bindings"]["ws"], "the token stands for the values"
    assert channel["x-centrifuge"] == {"address": "/auction/connection/websocket"}
    assert "x-centrifuge" not in DOCUMENT["channels"]["admin.console"]
    assert operation["x-rpc-methods"] == ["bid"]
    assert DOCUMENT["operations"]["auction.withdraw"]["x-rpc-methods"] == ["withdraw", "undo"]
    assert DOCUMENT["servers"] == {"default": {"host": "localhost:3210", "protocol": "ws"}}
    assert DOCUMENT["info"] == {"title": "Auction <house>", "version": "1.2"}


def test_where_clients_connect_is_left_out_while_it_is_not_known():
    assert "servers" not in AsenaServer(port=0).asyncapi()


def test_two_models_of_one_name_are_two_messages():
    def another(kind: str) -> type[BaseModel]:
        class Bid(BaseModel):
            type: Literal["one"] if kind == "one" else Literal["two"]  # type: ignore[valid-type]

        return Bid

    one, two = another("one"), another("two")

    @WebSocket("/twice")
    class Twice(AsenaWebSocketService):
        @on(one)
        def first(self, ws: Socket, message: Any) -> None: ...

        @on(two)
        def second(self, ws: Socket, message: Any) -> None: ...

    document = AsenaServer(Twice, port=0).asyncapi()
    messages = document["channels"]["twice"]["messages"]
    assert list(messages) == ["Bid", "Bid_2"]
    constants = [
        document["components"]["schemas"][each["payload"]["$ref"].rpartition("/")[2]]["properties"]["type"]["const"]
        for each in messages.values()
    ]
    assert constants == ["one", "two"]


def test_what_json_schema_cannot_express_is_named():
    class Odd(BaseModel):
        call: Callable[[], None]

    @WebSocket("/odd", sends=Odd)
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None: ...

    with pytest.raises(ConfigurationError, match="sends of Service: JSON Schema cannot express Odd"):
        AsenaServer(Service, port=0).asyncapi()


def test_what_is_sent_is_the_second_type_of_the_base_class_unless_declared():
    @WebSocket("/typed")
    class Typed(AsenaWebSocketService[Any, str | bytes]): ...

    @WebSocket("/both", sends=str)
    class Both(AsenaWebSocketService[Any, str | bytes]): ...

    @WebSocket("/none")
    class Neither(AsenaWebSocketService[Any]): ...

    operations = AsenaServer(Typed, Both, Neither, port=0).asyncapi()["operations"]
    assert {key: len(each["messages"]) for key, each in operations.items()} == {"typed.send": 2, "both.send": 1}


def test_sends_has_to_be_a_type():
    with pytest.raises(ConfigurationError, match=r"sends takes a type, or a union such as Bid \| Sold, not 5"):
        WebSocket("/x", sends=5)


def test_keywords_are_translated_and_names_left_alone():
    """From JSON Schema 2020-12, which pydantic writes, to draft-07."""
    assert draft07(
        {
            "properties": {
                "prefixItems": {"$ref": "#/x", "description": "a field of this name"},
                "default": {"default": {"$ref": 1, "other": 2}, "type": "object"},
                "pair": {"prefixItems": [{"type": "string"}], "maxItems": 1, "type": "array"},
                "either": {"oneOf": [], "discriminator": {"propertyName": "type", "mapping": {}}},
            }
        }
    ) == {
        "properties": {
            "prefixItems": {"allOf": [{"$ref": "#/x"}], "description": "a field of this name"},
            "default": {"default": {"$ref": 1, "other": 2}, "type": "object"},
            "pair": {"items": [{"type": "string"}], "additionalItems": True, "maxItems": 1, "type": "array"},
            "either": {"oneOf": [], "discriminator": "type"},
        }
    }


async def test_the_document_and_its_page_are_served(serve: Serve):
    from tornado.httpclient import AsyncHTTPClient

    from tests.contract_app import Anything, Auction, Console, Raw

    served = serve(
        Auction, Console, Anything, Raw,
        asyncapi_path="asyncapi.json", asyncapi_page="/docs", asyncapi_info={"title": "Auction <house>"},
    )  # fmt: skip
    fetch = AsyncHTTPClient().fetch
    answer = await fetch(served.url("/asyncapi.json"))
    assert answer.headers["Content-Type"] == "application/vnd.aai.asyncapi+json;version=3.0.0"
    assert json.loads(answer.body) == served.asyncapi()
    assert served.asyncapi()["servers"]["default"]["host"] == f"localhost:{served.port}"
    page = (await fetch(served.url("/docs"))).body.decode()
    assert "<h1>Auction &lt;house&gt;</h1>" in page
    assert "A live auction." in page
    assert "rpc(&quot;bid&quot;, …)" in page
    assert f"ws://localhost:{served.port}/auction" in page
    assert page.count('<h3 id="type.Lot">') == 1, "it contains itself"
    assert "<script" not in page
    assert "src=" not in page
    assert "https://" not in page


def test_a_path_that_is_taken_is_refused():
    from tests.contract_app import Auction

    for options in (
        {"asyncapi_path": "/auction"},
        {"asyncapi_page": "/auction"},
        {"asyncapi_path": "/docs", "asyncapi_page": "docs"},
        {"asyncapi_path": "/inspector", "inspector_path": "/inspector"},
    ):
        with pytest.raises(ConfigurationError, match=r"is taken already; give asyncapi_pa(th|ge) another path"):
            AsenaServer(Auction, **options)  # type: ignore[arg-type]


def test_the_command_line_prints_it():
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "asena_tornado", "asyncapi", "tests.contract_app:server", *arguments]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=50, check=True).stdout

    assert json.loads(said()) == DOCUMENT
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(said("--yaml")) == DOCUMENT
