from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime import (
    BrokerUnavailable,
    LimitExceeded,
    Limits,
    Run,
    RunCanceled,
    RunEnded,
    RunFailed,
    RunNotFound,
    RunRecord,
    Timeouts,
    UsageError,
)
from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.metadata import Set
from asgi_realtime.core.runs import MetadataChanged, TagsAdded
from asgi_realtime.engine.changes import COALESCE_S
from tests.brokers.backends import DistantBroker
from tests.inprocess import ended, make_realtime, run_without_anyio, until

pytestmark = pytest.mark.anyio


class Counting(MemoryBroker):
    """Keeps every version that was committed."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[RunRecord] = []

    async def commit(
        self, record: RunRecord, *, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int] | None = None
    ) -> int:
        self.commits.append(record)
        return await super().commit(record, expect=expect, change=change, floors=floors)


class Away(MemoryBroker):
    """Does not answer while `away`."""

    away = False
    refused = 0

    async def commit(
        self, record: RunRecord, *, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int] | None = None
    ) -> int:
        if self.away:
            self.refused += 1
            raise BrokerUnavailable("the broker is away")
        return await super().commit(record, expect=expect, change=change, floors=floors)


async def test_metadata_has_all_its_operations() -> None:
    async with make_realtime() as realtime, realtime.open_run("r", metadata={"old": 1}) as run:
        metadata = run.metadata
        metadata.set("text", "a")
        metadata.set("text", "b")
        metadata.append("list", 1)
        metadata.append("list", 2)
        metadata.remove("list", 1)
        metadata.increment("n")
        metadata.increment("n", 2.5)
        metadata.decrement("n", 0.5)
        metadata.decrement("m")
        metadata.delete("old")
        expected = {"text": "b", "list": [2], "n": 3.0, "m": -1}
        assert metadata.current() == expected
        assert metadata.get("text") == "b"
        assert metadata.get("missing") is None
        assert metadata.get("missing", 7) == 7
        assert repr(metadata).startswith("<Metadata {")
        await metadata.flush()
        assert (await realtime.get_run(run)).metadata == expected
        metadata.replace({"new": True})
        assert metadata.current() == {"new": True}
    assert (await ended(realtime, run.id)).metadata == {"new": True}


async def test_what_metadata_gives_is_a_copy_and_what_it_takes_too() -> None:
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        value = {"a": [1]}
        run.metadata.set("k", value)
        value["a"].append(2)
        run.metadata.get("k")["a"].append(3)
        run.metadata.current()["k"]["a"].append(4)
        assert run.metadata.get("k") == {"a": [1]}


async def test_changes_are_stored_together_within_50_ms() -> None:
    broker = Counting()
    async with make_realtime(broker=broker) as realtime, realtime.open_run("r") as run:
        created = len(broker.commits)
        for number in range(100):
            run.metadata.set("n", number)
            run.metadata.increment("sum", number)
            run.tags.add("a", "b")
        assert len(broker.commits) == created
        began = anyio.current_time()
        await until(lambda: len(broker.commits) > created)
        assert COALESCE_S - 0.01 <= anyio.current_time() - began < 2
        assert len(broker.commits) == created + 1
        record = await realtime.get_run(run)
        assert record.metadata == {"n": 99, "sum": 4950}
        assert record.tags == ("a", "b")
        run.metadata.set("n", 100)  # a later change is stored too
        await until(lambda: len(broker.commits) == created + 2)


async def test_the_end_stores_what_waits_in_the_same_version() -> None:
    broker = Counting()
    async with make_realtime(broker=broker) as realtime:
        async with realtime.open_run("r") as run:
            run.metadata.set("progress", 1)
            run.tags.add("late")
            run.set_output("done")
        assert [record.version for record in broker.commits] == [1, 2]
        last = broker.commits[-1]
        assert (last.metadata, last.tags, last.output) == ({"progress": 1}, ("late",), "done")


async def test_an_operation_that_is_refused_changes_nothing() -> None:
    async with make_realtime(limits=Limits(metadata_bytes=30)) as realtime, realtime.open_run("r") as run:
        run.metadata.set("text", "a")
        refused: list[tuple[type[Exception], str, Callable[[], None]]] = [
            (UsageError, "metadata 'text' is 'a' and cannot change by 1", lambda: run.metadata.increment("text")),
            (UsageError, "control characters", lambda: run.metadata.set("a\nb", 1)),
            (UsageError, "has no JSON form", lambda: run.metadata.set("k", object())),
            (UsageError, "metadata is a list; allowed is a dict", lambda: run.metadata.replace([1])),  # type: ignore[arg-type]
            (LimitExceeded, "metadata is 31 bytes, limit 30", lambda: run.metadata.set("more", "123456789")),
            (LimitExceeded, "limit 30", lambda: run.metadata.append("text", "x" * 30)),
        ]
        for error, message, operation in refused:
            with pytest.raises(error) as caught:
                operation()
            assert message in str(caught.value)
            assert run.metadata.current() == {"text": "a"}
        run.metadata.set("more", "12345678")
        await run.metadata.flush()
        assert (await realtime.get_run(run)).metadata == {"text": "a", "more": "12345678"}


async def test_tags_are_added_and_seen_at_once() -> None:
    async with make_realtime(limits=Limits(tags=3)) as realtime, realtime.open_run("r", tags=["a"]) as run:
        run.tags.add("b")
        run.tags.add("b", "a")
        assert list(run.tags) == ["a", "b"]
        assert "b" in run.tags and "c" not in run.tags and len(run.tags) == 2
        assert repr(run.tags) == "<Tags a, b>"
        with pytest.raises(LimitExceeded, match="a run has 4 tags, limit 3") as caught:
            run.tags.add("c", "d")
        assert caught.value.status == 422
        with pytest.raises(UsageError, match="a comma"):
            run.tags.add("x,y")
        assert list(run.tags) == ["a", "b"]
        await run.metadata.flush()
        assert (await realtime.get_run(run)).tags == ("a", "b")
        found = realtime.subscribe_to_runs_with_tag(["b"])
        assert (await anext(found)).id == run.id


async def test_metadata_may_be_changed_by_threads() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    def task(run: Run) -> None:
        def work() -> None:
            for _ in range(100):
                run.metadata.increment("n")
                run.metadata.append("list", 1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run.tags.add("from-thread")

    async with realtime:
        record = await ended(realtime, await realtime.trigger(task))
    assert record.metadata == {"n": 400, "list": [1] * 400}
    assert record.tags == ("from-thread",)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_a_def_task_changes_is_stored_while_it_runs(backend: str) -> None:
    """Under a server (not in tests, where anyio's runner helps) subscribers saw nothing of it before the run's end."""
    realtime = make_realtime()
    go = threading.Event()

    @realtime.task("t")
    def task(run: Run) -> None:
        run.metadata.set("progress", 0.5)
        run.tags.add("half")
        go.wait(5)

    async def main() -> None:
        async with realtime:
            handle = await realtime.trigger(task)
            try:
                async for record in realtime.subscribe_to_run(handle):
                    assert not record.is_completed
                    if (record.metadata, record.tags) == ({"progress": 0.5}, ("half",)):
                        break
            finally:
                go.set()

    run_without_anyio(main, backend)


@pytest.mark.parametrize("make_broker", [MemoryBroker, DistantBroker])
async def test_nothing_is_lost_when_two_processes_change_the_metadata_of_one_run(
    make_broker: type[MemoryBroker],
) -> None:
    broker = make_broker()
    one = make_realtime(broker=broker)
    two = make_realtime(broker=broker)

    @two.task("child")
    async def child(run: Run) -> None:
        assert run.parent is not None
        for number in range(20):
            run.parent.metadata.increment("n")
            run.parent.metadata.append("list", number)
            await run.parent.metadata.flush()

    async with one, two:
        async with one.open_run("parent") as parent:
            handle = await two.trigger(child, parent=parent.id)
            for number in range(20, 40):
                parent.metadata.increment("n")
                parent.metadata.append("list", number)
                await parent.metadata.flush()
            await handle.result(timeout=5)
        record = await ended(one, parent.id)
    assert record.metadata["n"] == 40
    assert sorted(record.metadata["list"]) == list(range(40))


async def test_the_end_comes_after_what_is_being_stored() -> None:
    """A change that was under way while the run ended came too late and was dropped."""
    broker = DistantBroker()
    async with make_realtime(broker=broker) as realtime:
        for _ in range(10):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("r") as run:
                    run.metadata.set("first", 1)
                    group.start_soon(run.metadata.flush)
                    await until(lambda: not run.buffer.pending())
                    run.metadata.set("second", 2)
                assert (await ended(realtime, run.id)).metadata == {"first": 1, "second": 2}


async def test_changes_are_stored_in_the_order_they_were_made() -> None:
    """Two that were stored at once could change places."""
    broker = DistantBroker()
    async with make_realtime(broker=broker) as realtime, realtime.open_run("r") as run:
        async with anyio.create_task_group() as group:
            for number in range(20):
                run.metadata.set("n", number)
                group.start_soon(run.metadata.flush)
                await anyio.lowlevel.checkpoint()
        assert (await realtime.get_run(run)).metadata == {"n": 19}


async def test_a_cancelled_flush_happens_once() -> None:
    """What a cancelled flush had stored was stored again."""
    async with make_realtime(broker=DistantBroker()) as realtime, realtime.open_run("r") as run:
        for steps in range(12):
            run.metadata.increment("n")
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(run.metadata.flush)
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
        await run.metadata.flush()
        assert (await realtime.get_run(run)).metadata == {"n": 12}


async def test_changes_wait_while_the_broker_is_away() -> None:
    broker = Away()
    timeouts = Timeouts(tick=0.01, append=0.01, drain=0.02)
    async with make_realtime(broker=broker, timeouts=timeouts) as realtime, realtime.open_run("r") as run:
        broker.away = True
        run.metadata.set("n", 1)
        with pytest.raises(BrokerUnavailable):
            await run.metadata.flush()
        assert run.metadata.get("n") == 1
        run.metadata.set("m", 2)
        refused = broker.refused
        await until(lambda: broker.refused > refused + 1)  # it is tried again by itself
        broker.away = False
        await until(lambda: not run.buffer.pending())
        assert (await realtime.get_run(run)).metadata == {"n": 1, "m": 2}


async def test_changes_of_a_run_that_is_gone_are_reported_lost(caplog: pytest.LogCaptureFixture) -> None:
    realtime = make_realtime()
    async with realtime:
        async with realtime.open_run("r") as run:
            pass
        await realtime.broker.remove(run.id)
        run.metadata.set("n", 1)
        with pytest.raises(RunNotFound):
            await run.metadata.flush()
        await until(lambda: "metadata of run" in caplog.text)
    assert f"metadata of run {run.id} is lost" in caplog.text


async def test_changes_after_the_end_are_absorbed() -> None:
    async with make_realtime() as realtime:
        async with realtime.open_run("r") as run:
            run.metadata.set("n", 1)
        run.metadata.set("n", 2)
        await run.metadata.flush()
        assert (await realtime.get_run(run)).metadata == {"n": 1}


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
            record = await realtime.get_run(parent)  # at the latest when the child has ended
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


async def test_a_parent_that_is_gone_is_no_parent(caplog: pytest.LogCaptureFixture) -> None:
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
        assert await waiting.result(timeout=5) is False  # its own end is not touched
    assert f"metadata of run {parent.id} is lost" in caplog.text


async def test_inputs_come_in_the_order_of_sending() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task(run: Run) -> list[Any]:
        first = await run.input("approval").get(timeout=5)
        assert run.input("approval") is run.input("approval")
        rest = [await run.input("approval").get() for _ in range(2)]
        other = await run.input("other").get()
        return [first, *rest, other]

    async with realtime:
        handle = await realtime.trigger(task)
        for data in ({"ok": True}, 2, None):
            await realtime.send_input(handle, "approval", data)
        await realtime.send_input(handle.id, "other", "x")
        assert await handle.result(timeout=5) == [{"ok": True}, 2, None, "x"]
        assert (await realtime.get_run(handle)).streams == ()


async def test_inputs_can_be_iterated_until_the_run_is_over() -> None:
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


async def test_each_input_goes_to_one_of_those_who_wait() -> None:
    """Two that waited at once both got the same data."""
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        got: list[Any] = []

        async def get() -> None:
            got.append(await run.input("in").get(timeout=5))

        async with anyio.create_task_group() as group:
            group.start_soon(get)
            group.start_soon(get)
            await anyio.wait_all_tasks_blocked()
            await realtime.send_input(run, "in", 1)
            await realtime.send_input(run, "in", 2)
        assert sorted(got) == [1, 2]


async def test_waiting_for_an_input_ends_at_its_timeout_and_loses_nothing() -> None:
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        with pytest.raises(TimeoutError):
            await run.input("in").get(timeout=0.01)
        with pytest.raises(UsageError, match="timeout is 'soon'"):
            await run.input("in").get(timeout="soon")
        await realtime.send_input(run, "in", 1)
        assert await run.input("in").get(timeout=1) == 1


async def test_waiting_for_an_input_ends_with_the_run() -> None:
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


async def test_inputs_have_limits_and_need_a_run() -> None:
    async with make_realtime(limits=Limits(input_bytes=5)) as realtime, realtime.open_run("r") as run:
        await realtime.send_input(run, "in", "123")
        with pytest.raises(LimitExceeded, match="is 6 bytes, limit 5"):
            await realtime.send_input(run, "in", "1234")
        with pytest.raises(UsageError, match="input id 'a/b'"):
            await realtime.send_input(run, "a/b", 1)
        with pytest.raises(LimitExceeded, match="input id is 129 characters, limit 128"):
            run.input("x" * 129)
        with pytest.raises(RunNotFound):
            await realtime.send_input("run_that_never_was", "in", 1)


async def test_an_output_is_checked_when_it_is_set() -> None:
    async with make_realtime(limits=Limits(output_bytes=5)) as realtime, realtime.open_run("r") as run:
        run.set_output("123")
        with pytest.raises(LimitExceeded, match="the output is 6 bytes, limit 5") as caught:
            run.set_output("1234")
        assert caught.value.status == 413
        with pytest.raises(UsageError, match="has no JSON form"):
            run.set_output(object())
    assert (await ended(realtime, run.id)).output == "123"


KEYS = st.sampled_from(["a", "b"])
OPERATION = st.one_of(
    st.tuples(st.just("set"), KEYS, st.integers(-3, 3)),
    st.tuples(st.just("set"), KEYS, st.lists(st.integers(0, 2), max_size=2)),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("append"), KEYS, st.integers(0, 2)),
    st.tuples(st.just("remove"), KEYS, st.integers(0, 2)),
    st.tuples(st.just("increment"), KEYS, st.integers(-3, 3)),
    st.tuples(st.just("replace"), st.dictionaries(KEYS, st.integers(0, 2))),
    st.tuples(st.just("flush")),
    st.tuples(st.just("yield")),
)


def model(metadata: dict[str, Any], name: str, *arguments: Any) -> None:
    """What an operation does to metadata, in the plainest words."""
    match name, arguments:
        case "set", (key, value):
            metadata[key] = value
        case "delete", (key,):
            metadata.pop(key, None)
        case "append", (key, value):
            old = metadata.get(key, [])
            metadata[key] = [*(old if isinstance(old, list) else [old]), value]
        case "remove", (key, value) if isinstance(metadata.get(key), list):
            metadata[key] = [item for item in metadata[key] if item != value]
        case "increment", (key, by) if not isinstance(metadata.get(key), list):
            metadata[key] = metadata.get(key, 0) + by
        case "replace", (value,):
            metadata.clear()
            metadata.update(value)


@given(st.lists(OPERATION, max_size=30))
@settings(max_examples=60, deadline=None)
def test_metadata_is_what_a_plain_dict_would_be_however_it_is_stored(operations: list[tuple[Any, ...]]) -> None:
    async def main() -> None:
        expected: dict[str, Any] = {}
        async with make_realtime(broker=DistantBroker()) as realtime:
            async with anyio.create_task_group() as group:
                async with realtime.open_run("r") as run:
                    for name, *arguments in operations:
                        if name == "flush":
                            group.start_soon(run.metadata.flush)
                        elif name == "yield":
                            await anyio.lowlevel.checkpoint()
                        elif name == "increment" and isinstance(expected.get(arguments[0]), list):
                            with pytest.raises(UsageError):
                                run.metadata.increment(*arguments)
                        else:
                            getattr(run.metadata, name)(*arguments)
                            model(expected, name, *arguments)
                        assert run.metadata.current() == expected
            assert (await ended(realtime, run.id)).metadata == expected

    anyio.run(main)


@given(st.lists(st.lists(st.sampled_from(["n", "m", "flush", "yield"]), max_size=10), min_size=2, max_size=4))
@settings(max_examples=30, deadline=None)
def test_increments_and_appends_of_several_processes_add_up(scripts: list[list[str]]) -> None:
    broker = DistantBroker()

    async def process(parent_id: str, number: int, script: list[str]) -> None:
        realtime = make_realtime(broker=broker)

        @realtime.task("child")
        async def child(run: Run) -> None:
            assert run.parent is not None
            for step, name in enumerate(script):
                if name == "flush":
                    await run.parent.metadata.flush()
                elif name == "yield":
                    await anyio.lowlevel.checkpoint()
                else:
                    run.parent.metadata.increment(name)
                    run.parent.metadata.append("log", [number, step])

        async with realtime:
            await (await realtime.trigger(child, parent=parent_id)).result(timeout=10)

    async def main() -> dict[str, Any]:
        async with make_realtime(broker=broker) as realtime, realtime.open_run("parent") as parent:
            async with anyio.create_task_group() as group:
                for number, script in enumerate(scripts):
                    group.start_soon(process, parent.id, number, script)
            return (await realtime.get_run(parent)).metadata

    metadata = anyio.run(main)
    done = [
        (number, step, name)
        for number, script in enumerate(scripts)
        for step, name in enumerate(script)
        if name in ("n", "m")
    ]
    for name in ("n", "m"):
        assert metadata.get(name, 0) == sum(one[2] == name for one in done)
    log = metadata.get("log", [])
    for number in range(len(scripts)):  # each process's own in its order
        assert [step for one, step in log if one == number] == [step for one, step, _ in done if one == number]


async def test_a_change_that_others_left_no_room_for_is_refused_once() -> None:
    """What others had filled meanwhile was exceeded in silence; a refused change must not hold up the next."""
    realtime = make_realtime(limits=Limits(metadata_bytes=100))
    async with realtime, realtime.open_run("r") as run:
        await realtime.runs.update(run.id, MetadataChanged((Set("theirs", "x" * 60),)))
        run.metadata.set("ours", "y" * 60)
        with pytest.raises(LimitExceeded, match="limit 100"):
            await run.metadata.flush()
        assert run.metadata.current() == {"theirs": "x" * 60}
        run.metadata.set("n", 1)
        await run.metadata.flush()
        assert (await realtime.get_run(run)).metadata == {"theirs": "x" * 60, "n": 1}


async def test_tags_that_others_add_are_seen_with_the_next_change() -> None:
    """`run.tags` never contained a tag that another process had added."""
    async with make_realtime() as realtime, realtime.open_run("r", tags=["a"]) as run:
        await realtime.runs.update(run.id, TagsAdded(("theirs",)))
        run.metadata.set("n", 1)
        await run.metadata.flush()
        assert list(run.tags) == ["a", "theirs"]
        run.tags.add("ours")
        assert list(run.tags) == ["a", "theirs", "ours"]


async def test_tags_that_others_left_no_room_for_are_refused_and_not_shown() -> None:
    """`run.tags` kept showing a tag that was refused when it was stored."""
    async with make_realtime(limits=Limits(tags=2)) as realtime, realtime.open_run("r", tags=["a"]) as run:
        await realtime.runs.update(run.id, TagsAdded(("theirs",)))
        run.tags.add("ours")
        assert list(run.tags) == ["a", "ours"]
        with pytest.raises(LimitExceeded, match="would have 3 tags, limit 2"):
            await run.metadata.flush()
        assert list(run.tags) == ["a", "theirs"]


async def test_changes_during_an_outage_add_no_jobs() -> None:
    """Each change started another job that retried until the broker was available: a thousand runs had 500,000."""
    broker = Away()
    timeouts = Timeouts(tick=0.01, append=1, drain=0.02)
    async with make_realtime(broker=broker, timeouts=timeouts) as realtime, realtime.open_run("r") as run:
        supervisor = realtime.engine.supervisor
        assert supervisor is not None
        await until(lambda: realtime.engine.executions._watches)
        before = supervisor.jobs
        broker.away = True
        for number in range(5):
            run.metadata.set("n", number)
            refused = broker.refused
            await until(lambda: broker.refused > refused)  # noqa: B023
            assert supervisor.jobs <= before + 1
        broker.away = False
        await until(lambda: not run.buffer.pending() and supervisor.jobs == before)
        assert (await realtime.get_run(run)).metadata == {"n": 4}
