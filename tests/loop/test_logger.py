from __future__ import annotations

from pathlib import Path

import pytest

import asgi_realtime
from asgi_realtime.loop.logger import client_logger, logger


def test_messages_start_with_the_name_and_keep_their_arguments(caplog: pytest.LogCaptureFixture) -> None:
    """A host without logging configuration prints warnings without the name of their logger."""
    logger.warning("run %s is %d %% done", "run_1", 5)
    client_logger.warning("gave up")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("asgi_realtime", "asgi_realtime: run run_1 is 5 % done"),
        ("asgi_realtime.client", "asgi_realtime: gave up"),
    ]
    assert caplog.records[0].filename == "test_logger.py"
    assert caplog.records[0].args == ("run_1", 5)


def test_no_module_has_a_logger_of_its_own() -> None:
    package = Path(asgi_realtime.__file__).parent
    own = [path.name for path in package.rglob("*.py") if "logger = logging.getLogger(" in path.read_text("utf-8")]
    assert own == []
