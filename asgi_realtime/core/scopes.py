"""The scopes of a token: what they grant, and the nested form in which users write them.

A scope is `action[:type[:id]]`. Only the first two colons separate, so ids can contain colons. Matching is lenient: an
unknown scope grants nothing. Creating is strict: a scope that can never grant anything raises an error, which would
otherwise show up as a 403 in a browser. Grammar: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from asgi_realtime.core.errors import UsageError, shown
from asgi_realtime.core.names import CONTROL_CHARACTERS

ResourceName = tuple[str, str | None]
"""A type and an id; without an id, the whole type, such as the list of all runs."""

ScopeIds = str | bool | Iterable[str]
Scopes = Mapping[str, Mapping[str, ScopeIds] | bool] | Sequence[str]
"""`{"read": {"runs": ["run_1"], "tags": True}}`, or a list of scopes as in the token."""

_EVERY_TYPE = ("runs", "tags", "batch", "tasks", "inputStreams", "waitpoints", "all")
_TYPES_OF: dict[str, tuple[str, ...]] = {
    "read": (*_EVERY_TYPE, "streams"),
    "write": _EVERY_TYPE,
    "trigger": ("tasks", "all"),
    "batchTrigger": ("tasks", "all"),
    "*": _EVERY_TYPE,
}


class Scope(NamedTuple):
    """The parts of one scope. `type` and `id` can be None."""

    action: str
    type: str | None = None
    id: str | None = None


def parse(scope: str) -> Scope:
    """Split a scope into its parts, without validation."""
    return Scope(*scope.split(":", 2))


def grants(scopes: Iterable[str], action: str, resources: Collection[ResourceName]) -> bool:
    """Whether one of the scopes grants the action on one of the names of a resource."""
    for scope in scopes:
        if _matches(parse(scope), action, resources):
            return True
    return False


def _matches(scope: Scope, action: str, names: Collection[ResourceName]) -> bool:
    if scope.action == "admin":
        return scope.type is None
    if scope.action != action and scope.action != "*":
        return False
    if scope.type == "all":
        return True
    if scope.id is not None:
        return (scope.type, scope.id) in names
    return any(scope.type == type for type, _ in names)


def named_ids(scopes: Iterable[str], action: str, type: str) -> frozenset[str]:
    """The ids of one type that the scopes list for an action."""
    parsed = (parse(scope) for scope in scopes)
    return frozenset(
        scope.id for scope in parsed if scope.action in (action, "*") and scope.type == type and scope.id is not None
    )


def flatten_scopes(scopes: Scopes) -> tuple[str, ...]:
    """Turn the nested form into scope strings, or validate a list of them. Keeps the order, removes duplicates.

    Raises `UsageError` for unknown words, empty values, and scopes that grant nothing, such as `read: True`.
    """
    if isinstance(scopes, Mapping):
        found = list(_flatten(scopes))
    elif isinstance(scopes, Sequence) and not isinstance(scopes, str | bytes):
        found = [_checked(scope) for scope in scopes]
    else:
        raise UsageError(
            f"scopes is a {_type(scopes)}; allowed are a dict like {{'read': {{'runs': ['run_1']}}}} or a list"
        )
    if not found:
        raise UsageError("scopes is empty, so the token would grant nothing; name at least one scope")
    return tuple(dict.fromkeys(found))


def _flatten(scopes: Mapping[str, Mapping[str, ScopeIds] | bool]) -> Iterator[str]:
    for action, types in scopes.items():
        if action == "admin" and types is True:
            yield "admin"
            continue
        allowed = _allowed_types(action)
        if not isinstance(types, Mapping):
            raise UsageError(
                f"scope {action!r} is {shown(types)}, which grants nothing; allowed is a dict with {allowed}"
            )
        if not types:
            raise UsageError(f"scope {action!r} is empty, which grants nothing; name at least one of {allowed}")
        for type, ids in types.items():
            for scope in _of_type(action, type, ids):
                yield _checked(scope)


def _of_type(action: str, type: str, ids: ScopeIds) -> Iterator[str]:
    where = f"{action}:{type}"
    if ids is True:
        yield where
    elif isinstance(ids, str):
        yield f"{where}:{ids}"
    elif not isinstance(ids, list | tuple | set | frozenset):
        raise UsageError(f"scope {where!r} is {shown(ids)}; allowed are True, an id, or a list of ids")
    elif not ids:
        raise UsageError(f"scope {where!r} is an empty list, which grants nothing; list at least one id, or pass True")
    else:
        for id in sorted(ids) if isinstance(ids, set | frozenset) else ids:
            if not isinstance(id, str):
                raise UsageError(f"scope {where!r} lists a {_type(id)}; allowed are ids as str")
            yield f"{where}:{id}"


def _checked(scope: object) -> str:
    if not isinstance(scope, str):
        raise UsageError(f"a scope is a {_type(scope)}; allowed are strings like 'read:runs:run_1'")
    action, type, id = parse(scope)
    if scope == "admin":
        return scope
    allowed = _allowed_types(action)
    if type is None:
        raise UsageError(f"scope {action!r} without a type grants nothing; name one of {allowed}")
    if type not in _TYPES_OF[action]:
        raise UsageError(f"scope {action!r} has the unknown type {type!r}; allowed are {allowed}")
    if id is not None:
        _check_id(action, type, id)
    return scope


def _check_id(action: str, type: str, id: str) -> None:
    if not id:
        raise UsageError(f"scope '{action}:{type}' has an empty id, which grants nothing; pass an id")
    if type == "all":
        raise UsageError(f"scope '{action}:all' has an id, but 'all' grants everything; leave the id out")
    if CONTROL_CHARACTERS.search(id):
        raise UsageError(f"scope '{action}:{type}' has an id with control characters: {id!r}")


def _allowed_types(action: str) -> str:
    types = _TYPES_OF.get(action)
    if types is None:
        raise UsageError(f"scope has the unknown action {action!r}; allowed are {', '.join(_TYPES_OF)}, admin")
    return ", ".join(types)


def _type(value: object) -> str:
    return type(value).__name__
