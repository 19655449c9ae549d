"""What `protocol="ag-ui"` sends is valid for the models of the package `ag-ui-protocol`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from asgi_realtime.core.log import End
from tests.ai.test_conversion import AG_UI, entries, parse, sent, streams
from tests.models.needs import need

REASONS = ["complete", "canceled", "failed", "crashed", "timed_out", "expired", "lost"]


@pytest.fixture(scope="module")
def adapter() -> Any:
    event = need("ag_ui.core").Event
    return need("pydantic").TypeAdapter(event)


@given(streams)
def test_every_event_of_a_run_is_valid(adapter: Any, items: list[Any]) -> None:
    for reason in REASONS:
        for event, _ in parse(sent(AG_UI, entries(items), -1, End(reason), [9])):
            adapter.validate_python(event)


@pytest.mark.parametrize(
    "chunk",
    [
        {"type": "source-url", "sourceId": "1", "url": "https://example.com"},
        {"type": "file", "url": "data:,x", "mediaType": "text/plain"},
        {"type": "message-metadata", "messageMetadata": {"model": "m"}},
        {"type": "tool-approval-request", "toolCallId": "c", "approvalId": "a"},
        {"type": "tool-input-error", "toolCallId": "c", "toolName": "add", "input": "{", "errorText": "bad"},
        {"type": "tool-output-denied", "toolCallId": "c"},
        {"type": "error", "errorText": "no credit"},
        {"type": "abort"},
    ],
)
def test_every_part_becomes_valid_events(adapter: Any, chunk: Any) -> None:
    for event, _ in parse(sent(AG_UI, entries([chunk]), -1, End("complete"), [1])):
        adapter.validate_python(event)
