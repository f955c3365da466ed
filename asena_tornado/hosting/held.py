"""System calls that hold the interpreter lock (GIL): what keeps a server alive beside a cell that computes.

Python lets go of the lock around every system call, in case it blocks. Beside a thread that computes, nothing could be
worse: the call takes a microsecond, and then the thread waits for the lock again, for a switch interval (5 ms) or,
where the other makes short system calls too, for as long as it keeps losing the race. A call on a non-blocking socket
cannot block, and neither can a look for events with a time limit of 0. Those are made here through `ctypes.PyDLL`,
which keeps the lock. Only the wait for events lets go of it.

Everything behaves as Python's own calls do, errno for errno, except that less may be sent or received at once. Python's
own calls are used where there is no C library to call, on Windows, and for sockets that may block. The calls into
OpenSSL and zlib let go of the lock, as Python offers no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import select
import selectors
import socket
import struct
import sys
import threading
from typing import Any

from .fairness import FairShare

try:
    import ctypes
except ImportError:  # a Python that was built without libffi
    ctypes = None  # type: ignore[assignment]

_MAX_COPY = 1 << 16  # bytes of a view that one send copies; bytes objects are sent as they are
_MAX_LENGTH = 1 << 30  # bytes that one call is asked for, as a length is passed as a C int
_MAX_RECEIVE = 1 << 16  # bytes that one `recv` returns
_MAX_EVENTS = 256  # that one look finds; what else is ready is found by the next

# A descriptor may be shared with another process, which may have made it blocking: nothing must block here.
_SEND_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0) | getattr(socket, "MSG_DONTWAIT", 0)
_RECV_FLAGS = getattr(socket, "MSG_DONTWAIT", 0)


def _load() -> Any:
    """The C library of this process; None where it cannot be called."""
    if os.name != "posix" or ctypes is None:
        return None
    try:
        library = ctypes.PyDLL(None, use_errno=True)
        # No declared arguments: that doubles what a call costs. An int is passed as a C int, bytes as a pointer.
        library.send.restype = library.recv.restype = ctypes.c_ssize_t
        library.close, library.shutdown  # noqa: B018  # AttributeError where they are missing
    except (OSError, AttributeError):
        return None
    return library


libc: Any = _load()


@functools.lru_cache(maxsize=16)
def _array(size: int) -> Any:
    """The type of an array of ``size`` bytes, kept: ctypes would make a class anew once its last instance is gone."""
    return ctypes.c_char * size


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


class _Buffer(threading.local):
    """What `recv` receives into, one for each thread: the lock may be handed over before it is read."""

    def __init__(self) -> None:
        self.bytes = ctypes.create_string_buffer(_MAX_RECEIVE)


_buffer: Any = _Buffer() if libc is not None else None


class HeldSocket(socket.socket):
    """A stream socket whose calls hold the lock, as long as it is non-blocking. Made by `hold`, where there is libc."""

    __slots__ = ()

    # What ctypes passes for the socket: its descriptor as of the very moment of the call, -1 once it is closed.
    _as_parameter_ = property(socket.socket.fileno)

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send, as ``socket.send``. Of a view or bytearray at most 64 KiB are taken at once."""
        if flags or self.gettimeout() != 0:
            return super().send(data, flags)
        if type(data) is not bytes:
            with memoryview(data) as view:
                if not view.contiguous:
                    return super().send(data)  # which says what is wrong
                data = bytes(view) if view.nbytes <= _MAX_COPY else bytes(view.cast("B")[:_MAX_COPY])
        size: int = libc.send(self, data, min(len(data), _MAX_LENGTH), _SEND_FLAGS)
        if size < 0:
            if ctypes.get_errno() == errno.EINTR:
                return super().send(data)  # which runs signal handlers, and tries again
            del data  # which the traceback would keep
            raise _last_error()
        return size

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /) -> int:
        """Send several, as ``socket.sendmsg``; about 64 KiB at once."""
        if ancdata or flags or address is not None or self.gettimeout() != 0:
            return super().sendmsg(buffers, ancdata, flags, address)
        buffers = list(buffers)
        joined = bytearray()
        for buffer in buffers:
            with memoryview(buffer) as view:
                if not view.contiguous:
                    return super().sendmsg(buffers)  # which says what is wrong
                joined += view if view.nbytes <= _MAX_COPY else view.cast("B")[:_MAX_COPY]
            if len(joined) >= _MAX_COPY:
                break
        return self.send(bytes(joined))

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive, as ``socket.recv``; at most 64 KiB at once."""
        if (
            (flags and flags != socket.MSG_PEEK)
            or type(bufsize) is not int
            or not 0 < bufsize <= _MAX_LENGTH
            or self.gettimeout() != 0
        ):
            return super().recv(bufsize, flags)
        buffer = _buffer.bytes
        size: int = libc.recv(self, buffer, min(bufsize, _MAX_RECEIVE), _RECV_FLAGS | flags)
        if size < 0:
            if ctypes.get_errno() == errno.EINTR:
                return super().recv(bufsize, flags)
            raise _last_error()
        received: bytes = buffer[:size]
        return received

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into a buffer, as ``socket.recv_into``."""
        if flags or type(nbytes) is not int or self.gettimeout() != 0:
            return super().recv_into(buffer, nbytes, flags)
        room = len(buffer) if type(buffer) is bytearray else memoryview(buffer).nbytes
        if not 0 <= nbytes <= room or not room:
            return super().recv_into(buffer, nbytes)  # which says what is wrong
        place = ctypes.byref(ctypes.c_char.from_buffer(buffer))
        size: int = libc.recv(self, place, min(nbytes or room, _MAX_LENGTH), _RECV_FLAGS)
        del place
        if size < 0:
            if ctypes.get_errno() == errno.EINTR:
                return super().recv_into(buffer, nbytes)
            del buffer  # which the traceback would keep, and keep from changing its size
            raise _last_error()
        return size

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept, as ``socket.accept``; on Linux the new socket is held and non-blocking, too."""
        if self.gettimeout() != 0 or sys.platform != "linux" or self.family not in _ADDRESSES:
            return super().accept()
        if self.fileno() >= 0 and os.get_blocking(self.fileno()):
            super().setblocking(False)  # another process has made it blocking
        place = _array(128)()
        length = ctypes.byref(ctypes.c_int(128))
        fd = libc.accept4(self, place, length, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if fd < 0:
            if ctypes.get_errno() == errno.EINTR:
                return super().accept()
            raise _last_error()
        accepted = HeldSocket(self.family, self.type | socket.SOCK_NONBLOCK, self.proto, fileno=fd)
        return accepted, _ADDRESSES[self.family](place.raw)

    def setblocking(self, flag: bool, /) -> None:
        """As ``socket.setblocking``; says nothing to the system that it knows already."""
        if flag is not False or self.gettimeout() != 0 or self.fileno() < 0 or os.get_blocking(self.fileno()):
            super().setblocking(flag)

    def shutdown(self, how: int, /) -> None:
        """As ``socket.shutdown``."""
        if type(how) is not int or not 0 <= how <= 2 or self.gettimeout() != 0:
            super().shutdown(how)
        elif libc.shutdown(self, how) < 0:
            raise _last_error()

    def _real_close(self, *args: Any) -> None:
        # What close() ends in, once no file made of the socket needs it any more.
        if self.gettimeout() != 0:
            super()._real_close(*args)  # type: ignore[misc]  # typeshed leaves it out
            return
        fd = self.detach()
        # Linux has given the descriptor up in any case, and we are closing: the peer's reset does not matter.
        if fd >= 0 and libc.close(fd) < 0 and ctypes.get_errno() != errno.ECONNRESET:
            raise _last_error()


def _inet(raw: bytes) -> tuple[str, int]:
    (port,) = struct.unpack_from("!H", raw, 2)
    return socket.inet_ntop(socket.AF_INET, raw[4:8]), port


def _inet6(raw: bytes) -> tuple[str, int, int, int]:
    port, flow = struct.unpack_from("!HI", raw, 2)
    (scope,) = struct.unpack_from("=I", raw, 24)
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port, flow, scope


# Linux's struct sockaddr_in and sockaddr_in6 as Python shows them.
_ADDRESSES = {socket.AF_INET: _inet, socket.AF_INET6: _inet6}


def hold(sock: socket.socket) -> socket.socket:
    """Make this socket's calls hold the lock from now on. Returns the same object, which others may refer to.

    A TLS socket, or any other that is not a plain stream, stays as it is.
    """
    if libc is not None and type(sock) is socket.socket and sock.type == socket.SOCK_STREAM:
        sock.__class__ = HeldSocket
    return sock


class HeldEpoll:
    """``select.epoll`` that holds the lock except where it waits: it looks first, and waits if there is nothing."""

    def __init__(self, event: struct.Struct, *, share: bool = True) -> None:
        """``event``: what `_event_layout` found. ``share``: whether each look may pause in favour of a cell."""
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()
        self._share = FairShare() if share else None
        self._event = event
        self._found = ctypes.create_string_buffer(event.size * _MAX_EVENTS)
        self._view = memoryview(self._found).cast("B")

    def _control(self, operation: int, fd: int, events: int) -> None:
        if libc.epoll_ctl(self._fd, operation, fd, self._event.pack(events, fd)) < 0:
            raise _last_error()

    def register(self, fd: int, eventmask: int) -> None:
        """As ``select.epoll.register``."""
        self._control(1, fd, eventmask)  # EPOLL_CTL_ADD

    def modify(self, fd: int, eventmask: int) -> None:
        """As ``select.epoll.modify``."""
        self._control(3, fd, eventmask)  # EPOLL_CTL_MOD

    def unregister(self, fd: int) -> None:
        """As ``select.epoll.unregister``."""
        self._control(2, fd, 0)  # EPOLL_CTL_DEL

    def poll(self, timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
        """As ``select.epoll.poll``: (descriptor, events) of each that is ready."""
        if self._share is not None:
            self._share.pause()
        count = libc.epoll_wait(self._fd, self._found, _MAX_EVENTS, 0)
        if count > 0:
            event = self._event
            return [(fd, events) for events, fd in event.iter_unpack(self._view[: count * event.size])]
        if count == 0 and timeout == 0:
            return []
        return self._epoll.poll(timeout, maxevents)

    def fileno(self) -> int:
        """As ``select.epoll.fileno``."""
        return self._epoll.fileno()

    def close(self) -> None:
        """As ``select.epoll.close``."""
        self._fd = -1
        self._epoll.close()


@functools.cache
def _event_layout() -> struct.Struct | None:
    """How this system lays out ``struct epoll_event``, which is packed on some processors; None if that is not known.

    Found by trying: Python sets the descriptor in the event's data.
    """
    if libc is None or not hasattr(libc, "epoll_wait"):
        return None
    ready, peer = socket.socketpair()
    with ready, peer, contextlib.closing(select.epoll()) as epoll:
        peer.send(b"x")
        epoll.register(ready, select.EPOLLIN)
        found = ctypes.create_string_buffer(64)
        libc.epoll_wait(epoll.fileno(), found, 1, 0)
        for layout in map(struct.Struct, ("=Ii4x", "=I4xi4x")):
            if layout.unpack_from(found) == (select.EPOLLIN, ready.fileno()):
                return layout
    return None


class HeldKqueue:
    """``select.kqueue``, likewise."""

    def __init__(self, *, share: bool = True) -> None:
        # macOS's struct kevent.
        class Kevent(ctypes.Structure):
            _fields_ = (
                ("ident", ctypes.c_size_t),
                ("filter", ctypes.c_int16),
                ("flags", ctypes.c_uint16),
                ("fflags", ctypes.c_uint32),
                ("data", ctypes.c_ssize_t),
                ("udata", ctypes.c_void_p),
            )

        self._event: Any = Kevent
        self._kqueue: Any = select.kqueue()  # type: ignore[attr-defined,unused-ignore]  # not on Linux
        self._share = FairShare() if share else None
        self._found = (Kevent * _MAX_EVENTS)()
        self._no_time = (ctypes.c_long * 2)(0, 0)

    def control(self, changes: Any, max_events: int, timeout: float | None = None, /) -> Any:
        """As ``select.kqueue.control``: what is ready, each with ``ident`` and ``filter``."""
        if self._share is not None:
            self._share.pause()
        given = [(each.ident, each.filter, each.flags, each.fflags, each.data, None) for each in changes or ()]
        array = (self._event * len(given))(*given)
        fd = self._kqueue.fileno()
        count = libc.kevent(fd, array, len(given), self._found, min(max_events, _MAX_EVENTS), self._no_time)
        if count < 0 and ctypes.get_errno() != errno.EINTR:
            raise _last_error()
        if count > 0 or timeout == 0 or not max_events:
            return self._found[: max(count, 0)]
        return self._kqueue.control(None, max_events, timeout)

    def fileno(self) -> int:
        """As ``select.kqueue.fileno``."""
        number: int = self._kqueue.fileno()
        return number

    def close(self) -> None:
        """As ``select.kqueue.close``."""
        self._kqueue.close()


def _selector() -> selectors.BaseSelector:
    """The system's best, holding the lock where that is possible."""
    selector: Any = selectors.DefaultSelector()
    held: Any = None
    if sys.platform == "linux" and isinstance(selector, selectors.EpollSelector):
        layout = _event_layout()
        held = None if layout is None else HeldEpoll(layout)
    elif sys.platform == "darwin" and hasattr(libc, "kevent") and isinstance(selector, selectors.KqueueSelector):
        held = HeldKqueue()
    if held is not None:
        # Not public, but the same in all versions. If it were renamed, setting this one would do no harm.
        unused, selector._selector = getattr(selector, "_selector", None), held  # noqa: SLF001
        if unused is not None:
            unused.close()
    return selector  # type: ignore[no-any-return]


def new_poll(*, held: bool) -> Any:
    """A ``select.epoll`` or ``select.kqueue``, whichever there is; ``held``: one that holds the lock, if possible."""
    if hasattr(select, "epoll"):
        layout = _event_layout() if held else None
        return select.epoll() if layout is None else HeldEpoll(layout, share=False)
    if held and hasattr(libc, "kevent"):
        return HeldKqueue(share=False)
    return select.kqueue()  # type: ignore[attr-defined,unused-ignore]  # not on Linux


class HeldLoop(asyncio.SelectorEventLoop):
    """asyncio's loop for a thread beside one that computes: it takes the lock once per turn.

    It overrides private methods of asyncio. On a Python that lacks one of them the override is never called, and that
    system call lets go of the lock as usual.
    """

    def __init__(self) -> None:
        super().__init__(_selector())

    def _make_self_pipe(self) -> None:
        super()._make_self_pipe()  # type: ignore[misc]  # typeshed leaves it out
        # Only the end that is read here: a thread that wakes the loop may as well let it run.
        hold(self._ssock)  # type: ignore[attr-defined]

    def _make_socket_transport(self, sock: socket.socket, *args: Any, **kwargs: Any) -> Any:
        return super()._make_socket_transport(hold(sock), *args, **kwargs)  # type: ignore[misc]

    def _make_ssl_transport(self, sock: socket.socket, *args: Any, **kwargs: Any) -> Any:
        return super()._make_ssl_transport(hold(sock), *args, **kwargs)  # type: ignore[misc]


def wait_precisely() -> None:
    """Have this thread's waits end when they are due.

    By default Linux may add 50 µs, which is long beside the interval for which a thread waits for the lock (prctl(2),
    PR_SET_TIMERSLACK).
    """
    if sys.platform == "linux" and libc is not None and hasattr(libc, "prctl"):
        libc.prctl(29, 1000, 0, 0, 0)  # nanoseconds


def random_bytes(size: int) -> bytes:
    """As ``os.urandom``."""
    if libc is None or not hasattr(libc, "getrandom"):
        return os.urandom(size)
    buffer = _array(size)()
    # Never in part, and never waiting, once the system has booted: getrandom(2).
    return buffer.raw if libc.getrandom(buffer, size, 0) == size else os.urandom(size)
