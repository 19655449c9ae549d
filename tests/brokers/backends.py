"""The memory broker as the conformance suite wants it, with a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.config import Limits, Retention, Timeouts
from asgi_realtime.testing.conformance import Backend


class Clock:
    """Unix seconds, moved by hand."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds

    async def advance(self, seconds: float) -> None:
        self.seconds += seconds


def held(broker: MemoryBroker) -> int:
    """Readers, followers, those who wait, and what is kept only for them."""
    streams = [live for run in broker._runs.values() for live in run.streams.values()]
    topics = list(broker._topics.values())
    return (
        sum(live.readers + len(live.waiting) + len(live._slices) for live in streams)
        + sum(topic.followers + len(topic.waiting) for topic in topics)
        + sum(live.log.next == 0 and live.end is None for live in streams)
        + sum(not len(topic.index) for topic in topics)
    )


class Memory:
    """`make_broker` for a memory broker, or for a class that says it is as good."""

    def __init__(self, factory: Callable[..., MemoryBroker] = MemoryBroker, *, guard_s: float = 10.0) -> None:
        self.factory = factory
        self.guard_s = guard_s

    def __call__(
        self, *, limits: Limits, retention: Retention, timeouts: Timeouts
    ) -> AbstractAsyncContextManager[Backend]:
        return self._opened(limits, retention, timeouts)

    @asynccontextmanager
    async def _opened(self, limits: Limits, retention: Retention, timeouts: Timeouts) -> AsyncIterator[Backend]:
        clock = Clock()
        made = self.factory(limits=limits, retention=retention, timeouts=timeouts, clock=clock)
        async with made as broker:
            yield Backend(broker=broker, peer=broker, now=clock, advance=clock.advance, held=lambda: held(broker))
