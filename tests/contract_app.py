"""An application whose contract has something of everything, for test_asyncapi and test_typescript."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, TokenAuth, WebSocket, on

T = TypeVar("T")


class Bid(BaseModel):
    """An offer for a lot."""

    type: Literal["bid"] = "bid"
    amount: Annotated[Decimal, Field(gt=0, description="In the currency of the lot.")]
    tags: list[str] = []


class Withdraw(BaseModel):
    type: Literal["withdraw", "undo"]
    lot: int


class Lot(BaseModel):
    id: int
    at: datetime
    parts: "list[Lot]" = []
    size: tuple[int, int] = (0, 0)


class Page(BaseModel, Generic[T]):
    items: list[T]


class Sold(TypedDict):
    type: Literal["sold"]
    lot: Lot
    to: str | None


class Visitor(BaseModel):
    name: Annotated[str, Field(min_length=1)]
    lots: list[int] = []


@WebSocket("/auction", sends=Bid | Sold)
class Auction(AsenaWebSocketService[Visitor]):
    """A live auction.

    Everybody sees every bid.
    """

    @on(Bid)
    async def bid(self, ws: Socket[Visitor], bid: Bid) -> Page[Lot]:
        """Bid for the lot."""
        raise NotImplementedError

    @on(Withdraw)
    def withdraw(self, ws: Socket[Visitor], message: Withdraw) -> None: ...


class User(BaseModel):
    id: str


Command = Annotated[Bid | Withdraw, Field(discriminator="type")]


@WebSocket("/admin/console", middlewares=[TokenAuth(lambda token: None)], protocols=["plain"], sends=str | bytes)
class Console(AsenaWebSocketService[User]):
    def on_message(self, ws: Socket[User], command: Command) -> str:
        return "done"


@WebSocket("/any")
class Anything(AsenaWebSocketService):
    def on_message(self, ws, message): ...


@WebSocket("/raw")
class Raw(AsenaWebSocketService):
    def on_message(self, ws: Socket, message: bytes) -> None: ...


server = AsenaServer(
    Auction, Console, Anything, Raw,
    port=3210,
    asyncapi_path="/asyncapi.json",
    asyncapi_page="/docs",
    asyncapi_info={"title": "Auction <house>", "version": "1.2"},
)  # fmt: skip
