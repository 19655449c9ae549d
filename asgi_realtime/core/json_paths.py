"""Metadata keys that are paths: `$.steps.0.done`. As in the metadata API of Trigger.dev.

Dots separate steps; a backslash escapes a dot. A step is the key of a dict or the index of a list. Patterns (`*`,
slices) are not supported. Every step except the last must exist; otherwise a change has no effect, as in the official
clients. A change copies the containers on its path, once, and shares the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from asgi_realtime.core.errors import UsageError, shown

PREFIX = "$."
MISSING: Any = object()
"""The old value where a path leads to nothing."""

_STEPS = re.compile(r"(?:[^.\\]|\\.)+")
_PATTERN = re.compile(r"\*|-?\d*:-?\d*|\[.*\]")
DANGEROUS = frozenset({"__proto__", "constructor", "prototype"})
"""Clients reject paths with these names, which would change the prototype of all JavaScript objects."""


_C = TypeVar("_C", dict[str, Any], list[Any])


class Copies:
    """The dicts and lists that were created here and can be changed in place. All others are copied first.

    Each of them is referenced from one place only, so a change has no effect elsewhere.
    """

    def __init__(self) -> None:
        self._ours: dict[int, object] = {}  # the reference keeps other objects from getting the same id

    def keep(self, value: _C) -> _C:
        """Register a new value as one that can be changed in place."""
        self._ours[id(value)] = value
        return value

    def of(self, value: _C) -> _C:
        """The value itself if it can be changed in place, else a copy that can."""
        return value if id(value) in self._ours else self.keep(value.copy())


def is_path(key: str) -> bool:
    """Whether a metadata key is a path."""
    return key.startswith(PREFIX)


def parse(key: str) -> tuple[str, ...]:
    """The steps of a path. Raises `UsageError` if it has none, or an unsupported one."""
    steps = tuple(re.sub(r"\\(.)", r"\1", step) for step in _STEPS.findall(key.removeprefix(PREFIX)))
    if not steps:
        raise UsageError(f"metadata key {shown(key)} is a path without a step; write it like '$.progress.done'")
    for step in steps:
        if _PATTERN.fullmatch(step) or step in DANGEROUS:
            raise UsageError(f"metadata key {shown(key)} has the step {step!r}; allowed are keys and list indexes")
    return steps


def changed(value: Any, steps: tuple[str, ...], change: Callable[[Any], Any], copies: Copies) -> Any:
    """Replace the value at a path by `change(old)`; `old` is `MISSING` if there is none.

    Returns the changed value, which is `value` itself if the path does not exist.
    """
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
