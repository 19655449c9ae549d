"""Which ended runs the memory broker removes to make room, and which requests it rejects."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.brokers import MemoryBroker
from asgi_realtime.brokers.base import ChangeMark, Producer, StreamKey
from asgi_realtime.brokers.memory_costs import MARK, claim_cost, record_cost, stream_cost
from asgi_realtime.core.config import Retention
from asgi_realtime.core.errors import InvalidConfiguration, LimitExceeded, RunNotFound, StreamClosed
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.testing.conformance.kit import next_version

pytestmark = pytest.mark.anyio

TOTAL = 100_000
SHARE = 75_000
"""What owners can hold together."""


def broker_of(total: int = TOTAL) -> MemoryBroker:
    return MemoryBroker(retention=Retention(total_bytes=total))


async def create(broker: MemoryBroker, run_id: str, owner: str | None = None, size: int = 0) -> StoredRecord:
    """A run that costs 4096 bytes and `size` more."""
    made = StoredRecord(
        id=run_id,
        task="t",
        status=Status.QUEUED,
        created_at_ms=0,
        updated_at_ms=0,
        token_owner=owner,
    )
    padding = 4096 + size - MARK - record_cost(made, made.topics)
    made = msgspec.structs.replace(made, payload_json=b"x" * padding)
    await broker.commit(made, expect=0, change=ChangeMark(run_id, 0))
    return made


async def end(broker: MemoryBroker, run: StoredRecord, at_ms: int = 1) -> None:
    ended = next_version(run, status=Status.COMPLETED, completed_at_ms=at_ms)
    await broker.commit(ended, expect=run.version, change=ChangeMark(run.id, 1))


async def create_ended(broker: MemoryBroker, run_id: str, owner: str | None = None, size: int = 0) -> None:
    await end(broker, await create(broker, run_id, owner, size))


async def test_the_first_run_that_does_not_fit_is_refused() -> None:
    broker = broker_of(2 * 4096)
    await create(broker, "a")
    with pytest.raises(LimitExceeded, match=r"holds 4096 bytes, limit 8192 \(Retention.total_bytes\); 4097") as caught:
        await create(broker, "b", size=1)
    assert caught.value.status == 503
    await create(broker, "b")
    assert broker.size == 8192


async def test_of_runs_that_ended_in_the_same_millisecond_the_first_ones_make_room() -> None:
    broker, names = broker_of(8 * 4096), "gbdfaceh"
    for run_id in names:
        await create_ended(broker, run_id)
    left = [run_id for run_id, record in zip(names, await broker.load(names), strict=True) if record is not None]
    assert 4 < len(left) < 8
    assert left == [*names[-len(left) :]]


async def test_a_run_makes_no_room_before_its_on_end_was_called() -> None:
    broker = broker_of(2 * 4096)
    await end(broker, msgspec.structs.replace(await create(broker, "a"), has_on_end=True))
    await create(broker, "b", size=-512)  # the end of the other run took some space
    with pytest.raises(LimitExceeded):
        await create(broker, "c")
    await broker.on_end_called("a")
    await create(broker, "c", size=-512)
    assert await broker.load(["a"]) == [None]


async def test_owners_never_use_the_share_of_the_host() -> None:
    broker = broker_of(4 * 4096)
    for owner in ("a", "b", "c"):
        await create(broker, owner, owner)
    with pytest.raises(LimitExceeded, match=r"hold 12288 bytes, limit 12288 \(.* less host_share\)") as caught:
        await create(broker, "d", "d")
    assert (caught.value.status, caught.value.retry_after_s) == (429, 10.0)
    await create(broker, "host")
    assert broker.size == 4 * 4096


async def test_while_owners_are_refused_the_host_continues() -> None:
    broker = broker_of()
    live = await create(broker, "live")
    await create(broker, "a", "a", size=SHARE - 2 * 4096)
    with pytest.raises(LimitExceeded):
        await create(broker, "b", "b", size=4096)
    with pytest.raises(LimitExceeded):
        await broker.append(StreamKey("a", "$trigger.input:x"), [b"x" * 4096], producer=Producer("p", 0))
    with pytest.raises(LimitExceeded):
        await broker.claim("key", "x" * 5000, ttl_s=10, owner="b")
    await broker.append(StreamKey("live", "s"), [b"x" * 1000])
    await create(broker, "another")
    await broker.claim("key", "x" * 5000, ttl_s=10)
    await end(broker, live)


async def test_a_live_stream_is_never_trimmed_to_make_room() -> None:
    broker = broker_of()
    await create(broker, "live")
    await broker.append(StreamKey("live", "s"), [b"x" * 1000] * 40)
    for number in range(100):
        await create_ended(broker, f"run {number}")
    page = await broker.read(StreamKey("live", "s"))
    assert (page.first, page.next) == (0, 40)


async def test_a_chunk_of_the_host_is_refused_only_if_unfinished_runs_fill_the_broker() -> None:
    broker = broker_of()
    run = await create(broker, "live")
    await create_ended(broker, "old", size=40_000)
    chunk = [b"x" * 30_000]
    await broker.append(StreamKey("live", "s"), chunk)
    await broker.append(StreamKey("live", "s"), chunk)
    assert "old" not in broker._runs
    await broker.append(StreamKey("live", "s"), chunk)
    with pytest.raises(LimitExceeded):
        await broker.append(StreamKey("live", "s"), chunk)
    await end(broker, run)
    with pytest.raises(StreamClosed):
        await broker.append(StreamKey("live", "s"), chunk)


async def test_a_stream_at_its_own_limit_continues_in_a_full_broker() -> None:
    broker = MemoryBroker(retention=Retention(total_bytes=20_000, stream_bytes=5000))
    await create(broker, "live")
    await broker.append(StreamKey("live", "s"), [b"x" * 900] * 8)
    await create(broker, "fill", size=20_000 - broker.size - 4096)
    await broker.append(StreamKey("live", "s"), [b"x" * 900])
    assert (await broker.read(StreamKey("live", "s"))).next == 9


async def test_the_owner_that_holds_the_most_loses_its_oldest_ended_runs() -> None:
    broker = broker_of()
    for number in range(10):
        await create_ended(broker, f"big {number}", "big")
    for number in range(8):
        await create_ended(broker, f"small {number}", "small")
    await create(broker, "new", "new")
    assert [run_id for run_id in broker._runs if run_id.startswith("small")] == [f"small {n}" for n in range(8)]
    assert "big 0" not in broker._runs
    assert "big 9" in broker._runs


async def test_an_owner_displaces_its_own_runs_before_those_of_smaller_owners() -> None:
    broker = broker_of()
    await create_ended(broker, "small", "small")
    for number in range(100):
        await create_ended(broker, f"big {number}", "big")
    assert "small" in broker._runs
    await create(broker, "open", "big", size=50_000)
    with pytest.raises(LimitExceeded):
        await create(broker, "another", "big", size=20_000)
    assert "small" in broker._runs, "though its removal would have made room for a part"


async def test_owners_displace_only_what_the_host_holds_beyond_its_share() -> None:
    broker = broker_of()
    for number in range(24):
        await create_ended(broker, f"host {number}")
    for number in range(30):
        await create_ended(broker, f"a {number}", "a")
    assert broker._space.host.size >= TOTAL - SHARE - 4096 - MARK
    assert broker._space.owners_size > 0
    for number in range(100):
        await create_ended(broker, f"b {number}", f"owner {number}")
    assert broker._space.host.size >= TOTAL - SHARE - 4096 - MARK


async def test_the_host_displaces_its_own_ended_runs_first() -> None:
    broker = broker_of()
    await create_ended(broker, "of an owner", "a")
    await create_ended(broker, "of the host", size=40_000)
    await create(broker, "first", size=50_000)
    assert [*broker._runs] == ["of an owner", "first"]
    await create(broker, "second", size=40_000)
    assert [*broker._runs] == ["first", "second"]


async def test_a_full_broker_warns_until_a_run_ends() -> None:
    broker = broker_of(2 * 4096)
    run = await create(broker, "a")
    for owner, whose in ((None, "the host"), ("o", "public tokens")):
        with pytest.raises(LimitExceeded):
            await create(broker, "b", owner, size=4096)
        await broker.ping()
        assert f"the memory broker is full and refuses data of {whose}" in broker.warnings[-1]
    await end(broker, run)
    await broker.ping()
    assert broker.warnings == ()


async def test_an_expired_claim_makes_room() -> None:
    now = [0.0]
    broker = MemoryBroker(retention=Retention(total_bytes=10_000), clock=lambda: now[0])
    await broker.claim("key", "x" * 5000, ttl_s=10)
    with pytest.raises(LimitExceeded):
        await create(broker, "a", size=2000)
    now[0] = 11
    await create(broker, "a", size=2000)


@pytest.mark.parametrize("share", [1.01, 0, -1])
def test_the_share_of_the_host_is_a_part(share: Any) -> None:
    with pytest.raises(InvalidConfiguration, match=r"Retention\.host_share"):
        Retention(host_share=share)


OWNERS = st.sampled_from([None, "a", "b", "c"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), OWNERS, st.integers(0, 20_000)),
        st.tuples(st.sampled_from(["append", "end"]), st.integers(0, 30), st.integers(0, 9000)),
        st.tuples(st.just("claim"), OWNERS, st.integers(0, 3000)),
        st.tuples(st.just("remove"), st.integers(0, 30), st.just(0)),
    ),
    max_size=60,
)


def recounted(broker: MemoryBroker, owner: str | None) -> int:
    """What a party holds, counted anew."""
    runs = [run for run in broker._runs.values() if run.record.token_owner == owner]
    size = sum(record_cost(run.record, run.record.topics) + MARK * len(run.marks) for run in runs)
    size += sum(stream_cost(live.log) for run in runs for live in run.streams.values())
    for key, (value, _) in broker._claims.items():
        party = broker._claim_parties.get(key)
        if (None if party is None else party.name) == owner:
            size += claim_cost(key, value)
    return size


@given(steps=STEPS)
async def test_any_history_keeps_the_rules(steps: list[tuple[str, Any, int]]) -> None:
    broker = broker_of()
    space = broker._space
    removed: list[tuple[str | None, bool, int]] = []
    remove = broker._remove

    def noting(run_id: str) -> None:
        run = broker._runs[run_id]
        removed.append((run.record.token_owner, run.record.is_completed, run.party.size))
        remove(run_id)

    space._remove = noting
    for number, (step, which, size) in enumerate(steps):
        runs = [*broker._runs.values()]
        run = runs[which % len(runs)] if runs and step in ("append", "end", "remove") else None
        by = which if step in ("create", "claim") else None if run is None else run.record.token_owner
        before = space.party(by).size
        removed.clear()
        try:
            if step == "create":
                await create(broker, f"run {number}", which, size)
            elif step == "claim":
                await broker.claim(f"key {number}", "x" * size, ttl_s=100, owner=which)
            elif run is not None and step == "remove" and run.record.is_completed:
                await broker.remove(run.record.id)
            elif run is not None and step == "append":
                await broker.append(StreamKey(run.record.id, "s"), [b"x" * size])
            elif run is not None and step == "end" and not run.record.is_completed:
                await end(broker, run.record, number)
        except (LimitExceeded, StreamClosed, RunNotFound):
            pass
        for owner, is_completed, held in removed:
            assert is_completed
            if by is not None:
                assert owner == by or held >= before + (TOTAL - SHARE if owner is None else 0)
        assert space.size <= TOTAL + MARK * len(steps)
        assert space.owners_size <= SHARE + MARK * len(steps), "the end of a run is never refused"
        assert space.size == sum(recounted(broker, owner) for owner in (None, "a", "b", "c"))
        for owner in (None, "a", "b", "c"):
            assert space.party(owner).size == recounted(broker, owner)
    for run_id in [*broker._runs]:
        await broker.remove(run_id)
    for key in [*broker._claims]:
        broker._drop_claim(key)
    assert (space.size, space._owners, space._evictable) == (0, {}, {})
