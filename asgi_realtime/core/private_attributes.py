"""Private attributes of dataclasses inside pydantic models, which pydantic publishes."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

_HOLD_ANYTHING = frozenset({Any, object, dict, list, tuple, set, frozenset})


def may_have_private(model: type[Any], *, extra: bool) -> bool:
    """Whether an instance of a model can contain a dataclass by its annotations, which are not cheap to search.

    `extra`: fields that are not declared count too, if the model allows them.
    """
    seen: set[Any] = set()
    waiting: list[Any] = [model]
    while waiting:
        found = waiting.pop()
        origin, arguments = typing.get_origin(found), typing.get_args(found)
        if origin is typing.Literal:
            continue
        if origin is typing.Annotated:
            waiting.append(arguments[0])
        elif arguments:
            waiting += arguments
        elif not isinstance(found, type):
            if found is not ...:
                return True
        elif found in _HOLD_ANYTHING or hasattr(found, "__dataclass_fields__"):
            return True
        elif found not in seen and hasattr(found, "model_fields"):
            seen.add(found)
            if extra and getattr(found, "model_config", {}).get("extra") == "allow":
                return True
            waiting += (declared.annotation for declared in found.model_fields.values())
    return False


def remove_private(value: Any, plain: Any) -> None:
    """Remove the private attributes of dataclasses from `plain`, which pydantic made of `value`."""
    if getattr(value, "__pydantic_root_model__", False):
        value = value.root
    cls: Any = type(value)
    if isinstance(plain, list):
        if isinstance(value, list | tuple) and len(value) == len(plain):
            for item, made in zip(value, plain, strict=True):
                remove_private(item, made)
    elif not isinstance(plain, dict):
        return
    elif hasattr(cls, "__dataclass_fields__"):
        for name in cls.__dataclass_fields__:
            if name.startswith("_"):
                plain.pop(name, None)
            else:
                remove_private(getattr(value, name, None), plain.get(name))
    elif hasattr(cls, "model_fields"):
        for name, declared in cls.model_fields.items():
            remove_private(getattr(value, name, None), plain.get(declared.serialization_alias or name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            remove_private(item, plain.get(str(key)))
