"""`WebSocketOptions`: every limit and time of a namespace in one place."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(ge=1)]


class WebSocketOptions(BaseModel):
    """Limits and times, for a server (``AsenaServer(options=…)``) or one namespace (``@WebSocket(options=…)``).

        @WebSocket("/ticker", options=WebSocketOptions(max_message_size=64 * 1024, slow_client_policy="drop"))
        class Ticker(AsenaWebSocketService): ...

    A namespace's options replace the server's as a whole. ``None`` switches a limit off where the type allows it.
    Unknown names are refused.

    Attributes:
        max_message_size (bytes, default 16 MiB): The longest message from a client, after decompression; a longer one
            closes the connection with 1009.
        max_sockets (default none): The most sockets in the namespace; one more is refused with HTTP 503.
        max_rooms_per_socket (default 100,000): The most rooms that one socket may be in; joining one more raises
            `RoomLimitError`.
        max_room_name_bytes (bytes, default 1 KiB): The longest name of a room, as UTF-8; a longer one raises
            `RoomNameError`.
        max_buffered_bytes (bytes, default 4 MiB): The most that may wait for a client that reads slowly.
        slow_client_policy (default "close"): What happens beyond that. "close": the client is closed with 1013; "drop":
            the newest messages are dropped, and counted. A Centrifuge client is closed when a reply would be, or
            when it is in a room with a history: it gets what it missed when it comes back.
        max_queued_messages (default 256): The most messages of one client that may wait for their handler; then nothing
            more is read from it until the handler catches up.
        max_queued_bytes (bytes, default 4 MiB): The same, in bytes.
        max_pending_calls (default 64): The most handlers of one socket that run at the same time, where it has handlers
            with ``@on(…, concurrent=True)``; one more waits, as do the messages behind it.
        handshake_timeout (seconds, default 10): For a handshake to arrive, and again for middleware to answer it; for a
            Centrifuge client also to connect after it.
        ping_interval (seconds, default 20): Between two pings; None sends none. Centrifuge clients get the heartbeats
            of their protocol.
        ping_timeout (seconds, default 20): Of silence after a ping, until the connection is closed with 1011; None
            waits for ever. A Centrifuge client has to answer, else it is closed with 3012.
        idle_timeout (seconds, default none): Without a message from the client, until it is closed with 1001.
        close_timeout (seconds, default 5): For a client to answer a close frame, until it is cut off.
        handler_grace (seconds, default 2): For a handler to finish when its client is gone, or the server stops, until
            it is cancelled.
        on_close_timeout (seconds, default 10): For ``on_close`` to finish, until it is cancelled.
        compression (default off): Whether to offer permessage-deflate (RFC 7692).
        compression_level (default 6): From 1 (fast) to 9 (small).
        compression_memory_level (default 8): From 1 (little memory) to 9 (fast).
        compression_window_bits (default 15): From 9 to 15: the largest window is two to the power of this, in bytes.
        compression_context_takeover (default off): Whether to keep the window between messages.
        compression_threshold (bytes, default 128): Shorter messages are sent uncompressed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_message_size: Bytes = 16 * 1024 * 1024
    """Bytes of one message from a client, after decompression; longer closes with 1009."""
    max_sockets: Annotated[int, Field(ge=1)] | None = None
    """Sockets per namespace; one more is refused with HTTP 503 before the upgrade."""

    max_rooms_per_socket: Annotated[int, Field(ge=1)] | None = 100_000
    """Rooms that one socket may be in; joining one more raises `RoomLimitError`, and nothing else changes."""
    max_room_name_bytes: Bytes = 1024
    """Bytes of a room's name, as UTF-8; longer raises `RoomNameError`, to join as well as to send."""

    max_buffered_bytes: Bytes = 4 * 1024 * 1024
    """Bytes that may wait for a client that reads slowly. What is sent while nothing waits is always taken."""
    slow_client_policy: Literal["close", "drop"] = "close"
    """Beyond ``max_buffered_bytes``: close with 1013, or drop the newest messages (and count them)."""

    max_queued_messages: Annotated[int, Field(ge=1)] = 256
    """Messages of one client that may wait for its handler; then the client is not read until it catches up."""
    max_queued_bytes: Bytes = 4 * 1024 * 1024
    """The same in bytes."""
    max_pending_calls: Annotated[int, Field(ge=1)] = 64
    """Handlers of one socket that run at the same time, with ``@on(…, concurrent=True)``; the next one waits until one
    of them is done, and keeps the messages behind it waiting."""

    handshake_timeout: Seconds = 10.0
    """Seconds in which the handshake has to arrive, and again in which middleware has to answer. The server's own value
    also holds for HTTP: for a request to arrive, and until a client that reads nothing of its answer is cut off."""
    ping_interval: Seconds | None = 20.0
    """Seconds between pings."""
    ping_timeout: Seconds | None = 20.0
    """Seconds of complete silence after a ping; then the connection is closed with 1011."""
    idle_timeout: Seconds | None = None
    """Seconds without a message from the client; then it is closed with 1001. Pongs do not count."""
    close_timeout: Seconds = 5.0
    """Seconds a client has to answer a close frame; then the connection is cut."""
    handler_grace: Seconds = 2.0
    """Seconds a running handler, and messages received before, may take once the client is gone, or the server stops;
    then it is cancelled."""
    on_close_timeout: Seconds = 10.0
    """Seconds ``on_close`` may take; then it is cancelled."""

    compression: bool = False
    """Offer permessage-deflate (RFC 7692). It costs CPU time and, with context takeover, memory per client."""
    compression_level: Annotated[int, Field(ge=1, le=9)] = 6
    """zlib's level, 1 (fast) to 9 (small)."""
    compression_memory_level: Annotated[int, Field(ge=1, le=9)] = 8
    """zlib's memory level, 1 (little memory) to 9 (fast)."""
    compression_window_bits: Annotated[int, Field(ge=9, le=15)] = 15
    """The largest window, as a power of two of bytes, that either side may use."""
    compression_context_takeover: bool = False
    """Keep the window between messages: smaller, but then every member of a room costs a compression of its own."""
    compression_threshold: Annotated[int, Field(ge=0)] = 128
    """Bytes below which messages are sent as they are."""
