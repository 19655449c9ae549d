"""Checks message parts as a client of the AI SDK reads them: the form of each part, and the order of all.

`check_order` raises `AssertionError` for what makes versions 5, 6 or 7 of the client fail or show something wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Part = dict[str, Any]

FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "start": (set(), {"messageId", "messageMetadata"}),
    "text-start": ({"id"}, {"providerMetadata"}),
    "text-delta": ({"id", "delta"}, set()),
    "text-end": ({"id"}, {"providerMetadata"}),
    "reasoning-start": ({"id"}, {"providerMetadata"}),
    "reasoning-delta": ({"id", "delta"}, set()),
    "reasoning-end": ({"id"}, {"providerMetadata"}),
    "tool-input-start": ({"toolCallId", "toolName"}, {"providerExecuted", "providerMetadata"}),
    "tool-input-delta": ({"toolCallId", "inputTextDelta"}, set()),
    "tool-input-available": ({"toolCallId", "toolName", "input"}, {"providerExecuted", "providerMetadata"}),
    "tool-input-error": ({"toolCallId", "toolName", "input", "errorText"}, {"providerExecuted", "providerMetadata"}),
    "tool-output-available": ({"toolCallId", "output"}, {"preliminary"}),
    "tool-output-error": ({"toolCallId", "errorText"}, set()),
    "tool-output-denied": ({"toolCallId"}, set()),
    "tool-approval-request": ({"toolCallId", "approvalId"}, set()),
    "source-url": ({"sourceId", "url"}, {"title"}),
    "source-document": ({"sourceId", "mediaType", "title"}, {"filename"}),
    "file": ({"url", "mediaType"}, set()),
    "data": ({"data"}, {"id", "transient"}),
    "start-step": (set(), set()),
    "finish-step": (set(), set()),
    "message-metadata": ({"messageMetadata"}, set()),
    "finish": (set(), {"finishReason", "messageMetadata"}),
    "error": ({"errorText"}, set()),
    "abort": (set(), {"reason"}),
}
"""The fields that each part must have, and those that it can have."""
REASONS = {"stop", "length", "content-filter", "tool-calls", "error", "other"}
VALUES = {"input", "output", "data", "messageMetadata"}
"""Fields that can be null."""


def check_order(parts: Sequence[Part], *, finished: bool = True) -> None:
    """Check all parts of one message; `finished` is whether its source ended normally."""
    client = Client()
    for index, part in enumerate(parts):
        check_form(part)
        assert part["type"] != "start" or index == 0, "start is not the first part"
        assert part["type"] != "finish" or index == len(parts) - 1, "finish is not the last part"
        client.read(part)
    assert not client.open, f"blocks are open at the end: {client.open}"
    assert bool(parts and parts[-1]["type"] == "finish") is finished
    if finished:
        assert not client.in_step, "a step is open at the end"
        assert "streaming" not in client.tools.values(), "the input of a tool has no end"


def check_form(part: Part) -> None:
    kind = part["type"]
    required, optional = FIELDS["data" if kind.startswith("data-") else kind]
    names = part.keys() - {"type"}
    assert required <= names <= required | optional, part
    assert all(value is not None for name, value in part.items() if name not in VALUES), part
    assert part.get("finishReason", "stop") in REASONS, part
    assert part.get("delta", "x") and part.get("inputTextDelta", "x"), f"an empty delta: {part}"


class Client:
    """What a client knows of the message so far."""

    def __init__(self) -> None:
        self.open: dict[str, str] = {}
        self.used: set[str] = set()
        self.tools: dict[str, str] = {}
        self.in_step = False

    def read(self, part: Part) -> None:
        kind = part["type"]
        if kind.startswith(("text-", "reasoning-")):
            block, _, action = kind.partition("-")
            self._block(block, action, part["id"])
        elif kind.startswith(("tool-input", "tool-output")):
            self._tool(kind, part["toolCallId"], part)
        elif kind == "start-step":
            assert not self.in_step, "a step begins in a step"
            self.in_step = True
        elif kind == "finish-step":
            assert self.in_step and not self.open, "a step ends with open blocks, or without a beginning"
            self.in_step = False

    def _block(self, kind: str, action: str, id: str) -> None:
        if action == "start":
            assert id not in self.used, f"the id {id} has two blocks"
            self.used.add(id)
            self.open[id] = kind
            return
        assert self.open.get(id) == kind, f"{kind}-{action} of the block {id}, which is not open"
        if action == "end":
            del self.open[id]

    def _tool(self, kind: str, call: str, part: Part) -> None:
        state = self.tools.get(call)
        if kind == "tool-input-start":
            assert state is None, f"the call {call} starts twice"
            self.tools[call] = "streaming"
        elif kind == "tool-input-delta":
            assert state == "streaming", f"a delta of the call {call}, whose input does not stream"
        elif kind.startswith("tool-input-"):
            assert state in (None, "streaming"), f"the call {call} has two inputs"
            self.tools[call] = "ready" if kind == "tool-input-available" else "done"
        else:
            assert state == "ready", f"the output of the call {call}, which is {state}"
            self.tools[call] = "ready" if part.get("preliminary") else "done"
