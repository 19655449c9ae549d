"""What message parts cost: `python -m benchmarks parts`.

For each kind of source, an answer of `TOKENS` tokens of 5 bytes, as the objects of its client:

* the bytes that are stored per token if the source is piped as it is, and if `parts()` converts it,
* the CPU time of the conversion per token; for `run_stream`, which `parts()` alone can read, with that of the agent.

Sources whose package is not installed (`make clients`) are left out. To add a source, add a function to `SOURCES`.
"""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from operator import itemgetter
from typing import Any

from asgi_realtime.ai import parts
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import EncodingError

TOKENS = 2500
TOKEN = "word "
REPEAT = 5
"""How often a conversion is timed. The fastest counts, because the machine can be busy."""

_CHUNK = {"id": "chatcmpl-B9MHDbslfkBeAs8l4bebGdFOJ6PeG", "object": "chat.completion.chunk", "created": 1741570283}
_RUN = "lc_run--01a22c8d-0fc8-7255-a4f5-2f76e27313c6"


@dataclass(frozen=True, slots=True)
class Row:
    """What a source cost, per token."""

    name: str
    piped: float | None
    """None if its items are not published: they carry prompts or agents."""
    parts: float
    cpu_us: float


def _completion() -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": TOKEN}, "logprobs": None, "finish_reason": None}
    return _CHUNK | {"model": "gpt-4o-mini", "system_fingerprint": "fp_b5d60d6081", "choices": [choice]}


def strings() -> Iterator[Any]:
    return (TOKEN for _ in range(TOKENS))


def completions() -> Iterator[Any]:
    model = import_module("openai.types.chat").ChatCompletionChunk
    return (model.model_validate(_completion()) for _ in range(TOKENS))


def completions_helper() -> Iterator[Any]:
    events = import_module("openai.lib.streaming.chat._events")
    for number, chunk in enumerate(completions()):
        yield events.ChunkEvent.construct(type="chunk", chunk=chunk, snapshot=None)
        snapshot = TOKEN * (number + 1)
        yield events.ContentDeltaEvent.construct(type="content.delta", delta=TOKEN, snapshot=snapshot)


def responses() -> Iterator[Any]:
    model = import_module("openai.types.responses").ResponseTextDeltaEvent
    item = {"item_id": "msg_67ccd2bf17f0819081ff3bb2cf6508e6", "output_index": 0, "content_index": 0, "logprobs": []}
    for number in range(TOKENS):
        yield model.construct(type="response.output_text.delta", delta=TOKEN, sequence_number=number, **item)


def litellm() -> Iterator[Any]:
    model = import_module("litellm.types.utils").ModelResponseStream
    return (model(**_completion()) for _ in range(TOKENS))


def anthropic() -> Iterator[Any]:
    types = import_module("anthropic.types")
    for _ in range(TOKENS):
        delta = types.TextDelta.construct(type="text_delta", text=TOKEN)
        yield types.RawContentBlockDeltaEvent.construct(type="content_block_delta", index=0, delta=delta)


def anthropic_helper() -> Iterator[Any]:
    model = import_module("anthropic.lib.streaming._types").TextEvent
    for number, event in enumerate(anthropic()):
        yield event
        yield model.construct(type="text", text=TOKEN, snapshot=TOKEN * (number + 1))


def genai() -> Iterator[Any]:
    model = import_module("google.genai.types").GenerateContentResponse
    sent = {
        "candidates": [{"content": {"parts": [{"text": TOKEN}], "role": "model"}, "index": 0}],
        "usageMetadata": {"promptTokenCount": 9, "totalTokenCount": 9},
        "modelVersion": "gemini-2.5-flash",
        "responseId": "lIXuaPuWN5S3kdUPqYjZ4Ac",
    }
    return (model.model_validate(sent) for _ in range(TOKENS))


def _agent() -> Any:
    async def stream(messages: Any, info: Any) -> AsyncIterator[str]:
        for _ in range(TOKENS):
            yield TOKEN

    model = import_module("pydantic_ai.models.function").FunctionModel(stream_function=stream)
    return import_module("pydantic_ai").Agent(model, instructions="Be brief.")


def pydantic_ai() -> Any:
    return _agent().run_stream_events("hi")


def pydantic_ai_run_stream() -> Any:
    return _agent().run_stream("hi")


def pydantic_ai_vercel() -> Any:
    adapters = import_module("pydantic_ai.ui.vercel_ai")
    types = import_module("pydantic_ai.ui.vercel_ai.request_types")
    message = types.UIMessage(id="u", role="user", parts=[types.TextUIPart(text="hi")])
    request = types.SubmitMessage(id="1", trigger="submit-message", messages=[message])
    return adapters.VercelAIAdapter(agent=_agent(), run_input=request).run_stream()


def pydantic_ai_ag_ui() -> Any:
    adapters, core = import_module("pydantic_ai.ui.ag_ui"), import_module("ag_ui.core")
    fields: dict[str, Any] = {"state": {}, "tools": [], "context": [], "forwarded_props": {}}
    message = core.UserMessage(id="u", content="hi")
    request = core.RunAgentInput(thread_id="t", run_id="r", messages=[message], **fields)
    return adapters.AGUIAdapter(agent=_agent(), run_input=request).run_stream()


def openai_agents() -> Iterator[Any]:
    event = import_module("agents").RawResponsesStreamEvent
    return (event(data=data) for data in responses())


def langchain() -> Iterator[Any]:
    model = import_module("langchain_core.messages").AIMessageChunk
    return (model(content=TOKEN, id=_RUN) for _ in range(TOKENS))


def langchain_events() -> Iterator[Any]:
    metadata = {"ls_provider": "openai", "ls_model_name": "gpt-4o-mini", "ls_model_type": "chat"}
    for chunk in langchain():
        event = {"event": "on_chat_model_stream", "data": {"chunk": chunk}, "run_id": _RUN[8:], "name": "ChatOpenAI"}
        yield event | {"tags": [], "metadata": metadata, "parent_ids": []}


def langgraph() -> Iterator[Any]:
    checkpoint = "agent:3764e928-4859-84eb-e0f7-52a1a1d0f6b1"
    graph = {"langgraph_step": 1, "langgraph_node": "agent", "langgraph_triggers": ["branch:to:agent"]}
    graph |= {"langgraph_path": ["__pregel_pull", "agent"], "langgraph_checkpoint_ns": checkpoint}
    return ((chunk, graph | {"ls_provider": "openai"}) for chunk in langchain())


SOURCES: dict[str, Callable[[], Any]] = {
    "strings": strings,
    "openai, chat completions": completions,
    "openai, chat completions, `.stream()`": completions_helper,
    "openai, Responses": responses,
    "litellm": litellm,
    "anthropic": anthropic,
    "anthropic, `.stream()`": anthropic_helper,
    "google-genai": genai,
    "pydantic-ai, `run_stream_events`": pydantic_ai,
    "pydantic-ai, `run_stream`": pydantic_ai_run_stream,
    "pydantic-ai, `VercelAIAdapter`": pydantic_ai_vercel,
    "pydantic-ai, `AGUIAdapter`": pydantic_ai_ag_ui,
    "openai-agents": openai_agents,
    "LangChain, `astream`": langchain,
    "LangChain, `astream_events`": langchain_events,
    "LangGraph, `messages`": langgraph,
}


def measure(name: str) -> Row:
    items = asyncio.run(_read(SOURCES[name]()))
    cpu_us, found = min((_convert(items or SOURCES[name]()) for _ in range(REPEAT)), key=itemgetter(0))
    return Row(name, _bytes(items), _bytes(found) or 0, cpu_us)


def _convert(source: Any) -> tuple[float, list[Any]]:
    begin = time.process_time()
    found = asyncio.run(_read(parts(source)))
    return (time.process_time() - begin) / TOKENS * 1e6, found


async def _read(source: Any) -> list[Any]:
    """All items; none if only `parts()` can read the source."""
    if isinstance(source, Iterator):
        return list(source)
    async with _entered(source) as items:
        return [item async for item in items] if hasattr(items, "__aiter__") else []


@asynccontextmanager
async def _entered(source: Any) -> AsyncIterator[Any]:
    if not hasattr(source, "__aenter__"):
        yield source
        return
    async with source as items:
        yield items


def _bytes(items: list[Any]) -> float | None:
    """The stored bytes per token; None if the items are not published."""
    stored = 0
    for item in items:
        try:
            stored += len(encode_value(item))
        except EncodingError:
            continue
    return stored / TOKENS if stored >= TOKENS * len(TOKEN) else None


def render(rows: list[Row]) -> str:
    lines = ["| source | piped as it is: bytes/token | `parts()`: bytes/token | CPU/token |", "|---|---|---|---|"]
    for row in rows:
        piped = "not published" if row.piped is None else f"{row.piped:.0f}"
        lines.append(f"| {row.name} | {piped} | {row.parts:.0f} | {row.cpu_us:.1f} µs |")
    return "\n".join(lines)


def main() -> int:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    warnings.simplefilter("ignore")
    rows = []
    for name in SOURCES:
        try:
            rows.append(measure(name))
        except ModuleNotFoundError as exc:
            print(f"{name}: {exc.name} is not installed (make clients)")
    print(render(rows))
    return 0
