"""The kinds of run feeds: one run, the runs with some tags, and the runs of a batch.

A feed follows one topic. This module selects the runs of the topic that belong to the feed, and knows when the feed
ends. How they are sent is the matter of `feed_events` and of the polls of the Trigger.dev dialect.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.core.batch_progress import BatchProgress
from asgi_realtime.core.log import End
from asgi_realtime.core.runs import RunRecord, batch_topic, run_topic, tag_topic
from asgi_realtime.core.topics import Change

FeedChange = tuple[Change, RunRecord]
"""A change of a topic that belongs to a feed, with the record of its run."""


class Feed(Protocol):
    """The runs of a feed, and its end."""

    topic: str
    run_id: str
    """The only run of the feed, or ""."""
    floor_ms: int
    """Runs created before this time are not part of the feed."""
    needs_every_run: bool
    """Whether the end depends on every run of the topic, also on those that a resuming client does not get."""

    def has(self, record: RunRecord) -> bool: ...

    def note(self, record: RunRecord) -> None:
        """Take a run of this feed into account for its end."""

    @property
    def end(self) -> End | None:
        """How the feed ends once all of the noted runs are sent; None while it continues."""
        ...


class RunFeed:
    """One run, until it ends."""

    floor_ms = 0
    needs_every_run = False

    def __init__(self, run_id: str, end: End | None = None) -> None:
        self.topic = run_topic(run_id)
        self.run_id = run_id
        self.end = end

    def has(self, record: RunRecord) -> bool:
        return True

    def note(self, record: RunRecord) -> None:
        self.end = record.end


class TagFeed:
    """The runs that have all of these tags and were created after a time. It never ends."""

    run_id = ""
    needs_every_run = False
    end: End | None = None

    def __init__(self, tags: Collection[str], *, floor_ms: int) -> None:
        self.topic = tag_topic(min(tags))
        self._tags = frozenset(tags)
        self.floor_ms = floor_ms

    def has(self, record: RunRecord) -> bool:
        return record.created_at_ms >= self.floor_ms and self._tags.issubset(record.tags)

    def note(self, record: RunRecord) -> None:
        return None


class BatchFeed:
    """The runs of a batch, until all have ended. `closed`: no more runs join it, and possibly it has none."""

    run_id = ""
    floor_ms = 0
    needs_every_run = True

    def __init__(self, batch_id: str, *, closed: bool = False) -> None:
        self.topic = batch_topic(batch_id)
        self._progress = BatchProgress(closed=closed)

    def has(self, record: RunRecord) -> bool:
        return True

    def note(self, record: RunRecord) -> None:
        self._progress.add(record)

    @property
    def end(self) -> End | None:
        return End("complete") if self._progress.is_over else None


async def select_changes(feed: Feed, run_cache: RunCache, page: Sequence[Change]) -> list[FeedChange]:
    """The changes that belong to the feed, with their records. Notes the records in the feed."""
    records = await run_cache.records(page)
    found = [
        (change, record)
        for change, record in zip(page, records, strict=True)
        if record is not None and feed.has(record)
    ]
    for _, record in found:
        feed.note(record)
    return found
