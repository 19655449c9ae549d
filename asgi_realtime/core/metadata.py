"""The metadata of a run: operations as values, and the pure function that applies them.

Operations cross process boundaries, so they are tagged structs. Each checks its key when it is created. Applying them
copies the containers that change, once for all operations, and shares the rest; it never modifies the old metadata or
the values of an operation. Semantics: the metadata API of Trigger.dev (set, del, append, remove, increment, decrement,
replace). In all of these except del, a key like `$.steps.0.done` is a path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from asgi_realtime.core import json_paths
from asgi_realtime.core.chunks import decode, encode_named
from asgi_realtime.core.errors import LimitExceeded, UsageError, shown
from asgi_realtime.core.json_paths import Copies
from asgi_realtime.core.names import CONTROL_CHARACTERS
from asgi_realtime.core.nesting import check_depth

MAX_KEY_LENGTH = 128

MAX_COMPARISONS = 2_000_000
"""Values that the operations of one request can compare. Each `remove` compares its value with all items of a list."""

_MOST_PER_REMOVE = 128 * 1024
"""Values in the largest metadata that default limits allow, so one `remove` does not compare more."""

_NUMBER_BYTES = 32
"""More than a number takes, with the punctuation around it and its key."""

NO_METADATA = msgspec.Raw(b"{}")
"""The encoded metadata of a run that has none."""


def check_metadata_key(key: str) -> None:
    """Raise `UsageError` if this is not a valid metadata key."""
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
    """Remove a key, if it exists."""


class Append(_Placed, frozen=True, tag="append"):
    """Append to a list. A missing key becomes a list, and any other value the first item of one."""

    value: Any


class Remove(_Placed, frozen=True, tag="remove"):
    """Remove the items that equal the value from a list. Has no effect on anything else."""

    value: Any


class Increment(_Placed, frozen=True, tag="increment", rename={"by": "value"}):
    """Add to a number; a missing key counts from 0. A negative `by` decrements."""

    by: int | float

    def __post_init__(self) -> None:
        _Placed.__post_init__(self)
        if not is_number(self.by):
            raise UsageError(f"metadata {self.key!r} cannot change by {self.by!r}; allowed is a finite number")


class Replace(msgspec.Struct, frozen=True, tag="update"):
    """Replace the whole metadata."""

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
    """Apply the operations in order and return the new metadata.

    Incrementing a value that is not a number raises `UsageError`, and more than `MAX_COMPARISONS` raise
    `LimitExceeded`. With `strict=False` neither does, for operations that were accepted for other metadata: such an
    increment is skipped.
    """
    copies = Copies()
    result = copies.keep(dict(metadata))
    compared = 0
    for operation in operations:
        if strict and isinstance(operation, Remove):
            compared += _comparisons(result, operation)
            if compared > MAX_COMPARISONS:
                raise LimitExceeded(
                    f"the operations remove too much from long lists: they compare more than {MAX_COMPARISONS} values;"
                    " send them in several requests"
                )
        result = _apply(result, operation, strict, copies)
    return result


def _apply(result: dict[str, Any], operation: Operation, strict: bool, copies: Copies) -> dict[str, Any]:
    """Apply one operation to a dict that can be changed in place; its values can be shared."""
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
    """Replace the value of a key or path by `change(old)`; `old` is `MISSING` if there is none."""
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


def _comparisons(metadata: dict[str, Any], operation: Remove) -> int:
    """How many values an operation compares, at most."""
    key = operation.key
    steps = json_paths.parse(key) if json_paths.is_path(key) else (key,)
    items = functools.reduce(json_paths.child, steps, metadata)
    return min(len(items) * _size(operation.value), _MOST_PER_REMOVE) if isinstance(items, list) else 0


def _size(value: object) -> int:
    """The number of values in a value, including itself."""
    size, waiting = 0, [value]
    while waiting:
        found = waiting.pop()
        size += 1
        if isinstance(found, list):
            waiting += found
        elif isinstance(found, dict):
            waiting += found.values()
    return size


def _others(items: list[Any], value: object) -> list[Any]:
    """The items that do not equal a value.

    Lists can be long and operations many, so most items use Python's comparison. It is ten times as fast, and differs
    only in that `True == 1`.
    """
    try:
        if value not in items:
            return items
        if isinstance(value, bool):
            return [item for item in items if item is not value]
        if not isinstance(value, list | dict):
            return [item for item in items if item != value or item is True or item is False]
        return [item for item in items if item != value or not _equal(item, value)]
    except RecursionError:  # Python's comparison of deeply nested values
        return [item for item in items if not _equal(item, value)]


def _equal(one: object, other: object) -> bool:
    """Equality in JSON: `true` is not 1."""
    waiting = [(one, other)]  # values can be nested deeper than the recursion limit
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
    except OverflowError:  # an int is too large for a float
        return None
    return total if is_number(total) else None


def is_number(value: object) -> bool:
    """Whether the value is a finite number in JSON: `True` is not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def normalize_value(value: object, name: str = "metadata") -> Any:
    """Encode and decode a value: a copy, as subscribers will see it. An error starts with the name."""
    return decode(encode_named(value, name))


def encode_metadata(metadata: Mapping[str, Any]) -> msgspec.Raw:
    """The metadata as a record stores it."""
    return msgspec.Raw(encode_named(metadata, "metadata")) if metadata else NO_METADATA


def most_added(operation: Operation) -> int | None:
    """The most bytes that an operation adds to encoded metadata; None if it can add levels, or cannot be bounded."""
    match operation:
        case Delete() | Remove():
            return 0
        case Increment(key, by) if isinstance(by, float) or abs(by) < 1 << 63:
            return 6 * len(key) + _NUMBER_BYTES
    return None


def check_size(encoded: msgspec.Raw, limit_bytes: int) -> None:
    """Raise `LimitExceeded` if encoded metadata exceeds the limit, or is nested too deeply."""
    if len(encoded) > limit_bytes:
        raise LimitExceeded(f"metadata is {len(encoded)} bytes, limit {limit_bytes}")
    check_depth(bytes(encoded), what="metadata")
