from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from asgi_realtime.asgi.phases import OPENING, TRANSITIONS, Phase
from asgi_realtime.asgi.subscription import SubscriptionResponse
from asgi_realtime.core.config import Cors
from tests.asgi.fake_host import FakeHost


@pytest.fixture
def host() -> FakeHost:
    return FakeHost(cors=Cors())


class CheckedPhase:
    """Takes the place of the slot `_phase` and checks each store against the table."""

    def __init__(self, slot: Any) -> None:
        self._slot = slot
        self.violations: list[tuple[Phase | None, Phase]] = []

    def __get__(self, subscription: Any, owner: Any = None) -> Any:
        return self._slot.__get__(subscription, owner)

    def __set__(self, subscription: Any, phase: Phase) -> None:
        try:
            before: Phase | None = self._slot.__get__(subscription)
        except AttributeError:
            before = None
        if phase not in (frozenset({OPENING}) if before is None else TRANSITIONS[before]):
            self.violations.append((before, phase))
        self._slot.__set__(subscription, phase)


@pytest.fixture(autouse=True)
def checked_phase(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test here checks the phases that its subscriptions go through."""
    checked = CheckedPhase(vars(SubscriptionResponse)["_phase"])
    monkeypatch.setattr(SubscriptionResponse, "_phase", checked)
    yield
    assert checked.violations == []
