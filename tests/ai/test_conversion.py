"""What a client has after any number of cuts and resumes is what a client has that was never cut.

The clients here are small models of the real ones. As the protocol demands, they treat events without an id as part of
the next event with one. The AI SDK's client is `assemble`; that of AG-UI rejects what the real one rejects.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.ai.ag_ui import AgUi
from asgi_realtime.ai.conversion import Conversion
from asgi_realtime.ai.message import assemble
from asgi_realtime.ai.ui_stream import UiMessageStream
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.log import End, Entry

COMPLETE = End("complete")
AI_SDK: Conversion[Any] = UiMessageStream("run_1")
AG_UI: Conversion[Any] = AgUi("run_1", "thread_1")

ids = st.sampled_from("ab")
texts = st.text("xyz\ud83d ", max_size=3)


def part(type: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"type": st.just(type), **fields})


calls = {"toolCallId": ids, "toolName": st.just("add")}
chunks = st.lists(
    st.one_of(
        texts,
        *(part(f"{kind}-{step}", id=ids) for kind in ("text", "reasoning") for step in ("start", "end")),
        *(part(f"{kind}-delta", id=ids, delta=texts) for kind in ("text", "reasoning") for _ in range(3)),
        part("tool-input-available", **calls, input=st.just({"n": 1})),
        part("tool-output-available", toolCallId=ids, output=st.none() | st.just("3")),
        part("start-step"),
        part("finish-step"),
        part("data-x", data=st.integers(0, 3), id=ids),
        part("start", messageId=st.just("mine"), messageMetadata=st.just({"m": 1})),
        part("finish", finishReason=st.just("length"), messageMetadata=st.just({"n": 2})),
    ),
    max_size=30,
)
tool_streams = st.builds(
    lambda deltas, between: [
        {"type": "tool-input-start", "toolCallId": "c", "toolName": "add"},
        *({"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": delta} for delta in deltas),
        *between,
        {"type": "tool-input-available", "toolCallId": "c", "toolName": "add", "input": "".join(deltas)},
        {"type": "tool-output-error", "toolCallId": "c", "errorText": "no"},
    ],
    st.lists(texts, max_size=5),
    st.lists(texts, max_size=2),
)
streams: st.SearchStrategy[list[Any]] = st.builds(lambda *lists: sum(lists, []), chunks, tool_streams, chunks)


def entries(items: list[Any]) -> list[Entry]:
    return [Entry(seq, encode_value(item), 0) for seq, item in enumerate(items)]


def parse(body: bytes) -> list[tuple[Any, int | None]]:
    """The events with the ids that they carry themselves."""
    found = []
    for frame in body.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        if fields["data"] != "[DONE]":
            found.append((json.loads(fields["data"]), int(fields["id"]) if "id" in fields else None))
    return found


def sent(conversion: Conversion[Any], log: list[Entry], after: int, end: End, sizes: list[int]) -> bytes:
    """What a server sends to a client that resumes: groups of stored chunks of these sizes, then one by one."""
    state = conversion.scan(conversion.beginning, log[: after + 1])
    body, place = b"", after + 1
    for size in [*sizes, *[1] * len(log)]:
        group = log[place : place + size]
        taken = (
            conversion.convert_one(state, *group) if len(group) == 1 else conversion.convert(state, place - 1, group)
        )
        body, place, state = body + taken.body, taken.last + 1, taken.state
    assert place == len(log)
    return body + conversion.end(state, end, len(log), is_first=not log)


def received(conversion: Conversion[Any], log: list[Entry], cuts: list[int], sizes: list[int]) -> list[Any]:
    """The events of a client whose connection breaks after each of these numbers of events."""
    events: list[Any] = []
    after = -1
    for cut in [*cuts, None]:
        pending: list[Any] = []
        for event, id in parse(sent(conversion, log, after, COMPLETE, sizes))[:cut]:
            pending.append(event)
            if id is not None:
                events += pending
                pending, after = [], id
        if after == len(log):
            break
    return events


cut_points = st.lists(st.integers(0, 20), max_size=3)
group_sizes = st.lists(st.integers(1, 12), max_size=6)


class AgUiClient:
    """The messages that AG-UI events form. Raises for events that a client rejects."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self.messages: dict[str, Any] = {}
        self.custom: list[Any] = []
        self.ending: Any = None
        self._open: list[tuple[str, str]] = []
        assert events[0]["type"] == "RUN_STARTED"
        for event in events[1:]:
            assert self.ending is None, "nothing follows the end"
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind, _, step = event["type"].rpartition("_")
        name = event.get("messageId") or event.get("toolCallId") or event.get("stepName") or ""
        if step in ("START", "STARTED"):
            assert (kind, name) not in self._open
            self._open.append((kind, name))
            self.messages.setdefault(f"{kind} {name}", "")
        elif step in ("CONTENT", "ARGS"):
            assert (kind, name) in self._open
            self.messages[f"{kind} {name}"] += event["delta"]
        elif kind != "RUN" and step in ("END", "FINISHED"):
            self._open.remove((kind, name))
        elif step == "RESULT":
            self.messages[f"result {event['messageId']}"] = event["content"]
        elif event["type"] == "CUSTOM":
            self.custom.append((event["name"], event["value"]))
        else:
            assert event["type"] == "RUN_ERROR" or not self._open, self._open
            self.ending = event


@given(streams, cut_points, group_sizes)
def test_cuts_and_resumes_change_nothing_for_the_ai_sdk(items: list[Any], cuts: list[int], sizes: list[int]) -> None:
    log = entries(items)
    whole = assemble([event for event, _ in parse(sent(AI_SDK, log, -1, COMPLETE, []))], message_id="?")
    assert assemble(received(AI_SDK, log, cuts, sizes), message_id="?") == whole


@given(streams, cut_points, group_sizes)
def test_cuts_and_resumes_change_nothing_for_ag_ui(items: list[Any], cuts: list[int], sizes: list[int]) -> None:
    log = entries(items)
    whole = AgUiClient([event for event, _ in parse(sent(AG_UI, log, -1, COMPLETE, []))])
    resumed = AgUiClient(received(AG_UI, log, cuts, sizes))
    assert vars(resumed) == vars(whole)


@given(streams, st.sampled_from(["complete", "failed", "canceled", "lost"]))
def test_one_message_is_what_the_host_assembles(items: list[Any], reason: str) -> None:
    """The client has what `assemble` makes of the stored chunks, except that the end closes what is open."""
    stored = assemble(items, message_id="msg_run_1")
    shown = assemble([event for event, _ in parse(sent(AI_SDK, entries(items), -1, End(reason), [30]))], message_id="?")
    if reason != "complete":
        stored.pop("metadata", None), shown.pop("metadata", None)
    for one in stored["parts"]:
        if one.get("state") == "streaming":
            one["state"] = "done"
    assert json.dumps(shown, sort_keys=True) == json.dumps(stored, sort_keys=True)


@given(streams)
def test_the_ai_sdk_gets_one_start_and_one_end_and_no_null(items: list[Any]) -> None:
    events = [event for event, _ in parse(sent(AI_SDK, entries(items), -1, COMPLETE, []))]
    types = [event["type"] for event in events]
    assert types[0] == "start" and types.count("start") == 1
    assert types[-1] == "finish" and types.count("finish") == 1
    for event in events:
        assert None not in [value for name, value in event.items() if name not in ("input", "output", "data")]


@given(streams, group_sizes)
def test_ids_ascend_and_the_last_event_has_one(items: list[Any], sizes: list[int]) -> None:
    for conversion in (AI_SDK, AG_UI):
        events = parse(sent(conversion, entries(items), -1, COMPLETE, sizes))
        found = [id for _, id in events if id is not None]
        assert found == sorted(set(found))
        assert events[-1][1] == len(items)


# What the chunks become


def converted(conversion: Conversion[Any], *items: Any, end: End | None = None) -> list[Any]:
    taken = conversion.convert(conversion.beginning, -1, entries(list(items)))
    assert taken.last == len(items) - 1
    body = taken.body if end is None else taken.body + conversion.end(taken.state, end, len(items), is_first=not items)
    return [event for event, _ in parse(body)]


def test_a_late_reader_gets_one_delta_for_each_part() -> None:
    items = [{"type": "text-start", "id": "1"}, {"type": "reasoning-start", "id": "1"}]
    items += [{"type": f"{kind}-delta", "id": "1", "delta": "x"} for _ in range(5000) for kind in ("text", "reasoning")]
    taken = AI_SDK.convert(AI_SDK.beginning, -1, entries(items))
    assert parse(taken.body)[-2:] == [
        ({"type": "text-delta", "id": "1", "delta": "x" * 5000}, None),
        ({"type": "reasoning-delta", "id": "1", "delta": "x" * 5000}, 10_001),
    ]


def test_a_joined_delta_has_no_id_before_all_of_its_chunk() -> None:
    """Here the last chunk is a delta and an end, and follows the delta of another part."""
    call = {"toolCallId": "c", "toolName": "add"}
    items = [{"type": "tool-input-start", **call}, "A", {"type": "tool-input-available", **call, "input": {}}]
    events = parse(AG_UI.convert(AG_UI.beginning, -1, entries(items)).body)
    assert [(event["type"], id) for event, id in events[3:]] == [
        ("TEXT_MESSAGE_CONTENT", 1),
        ("TOOL_CALL_ARGS", None),
        ("TOOL_CALL_END", 2),
    ]


def test_joined_deltas_keep_the_newest_metadata() -> None:
    delta = {"type": "text-delta", "id": "1", "delta": "x"}
    events = converted(AI_SDK, {"type": "text-start", "id": "1"}, {**delta, "providerMetadata": {"p": 1}}, delta)
    assert events[-1] == {**delta, "delta": "xx", "providerMetadata": {"p": 1}}


def test_halves_of_an_emoji_join() -> None:
    """Clients of models can split one between two deltas."""
    taken = AI_SDK.convert(AI_SDK.beginning, -1, entries(["\ud83d", "\ude00"]))
    assert parse(taken.body)[-1][0]["delta"] == "😀"


def test_a_body_ends_at_the_size() -> None:
    taken = AI_SDK.convert(AI_SDK.beginning, -1, entries(["x" * 100] * 10), max_bytes=500)
    assert 3 <= taken.last < 9


def test_a_first_start_keeps_its_id_and_metadata() -> None:
    start = {"type": "start", "messageId": "mine", "messageMetadata": {"model": "m"}}
    assert converted(AI_SDK, start) == [start]
    assert converted(AI_SDK, {"type": "start", "messageId": None}) == [{"type": "start", "messageId": "msg_run_1"}]
    assert [event["type"] for event in converted(AI_SDK, "x", start)] == ["start", "text-start", "text-delta"]


@pytest.mark.parametrize("chunk", [3, {"role": "assistant"}, {"type": "text-delta", "id": "1"}, ["x"]])
def test_a_conversion_stops_before_a_chunk_without_meaning(chunk: Any) -> None:
    for conversion in (AI_SDK, AG_UI):
        taken = conversion.convert(conversion.beginning, -1, entries(["x", chunk, "y"]))
        assert taken.last == 0
        rest = entries(["x", chunk, "y"])[1:]
        assert conversion.convert(taken.state, 0, rest) == (b"", 0, taken.state)
        assert conversion.convert_one(taken.state, rest[0]) == (b"", 0, taken.state)


def test_an_event_of_ag_ui_with_a_malformed_name_has_no_meaning() -> None:
    event = {"type": "TEXT_MESSAGE_START", "messageId": "m", "subagentRunId": {}}
    assert AG_UI.convert(AG_UI.beginning, -1, entries([event])).last == -1


TEXT = {"type": "text-start", "id": "1"}


@pytest.mark.parametrize(
    ("end", "last"),
    [
        (COMPLETE, {"type": "finish", "finishReason": "stop"}),
        (End("canceled"), {"type": "abort"}),
        (End("failed", "no credit"), {"type": "error", "errorText": "no credit"}),
        (End("failed"), {"type": "error", "errorText": "the run failed"}),
        (End("timed_out"), {"type": "error", "errorText": "the run took too long"}),
        (End("crashed"), {"type": "error", "errorText": "the run crashed"}),
        (End("expired"), {"type": "error", "errorText": "the run did not start in time"}),
        (End("lost"), {"type": "error", "errorText": "a part of the answer was lost"}),
    ],
)
def test_the_ends_of_the_ai_sdk(end: End, last: dict[str, str]) -> None:
    assert converted(AI_SDK, TEXT, end=end)[-2:] == [{"type": "text-end", "id": "1"}, last]
    assert converted(AI_SDK, end=end) == [{"type": "start", "messageId": "msg_run_1"}, last]
    assert AI_SDK.end(AI_SDK.beginning, end, 0).endswith(b"\n\ndata: [DONE]\n\n")


RUN = {"threadId": "thread_1", "runId": "run_1"}


@pytest.mark.parametrize(
    ("end", "last"),
    [
        (COMPLETE, {"type": "RUN_FINISHED", **RUN}),
        (End("canceled"), {"type": "RUN_FINISHED", **RUN, "outcome": {"type": "cancelled"}}),
        (End("failed", "no credit"), {"type": "RUN_ERROR", "message": "no credit", "code": "failed"}),
        (End("crashed"), {"type": "RUN_ERROR", "message": "the run crashed", "code": "crashed"}),
    ],
)
def test_the_ends_of_ag_ui(end: End, last: dict[str, Any]) -> None:
    closed = {"type": "TEXT_MESSAGE_END", "messageId": "msg_run_1-text-1"}
    assert converted(AG_UI, TEXT, end=end)[-2:] == [closed, last]
    assert converted(AG_UI, end=end) == [{"type": "RUN_STARTED", **RUN}, last]


def test_a_stream_without_its_beginning_is_followed() -> None:
    """What was opened in the part that has expired is closed at the end, and not opened twice."""
    delta = {"type": "text-delta", "id": "1", "delta": "x"}
    log = [Entry(seq, encode_value(delta), 0) for seq in (7, 8)]
    for conversion, closed in ((AI_SDK, ["text-end"]), (AG_UI, ["TEXT_MESSAGE_END"])):
        state = conversion.scan(conversion.middle, log[:1])
        taken = conversion.convert(state, 7, log[1:])
        types = [event["type"] for event, _ in parse(taken.body + conversion.end(taken.state, COMPLETE, 9))]
        assert types[1:-1] == closed


def test_the_events_of_tools_in_ag_ui() -> None:
    call = {"toolCallId": "c", "toolName": "add"}
    events = converted(
        AG_UI,
        {"type": "tool-input-start", **call},
        {"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": '{"n":'},
        {"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": "1}"},
        {"type": "tool-input-available", **call, "input": {"n": 1}},
        {"type": "tool-output-available", "toolCallId": "c", "output": "half", "preliminary": True},
        {"type": "tool-output-available", "toolCallId": "c", "output": {"sum": 2}},
    )
    id = {"toolCallId": "c"}
    assert events[1:] == [
        {"type": "TOOL_CALL_START", **id, "toolCallName": "add"},
        {"type": "TOOL_CALL_ARGS", **id, "delta": '{"n":1}'},
        {"type": "TOOL_CALL_END", **id},
        {"type": "TOOL_CALL_RESULT", "messageId": "msg_run_1-result-c", **id, "content": '{"sum":2}'},
    ]


def test_other_parts_are_custom_events() -> None:
    source = {"sourceId": "1", "url": "https://example.com"}
    assert converted(AG_UI, {"type": "data-plan", "data": [1]}, {"type": "source-url", **source})[1:] == [
        {"type": "CUSTOM", "name": "plan", "value": [1]},
        {"type": "CUSTOM", "name": "source-url", "value": source},
    ]


def test_events_of_ag_ui_pass_through() -> None:
    events = converted(
        AG_UI,
        {"type": "RUN_STARTED", "threadId": "t", "runId": "r"},
        {"type": "TEXT_MESSAGE_START", "messageId": "m", "role": "assistant", "name": None},
        {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "Hel"},
        {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "lo"},
        {"type": "STATE_SNAPSHOT", "snapshot": None},
        {"type": "RUN_FINISHED", "threadId": "t", "runId": "r", "result": 3},
        end=COMPLETE,
    )
    assert events == [
        {"type": "RUN_STARTED", **RUN},
        {"type": "TEXT_MESSAGE_START", "messageId": "m", "role": "assistant"},
        {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "Hello"},
        {"type": "STATE_SNAPSHOT", "snapshot": None},
        {"type": "TEXT_MESSAGE_END", "messageId": "m"},
        {"type": "RUN_FINISHED", **RUN, "result": 3},
    ]


def test_an_error_in_the_stream_is_the_end_of_an_ag_ui_run() -> None:
    for chunk in ({"type": "error", "errorText": "no credit"}, {"type": "RUN_ERROR", "message": "no credit"}):
        last = converted(AG_UI, chunk, end=COMPLETE)[-1]
        assert (last["type"], last["message"]) == ("RUN_ERROR", "no credit")
