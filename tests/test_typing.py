"""What a type checker makes of an application that uses the package."""

from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

APPLICATION = Path(__file__).with_name("typed_app.py")
STRICT = ["--strict", "--warn-unreachable", "--config-file=", "--no-error-summary"]
# Not the project's own: its settings differ, and one would keep invalidating the other.
CACHE = Path(__file__).parent.parent / ".mypy_cache" / "typed_app"


def checked(*files: str) -> str:
    """What mypy says about files when it is as strict as can be and knows no settings of this project."""
    said, complaints, _ = api.run([*STRICT, f"--cache-dir={CACHE}", *files])
    return str(said + complaints)


@pytest.mark.slow
def test_the_sample_application_passes_the_strictest_check():
    assert checked(str(APPLICATION)) == ""


@pytest.mark.slow
def test_the_check_would_notice_a_wrong_type(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        APPLICATION.read_text().replace("assert_type(Inject(Chat), Chat)", "assert_type(Inject(Chat), History)")
    )
    said = checked(str(wrong))
    assert 'Expression is of type "Chat", not "History"  [assert-type]' in said
    assert said.count("error:") == 1


SENDS = """
from pydantic import BaseModel
from asena_tornado import AsenaWebSocketService, Socket, WebSocket

class Visitor(BaseModel): ...
class Bid(BaseModel): ...
class Sold(BaseModel): ...
class Other(BaseModel): ...

@WebSocket("/auction")
class Auction(AsenaWebSocketService[Visitor, Bid | Sold]):
    def on_message(self, ws: Socket[Visitor, Bid | Sold], message: str) -> None:
        ws.send(Bid())
        ws.publish("lot", Sold())
        self.in_(Bid())
        for socket in self.sockets.values():
            socket.send(Sold())
        ws.send(Other())  # wrong
        ws.publish("lot", Other())  # wrong
        self.in_("text")  # wrong
        self.to("lot", Other())  # wrong
        self.get_sockets_by_room("lot")[0].send(Other())  # wrong

def anything(ws: Socket[Visitor], bare: Socket, auction: Auction) -> None:
    ws.send(Other())
    bare.send(Other())
    auction.to("lot", Other())  # wrong
"""


@pytest.mark.slow
def test_what_a_service_declares_to_send_is_checked(tmp_path):
    program = tmp_path / "sends.py"
    program.write_text(SENDS)
    complaints = [line for line in checked(str(program)).splitlines() if "error:" in line]
    wrong = [number for number, line in enumerate(SENDS.splitlines(), 1) if line.endswith("# wrong")]
    assert [int(line.split(":")[1]) for line in complaints] == wrong
    assert all('has incompatible type "' in line for line in complaints)
