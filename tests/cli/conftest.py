from __future__ import annotations

import pytest

from tests.cli.command import Command, commands
from tests.inprocess import SECRET


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("REALTIME_SECRET_KEY", SECRET)
    monkeypatch.delenv("REALTIME_ACCESS_TOKEN", raising=False)
    return commands(capsys)
