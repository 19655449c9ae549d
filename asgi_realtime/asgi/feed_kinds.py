"""The kinds of run feeds: one run, the runs with some tags, and the runs of a batch.

A feed follows one topic. This module selects the runs of the topic that belong to the feed, and knows when the feed
ends. `feed_events` and the polls of the Trigger.dev dialect send them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.core.batch_progress import BatchProgress
from asgi_realtime.core.log import End
from asgi_realtime.core.runs import StoredRecord, batch_topic, run_topic, tag_topic
from asgi_realtime.core.topics import Change

FeedChange = tuple[Change, StoredRecord]
"""A change of a topic that belongs to a feed, with the record of its run."""


class Feed:
    """The runs of a feed, and its end. A kind of feeds overrides what differs."""

    run_id = ""
    """The only run of the feed, if there is one."""
    floor_ms = 0
    """Runs created before this time are not part of the feed."""
    needs_every_run = False
    """Whether the end depends on every run of the topic, also on those that a resuming client does not get."""
    end: End | None = None
    """How the feed ends once all of the noted runs are sent; None while it continues."""

    def __init__(self, topic: str) -> None:
        self.topic = topic

    def has(self, record: StoredRecord) -> bool:
        return True

    def note(self, record: StoredRecord) -> None:
        """Take a run of this feed into account for its end."""


class RunFeed(Feed):
    """One run, until it ends."""

    def __init__(self, run_id: str, end: End | None = None) -> None:
        super().__init__(run_topic(run_id))
        self.run_id = run_id
        self.end = end

    def note(self, record: StoredRecord) -> None:
        self.end = record.end


class TagFeed(Feed):
    """The runs that have all of these tags and were created after a time. It never ends."""

    def __init__(self, tags: Collection[str], *, floor_ms: int) -> None:
        super().__init__(tag_topic(min(tags)))
        self._tags = frozenset(tags)
        self.floor_ms = floor_ms

    def has(self, record: StoredRecord) -> bool:
        return record.created_at_ms >= self.floor_ms and self._tags.issubset(record.tags)


class BatchFeed(Feed):
    """The runs of a batch, until all have ended. `closed`: no more runs join it, and possibly it has none."""

    needs_every_run = True

    def __init__(self, batch_id: str, *, closed: bool = False) -> None:
        super().__init__(batch_topic(batch_id))
        self._progress = BatchProgress(closed=closed)
        self._update_end()

    def note(self, record: StoredRecord) -> None:
        self._progress.add(record)
        self._update_end()

    def _update_end(self) -> None:
        self.end = End("complete") if self._progress.is_over else None


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
