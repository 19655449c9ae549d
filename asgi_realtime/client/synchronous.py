"""The client for code that has no event loop: the same calls, which block."""

from __future__ import annotations

import inspect
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, TypeVar
from weakref import WeakSet

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
from asgi_realtime.core.errors import InvalidConfiguration
from asgi_realtime.streams.followers import StreamChunk

T = TypeVar("T")
S = TypeVar("S")


class SyncRealtimeClient(ClientBase):
    """As `RealtimeClient`, for threads. `access_token` is a token, or a function that is not async.

    It may be used by many threads, each subscription by one. Use the client in `with`, or `close` it: then its
    subscriptions end, and new ones raise `UsageError`.
    """

    def __init__(
        self,
        base_url: str,
        access_token: str | Callable[[], str],
        *,
        connect_timeout: Span = CONNECT_TIMEOUT,
        silence_timeout: Span = SILENCE_TIMEOUT,
        give_up_after: Span | None = GIVE_UP_AFTER,
        http: httpx.Client | None = None,
    ) -> None:
        super().__init__(
            base_url,
            access_token,
            connect_timeout=connect_timeout,
            silence_timeout=silence_timeout,
            give_up_after=give_up_after,
        )
        self._owns_http = http is None
        self._http = http or httpx.Client(limits=httpx.Limits(max_connections=None))
        self._sleep: Callable[[float, threading.Event], object] = _sleep
        self._turn = threading.Lock()
        self._newest: str | None = None
        self._subscriptions: WeakSet[SyncSubscription[Any]] = WeakSet()

    def subscribe_to_run(self, run_id: str) -> SyncSubscription[RunState]:
        """The states of a run, the present one first, until it is over. States may be skipped, never the last."""
        return SyncSubscription(self, self._run(run_id), as_it_is)

    def subscribe_to_runs_with_tag(
        self, tags: str | Iterable[str], *, created_within: Span | None = None
    ) -> SyncSubscription[RunState]:
        """The runs that have all of these tags, the present ones first, then each change. Never ends.

        `created_within` is how far back it reaches: 24 h if it is None, and at most.
        """
        return SyncSubscription(self, self._tagged(tags, created_within), as_it_is)

    def subscribe_to_batch(self, batch_id: str) -> SyncSubscription[RunState]:
        """The runs of a batch, the present state first. Ends when all are over and no more can come."""
        return SyncSubscription(self, self._batch(batch_id), as_it_is)

    def read(self, run_id: str, stream: str = "default", *, start_index: int = 0) -> SyncSubscription[Any]:
        """The decoded chunks of a stream from `start_index` on, present and to come, none lost and none twice.

        Ends when the run completes; raises `RunFailed` or `RunCanceled` after the last chunk if it ended otherwise.
        Raises `StreamGap` if chunks are past their retention; whoever asks again gets the oldest that is kept.
        """
        return SyncSubscription(self, self._chunks(run_id, stream, start_index), chunk_only)

    def read_indexed(
        self, run_id: str, stream: str = "default", *, start_index: int = 0
    ) -> SyncSubscription[StreamChunk]:
        """As `read`, each chunk with its index: who keeps that goes on later from `index + 1`."""
        return SyncSubscription(self, self._chunks(run_id, stream, start_index), as_it_is)

    def get_run(self, run_id: str) -> RunState:
        """The present state of a run. Tries as long as a subscription does."""
        with self.subscribe_to_run(run_id) as states:
            for state in states:
                return state
        raise self._no_state()

    def close(self) -> None:
        """End the subscriptions, those that are read too, and close the connections, unless `http` was given."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.close()
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> SyncRealtimeClient:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _token(self, refused: str | None) -> str:
        """A token that is not the refused one, as far as the function has another. All subscriptions share it."""
        if isinstance(self._access_token, str):
            return self._access_token
        with self._turn:
            if self._newest is None or self._newest == refused:
                token = self._access_token()
                if inspect.iscoroutine(token):
                    token.close()
                    raise InvalidConfiguration("access_token is an async function; use it with RealtimeClient")
                self._newest = check_token(token)
            return self._newest


class SyncSubscription(Iterator[T], Generic[T]):
    """What a call of `SyncRealtimeClient` iterates; see `Subscription`. Whoever leaves early closes it, with `with`.

    Any thread may close it. The one that reads then ends: at once, or, before the server has answered, after
    `connect_timeout` or `silence_timeout` at the latest; with HTTP/2, which only your own `http` may have, when the
    next bytes come.
    """

    def __init__(self, client: SyncRealtimeClient, following: Following[S], shape: Callable[[S], T]) -> None:
        self._client = client
        self._following = following
        self._shape = shape
        self._response: httpx.Response | None = None
        self._body: Iterator[bytes] | None = None
        self._closed = threading.Event()
        self._reading = threading.Lock()
        """Who has it uses the connection."""
        client._subscriptions.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._following.path}>"

    def __next__(self) -> T:
        if not self._following.ready:
            self._wait_for_more()
        if self._closed.is_set() or not self._following.ready:
            raise StopIteration
        item = self._following.ready.popleft()
        if isinstance(item, Raised):
            raise item.error
        return self._shape(item)

    def close(self) -> None:
        """Close the connection; nothing comes after that. Ends the iteration of another thread."""
        self._closed.set()
        self._following.close()
        if not self._leave():
            self._wake()

    def __enter__(self) -> SyncSubscription[T]:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _wait_for_more(self) -> None:
        """Until something is ready, or nothing more will come."""
        with self._reading:
            try:
                while not (self._following.ready or self._following.over):
                    self._advance()
            except BaseException as exc:
                self._following.left()
                self._disconnect()
                if not (self._closed.is_set() and isinstance(exc, Exception)):
                    raise
        if self._closed.is_set():  # by a thread that may have found the connection in use
            self._leave()

    def _leave(self) -> bool:
        """Disconnect, unless a thread reads."""
        if not self._reading.acquire(blocking=False):
            return False
        try:
            self._disconnect()
        finally:
            self._reading.release()
        return True

    def _wake(self) -> None:
        """A thread that waits for bytes hears the end of them. To close a socket would not wake it."""
        response = self._response
        if response is None or response.http_version == "HTTP/2":  # that connection is that of others too
            return
        stream = response.extensions.get("network_stream")
        connected = None if stream is None else stream.get_extra_info("socket")
        if connected is not None:
            with suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # of TLS too, without its farewell

    def _advance(self) -> None:
        """One step: to a response, or to the next bytes of it."""
        request = self._prepare() if self._body is None else None
        if self._closed.is_set():
            return
        try:
            if request is not None:
                going_on = self._connect(request)
            else:
                going_on = self._receive()
        except httpx.RequestError as exc:
            silent = isinstance(exc, httpx.TimeoutException)
            self._following.lost(self._client._describe(exc), cause=exc, silent=silent)
            going_on = False
        if not going_on:
            self._disconnect()

    def _prepare(self) -> httpx.Request:
        """The next request, when it is time for it."""
        client, following = self._client, self._following
        if pause_s := following.pause_s:
            client._sleep(pause_s, self._closed)
        headers = following.headers(client._token(following.refused_token))
        return client._http.build_request(
            "GET", client.base_url + following.path, headers=headers, timeout=client._timeout
        )

    def _connect(self, request: httpx.Request) -> bool:
        following = self._following
        response = self._client._http.send(request, stream=True, auth=None, follow_redirects=False)
        self._response, self._body = response, response.iter_bytes()
        if self._closed.is_set():  # before there was anything that could be woken
            return False
        if following.takes(response.status_code, response.headers):
            return True
        following.answered(response.status_code, response.headers, _begin(self._body))
        return False

    def _receive(self) -> bool:
        assert self._body is not None
        try:
            data = next(self._body)
        except StopIteration:
            self._following.lost("the response ended")
            return False
        return self._following.received(data)

    def _disconnect(self) -> None:
        response, self._response, self._body = self._response, None, None
        if response is not None:
            response.close()


def _sleep(seconds: float, closed: threading.Event) -> None:
    closed.wait(seconds)


def _begin(body: Iterator[bytes]) -> bytes:
    """What an answer says that is no stream, if it is not long."""
    begin = b""
    for data in body:
        begin += data
        if len(begin) >= MOST_OF_A_REFUSAL:
            break
    return begin
