"""`?protocol=ai-sdk` and `ag-ui`: how bodies begin, resume and end, and what they must never look like."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from asgi_realtime.ai.ui_stream import UiMessageStream
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.config import Retention, Timeouts
from asgi_realtime.core.log import End
from asgi_realtime.core.runs import Status
from asgi_realtime.testing import AsgiClient, StreamedResponse
from tests.asgi.fake_host import FakeHost

pytestmark = pytest.mark.anyio

PATH = "/v1/streams/run_1/default"
AI_SDK = f"{PATH}?protocol=ai-sdk"
AG_UI = f"{PATH}?protocol=ag-ui"
BOTH = pytest.mark.parametrize("path", [AI_SDK, AG_UI])


@pytest.fixture(autouse=True)
def no_errors_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def types(response: StreamedResponse) -> list[str]:
    """The types of all remaining events. None of them has a name."""
    events = await response.read_all_events()
    assert {event.event for event in events} <= {"message"}
    return [event.data if event.data == "[DONE]" else json.loads(event.data)["type"] for event in events]


async def read(host: FakeHost, path: str = AI_SDK, **headers: str) -> list[str]:
    async with AsgiClient(host).stream(path, headers=host.headers(**headers)) as response:
        assert response.status_code == 200, await response.read()
        return await types(response)


async def refusal(host: FakeHost, path: str = AI_SDK, **headers: str) -> tuple[int, str]:
    response = await AsgiClient(host).get(path, headers={"accept": "text/event-stream", **host.headers(**headers)})
    return response.status_code, response.json()["error"]


async def test_a_body_for_the_ai_sdk(host: FakeHost) -> None:
    await host.create()
    await host.append("Hel", "lo")
    await host.finish()
    async with AsgiClient(host).stream(AI_SDK, headers=host.headers()) as response:
        assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert (await response.read()).decode() == (
            ": connected\n"
            'data: {"type":"start","messageId":"msg_run_1"}\n\n'
            'data: {"type":"text-start","id":"plain"}\n\n'
            'id: 1\ndata: {"type":"text-delta","id":"plain","delta":"Hello"}\n\n'
            'data: {"type":"text-end","id":"plain"}\n\n'
            'id: 2\ndata: {"type":"finish","finishReason":"stop"}\n\n'
            "data: [DONE]\n\n"
        )


async def test_a_body_for_ag_ui(host: FakeHost) -> None:
    await host.create()
    await host.append("Hel", "lo")
    await host.finish(status=Status.CANCELED)
    async with AsgiClient(host).stream(AG_UI, headers=host.headers()) as response:
        assert "x-vercel-ai-ui-message-stream" not in response.headers
        assert (await response.read()).decode() == (
            ": connected\n"
            'data: {"type":"RUN_STARTED","threadId":"run_1","runId":"run_1"}\n\n'
            'data: {"type":"TEXT_MESSAGE_START","messageId":"msg_run_1-text-plain","role":"assistant"}\n\n'
            'id: 1\ndata: {"type":"TEXT_MESSAGE_CONTENT","messageId":"msg_run_1-text-plain","delta":"Hello"}\n\n'
            'data: {"type":"TEXT_MESSAGE_END","messageId":"msg_run_1-text-plain"}\n\n'
            'id: 2\ndata: {"type":"RUN_FINISHED","threadId":"run_1","runId":"run_1",'
            '"outcome":{"type":"cancelled"}}\n\n'
        )


async def test_live_chunks_are_sent_one_by_one(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(AI_SDK, headers=host.headers()) as response:
        assert (await response.chunk()).startswith(b": ")
        await host.append("a")
        assert [json.loads((await response.next_event()).data)["type"] for _ in range(3)][-1] == "text-delta"
        for letter in "bc":
            await host.append(letter)
            event = await response.next_event()
            assert json.loads(event.data)["delta"] == letter
        await host.append({"type": "finish", "finishReason": "length"})
        assert await response.chunk() == b": \n", "a chunk without events"
        await host.finish()
        last = [await response.next_event() for _ in range(3)][1]
        assert json.loads(last.data) == {"type": "finish", "finishReason": "length"}


@BOTH
async def test_a_quiet_stream_has_heartbeats(host: FakeHost, path: str) -> None:
    await host.create()
    async with AsgiClient(host).stream(path, headers=host.headers()) as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(host.timeouts.heartbeat)
        assert await response.chunk() == b": heartbeat\n"


@BOTH
async def test_a_resumed_body_has_only_the_tail(host: FakeHost, path: str) -> None:
    await host.create()
    await host.append("a", "b", "c")
    async with AsgiClient(host).stream(path, headers=host.headers(last_event_id="0")) as response:
        event = await response.next_event()
        assert json.loads(event.data)["delta"] == "bc"
        assert event.id == "2"
        await host.finish()
        assert [kind.lower().replace("_", "-")[:4] for kind in await types(response)][:2] in (
            ["text", "fini"],
            ["text", "run-"],
        )


@BOTH
async def test_a_client_that_has_the_end_gets_nothing(host: FakeHost, path: str) -> None:
    await host.create()
    await host.append("a")
    await host.finish()
    response = await AsgiClient(host).get(path, headers=host.headers(last_event_id="1"))
    assert (response.status_code, response.body) == (204, b"")


@BOTH
@pytest.mark.parametrize("ended", [False, True])
async def test_an_id_past_the_end_is_an_error(host: FakeHost, path: str, ended: bool) -> None:
    await host.create()
    await host.append("a", "b")
    if ended:
        await host.finish()
    status, error = await refusal(host, path, last_event_id="9")
    assert status == 400
    assert error == "Last-Event-ID is 9, past the end of the stream: the last id is 1; start without an id"
    assert (await refusal(host, path, last_event_id="x"))[0] == 400


@pytest.mark.parametrize(
    ("status", "last"),
    [
        (Status.COMPLETED, ["finish", "RUN_FINISHED"]),
        (Status.FAILED, ["error", "RUN_ERROR"]),
        (Status.CANCELED, ["abort", "RUN_FINISHED"]),
        (Status.CRASHED, ["error", "RUN_ERROR"]),
        (Status.TIMED_OUT, ["error", "RUN_ERROR"]),
    ],
)
@pytest.mark.parametrize("live", [False, True])
async def test_every_end_of_a_run(host: FakeHost, status: Status, last: list[str], live: bool) -> None:
    await host.create()
    await host.append("a")
    for path, kind in zip((AI_SDK, AG_UI), last, strict=True):
        if not live:
            await host.finish(status=status)
        async with AsgiClient(host).stream(path, headers=host.headers()) as response:
            await response.chunk()
            if live:
                await host.finish(status=status)
            assert (await types(response))[-2 if path == AI_SDK else -1] == kind
            assert response.ended


async def test_a_run_that_expires_has_an_error(host: FakeHost) -> None:
    await host.create(executing=False)
    await host.finish(status=Status.EXPIRED)
    assert await read(host) == ["start", "error", "[DONE]"]
    assert await read(host, AG_UI) == ["RUN_STARTED", "RUN_ERROR"]


async def test_the_error_is_what_subscribers_see(host: FakeHost) -> None:
    await host.create()
    await host.finish(status=Status.FAILED, error="no credit")
    for path in (AI_SDK, AG_UI):
        body = await AsgiClient(host).get(path, headers=host.headers())
        assert b'"no credit"' in body.body
        hidden = {"authorization": f"Bearer {host.token(skip_columns=['error'])}"}
        body = await AsgiClient(host).get(path, headers=hidden)
        assert b"no credit" not in body.body and b"the run failed" in body.body


# What must not look finished


async def cut_off(host: FakeHost, path: str, cut: Any, **headers: str) -> list[str]:
    """The types of the events of a body that is broken."""
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(path, headers=host.headers(**headers)) as response:
        while not json.loads((await response.next_event()).data).get("delta"):
            pass
        await anyio.wait_all_tasks_blocked()
        cut()
        found = await types(response)
        assert not response.ended
    assert not host.subscribers and host.app.subscription_limits.open == 0
    return found


@BOTH
async def test_a_shutdown_breaks_the_connection(host: FakeHost, path: str) -> None:
    assert (await cut_off(host, path, host.begin_shutdown)) == []


@BOTH
async def test_an_expired_token_breaks_the_connection(host: FakeHost, path: str) -> None:
    assert (await cut_off(host, path, lambda: host.tick(3600))) == []


@BOTH
async def test_an_old_connection_is_broken(path: str) -> None:
    host = FakeHost(timeouts=Timeouts(stream_age=60, heartbeat=60))

    def grow_old() -> None:
        host.tick()
        host.tick(61)

    assert (await cut_off(host, path, grow_old)) == []


@BOTH
async def test_a_stream_that_cannot_be_followed_breaks_the_connection(host: FakeHost, path: str) -> None:
    await host.create()
    async with host.broker.live(StreamKey("run_1", "default")) as live:
        async with AsgiClient(host).stream(path, headers=host.headers()) as response:
            await response.chunk()
            live.fail(RuntimeError("another process has it now"))
            assert await types(response) == [] and not response.ended


@BOTH
async def test_a_shutdown_waits_for_a_run_that_drains(host: FakeHost, path: str) -> None:
    await host.create()
    host.draining.add("run_1")
    async with AsgiClient(host).stream(path, headers=host.headers()) as response:
        await response.chunk()
        host.begin_shutdown()
        await host.append("a")
        await host.finish()
        assert len(await types(response)) >= 4
        assert response.ended


@BOTH
async def test_a_request_during_a_shutdown_is_refused(host: FakeHost, path: str) -> None:
    await host.create()
    host.begin_shutdown()
    assert (await refusal(host, path))[0] == 503


@BOTH
async def test_a_lost_stream_is_an_error(host: FakeHost, path: str) -> None:
    await host.create()
    await host.append("a")
    await host.broker.append(StreamKey("run_1", "default"), [], end=End("lost", "two chunks were lost"))
    async with AsgiClient(host).stream(path, headers=host.headers()) as response:
        assert b"two chunks were lost" in await response.read()


@BOTH
async def test_a_stream_that_has_lost_its_beginning_is_refused(path: str) -> None:
    host = FakeHost(retention=Retention(stream_bytes=100))
    await host.create()
    await host.append(*["x" * 60] * 4)
    status, error = await refusal(host, path)
    assert status == 410
    assert error == "chunks 0 to 2 of this answer have expired"
    assert (await refusal(host, path, last_event_id="1"))[0] == 410
    async with AsgiClient(host).stream(path, headers=host.headers(last_event_id="2")) as response:
        assert json.loads((await response.next_event()).data)["delta"] == "x" * 60


@BOTH
async def test_a_reader_that_falls_behind_the_retained_part_gets_an_error(path: str) -> None:
    host = FakeHost(retention=Retention(stream_bytes=100))
    await host.create()
    async with AsgiClient(host).stream(path, headers=host.headers()) as response:
        await response.chunk()
        for _ in range(6):
            await host.append("x" * 60)
        body = await response.read()
        assert b"of this answer have expired" in body
        assert b"finish" not in body and b"RUN_FINISHED" not in body
        assert response.ended, "resuming does not help"


@BOTH
async def test_a_chunk_that_is_no_part_ends_with_an_error(
    host: FakeHost, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    await host.create()
    await host.append("a", {"choices": []})
    with caplog.at_level(logging.WARNING):
        async with AsgiClient(host).stream(path, headers=host.headers()) as response:
            body = await response.read()
    assert b"asgi_realtime.ai.parts(source)" in body
    assert b'"delta":"a"' in body
    (record,) = caplog.records
    assert "asgi_realtime.ai.parts(source)" in record.getMessage()


@BOTH
async def test_a_live_chunk_that_is_no_part_ends_with_an_error(host: FakeHost, path: str) -> None:
    await host.create()
    async with AsgiClient(host).stream(path, headers=host.headers()) as response:
        await response.chunk()
        await host.append("a")
        await response.next_event()
        await host.append({"choices": []})
        assert b"asgi_realtime.ai.parts(source)" in await response.read()


# The parameter


async def test_an_unknown_protocol_is_refused(host: FakeHost) -> None:
    await host.create()
    expected = (400, "protocol is 'mcp'; allowed are sse, ai-sdk, ag-ui")
    assert await refusal(host, f"{PATH}?protocol=mcp") == expected


async def test_sse_is_the_native_protocol(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    await host.finish()
    bodies = [
        (await AsgiClient(host).get(path, headers=host.headers())).body for path in (PATH, f"{PATH}?protocol=sse")
    ]
    assert bodies[0] == bodies[1]


@BOTH
async def test_a_token_is_needed(host: FakeHost, path: str) -> None:
    await host.create()
    assert (await AsgiClient(host).get(path)).status_code == 401
    other = {"authorization": f"Bearer {host.token('read:runs:run_2')}"}
    assert (await AsgiClient(host).get(path, headers=other)).status_code == 403


async def test_readers_at_the_same_place_share_the_conversion(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    await host.create()
    calls: list[int] = []
    convert = UiMessageStream.convert

    def count(self: Any, state: Any, after: int, *args: Any, **options: Any) -> Any:
        calls.append(after)
        return convert(self, state, after, *args, **options)

    monkeypatch.setattr(UiMessageStream, "convert", count)
    client = AsgiClient(host)
    async with (
        client.stream(AI_SDK, headers=host.headers()) as one,
        client.stream(AI_SDK, headers=host.headers()) as other,
    ):
        await one.chunk(), await other.chunk()
        await host.append("a", "b")
        for response in (one, other):
            assert len([await response.next_event() for _ in range(3)]) == 3
    assert calls == [-1]
