"""Batches: runs that are triggered and followed together.

All items are checked before the first run is created, and runs are created in the order of their items. The id of a run
follows from the id of its batch and its index, so creating a batch again finds the runs that exist. In process a batch
is one call. Over HTTP a batch is created first and its items come in a second request; both can be repeated. What has
to be remembered for that is in `batch_records`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import anyio.lowlevel
import msgspec

from asgi_realtime.core.config import Retention
from asgi_realtime.core.errors import LimitExceeded, RealtimeError, RunNotFound, UsageError
from asgi_realtime.core.runs import BatchMember, StoredRecord, owned
from asgi_realtime.engine.engine import Engine
from asgi_realtime.loop.logger import logger
from asgi_realtime.tasks.batch_records import BatchRecord, Plan, Stage, run_id_in
from asgi_realtime.tasks.budgets import Budgets
from asgi_realtime.tasks.launch import Created, Launcher, Once
from asgi_realtime.tasks.options import RunOptions
from asgi_realtime.tasks.records import Prepared
from asgi_realtime.tasks.task import TaskLike

BatchItem = tuple[TaskLike, Any] | tuple[TaskLike, Any, Mapping[str, Any]]
"""`(task, payload)` or `(task, payload, options)`; the options are those of `RunOptions`."""

_RUNS_PER_ITERATION = 20
"""Items that are processed before other tasks of the event loop get a chance to run."""


class TriggeredBatch(NamedTuple):
    """A batch that was triggered in process."""

    id: str
    run_ids: list[str]
    """The run of each item."""
    earlier_run_ids: list[str]
    """Those that are not runs of the batch: an idempotency key named them."""


@dataclass(frozen=True, slots=True)
class OpenedBatch:
    """A batch that was created over HTTP, or found by its idempotency key."""

    id: str
    count: int
    is_cached: bool
    """It was created before and has all its runs."""


class FilledBatch(NamedTuple):
    """How many items of a batch created a run in this request, and how many refer to a run that existed."""

    accepted: int
    deduplicated: int


class Batches:
    """Creates batches of runs."""

    def __init__(self, engine: Engine, launcher: Launcher, budgets: Budgets, *, retention: Retention) -> None:
        self._engine = engine
        self._runs = engine.runs
        self._launcher = launcher
        self._budgets = budgets
        self._retention = retention

    def check_count(self, count: int) -> None:
        """Raises `UsageError`, `LimitExceeded`."""
        if count < 1:
            raise UsageError("a batch is empty; it needs at least one run")
        limit = self._engine.limits.batch_runs
        if count > limit:
            raise LimitExceeded(f"a batch has {count} runs, limit {limit}")

    async def find(self, batch_id: str) -> BatchRecord | None:
        """The latest stage of a batch; None if its runs are all that is stored."""
        for stage in reversed(Stage):
            stored = await self._runs.claimed(stage.claim(batch_id))
            if stored is not None:
                return BatchRecord.decode(stored)
        return None

    async def store(self, stage: Stage, batch: BatchRecord) -> BatchRecord:
        """Store a stage; return the record that this or another process stored first."""
        ttl_s = max(self._retention.idempotency_key, self._retention.batch)
        value = msgspec.json.encode(batch).decode()
        return BatchRecord.decode(
            await self._runs.claim(stage.claim(batch.id), value, ttl_s=ttl_s, owner=batch.owner or None)
        )

    async def closed(self, batch_id: str) -> bool | None:
        """Whether the batch gets no more runs; None if its runs are all that is stored."""
        batch = await self.find(batch_id)
        return None if batch is None else batch.is_closed(self._runs.now_ms())

    # In process

    async def trigger(self, items: Sequence[Prepared]) -> TriggeredBatch:
        """Create a batch. If creating a run fails, the runs before it are canceled, so that the batch is over."""
        _check_no_threads(items)
        batch_id = new_batch_id()
        plan = await self._plan(batch_id, items)
        members = _members(batch_id, items, plan)
        batch = BatchRecord(batch_id, len(items), self._runs.now_ms(), planned=plan, is_sealed=True)

        async def launch() -> None:
            await self._launch_or_cancel(members)
            if len(members) < len(items):  # so the members alone do not show which items the batch has
                await self.store(Stage.SEALED, batch)

        await self._engine.begin().shielded(launch)
        earlier = sorted(set(plan.run_ids) - {member.id for member in members})
        return TriggeredBatch(batch_id, plan.run_ids, earlier)

    async def _launch_or_cancel(self, members: Sequence[StoredRecord]) -> None:
        for index, member in enumerate(members):
            try:
                await self._launcher.create(member)
            except Exception:
                for launched in members[:index]:
                    try:
                        await self._engine.executions.cancel(launched.id)
                    except RealtimeError as exc:
                        logger.warning("run %s of a failed batch could not be canceled: %s", launched.id, exc)
                raise

    # Over HTTP

    async def open(
        self, count: int, *, parent_id: str | None, idempotency_key: str | None, owner: str, once: Once | None
    ) -> OpenedBatch:
        """Create a batch to be filled with items later, or find the batch that was created with this key.

        `owner` is the owner of the public token, or "" for the secret key, and the same key of another owner is a
        different key: otherwise guessing a key would reveal the batch. Raises `UsageError`, `LimitExceeded`,
        `TokenSpent`.
        """
        self.check_count(count)
        batch_id = new_batch_id()
        if idempotency_key is not None:
            key = f"batch-key:{owned(owner, idempotency_key)}"
            batch_id = await self._runs.claim(key, batch_id, ttl_s=self._retention.idempotency_key, owner=owner or None)
            found = await self.find(batch_id)
            if found is not None and found.is_sealed:
                return OpenedBatch(batch_id, found.count, is_cached=True)
            _check_count_is_same(batch_id, count, found)
        if once is not None:
            spent = await self._launcher.spend(once, batch_id)
            spent.check_not_late()
            batch_id = spent.id
        now_ms = self._runs.now_ms()
        batch = BatchRecord(
            batch_id,
            count,
            now_ms,
            waits_until_ms=now_ms + round(self._waits_s(idempotency_key) * 1000),
            owner=owner,
            parent_id=parent_id,
            idempotency_key=idempotency_key,
        )
        _check_count_is_same(batch_id, count, await self.store(Stage.OPEN, batch))
        return OpenedBatch(batch_id, count, is_cached=False)

    def _waits_s(self, idempotency_key: str | None) -> float:
        """How long a batch waits for its items: at least as long as its key names it, because until then the key cannot
        create another batch."""
        waits_s = self._retention.batch
        return waits_s if idempotency_key is None else max(waits_s, self._retention.idempotency_key)

    async def waiting(self, batch_id: str) -> BatchRecord | None:
        """A batch that was created over HTTP, as long as its items can be sent."""
        batch = await self.find(batch_id)
        return batch if batch is not None and self._runs.now_ms() < batch.waits_until_ms else None

    async def fill(self, batch: BatchRecord, items: Sequence[Prepared]) -> FilledBatch:
        """Create the runs of a batch that do not exist yet.

        If creating one fails, the runs before it remain, and a repeated call continues after them. Raises
        `LimitExceeded`, before it creates any, if the owner of the token has no budget for all of them, and
        `UsageError` for a thread.
        """
        if batch.is_sealed:
            return FilledBatch(0, len(items))
        _check_no_threads(items)
        plan = await self._plan(batch.id, items)
        if any(item.record.idempotency_key is not None for item in items):
            batch = await self.store(Stage.PLANNED, batch.with_plan(plan))
            plan = batch.plan

        members = _members(batch.id, items, plan)

        async def launch() -> list[Created]:
            created = []
            for number, member in enumerate(members, 1):
                with suppress(RunNotFound):  # an earlier call created it, and it has expired
                    created.append(await self._launcher.create(member))
                await _yield_after(number)
            await self.store(Stage.SEALED, batch.sealed())
            return created

        owner = items[0].record.token_owner
        if owner is None:
            created = await self._engine.begin().shielded(launch)
        else:
            with await self._budgets.reserve(owner, members) as reservation:
                created = await self._engine.begin().shielded(launch)
                reservation.keep([member.record for member in created], self._runs.now_ms())
            await self._budgets.trim(owner)
        accepted = sum(member.is_new for member in created)
        return FilledBatch(accepted, len(items) - accepted)

    # Both

    async def _plan(self, batch_id: str, items: Sequence[Prepared]) -> Plan:
        """Claim the idempotency keys of the items."""
        run_ids: list[str] = []
        created: dict[str, int] = {}
        for index, item in enumerate(items):
            item = item.renamed(run_id_in(batch_id, index))
            run_id, found = item.record.id, None
            if item.record.idempotency_key is not None:
                run_id, found = await self._launcher.claim_key(item)
            if found is None or (found.batch is not None and found.batch.id == batch_id):
                created.setdefault(run_id, index)  # a second item with the same key refers to the same run
            run_ids.append(run_id)
            await _yield_after(index + 1)
        return Plan(run_ids, list(created.values()))


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(13)}"


def check_item(item: object) -> tuple[TaskLike, Any, RunOptions]:
    """The parts of a `BatchItem`. Raises `UsageError`."""
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise UsageError(f"a batch item is {item!r}; allowed are (task, payload) and (task, payload, options)")
    task, payload, options = (*item, {})[:3]
    if not isinstance(options, Mapping):
        raise UsageError(f"the options of a batch item are a {type(options).__name__}; allowed is a dict")
    return task, payload, cast(RunOptions, options)


def _check_no_threads(items: Sequence[Prepared]) -> None:
    """A busy thread would leave a batch without one of its runs. Raises `UsageError`."""
    for index, item in enumerate(items):
        if item.record.thread is not None:
            raise UsageError(f"item {index} of the batch has a thread; allowed is that for single runs (trigger)")


def _check_count_is_same(batch_id: str, count: int, found: BatchRecord | None) -> None:
    if found is not None and found.count != count:
        raise UsageError(
            f"batch {batch_id!r} was created by the same request with {found.count} runs; this one has {count}"
        )


def _members(batch_id: str, items: Sequence[Prepared], plan: Plan) -> list[StoredRecord]:
    """The runs that belong to the batch, in order, numbered among themselves so that a feed knows the last one."""
    return [
        msgspec.structs.replace(
            items[index].renamed(plan.run_ids[index]).record, batch=BatchMember(batch_id, rank, len(plan.created))
        )
        for rank, index in enumerate(plan.created)
    ]


async def _yield_after(number: int) -> None:
    if not number % _RUNS_PER_ITERATION:
        await anyio.lowlevel.checkpoint()
