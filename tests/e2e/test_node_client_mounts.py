"""The official client in Node under each `baseURL` that a host's mounts allow."""

from __future__ import annotations

import pytest

from tests.e2e.node import running
from tests.e2e.site import Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("node_ready"),
]

ALL = ["/realtime", "/realtime/", ""]
"""Inside the mount at `/realtime`, or the origin of an app mounted at `/realtime` and at `/api`."""


@pytest.mark.parametrize("prefix", ALL)
def test_everything_works(site: Site, prefix: str) -> None:
    base_url = site.origin + prefix
    sent = [{"input": "next", "data": "go"}]
    with running("trigger", site, baseURL=base_url, task="steps", payload={"count": 1}, send=sent) as program:
        lines = program.rest()
    assert [list(line)[0] for line in lines[-2:]] == ["retrieved", "chunks"]
    assert lines[-3]["run"]["output"] == {"received": ["go"]}
    assert lines[-1]["chunks"] == [{"step": 0}]
    with running("api", site, baseURL=base_url, calls=["batch"], task="echo", items=[{"payload": 1}]) as program:
        assert program.rest()[-1]["retrieved"]["runCount"] == 1
    run = site.open()
    with running("write", site, baseURL=base_url, run=run.id, texts=["text"]) as writer:
        assert writer.rest() == [{"written": True}]
    run.end()


def test_with_a_mount_at_realtime_alone_feeds_and_streams_work(site: Site) -> None:
    base_url = f"{site.origin}/only"
    run = site.open()
    run.append("a")
    with running("read", site, baseURL=base_url, run=run.id, token=run.token) as reader:
        assert reader.next("chunk") == "a"
        with running("subscribe", site, baseURL=base_url, feed="run", run=run.id, token=run.token) as feed:
            assert feed.next("run")["id"] == run.id
            run.end(output=1)
            assert feed.rest()[-1].keys() == {"end"}
        assert reader.rest() == [{"end": 1}]
    calls = ["trigger", "retrieve"]  # outside the mount, where the host has no route
    with running("api", site, baseURL=base_url, calls=calls, task="echo", run=run.id) as program:
        assert [line["error"]["status"] for line in program.rest()] == [404, 404]
    assert not site.requests("/only/api")
