"""The live view as a widget: one per server, however often it is displayed."""

from __future__ import annotations

import asyncio
import logging
from importlib.util import find_spec
from typing import Any, Protocol

from ..errors import ServerStateError
from ..hosting import cells
from .subject import Subject
from .view import STATIC, View

log = logging.getLogger("asena_tornado")

_PERIOD = 1.0  # seconds between the looks of a view
_LATE = 1.5  # seconds without a look after which the server pushes by itself: a cell may block the kernel
_FORGET = 10.0  # seconds without a look, while the kernel is idle, after which a view is taken to be gone


class _Session:
    """One display of the widget, while somebody sees it."""

    __slots__ = ("answered", "heard", "look")

    def __init__(self, look: dict[str, Any], now: float) -> None:
        self.look = look
        self.heard = self.answered = now


class Table(Protocol):
    """What is shown without widgets."""

    def _repr_html_(self) -> str: ...


class LiveView:
    """Shows itself as a widget that follows the server, in front ends that run widgets; otherwise as a table."""

    def __init__(self, table: Table, subject: Subject, *, read_only: bool = False) -> None:
        """``table``: what is shown where there are no widgets."""
        self._table = table
        self._subject = subject
        self._read_only = read_only

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        desk, namespace = self._subject.desk(), self._subject.path
        if self._subject.server.state != "running" or find_spec("anywidget") is None or not cells.watch():
            return {}
        key = (namespace, self._read_only)
        if key not in desk.widgets:
            desk.widgets[key] = _make_widget(View(desk, namespace=namespace, read_only=self._read_only))
        bundle = {"version_major": 2, "version_minor": 0, "model_id": desk.widgets[key].model_id}
        return {"application/vnd.jupyter.widget-view+json": bundle}

    def _repr_html_(self) -> str:
        return self._table._repr_html_()

    def __repr__(self) -> str:
        return repr(self._table)


class Link:
    """Between one widget and the server's loop; with no view open, it costs nothing."""

    def __init__(self, view: View, widget: Any) -> None:
        self._view = view
        self._widget = widget
        self._sessions: dict[str, _Session] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def views(self) -> int:
        """How many displays are open, as far as the server knows."""
        return len(self._sessions)

    def hear(self, _widget: Any, request: dict[str, Any], _buffers: Any) -> None:
        """A message from the front end, on one of the kernel's threads."""
        try:
            door = self._view.desk.subject.door()
            door.run(self._handle, door.loop, request)
        except ServerStateError as error:
            self._tell(request, {"state": "stopped", "error": str(error)})

    def _handle(self, loop: asyncio.AbstractEventLoop, request: dict[str, Any]) -> None:
        view = str(request.get("view"))
        if request.get("do") == "bye":
            self._sessions.pop(view, None)
            return
        if request.get("do") == "look":
            session = self._sessions.setdefault(view, _Session(request, loop.time()))
            session.look, session.heard = request, loop.time()
            # A server that was started again has another loop.
            if self._timer is None or self._loop is not loop:
                self._loop = loop
                self._timer = loop.call_later(_PERIOD, self._tick, loop)
        self._answer_soon(loop, request)

    def _answer_soon(self, loop: asyncio.AbstractEventLoop, request: dict[str, Any], *, pushed: bool = False) -> None:
        task = loop.create_task(self._answer(loop, request, pushed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, loop: asyncio.AbstractEventLoop, request: dict[str, Any], pushed: bool) -> None:
        answer = await self._view.answer(request)
        session = self._sessions.get(str(request.get("view")))
        if session is not None and request.get("do") == "look":
            session.answered = loop.time()
            if answer.get("events"):
                # What is pushed next begins after these.
                session.look = {**session.look, "since": answer["events"][-1]["number"]}
        self._tell(request, {**answer, "pushed": pushed})

    def _tell(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        try:
            self._widget.send({**answer, "view": request.get("view"), "to": request.get("do")})
        except Exception:
            log.exception("the live view could not be updated")
            self._sessions.clear()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Update the views that were alive before the running cell, as they cannot ask while it runs."""
        self._timer = None
        now = loop.time()
        for name, session in list(self._sessions.items()):
            if cells.idle and now - session.heard > _FORGET:
                del self._sessions[name]
            elif now - session.answered >= _LATE:
                session.answered = now
                self._answer_soon(loop, session.look, pushed=True)
        if self._sessions:
            self._timer = loop.call_later(_PERIOD, self._tick, loop)


def _make_widget(view: View) -> Any:
    import anywidget  # in the extra: notebook
    import traitlets

    class RoomsWidget(anywidget.AnyWidget):
        _esm = STATIC / "view.js"
        _css = STATIC / "view.css"
        # What was there when it was displayed: for saved notebooks, where nobody answers.
        snapshot = traitlets.Dict().tag(sync=True)

    widget = RoomsWidget(snapshot=view.glance())
    widget.link = Link(view, widget)
    widget.on_msg(widget.link.hear)
    return widget


__all__ = ["Link", "LiveView"]
