"""Drives an ASGI app without sockets, with bodies that are live.

A body chunk is handed over when the test reads it and `send()` waits until then, so there is the back-pressure of a
socket with no buffer at all. Leaving the `async with` is the client that goes away: the app gets `http.disconnect`.
Works on asyncio and trio. (`httpx.ASGITransport` collects the whole body first, so it never shows a live stream.)
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

import anyio
import anyio.abc

from asgi_realtime.testing.sse import Event, EventParser

T = TypeVar("T")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

LEAVE_S = 2.0
"""How long an app may take to notice that its client is gone, before it is cancelled."""

AFTERWARDS_S = 0.1
"""How long after a complete answer the app is still waited for, so that what it raises then is raised here."""


@contextmanager
def at_most(seconds: float | None, told: Callable[[], str]) -> Iterator[None]:
    """Raises `TimeoutError` with what `told` returns if the body takes longer. None: there is no limit."""
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(told())


class _ToTheEnd(Generic[T]):
    """Iterates what a call returns, until it raises `EndOfStream`. No generator: trio warns of one that is dropped."""

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
    """A response whose body is still on its way. Iterate it for the body chunks, as they are sent.

    Whatever waits raises `TimeoutError` after `timeout` seconds, which says what was read until then.
    """

    def __init__(self, scope: Scope, *, timeout: float | None = None) -> None:
        self.scope = scope
        """The scope that the app was called with: shows what it changed in there."""
        self.status = 0
        self.headers: dict[str, str] = {}
        """By names in small letters; values of the same name are joined by commas."""
        self.events: list[Event] = []
        """All events that were read so far."""
        self.ended = False
        """The app ended the body."""
        self.timeout = timeout
        """How long to wait for a chunk or an event that says nothing else, in seconds. None: for ever."""
        self._parser = EventParser()
        self._parsed: deque[Event] = deque()
        self._beginning = b""
        self._started = anyio.Event()
        self._gone = anyio.Event()
        self._chunks_in, self._chunks = anyio.create_memory_object_stream[bytes](0)

    @property
    def comments(self) -> list[str]:
        """All comments that were read so far."""
        return self._parser.comments

    @property
    def last_event_id(self) -> str | None:
        """What an EventSource would send as `Last-Event-ID` now."""
        return self._parser.last_event_id

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _ToTheEnd(self.chunk)

    async def chunk(self) -> bytes:
        """The next body chunk. Raises `anyio.EndOfStream` behind the last."""
        with at_most(self.timeout, lambda: f"no chunk came within {self.timeout:g} s{self._so_far()}"):
            return await self._chunks.receive()

    async def read(self) -> bytes:
        """The rest of the body, to its end."""
        return b"".join([chunk async for chunk in self])

    async def next_event(self, *, timeout: float | None = None) -> Event:
        """The next event. Heartbeats do not lengthen the wait.

        Raises `anyio.EndOfStream` behind the last, whether the app ended the body (`ended`) or the connection was cut.
        """
        seconds = self.timeout if timeout is None else timeout
        with at_most(seconds, lambda: f"no event came within {seconds:g} s{self._so_far()}"):
            while not self._parsed:
                try:
                    chunk = await self._chunks.receive()
                    self._beginning = self._beginning or chunk[:300]
                    self._parsed.extend(self._parser.feed(chunk))
                except anyio.EndOfStream:
                    how = "ended" if self.ended else "was cut off"
                    raise anyio.EndOfStream(f"the body {how}{self._so_far()}") from None
        event = self._parsed.popleft()
        self.events.append(event)
        return event

    def aiter_events(self, *, timeout: float | None = None) -> AsyncIterator[Event]:
        """The events one by one, to the end of the body. `timeout` is for each."""
        return _ToTheEnd(lambda: self.next_event(timeout=timeout))

    async def read_events(self) -> list[Event]:
        """The events in the body chunks that follow: of as many as it takes to have one, or to the end."""
        try:
            found = [await self.next_event()]
        except anyio.EndOfStream:
            return []
        found += self._parsed
        self.events += self._parsed
        self._parsed.clear()
        return found

    def _so_far(self) -> str:
        told = f"; answered with {self.status}; read so far: "
        if not self.events:
            return told + (f"no event, but {self._beginning!r}" if self._beginning else "nothing")
        earlier = max(0, len(self.events) - 5)
        shown = [f"{event.event} {event.data[:200]!r}" for event in self.events[earlier:]]
        return f"{told}events {', '.join(([f'{earlier} earlier ones'] if earlier else []) + shown)}"

    async def read_until(self, event: str) -> list[Event]:
        """All events up to and with the first of this name. Raises AssertionError if the body ends before."""
        found: list[Event] = []
        while not any(one.event == event for one in found):
            events = await self.read_events()
            assert events, f"the body ended before an event {event!r} came; there were {found}"
            found += events
        return found

    async def read_all_events(self) -> list[Event]:
        """All further events, to the end of the body."""
        found: list[Event] = []
        while events := await self.read_events():
            found += events
        return found

    def leave(self) -> None:
        """Go away. Further sends of the app go nowhere, as with a real server."""
        self._gone.set()
        self._chunks.close()

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not self.status, "the head was sent twice"
            self.status = message["status"]
            for name, value in message.get("headers", []):
                key, text = name.decode("latin-1").lower(), value.decode("latin-1")
                self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text
            self._started.set()
            return
        assert self.status, "a body without a head"
        assert not self.ended, "a body after its end"
        try:
            if message.get("body"):
                await self._chunks_in.send(bytes(message["body"]))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return
        if not message.get("more_body", False):
            self.ended = True
            self._chunks_in.close()
            self._gone.set()


def make_scope(
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | str = "",
    headers: Mapping[str, str] | None = None,
    root_path: str = "",
) -> dict[str, Any]:
    """An http scope as uvicorn makes it."""
    text = query if isinstance(query, str) else urlencode(query)
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode(),
        "root_path": root_path,
        "query_string": text.encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }


@asynccontextmanager
async def stream(
    app: App,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | str = "",
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    root_path: str = "",
    scope: Scope | None = None,
    timeout: float | None = None,
    spawn: Callable[[Callable[[], Awaitable[None]]], None] | None = None,
) -> AsyncIterator[StreamedResponse]:
    """Send a request; give the response as soon as its head is there. Leaving it early is a disconnect.

    What the app raises is raised here. If the body of the `async with` raises as well, that goes on, with the app's
    error as its cause. `timeout`, in seconds, is for the head and then for each wait; it raises `TimeoutError`.

    `spawn` runs the call of the app, which may then go on when its answer is complete, as background tasks do. Without
    it, it is cancelled after `LEAVE_S`.
    """
    scope = scope or make_scope(method, path, query=query, headers=headers, root_path=root_path)
    response = StreamedResponse(scope, timeout=timeout)
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    raised: list[Exception] = []
    failure: BaseException | None = None  # of the caller's block, which a task group would wrap
    call = anyio.CancelScope()
    goes_on = False

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await response._gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            with call:
                await app(scope, receive, response._send)
        except Exception as exc:
            if goes_on:
                raise  # into the log, as that of a server
            raised.append(exc)
        finally:
            response._started.set()
            response._chunks_in.close()
            over.set()

    over = anyio.Event()
    async with anyio.create_task_group() as tasks:
        if spawn is not None:
            spawn(run)
        else:
            tasks.start_soon(run)
        try:
            with at_most(timeout, lambda: f"{method} {path} was not answered within {timeout:g} s"):
                await response._started.wait()
            if not raised:
                assert response.status, "the app returned without an answer"
                yield response
        except (anyio.get_cancelled_exc_class(), GeneratorExit):
            raise
        except BaseException as exc:  # a skipped or failed test as well
            failure = exc
        finally:
            response.leave()
            may_go_on = spawn is not None and response.ended
            with anyio.move_on_after(AFTERWARDS_S if may_go_on else LEAVE_S, shield=True):
                await over.wait()
            goes_on = may_go_on and not over.is_set()
            if not goes_on:
                call.cancel()
                with anyio.CancelScope(shield=True):
                    await over.wait()
    if failure is not None:
        if raised and failure.__cause__ is None:
            failure.__cause__ = raised[0]
        raise failure
    if raised:
        raise raised[0]


class Response:
    """A whole response."""

    def __init__(self, streamed: StreamedResponse, body: bytes) -> None:
        self.scope = streamed.scope
        self.status = streamed.status
        self.headers = streamed.headers
        self.body = body
        self.ended = streamed.ended
        """The app ended the body. If not, it is what came before the connection was cut."""

    def __repr__(self) -> str:
        cut = "" if self.ended else " cut off"
        return f"<Response {self.status} {self.body[:200]!r}{cut}>"

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode()

    def json(self) -> Any:
        """The body as JSON. Raises `ValueError` if it is something else."""
        return json.loads(self.body)


async def request(
    app: App,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | str = "",
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    root_path: str = "",
) -> Response:
    """Send a request and read the whole answer. For answers that end."""
    async with stream(app, method, path, query=query, headers=headers, body=body, root_path=root_path) as streamed:
        return Response(streamed, await streamed.read())
