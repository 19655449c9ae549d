"""The syntax of ids, tags and keys. They are checked once, where they enter."""

from __future__ import annotations

import re
from collections.abc import Iterable

from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import LimitExceeded, UsageError, shown
from asgi_realtime.core.log import HIDDEN_STREAM

INPUT_PREFIX = "$trigger.input:"
"""Inputs are hidden streams with this name and the id of the input, as in the official clients."""

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BAD_IN_TAG = re.compile(r'[\x00-\x1f\x7f-\x9f\\",\ud800-\udfff]')
_RUN_ID = re.compile(r"[A-Za-z0-9._-]+")
_BAD_IN_THREAD = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_BAD_IN_KEY = re.compile(r"[\x00-\x1f\x7f-\x9f/?#\\\ud800-\udfff]")


def check_tags(tags: str | Iterable[str] | None, limits: Limits) -> tuple[str, ...]:
    """The tags without duplicates, in order, each without surrounding blanks. Raises `UsageError`, `LimitExceeded`."""
    listed = () if tags is None else (tags,) if isinstance(tags, str) else tuple(tags)
    unique = tuple(dict.fromkeys(check_tag(tag, limits) for tag in listed))
    if len(unique) > limits.tags:
        raise LimitExceeded(f"a run has {len(unique)} tags, limit {limits.tags}")
    return unique


def check_tag(tag: str, limits: Limits) -> str:
    """The tag without surrounding blanks, which `?tags=one, two` has. Raises `UsageError`, `LimitExceeded`."""
    if not isinstance(tag, str):
        raise UsageError(f"a tag is a {type(tag).__name__}; allowed is a str")
    tag = tag.strip(" ")
    if not tag.strip():
        raise UsageError("a tag is empty")
    if len(tag) > limits.tag_length:
        raise LimitExceeded(f"tag is {len(tag)} characters, limit {limits.tag_length}")
    if _BAD_IN_TAG.search(tag):
        raise UsageError(
            f"tag {tag!r} has a control character, a comma, a double quote or a backslash, which are not allowed"
        )
    return tag


def check_key(key: str, limits: Limits, *, what: str) -> str:
    """Return a valid stream key, input id or task id. Raises `UsageError`, `LimitExceeded`."""
    if not isinstance(key, str):
        raise UsageError(f"a {what} is a {type(key).__name__}; allowed is a str")
    if not key or key in (".", ".."):
        raise UsageError(f"{what} {key!r} is not allowed; it must be usable as one segment of a URL path")
    if len(key) > limits.key_length:
        raise LimitExceeded(f"{what} is {len(key)} characters, limit {limits.key_length}")
    if _BAD_IN_KEY.search(key):
        raise UsageError(f"{what} {key!r} has a control character or one of / \\ ? #, which are not allowed")
    return key


def check_run_id(run_id: str, limits: Limits) -> str:
    """Return a valid run id of the host. Raises `UsageError`, `LimitExceeded`.

    Stricter than `check_key`: run ids are in URLs, scopes, topics and the keys of brokers, where others separate.
    """
    check_key(run_id, limits, what="run_id")
    if not _RUN_ID.fullmatch(run_id):
        raise UsageError(f"run_id {shown(run_id)} is not allowed; allowed are ASCII letters, digits, '.', '_' and '-'")
    return run_id


def check_thread(thread: str, limits: Limits) -> str:
    """Return a valid name of a thread. Raises `UsageError`, `LimitExceeded`."""
    if not isinstance(thread, str):
        raise UsageError(f"a thread is a {type(thread).__name__}; allowed is a str")
    if not thread.strip():
        raise UsageError("a thread is empty; pass a name such as 'chat:1'")
    if len(thread) > limits.key_length:
        raise LimitExceeded(f"thread is {len(thread)} characters, limit {limits.key_length}")
    if _BAD_IN_THREAD.search(thread):
        raise UsageError(f"thread {thread!r} has a control character or a lone surrogate, which are not allowed")
    return thread


def stream_name(name: str, limits: Limits) -> str:
    """The key of a stream that users can write and read. Raises as `check_key`."""
    check_key(name, limits, what="stream key")
    if name.startswith(HIDDEN_STREAM):
        raise UsageError(f"stream key {name!r} starts with {HIDDEN_STREAM}, which is reserved for inputs")
    return name


def input_stream(input_id: str, limits: Limits) -> str:
    """The name of the hidden stream of an input. Raises as `check_key`."""
    return INPUT_PREFIX + check_key(input_id, limits, what="input id")
