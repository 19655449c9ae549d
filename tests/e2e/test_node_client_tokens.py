"""The official client in Node with tokens that the server rejects: what its user sees, and that it then disconnects."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from functools import partial

import pytest

from asgi_realtime import Realtime
from tests.e2e.node import running
from tests.e2e.site import SECRET, Line, Opened, Site, serving

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("node_ready")]


def expired(scope: str) -> str:
    an_hour_ago = Realtime(secret_key=SECRET, clock=lambda: time.time() - 3600)
    return an_hour_ago.create_public_token(scopes=[scope], expires_in="15m")


def foreign(scope: str) -> str:
    return Realtime(secret_key="another key, of 32 bytes or more").create_public_token(scopes=[scope])


def forged(scope: str) -> str:
    """The signature of a token that may read another run."""
    token = Realtime(secret_key=SECRET).create_public_token(scopes=["read:runs:run_of_mine"])
    header, claims, signature = token.split(".")
    signed = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    changed = base64.urlsafe_b64encode(json.dumps({**signed, "scopes": [scope]}).encode()).rstrip(b"=").decode()
    return f"{header}.{changed}.{signature}"


def unsigned(scope: str) -> str:
    _, claims, _ = Realtime(secret_key=SECRET).create_public_token(scopes=[scope]).split(".")
    header = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    return f"{header}.{claims}."


def for_another(scope: str) -> str:
    return Realtime(secret_key=SECRET).create_public_token(scopes=[f"{scope}x"])


REFUSED = {expired: 401, foreign: 401, forged: 401, unsigned: 401, for_another: 403}


def test_streams_runs_and_triggers_are_rejected(site: Site) -> None:
    run = site.open()
    run.append("secret")
    tokens = {make.__name__: make(f"read:runs:{run.id}") for make in REFUSED}
    with running("refused", site, run=run.id, task="echo", tokens=tokens) as program:
        for make, status in REFUSED.items():
            assert program.next("token") == make.__name__
            for _ in ("read", "retrieve", "trigger"):
                error = program.next("error")
                assert (make.__name__, error["status"]) == (make.__name__, status)
        assert program.rest() == []
    assert [seen["status"] for seen in site.requests(f"/streams/{run.id}/")] == list(REFUSED.values())
    run.end()


def test_a_read_token_does_not_trigger_nor_a_trigger_token_read(site: Site) -> None:
    run = site.open()
    tokens = {"read": run.token, "trigger": site.token("trigger:tasks:echo")}
    with running("refused", site, run=run.id, task="unlucky", tokens=tokens) as program:
        run.end()
        assert [program.next("token"), program.until("error")["status"]] == ["read", 403]
        assert [program.next("token")] + [program.next("error")["status"] for _ in range(3)] == ["trigger"] + [403] * 3


def test_a_rejected_feed_is_polled_once() -> None:
    """The polls of an accepted feed show that enough time has passed for a second try."""
    with serving("memory", poll_s=0.2) as site:
        run = site.open()
        forbidden = {make: site.open() for make in REFUSED}
        refused = [[other.id, make(f"read:runs:{other.id}")] for make, other in forbidden.items()]
        with running("refused_feed", site, run=run.id, refused=refused, token=run.token) as program:
            program.next("run")
            site.until_asked(f"/runs/{run.id}", query="live=true", times=5)
            for other in forbidden.values():
                other.update(metadata={"secret": 1})
            run.end()
            lines = program.rest()
        assert not [line for line in lines if "refused" in line]
        for make, other in forbidden.items():
            assert [seen["status"] for seen in site.requests(f"/runs/{other.id}")] == [REFUSED[make]]


@pytest.fixture(scope="module")
def ahead() -> Iterator[Site]:
    """A server with a clock that the tests move ahead."""
    with serving("memory") as site:
        yield site


def soon_expired(site: Site, run: Opened) -> str:
    return site.token(f"read:runs:{run.id}", expires_in=f"{site.ahead_s + 10}s")


def test_a_stream_ends_when_its_token_expires(ahead: Site) -> None:
    run = ahead.open()
    run.append("a")
    with running("read", ahead, run=run.id, token=soon_expired(ahead, run)) as reader:
        assert reader.next("chunk") == "a"
        ahead.move_clock(20)
        (line,) = reader.rest()
    assert line["error"]["status"] == 401
    assert [seen["status"] for seen in ahead.requests(f"/streams/{run.id}/")] == [200, 401]


def has_number(number: int, run: Line) -> bool:
    return bool(run["metadata"].get("number") == number)


def test_a_stream_continues_with_a_new_token(ahead: Site) -> None:
    run = ahead.open()
    run.append("a")
    stale = soon_expired(ahead, run)
    with running("api", ahead, calls=["refreshed"], run=run.id, stale=stale, fresh=run.token) as program:
        assert program.next("chunk") == "a"
        ahead.move_clock(20)
        assert program.next("refreshed")
        run.append("b")
        assert program.next("chunk") == "b"
        run.end()
        assert program.rest() == []
    asked = [(seen["last_event_id"], seen["status"]) for seen in ahead.requests(f"/streams/{run.id}/")]
    assert asked == [(None, 200), ("0", 401), ("0", 200)]


def test_a_feed_ends_when_its_token_expires(ahead: Site) -> None:
    run, other = ahead.open(), ahead.open()
    refused = [[run.id, soon_expired(ahead, run)]]
    with running("refused_feed", ahead, run=other.id, refused=refused) as program:
        program.until("refused")  # the first state, before the token expires
        ahead.until_asked(f"/runs/{run.id}", query="live=true", open=True)
        ahead.move_clock(20)
        ahead.until(lambda: ahead.requests(f"/runs/{run.id}")[-1]["status"] == 401, "the feed is rejected")
        run.update(metadata={"secret": 1})
        for number in range(3):
            other.update(metadata={"number": number})
            program.until("run", partial(has_number, number))
        other.end()
        lines = program.rest()
    assert not [line for line in lines if "refused" in line]
    statuses = [seen["status"] for seen in ahead.requests(f"/runs/{run.id}")]
    assert statuses.count(401) == 1 and not any(seen["open"] for seen in ahead.requests(f"/runs/{run.id}"))
