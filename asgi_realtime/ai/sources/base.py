"""What the converters of all sources share: their interface, the reasons why an answer ends, and `SourceFailed`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from asgi_realtime.ai.emitter import Emitter

_REASONS = {
    "stop": "stop end_turn stop_sequence completed",
    "length": "length max_tokens max_output_tokens model_length model_context_window_exceeded",
    "content-filter": "content_filter content-filter refusal safety recitation blocklist prohibited_content spii "
    "language image_safety image_prohibited_content image_recitation",
    "tool-calls": "tool_calls tool-calls tool_call tool_use function_call",
    "error": "error failed malformed_function_call unexpected_tool_call no_image image_other",
}
_REASON_OF = {word: reason for reason, words in _REASONS.items() for word in words.split()}


def finish_reason(reason: Any) -> str | None:
    """The AI SDK's name of the reason why a model stopped, whichever API names it. None if there is none yet."""
    reason = getattr(reason, "value", reason)
    return _REASON_OF.get(reason.lower(), "other") if isinstance(reason, str) and reason else None


class Converter(ABC):
    """Turns the items of one kind of source into parts. `Parts` creates one for each kind that it meets."""

    def __init__(self, emit: Emitter) -> None:
        self.emit = emit

    @classmethod
    @abstractmethod
    def accepts(cls, item: Any) -> bool:
        """Whether this is an item of this kind of source."""

    @abstractmethod
    def convert(self, item: Any) -> None:
        """Emit the parts of an item."""

    def finish(self) -> None:  # noqa: B027
        """The source ended normally."""

    def stopped(self, reason: Any) -> None:
        """The model said why it stopped. The last reason is that of the whole message."""
        self.emit.finish_reason = finish_reason(reason) or self.emit.finish_reason
