from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from asgi_realtime.asgi.trigger_dev import shapes
from asgi_realtime.asgi.trigger_dev.shapes import ShapeCursor
from asgi_realtime.core.metadata import encode_metadata
from asgi_realtime.core.run_columns import REQUIRED_COLUMNS, RUN_COLUMNS
from asgi_realtime.core.runs import RunError, Status, StoredRecord

QUEUED = StoredRecord(
    id="run_1", task="chat", status=Status.QUEUED, created_at_ms=1_767_323_045_678, updated_at_ms=1_767_323_045_678
)
FULL = msgspec.structs.replace(
    QUEUED,
    status=Status.COMPLETED,
    queued_at_ms=1_767_323_045_678,
    started_at_ms=1_767_323_046_000,
    completed_at_ms=1_767_323_047_001,
    updated_at_ms=1_767_323_047_001,
    delay_until_ms=1_767_323_046_000,
    ttl_s=600.0,
    tags=("a", "b"),
    metadata_json=encode_metadata({"progress": 0.5}),
    payload_json=b'{"prompt":"hi"}',
    output_json=b'{"text":"ho"}',
    streams=("default",),
    idempotency_key="key",
)
NUMBERS = {"number", "usageDurationMs", "costInCents", "baseCostInCents", "isTest"}


def columns(record: StoredRecord, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    message = json.loads(shapes.row(record, skip=skip))
    assert message["headers"] == {"operation": "insert"}
    value: dict[str, Any] = message["value"]
    return value


@pytest.mark.parametrize("record", [QUEUED, FULL])
def test_values_are_text_or_null_and_numbers_are_never_null(record: StoredRecord) -> None:
    row = columns(record)
    assert all(value is None or isinstance(value, str) for value in row.values())
    assert not [name for name in NUMBERS | REQUIRED_COLUMNS if row[name] is None]
    assert row.keys() == json.loads(shapes.schema()).keys()
    assert tuple(row) == RUN_COLUMNS


def test_a_full_record() -> None:
    assert columns(FULL) == {
        "id": "run_1",
        "friendlyId": "run_1",
        "taskIdentifier": "chat",
        "status": "COMPLETED_SUCCESSFULLY",
        "createdAt": "2026-01-02T03:04:05.678",
        "updatedAt": "2026-01-02T03:04:07.001",
        "queuedAt": "2026-01-02T03:04:05.678",
        "startedAt": "2026-01-02T03:04:06.000",
        "completedAt": "2026-01-02T03:04:07.001",
        "delayUntil": "2026-01-02T03:04:06.000",
        "expiredAt": None,
        "number": "0",
        "isTest": "f",
        "usageDurationMs": "1001",
        "costInCents": "0",
        "baseCostInCents": "0",
        "ttl": "600s",
        "payload": '{"prompt":"hi"}',
        "payloadType": "application/json",
        "metadata": '{"progress":0.5}',
        "metadataType": "application/json",
        "output": '{"text":"ho"}',
        "outputType": "application/json",
        "runTags": '{"a","b"}',
        "error": None,
        "realtimeStreams": '{"default"}',
        "idempotencyKey": "key",
    }


def test_every_status_has_a_wire_form() -> None:
    assert shapes.WIRE_STATUS.keys() == set(Status)
    for status in Status:
        assert columns(msgspec.structs.replace(QUEUED, status=status))["status"] == shapes.WIRE_STATUS[status]


def test_an_expired_run_has_its_time() -> None:
    expired = msgspec.structs.replace(QUEUED, status=Status.EXPIRED, completed_at_ms=1_767_323_047_001)
    assert columns(expired)["expiredAt"] == "2026-01-02T03:04:07.001"


def test_array_elements_are_quoted() -> None:
    tricky = msgspec.structs.replace(QUEUED, streams=("NULL", "a,b", "{}", 'q"q', "b\\b", ""))
    assert columns(tricky)["realtimeStreams"] == r'{"NULL","a,b","{}","q\"q","b\\b",""}'
    assert columns(QUEUED)["runTags"] == "{}"


def test_an_error_has_a_type_that_clients_know() -> None:
    failed = msgspec.structs.replace(QUEUED, status=Status.FAILED, error=RunError("TaskError", 'no "luck"'))
    assert json.loads(columns(failed)["error"]) == {
        "type": "BUILT_IN_ERROR",
        "name": "TaskError",
        "message": 'no "luck"',
        "stackTrace": "",
    }


def test_a_superjson_payload_is_sent_back_with_its_types() -> None:
    sent = msgspec.structs.replace(
        QUEUED, payload_json=b'{"at":"2026-01-02T03:04:05.678Z"}', payload_meta_json=b'{"values":{"at":["Date"]}}'
    )
    row = columns(sent)
    assert row["payloadType"] == "application/super+json"
    assert json.loads(row["payload"]) == {
        "json": {"at": "2026-01-02T03:04:05.678Z"},
        "meta": {"values": {"at": ["Date"]}},
    }


def test_columns_are_skipped_unless_clients_require_them() -> None:
    skip = shapes.skippable_columns(["output", "id", "payload", "updatedAt", "unknown", "payload"])
    assert skip == ("payload", "output")
    assert columns(FULL).keys() - columns(FULL, skip).keys() == {"payload", "output"}
    assert json.loads(shapes.schema(skip=skip)).keys() == columns(FULL, skip).keys()


def test_the_schema_has_types_and_arrays() -> None:
    schema = json.loads(shapes.schema())
    assert schema["runTags"] == {"type": "text", "dims": 1}
    assert schema["usageDurationMs"] == {"type": "int4"}
    assert shapes.schema().isascii()


def test_a_body_ends_with_up_to_date() -> None:
    up_to_date = {"headers": {"control": "up-to-date"}}
    assert json.loads(b"".join(shapes.body([]))) == [up_to_date]
    rows = [shapes.row(QUEUED), shapes.row(FULL)]
    body = json.loads(b"".join(shapes.body(rows)))
    assert body == [*map(json.loads, rows), up_to_date]
    assert body[0]["key"] == body[1]["key"]
    assert json.loads(shapes.MUST_REFETCH) == [{"headers": {"control": "must-refetch"}}]


def test_a_cursor_survives_a_round_trip() -> None:
    cursor = ShapeCursor("9f3c01d2", 1_767_323_045_678, 17)
    assert (cursor.handle, cursor.offset) == ("9f3c01d2.1767323045678", "17_0")
    assert ShapeCursor.parse(cursor.handle, cursor.offset) == cursor


@pytest.mark.parametrize(
    ("handle", "offset"),
    [
        ("", "1_0"),
        ("9f3c01d2", "1_0"),
        (".5", "1_0"),
        ("9f3c01d2.x", "1_0"),
        ("9f3c01d2.5-next", "1_0"),
        ("57129943-1767323045678", "1_0"),
        ("9f3c01d2.5", "1"),
        ("9f3c01d2.5", "1_1"),
        ("9f3c01d2.5", "-1_0"),
        ("9f3c01d2.5", "x_0"),
        ("9f3c01d2.5", "1" * 19 + "_0"),
        ("9f3c01d2.٣", "1_0"),
    ],
)
def test_a_foreign_cursor_is_none(handle: str, offset: str) -> None:
    assert ShapeCursor.parse(handle, offset) is None
