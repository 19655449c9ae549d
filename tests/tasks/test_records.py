from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import anyio
import pytest

from asgi_realtime import LimitExceeded, Limits, RunError, RunNotFound, Status, UsageError
from asgi_realtime.core.names import check_key
from asgi_realtime.tasks.batches import new_batch_id
from asgi_realtime.tasks.records import new_run_id
from tests.inprocess import GUARD_S, FakeClock, ended, make_realtime, stored, until
from tests.tasks.echo import count_runs, with_echo

pytestmark = pytest.mark.anyio


async def test_tags_can_be_one_string() -> None:
    async with with_echo() as realtime:
        assert (await realtime.get_run(await realtime.trigger("echo", tags="user:1"))).tags == ("user:1",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tags": ["x"] * 3 + list("abcdefghij")}, LimitExceeded, "a run has 11 tags, limit 10"),
        ({"tags": "x" * 129}, LimitExceeded, "tag is 129 characters, limit 128"),
        ({"tags": [""]}, UsageError, "a tag is empty"),
        ({"tags": [1]}, UsageError, "a tag is a int; allowed is a str"),
        ({"metadata": {"x" * 129: 1}}, UsageError, "metadata key is 129 characters; allowed are 1 to 128"),
        ({"metadata": {"a": "x" * 300_000}}, LimitExceeded, "limit 262144"),
        ({"metadata": ["a"]}, UsageError, "metadata is a list; allowed is a dict"),
        ({"metadata": {"a": object()}}, UsageError, "object has no JSON form"),
        ({"idempotency_key": "x" * 513}, LimitExceeded, "idempotency_key is 513 characters, limit 512"),
        ({"idempotency_key": ""}, UsageError, "idempotency_key is ''; allowed is a non-empty str"),
        ({"idempotency_key": 3}, UsageError, "idempotency_key is 3"),
        ({"idempotency_key": "a\ud800b"}, UsageError, "contains a lone surrogate, which cannot be encoded as UTF-8"),
        ({"ttl": "soon"}, UsageError, "ttl is 'soon'"),
        ({"ttl": 0}, UsageError, "ttl is 0; it must be more than zero"),
        ({"delay": -1}, UsageError, "delay is -1; it must be more than zero"),
        ({"delay": datetime(2030, 1, 1)}, UsageError, "delay is 2030-01-01T00:00:00, without a time zone; pass one"),
        ({"delay": datetime(9999, 1, 1, tzinfo=UTC)}, UsageError, "it must be less than ten years from now"),
        ({"idempotency_key_ttl": 0}, UsageError, "idempotency_key_ttl is 0; it must be more than zero"),
        ({"max_duration": "long"}, UsageError, "max_duration is 'long'"),
        ({"token_expires_in": "1 year"}, UsageError, "token_expires_in is '1 year'"),
        ({"parent": "run_unknown"}, RunNotFound, "no run 'run_unknown'"),
        ({"tag": "x"}, UsageError, "unknown option tag; allowed: delay, idempotency_key, "),
        ({"parent": 3}, UsageError, "a run is a int; pass its id, a RunHandle, a Run or a RunRecord"),
    ],
)
async def test_invalid_options_are_rejected_before_anything_is_stored(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with with_echo() as realtime:
        with pytest.raises(error) as caught:
            await realtime.trigger("echo", 1, **{"tags": "seen"} | options)
        assert message in str(caught.value)
        assert await count_runs(realtime, "tag:seen") == 0


async def test_values_at_their_limits_are_accepted() -> None:
    async with with_echo() as realtime:
        handle = await realtime.trigger(
            "echo", tags=[*"abcdefghi", "x" * 128], metadata={"k" * 128: 1}, idempotency_key="i" * 512
        )
        assert len((await realtime.get_run(handle)).tags) == 10


async def test_a_delayed_run_starts_after_its_delay() -> None:
    clock = FakeClock()
    async with with_echo(clock=clock) as realtime:
        handle = await realtime.trigger("echo", "late", delay="1m")
        record = await stored(realtime, handle)
        assert record.status is Status.DELAYED
        assert record.delay_until_ms == record.created_at_ms + 60_000
        assert record.queued_at_ms is None
        clock.seconds += 59
        await realtime.broker.due("delay")
        assert (await realtime.get_run(handle)).status is Status.DELAYED
        clock.seconds += 2
        assert (await ended(realtime, handle)).output == "late"
        assert (await stored(realtime, handle)).queued_at_ms == int(clock.seconds * 1000)


async def test_a_delay_can_be_a_datetime() -> None:
    clock = FakeClock()
    async with with_echo(clock=clock) as realtime:
        at = datetime.fromtimestamp(clock.seconds + 90.5, timezone(timedelta(hours=2)))
        record = await stored(realtime, await realtime.trigger("echo", delay=at))
        assert (record.status, record.delay_until_ms) == (Status.DELAYED, record.created_at_ms + 90_500)
        clock.seconds += 91
        assert (await ended(realtime, record.id)).status is Status.COMPLETED
        past = await realtime.trigger("echo", 1, delay=at)
        assert (await stored(realtime, past)).delay_until_ms is None, (
            "clocks differ, so a time in the past is not an error"
        )
        assert await past.result(timeout=GUARD_S) == 1


async def test_a_delayed_run_can_be_canceled() -> None:
    clock = FakeClock()
    async with with_echo(clock=clock) as realtime:
        handle = await realtime.trigger("echo", delay=60)
        assert (await realtime.cancel(handle)).status is Status.CANCELED
        clock.seconds += 120
        assert await realtime.broker.due("delay") == []


async def test_max_duration_can_only_shorten_that_of_the_task() -> None:
    realtime = make_realtime()

    @realtime.task("endless", max_duration="1m")
    async def endless() -> None:
        await anyio.sleep_forever()

    @realtime.task("free")
    async def free() -> None:
        await anyio.sleep_forever()

    async with realtime:
        for task in (endless, free):
            record = await ended(realtime, await realtime.trigger(task, max_duration=0.01))
            assert (record.status, record.max_duration_s) == (Status.TIMED_OUT, 0.01)
        longer = await realtime.trigger(endless, max_duration="1h", delay="1h")
        assert (await realtime.get_run(longer)).max_duration_s == 60


async def test_a_run_that_does_not_start_within_its_ttl_is_expired() -> None:
    clock = FakeClock()
    realtime = make_realtime(clock=clock)
    go = anyio.Event()
    started: list[str] = []

    @realtime.task("t", concurrency_limit=1)
    async def task(payload: str) -> None:
        started.append(payload)
        await go.wait()

    async with realtime:
        await realtime.trigger(task, "first")
        waiting = await realtime.trigger(task, "second", ttl="10m")
        delayed = await realtime.trigger(task, "third", ttl="10m", delay="1h")
        await until(lambda: started)
        clock.seconds += 601
        record = await ended(realtime, waiting)
        assert record.status is Status.EXPIRED
        assert record.ttl_s == 600
        assert record.error == RunError("Expired", "the run was not started within its ttl")
        assert (await realtime.get_run(delayed)).status is Status.DELAYED  # the ttl starts after the delay
        await realtime.cancel(delayed)
        go.set()
    assert started == ["first"]


async def test_ids_are_random_and_valid_in_a_path() -> None:
    ids = {new_run_id() for _ in range(1000)} | {new_batch_id() for _ in range(1000)}
    assert len(ids) == 2000
    assert {len(one) for one in ids} == {len("run_") + 26, len("batch_") + 26}
    for one in ids:
        check_key(one, Limits(), what="run id")
