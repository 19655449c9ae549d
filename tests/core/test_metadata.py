from __future__ import annotations

import copy
import datetime
from typing import Any

import msgspec
import pytest

from asgi_realtime.core import metadata
from asgi_realtime.core.errors import EncodingError, LimitExceeded, UsageError
from asgi_realtime.core.metadata import (
    Append,
    Delete,
    Increment,
    Operation,
    Remove,
    Replace,
    Set,
    apply_operations,
    check_size,
    encode_metadata,
    normalize_value,
)

OLD: dict[str, Any] = {
    "n": 1,
    "f": 0.5,
    "list": [1, True, {"a": [1]}, {"a": [1]}],
    "text": "x",
    "flag": True,
    "nil": None,
}


@pytest.mark.parametrize(
    ("operation", "changed"),
    [
        (Set("new", {"a": 1}), {"new": {"a": 1}}),
        (Set("n", None), {"n": None}),
        (Delete("n"), {"n": ...}),
        (Delete("missing"), {}),
        (Append("missing", 1), {"missing": [1]}),
        (Append("list", 2), {"list": [1, True, {"a": [1]}, {"a": [1]}, 2]}),
        (Append("text", "y"), {"text": ["x", "y"]}),
        (Append("nil", 1), {"nil": [None, 1]}),
        (Remove("list", {"a": [1]}), {"list": [1, True]}),
        (Remove("list", True), {"list": [1, {"a": [1]}, {"a": [1]}]}),
        (Remove("list", 1.0), {"list": [True, {"a": [1]}, {"a": [1]}]}),
        (Remove("list", {"a": [True]}), {}),
        (Remove("list", {"b": [1]}), {}),
        (Remove("list", [1]), {}),
        (Remove("missing", 1), {}),
        (Remove("text", "x"), {}),
        (Increment("n", 2), {"n": 3}),
        (Increment("n", -2.5), {"n": -1.5}),
        (Increment("missing", 1), {"missing": 1}),
        (Replace({"only": 1}), {**dict.fromkeys(OLD, ...), "only": 1}),
    ],
)
def test_an_operation_changes_its_key_and_nothing_else(operation: Operation, changed: dict[str, Any]) -> None:
    before = copy.deepcopy(OLD)
    expected = {key: value for key, value in {**OLD, **changed}.items() if value is not ...}
    assert apply_operations(OLD, [operation]) == expected
    assert before == OLD


def test_operations_apply_in_order_and_do_not_modify_their_values() -> None:
    value: list[Any] = [1]
    replacement: dict[str, Any] = {"a": value}
    operations: list[Operation] = [
        Set("x", 1),
        Replace(replacement),
        Append("a", 2),
        Append("a", 3),
        Remove("a", 1),
        Increment("n", 1),
    ]
    assert apply_operations({}, operations) == {"a": [2, 3], "n": 1}
    assert (value, replacement) == ([1], {"a": [1]})


def test_repeated_changes_do_not_leak_into_shared_values() -> None:
    """Lists are copied once, and then changed in place."""
    old: dict[str, Any] = {"a": [1], "b": {"c": [1]}}
    value: list[Any] = [0]
    operations: list[Operation] = [
        Append("a", 2),
        Append("a", 3),
        Set("kept", 1),
        Append("$.b.c", 2),
        Append("$.b.c", 3),
        Set("$.b.c.0", "x"),
        Set("$.b.d", value),
        Append("$.b.d", 1),
        Append("$.b.d", 2),
        Set("e", value),
        Append("e", 1),
        Set("$.e.1", "y"),
        Append("new", 1),
        Append("new", 2),
        Remove("new", 1),
        Append("new", 3),
    ]
    assert apply_operations(old, operations) == {
        "a": [1, 2, 3],
        "b": {"c": ["x", 2, 3], "d": [0, 1, 2]},
        "kept": 1,
        "e": [0, "y"],
        "new": [2, 3],
    }
    assert (old, value) == ({"a": [1], "b": {"c": [1]}}, [0])
    assert apply_operations(old, operations) == apply_operations(apply_operations(old, operations[:8]), operations[8:])


@pytest.mark.parametrize(
    ("value", "left"),
    [
        (1, [True, "1", None, [1], [True], {"a": 1}]),
        (1.0, [True, "1", None, [1], [True], {"a": 1}]),
        (True, [1, 1.0, "1", None, [1], [True], {"a": 1}]),
        (None, [1, True, 1.0, "1", [1], [True], {"a": 1}]),
        ("1", [1, True, 1.0, None, [1], [True], {"a": 1}]),
        ([1], [1, True, 1.0, "1", None, [True], {"a": 1}]),
        ([True], [1, True, 1.0, "1", None, [1], {"a": 1}]),
        ({"a": True}, [1, True, 1.0, "1", None, [1], [True], {"a": 1}]),
        ({"a": 1}, [1, True, 1.0, "1", None, [1], [True]]),
        ({}, [1, True, 1.0, "1", None, [1], [True], {"a": 1}]),
    ],
)
def test_remove_compares_as_json(value: Any, left: list[Any]) -> None:
    items = [1, True, 1.0, "1", None, [1], [True], {"a": 1}]
    result = apply_operations({"l": items}, [Remove("l", value)])["l"]
    assert [(type(item), item) for item in result] == [(type(item), item) for item in left]


def test_a_deeply_nested_value_can_be_removed() -> None:
    """The comparison raised `RecursionError`."""

    def deep(inner: Any) -> Any:
        for _ in range(2000):
            inner = [inner]
        return inner

    for value, left in ((deep(1), 2), (deep(2), 1), (deep(3), 3)):
        items = [deep(1), deep(2), deep(2)]
        assert len(apply_operations({"l": items}, [Remove("l", value)])["l"]) == left


def test_deeply_nested_values_of_another_shape_stay() -> None:
    def deep(inner: Any) -> Any:
        for _ in range(2000):
            inner = [inner]
        return inner

    for other in ([1, 2], [1, 1, 1], {"b": 1}, {"a": 2}, {"a": True}, True):
        items = [deep([1]), deep({"a": 1})]
        assert apply_operations({"l": items}, [Remove("l", deep(other))])["l"] == items


def test_no_operations_return_a_copy() -> None:
    result = apply_operations(OLD, [])
    assert result == OLD
    assert result is not OLD


@pytest.mark.parametrize(
    ("old", "by", "shown"),
    [
        ("1", 1, "'1'"),
        (True, 1, "True"),
        (None, 1, "None"),
        ([1], 1, "a list"),
        (1.7e308, 1.7e308, "1.7e\\+308"),
        (10**400, 0.5, "1000"),
    ],
)
def test_only_numbers_can_be_incremented(old: object, by: float, shown: str) -> None:
    operations: list[Operation] = [Increment("n", by), Set("after", 1)]
    with pytest.raises(UsageError, match=f"metadata 'n' is {shown}.* cannot change by"):
        apply_operations({"n": old}, operations)
    assert apply_operations({"n": old}, operations, strict=False) == {"n": old, "after": 1}


@pytest.mark.parametrize("by", [True, "1", None, float("nan"), float("inf")])
def test_an_increment_must_be_a_finite_number(by: Any) -> None:
    with pytest.raises(UsageError, match="finite number"):
        Increment("n", by)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "0 characters; allowed are 1 to 128"),
        ("k" * 129, "129 characters"),
        ("a\nb", "control characters"),
        ("a\x7f", "control characters"),
        (1, "is a int"),
    ],
)
def test_an_invalid_key_is_rejected(key: Any, message: str) -> None:
    makers = (lambda: Set(key, 1), lambda: Delete(key), lambda: Increment(key, 1), lambda: Replace({key: 1}))
    for make in makers:
        with pytest.raises(UsageError, match=message):
            make()


def test_a_key_of_128_characters_is_allowed() -> None:
    assert apply_operations({}, [Set("ä" * 128, 1)]) == {"ä" * 128: 1}


def test_metadata_can_only_be_replaced_by_a_dict() -> None:
    with pytest.raises(UsageError, match="metadata is a list; allowed is a dict"):
        Replace([1])  # type: ignore[arg-type]


def test_operations_can_be_serialized() -> None:
    operations = [
        Set("a", {"x": 1}),
        Delete("b"),
        Append("c", 1),
        Remove("d", [1]),
        Increment("e", -1),
        Increment("f", 0.5),
        Replace({"g": 1}),
    ]
    assert msgspec.json.decode(msgspec.json.encode(operations), type=list[Operation]) == operations
    with pytest.raises(msgspec.ValidationError, match="1 to 128"):
        msgspec.json.decode(b'[{"type":"delete","key":""}]', type=list[Operation])


def test_a_normalized_value_is_what_subscribers_see() -> None:
    value = {"at": datetime.date(2024, 1, 2), "pair": (1, 2), "bad": "\ud800", "nan": float("nan")}
    assert normalize_value(value) == {"at": "2024-01-02", "pair": [1, 2], "bad": "\ud800", "nan": None}
    with pytest.raises(EncodingError):
        normalize_value(object())


def test_the_size_limit_is_exact() -> None:
    check_size(encode_metadata({"a": "é"}), 10)
    with pytest.raises(LimitExceeded, match="metadata is 10 bytes, limit 9") as caught:
        check_size(encode_metadata({"a": "é"}), 9)
    assert caught.value.status == 422


@pytest.mark.parametrize("key", ["a", "$.b.0"])
def test_removes_compare_a_limited_number_of_values(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MAX_COMPARISONS", 60)
    items = list(range(10))
    old = {"a": items, "b": [items]}
    apply_operations(old, [Remove(key, 99)] * 6 + [Remove("missing", 1), Remove("$.missing.x", 1)])
    apply_operations(old, [Remove(key, [1, {"x": 2}])])
    for operations in ([Remove(key, 99)] * 7, [Remove(key, [1, {"x": 2}])] * 2):
        with pytest.raises(LimitExceeded, match="they compare more than 60 values; send them in several requests"):
            apply_operations(old, operations)
        apply_operations(old, operations, strict=False)
