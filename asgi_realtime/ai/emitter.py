"""Emits message parts, in an order that every version of the AI SDK accepts. Converters emit all parts through it.

A client of the AI SDK fails on a delta without its start, on a delta after `finish-step`, and on the output of a tool
call that it does not know. So this class tracks what the client has open:

* **Blocks** of text or reasoning. A track is one message of a model; it has at most one open block. A delta of another
  kind, or a tool call, ends that block, so the parts of a message have the order in which the model wrote them. Tracks
  are independent: models that answer concurrently, as in a graph, do not split each other's text.
* **Tool calls**, in the states of `_NEXT`. The input streams, is ready, and gets its outputs; what a source reports
  twice is emitted once.
* **Steps**: one call of a model and of the tools that it asked for. Beginning one ends the one before, and its blocks.

The ids of blocks and sources are a random prefix and a counter. The prefix makes them unique in a run in which several
`parts()` write one message. It has 4 characters, because every delta repeats it. Ids of a model would be longer, and
some models repeat them. The log stores the ids, so all readers see the same ones.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, NamedTuple

from asgi_realtime.ai.message_parts import Part
from asgi_realtime.ai.plain import plain

Kind = Literal["text", "reasoning"]
HOSTED: Part = {"providerExecuted": True}
"""Of a tool call that the model's API executes itself."""
FINISH_REASONS = frozenset({"stop", "length", "content-filter", "tool-calls", "error", "other"})

TOOL_FAILED = "The tool failed."
"""Instead of the exception of a tool, which can contain private data. The AI SDK's server hides it too."""
INVALID_INPUT = "The input of the tool call is not valid JSON."


class ToolState(Enum):
    NEW = "new"
    STREAMING = "streaming"
    READY = "ready"
    PRELIMINARY = "preliminary"
    DONE = "done"


_NEXT: dict[ToolState, frozenset[ToolState]] = {
    ToolState.NEW: frozenset({ToolState.STREAMING, ToolState.READY, ToolState.DONE}),
    ToolState.STREAMING: frozenset({ToolState.READY, ToolState.DONE}),
    ToolState.READY: frozenset({ToolState.PRELIMINARY, ToolState.DONE}),
    ToolState.PRELIMINARY: frozenset({ToolState.PRELIMINARY, ToolState.DONE}),
    ToolState.DONE: frozenset(),
}


class _Block(NamedTuple):
    kind: Kind
    delta_type: str
    id: str


@dataclass(slots=True)
class _Tool:
    name: str
    extra: Part
    state: ToolState = ToolState.NEW
    input: list[str] = field(default_factory=list)

    def enter(self, state: ToolState) -> bool:
        """Enter a state if the current one allows it."""
        if state not in _NEXT[self.state]:
            return False
        self.state = state
        return True


class Emitter:
    """Collects the parts of one source in `parts`, from which the caller takes them."""

    def __init__(self) -> None:
        self.parts: deque[Part] = deque()
        self.finish_reason: str | None = None
        self.finish_metadata: Any = None
        self.started = False
        """Whether any part was emitted."""
        self._prefix = secrets.token_urlsafe(3)
        self._count = 0
        self._open: dict[str, _Block] = {}
        self._tools: dict[str, _Tool] = {}
        self._cited: set[str] = set()
        self._in_step = False

    def _emit(self, type: str, **fields: Any) -> None:
        self.started = True
        self.parts.append({"type": type, **fields})

    def new_id(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count}"

    # Text and reasoning

    def text(self, delta: str | None, track: str = "") -> None:
        self._delta("text", delta, track)

    def reasoning(self, delta: str | None, track: str = "") -> None:
        self._delta("reasoning", delta, track)

    def _delta(self, kind: Kind, delta: str | None, track: str) -> None:
        if not delta:
            return
        block = self._open.get(track)
        if block is None or block.kind != kind:
            block = self.begin(kind, track)
        self.parts.append({"type": block.delta_type, "id": block.id, "delta": delta})

    def begin(self, kind: Kind, track: str = "", **extra: Any) -> _Block:
        """Begin a block, and end the one that is open in its track. A delta does so by itself."""
        self.end(track)
        block = self._open[track] = _Block(kind, f"{kind}-delta", self.new_id())
        self._emit(f"{kind}-start", id=block.id, **extra)
        return block

    def end(self, track: str = "", **extra: Any) -> None:
        """End the open block of a track, if there is one."""
        block = self._open.pop(track, None)
        if block is not None:
            self._emit(f"{block.kind}-end", id=block.id, **extra)

    def end_all(self) -> None:
        for track in list(self._open):
            self.end(track)

    @property
    def is_idle(self) -> bool:
        """Whether no text and no input of a tool is open, so that a step can begin."""
        return not self._open and all(tool.state is not ToolState.STREAMING for tool in self._tools.values())

    # Tools

    def tool_start(self, call: str, name: str, track: str = "", extra: Part | None = None) -> None:
        """The model has begun to write the input of a tool call."""
        if call not in self._tools:
            self.end(track)
            self._tool(call, name, extra).enter(ToolState.STREAMING)
            self._emit("tool-input-start", toolCallId=call, toolName=name, **(extra or {}))

    def tool_delta(self, call: str, delta: str | None) -> None:
        tool = self._tools.get(call)
        if delta and tool is not None and tool.state is ToolState.STREAMING:
            tool.input.append(delta)
            self._emit("tool-input-delta", toolCallId=call, inputTextDelta=delta)

    def tool_input(self, call: str, name: str, input: Any, track: str = "", extra: Part | None = None) -> None:
        """The whole input of a tool call. Ignored if it was emitted before."""
        if call not in self._tools:
            self.end(track)
        tool = self._tool(call, name, extra)
        if tool.enter(ToolState.READY):
            self._emit("tool-input-available", toolCallId=call, toolName=tool.name, input=plain(input), **tool.extra)

    def tool_input_text(self, call: str, name: str, text: str, track: str = "", extra: Part | None = None) -> None:
        """As `tool_input`, with the input as JSON text."""
        try:
            input = json.loads(text) if text.strip() else {}
        except ValueError:
            self.tool_input_error(call, name, text, track=track, extra=extra)
        else:
            self.tool_input(call, name, input, track, extra)

    def tool_input_error(
        self, call: str, name: str, input: Any, text: str = INVALID_INPUT, track: str = "", extra: Part | None = None
    ) -> None:
        if call not in self._tools:
            self.end(track)
        tool = self._tool(call, name, extra)
        if tool.state in (ToolState.NEW, ToolState.STREAMING) and tool.enter(ToolState.DONE):
            fields = {"toolCallId": call, "toolName": tool.name, "input": plain(input), "errorText": text}
            self._emit("tool-input-error", **fields, **tool.extra)

    def tool_input_end(self, call: str) -> None:
        """The streamed input of a tool call is complete."""
        tool = self._tools.get(call)
        if tool is not None and tool.state is ToolState.STREAMING:
            self.tool_input_text(call, tool.name, "".join(tool.input))

    def end_tool_inputs(self) -> None:
        for call in list(self._tools):
            self.tool_input_end(call)

    def tool_output(self, call: str, output: Any, *, name: str | None = None, preliminary: bool = False) -> None:
        """The output of a tool call. With a name, a call that is not known yet is announced first."""
        state = ToolState.PRELIMINARY if preliminary else ToolState.DONE
        if self._expects_output(call, name, state):
            extra = {"preliminary": True} if preliminary else {}
            self._emit("tool-output-available", toolCallId=call, output=plain(output), **extra)

    def tool_output_error(self, call: str, text: str = TOOL_FAILED, *, name: str | None = None) -> None:
        if self._expects_output(call, name, ToolState.DONE):
            self._emit("tool-output-error", toolCallId=call, errorText=text)

    def tool_output_denied(self, call: str) -> None:
        if self._expects_output(call, None, ToolState.DONE):
            self._emit("tool-output-denied", toolCallId=call)

    def _expects_output(self, call: str, name: str | None, state: ToolState) -> bool:
        self.tool_input_end(call)
        if name is not None:
            self.tool_input(call, name, {})
        tool = self._tools.get(call)
        return tool is not None and tool.enter(state)

    def _tool(self, call: str, name: str, extra: Part | None) -> _Tool:
        return self._tools.setdefault(call, _Tool(name, extra or {}))

    def knows_tool(self, call: str) -> bool:
        return call in self._tools

    # Sources, files, data

    def source(self, url: str | None, title: str | None = None) -> None:
        """A page that the model cites. Emitted once."""
        if url and url not in self._cited:
            self._cited.add(url)
            self._emit("source-url", sourceId=self.new_id(), url=url, **({"title": title} if title else {}))

    def document(self, title: str | None, media_type: str = "text/plain", filename: str | None = None) -> None:
        """A document that the model cites. Emitted once."""
        title = title or filename
        if title and title not in self._cited:
            self._cited.add(title)
            fields = {"sourceId": self.new_id(), "mediaType": media_type, "title": title}
            self._emit("source-document", **fields, **({"filename": filename} if filename else {}))

    def file(self, url: str, media_type: str) -> None:
        self._emit("file", url=url, mediaType=media_type)

    def data(self, name: str, value: Any, **fields: Any) -> None:
        self._emit(f"data-{name}", data=plain(value), **fields)

    def other(self, part: Part) -> None:
        """A part that has no place in the order, such as message-metadata."""
        self.started = True
        self.parts.append(part)

    # Steps, start and finish

    def start(self, message_id: str | None, metadata: Any = None) -> None:
        fields = {"messageId": message_id, "messageMetadata": metadata}
        self._emit("start", **{name: value for name, value in fields.items() if value is not None})

    def start_step(self) -> None:
        self.finish_step()
        self._in_step = True
        self._emit("start-step")

    def finish_step(self) -> None:
        if self._in_step:
            self.end_all()
            self._in_step = False
            self._emit("finish-step")

    def finish(self) -> None:
        """The source ended normally."""
        self.end_all()
        self.end_tool_inputs()
        self.finish_step()
        metadata = {} if self.finish_metadata is None else {"messageMetadata": self.finish_metadata}
        self._emit("finish", finishReason=self.finish_reason or "other", **metadata)
