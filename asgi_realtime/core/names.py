"""What ids, tags and keys may look like, checked once, where they come in."""

from __future__ import annotations

import re
from collections.abc import Iterable

from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import LimitExceeded, UsageError

INPUT_PREFIX = "$trigger.input:"
"""Inputs are hidden streams of this name and the input's id, as the official clients have it."""

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BAD_IN_TAG = re.compile(r'[\x00-\x1f\x7f-\x9f\\",\ud800-\udfff]')
_BAD_IN_KEY = re.compile(r"[\x00-\x1f\x7f-\x9f/?#\\\ud800-\udfff]")


def check_tags(tags: str | Iterable[str] | None, limits: Limits) -> tuple[str, ...]:
    """Tags without repeats, in their order. Raises `UsageError`, `LimitExceeded`."""
    given = () if tags is None else (tags,) if isinstance(tags, str) else tuple(tags)
    for tag in given:
        check_tag(tag, limits)
    unique = tuple(dict.fromkeys(given))
    if len(unique) > limits.tags:
        raise LimitExceeded(f"a run has {len(unique)} tags, limit {limits.tags}")
    return unique


def check_tag(tag: str, limits: Limits) -> None:
    if not isinstance(tag, str):
        raise UsageError(f"a tag is a {type(tag).__name__}; allowed is a str")
    if not tag.strip():
        raise UsageError("a tag is empty")
    if len(tag) > limits.tag_length:
        raise LimitExceeded(f"tag is {len(tag)} characters, limit {limits.tag_length}")
    if _BAD_IN_TAG.search(tag):
        raise UsageError(
            f"tag {tag!r} has a control character, a comma, a double quote or a backslash, which are not allowed"
        )


def check_key(key: str, limits: Limits, *, what: str) -> str:
    """A stream key, input id or task id. Raises `UsageError`, `LimitExceeded`."""
    if not isinstance(key, str):
        raise UsageError(f"a {what} is a {type(key).__name__}; allowed is a str")
    if not key or key in (".", ".."):
        raise UsageError(f"{what} {key!r} is not allowed; it must be a word that can stand in a URL's path")
    if len(key) > limits.key_length:
        raise LimitExceeded(f"{what} is {len(key)} characters, limit {limits.key_length}")
    if _BAD_IN_KEY.search(key):
        raise UsageError(f"{what} {key!r} has a control character or one of / \\ ? #, which are not allowed")
    return key


def stream_name(name: str, limits: Limits) -> str:
    """The key of a stream that users may write and read."""
    check_key(name, limits, what="stream key")
    if name.startswith("$"):
        raise UsageError(f"stream key {name!r} begins with $, which is kept for the library's own streams")
    return name


def input_stream(input_id: str, limits: Limits) -> str:
    """The hidden stream behind an input id."""
    return INPUT_PREFIX + check_key(input_id, limits, what="input id")
