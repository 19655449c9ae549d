from __future__ import annotations

from typing import Any

import anyio
import pytest

from asgi_realtime import (
    LimitExceeded,
    Limits,
    Run,
    RunCanceled,
    RunEnded,
    RunFailed,
    RunNotFound,
    UsageError,
)
from tests.inprocess import GUARD_S, make_realtime, until

pytestmark = pytest.mark.anyio


async def test_inputs_arrive_in_order() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task(run: Run) -> list[Any]:
        first = await run.input("approval").get(timeout=GUARD_S)
        assert run.input("approval") is run.input("approval")
        rest = [await run.input("approval").get() for _ in range(2)]
        other = await run.input("other").get()
        return [first, *rest, other]

    async with realtime:
        handle = await realtime.trigger(task)
        for data in ({"ok": True}, 2, None):
            await realtime.send_input(handle, "approval", data)
        await realtime.send_input(handle.id, "other", "x")
        assert await handle.result(timeout=GUARD_S) == [{"ok": True}, 2, None, "x"]
        assert (await realtime.get_run(handle)).streams == ()


async def test_inputs_can_be_iterated_until_the_run_ends() -> None:
    async with make_realtime() as realtime:
        got: list[Any] = []
        async with anyio.create_task_group() as group:
            async with realtime.open_run("r") as run:

                async def collect() -> None:
                    async for data in run.input("in"):
                        got.append(data)  # noqa: PERF401 - one by one, as they come

                group.start_soon(collect)
                await realtime.send_input(run, "in", 1)
                await realtime.send_input(run, "in", 2)
                await until(lambda: len(got) == 2)
        assert got == [1, 2]


async def test_each_input_goes_to_one_get() -> None:
    """Two calls that waited at once got the same data."""
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        got: list[Any] = []

        async def get() -> None:
            got.append(await run.input("in").get(timeout=GUARD_S))

        async with anyio.create_task_group() as group:
            group.start_soon(get)
            group.start_soon(get)
            await anyio.wait_all_tasks_blocked()
            await realtime.send_input(run, "in", 1)
            await realtime.send_input(run, "in", 2)
        assert sorted(got) == [1, 2]


async def test_a_get_that_times_out_loses_nothing() -> None:
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        with pytest.raises(TimeoutError, match=f"no data was sent to input 'in' of run '{run.id}' within 0.01 s"):
            await run.input("in").get(timeout=0.01)
        with pytest.raises(UsageError, match="timeout is 'soon'"):
            await run.input("in").get(timeout="soon")
        await realtime.send_input(run, "in", 1)
        assert await run.input("in").get(timeout=GUARD_S) == 1


async def test_a_get_ends_with_the_run() -> None:
    async with make_realtime() as realtime:
        runs: list[Run] = []
        async with realtime.open_run("completes") as run:
            runs.append(run)
            await realtime.send_input(run, "in", "last")
        with pytest.raises(ValueError):
            async with realtime.open_run("fails") as run:
                runs.append(run)
                raise ValueError
        with pytest.raises(RunCanceled):
            async with realtime.open_run("canceled") as run:
                runs.append(run)
                await realtime.cancel(run)
        assert await runs[0].input("in").get() == "last"
        for run, error in zip(runs, (RunEnded, RunFailed, RunCanceled), strict=True):
            with pytest.raises(error) as caught:
                await run.input("in").get()
            assert type(caught.value) is error


async def test_inputs_have_limits_and_require_a_run() -> None:
    async with make_realtime(limits=Limits(input_bytes=5)) as realtime, realtime.open_run("r") as run:
        await realtime.send_input(run, "in", "123")
        with pytest.raises(LimitExceeded, match="is 6 bytes, limit 5"):
            await realtime.send_input(run, "in", "1234")
        with pytest.raises(UsageError, match="input id 'a/b'"):
            await realtime.send_input(run, "a/b", 1)
        with pytest.raises(LimitExceeded, match="input id is 129 characters, limit 128"):
            run.input("x" * 129)
        with pytest.raises(RunNotFound):
            await realtime.send_input("run_unknown", "in", 1)
