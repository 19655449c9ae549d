"""Plain strings: each is a piece of the text."""

from __future__ import annotations

from typing import Any

from asgi_realtime.ai.sources.base import Converter


class Strings(Converter):
    @classmethod
    def accepts(cls, item: Any) -> bool:
        return isinstance(item, str)

    def convert(self, item: Any) -> None:
        self.emit.text(item)

    def finish(self) -> None:
        self.stopped("stop" if self.emit.finish_reason is None else None)
