"""Batches: several runs that are triggered together, and followed together.

All items are checked before the first run starts, and the runs are created in their order. A run's id follows from that
of the batch and its index, so whoever creates a batch again finds what is there. Over HTTP a batch is created first and
its items come in a second request, which may be repeated. What its runs do not tell is kept in claims: `KnownBatch`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.lowlevel
import msgspec

from asgi_realtime.core.config import Retention, Span
from asgi_realtime.core.errors import LimitExceeded, RealtimeError, RunNotFound, UsageError
from asgi_realtime.core.runs import BatchMember, CancelRequested, RunRecord
from asgi_realtime.engine.engine import Engine
from asgi_realtime.runs.handles import BatchHandle, ResultWaiter, batch_scopes
from asgi_realtime.runs.ids import new_batch_id
from asgi_realtime.tasks.launch import Launcher, Once, renamed
from asgi_realtime.tasks.records import Prepared, RunOptions
from asgi_realtime.tasks.task import TaskLike

logger = logging.getLogger("asgi_realtime")

BatchItem = tuple[TaskLike, Any] | tuple[TaskLike, Any, Mapping[str, Any]]

_TURN = 20  # runs that are created before others have a turn

ITEM_OPTIONS = frozenset({"tags", "metadata", "idempotency_key", "idempotency_key_ttl", "ttl", "delay", "max_duration"})


class KnownBatch(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept of a batch besides its runs. Of one whose runs tell everything, nothing is."""

    count: int
    created_at_ms: int
    waits_until_ms: int = 0
    """When it is too late for its items."""
    owner: str = ""
    """The credential that created it."""
    parent_id: str | None = None
    idempotency_key: str | None = None
    stands_for: list[str] | None = None
    """The run that each item stands for, if some have idempotency keys."""
    made: list[int] | None = None
    """The items that make a run of the batch, if some do not: a key stands for a run that was there before."""
    sealed: bool = False
    """All its runs were created."""

    def run_ids(self, batch_id: str) -> list[str]:
        """The runs of its items, in their order, whether they are there or not."""
        return self.stands_for or [run_id_in(batch_id, index) for index in range(self.count)]

    def last_id(self, batch_id: str) -> str | None:
        """The run that is created last, or None if all were there before."""
        if self.made is None:
            return run_id_in(batch_id, self.count - 1)
        return self.run_ids(batch_id)[self.made[-1]] if self.made else None

    def is_closed(self, now_ms: int) -> bool:
        """Whether no more runs come."""
        return self.sealed or self.made == [] or now_ms >= self.waits_until_ms


@dataclass(frozen=True, slots=True)
class Plan:
    """Which run each item of a batch stands for, and which items make a run of the batch."""

    run_ids: list[str]
    made: list[int]


@dataclass(frozen=True, slots=True)
class CreatedBatch:
    id: str
    count: int
    is_cached: bool
    """It was created before, with all its runs."""


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

    async def known(self, batch_id: str) -> KnownBatch | None:
        """What is kept of a batch: what was stored of it last."""
        for name in (_sealed, _planned, _open):
            stored = await self._runs.claimed(name(batch_id))
            if stored is not None:
                return _decode(stored)
        return None

    async def closed(self, batch_id: str) -> bool | None:
        """Whether no more runs come to a batch; None if nothing is kept of it."""
        known = await self.known(batch_id)
        return None if known is None else known.is_closed(self._runs.now_ms())

    async def _store(self, name: str, batch: KnownBatch) -> KnownBatch:
        """Claim what is known of a batch from now on, or learn what another has claimed."""
        ttl_s = max(self._retention.idempotency_key, self._retention.batch)
        return _decode(await self._runs.claim(name, msgspec.json.encode(batch).decode(), ttl_s=ttl_s))

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
        known = KnownBatch(len(items), self._runs.now_ms(), stands_for=plan.run_ids, made=plan.made, sealed=True)

        async def launch() -> None:
            await self._launch_or_cancel(members)
            if len(members) < len(items):  # which the members do not tell of
                await self._store(_sealed(batch_id), known)

        await self._engine.begin().shielded(launch)
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
            known = await self.known(batch_id)
            if known is not None and known.sealed:
                return CreatedBatch(batch_id, known.count, is_cached=True)
            _check_same(batch_id, count, known)
        if once is not None:
            spent = await self._launcher.spend(once, batch_id)
            spent.check_fresh()
            batch_id = spent.id
        now_ms = self._runs.now_ms()
        batch = KnownBatch(
            count,
            now_ms,
            waits_until_ms=now_ms + round(self._waits_s(idempotency_key) * 1000),
            owner=owner,
            parent_id=parent_id,
            idempotency_key=idempotency_key,
        )
        _check_same(batch_id, count, await self._store(_open(batch_id), batch))
        return CreatedBatch(batch_id, count, is_cached=False)

    def _waits_s(self, idempotency_key: str | None) -> float:
        """One with a key waits as long as the key stands for it: there is no other way to create it again."""
        waits_s = self._retention.batch
        return waits_s if idempotency_key is None else max(waits_s, self._retention.idempotency_key)

    async def waiting(self, batch_id: str) -> KnownBatch | None:
        """A batch that was created over HTTP, for as long as its items may come."""
        known = await self.known(batch_id)
        return known if known is not None and self._runs.now_ms() < known.waits_until_ms else None

    async def fill(self, batch_id: str, batch: KnownBatch, items: Sequence[Prepared]) -> Sealed:
        """Create the runs of a batch, those that are not there yet. `batch` is what is known of it.

        If one fails those before it stay, and the same call goes on where this one ended.
        """
        if batch.sealed:
            return Sealed(0, len(items))
        plan = await self._planned(batch_id, items)
        if any(item.record.claim is not None for item in items):  # what a key stands for may be another run later
            batch = await self._store(
                _planned(batch_id), msgspec.structs.replace(batch, stands_for=plan.run_ids, made=plan.made)
            )
            plan = Plan(batch.run_ids(batch_id), plan.made if batch.made is None else batch.made)
        members = _members(batch_id, items, plan)
        created = 0

        async def launch() -> None:
            nonlocal created
            for number, member in enumerate(members, 1):
                created += await self._is_new(member)
                if not number % _TURN:
                    await anyio.lowlevel.checkpoint()
            await self._store(_sealed(batch_id), msgspec.structs.replace(batch, sealed=True))

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
            if not (index + 1) % _TURN:
                await anyio.lowlevel.checkpoint()
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


def _check_same(batch_id: str, count: int, known: KnownBatch | None) -> None:
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


def _decode(stored: str) -> KnownBatch:
    return msgspec.json.decode(stored, type=KnownBatch)


# Claims do not change, so what is known of a batch is claimed anew, whole, when there is more: when it is created, when
# its items have come and some have keys, and when its runs are there. What stands behind the first colon of a claim's
# name may be any text, so none is the begin of another.


def _open(batch_id: str) -> str:
    return f"batch:{batch_id}"


def _planned(batch_id: str) -> str:
    return f"batch-plan:{batch_id}"


def _sealed(batch_id: str) -> str:
    return f"batch-sealed:{batch_id}"
