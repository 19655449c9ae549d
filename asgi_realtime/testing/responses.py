"""Responses of an app under test: complete ones, and ones whose body is still being sent."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

import anyio

from asgi_realtime.asgi.host import Message, Scope
from asgi_realtime.core.event_stream import Event, EventParser
from asgi_realtime.loop.waiting import at_most

T = TypeVar("T")


class _UntilEnd(Generic[T]):
    """Iterates the results of a call until it raises `EndOfStream`.

    A class, because trio warns about a generator that is dropped halfway.
    """

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self._call()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None


class StreamedResponse:
    """A response whose body is still being sent. Iterate it to get the body chunks as the app sends them.

    Every wait raises `TimeoutError` after `timeout` seconds, with what was read until then.
    """

    def __init__(self, scope: Scope, *, timeout: float | None = None) -> None:
        self.scope = scope
        """The scope that the app was called with, including its changes to it."""
        self.status_code = 0
        self.headers: dict[str, str] = {}
        """Keyed by lowercase name; values of the same name are joined with commas."""
        self.events: list[Event] = []
        """All events read so far."""
        self.ended = False
        """The app ended the body."""
        self.timeout = timeout
        """Seconds to wait for a chunk or an event, where a call names no other timeout. None means no limit."""
        self._parser = EventParser()
        self._parsed: deque[Event] = deque()
        self._first_bytes = b""
        self._started = anyio.Event()
        self._disconnected = anyio.Event()
        self._chunks_in, self._chunks = anyio.create_memory_object_stream[bytes](0)

    @property
    def comments(self) -> list[str]:
        """All comments read so far."""
        return self._parser.comments

    @property
    def last_event_id(self) -> str | None:
        """What an EventSource would send as `Last-Event-ID` now."""
        return self._parser.last_event_id

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _UntilEnd(self.chunk)

    async def chunk(self) -> bytes:
        """The next body chunk. Raises `anyio.EndOfStream` after the last one."""
        with at_most(self.timeout, lambda: f"no chunk came within {self.timeout:g} s{self._progress()}"):
            return await self._chunks.receive()

    async def read(self) -> bytes:
        """The rest of the body, to its end."""
        return b"".join([chunk async for chunk in self])

    async def next_event(self, *, timeout: float | None = None) -> Event:
        """The next event. Heartbeats do not extend the wait.

        Raises `anyio.EndOfStream` after the last one, whether the app ended the body (`ended`) or was cut off.
        """
        seconds = self.timeout if timeout is None else timeout
        with at_most(seconds, lambda: f"no event came within {seconds:g} s{self._progress()}"):
            while not self._parsed:
                try:
                    chunk = await self._chunks.receive()
                except anyio.EndOfStream:
                    how = "ended" if self.ended else "was cut off"
                    raise anyio.EndOfStream(f"the body {how}{self._progress()}") from None
                self._first_bytes = self._first_bytes or chunk[:300]
                self._parsed.extend(self._parser.feed(chunk))
        event = self._parsed.popleft()
        self.events.append(event)
        return event

    def aiter_events(self, *, timeout: float | None = None) -> AsyncIterator[Event]:
        """The events one by one, to the end of the body. `timeout` applies to each."""
        return _UntilEnd(lambda: self.next_event(timeout=timeout))

    async def read_events(self) -> list[Event]:
        """Wait for an event; return it with all others read along with it. Empty at the end of the body."""
        try:
            found = [await self.next_event()]
        except anyio.EndOfStream:
            return []
        found += self._parsed
        self.events += self._parsed
        self._parsed.clear()
        return found

    async def read_until(self, event: str) -> list[Event]:
        """All events up to and including the first with this name. Raises AssertionError if the body ends before it."""
        found: list[Event] = []
        while not any(one.event == event for one in found):
            events = await self.read_events()
            assert events, f"the body ended before an event {event!r}; its events were {found}"
            found += events
        return found

    async def read_all_events(self) -> list[Event]:
        """All remaining events, to the end of the body."""
        found: list[Event] = []
        while events := await self.read_events():
            found += events
        return found

    def leave(self) -> None:
        """Disconnect. As with a real server, further sends of the app go nowhere."""
        self._disconnected.set()
        self._chunks.close()

    def _progress(self) -> str:
        """What was read so far, for error messages."""
        intro = f"; the app responded with {self.status_code}; read so far: "
        if not self.events:
            return intro + (f"no event, but {self._first_bytes!r}" if self._first_bytes else "nothing")
        earlier = max(0, len(self.events) - 5)
        recent = [f"{event.event} {event.data[:200]!r}" for event in self.events[earlier:]]
        return f"{intro}events {', '.join(([f'{earlier} earlier ones'] if earlier else []) + recent)}"

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not self.status_code, "the app sent http.response.start twice"
            self.status_code = message["status"]
            for name, value in message.get("headers", []):
                key, text = name.decode("latin-1").lower(), value.decode("latin-1")
                self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text
            self._started.set()
            return
        assert self.status_code, "the app sent a body before http.response.start"
        assert not self.ended, "the app sent more body after its end"
        try:
            if message.get("body"):
                await self._chunks_in.send(bytes(message["body"]))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return
        if not message.get("more_body", False):
            self.ended = True
            self._chunks_in.close()
            self._disconnected.set()


class Response:
    """A complete response."""

    def __init__(self, streamed: StreamedResponse, body: bytes) -> None:
        self.scope = streamed.scope
        self.status_code = streamed.status_code
        self.headers = streamed.headers
        self.body = body
        self.ended = streamed.ended
        """The app ended the body. If not, `body` is what it sent before it was cut off."""

    def __repr__(self) -> str:
        cut = "" if self.ended else " cut off"
        return f"<Response {self.status_code} {self.body[:200]!r}{cut}>"

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode()

    def json(self) -> Any:
        """The body as JSON. Raises `ValueError` if it is something else."""
        return json.loads(self.body)
