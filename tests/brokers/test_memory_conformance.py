"""The memory broker passes the suite, on both loop libraries."""

from __future__ import annotations

import pytest

from asgi_realtime.testing.conformance import *  # noqa: F403
from asgi_realtime.testing.conformance import MakeBroker
from tests.brokers.backends import Memory


@pytest.fixture
def make_broker() -> MakeBroker:
    return Memory()
