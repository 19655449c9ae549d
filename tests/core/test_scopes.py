from __future__ import annotations

from typing import Any

import pytest

from asgi_realtime.core.errors import UsageError
from asgi_realtime.core.scopes import ResourceName, Scopes, flatten_scopes, grants, named_ids, parse

RUN: tuple[ResourceName, ...] = (("runs", "run_1"), ("tasks", "chat"), ("tags", "user:1"), ("batch", "batch_1"))


def test_only_the_first_two_colons_separate() -> None:
    assert parse("read:tags:user:1:x") == ("read", "tags", "user:1:x")
    assert parse("read:runs") == ("read", "runs", None)
    assert parse("admin") == ("admin", None, None)


@pytest.mark.parametrize(
    "scope",
    [
        "admin",
        "read:all",
        "read:all:anything",
        "*:all",
        "*:runs:run_1",
        "read:runs",
        "read:runs:run_1",
        "read:tasks:chat",
        "read:tags:user:1",
        "read:batch:batch_1",
    ],
)
def test_a_scope_that_matches_any_name_of_a_run_grants_access(scope: str) -> None:
    assert grants([scope], "read", RUN)
    assert grants(["read:runs:other", scope], "read", RUN)


@pytest.mark.parametrize(
    "scope",
    [
        "",
        "read",
        "*",
        "admin:x",
        "admin:all",
        "write:runs:run_1",
        "read:runs:run_2",
        "read:runs:",
        "read:runs:run_1:x",
        "read:tags:user",
        "Read:runs",
        "read:unknown",
    ],
)
def test_a_scope_that_matches_no_name_of_a_run_does_not(scope: str) -> None:
    assert not grants([scope], "read", RUN)


def test_a_scope_can_grant_one_stream() -> None:
    scopes = flatten_scopes({"read": {"streams": ["run_1:default"]}})
    assert grants(scopes, "read", [*RUN, ("streams", "run_1:default")])
    assert not grants(scopes, "read", [*RUN, ("streams", "run_1:other")])
    assert not grants(scopes, "read", RUN)


def test_no_scopes_grant_nothing() -> None:
    assert not grants([], "read", RUN)
    assert not grants(["read:runs"], "read", [])


def test_a_name_without_id_needs_a_scope_without_id() -> None:
    feed: tuple[ResourceName, ...] = (("runs", None), ("tags", None), ("tags", "a"))
    assert not grants(["read:runs:run_1"], "read", feed)
    assert not grants(["read:tags:b"], "read", feed)
    for scope in ("read:runs", "read:tags", "read:tags:a", "read:all"):
        assert grants([scope], "read", feed)


def test_the_ids_in_scopes_are_listed() -> None:
    scopes = ["read:runs:run_1", "*:runs:run_2", "write:runs:run_3", "read:runs", "read:batch:b", "admin", "read:all"]
    assert named_ids(scopes, "read", "runs") == {"run_1", "run_2"}
    assert named_ids(scopes, "read", "batch") == {"b"}
    assert named_ids(scopes, "write", "runs") == {"run_2", "run_3"}


def test_the_nested_form_becomes_scopes() -> None:
    scopes: Scopes = {
        "read": {"runs": ["run_1", "run_2"], "tags": True, "batch": "batch_1", "tasks": ("chat",)},
        "write": {"runs": "run_1", "inputStreams": ["run_1"], "waitpoints": {"w2", "w1"}},
        "trigger": {"tasks": ["chat"]},
        "batchTrigger": {"tasks": True},
    }
    assert flatten_scopes(scopes) == (
        "read:runs:run_1",
        "read:runs:run_2",
        "read:tags",
        "read:batch:batch_1",
        "read:tasks:chat",
        "write:runs:run_1",
        "write:inputStreams:run_1",
        "write:waitpoints:w1",
        "write:waitpoints:w2",
        "trigger:tasks:chat",
        "batchTrigger:tasks",
    )


def test_ids_can_contain_colons() -> None:
    assert flatten_scopes({"read": {"tags": ["user:1"]}}) == ("read:tags:user:1",)


def test_admin_and_all_can_be_written() -> None:
    assert flatten_scopes({"admin": True}) == ("admin",)
    assert flatten_scopes({"read": {"all": True}}) == ("read:all",)


def test_a_list_of_scopes_is_validated() -> None:
    assert flatten_scopes(["admin", "read:runs:a", "*:all", "read:runs:a"]) == ("admin", "read:runs:a", "*:all")


@pytest.mark.parametrize(
    ("scopes", "message"),
    [
        ({}, "scopes is empty"),
        ([], "scopes is empty"),
        ("read:runs", "scopes is a str; allowed are a dict"),
        (None, "scopes is a NoneType"),
        ({"reed": {"runs": True}}, "unknown action 'reed'; allowed are read, write, trigger, batchTrigger, \\*, admin"),
        (["reed:runs"], "unknown action 'reed'"),
        (["admin:x"], "unknown action 'admin'"),
        ({"admin": {"runs": True}}, "unknown action 'admin'"),
        ({"read": {"run": True}}, "unknown type 'run'; allowed are runs, tags, batch, tasks"),
        (["read:run"], "unknown type 'run'"),
        ({"trigger": {"runs": True}}, "'trigger' has the unknown type 'runs'; allowed are tasks, all"),
        ({"read": True}, "'read' is True, which grants nothing"),
        ({"read": False}, "'read' is False"),
        ({"read": "runs"}, "'read' is 'runs'"),
        ({"read": ["runs"]}, "'read' is a list"),
        ({"read": {}}, "'read' is empty"),
        (["read"], "'read' without a type"),
        ({"read": {"runs": []}}, "'read:runs' is an empty list"),
        ({"read": {"runs": False}}, "'read:runs' is False; allowed are True"),
        ({"read": {"runs": None}}, "'read:runs' is None"),
        ({"read": {"runs": ""}}, "'read:runs' has an empty id"),
        ({"read": {"runs": ["a", ""]}}, "'read:runs' has an empty id"),
        (["read:runs:"], "'read:runs' has an empty id"),
        ({"read": {"runs": [1]}}, "'read:runs' lists a int"),
        ({"read": {"all": "x"}}, "'read:all' has an id"),
        ({"read": {"tags": "a\nb"}}, "control characters"),
        (["read:tags:a\x00"], "control characters"),
        ([1], "a scope is a int"),
    ],
)
def test_scopes_that_are_unknown_or_grant_nothing_are_rejected(scopes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        flatten_scopes(scopes)
