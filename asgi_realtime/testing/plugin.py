"""The pytest fixtures of `asgi_realtime.testing`, found by pytest through an entry point.

They are sync and return what the test then opens, so they work under pytest-asyncio and anyio's plugin.
Nothing happens unless a test asks for one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_realtime import Realtime
    from asgi_realtime.testing.client import AsgiClient
    from asgi_realtime.testing.clock import FakeClock

SECRET = "a secret of the tests, of 32 bytes or more"


@pytest.fixture
def realtime_clock() -> FakeClock:
    """A `FakeClock`: `await realtime_clock.advance("15m")`."""
    from asgi_realtime.testing.clock import FakeClock

    return FakeClock()


@pytest.fixture
def realtime_factory(realtime_clock: FakeClock) -> Callable[..., Realtime]:
    """Makes a `Realtime` that goes by `realtime_clock`: memory broker, one secret, quick timeouts, no signal handlers.

    Its arguments are those of `Realtime` and come before these.
    """
    from asgi_realtime import Realtime, Timeouts

    def make(**settings: Any) -> Realtime:
        quick = Timeouts(tick=0.02, drain=0.1, cancel=1.0, close=1.0)
        usual: dict[str, Any] = {"secret_key": SECRET, "signals": False, "timeouts": quick, "clock": realtime_clock}
        return Realtime(**(usual | settings))

    return make


@pytest.fixture
def realtime_client() -> Callable[..., AsgiClient]:
    """`AsgiClient`: `async with realtime_client(app) as client:` starts the app and gives live responses."""
    from asgi_realtime.testing.client import AsgiClient

    return AsgiClient
