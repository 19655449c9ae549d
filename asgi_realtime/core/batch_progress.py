"""Decides when a batch is over.

A batch is *whole* once no more runs join it: either its creator has closed it (`closed`), or its last run has been
seen, because runs are created in the order of their indexes. A whole batch is over when none of the runs seen so far is
open. A run that was never seen counts as over: it ended and expired before.

`closed` does not follow from the runs: if the last items of a batch have idempotency keys of older runs, the run with
the last index is never created.
"""

from __future__ import annotations

from collections.abc import Collection

from asgi_realtime.core.runs import StoredRecord


class BatchProgress:
    """The runs of one batch, as far as they have been seen."""

    __slots__ = ("_open", "_whole")

    def __init__(self, *, closed: bool = False) -> None:
        self._whole = closed
        self._open: set[str] = set()

    def add(self, record: StoredRecord) -> None:
        """Take the newest state of one run of the batch into account."""
        if record.batch is not None and record.batch.index == record.batch.count - 1:
            self._whole = True
        if record.is_completed:
            self._open.discard(record.id)
        else:
            self._open.add(record.id)

    def retain(self, run_ids: Collection[str]) -> None:
        """Forget the runs that no longer exist: all but these."""
        self._open.intersection_update(run_ids)

    @property
    def is_over(self) -> bool:
        return self._whole and not self._open
