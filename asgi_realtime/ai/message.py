"""The message that a run forms, as the AI SDK's client assembles it: what a host stores when a run is over.

It is the same for every reader, and for an answer that was cut off it contains what had arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from asgi_realtime.ai.message_parts import BEGINNING, NotAPart, Part, follow
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import UsageError


def message_id_of(run_id: str) -> str:
    """The id of the message that a run forms, unless its first chunk is a `start` with another one."""
    return f"msg_{run_id}"


TOOL_CUT_OFF = "The run ended before this tool call was finished."


def assemble(chunks: Iterable[Any], *, message_id: str, is_over: bool = False, was_cut: bool = False) -> dict[str, Any]:
    """The UI message that the chunks of a stream form: `{"id", "role": "assistant", "parts": [...]}`.

    `message_id` is its id unless the first chunk is a `start` with one. Plain strings are text, and chunks that are not
    parts are left out. An unfinished text has `"state": "streaming"`, unless the run is over.

    `was_cut`: the run did not complete, so that nothing finishes its open tool calls. They have failed: models and the
    AI SDK reject a history with a tool call that has no result.
    """
    message, state = _Message(message_id), BEGINNING
    for index, chunk in enumerate(chunks):
        try:
            state, parts = follow(state, chunk, is_first=index == 0)
        except NotAPart:
            continue
        for part in parts:
            message.add(part)
    closing = state.closing() if is_over else []
    for part in [*closing, {"type": "finish", **state.finish_fields()}]:
        message.add(part)
    whole = message.joined()
    for part in whole["parts"] if was_cut else ():
        if part.get("state") in ("input-streaming", "input-available"):
            part |= {"state": "output-error", "errorText": TOOL_CUT_OFF}
            part.setdefault("input", {})
    return whole


class _Message:
    def __init__(self, message_id: str) -> None:
        self._parts: list[dict[str, Any]] = []
        self._message: dict[str, Any] = {"id": message_id, "role": "assistant", "parts": self._parts}
        self._open: dict[tuple[str, str], tuple[dict[str, Any], list[str]]] = {}
        self._texts: list[tuple[dict[str, Any], list[str]]] = []
        self._tools: dict[str, dict[str, Any]] = {}
        self._inputs: dict[str, list[str]] = {}  # the text of the inputs that are streaming
        self._data: dict[tuple[str, str], dict[str, Any]] = {}

    def joined(self) -> dict[str, Any]:
        """The message, with the texts that arrived in pieces. Joining them at each delta would take quadratic time."""
        for text, deltas in self._texts:
            text["text"] = "".join(deltas)
        for call_id, pieces in self._inputs.items():
            tool = self._tools.get(call_id, {})
            if tool.get("state") == "input-streaming" and (value := _partial_json("".join(pieces))) is not None:
                tool["input"] = value
        return self._message

    def add(self, part: Part) -> None:
        type: str = part["type"]
        kind, _, step = type.partition("-")
        if type in ("start", "finish", "message-metadata"):
            self._add_metadata(part)
        elif kind in ("text", "reasoning"):
            self._add_text(kind, step, part)
        elif kind == "tool" and step != "approval-response":
            self._add_tool(step, part)
        elif kind == "data":
            self._add_data(part)
        elif kind in ("source", "file"):
            self._parts.append(dict(part))
        elif type == "start-step":
            self._parts.append({"type": "step-start"})

    def _add_metadata(self, part: Part) -> None:
        self._message["id"] = part.get("messageId") or self._message["id"]
        if "messageMetadata" in part:
            self._message["metadata"] = _merged(self._message.get("metadata"), part["messageMetadata"])

    def _add_text(self, kind: str, step: str, part: Part) -> None:
        key = (kind, part["id"])
        if step == "start":
            identity = {"id": part["id"]} if kind == "reasoning" else {}  # as the AI SDK's client does
            self._open[key] = {"type": kind, **identity, "text": "", "state": "streaming"}, []
            self._texts.append(self._open[key])
            self._parts.append(self._open[key][0])
        text, deltas = self._open[key]
        if step == "delta":
            deltas.append(part["delta"])
        if "providerMetadata" in part:
            text["providerMetadata"] = part["providerMetadata"]
        if step == "end":
            del self._open[key]
            text["state"] = "done"

    def _add_tool(self, step: str, part: Part) -> None:
        call_id = part.get("toolCallId", "")
        if "toolName" in part and call_id not in self._tools:
            self._tools[call_id] = {"type": f"tool-{part['toolName']}", "toolCallId": call_id}
            self._parts.append(self._tools[call_id])
        tool = self._tools.get(call_id)
        if tool is None:
            return
        for name in ("input", "output", "errorText", "providerExecuted", "title"):
            if name in part:
                tool[name] = part[name]
        if "providerMetadata" in part:
            output = step.startswith("output")
            tool["resultProviderMetadata" if output else "callProviderMetadata"] = part["providerMetadata"]
        match step:
            case "input-start" | "input-delta":
                self._inputs.setdefault(call_id, []).append(part["inputTextDelta"] if step == "input-delta" else "")
                tool["state"] = "input-streaming"
            case "input-available" | "output-available" | "output-denied":
                tool["state"] = step
            case "input-error" | "output-error":
                tool["state"] = "output-error"
            case "approval-request":
                tool |= {"state": "approval-requested", "approval": {"id": part["approvalId"]}}
        if part.get("preliminary"):
            tool["preliminary"] = True
        else:
            tool.pop("preliminary", None)

    def _add_data(self, part: Part) -> None:
        if part.get("transient"):
            return
        key = (part["type"], str(part.get("id", "")))
        if key[1] and key in self._data:
            self._data[key]["data"] = part["data"]
            return
        self._data[key] = dict(part)
        self._parts.append(self._data[key])


def _merged(old: Any, new: Any) -> Any:
    """Metadata with newer metadata: objects field by field, everything else as a whole."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}


_CLOSING = {"{": "}", "[": "]"}


def _partial_json(text: str) -> Any:
    """The value of JSON that is cut off anywhere, without a last field that is incomplete; None if there is none."""
    closers, in_string, is_escaped, cut = "", False, False, 0
    cut_closers = ""
    for place, character in enumerate(text):
        if in_string:
            in_string = is_escaped or character != '"'
            is_escaped = character == "\\" and not is_escaped
        elif character == '"':
            in_string = True
        elif character in _CLOSING:
            closers = _CLOSING[character] + closers
            cut, cut_closers = place + 1, closers
        elif character in "]}":
            closers = closers[1:]
        elif character == ",":
            cut, cut_closers = place, closers
    for whole in (text + '"' * in_string + closers, text[:cut] + cut_closers):
        try:
            return decode(whole.encode("utf-8", "replace"))
        except UsageError:
            continue
    return None
