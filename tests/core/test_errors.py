"""Errors as values: process pools and task queues pickle them."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest

import asgi_realtime
import asgi_realtime.client
from asgi_realtime.client import UnexpectedAnswer
from asgi_realtime.core.errors import (
    LimitExceeded,
    ProducerGap,
    RealtimeError,
    ServerShutdown,
    StreamGap,
    TaskError,
    ThreadBusy,
    shown,
)
from asgi_realtime.core.run_errors import RunEnded, VersionConflict
from asgi_realtime.core.runs import Status, StoredRecord

RECORD = StoredRecord(id="run_1", task="chat", status=Status.FAILED, created_at_ms=0, updated_at_ms=0)
MORE: dict[type[RealtimeError], dict[str, Any]] = {
    LimitExceeded: {"status": 413},
    ProducerGap: {"expected": 5},
    RunEnded: {"record": RECORD},
    StreamGap: {"requested": 0, "first": 5},
    TaskError: {"data": {"a": [1]}},
    ThreadBusy: {"run_id": "run_1"},
    UnexpectedAnswer: {"status": 404, "code": "not_found"},
    VersionConflict: {"current": RECORD},
}
"""Arguments after the message."""


def tree(base: type[RealtimeError]) -> list[type[RealtimeError]]:
    return [base, *(found for child in base.__subclasses__() for found in tree(child))]


PUBLIC = [cls for cls in dict.fromkeys(tree(RealtimeError)) if cls.__module__.startswith("asgi_realtime.")]


def made(cls: type[RealtimeError]) -> RealtimeError:
    return cls("a message", **next((more for known, more in MORE.items() if issubclass(cls, known)), {}))


def test_all_exported_errors_are_tested() -> None:
    exported = {
        value
        for module in (asgi_realtime, asgi_realtime.client)
        for value in map(vars(module).get, module.__all__)
        if isinstance(value, type) and issubclass(value, RealtimeError)
    }
    assert exported <= set(PUBLIC)


def test_errors_survive_pickling() -> None:
    """`StreamGap` and others could not be unpickled, which breaks a whole process pool."""
    for error, protocol in product(map(made, PUBLIC), range(pickle.HIGHEST_PROTOCOL + 1)):
        error.add_note("in a worker")
        found = pickle.loads(pickle.dumps(error, protocol))
        assert type(found) is type(error)
        assert (found.args, vars(found)) == (error.args, vars(error))
        assert (str(found), found.status, found.code) == (str(error), error.status, error.code)


def test_errors_can_be_copied() -> None:
    for error in map(made, PUBLIC):
        found = copy.copy(error)
        assert type(found) is type(error)
        assert (found.args, vars(found)) == (error.args, vars(error))


def test_a_shutdown_needs_no_message() -> None:
    assert str(ServerShutdown()) == "the server was shut down"
    assert pickle.loads(pickle.dumps(ServerShutdown())).args == ("the server was shut down",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a'b", '"a\'b"'),
        ("x" * 80, f"'{'x' * 80}'"),
        ("x" * 81, f"'{'x' * 80}'…"),
        (1, "1"),
        (1.5, "1.5"),
        (True, "True"),
        (None, "None"),
        ([1], "a list"),
        (b"x", "a bytes"),
    ],
)
def test_error_messages_show_values_briefly(value: object, text: str) -> None:
    assert shown(value) == text
