from __future__ import annotations

import pytest

from asgi_realtime.core.access import Resource
from asgi_realtime.core.scopes import ResourceName, grants

RUN = (("runs", "run_1"), ("tasks", "chat"), ("tags", "a"))


@pytest.mark.parametrize(
    ("resource", "action", "names"),
    [
        (Resource(action="read", kind="run", run_id="run_1"), "read", RUN),
        (Resource(action="read", kind="stream", run_id="run_1", key="default"), "read", RUN),
        (Resource(action="read", kind="input", run_id="run_1", key="go"), "read", RUN),
        (Resource(action="write", kind="run", run_id="run_1"), "write", [("runs", "run_1")]),
        (Resource(action="write", kind="input", run_id="run_1", key="go"), "write", [("inputStreams", "run_1")]),
        (Resource(action="read", kind="runs", tags=("a", "b")), "read", [("tags", "b"), ("tags", None)]),
        (Resource(action="read", kind="batch", batch_id="batch_1"), "read", [("batch", "batch_1"), ("runs", None)]),
        (Resource(action="batchTrigger", kind="batch"), "batchTrigger", [("tasks", "chat"), ("batch", None)]),
        (Resource(action="trigger", kind="task", task="chat"), "trigger", [("tasks", "chat")]),
    ],
)
def test_the_scopes_of_a_resource_grant_it_and_nothing_else(
    resource: Resource, action: str, names: list[ResourceName]
) -> None:
    assert grants(resource.scopes, action, names)
    others = [("runs", "run_2"), ("inputStreams", "run_2"), ("tasks", "other"), ("tags", "c")]
    for other in ("read", "write", "trigger", "batchTrigger"):
        assert not grants(resource.scopes, other, [*others, ("tags", None), ("runs", None)])
        if other != action:
            assert not grants(resource.scopes, other, names)


def test_a_list_without_tags_grants_nothing() -> None:
    assert Resource(action="read", kind="runs").scopes == ()
