"""Events of a pydantic-ai agent: `run_stream_events()`, the events of its nodes, and the result of `run_stream()`.

A response of the model consists of parts with an index from 0, so the start of part 0 begins a step. Events that carry
messages, prompts or settings are ignored. Of `agent_run_result` only the finish reason of the last response is read.
Texts of failed and retried tool calls are instructions to the model, so they are not sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from asgi_realtime.ai.emitter import HOSTED, Emitter
from asgi_realtime.ai.plain import data_url, get, text_of
from asgi_realtime.ai.sources.base import Converter

_CALLS = ("tool-call", "builtin-tool-call", "native-tool-call")
_NATIVE_RETURNS = ("builtin-tool-return", "native-tool-return")
DENIED = "The tool call was denied."


class PydanticAI(Converter):
    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._calls: dict[int, str] = {}
        """The ids of the calls of the current response, by the index of their part."""

    @classmethod
    def accepts(cls, item: Any) -> bool:
        return bool(text_of(item, "event_kind"))

    def convert(self, item: Any) -> None:
        kind = text_of(item, "event_kind")
        if kind == "part_delta":
            self._delta(get(item, "index"), get(item, "delta"))
        elif kind == "part_start":
            self._start(get(item, "index"), get(item, "part"))
        elif kind == "part_end":
            self._end(get(item, "part"))
        elif kind in ("function_tool_call", "output_tool_call"):
            self._input(get(item, "part"))
        elif kind in ("function_tool_result", "output_tool_result"):
            self._output(get(item, "part") or get(item, "result"))
        elif kind == "agent_run_result":
            self.stopped(get(get(get(item, "result"), "response"), "finish_reason") or "stop")
        elif kind == "custom" and get(item, "ui"):
            self.emit.data(get(item, "name"), item.to_payload())

    def _start(self, index: int, part: Any) -> None:
        if index == 0:
            self._calls.clear()
            self.emit.start_step()
        kind = text_of(part, "part_kind")
        if kind == "text":
            self.emit.text(get(part, "content"))
        elif kind == "thinking":
            self.emit.reasoning(get(part, "content"))
        elif kind in _CALLS:
            self._calls[index] = call = get(part, "tool_call_id")
            self.emit.tool_start(call, get(part, "tool_name"), extra=None if kind == "tool-call" else HOSTED)
            self.emit.tool_delta(call, text_of(part, "args"))
        elif kind in _NATIVE_RETURNS:
            self._output(part)
        elif kind == "file":
            file = get(part, "content")
            media_type = get(file, "media_type")
            self.emit.file(data_url(media_type, get(file, "data")), media_type)

    def _delta(self, index: int, delta: Any) -> None:
        kind = text_of(delta, "part_delta_kind")
        if kind == "text":
            self.emit.text(get(delta, "content_delta"))
        elif kind == "thinking":
            self.emit.reasoning(get(delta, "content_delta"))
        elif kind == "tool_call":
            self.emit.tool_delta(self._calls.get(index, ""), text_of(delta, "args_delta"))

    def _end(self, part: Any) -> None:
        kind = text_of(part, "part_kind")
        if kind in _CALLS:
            self._input(part)
            return
        self.emit.end()
        for citation in get(part, "citations") or ():
            for source in get(citation, "sources") or ():
                self._source(source)

    def _input(self, part: Any) -> None:
        call, name, args = get(part, "tool_call_id"), get(part, "tool_name"), get(part, "args")
        if args is None or isinstance(args, str):
            self.emit.tool_input_text(call, name, args or "")
        else:
            self.emit.tool_input(call, name, args)

    def _output(self, part: Any) -> None:
        call, name, outcome = get(part, "tool_call_id"), get(part, "tool_name"), get(part, "outcome", "success")
        if text_of(part, "part_kind") == "retry-prompt" or outcome in ("failed", "retried"):
            if call is not None and name is not None:
                self.emit.tool_output_error(call, name=name)
        elif outcome == "denied":
            self.emit.tool_output_error(call, DENIED, name=name)
        else:
            self.emit.tool_output(call, get(part, "content"), name=name)

    def _source(self, source: Any) -> None:
        if url := get(source, "url"):
            self.emit.source(url, get(source, "title"))
        else:
            self.emit.document(get(source, "title"))


@dataclass(slots=True)
class _Event:
    """An event in the form of pydantic-ai's."""

    event_kind: str
    index: int = 0
    part: Any = None
    delta: Any = None
    result: Any = None


@dataclass(slots=True)
class _Delta:
    part_delta_kind: str
    content_delta: str | None = None
    args_delta: str | None = None


_TEXT_OF_KIND = {"text": ("content", "text"), "thinking": ("content", "thinking")} | dict.fromkeys(
    _CALLS, ("args", "tool_call")
)


class ResponseStream:
    """The events of a `StreamedRunResult`, which has no events in its public interface.

    What the agent did before its final response is in the new messages. The final response comes as snapshots; their
    differences are the deltas.
    """

    def __init__(self, result: Any) -> None:
        self._result = result

    async def __aiter__(self) -> AsyncIterator[_Event]:
        for message in self._result.new_messages():
            for event in _past_events(message):
                yield event
        response: Any = None
        known: list[str] = []
        async for response in self._result.stream_response(debounce_by=None):
            for event in _new_events(response.parts, known):
                yield event
        for part in response.parts if response is not None else ():
            yield _Event("part_end", part=part)
        yield _Event("agent_run_result", result=self._result)


def _past_events(message: Any) -> list[_Event]:
    if get(message, "kind") == "response":
        return [
            _Event(kind, index=index, part=part)
            for index, part in enumerate(message.parts)
            for kind in ("part_start", "part_end")
        ]
    returns = (part for part in message.parts if text_of(part, "part_kind") in ("tool-return", "retry-prompt"))
    return [_Event("function_tool_result", part=part) for part in returns]


def _new_events(parts: list[Any], known: list[str]) -> list[_Event]:
    """What a snapshot of a response adds to the texts of its parts that are known."""
    events = []
    for index, part in enumerate(parts):
        attribute, kind = _TEXT_OF_KIND.get(text_of(part, "part_kind"), ("", ""))
        text = text_of(part, attribute)
        if index == len(known):
            events += [_Event("part_end", part=before) for before in parts[index - 1 : index]]
            events.append(_Event("part_start", index=index, part=part))
            known.append(text)
        elif len(text) > len(known[index]):
            added = text[len(known[index]) :]
            delta = _Delta(kind, args_delta=added) if kind == "tool_call" else _Delta(kind, content_delta=added)
            events.append(_Event("part_delta", index=index, delta=delta))
            known[index] = text
    return events
