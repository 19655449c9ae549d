"""Encodes a value as one line of JSON, and decodes it: the form of chunks, payloads, outputs and metadata everywhere.

The output contains no raw line break, so it fits into an SSE frame unchanged. NaN and infinities become null, lone
surrogates become U+FFFD. Bytes inside a dict or list become base64 text. Bytes alone raise an error, because a source
of bytes is nearly always text that was not decoded. Pydantic models are recognized by an attribute of their class;
pydantic is never imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import msgspec

from asgi_realtime.core.errors import EncodingError, UsageError

_AS_SENT = frozenset({"openai", "anthropic"})
"""Models of these packages have every field that the API can send. The set fields are those that it did send."""

_LF, _CR = b"\n\r"  # as integers: `10 in data` is ten times as fast as `b"\n" in data`
_LINE_BREAKS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
"""An escape in a JSON string: a surrogate pair, a lone surrogate (the group), or any other."""

_BINARY = (bytes, bytearray, memoryview)
_MALFORMED = (msgspec.MsgspecError, ValueError)  # bad UTF-8 is a ValueError only
_MAX_PATH_STEPS = 20  # a value can contain itself
_ALLOWED = "str, numbers, dicts, lists, dataclasses, msgspec and pydantic models, datetimes, UUIDs, Decimals, enums"


def encode_value(value: object) -> bytes:
    """Encode a value as one line of JSON. Raises `EncodingError`, and nothing else, if it has no JSON form."""
    cls = type(value)
    if cls is not str and cls is not dict and isinstance(value, _BINARY):
        raise EncodingError(
            f"{cls.__name__} has no JSON form; pass text (`data.decode()`),"
            " or base64 text (`base64.b64encode(data).decode()`)"
        )
    try:
        data = _encode(value)
    except Exception as exc:  # the serializer of a model can raise anything
        data = _encode_slowly(value, exc)
    if _LF in data or _CR in data:
        return _on_one_line(data)
    return data


def decode(data: bytes) -> Any:
    """Decode JSON. Raises `UsageError` if it is malformed."""
    try:
        return _decode(data)
    except UsageError:
        if b"\\u" in data:
            return _decode_surrogates(data)
        raise


def json_line(data: bytes) -> bytes:
    """Received JSON as it is stored: on one line, and otherwise byte for byte as received.

    No number is rounded and no key moves. Escaped lone surrogates become U+FFFD. Raises `UsageError` if malformed.
    """
    data = data.strip(b" \t\r\n")
    try:
        _decode(data)
    except UsageError:
        scrubbed = scrub_escapes(data)
        if scrubbed == data:
            raise
        _decode(scrubbed)
        data = scrubbed
    if _LF in data or _CR in data:  # strings cannot contain them, so they are between tokens
        return data.translate(_LINE_BREAKS_TO_SPACES)
    return data


def scrub_escapes(data: bytes) -> bytes:
    """Replace escaped lone surrogates in JSON by U+FFFD. The length does not change."""
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
        return _scrub(json.loads(data, parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"not valid JSON: {exc}") from exc


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _enc_hook(value: Any) -> Any:
    """Encode types that msgspec does not support."""
    serializer = getattr(type(value), "__pydantic_serializer__", None)
    if serializer is None:
        return _known(value)
    data = serializer.to_json(value, by_alias=True, exclude_unset=_as_sent(value), warnings=False)
    if data.find(b"NaN") >= 0 or data.find(b"Infinity") >= 0:  # a model's configuration can allow these in its JSON
        return _model_dict(value)
    return msgspec.Raw(data)


def _plain_hook(value: Any) -> Any:
    """As `_enc_hook`, but returns Python values instead of JSON, so that their strings can be scrubbed."""
    if isinstance(value, msgspec.Raw):
        return decode(bytes(value))
    if hasattr(type(value), "__pydantic_serializer__"):
        return _model_dict(value)
    return _known(value)


def _model_dict(model: Any) -> Any:
    serializer = type(model).__pydantic_serializer__
    return serializer.to_python(model, mode="json", by_alias=True, exclude_unset=_as_sent(model), warnings=False)


def _as_sent(model: object) -> bool:
    return type(model).__module__.partition(".")[0] in _AS_SENT


def _known(value: object) -> Any:
    # msgspec takes str, int and float exactly; subclasses are common (markupsafe.Markup, numpy.float64).
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise EncodingError(f"{type(value).__qualname__} has no JSON form; allowed are {_ALLOWED}")


_encode = msgspec.json.Encoder(enc_hook=_enc_hook).encode


def _encode_slowly(value: object, cause: Exception) -> bytes:
    """A second attempt without lone surrogates. Raises an error that names the value and its path."""
    if isinstance(cause, RecursionError):
        raise _too_deep(value) from cause
    try:
        return _encode(_scrub(_to_plain(value)))
    except RecursionError as exc:
        raise _too_deep(value) from exc
    except Exception as exc:
        path, culprit = _blame(value)
        reason = str(exc) if isinstance(exc, EncodingError) else f"{type(culprit).__qualname__} has no JSON form: {exc}"
        raise EncodingError(f"at {path}: {reason}" if path else reason) from exc


def _too_deep(value: object) -> EncodingError:
    return EncodingError(f"{type(value).__qualname__} is nested too deeply, or contains itself")


def _to_plain(value: object) -> Any:
    return msgspec.to_builtins(value, enc_hook=_plain_hook, str_keys=True)


def _scrub(value: Any) -> Any:
    """Replace lone surrogates in plain values. Two that form a pair become one character."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_scrub(key): _scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_scrub(item) for item in value]
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
        _encode(_scrub(_to_plain(value)))
    except Exception:
        return False
    return True


def _on_one_line(data: bytes) -> bytes:
    """Remove line breaks, which only a `msgspec.Raw` of the caller can contain."""
    try:
        return msgspec.json.encode(msgspec.json.decode(data))
    except (*_MALFORMED, RecursionError) as exc:
        raise EncodingError(f"a msgspec.Raw is not valid JSON: {exc}") from exc
