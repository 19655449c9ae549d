"""The kinds of run feeds: one run, the runs with some tags, or the runs of a batch; and finding their runs.

A feed follows one topic. Which of the runs that this tells of belong to the feed, and when the feed is over, is said
here; how it is told to a client is the matter of `feed_events` and `shape_polls`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.core.batch_progress import BatchProgress
from asgi_realtime.core.log import End
from asgi_realtime.core.runs import RunRecord, batch_topic, run_topic, tag_topic
from asgi_realtime.core.topics import Change

Admitted = tuple[Change, RunRecord]


class Feed(Protocol):
    """Which runs a feed has, and when it is over."""

    topic: str
    run_id: str
    """The run that all of this is about, or ""."""
    floor_ms: int
    """Runs that were created before are not in it."""
    whole: bool
    """Whether every run has to be met to know the end, also those that a resuming client is not told of."""

    def has(self, record: RunRecord) -> bool: ...

    def saw(self, record: RunRecord) -> None:
        """A record of this feed was met."""

    @property
    def end(self) -> End | None:
        """How the feed ends, once all that was met is sent."""
        ...


class RunFeed:
    """One run, to its terminal state."""

    floor_ms = 0
    whole = False

    def __init__(self, run_id: str, end: End | None = None) -> None:
        self.topic = run_topic(run_id)
        self.run_id = run_id
        self.end = end

    def has(self, record: RunRecord) -> bool:
        return True

    def saw(self, record: RunRecord) -> None:
        self.end = record.end


class TagFeed:
    """The runs that have all of these tags and were created after a time. Never over."""

    run_id = ""
    whole = False
    end: End | None = None

    def __init__(self, tags: Collection[str], *, floor_ms: int) -> None:
        self.topic = tag_topic(min(tags))
        self._tags = frozenset(tags)
        self.floor_ms = floor_ms

    def has(self, record: RunRecord) -> bool:
        return record.created_at_ms >= self.floor_ms and self._tags.issubset(record.tags)

    def saw(self, record: RunRecord) -> None:
        return None


class BatchFeed:
    """The runs of a batch, until all are over. `closed`: no more runs join it, and possibly it has none."""

    run_id = ""
    floor_ms = 0
    whole = True

    def __init__(self, batch_id: str, *, closed: bool = False) -> None:
        self.topic = batch_topic(batch_id)
        self._progress = BatchProgress(closed=closed)

    def has(self, record: RunRecord) -> bool:
        return True

    def saw(self, record: RunRecord) -> None:
        self._progress.add(record)

    @property
    def end(self) -> End | None:
        return End("complete") if self._progress.is_over else None


async def admitted(feed: Feed, run_cache: RunCache, page: Sequence[Change]) -> list[Admitted]:
    """The changes that belong to the feed, with the records behind them."""
    records = await run_cache.records(page)
    found = [
        (change, record)
        for change, record in zip(page, records, strict=True)
        if record is not None and feed.has(record)
    ]
    for _, record in found:
        feed.saw(record)
    return found
