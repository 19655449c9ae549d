"""A source of each kind, from plain dicts and small objects: what its library yields, without the library.

Each answers with "Hello" after a call of the tool `weather`. Around it is what must not be sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace as Object
from typing import Any

from tests.ai.collecting import CANARY

CALL = {"toolCallId": "a", "toolName": "weather"}
INPUT = {"city": "Paris"}
OUTPUT = {"degrees": 21}
ARGUMENTS = ['{"city":', '"Paris"}']
SECRET = Object(instructions=CANARY, messages=[CANARY])


@dataclass
class Source:
    items: list[Any]
    reason: str = "stop"
    """Why it ends."""
    steps: int = 0
    """How many calls of a model it shows."""
    has_output: bool = True
    """Whether the output of the tool is in the source, or the host executes it."""
    streams_input: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the call."""

    @property
    def message(self) -> list[dict[str, Any]]:
        """The parts of the message that it forms."""
        tool: dict[str, Any] = {"type": "tool-weather", "toolCallId": "a", "input": INPUT, **self.extra}
        tool |= {"state": "output-available", "output": OUTPUT} if self.has_output else {"state": "input-available"}
        step = [{"type": "step-start"}]
        text = {"type": "text", "text": "Hello", "state": "done"}
        return [*step * (self.steps > 0), tool, *step * (self.steps > 1), text]


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def calls(**fields: Any) -> dict[str, Any]:
    return chunk(tool_calls=[{"index": 0, **fields}])


COMPLETIONS = [
    calls(id="a", function={"name": "weather", "arguments": ""}),
    *(calls(function={"arguments": piece}) for piece in ARGUMENTS),
    chunk(content="Hel"),
    chunk(content="lo"),
    chunk("stop"),
]

RESPONSE = {"instructions": CANARY, "tools": [CANARY], "incomplete_details": None}
ITEM = {"type": "function_call", "id": "i", "call_id": "a", "name": "weather", "arguments": ""}
RESPONSES: list[Any] = [
    {"type": "response.created", "response": RESPONSE},
    {"type": "response.output_item.added", "item": ITEM},
    *({"type": "response.function_call_arguments.delta", "item_id": "i", "delta": piece} for piece in ARGUMENTS),
    {"type": "response.output_item.done", "item": ITEM | {"arguments": "".join(ARGUMENTS)}},
    {"type": "response.output_text.delta", "delta": "Hel", "snapshot": CANARY},
    {"type": "response.output_text.delta", "delta": "lo"},
    {"type": "response.completed", "response": RESPONSE},
]

ANTHROPIC: list[Any] = [
    {"type": "message_start", "message": {}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": "a", "name": "weather"}},
    *(
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": piece}}
        for piece in ARGUMENTS
    ),
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": "text", "text": "Hel", "snapshot": CANARY},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "lo"}},
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
    {"type": "message_stop"},
]


def gemini(finish: str | None = None, history: list[Any] | None = None, **part: Any) -> Object:
    content = Object(parts=[Object(**part)])
    candidate = Object(index=0, content=content, finish_reason=Object(value=finish) if finish else None)
    headers = Object(headers={"x": CANARY})
    return Object(
        candidates=[candidate],
        prompt_feedback=None,
        sdk_http_response=headers,
        automatic_function_calling_history=history,
    )


RESULT = Object(parts=[Object(function_response=Object(name="weather", response=OUTPUT))])
GENAI = [
    gemini("STOP", function_call=Object(id="a", name="weather", args=INPUT)),
    gemini(text="Hel", history=[Object(parts=[Object(text=CANARY)]), RESULT]),
    gemini("STOP", text="lo"),
]

TOOL_PART = Object(part_kind="tool-call", tool_call_id="a", tool_name="weather", args="")
WHOLE_PART = Object(part_kind="tool-call", tool_call_id="a", tool_name="weather", args="".join(ARGUMENTS))
RETURN_PART = Object(part_kind="tool-return", tool_call_id="a", tool_name="weather", content=OUTPUT, metadata=CANARY)
PYDANTIC_AI = [
    Object(event_kind="part_start", index=0, part=TOOL_PART),
    *(
        Object(event_kind="part_delta", index=0, delta=Object(part_delta_kind="tool_call", args_delta=piece))
        for piece in ARGUMENTS
    ),
    Object(event_kind="part_end", index=0, part=WHOLE_PART),
    Object(event_kind="function_tool_call", part=WHOLE_PART),
    Object(event_kind="function_tool_result", part=RETURN_PART, content=CANARY),
    Object(event_kind="part_start", index=0, part=Object(part_kind="text", content="Hel")),
    Object(event_kind="part_delta", index=0, delta=Object(part_delta_kind="text", content_delta="lo")),
    Object(event_kind="agent_run_result", result=Object(response=Object(finish_reason="stop"), all_messages=CANARY)),
]

AG_UI = [
    {"type": "RUN_STARTED", "threadId": "t", "runId": "r", "input": {"messages": [CANARY]}},
    {"type": "TEXT_MESSAGE_START", "messageId": "system", "role": "system"},
    {"type": "TEXT_MESSAGE_CONTENT", "messageId": "system", "delta": CANARY},
    {"type": "STATE_SNAPSHOT", "snapshot": CANARY},
    {"type": "TOOL_CALL_START", "toolCallId": "a", "toolCallName": "weather"},
    *({"type": "TOOL_CALL_ARGS", "toolCallId": "a", "delta": piece} for piece in ARGUMENTS),
    {"type": "TOOL_CALL_END", "toolCallId": "a"},
    {"type": "TOOL_CALL_RESULT", "toolCallId": "a", "messageId": "m", "content": '{"degrees": 21}'},
    {"type": "TEXT_MESSAGE_START", "messageId": "m", "role": "assistant"},
    {"type": "TEXT_MESSAGE_CHUNK", "messageId": "m", "delta": "Hel"},
    {"type": "TEXT_MESSAGE_CHUNK", "delta": "lo"},
    {"type": "TEXT_MESSAGE_END", "messageId": "m"},
    {"type": "MESSAGES_SNAPSHOT", "messages": [CANARY]},
    {"type": "RUN_FINISHED", "threadId": "t", "runId": "r"},
]


def raw(event: Any) -> Object:
    return Object(type="raw_response_event", data=event)


OUTPUT_ITEM = Object(
    type="tool_call_output_item", raw_item={"call_id": "a", "output": CANARY}, output=OUTPUT, agent=SECRET
)
OPENAI_AGENTS = [
    Object(type="agent_updated_stream_event", new_agent=SECRET),
    *map(raw, RESPONSES[:5]),
    Object(type="run_item_stream_event", name="tool_output", item=OUTPUT_ITEM),
    raw(RESPONSES[0]),
    *map(raw, RESPONSES[5:]),
]


def message(kind: str, content: Any = "", id: str = "1", **fields: Any) -> Object:
    return Object(type=kind, content=content, id=id, additional_kwargs={}, **fields)


CHUNKS = [
    message("AIMessageChunk", tool_call_chunks=[{"index": 0, "id": "a", "name": "weather", "args": ""}]),
    *(
        message("AIMessageChunk", tool_call_chunks=[{"index": 0, "id": None, "name": None, "args": piece}])
        for piece in ARGUMENTS
    ),
    message("AIMessageChunk", chunk_position="last"),
]
WHOLE = message("ai", tool_calls=[{"id": "a", "name": "weather", "args": INPUT}])
TOOL = message("tool", '{"degrees": 21}', "t", tool_call_id="a", name="weather", artifact=CANARY)
TEXTS = [
    message("AIMessageChunk", "Hel", "2"),
    message("AIMessageChunk", "lo", "2", response_metadata={"finish_reason": "stop"}),
    message("AIMessageChunk", "", "2", chunk_position="last"),
]
PROMPTS = [message("system", CANARY), message("human", CANARY)]


def event(kind: str, **data: Any) -> dict[str, Any]:
    return {"event": kind, "run_id": "r", "name": "weather", "data": data}


EVENTS = [
    event("on_chat_model_start", input={"messages": PROMPTS}),
    *(event("on_chat_model_stream", chunk=one) for one in CHUNKS),
    event("on_chat_model_end", output=WHOLE, input=PROMPTS),
    event("on_tool_start", input=INPUT),
    event("on_tool_end", output=TOOL, input=INPUT),
    event("on_chain_stream", chunk={"messages": PROMPTS}),
    *(event("on_chat_model_stream", chunk=one) for one in TEXTS),
    event("on_chain_end", output=PROMPTS),
]

SOURCES: dict[str, Source] = {
    "chat completions": Source(COMPLETIONS, has_output=False),
    "openai's helper": Source(
        [{"type": "chunk", "chunk": one, "snapshot": CANARY} for one in COMPLETIONS]
        + [{"type": "content.delta", "delta": "Hel", "snapshot": CANARY}],
        has_output=False,
    ),
    "mistral": Source([{"data": one} for one in COMPLETIONS], has_output=False),
    "Responses": Source(RESPONSES, "tool-calls", has_output=False),
    "anthropic": Source(ANTHROPIC, has_output=False),
    "google-genai": Source(GENAI, streams_input=False),
    "pydantic-ai": Source(PYDANTIC_AI, steps=2),
    "AG-UI": Source(AG_UI),
    "openai-agents": Source(OPENAI_AGENTS, "tool-calls", steps=2),
    "LangChain": Source([*PROMPTS, *CHUNKS, TOOL, *TEXTS]),
    "LangChain's events": Source(EVENTS, steps=2),
    "LangGraph's messages": Source([(one, {"key": CANARY}) for one in [*PROMPTS, *CHUNKS, TOOL, *TEXTS]], steps=2),
    "LangGraph's updates": Source(
        [
            {"agent": {"messages": [*PROMPTS, WHOLE], "other": CANARY}},
            {"tools": {"messages": [TOOL]}},
            {"agent": {"messages": message("ai", "Hello", "2", response_metadata={"finish_reason": "stop"})}},
        ],
        steps=2,
        streams_input=False,
    ),
    "LangGraph's modes": Source(
        [
            *(("messages", (one, {})) for one in CHUNKS),
            ("updates", {"agent": {"messages": [WHOLE]}}),
            ("values", {"messages": PROMPTS}),
            (("graph:1",), "messages", (TOOL, {})),
            *({"type": "messages", "ns": (), "data": (one, {})} for one in TEXTS),
        ],
        steps=2,
    ),
}
