"""Runs whose id the host chooses, such as that of a row in its database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from asgi_realtime import Limits, Realtime, RunExists, Status, UsageError, current_run
from tests.inprocess import GUARD_S, ended, make_realtime

pytestmark = pytest.mark.anyio


@pytest.fixture
async def realtime() -> AsyncIterator[Realtime]:
    realtime = make_realtime(limits=Limits(key_length=10))

    @realtime.task("name")
    async def name() -> str:
        return current_run().id

    @realtime.task("waits")
    async def waits() -> None:
        await current_run().input("go").get(timeout=GUARD_S)

    async with realtime:
        yield realtime


async def test_every_call_that_creates_a_run_accepts_its_id(realtime: Realtime) -> None:
    async with realtime.open_run("r", run_id="42") as run:
        await realtime.append("a")
        assert run.id == run.handle.id == "42"
    assert realtime.pipe(["b"], run_id="msg-1.b_C").handle.id == "msg-1.b_C"
    assert [chunk async for chunk in realtime.read("msg-1.b_C")] == ["b"]
    assert [chunk async for chunk in realtime.read("42")] == ["a"]
    typed = realtime.define_stream("typed", str)
    assert (await typed.pipe(["c"], run_id="typed").wait_until_complete()).chunks == 1
    handle = await realtime.trigger("name", run_id="named")
    assert (handle.id, handle.is_cached) == ("named", False)
    assert await handle.result(timeout=GUARD_S) == "named"
    record = await realtime.get_run("named")
    assert (record.id, record.root_id) == ("named", "named")
    assert (await realtime.trigger("name", run_id=None)).id.startswith("run_")

    def in_thread() -> None:
        with realtime.sync.open_run("r", run_id="sync") as run:
            assert run.handle.id == "sync"
        assert realtime.sync.pipe(["d"], run_id="sync-pipe").handle.id == "sync-pipe"
        assert realtime.sync.trigger("name", run_id="sync-name").id == "sync-name"

    await anyio.to_thread.run_sync(in_thread)


async def test_an_id_is_for_one_run(realtime: Realtime) -> None:
    handle = await realtime.trigger("waits", run_id="42")
    await all_calls_find_that_it_exists(realtime)
    await realtime.send_input(handle, "go", True)
    await handle.result(timeout=GUARD_S)
    await all_calls_find_that_it_exists(realtime)  # also once the run is over
    assert (await realtime.get_run("42")).status is Status.COMPLETED
    await (await realtime.trigger("name", run_id="43")).result(timeout=GUARD_S)
    with pytest.raises(RunExists, match="'43' exists already"):
        await realtime.trigger("name", run_id="43")


async def all_calls_find_that_it_exists(realtime: Realtime) -> None:
    with pytest.raises(RunExists, match="'42' exists already"):
        async with realtime.open_run("r", run_id="42"):
            raise AssertionError("the body must not run")
    with pytest.raises(RunExists) as caught:
        await realtime.trigger("name", run_id="42")
    assert (caught.value.status, caught.value.code) == (409, "run_exists")
    pipe = realtime.pipe(["other"], run_id="42")
    for wait in (pipe.wait_until_started, pipe.wait_until_complete):
        with pytest.raises(RunExists):
            await wait()

    def in_thread() -> None:
        calls: list[Callable[[], Any]] = [
            lambda: realtime.sync.pipe(["other"], run_id="42"),
            lambda: realtime.sync.trigger("name", run_id="42"),
            lambda: realtime.sync.open_run("r", run_id="42").__enter__(),
        ]
        for call in calls:
            with pytest.raises(RunExists):
                call()

    await anyio.to_thread.run_sync(in_thread)


async def test_a_triggered_run_that_has_expired_leaves_its_id_taken(realtime: Realtime) -> None:
    await (await realtime.trigger("name", run_id="42")).result(timeout=GUARD_S)
    await realtime.broker.remove("42")
    with pytest.raises(RunExists):
        await realtime.trigger("name", run_id="42")


@pytest.mark.parametrize("run_id", ["", ".", "..", "a b", "a/b", "a:b", "a#b", "é", "a\n", "{a}", "x" * 11, 42, b"a"])
async def test_an_id_must_be_safe_everywhere(realtime: Realtime, run_id: Any) -> None:
    for call in (
        lambda: realtime.open_run("r", run_id=run_id),
        lambda: realtime.pipe(["a"], run_id=run_id),
    ):
        with pytest.raises(UsageError, match="run_id"):
            call()
    with pytest.raises(UsageError, match="run_id"):
        await realtime.trigger("name", run_id=run_id)


async def test_what_an_id_excludes(realtime: Realtime) -> None:
    with pytest.raises(UsageError, match="run_id= and idempotency_key= both identify the run"):
        await realtime.trigger("name", run_id="42", idempotency_key="k")
    with pytest.raises(UsageError, match="unknown option run_id"):
        await realtime.batch_trigger([("name", None, {"run_id": "42"})])
    async with realtime.open_run("r"):
        with pytest.raises(UsageError, match="run_id= is for a run that pipe"):
            realtime.pipe(["a"], run_id="42")


async def test_of_concurrent_calls_one_creates_the_run(realtime: Realtime) -> None:
    pipes = [realtime.pipe([n], run_id="42") for n in range(5)]
    taken = 0
    for pipe in pipes:
        try:
            await pipe.wait_until_complete()
        except RunExists:
            taken += 1
    assert taken == 4
    assert (await ended(realtime, "42")).status is Status.COMPLETED
