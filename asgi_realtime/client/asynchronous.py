"""The client for asyncio and trio."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import anyio
import httpx

from asgi_realtime.client.calls import (
    CONNECT_TIMEOUT,
    GIVE_UP_AFTER,
    MOST_OF_A_REFUSAL,
    SILENCE_TIMEOUT,
    ClientBase,
    as_it_is,
    check_token,
    chunk_only,
)
from asgi_realtime.client.following import Following, Raised
from asgi_realtime.client.states import RunState
from asgi_realtime.core.config import Span
from asgi_realtime.streams.followers import StreamChunk

T = TypeVar("T")
S = TypeVar("S")


class RealtimeClient(ClientBase):
    """Follows runs and reads streams of a `Realtime` in another service.

    `base_url` is the origin and the mount: `https://api.example.com/realtime`. `access_token` is a public access token,
    or a function, async or not, that returns one: it is asked for the first, and for a new one whenever the server does
    not take the last any more.

    A subscription comes back by itself, where it was, after a lost connection, an answer 5xx, 408 or 429, a server's
    shutdown, and `silence_timeout` without a byte; with pauses that grow from 1 s to 30 s. After `give_up_after`
    without progress it raises `ServerUnreachable`; with None it never gives up. `connect_timeout` is for one try.

    `http` is used for the requests and not closed; so proxies and certificates may be set there. Use the client in
    `async with`, or `aclose` it; then its subscriptions end, and new ones raise `UsageError`.
    """

    def __init__(
        self,
        base_url: str,
        access_token: str | Callable[[], str | Awaitable[str]],
        *,
        connect_timeout: Span = CONNECT_TIMEOUT,
        silence_timeout: Span = SILENCE_TIMEOUT,
        give_up_after: Span | None = GIVE_UP_AFTER,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        super().__init__(
            base_url,
            access_token,
            connect_timeout=connect_timeout,
            silence_timeout=silence_timeout,
            give_up_after=give_up_after,
        )
        self._owns_http = http is None
        self._http = http or httpx.AsyncClient(limits=httpx.Limits(max_connections=None))
        self._sleep: Callable[[float], Awaitable[None]] = anyio.sleep
        self._turn = anyio.Lock()
        self._newest: str | None = None
        self._subscriptions: WeakSet[Subscription[Any]] = WeakSet()

    def subscribe_to_run(self, run_id: str) -> Subscription[RunState]:
        """The states of a run, the present one first, until it is over. States may be skipped, never the last."""
        return Subscription(self, self._run(run_id), as_it_is)

    def subscribe_to_runs_with_tag(
        self, tags: str | Iterable[str], *, created_within: Span | None = None
    ) -> Subscription[RunState]:
        """The runs that have all of these tags, the present ones first, then each change. Never ends.

        `created_within` is how far back it reaches: 24 h if it is None, and at most.
        """
        return Subscription(self, self._tagged(tags, created_within), as_it_is)

    def subscribe_to_batch(self, batch_id: str) -> Subscription[RunState]:
        """The runs of a batch, the present state first. Ends when all are over and no more can come."""
        return Subscription(self, self._batch(batch_id), as_it_is)

    def read(self, run_id: str, stream: str = "default", *, start_index: int = 0) -> Subscription[Any]:
        """The decoded chunks of a stream from `start_index` on, present and to come, none lost and none twice.

        Ends when the run completes; raises `RunFailed` or `RunCanceled` after the last chunk if it ended otherwise.
        Raises `StreamGap` if chunks are past their retention; whoever asks again gets the oldest that is kept.
        """
        return Subscription(self, self._chunks(run_id, stream, start_index), chunk_only)

    def read_indexed(self, run_id: str, stream: str = "default", *, start_index: int = 0) -> Subscription[StreamChunk]:
        """As `read`, each chunk with its index: who keeps that goes on later from `index + 1`."""
        return Subscription(self, self._chunks(run_id, stream, start_index), as_it_is)

    async def get_run(self, run_id: str) -> RunState:
        """The present state of a run. Tries as long as a subscription does."""
        async with self.subscribe_to_run(run_id) as states:
            async for state in states:
                return state
        raise self._no_state()

    async def aclose(self) -> None:
        """End the subscriptions, those that are read too, and close the connections, unless `http` was given."""
        self._closed = True
        for subscription in list(self._subscriptions):
            await subscription.aclose()
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> RealtimeClient:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _token(self, refused: str | None) -> str:
        """A token that is not the refused one, as far as the function has another. All subscriptions share it."""
        if isinstance(self._access_token, str):
            return self._access_token
        async with self._turn:
            if self._newest is None or self._newest == refused:
                token = self._access_token()
                self._newest = check_token(await token if inspect.isawaitable(token) else token)
            return self._newest


class Subscription(AsyncIterator[T], Generic[T]):
    """What a call of `RealtimeClient` iterates. It connects when it is first asked, and holds a connection to its end.

    Whoever leaves early closes it, with `async with` or `aclose`. Cancellation closes the connection and loses nothing,
    and neither does an error: asked again it goes on where it was, but for an end. For one task at a time; any other
    may close it, which ends the iteration.

    Raises `InvalidToken`, `ExpiredToken`, `ScopeDenied`, `RunNotFound` and others as the server refuses, then
    `ServerUnreachable`, `UnexpectedAnswer`, and what the function for tokens raises.
    """

    def __init__(self, client: RealtimeClient, following: Following[S], shape: Callable[[S], T]) -> None:
        self._client = client
        self._following = following
        self._shape = shape
        self._response: httpx.Response | None = None
        self._body: AsyncIterator[bytes] | None = None
        self._closed = False
        self._wait: anyio.CancelScope | None = None
        """That of the task that is in `__anext__`."""
        self._waited: anyio.Event
        client._subscriptions.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._following.path}>"

    async def __anext__(self) -> T:
        if not self._following.ready:
            await self._wait_for_more()
        if self._closed or not self._following.ready:
            raise StopAsyncIteration
        item = self._following.ready.popleft()
        if isinstance(item, Raised):
            raise item.error
        return self._shape(item)

    async def aclose(self) -> None:
        """Close the connection; nothing comes after that. Ends the iteration of another task."""
        self._closed = True
        self._following.close()
        if self._wait is None:
            await self._disconnect()
        else:
            self._wait.cancel()
            await self._waited.wait()

    async def __aenter__(self) -> Subscription[T]:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _wait_for_more(self) -> None:
        """Until something is ready, or nothing more will come."""
        self._waited = anyio.Event()
        try:
            with anyio.CancelScope() as self._wait:
                try:
                    while not (self._following.ready or self._following.over):
                        await self._advance()
                except BaseException:
                    self._following.left()
                    await self._disconnect()
                    raise
            if self._closed:
                await self._disconnect()
        finally:
            self._wait = None
            self._waited.set()

    async def _advance(self) -> None:
        """One step: to a response, or to the next bytes of it."""
        request = await self._prepare() if self._body is None else None
        try:
            if request is not None:
                going_on = await self._connect(request)
            else:
                going_on = await self._receive()
        except httpx.RequestError as exc:
            silent = isinstance(exc, httpx.TimeoutException)
            self._following.lost(self._client._describe(exc), cause=exc, silent=silent)
            going_on = False
        if not going_on:
            await self._disconnect()

    async def _prepare(self) -> httpx.Request:
        """The next request, when it is time for it."""
        client, following = self._client, self._following
        if pause_s := following.pause_s:
            await client._sleep(pause_s)
        headers = following.headers(await client._token(following.refused_token))
        return client._http.build_request(
            "GET", client.base_url + following.path, headers=headers, timeout=client._timeout
        )

    async def _connect(self, request: httpx.Request) -> bool:
        following = self._following
        response = await self._client._http.send(request, stream=True, auth=None, follow_redirects=False)
        self._response, self._body = response, response.aiter_bytes()
        if following.takes(response.status_code, response.headers):
            return True
        following.answered(response.status_code, response.headers, await _begin(self._body))
        return False

    async def _receive(self) -> bool:
        assert self._body is not None
        try:
            data = await anext(self._body)
        except StopAsyncIteration:
            self._following.lost("the response ended")
            return False
        return self._following.received(data)

    async def _disconnect(self) -> None:
        response, body, self._response, self._body = self._response, self._body, None, None
        if body is not None:
            with anyio.CancelScope(shield=True) as scope, suppress(httpx.RequestError):
                scope.cancel()  # ends the generators within each other that httpx reads with; trio warns of them if not
                async for _ in body:
                    pass
        if response is not None:
            with anyio.CancelScope(shield=True):
                await response.aclose()


async def _begin(body: AsyncIterator[bytes]) -> bytes:
    """What an answer says that is no stream, if it is not long."""
    begin = b""
    async for data in body:
        begin += data
        if len(begin) >= MOST_OF_A_REFUSAL:
            break
    return begin
