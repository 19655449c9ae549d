"""The metadata of a run over HTTP, as workers of the official package read and update it."""

from __future__ import annotations

import hashlib
from typing import Any

import anyio.lowlevel
import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorize, run_resources
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_response
from asgi_realtime.asgi.trigger_dev.credentials import find_open_run, once
from asgi_realtime.asgi.trigger_dev.decoding import read_json
from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.core.errors import LimitExceeded, RunNotFound
from asgi_realtime.core.metadata import NO_METADATA, Operation, Replace, apply_operations, check_size, encode_metadata
from asgi_realtime.core.run_changes import MetadataChanged
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.tasks.launch import Once

MAX_UPDATE_BYTES = 1024 * 1024
"""Limit of the body that updates metadata."""

MAX_OPERATIONS = 1000
"""Limit of operations in one request."""

_OPERATION: Any = Operation  # mypy does not accept a union as a `type`


class MetadataUpdate(msgspec.Struct, rename="camel"):
    """Changes to the metadata of a run, of its parent and of its root. `metadata` replaces all metadata of the run.

    Operations stay encoded until they have been counted: checking the path of each is what takes time.
    """

    metadata: dict[str, Any] | None = None
    operations: list[msgspec.Raw] = []
    parent_operations: list[msgspec.Raw] = []
    root_operations: list[msgspec.Raw] = []

    def by_run(self, record: StoredRecord) -> dict[str, list[Operation]]:
        """The operations by the id of the run they change. A run without a parent counts as its own parent, as with
        Trigger.dev. Raises `InvalidRequest`, `UsageError`, `LimitExceeded`."""
        count, most = len(self.operations) + len(self.parent_operations) + len(self.root_operations), MAX_OPERATIONS
        if count > most:
            raise LimitExceeded(f"the request has {count} operations, limit {most}; send them in several requests")
        changes: dict[str, list[Operation]] = {}
        if self.metadata is not None:
            changes[record.id] = [Replace(self.metadata)]
        for run_id, name, operations in (
            (record.id, "operations", self.operations),
            (record.parent_id or record.id, "parentOperations", self.parent_operations),
            (record.root_id or record.id, "rootOperations", self.root_operations),
        ):
            for place, operation in enumerate(operations):
                decoded: Operation = read_json(bytes(operation), _OPERATION, what=f"{name}[{place}]")
                changes.setdefault(run_id, []).append(decoded)
        return changes


async def retrieve_metadata(request: Request, run_id: str) -> Response:
    """Respond with the metadata of a run, or with none if the token hides it."""
    record = await request.host.runs.get(run_id)
    authorize(request.claims, "read", run_resources(record))
    return json_response(
        {"metadata": NO_METADATA if "metadata" in request.claims.skip_columns else record.metadata_json}
    )


async def update_metadata(request: Request, run_id: str) -> Response:
    """Apply all operations in order, or none if one of them fails."""
    record = await find_open_run(request, run_id)
    mark = _mark(once(request, f"metadata {run_id}"))
    update = read_json(await request.body(MAX_UPDATE_BYTES), MetadataUpdate)
    changes = update.by_run(record)
    runs = await _open_runs(request, record, changes)
    for run in runs:  # check all runs before changing the first
        changed_metadata = encode_metadata(apply_operations(run.metadata, changes[run.id]))
        check_size(changed_metadata, request.host.limits.metadata_bytes)
    for run in runs:
        await anyio.lowlevel.checkpoint()  # storing applies the operations once more
        try:
            changed = await request.host.runs.update(run.id, MetadataChanged(tuple(changes[run.id])), mark=mark)
        except RunNotFound:
            if run is record:
                raise
        else:
            record = changed if run is record else record
    return json_response({"metadata": record.metadata_json})


async def _open_runs(request: Request, record: StoredRecord, changes: dict[str, list[Operation]]) -> list[StoredRecord]:
    """The runs to change, this run first. A parent or root that is over or expired is skipped."""
    others = await request.host.runs.load([run_id for run_id in changes if run_id != record.id])
    found = [other for other in others if other is not None and not other.is_completed]
    return [record, *found] if record.id in changes else found


def _mark(attempt: Once | None) -> ChangeMark | None:
    """The mark by which the broker recognizes the changes of a repeated request."""
    return None if attempt is None else ChangeMark(hashlib.sha256(attempt.claim.encode()).hexdigest()[:32], 0)
