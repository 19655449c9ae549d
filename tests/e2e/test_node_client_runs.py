"""The official client in Node follows runs: one, those with some tags, those of a batch, with their streams."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from tests.e2e.conftest import both_brokers
from tests.e2e.node import running
from tests.e2e.site import Line, Site, serving

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("node_ready")]

POLL_S = 0.2


def new_tag() -> str:
    return f"user:{secrets.token_hex(4)}"


def step(number: int) -> Callable[[Line], bool]:
    return lambda run: run["metadata"].get("step") == number


def ended(run: Line) -> bool:
    return "finishedAt" in run


def runs_in(lines: list[Line]) -> list[Line]:
    return [line["run"] for line in lines if "run" in line]


@both_brokers
def test_a_run_is_followed_to_its_output(site: Site) -> None:
    tag = new_tag()
    run = site.trigger("steps", {"count": 3}, tags=[tag], metadata={"model": "small"})
    with running("subscribe", site, feed="run", run=run.id, token=run.token) as feed:
        shown = feed.until("run", step(0))
        assert (shown["id"], shown["status"], shown["isExecuting"]) == (run.id, "EXECUTING", True)
        assert (shown["taskIdentifier"], shown["payload"], shown["tags"]) == ("steps", {"count": 3}, [tag])
        assert shown["metadata"] == {"model": "small", "step": 0}
        assert "output" not in shown and not ended(shown)
        created = datetime.fromisoformat(shown["createdAt"]["$date"])
        assert abs((datetime.now(UTC) - created).total_seconds()) < 3600
        assert shown["createdAt"]["$date"] <= shown["startedAt"]["$date"] <= shown["updatedAt"]["$date"]
        site.send(run.id, "next", "go 0")
        for number in (1, 2):
            assert feed.until("run", step(number))["metadata"] == {"model": "small", "step": number}
            site.send(run.id, "next", f"go {number}")
        lines = feed.rest()
    *_, last = runs_in(lines)
    assert (last["status"], last["isCompleted"], last["isSuccess"]) == ("COMPLETED", True, True)
    assert last["output"] == {"received": ["go 0", "go 1", "go 2"]}
    assert last["finishedAt"]["$date"] >= last["startedAt"]["$date"]
    assert [ended(run) for run in runs_in(lines)].count(True) == 1  # with the output at once, and nothing after it
    assert "end" in lines[-1]


def test_a_delayed_run_is_shown_as_delayed(site: Site) -> None:
    run = site.trigger("echo", "late", delay="1h", ttl="2h")
    with running("subscribe", site, feed="run", run=run.id, token=run.token, breakAfter=1) as feed:
        shown = feed.next("run")
        assert feed.next("end") == 1
        assert feed.rest() == []
    assert (shown["status"], shown["isQueued"]) == ("DELAYED", True)
    assert shown["delayedUntil"]["$date"] > shown["createdAt"]["$date"]


def test_a_run_that_fails_shows_its_error(site: Site) -> None:
    run = site.trigger("unlucky")
    with running("subscribe", site, feed="run", run=run.id, token=run.token) as feed:
        *_, last, end = feed.rest()
    assert (last["run"]["status"], last["run"]["isFailed"]) == ("FAILED", True)
    assert (last["run"]["error"]["name"], last["run"]["error"]["message"]) == ("TaskError", "no luck")
    assert "output" not in last["run"] and "end" in end


def test_a_canceled_run_ends_its_feed(site: Site) -> None:
    run = site.trigger("endless")
    with running("subscribe", site, feed="run", run=run.id, token=run.token) as feed:
        feed.until("run", lambda run: run["status"] == "EXECUTING")
        with running("api", site, calls=["cancel"], run=run.id) as canceling:
            assert canceling.next("canceled") == {"id": run.id}
        *_, last, end = feed.rest()
    assert (last["run"]["status"], last["run"]["isCancelled"], last["run"]["isCompleted"]) == ("CANCELED", True, False)
    assert "end" in end


def test_a_run_that_has_ended_is_sent_once_and_the_feed_ends(site: Site) -> None:
    run = site.open()
    run.end(output=[1, {"a": None}])
    with running("subscribe", site, feed="run", run=run.id, token=run.token) as feed:
        shown, end = feed.rest()
    assert (shown["run"]["output"], end) == ([1, {"a": None}], {"end": 1})
    assert len(site.requests(f"/runs/{run.id}")) == 1


def test_an_output_of_any_kind_arrives_unchanged(site: Site) -> None:
    outputs: list[Any] = [None, "", 0, False, "null", "text with \u2028 and \U0001f600", {"": []}, [[], {}]]
    for output in outputs:
        run = site.open(metadata={"kind": output})
        run.end(output=output)
        with running("subscribe", site, feed="run", run=run.id, token=run.token) as feed:
            shown, _ = feed.rest()
        assert shown["run"].get("output") == output
        assert shown["run"]["metadata"] == {"kind": output}


def test_tags_with_special_characters_arrive_unchanged(site: Site) -> None:
    tags = ["user:1", "a b", "{braces}", "NULL", "it's", "Zürich", "a/b?c=d&e", "%41"]
    run = site.open(tags=tags)
    with running("subscribe", site, feed="run", run=run.id, token=run.token, breakAfter=1) as feed:
        assert sorted(feed.next("run")["tags"]) == sorted(tags)


def test_a_client_can_skip_columns(site: Site) -> None:
    run = site.trigger("echo", {"secret": 1}, metadata={"shown": True})
    options = {"skipColumns": ["payload", "output", "startedAt"]}
    with running("subscribe", site, feed="run", run=run.id, token=run.token, options=options) as feed:
        *_, last, _ = feed.rest()
    assert last["run"]["status"] == "COMPLETED"
    assert not {"payload", "output", "startedAt"} & set(last["run"])
    assert last["run"]["metadata"] == {"shown": True} and ended(last["run"])


def test_a_token_can_skip_columns(site: Site) -> None:
    run = site.trigger("echo", {"secret": 1})
    options = {"scopes": {"read": {"runs": [run.id]}}, "realtime": {"skipColumns": ["payload"]}}
    with running("api", site, calls=["publicToken"], options=options) as minting:
        token = minting.next("token")
    with running("subscribe", site, feed="run", run=run.id, token=token, options={"skipColumns": ["output"]}) as feed:
        *_, last, _ = feed.rest()
    assert "payload" not in last["run"] and last["run"]["output"] == {"secret": 1}


def test_a_feed_can_continue_after_the_end_of_its_run(site: Site) -> None:
    run = site.open()
    with running(
        "subscribe", site, feed="run", run=run.id, token=run.token, options={"stopOnCompletion": False}
    ) as feed:
        feed.next("run")
        run.end(output=1)
        feed.until("run", ended)
        site.until_asked(f"/runs/{run.id}", query="live=true", open=True)
        feed.send("abort")
        assert feed.rest()[-1].keys() == {"end"}


@pytest.mark.parametrize("leave", ["break", "abort"])
def test_leaving_a_feed_ends_the_held_request(site: Site, leave: str) -> None:
    run = site.open()
    times = 2 if leave == "break" else None
    with running("subscribe", site, feed="run", run=run.id, token=run.token, breakAfter=times) as feed:
        feed.next("run")
        site.until_asked(f"/runs/{run.id}", query="live=true", open=True)
        if leave == "break":
            run.update(metadata={"a": 1})
        else:
            feed.send("abort")
        assert "end" in feed.rest()[-1]
    site.until(lambda: not any(seen["open"] for seen in site.requests(f"/runs/{run.id}")), "nothing is held")
    run.end()


def test_a_program_that_has_followed_and_read_exits(site: Site) -> None:
    run = site.open()
    run.append("a")
    run.end()
    with running("subscribe", site, alone=True, feed="run", run=run.id, token=run.token) as feed:
        assert feed.rest()[-1] == {"end": 1}
    with running("read", site, alone=True, run=run.id, token=run.token) as reader:
        assert reader.rest()[-1] == {"end": 1}


def test_an_idle_feed_holds_one_request_at_a_time() -> None:
    with serving("memory", poll_s=POLL_S) as site:
        run = site.open()
        with running("subscribe", site, feed="run", run=run.id, token=run.token) as feed:
            feed.next("run")
            site.until_asked(f"/runs/{run.id}", query="live=true", times=6)
            polls = [seen for seen in site.requests(f"/runs/{run.id}", query="live=true") if not seen["open"]]
            assert all(seen["status"] == 200 and seen["held"] > POLL_S / 2 for seen in polls)
            assert all(one["began"] + one["held"] <= next["began"] for one, next in pairwise(polls))
            assert len(site.requests(f"/runs/{run.id}")) <= len(polls) + 2  # the snapshot, and the one held now
            run.update(metadata={"changed": True})
            assert feed.next("run")["metadata"] == {"changed": True}  # the empty polls before printed nothing
            run.end(output="done")
            *_, last, _ = feed.rest()
        assert last["run"]["output"] == "done"


@both_brokers
def test_the_runs_that_have_all_tags_are_followed(site: Site) -> None:
    one, other = new_tag(), new_tag()
    both = site.open(tags=[one, other])
    site.open(tags=[one])
    token = site.token(f"read:tags:{one}")
    with running("subscribe", site, feed="tags", tags=[one, other], token=token) as feed:
        assert feed.next("run")["id"] == both.id
        late = site.open(name="late", tags=[other, one, new_tag()])
        assert (feed.until("run", lambda run: run["id"] == late.id))["taskIdentifier"] == "late"
        joined = site.open(tags=[other])
        joined.update(tags=[one])
        feed.until("run", lambda run: run["id"] == joined.id)
        both.update(metadata={"a": 1})
        assert feed.until("run", lambda run: run["id"] == both.id)["metadata"] == {"a": 1}
        for run in (both, late):
            run.end(output=run.id)
        outputs = {feed.until("run", ended)["output"] for _ in range(2)}
        feed.send("abort")
        rest = feed.rest()
    assert outputs == {both.id, late.id}
    assert {run["id"] for run in runs_in(rest)} <= {joined.id}


def test_changes_of_other_runs_do_not_answer_a_held_request(site: Site) -> None:
    """A list of several tags follows one of their topics. An empty response would be polled again immediately."""
    tags = sorted(new_tag() for _ in range(2))
    run = site.open(tags=tags)
    other = site.open(tags=tags[:1])
    query = f"tags={tags[0]}%2C{tags[1]}".replace(":", "%3A")
    with running("subscribe", site, feed="tags", tags=tags, token=site.token("read:tags")) as feed:
        assert feed.next("run")["id"] == run.id
        site.until_asked("/v1/runs", query=query, open=True)
        for number in range(20):
            other.update(metadata={"number": number})
        run.update(metadata={"number": -1})
        assert feed.next("run")["id"] == run.id
        assert len(site.until_asked("/v1/runs", query=query, times=3)) == 3
    other.end()


def test_a_list_of_large_runs_arrives_complete(site: Site) -> None:
    tag = new_tag()
    runs = [site.open(tags=[tag]) for _ in range(8)]
    for number, run in enumerate(runs):
        run.end(output=f"{number}" * 1_000_000)
    with running("subscribe", site, feed="tags", tags=tag, token=site.token("read:tags"), breakAfter=8) as feed:
        found = {run["id"]: run["output"] for run in runs_in(feed.rest())}
    assert found == {run.id: f"{number}" * 1_000_000 for number, run in enumerate(runs)}


def test_one_tag_may_be_text(site: Site) -> None:
    tag = new_tag()
    runs = [site.open(tags=[tag]) for _ in range(5)]
    with running("subscribe", site, feed="tags", tags=tag, token=site.token(f"read:tags:{tag}"), breakAfter=5) as feed:
        found = runs_in(feed.rest())
    assert {run["id"] for run in found} == {run.id for run in runs}


def test_a_list_reaches_back_as_far_as_requested(site: Site) -> None:
    tag = new_tag()
    old = site.open(tags=[tag])
    # The age of a run depends on the system clock, which a test cannot set.
    born = datetime.now(UTC)
    site.until(lambda: (datetime.now(UTC) - born).total_seconds() > 1, "the run is older than a second")
    filters = {"createdAt": "1s", "skipColumns": ["metadata"]}
    with running("subscribe", site, feed="tags", tags=tag, filters=filters, token=site.token("read:tags")) as feed:
        site.until_asked("/v1/runs", query=f"tags={tag.replace(':', '%3A')}", times=2, open=False)
        new = site.open(tags=[tag], metadata={"a": 1})
        old.update(metadata={"a": 1})
        shown = feed.next("run")
        new.end()
        assert feed.until("run", ended)["id"] == new.id == shown["id"]
    assert "metadata" not in shown
    with running("subscribe", site, feed="tags", tags=tag, filters={"createdAt": "1h"}, breakAfter=2) as feed:
        assert {run["id"] for run in runs_in(feed.rest())} == {old.id, new.id}


@both_brokers
def test_the_runs_of_a_batch_are_followed(site: Site) -> None:
    batch = site.post("batch_trigger", items=[["echo", 1], ["echo", 2], ["steps", {"count": 1}]])
    with running("subscribe", site, feed="batch", batch=batch["id"], token=batch["publicAccessToken"]) as feed:
        over: dict[str, Any] = {}
        while len(over) < 2:
            run = feed.until("run", ended)
            over[run["id"]] = run["output"]
        assert over == dict(zip(batch["runs"][:2], (1, 2), strict=True))
        site.send(batch["runs"][2], "next", "go")
        last = feed.until("run", lambda run: ended(run) and run["id"] == batch["runs"][2])
        assert last["output"] == {"received": ["go"]}


@both_brokers
def test_the_streams_of_a_run_come_with_it(site: Site) -> None:
    run = site.open()
    run.append("first", "second")
    with running("subscribe", site, feed="run", run=run.id, token=run.token, withStreams=True) as feed:
        shown = feed.next("run")
        assert shown["realtimeStreams"] == ["default"]
        assert [feed.until("chunk") for _ in range(2)] == ["first", "second"]
        run.append({"line": 1}, stream="log")  # of a new stream
        assert feed.until("chunk") == {"line": 1}
        run.append("third")
        assert feed.until("chunk") == "third"
        run.append("last words")
        run.end(output="done")
        lines = [feed.line(), feed.line()]
        assert {"chunk": "last words", "stream": "default"} in lines
        assert [run["output"] for run in runs_in(lines)] == ["done"]
        feed.send("abort")  # the package does not end a feed with streams
        assert feed.rest()[-1].keys() == {"end"}
    assert all(seen["status"] == 200 for seen in site.requests(f"/streams/{run.id}/"))
    assert len(site.requests(f"/streams/{run.id}/")) == 2
