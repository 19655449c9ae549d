"""What the requests of feeds can ask for, and which scopes grant access to them."""

from __future__ import annotations

import json

import msgspec
import pytest

from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import FakeHost
from tests.asgi.official_sdk import on_one_loop
from tests.asgi.reading import kinds, runs, tag_snapshot

pytestmark = pytest.mark.anyio

RUN = "/v1/runs/run_1"
TAGS = "/v1/runs"
BATCH = "/v1/batches/batch_1"


async def test_a_run_feed_checks_token_run_and_scope(host: FakeHost) -> None:
    assert (await AsgiClient(host).get(RUN)).status_code == 401
    assert (await AsgiClient(host).get(RUN, headers=host.feed_headers("read:runs"))).status_code == 404
    await host.create()
    assert (await AsgiClient(host).get(RUN, headers=host.feed_headers("read:runs:run_2"))).status_code == 403


@pytest.mark.parametrize("accept", ["application/json", "*/*", None])
async def test_a_request_without_accept_header_and_offset_is_400_and_names_both(
    host: FakeHost, accept: str | None
) -> None:
    await host.create()
    headers = host.headers() if accept is None else host.headers(accept=accept)
    response = await AsgiClient(host).get(RUN, headers=headers)
    assert response.status_code == 400
    error = json.loads(response.body)["error"]
    assert "Accept: text/event-stream" in error and "?offset=-1" in error


async def test_created_at_limits_the_feed_to_a_window(host: FakeHost) -> None:
    await host.create("run_old", tags=["a"], created_ago_s=25 * 3600)
    await host.create("run_2h", tags=["a"], created_ago_s=2 * 3600)
    await host.create("run_now", tags=["a"])
    assert runs(await tag_snapshot(host, "a")) == ["run_2h", "run_now"]
    assert runs(await tag_snapshot(host, "a", createdAt="1h")) == ["run_now"]
    assert runs(await tag_snapshot(host, "a", createdAt="7d")) == ["run_2h", "run_now"]  # clamped


async def test_a_changed_run_from_before_the_window_is_not_sent(host: FakeHost) -> None:
    await host.create("run_old", tags=["a"], created_ago_s=7200)
    query = {"tags": "a", "createdAt": "1h"}
    async with AsgiClient(host).stream(TAGS, headers=host.feed_headers("read:runs"), query=query) as response:
        assert kinds(await response.read_until("ready")) == ["ready"]
        await host.finish("run_old")
        await host.create("run_new", tags=["a"], executing=False)
        assert runs(await response.read_events()) == ["run_new"]


@on_one_loop
@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ({}, 400, "tags is missing"),
        ({"tags": ""}, 400, "tags is missing"),
        ({"tags": "a,"}, 400, "empty"),
        ({"tags": " "}, 400, "empty"),
        ({"tags": "a\nb"}, 400, "control character"),
        ({"tags": "a\x7f"}, 400, "control character"),
        ({"tags": 'a"b'}, 400, "double quote"),
        ({"tags": "a\\b"}, 400, "backslash"),
        ({"tags": "t" * 129}, 422, "limit 128"),
        ({"tags": ",".join(map(str, range(11)))}, 422, "limit 10"),
        ({"tags": "a", "createdAt": "soon"}, 400, "createdAt"),
        ({"tags": "a", "createdAt": "-1h"}, 400, "createdAt"),
        ({"tags": "a", "createdAt": "0s"}, 400, "createdAt"),
    ],
)
async def test_malformed_queries_are_rejected(host: FakeHost, query: dict[str, str], status: int, words: str) -> None:
    response = await AsgiClient(host).get(TAGS, headers=host.feed_headers("read:runs"), query=query)
    assert response.status_code == status
    assert words in json.loads(response.body)["error"]


async def test_tags_can_be_separated_by_a_comma_and_a_blank(host: FakeHost) -> None:
    await host.create("run_both", tags=["one", "two"])
    assert runs(await tag_snapshot(host, "one, two")) == ["run_both"]


async def test_tags_at_the_limit_are_accepted(host: FakeHost) -> None:
    await tag_snapshot(host, ",".join("t" * 127 + str(number) for number in range(10)))


@on_one_loop
@pytest.mark.parametrize(
    ("scope", "status"),
    [
        ("read:runs", 200),
        ("read:tags", 200),
        ("read:tags:b", 200),
        ("read:all", 200),
        ("read:runs:run_1", 403),
        ("read:tags:c", 403),
        ("write:tags:a", 403),
    ],
)
async def test_scopes_that_grant_access_to_a_tag_feed(host: FakeHost, scope: str, status: int) -> None:
    headers = host.feed_headers(scope)
    async with AsgiClient(host).stream(TAGS, headers=headers, query={"tags": "a,b"}) as response:
        assert response.status_code == status


async def test_the_error_of_a_tag_feed_names_the_narrowest_scope(host: FakeHost) -> None:
    """It recommended `read:runs`, which grants every run of every user."""
    response = await AsgiClient(host).get(
        TAGS, headers=host.feed_headers("read:tags:user:2"), query={"tags": "user:1,vip"}
    )
    assert response.status_code == 403
    message = "access is not granted; it needs the scope 'read:tags:user:1'"
    assert json.loads(response.body)["error"] == message


async def test_a_batch_feed_checks_token_and_scope(host: FakeHost) -> None:
    assert (await AsgiClient(host).get(BATCH)).status_code == 401
    await host.create_batch()
    response = await AsgiClient(host).get(BATCH, headers=host.feed_headers("read:batch:batch_2"))
    assert response.status_code == 403
    async with AsgiClient(host).stream(BATCH, headers=host.feed_headers("read:runs")) as feed:
        assert feed.status_code == 200


async def test_a_run_of_an_older_version_with_deep_json_does_not_end_the_feed_of_a_tag(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    deep = b"[" * 2000 + b"]" * 2000
    await host.create("run_deep", tags=["a"], executing=False)
    record = msgspec.structs.replace(
        await host.get("run_deep"), version=2, payload_json=deep, metadata_json=msgspec.Raw(b'{"x":%b}' % deep)
    )
    await host.broker.commit(record, expect=1, change=ChangeMark("older", 1))
    await host.create("run_other", tags=["a"], payload=1)
    for _ in range(2):
        deep_run, other = [json.loads(event.data) for event in (await tag_snapshot(host, "a"))[:2]]
        assert (deep_run["id"], deep_run["metadata"], "payload" in deep_run) == ("run_deep", {}, False)
        assert (other["id"], other["payload"]) == ("run_other", 1)
    (logged,) = caplog.messages
    assert logged == "feeds omit the metadata, payload of run run_deep: it is nested too deeply"
