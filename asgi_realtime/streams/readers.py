"""Reading streams from the host's own code.

Every reader pulls, a buffer at a time, and holds nothing of the broker between two `anext` calls. You can drop an
iterator at any point.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from asgi_realtime.brokers.base import Broker, Entry, StreamKey
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.errors import BrokerUnavailable, StreamGap, StreamNotFound
from asgi_realtime.core.log import End
from asgi_realtime.core.run_errors import end_error
from asgi_realtime.loop.waiting import WaitList, at_most, wait_for_any
from asgi_realtime.runs.store import RunStore

T = TypeVar("T")


class ReaderShutdown(Protocol):
    """The shutdown of a `Realtime`, as its readers see it."""

    waiting: WaitList
    """Woken whenever `check_reader` can begin to raise."""

    def check_reader(self, run_id: str) -> None:
        """Raises `ServerShutdown` if a reader of this run, or of several runs (""), must not wait."""


class BufferedIterator(AsyncIterator[T], Generic[T]):
    """An async iterator that fills a buffer whenever it is empty. `start`, if given, is awaited before each fill.

    With `shutdown`, a wait raises `ServerShutdown` once a shutdown has begun, unless that waits for the run, `run_id`.
    Readers inside of a run have none: they end with it.

    While the broker is unavailable, `anext` retries like a writer, then raises `BrokerUnavailable`. The iterator stays
    usable after that.
    """

    def __init__(
        self,
        runs: RunStore,
        *,
        run_id: str = "",
        start: Callable[[], Awaitable[None]] | None = None,
        shutdown: ReaderShutdown | None = None,
    ) -> None:
        self._ready: deque[T] = deque()
        self._runs = runs
        self._run_id = run_id
        self._start = start
        self._shutdown = shutdown

    async def __anext__(self) -> T:
        while not self._ready:
            if self._start is not None:
                await self._start()
            await self._runs.retry(self._fill)
        return self._ready.popleft()

    def _add_shutdown(self, add: Callable[[WaitList], None]) -> None:
        """Let a shutdown wake a follower, too."""
        if self._shutdown is not None:
            add(self._shutdown.waiting)

    def _check_shutdown(self) -> None:
        """Called right before each wait."""
        if self._shutdown is not None:
            self._shutdown.check_reader(self._run_id)

    @abstractmethod
    async def _fill(self) -> None:
        """Append the next items to `_ready`, without an `await` after the cursor moves: cancellation loses nothing.

        Raises `StopAsyncIteration` at the end, or the error that the iteration ends with.
        """


class StreamCursor:
    """A position in one stream: `after` is the seq of the last entry that was read, -1 for none."""

    __slots__ = ("after", "key")

    def __init__(self, key: StreamKey, after: int = -1) -> None:
        self.key = key
        self.after = after

    async def entries(self, broker: Broker, live: LiveLog) -> list[Entry]:
        """The entries after the cursor, which the caller moves. Suspends only to fetch what this process does not hold.

        Raises `StreamGap` if entries were trimmed, once: the cursor moves to the retained ones. Raises the failure of
        the log unless it has ended; an ended log is complete.
        """
        if live.failure is not None and live.end is None:
            raise live.failure
        if live.gap(self.after) is None:
            return live.entries(self.after)
        page = await broker.read(self.key, after=self.after)
        expected = self.after + 1
        if page.first > expected:
            self.after = page.first - 1
            raise StreamGap(
                f"chunk {expected} of stream {self.key.name!r} was trimmed; the oldest retained chunk is {page.first}",
                requested=expected,
                first=page.first,
            )
        if not page.entries:
            raise BrokerUnavailable(f"chunks after {self.after} of stream {self.key.name!r} disappeared; retry")
        return page.entries

    def at_end_of(self, live: LiveLog) -> bool:
        """Whether every entry of the log has been read."""
        return self.after + 1 >= live.log.next


class StreamReader(BufferedIterator[Entry]):
    """The entries of one stream after a cursor. `end` is set once all are read and the stream has ended.

    Raises `StreamGap` if entries were trimmed, and then continues with the oldest retained one; `TimeoutError` after
    `timeout_s` without an entry; `RunNotFound`; `StreamNotFound` if the run completed with other streams only.
    """

    def __init__(
        self,
        runs: RunStore,
        key: StreamKey,
        *,
        after: int = -1,
        timeout_s: float | None = None,
        start: Callable[[], Awaitable[None]] | None = None,
        shutdown: ReaderShutdown | None = None,
    ) -> None:
        super().__init__(runs, run_id=key.run, start=start, shutdown=shutdown)
        self.end: End | None = None
        self.key = key
        self._cursor = StreamCursor(key, after)
        self._timeout_s = timeout_s

    async def _fill(self) -> None:
        if self.end is not None:
            raise StopAsyncIteration
        cursor = self._cursor
        await self._runs.wait_created(cursor.key.run)
        async with self._runs.broker.live(cursor.key) as live:
            while not (entries := await cursor.entries(self._runs.broker, live)):
                if live.end is not None:
                    if live.end.reason == "complete" and not live.log.next:
                        await self._check_name()
                    self.end = live.end
                    raise StopAsyncIteration
                self._check_shutdown()
                with at_most(self._timeout_s, self._describe_timeout):
                    await self._wait(live.waiting)
            cursor.after = entries[-1].seq
            self._ready.extend(entries)
            if cursor.at_end_of(live):
                self.end = live.end  # the run can expire before the next call

    def _describe_timeout(self) -> str:
        key = self.key
        return f"no chunk arrived in stream {key.name!r} of run {key.run!r} within {self._timeout_s:g} s"

    async def _wait(self, waiting: WaitList) -> None:
        if self._shutdown is None:
            await waiting.wait()
        else:
            await wait_for_any(waiting, self._shutdown.waiting)

    async def _check_name(self) -> None:
        """A run without any stream is not an error: a writer that wrote nothing adds none."""
        key = self._cursor.key
        (record,) = await self._runs.broker.load([key.run])
        if record is not None and record.streams and not key.hidden and key.name not in record.streams:
            streams = ", ".join(map(repr, record.streams))
            raise StreamNotFound(f"run {key.run!r} completed without a stream {key.name!r}; it has {streams}")


class ChunkReader(AsyncIterator[T], Generic[T]):
    """The decoded chunks of a stream. Ends if the run completed; otherwise raises how it ended."""

    def __init__(self, entries: StreamReader, decode_chunk: Callable[[bytes], T]) -> None:
        self._entries = entries
        self._decode_chunk = decode_chunk

    async def __anext__(self) -> T:
        try:
            entry = await self._entries.__anext__()
        except StopAsyncIteration:
            end = self._entries.end
            if end is not None and end.reason != "complete":
                raise end_error(end) from None
            raise
        return self._decode_chunk(entry.data)
