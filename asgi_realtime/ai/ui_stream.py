"""The UI message stream of the AI SDK, which `useChat` reads: versions 5 to 7.

One run is one message. The first event is `start` with an id that every reader gets, or else a page that resumes would
show the answer twice. The client takes a body that ends for an answer that is finished, so only a stream that has ended
sends an end: `finish`, `abort` or `error`, and `[DONE]`.
"""

from __future__ import annotations

from typing import Any, Self

from asgi_realtime.ai.conversion import Conversion, Event, NoMeaning, end_text
from asgi_realtime.ai.message import message_id_of
from asgi_realtime.ai.message_parts import BEGINNING, MIDDLE, MessageState, NotAPart, follow
from asgi_realtime.core.log import End
from asgi_realtime.core.runs import StoredRecord


class UiMessageStream(Conversion[MessageState]):
    """A run as a UI message stream."""

    name = "ai-sdk"
    headers = ((b"x-vercel-ai-ui-message-stream", b"v1"),)
    deltas = {
        "text-delta": ("id", "delta"),
        "reasoning-delta": ("id", "delta"),
        "tool-input-delta": ("toolCallId", "inputTextDelta"),
    }
    trailer = b"data: [DONE]\n\n"
    beginning = BEGINNING
    middle = MIDDLE

    def __init__(self, run_id: str) -> None:
        self._start: Event = {"type": "start", "messageId": message_id_of(run_id)}

    @classmethod
    def of(cls, record: StoredRecord) -> Self:
        return cls(record.id)

    def opening(self) -> list[Event]:
        return [self._start]

    def step(self, state: MessageState, chunk: Any, seq: int) -> tuple[MessageState, list[Event]]:
        try:
            state, parts = follow(state, chunk, is_first=seq == 0)
        except NotAPart:
            raise NoMeaning from None
        if seq:
            return state, parts
        if parts and parts[0]["type"] == "start":
            return state, [{**self._start, **parts[0]}]
        return state, [self._start, *parts]

    def finish(self, state: MessageState, end: End) -> list[Event]:
        closing = state.closing()
        if end.reason == "complete":
            return [*closing, {"type": "finish", "finishReason": "stop", **state.finish_fields()}]
        if end.reason == "canceled":
            return [*closing, {"type": "abort"}]  # version 5 rejects a reason
        return [*closing, {"type": "error", "errorText": end_text(end)}]
