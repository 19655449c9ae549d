"""Reads the objects of model clients without importing these, and turns values into plain JSON.

Every client has objects with attributes, and all can be replaced by dicts of the same form, so one function reads both.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.errors import EncodingError, UsageError

_LEAVES = frozenset({str, int, bool, type(None)})


def get(item: Any, name: str, default: Any = None) -> Any:
    """A key of a dict, or an attribute of an object."""
    if isinstance(item, dict):
        return item.get(name, default)
    return getattr(item, name, default)


def fields(item: Any) -> dict[str, Any]:
    """The fields of a dict or a model, also those that the API sent and the model does not declare.

    Asking a pydantic model for an attribute that it lacks takes a microsecond.
    """
    if isinstance(item, dict):
        return item
    found: dict[str, Any] = vars(item)
    extra = getattr(item, "__pydantic_extra__", None)
    return {**found, **extra} if extra else found


def text_of(item: Any, name: str) -> str:
    """A text, or the value of an enum of texts; otherwise the empty text."""
    value = get(item, name)
    value = getattr(value, "value", value)
    return value if isinstance(value, str) else ""


def plain(value: Any) -> Any:
    """A value as it is published: without private attributes, agents and prompts.

    Of what has no JSON form, only the name of its type remains.
    """
    if type(value) in _LEAVES:
        return value
    try:
        return decode(encode_value(value))
    except (EncodingError, UsageError):
        return f"<{type(value).__name__}>"


def data_url(media_type: str, data: bytes | str) -> str:
    """A data URL of binary data, or of text that is base64 already."""
    encoded = data if isinstance(data, str) else base64.b64encode(data).decode()
    return f"data:{media_type};base64,{encoded}"


def parsed(content: Any) -> Any:
    """The output of a tool from a text for the model: JSON if the tool returned an object or a list."""
    if isinstance(content, str) and content.startswith(("{", "[")):
        try:
            return json.loads(content)
        except ValueError:
            pass
    return content
