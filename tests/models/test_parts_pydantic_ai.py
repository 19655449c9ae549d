"""`parts()` with agents of pydantic-ai: their events, the result of `run_stream`, and the output of its adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace as Object
from types import new_class
from typing import Any

import pytest

from asgi_realtime import SourceFailed
from tests.ai.collecting import CANARY, Part, collect, collect_failing, of_type, text_of, types_of
from tests.models.needs import need

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

STEP = ["start-step", "tool-input-start", "tool-input-delta", "tool-input-available", "tool-output-available"]
TEXT = ["text-start", "text-delta", "text-end"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def vercel(agent: Any) -> Any:
    adapters, types = need("pydantic_ai.ui.vercel_ai"), need("pydantic_ai.ui.vercel_ai.request_types")
    message = types.UIMessage(id="u", role="user", parts=[types.TextUIPart(text="hi")])
    request = types.SubmitMessage(id="1", trigger="submit-message", messages=[message])
    return adapters.VercelAIAdapter(agent=agent, run_input=request).run_stream(deps=CANARY)


def ag_ui(agent: Any) -> Any:
    core, adapters = need("ag_ui.core"), need("pydantic_ai.ui.ag_ui")  # without the first, the second fails differently
    message = core.UserMessage(id="u", content="hi")
    request = core.RunAgentInput(
        thread_id="t", run_id="r", state={"a": CANARY}, messages=[message], tools=[], context=[], forwarded_props={}
    )
    return adapters.AGUIAdapter(agent=agent, run_input=request).run_stream(deps=CANARY)


OPEN: dict[str, Callable[[Any], Any]] = {
    "events": lambda agent: agent.run_stream_events("hi", message_history=history(), deps=CANARY),
    "run_stream": lambda agent: agent.run_stream("hi", message_history=history(), deps=CANARY),
    "vercel": vercel,
    "ag_ui": ag_ui,
}
EVERY = pytest.mark.parametrize("kind", OPEN)


def history() -> list[Any]:
    messages = need("pydantic_ai.messages")
    return [messages.ModelRequest(parts=[messages.UserPromptPart(CANARY)]), answer(messages.TextPart(CANARY))]


def answer(*parts: Any) -> Any:
    return need("pydantic_ai.messages").ModelResponse(parts=list(parts))


Deltas = Callable[[int], list[Any]]
"""What a model streams when it is called for the n-th time."""


def agent(deltas: Deltas) -> Any:
    """An agent whose model streams deltas, with a tool that looks up secrets and one that fails."""
    pydantic_ai, function = need("pydantic_ai"), need("pydantic_ai.models.function")
    calls = []

    async def stream(messages: Any, info: Any) -> AsyncIterator[Any]:
        calls.append(messages)
        for delta in deltas(len(calls) - 1):
            if isinstance(delta, Exception):
                raise delta
            yield delta

    found = pydantic_ai.Agent(
        function.FunctionModel(stream_function=stream), system_prompt=CANARY, instructions=CANARY, deps_type=str
    )

    def weather(context: Any, city: str) -> dict[str, Any]:
        assert context.deps == CANARY
        if city == "nowhere":
            raise pydantic_ai.ModelRetry(CANARY)
        return {"city": city, "degrees": 21}

    add_tool(found, weather)
    return found


def add_tool(agent: Any, tool: Callable[..., Any]) -> None:
    """Add a tool whose first argument is the context. Its annotation cannot name a package that may be missing."""
    tool.__annotations__["context"] = need("pydantic_ai").RunContext[str]
    agent.tool(tool)


def tool(index: int, arguments: str, *, name: str | None = None) -> Any:
    delta = need("pydantic_ai.models.function").DeltaToolCall
    return {index: delta(name=name, json_args=arguments, tool_call_id=f"call-{index}" if name else None)}


def thinking(text: str) -> Any:
    return {0: need("pydantic_ai.models.function").DeltaThinkingPart(content=text)}


def two_calls(step: int) -> list[Any]:
    if step == 0:
        return [
            tool(0, '{"city":', name="weather"),
            tool(0, ' "Paris"}'),
            tool(1, '{"city": "Rome"}', name="weather"),
        ]
    return ["It is ", "sunny."]


@EVERY
async def test_parallel_tool_calls_and_text(kind: str) -> None:
    found = await collect(OPEN[kind](agent(two_calls)))
    calls = {part["toolCallId"]: part for part in of_type(found, "tool-input-available")}
    assert [part["input"] for part in calls.values()] == [{"city": "Paris"}, {"city": "Rome"}]
    outputs = of_type(found, "tool-output-available")
    assert {part["output"]["city"]: part["toolCallId"] for part in outputs} == {"Paris": "call-0", "Rome": "call-1"}
    assert text_of(found) == "It is sunny."
    assert len(of_type(found, "text-delta")) == 2
    if kind != "ag_ui":  # its events have no steps for calls of the model
        assert len(of_type(found, "start-step")) == 2
        kinds = [kind for kind in types_of(found) if kind != "message-metadata"]
        assert kinds[-6:] == ["start-step", *TEXT, "finish-step", "finish"]
    assert found[-1]["finishReason"] == "stop"


@pytest.mark.parametrize("kind", ["events", "run_stream", "vercel"])  # AG-UI has no errors of tools
async def test_a_tool_that_fails_and_is_called_again(kind: str) -> None:
    def deltas(step: int) -> list[Any]:
        return [[tool(0, '{"city": "nowhere"}', name="weather")], ["Sorry."]][step]

    found = await collect(OPEN[kind](agent(deltas)))
    assert of_type(found, "tool-output-error") == [{"toolCallId": "call-0", "errorText": "The tool failed."}]
    assert text_of(found) == "Sorry."


@EVERY
async def test_thinking(kind: str) -> None:
    found = await collect(OPEN[kind](agent(lambda step: [thinking("Let "), thinking("me."), "Hi"])))
    assert (text_of(found, "reasoning"), text_of(found)) == ("Let me.", "Hi")
    kinds = [kind for kind in types_of(found) if not kind.endswith("step")]
    assert kinds[:6] == ["reasoning-start", "reasoning-delta", "reasoning-end", *TEXT]


@EVERY
async def test_an_empty_text(kind: str) -> None:
    def deltas(step: int) -> list[Any]:
        return [[tool(0, "{}", name="unknown")], [""], ["Hi"]][min(step, 2)]

    found = await collect(OPEN[kind](agent(deltas)))
    assert text_of(found) == ("" if kind == "run_stream" else "Hi")  # for that one, any text is the last response
    assert found[-1]["finishReason"] == "stop"


@EVERY
async def test_an_error_in_the_middle(kind: str) -> None:
    found, error = await collect_failing(OPEN[kind](agent(lambda step: ["Hel", OSError(CANARY)])))
    assert text_of(found) == "Hel"
    assert isinstance(error, OSError | SourceFailed)


@pytest.mark.parametrize("kind", ["events", "vercel"])
async def test_files_and_finish_reasons(kind: str) -> None:
    messages, models = need("pydantic_ai.messages"), need("pydantic_ai.models")
    image = messages.FilePart(messages.BinaryImage(b"abc", media_type="image/png"))
    response = answer(image, messages.TextPart("Here"))
    response.finish_reason = "length"
    model = need("pydantic_ai.models.test").TestModel(custom_output_text="Here")

    @asynccontextmanager
    async def request_stream(*args: Any, **options: Any) -> AsyncIterator[Any]:
        yield models.CompletedStreamedResponse(
            response, model_request_parameters=models.ModelRequestParameters(), replay_events=True
        )

    model.request_stream = request_stream
    found = await collect(OPEN[kind](need("pydantic_ai").Agent(model, deps_type=str)))
    assert of_type(found, "file") == [{"url": "data:image/png;base64,YWJj", "mediaType": "image/png"}]
    assert found[-1]["finishReason"] == "length"


def custom_event(name: str, **options: Any) -> Any:
    """A class of events of the app. Classes register themselves, so each needs another name."""
    fields = {"__annotations__": {"done": Any}, "__module__": __name__}
    bases = (need("pydantic_ai.messages").CustomEvent,)
    return dataclass(kw_only=True)(
        new_class("Event", bases, {"name": name, **options}, lambda body: body.update(fields))
    )


@pytest.mark.parametrize("kind", ["events", "vercel", "ag_ui"])
async def test_custom_events_are_data(kind: str) -> None:
    progress, secret = custom_event(f"progress_{kind}"), custom_event(f"secret_{kind}", ui=False)
    found_agent = agent(lambda step: [tool(0, "{}", name="work")] if step == 0 else ["Done"])

    async def work(context: Any) -> str:
        await context.emit(progress(done=1))
        await context.emit(secret(done=CANARY))
        return "worked"

    add_tool(found_agent, work)
    found = await collect(OPEN[kind](found_agent))
    [data] = [part["data"] for part in found if part["type"].startswith("data-progress")]
    assert data["done"] == 1


async def test_citations() -> None:
    sources = [Object(url="https://example.com", title="E", excerpts=[CANARY]), Object(title="Notes")]
    part = Object(part_kind="text", content="See", citations=[Object(sources=sources)])
    found: list[Part] = await collect([Object(event_kind="part_end", index=0, part=part)])
    assert of_type(found, "source-url")[0]["url"] == "https://example.com"
    assert of_type(found, "source-document")[0]["title"] == "Notes"
