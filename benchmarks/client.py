"""The load client: subscribers that verify every byte and cost little.

All subscribers of a stream must receive the same events. So the subscriber that is furthest ahead writes the transcript
of the stream, the others compare their bytes with it, and it is parsed once, after the measurement. A subscriber that
differs keeps its own copy from there on, which is parsed separately. The report is therefore exact, and the usual case
is a comparison of memory.
"""

from __future__ import annotations

import asyncio
import re
import time
from bisect import bisect_right
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from typing import cast

from benchmarks.chunks import FRAME_END, Event, parse_events

_FIRST_EVENT = re.compile(rb"(?:\A(?:(?::|retry:)[^\n]*\n)*|\n\r?\n)(?=id:|data:)")
_MEMO_ENTRIES = 1024
_MEMO_BYTES = 4096
_CONNECTING = 64
"""Connections that open concurrently."""


@dataclass(slots=True)
class Transcript:
    """What the subscribers of one stream received from its first chunk on, without comments."""

    text: bytearray = field(default_factory=bytearray)
    readers: int = 0
    seen: dict[tuple[int, bytes], int] = field(default_factory=dict)
    """(position, bytes read from the socket there) -> the position after them. Subscribers mostly read the same bytes
    at the same position, and a lookup is cheaper than decoding them again."""

    ends: list[int] = field(default_factory=list)
    """Where chunks end, as far as `count_to` has scanned."""

    def count_to(self, position: int) -> int:
        """Return how many chunks end at or before a position."""
        known = self.ends[-1] if self.ends else 0
        if known < position:
            self.ends += [match.end() for match in FRAME_END.finditer(self.text, known)]
        return bisect_right(self.ends, position)

    def remember(self, position: int, data: bytes, end: int) -> None:
        if self.readers == 1:
            return
        if len(self.seen) >= _MEMO_ENTRIES:
            self.seen.clear()
        self.seen[position, data] = end


class Subscriber(asyncio.Protocol):
    """One subscription over a socket: sends the request, decodes the chunked body and compares it."""

    def __init__(self, path: str, token: str, transcript: Transcript, *, sampled: bool = False) -> None:
        headers = f"Host: 127.0.0.1\r\nAccept: text/event-stream\r\nAuthorization: Bearer {token}\r\n"
        self._head = f"GET {path} HTTP/1.1\r\n{headers}"
        self.last_event_id: int | None = None
        self.transcript = transcript
        transcript.readers += 1
        self.position = 0
        """How much of the transcript this subscriber has received."""
        self.own: bytearray | None = None
        """Everything received since the first difference from the transcript."""
        self.arrivals: list[tuple[int, int]] | None = [] if sampled else None
        """(time, position) of each read, if latencies are recorded."""
        self.requested_ns = self.last_ns = 0
        self.ended = False
        self.closed = False
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.started: asyncio.Future[None] = loop.create_future()
        """Done when the first chunk arrives."""
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        """Bytes of the socket that are an incomplete head or chunk."""
        self._preamble: bytes | None = b""
        """The body before the first chunk; None after it has arrived."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.requested_ns = time.monotonic_ns()
        resume = "" if self.last_event_id is None else f"Last-Event-ID: {self.last_event_id}\r\n"
        self._transport.write(f"{self._head}{resume}\r\n".encode())

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        for future in (self.opened, self.started):
            if not future.done():
                future.set_exception(ConnectionError(f"the server closed the connection: {self._rest[:200]!r}"))
                future.exception()  # mark it as retrieved, because nothing has to await it

    def data_received(self, data: bytes) -> None:
        self.last_ns = time.monotonic_ns()
        start = self.position
        is_complete = not self._rest and self._preamble is None and self.own is None and len(data) <= _MEMO_BYTES
        end = self.transcript.seen.get((start, data)) if is_complete else None
        if end is not None:
            self.position = end
        else:
            self._decode(data)
            if is_complete and not self._rest and self.own is None and not self.ended:
                self.transcript.remember(start, data, self.position)
        if self.arrivals is not None:
            self.arrivals.append((self.last_ns, self.position))

    def resumed(self) -> Subscriber:
        """The next connection of this subscriber, which resumes after its last chunk.

        This one must end with a complete chunk and match the transcript.
        """
        last = self.transcript.count_to(self.position) - 1
        if self.own is not None or self._rest or self.transcript.ends[last] != self.position:
            raise RuntimeError("it was cut within a chunk, or received something unexpected")
        later = copy(self)
        loop = asyncio.get_running_loop()
        later.last_event_id = last
        later.opened, later.started = loop.create_future(), loop.create_future()
        later.ended = later.closed = False
        later.requested_ns = later.last_ns = 0
        later._transport, later._preamble = None, b""
        return later

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def received(self) -> int:
        """The number of chunks received so far, without parsing them."""
        own = sum(1 for _ in FRAME_END.finditer(self.own)) if self.own else 0
        return self.transcript.count_to(self.position) + own

    def events(self) -> tuple[list[Event], int]:
        """All received chunks in order, and the number of unexpected bytes."""
        return parse_events(self.transcript.text[: self.position] + (self.own or b""))

    def _decode(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        at = 0
        if not self.opened.done():
            head_end = data.find(b"\r\n\r\n")
            if head_end < 0:
                self._rest = data
                return
            self._check_head(data[:head_end])
            at = head_end + 4
        bodies: list[bytes] = []
        while (eol := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:eol], 16)
            end = eol + 2 + size
            if end + 2 > len(data):
                break
            if size == 0:
                self.ended = True
            bodies.append(data[eol + 2 : end])
            at = end + 2
        self._rest = data[at:]
        if bodies:
            # Each server sends heartbeats as separate bodies, with a time in them or at a different position for each
            # subscriber. One inside another body ends up in `own` and is parsed there.
            wanted = [body for body in bodies if body[:1] != b":"]
            self._take(wanted[0] if len(wanted) == 1 else b"".join(wanted))

    def _check_head(self, head: bytes) -> None:
        status, _, headers = head.partition(b"\r\n")
        if status != b"HTTP/1.1 200 OK" or b"transfer-encoding: chunked" not in headers.lower():
            self.opened.set_exception(ConnectionError(f"unexpected response: {head[:300]!r}"))
            self.close()
        else:
            self.opened.set_result(None)

    def _take(self, body: bytes) -> None:
        if self._preamble is not None:
            self._preamble += body
            first = _FIRST_EVENT.search(self._preamble)
            if first is None:
                return
            body, self._preamble = self._preamble[first.end() :], None
            if not self.started.done():
                self.started.set_result(None)
        if self.own is not None:
            self.own += body
            return
        text = self.transcript.text
        known = len(text) - self.position
        if not text.startswith(body if len(body) <= known else body[:known], self.position):
            self.own = bytearray(body)
            return
        if len(body) > known:
            text += body[known:] if known else body
        self.position += len(body)


async def open_subscribers(
    port: int, subscribers: Iterable[Subscriber], *, at_once: int = _CONNECTING
) -> list[Subscriber]:
    """Connect all subscribers and return them once each has the head of its response."""
    loop = asyncio.get_running_loop()
    limit = asyncio.Semaphore(at_once)

    async def connect(subscriber: Subscriber) -> Subscriber:
        async with limit:
            await loop.create_connection(lambda: subscriber, "127.0.0.1", port)
            await asyncio.wait_for(subscriber.opened, 30)
        return subscriber

    return await asyncio.gather(*(connect(subscriber) for subscriber in subscribers))


async def close_subscribers(subscribers: list[Subscriber]) -> None:
    for subscriber in subscribers:
        subscriber.close()
    while not all(subscriber.closed for subscriber in subscribers):  # noqa: ASYNC110 - one or two loop iterations
        await asyncio.sleep(0)


@dataclass(slots=True)
class Verdict:
    """Errors in what was received; all zero is correct."""

    missing: int = 0
    duplicated: int = 0
    damaged: int = 0
    """Unexpected bytes, and chunks out of order."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.duplicated or self.damaged)


def judge(seqs: list[int], expected: int, foreign: int = 0) -> Verdict:
    """Compare the chunk numbers of one subscriber with 0, 1, … expected - 1."""
    if seqs == list(range(expected)):
        return Verdict(damaged=foreign)
    distinct = set(seqs)
    wanted = distinct.intersection(range(expected))
    disorder = sum(later < earlier for earlier, later in zip(seqs, seqs[1:], strict=False))
    return Verdict(
        missing=expected - len(wanted),
        duplicated=len(seqs) - len(distinct),
        damaged=foreign + disorder + len(distinct) - len(wanted),
    )


def verify(subscribers: list[Subscriber], expected: int | None) -> Verdict:
    """Judge all subscribers. If `expected` is None (an overloaded server was stopped), only what arrived counts."""
    total = Verdict()
    judged: dict[tuple[int, int], Verdict] = {}
    for subscriber in subscribers:
        key = (id(subscriber.transcript), subscriber.position)
        verdict = judged.get(key) if subscriber.own is None else None
        if verdict is None:
            events, foreign = subscriber.events()
            seqs = [event.seq for event in events]
            if expected is None:
                foreign = 0 if subscriber.own is None else foreign  # the transcript can end within an event
                verdict = judge(seqs, max(seqs, default=-1) + 1, foreign)
            else:
                verdict = judge(seqs, expected, foreign)
            if subscriber.own is None:
                judged[key] = verdict
        total.missing += verdict.missing
        total.duplicated += verdict.duplicated
        total.damaged += verdict.damaged
    return total


def latencies_ms(subscribers: list[Subscriber], *, skip: int = 0) -> list[float]:
    """Sorted times from due to read of all chunks after the first `skip`, for the sampled subscribers."""
    times: list[float] = []
    parsed: dict[int, list[Event]] = {}
    for subscriber in subscribers:
        if subscriber.arrivals is None:
            continue
        events = parsed.get(id(subscriber.transcript))
        if events is None:
            events = parsed[id(subscriber.transcript)] = parse_events(subscriber.transcript.text)[0]
        at = 0
        for when, position in subscriber.arrivals:
            while at < len(events) and events[at].end <= position:
                if events[at].seq >= skip:
                    times.append((when - events[at].due_ns) / 1e6)
                at += 1
    return sorted(times)
