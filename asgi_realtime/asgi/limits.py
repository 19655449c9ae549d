"""How many subscriptions and request bodies this process has open, by run and by owner.

The owner of a public token can use several tokens and gets new ones with each handle, so tokens are not counted. Nor
can a fixed limit per owner alone protect the others: two owners at half of the total would use all of it. An owner can
therefore hold at most as many subscriptions as are still free, in the process and in the run, so each further owner
leaves half of the rest (the dynamic threshold of shared-memory switches, Choudhury and Hahne 1998).
"""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import LimitExceeded

MAX_PROBES = 20
"""Streams of `GET /v1/health` open at once in this process. They need no token."""

PROBE = "\0probe"
"""The owner under which all probes are counted, because they have no token. No token can name it."""

RETRY_AFTER_S = 5.0
"""When a rejected request can be sent again. Nothing announces when others end."""

_FREE = " (as many as are free)"

T = TypeVar("T")


class SubscriptionLimits:
    """Counts what is open and rejects what exceeds a limit. An empty run id or owner is not counted."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_run: dict[str, int] = {}
        self._by_owner: dict[str, int] = {}
        self._by_run_and_owner: dict[tuple[str, str], int] = {}
        self._bodies: Counter[str] = Counter()
        self._body_bytes: Counter[str] = Counter()
        self.open = 0

    def open_of(self, run_id: str) -> int:
        """How many subscriptions of a run are open."""
        return self._by_run.get(run_id, 0)

    def acquire(self, run_id: str, owner: str) -> None:
        """Count one more subscription. Raises `LimitExceeded` (429) and then counts nothing."""
        limits, run_and_owner = self._limits, (run_id, owner)
        of_run = self._by_run.get(run_id, 0)
        of_owner = self._by_owner.get(owner, 0)
        of_both = self._by_run_and_owner.get(run_and_owner, 0)
        _check("this server", self.open, limits.subscribers)
        _check("this run", of_run, limits.subscribers_per_run)
        if owner == PROBE:
            _check("/v1/health", of_owner, MAX_PROBES)
        if owner:
            _check("this owner", of_owner, limits.subscribers_per_owner)
            _check("this owner", of_owner, limits.subscribers - self.open, note=_FREE)
            _check("this owner", of_both, limits.subscribers_per_run - of_run, note=_FREE)
        self.open += 1
        if run_id:
            self._by_run[run_id] = of_run + 1
        if owner:
            self._by_owner[owner] = of_owner + 1
        if run_id and owner:
            self._by_run_and_owner[run_and_owner] = of_both + 1

    def release(self, run_id: str, owner: str) -> None:
        """Count one subscription less, under the names it was acquired with."""
        self.open -= 1
        if run_id:
            _decrement(self._by_run, run_id)
        if owner:
            _decrement(self._by_owner, owner)
        if run_id and owner:
            _decrement(self._by_run_and_owner, (run_id, owner))

    def acquire_body(self, owner: str) -> None:
        """Count one more request with a body. Raises `LimitExceeded` (429) and then counts nothing."""
        _check("this owner", self._bodies[owner], self._limits.bodies_per_owner, "requests that send a body")
        self._bodies[owner] += 1

    def add_body_bytes(self, owner: str, size: int) -> None:
        """Count more bytes of bodies. Raises `LimitExceeded` (429) and then counts nothing."""
        held, limit = self._body_bytes[owner], self._limits.body_bytes_per_owner
        if held + size > limit and self._bodies[owner] > 1:
            message = f"this owner sends bodies of {held + size} bytes at once, limit {limit}; send fewer, or try later"
            raise LimitExceeded(message, status=429, retry_after_s=RETRY_AFTER_S)
        self._body_bytes[owner] += size

    def release_body(self, owner: str, size: int) -> None:
        """Count one request with a body less, and its bytes."""
        _decrement(self._bodies, owner)
        _decrement(self._body_bytes, owner, size)


def _decrement(counts: dict[T, int], key: T, by: int = 1) -> None:
    counts[key] -= by
    if not counts[key]:
        del counts[key]


def _check(what: str, count: int, limit: int, kind: str = "subscriptions", *, note: str = "") -> None:
    if count >= limit:
        message = f"{what} has {count} open {kind}, limit {limit}{note}; close one, or try later"
        raise LimitExceeded(message, status=429, retry_after_s=RETRY_AFTER_S)
