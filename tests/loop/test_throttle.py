from __future__ import annotations

from asgi_realtime.loop import throttle
from asgi_realtime.loop.throttle import Throttle


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_flood_is_counted_and_reported_once() -> None:
    clock = Clock()
    limited = Throttle(burst=2, period_s=10.0, clock=clock)
    assert [limited.admit("a") for _ in range(5)] == ["", "", None, None, None]
    assert limited.admit("b") == ""
    clock.seconds = 9.9
    assert limited.admit("a") is None
    clock.seconds = 10.0
    assert limited.admit("a") == " (4 more like this were not logged)"
    assert [limited.admit("a") for _ in range(2)] == ["", None]
    clock.seconds = 30.0
    assert limited.admit("a") == " (1 more like this were not logged)"
    assert limited.admit("b") == ""


def test_the_number_of_kinds_is_bounded() -> None:
    limited = Throttle(clock=Clock())
    for number in range(3 * throttle._MAX_KINDS):
        assert limited.admit(str(number)) == ""
    assert len(limited._kinds) <= throttle._MAX_KINDS
