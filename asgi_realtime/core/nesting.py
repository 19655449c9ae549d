"""Limits of the shape of JSON, checked on the bytes, before anything decodes them.

Parsers limit nesting by the stack that is left, so what a request can just store may be too deep for a feed that wraps
it. `MAX_DEPTH` leaves room for every wrapper, and common parsers accept it (Ruby's limit is 100, that of Rust's
serde_json 128, that of pydantic 200). A short text can also describe a million lists, and each costs far more time and
memory than its two bytes; `MAX_PARTS` limits them in what clients send.
"""

from __future__ import annotations

from itertools import accumulate

from asgi_realtime.core.errors import LimitExceeded

MAX_DEPTH = 100
"""Levels of lists and objects in one value, from outside or published by the host."""

MAX_PARTS = 100_000
"""Lists, objects, and names in objects, in one value that a client sends."""

_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}:"')
_STEPS = [0] * 256
for _byte in b"[{":
    _STEPS[_byte] = 1
for _byte in b"]}":
    _STEPS[_byte] = -1
_STEP_OF = _STEPS.__getitem__


def check_depth(data: bytes, *, what: str = "JSON") -> None:
    """Raise `LimitExceeded` if JSON is nested too deeply. Malformed JSON can pass."""
    if len(data) > 2 * MAX_DEPTH and data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(_structure(data), what)


def check_parts(data: bytes, *, limit: int = MAX_PARTS, what: str = "JSON") -> None:
    """Raise `LimitExceeded` if JSON has too many lists, objects and names."""
    if _count(data) > limit:  # what is in strings counts too
        _check_parts(_structure(data), limit, what)


def check_shape(data: bytes, *, what: str = "JSON") -> None:
    """`check_depth` and `check_parts` in one pass."""
    if len(data) > 2 * MAX_DEPTH and _count(data) > MAX_DEPTH:
        structure = _structure(data)
        _check_parts(structure, MAX_PARTS, what)
        _check_depth(structure, what)


def _count(data: bytes) -> int:
    return data.count(b"[") + data.count(b"{") + data.count(b":")


def _check_parts(structure: bytes, limit: int, what: str) -> None:
    count = _count(structure)
    if count > limit:
        raise LimitExceeded(f"{what} has {count} lists, objects and names, limit {limit}")


def _check_depth(structure: bytes, what: str) -> None:
    depth = max(accumulate(map(_STEP_OF, structure)), default=0)
    if depth > MAX_DEPTH:
        raise LimitExceeded(f"{what} is nested too deeply: {depth} levels, limit {MAX_DEPTH}")


def _structure(data: bytes) -> bytes:
    """The brackets and colons outside strings. This takes linear time, a few milliseconds per MiB."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    data = data.translate(None, _NOT_STRUCTURE)
    if b'"' in data:  # an even number of quotes can be removed anywhere without changing what is inside a string
        data = b"".join(data.replace(b'""', b"").split(b'"')[::2])
    return data
