"""Batches over HTTP: create one, fill it with items, and retrieve it.

The official client creates a batch first and then sends its items as newline-delimited JSON. No run starts before all
items have arrived and passed validation. A repeated request finds the runs that the first one created.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import anyio.lowlevel
import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorize, batch_resources
from asgi_realtime.asgi.host import Host
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_bytes_response, json_response
from asgi_realtime.asgi.trigger_dev.batch_json import batch_json
from asgi_realtime.asgi.trigger_dev.credentials import check_tags_allowed, check_task, find_parent, handle_token, once
from asgi_realtime.asgi.trigger_dev.decoding import read_json
from asgi_realtime.asgi.trigger_dev.ndjson import LineSplitter
from asgi_realtime.asgi.trigger_dev.run_requests import (
    OPTIONS_BYTES,
    RunRequest,
    max_body_bytes,
    read_options,
    read_payload,
)
from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import (
    InvalidRequest,
    LimitExceeded,
    RealtimeError,
    RunNotFound,
    ScopeDenied,
    UsageError,
    shown,
)
from asgi_realtime.core.metadata import NO_METADATA
from asgi_realtime.core.runs import StoredRecord, batch_topic
from asgi_realtime.core.scopes import parse
from asgi_realtime.runs.handles import batch_scopes
from asgi_realtime.tasks.batch_records import BatchRecord
from asgi_realtime.tasks.records import Prepared, check_idempotency_key
from asgi_realtime.tokens import Claims

_LINES_PER_ITEM = 4
"""Blank and repeated lines count too."""

_BYTES_PER_ITERATION = 64 * 1024
"""How much of a body is checked before other tasks of the event loop run."""

_MIN_ITEM_BYTES = _BYTES_PER_ITERATION // 20
"""The size as which a shorter item counts."""

_PAGE = 10
"""Records loaded at once. Each comes with its payload and output."""


class CreateBatch(msgspec.Struct, rename="camel"):
    """The body that creates a batch."""

    run_count: int
    task_identifiers: list[str] | None = None
    parent_run_id: str | None = None
    idempotency_key: str | None = None


class Item(RunRequest):
    """One line of the body that fills a batch."""

    index: int = -1
    task: str = ""


def max_create_bytes(limits: Limits) -> int:
    """The body can name a task for each run, and a key. An escaped character takes six bytes."""
    return 6 * (limits.batch_runs * limits.key_length + limits.idempotency_key_length) + OPTIONS_BYTES


async def create_batch(request: Request) -> Response:
    """Create a batch that waits for its items, or find the one of the same idempotency key."""
    _check_can_batch(request.claims)
    attempt = once(request, "batch") if request.claims.one_time else None

    body = read_json(await request.body(max_create_bytes(request.host.limits)), CreateBatch)
    _authorize_tasks(request, body.task_identifiers)
    if body.idempotency_key is not None:
        check_idempotency_key(body.idempotency_key, request.host.limits)
    await find_parent(request, body.parent_run_id)
    if request.owner:
        request.host.tasks.budgets.count_batch(request.owner)
    batch = await request.host.tasks.batches.open(
        body.run_count,
        parent_id=body.parent_run_id,
        idempotency_key=body.idempotency_key,
        owner=request.owner,
        once=attempt,
    )
    token = handle_token(request, batch_scopes(batch.id))
    created = {"id": batch.id, "runCount": batch.count, "isCached": batch.is_cached}
    return json_response(created, 202, {"x-trigger-jwt": token})


async def fill_batch(request: Request, batch_id: str) -> Response:
    """Start the runs of a batch once all items are valid. Incomplete items start nothing and leave it unsealed."""
    _check_can_batch(request.claims)
    batches = request.host.tasks.batches
    batch = await batches.waiting(batch_id)
    if batch is None:
        raise RunNotFound(f"no batch {shown(batch_id)} is waiting for items: it does not exist or has expired")
    if not request.claims.secret and request.owner != batch.owner:
        raise ScopeDenied(
            f"another owner created batch {shown(batch_id)}; fill it with a token of that owner or the secret key"
        )

    limits = request.host.limits
    items = await _read_items(await request.body(limits.batch_bytes), batch.count, limits)
    prepared = await _prepare_items(request, batch, items)
    if len(prepared) < batch.count:
        return _fill_response(batch_id, sealed=False, enqueuedCount=0, expectedCount=batch.count)
    filled = await batches.fill(batch, prepared)
    return _fill_response(batch_id, accepted=filled.accepted, deduplicated=filled.deduplicated, sealed=True)


def _fill_response(batch_id: str, *, accepted: int = 0, deduplicated: int = 0, sealed: bool, **more: int) -> Response:
    """With `sealed: false` the client sends all items again."""
    counts = {"itemsAccepted": accepted, "itemsDeduplicated": deduplicated}
    return json_response({"id": batch_id, **counts, "sealed": sealed, **more})


def _check_can_batch(claims: Claims) -> None:
    """Reject a token that cannot batch any task before reading the body, which names the tasks."""
    actions = {parse(scope).action for scope in claims.scopes}
    if not claims.secret and not actions & {"batchTrigger", "*", "admin"}:
        raise ScopeDenied("access is not granted; it needs a scope such as 'batchTrigger:tasks:chat'")


def _authorize_tasks(request: Request, task_ids: Sequence[str] | None) -> None:
    if not task_ids:
        authorize(request.claims, "batchTrigger", [("tasks", None), ("batch", None)])
    for task_id in dict.fromkeys(task_ids or ()):
        authorize(request.claims, "batchTrigger", [("tasks", task_id), ("batch", None)])
        check_task(request, task_id)


async def _read_items(body: bytes, count: int, limits: Limits) -> list[Item]:
    """The items ordered by index. A line that comes twice is one item."""
    breaks, most = body.count(b"\n"), count * _LINES_PER_ITEM
    if breaks > most:
        raise LimitExceeded(f"the body has {breaks} line breaks, limit {most} for a batch of {count} runs", status=413)
    pacer = _Pacer()
    splitter = LineSplitter(max_body_bytes(limits))
    items: dict[int, Item] = {}
    for number, line in enumerate(chain(splitter.feed(body), splitter.rest()), 1):
        item = read_json(line, Item, what=f"line {number}", max_parts=None)
        if not 0 <= item.index < count:
            raise UsageError(f"line {number} has index {item.index}; the batch has {count} runs, counted from 0")
        if items.setdefault(item.index, item) != item:
            raise UsageError(f"line {number} has index {item.index}, as an earlier line; send each item once")
        await pacer.pace(len(line))
    return [items[index] for index in sorted(items)]


async def _prepare_items(request: Request, batch: BatchRecord, items: Sequence[Item]) -> list[Prepared]:
    parent = await find_parent(request, batch.parent_id)
    pacer = _Pacer()
    prepared: list[Prepared] = []
    for item in items:
        try:
            prepared.append(await _prepare(request, parent, item, pacer))
        except RealtimeError as exc:
            exc.args = (f"item {item.index}: {exc}",)
            raise
        await pacer.pace(len(item.payload) + len(item.options))
    return prepared


async def _prepare(request: Request, parent: StoredRecord | None, item: Item, pacer: _Pacer) -> Prepared:
    if not item.task:
        raise InvalidRequest("task is missing; it must be the id of a task")
    _authorize_tasks(request, [item.task])
    tasks, limits = request.host.tasks, request.host.limits
    options = read_options(item, limits)
    payload, run_options = read_payload(item, options, limits), options.run_options()
    await pacer.pace(len(item.payload))  # both the last step and the next can decode it
    prepared = tasks.prepare_json(item.task, payload, run_options, parent=parent, owner=request.owner or None)
    check_tags_allowed(request.claims, prepared.record.tags)
    return prepared


class _Pacer:
    """Lets other tasks of the event loop run while a large batch is checked."""

    def __init__(self) -> None:
        self._bytes = 0

    async def pace(self, size: int) -> None:
        self._bytes += max(size, _MIN_ITEM_BYTES)
        if self._bytes >= _BYTES_PER_ITERATION:
            self._bytes = 0
            await anyio.lowlevel.checkpoint()


async def retrieve_batch(request: Request, batch_id: str) -> Response:
    """Respond with the status of a batch and the ids of its runs."""
    authorize(request.claims, "read", batch_resources(batch_id))
    host = request.host
    batch = await host.tasks.batches.find(batch_id)
    if batch is None:
        changes = await host.broker.changes(batch_topic(batch_id), limit=host.limits.topic_runs)
        runs = sorted(await _load_runs(host, [change.run_id for change in changes.items]), key=_index)
        if not runs:
            raise RunNotFound(f"no batch {shown(batch_id)}: it does not exist or has expired (Retention.after_end)")
    else:
        runs = await _load_runs(host, batch.plan.run_ids)
    return json_bytes_response(batch_json(batch_id, runs, batch, now_ms=round(host.clock() * 1000)))


def _index(run: StoredRecord) -> int:
    return run.batch.index if run.batch else 0


async def _load_runs(host: Host, run_ids: Sequence[str]) -> list[StoredRecord]:
    """The runs that still exist, in the given order, without what can be large. Several items can have the same run."""
    found: dict[str, StoredRecord] = {}
    ids = list(dict.fromkeys(run_ids))
    for start in range(0, len(ids), _PAGE):
        for record in await host.runs.load(ids[start : start + _PAGE]):
            if record is not None:
                found[record.id] = msgspec.structs.replace(
                    record, payload_json=None, output_json=None, metadata_json=NO_METADATA
                )
        await anyio.lowlevel.checkpoint()
    return [found[run_id] for run_id in run_ids if run_id in found]
