"""Reads with either client, so that one test covers `SyncRealtimeClient`, and `RealtimeClient` on both loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import anyio
import httpx

from asgi_realtime.client import RealtimeClient, SyncRealtimeClient
from asgi_realtime.client.transport import Transport

KINDS = ["sync", "asyncio", "trio"]


def spread(cases: list[Any]) -> list[tuple[Any, ...]]:
    """Pair each case with one kind of client, in turn: the protocol, which decides these, is the same for all kinds."""
    return [(kind, *case) for kind, case in zip(cycle(KINDS), cases, strict=False)]


Call = Callable[[Any], Any]
"""Takes a client of either kind and returns its subscription."""


@dataclass
class FakeTime:
    """A clock that only pauses move, and a constant in place of random numbers. `pauses` records what was slept."""

    random: float = 1.0
    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def install(self, transport: Transport) -> None:
        transport.clock, transport.random, transport.sleep = lambda: self.now, lambda: self.random, self.sleep

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        await anyio.lowlevel.checkpoint()


@dataclass
class Outcome:
    """What a subscription yielded and raised. Reading stops after `take` items, or one error more than `retries`."""

    take: int | None
    retries: int
    items: list[Any] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    @property
    def error(self) -> Exception | None:
        """The last error. None if the subscription ended."""
        return self.errors[-1] if self.errors else None

    @property
    def wants_more(self) -> bool:
        return len(self.items) != self.take and len(self.errors) <= self.retries


def read(
    kind: str,
    url: str,
    token: Any,
    call: Call,
    *,
    on_item: Callable[[Any], None] = lambda item: None,
    take: int | None = None,
    retries: int = 0,
    fake_time: FakeTime | None = None,
    follow_redirects: bool = False,
    **options: Any,
) -> Outcome:
    """Read until the end, `take` items, or more errors than `retries`. `on_item` is called with each item."""
    outcome = Outcome(take, retries)
    if follow_redirects:
        options["http"] = httpx.AsyncClient(follow_redirects=True)
    if kind == "sync":
        with SyncRealtimeClient(url, token, **options) as client:
            if fake_time is not None:
                fake_time.install(client._client._transport)
            _read(client, call, on_item, outcome)
        return outcome

    async def main() -> None:
        with anyio.fail_after(60):
            async with RealtimeClient(url, token, **options) as client:
                if fake_time is not None:
                    fake_time.install(client._transport)
                await _aread(client, call, on_item, outcome)
            if "http" in options:
                assert not options["http"].is_closed
                await options["http"].aclose()

    anyio.run(main, backend=kind)
    return outcome


def _read(client: SyncRealtimeClient, call: Call, on_item: Callable[[Any], None], outcome: Outcome) -> None:
    with call(client) as subscription:
        while outcome.wants_more:
            try:
                item = next(subscription)
            except StopIteration:
                break
            except Exception as exc:
                outcome.errors.append(exc)
            else:
                outcome.items.append(item)
                on_item(item)


async def _aread(client: RealtimeClient, call: Call, on_item: Callable[[Any], None], outcome: Outcome) -> None:
    async with call(client) as subscription:
        while outcome.wants_more:
            try:
                item = await anext(subscription)
            except StopAsyncIteration:
                break
            except Exception as exc:
                outcome.errors.append(exc)
            else:
                outcome.items.append(item)
                await anyio.to_thread.run_sync(on_item, item)
