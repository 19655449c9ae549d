"""The suite that every broker backend passes: one test for each promise of `asgi_realtime.brokers.Broker`.

Import it into one of your test modules, together with a fixture that opens your broker::

    from asgi_realtime.testing.conformance import *

    @pytest.fixture
    def make_broker() -> MakeBroker:
        @asynccontextmanager
        async def open(**settings):                       # limits=, retention=, timeouts=
            clock = Clock()
            async with MyBroker(url, clock=clock, **settings) as broker, MyBroker(url, ...) as peer:
                yield Backend(broker=broker, peer=peer, now=clock, advance=clock.advance, held=...)

        return open

    @pytest.fixture(params=["asyncio", "trio"])             # the loops that your broker runs on
    def anyio_backend(request): ...

Each call of `make_broker` opens an empty storage. `peer` is that storage as another process sees it, and the tests
write through both; for a broker that is not shared it is the broker itself. If the broker's clock cannot be moved,
leave out `now` and `advance`: the suite then sleeps for a few seconds in all. `held` counts what the two brokers hold
for readers, so that the suite finds what a cancelled reader leaves behind.

The tests need pytest, hypothesis and anyio's pytest plugin. They wait for conditions, within 10 seconds each
(`make_broker.guard_s` changes that). A backend may deliver changes to topics more than once and may trim roughly; it
must not lose, reorder or invent anything.
"""

from __future__ import annotations

import pkgutil

import pytest

pytest.register_assert_rewrite(*(part.name for part in pkgutil.iter_modules(__path__, f"{__name__}.")))

from asgi_realtime.testing.conformance.claims import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.due import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.ended_runs import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.kit import Backend, MakeBroker  # noqa: E402
from asgi_realtime.testing.conformance.live import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.producers import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.run_lists import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.runs import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.stream_limits import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.streams import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.topics import *  # noqa: E402, F403
from asgi_realtime.testing.conformance.watchers import *  # noqa: E402, F403

__all__ = ["Backend", "MakeBroker"]
__all__ += sorted(name for name in globals() if name.startswith("test_"))
