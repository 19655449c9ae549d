from __future__ import annotations

import anyio
import pytest

from asgi_realtime import BrokerUnavailable
from asgi_realtime.loop.retry import Retry
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio


class Calls:
    """Fails `failures` times, then returns 7."""

    def __init__(self, failures: int, error: type[Exception] = BrokerUnavailable) -> None:
        self.count = 0
        self._failures = failures
        self._error = error

    async def __call__(self) -> int:
        self.count += 1
        if self.count <= self._failures:
            raise self._error("no answer")
        return 7


async def test_a_call_is_repeated_until_it_succeeds() -> None:
    calls = Calls(2)
    assert await Retry(5)(calls) == 7
    assert calls.count == 3


async def test_the_error_is_raised_when_the_patience_is_over() -> None:
    calls = Calls(100)
    with pytest.raises(BrokerUnavailable):
        await Retry(0.1)(calls)
    assert calls.count == 2


async def test_other_errors_are_not_retried() -> None:
    calls = Calls(1, ValueError)
    with pytest.raises(ValueError):
        await Retry(5)(calls)
    assert calls.count == 1


async def test_shortening_the_patience_ends_calls_in_progress() -> None:
    retry = Retry(1000)
    calls = Calls(10**9)
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as group:
            group.start_soon(shorten, retry, calls)
            with pytest.raises(BrokerUnavailable):
                await retry(calls)


async def shorten(retry: Retry, calls: Calls) -> None:
    while calls.count < 3:  # noqa: ASYNC110 - nothing signals a call
        await anyio.sleep(0.001)
    retry.shorten(0)


async def test_a_reset_restores_the_patience() -> None:
    retry = Retry(5)
    retry.shorten(0)
    with pytest.raises(BrokerUnavailable):
        await retry(Calls(1))
    retry.reset()
    assert await retry(Calls(1)) == 7
