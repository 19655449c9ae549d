"""The conformance suite on the Redis broker: all of it on one server, part of it on Valkey and on a Cluster."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.testing import conformance
from asgi_realtime.testing.conformance import *  # noqa: F403
from asgi_realtime.testing.conformance import Backend, MakeBroker

pytestmark = [pytest.mark.redis]


class OnRedis:
    """`make_broker` for a server that all tests share. Each call has a new prefix."""

    guard_s = 30.0

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(
        self, *, limits: Limits, retention: Retention, timeouts: Timeouts
    ) -> AbstractAsyncContextManager[Backend]:
        return self._open(limits, retention, timeouts)

    @asynccontextmanager
    async def _open(self, limits: Limits, retention: Retention, timeouts: Timeouts) -> AsyncIterator[Backend]:
        prefix = f"t{secrets.token_hex(6)}"
        first, second = (
            RedisBroker(self.url, prefix=prefix, limits=limits, retention=retention, timeouts=timeouts)
            for _ in range(2)
        )
        async with first as broker, second as peer:
            yield Backend(broker=broker, peer=peer, held=lambda: broker.held + peer.held)


EVERYWHERE = {
    "test_the_first_claim_wins",
    "test_of_concurrent_replacements_one_succeeds",
    "test_a_claim_is_removed_with_its_run",
    "test_a_delayed_run_is_due_at_the_end_of_its_delay",
    "test_due_runs_are_listed_oldest_first_up_to_a_limit",
    "test_only_the_owner_renews_a_lease",
    "test_a_run_that_a_queue_has_is_not_due",
    "test_an_on_end_is_due_a_lease_after_the_end_and_taken_once",
    "test_a_run_is_not_removed_before_its_on_end_was_called",
    "test_the_readers_of_all_processes_count_until_they_expire",
    "test_the_readers_of_a_run_that_is_over_do_not_count",
    "test_a_removed_run_disappears_everywhere",
    "test_a_removal_wakes_the_followers_of_the_runs_topics",
    "test_ping_returns_if_the_broker_answers",
    "test_a_reader_gets_the_history_and_then_each_append",
    "test_whenever_a_reader_joins_and_leaves_nothing_is_lost_or_duplicated",
    "test_the_end_of_a_run_ends_all_its_streams_at_their_last_entry",
    "test_readers_of_a_removed_run_still_get_its_end",
    "test_a_record_is_loaded_as_it_was_stored",
    "test_a_commit_on_another_version_is_rejected_with_the_stored_record",
    "test_a_run_does_not_end_before_its_streams_have_what_was_acknowledged",
    "test_one_of_concurrent_committers_wins_each_version",
    "test_a_retried_commit_is_recognized_after_later_ones",
    "test_a_cancelled_commit_takes_full_effect_or_none",
    "test_record_and_run_topic_change_in_one_step",
    "test_inputs_are_rejected_at_the_limit_and_never_trimmed",
    "test_data_is_read_byte_for_byte",
    "test_concurrent_appends_are_serialized_and_never_interleaved",
    "test_a_stream_can_end_with_its_last_append",
    "test_a_gap_in_the_count_of_a_producer_is_rejected",
    "test_the_count_of_a_producer_outlives_its_entries_and_the_run",
    "test_lost_items_are_restored_in_their_place_or_not_at_all",
    "test_trimming_drops_the_oldest_entries_and_keeps_positions",
    "test_a_run_is_in_all_its_topics_when_the_commit_returns",
    "test_many_changes_are_read_in_pages_without_gaps",
    "test_an_unusable_cursor_gets_a_snapshot_at_once",
    "test_a_topic_retains_its_newest_runs_and_older_cursors_get_a_snapshot",
    "test_a_follower_gets_the_changes_of_every_process",
    "test_a_list_retains_the_runs_of_all_processes_that_changed_last",
    "test_a_list_never_exceeds_its_size",
}
"""The tests that also run on Valkey and on a Cluster: they use every script, keys of several slots, and every channel.
What the other tests find does not depend on the server."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make_broker" in metafunc.fixturenames:
        backends: list[Any] = ["redis"]
        if metafunc.function.__name__ in EVERYWHERE:
            backends += ["valkey", pytest.param("redis:cluster", marks=pytest.mark.cluster)]
        metafunc.parametrize("make_broker", backends, indirect=True)


@pytest.fixture
def make_broker(request: pytest.FixtureRequest) -> MakeBroker:
    if request.param == "redis:cluster":
        return OnRedis(request.getfixturevalue("redis_cluster").url)
    return OnRedis(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_the_tests_for_every_server_exist() -> None:
    assert set(conformance.__all__) >= EVERYWHERE
