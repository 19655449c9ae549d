"""`parts()` with google-genai."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ai.collecting import CANARY, Part, collect, collect_failing, of_type, text_of, types_of
from tests.models.endpoint import Endpoint, Event, endpoint
from tests.models.needs import need

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

TEXT = ["text-start", "text-delta", "text-end", "finish"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def response(*parts: Event, finish: str | None = None, **candidate: Any) -> Event:
    """A response as the API sends it."""
    reason = {} if finish is None else {"finishReason": finish}
    return {"candidates": [{"content": {"role": "model", "parts": list(parts)}, "index": 0} | reason | candidate]}


async def opened(served: Endpoint, **config: Any) -> Any:
    genai, types = need("google.genai"), need("google.genai.types")
    client = genai.Client(
        api_key=CANARY, http_options=types.HttpOptions(base_url=served.url, headers={"x-tenant": CANARY})
    )
    return await client.aio.models.generate_content_stream(
        model="m", contents="hi", config=types.GenerateContentConfig(system_instruction=CANARY, **config)
    )


async def answer(*answers: list[Event], **config: Any) -> list[Part]:
    async with endpoint(*answers) as served:
        found = await collect(await opened(served, **config))
    assert CANARY in served.requests[0]
    return found


async def test_thoughts_and_text() -> None:
    found = await answer(
        [
            response({"text": "Let me.", "thought": True, "thoughtSignature": "AAAA"}),
            response({"text": "Hel"}),
            response({"text": "lo"}, finish="MAX_TOKENS"),
        ]
    )
    assert types_of(found) == ["reasoning-start", "reasoning-delta", "reasoning-end", *TEXT]
    assert (text_of(found, "reasoning"), text_of(found)) == ("Let me.", "Hello")
    assert found[-1]["finishReason"] == "length"


async def test_parallel_function_calls() -> None:
    calls = [{"functionCall": {"name": name, "args": args}} for name, args in (("f", {"x": 1}), ("f", {"x": 2}))]
    found = await answer([response(*calls, finish="STOP")])
    inputs = of_type(found, "tool-input-available")
    assert [part["input"] for part in inputs] == [{"x": 1}, {"x": 2}]
    assert len({part["toolCallId"] for part in inputs}) == 2
    assert found[-1]["finishReason"] == "tool-calls"


async def test_arguments_in_pieces() -> None:
    """As Vertex AI streams them; the other API rejects them."""
    types = need("google.genai.types")

    def piece(*pieces: Any, name: str | None = None, more: bool = True) -> Any:
        call = types.FunctionCall(name=name, partial_args=list(pieces), will_continue=more or None)
        content = types.Content(role="model", parts=[types.Part(function_call=call)])
        return types.GenerateContentResponse(candidates=[types.Candidate(content=content)])

    def arg(path: str, **value: Any) -> Any:
        return types.PartialArg(json_path=path, **value)

    found = await collect(
        [
            piece(name="f"),
            piece(arg("$.city", string_value="Par", will_continue=True)),
            piece(arg("$.city", string_value="is"), arg("$.days[1].n", number_value=2)),
            piece(arg("$.days[0].n", number_value=1), arg("$['the rest'].ok", bool_value=True)),
            piece(arg("$.none", null_value="NULL_VALUE"), more=False),
        ]
    )
    [call] = of_type(found, "tool-input-available")
    days = [{"n": 1}, {"n": 2}]
    assert call["input"] == {"city": "Paris", "days": days, "the rest": {"ok": True}, "none": None}
    assert [part["toolCallId"] for part in of_type(found, "tool-input-start")] == [call["toolCallId"]]


async def test_functions_that_the_client_calls() -> None:
    secret = CANARY

    def weather(city: str) -> dict[str, Any]:
        """Look up the weather."""
        if city == "nowhere":
            raise ValueError(secret)
        return {"city": city}

    calls = [{"functionCall": {"name": "weather", "args": {"city": city}}} for city in ("Paris", "nowhere")]
    found = await answer(
        [response(*calls, finish="STOP")],
        [response({"functionCall": {"name": "weather", "args": {"city": "Rome"}}}, finish="STOP")],
        [response({"text": "Sunny"}), response({"text": "."}, finish="STOP")],
        tools=[weather],
    )
    assert [part["output"] for part in of_type(found, "tool-output-available")] == [{"city": "Paris"}, {"city": "Rome"}]
    assert len(of_type(found, "tool-output-error")) == 1
    assert text_of(found) == "Sunny."
    assert found[-1]["finishReason"] == "stop"


async def test_code_images_and_files() -> None:
    found = await answer(
        [
            response({"executableCode": {"language": "PYTHON", "code": "1+1"}}),
            response({"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "2"}}),
            response({"inlineData": {"mimeType": "image/png", "data": "YWJj"}}),
            response(
                {"fileData": {"fileUri": "https://example.com/a.pdf", "mimeType": "application/pdf"}}, finish="STOP"
            ),
        ]
    )
    [call], [output] = of_type(found, "tool-input-available"), of_type(found, "tool-output-available")
    assert call["input"] == {"code": "1+1"} and call["providerExecuted"]
    assert output["output"] == {"outcome": "OUTCOME_OK", "output": "2"}
    assert of_type(found, "file") == [
        {"url": "data:image/png;base64,YWJj", "mediaType": "image/png"},
        {"url": "https://example.com/a.pdf", "mediaType": "application/pdf"},
    ]


async def test_grounding() -> None:
    chunks = [
        {"web": {"uri": "https://example.com", "title": "E"}},
        {"retrievedContext": {"uri": "gs://bucket/x", "title": "Notes", "text": CANARY}},
        {"retrievedContext": {"uri": "https://example.com/doc", "title": "Doc"}},
    ]
    metadata = {"groundingChunks": chunks, "searchEntryPoint": {"renderedContent": CANARY}}
    found = await answer([response({"text": "See"}, finish="STOP", groundingMetadata=metadata)])
    assert [part["url"] for part in of_type(found, "source-url")] == ["https://example.com", "https://example.com/doc"]
    assert [part["title"] for part in of_type(found, "source-document")] == ["Notes"]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (response(finish="SAFETY"), "content-filter"),
        (response(finish="OTHER"), "other"),
        (response(finish="STOP"), "stop"),
        ({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}, "content-filter"),
    ],
)
async def test_reasons_of_an_empty_answer(event: Event, reason: str) -> None:
    assert await answer([event]) == [{"type": "finish", "finishReason": reason}]


async def test_a_connection_that_breaks() -> None:
    async with endpoint([response({"text": "Hel"})], cut=True) as served:
        found, _ = await collect_failing(await opened(served))
    assert types_of(found) == TEXT[:-1]
