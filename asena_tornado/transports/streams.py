"""`RedisHistory`: Redis (or Valkey) keeps what is published to a channel with a history, in a stream.

A channel has three names in Redis, with one hash tag, so that they are at one place in a cluster: its stream, a hash
with its epoch and offset, and the pub/sub channel on which entries are announced. An entry's id in the stream is its
offset and when it was added, in milliseconds.
"""

from __future__ import annotations

import asyncio
import hashlib
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import TransportError
from ..websocket.history import new_epoch
from .contract import Entries, Entry, EntryReceiver

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection, ConnectionPool

_REMEMBERED = 30 * 86400  # seconds for which a channel's epoch and offset outlive its last entry
_READERS = 4  # connections

# In the hash: e, the epoch; o, the offset; l, the milliseconds for which entries are kept; x, a time before which no
# entry was added that is still there.
_BEGIN = """
local meta = redis.call('HMGET', KEYS[2], 'e', 'o', 'l', 'x')
local epoch, ttl = meta[1], tonumber(meta[3] or 0)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function begin(epoch)
  redis.call('DEL', KEYS[1], KEYS[2])
  redis.call('HSET', KEYS[2], 'e', epoch)
  return epoch
end
local function added(entry)
  return tonumber(string.match(entry[1], '%-(%d+)$'))
end
"""

# KEYS: stream, hash. ARGV: channel, payload, size, ttl (ms), an epoch if a new one is needed, how long to remember it
# (ms).
_PUBLISH = (
    _BEGIN
    + """
if not epoch then epoch = begin(ARGV[5]) end
ttl = tonumber(ARGV[4])
local function add()
  local offset = string.format('%.0f', redis.call('HINCRBY', KEYS[2], 'o', 1))
  local id = offset .. '-' .. string.format('%.0f', now)
  return offset, redis.pcall('XADD', KEYS[1], 'MAXLEN', ARGV[3], id, 'd', ARGV[2])
end
local offset, result = add()
if type(result) == 'table' and result.err then
  -- The stream is not the one that the hash is about.
  epoch = begin(ARGV[5])
  meta[4] = nil
  offset, result = add()
  if type(result) == 'table' and result.err then return result end
end
local first = tonumber(meta[4] or now)
if first <= now - ttl then
  first = nil
  while not first do
    local expired = {}
    for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 20)) do
      if added(entry) > now - ttl then
        first = added(entry)
        break
      end
      expired[#expired + 1] = entry[1]
    end
    if #expired > 0 then
      redis.call('XDEL', KEYS[1], unpack(expired))
    elseif not first then
      first = now
    end
  end
end
redis.call('HSET', KEYS[2], 'l', ARGV[4], 'x', string.format('%.0f', first))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('PUBLISH', ARGV[1], epoch .. ' ' .. offset .. ' ' .. string.format('%.0f', now) .. ' ' .. ARGV[2])
return offset
"""
)

# KEYS: stream, hash. ARGV: since or '', limit or -1, whether reversed, an epoch, how long to remember it (ms).
_READ = (
    _BEGIN
    + """
if not epoch then
  epoch = begin(ARGV[4])
  redis.call('PEXPIRE', KEYS[2], ARGV[5])
end
local limit, found, page = tonumber(ARGV[2]), {}, nil
local reverse = ARGV[3] == '1'
local from = '-'
if reverse then from = '+' end
if ARGV[1] ~= '' then
  local since = tonumber(ARGV[1])
  if reverse then
    if since <= 1 then limit = 0 end
    from = string.format('%.0f', since - 1)
  else
    from = string.format('%.0f', since + 1)
  end
end
while limit < 0 or #found < limit do
  local count = 500
  if limit >= 0 and limit - #found < count then count = limit - #found end
  if reverse then
    page = redis.call('XREVRANGE', KEYS[1], from, '-', 'COUNT', count)
  else
    page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', count)
  end
  local last
  for _, entry in ipairs(page) do
    last = tonumber(string.match(entry[1], '^(%d+)'))
    if added(entry) > now - ttl then
      found[#found + 1] = {entry[1], entry[2][2]}
    elseif reverse then
      limit = #found
      break
    end
  end
  if #page < count or (reverse and last <= 1) then break end
  from = string.format('%.0f', reverse and last - 1 or last + 1)
end
return {epoch, meta[2] or '0', found}
"""
)


class Carrier(Protocol):
    """The `RedisTransport`, as far as its histories are concerned."""

    timeout: float
    _start: bytes
    _pool: ConnectionPool

    def _queue(self, name: bytes, command: bytes, size: int) -> bool: ...

    def _want(self, name: bytes) -> None: ...

    def _unwant(self, name: bytes) -> None: ...

    async def _flushed(self) -> None: ...


class Scripted(bytes):
    """A finished command that runs the script for publishing, by its digest."""

    channel: bytes
    parts: tuple[bytes, ...]

    @property
    def whole(self) -> bytes:
        """The same with the script itself, for a server that does not know the digest."""
        return _command(b"EVAL", _PUBLISH.encode(), *self.parts)


class RedisHistory:
    """The histories of a `RedisTransport`: a `TransportHistory`.

    Needs the commands EVALSHA, EVAL and SCRIPT LOAD and those that the scripts use, of Redis 5 or newer, and all keys
    and channels that begin with the prefix in a brace: ``{asena:``. What is not published for 30 days after its last
    entry has expired is forgotten, with its epoch and offset.
    """

    def __init__(self, transport: Carrier) -> None:
        self.followed: dict[bytes, EntryReceiver] = {}
        self.load_due = False  # the publisher's connection has to load the script first
        self.used = False
        self._transport = transport
        self._publish_digest = hashlib.sha1(_PUBLISH.encode(), usedforsecurity=False).hexdigest().encode()
        self._read_digest = hashlib.sha1(_READ.encode(), usedforsecurity=False).hexdigest().encode()
        self._epochs = map(f"{new_epoch()}.{{}}".format, count())
        self._idle: list[AbstractConnection] = []
        self._gate = asyncio.Semaphore(_READERS)

    @property
    def load(self) -> bytes:
        """The command that loads the script for publishing."""
        return _command(b"SCRIPT", b"LOAD", _PUBLISH.encode())

    def open(self) -> None:
        """Begin, on the loop of the transport."""
        self._gate = asyncio.Semaphore(_READERS)

    async def close(self) -> None:
        """Disconnect, and follow nothing any more."""
        self.followed.clear()
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.disconnect(nowait=True)

    def publish(self, channel: str, payload: bytes, *, size: int, ttl: float) -> bool:
        """Queue it for the pipeline of this turn of the loop, as `RedisTransport.publish` does."""
        stream, meta, name = self._names(channel)
        if not self.used:
            self.used = self.load_due = True
        parts = (
            b"2",
            stream,
            meta,
            name,
            payload,
            b"%d" % size,
            b"%d" % max(1, round(ttl * 1000)),
            self._new_epoch(),
            b"%d" % round((ttl + _REMEMBERED) * 1000),
        )
        command = Scripted(_command(b"EVALSHA", self._publish_digest, *parts))
        command.channel = name
        command.parts = parts
        return self._transport._queue(name, command, len(payload))

    def follow(self, channel: str, receiver: EntryReceiver) -> None:
        """Subscribe with this turn's other changes."""
        name = self._names(channel)[2]
        self.followed[name] = receiver
        self._transport._want(name)

    def unfollow(self, channel: str) -> None:
        """Unsubscribe with this turn's other changes."""
        name = self._names(channel)[2]
        self.followed.pop(name, None)
        self._transport._unwant(name)

    def arrived(self, receiver: EntryReceiver, announced: bytes) -> None:
        """An entry was announced; whatever somebody else publishes there is ignored."""
        parts = announced.split(b" ", 3)
        if len(parts) == 4 and parts[0].isascii() and parts[1].isdigit() and parts[2].isdigit():
            receiver(parts[0].decode(), int(parts[1]), int(parts[2]) / 1000, parts[3])

    async def read(
        self, channel: str, *, since: int | None = None, limit: int | None = None, reverse: bool = False
    ) -> Entries:
        """Ask Redis, once it has what was published here before."""
        transport = self._transport
        await transport._flushed()
        stream, meta, _ = self._names(channel)
        parts = (
            b"2",
            stream,
            meta,
            b"" if since is None else b"%d" % min(since, 2**53),
            b"-1" if limit is None else b"%d" % min(limit, 2**53),
            b"1" if reverse else b"0",
            self._new_epoch(),
            b"%d" % (_REMEMBERED * 1000),
        )
        epoch, offset, found = await self._ask(parts)
        entries = []
        for id, payload in found:
            number, _, at = id.partition(b"-")
            entries.append(Entry(int(number), int(at) / 1000, payload))
        return Entries(epoch.decode(), int(offset), entries)

    async def wipe(self, channel: str) -> None:
        """Lose what there is of a channel."""
        stream, meta, _ = self._names(channel)
        await self._run(_command(b"DEL", stream, meta))

    def _new_epoch(self) -> bytes:
        """One that no history has had: each call may be the one that begins another after a loss."""
        return next(self._epochs).encode()

    def _names(self, channel: str) -> tuple[bytes, bytes, bytes]:
        tag = b"{" + self._transport._start + channel.encode() + b"}"
        return tag + b":stream", tag + b":meta", tag

    async def _ask(self, parts: tuple[bytes, ...]) -> Any:
        from redis.exceptions import NoScriptError

        try:
            return await self._run(_command(b"EVALSHA", self._read_digest, *parts))
        except NoScriptError:
            return await self._run(_command(b"EVAL", _READ.encode(), *parts))

    async def _run(self, command: bytes) -> Any:
        """The answer. Raises `TransportError`, and `NoScriptError`."""
        from redis.exceptions import NoScriptError, RedisError

        transport = self._transport
        try:
            async with self._gate, asyncio.timeout(transport.timeout):
                while True:
                    known = bool(self._idle)
                    connection = self._idle.pop() if known else transport._pool.make_connection()  # type: ignore[no-untyped-call]
                    try:
                        return await self._exchange(connection, command)
                    except (ConnectionError, OSError):
                        if not known:
                            raise
                        # It may have been closed while nobody looked.
        except NoScriptError:
            raise
        except (RedisError, OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            raise TransportError(f"{transport!r} cannot be asked for a history: {why}") from error

    async def _exchange(self, connection: AbstractConnection, command: bytes) -> Any:
        from redis.exceptions import ConnectionError as Lost
        from redis.exceptions import ResponseError

        try:
            if not connection.is_connected:
                await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_packed_command([command], check_health=False)
            answer = await connection.read_response(disable_decoding=True)
        except ResponseError:
            self._idle.append(connection)
            raise
        except Lost as error:
            await connection.disconnect(nowait=True)
            raise ConnectionError(str(error)) from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._idle.append(connection)
        return answer


def _command(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


__all__ = ["RedisHistory", "Scripted"]
