"""Runs as they are sent to feeds: loaded once for each version, encoded once, shared by all who are told of it."""

from __future__ import annotations

from collections.abc import Sequence

from asgi_realtime.asgi.host import Runs
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.core.topics import Change

MAX_BYTES = 64 * 1024 * 1024
"""Of all rows that are kept: a record's payload and output may be of many megabytes."""

_ROW_BYTES = 2048


class _Row:
    __slots__ = ("json", "record", "size")

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.json: bytes | None = None
        stored = len(record.payload_json or b"") + len(record.output_json or b"")
        self.size = 2 * stored + _ROW_BYTES


class RowCache:
    """The newest rows by run, at most `max_rows` of them and at most `MAX_BYTES`, roughly; the least used go first."""

    def __init__(self, runs: Runs, *, max_rows: int) -> None:
        self._runs = runs
        self._max_rows = max_rows
        self._rows: dict[str, _Row] = {}  # in the order of use
        self._size = 0

    async def records(self, changes: Sequence[Change]) -> list[RunRecord | None]:
        """The records behind changes, each at least as new as its change; None for a run that is gone."""
        found = [self._known(change) for change in changes]
        missing = [place for place, record in enumerate(found) if record is None]
        if missing:
            loaded = await self._runs.load([changes[place].run_id for place in missing])
            for place, record in zip(missing, loaded, strict=True):
                if record is not None:
                    self._keep(_Row(record))
                found[place] = record
        return found

    def json(self, record: RunRecord) -> bytes:
        """The record as JSON, with nothing left out."""
        row = self._rows.get(record.id)
        if row is None or row.record.version != record.version:
            return run_json(record)
        if row.json is None:
            row.json = run_json(record)
        return row.json

    def _known(self, change: Change) -> RunRecord | None:
        row = self._rows.get(change.run_id)
        if row is None or row.record.version != change.version:
            return None  # a row of a later version may be of one that the broker has lost
        self._rows[change.run_id] = self._rows.pop(change.run_id)
        return row.record

    def _keep(self, row: _Row) -> None:
        run_id = row.record.id
        known = self._rows.get(run_id)
        if known is not None and _is_newer(known.record, row.record):
            return  # somebody else loaded it meanwhile
        self._drop(run_id)
        self._rows[run_id] = row
        self._size += row.size
        while len(self._rows) > self._max_rows or (self._size > MAX_BYTES and len(self._rows) > 1):
            self._drop(next(iter(self._rows)))

    def _drop(self, run_id: str) -> None:
        row = self._rows.pop(run_id, None)
        if row is not None:
            self._size -= row.size


def _is_newer(record: RunRecord, other: RunRecord) -> bool:
    """A higher version alone says nothing where the broker has lost some."""
    return record.version >= other.version and record.updated_at_ms >= other.updated_at_ms
