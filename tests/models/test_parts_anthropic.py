"""`parts()` with the client of anthropic, raw and with the helper."""

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

HELPER = pytest.mark.parametrize("helper", [False, True])
TEXT = ["text-start", "text-delta", "text-end"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def client(served: Endpoint) -> AsyncIterator[Any]:
    options = {"api_key": CANARY, "default_headers": {"x-tenant": CANARY}, "max_retries": 0}
    async with need("anthropic").AsyncAnthropic(base_url=served.url, **options) as found:
        yield found
    assert CANARY in served.requests[0]


def request() -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": CANARY}]
    return {"model": "m", "max_tokens": 9, "system": CANARY, "messages": [*messages, {"role": "user", "content": "go"}]}


async def message(*events: Event, stop: str = "end_turn", helper: bool = False) -> list[Part]:
    async with endpoint(whole(*events, stop=stop)) as served, client(served) as anthropic:
        if helper:
            return await collect(anthropic.messages.stream(**request()))
        return await collect(await anthropic.messages.create(**request(), stream=True))


def whole(*events: Event, stop: str = "end_turn") -> list[Event]:
    usage = {"input_tokens": 1, "output_tokens": 1}
    start = {"id": "msg", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": usage}
    return [
        {"type": "message_start", "message": start | {"stop_reason": None, "stop_sequence": None}},
        {"type": "ping"},
        *events,
        {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]


def block(index: int, content: Event, *deltas: Event) -> list[Event]:
    return [
        {"type": "content_block_start", "index": index, "content_block": content},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def text(index: int, *words: str) -> list[Event]:
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": word} for word in words))


def tool(index: int, id: str, *pieces: str, type: str = "tool_use") -> list[Event]:
    start = {"type": type, "id": id, "name": "f", "input": {}}
    return block(index, start, *({"type": "input_json_delta", "partial_json": piece} for piece in pieces))


@HELPER
async def test_thinking_and_text(helper: bool) -> None:
    found = await message(
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "Let "},
            {"type": "thinking_delta", "thinking": "me."},
            {"type": "signature_delta", "signature": CANARY},
        ),
        *block(1, {"type": "redacted_thinking", "data": CANARY}),
        *text(2, "Hel", "lo"),
        *text(3, "Again"),
        helper=helper,
    )
    assert types_of(found) == ["reasoning-start", "reasoning-delta", "reasoning-end", *TEXT, *TEXT, "finish"]
    assert (text_of(found, "reasoning"), text_of(found)) == ("Let me.", "HelloAgain")
    assert found[-1]["finishReason"] == "stop"


@HELPER
async def test_parallel_tool_calls(helper: bool) -> None:
    found = await message(
        *text(0, "I look."), *tool(1, "a", '{"x": ', "1}"), *tool(2, "b"), stop="tool_use", helper=helper
    )
    assert of_type(found, "tool-input-available") == [
        {"toolCallId": "a", "toolName": "f", "input": {"x": 1}},
        {"toolCallId": "b", "toolName": "f", "input": {}},
    ]
    assert [part["inputTextDelta"] for part in of_type(found, "tool-input-delta")] == ['{"x": ', "1}"]
    assert found[-1]["finishReason"] == "tool-calls"


@HELPER
async def test_tools_that_the_api_executes(helper: bool) -> None:
    page = {"type": "web_search_result", "url": "https://example.com", "title": "E", "encrypted_content": CANARY}
    failure = {"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"}
    found = await message(
        *tool(0, "a", '{"query": "q"}', type="server_tool_use"),
        *block(1, {"type": "web_search_tool_result", "tool_use_id": "a", "content": [page | {"page_age": None}]}),
        *tool(2, "b", "{}", type="server_tool_use"),
        *block(3, {"type": "web_search_tool_result", "tool_use_id": "b", "content": failure}),
        helper=helper,
    )
    assert all(part["providerExecuted"] for part in of_type(found, "tool-input-available"))
    [output] = of_type(found, "tool-output-available")
    assert output["output"][0]["url"] == "https://example.com"
    assert of_type(found, "source-url")[0]["title"] == "E"
    [error] = of_type(found, "tool-output-error")
    assert error == {"toolCallId": "b", "errorText": "The tool failed: max_uses_exceeded."}


@HELPER
async def test_citations(helper: bool) -> None:
    url = {"type": "web_search_result_location", "url": "https://example.com", "title": "E", "encrypted_index": CANARY}
    page = {"type": "page_location", "document_index": 0, "document_title": "Report", "cited_text": CANARY}
    citations = [url | {"cited_text": CANARY}, page | {"start_page_number": 1, "end_page_number": 2}]
    found = await message(
        *block(
            0,
            {"type": "text", "text": "", "citations": []},
            {"type": "text_delta", "text": "See"},
            *({"type": "citations_delta", "citation": citation} for citation in citations),
        ),
        helper=helper,
    )
    assert of_type(found, "source-url")[0]["url"] == "https://example.com"
    [document] = of_type(found, "source-document")
    assert (document["title"], document["mediaType"]) == ("Report", "application/pdf")


@HELPER
@pytest.mark.parametrize(
    ("stop", "reason"),
    [("refusal", "content-filter"), ("max_tokens", "length"), ("pause_turn", "other"), ("stop_sequence", "stop")],
)
async def test_reasons_of_an_empty_answer(stop: str, reason: str, helper: bool) -> None:
    assert await message(stop=stop, helper=helper) == [{"type": "finish", "finishReason": reason}]


@HELPER
async def test_a_connection_that_breaks(helper: bool) -> None:
    events = whole(*text(0, "Hel"))[:4]
    async with endpoint(events, cut=True) as served, client(served) as anthropic:
        if helper:
            found, _ = await collect_failing(anthropic.messages.stream(**request()))
        else:
            found, _ = await collect_failing(await anthropic.messages.create(**request(), stream=True))
    assert types_of(found) == TEXT


@HELPER
async def test_an_error_event(helper: bool) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    async with endpoint([*whole(*text(0, "Hel"))[:4], error]) as served, client(served) as anthropic:
        if helper:
            found, failure = await collect_failing(anthropic.messages.stream(**request()))
        else:
            found, failure = await collect_failing(await anthropic.messages.create(**request(), stream=True))
    assert types_of(found) == TEXT
    assert isinstance(failure, need("anthropic").APIStatusError | SourceFailed)


async def test_the_text_stream_of_the_helper() -> None:
    async with endpoint(whole(*text(0, "Hel", "lo"))) as served, client(served) as anthropic:
        async with anthropic.messages.stream(**request()) as stream:
            found = await collect(stream.text_stream)
    assert text_of(found) == "Hello"
