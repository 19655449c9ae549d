"""`parts()` with LangChain and LangGraph."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from asgi_realtime import InvalidSource
from tests.ai.collecting import CANARY, Part, collect, collect_failing, of_type, text_of, types_of
from tests.models.needs import need

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

TEXT = ["text-start", "text-delta", "text-end"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def said(content: Any = "", **fields: Any) -> Any:
    return need("langchain_core.messages").AIMessageChunk(content=content, **fields)


def call(index: int, args: str, *, id: str | None = None, name: str | None = None) -> Any:
    return said(tool_call_chunks=[{"index": index, "args": args, "id": id, "name": name}])


def model(*turns: list[Any], streams: bool = True) -> Any:
    """A chat model that gives one turn for each call. An exception in a turn is raised."""
    models, outputs = need("langchain_core.language_models"), need("langchain_core.outputs")
    left = list(turns)

    class Scripted(models.BaseChatModel):  # type: ignore[misc, name-defined]
        @property
        def _llm_type(self) -> str:
            return "scripted"

        def bind_tools(self, tools: Any, **options: Any) -> Any:
            return self

        def _generate(self, messages: Any, *args: Any, **options: Any) -> Any:
            first, *rest = left.pop(0)
            for chunk in rest:
                first += chunk
            whole = need("langchain_core.messages").message_chunk_to_message(first)
            return outputs.ChatResult(generations=[outputs.ChatGeneration(message=whole)])

        if streams:

            async def _astream(self, messages: Any, *args: Any, **options: Any) -> AsyncIterator[Any]:
                for chunk in left.pop(0):
                    if isinstance(chunk, Exception):
                        raise chunk
                    yield outputs.ChatGenerationChunk(message=chunk)

    return Scripted()


CALLS = ['{"city": "Paris"}', '{"city": "nowhere"}']


def turns() -> list[list[Any]]:
    return [
        [
            said("I look. "),
            call(0, "", id="a", name="weather"),
            call(0, CALLS[0][:5]),
            call(0, CALLS[0][5:]),
            call(1, CALLS[1], id="b", name="weather"),
            said(response_metadata={"finish_reason": "tool_calls"}),
        ],
        [said("It is "), said("sunny.", response_metadata={"finish_reason": "stop"})],
    ]


def graph(scripted: Any) -> Any:
    """An agent with a tool that looks up the weather, and reports progress."""
    prebuilt, tools = need("langgraph.prebuilt"), need("langchain_core.tools")
    writer = need("langgraph.config").get_stream_writer
    secret = CANARY

    async def weather(city: str) -> dict[str, Any]:
        """Look up the weather."""
        if city == "nowhere":
            raise ValueError(secret)
        writer()({"type": "data-progress", "id": "p", "data": {"city": city}})
        writer()({"looked": 1})
        return {"city": city}

    node = prebuilt.ToolNode([tools.tool(weather)], handle_tool_errors=True)
    return prebuilt.create_react_agent(scripted, node, prompt=CANARY)


def history() -> dict[str, Any]:
    return {"messages": [("system", CANARY), ("user", CANARY), ("assistant", CANARY), ("user", "hi")]}


OPEN: dict[str, Callable[[Any], Any]] = {
    "messages": lambda graph: graph.astream(history(), stream_mode="messages"),
    "updates": lambda graph: graph.astream(history(), stream_mode="updates"),
    "several": lambda graph: graph.astream(history(), stream_mode=["messages", "updates", "custom", "values"]),
    "subgraphs": lambda graph: graph.astream(history(), stream_mode=["messages", "updates"], subgraphs=True),
    "updates of subgraphs": lambda graph: graph.astream(history(), stream_mode="updates", subgraphs=True),
    "version 2": lambda graph: graph.astream(history(), stream_mode=["messages", "updates"], version="v2"),
    "events": lambda graph: graph.astream_events(history(), version="v2"),
}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("kind", OPEN)
async def test_an_agent(kind: str, streams: bool) -> None:
    found = await collect(OPEN[kind](graph(model(*turns(), streams=streams))))
    inputs = {part["toolCallId"]: part["input"] for part in of_type(found, "tool-input-available")}
    assert inputs == {"a": {"city": "Paris"}, "b": {"city": "nowhere"}}
    assert of_type(found, "tool-output-available") == [{"toolCallId": "a", "output": {"city": "Paris"}}]
    assert of_type(found, "tool-output-error") == [{"toolCallId": "b", "errorText": "The tool failed."}]
    assert text_of(found) == "I look. It is sunny."
    assert len(of_type(found, "start-step")) == 2
    assert types_of(found)[-6:] == ["start-step", *TEXT, "finish-step", "finish"]
    assert found[-1]["finishReason"] == "stop"
    if streams and not kind.startswith("updates"):
        assert len(of_type(found, "text-delta")) == 3
        assert "".join(part["inputTextDelta"] for part in of_type(found, "tool-input-delta")) == "".join(CALLS)


async def test_what_a_graph_writes() -> None:
    found = await collect(graph(model(*turns())).astream(history(), stream_mode=["messages", "custom"]))
    assert of_type(found, "data-progress") == [{"id": "p", "data": {"city": "Paris"}}]
    assert of_type(found, "data-custom") == [{"data": {"looked": 1}}]


async def test_an_interrupt() -> None:
    types, graphs = need("langgraph.types"), need("langgraph.graph")
    builder = graphs.StateGraph(dict)
    builder.add_node("ask", lambda state: {"answer": types.interrupt({"question": "Go?"})})
    builder.add_edge(graphs.START, "ask")
    compiled = builder.compile(checkpointer=need("langgraph.checkpoint.memory").InMemorySaver())
    stream = compiled.astream({"key": CANARY}, {"configurable": {"thread_id": "1"}}, stream_mode="updates")
    [data] = of_type(await collect(stream), "data-interrupt")
    assert data["data"] == {"question": "Go?"}


async def test_nodes_that_write_at_the_same_time() -> None:
    """Their texts stay apart, and a step does not begin in the middle of a text."""

    def items() -> list[Any]:
        chunks = [said("one "), said("uno "), said("two"), said("due")]
        for chunk, id in zip(chunks, "abab", strict=True):
            chunk.id = id
        ends = [said(id=id, chunk_position="last") for id in "ab"]
        return [(chunk, {"langgraph_node": chunk.id}) for chunk in chunks + ends]

    found = await collect(items())
    texts: dict[str, str] = {}
    for part in of_type(found, "text-delta"):
        texts[part["id"]] = texts.get(part["id"], "") + part["delta"]
    assert sorted(texts.values()) == ["one two", "uno due"]
    assert len(of_type(found, "start-step")) == 1


async def test_an_update_with_a_history() -> None:
    messages = need("langchain_core.messages")
    old = [messages.SystemMessage(CANARY), messages.AIMessage(CANARY), messages.HumanMessage(CANARY)]
    update = {"node": {"messages": [*old, messages.AIMessage("new")], "summary": CANARY}, "other": None}
    assert text_of(await collect([update])) == "new"


async def test_updates_without_messages() -> None:
    found, error = await collect_failing([{"node": {"answer": CANARY}}])
    assert found == []
    assert isinstance(error, InvalidSource) and "contain no messages" in str(error)


async def test_the_values_of_a_graph_are_unknown() -> None:
    found, error = await collect_failing(graph(model(*turns())).astream(history(), stream_mode="values"))
    assert found == []
    assert isinstance(error, InvalidSource)


# Chat models and chains


async def test_a_chat_model() -> None:
    found = await collect(model(*turns()).astream([("system", CANARY), ("user", "hi")]))
    assert types_of(found)[:5] == [*TEXT, "tool-input-start", "tool-input-delta"]
    assert [part["input"] for part in of_type(found, "tool-input-available")] == [json.loads(one) for one in CALLS]
    assert found[-1]["finishReason"] == "tool-calls"


async def test_a_chain_of_a_prompt_and_a_parser() -> None:
    prompts, parsers = need("langchain_core.prompts"), need("langchain_core.output_parsers")
    prompt = prompts.ChatPromptTemplate.from_messages([("system", CANARY), ("user", "{question}")])
    chain = prompt | model(turns()[1]) | parsers.StrOutputParser()
    assert text_of(await collect(chain.astream({"question": CANARY}))) == "It is sunny."
    chain = prompt | model(turns()[1]) | parsers.StrOutputParser()
    assert text_of(await collect(chain.astream_events({"question": CANARY}, version="v2"))) == "It is sunny."


async def test_a_tool_and_an_event_of_a_chain() -> None:
    runnables, tools = need("langchain_core.runnables"), need("langchain_core.tools")
    dispatch = need("langchain_core.callbacks").adispatch_custom_event

    async def double(x: int) -> int:
        """Double a number."""
        await dispatch("progress", {"done": 1})
        return 2 * x

    chain = runnables.RunnableLambda(lambda x: {"x": x}) | tools.tool(double)
    found = await collect(chain.astream_events(2, version="v2"))
    assert of_type(found, "data-progress") == [{"data": {"done": 1}}]
    [call], [output] = of_type(found, "tool-input-available"), of_type(found, "tool-output-available")
    assert (call["toolName"], call["input"], output["output"]) == ("double", {"x": 2}, 4)


@pytest.mark.parametrize("content", [[], ""])
async def test_an_empty_answer(content: Any) -> None:
    chunk = said(content, response_metadata={"stop_reason": "end_turn"})
    assert await collect(model([chunk]).astream("hi")) == [{"type": "finish", "finishReason": "stop"}]


async def test_an_error_in_the_middle() -> None:
    found, error = await collect_failing(model([said("Hel"), OSError("reset")]).astream("hi"))
    assert types_of(found) == TEXT
    assert isinstance(error, OSError)


def blocks(*content: Any, **fields: Any) -> list[Any]:
    return [said(list(content), id="m", **fields)]


async def test_blocks_of_every_provider() -> None:
    found = await collect(
        [
            *blocks({"type": "thinking", "thinking": "a", "signature": CANARY}),
            *blocks({"type": "reasoning", "summary": [{"type": "summary_text", "text": "b"}]}),
            *blocks({"type": "reasoning", "reasoning": "c"}),
            *blocks({"type": "reasoning_content", "reasoning_content": {"text": "d"}}),
            said("", id="m", additional_kwargs={"reasoning_content": "e"}),
            *blocks("x", {"type": "text", "text": "y"}, {"type": "output_text", "text": "z"}),
            *blocks({"type": "refusal", "refusal": "!"}),
            *blocks({"type": "text", "text": "", "citations": [{"url": "https://example.com", "title": "E"}]}),
            *blocks({"type": "text", "text": "", "annotations": [{"type": "citation", "title": "Notes"}]}),
            *blocks({"type": "image", "base64": "AAAA", "mime_type": "image/jpeg"}),
            *blocks({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}),
            *blocks({"type": "tool_use", "input": CANARY}),
        ]
    )
    assert (text_of(found, "reasoning"), text_of(found)) == ("abcde", "xyz!")
    assert [part["url"] for part in of_type(found, "source-url")] == ["https://example.com"]
    assert [part["title"] for part in of_type(found, "source-document")] == ["Notes"]
    urls: list[Part] = of_type(found, "file")
    assert [part["url"] for part in urls] == ["data:image/jpeg;base64,AAAA", "https://example.com/a.png"]
    assert found[-1]["finishReason"] == "content-filter"
