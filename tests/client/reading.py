"""One way to use both clients: a test holds for `SyncRealtimeClient`, and for `RealtimeClient` on both loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from asgi_realtime.client import RealtimeClient, SyncRealtimeClient

KINDS = ["sync", "asyncio", "trio"]

Call = Callable[[Any], Any]
"""From a client of either kind to its subscription."""


@dataclass
class Surroundings:
    """A clock that only pauses move, and dice that always fall alike. `pauses` are those that were asked for."""

    dice: float = 1.0
    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def sleep(self, seconds: float, closed: object = None) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)
        await anyio.lowlevel.checkpoint()


@dataclass
class Told:
    """What a subscription gave: `error` is what it raised, or None if it ended."""

    items: list[Any] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    @property
    def error(self) -> Exception | None:
        return self.errors[-1] if self.errors else None


def read(
    kind: str,
    url: str,
    token: Any,
    call: Call,
    *,
    on_item: Callable[[Any], None] | None = None,
    take: int | None = None,
    ask_again: int = 0,
    surroundings: Surroundings | None = None,
    follow_redirects: bool = False,
    **options: Any,
) -> Told:
    """Read until the end, an error or `take` items. After an error ask again so many times. `on_item` hears of each."""
    told = Told()
    if kind == "sync":
        _read(told, url, token, call, on_item, take, ask_again, surroundings, follow_redirects, options)
    else:

        async def main() -> None:
            with anyio.fail_after(60):
                await _aread(told, url, token, call, on_item, take, ask_again, surroundings, follow_redirects, options)

        anyio.run(main, backend=kind)
    return told


def _read(
    told: Told,
    url: str,
    token: Any,
    call: Call,
    on_item: Callable[[Any], None] | None,
    take: int | None,
    ask_again: int,
    surroundings: Surroundings | None,
    follow_redirects: bool,
    options: dict[str, Any],
) -> None:
    http = httpx.Client(follow_redirects=True) if follow_redirects else None
    with SyncRealtimeClient(url, token, http=http, **options) as client:
        if surroundings is not None:
            client._sleep, client._clock = surroundings.sleep, lambda: surroundings.now
            client._random = lambda: surroundings.dice
        with call(client) as subscription:
            while len(told.items) != take:
                try:
                    item = next(subscription)
                except StopIteration:
                    break
                except Exception as exc:
                    told.errors.append(exc)
                    if len(told.errors) > ask_again:
                        break
                    continue
                told.items.append(item)
                if on_item is not None:
                    on_item(item)
    if http is not None:
        assert not http.is_closed
        http.close()


async def _aread(
    told: Told,
    url: str,
    token: Any,
    call: Call,
    on_item: Callable[[Any], None] | None,
    take: int | None,
    ask_again: int,
    surroundings: Surroundings | None,
    follow_redirects: bool,
    options: dict[str, Any],
) -> None:
    http = httpx.AsyncClient(follow_redirects=True) if follow_redirects else None
    async with RealtimeClient(url, token, http=http, **options) as client:
        if surroundings is not None:
            client._sleep, client._clock = surroundings.asleep, lambda: surroundings.now
            client._random = lambda: surroundings.dice
        async with call(client) as subscription:
            while len(told.items) != take:
                try:
                    item = await anext(subscription)
                except StopAsyncIteration:
                    break
                except Exception as exc:
                    told.errors.append(exc)
                    if len(told.errors) > ask_again:
                        break
                    continue
                told.items.append(item)
                if on_item is not None:
                    await anyio.to_thread.run_sync(on_item, item)
    if http is not None:
        assert not http.is_closed
        await http.aclose()
