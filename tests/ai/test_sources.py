"""Each kind of source becomes the same message, and nothing private is in it. Without the libraries."""

from __future__ import annotations

from types import SimpleNamespace as Object
from typing import Any

import pytest

from asgi_realtime import InvalidSource, SourceFailed
from asgi_realtime.ai.message import assemble
from tests.ai.collecting import CANARY, collect, collect_failing, of_type, text_of, types_of
from tests.ai.plain_sources import ARGUMENTS, SOURCES, gemini, message

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", SOURCES)
async def test_a_tool_call_and_text(name: str) -> None:
    source = SOURCES[name]
    found = await collect(source.items)
    assert assemble(found, message_id="m")["parts"] == source.message
    assert found[-1] == {"type": "finish", "finishReason": source.reason}
    assert [part["delta"] for part in of_type(found, "text-delta")] in (["Hel", "lo"], ["Hello"])
    pieces = [part["inputTextDelta"] for part in of_type(found, "tool-input-delta")]
    assert pieces == (ARGUMENTS if source.streams_input else [])


@pytest.mark.parametrize("name", SOURCES)
async def test_every_beginning_of_a_source(name: str) -> None:
    """Wherever a source ends, and wherever it fails, the order is right."""

    async def failing(items: list[Any]) -> Any:
        for item in items:
            yield item
        raise OSError

    items = SOURCES[name].items
    for length in range(1, len(items)):
        _, error = await collect_failing(failing(items[:length]))
        assert isinstance(error, OSError)
        if name != "LangGraph's updates":
            await collect(items[:length])


async def test_content_of_mistral() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Let me"}]}
    delta = {"content": [thinking, {"type": "text", "text": "Hi"}]}
    found = await collect([{"data": {"choices": [{"index": 0, "delta": delta}]}}])
    assert (text_of(found, "reasoning"), text_of(found)) == ("Let me", "Hi")


async def test_a_failure_of_an_ag_ui_agent() -> None:
    found, error = await collect_failing([{"type": "RUN_ERROR", "message": "no key"}])
    assert found == []
    assert isinstance(error, SourceFailed) and "no key" in str(error)


async def test_reasoning_and_custom_events_of_ag_ui() -> None:
    found = await collect(
        [
            {"type": "REASONING_MESSAGE_START", "messageId": "m", "role": "reasoning"},
            {"type": "REASONING_MESSAGE_CONTENT", "messageId": "m", "delta": "Let me"},
            {"type": "REASONING_MESSAGE_END", "messageId": "m"},
            {"type": "CUSTOM", "name": "progress", "value": {"done": 1}},
            {"type": "RUN_FINISHED"},
        ]
    )
    assert types_of(found)[:4] == ["reasoning-start", "reasoning-delta", "reasoning-end", "data-progress"]
    assert of_type(found, "data-progress") == [{"data": {"done": 1}}]


async def test_outputs_without_a_json_form_are_named_only() -> None:
    agent = Object(event_kind="function_tool_call", part=Object(tool_call_id="a", tool_name="f", args={}))
    result = Object(tool_call_id="a", tool_name="f", content=object(), outcome="success")
    found = await collect([agent, Object(event_kind="function_tool_result", part=result)])
    assert of_type(found, "tool-output-available") == [{"toolCallId": "a", "output": "<object>"}]


@pytest.mark.parametrize(
    ("outcome", "text"),
    [("denied", "The tool call was denied."), ("failed", "The tool failed."), ("retried", "The tool failed.")],
)
async def test_outcomes_of_tools_of_pydantic_ai(outcome: str, text: str) -> None:
    part = Object(tool_call_id="a", tool_name="f", content=CANARY, outcome=outcome)
    found = await collect([Object(event_kind="function_tool_result", part=part)])
    assert of_type(found, "tool-output-error") == [{"toolCallId": "a", "errorText": text}]


async def test_native_tools_of_pydantic_ai() -> None:
    call = Object(part_kind="builtin-tool-call", tool_call_id="a", tool_name="search", args={"q": 1})
    result = Object(part_kind="builtin-tool-return", tool_call_id="a", tool_name="search", content="found")
    events = [
        Object(event_kind="part_start", index=0, part=call),
        Object(event_kind="part_end", index=0, part=call),
        Object(event_kind="part_start", index=1, part=result),
    ]
    found = await collect(events)
    expected = {"toolCallId": "a", "toolName": "search", "input": {"q": 1}, "providerExecuted": True}
    assert of_type(found, "tool-input-available") == [expected]
    assert of_type(found, "tool-output-available") == [{"toolCallId": "a", "output": "found"}]


async def test_a_tool_that_raised_in_openai_agents() -> None:
    items = [one for one in SOURCES["openai-agents"].items if getattr(one, "name", "") != "tool_output"]
    output = f"An error occurred while running the tool. Please try again. Error: {CANARY}"
    item = Object(type="tool_call_output_item", raw_item={"call_id": "a"}, output=output)
    found = await collect([*items[:6], Object(type="run_item_stream_event", item=item)])
    assert of_type(found, "tool-output-error") == [{"toolCallId": "a", "errorText": "The tool failed."}]


async def test_the_command_of_a_tool_of_langchain() -> None:
    result = message("tool", "done", "t", tool_call_id="a", name="f", status="success")
    command = Object(update={"messages": [message("human", CANARY), result], "key": CANARY})
    found = await collect([{"event": "on_tool_end", "run_id": "r", "name": "f", "data": {"output": command}}])
    assert of_type(found, "tool-output-available") == [{"toolCallId": "a", "output": "done"}]


async def test_a_completion_model_of_langchain() -> None:
    events = [
        {"event": kind, "run_id": "r", "name": "m", "data": data}
        for kind, data in (("on_llm_stream", {"chunk": Object(text="Hi")}), ("on_llm_end", {"output": CANARY}))
    ]
    assert text_of(await collect(events)) == "Hi"


async def test_only_the_first_candidate_of_google_genai_is_converted() -> None:
    one, other = gemini(text="Hi").candidates[0], gemini(text="Bye").candidates[0]
    other.index = 1
    one.citation_metadata = Object(citations=[Object(uri="https://example.com", title=None)])
    found = await collect([Object(candidates=[one, other], prompt_feedback=None)])
    assert text_of(found) == "Hi"
    assert of_type(found, "source-url")[0]["url"] == "https://example.com"


async def test_results_of_functions_that_are_no_objects() -> None:
    call = {"name": "weather", "args": {}}
    answers = [{"result": 21}, {"a": 1, "error": "kept"}]
    responses = [Object(function_response=Object(name="weather", response=answer)) for answer in answers]
    unknown = Object(function_response=Object(name="unknown", response={}))
    found = await collect(
        [
            *(gemini(function_call=Object(id=id, **call)) for id in "ab"),
            gemini("STOP", text="Hi", history=[Object(parts=[*responses, unknown])]),
        ]
    )
    assert of_type(found, "tool-output-available") == [
        {"toolCallId": "a", "output": 21},
        {"toolCallId": "b", "output": answers[1]},
    ]


@pytest.mark.parametrize("item", [(1, 2, 3), (("a",), "messages"), ("other", {}), ((), 5), (message("ai"), 5)])
async def test_tuples_that_are_not_of_langgraph(item: Any) -> None:
    _, error = await collect_failing([item])
    assert isinstance(error, InvalidSource)
