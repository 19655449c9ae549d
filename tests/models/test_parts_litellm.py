"""`parts()` with litellm."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ai.collecting import CANARY, Part, collect, collect_failing, of_type, text_of, types_of
from tests.models.endpoint import Endpoint, Event, endpoint
from tests.models.needs import need
from tests.models.test_parts_openai import MESSAGES, TEXT, call, chunk

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


async def opened(served: Endpoint) -> Any:
    litellm = need("litellm")
    return await litellm.acompletion(
        model="openai/m", messages=MESSAGES, stream=True, api_base=served.url, api_key=CANARY, num_retries=0
    )


async def completion(*chunks: Event) -> list[Part]:
    async with endpoint(list(chunks), done=True) as served:
        found = await collect(await opened(served))
    assert CANARY in served.requests[0]
    return found


async def test_reasoning_and_text() -> None:
    found = await completion(
        chunk(role="assistant", reasoning_content="Let me."), chunk(content="Hel"), chunk(content="lo"), chunk("length")
    )
    assert types_of(found) == ["reasoning-start", "reasoning-delta", "reasoning-end", *TEXT]
    assert (text_of(found, "reasoning"), text_of(found)) == ("Let me.", "Hello")
    assert found[-1]["finishReason"] == "length"


async def test_parallel_tool_calls() -> None:
    found = await completion(
        chunk(role="assistant", tool_calls=[call(0, "", id="a", type="function", name="f")]),
        chunk(tool_calls=[call(0, '{"x": 1}')]),
        chunk(tool_calls=[call(1, "{}", id="b", type="function", name="g")]),
        chunk("tool_calls"),
    )
    assert of_type(found, "tool-input-available") == [
        {"toolCallId": "a", "toolName": "f", "input": {"x": 1}},
        {"toolCallId": "b", "toolName": "g", "input": {}},
    ]
    assert found[-1]["finishReason"] == "tool-calls"


async def test_an_empty_answer() -> None:
    assert await completion(chunk(role="assistant", content=""), chunk("stop")) == [
        {"type": "finish", "finishReason": "stop"}
    ]


async def test_a_connection_that_breaks() -> None:
    async with endpoint([chunk(role="assistant", content="Hel"), chunk(content="lo")], cut=True) as served:
        found, _ = await collect_failing(await opened(served))
    assert types_of(found) == TEXT[:-1]
