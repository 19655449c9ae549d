"""Runs a command in this process, as a shell would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from asgi_realtime.cli import main


@dataclass
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


def commands(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        output = capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return Result(exited.value.code, output.out, output.err)

    return run
