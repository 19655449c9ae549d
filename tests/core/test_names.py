from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asgi_realtime import LimitExceeded, Limits, UsageError
from asgi_realtime.core.names import check_key, check_tag, check_tags, input_stream, stream_name

LIMITS = Limits(tags=3, tag_length=5, key_length=5)


@pytest.mark.parametrize(
    ("given", "tags"),
    [
        (None, ()),
        ("a", ("a",)),
        (["b", "a", "b"], ("b", "a")),
        (iter("ab"), ("a", "b")),
        ([], ()),
        ("12345", ("12345",)),
    ],
)
def test_tags_keep_their_order_without_duplicates(given: Any, tags: tuple[str, ...]) -> None:
    assert check_tags(given, LIMITS) == tags


@pytest.mark.parametrize("tag", ["a b", "user:1", "ä", "日本", "a/b", "#1", "'"])
def test_tags_can_be_almost_any_text(tag: str) -> None:
    assert check_tag(tag, Limits()) == tag


def test_blanks_around_a_tag_do_not_count() -> None:
    """`?tags=one, two` requested a tag with a leading blank, which no run has."""
    assert check_tags([" a", "b ", "a"], LIMITS) == ("a", "b")
    assert check_tags("  12345  ", LIMITS) == ("12345",)


@pytest.mark.parametrize(
    ("tags", "error", "message"),
    [
        ("123456", LimitExceeded, "tag is 6 characters, limit 5"),
        (list("abcd"), LimitExceeded, "a run has 4 tags, limit 3"),
        ("", UsageError, "a tag is empty"),
        ("  ", UsageError, "a tag is empty"),
        ([1], UsageError, "a tag is a int; allowed is a str"),
        ("a\nb", UsageError, "control character"),
        ("a\x00", UsageError, "control character"),
        ("a\x7f", UsageError, "control character"),
        ("a\x85", UsageError, "control character"),
        ("a,b", UsageError, "a comma"),
        ('a"b', UsageError, "a double quote"),
        ("a\\b", UsageError, "a backslash"),
        ("a\ud800", UsageError, "not allowed"),
    ],
)
def test_invalid_tags_are_rejected(tags: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        check_tags(tags, LIMITS)
    assert message in str(caught.value)
    assert getattr(caught.value, "status", None) == 422


@pytest.mark.parametrize("key", ["a", "a b", "a.b", "...", "ä", "a:b", "a%b", "12345"])
def test_keys_can_be_any_path_segment(key: str) -> None:
    assert check_key(key, LIMITS, what="stream key") == key


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("", UsageError, "stream key '' is not allowed"),
        (".", UsageError, "stream key '.' is not allowed"),
        ("..", UsageError, "stream key '..' is not allowed"),
        (1, UsageError, "a stream key is a int; allowed is a str"),
        (None, UsageError, "a stream key is a NoneType"),
        ("123456", LimitExceeded, "stream key is 6 characters, limit 5"),
        *[(f"a{bad}b", UsageError, "has a control character or one of / \\ ? #") for bad in "/\\?#\r\n\x00\x9f\udfff"],
    ],
)
def test_invalid_keys_are_rejected(key: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        check_key(key, LIMITS, what="stream key")
    assert message in str(caught.value)


def test_stream_keys_that_start_with_a_dollar_are_reserved() -> None:
    assert stream_name("ai", LIMITS) == "ai"
    assert input_stream("in", LIMITS) == "$trigger.input:in"
    with pytest.raises(UsageError, match="starts with \\$, which is reserved for inputs"):
        stream_name("$in", LIMITS)


@pytest.mark.parametrize("check", [stream_name, input_stream])
def test_names_of_streams_and_inputs_are_checked(check: Callable[[str, Limits], str]) -> None:
    with pytest.raises(UsageError):
        check("a/b", LIMITS)
    with pytest.raises(LimitExceeded):
        check("123456", LIMITS)
