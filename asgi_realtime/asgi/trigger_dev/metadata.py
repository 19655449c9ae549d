"""Changing a run from outside, as a worker of the official package does: its metadata, and its tags."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorise, run_resources
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_response
from asgi_realtime.asgi.trigger_dev.credentials import once, open_run
from asgi_realtime.asgi.trigger_dev.run_requests import read_json
from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.core.errors import LimitExceeded, RunNotFound
from asgi_realtime.core.metadata import (
    Operation,
    Replace,
    apply_operations,
    check_size,
)
from asgi_realtime.core.runs import MetadataChanged, RunRecord

MAX_UPDATE_BYTES = 1024 * 1024
"""Metadata changes in one request."""

MAX_OPERATIONS = 1000
"""Metadata operations in one request; each can traverse the whole metadata."""

_OPERATION: Any = Operation


class MetadataUpdate(msgspec.Struct, rename="camel"):
    """Changes to the metadata of a run, of its parent and of its root. `metadata` replaces all metadata of the run.

    Operations stay encoded until they have been counted: checking the path of each is what takes time.
    """

    metadata: dict[str, Any] | None = None
    operations: list[msgspec.Raw] = []
    parent_operations: list[msgspec.Raw] = []
    root_operations: list[msgspec.Raw] = []

    def check_count(self, limit: int) -> None:
        """Raises `LimitExceeded`."""
        count = len(self.operations) + len(self.parent_operations) + len(self.root_operations)
        if count > limit:
            raise LimitExceeded(f"the request has {count} operations, limit {limit}; send them in several requests")

    def by_run(self, record: RunRecord) -> dict[str, list[Operation]]:
        """The operations by the id of the run they change. A run without a parent counts as its own parent, as with
        Trigger.dev. Raises `InvalidRequest`, `UsageError`."""
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
    claims = request.authenticate()
    record = await request.host.runs.get(run_id)
    authorise(claims, "read", run_resources(record))
    return json_response({"metadata": {} if "metadata" in claims.skip_columns else record.metadata})


async def update_metadata(request: Request, run_id: str) -> Response:
    """Apply operations in their order: all of them, or none if one cannot be."""
    record = await open_run(request, run_id)
    mark = _mark(request, run_id)
    limits = request.host.limits
    update = read_json(await request.body(MAX_UPDATE_BYTES), MetadataUpdate)
    update.check_count(MAX_OPERATIONS)
    changes = update.by_run(record)
    runs = await _open_runs(request, record, changes)
    for run in runs:  # all before any is changed
        check_size(apply_operations(run.metadata, changes[run.id]), limits.metadata_bytes)
    for run in runs:
        try:
            changed = await request.host.runs.update(run.id, MetadataChanged(tuple(changes[run.id])), mark=mark)
        except RunNotFound:
            if run is record:
                raise
        else:
            record = changed if run is record else record
    return json_response({"metadata": record.metadata})


async def _open_runs(request: Request, record: RunRecord, changes: dict[str, list[Operation]]) -> list[RunRecord]:
    """The runs that are to be changed, this one first. One that is over or gone is passed over."""
    others = await request.host.runs.load([run_id for run_id in changes if run_id != record.id])
    found = [other for other in others if other is not None and not other.is_completed]
    return [record, *found] if record.id in changes else found


def _mark(request: Request, run_id: str) -> ChangeMark | None:
    """The name of the changes that a request makes, so that it makes them once, however often it is sent."""
    request_is = once(request, request.authenticate(), f"metadata {run_id}")
    return None if request_is is None else ChangeMark(hashlib.sha256(request_is.claim.encode()).hexdigest()[:32], 0)
