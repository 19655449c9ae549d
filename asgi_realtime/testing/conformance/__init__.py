"""The suite that every broker backend passes: one promise of `asgi_realtime.brokers.Broker` a test.

Take it into a test module of your own, with a fixture that opens your broker::

    from asgi_realtime.testing.conformance import *

    @pytest.fixture
    def make_broker() -> MakeBroker:
        @asynccontextmanager
        async def opened(**settings):                       # limits=, retention=, timeouts=
            clock = Clock()
            async with MyBroker(url, clock=clock, **settings) as broker, MyBroker(url, ...) as peer:
                yield Backend(broker=broker, peer=peer, now=clock, advance=clock.advance, held=...)

        return opened

    @pytest.fixture(params=["asyncio", "trio"])             # the loop libraries that your broker runs on
    def anyio_backend(request): ...

Each call of `make_broker` opens an empty storage of its own. `peer` is that storage as another process sees it, and
the tests write here and there; for a broker that is not shared it is the broker itself. Without a clock that can be
moved leave `now` and `advance` out: the suite then sleeps for a few seconds in all. `held` counts what the two brokers
hold open for readers, to find what a cancelled reader left behind.

The tests need pytest, hypothesis and anyio's pytest plugin. They wait for conditions, never for a time, under a guard
of 10 seconds (`make_broker.guard_s`, if your fixture's function has that attribute, says otherwise). A backend may
deliver changes to topics more than once and may trim roughly; it may not lose, reorder or invent anything.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in ("due", "kit", "live", "runs", "streams", "topics")))

from asgi_realtime.testing.conformance.due import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.kit import Backend, MakeBroker  # noqa: E402
from asgi_realtime.testing.conformance.live import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.runs import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.streams import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.topics import *  # noqa: E402, F403

__all__ = ["Backend", "MakeBroker"]
__all__ += sorted(name for name in globals() if name.startswith("test_"))
