"""Messages of LangChain, from the `astream` of a chat model or a chain, and the events of `astream_events`.

Only messages of the assistant and results of tools are converted; prompts are messages too. A message arrives in chunks
with an id, or whole. What has arrived in chunks is ignored when it arrives again as a whole, as it does in events and
in updates of a graph. Content is a text or a list of blocks, whose form depends on the provider.
"""

from __future__ import annotations

from typing import Any

from asgi_realtime.ai.emitter import Emitter
from asgi_realtime.ai.plain import data_url, get, parsed, text_of
from asgi_realtime.ai.sources.base import Converter

_KINDS = frozenset({"ai", "human", "system", "tool", "function", "chat", "remove"})
_REASONS = ("finish_reason", "stop_reason", "done_reason")
_IMAGE = "image/png"


def is_message(item: Any) -> bool:
    kind = text_of(item, "type").removesuffix("MessageChunk").lower()
    return kind in _KINDS and hasattr(item, "additional_kwargs")


def is_from_assistant(message: Any) -> bool:
    return text_of(message, "type") in ("ai", "AIMessageChunk")


def is_from_tool(message: Any) -> bool:
    return text_of(message, "type") in ("tool", "ToolMessageChunk")


class Messages(Converter):
    """The messages of a stream. Each is a track of its own, because several models can write at a time."""

    has_steps = False
    """Whether each message of the assistant begins a step: in graphs and events."""

    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._seen: set[str] = set()
        """The ids of the assistant's messages that have arrived."""
        self._calls: dict[tuple[str, Any], str] = {}
        """The ids of the calls whose input streams, by message and index."""

    @classmethod
    def accepts(cls, item: Any) -> bool:
        return is_message(item)

    def convert(self, item: Any) -> None:
        if text_of(item, "type") != "AIMessageChunk":
            self.whole(item)
            return
        self._begin(item)
        self._content(item)
        self._call_chunks(item)
        self._end(item, is_last=get(item, "chunk_position") == "last")

    def whole(self, message: Any) -> None:
        """A whole message, which can have the class of a chunk if it was joined from chunks."""
        if is_from_tool(message):
            self.result(message)
        elif is_from_assistant(message) and get(message, "id") not in self._seen:
            self._begin(message)
            self._content(message)
            for call in get(message, "tool_calls") or ():
                self.emit.tool_input(call["id"] or self.emit.new_id(), call["name"], call["args"], _track(message))
            self._end(message, is_last=True)

    def result(self, message: Any) -> None:
        """The message with the result of a tool."""
        call, name = text_of(message, "tool_call_id"), get(message, "name") or None
        if get(message, "status") == "error":
            self.emit.tool_output_error(call, name=name)
        else:
            self.emit.tool_output(call, parsed(get(message, "content")), name=name)

    def _begin(self, message: Any) -> None:
        id = get(message, "id")
        if id not in self._seen:
            self._seen.add(id)
            if self.has_steps and self.emit.is_idle:
                self.emit.start_step()

    def _content(self, message: Any) -> None:
        track, content = _track(message), get(message, "content")
        self.emit.reasoning(text_of(get(message, "additional_kwargs"), "reasoning_content"), track)
        if isinstance(content, str):
            self.emit.text(content, track)
            return
        for block in content:
            if isinstance(block, str):
                self.emit.text(block, track)
            else:
                self._block(block, track)

    def _block(self, block: dict[str, Any], track: str) -> None:
        kind = text_of(block, "type")
        if kind in ("thinking", "reasoning", "reasoning_content"):
            self._reasoning(block, track)
        elif kind == "refusal":
            self.emit.text(text_of(block, "refusal"), track)
            self.stopped("refusal")
        elif kind in ("text", "output_text"):
            self.emit.text(text_of(block, "text"), track)
            for citation in block.get("annotations") or block.get("citations") or ():
                self._citation(citation)
        elif kind in ("image", "image_url", "file", "audio", "video"):
            self._file(block)

    def _reasoning(self, block: dict[str, Any], track: str) -> None:
        for name in ("thinking", "reasoning"):
            self.emit.reasoning(text_of(block, name), track)
        for summary in block.get("summary") or ():
            self.emit.reasoning(text_of(summary, "text"), track)
        self.emit.reasoning(text_of(block.get("reasoning_content"), "text"), track)

    def _citation(self, citation: Any) -> None:
        if url := text_of(citation, "url"):
            self.emit.source(url, get(citation, "title"))
        else:
            self.emit.document(text_of(citation, "document_title") or text_of(citation, "title"))

    def _file(self, block: dict[str, Any]) -> None:
        image = block.get("image_url")
        url = image if isinstance(image, str) else text_of(image, "url") or text_of(block, "url")
        media_type = text_of(block, "mime_type") or _IMAGE
        if data := text_of(block, "base64") or (text_of(block, "data") if "source_type" in block else ""):
            url = data_url(media_type, data)
        if url:
            self.emit.file(url, media_type)

    def _call_chunks(self, message: Any) -> None:
        track = _track(message)
        for chunk in get(message, "tool_call_chunks") or ():
            index, id = chunk.get("index"), chunk.get("id")
            call = self._calls.get((track, index))
            if call is None or (id and id != call):
                call = self._calls[track, index] = id or self.emit.new_id()
                self.emit.tool_start(call, chunk.get("name") or "", track)
            self.emit.tool_delta(call, chunk.get("args"))

    def _end(self, message: Any, *, is_last: bool) -> None:
        metadata = get(message, "response_metadata") or {}
        self.stopped(next((metadata[name] for name in _REASONS if metadata.get(name)), None))
        if is_last:
            track = _track(message)
            self.emit.end(track)
            for key in [key for key in self._calls if key[0] == track]:
                self.emit.tool_input_end(self._calls.pop(key))

    def finish(self) -> None:
        if self._seen and self.emit.finish_reason is None:
            self.stopped("stop")


def _track(message: Any) -> str:
    return get(message, "id") or ""


class Events(Messages):
    """The events of `astream_events`. Inputs, and outputs of chains, are not read: they contain prompts and states."""

    has_steps = True

    @classmethod
    def accepts(cls, item: Any) -> bool:
        if not isinstance(item, dict) or "run_id" not in item:
            return False
        return text_of(item, "event").startswith("on_") and isinstance(item.get("data"), dict)

    def convert(self, item: Any) -> None:
        kind, data = item["event"], item["data"]
        if kind == "on_chat_model_stream":
            super().convert(data["chunk"])
        elif kind == "on_chat_model_end" and is_message(data.get("output")):
            self.whole(data["output"])
        elif kind == "on_llm_stream":
            self.emit.text(text_of(data["chunk"], "text"), item["run_id"])
        elif kind == "on_llm_end":
            self.emit.end(item["run_id"])
        elif kind == "on_tool_end":
            self._tool_end(item)
        elif kind == "on_tool_error":
            call = data.get("tool_call_id") or item["run_id"]
            self.emit.tool_output_error(call, name=item.get("name"))
        elif kind == "on_custom_event":
            self.emit.data(item["name"], data)

    def _tool_end(self, item: dict[str, Any]) -> None:
        output = item["data"].get("output")
        if is_message(output):
            self.result(output)
            return
        update = get(output, "update")
        if isinstance(update, dict):  # a Command
            for message in update.get("messages") or ():
                if is_from_tool(message):
                    self.result(message)
            return
        call = item["run_id"]  # called by the code of a chain, not by a model
        self.emit.tool_input(call, item["name"], item["data"].get("input"))
        self.emit.tool_output(call, output)
