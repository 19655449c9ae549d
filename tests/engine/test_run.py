from __future__ import annotations

import anyio
import pytest

from asgi_realtime import (
    LimitExceeded,
    Limits,
    Run,
    UsageError,
)
from tests.inprocess import ended, make_realtime, until

pytestmark = pytest.mark.anyio


async def test_a_child_changes_the_metadata_of_its_parent_and_root() -> None:
    realtime = make_realtime()

    @realtime.task("child")
    async def child(run: Run) -> str:
        assert run.parent is not None
        assert run.parent is run.root
        run.parent.metadata.increment("children")
        run.root.metadata.set("seen", run.parent.metadata.get("progress"))
        run.parent.tags.add("has-children")
        assert repr(run.parent) == f"<RelatedRun {run.parent.id} task='parent'>"
        return run.parent.task

    async with realtime:
        async with realtime.open_run("parent") as parent:
            parent.metadata.set("progress", 0.5)
            await parent.metadata.flush()
            assert await (await realtime.trigger(child)).result(timeout=5) == "parent"
            record = await realtime.get_run(parent)  # stored no later than the end of the child
            assert record.metadata == {"progress": 0.5, "children": 1, "seen": 0.5}
            assert record.tags == ("has-children",)
            parent.metadata.increment("children")
        assert (await ended(realtime, parent.id)).metadata["children"] == 2


async def test_a_run_without_a_parent_is_its_own_root() -> None:
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        assert run.parent is None
        assert run.root is run
        assert repr(run) == f"<Run {run.id} task='r'>"
        assert run.payload is None


async def test_a_removed_parent_is_none(caplog: pytest.LogCaptureFixture) -> None:
    realtime = make_realtime()
    go = anyio.Event()

    @realtime.task("child")
    async def child(run: Run) -> bool:
        if run.parent is None:
            return run.root is run
        await go.wait()
        run.parent.metadata.set("late", True)
        return False

    async with realtime:
        async with realtime.open_run("parent") as parent:
            waiting = await realtime.trigger(child)
            await until(lambda: waiting.id in realtime.engine.executions)
        delayed = await realtime.trigger(child, parent=parent, delay=0.001)
        await realtime.broker.remove(parent.id)
        assert await delayed.result(timeout=5) is True
        go.set()
        assert await waiting.result(timeout=5) is False  # the child completes regardless
    assert f"metadata of run {parent.id} is lost" in caplog.text


async def test_an_output_is_checked_when_it_is_set() -> None:
    async with make_realtime(limits=Limits(output_bytes=5)) as realtime, realtime.open_run("r") as run:
        run.set_output("123")
        with pytest.raises(LimitExceeded, match="the output is 6 bytes, limit 5") as caught:
            run.set_output("1234")
        assert caught.value.status == 413
        with pytest.raises(UsageError, match="has no JSON form"):
            run.set_output(object())
    assert (await ended(realtime, run.id)).output == "123"
