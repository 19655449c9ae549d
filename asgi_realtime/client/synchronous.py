"""The client for threads: the same calls, which block.

It runs a `RealtimeClient` on an event loop in a daemon thread; each call that has to wait becomes a task there. The
loop starts with the first such call. A daemon thread does not keep the process from exiting, and a client that is
garbage collected without `close` stops its loop too.

Only the token function does not run on the loop. It is the caller's code and may block, so the thread that waits for
the call runs it (`_Call`).
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.from_thread
import httpx

from asgi_realtime.client.asynchronous import (
    CONNECT_TIMEOUT,
    GIVE_UP_AFTER,
    SILENCE_TIMEOUT,
    RealtimeClient,
)
from asgi_realtime.client.states import RunState
from asgi_realtime.client.subscription import Subscription
from asgi_realtime.core.config import Span
from asgi_realtime.core.errors import InvalidConfiguration, UsageError
from asgi_realtime.loop.thread_calls import LoopThread
from asgi_realtime.streams.followers import StreamChunk

R = TypeVar("R")
T = TypeVar("T")


class SyncRealtimeClient:
    """As `RealtimeClient`, for threads. `access_token` is a token, or a function that is not async.

    Many threads can use the client, but each subscription only one at a time. Pass `http` to configure the requests; it
    must be an `httpx.AsyncClient`, is used on the event loop of this client only, and is closed with it.

    Use the client in a `with` block, or call `close`. Then its subscriptions end, and new calls raise `UsageError`. So
    do calls in a child process if the client was used before the fork.
    """

    def __init__(
        self,
        base_url: str,
        access_token: str | Callable[[], str],
        *,
        connect_timeout: Span = CONNECT_TIMEOUT,
        silence_timeout: Span = SILENCE_TIMEOUT,
        give_up_after: Span | None = GIVE_UP_AFTER,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        if isinstance(http, httpx.Client):
            raise InvalidConfiguration("http is an httpx.Client; pass an httpx.AsyncClient, also to this client")
        self._client = RealtimeClient(
            base_url,
            _called_in_thread(access_token) if callable(access_token) else access_token,
            connect_timeout=connect_timeout,
            silence_timeout=silence_timeout,
            give_up_after=give_up_after,
            http=http,
        )
        self._client._transport.owns_http = True
        self.base_url = self._client.base_url
        self._lock = threading.RLock()  # reentrant, so that a signal handler can close the client
        self._loop: LoopThread | None = None
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def subscribe_to_run(self, run_id: str) -> SyncSubscription[RunState]:
        """As `RealtimeClient.subscribe_to_run`."""
        return self._subscribe(lambda: self._client.subscribe_to_run(run_id))

    def subscribe_to_runs_with_tag(
        self, tags: str | Iterable[str], *, created_within: Span | None = None
    ) -> SyncSubscription[RunState]:
        """As `RealtimeClient.subscribe_to_runs_with_tag`."""
        return self._subscribe(lambda: self._client.subscribe_to_runs_with_tag(tags, created_within=created_within))

    def subscribe_to_batch(self, batch_id: str) -> SyncSubscription[RunState]:
        """As `RealtimeClient.subscribe_to_batch`."""
        return self._subscribe(lambda: self._client.subscribe_to_batch(batch_id))

    def read(self, run_id: str, stream: str = "default", *, start_index: int = 0) -> SyncSubscription[Any]:
        """As `RealtimeClient.read`."""
        return self._subscribe(lambda: self._client.read(run_id, stream, start_index=start_index))

    def read_indexed(
        self, run_id: str, stream: str = "default", *, start_index: int = 0
    ) -> SyncSubscription[StreamChunk]:
        """As `RealtimeClient.read_indexed`."""
        return self._subscribe(lambda: self._client.read_indexed(run_id, stream, start_index=start_index))

    def get_run(self, run_id: str) -> RunState:
        """As `RealtimeClient.get_run`."""
        call = self._start(lambda: self._client.get_run(run_id))
        if call is None:
            raise UsageError("this client is closed")
        return call.result()

    def close(self) -> None:
        """End all subscriptions, even while other threads read them, and close the connections."""
        if self._forked:
            return
        with self._lock:
            self._client._closed = True
            loop, self._loop = self._loop, None
        if loop is not None:
            self._finalizer.detach()
            _stop(loop, self._client)

    def __enter__(self) -> SyncRealtimeClient:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _forked(self) -> bool:
        """The loop runs in the parent process, so it cannot be used here."""
        return self._loop is not None and self._pid != os.getpid()

    def _subscribe(self, subscribe: Callable[[], Subscription[T]]) -> SyncSubscription[T]:
        with self._lock:  # the client adds it to a set, which is not thread-safe
            return SyncSubscription(self, subscribe())

    def _start(self, function: Callable[[], Awaitable[T]]) -> _Call[T] | None:
        """Start a call on the loop. None if the client is closed."""
        if self._forked:
            raise UsageError("this client was used before the process forked; create a new one in the child process")
        with self._lock:  # `close` waits for every call that starts here
            if self._client._closed:
                return None
            if self._loop is None:
                self._loop, self._pid = LoopThread(), os.getpid()
                self._finalizer = weakref.finalize(self, _abandon, self._pid, self._loop, self._client)
                self._finalizer.atexit = False
            call = _Call(self._loop.portal, function)
            call.start()
        return call


class SyncSubscription(Iterator[T], Generic[T]):
    """What the calls of `SyncRealtimeClient` return, to be iterated; see `Subscription`.

    If you stop iterating early, close the subscription with `with` or `close`. Any thread can close it, which ends the
    iteration at once.
    """

    def __init__(self, client: SyncRealtimeClient, subscription: Subscription[T]) -> None:
        self._client = client
        self._subscription = subscription

    def __repr__(self) -> str:
        return repr(self._subscription).replace("<", "<Sync", 1)

    def __next__(self) -> T:
        if not self._subscription._has_item:  # chunks that arrived together need only one switch of threads
            call = self._client._start(self._subscription._wait_for_item)
            if call is None:
                raise StopIteration
            call.result()
        try:
            return self._subscription._pop()
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """Close the connection and end the iteration, in whichever thread it runs."""
        if not self._client._forked and (call := self._client._start(self._subscription.aclose)):
            call.result()

    def __enter__(self) -> SyncSubscription[T]:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Call(Generic[T]):
    """A coroutine that runs on the loop, and the thread that waits for its result and runs jobs for it."""

    def __init__(self, portal: anyio.from_thread.BlockingPortal, function: Callable[[], Awaitable[T]]) -> None:
        self._portal = portal
        self._function = function
        self._future: Future[T | None]
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._scope: anyio.CancelScope | None = None
        self._ended: anyio.Event

    def start(self) -> None:
        token = _current_call.set(self)
        try:
            with self._cancelled_by_exceptions():
                self._future = self._portal.start_task_soon(self._run)
        finally:
            _current_call.reset(token)

    def result(self) -> T:
        """Wait for the end. If a signal handler raises, as `KeyboardInterrupt` does, cancel the coroutine."""
        with self._cancelled_by_exceptions():
            while (job := self._jobs.get()) is not None:
                job()
        return cast(T, self._future.result())

    async def run_in_thread(self, function: Callable[[], R]) -> R:
        """Run a function in the thread that waits for this call."""
        done: Future[R] = Future()

        def job() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function())
                except Exception as exc:
                    done.set_exception(exc)

        self._jobs.put(job)
        return await asyncio.wrap_future(done)

    async def _run(self) -> T | None:
        self._ended = anyio.Event()
        try:
            with anyio.CancelScope() as self._scope:
                return await self._function()
        finally:
            self._ended.set()
            self._jobs.put(None)
        return None  # cancelled

    @contextmanager
    def _cancelled_by_exceptions(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._portal.call(self._cancel)
            raise

    async def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            await self._ended.wait()


_current_call: ContextVar[_Call[Any]] = ContextVar("asgi_realtime_client_call")


def _called_in_thread(function: Callable[[], str]) -> Callable[[], Awaitable[str]]:
    async def call() -> str:
        token = await _current_call.get().run_in_thread(function)
        if inspect.iscoroutine(token):
            token.close()
            raise InvalidConfiguration("access_token is an async function; use it with RealtimeClient")
        return token

    return call


def _stop(loop: LoopThread, client: RealtimeClient) -> None:
    try:
        loop.portal.call(client.aclose)
    finally:
        loop.close()


def _abandon(pid: int, loop: LoopThread, client: RealtimeClient) -> None:
    """Stop the loop of a client that was garbage collected, in whichever thread that happened, even the loop's own."""
    if pid == os.getpid():
        threading.Thread(target=_stop, args=(loop, client), daemon=True).start()
