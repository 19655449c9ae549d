from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime import (
    LimitExceeded,
    Limits,
    Run,
    UsageError,
)
from asgi_realtime.core.metadata import Set, encode_metadata
from asgi_realtime.core.run_changes import MetadataChanged, TagsAdded
from tests.brokers.backends import DistantBroker
from tests.inprocess import ended, make_realtime

pytestmark = pytest.mark.anyio


async def test_metadata_supports_all_operations() -> None:
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


async def test_metadata_copies_the_values_that_it_accepts_and_returns() -> None:
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        value = {"a": [1]}
        run.metadata.set("k", value)
        value["a"].append(2)
        run.metadata.get("k")["a"].append(3)
        run.metadata.current()["k"]["a"].append(4)
        assert run.metadata.get("k") == {"a": [1]}


async def test_a_refused_operation_changes_nothing() -> None:
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


async def test_tags_are_added_and_visible_at_once() -> None:
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


async def test_threads_can_change_metadata() -> None:
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
    """The effect of an operation on metadata, in the simplest code."""
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
def test_metadata_behaves_like_a_plain_dict_however_it_is_stored(operations: list[tuple[Any, ...]]) -> None:
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


async def test_a_change_that_no_longer_fits_is_refused_once() -> None:
    """The limit was exceeded silently if other processes had used it up; a refused change must not block the next."""
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


async def test_tags_that_no_longer_fit_are_refused_and_not_shown() -> None:
    """`run.tags` kept showing a tag that was refused when it was stored."""
    async with make_realtime(limits=Limits(tags=2)) as realtime, realtime.open_run("r", tags=["a"]) as run:
        await realtime.runs.update(run.id, TagsAdded(("theirs",)))
        run.tags.add("ours")
        assert list(run.tags) == ["a", "ours"]
        with pytest.raises(LimitExceeded, match="would have 3 tags, limit 2"):
            await run.metadata.flush()
        assert list(run.tags) == ["a", "theirs"]


async def test_increments_of_large_metadata_do_not_encode_it_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def spy(view: dict[str, Any]) -> Any:
        encoded.append(len(view))
        return encode_metadata(view)

    async with make_realtime() as realtime, realtime.open_run("r", metadata={"a": ["x"] * 1000}) as run:
        monkeypatch.setattr("asgi_realtime.engine.metadata.encode_metadata", spy)
        for _ in range(100):
            run.metadata.increment("n")
            run.metadata.remove("a", "y")
            run.metadata.delete("missing")
        assert run.metadata.get("n") == 100
        assert len(encoded) == 1


@pytest.mark.parametrize("by", [1, -0.1, (1 << 63) - 1, 1 << 200])
async def test_the_limit_of_metadata_is_exact_for_increments(by: float) -> None:
    async with make_realtime(limits=Limits(metadata_bytes=1000)) as realtime, realtime.open_run("r") as run:
        for number in range(1000):
            view = run.metadata.current()
            key = f"\ud800\u2028{number}"
            try:
                run.metadata.increment(key, by)
            except LimitExceeded:
                break
        assert run.metadata.current() == view
        assert len(encode_metadata(view)) <= 1000 < len(encode_metadata({**view, key: by}))
