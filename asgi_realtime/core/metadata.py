"""The metadata of a run: operations as values, and the pure function that applies them.

Operations cross processes, so they are tagged structs; their keys are checked when they are made. Applying copies what
it changes, once for all operations, and shares the rest: neither the old metadata nor a value inside it is changed, nor
one of an operation. Semantics: those of the metadata API of Trigger.dev (set, del, append, remove, increment,
decrement, replace), also that a key like `$.steps.0.done` names a place inside, for all of these but del.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from asgi_realtime.core import json_paths
from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.errors import LimitExceeded, UsageError, shown
from asgi_realtime.core.json_paths import Copies
from asgi_realtime.core.names import CONTROL_CHARACTERS

MAX_KEY_LENGTH = 128


def check_metadata_key(key: str) -> None:
    """Raise `UsageError` if this cannot be a metadata key."""
    if not isinstance(key, str):
        raise UsageError(f"metadata key is a {type(key).__name__}; allowed is a str")
    if not 0 < len(key) <= MAX_KEY_LENGTH:
        raise UsageError(f"metadata key is {len(key)} characters; allowed are 1 to {MAX_KEY_LENGTH}")
    if CONTROL_CHARACTERS.search(key):
        raise UsageError(f"metadata key {key!r} has control characters")


class _Keyed(msgspec.Struct, frozen=True):
    key: str

    def __post_init__(self) -> None:
        check_metadata_key(self.key)


class _Placed(_Keyed, frozen=True):
    def __post_init__(self) -> None:
        check_metadata_key(self.key)
        if json_paths.is_path(self.key):
            json_paths.parse(self.key)


class Set(_Placed, frozen=True, tag="set"):
    """Set a key."""

    value: Any


class Delete(_Keyed, frozen=True, tag="delete"):
    """Remove a key, if it is there."""


class Append(_Placed, frozen=True, tag="append"):
    """Add a value to the end of a list. A missing key becomes a list, another value the first of one."""

    value: Any


class Remove(_Placed, frozen=True, tag="remove"):
    """Take the elements that equal the value out of a list. Anything else stays as it is."""

    value: Any


class Increment(_Placed, frozen=True, tag="increment", rename={"by": "value"}):
    """Add to a number; a missing key counts from 0. A negative `by` decrements."""

    by: int | float

    def __post_init__(self) -> None:
        _Placed.__post_init__(self)
        if not is_number(self.by):
            raise UsageError(f"metadata {self.key!r} cannot change by {self.by!r}; allowed is a finite number")


class Replace(msgspec.Struct, frozen=True, tag="update"):
    """Put other metadata in the place of all that there is."""

    value: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            raise UsageError(f"metadata is a {type(self.value).__name__}; allowed is a dict")
        for key in self.value:
            check_metadata_key(key)


Operation = Set | Delete | Append | Remove | Increment | Replace


def apply_operations(
    metadata: Mapping[str, Any], operations: Iterable[Operation], *, strict: bool = True
) -> dict[str, Any]:
    """Return the metadata after the operations, in their order.

    An increment of what is no number raises `UsageError`; with `strict=False` it is skipped, for operations that were
    accepted against other metadata.
    """
    copies = Copies()
    result = copies.keep(dict(metadata))
    for operation in operations:
        result = _apply(result, operation, strict, copies)
    return result


def _apply(result: dict[str, Any], operation: Operation, strict: bool, copies: Copies) -> dict[str, Any]:
    """Apply one operation to a dict that is ours; its values need not be."""
    match operation:
        case Set(key, value):
            return _at(result, key, lambda _: value, copies)
        case Delete(key):
            result.pop(key, None)
        case Append(key, value):
            return _at(result, key, lambda old: _appended(old, value, copies), copies)
        case Remove(key, value):
            return _at(result, key, lambda old: _without(old, value, copies), copies)
        case Replace(value):
            return copies.keep(dict(value))
        case _:
            return _at(result, operation.key, lambda old: _incremented(old, operation, strict), copies)
    return result


def _at(result: dict[str, Any], key: str, change: Callable[[Any], Any], copies: Copies) -> dict[str, Any]:
    """Put `change` of what a key names, or of `MISSING`, in its place."""
    if json_paths.is_path(key):
        following: dict[str, Any] = json_paths.changed(result, json_paths.parse(key), change, copies)
        return following
    old = result.get(key, json_paths.MISSING)
    new = change(old)
    if new is not old:
        result[key] = new
    return result


def _appended(old: Any, value: object, copies: Copies) -> list[Any]:
    if old is json_paths.MISSING:
        return copies.keep([value])
    if not isinstance(old, list):
        return copies.keep([old, value])
    items = copies.of(old)
    items.append(value)
    return items


def _without(old: Any, value: object, copies: Copies) -> Any:
    if not isinstance(old, list):
        return old
    left = _others(old, value)
    if len(left) == len(old):
        return old
    items = copies.of(old)
    items[:] = left
    return items


def _others(items: list[Any], value: object) -> list[Any]:
    """The elements that do not equal a value. Lists may be long, and operations many, so most elements are compared as
    Python does, which is ten times as fast, and differs only in taking `true` for 1."""
    try:
        if value not in items:
            return items
        if isinstance(value, bool):
            return [item for item in items if item is not value]
        if not isinstance(value, list | dict):
            return [item for item in items if item != value or item is True or item is False]
        return [item for item in items if item != value or not _equal(item, value)]
    except RecursionError:  # Python's comparison of values that are deep
        return [item for item in items if not _equal(item, value)]


def _equal(one: object, other: object) -> bool:
    """Equality as JSON has it: `true` is not 1."""
    waiting = [(one, other)]  # and no recursion, since values may be deeper than that can be
    while waiting:
        one, other = waiting.pop()
        if isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            waiting += zip(one, other, strict=True)
        elif isinstance(one, dict) and isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            waiting += ((one[key], other[key]) for key in one)
        elif isinstance(one, bool) or isinstance(other, bool):
            if one is not other:
                return False
        elif one != other:
            return False
    return True


def _incremented(old: Any, operation: Increment, strict: bool) -> Any:
    total = _sum(0 if old is json_paths.MISSING else old, operation.by)
    if total is not None:
        return total
    if strict:
        raise UsageError(
            f"metadata {operation.key!r} is {shown(old)} and cannot change by {operation.by!r};"
            " allowed are finite numbers"
        )
    return old


def _sum(old: Any, by: int | float) -> int | float | None:
    if not is_number(old):
        return None
    try:
        total = old + by
    except OverflowError:  # an int beyond the range of floats
        return None
    return total if is_number(total) else None


def is_number(value: object) -> bool:
    """Whether the value is a finite number as JSON has it: `True` is not 1."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def normalize_value(value: object) -> Any:
    """Take a value through JSON once: what is read back is what subscribers see, and nobody else holds it."""
    return decode(encode_value(value))


def check_size(metadata: Mapping[str, Any], limit_bytes: int) -> None:
    """Raise `LimitExceeded` if the encoded metadata is over the limit."""
    size = len(encode_value(metadata))
    if size > limit_bytes:
        raise LimitExceeded(f"metadata is {size} bytes, limit {limit_bytes}")
