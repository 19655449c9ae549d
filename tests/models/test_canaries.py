"""Nothing that the host keeps private reaches a chunk, with the real packages of model clients and agent frameworks.

Prompts, instructions, histories, the credentials of tools, and headers contain a canary. The objects are built from
what the APIs send, as the clients build them; nothing here uses a network.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from asgi_realtime.core.errors import EncodingError
from tests.faults import make, stored
from tests.models.needs import need

pytestmark = pytest.mark.anyio

CANARY = "CANARY-7d1f"
TEXT = "Hello"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")


async def chunks_of(source: Any) -> list[Any]:
    """What a raw source publishes. No chunk contains the canary; what is skipped does not mention it either."""
    async with make() as realtime:
        async with realtime.open_run("chat") as run:
            pipe = realtime.pipe(source)
            items = [item async for item in pipe]
            try:
                await pipe.wait_until_complete()
            except EncodingError as exc:
                assert "encode=" in str(exc) and CANARY not in str(exc)
        chunks = await stored(realtime, run.id)
    assert items
    assert CANARY not in json.dumps(chunks)
    return chunks


COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": TEXT}, "finish_reason": None}],
}


def response() -> dict[str, Any]:
    """As the Responses API repeats the request in `response.created`."""
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": "in_progress",
        "model": "m",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "instructions": CANARY,
        "prompt": {"id": "pmpt_1", "variables": {"key": CANARY}},
        "tools": [{"type": "mcp", "server_label": "s", "headers": {"Authorization": CANARY}, "require_approval": None}],
    }


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("openai.types.chat", "ChatCompletionChunk"),
        ("groq.types.chat", "ChatCompletionChunk"),
        ("cerebras.cloud.sdk.types.chat.chat_completion", "ChatChunkResponse"),
    ],
)
async def test_chunks_of_completions_are_as_the_api_sent_them(module: str, name: str) -> None:
    model = getattr(need(module), name)
    assert await chunks_of([model.construct(**COMPLETION)]) == [COMPLETION]


async def test_openai_responses() -> None:
    types = need("openai.types.responses")
    events = [
        types.ResponseCreatedEvent.construct(
            type="response.created", sequence_number=0, response=types.Response.construct(**response())
        ),
        types.ResponseTextDeltaEvent.construct(type="response.output_text.delta", delta=TEXT, sequence_number=1),
    ]
    created, delta = await chunks_of(events)
    assert created["type"] == "response.created"
    assert created["response"]["id"] == "resp_1"
    assert not {"instructions", "prompt", "tools"} & set(created["response"])
    assert delta == {"type": "response.output_text.delta", "delta": TEXT, "sequence_number": 1}


async def test_helper_events_of_openai() -> None:
    events = need("openai.lib.streaming.chat._events")
    delta = events.ContentDeltaEvent.construct(type="content.delta", delta=TEXT, snapshot=CANARY, parsed=CANARY)
    arguments = events.FunctionToolCallArgumentsDeltaEvent.construct(
        type="tool_calls.function.arguments.delta", name="f", index=0, arguments_delta="}", arguments=CANARY
    )
    assert await chunks_of([delta, arguments]) == [
        {"type": "content.delta", "delta": TEXT},
        {"type": "tool_calls.function.arguments.delta", "name": "f", "index": 0, "arguments_delta": "}"},
    ]


async def test_helper_events_of_anthropic() -> None:
    events = need("anthropic.lib.streaming._types")
    text = events.TextEvent.construct(type="text", text=TEXT, snapshot=CANARY)
    assert await chunks_of([text]) == [{"type": "text", "text": TEXT}]


async def test_google_genai() -> None:
    types = need("google.genai.types")
    sent = {"candidates": [{"content": {"parts": [{"text": TEXT}], "role": "model"}, "index": 0}], "responseId": "r"}
    answer = types.GenerateContentResponse.model_validate(sent)
    answer.sdk_http_response = types.HttpResponse(headers={"x-key": CANARY})
    answer.automatic_function_calling_history = [types.Content(role="user", parts=[types.Part(text=CANARY)])]
    assert await chunks_of([answer]) == [sent]


async def test_mistral() -> None:
    models = need("mistralai.client.models")
    [chunk] = await chunks_of([models.CompletionEvent.model_validate({"data": COMPLETION})])
    assert chunk == {"data": COMPLETION}


async def test_ollama() -> None:
    ollama = need("ollama")
    sent = {"model": "m", "message": {"role": "assistant", "content": TEXT}, "done": False}
    generated = ollama.GenerateResponse(model="m", response=TEXT, done=True, context=[1, 2, 3])
    assert await chunks_of([ollama.ChatResponse(**sent), generated]) == [
        sent,
        {"model": "m", "response": TEXT, "done": True},
    ]


async def test_huggingface() -> None:
    hub = need("huggingface_hub")
    sent = {**COMPLETION, "system_fingerprint": "f"}
    [chunk] = await chunks_of([hub.ChatCompletionStreamOutput.parse_obj_as_instance(sent)])
    assert chunk["choices"] == [{"index": 0, "delta": {"content": TEXT}}]
    assert None not in chunk.values()


@pytest.mark.filterwarnings("ignore")
async def test_litellm() -> None:
    utils = need("litellm.types.utils")
    chunk = utils.ModelResponseStream(**COMPLETION)
    chunk._hidden_params = {"additional_headers": CANARY}
    [got] = await chunks_of([chunk])
    assert got["choices"] == [{"index": 0, "delta": {"content": TEXT}}]


async def test_parts_of_chat_protocols() -> None:
    ag_ui, vercel = need("ag_ui.core"), need("pydantic_ai.ui.vercel_ai.response_types")
    event = ag_ui.TextMessageContentEvent(message_id="1", delta=TEXT)
    assert await chunks_of([event, vercel.TextDeltaChunk(id="1", delta=TEXT)]) == [
        {"type": "TEXT_MESSAGE_CONTENT", "messageId": "1", "delta": TEXT},
        {"type": "text-delta", "id": "1", "delta": TEXT},
    ]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.filterwarnings("ignore")
async def test_events_of_a_pydantic_ai_agent(anyio_backend: str) -> None:
    pydantic_ai, models = need("pydantic_ai"), need("pydantic_ai.models.test")
    agent = pydantic_ai.Agent(
        models.TestModel(custom_output_text=TEXT, call_tools=[]), system_prompt=CANARY, instructions=CANARY
    )

    async def events() -> AsyncIterator[Any]:
        async with agent.run_stream_events("hi") as stream:
            async for event in stream:
                yield event

    chunks = await chunks_of(events())
    deltas = [chunk["delta"] for chunk in chunks if chunk["event_kind"] == "part_delta"]
    assert "".join(delta["content_delta"] for delta in deltas) == TEXT
    assert "agent_run_result" not in [chunk["event_kind"] for chunk in chunks]


async def test_messages_of_pydantic_ai() -> None:
    messages, run = need("pydantic_ai.messages"), need("pydantic_ai.run")
    request = messages.ModelRequest(parts=[messages.SystemPromptPart(CANARY)], instructions=CANARY)
    result = run.AgentRunResult(TEXT)
    result._state.message_history.append(request)
    assert await chunks_of([request, [request], {"a": [request]}, result, {"result": result}]) == []


async def test_events_of_openai_agents() -> None:
    agents, types = need("agents"), need("openai.types.responses")
    agent = agents.Agent(name="a", instructions=CANARY)
    created = types.ResponseCreatedEvent.construct(
        type="response.created", sequence_number=0, response=types.Response.construct(**response())
    )
    events = [
        agents.AgentUpdatedStreamEvent(new_agent=agent),
        agents.RawResponsesStreamEvent(data=created),
        agents.RunItemStreamEvent(name="message_output_created", item=None),  # type: ignore[unused-ignore, arg-type]
        agent,
        {"agent": agent},
    ]
    assert await chunks_of(events) == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_events_of_langchain(anyio_backend: str) -> None:
    runnables, fake = need("langchain_core.runnables"), need("langchain_core.language_models.fake_chat_models")
    prompts = need("langchain_core.prompts")
    prompt = prompts.ChatPromptTemplate.from_messages([("system", CANARY), ("human", "{question}")])
    model = fake.GenericFakeChatModel(messages=iter([TEXT]))
    assert issubclass(type(prompt | model), runnables.Runnable)
    chunks = await chunks_of((prompt | model).astream_events({"question": CANARY}, version="v2"))
    streamed = [chunk["data"]["chunk"]["content"] for chunk in chunks if chunk["event"] == "on_chat_model_stream"]
    assert "".join(streamed) == TEXT


async def test_messages_of_langchain() -> None:
    messages, values = need("langchain_core.messages"), need("langchain_core.prompt_values")
    system = messages.SystemMessage(CANARY)
    prompt = values.ChatPromptValue(messages=[system])
    answer = messages.AIMessageChunk(content=TEXT)
    items: Iterator[Any] = iter([system, (system, {}), {"a": [messages.HumanMessage(CANARY)]}, prompt, answer])
    [chunk] = await chunks_of(items)
    assert chunk["content"] == TEXT


async def test_values_of_numpy() -> None:
    numpy = need("numpy")
    row = {"loss": numpy.float32(0.5), "all": numpy.array([[1, 2], [3, 4]]), "ok": numpy.bool_(True)}
    nan = {numpy.int64(1): numpy.float64("nan"), "list": numpy.array([numpy.inf])}
    assert await chunks_of([row, nan]) == [
        {"loss": 0.5, "all": [[1, 2], [3, 4]], "ok": True},
        {"1": None, "list": [None]},
    ]
