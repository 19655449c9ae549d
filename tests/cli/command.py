"""Runs a command as a shell does, in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from asgi_realtime.cli import main


@dataclass
class Done:
    code: int
    out: str
    err: str


Command = Callable[..., Done]


def commands(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        told = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, told.out, told.err)

    return run
