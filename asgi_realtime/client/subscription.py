"""One subscription on asyncio or trio. `protocol` decides what happens; this module carries the bytes to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Generic, TypeVar

import anyio
import httpx

from asgi_realtime.client.protocol import Raised, SubscriptionProtocol
from asgi_realtime.client.transport import Transport

T = TypeVar("T")

_ERROR_BODY_BYTES = 64 * 1024
"""How much of a body is read that is not an event stream."""


class Subscription(AsyncIterator[T], Generic[T]):
    """What the calls of `RealtimeClient` return, to be iterated. It connects on the first `anext`.

    If you stop iterating early, close the subscription with `async with` or `aclose`. A cancellation closes the
    connection and loses nothing, and neither does an error: iterating again resumes, except after the end. Only one
    task can iterate at a time; any task can close the subscription, which ends the iteration.

    Raises `InvalidToken`, `ExpiredToken`, `ScopeDenied`, `RunNotFound` and others when the server refuses the request,
    `ServerUnreachable`, `UnexpectedAnswer`, and whatever the token function raises.
    """

    def __init__(self, transport: Transport, protocol: SubscriptionProtocol[T]) -> None:
        self._transport = transport
        self._protocol = protocol
        self._response: httpx.Response | None = None
        self._body: AsyncIterator[bytes] | None = None
        self._closed = False
        self._reader: anyio.CancelScope | None = None
        """Cancels the task that waits in `__anext__`."""
        self._reader_left: anyio.Event

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._protocol.path}>"

    async def __anext__(self) -> T:
        if not self._has_item:
            await self._wait_for_item()
        return self._pop()

    async def aclose(self) -> None:
        """Close the connection and end the iteration, in whichever task it runs."""
        self._closed = True
        self._protocol.close()
        if self._reader is not None:
            self._reader.cancel()
            await self._reader_left.wait()
        await self._disconnect()

    async def __aenter__(self) -> Subscription[T]:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    @property
    def _has_item(self) -> bool:
        """`_pop` can be called: there is an item, or never will be."""
        return bool(self._protocol.ready) or self._protocol.over

    def _pop(self) -> T:
        if self._closed or not self._protocol.ready:
            raise StopAsyncIteration
        item = self._protocol.ready.popleft()
        if isinstance(item, Raised):
            raise item.error
        return item

    async def _wait_for_item(self) -> None:
        if self._reader is not None:  # a cancelled call of `SyncSubscription` still closes its connection
            await self._reader_left.wait()
        self._reader_left = anyio.Event()
        try:
            with anyio.CancelScope() as self._reader:
                while not self._has_item:
                    await self._advance()
        except BaseException:
            self._protocol.leave()
            await self._disconnect()
            raise
        finally:
            self._reader = None
            self._reader_left.set()

    async def _advance(self) -> None:
        """Take one step: to a response, or to its next bytes."""
        request = await self._transport.prepare(self._protocol) if self._body is None else None
        try:
            connected = await self._receive() if request is None else await self._connect(request)
        except httpx.RequestError as exc:
            silent = isinstance(exc, httpx.TimeoutException)
            self._protocol.lose(self._transport.describe(exc), cause=exc, silent=silent)
            connected = False
        if not connected:
            await self._disconnect()

    async def _connect(self, request: httpx.Request) -> bool:
        response = await self._transport.send(request)
        self._response, self._body = response, response.aiter_bytes()
        if self._protocol.accept(response.status_code, response.headers):
            return True
        self._protocol.refuse(response.status_code, response.headers, await _read_error_body(self._body))
        return False

    async def _receive(self) -> bool:
        assert self._body is not None
        try:
            data = await anext(self._body)
        except StopAsyncIteration:
            self._protocol.lose("the response ended")
            return False
        return self._protocol.receive(data)

    async def _disconnect(self) -> None:
        response, body, self._response, self._body = self._response, self._body, None, None
        if body is not None:
            # Exhausts the nested generators that httpx reads with; trio warns about generators that are dropped.
            with anyio.CancelScope(shield=True) as scope, suppress(httpx.RequestError):
                scope.cancel()
                async for _ in body:
                    pass
        if response is not None:
            with anyio.CancelScope(shield=True):
                await response.aclose()


async def _read_error_body(body: AsyncIterator[bytes]) -> bytes:
    found = b""
    async for data in body:
        found += data
        if len(found) >= _ERROR_BODY_BYTES:
            break
    return found
