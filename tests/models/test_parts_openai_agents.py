"""`parts()` with openai-agents, on models of both of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asgi_realtime.ai import parts
from tests.ai.collecting import CANARY, Part, collect, collect_failing, of_type, text_of, types_of
from tests.models.endpoint import Event, endpoint
from tests.models.needs import need
from tests.models.test_parts_openai import CALL, MESSAGE, added, call, chunk, delta, done, numbered

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

STEP = ["start-step", "text-start", "text-delta", "text-end", "finish-step", "finish"]
INPUT: list[Any] = [
    {"role": "user", "content": CANARY},
    {"role": "assistant", "content": CANARY},
    {"role": "user", "content": "hi"},
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")


def text_part(text: str) -> Event:
    return {"type": "output_text", "text": text, "annotations": []}


def says(*words: str) -> list[Event]:
    """A response with a text."""
    message = MESSAGE | {"status": "completed", "content": [text_part("".join(words))]}
    part = {"item_id": "i", "part": text_part("")}
    return numbered(
        added(**MESSAGE),
        {"type": "response.content_part.added"} | part,
        *(delta("output_text", word, logprobs=[]) for word in words),
        {"type": "response.content_part.done"} | part,
        done(**message),
        output=[message],
    )


def calls(*arguments: str, name: str = "weather") -> list[Event]:
    """A response that calls a tool for each of the arguments."""
    items = [
        CALL | {"id": f"i{n}", "call_id": f"call-{n}", "name": name, "arguments": text}
        for n, text in enumerate(arguments)
    ]
    events = [event for item in items for event in (added(**item | {"arguments": ""}), done(**item))]
    return numbered(*events, output=items)


@asynccontextmanager
async def running(*answers: list[Event], api: str = "responses", **options: Any) -> AsyncIterator[Any]:
    """A streamed run of an agent with a tool, whose model gives these answers."""
    agents, openai = need("agents"), need("openai")
    secret = CANARY

    def weather(city: str) -> dict[str, Any]:
        """Look up the weather."""
        if city == "nowhere":
            raise ValueError(secret)
        return {"city": city}

    async with endpoint(*answers, done=api == "completions", **options) as served:
        async with openai.AsyncOpenAI(base_url=served.url, api_key=CANARY, max_retries=0) as client:
            kinds = {"responses": "OpenAIResponsesModel", "completions": "OpenAIChatCompletionsModel"}
            model = getattr(agents, kinds[api])(model="m", openai_client=client)
            other = agents.Agent(name="other", instructions=CANARY, model=model)
            agent = agents.Agent(
                name="first", instructions=CANARY, model=model, tools=[agents.function_tool(weather)], handoffs=[other]
            )
            yield agents.Runner.run_streamed(agent, INPUT)
        assert all(CANARY in request for request in served.requests)


async def run(*answers: list[Event], api: str = "responses") -> list[Part]:
    async with running(*answers, api=api) as result:
        return await collect(result)


async def test_parallel_tool_calls_and_text() -> None:
    found = await run(calls('{"city": "Paris"}', '{"city": "Rome"}'), says("It is ", "sunny."))
    inputs = {part["toolCallId"]: part["input"] for part in of_type(found, "tool-input-available")}
    assert inputs == {"call-0": {"city": "Paris"}, "call-1": {"city": "Rome"}}
    outputs = {part["toolCallId"]: part["output"] for part in of_type(found, "tool-output-available")}
    assert outputs == inputs
    assert types_of(found)[-6:] == STEP
    assert text_of(found) == "It is sunny."
    assert found[-1]["finishReason"] == "stop"


async def test_a_model_of_chat_completions() -> None:
    found = await run(
        [
            chunk(role="assistant", tool_calls=[call(0, "", id="a", type="function", name="weather")]),
            chunk(tool_calls=[call(0, '{"city": "Paris"}')]),
            chunk("tool_calls"),
        ],
        [chunk(role="assistant", content="It is "), chunk(content="sunny."), chunk("stop")],
        api="completions",
    )
    assert of_type(found, "tool-output-available") == [{"toolCallId": "a", "output": {"city": "Paris"}}]
    assert types_of(found)[-6:] == STEP
    assert text_of(found) == "It is sunny."


async def test_the_events_of_a_run() -> None:
    async with running(says("Hi")) as result:
        assert text_of(await collect(result.stream_events())) == "Hi"


async def test_a_tool_that_raises() -> None:
    found = await run(calls('{"city": "nowhere"}'), says("Sorry."))
    assert of_type(found, "tool-output-error") == [{"toolCallId": "call-0", "errorText": "The tool failed."}]


async def test_a_handoff() -> None:
    found = await run(calls("{}", name="transfer_to_other"), says("Hi"))
    [output] = of_type(found, "tool-output-available")
    assert output["toolCallId"] == "call-0"
    assert text_of(found) == "Hi"


async def test_a_refusal() -> None:
    message = MESSAGE | {"status": "completed", "content": [{"type": "refusal", "refusal": "No."}]}
    answer = numbered(added(**MESSAGE), delta("refusal", "No."), done(**message), output=[message])
    async with running(answer) as result:
        found, error = await collect_failing(result)
    assert text_of(found) == "No."
    assert isinstance(error, need("agents.exceptions").ModelRefusalError)


async def test_a_connection_that_breaks() -> None:
    async with running(says("Hel")[:4], cut=True) as result:
        found, _ = await collect_failing(result)
    assert text_of(found) == "Hel"


async def test_leaving_early_cancels_the_run() -> None:
    async with running(calls('{"city": "Paris"}'), says("never")) as result:
        async with parts(result) as found:
            await anext(found)
    assert result._cancel_mode == "immediate"
    assert result.is_complete


async def test_a_run_that_is_never_read_is_canceled() -> None:
    async with running(says("never")) as result:
        await parts(result).aclose()
    assert result._cancel_mode == "immediate"
