"""Bytes in and out of one upgraded connection: its socket, or Tornado's stream on loops that cannot watch a socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Protocol

from tornado.iostream import IOStream, StreamClosedError

from . import engine
from .ledger import Ledger
from .reader import Reader

# One read takes what gathered meanwhile, up to here: thousands of tiny frames in one chunk would hold up the others.
_READ_SIZE = 64 * 1024
_JOIN_BELOW = 64 * 1024
_LINGER = 1.0  # seconds
_RECORDS = 4  # of TLS, of 16 KiB each, that are read in one turn
_VECTOR = 64  # chunks per sendmsg, well below every system's IOV_MAX

_buffers = threading.local()


def _shared_buffer() -> memoryview:
    """The one read buffer of this thread's loop: it is empty again before the next socket is read."""
    try:
        return _buffers.view  # type: ignore[no-any-return]
    except AttributeError:
        _buffers.view = memoryview(bytearray(_READ_SIZE))
        return _buffers.view  # type: ignore[no-any-return]


class ChannelOwner(Protocol):
    """What gets the events of a channel. All calls come on the loop."""

    def data_received(self, data: bytes) -> None:
        """Take the next bytes from the client."""
        ...

    def peer_gone(self) -> None:
        """The client has closed its side. What it sent before that may still have to be read: do not pause any more."""
        ...

    def channel_lost(self, error: Exception | None) -> None:
        """The connection is gone, after an ``error`` if there was one. Nothing is called after this."""
        ...

    def channel_progressed(self) -> None:
        """The system has taken some of the bytes that were waiting."""
        ...

    def channel_drained(self) -> None:
        """The system has taken all of the bytes that were waiting."""
        ...


class Channel(Protocol):
    """One connection's bytes.

    ``waiting`` is how many the system has not taken yet. ``send`` is the socket's own, for code that writes to
    thousands in a row and reports with `sent` what became of it; it is None whenever `write` has to be used instead.
    """

    waiting: int
    send: Callable[[bytes], int] | None

    def start(self, owner: ChannelOwner, received: bytes) -> None:
        """Begin to read, and tell ``owner``, first of all about ``received``, which has already arrived."""
        ...

    def write(self, data: bytes) -> None:
        """Send what the system takes now and keep the rest, in order. Never waits and never raises."""
        ...

    def sent(self, data: bytes, size: int, error: OSError | None = None) -> None:
        """Keep the rest: the caller's ``send(data)`` took only ``size`` bytes, or raised ``error``."""
        ...

    def pause(self) -> None:
        """Stop reading, so that TCP slows the client down."""
        ...

    def resume(self) -> None:
        """Read again."""
        ...

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        ...

    def finish(self) -> None:
        """Close once everything has been sent."""
        ...

    def shut(self) -> None:
        """Shut down the sending side once everything has been sent, and read until the client closes as well."""
        ...

    def abort(self) -> None:
        """Close now, whatever is unsent."""
        ...

    def give_up(self) -> None:
        """Close the descriptor and nothing else, for a process or thread in which the loop does not run."""
        ...


class SocketChannel:
    """A plain TCP connection, read with ``recv_into`` and written with ``send``: no future, task or copy between."""

    __slots__ = (
        "_backlog",
        "_ending",
        "_fd",
        "_ledger",
        "_loop",
        "_owner",
        "_reader",
        "_reading",
        "_sock",
        "send",
        "waiting",
    )

    # What says that there is nothing to read, or no room to write, just now.
    AGAIN: ClassVar[tuple[type[OSError], ...]] = (BlockingIOError, InterruptedError)

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, ledger: Ledger, reader: Reader) -> None:
        self._loop = loop
        self._ledger = ledger
        self._reader = reader
        self._sock = sock
        self._fd = sock.fileno()
        self.send: Callable[[bytes], int] | None = None
        self._start_sending()
        self._owner: ChannelOwner | None = None
        self._backlog: deque[memoryview | bytes] | None = None
        self._reading = False
        self._ending: str | None = None  # "shut" or "close" once the backlog is written
        self.waiting = 0

    def start(self, owner: ChannelOwner, received: bytes) -> None:
        """Begin to read; ``received`` is what had already arrived."""
        self._owner = owner
        self.resume()
        if received:
            owner.data_received(received)

    def _readable(self) -> None:
        view = _shared_buffer()
        try:
            size = self._sock.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lost(error)
            return
        if size:
            self._owner.data_received(bytes(view[:size]))  # type: ignore[union-attr]  # started, so it is there
        else:
            self._lost(None)

    def _start_sending(self) -> None:
        self.send = self._sock.send

    def _stop_sending(self) -> None:
        self.send = None

    def write(self, data: bytes) -> None:
        """Send now what the system takes, and the rest when it takes more."""
        if self.send is None:
            if self._backlog is not None:
                self._backlog.append(data)
                self._ledger.owe(data)
                self.waiting += len(data)
            return
        try:
            size = self.send(data)
        except OSError as error:
            self.sent(data, 0, error)
        else:
            if size != len(data):
                self.sent(data, size)

    def sent(self, data: bytes, size: int, error: OSError | None = None) -> None:
        """``send`` took only ``size`` bytes, or raised: keep the rest."""
        if error is not None and not isinstance(error, self.AGAIN):
            # The caller may be in the middle of a room: let it finish before the owner hears of it.
            self._stop_sending()
            self._loop.call_soon(self._lost, error)
            return
        # A view, not a copy: thousands of slow members may wait for the same bytes.
        self._backlog = deque((memoryview(data)[size:],))
        self._ledger.owe(data)
        self.waiting = len(data) - size
        self._stop_sending()
        if error is None:
            self._loop.add_writer(self._fd, self._writable)
        else:
            self._again(error)

    def _again(self, error: OSError) -> None:
        """Nothing can be written just now."""
        self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        backlog = self._backlog
        if backlog is None:
            return
        try:
            sent = self._send_some(backlog)
        except self.AGAIN as error:
            self._again(error)
            return
        except OSError as error:
            self._lost(error)
            return
        self.waiting -= sent
        if self._owner is not None:
            self._owner.channel_progressed()
        while sent:
            first = backlog[0]
            if sent < len(first):
                backlog[0] = memoryview(first)[sent:]
                break
            sent -= len(first)
            backlog.popleft()
            self._ledger.settle(_whole(first))
        if not backlog:
            self._backlog = None
            self._start_sending()
            self._loop.remove_writer(self._fd)
            if self._ending == "close":
                self._close()
            elif self._ending == "shut":
                self._shut_writing()
            elif self._owner is not None:
                self._owner.channel_drained()

    def _send_some(self, backlog: deque[memoryview | bytes]) -> int:
        if len(backlog) == 1:
            return self._sock.send(backlog[0])
        if self.waiting < _JOIN_BELOW:
            return self._sock.send(b"".join(backlog))
        return self._sock.sendmsg([backlog[i] for i in range(min(len(backlog), _VECTOR))])

    def pause(self) -> None:
        """Stop reading, so that TCP slows the client down."""
        if self._reading:
            self._reading = False
            self._reader.discard(self._fd)

    def resume(self) -> None:
        """Read (again)."""
        if not self._reading and self._fd >= 0:
            try:
                self._reader.add(self._fd, self._readable)
            except OSError as error:  # the system watches as many as it may
                self._loop.call_soon(self._lost, error)
            else:
                self._reading = True

    def shut(self) -> None:
        """Say that no more will be sent, once all is sent; go on reading until the client has closed too."""
        if self._backlog is None:
            self._shut_writing()
        elif self._ending is None:
            self._ending = "shut"

    def _shut_writing(self) -> None:
        # The client may be gone already; then reading says so.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def finish(self) -> None:
        """Close once all is sent."""
        if self._backlog is None:
            self._close()
        else:
            self._ending = "close"

    def _close(self) -> None:
        self._lost(None)

    def abort(self) -> None:
        """Close now, whatever is unsent, with a reset."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self._lost(None)

    def fileno(self) -> int:
        """The socket's descriptor; -1 when it is closed."""
        return self._fd

    def give_up(self) -> None:
        """Close the descriptor and nothing else: in a forked child, or once the loop has ended."""
        os.close(self._sock.detach())

    def _lost(self, error: Exception | None) -> None:
        if self._fd < 0:
            return
        self.pause()
        if self._backlog is not None:
            self._loop.remove_writer(self._fd)
            for data in self._backlog:
                self._ledger.settle(_whole(data))
            self._backlog = None
        self.waiting = 0
        self._stop_sending()
        self._fd = -1
        self._sock.close()
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.channel_lost(error)


class CompiledChannel(SocketChannel):
    """The same, where `engine` is compiled: the system calls of its own hold the interpreter lock."""

    __slots__ = ()

    def _readable(self) -> None:
        try:
            data = engine.compiled.receive(self._fd)  # type: ignore[union-attr]  # it is there, see `plain_channel`
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lost(error)
            return
        if data:
            self._owner.data_received(data)  # type: ignore[union-attr]  # started, so it is there
        else:
            self._lost(None)

    def _start_sending(self) -> None:
        self.send = engine.compiled.Sender(self._fd)  # type: ignore[union-attr]  # likewise

    def _stop_sending(self) -> None:
        # Somebody may have it in hand.
        if self.send is not None:
            self.send.stop()  # type: ignore[attr-defined]  # a `Sender`
            self.send = None


def plain_channel(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, ledger: Ledger, reader: Reader
) -> SocketChannel:
    """The channel for a socket without TLS, by the engine that there is."""
    return (SocketChannel if engine.compiled is None else CompiledChannel)(loop, sock, ledger, reader)


class TlsChannel(SocketChannel):
    """The same over TLS: Python's own ``ssl`` socket, read and written directly.

    TLS has buffers of its own: the system does not report bytes that are decrypted already, and a write may have to
    wait until something has been read, or a read until something has been written, as when keys are changed.
    """

    __slots__ = ("_patience", "_read_waits", "_write_waits")

    AGAIN: ClassVar[tuple[type[OSError], ...]] = (*SocketChannel.AGAIN, ssl.SSLWantReadError, ssl.SSLWantWriteError)

    _sock: ssl.SSLSocket

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: ssl.SSLSocket, ledger: Ledger, reader: Reader) -> None:
        super().__init__(loop, sock, ledger, reader)
        self._patience: asyncio.TimerHandle | None = None  # nothing more is sent; the client has a moment to close
        self._read_waits = False  # for a write
        self._write_waits = False  # for a read

    def start(self, owner: ChannelOwner, received: bytes) -> None:
        """Begin to read; ``received`` is what had already arrived."""
        super().start(owner, received)
        self._loop.call_soon(self._readable)  # more may have been decrypted than Tornado has read

    def _readable(self) -> None:
        if self._fd < 0:
            return
        if self._write_waits:
            self._write_waits = False
            self._watch_writing()
        view = _shared_buffer()
        for _ in range(_RECORDS):
            if not self._reading:
                return  # paused, or lost, by what was read
            try:
                size = self._sock.recv_into(view)
            except ssl.SSLWantWriteError:
                self._read_waits = True
                self._watch_writing()
                return
            except self.AGAIN:
                return
            except OSError as error:
                self._lost(None if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) else error)
                return
            if not size:
                self._lost(None)
                return
            self._owner.data_received(bytes(view[:size]))  # type: ignore[union-attr]  # started, so it is there
            if self._fd < 0 or not self._sock.pending():
                return
        self._loop.call_soon(self._readable)

    def resume(self) -> None:
        """Read again, including what is decrypted already."""
        if not self._reading and self._fd >= 0:
            super().resume()
            if self._owner is not None:
                self._loop.call_soon(self._readable)

    def _again(self, error: OSError) -> None:
        if isinstance(error, ssl.SSLWantReadError):
            self._write_waits = True
            self._loop.remove_writer(self._fd)
        else:
            self._watch_writing()

    def _watch_writing(self) -> None:
        self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        if self._read_waits:
            self._read_waits = False
            if self._backlog is None:
                self._loop.remove_writer(self._fd)
            self._readable()
        super()._writable()

    def _send_some(self, backlog: deque[memoryview | bytes]) -> int:
        return self._sock.send(backlog[0])  # what could not be written has to come again as it was

    def _close(self) -> None:
        # TLS has a goodbye of its own. Closed with that unread, the connection would be reset, and the client would
        # lose what it has not read yet.
        if self._patience is None and self._fd >= 0:
            self._shut_writing()
            self.resume()
            self._patience = self._loop.call_later(_LINGER, self._lost, None)

    def _lost(self, error: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        super()._lost(error)

    def shut(self) -> None:
        """TLS has no half-close that clients honour: reading goes on until they close, or the time limit."""


def _whole(data: memoryview | bytes) -> bytes:
    """The buffer that a memoryview shows a part of."""
    return data.obj if isinstance(data, memoryview) else data  # type: ignore[return-value]  # views of bytes


class StreamChannel:
    """The same over a Tornado stream: for loops that cannot watch a socket (Windows' proactor)."""

    send: Callable[[bytes], int] | None = None  # there is more to do than to send

    def __init__(self, stream: IOStream, ledger: Ledger) -> None:
        self._stream = stream
        self._ledger = ledger
        self._owner: ChannelOwner | None = None
        self._task: asyncio.Task[None] | None = None
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._unsent: deque[int] = deque()
        self._gone = False
        self.waiting = 0

    def start(self, owner: ChannelOwner, received: bytes) -> None:
        """Begin to read; ``received`` is what had already arrived."""
        self._owner = owner
        self._stream.set_close_callback(self._ended)
        if received:
            owner.data_received(received)
        self._task = asyncio.get_running_loop().create_task(self._read())

    def _ended(self) -> None:
        """The client has closed; what it had sent before may still be in the stream's buffer."""
        if self._owner is not None and self._task is not None and not self._task.done():
            self._owner.peer_gone()
        else:
            self._closed()

    async def _read(self) -> None:
        try:
            while not self._gone:
                await self._may_read.wait()
                data = await self._stream.read_bytes(_READ_SIZE, partial=True)
                if self._owner is not None:
                    self._owner.data_received(data)
                # As long as there is input, nothing above waits: others must get their turn.
                await asyncio.sleep(0)
        except StreamClosedError:
            self._closed()

    def write(self, data: bytes) -> None:
        """Hand over to the stream; what it has not sent counts as waiting."""
        try:
            future = self._stream.write(data)
        except StreamClosedError:
            asyncio.get_running_loop().call_soon(self._closed)
            return
        if not future.done():
            self.waiting += len(data)
            self._ledger.owe_copy(len(data))
            self._unsent.append(len(data))
            future.add_done_callback(self._written)
        elif future.exception() is not None:
            asyncio.get_running_loop().call_soon(self._closed)

    def sent(self, data: bytes, size: int, error: OSError | None = None) -> None:
        """Never called, as ``send`` is None."""

    def _written(self, future: asyncio.Future[None]) -> None:
        # Also marks an exception as seen: the close callback reports that the stream is closed.
        if future.cancelled() or future.exception() is not None or self._gone:
            return
        size = self._unsent.popleft()
        self.waiting -= size
        self._ledger.settle_copy(size)
        if self._owner is not None:
            self._owner.channel_progressed()
            if not self.waiting:
                self._owner.channel_drained()

    def pause(self) -> None:
        """Stop reading after the chunk that is being read."""
        self._may_read.clear()

    def resume(self) -> None:
        """Read (again)."""
        self._may_read.set()

    def shut(self) -> None:
        """TLS has no half-close that clients honour: reading goes on until they close, or the time limit."""

    def finish(self) -> None:
        """Close once all is sent."""
        if not self.waiting:
            self._stream.close()
            self._closed()
        else:
            self._stream.write(b"").add_done_callback(lambda _: self._stream.close())

    def abort(self) -> None:
        """Close now, whatever is unsent."""
        self._stream.close()
        self._closed()

    def fileno(self) -> int:
        """The socket's descriptor; -1 when it is closed."""
        return -1 if self._gone or self._stream.closed() else self._stream.socket.fileno()

    def give_up(self) -> None:
        """Close the descriptor and nothing else: in a forked child, or once the loop has ended."""
        os.close(self._stream.socket.detach())

    def _closed(self) -> None:
        if self._gone:
            return
        self._gone = True
        self._ledger.settle_copy(self.waiting)
        self.waiting = 0
        if self._task is not None:
            self._task.cancel()
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.channel_lost(self._stream.error if isinstance(self._stream.error, Exception) else None)
