"""Where a server's loop lives, what it listens on, and how it is reached."""

from .held import hold, new_poll, random_bytes
from .kernel import cells, in_cell, pass_interrupt_on, show_in_cells, waking
from .listen import Acceptor, listen
from .loops import (
    LoopDoor,
    LoopKind,
    LoopThread,
    beside,
    in_empty_context,
    interruptible,
    new_event_loop,
    run_nested,
    running_loop,
)
from .reachability import Reach, reach
from .signals import until_signaled
from .switching import switching
from .turns import lock_within, queue, turn
from .waiting import AFTER_CANCEL, held_up_at, wait_for

__all__ = [
    "AFTER_CANCEL",
    "Acceptor",
    "LoopDoor",
    "LoopKind",
    "LoopThread",
    "Reach",
    "beside",
    "cells",
    "held_up_at",
    "hold",
    "in_cell",
    "in_empty_context",
    "interruptible",
    "listen",
    "lock_within",
    "new_event_loop",
    "new_poll",
    "pass_interrupt_on",
    "queue",
    "random_bytes",
    "reach",
    "run_nested",
    "running_loop",
    "show_in_cells",
    "switching",
    "turn",
    "until_signaled",
    "wait_for",
    "waking",
]
