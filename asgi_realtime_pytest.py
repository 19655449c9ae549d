"""The pytest fixtures of `asgi_realtime.testing`, which pytest finds through an entry point.

They are plain functions whose results the test opens, so they work with pytest-asyncio and with anyio's plugin.
The plugin does nothing unless a test requests one of them. It is a module outside of the package, because pytest loads
it in every project of the environment, and a module of the package would import the whole library there (0.3 s).
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
    """Creates a `Realtime` on `realtime_clock`: memory broker, a test secret, short timeouts, no signal handlers.

    It accepts the arguments of `Realtime`, which override these.
    """
    from asgi_realtime import Realtime, Timeouts

    def make(**settings: Any) -> Realtime:
        quick = Timeouts(tick=0.02, drain=0.1, cancel=1.0, close=1.0)
        defaults: dict[str, Any] = {"secret_key": SECRET, "signals": False, "timeouts": quick, "clock": realtime_clock}
        return Realtime(**(defaults | settings))

    return make


@pytest.fixture
def realtime_client() -> Callable[..., AsgiClient]:
    """`AsgiClient`: `async with realtime_client(app) as client:` starts the app; its responses are live."""
    from asgi_realtime.testing.client import AsgiClient

    return AsgiClient
