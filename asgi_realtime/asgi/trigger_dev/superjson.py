"""superjson, the format in which the official clients send payloads: JSON plus the JavaScript types of its values.

`{"json": …, "meta": {"values": …}}`: the tree in `values` annotates values by their path, for example that a string is
a Date or a list is a Set. Tasks receive the plain JSON. The annotations are stored for official clients, which restore
the types when they read the payload.

Those clients throw when an annotation does not fit its value, and a run feed ends with the exception. A user who can
trigger a task could therefore end the feeds of others. So this module checks every annotation against its value,
rejects payloads with one that does not fit, and drops annotations that it cannot check; readers then get the plain
value.

Format: superjson 2.2. Some of its versions do not escape dots in the key of an annotated value, so that the annotation
leads nowhere or to another value.

Every step takes linear time in the length of the text: paths are nodes of a tree that each annotation extends, and are
never copied. The length is limited, because the constant factor is large.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Self

import msgspec

from asgi_realtime.core.chunks import decode, decode_as, encode_value, json_line
from asgi_realtime.core.errors import LimitExceeded, UsageError, shown
from asgi_realtime.core.json_paths import DANGEROUS, MISSING, child
from asgi_realtime.core.metadata import is_number
from asgi_realtime.core.nesting import check_shape

MAX_BYTES = 256 * 1024
"""Limit of a superjson text. It is twice what the official clients send; they upload larger payloads elsewhere."""

MAX_DIGITS = 4096
"""Limit of one BigInt: parsing takes quadratic time."""

_TYPED_ARRAYS = frozenset(
    {"Int8Array", "Uint8Array", "Uint8ClampedArray", "Int16Array", "Uint16Array", "Int32Array", "Uint32Array"}
    | {"Float32Array", "Float64Array"}
)
_NUMBERS = frozenset({"NaN", "Infinity", "-Infinity", "-0"})
_ERROR = frozenset({"name", "message"})
_CONTAINERS = (dict, list)
_BIG = re.compile(rf"-?[0-9]{{1,{MAX_DIGITS}}}")
_PARTS = re.compile(r"\\\.|\.|[^.\\]+|\\")
_URL = re.compile(
    r"(?:https?|wss?|ftp)://(?:(?!xn--)[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?\.)*"
    r"(?!xn--)[A-Za-z](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?::[0-9]{1,4})?(?:[/?#][\x21-\x7e]*)?",
    re.IGNORECASE,
)
"""A subset of the URLs that every reader can parse. The rules for host names are too long to check all of them."""


class _Superjson(msgspec.Struct):
    json: msgspec.Raw = msgspec.Raw(b"")
    meta: msgspec.Raw = msgspec.Raw(b"")


class Parsed(NamedTuple):
    """A payload as plain JSON, and the `meta` with its annotations, if it has any."""

    json: bytes
    meta: bytes | None


def parse(text: bytes) -> Parsed:
    """Split superjson into its parts.

    Raises `UsageError` if it is malformed or an annotation does not fit, and `LimitExceeded` (413 if it is too long).
    """
    if len(text) > MAX_BYTES:
        raise LimitExceeded(f"superjson is {len(text)} bytes, limit {MAX_BYTES}; send plain JSON", status=413)
    try:
        parts = decode_as(text, _Superjson)
    except msgspec.ValidationError as exc:
        raise UsageError(f'not superjson: {exc}; it must be an object with "json" and optionally "meta"') from exc
    json = json_line(bytes(parts.json)) if parts.json else b""
    if not json:
        raise UsageError('not superjson: "json" is missing')
    values = _values(bytes(parts.meta))
    kept = _Annotations(decode(json)).checked(values) if values else None
    return Parsed(json, encode_value({"values": kept}) if kept else None)


def _values(meta: bytes) -> Any:
    """The annotation tree. Reference equalities are ignored, so readers get equal copies."""
    check_shape(meta, what="superjson's meta")
    found = decode(meta) if meta else None
    if found is None:
        return None
    if not isinstance(found, dict):
        raise UsageError("superjson's meta is not an object")
    return found.get("values")


class _Place:
    """A path in the annotated value: its last segment, and the place of the rest."""

    __slots__ = ("above", "inner", "outer", "segment")

    def __init__(self, segment: str = "", outer: Self | None = None) -> None:
        self.segment = segment
        self.outer = outer
        self.inner: dict[str, Self] = {}
        self.above: int | None = None
        """The number of annotations above its own in the tree; None without an annotation."""

    def at(self, segments: list[str]) -> _Place:
        place: _Place = self
        for segment in segments:
            following = place.inner.get(segment)
            if following is None:
                following = place.inner[segment] = _Place(segment, place)
            place = following
        return place

    def __str__(self) -> str:
        segments: list[str] = []
        place = self
        while place.outer is not None:
            segments.append(place.segment)
            place = place.outer
        return shown(".".join(reversed(segments))) if segments else "the payload"


class _Annotations:
    """Checks a tree of annotations while walking it and the annotated value in parallel."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._root = _Place()
        self._ambiguous = _ambiguous_places(value)

    def checked(self, tree: Any) -> Any:
        """The tree without dropped annotations; None if none remain.

        An annotation within an annotated value must be nested in the tree too: a reader restores types from the inside
        out, and otherwise could meet a container that it has already converted.
        """
        kept = self._tree(tree, self._value, self._root, 0)
        waiting = [(self._root, 0)]
        while waiting:
            place, outside = waiting.pop()
            if place.above is not None:
                if place.above != outside:
                    raise UsageError(f"superjson annotates {place} within a value that it annotates elsewhere")
                outside += 1
            waiting += ((inner, outside) for inner in place.inner.values())
        return kept

    def _tree(self, tree: Any, value: Any, place: _Place, above: int) -> Any:
        """A node is a list of a type and optionally a dict of inner nodes. The levels between nodes are dicts."""
        if not tree:
            return None
        if isinstance(tree, dict):
            return self._inner(tree, value, place, above)
        if not isinstance(tree, list) or len(tree) > 2 or not isinstance((*tree, None)[1], dict | None):
            raise UsageError(f"superjson's annotation of {place} is malformed")
        if place.above is not None:
            raise UsageError(f"superjson annotates {place} twice")
        place.above = above
        inner: dict[str, Any] = tree[1] or {} if len(tree) == 2 else {}
        children = self._inner(inner, value, place, above + 1)
        type = self._type(tree[0], value, place, inner)
        if type is None:
            return children
        return [type, children] if children else [type]

    def _inner(self, tree: dict[str, Any], value: Any, place: _Place, above: int) -> dict[str, Any] | None:
        kept: dict[str, Any] = {}
        for key, subtree in tree.items():
            segments = _segments(key)
            _check_allowed(segments)
            container, found = _at(value, segments)
            if found is MISSING or (id(container), segments[-1]) in self._ambiguous:
                continue
            checked = self._tree(subtree, found, place.at(segments), above)
            if checked is not None:
                kept[key] = checked
        return kept or None

    def _type(self, type: Any, value: Any, place: _Place, inner: dict[str, Any]) -> Any:
        """The type to keep, or None to give readers the plain value. Raises `UsageError` if it does not fit."""
        if type == ["custom", "buffer"]:  # a Node Buffer, which browsers lack, is a Uint8Array
            type = ["typed-array", "Uint8Array"]
        if type == "regexp":  # cannot be checked
            return None
        if not _fits(type, value):
            raise UsageError(f"superjson's annotation of {place} does not fit: {_shown_type(type)}")
        if inner and type not in ("set", "map"):
            raise UsageError(f"superjson's annotation of {place} has others inside: {_shown_type(type)}")
        if type == "map" and any(isinstance(tree, list) and len(_segments(key)) == 1 for key, tree in inner.items()):
            raise UsageError(f"superjson annotates a whole pair of the map at {place}")
        return None if type == "URL" and not _URL.fullmatch(value) else type


def _fits(type: Any, value: Any) -> bool:
    match type:
        case "undefined":
            return True
        case "Date" | "URL":
            return isinstance(value, str)
        case "bigint":
            return isinstance(value, str) and _BIG.fullmatch(value) is not None
        case "number":
            return isinstance(value, str) and value in _NUMBERS
        case "Error":
            return (
                isinstance(value, dict) and value.keys() <= _ERROR and all(isinstance(v, str) for v in value.values())
            )
        case "set":
            return isinstance(value, list)
        case "map":
            return isinstance(value, list) and all(isinstance(pair, list) for pair in value)
        case ["typed-array", str(name)]:
            return (
                name in _TYPED_ARRAYS
                and isinstance(value, list)
                and all(item is None or is_number(item) for item in value)
            )
        case _:
            return False


def _segments(key: str) -> list[str]:
    """The path segments in a key, which are separated by dots. A backslash escapes a dot."""
    if "\\" not in key:
        return key.split(".")
    segments = [""]
    for part in _PARTS.findall(key):
        if part == ".":
            segments.append("")
        else:
            segments[-1] += "." if part == "\\." else part
    return segments


def _check_allowed(segments: list[str]) -> None:
    for segment in segments:
        if segment in DANGEROUS:
            raise UsageError(f"superjson annotates {segment!r}, which is not allowed")


def _at(value: Any, segments: list[str]) -> tuple[Any, Any]:
    """The container of the value at a path, and the value."""
    container = MISSING
    for segment in segments:
        if value is MISSING:
            return MISSING, MISSING
        container, value = value, child(value, segment)
    return container, value


def _ambiguous_places(value: Any) -> set[tuple[int, str]]:
    """The places, as the id of a container and the last path segment, that an unescaped key with dots also names.

    With both `{"a.b": …}` and `{"a": {"b": …}}` in a payload, an annotation of `a.b` can mean either.
    """
    places: set[tuple[int, str]] = set()
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            for name in found:
                if "." in name:
                    segments = _segments(name)
                    container, place = _at(found, segments)
                    if place is not MISSING:
                        places.add((id(container), segments[-1]))
            found = found.values()
        elif not isinstance(found, list):
            continue
        waiting.extend(inner for inner in found if isinstance(inner, _CONTAINERS))
    return places


def _shown_type(type: Any) -> str:
    return shown(type if isinstance(type, str) else encode_value(type).decode())
