"""System calls that hold the interpreter lock (GIL): what keeps a server alive beside a cell that computes.

Python lets go of the lock around every system call, in case it blocks. Beside a thread that computes that is the worst
it can do: the call takes a microsecond, and then the thread waits for the lock again, for a switch interval (5 ms) or,
where the other makes short system calls too, for as long as it keeps losing the race. A call on a non-blocking socket
cannot block, and neither can a look for events with a time limit of 0. Those are made here through `ctypes.PyDLL`,
which keeps the lock. Only the wait for events lets go of it.

Everything behaves as Python's own calls do, errno for errno, and *is* Python's own where there is no C library to be
called, on Windows, and for sockets that may block. TLS and compression let go of the lock in OpenSSL's and zlib's
wrappers; there is no other way to them.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import select
import selectors
import socket
import struct
import sys
import threading
from typing import Any

from .fairness import FairShare

_COPIED = 1 << 18  # bytes of a view that one send copies; bytes objects are sent as they are
_MOST = 1 << 30  # bytes that one call is asked for, as a length is passed as a C int
_RECEIVED = 1 << 16  # bytes that one `recv` returns at most
_EVENTS = 256  # that one look finds; what else is ready is found by the next


def _load() -> Any:
    """The C library of this process; None where there is none that could be called."""
    if os.name != "posix":
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


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


class _Buffer(threading.local):
    """What `recv` receives into, for each thread: without the lock's protection the bytes would be mixed up."""

    def __init__(self) -> None:
        self.bytes = ctypes.create_string_buffer(_RECEIVED)


_buffer = _Buffer()
_accept4 = getattr(libc, "accept4", None) if sys.platform == "linux" else None


class HeldSocket(socket.socket):
    """A stream socket whose calls hold the lock, as long as it is non-blocking. Made by `hold`."""

    __slots__ = ()

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send, as ``socket.send``. Of a view or bytearray at most 256 KiB are taken at once."""
        if flags or libc is None or self.gettimeout() != 0:
            return super().send(data, flags)
        if type(data) is not bytes:
            with memoryview(data) as view:
                data = bytes(view) if view.nbytes <= _COPIED else bytes(view.cast("B")[:_COPIED])
        size: int = libc.send(self.fileno(), data, min(len(data), _MOST), _NO_SIGNAL)
        if size < 0:
            if ctypes.get_errno() == errno.EINTR:
                return super().send(data)  # which knows what signal handlers are owed
            raise _last_error()
        return size

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /) -> int:
        """Send several, as ``socket.sendmsg``; at most 256 KiB at once."""
        if ancdata or flags or address is not None or libc is None or self.gettimeout() != 0:
            return super().sendmsg(buffers, ancdata, flags, address)
        joined = bytearray()
        for buffer in buffers:
            with memoryview(buffer) as view:
                joined += view if view.nbytes <= _COPIED else view.cast("B")[:_COPIED]
            if len(joined) >= _COPIED:
                break
        return self.send(joined)

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive, as ``socket.recv``; at most 64 KiB at once."""
        if bufsize <= 0 or flags or libc is None or self.gettimeout() != 0:
            return super().recv(bufsize, flags)
        buffer = _buffer.bytes
        size: int = libc.recv(self.fileno(), buffer, min(bufsize, _RECEIVED), 0)
        if size < 0:
            if ctypes.get_errno() == errno.EINTR:
                return super().recv(bufsize)
            raise _last_error()
        received: bytes = buffer[:size]  # type: ignore[assignment]  # an array of c_char gives bytes
        return received

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into a buffer, as ``socket.recv_into``."""
        if flags or libc is None or self.gettimeout() != 0:
            return super().recv_into(buffer, nbytes, flags)
        room = len(buffer) if type(buffer) is bytearray else memoryview(buffer).nbytes
        if not 0 <= nbytes <= room or not room:
            return super().recv_into(buffer, nbytes)  # which says what is wrong
        place = ctypes.byref(ctypes.c_char.from_buffer(buffer))
        size: int = libc.recv(self.fileno(), place, min(nbytes or room, _MOST), 0)
        if size < 0:
            if ctypes.get_errno() == errno.EINTR:
                return super().recv_into(buffer, nbytes)
            raise _last_error()
        return size

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept, as ``socket.accept``; the new socket is held and non-blocking, too."""
        if _accept4 is None or libc is None or self.gettimeout() != 0 or self.family not in _ADDRESSES:
            return super().accept()
        place = ctypes.create_string_buffer(128)
        fd = _accept4(self.fileno(), place, ctypes.byref(ctypes.c_int(128)), socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if fd < 0:
            if ctypes.get_errno() == errno.EINTR:
                return super().accept()
            raise _last_error()
        accepted = HeldSocket(self.family, self.type | socket.SOCK_NONBLOCK, self.proto, fileno=fd)
        return accepted, _ADDRESSES[self.family](place.raw)

    def setblocking(self, flag: bool, /) -> None:
        """As ``socket.setblocking``; says nothing to the system that it knows already."""
        if flag or self.gettimeout() != 0 or self.fileno() < 0:
            super().setblocking(flag)

    def shutdown(self, how: int, /) -> None:
        """As ``socket.shutdown``."""
        if libc is None or self.gettimeout() != 0:
            super().shutdown(how)
        elif libc.shutdown(self.fileno(), how) < 0:
            raise _last_error()

    def _real_close(self, *args: Any) -> None:
        # What close() ends in, once no file made of the socket needs it any more.
        if libc is None or self.gettimeout() != 0:
            super()._real_close(*args)  # type: ignore[misc]  # typeshed leaves it out
            return
        fd = self.detach()
        # Linux has given the descriptor up in any case; the peer's reset is no news to who closes.
        if fd >= 0 and libc.close(fd) < 0 and ctypes.get_errno() != errno.ECONNRESET:
            raise _last_error()


_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


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
    """Have the calls of this socket hold the lock from now on, whoever has it. Returns the same object.

    A TLS socket, or any other that is not a plain one, stays as it is.
    """
    if type(sock) is socket.socket and libc is not None:
        sock.__class__ = HeldSocket
    return sock


# struct epoll_event is packed on x86-64 and nowhere else; of its data, Python sets the descriptor.
_EVENT = struct.Struct("=Ii4x" if os.uname().machine == "x86_64" else "=I4xi4x") if os.name == "posix" else None


class HeldEpoll:
    """``select.epoll`` that holds the lock but where it waits: it looks first, and waits only if there is nothing."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()
        self._share = FairShare()
        assert _EVENT is not None
        self._size = _EVENT.size
        self._found = ctypes.create_string_buffer(self._size * _EVENTS)
        self._view = memoryview(self._found).cast("B")

    def _control(self, operation: int, fd: int, events: int) -> None:
        assert _EVENT is not None
        if libc.epoll_ctl(self._fd, operation, fd, _EVENT.pack(events, fd)) < 0:
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
        self._share.pause()
        count = libc.epoll_wait(self._fd, self._found, _EVENTS, 0)
        if count > 0:
            assert _EVENT is not None
            return [(fd, events) for events, fd in _EVENT.iter_unpack(self._view[: count * self._size])]
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


class _Kevent(ctypes.Structure):
    """macOS's struct kevent."""

    _fields_ = (
        ("ident", ctypes.c_size_t),
        ("filter", ctypes.c_int16),
        ("flags", ctypes.c_uint16),
        ("fflags", ctypes.c_uint32),
        ("data", ctypes.c_ssize_t),
        ("udata", ctypes.c_void_p),
    )


class HeldKqueue:
    """``select.kqueue``, likewise."""

    def __init__(self) -> None:
        self._kqueue: Any = select.kqueue()  # type: ignore[attr-defined,unused-ignore]  # not on Linux
        self._share = FairShare()
        self._found = (_Kevent * _EVENTS)()
        self._no_time = (ctypes.c_long * 2)(0, 0)

    def control(self, changes: Any, max_events: int, timeout: float | None = None, /) -> Any:
        """As ``select.kqueue.control``: what is ready, each with ``ident`` and ``filter``."""
        self._share.pause()
        given = [(each.ident, each.filter, each.flags, each.fflags, each.data, None) for each in changes or ()]
        array: Any = (_Kevent * len(given))(*given)  # type: ignore[misc]  # a structure takes a tuple
        fd = self._kqueue.fileno()
        count = libc.kevent(fd, array, len(given), self._found, min(max_events, _EVENTS), self._no_time)
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
    selector = selectors.DefaultSelector()
    held: Any = {"linux": HeldEpoll, "darwin": HeldKqueue}.get(sys.platform)
    if held is not None and libc is not None and hasattr(libc, "epoll_wait" if held is HeldEpoll else "kevent"):
        # Not public, but the same in all versions; in another one the attribute is merely not looked at.
        unused: Any = getattr(selector, "_selector", None)
        if unused is not None:
            unused.close()
            selector._selector = held()  # type: ignore[attr-defined]
    return selector


class HeldLoop(asyncio.SelectorEventLoop):
    """asyncio's loop for a thread beside one that computes: it takes the lock once per turn.

    What it overrides is asyncio's own business. Where a Python has no such method it is not called, and that system
    call lets go of the lock as ever.
    """

    def __init__(self) -> None:
        super().__init__(_selector())

    def _make_self_pipe(self) -> None:
        super()._make_self_pipe()  # type: ignore[misc]  # typeshed leaves it out
        # Only the end that is read here: who wakes the loop may as well let it run.
        hold(self._ssock)  # type: ignore[attr-defined]

    def _make_socket_transport(self, sock: socket.socket, *args: Any, **kwargs: Any) -> Any:
        return super()._make_socket_transport(hold(sock), *args, **kwargs)  # type: ignore[misc]


def random_bytes(size: int) -> bytes:
    """As ``os.urandom``."""
    if libc is None or not hasattr(libc, "getrandom"):
        return os.urandom(size)
    buffer = ctypes.create_string_buffer(size)
    # Never in part, and never waiting, once the system has booted: getrandom(2).
    return buffer.raw if libc.getrandom(buffer, size, 0) == size else os.urandom(size)
