"""`parts()`: opening, closing, errors, pipes; and the order of parts whatever the source. Without any client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace as Object
from typing import Any

import anyio
import pytest

from asgi_realtime import InvalidSource, Limits, RunNotFound, SourceFailed, UsageError
from asgi_realtime.ai import parts
from tests.ai.collecting import Part, collect, collect_failing, of_type, text_of, types_of
from tests.ai.order import check_order
from tests.faults import make, steps, stored

pytestmark = pytest.mark.anyio


async def stream(*items: Any, error: Exception | None = None) -> AsyncIterator[Any]:
    for item in items:
        yield item
    if error is not None:
        raise error


def chunk(finish: str | None = None, **delta: Any) -> Part:
    """A chunk of a chat completion, as plain JSON."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def call(index: int, arguments: str = "", *, id: str | None = None, name: str | None = None) -> Part:
    return {"index": index, "id": id, "function": {"name": name, "arguments": arguments}}


# The interface


async def test_strings_are_text() -> None:
    found = await collect(stream("Hel", "", "lo"))
    assert types_of(found) == ["text-start", "text-delta", "text-end", "finish"]
    assert text_of(found) == "Hello"
    assert found[-1] == {"type": "finish", "finishReason": "stop"}


async def test_a_message_id_is_that_of_the_first_part() -> None:
    found = await collect(["Hi"], message_id="m1")
    assert found[0] == {"type": "start", "messageId": "m1"}
    assert types_of(await collect(stream("Hi"))) == ["text-start", "text-delta", "text-end", "finish"]


async def test_an_empty_source_is_an_empty_message() -> None:
    assert await collect(stream()) == [{"type": "finish", "finishReason": "other"}]


@pytest.mark.parametrize("message_id", ["", 5])
async def test_a_message_id_is_text(message_id: Any) -> None:
    with pytest.raises(UsageError, match="message_id is"):
        parts([], message_id=message_id)


async def test_parts_can_be_iterated_without_a_context() -> None:
    found = [part async for part in parts(stream("a"))]
    check_order(found)


async def test_a_sync_source_is_read_by_a_thread() -> None:
    assert text_of(await collect(word for word in ("a", "b"))) == "ab"


async def test_a_source_can_be_a_context_manager() -> None:
    entered: list[str] = []

    class Manager:
        async def __aenter__(self) -> AsyncIterator[str]:
            entered.append("entered")
            return stream("a")

        async def __aexit__(self, *exc_info: object) -> None:
            entered.append("exited")

    assert text_of(await collect(Manager())) == "a"
    assert entered == ["entered", "exited"]


async def test_ids_are_short_and_differ_between_sources_and_blocks() -> None:
    one, other = [await collect([chunk(content="a"), chunk(reasoning="b"), chunk(content="c")]) for _ in range(2)]
    ids = [part["id"] for part in one + other if part["type"].endswith("-start")]
    assert len(set(ids)) == 6
    assert max(map(len, ids)) == 5


async def test_a_pipe_publishes_and_yields_the_parts() -> None:
    async with make() as realtime:
        async with realtime.open_run("chat") as run:
            pipe = realtime.pipe(parts(stream("Hel", "lo"), message_id="m1"))
            found = [part async for part in pipe]
            await pipe.wait_until_complete()
        assert await stored(realtime, run.id) == found
    check_order(found)
    assert text_of(found) == "Hello"


# Closing


class Source:
    """A source that records how it is closed."""

    def __init__(self, *items: Any) -> None:
        self.items = list(items)
        self.closed = 0
        self.reading = anyio.Event()

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> Any:
        if self.items:
            return self.items.pop(0)
        self.reading.set()
        await anyio.sleep_forever()

    async def aclose(self) -> None:
        self.closed += 1


class Managed:
    """A context manager that runs a task group, so it has to be exited in the scope that entered it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.exits: list[type[BaseException] | None] = []

    async def __aenter__(self) -> Source:
        self.group = anyio.create_task_group()
        await self.group.__aenter__()
        return self.source

    async def __aexit__(self, kind: Any, exc: Any, traceback: Any) -> bool | None:
        self.exits.append(kind)
        return await self.group.__aexit__(kind, exc, traceback)


async def test_leaving_the_context_closes_the_source() -> None:
    source = Source("a", "b")
    async with parts(source) as found:
        await anext(found)
    assert source.closed == 1


@pytest.mark.parametrize("managed", [False, True])
@pytest.mark.parametrize("entered", [False, True])
async def test_a_cancellation_closes_the_source(managed: bool, entered: bool) -> None:
    source = Source("a")
    manager = Managed(source)

    async def read() -> None:
        found = parts(manager if managed else source)
        if not entered:
            async for _ in found:
                pass
        async with found as stream:
            async for _ in stream:
                pass

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await source.reading.wait()
        group.cancel_scope.cancel()
    assert source.closed == 1
    assert len(manager.exits) == managed


@pytest.mark.parametrize("managed", [False, True])
async def test_canceling_a_pipe_closes_the_source(managed: bool, caplog: pytest.LogCaptureFixture) -> None:
    source = Source("a")
    manager = Managed(source)
    async with make() as realtime:
        async with realtime.open_run("chat") as run:
            pipe = realtime.pipe(parts(manager if managed else source))
            await source.reading.wait()
            await pipe.aclose()
        found = await stored(realtime, run.id)
    assert source.closed == 1
    assert len(manager.exits) == managed
    assert text_of(found) == "a"
    assert caplog.messages == []


async def test_canceling_a_pipe_that_waits_for_its_reader_closes_the_source(caplog: pytest.LogCaptureFixture) -> None:
    """The source was closed in a scope that its task group was not in, which broke the pipe's own scopes."""
    manager = Managed(Source(*"ab" * 50))
    async with make(limits=Limits(pipe_buffer=4)) as realtime:
        async with realtime.open_run("chat"):
            pipe = realtime.pipe(parts(manager))
            reader = aiter(pipe)
            await anext(reader)
            await steps(20)
            await pipe.aclose()
    assert manager.source.items, "the pipe did not wait"
    assert (manager.source.closed, len(manager.exits)) == (1, 1)
    assert caplog.messages == []


async def test_a_source_that_is_never_read_is_closed() -> None:
    source = Source("a")
    await parts(source).aclose()
    assert source.closed == 1
    async with make() as realtime:
        pipe = realtime.pipe(parts(source), run="run_unknown")
        with pytest.raises(RunNotFound):
            await pipe.wait_until_complete()
    assert source.closed == 2


async def test_the_error_of_a_source_is_raised_after_its_text_has_ended() -> None:
    found, error = await collect_failing(stream("Hel", error=OSError("reset")))
    assert types_of(found) == ["text-start", "text-delta", "text-end"]
    assert isinstance(error, OSError)


async def test_a_source_that_cannot_be_opened() -> None:
    class Refusing(Managed):
        async def __aenter__(self) -> Source:
            raise OSError("401")

    manager = Refusing(Source())
    _, error = await collect_failing(manager)
    assert str(error) == "401"
    with pytest.raises(OSError):
        await anext(parts(manager))
    assert repr(parts(manager)) == "<Parts of a Refusing>"


async def test_the_error_of_closing_is_raised() -> None:
    class Failing(Managed):
        async def __aexit__(self, *exc_info: Any) -> None:
            await super().__aexit__(*exc_info)
            raise OSError("the end is missing")

    async def one() -> AsyncIterator[str]:
        yield "a"

    found, error = await collect_failing(Failing(one()))  # type: ignore[arg-type]
    assert text_of(found) == "a"
    assert str(error) == "the end is missing"


async def test_after_an_error_the_parts_have_ended() -> None:
    found = parts(stream(error=OSError()))
    with pytest.raises(OSError):
        await anext(found)
    assert [part async for part in found] == []


# Unknown sources and items


@pytest.mark.parametrize("source", [None, 5, "text", b"bytes", {"type": "text"}, stream, object(), str])
async def test_what_is_no_stream_is_rejected_at_once(source: Any) -> None:
    with pytest.raises(InvalidSource, match="supported are streams of openai"):
        parts(source)


@pytest.mark.parametrize(
    "item",
    [
        None,
        5,
        {},
        {"foo": 1},
        {"type": "text"},
        {"choices": 1},
        Object(type="x"),
        ("a", "b"),
        {"object": "chat.completion", "choices": [{"message": {"content": "not streamed"}}]},
    ],
)
async def test_an_unknown_item_is_rejected_before_anything_is_published(item: Any) -> None:
    found, error = await collect_failing(stream(item))
    assert found == []
    assert isinstance(error, InvalidSource)
    assert "supported are streams of openai" in str(error)


async def test_an_unknown_item_in_the_middle_ends_the_text() -> None:
    found, error = await collect_failing(stream("a", {"foo": "private", "bar": 1}))
    assert types_of(found) == ["text-start", "text-delta", "text-end"]
    assert isinstance(error, InvalidSource)
    assert "a dict with the keys 'foo', 'bar'" in str(error) and "private" not in str(error)


# Parts of the host


async def test_parts_of_the_host_pass() -> None:
    given = [
        {"type": "start-step"},
        {"type": "data-status", "id": "s", "data": {"step": 1}, "transient": True},
        {"type": "source-url", "sourceId": "1", "url": "https://example.com", "title": None},
        {"type": "source-document", "sourceId": "2", "mediaType": "text/plain", "title": "t", "filename": "f"},
        {"type": "file", "url": "https://example.com/a.png", "mediaType": "image/png"},
        {"type": "tool-input-available", "toolCallId": "c", "toolName": "f", "input": {}, "dynamic": True},
        {"type": "tool-output-available", "toolCallId": "c", "output": 1, "preliminary": True},
        {"type": "tool-output-available", "toolCallId": "c", "output": None},
        {"type": "message-metadata", "messageMetadata": {"a": 1}},
        {"type": "finish-step"},
        {"type": "finish", "finishReason": "length", "messageMetadata": {"b": 2}},
    ]
    expected = json.loads(json.dumps(given))
    del expected[2]["title"], expected[5]["dynamic"]
    assert await collect(given) == expected


async def test_parts_of_the_host_can_be_among_the_items_of_a_model() -> None:
    found = await collect([{"type": "data-status", "data": "thinking"}, chunk(content="Hi"), chunk("stop")])
    assert types_of(found) == ["data-status", "text-start", "text-delta", "text-end", "finish"]


async def test_blocks_of_the_host_are_closed_as_it_says() -> None:
    metadata = {"providerMetadata": {"x": {"signature": "s"}}}
    given: list[Part] = [
        {"type": "reasoning-start", "id": "r"},
        {"type": "text-start", "id": "t", **metadata},
        {"type": "reasoning-delta", "id": "r", "delta": "a"},
        {"type": "text-delta", "id": "t", "delta": "b"},
        {"type": "reasoning-end", "id": "r", **metadata},
        {"type": "text-end", "id": "t"},
    ]
    found = await collect(given)
    ids = {part["type"].partition("-")[0]: part["id"] for part in found[:2]}
    expected = [part | {"id": ids[part["type"].partition("-")[0]]} for part in given]
    assert found == [*expected, {"type": "finish", "finishReason": "other"}]


async def test_strings_do_not_change_the_reason_of_another_item() -> None:
    found = await collect(["a", {"type": "finish", "finishReason": "length"}])
    assert found[-1]["finishReason"] == "length"


async def test_the_order_of_the_host_s_parts_is_corrected() -> None:
    given = [
        {"type": "text-delta", "id": "a", "delta": "no start"},
        {"type": "reasoning-start", "id": "b"},
        {"type": "finish-step"},
        {"type": "start-step"},
        {"type": "text-start", "id": "a"},
        {"type": "text-end", "id": "c"},
        {"type": "text-delta", "id": "a", "delta": "open across steps"},
        {"type": "start-step"},
        {"type": "tool-input-start", "toolCallId": "c", "toolName": "f"},
        {"type": "tool-input-start", "toolCallId": "c", "toolName": "f"},
        {"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": '{"a":'},
        {"type": "tool-input-delta", "toolCallId": "d", "inputTextDelta": "unknown"},
        {"type": "tool-output-available", "toolCallId": "c", "output": "of an input without end"},
    ]
    found = await collect(given)
    assert text_of(found) == "no startopen across steps"
    assert of_type(found, "tool-input-error")[0]["input"] == '{"a":'
    assert of_type(found, "tool-output-available") == []


async def test_a_start_of_the_host_counts_only_at_the_beginning() -> None:
    start = {"type": "start", "messageId": "m", "messageMetadata": {"a": 1}}
    assert (await collect([start]))[0] == start
    found = await collect([start, start], message_id="mine")
    assert found[0] == {"type": "start", "messageId": "mine"}
    assert of_type(found, "message-metadata") == [{"messageMetadata": {"a": 1}}] * 2


async def test_the_output_of_a_call_that_another_source_has_made_passes() -> None:
    given = [
        {"type": "tool-output-available", "toolCallId": "elsewhere", "output": None, "preliminary": True},
        {"type": "tool-output-available", "toolCallId": "elsewhere", "output": {"a": None}},
        {"type": "tool-output-error", "toolCallId": "other", "errorText": "failed"},
    ]
    async with parts(given) as found:
        assert [part async for part in found][:-1] == given


async def test_calls_of_the_host_that_fail_or_wait_for_an_approval() -> None:
    first, second = {"toolCallId": "a", "toolName": "f", "input": {}}, {"toolCallId": "b", "toolName": "f", "input": {}}
    given = [
        {"type": "tool-input-available", **first},
        {"type": "tool-approval-request", "toolCallId": "a", "approvalId": "1"},
        {"type": "tool-output-denied", "toolCallId": "a"},
        {"type": "tool-input-available", **second, "providerExecuted": True},
        {"type": "tool-output-error", "toolCallId": "b", "errorText": "failed"},
        {"type": "tool-output-available", "toolCallId": "b", "output": "too late"},
        {"type": "tool-input-error", "toolCallId": "c", "toolName": "f", "input": "{", "errorText": "no JSON"},
        {"type": "tool-input-available", **first},
    ]
    assert (await collect(given))[:-1] == [*given[:5], given[6]]


async def test_errors_and_aborts_of_the_host_pass() -> None:
    given = [{"type": "error", "errorText": "Try again"}, {"type": "abort", "reason": "stopped"}, {"type": "done"}]
    assert (await collect(given))[:-1] == given[:2]


@pytest.mark.parametrize("part", [{"type": "text-delta", "id": "a"}, {"type": "data-x"}, {"type": "file", "url": "u"}])
async def test_a_part_without_a_required_field_is_rejected(part: Part) -> None:
    _, error = await collect_failing([part])
    assert isinstance(error, InvalidSource) and f"a part of the type {part['type']!r} has no" in str(error)


# Chat completions as plain JSON


async def test_completions_of_any_client() -> None:
    found = await collect(
        [
            chunk(role="assistant", content=""),
            chunk(reasoning_content="Let me"),
            chunk(reasoning=" think"),
            chunk(content="It is"),
            chunk(content=" sunny"),
            chunk("length"),
            {"choices": [], "usage": {"total_tokens": 5}},
        ]
    )
    expected = ["reasoning-start", "reasoning-delta", "reasoning-end", "text-start", "text-delta", "text-end", "finish"]
    assert types_of(found) == expected
    assert (text_of(found, "reasoning"), text_of(found)) == ("Let me think", "It is sunny")
    assert found[-1]["finishReason"] == "length"


async def test_parallel_tool_calls_of_completions() -> None:
    found = await collect(
        [
            chunk(content="I look."),
            chunk(tool_calls=[call(0, id="a", name="f"), call(1, id="b", name="g")]),
            chunk(tool_calls=[call(1, '{"y":')]),
            chunk(tool_calls=[call(0, '{"x": 1}')]),
            chunk(tool_calls=[call(1, "2}")]),
            chunk("tool_calls"),
        ]
    )
    assert types_of(found)[:4] == ["text-start", "text-delta", "text-end", "tool-input-start"]
    assert of_type(found, "tool-input-available") == [
        {"toolCallId": "a", "toolName": "f", "input": {"x": 1}},
        {"toolCallId": "b", "toolName": "g", "input": {"y": 2}},
    ]
    assert found[-1]["finishReason"] == "tool-calls"


async def test_calls_that_share_an_index_or_have_no_id() -> None:
    found = await collect(
        [
            chunk(tool_calls=[call(0, "{}", id="a", name="f")]),
            chunk(tool_calls=[call(0, "{}", id="b", name="f")]),
            chunk(tool_calls=[call(2, "", name="h")]),
            chunk("tool_calls"),
        ]
    )
    calls = of_type(found, "tool-input-available")
    assert [one["toolName"] for one in calls] == ["f", "f", "h"]
    assert len({one["toolCallId"] for one in calls}) == 3


@pytest.mark.parametrize("end", [[], [chunk("length")]])
async def test_an_input_that_is_cut_off_is_an_error(end: list[Part]) -> None:
    found = await collect([chunk(tool_calls=[call(0, '{"x": ', id="a", name="f")]), *end])
    [error] = of_type(found, "tool-input-error")
    assert error["input"] == '{"x": '


async def test_a_refusal_is_text_and_the_reason() -> None:
    found = await collect([chunk(refusal="I can"), chunk(refusal="not."), chunk("stop")])
    assert text_of(found) == "I cannot."
    assert found[-1]["finishReason"] == "content-filter"


async def test_only_the_first_choice_is_converted() -> None:
    two = chunk(content="one")
    two["choices"].append({"index": 1, "delta": {"content": "two"}})
    assert text_of(await collect([two])) == "one"


async def test_citations_and_images_of_completions() -> None:
    cited = {"type": "url_citation", "url_citation": {"url": "https://example.com", "title": "Example"}}
    image = {"type": "image_url", "image_url": {"url": "data:image/webp;base64,AAAA"}}
    found = await collect([chunk(annotations=[cited, cited], images=[image])])
    [source] = of_type(found, "source-url")
    assert source["url"] == "https://example.com" and source["title"] == "Example"
    assert of_type(found, "file") == [{"url": "data:image/webp;base64,AAAA", "mediaType": "image/webp"}]


# Failures within a stream


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "Try again"}}},
        {"type": "error", "code": "server_error", "message": "Try again"},
        {"type": "error", "error": {"type": "overloaded_error", "message": "Try again"}},
    ],
)
async def test_a_failure_that_a_model_reports_is_raised(event: Part) -> None:
    found, error = await collect_failing(stream({"type": "response.output_text.delta", "delta": "Hel"}, event))
    assert types_of(found) == ["text-start", "text-delta", "text-end"]
    assert isinstance(error, SourceFailed) and "Try again" in str(error)
