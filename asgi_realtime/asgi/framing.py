"""How a subscription's control messages look on the wire.

A framing is chosen for each response. There is one so far, the native: named SSE events that any EventSource can read,
none of them called `error`, because an EventSource fires that name itself. Spec: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from asgi_realtime.core.log import End, Entry
from asgi_realtime.core.sse import HEARTBEAT, chunk_frame, comment_frame, control_frame, retry_frame
from asgi_realtime.livelog import LiveLog, Slice

RETRY_MS = 1000
"""How soon a client comes back after a drop. Said in each response, or a shutdown's value would stay."""


class Framing(Protocol):
    """What is said on a stream besides its chunks."""

    heartbeat: bytes

    def preamble(self, comment: str) -> bytes:
        """The first body, at once: some hosts hold the head back until there is one."""
        ...

    @property
    def take(self) -> Callable[[LiveLog, int], Slice | None]:
        """Gives what follows the cursor, as `LiveLog.take`."""
        ...

    def frame(self, entry: Entry) -> bytes:
        """One entry that the process does not hold: `take` gives those that it does."""
        ...

    def gap(self, requested: int, first: int) -> bytes:
        """Entries are gone: the client asked for `requested`, the first one there is `first`."""
        ...

    def end(self, end: End, id: str | None) -> bytes:
        """Nothing more will come."""
        ...

    def reconnect(self, retry_ms: int) -> bytes:
        """The server leaves; come back after this time."""
        ...


class NativeFraming:
    """For EventSource, curl and httpx-sse."""

    __slots__ = ()
    heartbeat = HEARTBEAT

    def preamble(self, comment: str) -> bytes:
        return retry_frame(RETRY_MS) + comment_frame(comment)

    take = staticmethod(LiveLog.take)  # for each delivery: no call around it

    def frame(self, entry: Entry) -> bytes:
        return chunk_frame(entry.seq, entry.data)

    def gap(self, requested: int, first: int) -> bytes:
        # With the id a drop right after this resumes at `first`, and the gap is not told twice.
        return control_frame("gap", _json({"requested": requested, "first": first}), id=str(first - 1))

    def end(self, end: End, id: str | None) -> bytes:
        data = {"reason": end.reason} if end.error is None else {"reason": end.reason, "error": end.error}
        return control_frame("end", _json(data), id=id)

    def reconnect(self, retry_ms: int) -> bytes:
        return control_frame("reconnect", _json({"retry": retry_ms}), retry_ms=retry_ms)


def _json(value: dict[str, str] | dict[str, int]) -> bytes:
    return msgspec.json.encode(value)


NATIVE = NativeFraming()
