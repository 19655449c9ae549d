from __future__ import annotations

from typing import Any

import anyio
import pytest

from asgi_realtime import (
    Cors,
    ExpiredToken,
    InvalidConfiguration,
    InvalidToken,
    LimitExceeded,
    Limits,
    NoCurrentRun,
    Realtime,
    Retention,
    RunNotFound,
    StreamClosed,
    Timeouts,
    UsageError,
    current_run,
)
from asgi_realtime.brokers.memory import MemoryBroker
from tests.inprocess import SECRET, FakeClock, make_realtime

ONE_LINER = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
OTHER = "another secret of the tests, also of 32 bytes or more"


# Construction


@pytest.mark.parametrize("secret", [None, "", [], [""], [SECRET, ""]])
def test_a_missing_secret_is_rejected_with_the_command_that_generates_one(secret: Any) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        Realtime(secret_key=secret)
    assert str(caught.value) == f"secret_key is missing; generate one with: {ONE_LINER}"


def test_a_secret_is_required() -> None:
    with pytest.raises(InvalidConfiguration, match="secret_key is missing"):
        Realtime()


@pytest.mark.parametrize("secret", ["x" * 31, [SECRET, "x" * 31]])
def test_a_short_secret_is_rejected_without_being_shown(secret: Any) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        Realtime(secret_key=secret)
    assert str(caught.value) == f"secret_key is 31 bytes, minimum 32; generate one with: {ONE_LINER}"


@pytest.mark.parametrize("secret", ["x" * 32, "ä" * 16, [SECRET, OTHER], (SECRET,)])
def test_one_secret_or_several_of_32_bytes_are_enough(secret: Any) -> None:
    Realtime(secret_key=secret)


def test_the_first_secret_signs_and_all_verify() -> None:
    old, both, new = (Realtime(secret_key=secret) for secret in (SECRET, [OTHER, SECRET], OTHER))
    scopes = ["read:runs:run_1"]
    assert both.verify_token(old.create_public_token(scopes=scopes)).scopes == tuple(scopes)
    assert new.verify_token(both.create_public_token(scopes=scopes)).scopes == tuple(scopes)
    with pytest.raises(InvalidToken, match="wrong signature"):
        old.verify_token(both.create_public_token(scopes=scopes))


def test_the_repr_contains_no_secret() -> None:
    assert repr(make_realtime()) == "<Realtime broker=MemoryBroker>"


def test_a_broker_is_a_url_or_an_object() -> None:
    broker = MemoryBroker()
    assert make_realtime(broker=broker).broker is broker
    with pytest.raises(InvalidConfiguration, match="broker 'kafka://' is not known; allowed are memory://, redis://"):
        make_realtime(broker="kafka://")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"secret_key": 123}, "secret_key is a int; pass a str, generated with: "),
        ({"secret_key": {"a": SECRET}}, "secret_key is a dict; pass a str, generated with: "),
        ({"secret_key": SECRET.encode()}, "secret_key is a bytes; pass a str, generated with: "),
        ({"secret_key": [SECRET, 5]}, "secret_key is a int; pass a str, generated with: "),
        ({"broker": None}, "broker is None; allowed are a URL such as 'redis://…' and a Broker object"),
        ({"limits": {"tags": 5}}, "limits is a dict; allowed is Limits(…)"),
        ({"retention": 60}, "retention is 60; allowed is Retention(…)"),
        ({"timeouts": Limits()}, "timeouts is a Limits; allowed is Timeouts(…)"),
        ({"cors": True}, "cors is True; allowed are '*', a list of origins, Cors(…) and None"),
        ({"api": None}, "api is None; allowed are True and False"),
        ({"inspector": "/runs"}, "inspector is '/runs'; allowed are True and False"),
        ({"signals": 15}, "signals is 15; allowed are True and False"),
        ({"debug": "0"}, "debug is '0'; allowed are True and False"),
        ({"clock": 5}, "clock is 5; allowed is a function that returns unix seconds"),
    ],
)
def test_a_setting_of_a_wrong_type_is_rejected_with_what_is_allowed(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        make_realtime(**wrong)
    assert str(caught.value).startswith(message)


def test_settings_reach_their_parts() -> None:
    limits, retention, timeouts = Limits(tags=1), Retention(after_end=1), Timeouts(tick=1)
    realtime = make_realtime(limits=limits, retention=retention, timeouts=timeouts)
    assert (realtime.limits, realtime.retention, realtime.timeouts) == (limits, retention, timeouts)
    assert (realtime.api, realtime.debug) == (True, False)
    plain = Realtime(secret_key=SECRET)
    assert (plain.limits, plain.retention, plain.timeouts) == (Limits(), Retention(), Timeouts())


@pytest.mark.parametrize(
    ("cors", "kept"),
    [
        ("*", Cors("*")),
        (["https://a.example"], Cors(["https://a.example"])),
        (Cors("https://a.example", max_age=1), Cors("https://a.example", max_age=1)),
        (None, None),
    ],
)
def test_cors_is_a_star_a_list_a_value_or_none(cors: Any, kept: Any) -> None:
    assert make_realtime(cors=cors).cors == kept


def test_creating_a_realtime_has_no_side_effect() -> None:
    realtime = make_realtime()
    assert realtime.engine.supervisor is None
    assert not realtime.closing
    assert realtime.subscribers == set()


# Tokens


def test_a_public_token_has_the_requested_scopes() -> None:
    clock = FakeClock()
    realtime = make_realtime(clock=clock)
    token = realtime.create_public_token(scopes={"read": {"runs": ["run_1", "run_2"], "tags": "user:1"}})
    claims = realtime.verify_token(token)
    assert set(claims.scopes) == {"read:runs:run_1", "read:runs:run_2", "read:tags:user:1"}
    assert claims.expires_at == clock.seconds + 15 * 60
    assert not claims.one_time and not claims.secret
    clock.seconds += 15 * 60
    with pytest.raises(ExpiredToken):
        realtime.verify_token(token)


@pytest.mark.parametrize(
    "scopes",
    [
        {"read": {"runs": []}},
        {"read": {"runz": ["run_1"]}},
        {"reed": {"runs": ["run_1"]}},
        {"read": True},
        {},
        [],
        ["reed:runs:run_1"],
        "read:runs:run_1",
    ],
)
def test_empty_and_unknown_scopes_are_rejected(scopes: Any) -> None:
    with pytest.raises(UsageError):
        make_realtime().create_public_token(scopes=scopes)


@pytest.mark.parametrize("span", ["soon", 0, -1, None])
def test_a_token_expires_after_a_span(span: Any) -> None:
    with pytest.raises(UsageError, match="expires_in is"):
        make_realtime().create_public_token(scopes=["read:runs:run_1"], expires_in=span)


def test_a_trigger_token_is_for_its_tasks_and_one_use() -> None:
    realtime = make_realtime()

    @realtime.task("chat")
    async def chat() -> None: ...

    claims = realtime.verify_token(realtime.create_trigger_public_token(chat))
    assert claims.scopes == ("trigger:tasks:chat",)
    assert claims.one_time
    claims = realtime.verify_token(
        realtime.create_trigger_public_token(["chat", "other"], multiple_use=True, expires_in="1h")
    )
    assert claims.scopes == ("trigger:tasks:chat", "trigger:tasks:other")
    assert not claims.one_time
    assert realtime.create_trigger_public_token("chat") != realtime.create_trigger_public_token("chat")
    wrong: list[list[str] | str] = [[], ["a/b"], ""]
    for tasks in wrong:
        with pytest.raises(UsageError):
            realtime.create_trigger_public_token(tasks)


def test_a_batch_trigger_token_is_for_batches_of_its_tasks() -> None:
    realtime = make_realtime()
    claims = realtime.verify_token(realtime.create_batch_trigger_public_token(["chat", "other"]))
    assert claims.scopes == ("batchTrigger:tasks:chat", "batchTrigger:tasks:other")
    assert claims.one_time
    token = realtime.create_batch_trigger_public_token("chat", multiple_use=True, skip_columns=["output"])
    claims = realtime.verify_token(token)
    assert (claims.one_time, claims.skip_columns) == (False, ("output",))


def test_a_token_can_omit_columns() -> None:
    realtime = make_realtime()
    token = realtime.create_public_token(scopes=["read:runs"], skip_columns=["payload", "runTags", "payload"])
    assert realtime.verify_token(token).skip_columns == ("payload", "runTags")
    token = realtime.create_trigger_public_token("chat", skip_columns=("metadata",))
    assert realtime.verify_token(token).skip_columns == ("metadata",)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["status"], "skip_columns has 'status'; allowed are startedAt, "),
        (["tags"], "skip_columns has 'tags'"),  # the column of a run feed has another name
        (["payloads"], "skip_columns has 'payloads'"),
        ("id", "skip_columns has 'id'"),
        ([1], "skip_columns has a int"),
    ],
)
def test_a_token_rejects_unknown_columns(columns: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_realtime().create_public_token(scopes=["read:runs"], skip_columns=columns)
    with pytest.raises(UsageError, match=message):
        make_realtime().create_trigger_public_token("chat", skip_columns=columns)


def test_tokens_with_the_same_claims_differ() -> None:
    """A client reads what it triggered with its token, and nothing that another token triggered."""
    realtime = make_realtime(clock=FakeClock())
    tokens = [realtime.create_trigger_public_token("chat", multiple_use=True) for _ in range(2)]
    assert len({realtime.verify_token(token).token_id for token in tokens}) == 2


def test_a_string_that_is_not_a_token_is_rejected() -> None:
    for bad in ("", "x", "a.b.c"):
        with pytest.raises(InvalidToken):
            make_realtime().verify_token(bad)


# Arguments that name a run


@pytest.mark.anyio
async def test_a_run_is_an_id_a_handle_a_run_or_a_record() -> None:
    realtime = make_realtime()

    @realtime.task("echo")
    async def echo(payload: str) -> str:
        return payload

    async with realtime:
        handle = await realtime.trigger(echo, "x")
        await handle.result()
        record = await realtime.get_run(handle)
        for run in (handle, handle.id, record):
            assert await realtime.get_run(run) == record
            assert await realtime.result(run) == "x"
            assert await realtime.cancel(run) == record
            assert [one async for one in realtime.subscribe_to_run(run)] == [record]
            assert [chunk async for chunk in realtime.read(run)] == []
            with pytest.raises(StreamClosed):
                await realtime.append("late", run=run)
        async with realtime.open_run("r") as opened:
            assert (await realtime.get_run(opened)).id == opened.id
            await realtime.append("a", run=opened)
            await realtime.send_input(opened, "in", 1)


@pytest.mark.parametrize("run", [None, "", 3, {"id": "run_1"}, object()])
@pytest.mark.anyio
async def test_anything_else_is_not_a_run(run: Any) -> None:
    async with make_realtime() as realtime:
        for call in (realtime.get_run, realtime.cancel, realtime.result):
            with pytest.raises(UsageError, match="a run is a .*; pass its id, a RunHandle, a Run or a RunRecord"):
                await call(run)
        with pytest.raises(UsageError):
            realtime.read(run)


@pytest.mark.anyio
async def test_an_unknown_run_is_not_found() -> None:
    async with make_realtime() as realtime:
        for call in (realtime.get_run, realtime.cancel, realtime.result):
            with pytest.raises(RunNotFound):
                await call("run_unknown")
        with pytest.raises(RunNotFound):
            await realtime.append(1, run="run_unknown")


@pytest.mark.anyio
async def test_without_a_current_run_a_run_is_required() -> None:
    async with make_realtime() as realtime, make_realtime() as other:
        with pytest.raises(NoCurrentRun, match="pass run="):
            await realtime.append(1)
        with pytest.raises(NoCurrentRun):
            realtime.writer()
        async with other.open_run("elsewhere") as run:
            assert current_run() is run
            with pytest.raises(NoCurrentRun):
                await realtime.append(1)  # the current run belongs to another `Realtime`


@pytest.mark.anyio
async def test_inside_a_run_a_pipe_rejects_tags() -> None:
    async with make_realtime() as realtime, realtime.open_run("r"):
        with pytest.raises(UsageError, match="use run.tags and run.metadata"):
            realtime.pipe([1], tags="x")


@pytest.mark.anyio
async def test_the_run_of_a_lone_pipe_is_checked_before_it_is_created() -> None:
    async with make_realtime() as realtime:
        with pytest.raises(LimitExceeded):
            realtime.pipe([1], tags=list("abcdefghijk"))
        with pytest.raises(UsageError):
            realtime.pipe([1], "$hidden")
        with pytest.raises(UsageError):
            realtime.pipe([1], task="a/b")
        with pytest.raises(UsageError):
            realtime.pipe([1], metadata={"": 1})
        assert realtime.runs.creating == {}


@pytest.mark.anyio
async def test_the_number_of_cached_append_writers_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_realtime.engine.producers._SHARED_WRITERS", 2)
    async with make_realtime() as realtime, realtime.open_run("r") as run:
        for name in ("a", "b", "c", "a"):
            await realtime.append(name, name)
        assert len(realtime._producers._shared) == 2
    assert run.id


@pytest.mark.anyio
async def test_concurrent_appends_keep_their_order() -> None:
    async with make_realtime() as realtime:
        async with realtime.open_run("r") as run, anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(realtime.append, number)
        assert sorted([chunk async for chunk in realtime.read(run)]) == list(range(50))


@pytest.mark.anyio
async def test_the_realtime_is_an_asgi_app() -> None:
    realtime = make_realtime()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/health",
        "raw_path": b"/v1/health",
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }
    async with realtime:
        await realtime(scope, receive, send)
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("name", ["limits", "broker", "cors", "executor", "secret_key"])
def test_a_setting_cannot_be_assigned_later(name: str) -> None:
    """The parts have read it already, so the assignment had an effect on some of them or on none."""
    with pytest.raises(AttributeError, match=f"realtime.{name} cannot be assigned; pass {name}= to Realtime"):
        setattr(make_realtime(), name, None)


@pytest.mark.anyio
async def test_the_longest_lifetime_of_a_token_is_the_same_everywhere() -> None:
    """A token for 365 days was created in Python and rejected over HTTP."""
    realtime = make_realtime()
    words = r"expires_in is 31536000 seconds, limit 2592000; Limits\(token_life=…\) sets the limit"
    with pytest.raises(LimitExceeded, match=words):
        realtime.create_public_token(scopes=["read:runs"], expires_in="365d")
    with pytest.raises(LimitExceeded, match=words):
        realtime.create_trigger_public_token("t", expires_in="365d")
    with pytest.raises(LimitExceeded, match=f"token_{words}"):
        await realtime.trigger("t", token_expires_in="365d")
    long = make_realtime(limits=Limits(token_life=400 * 24 * 3600))
    assert long.create_public_token(scopes=["read:runs"], expires_in="365d")


@pytest.mark.anyio
async def test_a_default_lifetime_is_shortened_to_the_limit() -> None:
    async with make_realtime(limits=Limits(token_life=60)) as realtime, realtime.open_run("r") as run:
        claims = realtime.verify_token(run.handle.public_access_token)
        assert claims.expires_at - realtime.clock() <= 61
