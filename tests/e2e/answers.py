"""Answers of every kind of part, for the tests with the clients of chat frontends."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Literal

from asgi_realtime import Realtime, RunCanceled, TaskError
from tests.e2e.site import Opened, Site

CALL = {"toolCallId": "call-1", "toolName": "weather"}
OTHER = {"toolCallId": "call-2", "toolName": "clock"}
IMAGE = "data:image/png;base64,iVBORw0KGgo="

TEXT = [
    {"type": "text-start", "id": "t"},
    {"type": "text-delta", "id": "t", "delta": "Hel"},
    {"type": "text-delta", "id": "t", "delta": "lo 🐋"},
    {"type": "text-end", "id": "t"},
]
REASONING = [
    {"type": "reasoning-start", "id": "r"},
    {"type": "reasoning-delta", "id": "r", "delta": "They "},
    {"type": "reasoning-delta", "id": "r", "delta": "greet."},
    {"type": "reasoning-end", "id": "r"},
]
CALL_INPUT = [
    {"type": "tool-input-start", **CALL},
    {"type": "tool-input-delta", "toolCallId": "call-1", "inputTextDelta": '{"city": '},
    {"type": "tool-input-delta", "toolCallId": "call-1", "inputTextDelta": '"Paris"}'},
    {"type": "tool-input-available", **CALL, "input": {"city": "Paris"}},
]
OUTPUT = {"type": "tool-output-available", "toolCallId": "call-1", "output": {"degrees": 21}}
FINISH = {"type": "finish", "finishReason": "stop"}

ANSWERS: dict[str, list[Any]] = {
    "empty": [FINISH],
    "strings": ["Hel", "lo"],
    "text": [*TEXT, FINISH],
    "reasoning, then text": [*REASONING, *TEXT, FINISH],
    "text and reasoning at once": [
        TEXT[0],
        REASONING[0],
        TEXT[1],
        REASONING[1],
        REASONING[2],
        TEXT[2],
        REASONING[3],
        TEXT[3],
        FINISH,
    ],
    "a step with a tool call": [
        {"type": "start-step"},
        *CALL_INPUT,
        OUTPUT,
        {"type": "finish-step"},
        {"type": "start-step"},
        *TEXT,
        {"type": "finish-step"},
        FINISH,
    ],
    "two tool calls at once": [
        {"type": "tool-input-start", **CALL},
        {"type": "tool-input-start", **OTHER},
        *CALL_INPUT[1:],
        {"type": "tool-input-available", **OTHER, "input": {}},
        {"type": "tool-output-available", "toolCallId": "call-2", "output": None},
        OUTPUT,
        FINISH,
    ],
    "a tool call without output": [*CALL_INPUT, {"type": "finish", "finishReason": "tool-calls"}],
    "a tool that fails": [
        *CALL_INPUT,
        {"type": "tool-output-error", "toolCallId": "call-1", "errorText": "no such city"},
        FINISH,
    ],
    "a tool input that is wrong": [
        {"type": "tool-input-start", **CALL},
        {"type": "tool-input-error", **CALL, "input": "{", "errorText": "no JSON"},
        FINISH,
    ],
    "a tool of the provider": [
        {"type": "tool-input-available", **CALL, "input": {"city": "Paris"}, "providerExecuted": True},
        {**OUTPUT, "preliminary": True},
        {**OUTPUT, "output": {"degrees": 22}},
        FINISH,
    ],
    "sources and a file": [
        {"type": "source-url", "sourceId": "s1", "url": "https://example.com/", "title": "Example"},
        {"type": "source-document", "sourceId": "s2", "mediaType": "text/plain", "title": "Notes", "filename": "n.txt"},
        {"type": "file", "url": IMAGE, "mediaType": "image/png"},
        FINISH,
    ],
    "data": [
        {"type": "data-progress", "id": "p", "data": {"done": 1}},
        {"type": "data-note", "data": "kept"},
        {"type": "data-progress", "id": "p", "data": {"done": 2}},
        {"type": "data-toast", "data": "only shown", "transient": True},
        FINISH,
    ],
    "metadata": [
        {"type": "start", "messageId": "mine", "messageMetadata": {"model": "fake", "usage": {"in": 1}}},
        *TEXT,
        {"type": "message-metadata", "messageMetadata": {"usage": {"out": 2}}},
        {"type": "finish", "finishReason": "length", "messageMetadata": {"seconds": 3}},
    ],
    "several sources": [
        {"type": "start"},
        *TEXT,
        {"type": "finish", "finishReason": "stop"},
        {"type": "start", "messageId": "dropped"},
        *REASONING,
        {"type": "text-start", "id": "t2"},
        {"type": "text-delta", "id": "t2", "delta": "More."},
        {"type": "text-end", "id": "t2"},
        {"type": "finish", "finishReason": "length"},
    ],
    "text that is not closed": [*TEXT[:2], *REASONING[:2]],
}


def active_run(site: Site, thread: str) -> Opened:
    """Wait for the run that answers in a thread of the host of `frontends_app`."""
    found = site.until(lambda: site.post("active", thread=thread)["run"], "a run is active")
    return Opened(site, found, "")


def say(run: Opened, *chunks: Any) -> None:
    run.site.send(run.id, "answer", {"chunks": chunks})


def end(run: Opened, how: str = "completed") -> None:
    """Complete the run, or fail it with an error."""
    run.site.send(run.id, "answer", {"end": how})


End = Literal["completed", "failed", "canceled"]
ERROR = "The model is not available."


def body_of(chunks: list[Any], protocol: Literal["ai-sdk", "ag-ui"], *, how: End = "completed") -> bytes:
    """The response with an answer of the run `run_1`."""

    async def record() -> bytes:
        async with Realtime(secret_key="a key of the tests, 32 bytes or more", signals=False) as realtime:
            with suppress(TaskError, RunCanceled):
                async with realtime.open_run("answer", run_id="run_1") as run:
                    for chunk in chunks:
                        await realtime.append(chunk)
                    if how == "failed":
                        raise TaskError(ERROR)
                    if how == "canceled":
                        await realtime.cancel(run)
                        await asyncio.Event().wait()
            return b"".join([body async for body in realtime.response("run_1", protocol=protocol)])

    return asyncio.run(record())
