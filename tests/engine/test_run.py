from __future__ import annotations

import anyio
import pytest

from asgi_realtime import (
    EncodingError,
    LimitExceeded,
    Limits,
    Run,
    RunEnded,
    UsageError,
)
from tests.inprocess import GUARD_S, ended, make_realtime, until

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
            assert await (await realtime.trigger(child)).result(timeout=GUARD_S) == "parent"
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
        assert await delayed.result(timeout=GUARD_S) is True
        go.set()
        assert await waiting.result(timeout=GUARD_S) is False  # the child completes regardless
    assert f"metadata of run {parent.id} is lost" in caplog.text


async def test_an_output_is_checked_when_it_is_set() -> None:
    async with make_realtime(limits=Limits(output_bytes=5)) as realtime, realtime.open_run("r") as run:
        run.set_output("123")
        with pytest.raises(LimitExceeded, match=f"the output of run '{run.id}' is 6 bytes, limit 5") as caught:
            run.set_output("1234")
        assert caught.value.status == 413
        with pytest.raises(UsageError, match="has no JSON form"):
            run.set_output(object())
    assert (await ended(realtime, run.id)).output == "123"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("metadata", r"use run\.metadata\.set\(key, value\), or run\.metadata\.replace\({…}\) for all of it"),
        ("tags", r"use run\.tags\.add\(tag\)"),
        ("output", r"use run\.set_output\(value\), or return it from the task"),
        ("payload", "it is read-only"),
        ("id", "it is read-only"),
        ("progress", r"use run\.metadata\.set\('progress', value\), which subscribers see"),
    ],
)
async def test_an_assignment_to_a_run_raises_with_what_to_call(name: str, words: str) -> None:
    """`run.metadata = {…}` was accepted, and nothing was published."""
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        with pytest.raises(AttributeError, match=rf"^run\.{name} cannot be assigned; {words}$"):
            setattr(run, name, {"step": 1})
        with pytest.raises(AttributeError, match="step"):
            setattr(run.metadata, "step", 1)  # noqa: B010 - mypy rejects the statement


async def test_changes_after_the_end_raise() -> None:
    """They vanished silently, in a background task that outlived its run."""
    async with make_realtime() as realtime:
        async with realtime.open_run("r") as run:
            run.metadata.set("step", 1)
        over = pytest.raises(RunEnded, match=f"run '{run.id}' is over; its .* can no longer change")
        with over:
            run.metadata.set("step", 2)
        with over:
            run.metadata.increment("step")
        with over:
            run.tags.add("late")
        with over:
            run.set_output("late")
        assert run.metadata.current() == {"step": 1}
        assert list(run.tags) == []
        await run.metadata.flush()


async def test_changes_of_a_parent_that_is_over_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A run can outlive its parent, so these must not raise in it."""
    realtime = make_realtime()
    go = anyio.Event()

    @realtime.task("child")
    async def child(run: Run) -> str:
        assert run.parent is not None
        await go.wait()
        for number in range(2):
            run.parent.metadata.set("done", number)
            await run.parent.metadata.flush()
        return "done"

    async with realtime:
        async with realtime.open_run("parent") as parent:
            handle = await realtime.trigger(child)
            await until(lambda: handle.id in realtime.engine.executions)
        go.set()
        assert await handle.result(timeout=GUARD_S) == "done"
    words = f"changes of metadata or tags of run {parent.id} are lost: it is COMPLETED"
    assert caplog.text.count(words) == 1


async def test_an_error_names_the_value_without_a_json_form() -> None:
    """`Handle has no JSON form` did not say whether the output, a chunk or the metadata was meant."""

    class Handle:
        pass

    bad = {"results": [1, Handle()]}
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        where = r": at \['results'\]\[1\]: .*Handle has no JSON form"
        with pytest.raises(EncodingError, match=f"^the output of run '{run.id}'{where}"):
            run.set_output(bad)
        with pytest.raises(EncodingError, match=f"^metadata key 'step' of run '{run.id}'{where}"):
            run.metadata.set("step", bad)
        with pytest.raises(EncodingError, match=f"^metadata of run '{run.id}'{where}"):
            run.metadata.replace(bad)
        with pytest.raises(EncodingError, match=f"^metadata{where}"):
            realtime.open_run("r", metadata=bad)
        with pytest.raises(EncodingError, match=f"^a chunk of stream 'default' of run '{run.id}'{where}"):
            await realtime.append(bad)
        with pytest.raises(EncodingError, match=f"^the data for input 'approval'{where}"):
            await realtime.send_input(run, "approval", bad)
