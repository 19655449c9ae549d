"""Chunks of chat completions: openai, litellm, and every client of an API of that form.

Only the first choice is converted. Tool calls have an index within a chunk; the id and the name come with the first
delta of a call. Some servers send whole calls that all have the index 0, so another id begins another call. Some send
no id. Reasoning has two names, as OpenAI's own API sends none.

The helper `client.chat.completions.stream()` of openai yields each chunk and then events that repeat it with a snapshot
of the answer so far. These events are ignored.
"""

from __future__ import annotations

from typing import Any

from asgi_realtime.ai.emitter import Emitter
from asgi_realtime.ai.plain import fields, get, text_of
from asgi_realtime.ai.sources.base import Converter

_HELPER = ("content.", "refusal.", "logprobs.", "tool_calls.")


class Completions(Converter):
    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._calls: dict[int, str] = {}
        """The ids of the calls whose input streams, by index."""
        self._refused = False

    @classmethod
    def accepts(cls, item: Any) -> bool:
        kind = text_of(item, "type")
        if kind == "chunk":
            return cls._is_chunk(get(item, "chunk"))
        return kind.startswith(_HELPER) or cls._is_chunk(item) or cls._is_chunk(get(item, "data"))

    @staticmethod
    def _is_chunk(item: Any) -> bool:
        choices = get(item, "choices")
        return isinstance(choices, list) and (not choices or get(choices[0], "delta") is not None)

    def convert(self, item: Any) -> None:
        choices = get(item, "choices")
        if choices is None:
            if text_of(item, "type").startswith(_HELPER):
                return
            choices = get(get(item, "chunk") or get(item, "data"), "choices")
        for choice in choices:
            if not get(choice, "index"):
                self._choice(choice)

    def _choice(self, choice: Any) -> None:
        emit, delta = self.emit, fields(get(choice, "delta"))
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            emit.reasoning(reasoning)
        content = delta.get("content")
        if isinstance(content, str):
            emit.text(content)
        elif content:
            self._blocks(content)
        if refusal := delta.get("refusal"):
            self._refused = True
            emit.text(refusal)
        for call in delta.get("tool_calls") or ():
            self._tool_call(call)
        if annotations := delta.get("annotations"):
            self._annotations(annotations)
        if images := delta.get("images"):
            self._images(images)
        if reason := get(choice, "finish_reason"):
            self._end_calls()
            self.stopped("content_filter" if self._refused else reason)

    def _blocks(self, content: list[Any]) -> None:
        """Content as Mistral's API sends it."""
        for block in content:
            if text_of(block, "type") == "thinking":
                for inner in get(block, "thinking") or ():
                    self.emit.reasoning(text_of(inner, "text"))
            else:
                self.emit.text(text_of(block, "text"))

    def _tool_call(self, call: Any) -> None:
        function = get(call, "function")
        index, id, name = get(call, "index") or 0, get(call, "id"), text_of(function, "name")
        current = self._calls.get(index)
        if current is None or (id and id != current):
            if current is not None:
                self.emit.tool_input_end(current)
            current = self._calls[index] = id or self.emit.new_id()
            self.emit.tool_start(current, name)
        self.emit.tool_delta(current, text_of(function, "arguments"))

    def _annotations(self, annotations: list[Any]) -> None:
        for annotation in annotations:
            if cited := get(annotation, "url_citation"):
                self.emit.source(get(cited, "url"), get(cited, "title"))

    def _images(self, images: list[Any]) -> None:
        for image in images:
            url = text_of(get(image, "image_url"), "url")
            media_type = url.removeprefix("data:").partition(";")[0] if url.startswith("data:") else "image/png"
            self.emit.file(url, media_type)

    def _end_calls(self) -> None:
        for call in self._calls.values():
            self.emit.tool_input_end(call)
        self._calls.clear()
