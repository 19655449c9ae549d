"""The streams of the real clients of language models as sources."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime.core.errors import InvalidSource
from tests.faults import make, stored

pytestmark = pytest.mark.anyio


def _body(events: list[str]) -> bytes:
    return "".join(f"data: {event}\n\n" for event in events).encode()


_OPENAI = _body(
    [
        '{"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
        f'"choices":[{{"index":0,"delta":{{"content":"{word}"}},"finish_reason":null}}]}}'
        for word in ("one", "two", "three")
    ]
    + ["[DONE]"]
)


def _http(client: Any) -> Any:
    """The HTTP library of a client package: httpx, or its successor."""
    name = client.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
    return sys.modules[name]


def _watched(http: Any, data: bytes, closed: list[bool]) -> Any:
    """A response body that records its close."""

    class Body(http.AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for line in data.splitlines(keepends=True):
                await anyio.lowlevel.checkpoint()
                yield line

        async def aclose(self) -> None:
            closed.append(True)

    return Body()


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_stream_of_the_openai_client_is_piped_and_closed(stopped: bool, anyio_backend: str) -> None:
    import openai

    closed: list[bool] = []
    library = _http(openai)
    body = _watched(library, _OPENAI, closed)
    answer = {"headers": {"content-type": "text/event-stream"}, "stream": body}
    transport = library.MockTransport(lambda request: library.Response(200, **answer))
    async with (
        library.AsyncClient(transport=transport) as http,
        make() as realtime,
        realtime.open_run("chat") as run,
    ):
        client = openai.AsyncOpenAI(api_key="none", base_url="http://model", http_client=http)
        completion = await client.chat.completions.create(model="m", messages=[], stream=True)
        pipe = realtime.pipe(completion)
        text = []
        async for chunk in pipe:
            text.append(chunk.choices[0].delta.content)
            if stopped:
                await pipe.aclose()
                break
        await pipe.wait_until_complete()
        assert closed
        chunks = await stored(realtime, run.id)
        if not stopped:
            assert text == ["one", "two", "three"]
            assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"content": word} for word in text]
            assert set(chunks[0]) == {"id", "object", "created", "model", "choices"}, "as the API sent it"


def _anthropic_body() -> bytes:
    events = [
        '{"type":"message_start","message":{"id":"m","type":"message","role":"assistant","content":[],"model":"m",'
        '"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}}',
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"one"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"two"}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":2}}',
        '{"type":"message_stop"}',
    ]
    kinds = [event.split('"')[3] for event in events]
    return "".join(f"event: {kind}\ndata: {event}\n\n" for kind, event in zip(kinds, events, strict=True)).encode()


def _anthropic(body: bytes) -> Any:
    anthropic = pytest.importorskip("anthropic")
    library = _http(anthropic)
    answer = {"headers": {"content-type": "text/event-stream"}, "content": body}
    transport = library.MockTransport(lambda request: library.Response(200, **answer))
    return anthropic.AsyncAnthropic(
        api_key="none", base_url="http://model", http_client=library.AsyncClient(transport=transport)
    )


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_manager_of_the_anthropic_client_is_piped_and_closed(stopped: bool, anyio_backend: str) -> None:
    async with _anthropic(_anthropic_body()) as client, make() as realtime, realtime.open_run("chat") as run:
        stream = client.messages.stream(model="m", max_tokens=10, messages=[{"role": "user", "content": "hi"}])
        pipe = realtime.pipe(stream)
        text = ""
        async for event in pipe:
            if event.type == "text":
                text += event.text
                if stopped:
                    await pipe.aclose()
                    break
        await pipe.wait_until_complete()
        assert text == ("one" if stopped else "onetwo")
        kinds = [chunk["type"] for chunk in await stored(realtime, run.id)]
        assert "text" in kinds
        if not stopped:
            assert kinds[-1] == "message_stop"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_raw_stream_of_the_anthropic_client_is_piped_and_closed(anyio_backend: str) -> None:
    async with _anthropic(_anthropic_body()) as client, make() as realtime, realtime.open_run("chat") as run:
        stream = await client.messages.create(
            model="m", max_tokens=10, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        await realtime.pipe(stream).wait_until_complete()
        chunks = await stored(realtime, run.id)
        assert chunks[2] == {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "one"}}
        assert len(chunks) == 7


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_stream_of_the_sync_openai_client_is_piped_and_closed(anyio_backend: str) -> None:
    import openai

    library = _http(openai)
    answer = {"headers": {"content-type": "text/event-stream"}, "content": _OPENAI}
    transport = library.MockTransport(lambda request: library.Response(200, **answer))
    with library.Client(transport=transport) as http:
        client = openai.OpenAI(api_key="none", base_url="http://model", http_client=http)
        completion = client.chat.completions.create(model="m", messages=[], stream=True)
        async with make() as realtime, realtime.open_run("chat"):
            assert (await realtime.pipe(completion).wait_until_complete()).chunks == 3


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_completion_that_is_not_a_stream_is_rejected(anyio_backend: str) -> None:
    """Without `stream=True` the client returns a model, and iterating that yields its fields."""
    import openai.types.chat

    completion = openai.types.chat.ChatCompletion(id="c", choices=[], created=1, model="m", object="chat.completion")
    async with make() as realtime:
        with pytest.raises(InvalidSource, match=r"a ChatCompletion is not a source: .*stream=True"):
            realtime.pipe(completion)
