"""Where a server's loop lives, what it listens on, and how it is reached."""

from .kernel import in_cell, waking
from .listen import listen
from .loops import LoopDoor, LoopThread, in_empty_context, new_event_loop, run_nested, running_loop
from .reachability import Reach, reach

__all__ = [
    "LoopDoor",
    "LoopThread",
    "Reach",
    "in_cell",
    "in_empty_context",
    "listen",
    "new_event_loop",
    "reach",
    "run_nested",
    "running_loop",
    "waking",
]
