"""`parts()` with the client of openai: chat completions and Responses, raw and with the helpers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asgi_realtime import SourceFailed
from tests.ai.collecting import CANARY, Part, collect, collect_failing, of_type, text_of, types_of
from tests.models.endpoint import Endpoint, Event, endpoint
from tests.models.needs import need

pytestmark = pytest.mark.anyio

MESSAGES: list[Any] = [{"role": "system", "content": CANARY}, {"role": "user", "content": "hi"}]
TEXT = ["text-start", "text-delta", "text-end", "finish"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def chunk(finish: str | None = None, **delta: Any) -> Event:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}


def call(index: int, arguments: str, **fields: Any) -> Event:
    name = fields.pop("name", None)
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"index": index, "function": function, **fields}


@asynccontextmanager
async def client(served: Endpoint) -> AsyncIterator[Any]:
    options = {"api_key": CANARY, "default_headers": {"x-tenant": CANARY}, "max_retries": 0}
    async with need("openai").AsyncOpenAI(base_url=served.url, **options) as found:
        yield found
    assert CANARY in served.requests[0]


async def completion(*chunks: Event, helper: bool) -> list[Part]:
    async with endpoint(list(chunks), done=True) as served, client(served) as openai:
        if helper:
            return await collect(openai.chat.completions.stream(model="m", messages=MESSAGES))
        return await collect(await openai.chat.completions.create(model="m", messages=MESSAGES, stream=True))


@pytest.mark.parametrize("helper", [False, True])
async def test_text_of_a_completion(helper: bool) -> None:
    found = await completion(chunk(role="assistant", content="Hel"), chunk(content="lo"), chunk("stop"), helper=helper)
    assert types_of(found) == TEXT
    assert text_of(found) == "Hello"
    assert found[-1]["finishReason"] == "stop"


@pytest.mark.parametrize("helper", [False, True])
async def test_parallel_tool_calls_of_a_completion(helper: bool) -> None:
    found = await completion(
        chunk(role="assistant", tool_calls=[call(0, "", id="a", type="function", name="f")]),
        chunk(tool_calls=[call(0, '{"x"')]),
        chunk(tool_calls=[call(0, ": 1}")]),
        chunk(tool_calls=[call(1, "{}", id="b", type="function", name="g")]),
        chunk("tool_calls"),
        helper=helper,
    )
    assert of_type(found, "tool-input-available") == [
        {"toolCallId": "a", "toolName": "f", "input": {"x": 1}},
        {"toolCallId": "b", "toolName": "g", "input": {}},
    ]
    assert [part["inputTextDelta"] for part in of_type(found, "tool-input-delta")] == ['{"x"', ": 1}", "{}"]
    assert found[-1]["finishReason"] == "tool-calls"


@pytest.mark.parametrize("helper", [False, True])
async def test_a_refused_completion(helper: bool) -> None:
    found = await completion(chunk(role="assistant", refusal="No."), chunk("stop"), helper=helper)
    assert (text_of(found), found[-1]["finishReason"]) == ("No.", "content-filter")


@pytest.mark.parametrize("helper", [False, True])
async def test_an_empty_completion(helper: bool) -> None:
    found = await completion(chunk(role="assistant", content=""), chunk("stop"), helper=helper)
    assert found == [{"type": "finish", "finishReason": "stop"}]


async def test_a_connection_that_breaks_in_a_completion() -> None:
    async with endpoint([chunk(content="Hel")], cut=True) as served, client(served) as openai:
        stream = await openai.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        found, error = await collect_failing(stream)
    assert types_of(found) == TEXT[:-1]
    assert "incomplete" in str(error) or "onnection" in str(error)


async def test_an_error_event_in_a_completion() -> None:
    answer = [chunk(content="Hel"), {"error": {"message": "overloaded", "code": "x"}}]
    async with endpoint(answer) as served, client(served) as openai:
        stream = await openai.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        found, error = await collect_failing(stream)
    assert types_of(found) == TEXT[:-1]
    assert isinstance(error, need("openai").APIError)


# Responses


def response(status: str, **fields: Any) -> Event:
    """The response as the API repeats it: with what was sent."""
    return {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "status": status,
        "model": "m",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "instructions": CANARY,
        "tools": [{"type": "mcp", "server_label": "s", "headers": {"Authorization": CANARY}, "require_approval": None}],
        **fields,
    }


def numbered(*events: Event, status: str = "completed", **fields: Any) -> list[Event]:
    whole = [
        {"type": "response.created", "response": response("in_progress")},
        *events,
        {"type": f"response.{status}", "response": response(status, **fields)},
    ]
    return [{"output_index": 0, "content_index": 0, "sequence_number": n} | event for n, event in enumerate(whole)]


def added(**item: Any) -> Event:
    return {"type": "response.output_item.added", "item": item}


def done(**item: Any) -> Event:
    return {"type": "response.output_item.done", "item": item}


def delta(kind: str, text: str, **fields: Any) -> Event:
    return {"type": f"response.{kind}.delta", "delta": text, "item_id": "i", **fields}


MESSAGE = {"type": "message", "id": "i", "role": "assistant", "status": "in_progress", "content": []}
TEXT_PART = {
    "type": "response.content_part.added",
    "item_id": "i",
    "part": {"type": "output_text", "text": "", "annotations": []},
}
CALL = {"type": "function_call", "id": "i", "call_id": "a", "name": "f", "arguments": ""}


async def respond(answer: list[Event], *, helper: bool = False) -> list[Part]:
    async with endpoint(answer) as served, client(served) as openai:
        if helper:
            return await collect(openai.responses.stream(model="m", input=MESSAGES, instructions=CANARY))
        return await collect(await openai.responses.create(model="m", input=MESSAGES, stream=True))


@pytest.mark.parametrize("helper", [False, True])
async def test_reasoning_and_text_of_a_response(helper: bool) -> None:
    reasoning = {"type": "reasoning", "id": "i", "summary": []}
    summary = {"summary_index": 0, "item_id": "i", "part": {"type": "summary_text", "text": ""}}
    added_part = {"type": "response.reasoning_summary_part.added"} | summary
    done_part = {"type": "response.reasoning_summary_part.done"} | summary
    answer = numbered(
        added(**reasoning),
        added_part,
        delta("reasoning_summary_text", "Th", summary_index=0),
        delta("reasoning_summary_text", "ink", summary_index=0),
        done_part,
        added_part,
        delta("reasoning_summary_text", "ing", summary_index=1),
        done_part,
        done(**reasoning, encrypted_content=CANARY),
        added(**MESSAGE) | {"output_index": 1},
        TEXT_PART | {"output_index": 1},
        delta("output_text", "Hel", logprobs=[], output_index=1),
        delta("output_text", "lo", logprobs=[], output_index=1),
        {"type": "response.content_part.done", "item_id": "i", "part": TEXT_PART["part"], "output_index": 1},
        done(**MESSAGE) | {"output_index": 1},
    )
    if helper:  # its accumulator requires the summaries that the raw events leave out
        answer = [event for event in answer if "summary" not in event["type"]]
    found = await respond(answer, helper=helper)
    assert types_of(found)[-4:] == TEXT
    assert text_of(found) == "Hello"
    assert found[-1]["finishReason"] == "stop"
    if not helper:
        assert text_of(found, "reasoning") == "Thinking"
        assert len(of_type(found, "reasoning-end")) == 2


@pytest.mark.parametrize("helper", [False, True])
async def test_parallel_function_calls_of_a_response(helper: bool) -> None:
    other = CALL | {"id": "j", "call_id": "b"}
    found = await respond(
        numbered(
            added(**CALL),
            delta("function_call_arguments", '{"x":'),
            delta("function_call_arguments", " 1}"),
            done(**CALL | {"arguments": '{"x": 1}'}),
            added(**other) | {"output_index": 1},
            done(**other | {"arguments": "{}"}) | {"output_index": 1},
        ),
        helper=helper,
    )
    assert of_type(found, "tool-input-available") == [
        {"toolCallId": "a", "toolName": "f", "input": {"x": 1}},
        {"toolCallId": "b", "toolName": "f", "input": {}},
    ]
    assert len(of_type(found, "tool-input-delta")) == 2
    assert found[-1]["finishReason"] == "tool-calls"


async def test_hosted_tools_citations_and_images_of_a_response() -> None:
    web = {"type": "web_search_call", "id": "w", "status": "completed"}
    files = {"type": "file_search_call", "id": "s", "status": "completed", "queries": ["q"]}
    results = [{"file_id": "1", "filename": "notes.txt", "text": CANARY}]
    mcp = {"type": "mcp_call", "id": "m", "name": "lookup", "server_label": "s", "arguments": '{"a": 1}'}
    python = {"type": "code_interpreter_call", "id": "p", "status": "completed", "code": "1", "container_id": "c"}
    cited = {"type": "url_citation", "url": "https://example.com", "title": "E", "start_index": 0, "end_index": 1}
    file = {"type": "file_citation", "file_id": "1", "filename": "notes.txt", "index": 0}
    found = await respond(
        numbered(
            added(**web),
            done(**web, action={"type": "search", "query": "weather"}),
            done(**files, results=results),
            added(**mcp),
            done(**mcp, output="found"),
            done(**mcp | {"id": "n"}, error={"type": "x", "message": CANARY}),
            done(**python, outputs=[{"type": "logs", "logs": "1"}]),
            done(type="image_generation_call", id="g", status="completed", result="AAAA"),
            delta("output_text", "See", logprobs=[]),
            {
                "type": "response.output_text.annotation.added",
                "item_id": "i",
                "annotation_index": 0,
                "annotation": cited,
            },
            {
                "type": "response.output_text.annotation.added",
                "item_id": "i",
                "annotation_index": 1,
                "annotation": file,
            },
        )
    )
    calls = {part["toolCallId"]: part for part in of_type(found, "tool-input-available")}
    assert all(part["providerExecuted"] for part in calls.values())
    assert calls["w"]["toolName"] == "web_search" and calls["w"]["input"] == {"type": "search", "query": "weather"}
    assert calls["s"]["input"] == {"queries": ["q"]} and calls["m"]["input"] == {"a": 1}
    outputs = {part["toolCallId"]: part["output"] for part in of_type(found, "tool-output-available")}
    assert outputs["s"] == {"status": "completed", "filenames": ["notes.txt"]}
    assert outputs["m"] == "found"
    assert outputs["p"]["outputs"] == [{"type": "logs", "logs": "1"}]
    assert [part["toolCallId"] for part in of_type(found, "tool-output-error")] == ["n"]
    assert of_type(found, "file") == [{"url": "data:image/png;base64,AAAA", "mediaType": "image/png"}]
    assert of_type(found, "source-url")[0]["url"] == "https://example.com"
    assert of_type(found, "source-document")[0]["filename"] == "notes.txt"


async def test_custom_tools_of_a_response() -> None:
    item = {"type": "custom_tool_call", "id": "i", "call_id": "a", "name": "sql", "input": "select 1"}
    found = await respond(numbered(done(**item)))
    assert of_type(found, "tool-input-available") == [{"toolCallId": "a", "toolName": "sql", "input": "select 1"}]


async def test_a_refused_response() -> None:
    found = await respond(numbered(delta("refusal", "No.")))
    assert (text_of(found), found[-1]["finishReason"]) == ("No.", "content-filter")


@pytest.mark.parametrize(
    ("reason", "expected"), [("max_output_tokens", "length"), ("content_filter", "content-filter")]
)
async def test_an_incomplete_response(reason: str, expected: str) -> None:
    found = await respond(numbered(status="incomplete", incomplete_details={"reason": reason}))
    assert found == [{"type": "finish", "finishReason": expected}]


async def test_a_failed_response() -> None:
    answer = numbered(
        delta("output_text", "Hel", logprobs=[]), status="failed", error={"code": "server_error", "message": "Later"}
    )
    async with endpoint(answer) as served, client(served) as openai:
        stream = await openai.responses.create(model="m", input=MESSAGES, stream=True)
        found, error = await collect_failing(stream)
    assert types_of(found) == TEXT[:-1]
    assert isinstance(error, SourceFailed) and "server_error: Later" in str(error)
