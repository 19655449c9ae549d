"""Records, status transitions, and `apply`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.core.errors import InvalidTransition
from asgi_realtime.core.log import End
from asgi_realtime.core.metadata import Append, Increment, Operation, Set, apply_operations, encode_metadata
from asgi_realtime.core.run_changes import (
    CancelRequested,
    Finished,
    MetadataChanged,
    Queued,
    RunChange,
    Started,
    StreamAdded,
    TagsAdded,
    apply,
)
from asgi_realtime.core.runs import (
    DUE_KINDS,
    END_REASONS,
    TERMINAL,
    TRANSITIONS,
    WAITING,
    BatchMember,
    RunError,
    Status,
    StoredRecord,
    batch_topic,
    due_times,
    run_topic,
    tag_topic,
)

NOW = 1_700_000_000_000


def record(status: Status = Status.QUEUED, **fields: Any) -> StoredRecord:
    if status in TERMINAL:
        fields.setdefault("completed_at_ms", NOW)
    return StoredRecord(id="run_1", task="chat", status=status, created_at_ms=NOW, updated_at_ms=NOW, **fields)


def becoming(status: Status) -> RunChange:
    if status is Status.QUEUED:
        return Queued()
    if status is Status.EXECUTING:
        return Started("owner")
    return Finished(status)


def reachable() -> list[tuple[Status, Status]]:
    """All pairs of a non-terminal status and a status that a change can lead to."""
    return [
        (present, following)
        for present, following in product(Status, Status)
        if present not in TERMINAL and following is not Status.DELAYED
    ]


# Status


def test_every_status_is_in_the_table_and_every_terminal_one_has_an_end_reason() -> None:
    assert set(TRANSITIONS) == set(Status)
    assert set(END_REASONS) == TERMINAL
    assert TERMINAL | WAITING | {Status.EXECUTING} == set(Status)


@pytest.mark.parametrize(("present", "following"), reachable())
def test_only_transitions_in_the_table_are_allowed(present: Status, following: Status) -> None:
    before = record(present)
    if following in TRANSITIONS[present]:
        after = apply(before, [becoming(following)], NOW + 5)
        assert (after.status, after.version, after.updated_at_ms) == (following, 2, NOW + 5)
        return
    with pytest.raises(InvalidTransition, match=f"{present} cannot become {following}"):
        apply(before, [becoming(following)], NOW + 5)


def test_an_invalid_transition_names_the_allowed_ones() -> None:
    with pytest.raises(InvalidTransition, match="allowed: CANCELED, EXPIRED, QUEUED"):
        apply(record(Status.DELAYED), [Started("owner")], NOW)


@pytest.mark.parametrize("status", sorted(TERMINAL))
@pytest.mark.parametrize(
    "change",
    [
        Queued(),
        Started("late"),
        Finished(Status.COMPLETED, b"1"),
        CancelRequested(),
        TagsAdded(("late",)),
        StreamAdded("late"),
        MetadataChanged((Set("late", 1),)),
    ],
    ids=lambda change: type(change).__name__,
)
def test_a_run_that_is_over_ignores_changes(status: Status, change: RunChange) -> None:
    ended = record(status)
    assert apply(ended, [change], NOW + 5) is ended


# apply


def test_a_run_from_its_delay_to_its_end() -> None:
    run = record(Status.DELAYED)
    run = apply(run, [Queued()], NOW + 1)
    assert (run.status, run.queued_at_ms) == (Status.QUEUED, NOW + 1)
    run = apply(run, [Started("owner-1")], NOW + 2)
    assert (run.status, run.started_at_ms, run.owner) == (Status.EXECUTING, NOW + 2, "owner-1")
    run = apply(run, [Finished(Status.COMPLETED, b'{"text":"hi"}')], NOW + 3)
    assert (run.status, run.completed_at_ms, run.output, run.error) == (
        Status.COMPLETED,
        NOW + 3,
        {"text": "hi"},
        None,
    )
    assert run.version == 4


def test_a_failure_has_its_error_in_the_same_version() -> None:
    error = RunError("TaskError", "out of luck")
    run = apply(record(Status.EXECUTING), [Finished(Status.FAILED, error=error)], NOW + 1)
    assert (run.version, run.error, run.end) == (2, error, End("failed", "out of luck"))


def test_several_changes_make_one_version() -> None:
    changes: list[RunChange] = [
        Started("owner"),
        TagsAdded(("user:1",)),
        TagsAdded(("user:1", "chat")),
        StreamAdded("ai"),
        StreamAdded("default"),
        MetadataChanged((Set("n", 1),)),
        MetadataChanged((Increment("n", 2), Append("list", "a"))),
    ]
    run = apply(record(), changes, NOW + 1)
    assert run.version == 2
    assert run.status is Status.EXECUTING
    assert run.tags == ("user:1", "chat")
    assert run.streams == ("ai", "default")
    assert run.metadata == {"n": 3, "list": ["a"]}


def test_changes_after_an_end_in_the_same_call_are_ignored() -> None:
    changes: list[RunChange] = [
        TagsAdded(("before",)),
        Finished(Status.COMPLETED),
        TagsAdded(("after",)),
        Finished(Status.FAILED),
    ]
    run = apply(record(Status.EXECUTING), changes, NOW + 1)
    assert (run.version, run.status, run.tags) == (2, Status.COMPLETED, ("before",))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [TagsAdded(("known",))],
        [TagsAdded(())],
        [StreamAdded("known")],
        [MetadataChanged((Set("n", 1),))],
        [MetadataChanged(())],
        [CancelRequested()],
    ],
    ids=repr,
)
def test_a_change_without_effect_makes_no_version(changes: list[RunChange]) -> None:
    run = record(
        Status.EXECUTING,
        tags=("known",),
        streams=("known",),
        metadata_json=encode_metadata({"n": 1}),
        cancel_requested_at_ms=NOW - 1,
    )
    assert apply(run, changes, NOW + 5) is run


def test_true_and_one_are_different_values() -> None:
    """`metadata.set("done", True)` over a 1 was dropped as a change without effect."""
    run = record(Status.EXECUTING, metadata_json=encode_metadata({"done": 1}))
    assert apply(run, [MetadataChanged((Set("done", True),))], NOW + 1).metadata["done"] is True


def test_the_old_record_is_never_modified() -> None:
    run = record(Status.EXECUTING, metadata_json=encode_metadata({"list": [1]}), tags=("a",))
    before = msgspec.json.encode(run)
    apply(run, [MetadataChanged((Append("list", 2), Set("n", 1))), TagsAdded(("b",))], NOW + 1)
    assert msgspec.json.encode(run) == before


def test_time_does_not_run_backwards() -> None:
    """The clocks of processes differ."""
    run = apply(record(Status.EXECUTING), [Finished(Status.COMPLETED)], NOW - 1000)
    assert (run.updated_at_ms, run.completed_at_ms) == (NOW, NOW)


@pytest.mark.parametrize("status", sorted(WAITING))
def test_a_waiting_run_is_canceled_immediately(status: Status) -> None:
    run = apply(record(status), [CancelRequested()], NOW + 1)
    assert (run.status, run.completed_at_ms, run.end) == (Status.CANCELED, NOW + 1, End("canceled"))


def test_the_owner_of_an_executing_run_is_asked_to_cancel_it() -> None:
    run = apply(record(Status.EXECUTING), [CancelRequested()], NOW + 1)
    assert (run.status, run.cancel_requested_at_ms) == (Status.EXECUTING, NOW + 1)
    assert apply(run, [CancelRequested()], NOW + 2) is run


CHANGES = st.lists(
    st.one_of(
        st.sampled_from([Queued(), Started("owner"), CancelRequested(), StreamAdded("s"), TagsAdded(("t", "u"))]),
        st.sampled_from(sorted(TERMINAL)).map(Finished),
        st.integers(0, 3).map(lambda value: MetadataChanged((Set("n", value),))),
    ),
    max_size=8,
)


@given(status=st.sampled_from(list(Status)), calls=st.lists(CHANGES, max_size=5))
def test_versions_increase_by_one_and_the_status_follows_the_table(status: Status, calls: list[list[Any]]) -> None:
    run = record(status)
    for changes in calls:
        try:
            after = apply(run, changes, NOW + 1)
        except InvalidTransition:
            continue
        assert (after is run) or after.version == run.version + 1
        assert run.status not in TERMINAL or after is run
        assert (after.end is not None) == (after.completed_at_ms is not None)
        run = after


# Records


def test_a_record_survives_json() -> None:
    run = record(
        Status.FAILED,
        payload_json=b'{"prompt":"hi"}',
        output_json=b"[1]",
        error=RunError("E", "m"),
        tags=("a",),
        metadata_json=encode_metadata({"x": [None, 1.5]}),
        batch=BatchMember("batch_1", 0, 2),
    )
    assert msgspec.json.decode(msgspec.json.encode(run), type=StoredRecord) == run
    assert (run.payload, run.output) == ({"prompt": "hi"}, [1])


def test_metadata_is_plain_json_in_an_encoded_record() -> None:
    run = record(Status.EXECUTING, metadata_json=encode_metadata({"x": [None, 1.5]}))
    assert msgspec.json.decode(msgspec.json.encode(run))["metadata"] == {"x": [None, 1.5]}
    assert "metadata" not in msgspec.json.decode(msgspec.json.encode(record(Status.EXECUTING)))


def test_metadata_is_a_new_dict_at_each_access() -> None:
    run = record(Status.EXECUTING, metadata_json=encode_metadata({"list": [1]}))
    run.metadata["list"].append(2)
    assert run.metadata == {"list": [1]}


def test_changes_of_metadata_that_cancel_out_make_no_version() -> None:
    run = record(Status.EXECUTING, metadata_json=encode_metadata({"n": 1}))
    changes: list[RunChange] = [MetadataChanged((Increment("n", 1),)), MetadataChanged((Increment("n", -1),))]
    assert apply(run, changes, NOW + 1) is run


def test_a_record_without_payload_and_output_has_none() -> None:
    assert (record().payload, record().output) == (None, None)


@pytest.mark.parametrize("status", Status)
def test_predicates_follow_from_the_status(status: Status) -> None:
    run = record(status)
    assert run.is_completed is (status in TERMINAL)
    assert run.is_queued is (status in WAITING)
    assert run.is_executing is (status is Status.EXECUTING)
    assert run.is_success is (status is Status.COMPLETED)
    assert run.is_canceled is (status is Status.CANCELED)
    assert run.is_failed is (run.is_completed and not run.is_success and not run.is_canceled)
    assert run.end == (End(END_REASONS[status]) if status in TERMINAL else None)


def test_the_topics_of_a_run_are_its_tags_and_its_batch() -> None:
    assert record().topics == ()
    run = record(tags=("user:1", "chat"), batch=BatchMember("batch_1", 0, 1))
    assert run.topics == ("tag:user:1", "tag:chat", "batch:batch_1")
    assert (run_topic("r"), tag_topic("t"), batch_topic("b")) == ("run:r", "tag:t", "batch:b")


# Due times


@pytest.mark.parametrize(
    ("run", "due"),
    [
        (record(Status.DELAYED, delay_until_ms=NOW + 5), {"delay": NOW + 5}),
        (record(Status.DELAYED, delay_until_ms=NOW + 5, expires_at_ms=NOW + 9), {"delay": NOW + 5, "ttl": NOW + 9}),
        (record(Status.DELAYED), {}),
        (record(Status.QUEUED, delay_until_ms=NOW + 5, expires_at_ms=NOW + 9), {"ttl": NOW + 9}),
        (record(Status.QUEUED), {}),
        (record(Status.EXECUTING, delay_until_ms=NOW + 5, expires_at_ms=NOW + 9), {}),
        (record(Status.EXECUTING, cancel_requested_at_ms=NOW), {"cancel": NOW + 2500}),
        (record(Status.COMPLETED, expires_at_ms=NOW + 9, cancel_requested_at_ms=NOW), {"expiry": NOW + 60_000}),
    ],
)
def test_when_a_run_is_due(run: StoredRecord, due: dict[str, int]) -> None:
    assert due_times(run, cancel_s=2.5, after_end_s=60) == due
    assert set(due) <= set(DUE_KINDS)


def test_metadata_is_decoded_once_for_all_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[int] = []

    def spy(metadata: dict[str, Any], operations: Sequence[Operation], *, strict: bool) -> dict[str, Any]:
        applied.append(len(operations))
        return apply_operations(metadata, operations, strict=strict)

    monkeypatch.setattr("asgi_realtime.core.run_changes.apply_operations", spy)
    changes: list[RunChange] = [
        MetadataChanged((Increment("n", 1),)),
        TagsAdded(("a",)),
        MetadataChanged((Increment("n", 2),)),
    ]
    assert apply(record(), changes, NOW).metadata == {"n": 3}
    assert applied == [2]
