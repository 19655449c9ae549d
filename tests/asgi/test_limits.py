from __future__ import annotations

import pytest

from asgi_realtime.asgi.limits import MAX_PROBES, PROBE, SubscriptionLimits
from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import LimitExceeded


def test_a_rejected_subscription_is_not_counted() -> None:
    counts = SubscriptionLimits(Limits(subscribers=3, subscribers_per_run=2, subscribers_per_owner=1))
    counts.acquire("run_1", "a")
    for run_id, owner, limit in (("run_2", "a", 1), ("run_1", "a", 1)):
        with pytest.raises(LimitExceeded, match=f"this owner has 1 open subscriptions, limit {limit}; ") as refused:
            counts.acquire(run_id, owner)
        assert (refused.value.status, refused.value.retry_after_s) == (429, 5.0)
    counts.acquire("run_1", "")
    with pytest.raises(LimitExceeded, match="this run has 2 open subscriptions, limit 2"):
        counts.acquire("run_1", "b")
    counts.acquire("", "b")
    with pytest.raises(LimitExceeded, match="this server has 3"):
        counts.acquire("", "c")
    assert counts.open == 3


def test_released_names_are_forgotten() -> None:
    counts = SubscriptionLimits(Limits(subscribers_per_run=1))
    for number in range(5):
        counts.acquire("run_1", str(number))
        counts.release("run_1", str(number))
    assert counts.open == 0
    assert not counts._by_run and not counts._by_owner and not counts._by_run_and_owner


def test_an_owner_holds_at_most_as_many_as_are_free() -> None:
    """Otherwise two owners with half of all each would leave nothing."""
    counts = SubscriptionLimits(Limits(subscribers=1000))
    for owner, open_then in (("a", 500), ("b", 750), ("c", 875)):
        with pytest.raises(LimitExceeded, match=r"\(as many as are free\)"):
            for _ in range(1000):
                counts.acquire("", owner)
        assert counts.open == open_then
    counts.acquire("", "newcomer")
    counts.acquire("", "")  # the secret key


def test_an_owner_cannot_take_all_of_a_run() -> None:
    counts = SubscriptionLimits(Limits(subscribers_per_run=4))
    counts.acquire("run_2", "a")
    for _ in range(2):
        counts.acquire("run_1", "a")
    with pytest.raises(LimitExceeded, match=r"limit 2 \(as many as are free\)"):
        counts.acquire("run_1", "a")
    counts.acquire("run_1", "b")
    counts.acquire("run_2", "a")


def test_probes_have_a_limit_of_their_own() -> None:
    counts = SubscriptionLimits(Limits())
    for _ in range(MAX_PROBES):
        counts.acquire("", PROBE)
    with pytest.raises(LimitExceeded, match="/v1/health has 20 open subscriptions, limit 20"):
        counts.acquire("", PROBE)


def test_bodies_are_limited_per_owner() -> None:
    counts = SubscriptionLimits(Limits(bodies_per_owner=2))
    counts.acquire_body("a")
    counts.acquire_body("a")
    counts.acquire_body("b")
    with pytest.raises(LimitExceeded, match="this owner has 2 open requests that send a body, limit 2") as refused:
        counts.acquire_body("a")
    assert refused.value.status == 429
    counts.release_body("a", 0)
    counts.acquire_body("a")
    assert counts.open == 0
