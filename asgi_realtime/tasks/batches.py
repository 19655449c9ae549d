"""Batches: several runs that are triggered together, and followed together.

All items are checked before the first run starts, and the runs are created in their order. A run's id follows from that
of the batch and its index, so whoever creates a batch again finds what is there. Over HTTP a batch is created first and
its items come in a second request, which may be repeated; what is known of it besides its runs is kept in claims.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from asgi_realtime.config import Retention, Span
from asgi_realtime.core.runs import BatchMember, CancelRequested, RunRecord
from asgi_realtime.engine import Engine
from asgi_realtime.errors import LimitExceeded, RealtimeError, RunNotFound, UsageError
from asgi_realtime.handles import BatchHandle, ResultWaiter, batch_scopes
from asgi_realtime.names import new_batch_id
from asgi_realtime.supervisor import logger
from asgi_realtime.tasks.launch import Launcher, Once, renamed
from asgi_realtime.tasks.records import Prepared, RunOptions
from asgi_realtime.tasks.task import Task

TaskLike = Task[Any, Any] | str
BatchItem = tuple[TaskLike, Any] | tuple[TaskLike, Any, Mapping[str, Any]]

ITEM_OPTIONS = frozenset({"tags", "metadata", "idempotency_key", "idempotency_key_ttl", "ttl", "delay", "max_duration"})


class OpenBatch(msgspec.Struct, frozen=True):
    """A batch that was created over HTTP."""

    count: int
    created_at_ms: int
    parent_id: str | None = None
    idempotency_key: str | None = None


class Plan(msgspec.Struct, frozen=True):
    """Which run each item of a batch stands for, and which items make a run of the batch: not those whose idempotency
    key stands for a run that was there before."""

    run_ids: list[str]
    made: list[int]


@dataclass(frozen=True, slots=True)
class CreatedBatch:
    id: str
    count: int
    is_cached: bool
    """It was created before, with all its runs."""


@dataclass(frozen=True, slots=True)
class KnownBatch:
    """What is known of a batch besides its runs. Of one that was triggered in process that is nothing."""

    opened: OpenBatch | None
    run_ids: list[str] | None
    """The runs that its items stand for, if some items have idempotency keys."""
    sealed: bool
    """All its runs were created."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A batch whose runs are all there."""

    accepted: int
    deduplicated: int


class Batches:
    """Creates batches of runs."""

    def __init__(self, engine: Engine, launcher: Launcher, *, retention: Retention) -> None:
        self._engine = engine
        self._runs = engine.runs
        self._limits = engine.limits
        self._launcher = launcher
        self._retention = retention

    def check_count(self, count: int) -> None:
        """Raises `UsageError`, `LimitExceeded`."""
        if count < 1:
            raise UsageError("a batch is empty; it needs at least one run")
        if count > self._limits.batch_runs:
            raise LimitExceeded(f"a batch has {count} runs, limit {self._limits.batch_runs}")

    # In process

    async def trigger(
        self,
        items: Sequence[Prepared],
        *,
        token_expires_in: Span,
        mint: Callable[[Sequence[str], Span], str],
        result: ResultWaiter,
    ) -> BatchHandle:
        """Create a batch. If one run fails to start those before it are canceled, so that the batch is over."""
        self.check_count(len(items))
        batch_id = new_batch_id()
        plan = await self._planned(batch_id, items)
        members = _members(batch_id, items, plan)
        elsewhere = sorted(set(plan.run_ids) - {member.id for member in members})
        token = mint([*batch_scopes(batch_id), *(f"read:runs:{run_id}" for run_id in elsewhere)], token_expires_in)
        await self._engine.begin().shielded(lambda: self._launch_or_cancel(members))
        return BatchHandle(batch_id, token, runs=plan.run_ids, result=result)

    async def _launch_or_cancel(self, members: Sequence[RunRecord]) -> None:
        for index, member in enumerate(members):
            try:
                await self._launcher.create(member)
            except Exception:
                for launched in members[:index]:
                    await self._cancel_launched(launched.id)
                raise

    async def _cancel_launched(self, run_id: str) -> None:
        try:
            await self._runs.update(run_id, CancelRequested())
        except RealtimeError as exc:
            logger.warning("run %s of a batch that failed could not be canceled: %s", run_id, exc)
            return
        execution = self._engine.executions.get(run_id)
        if execution is not None:
            execution.cancel()

    # Over HTTP

    async def open(
        self, count: int, *, parent_id: str | None, idempotency_key: str | None, owner: str, once: Once | None
    ) -> CreatedBatch:
        """Create a batch whose items are to come, or find the one that was created with this key before.

        `owner` is the credential: with another the same key is another one, or whoever guesses it could read what comes
        into the batch. Raises `UsageError`, `LimitExceeded`, `TokenSpent`.
        """
        self.check_count(count)
        batch_id = new_batch_id()
        if idempotency_key is not None:
            key = f"batch-key:{owner}:{idempotency_key}"
            batch_id = await self._runs.claim(key, batch_id, ttl_s=self._retention.idempotency_key)
            sealed = await self._runs.claimed(_sealed(batch_id))
            if sealed is not None:
                return CreatedBatch(batch_id, int(sealed), is_cached=True)
            _check_same(batch_id, count, await self.find(batch_id))
        if once is not None:
            spent = await self._launcher.spend(once, batch_id)
            spent.check_fresh()
            batch_id = spent.id
        batch = OpenBatch(count, self._runs.now_ms(), parent_id, idempotency_key)
        stored = await self._runs.claim(_open(batch_id), _encode(batch), ttl_s=self._retention.batch)
        _check_same(batch_id, count, msgspec.json.decode(stored, type=OpenBatch))
        return CreatedBatch(batch_id, count, is_cached=False)

    async def find(self, batch_id: str) -> OpenBatch | None:
        """A batch that was created over HTTP, for as long as its items may come."""
        stored = await self._runs.claimed(_open(batch_id))
        return None if stored is None else msgspec.json.decode(stored, type=OpenBatch)

    async def known(self, batch_id: str) -> KnownBatch:
        """What is known of a batch besides its runs."""
        plan = await self._runs.claimed(_planned(batch_id))
        return KnownBatch(
            opened=await self.find(batch_id),
            run_ids=None if plan is None else msgspec.json.decode(plan, type=Plan).run_ids,
            sealed=await self._runs.claimed(_sealed(batch_id)) is not None,
        )

    async def fill(self, batch_id: str, items: Sequence[Prepared]) -> Sealed:
        """Create the runs of a batch, those that are not there yet.

        If one fails those before it stay, and the same call goes on where this one ended.
        """
        if await self._runs.claimed(_sealed(batch_id)) is not None:
            return Sealed(0, len(items))
        plan = await self._planned(batch_id, items)
        if any(item.record.claim is not None for item in items):  # what a key stands for may be another run later
            stored = await self._runs.claim(_planned(batch_id), _encode(plan), ttl_s=self._retention.idempotency_key)
            plan = msgspec.json.decode(stored, type=Plan)
        members = _members(batch_id, items, plan)
        created = 0

        async def launch() -> None:
            nonlocal created
            for member in members:
                created += await self._is_new(member)
            ttl_s = max(self._retention.idempotency_key, self._retention.batch)
            await self._runs.claim(_sealed(batch_id), str(len(items)), ttl_s=ttl_s)

        await self._engine.begin().shielded(launch)
        return Sealed(created, len(items) - created)

    async def _is_new(self, member: RunRecord) -> bool:
        try:
            _, was_there = await self._launcher.create(member)
        except RunNotFound:  # an earlier call of ours created it, and it has gone
            return False
        return not was_there

    # Both

    async def _planned(self, batch_id: str, items: Sequence[Prepared]) -> Plan:
        """Take the idempotency keys of the items."""
        run_ids: dict[int, str] = {}
        made: dict[str, int] = {}
        for index, item in enumerate(items):
            run_id, found = run_id_in(batch_id, index), None
            if item.record.claim is not None:
                run_id, found = await self._launcher.claim_key(item.record.claim, run_id, ttl_s=item.key_ttl_s)
                belongs = found is not None and found.batch is not None and found.batch.id == batch_id
                found = None if belongs else found  # of an earlier call for this batch
            if found is None:
                made.setdefault(run_id, index)  # a second item with the same key stands for the same run
            run_ids[index] = run_id
        return Plan([*run_ids.values()], [*made.values()])


def run_id_in(batch_id: str, index: int) -> str:
    """The id of a run in a batch: the same whoever makes it, and not to be guessed without the batch's."""
    return f"run_{hashlib.sha256(f'{batch_id}/{index}'.encode()).hexdigest()[:26]}"


def check_item(item: object) -> tuple[TaskLike, Any, RunOptions]:
    """The parts of an item as the in-process API takes it. Raises `UsageError`."""
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise UsageError(f"a batch item is {item!r}; allowed are (task, payload) and (task, payload, options)")
    task, payload, *rest = item
    options = dict(rest[0]) if rest else {}
    if not options.keys() <= ITEM_OPTIONS:
        unknown = ", ".join(sorted(options.keys() - ITEM_OPTIONS))
        raise UsageError(f"batch item options {unknown} are not known; allowed: {', '.join(sorted(ITEM_OPTIONS))}")
    return task, payload, RunOptions(**options)


def _check_same(batch_id: str, count: int, known: OpenBatch | None) -> None:
    if known is not None and known.count != count:
        raise UsageError(f"batch {batch_id!r} was created by this before, with {known.count} runs, not {count}")


def _members(batch_id: str, items: Sequence[Prepared], plan: Plan) -> list[RunRecord]:
    """The runs that belong to the batch, in their order. They count among themselves, so that its feeds end."""
    return [
        msgspec.structs.replace(
            renamed(items[index].record, plan.run_ids[index]), batch=BatchMember(batch_id, rank, len(plan.made))
        )
        for rank, index in enumerate(plan.made)
    ]


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()


# The names of claims. What stands behind the first colon may be any text, so none is the begin of another.


def _open(batch_id: str) -> str:
    return f"batch:{batch_id}"


def _planned(batch_id: str) -> str:
    return f"batch-plan:{batch_id}"


def _sealed(batch_id: str) -> str:
    return f"batch-sealed:{batch_id}"
