"""The suite passes on the memory broker, and on two made from it that do the same in another way."""

from __future__ import annotations

import pytest

from asgi_realtime.brokers import MemoryBroker
from asgi_realtime.testing.conformance import *  # noqa: F403
from asgi_realtime.testing.conformance import MakeBroker, run_lists
from tests.brokers.backends import DistantBroker, Memory, RepeatingBroker

for name in vars(run_lists):  # only brokers that processes share have lists of runs
    if name.startswith("test_"):
        del globals()[name]

BROKERS = {"memory": MemoryBroker, "memory:publishes-twice": RepeatingBroker, "memory:distant": DistantBroker}


@pytest.fixture(params=BROKERS)
def make_broker(request: pytest.FixtureRequest) -> MakeBroker:
    return Memory(BROKERS[request.param])
