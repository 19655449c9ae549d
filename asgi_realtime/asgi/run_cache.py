"""Runs as they are sent to feeds: loaded once for each version, encoded once, shared by all who are told of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from asgi_realtime.asgi.host import Runs
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.core.topics import Change

MAX_BYTES = 64 * 1024 * 1024
"""Of all rows that are kept: a record's payload and output may be of many megabytes."""

MAX_ROWS = 10_000

_ROW_BYTES = 2048


_MAX_FORMS = 4
"""Of one row: each feed has its own form, and so has each choice of columns to leave out."""


class EncodeRow(Protocol):
    """A way to encode a run, such as `core.run_json.run_json`."""

    def __call__(self, record: RunRecord, *, skip: Collection[str]) -> bytes: ...


class _Row:
    __slots__ = ("forms", "record", "size")

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.forms: dict[tuple[EncodeRow, tuple[str, ...]], bytes] = {}
        self.size = _ROW_BYTES + len(record.payload_json or b"") + len(record.output_json or b"")


class RunCache:
    """The newest rows by run, at most `max_rows` of them and at most `MAX_BYTES`, roughly; the least used go first."""

    def __init__(self, runs: Runs, *, max_rows: int = MAX_ROWS) -> None:
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

    def encoded(self, record: RunRecord, encode: EncodeRow, skip: tuple[str, ...] = ()) -> bytes:
        """The record as `encode` writes it, without the columns of `skip`."""
        row = self._rows.get(record.id)
        if row is None or row.record.version != record.version:
            return encode(record, skip=skip)
        form = row.forms.get((encode, skip))
        if form is None:
            form = encode(record, skip=skip)
            if len(row.forms) < _MAX_FORMS:
                row.forms[encode, skip] = form
                row.size += len(form)
                self._size += len(form)
                self._fit()
        return form

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
        self._fit()

    def _fit(self) -> None:
        while len(self._rows) > self._max_rows or (self._size > MAX_BYTES and len(self._rows) > 1):
            self._drop(next(iter(self._rows)))

    def _drop(self, run_id: str) -> None:
        row = self._rows.pop(run_id, None)
        if row is not None:
            self._size -= row.size


def _is_newer(record: RunRecord, other: RunRecord) -> bool:
    """A higher version alone says nothing where the broker has lost some."""
    return record.version >= other.version and record.updated_at_ms >= other.updated_at_ms
