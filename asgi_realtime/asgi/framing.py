"""How a subscription looks on the wire.

Each class of responses has one framing. The native one has named SSE events that any EventSource reads. None of them is
called `error`, because an EventSource fires that event itself. Spec: docs/protocol.md, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from asgi_realtime.asgi.host import Headers
from asgi_realtime.brokers.live_log import LiveLog, Slice
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.log import End, Entry
from asgi_realtime.core.sse import chunk_frame, comment_line, control_frame, retry_line

RETRY_MS = 1000
"""How soon a client reconnects after a lost connection. Each response sets it, or a shutdown's value would remain."""


CUT_OFF = comment_line("cut off")
"""The last frame of a body that must not look complete, by identity: the connection is broken instead of closed."""


class Framing:
    """Encodes chunks and control events, here for EventSource, curl and httpx-sse. A dialect overrides what differs."""

    __slots__ = ()
    headers: Headers = []
    """Headers of the head, in addition to those of every event stream."""
    has_gaps = True
    """Whether a body can report a gap and continue after it."""
    reconnects = True
    """Whether a client that comes during a shutdown gets a body that makes it reconnect, and otherwise an error."""

    def preamble(self, comment: str) -> bytes:
        """The first part of the body, sent at once: some hosts hold the head back until there is one."""
        return retry_line(RETRY_MS) + comment_line(comment)

    take: Callable[[LiveLog, int], Slice | None] = staticmethod(LiveLog.take)
    """What follows a cursor. Not wrapped, because it is called for each delivery."""

    def encode(self, entries: Sequence[Entry]) -> bytes:
        """Encode entries that were read from the broker; `take` returns those that this process holds."""
        return b"".join(chunk_frame(entry.seq, entry.data) for entry in entries)

    def gap(self, requested: int, first: int) -> bytes:
        """Entries were trimmed: the client requested `requested`, the first that remains is `first`."""
        # Its id makes a client that disconnects right after it resume at `first`, without a second gap.
        return control_frame("gap", encode_value({"requested": requested, "first": first}), id=str(first - 1))

    def end(self, end: End, id: str | None) -> bytes:
        """Nothing more will follow."""
        data = {"reason": end.reason} if end.error is None else {"reason": end.reason, "error": end.error}
        return control_frame("end", encode_value(data), id=id)

    def reconnect(self, retry_ms: int) -> bytes:
        """The server closes the connection; the client should reconnect after this time."""
        return control_frame("reconnect", encode_value({"retry": retry_ms}), retry_ms=retry_ms)

    def cut_short(self) -> bytes:
        """The last frame of a body that should have been broken and cannot be."""
        return b""

    def interrupted(self) -> bytes:
        """The stream cannot be followed; the client should reconnect, and then gets the reason."""
        return b""


NATIVE = Framing()
