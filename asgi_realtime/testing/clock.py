"""A clock that only moves when a test moves it, and expired tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.scopes import flatten_scopes
from asgi_realtime.tokens import TokenAuthority

if TYPE_CHECKING:
    from asgi_realtime.engine.ticker import Ticker
    from asgi_realtime.realtime import Realtime


class FakeClock:
    """Unix seconds for `Realtime(clock=…)`. It starts at the machine's time, or at `start`, and stands still.

    It applies to tokens, to the `ttl` and `delay` of runs, to retention and idempotency keys in the memory broker, and
    to the heartbeats, held polls and stall detection of subscriptions. `max_duration`, `timeout=` of calls and the
    drain of a shutdown take real time, and a Redis broker uses the clock of Redis.
    """

    def __init__(self, start: float | None = None) -> None:
        self._started_at = time.time() if start is None else start
        self._moved_s = 0.0
        self._followers: WeakSet[Ticker] = WeakSet()

    def __call__(self) -> float:
        return self._started_at + self._moved_s

    def __repr__(self) -> str:
        return f"<FakeClock {self():.3f}, moved by {self._moved_s:g} s>"

    def steady(self) -> float:
        """The monotonic clock, plus what this clock was moved by."""
        return time.monotonic() + self._moved_s

    def add_follower(self, follower: Ticker) -> None:
        """Make a ticker act at once when the clock moves. A `Realtime` adds its ticker when it starts."""
        self._followers.add(follower)

    def move(self, span: Span) -> None:
        """Move by `90`, `"15m"` or a timedelta, in tests without a loop. Each `Realtime` notices at its next tick."""
        self._moved_s += parse_span(span)

    async def advance(self, span: Span) -> None:
        """Move, and wait until everything due by then is done: runs have expired or were enqueued, and subscriptions
        were woken.

        Time moves in one step, so what this causes is timed from the new time. A `Realtime` on another loop notices at
        its next tick.
        """
        seconds = parse_span(span)
        followers = [follower for follower in self._followers if follower.running]
        for follower in followers:
            follower.tick()  # what started since the last tick is noted with the time before the move
        self._moved_s += seconds
        for follower in followers:
            await follower.once()
            follower.tick()


def expired_token(realtime: Realtime, *, scopes: Mapping[str, Any] | Sequence[str]) -> str:
    """A public access token that expired a minute ago. For scopes see `create_public_token`."""
    past = TokenAuthority(realtime.tokens._secrets, clock=lambda: realtime.clock() - 120)
    return past.mint(flatten_scopes(scopes), expires_in_s=60)
