"""A clock that stands still until a test moves it, and tokens whose time is over."""

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
    """Unix seconds for `Realtime(clock=…)`. It begins at the machine's time, or at `start`, and stands still.

    What goes by it: tokens, a run's `ttl` and `delay`, retention and idempotency keys in the memory broker, and of
    subscriptions the heartbeat, the hold of a poll and the drop of a client that does not read. What does not, and
    takes real time: `max_duration`, `timeout=` of calls, the drain of a shutdown; and a Redis broker has Redis's clock.
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
        """Seconds for spans: real ones, and what this was moved by."""
        return time.monotonic() + self._moved_s

    def add_follower(self, follower: Ticker) -> None:
        """Have it act at once when this is moved; what a `Realtime` does with its clock when it starts."""
        self._followers.add(follower)

    def move(self, span: Span) -> None:
        """Move on by `90`, `"15m"`, a timedelta. Each `Realtime` notices at its next tick. For tests without a loop."""
        self._moved_s += parse_span(span)

    async def advance(self, span: Span) -> None:
        """Move on, and have all that became due done: when this returns, runs have expired or are handed over, and
        subscriptions are woken to send what is to be sent.

        It is one jump: what follows from that counts from the new time. A `Realtime` that runs on another loop notices
        at its next tick.
        """
        seconds = parse_span(span)
        followers = [follower for follower in self._followers if follower.running]
        for follower in followers:
            follower.tick()  # so that what began since the last tick has begun before the jump
        self._moved_s += seconds
        for follower in followers:
            await follower.once()
            follower.tick()


def expired_token(realtime: Realtime, *, scopes: Mapping[str, Any] | Sequence[str]) -> str:
    """A public access token that was good until a minute ago. Scopes are as in `create_public_token`."""
    past = TokenAuthority(realtime.tokens._secrets, clock=lambda: realtime.clock() - 120)
    return past.mint(flatten_scopes(scopes), expires_in_s=60)
