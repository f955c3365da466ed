"""The TypeScript of a server: `tsc` takes what is right and refuses what is wrong, with asena.js and with the SDK."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import asena_tornado
from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, WebSocket
from tests.contract_app import server
from tests.npm import installed

USES = """
import { Centrifuge } from "CLIENT";
import type { Anything, Auction, Console, Lot, Raw, Typed } from "./contract";

async function right(client: Typed<Centrifuge, Auction>): Promise<void> {
  const reply = await client.rpc("bid", { amount: 5 });
  const lots: Lot[] = reply.data.items;
  const parts: number = lots[0].parts[0].size[1];
  await client.rpc("undo", { lot: parts });
  const whole = await client.rpc("", { type: "bid", amount: "5.5", tags: ["x"] });
  if (whole.data !== null) whole.data.items.pop();
  await client.send({ type: "withdraw", lot: 1 });
  client.on("message", (ctx) => {
    if (ctx.data.type === "bid") console.log(ctx.data.amount.length, ctx.data.tags.length);
    else console.log(ctx.data.lot.at, ctx.data.to?.length);
  }).on("connected", (ctx) => console.log(ctx.client));
  const room = client.newSubscription("lot", { recoverable: true });
  room.on("publication", (ctx) => console.log(ctx.data.type, ctx.offset)).subscribe();
  await room.ready();
  client.removeSubscription(room);
  client.connect();
  const path: "/auction" = null as unknown as Auction["path"];
  const query: Auction["query"] = { name: "ann" };
  const heard: Console["sends"] = new ArrayBuffer(1);
  console.log(path, query, heard);
}

async function wrong(client: Typed<Centrifuge, Auction>): Promise<void> {
  // @ts-expect-error: there is no such method
  await client.rpc("sell", { amount: 5 });
  // @ts-expect-error: a field is missing
  await client.rpc("bid", {});
  // @ts-expect-error: a field is missing
  await client.rpc("bid");
  // @ts-expect-error: it has another type
  await client.rpc("undo", { lot: "1" });
  // @ts-expect-error: the reply is something else
  (await client.rpc("bid", { amount: 5 })).data.amount;
  // @ts-expect-error: the reply is null
  (await client.rpc("undo", { lot: 1 })).data.items;
  // @ts-expect-error: nobody knows which message this is
  await client.send({ amount: 5 });
  // @ts-expect-error: nobody takes this one
  await client.send({ type: "sold", lot: 1 });
  // @ts-expect-error: what comes has no such field
  client.on("message", (ctx) => ctx.data.nothing);
  // @ts-expect-error: which of them has it is not known yet
  client.on("publication", (ctx) => ctx.data.lot);
  // @ts-expect-error: there is no such event
  client.on("news", () => {});
  // @ts-expect-error: what comes has no such field
  client.newSubscription("lot").on("publication", (ctx) => ctx.data.nothing);
  // @ts-expect-error: a name is needed
  const query: Auction["query"] = {};
  // @ts-expect-error: bytes are wrapped
  const raw: Raw["accepts"] = "bytes";
  // @ts-expect-error: what is not declared is not known
  (null as unknown as Anything["sends"]).length;
  console.log(query, raw);
}

void right(new Centrifuge("ws://localhost") as Typed<Centrifuge, Auction>);
void wrong(new Centrifuge("ws://localhost") as Typed<Centrifuge, Auction>);
"""

Check = Callable[[str, str], str]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory, "npm-typescript", "typescript@5", "centrifuge@5")


@pytest.fixture
def check(packages: Path, tmp_path: Path) -> Check:
    """What ``tsc --strict`` says of a program beside the declarations of a server, where nothing is good."""

    def check(declarations: str, program: str) -> str:
        (tmp_path / "node_modules").symlink_to(packages)
        (tmp_path / "contract.d.ts").write_text(declarations)
        (tmp_path / "program.ts").write_text(program)
        shutil.copy(Path(asena_tornado.__file__).parent / "client" / "asena.d.ts", tmp_path)
        command = [
            "node", str(packages / "typescript" / "bin" / "tsc"), "--strict", "--noEmit", "--target", "es2022",
            "--module", "esnext", "--moduleResolution", "bundler", "--lib", "es2022,dom", "program.ts",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
        return done.stdout + done.stderr

    return check


@pytest.mark.js
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("client", ["./asena.js", "centrifuge"])
def test_right_uses_compile_and_wrong_ones_do_not(check: Check, client: str):
    assert check(server.typescript(), USES.replace("CLIENT", client)) == ""


@pytest.mark.js
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_odd_names_and_texts_do_not_break_it(check: Check):
    from typing import Any

    from pydantic import BaseModel, ConfigDict, Field

    class Promise(BaseModel):
        """Ends here: */ export const oops = 1; /*"""

        model_config = ConfigDict(extra="allow")
        odd: int = Field(alias='an odd "name"')
        maps: dict[str, list[int | None]]
        more: tuple[int, ...]
        anything: Any

    class Typed(BaseModel):
        it: Promise

    @WebSocket("/Namespace", name="Client", sends=Typed)
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: Promise) -> dict[str, Promise]:
            raise NotImplementedError

    uses = """
    import type * as contract from "./contract";
    type Odd = contract.Client2["accepts"];
    const odd: Odd = { 'an odd "name"': 1, maps: { a: [1, null] }, more: [1, 2], anything: [], x: 1 };
    // @ts-expect-error: no list of texts
    const wrong: Odd = { ...odd, maps: { a: ["x"] } };
    console.log(odd, wrong);
    """
    assert check(AsenaServer(Service, port=0).typescript(), uses) == ""


def test_the_command_line_prints_it():
    command = [sys.executable, "-m", "asena_tornado", "types", "tests.contract_app:server"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == server.typescript()
    assert "new Centrifuge(url) as Typed<Centrifuge, Auction>" in done.stdout
