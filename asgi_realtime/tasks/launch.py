"""Creates runs and hands them to the executor: exactly one run per request, however often the request arrives.

Three claims of the broker, on which the first value wins, make a repeated request find what the first one made:

* the *idempotency key* of the caller names a run. The claim is released when that run expires;
* a *request* of an official client (`Once.claim`) names the run or batch that it makes. A one-time token is such a
  claim too: `Once.mark` distinguishes requests, and a different request finds the token spent;
* `made:<run id>` records that the run of a request existed, and outlives the run. Without it a late retry would execute
  the run a second time.

A claim is always taken before the run is created. If the process dies in between, the claim names an id without a run,
and the retry creates the run under that id.

If the executor does not accept a stored run, the run stays QUEUED, and a ticker dispatches it later.
"""

from __future__ import annotations

from typing import NamedTuple

from asgi_realtime.core.config import Retention
from asgi_realtime.core.errors import LimitExceeded, RunExists, RunNotFound, TokenSpent
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.engine.engine import Engine
from asgi_realtime.tasks.budgets import Budgets
from asgi_realtime.tasks.records import Prepared

MAX_REMEMBERED_RUNS = 10_000
"""Runs created by this process that it remembers, so that a repeated request does not create one again."""


class Once(NamedTuple):
    """A request that makes one run or one batch, however often it arrives."""

    claim: str
    """The claim that identifies the request across processes."""
    mark: str
    """Distinguishes this request from others with the same claim. Those are rejected: the one-time token is spent."""
    ttl_s: float
    owner: str | None = None
    """The owner of the token. The claims count against its budgets."""


class Spent(NamedTuple):
    """The id of what a request makes, as its claim records it."""

    id: str
    is_new: bool
    """This call has taken the claim."""
    is_late: bool
    """The claim is so old that what it made may have expired, so it must not be made again."""

    def check_not_late(self) -> None:
        """Raises `TokenSpent` if what the request made must not be made again."""
        if self.is_late:
            raise TokenSpent("the one-time token was used before and what it made has expired; request a new token")


class Launched(NamedTuple):
    """The run of a `trigger` call."""

    record: StoredRecord
    is_cached: bool
    """Its idempotency key names a run that another request made."""


class Created(NamedTuple):
    """The run that is stored under an id."""

    record: StoredRecord
    is_new: bool
    """This call has stored it."""


class Launcher:
    """Creates runs and hands them to the executor."""

    def __init__(self, engine: Engine, budgets: Budgets, *, retention: Retention) -> None:
        self._engine = engine
        self._runs = engine.runs
        self._budgets = budgets
        self.retention = retention
        self._created_ids: dict[str, None] = {}

    async def launch(self, prepared: Prepared, *, once: Once | None = None) -> Launched:
        """Create a run, or find the one that the same request or the same idempotency key has made.

        The key is checked first: if it names a run, nothing is made and nothing is spent. But a request that arrived
        before gets the run it made, even if its key names another run by now. Raises `TokenSpent`, `RunNotFound` if the
        run was made before and has expired, `ThreadBusy`, and `LimitExceeded` if the owner of the token has no budget
        for a new run.
        """
        owner = prepared.record.token_owner
        if owner is None:
            return await self._launch(prepared, once)
        try:
            reservation = await self._budgets.reserve(owner, [prepared.record])
        except LimitExceeded:
            found = await self._find_launched(prepared, once)
            if found is None:
                raise
            return found
        with reservation:
            launched = await self._launch(prepared, once)
            reservation.keep([launched.record], self._runs.now_ms())
        await self._budgets.trim(owner)
        return launched

    async def _find_launched(self, prepared: Prepared, once: Once | None) -> Launched | None:
        """What `launch` would find, without making anything."""
        spent = None if once is None else await self._spent(once)
        made = None if spent is None else await self._find_made(spent)
        if made is not None:
            return Launched(made, is_cached=False)
        key = prepared.record.claim
        run_id = None if key is None else await self._runs.claimed(key)
        (found,) = [None] if run_id is None else await self._runs.load([run_id])
        return None if found is None else Launched(found, is_cached=True)

    async def _launch(self, prepared: Prepared, once: Once | None) -> Launched:
        if prepared.record.idempotency_key is None:
            created = await self._create_once(prepared, once)
            return Launched(created.record, is_cached=False)
        if once is not None:
            spent = await self._spent(once) or await self._intend(once, prepared.record.id)
            made = None if spent.is_new else await self._find_made(spent)
            if made is not None:
                return Launched(made, is_cached=False)
            prepared = prepared.renamed(spent.id)
        run_id, found = await self.claim_key(prepared)
        if found is not None:
            return Launched(found, is_cached=True)
        created = await self._create_once(prepared.renamed(run_id), once)
        same_request = once is not None and run_id == prepared.record.id  # it arrived twice at the same time
        return Launched(created.record, is_cached=not created.is_new and not same_request)

    async def launch_named(self, prepared: Prepared) -> Launched:
        """Create a run under the id that the host chose. Raises `RunExists`. Cancelling the caller does not interrupt
        the creation."""
        record = prepared.record
        try:
            created = await self._engine.begin().shielded(lambda: self.create(record, replaces=prepared.replaces))
        except RunNotFound:  # this process has created it, and it has expired
            raise RunExists(record.id) from None
        if not created.is_new:
            raise RunExists(record.id)
        return Launched(created.record, is_cached=False)

    async def _create_once(self, prepared: Prepared, once: Once | None) -> Created:
        """Create the run of a request, or find it. Cancelling the caller does not interrupt the creation: a run that is
        stored but not enqueued would wait for a whole lease."""
        if once is not None:
            if prepared.record.thread is not None and not prepared.replaces and await self._spent(once) is None:
                await self._engine.run_threads.check_free(prepared.record)  # a busy thread must not cost the token
            spent = await self.spend(once, prepared.record.id)
            made = None if spent.is_new else await self._find_made(spent)
            if made is not None:
                return Created(made, is_new=False)
            prepared = prepared.renamed(spent.id)

        async def create() -> Created:
            created = await self.create(prepared.record, replaces=prepared.replaces)
            if once is not None:
                await self._runs.claim(_made(prepared.record.id), "made", ttl_s=once.ttl_s, owner=once.owner)
            return created

        return await self._engine.begin().shielded(create)

    async def create(self, record: StoredRecord, *, replaces: bool = False) -> Created:
        """Store a run and hand it to the executor, or find the run that has its id.

        With `replaces` it cancels the active run of its thread. Raises `ThreadBusy`, and `RunNotFound` if this process
        has created the run before and it has expired: an id is never reused.
        """
        if record.id in self._created_ids:
            (found,) = await self._runs.load([record.id])
            if found is None:
                raise _expired(record.id)
            return Created(found, is_new=False)
        self._engine.check_accepts_runs()
        try:
            await self._engine.run_threads.create(record, replace=replaces)
        except VersionConflict as conflict:
            if conflict.current is None:
                raise
            return Created(conflict.current, is_new=False)
        self._created_ids[record.id] = None
        if len(self._created_ids) > MAX_REMEMBERED_RUNS:
            del self._created_ids[next(iter(self._created_ids))]
        if record.status is Status.QUEUED:
            await self._engine.dispatcher.dispatch(record)
        return Created(record, is_new=True)

    async def claim_key(self, prepared: Prepared) -> tuple[str, StoredRecord | None]:
        """Claim the idempotency key of a run, or find the run that it names. The run must have a key.

        Returns the id that the key names, and its run, or None if that is yet to be created.

        A claim is released together with its run. If the same claim is found twice and no run in between, then its
        owner has not created the run yet and possibly never will; this call creates it instead.
        """
        claim = prepared.record.claim
        assert claim is not None
        previous = None
        while True:
            run_id = await self._runs.claim(
                claim, prepared.record.id, ttl_s=prepared.key_ttl_s, owner=prepared.record.token_owner
            )
            if run_id in (prepared.record.id, previous):
                return run_id, None
            (found,) = await self._runs.load([run_id])
            if found is not None:
                return run_id, found
            previous = run_id

    async def _find_made(self, spent: Spent) -> StoredRecord | None:
        """The run that a request made, or None if it is yet to be made. Raises `TokenSpent`, and `RunNotFound` if it
        was made and has expired: it must not execute twice."""
        (found,) = await self._runs.load([spent.id])
        if found is None:
            spent.check_not_late()
            if await self._runs.claimed(_made(spent.id)) is not None:
                raise _expired(spent.id)
        return found

    async def spend(self, once: Once, made_id: str) -> Spent:
        """Claim the id that a request makes, or find the one it made. Raises `TokenSpent` for a different request."""
        value = f"{made_id} {self._runs.now_ms()} {once.mark}"
        claimed = await self._runs.claim(once.claim, value, ttl_s=once.ttl_s, owner=once.owner)
        return Spent(made_id, is_new=True, is_late=False) if claimed == value else self._read_spent(once, claimed)

    async def _spent(self, once: Once) -> Spent | None:
        """What a request made, if it arrived before. Raises `TokenSpent` for a different request."""
        claimed = await self._runs.claimed(once.claim)
        return None if claimed is None else self._read_spent(once, claimed)

    def _read_spent(self, once: Once, claimed: str) -> Spent:
        made_id, at_ms, mark = claimed.split(" ", 2)
        if mark != once.mark:
            raise TokenSpent("the one-time token was used before; request a new one")
        is_late = self._runs.now_ms() - int(at_ms) > self.retention.request_key * 1000
        return Spent(made_id, is_new=False, is_late=is_late)

    async def _intend(self, once: Once, run_id: str) -> Spent:
        """Reserve the id for what a request makes if its idempotency key names no run. The reservation lets a
        concurrent duplicate of the request be recognized, and spends nothing."""
        claimed = await self._runs.claim(f"intent:{once.claim} {once.mark}", run_id, ttl_s=once.ttl_s, owner=once.owner)
        return Spent(claimed, is_new=claimed == run_id, is_late=False)


def _made(run_id: str) -> str:
    return f"made:{run_id}"


def _expired(run_id: str) -> RunNotFound:
    return RunNotFound(f"run {run_id!r} was made by this request before and has expired (Retention.after_end)")
