"""A stream in the wire format of a chat frontend: `?protocol=ai-sdk` or `ag-ui`.

A native stream in another framing. `ai.conversion` makes the events; here is how a subscription uses it. The conversion
of a chunk depends on those before it, so a framing belongs to one response and holds the state at its cursor.

These clients take a body that ends for an answer that is complete, and know no event that says otherwise. So only the
end of the run ends a body. A shutdown, an age limit, a token that expires or a broker that fails breaks the connection
(`CUT_OFF`), and the client resumes by its last id. What resuming cannot help is an error in the words of the protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import anyio.lowlevel

from asgi_realtime.ai.ag_ui import AgUi
from asgi_realtime.ai.conversion import NOT_PARTS, Conversion, Converted
from asgi_realtime.ai.ui_stream import UiMessageStream
from asgi_realtime.asgi.framing import CUT_OFF, Framing
from asgi_realtime.asgi.lookup import find_run
from asgi_realtime.asgi.phases import Alert
from asgi_realtime.asgi.request import Access, Request
from asgi_realtime.asgi.streams import StreamResponse
from asgi_realtime.asgi.subscription import Ended
from asgi_realtime.brokers.live_log import MAX_BODY, LiveLog, Slice
from asgi_realtime.core.errors import InvalidRequest, ServerShutdown, StreamGap, shown
from asgi_realtime.core.log import End, Entry, StreamKey
from asgi_realtime.core.names import stream_name
from asgi_realtime.core.sse import comment_line
from asgi_realtime.loop.logger import logger

MAX_JOINED = 16_384
"""The most chunks that one body joins. Converting them takes up to 60 ms."""

_PAGE = 512
_CUT_SHORT = "the connection ended before the answer did; reload to see the rest"

PROTOCOLS: dict[str, type[Conversion[Any]] | None] = {"sse": None, "ai-sdk": UiMessageStream, "ag-ui": AgUi}
"""The wire formats of a stream; None is the native one."""


def find_protocol(name: str) -> type[Conversion[Any]] | None:
    """How to convert a stream; None if its native form is wanted. Raises `InvalidRequest`."""
    if name not in PROTOCOLS:
        raise InvalidRequest(f"protocol is {shown(name)}; allowed are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


class ConvertedFraming(Framing):
    """The framing of one response. It knows the state at the cursor of the response, and after what was taken next."""

    __slots__ = ("_after", "_next", "_state", "conversion", "headers")
    has_gaps = False
    reconnects = False

    def __init__(self, conversion: Conversion[Any]) -> None:
        self.conversion = conversion
        self.headers = list(conversion.headers)
        self._after = -1
        self._state: Any = conversion.beginning
        self._next: tuple[int, Any] = (-1, self._state)

    def resume(self, after: int, state: Any) -> None:
        """Continue after what a client has."""
        self._next = (after, state)

    def _state_at(self, after: int) -> Any:
        if self._next[0] == after:
            self._after, self._state = self._next
        assert self._after == after, "a response continues where it was"
        return self._state

    def preamble(self, comment: str) -> bytes:
        return comment_line(comment)

    def take(self, live: LiveLog, after: int) -> Slice | None:
        """None also if the next chunk has no meaning; then `end` ends the body."""
        if after + 1 >= live.log.next:
            return None
        state = self._state_at(after)
        taken: Converted[Any]
        if live.readers == 1:
            taken = self._convert(live, after, state)
        else:
            key = (self.conversion.name, after, state)
            taken = live.shared(key, lambda: self._convert(live, after, state))
        if taken.last == after:
            return None
        self._next = (taken.last, taken.state)
        return taken.body or _NOTHING, taken.last

    def _convert(self, live: LiveLog, after: int, state: Any) -> Converted[Any]:
        if after + 2 == live.log.next:
            return self.conversion.convert_one(state, live.entries(after, 1)[0])
        return self.conversion.convert(state, after, _entries(live, after), max_bytes=MAX_BODY)

    def encode(self, entries: Sequence[Entry]) -> bytes:
        after = entries[0].seq - 1
        taken = self.conversion.convert(self._state_at(after), after, entries)
        self._next = (taken.last, taken.state)
        if taken.last < entries[-1].seq:
            raise Ended(taken.body + self.reject(taken.last))
        return taken.body or _NOTHING

    def reject(self, after: int) -> bytes:
        """The end of a body whose next chunk has no meaning."""
        logger.warning("a reader with protocol=%s was cut off: %s", self.conversion.name, NOT_PARTS)
        return self._end(End("failed", NOT_PARTS), after, after + 1)

    def gap(self, requested: int, first: int) -> bytes:
        end = End("lost", f"chunks {requested} to {first - 1} of this answer have expired")
        return self._end(end, requested - 1, None)

    def end(self, end: End, id: str | None) -> bytes:
        if id is None:  # the token has expired: the client can resume with another one
            return CUT_OFF
        return self._end(end, int(id) - 1, int(id))

    def cut_short(self) -> bytes:
        return self._end(End("failed", _CUT_SHORT), self._next[0], None)

    def _end(self, end: End, after: int, id: int | None) -> bytes:
        return self.conversion.end(self._state_at(after), end, id, is_first=after == -1)

    def reconnect(self, retry_ms: int) -> bytes:
        return CUT_OFF

    def interrupted(self) -> bytes:
        return CUT_OFF


_NOTHING = comment_line("")
"""The body for chunks without events. An empty message could end a body for a server."""


def _entries(live: LiveLog, after: int) -> Iterator[Entry]:
    """What this process holds after a cursor, decoded only as far as it is used."""
    for _ in range(MAX_JOINED // _PAGE):
        page = live.entries(after, _PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1].seq


class ConvertedResponse(StreamResponse):
    """Sends the chunks of a stream in the events of another protocol."""

    __slots__ = ("framing",)
    framing: ConvertedFraming

    def __init__(self, request: Access, key: StreamKey, conversion: Conversion[Any]) -> None:
        self.framing = ConvertedFraming(conversion)
        super().__init__(request, key)

    @classmethod
    async def converted(cls, request: Request, run_id: str, key: str) -> StreamResponse:
        """The endpoint for requests with `?protocol=`."""
        protocol = find_protocol(request.protocol or "")
        if protocol is None:
            return await StreamResponse.stream(request, run_id, key)
        name = StreamKey(run_id, stream_name(key, request.host.limits))
        record = await find_run(request, run_id, stream=name.name)
        response = cls(request, name, protocol.of(record))
        response.watch(record)
        return response

    async def _prepare(self, source: LiveLog) -> bool:
        if self._alert is Alert.SHUTDOWN:
            raise ServerShutdown()
        await self._check_position(source)
        if not await super()._prepare(source):
            return False
        self.framing.resume(self._after, await self._state_after(source))
        return True

    async def _check_position(self, source: LiveLog) -> None:
        """Raises `InvalidRequest` for an id that the stream has not reached."""
        after, following = self._after, source.log.next
        is_end = source.end is not None and after == following
        if after < following or is_end:
            return
        page = await self._host.broker.read(self._key, after=after, limit=1)
        if page.next > after:
            return
        last = f"the last id is {page.next - 1}" if page.next else "the stream has no chunks"
        raise InvalidRequest(f"Last-Event-ID is {after}, past the end of the stream: {last}; start without an id")

    async def _state_after(self, source: LiveLog) -> Any:
        """The state at the cursor, from the chunks before it. Raises `StreamGap` if the next chunk has expired."""
        conversion, after = self.framing.conversion, self._after
        if after + 1 < source.log.first:
            page = await self._host.broker.read(self._key, after=after, limit=1)
            if page.first > after + 1:
                message = f"chunks {after + 1} to {page.first - 1} of this answer have expired"
                raise StreamGap(message, requested=after + 1, first=page.first)
        state, at = conversion.beginning, -1
        while at < after:
            entries = await self._stored(source, at)
            if entries[0].seq > at + 1:
                state = conversion.middle
            at = entries[-1].seq
            state = conversion.scan(state, [entry for entry in entries if entry.seq <= after])
        return state

    async def _stored(self, source: LiveLog, after: int) -> Sequence[Entry]:
        """Chunks after a cursor. There must be some."""
        if after + 1 >= source.log.first:
            await anyio.lowlevel.checkpoint()
            return source.entries(after, _PAGE)
        return (await self._host.broker.read(self._key, after=after, limit=_PAGE)).entries

    def _take(self, source: LiveLog) -> bytes:
        piece = self.framing.take(source, self._after)
        if piece is None:
            raise Ended(self.framing.reject(self._after))
        body, self._after = piece
        return body
