"""The Autobahn test suite, as kosoku runs it: its own case files against an echo service."""

from __future__ import annotations

import pytest

from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket, WebSocketOptions

pytestmark = pytest.mark.engine

kosoku = pytest.importorskip("kosoku")

# Compression of a thousand messages per case, in many sizes: minutes, and this runner cannot run all of them.
LONG = ["12.*", "13.*"]


@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_message(self, ws, message: str | bytes):
        ws.send(message)


@pytest.mark.slow
@pytest.mark.parametrize("compression", [False, True])
async def test_every_case_of_the_autobahn_suite_is_passed_strictly(compression):
    with AsenaServer(Echo, port=0, options=WebSocketOptions(compression=compression)) as server:
        try:
            results = await kosoku.run_fuzzingclient(server.url("/echo"), exclude_cases=LONG, concurrency=4)
        except kosoku.FailureError as failure:
            results = failure.results
    behaviour = {r.case_id: (r.behavior.value, r.behavior_close.value) for r in results}
    assert len(behaviour) > 250
    assert {case: how for case, how in behaviour.items() if not {*how} <= {"OK", "INFORMATIONAL"}} == {}
