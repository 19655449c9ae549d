from __future__ import annotations

import copy
from typing import Any

import pytest

from asgi_realtime.core import json_paths
from asgi_realtime.core.errors import UsageError
from asgi_realtime.core.metadata import (
    Append,
    Delete,
    Increment,
    Operation,
    Remove,
    Replace,
    Set,
    apply_operations,
)


@pytest.mark.parametrize(
    ("key", "steps"),
    [
        ("$.a", ("a",)),
        ("$.a.b", ("a", "b")),
        ("$.a.0.b", ("a", "0", "b")),
        (r"$.a\.b.c", ("a.b", "c")),
        (r"$.a\\.b", ("a\\", "b")),
        ("$..a..b.", ("a", "b")),
        ("$.ä ö.-1", ("ä ö", "-1")),
        ("$.$", ("$",)),
    ],
)
def test_dots_separate_the_steps_of_a_path(key: str, steps: tuple[str, ...]) -> None:
    assert json_paths.is_path(key)
    assert json_paths.parse(key) == steps


@pytest.mark.parametrize("key", ["a", "$", "$a", "a.b", "", ".a"])
def test_other_keys_are_not_paths(key: str) -> None:
    assert not json_paths.is_path(key)


@pytest.mark.parametrize("key", ["$.", "$..", "$.a.*", "$.a.1:2", "$.a.:", "$.a.[0]", "$.__proto__.a", "$.constructor"])
def test_unsupported_paths_are_rejected_when_the_operation_is_created(key: str) -> None:
    for make in (lambda: Set(key, 1), lambda: Append(key, 1), lambda: Remove(key, 1), lambda: Increment(key, 1)):
        with pytest.raises(UsageError, match=r"metadata key .*(path without a step|allowed are keys and list indexes)"):
            make()


OLD: dict[str, Any] = {"a": {"b": {"n": 1}, "list": [1, {"x": 1}, 1]}, "text": "t", "nil": None, "other": {"kept": []}}


@pytest.mark.parametrize(
    ("operation", "new_a"),
    [
        (Set("$.a.b.n", 2), {"b": {"n": 2}, "list": [1, {"x": 1}, 1]}),
        (Set("$.a.c", None), {"b": {"n": 1}, "list": [1, {"x": 1}, 1], "c": None}),
        (Set("$.a.list.1.x", "y"), {"b": {"n": 1}, "list": [1, {"x": "y"}, 1]}),
        (Set("$.a.list.0", "y"), {"b": {"n": 1}, "list": ["y", {"x": 1}, 1]}),
        (Set("$.a.list.3", "y"), {"b": {"n": 1}, "list": [1, {"x": 1}, 1, "y"]}),
        (Append("$.a.list", 4), {"b": {"n": 1}, "list": [1, {"x": 1}, 1, 4]}),
        (Append("$.a.new", 4), {"b": {"n": 1}, "list": [1, {"x": 1}, 1], "new": [4]}),
        (Append("$.a.b.n", 4), {"b": {"n": [1, 4]}, "list": [1, {"x": 1}, 1]}),
        (Remove("$.a.list", 1), {"b": {"n": 1}, "list": [{"x": 1}]}),
        (Increment("$.a.b.n", 2), {"b": {"n": 3}, "list": [1, {"x": 1}, 1]}),
        (Increment("$.a.b.m", 2), {"b": {"n": 1, "m": 2}, "list": [1, {"x": 1}, 1]}),
        (Set("$.a", 1), 1),
    ],
)
def test_an_operation_changes_the_value_at_its_path(operation: Operation, new_a: Any) -> None:
    before = copy.deepcopy(OLD)
    result = apply_operations(OLD, [operation])
    assert result == {**OLD, "a": new_a}
    assert before == OLD
    assert result["other"] is OLD["other"]


@pytest.mark.parametrize(
    "operation",
    [
        Set("$.missing.b", 1),
        Set("$.a.b.n.deeper", 1),
        Set("$.text.b", 1),
        Set("$.nil.b", 1),
        Set("$.a.list.9", 1),
        Set("$.a.list.x", 1),
        Set("$.a.list.01", 1),
        Append("$.missing.list", 1),
        Increment("$.missing.n", 1),
        Remove("$.a.missing", 1),
        Remove("$.a.b.n", 1),
        Delete("$.a.b"),
    ],
)
def test_an_operation_on_a_missing_path_has_no_effect(operation: Operation) -> None:
    assert apply_operations(OLD, [operation]) == OLD


def test_a_value_at_a_path_must_be_a_number_to_be_incremented() -> None:
    with pytest.raises(UsageError, match="is a dict and cannot change by 1"):
        apply_operations(OLD, [Increment("$.a.b", 1)])
    assert apply_operations(OLD, [Increment("$.a.b", 1)], strict=False) == OLD


def test_a_plain_key_that_looks_like_a_path_can_be_deleted() -> None:
    metadata = apply_operations({}, [Replace({"$.a": 1, "a": 2})])
    assert apply_operations(metadata, [Set("$.a", 3)]) == {"$.a": 1, "a": 3}
    assert apply_operations(metadata, [Delete("$.a")]) == {"a": 2}
