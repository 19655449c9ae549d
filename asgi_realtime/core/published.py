"""What is published of an object that is more than plain JSON: its wire form, and nothing that the host keeps private.

* Models of API clients are encoded as their API sent them. Their classes declare every field that the API can send, so
  unset fields are omitted. Where the client does not record which fields were set, or its own encoder drops nulls, all
  nulls are omitted. Fields that the client adds are omitted too: response headers, and the text so far, which makes a
  stream quadratic. The Responses API echoes the prompt and the tools with their credentials; these are also omitted.
* Attributes that begin with an underscore are omitted from dataclasses, attrs classes and msgspec structs. pydantic
  omits them from its models, but not from dataclasses inside of them.
* Objects that carry an agent, a prompt or a history are rejected. The host decides with `encode=` what to publish of
  them.

Models that users define keep all their fields. Classes are recognized by their structure, or by the package of a base
class; no client library is imported. `_form` decides once per class.

Plain dicts and lists are not searched for such objects unless their JSON contains an underscore (see `chunks`), because
a search costs as much as encoding them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import msgspec

from asgi_realtime.core.errors import EncodingError
from asgi_realtime.core.private_attributes import may_have_private, remove_private

ALLOWED = "str, numbers, dicts, lists, dataclasses, msgspec and pydantic models, datetimes, UUIDs, Decimals, enums"
_INSTEAD = "pass encode= with a function that returns what to publish of it, or None for nothing"

_AS_SENT = frozenset({"ollama", "mistralai"})
"""Clients whose models know which fields were set. `_is_generated` finds others, such as openai."""
_WITHOUT_NULLS = frozenset({"ag_ui", "pydantic_ai"})
"""Packages whose own encoders omit nulls. Their models can be built by the host, so default values must remain."""
_BOTH = frozenset({"google", "litellm"})

_ECHOED = {"instructions", "prompt", "tools"}
"""What a response of the Responses API repeats of its request."""
_ADDED = {"snapshot", "sdk_http_response", "automatic_function_calling_history"}
"""What clients add to the events of their API."""

_AGENT_EVENTS = frozenset({"raw_response_event", "run_item_stream_event", "agent_updated_stream_event"})
_SHAPES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"instructions", "handoffs"}), "is an agent with its instructions"),
    (frozenset({"parts", "instructions", "kind"}), "carries prompts"),
    (frozenset({"user_prompt", "system_prompts"}), "carries prompts"),
    (frozenset({"new_items", "raw_responses", "input"}), "carries an agent and its history"),
)
"""Fields of classes that carry what must not be published. In this order: an agent of openai-agents, a request and a
first node of pydantic-ai, a result of openai-agents."""

_LEAVES = frozenset({str, int, float, bool, type(None), bytes})
_SERIALIZER = "__pydantic_serializer__"


@dataclass(frozen=True, slots=True)
class _Form:
    """What is published of the instances of a class."""

    refusal: str | None = None
    """Why none is."""
    fields: tuple[tuple[str, str], ...] | None = None
    """The attributes to read and the names to publish them by; None if msgspec or the hook encodes the class."""
    nulls: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    """How pydantic serializes it."""
    has_private: bool = False
    """Whether pydantic can publish private attributes of dataclasses inside."""


def is_plain(value: Any) -> bool:
    """Whether a dict or list contains nothing but plain values, so that its JSON can be published as it is."""
    for item in value.values() if type(value) is dict else value:
        cls = type(item)
        if cls in _LEAVES:
            continue
        if not (cls is dict or cls is list) or not is_plain(item):
            return False
    return True


def public(value: Any) -> Any:
    """A value without private attributes: objects become dicts. Raises `EncodingError` for what is never published."""
    cls = type(value)
    if cls in _LEAVES:
        return value
    if cls is dict:
        if "event" in value:
            _check_event(value)
        return {_key(key): public(item) for key, item in value.items()}
    if cls is list or cls is tuple:
        return [public(item) for item in value]
    form = _form_of(value)
    if form.fields is None:
        return value
    pairs = ((name, getattr(value, attribute, msgspec.UNSET)) for attribute, name in form.fields)
    return {
        name: public(item) for name, item in pairs if item is not msgspec.UNSET and (form.nulls or item is not None)
    }


def hook(value: Any) -> Any:
    """Encode types that msgspec does not support: JSON of a model, otherwise simpler values."""
    serializer = getattr(type(value), _SERIALIZER, None)
    if serializer is None:
        return _simpler(value)
    form = _form_of(value)
    data: bytes = serializer.to_json(value, warnings=False, **form.options)
    if data.find(b"NaN") >= 0 or data.find(b"Infinity") >= 0:  # a model's configuration can allow these in its JSON
        return plain_hook(value)
    if form.has_private and data.find(b'"_') >= 0:
        return plain_hook(value)
    return msgspec.Raw(data)


def plain_hook(value: Any) -> Any:
    """As `hook`, but returns Python values instead of JSON."""
    serializer = getattr(type(value), _SERIALIZER, None)
    if serializer is None:
        return _simpler(value)
    plain = serializer.to_python(value, mode="json", warnings=False, **_form_of(value).options)
    remove_private(value, plain)
    return plain


def _check_event(event: dict[str, Any]) -> None:
    """Raise `EncodingError` for an event of LangChain's `astream_events` that carries the input of a step."""
    name, data = event["event"], event.get("data")
    if isinstance(name, str) and name.startswith("on_") and "run_id" in event and isinstance(data, dict):
        if "input" in data:
            raise EncodingError(f"the event {name} carries the input of its step, such as prompts; {_INSTEAD}")


def _form_of(value: object) -> _Form:
    cls: Any = type(value)
    form = _form(cls)
    if form.refusal is not None:
        raise EncodingError(f"{cls.__qualname__} {form.refusal}; {_INSTEAD}")
    return form


# Classes


@lru_cache(maxsize=4096)
def _form(cls: type) -> _Form:
    if hasattr(cls, _SERIALIZER) and hasattr(cls, "model_fields"):
        return _form_of_model(cls)
    names = _attributes(cls)
    if names is None:
        return _Form(_refusal(cls, frozenset()))
    refusal = _refusal(cls, frozenset(name for name, _ in names))
    return _Form(
        refusal,
        tuple(pair for pair in names if not pair[0].startswith("_")),
        nulls=not issubclass(
            cls, dict
        ),  # a dataclass that is a dict as well: huggingface_hub, with null for "not sent"
    )


def _attributes(cls: type) -> tuple[tuple[str, str], ...] | None:
    """The fields of a class that msgspec would encode with its private attributes."""
    if issubclass(cls, msgspec.Struct):
        private = any(name.startswith("_") for name in cls.__struct_fields__)
        if not private or cls.__struct_config__.array_like:
            return None  # msgspec knows its tags and defaults
        return tuple(zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True))
    fields: Mapping[str, Any] | None = getattr(cls, "__dataclass_fields__", None)
    if fields is not None:
        return tuple((name, name) for name, found in fields.items() if found._field_type.name == "_FIELD")
    attributes = getattr(cls, "__attrs_attrs__", None)
    return None if attributes is None else tuple((found.name, found.name) for found in attributes)


def _refusal(cls: type, names: frozenset[str]) -> str | None:
    if hasattr(cls, "all_messages") and hasattr(cls, "new_messages"):
        return "carries the messages of an agent run"
    kind = getattr(cls, "type", None) or getattr(cls, "event_kind", None)
    if isinstance(kind, str) and kind in _AGENT_EVENTS:
        return "carries an agent"
    if kind == "agent_run_result" or "new_agent" in names:
        return "carries the agent run with its messages"
    return next((reason for shape, reason in _SHAPES if shape <= names), None)


def _form_of_model(cls: type[Any]) -> _Form:
    names = frozenset(cls.model_fields)
    options: dict[str, Any] = {"by_alias": True, **_omitted(cls)}
    if len(options) > 1 and (excluded := _excluded(names)):
        options["exclude"] = excluded
    return _Form(
        _model_refusal(cls, names), options=options, has_private=may_have_private(cls, extra=len(options) == 1)
    )


def _omitted(cls: type[Any]) -> dict[str, bool]:
    """Which fields pydantic omits: those that the API did not send, nulls, or none, if this is a model of a user."""
    packages = {base.__module__.partition(".")[0] for base in cls.__mro__ if hasattr(base, "model_fields")}
    if not packages.isdisjoint(_BOTH):
        return {"exclude_unset": True, "exclude_none": True}
    if not packages.isdisjoint(_WITHOUT_NULLS):
        return {"exclude_none": True}
    return {"exclude_unset": True} if _is_generated(cls) or not packages.isdisjoint(_AS_SENT) else {}


def _is_generated(cls: type[Any]) -> bool:
    """Whether this is a model of a client generated by Stainless, as those of openai, anthropic, groq and cerebras."""
    construct: Callable[..., Any] | None = getattr(cls, "construct", None)
    return getattr(construct, "__module__", "").endswith("._models") and hasattr(cls, "to_dict")


def _excluded(names: frozenset[str]) -> dict[str, Any]:
    excluded: dict[str, Any] = dict.fromkeys(_ADDED & names, True)
    if "snapshot" in names:
        excluded["parsed"] = True  # the snapshot once more
    if "arguments_delta" in names:
        excluded |= {"arguments": True, "parsed_arguments": True}  # the arguments so far
    if {"context", "response", "done"} <= names:
        excluded["context"] = True  # ollama's: the conversation as tokens
    if {*_ECHOED, "output"} <= names:
        excluded |= dict.fromkeys(_ECHOED, True)
    if {"response", "type"} <= names:
        excluded["response"] = _ECHOED
    return excluded


def _model_refusal(cls: type[Any], names: frozenset[str]) -> str | None:
    """LangChain's prompts and messages to a model."""
    if hasattr(cls, "to_messages"):
        return "is a prompt"
    if {"content", "additional_kwargs", "response_metadata", "type"} <= names:
        kind = str(cls.model_fields["type"].default).lower()
        return "is a prompt" if kind.startswith(("system", "human")) else None
    return None


# Values


def _key(key: Any) -> Any:
    """A key of a dict as the `json` module writes it."""
    if key is None:
        return "null"
    if isinstance(key, bool):
        return "true" if key else "false"
    return key.item() if _is_array(key) else key


def _is_array(value: object) -> bool:
    """Whether this is an array or a scalar of numpy, or alike."""
    return hasattr(value, "dtype") and hasattr(value, "tolist")


def _simpler(value: object) -> Any:
    # msgspec takes str, int and float exactly; subclasses are common (markupsafe.Markup, numpy.float64).
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_key(key): item for key, item in value.items()}
    if isinstance(value, deque):
        return list(value)
    if _is_array(value):
        return value.tolist()  # type: ignore[attr-defined]
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, SimpleNamespace):
        return {name: item for name, item in vars(value).items() if not name.startswith("_")}
    if isinstance(value, PurePath) or type(value).__module__ == "ipaddress" or hasattr(value, "get_secret_value"):
        return str(value)  # of a secret: asterisks
    raise EncodingError(f"{type(value).__qualname__} has no JSON form; allowed are {ALLOWED}")
