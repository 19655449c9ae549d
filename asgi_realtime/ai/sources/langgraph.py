"""The output of a LangGraph graph: `astream` in the modes `messages`, `updates` and `custom`, alone or several at once.

With one mode, items are what the mode yields: pairs of a message and its metadata, or updates by node. With several
they are tuples of mode and item, with subgraphs also of the namespace; in version 2 they are dicts. Other modes yield
states and are ignored. What the host writes with the stream writer is data, or a part if it has the form of one.

An update can contain a whole history, which a node has loaded or trimmed. So only the messages after the last one that
is not of the assistant or of a tool are new.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from asgi_realtime.ai.emitter import Emitter
from asgi_realtime.ai.plain import get, text_of
from asgi_realtime.ai.sources.langchain import Messages, is_from_assistant, is_from_tool, is_message
from asgi_realtime.ai.sources.ui_parts import UiParts
from asgi_realtime.core.errors import InvalidSource

_MODES = frozenset({"values", "updates", "messages", "custom", "checkpoints", "tasks", "debug"})
_INTERRUPT = "__interrupt__"


class Graph(Messages):
    has_steps = True

    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit)
        self._parts = UiParts(emit)
        self._has_messages = False

    @classmethod
    def accepts(cls, item: Any) -> bool:
        if isinstance(item, dict):
            return item.keys() == {"type", "ns", "data"} or is_update(item)
        return isinstance(item, tuple) and _unpacked(item) is not None

    def convert(self, item: Any) -> None:
        mode, payload = cast(tuple[str, Any], _unpacked(item))
        if mode == "messages":
            self._has_messages = True
            super().convert(payload[0])
        elif mode == "updates":
            self._update(payload)
        elif mode == "custom":
            self._custom(payload)

    def finish(self) -> None:
        super().finish()
        if not self._has_messages and not self.emit.started:
            raise InvalidSource(
                "the updates of the graph contain no messages; parts() converts the stream modes 'messages', 'updates'"
                " (of a state with messages) and 'custom'"
            )

    def _update(self, update: dict[str, Any]) -> None:
        for node, change in update.items():
            if node == _INTERRUPT:
                for interrupt in change:
                    self.emit.data("interrupt", get(interrupt, "value"), id=text_of(interrupt, "id"))
                continue
            for message in _new_messages(change):
                self._has_messages = True
                self.whole(message)

    def _custom(self, payload: Any) -> None:
        if isinstance(payload, dict) and UiParts.accepts(payload):
            self._parts.convert(payload)
        else:
            self.emit.data("custom", payload)


def _unpacked(item: Any) -> tuple[str, Any] | None:
    """The mode of an item, and what the mode yields."""
    if isinstance(item, dict):
        return ("updates", item) if is_update(item) else (item["type"], item["data"])
    if len(item) == 3 or (len(item) == 2 and _is_namespace(item[0])):
        if not _is_namespace(item[0]):
            return None
        item = item[1:] if len(item) == 3 else item[1]
    if is_update(item):
        return "updates", item
    if not isinstance(item, tuple) or len(item) != 2:
        return None
    if is_message(item[0]) and isinstance(item[1], dict):
        return "messages", item
    return item if isinstance(item[0], str) and item[0] in _MODES else None


def _is_namespace(item: Any) -> bool:
    return isinstance(item, tuple) and all(isinstance(name, str) for name in item)


def is_update(item: Any) -> bool:
    """Whether this is a dict of what nodes have returned: a change of the state, several, or nothing."""
    if not isinstance(item, dict) or not item or "type" in item:
        return False
    return all(node == _INTERRUPT or _is_change(change) for node, change in item.items())


def _is_change(change: Any) -> bool:
    if isinstance(change, list):
        return all(isinstance(one, dict) for one in change)
    return change is None or isinstance(change, dict)


def _new_messages(change: Any) -> Iterator[Any]:
    for state in change if isinstance(change, list) else [change or {}]:
        for value in state.values():
            start, messages = 0, [one for one in (value if isinstance(value, list) else [value]) if is_message(one)]
            for index, message in enumerate(messages):
                if not (is_from_assistant(message) or is_from_tool(message)):
                    start = index + 1
            yield from messages[start:]
