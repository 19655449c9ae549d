"""The runs that this process executes, as it knows them: a broker may lose what it has acknowledged.

Who executes a run knows every version of it that he has stored, and his writers know what of their chunks was
acknowledged. What the broker has is held against that here, and nowhere else: whether it is the same, whether something
of ours was lost and is to be stored again, or whether the run is over, gone for good, or executed by another by now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from asgi_realtime.core.errors import RealtimeError, StreamLost
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.runs import RunRecord

_LOOKED_AT = 4
"""Quiet writers that are looked at whenever another keeps something."""


class Writer(Protocol):
    """A writer of this process, as the owner of its run sees it."""

    key: StreamKey
    producer: str
    chunks: int
    failure: RealtimeError | None

    async def restore(self) -> None:
        """Write again what the broker has lost, or set `failure`. Raises `BrokerUnavailable`."""

    def release(self, now_s: float) -> bool:
        """Let go of what was kept long enough by this monotonic time; whether that is everything."""


class _Owned:
    __slots__ = ("record", "since", "writers")

    def __init__(self, record: RunRecord, since: float) -> None:
        self.record = record
        self.since = since
        self.writers: dict[Writer, None] = {}


class OwnedRuns:
    """All runs that execute here. `lossy`: the broker may lose something. `clock` gives unix seconds.

    A run that has not been renewed for `after_end_s` may have been ended and removed by others meanwhile.
    """

    def __init__(self, *, lossy: bool, clock: Callable[[], float], after_end_s: float) -> None:
        self._lossy = lossy
        self._clock = clock
        self._after_end_s = after_end_s
        self._runs: dict[str, _Owned] = {}
        self._keeping: dict[Writer, None] = {}  # those that wrote longest ago first
        self._renewed_at = clock()

    def own(self, record: RunRecord) -> None:
        """This process begins to execute the run."""
        self._runs[record.id] = _Owned(record, self._clock())

    def disown(self, run_id: str) -> None:
        """The execution is over."""
        self._runs.pop(run_id, None)

    def stored(self, record: RunRecord) -> None:
        """A newer version was stored."""
        owned = self._runs.get(record.id)
        if owned is not None:
            owned.record = record

    def record(self, run_id: str) -> RunRecord | None:
        """The version of a run of ours that this process stored last."""
        owned = self._runs.get(run_id)
        return None if owned is None else owned.record

    def renewed(self) -> None:
        """The leases were renewed. From any thread."""
        self._renewed_at = self._clock()

    # What the broker has, against what is known here

    def taken(self, record: RunRecord) -> bool:
        """Whether another process executes a run that began here. Nothing that comes of it here counts then."""
        owned = self._runs.get(record.id)
        return owned is not None and record.owner is not None and record.owner != owned.record.owner

    def restore_candidate(self, run_id: str, stored: RunRecord | None) -> RunRecord | None:
        """What the run is: the record that is stored, or the one that is to be stored in its place.

        The same object if nothing was lost; None if the run is gone for good. What others did after a loss stays: its
        end above all, tags, and that it is to be canceled.
        """
        owned = self._runs.get(run_id)
        if owned is None or not self._lossy or owned.record.is_completed:
            return stored
        known = owned.record
        if stored is None:
            seen_at = max(owned.since, self._renewed_at)
            return known if self._clock() - seen_at < self._after_end_s else None
        if stored.is_completed or self.taken(stored):
            return stored
        if not stored.is_queued and stored.version >= known.version:
            return stored
        return msgspec.structs.replace(
            known,
            version=stored.version,
            tags=tuple(dict.fromkeys((*known.tags, *stored.tags))),
            cancel_requested_at_ms=known.cancel_requested_at_ms or stored.cancel_requested_at_ms,
        )

    # Writers

    def writes(self, writer: Writer) -> None:
        """A writer of this process writes to a stream of a run."""
        owned = self._runs.get(writer.key.run)
        if owned is not None:
            owned.writers[writer] = None

    def keeps(self, writer: Writer) -> None:
        """A writer has kept something that was acknowledged. Those that are quiet let go of what they kept."""
        now = time.monotonic()
        self._keeping.pop(writer, None)
        self._keeping[writer] = None
        for quiet in [writer for writer, _ in zip(self._keeping, range(_LOOKED_AT), strict=False)]:
            if not quiet.release(now):
                break
            del self._keeping[quiet]

    def writers(self, run_id: str) -> list[Writer]:
        """Those that write to the streams of a run of ours."""
        owned = self._runs.get(run_id)
        return [] if owned is None else list(owned.writers)

    def floors(self, record: RunRecord) -> Mapping[tuple[str, str], int]:
        """By stream and producer, what a run that ends must have of what was acknowledged to our writers.

        Raises `StreamLost` if the run would be a success and one of its streams was lost.
        """
        writers = self.writers(record.id) if self._lossy and record.is_completed else []
        for writer in writers:
            if isinstance(writer.failure, StreamLost) and record.is_success:
                raise writer.failure
        return {(writer.key.name, writer.producer): writer.chunks for writer in writers if writer.failure is None}
