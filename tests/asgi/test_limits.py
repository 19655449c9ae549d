from __future__ import annotations

import pytest

from asgi_realtime.asgi import limits
from asgi_realtime.asgi.limits import SubscriptionLimits
from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import LimitExceeded


def test_a_rejected_subscription_is_not_counted() -> None:
    counts = SubscriptionLimits(Limits(subscribers=3, subscribers_per_run=2, subscribers_per_token=1))
    counts.acquire("run_1", "a")
    for run_id, token_id, limit in (("run_2", "a", 1), ("run_1", "a", 1)):
        with pytest.raises(LimitExceeded, match=f"limit {limit}") as refused:
            counts.acquire(run_id, token_id)
        assert refused.value.status == 429
    counts.acquire("run_1", "")
    with pytest.raises(LimitExceeded, match="this run has 2 open subscriptions, limit 2"):
        counts.acquire("run_1", "b")
    counts.acquire("", "b")
    with pytest.raises(LimitExceeded, match="this server has 3"):
        counts.acquire("", "c")
    assert counts.open == 3


def test_released_ids_are_forgotten() -> None:
    counts = SubscriptionLimits(Limits(subscribers_per_run=1))
    for number in range(5):
        counts.acquire("run_1", str(number))
        counts.release("run_1", str(number))
    assert counts.open == 0
    assert not counts._by_run and not counts._by_token


def test_bodies_are_limited_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BODIES_PER_TOKEN", 2)
    counts = SubscriptionLimits(Limits())
    counts.acquire_body("a")
    counts.acquire_body("a")
    counts.acquire_body("b")
    with pytest.raises(LimitExceeded, match="this token has 2 open requests that send a body, limit 2") as refused:
        counts.acquire_body("a")
    assert refused.value.status == 429
    counts.release_body("a")
    counts.acquire_body("a")
    assert counts.open == 0
