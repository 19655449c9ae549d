"""The parts of a message, and what the chunks of a run mean as one message.

A part is a dict of the AI SDK's UI message stream, limited to what its versions 5 to 7 accept. `follow` takes the
chunks of a stream in order and returns the parts of the one message that they form. So it opens a text part for plain
strings, drops what only the end of a run can say (`finish`), and gives every delta a start, which clients insist on.

`MessageState` is a value and depends on the chunks so far only. Readers at the same place can share it, and a reader
that resumes computes it from the stored chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from asgi_realtime.core.chunks import decode, encode_value

Part = dict[str, Any]

_TOOL = ("toolCallId", "toolName")
REQUIRED: dict[str, tuple[str, ...]] = {
    "start": (),
    "text-start": ("id",),
    "text-delta": ("id", "delta"),
    "text-end": ("id",),
    "reasoning-start": ("id",),
    "reasoning-delta": ("id", "delta"),
    "reasoning-end": ("id",),
    "tool-input-start": _TOOL,
    "tool-input-delta": ("toolCallId", "inputTextDelta"),
    "tool-input-available": (*_TOOL, "input"),
    "tool-input-error": (*_TOOL, "input", "errorText"),
    "tool-output-available": ("toolCallId", "output"),
    "tool-output-error": ("toolCallId", "errorText"),
    "tool-output-denied": ("toolCallId",),
    "tool-approval-request": ("toolCallId", "approvalId"),
    "tool-approval-response": ("approvalId", "approved"),
    "source-url": ("sourceId", "url"),
    "source-document": ("sourceId", "mediaType", "title"),
    "file": ("url", "mediaType"),
    "start-step": (),
    "finish-step": (),
    "message-metadata": ("messageMetadata",),
    "finish": (),
    "error": ("errorText",),
    "abort": (),
    "done": (),
}
"""The types of parts and the fields that each must have. `done` is the last chunk of pydantic-ai's adapter."""

_NOT_TEXT = frozenset({"input", "output", "data", "messageMetadata", "approved"})
"""Required fields that can be any JSON, also null. All others are text."""

PLAIN = "plain"
"""The id of the text part that plain strings form. It is fixed, because the chunk that opened it can be trimmed."""

_DELTAS = {"text-delta": "text", "reasoning-delta": "reasoning"}
_SILENT = frozenset({"start", "finish", "done"})


class NotAPart(Exception):
    """A chunk is neither text nor a part."""


@dataclass(frozen=True, slots=True)
class MessageState:
    """What the parts so far have opened and announced."""

    open: tuple[tuple[str, str], ...] = ()
    """The text and reasoning parts that have started and not ended: `text` or `reasoning`, and the id."""
    finish: bytes = b"{}"
    """The last `finish`, as JSON. It takes effect when the run completes."""
    is_whole: bool = True
    """Whether the first chunk of the stream was followed. Otherwise parts can be open that are not listed."""

    def closing(self) -> list[Part]:
        """The parts that end what is open."""
        return [{"type": f"{kind}-end", "id": id} for kind, id in self.open]

    def finish_fields(self) -> Part:
        """The last `finish`; empty if there was none."""
        fields: Part = decode(self.finish)
        return fields


BEGINNING = MessageState()
MIDDLE = MessageState(is_whole=False)


def follow(state: MessageState, chunk: Any, *, is_first: bool = False) -> tuple[MessageState, list[Part]]:
    """The state after a chunk, and the parts that it adds to the message. Raises `NotAPart`.

    Only the very first chunk of a stream, `is_first`, can be the `start` of the message.
    """
    if type(chunk) is dict and len(chunk) == 3 and _continues(state, chunk):  # nearly all chunks are such deltas
        return state, [chunk]
    if isinstance(chunk, str):
        return _follow_open(state, {"type": "text-delta", "id": PLAIN, "delta": chunk}, ("text", PLAIN), "delta")
    part = checked_part(chunk)
    name: str = part["type"]
    if name in _SILENT:
        if name == "finish":
            return replace(state, finish=encode_value(part)), []
        return state, [part] if name == "start" and is_first else []
    kind, _, step = name.partition("-")
    if kind in ("text", "reasoning"):
        return _follow_open(state, part, (kind, part["id"]), step)
    if name == "finish-step":  # versions 5 and 6 forget what is open
        return replace(state, open=()), [*state.closing(), part]
    return state, [part]


def _continues(state: MessageState, chunk: Part) -> bool:
    """Whether a chunk with three fields is a delta of a part that is open."""
    kind = _DELTAS.get(chunk["type"]) if type(chunk.get("type")) is str else None
    return kind is not None and type(chunk.get("delta")) is str and (kind, chunk.get("id")) in state.open


def _follow_open(state: MessageState, part: Part, which: tuple[str, str], step: str) -> tuple[MessageState, list[Part]]:
    is_open = which in state.open
    if step == "end":
        if not is_open and state.is_whole:
            return state, []
        return replace(state, open=tuple(one for one in state.open if one != which)), [part]
    if step == "delta" and is_open:
        return state, [part]
    if step == "start" and is_open:
        return state, []
    state = replace(state, open=(*state.open, which))
    if step == "delta" and state.is_whole:
        return state, [{"type": f"{which[0]}-start", "id": which[1]}, part]
    return state, [part]


def checked_part(chunk: Any) -> Part:
    """The chunk as a part, without fields that are null. Raises `NotAPart`."""
    if not isinstance(chunk, dict) or not isinstance(type := chunk.get("type"), str):
        raise NotAPart
    required = ("data",) if type.startswith("data-") else REQUIRED.get(type)
    if required is None:
        raise NotAPart
    for name in required:
        if name not in chunk or (name not in _NOT_TEXT and not isinstance(chunk[name], str)):
            raise NotAPart
    if None in chunk.values():
        return {name: value for name, value in chunk.items() if value is not None or name in required}
    return chunk
