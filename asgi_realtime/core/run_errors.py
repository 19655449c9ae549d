"""The errors that carry a run record. `errors.py` shows their place in the tree and must not import runs."""

from __future__ import annotations

from asgi_realtime.core.errors import RealtimeError, StateError
from asgi_realtime.core.log import End
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.core.runs import StoredRecord


class RunEnded(RealtimeError):
    """A run ended without a result, or is over and can no longer change. `record` is its last state, if known."""

    code = "run_ended"

    def __init__(self, message: str, *, record: RunRecord | None = None) -> None:
        super().__init__(message)
        self.record = record


class RunFailed(RunEnded):
    """The run ended FAILED, CRASHED, EXPIRED or TIMED_OUT."""

    code = "run_failed"


class RunCanceled(RunEnded):
    """The run was canceled."""

    code = "run_canceled"


def end_error(end: End, record: RunRecord | None = None) -> RunEnded:
    """The error to raise for a run that ended without a result."""
    if end.reason == "canceled":
        return RunCanceled("the run was canceled", record=record)
    detail = f": {end.error}" if end.error else ""
    return RunFailed(f"the run ended {end.reason}{detail}", record=record)


class VersionConflict(StateError):
    """A compare-and-set found another version. `current` is the stored record."""

    code = "version_conflict"

    def __init__(self, message: str, *, current: StoredRecord | None = None) -> None:
        super().__init__(message)
        self.current = current
