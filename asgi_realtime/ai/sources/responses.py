"""Events of OpenAI's Responses API, raw or from the helper `client.responses.stream()`, which adds snapshots to them.

The response that an answer begins and ends with repeats the request: instructions, tools, headers of tools. Nothing is
read from it except why it ended. Tools that the API itself executes become calls with `providerExecuted`. Of the files
that a search finds, only the names are sent, because their text belongs to the model's input.
"""

from __future__ import annotations

from typing import Any

from asgi_realtime.ai.emitter import HOSTED, Emitter
from asgi_realtime.ai.plain import data_url, get, text_of
from asgi_realtime.ai.sources.base import Converter
from asgi_realtime.core.errors import SourceFailed

_ARGUMENTS = "response.function_call_arguments.delta"
_MCP_ARGUMENTS = "response.mcp_call_arguments.delta"
_TEXT_ENDS = frozenset(
    {
        "response.content_part.done",
        "response.reasoning_summary_part.done",
        "response.reasoning_text.done",
    }
)
_HOSTED = frozenset({"web_search_call", "file_search_call", "code_interpreter_call"})


class Responses(Converter):
    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._calls: dict[str, str] = {}
        """The ids of calls by those of their items."""
        self._refused = False
        self._has_calls = False

    @classmethod
    def accepts(cls, item: Any) -> bool:
        kind = text_of(item, "type")
        return kind.startswith("response.") or (kind == "error" and bool(text_of(item, "message")))

    def convert(self, item: Any) -> None:
        kind, emit = text_of(item, "type"), self.emit
        if kind == "response.output_text.delta":
            emit.text(get(item, "delta"))
        elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
            emit.reasoning(get(item, "delta"))
        elif kind == "response.refusal.delta":
            self._refused = True
            emit.text(get(item, "delta"))
        elif kind in _TEXT_ENDS:
            emit.end()
        elif kind in (_ARGUMENTS, _MCP_ARGUMENTS):
            emit.tool_delta(self._calls.get(get(item, "item_id"), ""), get(item, "delta"))
        elif kind == "response.output_text.annotation.added":
            self._annotation(get(item, "annotation"))
        elif kind == "response.output_item.added":
            self._item_added(get(item, "item"))
        elif kind == "response.output_item.done":
            self._item_done(get(item, "item"))
        elif kind in ("response.completed", "response.incomplete"):
            self._completed(get(item, "response"))
        elif kind == "response.failed":
            raise SourceFailed(_failure(get(get(item, "response"), "error")))
        elif kind == "error":
            raise SourceFailed(_failure(item))

    def _completed(self, response: Any) -> None:
        reason = get(get(response, "incomplete_details"), "reason") or "stop"
        if self._refused:
            reason = "refusal"
        elif self._has_calls and reason == "stop":
            reason = "tool_calls"
        self.stopped(reason)
        self._has_calls = self._refused = False

    def _annotation(self, annotation: Any) -> None:
        if text_of(annotation, "type") == "url_citation":
            self.emit.source(get(annotation, "url"), get(annotation, "title"))
        elif filename := text_of(annotation, "filename"):
            self.emit.document(filename, filename=filename)

    # Items: messages, reasoning, and calls of tools

    def _item_added(self, item: Any) -> None:
        kind = text_of(item, "type")
        self.emit.end()
        if kind == "function_call":
            self._calls[get(item, "id")] = call = get(item, "call_id")
            self.emit.tool_start(call, get(item, "name"))
        elif kind == "mcp_call":
            self._calls[get(item, "id")] = call = get(item, "id")
            self.emit.tool_start(call, get(item, "name"), extra=HOSTED)
        elif kind in _HOSTED:
            self.emit.tool_start(get(item, "id"), kind.removesuffix("_call"), extra=HOSTED)

    def _item_done(self, item: Any) -> None:
        kind = text_of(item, "type")
        self.emit.end()
        if kind == "function_call":
            self._has_calls = True
            self.emit.tool_input_text(get(item, "call_id"), get(item, "name"), text_of(item, "arguments"))
        elif kind == "custom_tool_call":
            self._has_calls = True
            self.emit.tool_input(get(item, "call_id"), get(item, "name"), get(item, "input"))
        elif kind == "mcp_call":
            self._mcp_call(item)
        elif kind == "image_generation_call":
            self._image(item)
        elif kind in _HOSTED:
            call = get(item, "id")
            input, output = _hosted_call(kind, item)
            self.emit.tool_input(call, kind.removesuffix("_call"), input, extra=HOSTED)
            self.emit.tool_output(call, output)

    def _mcp_call(self, item: Any) -> None:
        call, name = get(item, "id"), get(item, "name")
        self.emit.tool_input_text(call, name, text_of(item, "arguments"), extra=HOSTED)
        if get(item, "error"):
            self.emit.tool_output_error(call)
        else:
            self.emit.tool_output(call, get(item, "output"))

    def _image(self, item: Any) -> None:
        if image := get(item, "result"):
            media_type = f"image/{text_of(item, 'output_format') or 'png'}"
            self.emit.file(data_url(media_type, image), media_type)


def _hosted_call(kind: str, item: Any) -> tuple[Any, Any]:
    """Input and output of a call of a tool that OpenAI executes."""
    output: dict[str, Any] = {"status": text_of(item, "status")}
    if kind == "web_search_call":
        return get(item, "action") or {}, output
    if kind == "file_search_call":
        output["filenames"] = [text_of(found, "filename") for found in get(item, "results") or ()]
        return {"queries": get(item, "queries")}, output
    output["outputs"] = get(item, "outputs") or []
    return {"code": get(item, "code")}, output


def _failure(error: Any) -> str:
    return (
        f"the model's stream failed: {text_of(error, 'code') or 'no code'}: {text_of(error, 'message') or 'no message'}"
    )
