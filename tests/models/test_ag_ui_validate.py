"""What the conformance validator of AG-UI, a package of its own, says of our responses."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_realtime.testing import EventParser
from tests.e2e.answers import ANSWERS, End, body_of
from tests.models.needs import need


@pytest.fixture(scope="module")
def validator() -> Any:
    return need("ag_ui_validate")


def findings(validator: Any, body: bytes) -> list[str]:
    """Its errors and warnings."""
    check = validator.create_validator()
    for event in EventParser().feed(body):
        check.feed(event.data)
    check.finalize()
    return [finding.message for finding in check.report().diagnostics if finding.severity != "info"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_answer_conforms(validator: Any, answer: str) -> None:
    found = findings(validator, body_of(ANSWERS[answer], "ag-ui"))
    assert all("do not parse as JSON" in finding for finding in found)
    assert bool(found) == (answer == "a tool input that is wrong")  # the model is, and that is shown


@pytest.mark.parametrize("end", ["failed", "canceled"])
def test_every_ending_conforms(validator: Any, end: End) -> None:
    assert findings(validator, body_of(ANSWERS["text that is not closed"], "ag-ui", how=end)) == []


def test_the_validator_sees_an_answer_that_is_cut_off(validator: Any) -> None:
    body, _, _ = body_of(ANSWERS["text"], "ag-ui").rpartition(b"data: ")
    assert findings(validator, body) != []
