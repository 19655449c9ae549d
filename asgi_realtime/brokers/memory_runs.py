"""A run in memory, and the short path of a chunk into one of its streams.

`MemoryBroker.append_nowait` handles everything: new streams, producers, inputs, ends, trimming, a full broker. Nearly
every chunk needs none of that. An `Appender` recognizes such a chunk with a few comparisons, before it changes
anything, and does only what remains: store, count, wake. The results of the two paths are identical.
"""

from __future__ import annotations

from collections.abc import Callable

from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.memory_costs import APPEND_COST, ENTRY, NEW_STREAM_COST
from asgi_realtime.brokers.memory_space import Party, Space
from asgi_realtime.core.log import End, Log
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.loop.waiting import WakeSoon


class StoredRun:
    """A run, and what is removed with it."""

    __slots__ = (
        "appenders",
        "inputs_bytes",
        "marks",
        "party",
        "published_to",
        "record",
        "record_size",
        "streams",
        "watchers",
    )

    def __init__(self, record: StoredRecord, party: Party) -> None:
        self.record = record
        self.party = party  # it is charged for the run
        self.streams: dict[str, LiveLog] = {}
        self.appenders: dict[str, Appender] | None = None
        self.marks: dict[ChangeMark, int] = {}  # the versions that the newest commits stored
        self.published_to: tuple[str, ...] = ()  # every topic that has ever listed the run
        self.inputs_bytes = 0
        self.watchers: dict[str, tuple[int, int]] | None = None  # by process: how many, and until when that counts
        self.record_size = 0

    @property
    def size(self) -> int:
        """What its party is charged for, in bytes."""
        return self.record_size + sum(live.cost for live in self.streams.values())


_REMOVED = LiveLog(Log(), WakeSoon())
_REMOVED.log.close(End("lost"))


class Appender:
    """Appends chunks to one stream, which has chunks already. All writers of the stream share it."""

    __slots__ = ("_clock", "_live", "_party", "_space", "_stream_bytes")

    def __init__(
        self, party: Party, live: LiveLog, space: Space, *, clock: Callable[[], float], stream_bytes: int
    ) -> None:
        self._party = party
        self._live = live
        self._space = space
        self._clock = clock
        self._stream_bytes = stream_bytes

    def detach(self) -> None:
        """The run is removed. Writers are kept for longer, and must not keep its chunks."""
        self._live = _REMOVED

    def append(self, item: bytes) -> int | None:
        """Append one JSON item and return its seq; or do nothing and return None: `append_nowait` has to decide."""
        live, space = self._live, self._space
        log, most = live.log, len(item) + APPEND_COST
        if log.end is not None or live.failure is not None:
            return None
        if log.size + most > self._stream_bytes or space.size + most + NEW_STREAM_COST > space.owners_total:
            return None
        grown = log.push(item, int(self._clock() * 1000)) + ENTRY
        live.cost += grown
        self._party.size += grown
        space.size += grown
        live.wake()
        return log.next - 1
