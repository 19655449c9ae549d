"""Responses of google-genai's `generate_content_stream`.

Calls of functions often have no id. They come whole, or their arguments come in pieces, each with a JSON path. If the
client itself calls the functions, it streams the calls but not their results: it attaches the whole history to the next
response. Of that history only the results of the last round are read. The API says STOP for an answer that ends with
calls.
"""

from __future__ import annotations

import re
from typing import Any

from asgi_realtime.ai.emitter import HOSTED, Emitter
from asgi_realtime.ai.plain import data_url, get, text_of
from asgi_realtime.ai.sources.base import Converter

_CODE = "code_execution"
_STEP = re.compile(r"\[(\d+)\]|\['([^']*)'\]|\.([^.\[]+)")
"""A step of a JSON path: an index, a quoted name, or a name."""


class GenAI(Converter):
    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._pending: list[tuple[str, str]] = []
        """Name and id of the calls without a result, in order."""
        self._history = 0
        """The length of the history that was read."""
        self._args: dict[str, Any] = {}
        """The arguments of the last call so far."""
        self._code_call = ""

    @classmethod
    def accepts(cls, item: Any) -> bool:
        return hasattr(item, "candidates") and hasattr(item, "prompt_feedback")

    def convert(self, item: Any) -> None:
        history = get(item, "automatic_function_calling_history")
        if history and len(history) > self._history:
            self._history = len(history)
            self._results(history[-1])
        for candidate in get(item, "candidates") or ():
            if not get(candidate, "index"):
                self._candidate(candidate)
        if get(get(item, "prompt_feedback"), "block_reason"):
            self.stopped("safety")

    def finish(self) -> None:
        if self._pending and self.emit.finish_reason == "stop":
            self.stopped("tool_calls")

    def _candidate(self, candidate: Any) -> None:
        for part in get(get(candidate, "content"), "parts") or ():
            self._part(part)
        for chunk in get(get(candidate, "grounding_metadata"), "grounding_chunks") or ():
            self._grounding(chunk)
        for citation in get(get(candidate, "citation_metadata"), "citations") or ():
            self.emit.source(get(citation, "uri"), get(citation, "title"))
        self.stopped(get(candidate, "finish_reason"))

    def _part(self, part: Any) -> None:
        emit = self.emit
        if text := get(part, "text"):
            (emit.reasoning if get(part, "thought") else emit.text)(text)
        elif call := get(part, "function_call"):
            self._call(call)
        elif blob := get(part, "inline_data"):
            media_type = get(blob, "mime_type")
            emit.file(data_url(media_type, get(blob, "data")), media_type)
        elif file := get(part, "file_data"):
            emit.file(get(file, "file_uri"), get(file, "mime_type"))
        elif code := get(part, "executable_code"):
            self._code_call = emit.new_id()
            emit.tool_input(self._code_call, _CODE, {"code": get(code, "code")}, extra=HOSTED)
        elif result := get(part, "code_execution_result"):
            output = {"outcome": text_of(result, "outcome"), "output": get(result, "output")}
            emit.tool_output(self._code_call, output)

    def _call(self, call: Any) -> None:
        """A call, or a piece of one: the first has the name, and the last does not continue."""
        if name := text_of(call, "name"):
            id = get(call, "id") or self.emit.new_id()
            self._pending.append((name, id))
            self._args = dict(get(call, "args") or {})
            if get(call, "will_continue"):
                self.emit.tool_start(id, name)
        for piece in get(call, "partial_args") or ():
            _add_piece(self._args, piece)
        if self._pending and not get(call, "will_continue"):
            name, id = self._pending[-1]
            self.emit.tool_input(id, name, self._args)

    def _results(self, content: Any) -> None:
        for part in get(content, "parts") or ():
            result = get(part, "function_response")
            call = next((one for one in self._pending if one[0] == text_of(result, "name")), None)
            if call is None:
                continue
            self._pending.remove(call)
            response = get(result, "response")
            if isinstance(response, dict) and response.keys() == {"error"}:
                self.emit.tool_output_error(call[1])
            elif isinstance(response, dict) and response.keys() == {"result"}:
                self.emit.tool_output(call[1], response["result"])
            else:
                self.emit.tool_output(call[1], response)

    def _grounding(self, chunk: Any) -> None:
        if page := get(chunk, "web") or get(chunk, "maps"):
            self.emit.source(get(page, "uri"), get(page, "title"))
        elif document := get(chunk, "retrieved_context"):
            uri = text_of(document, "uri")
            if uri.startswith(("http://", "https://")):
                self.emit.source(uri, get(document, "title"))
            else:
                self.emit.document(get(document, "title"))


def _add_piece(args: dict[str, Any], piece: Any) -> None:
    """Put a piece of an argument in its place. Pieces of a text are joined."""
    steps = [
        int(index) if index else quoted or name for index, quoted, name in _STEP.findall(text_of(piece, "json_path"))
    ]
    values = (get(piece, name) for name in ("string_value", "number_value", "bool_value"))
    value = next((value for value in values if value is not None), None)
    place: Any = args
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(step, int):
            place.extend([None] * (step + 1 - len(place)))
            before = place[step]
        else:
            before = place.get(step)
        if following is not None:
            place[step] = before if before is not None else [] if isinstance(following, int) else {}
        else:
            place[step] = before + value if isinstance(before, str) and isinstance(value, str) else value
        place = place[step]
