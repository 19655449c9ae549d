"""Batches over HTTP, as `tasks.batchTrigger` and `batch.retrieve` of the official clients ask for them.

A batch is created, then its items come as lines of JSON. Nothing is started before all have come and are checked; what
is sent again finds the runs that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import anyio.lowlevel
import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorise, batch_resources
from asgi_realtime.asgi.host import Host
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_bytes_response, json_response
from asgi_realtime.asgi.trigger_dev.batch_json import BatchRun, batch_json
from asgi_realtime.asgi.trigger_dev.credentials import check_task, find_parent, handle_token, once
from asgi_realtime.asgi.trigger_dev.ndjson import LineSplitter
from asgi_realtime.asgi.trigger_dev.run_requests import (
    OPTIONS_BYTES,
    RunRequest,
    max_body_bytes,
    read_json,
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
from asgi_realtime.core.runs import RunRecord, batch_topic
from asgi_realtime.core.scopes import parse
from asgi_realtime.runs.handles import batch_scopes
from asgi_realtime.tasks.batch_records import BatchRecord
from asgi_realtime.tasks.records import Prepared, check_idempotency_key
from asgi_realtime.tokens import Claims

_LINES_PER_ITEM = 4  # blank ones too, and those that come twice
_TURN = 20  # items that are checked before others have a turn
_TURN_BYTES = 64 * 1024
_PAGE = 10  # records that are loaded at once


class CreateBatch(msgspec.Struct, rename="camel"):
    """The body that creates a batch."""

    run_count: int
    task_identifiers: list[str] | None = None
    parent_run_id: str | None = None
    idempotency_key: str | None = None


class Item(RunRequest):
    """A line of the body that fills a batch."""

    index: int = -1
    task: str = ""


def max_create_bytes(limits: Limits) -> int:
    """The body that creates a batch may name a task for each run, each character in six bytes, and its key."""
    return 6 * (limits.batch_runs * limits.key_length + limits.idempotency_key_length) + OPTIONS_BYTES


async def create_batch(request: Request) -> Response:
    claims = request.authenticate()
    _check_may_batch(claims)
    request_is = once(request, claims, "batch") if claims.one_time else None

    body = read_json(await request.body(max_create_bytes(request.host.limits)), CreateBatch)
    _authorise_tasks(request, claims, body.task_identifiers)
    if body.idempotency_key is not None:
        check_idempotency_key(body.idempotency_key, request.host.limits)
    await find_parent(request, claims, body.parent_run_id)
    batch = await request.host.tasks.batches.open(
        body.run_count,
        parent_id=body.parent_run_id,
        idempotency_key=body.idempotency_key,
        owner=claims.token_id,
        once=request_is,
    )
    told = {"id": batch.id, "runCount": batch.count, "isCached": batch.is_cached}
    headers = {"x-trigger-jwt": handle_token(request.host, claims, batch_scopes(batch.id))}
    return json_response(told, 202, headers)


async def fill_batch(request: Request, batch_id: str) -> Response:
    claims = request.authenticate()
    _check_may_batch(claims)
    batches = request.host.tasks.batches
    batch = await batches.waiting(batch_id)
    if batch is None:
        raise RunNotFound(f"no batch {shown(batch_id)} waits for items: it never was, or it waited too long")
    if not claims.secret and claims.token_id != batch.owner:
        raise ScopeDenied(f"batch {shown(batch_id)} was created by another token; that fills it, or the secret key")

    limits = request.host.limits
    lines = await _items(await request.body(limits.batch_bytes), batch.count, limits)
    items = await _prepared(request, claims, batch, lines)
    if len(items) < batch.count:
        missing = {"enqueuedCount": 0, "expectedCount": batch.count}
        return json_response({"id": batch_id, "itemsAccepted": 0, "itemsDeduplicated": 0, "sealed": False} | missing)
    sealed = await batches.fill(batch, items)
    told = {"id": batch_id, "itemsAccepted": sealed.accepted, "itemsDeduplicated": sealed.deduplicated}
    return json_response(told | {"sealed": True})


def _check_may_batch(claims: Claims) -> None:
    """Refuse at once who may batch nothing. Which tasks are meant stands in the body."""
    actions = {parse(scope).action for scope in claims.scopes}
    if not claims.secret and not actions & {"batchTrigger", "*", "admin"}:
        raise ScopeDenied(
            "the token's scopes do not admit this; a token with a scope like 'batchTrigger:tasks:chat' does"
        )


def _authorise_tasks(request: Request, claims: Claims, task_ids: Sequence[str] | None) -> None:
    if not task_ids:
        authorise(claims, "batchTrigger", [("tasks", None), ("batch", None)])
    for task_id in dict.fromkeys(task_ids or ()):
        authorise(claims, "batchTrigger", [("tasks", task_id), ("batch", None)])
        check_task(request, claims, task_id)


async def _items(body: bytes, count: int, limits: Limits) -> list[Item]:
    """The items in the order of their indexes. One that comes twice is one item."""
    breaks, most = body.count(b"\n"), count * _LINES_PER_ITEM
    if breaks > most:
        raise LimitExceeded(f"the body has {breaks} line breaks, limit {most} for a batch of {count} runs", status=413)
    turns = _Turns()
    splitter = LineSplitter(max_body_bytes(limits))
    found: dict[int, Item] = {}
    for number, line in enumerate(chain(splitter.feed(body), splitter.rest()), 1):
        item = read_json(line, Item, what=f"line {number}")
        if not 0 <= item.index < count:
            raise UsageError(f"line {number} has the index {item.index}; the batch has {count} runs, from 0")
        if found.setdefault(item.index, item) != item:
            raise UsageError(f"line {number} has the index {item.index}, as another line before it")
        await turns.after(len(line))
    return [found[index] for index in sorted(found)]


async def _prepared(request: Request, claims: Claims, batch: BatchRecord, items: Sequence[Item]) -> list[Prepared]:
    parent = await find_parent(request, claims, batch.parent_id)
    turns = _Turns()
    prepared: list[Prepared] = []
    for item in items:
        try:
            prepared.append(_prepare(request, claims, parent, item))
        except RealtimeError as exc:
            exc.args = (f"item {item.index}: {exc}",)
            raise
        await turns.after(len(item.payload) + len(item.options))
    return prepared


def _prepare(request: Request, claims: Claims, parent: RunRecord | None, item: Item) -> Prepared:
    if not item.task:
        raise InvalidRequest("task is missing; it must be the id of a task")
    _authorise_tasks(request, claims, [item.task])
    token_id = None if claims.secret else claims.token_id
    limits = request.host.limits
    options = read_options(item, limits)
    payload, run_options = read_payload(item, options, limits), options.run_options()
    return request.host.tasks.prepare_json(item.task, payload, run_options, parent=parent, token_id=token_id)


class _Turns:
    """Gives others a turn after some items or some bytes."""

    def __init__(self) -> None:
        self._items = 0
        self._bytes = 0

    async def after(self, size: int) -> None:
        self._items += 1
        self._bytes += size
        if self._items >= _TURN or self._bytes >= _TURN_BYTES:
            self._items = self._bytes = 0
            await anyio.lowlevel.checkpoint()


# Retrieve


async def retrieve_batch(request: Request, batch_id: str) -> Response:
    claims = request.authenticate()
    authorise(claims, "read", batch_resources(batch_id))
    host = request.host
    known = await host.tasks.batches.records.find(batch_id)
    if known is None:
        changes = await host.broker.changes(batch_topic(batch_id), limit=host.limits.topic_runs)
        found = await _load_runs(host, [change.run_id for change in changes.items])
        if not found:
            raise RunNotFound(f"no batch {shown(batch_id)}: it never was, or it is past its retention")
        return json_bytes_response(batch_json(batch_id, sorted(found.values(), key=lambda run: run.index)))
    run_ids = known.plan.run_ids
    found = await _load_runs(host, list(dict.fromkeys(run_ids)))
    last_id = known.last_id
    whole = known.is_sealed or last_id is None or last_id in found
    return json_bytes_response(
        batch_json(
            batch_id,
            [found[run_id] for run_id in run_ids if run_id in found],
            count=known.count,
            created_at_ms=known.created_at_ms,
            idempotency_key=known.idempotency_key,
            waits=not whole and not known.is_closed(round(host.clock() * 1000)),
            whole=whole,
        )
    )


async def _load_runs(host: Host, run_ids: Sequence[str]) -> dict[str, BatchRun]:
    """Those that are there. Few at once, since each comes with its payload and its output."""
    found: dict[str, BatchRun] = {}
    for start in range(0, len(run_ids), _PAGE):
        records = await host.runs.load(run_ids[start : start + _PAGE])
        found |= {record.id: BatchRun.of(record) for record in records if record is not None}
        await anyio.lowlevel.checkpoint()
    return found
