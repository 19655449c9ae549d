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
from asgi_realtime.core.nesting import check_shape
from asgi_realtime.core.published import hook, is_plain, plain_hook, public

_LF, _CR, _UNDERSCORE = b"\n\r_"  # as integers: `10 in data` is ten times as fast as `b"\n" in data`
_NEL_END, _LS_END = 0x85, 0x80
"""Bytes without which UTF-8 contains none of the three separators."""
_SEPARATORS = tuple((text.encode(), rb"\u%04x" % ord(text)) for text in "\u2028\u2029\x85")
_LINE_BREAKS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")
_ESCAPE = re.compile(rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|([89a-fA-F][0-9a-fA-F]{2}))")
"""An escaped surrogate pair, or an escaped lone surrogate (the group)."""

_SURROGATE, _BACKSLASH = (character.encode() for character in "\U0010ffff\U0010fffe")
"""Noncharacters that replace the backslash of `\\ud800`, and an escaped backslash, while msgspec splits an object."""
_MARKS = ((b"\\\\", _BACKSLASH), (b"\\ud", _SURROGATE + b"ud"), (b"\\uD", _SURROGATE + b"uD"))

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


def encode_named(value: object, name: str) -> bytes:
    """As `encode_value`; the error starts with the name of the value."""
    try:
        return encode_value(value)
    except EncodingError as exc:
        exc.args = (f"{name}: {exc}",)
        raise


def _without_private(value: Any, data: bytes) -> bytes:
    """What is published of a value whose JSON is `data`. Agents, prompts and their events have an underscore in it."""
    cls = type(value)
    if (cls is dict or cls is list) and is_plain(value) and (cls is list or "event" not in value):
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
    is_struct = hasattr(type, "__struct_fields__") and data.lstrip().startswith(b"{")
    found = _fields(data, type) if is_struct else _decode_surrogates(data)
    try:
        return msgspec.convert(found, type, str_keys=True)
    except UnicodeEncodeError as exc:  # the name of a field, or of the kind of a struct
        raise UsageError("a name has a lone surrogate; allowed are names in whole characters") from exc


def _fields(data: bytes, struct: Any) -> dict[str, Any]:
    """The fields of an object that a struct has. Those that it holds as raw JSON remain, byte for byte."""
    try:
        items = msgspec.json.decode(_marked(data), type=dict[str, msgspec.Raw])
    except (*_MALFORMED, RecursionError) as exc:
        raise UsageError(f"not valid JSON: {exc}") from exc
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        item = items.get(field.encode_name)
        if item is None:
            continue
        if field.type is msgspec.Raw:
            fields[field.encode_name] = _unmarked(item)
        elif field.type == list[msgspec.Raw] and bytes(item).startswith(b"["):
            fields[field.encode_name] = [_unmarked(one) for one in msgspec.json.decode(item, type=list[msgspec.Raw])]
        else:
            fields[field.encode_name] = _decode_surrogates(bytes(_unmarked(item)))
    return fields


def _marked(data: bytes) -> bytes:
    """JSON without escaped surrogates, which msgspec does not even skip. `_unmarked` restores them."""
    for mark in (_SURROGATE, _BACKSLASH):
        data = data.replace(mark, json.dumps(mark.decode())[1:-1].encode())
    for text, mark in _MARKS:
        data = data.replace(text, mark)
    return data


def _unmarked(raw: msgspec.Raw) -> msgspec.Raw:
    return msgspec.Raw(bytes(raw).replace(_BACKSLASH, b"\\\\").replace(_SURROGATE, b"\\"))


def json_line(data: bytes) -> bytes:
    """Received JSON as it is stored: on one line, and otherwise byte for byte as received.

    No number is rounded, no key moves, and lone surrogates remain. Raises `UsageError` if malformed, `LimitExceeded` if
    nested too deeply or of too many parts.
    """
    data = data.strip(b" \t\r\n")
    check_shape(data)
    decode(data)
    if _LF in data or _CR in data:  # strings cannot contain them, so they are between tokens
        data = data.translate(_LINE_BREAKS_TO_SPACES)
    return data if data.isascii() else escape_separators(data)


def scrub_escapes(data: bytes) -> bytes:
    """Replace escaped lone surrogates in JSON by U+FFFD, for parsers that reject them."""
    if b"\\ud" not in data and b"\\uD" not in data:
        return data
    data = data.replace(b"\\\\", b"\\u005c")  # so that a search finds escapes only
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
        return json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite_float)
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
