"""The client for threads: the same calls, which block.

It runs a `RealtimeClient` on an event loop in a daemon thread; each call that has to wait becomes a task there. The
loop starts with the first such call. A daemon thread does not keep the process from exiting, and a client that is
garbage collected without `close` stops its loop too.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Generic, TypeVar, Unpack, cast

import anyio
import anyio.from_thread
import httpx

from asgi_realtime.client.asynchronous import ClientOptions, RealtimeClient
from asgi_realtime.client.states import RunState
from asgi_realtime.client.subscription import Subscription
from asgi_realtime.core.config import Span
from asgi_realtime.core.errors import InvalidConfiguration, UsageError
from asgi_realtime.loop.thread_calls import LoopThread
from asgi_realtime.loop.threads import without_loop
from asgi_realtime.streams.followers import StreamChunk

T = TypeVar("T")


class SyncRealtimeClient:
    """As `RealtimeClient`, for threads. `access_token` is a token, or a function that is not async.

    Many threads can use the client, but each subscription only one at a time. Pass `http` to configure the requests; it
    must be an `httpx.AsyncClient`, is used on the event loop of this client only, and is closed with it.

    Use the client in a `with` block, or call `close`. Then its subscriptions end, and new calls raise `UsageError`. So
    do calls in a child process if the client was used before the fork.
    """

    def __init__(self, base_url: str, access_token: str | Callable[[], str], **options: Unpack[ClientOptions]) -> None:
        if isinstance(options.get("http"), httpx.Client):
            raise InvalidConfiguration("http is an httpx.Client; pass an httpx.AsyncClient, also to this client")
        token = _in_thread(access_token) if callable(access_token) else access_token
        self._client = RealtimeClient(base_url, token, **options)
        self._client._transport.owns_http = True
        self.base_url = self._client.base_url
        self._loop = _ClientLoop(self._client)
        weakref.finalize(self, self._loop.abandon).atexit = False

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
        return self._loop.call(lambda: self._client.get_run(run_id))

    def close(self) -> None:
        """End all subscriptions, even while other threads read them, and close the connections."""
        self._loop.stop()

    def __enter__(self) -> SyncRealtimeClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _subscribe(self, subscribe: Callable[[], Subscription[T]]) -> SyncSubscription[T]:
        with self._loop.lock:  # the client adds it to a set, which is not thread-safe
            return SyncSubscription(self, subscribe())


class SyncSubscription(Iterator[T], Generic[T]):
    """What the calls of `SyncRealtimeClient` return, to be iterated; see `Subscription`.

    If you stop iterating early, close the subscription with `with` or `close`. Any thread can close it, which ends the
    iteration at once.
    """

    def __init__(self, client: SyncRealtimeClient, subscription: Subscription[T]) -> None:
        self._client = client  # whose loop stops when it is garbage collected
        self._subscription = subscription

    def __repr__(self) -> str:
        return repr(self._subscription).replace("<", "<Sync", 1)

    def __next__(self) -> T:
        try:
            if not self._subscription._has_item:  # chunks that arrived together need only one switch of threads
                self._client._loop.call(self._subscription._wait_for_item)
            return self._subscription._pop()
        except (StopAsyncIteration, _ClientClosed):
            raise StopIteration from None

    def close(self) -> None:
        """Close the connection and end the iteration, in whichever thread it runs."""
        with suppress(UsageError):  # the client is closed, or belongs to the parent process
            self._client._loop.call(self._subscription.aclose)

    def __enter__(self) -> SyncSubscription[T]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _ClientClosed(UsageError):
    """A call of a closed client."""


class _Call(Generic[T]):
    """One call on the loop. The object exists before the call starts, so that an interrupt can always cancel it."""

    def __init__(self, function: Callable[[], Awaitable[T]]) -> None:
        self._function = function
        self._scope: anyio.CancelScope | None = None

    async def run(self) -> T | None:
        with anyio.CancelScope() as self._scope:
            return await self._function()
        return None  # cancelled, so the waiting thread does not read it

    def cancel(self) -> None:
        """Call on the loop, after `run` has started."""
        if self._scope is not None:
            self._scope.cancel()


class _ClientLoop:
    """The loop of a client, from its first call to `stop`, in the process that made the call."""

    def __init__(self, client: RealtimeClient) -> None:
        self._client = client
        self._thread: LoopThread | None = None
        self._pid = os.getpid()
        self.lock = threading.RLock()  # reentrant, so that a signal handler can close the client

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function on the loop. An exception that interrupts the waiting thread cancels it."""
        if self._is_forked:
            raise UsageError("this client was used before the process forked; create a new one in the child process")
        call = _Call(function)
        portal: anyio.from_thread.BlockingPortal | None = None
        try:
            with self.lock:  # `stop` waits for every call that starts here
                if self._client._closed:
                    raise _ClientClosed("this client is closed")
                if self._thread is None:
                    self._thread, self._pid = LoopThread(), os.getpid()
                portal = self._thread.portal
                future = portal.start_task_soon(call.run)
            return cast("T", future.result())
        except (
            BaseException
        ):  # of the call itself, or a signal handler raised: at any point, also while the call starts
            if portal is not None:
                with suppress(RuntimeError):  # the loop has ended
                    portal.start_task_soon(call.cancel)
            raise

    def stop(self) -> None:
        if self._is_forked:
            return
        with self.lock:
            self._client._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            try:
                thread.portal.call(self._client.aclose)
            finally:
                thread.close()

    def abandon(self) -> None:
        """Stop without waiting, in whichever thread the client was garbage collected, even the loop's own."""
        if self._thread is not None and not self._is_forked:
            threading.Thread(target=self.stop, daemon=True).start()

    @property
    def _is_forked(self) -> bool:
        return self._thread is not None and self._pid != os.getpid()


def _in_thread(function: Callable[[], str]) -> Callable[[], Awaitable[str]]:
    """Call the token function, which may block, in a daemon thread, with the context variables of the waiting thread.

    (Python waits for anyio's worker threads before it exits.)
    """

    async def call() -> str:
        result: Future[str] = Future()
        result.set_running_or_notify_cancel()  # cancelling abandons it

        def work() -> None:
            try:
                result.set_result(function())
            except Exception as exc:
                result.set_exception(exc)
            except BaseException as exc:  # would end the loop
                result.set_exception(RuntimeError(f"the token function raised {exc!r}"))

        threading.Thread(target=without_loop(copy_context()).run, args=(work,), daemon=True).start()
        token = await asyncio.wrap_future(result)
        if inspect.iscoroutine(token):
            token.close()
            raise InvalidConfiguration("access_token is an async function; use it with RealtimeClient")
        return token

    return call
