"""How many subscriptions and request bodies this process has open, by run and by token."""

from __future__ import annotations

from collections import Counter

from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import LimitExceeded

MAX_PROBES = 20
"""Streams of `GET /v1/health` open at once in this process. They need no token."""

MAX_BODIES_PER_TOKEN = 100
"""Requests with a body (POST, PUT) that one public token can have open at once in this process."""

PROBE = "probe"
"""The token id under which all probes are counted, because they have no token."""


class SubscriptionLimits:
    """Counts what is open and rejects what exceeds a limit. An empty run id or token id is not counted."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_run: Counter[str] = Counter()
        self._by_token: Counter[str] = Counter()
        self._bodies: Counter[str] = Counter()
        self.open = 0

    def acquire(self, run_id: str, token_id: str) -> None:
        """Count one more subscription. Raises `LimitExceeded` (429) and then counts nothing."""
        limits = self._limits
        _check("this server", self.open, limits.subscribers)
        _check("this run", self._by_run[run_id] if run_id else 0, limits.subscribers_per_run)
        if token_id == PROBE:
            _check("/v1/health", self._by_token[token_id], MAX_PROBES)
        _check("this token", self._by_token[token_id] if token_id else 0, limits.subscribers_per_token)
        self.open += 1
        if run_id:
            self._by_run[run_id] += 1
        if token_id:
            self._by_token[token_id] += 1

    def release(self, run_id: str, token_id: str) -> None:
        """Count one subscription less, under the ids it was acquired with."""
        self.open -= 1
        for counter, name in ((self._by_run, run_id), (self._by_token, token_id)):
            if name:
                _decrement(counter, name)

    def acquire_body(self, token_id: str) -> None:
        """Count one more request with a body. Raises `LimitExceeded` (429) and then counts nothing."""
        _check("this token", self._bodies[token_id], MAX_BODIES_PER_TOKEN, "requests that send a body")
        self._bodies[token_id] += 1

    def release_body(self, token_id: str) -> None:
        _decrement(self._bodies, token_id)


def _decrement(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


def _check(what: str, count: int, limit: int, kind: str = "subscriptions") -> None:
    if count >= limit:
        raise LimitExceeded(f"{what} has {count} open {kind}, limit {limit}; close one, or try later", status=429)
