from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from asgi_realtime.core.config import parse_span
from asgi_realtime.core.metadata import encode_metadata
from asgi_realtime.core.run_json import run_json, skippable_fields
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.core.runs import BatchMember, RunError, Status, StoredRecord

REQUIRED = {
    *("id", "status", "taskIdentifier", "isQueued", "isExecuting", "isWaiting", "isCompleted", "isSuccess", "isFailed"),
    *("isCancelled", "isTest", "createdAt", "updatedAt", "tags", "costInCents", "baseCostInCents", "durationMs"),
    *("depth", "triggerFunction", "relatedRuns"),
}
QUEUED = StoredRecord(
    id="run_1", task="chat", status=Status.QUEUED, created_at_ms=1_767_323_045_678, updated_at_ms=1_767_323_045_678
)
FULL = msgspec.structs.replace(
    QUEUED,
    status=Status.COMPLETED,
    started_at_ms=1_767_323_046_000,
    completed_at_ms=1_767_323_047_001,
    updated_at_ms=1_767_323_047_001,
    delay_until_ms=1_767_323_046_000,
    ttl_s=600.0,
    tags=("a", "b"),
    metadata_json=encode_metadata({"progress": 0.5}),
    payload_json=b'{"prompt":"hi"}',
    output_json=b"null",
    streams=("default",),
    idempotency_key="key",
    batch=BatchMember("batch_1", 0, 2),
    depth=1,
)


def as_dict(record: StoredRecord, **options: Any) -> dict[str, Any]:
    data = run_json(record, **options)
    assert b"\n" not in data
    decoded: dict[str, Any] = json.loads(data)
    return decoded


@pytest.mark.parametrize("record", [QUEUED, FULL])
def test_required_fields_are_present_and_no_optional_field_is_null(record: StoredRecord) -> None:
    run = as_dict(record)
    assert run.keys() >= REQUIRED
    assert [name for name, value in run.items() if value is None and name != "output"] == []


@pytest.mark.parametrize("record", [QUEUED, FULL, msgspec.structs.replace(FULL, token_owner="user:1", owner="me")])
def test_a_record_as_a_dict_is_the_same_json_and_hides_what_is_internal(record: StoredRecord) -> None:
    assert RunRecord(record) == as_dict(record)


def test_unknown_fields_are_absent() -> None:
    absent = {"startedAt", "finishedAt", "payload", "output", "error", "idempotencyKey", "ttl", "batchId"}
    absent |= {"expiredAt", "delayedUntil"}
    assert not absent & as_dict(QUEUED).keys()


def test_a_full_record() -> None:
    run = as_dict(FULL)
    assert run["createdAt"] == "2026-01-02T03:04:05.678Z"
    assert run["finishedAt"] == "2026-01-02T03:04:07.001Z"
    assert run["durationMs"] == 1001
    assert run["payload"] == {"prompt": "hi"}
    assert run["output"] is None  # the output of a task that returned None is null, not absent
    assert run["realtimeStreams"] == ["default"]
    assert run["tags"] == ["a", "b"]
    assert run["ttl"] == "600s"
    assert (run["batchId"], run["triggerFunction"]) == ("batch_1", "batchTrigger")
    assert run["metadata"] == {"progress": 0.5}


def test_times_keep_their_milliseconds() -> None:
    for milliseconds in range(1000):
        record = msgspec.structs.replace(QUEUED, created_at_ms=1_767_323_045_000 + milliseconds)
        assert as_dict(record)["createdAt"] == f"2026-01-02T03:04:05.{milliseconds:03}Z"


@pytest.mark.parametrize("status", list(Status))
def test_booleans_agree_with_the_record(status: Status) -> None:
    record = msgspec.structs.replace(QUEUED, status=status)
    run = as_dict(record)
    assert run["status"] == status.value
    assert (run["isCompleted"], run["isSuccess"]) == (record.is_completed, record.is_success)
    assert (run["isFailed"], run["isCancelled"]) == (record.is_failed, record.is_canceled)
    assert (run["isQueued"], run["isExecuting"]) == (record.is_queued, record.is_executing)


def test_an_expired_run_has_the_time_of_its_expiry() -> None:
    record = msgspec.structs.replace(
        QUEUED, status=Status.EXPIRED, completed_at_ms=1_767_323_047_001, error=RunError("Expired", "not started")
    )
    run = as_dict(record)
    assert run["expiredAt"] == run["finishedAt"]
    assert run["error"] == {"name": "Expired", "message": "not started"}


def test_an_executing_run_has_a_duration() -> None:
    record = msgspec.structs.replace(
        QUEUED, status=Status.EXECUTING, started_at_ms=1_767_323_045_700, updated_at_ms=1_767_323_046_000
    )
    assert as_dict(record)["durationMs"] == 300


def test_fields_can_be_skipped_by_either_name() -> None:
    skip = ["payload", "output", "metadata", "runTags", "completedAt", "usageDurationMs", "realtimeStreams", "unknown"]
    run = as_dict(FULL, skip=skip)
    assert not {"payload", "output", "metadata", "finishedAt", "realtimeStreams"} & run.keys()
    assert (run["tags"], run["durationMs"]) == ([], 0)


def test_fields_that_identify_a_run_cannot_be_skipped() -> None:
    assert as_dict(FULL, skip=sorted(REQUIRED)).keys() >= REQUIRED
    assert as_dict(FULL, skip=["id", "status", "createdAt", "updatedAt"]) == as_dict(FULL)


def test_unknown_and_required_names_are_not_skippable() -> None:
    assert skippable_fields(("output", "nonsense", "id", "runTags", "output")) == ("output", "runTags")
    failed = msgspec.structs.replace(FULL, status=Status.FAILED, error=RunError("E", "m"))
    expired = msgspec.structs.replace(FULL, status=Status.EXPIRED)
    for record in (FULL, failed, expired):
        shown = as_dict(record)
        assert all(as_dict(record, skip=[name]) == shown for name in shown if not skippable_fields([name]))
        assert all(as_dict(record, skip=[name]) != shown for name in shown if skippable_fields([name]) and shown[name])


@pytest.mark.parametrize(
    ("seconds", "text"), [(600.0, "600s"), (1_209_601.0, "1209601s"), (0.5, "0.5s"), (100.0, "100s"), (0.001, "0.001s")]
)
def test_a_ttl_keeps_its_digits(seconds: float, text: str) -> None:
    assert as_dict(msgspec.structs.replace(QUEUED, ttl_s=seconds))["ttl"] == text
    assert parse_span(text) == seconds
