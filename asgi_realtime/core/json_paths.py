"""Metadata keys that name a place inside: `$.steps.0.done`. As in the metadata API of Trigger.dev.

A dot separates steps, and a backslash before it makes it part of a name. A step is the key of a dict or the index of a
list. Patterns (`*`, slices) are not known here. What a path leads through has to be there: a change of what lies beyond
changes nothing, as with the official clients. Changing copies what it goes through, once, and shares the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from asgi_realtime.core.errors import UsageError, shown

PREFIX = "$."
MISSING: Any = object()
"""What stands at a place where nothing is."""

_STEPS = re.compile(r"(?:[^.\\]|\\.)+")
_PATTERN = re.compile(r"\*|-?\d*:-?\d*|\[.*\]")
DANGEROUS = frozenset({"__proto__", "constructor", "prototype"})
"""Clients refuse paths with these: on their side they would change the prototype of all objects."""


_C = TypeVar("_C", dict[str, Any], list[Any])


class Copies:
    """The dicts and lists that are ours to change: whatever else is changed is copied first.

    Each stands at one place only, so changing it there changes nothing elsewhere.
    """

    def __init__(self) -> None:
        self._ours: dict[int, object] = {}  # held, so that no other object gets the id of one

    def keep(self, value: _C) -> _C:
        """Make a value ours that was made just now."""
        self._ours[id(value)] = value
        return value

    def of(self, value: _C) -> _C:
        """The value itself if it is ours, else a copy that is."""
        return value if id(value) in self._ours else self.keep(value.copy())


def is_path(key: str) -> bool:
    """Whether a metadata key is a path and not a plain key."""
    return key.startswith(PREFIX)


def parse(key: str) -> tuple[str, ...]:
    """The steps of a path. Raises `UsageError` if it has none, or one that is not known here."""
    steps = tuple(re.sub(r"\\(.)", r"\1", step) for step in _STEPS.findall(key.removeprefix(PREFIX)))
    if not steps:
        raise UsageError(f"metadata key {shown(key)} is a path without a step; write it like '$.progress.done'")
    for step in steps:
        if _PATTERN.fullmatch(step) or step in DANGEROUS:
            raise UsageError(f"metadata key {shown(key)} has the step {step!r}; allowed are keys and indexes of lists")
    return steps


def changed(value: Any, steps: tuple[str, ...], change: Callable[[Any], Any], copies: Copies) -> Any:
    """The value with `change` of what stands at a place, or of `MISSING`; the value itself if the way is not there."""
    step, *rest = steps
    old = child(value, step)
    following = changed(old, tuple(rest), change, copies) if rest else change(old)
    if following is old:
        return value
    if isinstance(value, dict):
        value = copies.of(value)
        value[step] = following
    elif isinstance(value, list) and _is_index(step) and int(step) <= len(value):
        value = copies.of(value)
        value[int(step) : int(step) + 1] = [following]
    return value


def child(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value.get(step, MISSING)
    if isinstance(value, list) and _is_index(step) and int(step) < len(value):
        return value[int(step)]
    return MISSING


def _is_index(step: str) -> bool:
    return step.isascii() and step.isdigit() and len(step) < 10 and str(int(step)) == step
