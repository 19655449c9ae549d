"""Connections that fail where a test wants it: cut, stalled or refused.

`Faults` is an ASGI app that wraps another, so it works under `AsgiClient` and under a real server with a browser.
Faults happen after a number of events, never after a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio

from asgi_realtime.asgi.host import App, Message, Receive, Scope, Send
from asgi_realtime.core.event_stream import EventParser

F = TypeVar("F")

LEAVE_S = 2.0
"""How long an app may take to return after its connection was cut, before it is cancelled."""


@dataclass(eq=False)
class _Fault(ABC):
    description: str
    path: str
    times: float

    @abstractmethod
    async def apply(self, app: App, scope: Scope, receive: Receive, send: Send, record: Callable[[], None]) -> None:
        """Call the app, or respond instead of it. Call `record` when the fault happens."""


@dataclass(eq=False)
class _Refusal(_Fault):
    status: int
    headers: Mapping[str, str]

    async def apply(self, app: App, scope: Scope, receive: Receive, send: Send, record: Callable[[], None]) -> None:
        record()
        headers = {"content-type": "text/plain; charset=utf-8", **self.headers}
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": encoded})
        await send({"type": "http.response.body", "body": b"refused by a test"})


@dataclass(eq=False)
class _Cut(_Fault):
    after: int
    mid_event: bool

    async def apply(self, app: App, scope: Scope, receive: Receive, send: Send, record: Callable[[], None]) -> None:
        connection = _CutConnection(self, receive, send, record)
        with connection.running:
            await app(scope, connection.receive, connection.send)


@dataclass(eq=False)
class Stall(_Fault):
    """Clients that stop reading until `release`."""

    after: int
    released: anyio.Event = field(default_factory=anyio.Event)

    def release(self) -> None:
        """Let the clients continue, including future ones. Call it on the event loop of the app."""
        self.released.set()

    async def apply(self, app: App, scope: Scope, receive: Receive, send: Send, record: Callable[[], None]) -> None:
        connection = _StalledConnection(self, receive, send, record)
        await app(scope, connection.receive, connection.send)


class Faults:
    """The app with bad connections: create `faults = Faults(app)`, and pass `faults` to the client or the server.

    Each method plans a fault for the next `times` requests whose path starts with `path`. Each request gets one fault,
    the one planned first. Preflights (OPTIONS) and lifespans pass unchanged.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.happened: list[str] = []
        """One line per fault that happened: `GET /events cut after 2 events`."""
        self._planned: list[_Fault] = []

    def refuse(
        self, status: int = 503, *, times: float = 1, path: str = "/", headers: Mapping[str, str] | None = None
    ) -> None:
        """Respond with this status and a short text without calling the app. `times` can be `math.inf`."""
        self._planned.append(_Refusal(f"refused with {status}", path, times, status, headers or {}))

    def cut(self, after: int = 0, *, mid_event: bool = False, times: float = 1, path: str = "/") -> None:
        """Cut the connection after this many events; with `mid_event`, in the middle of the next one.

        The app receives `http.disconnect`, and what it sends is discarded, as with a disconnected client; it is
        cancelled if it does not return within 2 seconds. The client receives what was sent before, without the end of
        the body: a real server closes the connection. A body that ends earlier is not cut.
        """
        description = f"cut after {after} events{' and half of one' if mid_event else ''}"
        self._planned.append(_Cut(description, path, times, after, mid_event))

    def stall(self, after: int = 0, *, times: float = 1, path: str = "/") -> Stall:
        """Stop reading after this many events. The app's `send` waits until the client disconnects, or until
        `release()` is called on the returned object.
        """
        stall = Stall(f"stalled after {after} events", path, times, after)
        self._planned.append(stall)
        return stall

    def clear(self) -> None:
        """Remove all planned faults. Faults in progress continue."""
        self._planned.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._next(scope)
        if fault is None:
            await self.app(scope, receive, send)
            return
        line = f"{scope['method']} {scope['path']} {fault.description}"
        await fault.apply(self.app, scope, receive, send, lambda: self.happened.append(line))

    def _next(self, scope: Scope) -> _Fault | None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return None
        for fault in self._planned:
            if scope["path"].startswith(fault.path):
                fault.times -= 1
                if fault.times < 1:
                    self._planned.remove(fault)
                return fault
        return None


class _Events:
    """Counts the events of a body."""

    def __init__(self) -> None:
        self.count = 0
        self._parser = EventParser()

    def feed_until(self, wanted: int, body: bytes) -> int | None:
        """Return the offset at which `wanted` events are complete. None if that is beyond these bytes."""
        at = 0
        if self.count >= wanted:
            return at
        for line in body.splitlines(keepends=True):
            at += len(line)
            self.count += len(self._parser.feed(line))
            if self.count >= wanted:
                return at
        return None


class _Connection(Generic[F]):
    def __init__(self, fault: F, receive: Receive, send: Send, record: Callable[[], None]) -> None:
        self._fault = fault
        self._receive = receive
        self._send = send
        self._record = record
        self._events = _Events()


class _CutConnection(_Connection[_Cut]):
    """Disconnects where the fault says. The app runs in the caller's task."""

    def __init__(self, fault: _Cut, receive: Receive, send: Send, record: Callable[[], None]) -> None:
        super().__init__(fault, receive, send, record)
        self._lost = False
        self._receiving: set[anyio.CancelScope] = set()
        self.running = anyio.CancelScope()

    async def receive(self) -> Message:
        if not self._lost:
            with anyio.CancelScope() as scope:
                self._receiving.add(scope)
                try:
                    return await self._receive()
                finally:
                    self._receiving.discard(scope)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._lost:
            return
        at = self._cut_offset(message)
        if at is None:
            await self._send(message)
            return
        if message["type"] == "http.response.start":
            await self._send(message)
        elif at:
            await self._send({"type": "http.response.body", "body": message["body"][:at], "more_body": True})
        self._lose()

    def _cut_offset(self, message: Message) -> int | None:
        """How many bytes of this message the client still receives. None if the cut comes later."""
        fault = self._fault
        if message["type"] != "http.response.body":
            at_once = message["type"] == "http.response.start" and not fault.after and not fault.mid_event
            return 0 if at_once else None
        body = message.get("body", b"")
        at = self._events.feed_until(fault.after, body)
        if at is None or not fault.mid_event:
            return at
        rest = body[at:]
        if not rest:
            return None
        return at + max(1, (self._events.feed_until(fault.after + 1, rest) or len(rest)) // 2)

    def _lose(self) -> None:
        self._record()
        self._lost = True
        self.running.deadline = anyio.current_time() + LEAVE_S
        for scope in tuple(self._receiving):
            scope.cancel()


class _StalledConnection(_Connection[Stall]):
    """Stops reading where the fault says.

    While the app waits in `send`, this watches for the disconnect, as the app may not be in `receive`.
    """

    def __init__(self, fault: Stall, receive: Receive, send: Send, record: Callable[[], None]) -> None:
        super().__init__(fault, receive, send, record)
        self._stalled = False
        self._disconnected = False
        self._early: deque[Message] = deque()
        self._receiving = anyio.Lock()

    async def receive(self) -> Message:
        async with self._receiving:
            return self._early.popleft() if self._early else await self._take()

    async def _take(self) -> Message:
        if self._disconnected:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._disconnected = message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        body = message.get("body", b"")
        at = self._events.feed_until(self._fault.after, body)
        if at is None or self._fault.released.is_set():
            await self._send(message)
            return
        if at:
            await self._send({"type": "http.response.body", "body": body[:at], "more_body": True})
        if at < len(body) or not message.get("more_body", False):
            await self._wait_for_reader()
            await self._send({**message, "body": body[at:]})

    async def _wait_for_reader(self) -> None:
        if not self._stalled:
            self._stalled = True
            self._record()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, tasks.cancel_scope)
            await self._fault.released.wait()
            tasks.cancel_scope.cancel()

    async def _watch(self, waiting: anyio.CancelScope) -> None:
        while not self._disconnected:
            async with self._receiving:
                message = await self._take()
                if not self._disconnected:
                    self._early.append(message)
        waiting.cancel()
