from __future__ import annotations

import pytest

from asgi_realtime.core.config import Cors
from tests.asgi.standin import StandIn


@pytest.fixture
def host() -> StandIn:
    return StandIn(cors=Cors())
