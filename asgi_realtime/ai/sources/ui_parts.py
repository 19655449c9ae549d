"""Message parts themselves: dicts that the host yields, and the chunks of pydantic-ai's `VercelAIAdapter.run_stream()`.

They pass through the emitter like those of any other source, so their order is corrected and their ids are shortened.
Fields that not every version of the AI SDK accepts are omitted. Requests for approval pass, although version 5 rejects
them: they exist only if the host asks for a newer version.
"""

from __future__ import annotations

from typing import Any

from asgi_realtime.ai.emitter import FINISH_REASONS, TOOL_FAILED
from asgi_realtime.ai.message_parts import REQUIRED, Part
from asgi_realtime.ai.plain import text_of
from asgi_realtime.ai.sources.base import Converter
from asgi_realtime.core.errors import InvalidSource, SourceFailed

_PASSED = {
    "source-url": ("sourceId", "url", "title"),
    "source-document": ("sourceId", "mediaType", "title", "filename"),
    "file": ("url", "mediaType"),
    "message-metadata": ("messageMetadata",),
    "error": ("errorText",),
    "abort": ("reason",),
    "tool-approval-request": ("toolCallId", "approvalId"),
    "tool-approval-response": ("approvalId", "approved"),
}
"""Parts without a state, and their fields."""
_KEPT = ("providerExecuted", "providerMetadata")


class UiParts(Converter):
    @classmethod
    def accepts(cls, item: Any) -> bool:
        kind = text_of(item, "type")
        if kind not in REQUIRED and not kind.startswith("data-"):
            return False
        if isinstance(item, dict):
            return kind != "error" or "errorText" in item
        return hasattr(item, "encode") and hasattr(item, "model_dump")

    def convert(self, item: Any) -> None:
        part: Part = item if isinstance(item, dict) else item.model_dump(by_alias=True, mode="json")
        kind = part["type"]
        missing = [name for name in REQUIRED.get(kind, ("data",)) if name not in part]
        if missing:
            raise InvalidSource(f"a part of the type {kind!r} has no {' and no '.join(missing)}")
        if not isinstance(item, dict) and "errorText" in part:  # the text of an exception, which the host has not seen
            if kind == "error":
                raise SourceFailed(part["errorText"])
            part["errorText"] = TOOL_FAILED
        if kind in _PASSED:
            self.emit.other({"type": kind} | {name: part[name] for name in _PASSED[kind] if part.get(name) is not None})
        elif kind.startswith(("text-", "reasoning-")):
            self._block(kind, part)
        elif kind.startswith("tool-"):
            self._tool(kind, part)
        elif kind.startswith("data-"):
            fields = {name: part[name] for name in ("id", "transient") if part.get(name) is not None}
            self.emit.data(kind.removeprefix("data-"), part["data"], **fields)
        else:
            self._control(kind, part)

    def _block(self, kind: str, part: Part) -> None:
        track, emit = part["id"], self.emit
        if kind == "text-delta":
            emit.text(part["delta"], track)
        elif kind == "reasoning-delta":
            emit.reasoning(part["delta"], track)
        elif kind == "text-start":
            emit.begin("text", track, **_kept(part))
        elif kind == "reasoning-start":
            emit.begin("reasoning", track, **_kept(part))
        else:
            emit.end(track, **_kept(part))

    def _tool(self, kind: str, part: Part) -> None:
        call, emit = part["toolCallId"], self.emit
        if kind == "tool-input-start":
            emit.tool_start(call, part["toolName"], extra=_kept(part))
        elif kind == "tool-input-delta":
            emit.tool_delta(call, part["inputTextDelta"])
        elif kind == "tool-input-available":
            emit.tool_input(call, part["toolName"], part["input"], extra=_kept(part))
        elif kind == "tool-input-error":
            emit.tool_input_error(call, part["toolName"], part["input"], part["errorText"])
        elif not emit.knows_tool(call):  # another source of the run has made the call
            names = (*REQUIRED[kind], "preliminary")
            emit.other({"type": kind} | {name: part[name] for name in names if name in part})
        elif kind == "tool-output-available":
            emit.tool_output(call, part["output"], preliminary=bool(part.get("preliminary")))
        elif kind == "tool-output-error":
            emit.tool_output_error(call, part["errorText"])
        else:
            emit.tool_output_denied(call)

    def _control(self, kind: str, part: Part) -> None:
        emit, metadata = self.emit, part.get("messageMetadata")
        if kind == "start-step":
            emit.start_step()
        elif kind == "finish-step":
            emit.finish_step()
        elif kind == "finish":
            reason = part.get("finishReason")
            emit.finish_reason = reason if reason in FINISH_REASONS else emit.finish_reason or "stop"
            emit.finish_metadata = metadata
        elif kind == "start":
            if not emit.started and part.get("messageId"):
                emit.start(part["messageId"], metadata)
            elif metadata is not None:
                emit.other({"type": "message-metadata", "messageMetadata": metadata})


def _kept(part: Part) -> Part:
    return {name: part[name] for name in _KEPT if part.get(name) is not None}
