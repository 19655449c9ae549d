"""How many subscriptions are open, in this process, for each run and for each token; and bodies of each token."""

from __future__ import annotations

from collections import Counter

from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import LimitExceeded

MAX_PROBES = 20
"""Streams of `GET /v1/health` open at once in this process. They need no token."""

MAX_BODIES_PER_TOKEN = 100
"""Requests with a body (POST, PUT) that one public token can have open at once in this process."""

PROBE = "probe"
"""What stands in place of a token where none is needed: all probes of the health are counted under it."""


class SubscriptionLimits:
    """Counts, and refuses what is over a limit. An empty name is not counted."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_run: Counter[str] = Counter()
        self._by_token: Counter[str] = Counter()
        self._bodies: Counter[str] = Counter()
        self.open = 0

    def acquire(self, run_id: str, token_id: str) -> None:
        """Count one subscription more. Raises `LimitExceeded` (429) and then counts nothing."""
        limits = self._limits
        _check("this server", self.open, limits.subscribers)
        _check("this run", self._by_run[run_id] if run_id else 0, limits.subscribers_per_run)
        if token_id == PROBE:
            _check("the health of this server", self._by_token[token_id], MAX_PROBES)
        _check("this token", self._by_token[token_id] if token_id else 0, limits.subscribers_per_token)
        self.open += 1
        if run_id:
            self._by_run[run_id] += 1
        if token_id:
            self._by_token[token_id] += 1

    def release(self, run_id: str, token_id: str) -> None:
        """Count one less, with the names it was taken with."""
        self.open -= 1
        for counter, name in ((self._by_run, run_id), (self._by_token, token_id)):
            if name:
                _uncount(counter, name)

    def acquire_body(self, token_id: str) -> None:
        """Count one open request with a body. Raises `LimitExceeded` (429) and then counts nothing."""
        if self._bodies[token_id] >= MAX_BODIES_PER_TOKEN:
            raise LimitExceeded(
                f"this token has {MAX_BODIES_PER_TOKEN} requests open that send a body, the limit", status=429
            )
        self._bodies[token_id] += 1

    def release_body(self, token_id: str) -> None:
        _uncount(self._bodies, token_id)


def _uncount(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


def _check(what: str, taken: int, limit: int) -> None:
    if taken >= limit:
        raise LimitExceeded(
            f"{what} has {taken} open subscriptions, limit {limit}; close one, or try later", status=429
        )
