"""Events of openai-agents: those of `RunResultStreaming`, which is itself accepted, and of its `stream_events()`.

What the models say comes as raw events of the Responses API, whichever API the model has. The items that repeat it are
ignored, except for the outputs of tools and handoffs. The events also carry the agents, which are never read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from asgi_realtime.ai.emitter import Emitter
from asgi_realtime.ai.plain import get, text_of
from asgi_realtime.ai.sources.base import Converter
from asgi_realtime.ai.sources.responses import Responses

_EVENTS = frozenset({"raw_response_event", "run_item_stream_event", "agent_updated_stream_event"})
_FAILURE = "An error occurred while running the tool"
"""How the output of a tool begins that raised: its exception follows. Nothing else marks such an output."""


class OpenAIAgents(Converter):
    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._responses = Responses(emit)

    @classmethod
    def accepts(cls, item: Any) -> bool:
        return text_of(item, "type") in _EVENTS

    def convert(self, item: Any) -> None:
        kind = text_of(item, "type")
        if kind == "raw_response_event":
            self._raw(get(item, "data"))
        elif kind == "run_item_stream_event":
            self._item(get(item, "item"))

    def _raw(self, event: Any) -> None:
        if text_of(event, "type") == "response.created":
            self.emit.start_step()
        if Responses.accepts(event):
            self._responses.convert(event)

    def _item(self, item: Any) -> None:
        raw = get(item, "raw_item")
        if text_of(item, "type") not in ("tool_call_output_item", "handoff_output_item"):
            return
        call, output = text_of(raw, "call_id"), get(item, "output", get(raw, "output"))
        if isinstance(output, str) and output.startswith(_FAILURE):
            self.emit.tool_output_error(call)
        else:
            self.emit.tool_output(call, output)


class EventStream:
    """The events of a run. Closing it cancels the run, which would otherwise be waited for."""

    def __init__(self, result: Any) -> None:
        self._result = result

    async def __aiter__(self) -> AsyncIterator[Any]:
        events = self._result.stream_events()
        try:
            async for event in events:
                yield event
        finally:
            await self.aclose()
            await events.aclose()

    async def aclose(self) -> None:
        if not self._result.is_complete:
            self._result.cancel()
