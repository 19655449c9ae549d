from __future__ import annotations

import threading

import pytest

from asgi_realtime import Realtime, Status
from tests.inprocess import make_realtime, until

pytestmark = pytest.mark.anyio


class Subscriber:
    """A subscription, as far as the engine sees it."""

    def __init__(self, realtime: Realtime, *, broken: bool = False) -> None:
        self.realtime = realtime
        self.broken = broken
        self.ticks: list[float] = []
        self.shut = 0
        self.shut_in: int | None = None
        realtime.subscribers.add(self)

    def tick(self, now: float, steady: float) -> None:
        self.ticks.append(now)
        if self.broken:
            raise ValueError("broken")

    def shut_down(self) -> None:
        self.shut += 1
        self.shut_in = threading.get_ident()
        self.realtime.subscribers.discard(self)


async def test_begin_shutdown_ends_subscriptions_once_and_nothing_else() -> None:
    realtime = make_realtime()
    realtime.begin_shutdown()
    assert not realtime.closing  # it was not running
    async with realtime:
        subscriber = Subscriber(realtime)
        realtime.begin_shutdown()
        realtime.begin_shutdown()
        assert not realtime.closing  # the call can come from a signal handler that interrupted any code
        await until(lambda: realtime.closing)
        assert subscriber.shut == 1
        async with realtime.open_run("r") as run:
            pass
        assert (await realtime.get_run(run)).status is Status.COMPLETED


async def test_begin_shutdown_can_be_called_from_a_thread() -> None:
    async with make_realtime() as realtime:
        subscriber = Subscriber(realtime)
        thread = threading.Thread(target=realtime.begin_shutdown)
        thread.start()
        await until(lambda: subscriber.shut)
        thread.join()
        assert realtime.closing
        assert subscriber.shut_in == threading.get_ident()


async def test_stop_ends_subscriptions() -> None:
    realtime = make_realtime()
    async with realtime:
        subscriber = Subscriber(realtime)
    assert subscriber.shut == 1


async def test_a_subscription_that_raises_does_not_stop_the_ticker(caplog: pytest.LogCaptureFixture) -> None:
    """It ended the ticker, and with it the broker."""
    realtime = make_realtime(clock=lambda: 5.0)
    async with realtime:
        broken, sound = Subscriber(realtime, broken=True), Subscriber(realtime)
        await until(lambda: len(sound.ticks) >= 3 and len(broken.ticks) >= 3)
        assert set(sound.ticks) == {5.0}
        async with realtime.open_run("r"):
            pass
    assert "the ticker failed for" in caplog.text
