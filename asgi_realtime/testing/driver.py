"""One request to an ASGI app, without sockets and with a live body.

`send()` waits until the test reads the chunk, so backpressure is that of a socket without any buffer.
Works on asyncio and trio. (`httpx.ASGITransport` collects the whole body first, so it cannot show a live stream.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urlencode

import anyio

from asgi_realtime.asgi.host import App, Message, Scope
from asgi_realtime.loop.waiting import at_most
from asgi_realtime.testing.responses import StreamedResponse

LEAVE_S = 2.0
"""How long an app may take to return after its client disconnected, before it is cancelled."""

AFTERWARDS_S = 0.1
"""How long to wait for the app after a complete response, so that what it raises then is raised here."""


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


class _Exchange:
    """One call of the app with one request."""

    def __init__(self, app: App, scope: Scope, body: bytes, timeout: float | None) -> None:
        self.response = StreamedResponse(scope, timeout=timeout)
        self.raised: Exception | None = None
        """What the app raised before `leave` let it continue."""
        self._app = app
        self._timeout = timeout
        self._requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._call = anyio.CancelScope()
        self._continued = False
        self._returned = anyio.Event()

    async def run(self) -> None:
        try:
            with self._call:
                await self._app(self.response.scope, self._receive, self.response._send)
        except Exception as exc:
            if self._continued:
                raise  # to the log, as on a server
            self.raised = exc
        finally:
            self.response._started.set()
            self.response._chunks_in.close()
            self._returned.set()

    async def wait_started(self) -> None:
        request = f"{self.response.scope['method']} {self.response.scope['path']}"
        with at_most(self._timeout, lambda: f"the app did not respond to {request} within {self._timeout:g} s"):
            await self.response._started.wait()
        assert self.raised or self.response.status_code, "the app returned without a response"

    async def leave(self, *, can_continue: bool) -> None:
        """Disconnect and wait for the app. After a complete response it can continue, otherwise it is cancelled."""
        self.response.leave()
        can_continue = can_continue and self.response.ended
        with anyio.move_on_after(AFTERWARDS_S if can_continue else LEAVE_S, shield=True):
            await self._returned.wait()
        self._continued = can_continue and not self._returned.is_set()
        if not self._continued:
            self._call.cancel()
            with anyio.CancelScope(shield=True):
                await self._returned.wait()

    def reraise(self, failure: BaseException | None) -> None:
        """Raise the failure of the caller's block, caused by that of the app, or the latter alone."""
        if failure is None:
            failure = self.raised
        elif self.raised is not None and failure.__cause__ is None:
            failure.__cause__ = self.raised
        if failure is not None:
            raise failure

    async def _receive(self) -> Message:
        if self._requests:
            return self._requests.pop()
        await self.response._disconnected.wait()
        return {"type": "http.disconnect"}


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
    exchange = _Exchange(app, scope, body, timeout)
    failure: BaseException | None = None  # of the caller's block; the task group would wrap it in an exception group
    async with anyio.create_task_group() as tasks:
        if spawn is not None:
            spawn(exchange.run)
        else:
            tasks.start_soon(exchange.run)
        try:
            await exchange.wait_started()
            if not exchange.raised:
                yield exchange.response
        except (anyio.get_cancelled_exc_class(), GeneratorExit):
            raise
        except BaseException as exc:  # includes the exceptions of pytest.skip and pytest.fail
            failure = exc
        finally:
            await exchange.leave(can_continue=spawn is not None)
    exchange.reraise(failure)
