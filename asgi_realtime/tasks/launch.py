"""Launching runs: stored first, then handed to the executor, and once, however often somebody asks for the same.

What is asked for again is told by claims, each of which stands for one run id, and is taken before the run is created.
So a process that dies in between leaves a claim, and whoever finds it creates the run under its id. An idempotency key
is such a claim, of the user's choice; a request that a client sends again, or that spends a one-time token, is another.
What such a request has made is marked as made, so that it is not made again when it is gone.

A run that the executor does not take now is launched all the same: it stays QUEUED, and is handed over later.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from asgi_realtime.core.config import Retention
from asgi_realtime.core.errors import RunNotFound, TokenSpent
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import RunRecord, Status
from asgi_realtime.engine.engine import Engine
from asgi_realtime.tasks.records import Prepared

MAX_REMEMBERED_RUNS = 10_000
"""Runs created by this process whose ids it remembers, so that a repeated request does not create one again."""


@dataclass(frozen=True, slots=True)
class Once:
    """A request that makes one thing, a run or a batch, however often it is sent."""

    claim: str
    """Under which it is known to all processes."""
    mark: str
    """What tells it from other requests with the same claim, which are refused: a token is spent."""
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Spent:
    """What a request has made, or is to make."""

    id: str
    is_new: bool
    is_late: bool
    """It comes so late that what it made may be past its retention, and must not be made again."""

    def check_fresh(self) -> None:
        """Raises `TokenSpent` if what the request made is not to be made again."""
        if self.is_late:
            raise TokenSpent("the one-time token was used before, and what it made is gone; ask for another")


class Launcher:
    """Creates runs and hands them to the executor."""

    def __init__(self, engine: Engine, *, retention: Retention) -> None:
        self._engine = engine
        self._runs = engine.runs
        self.retention = retention
        self._made: dict[str, None] = {}

    async def launch(self, prepared: Prepared, *, once: Once | None = None) -> tuple[RunRecord, bool]:
        """Create a run, or find the one that this request made before; or the one that its idempotency key stands for
        because of another request, and then True with it. Raises `TokenSpent`, `RunNotFound` if it is gone."""
        record = prepared.record
        if record.claim is not None:
            return await self._launch_by_key(prepared, record.claim, once)
        record, _ = await self._launch_by_request(record, once)
        return record, False

    async def _launch_by_request(self, record: RunRecord, once: Once | None) -> tuple[RunRecord, bool]:
        """True with a run that was there."""
        if once is not None:
            spent = await self.spend(once, record.id)
            found = None if spent.is_new else await self._find_made(spent)
            if found is not None:
                return found, True
            record = renamed(record, spent.id)
        return await self._create_shielded(record, once)

    async def _launch_by_key(self, prepared: Prepared, claim: str, once: Once | None) -> tuple[RunRecord, bool]:
        """The key comes first: one that stands for a run makes none, and spends nothing. But a request that was here
        before gets what it made, whatever its key stands for by now."""
        record = prepared.record
        if once is not None:
            spent = await self._spent(once) or await self._intend(once, record.id)
            found = None if spent.is_new else await self._find_made(spent)
            if found is not None:
                return found, False
            record = renamed(record, spent.id)
        run_id, found = await self.claim_key(claim, record.id, ttl_s=prepared.key_ttl_s)
        if found is not None:
            return found, True
        made, was_there = await self._launch_by_request(renamed(record, run_id), once)
        same_at_once = once is not None and run_id == record.id
        return made, was_there and not same_at_once

    async def _create_shielded(self, record: RunRecord, once: Once | None) -> tuple[RunRecord, bool]:
        """As `create`; cancelling the caller does not cancel it. What a request makes is remembered as made."""
        created: list[tuple[RunRecord, bool]] = []

        async def create() -> None:
            created.append(await self.create(record))
            if once is not None:
                await self._runs.claim(_made(record.id), "made", ttl_s=once.ttl_s)

        await self._engine.begin().shielded(create)  # a run that is stored and not queued would wait for a lease
        return created[0]

    async def create(self, record: RunRecord) -> tuple[RunRecord, bool]:
        """Store a run and hand it to the executor; or find the one that has its id, and then True with it.

        Raises `RunNotFound` if this process has created it before, and it is gone: no id is used twice.
        """
        if record.id in self._made:
            (found,) = await self._runs.load([record.id])
            if found is None:
                raise RunNotFound(f"run {record.id!r} was made by this request before, and is past its retention")
            return found, True
        try:
            await self._runs.create(record)
        except VersionConflict as conflict:
            if conflict.current is None:
                raise
            return conflict.current, True
        self._remember(record.id)
        if record.status is Status.QUEUED:
            await self._engine.dispatcher.dispatch(record)
        return record, False

    def _remember(self, run_id: str) -> None:
        self._made[run_id] = None
        if len(self._made) > MAX_REMEMBERED_RUNS:
            del self._made[next(iter(self._made))]

    async def claim_key(self, claim: str, run_id: str, *, ttl_s: float) -> tuple[str, RunRecord | None]:
        """The id that an idempotency key stands for, and its run; no run if it is still to be created.

        A claim goes with its run. So one that stands before and after a look that found no run is of somebody who has
        not created it yet, and may never do.
        """
        before = None
        while True:
            stands_for = await self._runs.claim(claim, run_id, ttl_s=ttl_s)
            if stands_for in (run_id, before):
                return stands_for, None
            (found,) = await self._runs.load([stands_for])
            if found is not None:
                return stands_for, found
            before = stands_for

    async def _find_made(self, spent: Spent) -> RunRecord | None:
        """The run that a request made; None if it is still to be made. Raises `TokenSpent`, `RunNotFound` if it was
        made and is gone: it must not be executed twice."""
        (found,) = await self._runs.load([spent.id])
        if found is None:
            spent.check_fresh()
            if await self._runs.claimed(_made(spent.id)) is not None:
                raise RunNotFound(f"run {spent.id!r} was made by this request before, and is past its retention")
        return found

    async def spend(self, once: Once, made_id: str) -> Spent:
        """Claim what a request makes, or learn what it has made. Raises `TokenSpent` for another request."""
        value = f"{made_id} {self._runs.now_ms()} {once.mark}"
        stands = await self._runs.claim(once.claim, value, ttl_s=once.ttl_s)
        return Spent(made_id, is_new=True, is_late=False) if stands == value else self._spent_before(once, stands)

    async def _spent(self, once: Once) -> Spent | None:
        """What a request has made, if it was here before. Raises `TokenSpent` if another was."""
        stands = await self._runs.claimed(once.claim)
        return None if stands is None else self._spent_before(once, stands)

    def _spent_before(self, once: Once, stands: str) -> Spent:
        spent_on, at_ms, mark = stands.split(" ", 2)
        if mark != once.mark:
            raise TokenSpent("the one-time token was used before; ask for another")
        is_late = self._runs.now_ms() - int(at_ms) > self.retention.request_key * 1000
        return Spent(spent_on, is_new=False, is_late=is_late)

    async def _intend(self, once: Once, run_id: str) -> Spent:
        """What a request is to make if its key makes anything, so that the same request at once is known as the same.
        Nothing is spent by that."""
        stands = await self._runs.claim(f"intent:{once.claim} {once.mark}", run_id, ttl_s=once.ttl_s)
        return Spent(stands, is_new=stands == run_id, is_late=False)


def renamed(record: RunRecord, run_id: str) -> RunRecord:
    """A run under another id, also as its own root, if it was that."""
    root_id = run_id if record.root_id in (record.id, None) else record.root_id
    return msgspec.structs.replace(record, id=run_id, root_id=root_id)


def _made(run_id: str) -> str:
    """The claim that says that a run was there, which outlives it."""
    return f"made:{run_id}"
