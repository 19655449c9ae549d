"""The events of AG-UI, version 1.0.

One run here is one run there. Message parts become events, and chunks that are AG-UI events already, such as those of
pydantic-ai's `AGUIAdapter`, pass through. Clients reject RUN_FINISHED while anything is open, so the state lists what
the events so far have opened. RUN_STARTED of a chunk is dropped, and RUN_FINISHED or RUN_ERROR is held back: a stream
ends when the run does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from asgi_realtime.ai.conversion import Conversion, Event, NoMeaning, end_text
from asgi_realtime.ai.message import message_id_of
from asgi_realtime.ai.message_parts import BEGINNING, MIDDLE, MessageState, NotAPart, Part, follow
from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.log import End
from asgi_realtime.core.runs import StoredRecord

_OPENERS = {
    "TEXT_MESSAGE_START": ("messageId", "TEXT_MESSAGE_END"),
    "REASONING_START": ("messageId", "REASONING_END"),
    "REASONING_MESSAGE_START": ("messageId", "REASONING_MESSAGE_END"),
    "TOOL_CALL_START": ("toolCallId", "TOOL_CALL_END"),
    "STEP_STARTED": ("stepName", "STEP_FINISHED"),
    "SUBAGENT_STARTED": ("subagentRunId", "SUBAGENT_FINISHED"),
}
"""The events that open something, the field that names it, and the event that closes it."""

_CLOSERS = {closer: field for field, closer in _OPENERS.values()} | {"SUBAGENT_ERROR": "subagentRunId"}

_CONTENTS = {
    "TEXT_MESSAGE_CONTENT": ("TEXT_MESSAGE_START",),
    "REASONING_MESSAGE_CONTENT": ("REASONING_START", "REASONING_MESSAGE_START"),
    "TOOL_CALL_ARGS": ("TOOL_CALL_START",),
}
"""What must be open for the deltas."""

_RUN_EVENTS = frozenset({"RUN_STARTED", "RUN_FINISHED", "RUN_ERROR"})
_TYPES = (
    frozenset(
        "TEXT_MESSAGE_CONTENT TEXT_MESSAGE_CHUNK REASONING_MESSAGE_CONTENT REASONING_MESSAGE_CHUNK"
        " REASONING_ENCRYPTED_VALUE TOOL_CALL_ARGS TOOL_CALL_CHUNK TOOL_CALL_RESULT STATE_SNAPSHOT STATE_DELTA"
        " MESSAGES_SNAPSHOT ACTIVITY_SNAPSHOT ACTIVITY_DELTA RAW CUSTOM".split()
    )
    | _OPENERS.keys()
    | _CLOSERS.keys()
    | _RUN_EVENTS
)

_NULLABLE = frozenset({"value", "snapshot", "event"})
"""Required fields that can be null. Clients reject an optional field that is null."""

_TEXTS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "start": [("TEXT_MESSAGE_START", {"role": "assistant"})],
    "delta": [("TEXT_MESSAGE_CONTENT", {})],
    "end": [("TEXT_MESSAGE_END", {})],
}
_REASONINGS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "start": [("REASONING_START", {}), ("REASONING_MESSAGE_START", {"role": "reasoning"})],
    "delta": [("REASONING_MESSAGE_CONTENT", {})],
    "end": [("REASONING_MESSAGE_END", {}), ("REASONING_END", {})],
}


class _Open(NamedTuple):
    """Something that is open: the event that closes it, and the names of it and of its subagent."""

    closer: str
    id: str
    subagent: str

    def close(self) -> Event:
        event = {"type": self.closer, _CLOSERS[self.closer]: self.id}
        return {**event, "subagentRunId": self.subagent} if self.subagent else event


@dataclass(frozen=True, slots=True)
class AgUiState:
    """What the events so far have opened, and how the run said that it ends."""

    message: MessageState = BEGINNING
    open: tuple[_Open, ...] = ()
    with_input: frozenset[str] = frozenset()
    """The open tool calls that have received some of their input."""
    steps: int = 0
    ending: bytes = b"{}"

    def has_tool(self, call_id: str) -> bool:
        return any(one.closer == "TOOL_CALL_END" and one.id == call_id for one in self.open)


class AgUi(Conversion[AgUiState]):
    """A run as AG-UI events."""

    name = "ag-ui"
    deltas = {
        "TEXT_MESSAGE_CONTENT": ("messageId", "delta"),
        "REASONING_MESSAGE_CONTENT": ("messageId", "delta"),
        "TOOL_CALL_ARGS": ("toolCallId", "delta"),
    }
    beginning = AgUiState()
    middle = AgUiState(MIDDLE)

    def __init__(self, run_id: str, thread_id: str) -> None:
        self._ids = {"threadId": thread_id, "runId": run_id}
        self._message_id = message_id_of(run_id)

    @classmethod
    def of(cls, record: StoredRecord) -> Self:
        return cls(record.id, record.thread or record.id)

    def opening(self) -> list[Event]:
        return [{"type": "RUN_STARTED", **self._ids}]

    def step(self, state: AgUiState, chunk: Any, seq: int) -> tuple[AgUiState, list[Event]]:
        state, events = self._convert_event(state, chunk) if _is_event(chunk) else self._convert_parts(state, chunk)
        if len(events) != 1 or events[0]["type"] not in _CONTENTS or not state.message.is_whole:
            state = _tracked(state, events)
        return state, events if seq else [*self.opening(), *events]

    def finish(self, state: AgUiState, end: End) -> list[Event]:
        closing = [one.close() for one in reversed(state.open)]
        if end.reason == "complete":
            ending: Event = decode(state.ending)
            is_error = ending.get("type") == "RUN_ERROR"
            return [*closing, ending if is_error else {"type": "RUN_FINISHED", **ending, **self._ids}]
        if end.reason == "canceled":
            return [*closing, {"type": "RUN_FINISHED", **self._ids, "outcome": {"type": "cancelled"}}]
        return [*closing, {"type": "RUN_ERROR", "message": end_text(end), "code": end.reason}]

    def _convert_event(self, state: AgUiState, event: Event) -> tuple[AgUiState, list[Event]]:
        event = {name: value for name, value in event.items() if value is not None or name in _NULLABLE}
        named = _OPENERS.get(event["type"], (_CLOSERS.get(event["type"]),))[0]
        required = self.deltas.get(event["type"], (named,) if named else ())
        names = [*(event.get(name) for name in required), event.get("subagentRunId", "")]
        if not all(isinstance(name, str) for name in names):
            raise NoMeaning
        if event["type"] in _RUN_EVENTS:
            return state if event["type"] == "RUN_STARTED" else replace(state, ending=encode_value(event)), []
        return state, [event]

    def _convert_parts(self, state: AgUiState, chunk: Any) -> tuple[AgUiState, list[Event]]:
        try:
            message, parts = follow(state.message, chunk)
        except NotAPart:
            raise NoMeaning from None
        if message is not state.message:
            state = replace(state, message=message)
        events: list[Event] = []
        for part in parts:
            state, more = self._convert_part(state, part)
            events += more
        return state, events

    def _convert_part(self, state: AgUiState, part: Part) -> tuple[AgUiState, list[Event]]:
        type: str = part["type"]
        kind, _, step = type.partition("-")
        if kind in ("text", "reasoning"):
            return state, self._texts(kind, step, part)
        if kind == "tool" and "approval" not in step:
            return self._tool(state, step, part)
        if type == "start-step":
            return replace(state, steps=state.steps + 1), [_step("STEP_STARTED", state.steps + 1)]
        if type == "finish-step":
            steps = [one.close() for one in state.open if one.closer == "STEP_FINISHED"]
            return state, steps
        if type == "error":
            return replace(state, ending=encode_value({"type": "RUN_ERROR", "message": part["errorText"]})), []
        if type == "abort":
            return state, []
        if kind == "data":
            return state, [{"type": "CUSTOM", "name": step, "value": part["data"]}]
        value = {name: value for name, value in part.items() if name != "type"}
        return state, [{"type": "CUSTOM", "name": type, "value": value}]

    def _texts(self, kind: str, step: str, part: Part) -> list[Event]:
        if step == "delta" and not part["delta"]:
            return []
        fields = {"messageId": f"{self._message_id}-{kind}-{part['id']}"}
        if step == "delta":
            fields["delta"] = part["delta"]
        rows = (_TEXTS if kind == "text" else _REASONINGS)[step]
        return [{"type": type, **fields, **more} for type, more in rows]

    def _tool(self, state: AgUiState, step: str, part: Part) -> tuple[AgUiState, list[Event]]:
        call_id: str = part["toolCallId"]
        call = {"toolCallId": call_id}
        start = {"type": "TOOL_CALL_START", **call, "toolCallName": part.get("toolName", "")}
        close = {"type": "TOOL_CALL_END", **call}
        is_open = state.has_tool(call_id)
        if step == "input-start":
            return state, [] if is_open else [start]
        if step == "input-delta":
            if not part["inputTextDelta"]:
                return state, []
            if call_id not in state.with_input:
                state = replace(state, with_input=state.with_input | {call_id})
            return state, [{"type": "TOOL_CALL_ARGS", **call, "delta": part["inputTextDelta"]}]
        events: list[Event] = []
        if step in ("input-available", "input-error"):
            events += [] if is_open else [start]
            if call_id not in state.with_input:
                events.append({"type": "TOOL_CALL_ARGS", **call, "delta": _text(part["input"])})
            events.append(close)
            state = replace(state, with_input=state.with_input - {call_id})
        elif is_open:
            events.append(close)
        result = part.get("errorText", part.get("output", "the call was denied" if step == "output-denied" else None))
        if step != "input-available" and not part.get("preliminary"):
            result_id = f"{self._message_id}-result-{call_id}"
            events.append({"type": "TOOL_CALL_RESULT", "messageId": result_id, **call, "content": _text(result)})
        return state, events


def _is_event(chunk: Any) -> bool:
    return isinstance(chunk, dict) and isinstance(chunk.get("type"), str) and chunk["type"] in _TYPES


def _tracked(state: AgUiState, events: list[Event]) -> AgUiState:
    """The state with what these events open and close."""
    open = state.open
    for event in events:
        type = event["type"]
        if type in _OPENERS:
            open = (*open, _opened(type, event))
        elif type in _CLOSERS:
            closed = (type.replace("SUBAGENT_ERROR", "SUBAGENT_FINISHED"), event[_CLOSERS[type]])
            open = tuple(one for one in open if one[:2] != closed)
        elif type in _CONTENTS and not state.message.is_whole:  # what it continues can have been opened before
            implied = [_opened(opener, event) for opener in _CONTENTS[type]]
            open = (*open, *(one for one in implied if one not in open))
    return state if open is state.open else replace(state, open=open)


def _opened(opener: str, event: Event) -> _Open:
    field, closer = _OPENERS[opener]
    return _Open(closer, event[field], "" if field == "subagentRunId" else event.get("subagentRunId", ""))


def _step(type: str, number: int) -> Event:
    return {"type": type, "stepName": f"step-{number}"}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else encode_value(value).decode()
