"""Events of Anthropic's Messages API, raw or from the helper `client.messages.stream()`.

A message consists of content blocks, one after the other. The helper yields the raw events, and between them events
with a snapshot of the block so far, which are ignored. Results of tools that the API executes are blocks of their own.
What is encrypted or signed for the API is not sent.
"""

from __future__ import annotations

from typing import Any

from asgi_realtime.ai.emitter import HOSTED, Emitter
from asgi_realtime.ai.plain import get, plain, text_of
from asgi_realtime.ai.sources.base import Converter
from asgi_realtime.core.errors import SourceFailed

_RAW = frozenset(
    {"message_start", "message_delta", "content_block_start", "content_block_delta", "content_block_stop", "error"}
)
_IGNORED = frozenset({"message_stop", "ping"})
_HELPERS = {"text": "snapshot", "thinking": "snapshot", "citation": "snapshot", "input_json": "snapshot"} | {
    "signature": "signature",
    "compaction": "content",
}
"""The events that the helper adds, and what each has."""
_CALLS = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})
_SECRET = ("encrypted_content", "encrypted_stdout", "encrypted_index")


class Anthropic(Converter):
    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._calls: dict[int, str] = {}
        """The ids of the calls whose input streams, by the index of their block."""

    @classmethod
    def accepts(cls, item: Any) -> bool:
        kind = text_of(item, "type")
        if kind == "error":
            return get(item, "error") is not None
        return kind in _RAW or kind in _IGNORED or (kind in _HELPERS and get(item, _HELPERS[kind]) is not None)

    def convert(self, item: Any) -> None:
        kind = text_of(item, "type")
        if kind == "content_block_delta":
            self._delta(get(item, "index"), get(item, "delta"))
        elif kind == "content_block_start":
            self._start(get(item, "index"), get(item, "content_block"))
        elif kind == "content_block_stop":
            self.emit.end()
            if call := self._calls.pop(get(item, "index"), None):
                self.emit.tool_input_end(call)
        elif kind == "message_delta":
            self.stopped(get(get(item, "delta"), "stop_reason"))
        elif kind == "error":
            error = get(item, "error")
            raise SourceFailed(f"the model's stream failed: {text_of(error, 'type')}: {text_of(error, 'message')}")

    def _start(self, index: int, block: Any) -> None:
        kind, emit = text_of(block, "type"), self.emit
        emit.end()
        if kind == "text":
            emit.text(text_of(block, "text"))
        elif kind == "thinking":
            emit.reasoning(text_of(block, "thinking"))
        elif kind in _CALLS:
            self._calls[index] = call = get(block, "id")
            emit.tool_start(call, get(block, "name"), extra=None if kind == "tool_use" else HOSTED)
        elif kind.endswith("_tool_result"):
            self._result(block)

    def _delta(self, index: int, delta: Any) -> None:
        kind, emit = text_of(delta, "type"), self.emit
        if kind == "text_delta":
            emit.text(get(delta, "text"))
        elif kind == "thinking_delta":
            emit.reasoning(get(delta, "thinking"))
        elif kind == "input_json_delta":
            emit.tool_delta(self._calls.get(index, ""), get(delta, "partial_json"))
        elif kind == "citations_delta":
            self._citation(get(delta, "citation"))

    def _citation(self, citation: Any) -> None:
        source = text_of(citation, "url") or text_of(citation, "source")
        if source.startswith(("http://", "https://")):
            self.emit.source(source, get(citation, "title"))
        else:
            title = get(citation, "document_title") or get(citation, "title")
            media_type = "application/pdf" if text_of(citation, "type") == "page_location" else "text/plain"
            self.emit.document(title, media_type)

    def _result(self, block: Any) -> None:
        """The result of a tool that the API has executed."""
        call, content = get(block, "tool_use_id"), get(block, "content")
        if get(block, "is_error") or text_of(content, "type").endswith("_error"):
            code = text_of(content, "error_code")
            self.emit.tool_output_error(call, *([f"The tool failed: {code}."] if code else []))
            return
        if text_of(block, "type") == "web_search_tool_result":
            for found in content or ():
                self.emit.source(get(found, "url"), get(found, "title"))
        self.emit.tool_output(call, _without_secrets(plain(content)))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_secrets(item) for name, item in value.items() if name not in _SECRET}
    return value
