"""One request to an ASGI app, without sockets and with a live body.

`send()` waits until the test reads the chunk, so back-pressure is that of a socket without any buffer.
Works on asyncio and trio. (`httpx.ASGITransport` collects the whole body first, so it cannot show a live stream.)
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

import anyio

from asgi_realtime.asgi.host import App, Message, Scope
from asgi_realtime.core.event_stream import Event, EventParser

T = TypeVar("T")

LEAVE_S = 2.0
"""How long an app may take to return after its client disconnected, before it is cancelled."""

AFTERWARDS_S = 0.1
"""How long to wait for the app after a complete response, so that what it raises then is raised here."""


@contextmanager
def at_most(seconds: float | None, describe: Callable[[], str]) -> Iterator[None]:
    """Raise `TimeoutError` with the text from `describe` if the block takes longer. None means no limit."""
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(describe())


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


def make_scope(
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | str = "",
    headers: Mapping[str, str] | None = None,
    root_path: str = "",
) -> dict[str, Any]:
    """An HTTP scope as uvicorn makes it."""
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
async def call_app(
    app: App,
    scope: Scope,
    *,
    body: bytes,
    timeout: float | None,
    spawn: Callable[[Callable[[], Awaitable[None]]], None] | None,
) -> AsyncIterator[StreamedResponse]:
    """Call the app with a request and yield the response once it has started. Exiting early is a disconnect.

    Raises what the app raises. If the block of the `async with` raises too, that error propagates, with the app's error
    as its cause. Raises `TimeoutError` if the app does not respond within `timeout` seconds; each wait of the response
    has the same limit.

    `spawn` runs the call in another task, so that it can continue after a complete response, as background tasks do.
    Without it the call is cancelled `LEAVE_S` after the exit.
    """
    response = StreamedResponse(scope, timeout=timeout)
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    raised: list[Exception] = []
    failure: BaseException | None = None  # of the caller's block; the task group would wrap it in an exception group
    call = anyio.CancelScope()
    continues = False
    returned = anyio.Event()

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await response._disconnected.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            with call:
                await app(scope, receive, response._send)
        except Exception as exc:
            if continues:
                raise  # to the log, as on a server
            raised.append(exc)
        finally:
            response._started.set()
            response._chunks_in.close()
            returned.set()

    async with anyio.create_task_group() as tasks:
        if spawn is not None:
            spawn(run)
        else:
            tasks.start_soon(run)
        try:
            request = f"{scope['method']} {scope['path']}"
            with at_most(timeout, lambda: f"the app did not respond to {request} within {timeout:g} s"):
                await response._started.wait()
            if not raised:
                assert response.status_code, "the app returned without a response"
                yield response
        except (anyio.get_cancelled_exc_class(), GeneratorExit):
            raise
        except BaseException as exc:  # includes the exceptions of pytest.skip and pytest.fail
            failure = exc
        finally:
            response.leave()
            can_continue = spawn is not None and response.ended
            with anyio.move_on_after(AFTERWARDS_S if can_continue else LEAVE_S, shield=True):
                await returned.wait()
            continues = can_continue and not returned.is_set()
            if not continues:
                call.cancel()
                with anyio.CancelScope(shield=True):
                    await returned.wait()
    if failure is not None:
        if raised and failure.__cause__ is None:
            failure.__cause__ = raised[0]
        raise failure
    if raised:
        raise raised[0]
