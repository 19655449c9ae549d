"""Loading the runs of topic changes page by page, so that a long topic does not load all its runs at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from asgi_realtime.core.topics import Change

T = TypeVar("T")

PAGE = 32
"""Runs to load at once. Each can have megabytes of payload."""


def pages(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    return (changes[start : start + PAGE] for start in range(0, len(changes), PAGE))


async def newest(
    changes: Sequence[Change], load: Callable[[Sequence[Change]], Awaitable[list[T]]], *, limit: int
) -> list[T]:
    """The last `limit` of what `load` finds for the changes of a snapshot, in their order.

    `load` can drop changes (their run has expired, or a feed does not want it), so the pages are loaded from the end
    until there are enough.
    """
    found: list[T] = []
    for page in pages(changes[::-1]):
        found += await load(page)
        if len(found) >= limit:
            break
    return found[:limit][::-1]
