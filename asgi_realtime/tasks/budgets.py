"""What an owner of public tokens may have stored and open at once, and the account of what it has.

Each run that a public token triggers is listed in a topic of its owner, so every broker has an exact list, across
processes and restarts. An account mirrors that list: it reads the changes since its last use, and loads the runs that
changed. Before a run is created, its place is reserved without suspending after the check, so requests of one process
cannot exceed a budget together; two processes can, by what they create at the same moment. Ended runs never stand in
the way of new ones: those that exceed a budget are removed, the oldest first.

The host, that is, code in process and requests with the secret key, has no account, and its calls cost nothing here.
Runs that a task triggers in process are the work of the host, also if a public token triggered the task.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio

from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import BrokerUnavailable, LimitExceeded
from asgi_realtime.core.runs import StoredRecord, content_bytes, owner_topic
from asgi_realtime.core.topics import Changes, Cursor
from asgi_realtime.loop.logger import logger
from asgi_realtime.runs.store import RunStore

MAX_ACCOUNTS = 1000
MAX_ACCOUNT_RUNS = 50_000
"""How many accounts, and runs in all accounts, this process remembers. Forgotten ones are read again."""

RETRY_AFTER_S = 5.0
"""When a rejected request can be sent again, if nothing says when a run ends."""

_MINUTE_MS = 60_000
_RUN_BYTES = 3072
"""What a run takes in addition to its contents, roughly."""
_INPUT_BYTES = 512
"""The same for an input."""
_PAGE = 10
"""Records loaded at once. Each comes with its payload and output."""


class _Entry(NamedTuple):
    """A run in an account."""

    version: int
    size: int
    ended_at_ms: int | None


class _Account:
    """What one owner has."""

    def __init__(self, owner: str) -> None:
        self.topic = owner_topic(owner)
        self.cursor: Cursor | None = None
        self.runs: dict[str, _Entry] = {}
        self.reserved: dict[str, int] = {}
        """The sizes of the runs that are being created."""
        self.inputs: dict[str, int] = {}
        """What arrived in this process as inputs, by run. Inputs can go to runs of the host too."""
        self.created_ms: list[int] = []
        """When the runs of the last minute were created, in ascending order."""
        self.reading = anyio.Lock(fast_acquire=True)

    @property
    def open_runs(self) -> int:
        return sum(entry.ended_at_ms is None for entry in self.runs.values()) + len(self._unlisted())

    @property
    def open_bytes(self) -> int:
        """What cannot be removed."""
        listed = sum(entry.size for entry in self.runs.values() if entry.ended_at_ms is None)
        inputs = sum(size for run_id, size in self.inputs.items() if not self._has_ended(run_id))
        return listed + inputs + sum(self._unlisted().values())

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.runs.values()) + sum(self.inputs.values())

    def recent_runs(self, now_ms: int) -> int:
        """How many runs were created within the last minute, or are being created."""
        del self.created_ms[: bisect.bisect_right(self.created_ms, now_ms - _MINUTE_MS)]
        return len(self.created_ms) + len(self._unlisted())

    def put(self, record: StoredRecord, now_ms: int) -> None:
        """List a version of a run, unless a newer one is listed."""
        known = self.runs.get(record.id)
        if known is None and record.created_at_ms > now_ms - _MINUTE_MS:
            bisect.insort(self.created_ms, record.created_at_ms)
        if known is None or known.version <= record.version:
            self.runs[record.id] = _Entry(record.version, _record_bytes(record), record.completed_at_ms)

    def drop(self, run_id: str) -> None:
        self.runs.pop(run_id, None)
        self.inputs.pop(run_id, None)

    def _unlisted(self) -> dict[str, int]:
        return {run_id: size for run_id, size in self.reserved.items() if run_id not in self.runs}

    def _has_ended(self, run_id: str) -> bool:
        entry = self.runs.get(run_id)
        return entry is not None and entry.ended_at_ms is not None


class Reservation:
    """Places for runs that are being created. Leaving it releases those that `keep` did not list."""

    def __init__(self, account: _Account, sizes: Mapping[str, int]) -> None:
        self._account = account
        self._sizes = sizes

    def __enter__(self) -> Reservation:
        self._account.reserved.update(self._sizes)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for run_id in self._sizes:
            self._account.reserved.pop(run_id, None)

    def keep(self, records: Iterable[StoredRecord], now_ms: int) -> None:
        """These runs exist."""
        for record in records:
            self._account.put(record, now_ms)


class Budgets:
    """The accounts of all owners that this process serves."""

    def __init__(self, runs: RunStore, limits: Limits) -> None:
        self._runs = runs
        self._limits = limits
        self._accounts: dict[str, _Account] = {}  # in order of use

    async def reserve(self, owner: str, records: Sequence[StoredRecord]) -> Reservation:
        """Reserve places for new runs, all or none. The caller enters the reservation at once, without suspending.

        Raises `LimitExceeded`: 429 if the same request can succeed later, else 422.
        """
        for record in records:
            self._check_delay(record)
        account = self._account(owner)
        sizes = {record.id: _record_bytes(record) for record in records}
        await self._read(account)
        if self._excess(account, sizes) is not None:
            await self._read(account, all=True)  # a run can have disappeared without an end
            excess = self._excess(account, sizes)
            if excess is not None:
                raise excess
        return Reservation(account, sizes)

    async def trim(self, owner: str) -> None:
        """Remove the runs of an owner that ended longest ago, until it is within its budgets."""
        account = self._account(owner)
        limits = self._limits
        most = min(limits.runs_per_owner, max(1, min(limits.feed_runs, limits.topic_runs) // 2))
        ended = [(entry.ended_at_ms, id) for id, entry in account.runs.items() if entry.ended_at_ms is not None]
        ended.sort(key=operator.itemgetter(0))  # of runs that ended in the same millisecond, the one listed first
        try:
            for _, run_id in ended:
                if len(account.runs) <= most and account.bytes <= limits.bytes_per_owner:
                    return
                await self._runs.broker.remove(run_id)
                account.drop(run_id)
        except BrokerUnavailable as exc:  # the run that the caller created exists; the next one removes the rest
            logger.warning("the oldest runs of an owner could not be removed: %s", exc)

    def count_batch(self, owner: str) -> None:
        """An open batch is stored too, so it counts as a run of the minute, in this process. Raises `LimitExceeded`
        (429)."""
        account, now_ms = self._account(owner), self._runs.now_ms()
        excess = self._rate_excess(account, 1, now_ms)
        if excess is not None:
            raise excess
        bisect.insort(account.created_ms, now_ms)

    @asynccontextmanager
    async def input(self, owner: str, run_id: str, size: int) -> AsyncIterator[None]:
        """Charge data that is sent to a run, unless storing it fails. Raises `LimitExceeded` (429)."""
        account = self._account(owner)
        size += _INPUT_BYTES
        if self._bytes_excess(account, size) is not None:
            await self._read(account, all=True)
            await self._drop_inputs(account)
            excess = self._bytes_excess(account, size)
            if excess is not None:
                raise excess
        account.inputs[run_id] = account.inputs.get(run_id, 0) + size
        try:
            yield
        except BaseException:
            if run_id in account.inputs:
                account.inputs[run_id] -= size
            raise

    # Checks

    def _check_delay(self, record: StoredRecord) -> None:
        limit = self._limits.delay_per_owner
        if record.delay_until_ms is not None and record.delay_until_ms - record.created_at_ms > limit * 1000:
            seconds = (record.delay_until_ms - record.created_at_ms) / 1000
            raise LimitExceeded(
                f"delay is {seconds:.0f} seconds, limit {limit:.0f} for a public token (Limits.delay_per_owner)"
            )

    def _excess(self, account: _Account, sizes: Mapping[str, int]) -> LimitExceeded | None:
        limits = self._limits
        new = {run_id: size for run_id, size in sizes.items() if run_id not in account.runs}
        if not new:
            return None
        excess = self._rate_excess(account, len(new), self._runs.now_ms())
        if excess is not None:
            return excess
        if (has := account.open_runs) + len(new) > limits.open_runs_per_owner:
            return _over(f"has {has} open runs", len(new), limits.open_runs_per_owner, "open_runs_per_owner")
        return self._bytes_excess(account, sum(new.values()))

    def _rate_excess(self, account: _Account, new: int, now_ms: int) -> LimitExceeded | None:
        recent, limit = account.recent_runs(now_ms), self._limits.runs_per_minute_per_owner
        if recent + new <= limit:
            return None
        first = min(recent + new - limit, len(account.created_ms))  # so many must be a minute old
        wait_s = (account.created_ms[first - 1] + _MINUTE_MS - now_ms) / 1000 if first else RETRY_AFTER_S
        return _over(f"triggered {recent} runs within a minute", new, limit, "runs_per_minute_per_owner", wait_s)

    def _bytes_excess(self, account: _Account, size: int) -> LimitExceeded | None:
        has, limit = account.open_bytes, self._limits.bytes_per_owner
        return _over(f"has {has} bytes in open runs", size, limit, "bytes_per_owner") if has + size > limit else None

    # Read

    def _account(self, owner: str) -> _Account:
        account = self._accounts.pop(owner, None)
        if account is None:
            self._forget()
            account = _Account(owner)
        self._accounts[owner] = account
        return account

    def _forget(self) -> None:
        """Make room for an account: forget those that were not used for longest."""
        runs = sum(len(account.runs) for account in self._accounts.values())
        for owner, account in list(self._accounts.items()):
            if len(self._accounts) < MAX_ACCOUNTS and runs < MAX_ACCOUNT_RUNS:
                return
            if not account.reserved:
                runs -= len(account.runs)
                del self._accounts[owner]

    async def _read(self, account: _Account, *, all: bool = False) -> None:
        """Bring an account up to date. With `all`, also drop the runs that are gone."""
        async with account.reading:
            after = None if all else account.cursor
            while True:
                listed = list(account.runs)  # a run that is created while this waits may be missing in what it reads
                changes = await self._runs.retry(
                    self._runs.broker.changes, account.topic, after=after, limit=self._limits.topic_runs
                )
                if changes.snapshot:
                    for run_id in set(listed).difference(change.run_id for change in changes.items):
                        account.drop(run_id)
                await self._apply(account, changes)
                account.cursor = after = changes.cursor
                if len(changes.items) < self._limits.topic_runs or changes.snapshot:
                    return

    async def _apply(self, account: _Account, changes: Changes) -> None:
        known = account.runs
        changed = [item.run_id for item in changes.items if _is_news(known.get(item.run_id), item.version)]
        for start in range(0, len(changed), _PAGE):
            page = changed[start : start + _PAGE]
            for run_id, record in zip(page, await self._runs.retry(self._runs.load, page), strict=True):
                if record is None:
                    account.drop(run_id)
                else:
                    account.put(record, self._runs.now_ms())

    async def _drop_inputs(self, account: _Account) -> None:
        """Forget the inputs of runs that are gone."""
        run_ids = list(account.inputs)
        for start in range(0, len(run_ids), _PAGE):
            page = run_ids[start : start + _PAGE]
            for run_id, record in zip(page, await self._runs.retry(self._runs.load, page), strict=True):
                if record is None:
                    account.inputs.pop(run_id, None)


def _is_news(known: _Entry | None, version: int) -> bool:
    return known is None or (known.ended_at_ms is None and known.version < version)


def _record_bytes(record: StoredRecord) -> int:
    return _RUN_BYTES + content_bytes(record)


def _over(has: str, new: int, limit: int, name: str, wait_s: float = RETRY_AFTER_S) -> LimitExceeded:
    message = f"the owner of this token {has}, and this request adds {new}; limit {limit} (Limits.{name})"
    if new > limit:
        return LimitExceeded(message)
    return LimitExceeded(f"{message}; try later", status=429, retry_after_s=wait_s)
