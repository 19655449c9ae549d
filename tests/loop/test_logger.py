from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import asgi_realtime
from asgi_realtime.loop.logger import client_logger, logger


def test_the_messages_of_a_handler_do_not_repeat_the_name(caplog: pytest.LogCaptureFixture) -> None:
    """With `%(name)s: %(message)s` the lines were `asgi_realtime: asgi_realtime: …`."""
    logger.warning("run %s is %d %% done", "run_1", 5)
    client_logger.warning("gave up")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("asgi_realtime", "run run_1 is 5 % done"),
        ("asgi_realtime.client", "gave up"),
    ]
    assert caplog.records[0].filename == "test_logger.py"
    assert caplog.records[0].args == ("run_1", 5)


@pytest.mark.slow
def test_without_a_handler_messages_start_with_the_name() -> None:
    """Python prints the bare messages of warnings then."""
    program = """
        from asgi_realtime.loop.logger import client_logger, logger
        logger.warning("run %s is %d %% done", "run_1", 5)
        client_logger.warning("gave up")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "asgi_realtime: run run_1 is 5 % done\nasgi_realtime: gave up\n"


def test_no_module_has_a_logger_of_its_own() -> None:
    package = Path(asgi_realtime.__file__).parent
    own = [path.name for path in package.rglob("*.py") if "logger = logging.getLogger(" in path.read_text("utf-8")]
    assert own == []
