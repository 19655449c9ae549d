"""Encodes a value as one line of JSON, and decodes it: the form of chunks, payloads, outputs and metadata everywhere.

The output contains no line break of any kind, so it fits into an SSE frame unchanged: neither those of the format nor
the others at which `str.splitlines` splits, because many readers in Python use that. JSON escapes the control
characters among them, and this module the other three. NaN and infinities become null.

Lone surrogates are kept as escapes, like `\\ud83d`. Some clients decode each half of an emoji separately, and a browser
that joins the chunks gets the whole emoji. msgspec supports no lone surrogates, so such values take a slow path through
the `json` module in both directions.

Bytes inside a dict or list become base64 text. Bytes alone raise an error, because a source of bytes is nearly always
text that was not decoded. `core.published` decides what is published of an object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

import msgspec

from asgi_realtime.core.errors import EncodingError, UsageError
from asgi_realtime.core.published import hook, plain_hook, public

_LF, _CR, _UNDERSCORE = b"\n\r_"  # as integers: `10 in data` is ten times as fast as `b"\n" in data`
_NEL_END, _LS_END = 0x85, 0x80
"""Bytes without which UTF-8 contains none of the three separators."""
_SEPARATORS = tuple((text.encode(), rb"\u%04x" % ord(text)) for text in "\u2028\u2029\x85")
_LINE_BREAKS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
"""An escape in a JSON string: a surrogate pair, a lone surrogate (the group), or any other."""

_FIRST_STAND_IN = 0x10F800
_STAND_IN = re.compile(rb"\xf4\x8f[\xa0-\xbf][\x80-\xbf]")
"""The last 2,048 characters of Unicode, which are private, in UTF-8: as many as there are surrogates."""

_MAYBE_PRIVATE = re.compile(b'"_').search
"""Finds private attributes in JSON, among keys and texts that begin with an underscore. Faster than `in`."""

_PLAIN = frozenset({list, tuple, int, float, bool, type(None)})
_BINARY = (bytes, bytearray, memoryview)
_MALFORMED = (msgspec.MsgspecError, ValueError)  # bad UTF-8 is a ValueError only
_MAX_PATH_STEPS = 20  # a value can contain itself

T = TypeVar("T")


def encode_value(value: object) -> bytes:
    """Encode a value as one line of JSON. Raises `EncodingError`, and nothing else, if it has no JSON form."""
    cls = type(value)
    try:
        if cls is str:
            data = _encode(value)
            return data if data.isascii() else escape_separators(data)
        data = _encode(value if cls is dict or cls in _PLAIN else _checked(value))
        if _UNDERSCORE in data:
            data = _without_private(value, data)
    except Exception as exc:  # the serializer of a model can raise anything
        data = _encode_slowly(value, exc)
    if _LF in data or _CR in data:
        data = _on_one_line(data)
    return data if data.isascii() else escape_separators(data)


def _without_private(value: object, data: bytes) -> bytes:
    """What is published of a value whose JSON is `data`. Agents, prompts and their events have an underscore in it."""
    if _MAYBE_PRIVATE(data) is None and data.find(b'"instructions"') < 0:
        if type(value) is not dict or "event" not in value:
            return data
    return _encode(public(value))


def _checked(value: object) -> Any:
    if isinstance(value, _BINARY):
        raise EncodingError(
            f"{type(value).__name__} has no JSON form; pass text (`data.decode()`),"
            " or base64 text (`base64.b64encode(data).decode()`)"
        )
    return public(value)


def escape_separators(data: bytes) -> bytes:
    """JSON with U+2028, U+2029 and U+0085 as escapes: `str.splitlines` splits there."""
    if _LS_END in data or _NEL_END in data:
        for separator, escape in _SEPARATORS:
            data = data.replace(separator, escape)
    return data


def decode(data: bytes) -> Any:
    """Decode JSON. Raises `UsageError` if it is malformed."""
    try:
        return _decode(data)
    except UsageError:
        if b"\\u" in data:
            return _decode_surrogates(data)
        raise


def decode_as(data: bytes, type: type[T]) -> T:
    """Decode JSON into a type that msgspec supports.

    Raises `msgspec.ValidationError` if it does not match, and `UsageError` if it is malformed.
    """
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.ValidationError:
        raise
    except RecursionError as exc:
        raise UsageError("JSON is nested too deeply") from exc
    except _MALFORMED as exc:
        if b"\\u" not in data:
            raise UsageError(f"not valid JSON: {exc}") from exc
    found = _decode_surrogates(data)
    if isinstance(found, dict) and hasattr(type, "__struct_fields__"):
        found |= _raw_fields(data, type)
    return msgspec.convert(found, type, str_keys=True)


def _raw_fields(data: bytes, struct: Any) -> dict[str, Any]:
    """The fields of an object that a struct holds as raw JSON, byte for byte."""
    marked = _STAND_IN.sub(lambda found: json.dumps(found[0].decode())[1:-1].encode(), data)
    marked = _ESCAPE.sub(lambda escape: _stand_in(escape[1]) if escape[1] else escape[0], marked)
    items = msgspec.json.decode(marked, type=dict[str, msgspec.Raw])
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        item = items.get(field.encode_name)
        if item is not None and field.type is msgspec.Raw:
            fields[field.encode_name] = _unmarked(item)
        elif item is not None and field.type == list[msgspec.Raw] and bytes(item).startswith(b"["):
            fields[field.encode_name] = [_unmarked(one) for one in msgspec.json.decode(item, type=list[msgspec.Raw])]
    return fields


def _stand_in(escape: bytes) -> bytes:
    """The private character that takes the place of a lone surrogate while msgspec splits an object."""
    return chr(int(escape[1:], 16) - 0xD800 + _FIRST_STAND_IN).encode()


def _unmarked(raw: msgspec.Raw) -> msgspec.Raw:
    def escape(found: re.Match[bytes]) -> bytes:
        return b"\\u%04x" % (ord(found[0].decode()) - _FIRST_STAND_IN + 0xD800)

    return msgspec.Raw(_STAND_IN.sub(escape, bytes(raw)))


def json_line(data: bytes) -> bytes:
    """Received JSON as it is stored: on one line, and otherwise byte for byte as received.

    No number is rounded, no key moves, and lone surrogates remain. Raises `UsageError` if malformed.
    """
    data = data.strip(b" \t\r\n")
    try:
        _decode(data)
    except UsageError:
        scrubbed = scrub_escapes(data)
        if scrubbed == data:
            raise
        _decode(scrubbed)
    if _LF in data or _CR in data:  # strings cannot contain them, so they are between tokens
        data = data.translate(_LINE_BREAKS_TO_SPACES)
    return data if data.isascii() else escape_separators(data)


def scrub_escapes(data: bytes) -> bytes:
    """Replace escaped lone surrogates in JSON by U+FFFD, so that msgspec can check the rest."""
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], data)


def _decode(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except RecursionError as exc:
        raise UsageError("JSON is nested too deeply") from exc
    except _MALFORMED as exc:
        raise UsageError(f"not valid JSON: {exc}") from exc


def _decode_surrogates(data: bytes) -> Any:
    """Decode JSON with escaped lone surrogates, as `JSON.stringify` writes them (ECMA-262, 25.5.2.3)."""
    try:
        return json.loads(data, parse_constant=_refuse_constant, parse_float=_finite_float)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"not valid JSON: {exc}") from exc


def _finite_float(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{text[:20]} is out of range")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


_encode = msgspec.json.Encoder(enc_hook=hook).encode


def _encode_slowly(value: object, cause: Exception) -> bytes:
    """A second attempt with lone surrogates and unusual keys. Raises an error that names the value and its path."""
    if isinstance(cause, RecursionError):
        raise _too_deep(value) from cause
    try:
        return _dump(value)
    except RecursionError as exc:
        raise _too_deep(value) from exc
    except Exception as exc:
        path, culprit = _blame(value)
        reason = str(exc) if isinstance(exc, EncodingError) else f"{type(culprit).__qualname__} has no JSON form: {exc}"
        raise EncodingError(f"at {path}: {reason}" if path else reason) from exc


def _too_deep(value: object) -> EncodingError:
    return EncodingError(f"{type(value).__qualname__} is nested too deeply, or contains itself")


def _dump(value: object) -> bytes:
    plain = msgspec.to_builtins(_checked(value), enc_hook=_plain_hook, str_keys=True)
    return json.dumps(_finite(plain), allow_nan=False, separators=(",", ":")).encode()


def _plain_hook(value: Any) -> Any:
    return decode(bytes(value)) if isinstance(value, msgspec.Raw) else plain_hook(value)


def _finite(value: Any) -> Any:
    """Plain values with None for NaN and infinities."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _blame(value: object) -> tuple[str, object]:
    """The path of the innermost value in dicts and lists that cannot be encoded, and that value."""
    path = ""
    for _ in range(_MAX_PATH_STEPS):
        found = next(((step, child) for step, child in _children(value) if not _is_encodable(child)), None)
        if found is None:
            break
        path, value = path + found[0], found[1]
    return path, value


def _children(value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        return ((f"[{key!r}]", child) for key, child in value.items())
    if isinstance(value, list | tuple):
        return ((f"[{index}]", child) for index, child in enumerate(value))
    return ()


def _is_encodable(value: object) -> bool:
    try:
        _dump(value)
    except Exception:
        return False
    return True


def _on_one_line(data: bytes) -> bytes:
    """Remove line breaks, which only a `msgspec.Raw` of the caller can contain."""
    try:
        return msgspec.json.encode(msgspec.json.decode(data))
    except (*_MALFORMED, RecursionError) as exc:
        raise EncodingError(f"a msgspec.Raw is not valid JSON: {exc}") from exc
