"""Claims, and the ping: what needs neither a run nor a stream.

Where real time has to pass, the tests wait a fraction of a second and then for a condition. They never assume that the
machine is fast: an attempt that took too long is repeated (`in_time`).
"""

from __future__ import annotations

import anyio
import pytest

from asgi_realtime.brokers.base import Broker
from asgi_realtime.testing.conformance.kit import SHORT_S, MakeBroker, eventually, in_time, new_tag, open_backend


@pytest.mark.anyio
async def test_the_first_claim_wins(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        assert await backend.broker.claim(key, "first", ttl_s=60) == "first"
        assert await backend.peer.claim(key, "second", ttl_s=60) == "first"
        assert await backend.broker.claim(key, "first", ttl_s=60) == "first"
        assert await backend.broker.claim(new_tag(), "second", ttl_s=60) == "second"


@pytest.mark.anyio
async def test_concurrent_claims_all_return_one_winner(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        found: list[str] = []

        async def claim(broker: Broker, value: str) -> None:
            found.append(await broker.claim(key, value, ttl_s=60))

        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(claim, backend.processes[number % 2], f"value {number}")
        assert len(found) == 10
        assert len(set(found)) == 1


@pytest.mark.anyio
async def test_a_claim_expires_by_the_brokers_clock(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:

        async def claim_twice() -> tuple[str, str]:
            key = new_tag()
            await backend.broker.claim(key, "first", ttl_s=SHORT_S)
            return key, await backend.peer.claim(key, "second", ttl_s=60)

        key, second = await in_time(backend, SHORT_S, claim_twice)
        assert second == "first"

        async def third_wins() -> bool:
            return await backend.peer.claim(key, "third", ttl_s=60) == "third"

        await eventually(backend, third_wins, "the claim expires; the second one has not prolonged it")
        assert await backend.broker.claim(key, "fourth", ttl_s=60) == "third"


@pytest.mark.anyio
async def test_a_claim_can_be_looked_up(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        assert await backend.peer.claimed(new_tag()) is None

        async def claim_and_look_up() -> tuple[str, list[str | None]]:
            key = new_tag()
            assert await backend.peer.claimed(key) is None
            assert await backend.broker.claim(key, "first: 1", ttl_s=SHORT_S) == "first: 1", "a look-up claims nothing"
            await backend.peer.claim(key, "second", ttl_s=60)
            return key, [await broker.claimed(key) for broker in backend.processes]

        key, found = await in_time(backend, SHORT_S, claim_and_look_up)
        assert found == ["first: 1"] * 2

        async def has_expired() -> bool:
            return [await broker.claimed(key) for broker in backend.processes] == [None, None]

        await eventually(backend, has_expired, "the claim expires; look-ups do not prolong it")
        await backend.peer.claim(key, "third", ttl_s=60)
        assert await backend.broker.claimed(key) == "third"


@pytest.mark.anyio
async def test_a_claim_replaces_only_the_expected_value(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        assert await backend.broker.claim(key, "first", ttl_s=60, instead_of="none") == "first", "it had no value"
        assert await backend.peer.claim(key, "second", ttl_s=60, instead_of="another") == "first"
        assert await backend.peer.claim(key, "second", ttl_s=60, instead_of="first") == "second"
        assert [await broker.claimed(key) for broker in backend.processes] == ["second"] * 2
        assert await backend.peer.claim(key, "second", ttl_s=60, instead_of="first") == "second", "a retry"
        assert await backend.broker.claim(key, "third", ttl_s=60, instead_of="first") == "second"


@pytest.mark.anyio
async def test_of_concurrent_replacements_one_succeeds(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        await backend.broker.claim(key, "old", ttl_s=60)
        found: list[str] = []

        async def replace(broker: Broker, value: str) -> None:
            found.append(await broker.claim(key, value, ttl_s=60, instead_of="old"))

        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(replace, backend.processes[number % 2], f"value {number}")
        assert len(found) == 10
        assert set(found) == {await backend.peer.claimed(key)} != {"old"}


@pytest.mark.anyio
async def test_a_replacement_has_its_own_lifetime(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        short, long = new_tag(), new_tag()

        async def replace_both() -> bool:
            await backend.broker.claim(long, "old", ttl_s=SHORT_S)
            await backend.broker.claim(short, "old", ttl_s=60)
            return await backend.peer.claim(long, "new", ttl_s=60, instead_of="old") == "new"

        assert await in_time(backend, SHORT_S, replace_both)
        assert await backend.peer.claim(short, "new", ttl_s=SHORT_S, instead_of="old") == "new"

        async def has_expired() -> bool:
            return await backend.broker.claimed(short) is None

        await eventually(backend, has_expired, "the shorter lifetime is over")
        assert await backend.broker.claimed(long) == "new"
        assert await backend.broker.claim(short, "third", ttl_s=60, instead_of="new") == "third"


@pytest.mark.anyio
async def test_ping_returns_if_the_broker_answers(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        for broker in backend.processes:
            await broker.ping()
            assert isinstance(broker.shared, bool)
