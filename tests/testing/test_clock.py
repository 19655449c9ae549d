"""The fake clock, and the library on it."""

from __future__ import annotations

import anyio
import pytest

from asgi_realtime import ExpiredToken, Realtime, Retention, RunNotFound, Status, Timeouts, UsageError, current_run
from asgi_realtime.testing import AsgiClient, FakeClock, expired_token
from tests.inprocess import GUARD_S, SECRET, ended

pytestmark = pytest.mark.anyio

NEVER = Timeouts(tick=3600.0, drain=0.02)
"""The ticker never fires in these tests, so only the clock makes things happen."""


def make(clock: FakeClock, **settings: object) -> Realtime:
    options: dict[str, object] = {"secret_key": SECRET, "signals": False, "timeouts": NEVER} | settings
    return Realtime(clock=clock, **options)  # type: ignore[arg-type]


def test_it_stands_still_until_it_is_moved() -> None:
    clock = FakeClock(1000.0)
    steady = clock.steady()
    assert clock() == clock() == 1000.0
    clock.move("1m30s")
    clock.move(0.5)
    assert clock() == 1090.5
    assert clock.steady() - steady >= 90.5
    assert repr(clock) == "<FakeClock 1090.500, moved by 90.5 s>"
    with pytest.raises(UsageError):
        clock.move(-1)


async def test_advance_without_a_follower() -> None:
    clock = FakeClock(1000.0)
    await clock.advance("15m")
    assert clock() == 1900.0


async def test_a_token_expires() -> None:
    clock = FakeClock()
    realtime = make(clock)
    token = realtime.create_public_token(scopes=["read:runs"], expires_in="15m")
    await clock.advance("14m")
    assert realtime.verify_token(token).scopes == ("read:runs",)
    await clock.advance("61s")
    with pytest.raises(ExpiredToken):
        realtime.verify_token(token)


async def test_an_expired_token() -> None:
    for realtime in (make(FakeClock()), Realtime(secret_key=[SECRET, SECRET[::-1]], signals=False)):
        token = expired_token(realtime, scopes={"read": {"tags": "user:1"}})
        with pytest.raises(ExpiredToken):
            realtime.verify_token(token)
        async with AsgiClient(realtime, lifespan=False) as client:
            assert (await client.get("/v1/runs?tags=user:1", token=token)).status_code == 401
        await realtime.stop()


async def test_a_subscription_ends_with_its_token_at_once() -> None:
    clock = FakeClock()
    realtime = make(clock)
    async with realtime, realtime.open_run("sample") as run:
        token = realtime.create_public_token(scopes={"read": {"runs": run.id}}, expires_in="15m")
        async with AsgiClient(realtime, lifespan=False, token=token) as client:
            async with client.stream(f"/v1/runs/{run.id}") as response:
                assert (await response.next_event()).event == "run"
                await clock.advance("16m")
                events = [event async for event in response.aiter_events()]
                assert events[-1].json()["reason"] == "token_expired"
                assert response.ended


async def test_a_heartbeat_is_sent_without_a_real_wait() -> None:
    clock = FakeClock()
    realtime = make(clock)
    async with realtime, realtime.open_run("sample") as run:
        async with AsgiClient(realtime, lifespan=False, token=SECRET) as client:
            async with client.stream(f"/v1/runs/{run.id}") as response:
                await response.read_until("ready")
                for _ in range(2):
                    await anyio.wait_all_tasks_blocked()  # it now waits for something to send
                    await clock.advance("16s")
                    assert await response.chunk() == b": heartbeat\n"


async def test_delayed_runs_start_and_ended_runs_expire() -> None:
    clock = FakeClock()
    realtime = make(clock, retention=Retention(after_end=3600.0))

    @realtime.task("later")
    async def later() -> str:
        return "done"

    async with realtime:
        late = await realtime.trigger(later, delay="10m")
        await clock.advance("9m")
        assert (await realtime.get_run(late)).status is Status.DELAYED
        await clock.advance("2m")
        assert (await ended(realtime, late)).output == "done"
        await clock.advance("59m")
        assert (await realtime.get_run(late)).is_completed
        await clock.advance("2m")
        with pytest.raises(RunNotFound):
            await realtime.get_run(late)


async def test_a_queued_run_expires_while_an_executing_one_survives() -> None:
    clock = FakeClock()
    realtime = make(clock)
    release = anyio.Event()

    @realtime.task("busy", concurrency_limit=1)
    async def busy() -> str:
        await release.wait()
        return current_run().id

    async with realtime:
        first = await realtime.trigger(busy)
        async for record in realtime.subscribe_to_run(first):
            if record.status is Status.EXECUTING:
                break
        second = await realtime.trigger(busy, ttl="5m")
        await clock.advance("6m")  # longer than a lease
        assert (await realtime.get_run(second)).status is Status.EXPIRED
        assert (await realtime.get_run(first)).status is Status.EXECUTING
        release.set()
        with anyio.fail_after(GUARD_S):
            assert await first.result() == first.id


async def test_it_moves_every_running_realtime_on_it() -> None:
    clock = FakeClock()
    realtimes = [make(clock) for _ in range(3)]
    handles = []
    for realtime in realtimes:

        @realtime.task("later")
        async def later() -> int:
            return 1

        await realtime.start()
        handles.append(await realtime.trigger(later, delay="10m"))
    await realtimes[2].stop()
    await clock.advance("11m")
    assert [(await ended(realtime, run)).output for realtime, run in zip(realtimes[:2], handles, strict=False)] == [
        1,
        1,
    ]
    assert not realtimes[2].engine.running
    for realtime in realtimes[:2]:
        await realtime.stop()
