"""AG-UI events, such as those of pydantic-ai's `AGUIAdapter.run_stream()`: as models, or as dicts of the wire.

Messages are identified by their id. Only those of the assistant are converted. The input of the run, states, snapshots
and activities are ignored, because a message has no place for them. Steps are named stages of an app, not calls of a
model, and are ignored too.
"""

from __future__ import annotations

from typing import Any

from asgi_realtime.ai.emitter import Emitter
from asgi_realtime.ai.plain import get, parsed, text_of
from asgi_realtime.ai.sources.base import Converter
from asgi_realtime.core.errors import SourceFailed

_FAMILIES = tuple(
    "TEXT_ TOOL_CALL_ REASONING_ THINKING_ STATE_ MESSAGES_ ACTIVITY_ RUN_ STEP_ SUBAGENT_ CUSTOM RAW".split()
)
_OURS = ("", "assistant")


class AgUi(Converter):
    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._foreign: set[str] = set()
        """The ids of messages that are not the assistant's."""
        self._current = ""
        """The id of the last message or tool call: chunks can leave it out."""

    @classmethod
    def accepts(cls, item: Any) -> bool:
        return text_of(item, "type").startswith(_FAMILIES)

    def convert(self, item: Any) -> None:
        kind = text_of(item, "type")
        if kind.startswith("TEXT_MESSAGE_"):
            self._text(kind, item)
        elif kind.startswith("REASONING_MESSAGE_"):
            track = f"reasoning:{_field(item, 'message_id')}"
            self.emit.reasoning(text_of(item, "delta"), track)
            if kind.endswith("_END"):
                self.emit.end(track)
        elif kind.startswith("TOOL_CALL_"):
            self._tool(kind, item)
        elif kind == "CUSTOM":
            self.emit.data(text_of(item, "name"), get(item, "value"))
        elif kind == "RUN_FINISHED":
            self.stopped("stop")
        elif kind == "RUN_ERROR":
            raise SourceFailed(f"the agent failed: {text_of(item, 'message')}")

    def _text(self, kind: str, item: Any) -> None:
        id = self._current = _field(item, "message_id") or self._current
        if text_of(item, "role") not in _OURS:
            self._foreign.add(id)
        if id not in self._foreign:
            self.emit.text(text_of(item, "delta"), id)
            if kind == "TEXT_MESSAGE_END":
                self.emit.end(id)

    def _tool(self, kind: str, item: Any) -> None:
        call = self._current = _field(item, "tool_call_id") or self._current
        if name := _field(item, "tool_call_name"):
            self.emit.tool_start(call, name, _field(item, "parent_message_id"))
        self.emit.tool_delta(call, text_of(item, "delta"))
        if kind == "TOOL_CALL_END":
            self.emit.tool_input_end(call)
        elif kind == "TOOL_CALL_RESULT":
            self.emit.tool_output(call, parsed(get(item, "content")))


def _field(item: Any, name: str) -> str:
    """A text by its name in Python, or by the one on the wire."""
    if isinstance(item, dict):
        first, *rest = name.split("_")
        name = first + "".join(word.capitalize() for word in rest)
    return text_of(item, name)
