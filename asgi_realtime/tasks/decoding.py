"""Decoding JSON into the types that users declare: dataclasses, msgspec structs, TypedDicts, pydantic models.

msgspec decodes the types that it supports. pydantic, if installed, decodes models and the types that only it supports.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import msgspec
import msgspec.inspect

from asgi_realtime.core.chunks import decode, encode_value, scrub_escapes
from asgi_realtime.core.errors import InvalidConfiguration, UsageError


def decoder_of(annotation: Any) -> Callable[[bytes], Any]:
    """A function that decodes JSON into a type. Raises `InvalidConfiguration` for a type that JSON cannot express."""
    if annotation is Any or annotation is inspect.Parameter.empty or annotation is object:
        return decode
    read = _reader(annotation)

    def decode_typed(data: bytes) -> Any:
        try:
            return read(data)
        except RecursionError as exc:
            raise UsageError("JSON is nested too deeply") from exc
        except (msgspec.MsgspecError, ValueError, TypeError) as exc:
            raise UsageError(str(exc)) from exc

    return decode_typed


def _reader(annotation: Any) -> Callable[[bytes], Any]:
    try:
        if _is_foreign(annotation):
            raise TypeError(f"{type_name(annotation)} cannot be decoded from JSON")
        read = msgspec.json.Decoder(annotation, dec_hook=_decode_foreign).decode
    except TypeError as exc:
        adapter = _pydantic_adapter(annotation)
        if adapter is None:
            raise InvalidConfiguration(
                f"{type_name(annotation)} cannot be the type of a payload or chunk: {exc}"
            ) from exc
        return lambda data: adapter(scrub_escapes(data))

    def read_any(data: bytes) -> Any:
        try:
            return read(data)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            if b"\\u" not in data:
                raise
        # msgspec does not decode lone surrogates, but it converts them
        return msgspec.convert(decode(data), annotation, dec_hook=_decode_foreign, str_keys=True)

    return read_any


def _is_foreign(annotation: Any) -> bool:
    """Whether msgspec would pass the type to `_decode_foreign` and that cannot decode it."""
    known = msgspec.inspect.type_info(annotation)
    return isinstance(known, msgspec.inspect.CustomType) and not hasattr(annotation, "model_validate_json")


def _pydantic_adapter(annotation: Any) -> Callable[[bytes], Any] | None:
    """A decoder for types that only pydantic supports, such as a union of models; None without pydantic."""
    try:
        import pydantic
    except ImportError:
        return None
    try:
        return pydantic.TypeAdapter(annotation).validate_json
    except pydantic.errors.PydanticUserError:
        return None


def _decode_foreign(annotation: Any, value: Any) -> Any:
    """Decode a type that msgspec does not support: a pydantic model. Strict models need JSON rather than objects.

    pydantic accepts no lone surrogates, so they become U+FFFD.
    """
    validate = getattr(annotation, "model_validate_json", None)
    if validate is None:
        raise TypeError(f"{type_name(annotation)} cannot be decoded from JSON")
    return validate(scrub_escapes(encode_value(value)))


def type_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation)
