"""The client for asyncio and trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypedDict, TypeVar
from weakref import WeakSet

import httpx

from asgi_realtime.client.arguments import batch_path, check_start_index, run_path, stream_path, tags_path
from asgi_realtime.client.errors import UnexpectedAnswer
from asgi_realtime.client.protocol import ChunksProtocol, RunsProtocol, SubscriptionProtocol
from asgi_realtime.client.states import RunState
from asgi_realtime.client.subscription import Subscription
from asgi_realtime.client.transport import Transport
from asgi_realtime.core.config import Span
from asgi_realtime.core.errors import UsageError
from asgi_realtime.streams.followers import StreamChunk

T = TypeVar("T")

CONNECT_TIMEOUT = 10.0
"""Seconds until a connection is established and the request is sent."""

SILENCE_TIMEOUT = 45.0
"""Seconds without a byte after which a connection counts as lost. The server sends a heartbeat every 15."""

GIVE_UP_AFTER = 300.0
"""Seconds without progress after which a subscription raises `ServerUnreachable`."""


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of both clients; see `RealtimeClient`."""

    connect_timeout: Span
    silence_timeout: Span
    give_up_after: Span | None
    http: httpx.AsyncClient | None


class RealtimeClient:
    """Follows runs and reads streams of a `Realtime` in another service.

    `base_url` is the origin and the mount path: `https://api.example.com/realtime`. `access_token` is a public access
    token, or a function, async or not, that returns one. The function is called for the first token, and again when the
    server refuses the last one.

    A subscription reconnects and resumes after a lost connection, a response with 5xx, 408 or 429, a server shutdown,
    and `silence_timeout` without a byte; its pauses grow from 1 s to 30 s. After `give_up_after` without progress it
    raises `ServerUnreachable`; None means never. `connect_timeout` limits one connection attempt.

    Pass `http` to configure proxies and certificates; the client does not close it.
    Use the client with `async with`, or call `aclose`. Then its subscriptions end, and new calls raise `UsageError`.
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
        self._transport = Transport(base_url, access_token, connect_timeout, silence_timeout, give_up_after, http)
        self.base_url = self._transport.base_url
        self._closed = False
        self._subscriptions: WeakSet[Subscription[Any]] = WeakSet()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def subscribe_to_run(self, run_id: str) -> Subscription[RunState]:
        """The states of a run, starting with the current one, until the run is over.

        Intermediate states can be skipped, the last one never.
        """
        return self._subscribe_to_runs(run_path(run_id))

    def subscribe_to_runs_with_tag(
        self, tags: str | Iterable[str], *, created_within: Span | None = None
    ) -> Subscription[RunState]:
        """The current state of every run that has all of these tags, then each change. Never ends.

        `created_within` limits the runs by age; the default, and the maximum, is 24 h.
        """
        return self._subscribe_to_runs(tags_path(tags, created_within))

    def subscribe_to_batch(self, batch_id: str) -> Subscription[RunState]:
        """The current state of every run of a batch, then each change.

        Ends when all runs are over and no more can be added.
        """
        return self._subscribe_to_runs(batch_path(batch_id))

    def read(self, run_id: str, stream: str = "default", *, start_index: int = 0) -> Subscription[Any]:
        """The decoded chunks of a stream from `start_index` on, stored and new ones, without loss or duplicates.

        Ends when the run completes. If it ended otherwise, raises `RunFailed` or `RunCanceled` after the last chunk.
        Raises `StreamGap` if chunks have expired; iterating again continues with the oldest retained one.
        """
        return self._read(run_id, stream, start_index, lambda item: item.chunk)

    def read_indexed(self, run_id: str, stream: str = "default", *, start_index: int = 0) -> Subscription[StreamChunk]:
        """As `read`, with the index of each chunk. To resume in another process, start at `index + 1`."""
        return self._read(run_id, stream, start_index, lambda item: item)

    async def get_run(self, run_id: str) -> RunState:
        """The current state of a run. Retries as long as a subscription does."""
        async with self.subscribe_to_run(run_id) as states:
            async for state in states:
                return state
        self._check_open()
        raise UnexpectedAnswer("the server sent no state of the run", status=200)

    async def aclose(self) -> None:
        """End all subscriptions, even while they are read, and close the connections unless `http` was passed in."""
        self._closed = True
        for subscription in list(self._subscriptions):
            await subscription.aclose()
        await self._transport.aclose()

    async def __aenter__(self) -> RealtimeClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _subscribe_to_runs(self, path: str) -> Subscription[RunState]:
        return self._subscribe(RunsProtocol(path, self._transport.backoff()))

    def _read(self, run_id: str, stream: str, start_index: int, convert: Callable[[StreamChunk], T]) -> Subscription[T]:
        path, start_index = stream_path(run_id, stream), check_start_index(start_index)
        return self._subscribe(ChunksProtocol(path, self._transport.backoff(), stream, start_index, convert))

    def _subscribe(self, protocol: SubscriptionProtocol[T]) -> Subscription[T]:
        self._check_open()
        protocol.renewable = self._transport.renewable
        subscription = Subscription(self._transport, protocol)
        self._subscriptions.add(subscription)
        return subscription

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this client is closed")
