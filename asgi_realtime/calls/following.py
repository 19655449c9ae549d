"""The calls that follow runs: the current records, then each change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Literal, overload

from asgi_realtime.calls.parts import Parts
from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import UsageError
from asgi_realtime.core.names import check_tags
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.runs.handles import BatchHandle
from asgi_realtime.streams.followers import BatchFollower, RunFollower, RunWithStreams, StreamChunk, TagFollower
from asgi_realtime.tasks.options import RunLike, run_id_of


class FollowCalls(Parts):
    """Subscriptions to a run, the runs with a tag, or a batch."""

    @overload
    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: Literal[False] = False
    ) -> AsyncIterator[RunRecord]: ...

    @overload
    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: Literal[True]
    ) -> AsyncIterator[RunRecord | StreamChunk]: ...

    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: bool = False
    ) -> AsyncIterator[RunRecord] | AsyncIterator[RunRecord | StreamChunk]:
        """The records of a run: the current one, then one for each change. A slow reader skips to the newest.

        With streams, `StreamChunk`s come in between, and the terminal record after the last chunk. Raises
        `RunNotFound`.
        """
        run_id = run_id_of(run)
        self.engine.begin()
        return (RunWithStreams if with_streams else RunFollower)(
            self.runs,
            run_id,
            stop_on_completion=stop_on_completion,
            start=self.ensure_started,
            shutdown=self._reader_shutdown(),
        )

    def subscribe_to_runs_with_tag(
        self, tags: str | Iterable[str], *, created_within: Span = "24h"
    ) -> AsyncIterator[RunRecord]:
        """The runs that have all of these tags: first the existing ones, then each change. Never ends."""
        wanted = check_tags(tags, self.limits)
        if not wanted:
            raise UsageError("tags are empty; name at least one")
        oldest_ms = self.runs.now_ms() - round(parse_span(created_within, name="created_within") * 1000)
        self.engine.begin()
        return TagFollower(
            self.runs, wanted, oldest_ms=oldest_ms, start=self.ensure_started, shutdown=self._reader_shutdown()
        )

    def subscribe_to_batch(self, batch: str | BatchHandle) -> AsyncIterator[RunRecord]:
        """The runs of a batch: the current records, then each change. Ends when all of its runs are over. Raises
        `RunNotFound`."""
        batch_id = batch if isinstance(batch, str) else batch.id
        self.engine.begin()
        return BatchFollower(
            self.runs,
            batch_id,
            closed=lambda: self.tasks.batches.closed(batch_id),
            start=self.ensure_started,
            shutdown=self._reader_shutdown(),
        )
