"""The blocks of docs/parts.md run with the real packages, and each answers "Hello"."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from asgi_realtime.ai import parts
from tests.ai.collecting import text_of
from tests.ai.order import FIELDS, check_order
from tests.docs.blocks import ROOT, blocks
from tests.docs.test_snippets import execute
from tests.faults import make, stored
from tests.models import test_parts_anthropic as anthropic_
from tests.models import test_parts_genai as genai_
from tests.models import test_parts_langchain as langchain_
from tests.models import test_parts_openai as openai_
from tests.models import test_parts_openai_agents as agents_
from tests.models.endpoint import endpoint
from tests.models.needs import need

Names = dict[str, Any]

BLOCKS = blocks("parts")
WORDS = ("Hel", "lo")


@asynccontextmanager
async def openai() -> AsyncIterator[Names]:
    chunks = [openai_.chunk(role="assistant"), *(openai_.chunk(content=word) for word in WORDS), openai_.chunk("stop")]
    async with endpoint(chunks, done=True) as served, openai_.client(served) as client:
        yield {"client": client}


@asynccontextmanager
async def anthropic() -> AsyncIterator[Names]:
    async with endpoint(anthropic_.whole(*anthropic_.text(0, *WORDS))) as served:
        yield {"client": need("anthropic").AsyncAnthropic(base_url=served.url, api_key="key")}


@asynccontextmanager
async def genai() -> AsyncIterator[Names]:
    responses = [*(genai_.response({"text": word}) for word in WORDS), genai_.response(finish="STOP")]
    async with endpoint(responses) as served:
        options = need("google.genai.types").HttpOptions(base_url=served.url)
        yield {"client": need("google.genai").Client(api_key="key", http_options=options)}


@asynccontextmanager
async def pydantic_ai() -> AsyncIterator[Names]:
    agent = need("pydantic_ai").Agent(need("pydantic_ai.models.test").TestModel(custom_output_text="Hello"))
    yield {"agent": agent}


@asynccontextmanager
async def openai_agents() -> AsyncIterator[Names]:
    async with endpoint(agents_.says(*WORDS)) as served:
        client = need("openai").AsyncOpenAI(base_url=served.url, api_key="key", max_retries=0)
        model = need("agents").OpenAIResponsesModel(model="m", openai_client=client)
        yield {"agent": need("agents").Agent(name="a", model=model), "Runner": need("agents").Runner}


@asynccontextmanager
async def langgraph() -> AsyncIterator[Names]:
    yield {"graph": langchain_.graph(langchain_.model([langchain_.said(word) for word in WORDS]))}


SOURCES: dict[str, Callable[[], AbstractAsyncContextManager[Names]]] = {
    "openai": openai,
    "anthropic": anthropic,
    "genai": genai,
    "pydantic_ai": pydantic_ai,
    "openai_agents": openai_agents,
    "langgraph": langgraph,
    "own": openai,
}


def test_every_block_has_a_source() -> None:
    assert set(BLOCKS) == set(SOURCES)


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BLOCKS)
async def test_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    async with AsyncExitStack() as stack, make() as realtime:
        names = await stack.enter_async_context(SOURCES[name]())
        names |= {"model": "m", "question": "hi", "messages": [{"role": "user", "content": "hi"}]}
        if name in ("openai", "own"):
            names["messages"] = openai_.MESSAGES
        async with realtime.open_run("answer") as run:
            await execute(BLOCKS[name], names | {"realtime": realtime, "parts": parts})
        found = await stored(realtime, run.id)
    check_order(found)
    assert text_of(found) == "Hello"
    if name == "own":
        assert [part["type"] for part in found[:2]] == ["data-status", "source-url"]


def test_the_page_names_every_part() -> None:
    page = (ROOT / "docs" / "parts.md").read_text()
    hidden = {"data", "message-metadata", "error", "abort", "tool-output-denied", "tool-approval-request"}
    assert [kind for kind in FIELDS if f"`{kind}`" not in page and kind not in hidden] == []
