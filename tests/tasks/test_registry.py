from __future__ import annotations

from typing import Any

import anyio
import pytest

from asgi_realtime import (
    Run,
    RunNotFound,
    UnknownTask,
    UsageError,
)
from tests.inprocess import GUARD_S, make_realtime
from tests.tasks.echo import with_echo

pytestmark = pytest.mark.anyio


async def test_a_run_is_found_by_its_id_as_soon_as_there_is_a_handle() -> None:
    async with with_echo() as realtime:
        handle = await realtime.trigger("echo", 1, tags=["a", "b", "a"], metadata={"n": 1})
        record = await realtime.get_run(handle)
        assert record.id == handle.id
        assert record.task == "echo"
        assert record.tags == ("a", "b")
        assert record.metadata == {"n": 1}
        assert record.payload == 1
        assert record.parent_id is None and record.root_id == handle.id and record.depth == 0
        assert not handle.is_cached


async def test_an_unknown_task_is_rejected_with_the_list_of_registered_ones() -> None:
    async with with_echo() as realtime:
        with pytest.raises(UnknownTask, match="no task 'ecko' is registered; registered: echo"):
            await realtime.trigger("ecko")
    with pytest.raises(UnknownTask, match="registered: none"):
        await make_realtime().trigger("ecko")


async def test_a_task_of_another_realtime_is_unknown() -> None:
    other = make_realtime()

    @other.task("elsewhere")
    async def elsewhere() -> None: ...

    async with with_echo() as realtime:
        with pytest.raises(UnknownTask, match="no task 'elsewhere'"):
            await realtime.trigger(elsewhere)


async def test_a_run_that_is_triggered_in_a_run_is_its_child() -> None:
    realtime = make_realtime()

    @realtime.task("parent")
    async def parent() -> str:
        return (await realtime.trigger(child)).id

    @realtime.task("child")
    async def child(run: Run) -> str:
        assert run.parent is not None
        return (await realtime.trigger(grandchild)).id

    @realtime.task("grandchild")
    async def grandchild(run: Run) -> list[Any]:
        assert run.parent is not None
        return [run.parent.id, run.parent.task, run.root.id, run.root.task]

    async with realtime:
        top = await realtime.trigger(parent)
        child_id = await top.result(timeout=GUARD_S)
        grandchild_id = await realtime.result(child_id, timeout=GUARD_S)
        assert await realtime.result(grandchild_id, timeout=GUARD_S) == [child_id, "child", top.id, "parent"]
        records = [await realtime.get_run(run_id) for run_id in (top.id, child_id, grandchild_id)]
    assert [record.parent_id for record in records] == [None, top.id, child_id]
    assert [record.root_id for record in records] == [top.id] * 3
    assert [record.depth for record in records] == [0, 1, 2]


async def test_a_parent_can_be_named_in_any_form() -> None:
    async with with_echo() as realtime:
        handle = await realtime.trigger("echo")
        record = await realtime.get_run(handle)
        async with realtime.open_run("other") as other:
            for parent in (handle, handle.id, record):
                child = await realtime.get_run(await realtime.trigger("echo", parent=parent))
                assert child.parent_id == handle.id
            child = await realtime.get_run(await realtime.trigger("echo", parent=other))
            assert child.parent_id == other.id


async def test_the_current_run_of_another_realtime_is_not_a_parent() -> None:
    async with with_echo() as realtime, make_realtime() as other, other.open_run("elsewhere"):
        assert (await realtime.get_run(await realtime.trigger("echo"))).parent_id is None


async def test_the_first_trigger_starts_the_realtime() -> None:
    realtime = with_echo()
    handle = await realtime.trigger("echo", 1)
    assert await handle.result(timeout=GUARD_S) == 1
    await realtime.stop()


async def test_executing_an_unknown_run_or_task_raises() -> None:
    async with with_echo() as realtime:
        with pytest.raises(RunNotFound):
            await realtime.execute("run_unknown")
        async with realtime.open_run("unregistered") as run:
            with pytest.raises(UnknownTask):
                await realtime.execute(run.id)


async def test_waiting_for_a_result_ends_at_the_timeout() -> None:
    realtime = make_realtime()
    go = anyio.Event()

    @realtime.task("t")
    async def task() -> int:
        await go.wait()
        return 1

    async with realtime:
        handle = await realtime.trigger(task)
        with pytest.raises(TimeoutError, match=f"run '{handle.id}' has not ended within 0.01 s; it continues"):
            await handle.result(timeout=0.01)
        with pytest.raises(UsageError, match="timeout is -1"):
            await handle.result(timeout=-1)
        go.set()
        assert await handle.result(timeout="5s") == 1
        assert await handle.result() == 1
        with pytest.raises(RunNotFound):
            await realtime.result("run_unknown")


async def test_cancelling_a_wait_for_a_result_does_not_cancel_the_run() -> None:
    realtime = make_realtime()
    go = anyio.Event()

    @realtime.task("t")
    async def task() -> int:
        await go.wait()
        return 1

    async with realtime:
        handle = await realtime.trigger(task)
        with anyio.move_on_after(0.01):
            await handle.result()
        go.set()
        assert await handle.result(timeout=GUARD_S) == 1
