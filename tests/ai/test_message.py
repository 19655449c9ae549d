"""The message that the chunks of a run form."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_realtime.ai.message import TOOL_CUT_OFF, assemble, message_id_of


def parts_of(*chunks: Any) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = assemble(chunks, message_id="m")["parts"]
    return parts


def text(value: str, *, state: str = "done") -> dict[str, Any]:
    return {"type": "text", "text": value, "state": state}


def test_the_message_id_depends_on_the_run_alone() -> None:
    assert message_id_of("run_1") == message_id_of("run_1") != message_id_of("run_2")


def test_a_start_at_the_beginning_names_the_message() -> None:
    start = {"type": "start", "messageId": "mine"}
    assert assemble([start, "Hi"], message_id="m")["id"] == "mine"
    assert assemble(["Hi", start], message_id="m")["id"] == "m"
    assert assemble([], message_id="m") == {"id": "m", "role": "assistant", "parts": []}


def test_plain_strings_form_one_text() -> None:
    assert parts_of("Hel", "lo") == [text("Hello", state="streaming")]


def test_the_end_of_the_run_ends_texts() -> None:
    assert assemble(["Hel", "lo"], message_id="m", is_over=True)["parts"] == [text("Hello")]


def test_unfinished_tool_calls_of_a_run_that_was_cut_have_failed() -> None:
    """A model rejects a history with a tool call that has no result."""
    name = {"toolName": "weather"}
    chunks = [
        {"type": "tool-input-available", "toolCallId": "ready", **name, "input": {"q": 1}},
        {"type": "tool-input-start", "toolCallId": "writing", **name},
        {"type": "tool-input-available", "toolCallId": "done", **name, "input": {}},
        {"type": "tool-output-available", "toolCallId": "done", "output": 7},
    ]
    whole = assemble(chunks, message_id="m", is_over=True)["parts"]
    assert [part["state"] for part in whole] == ["input-available", "input-streaming", "output-available"]
    failed = {"state": "output-error", "errorText": TOOL_CUT_OFF}
    assert assemble(chunks, message_id="m", is_over=True, was_cut=True)["parts"] == [
        {"type": "tool-weather", "toolCallId": "ready", "input": {"q": 1}, **failed},
        {"type": "tool-weather", "toolCallId": "writing", "input": {}, **failed},
        whole[2],
    ]


def test_text_and_reasoning_are_assembled_by_id() -> None:
    assert parts_of(
        {"type": "reasoning-start", "id": "1"},
        {"type": "text-start", "id": "1"},
        {"type": "reasoning-delta", "id": "1", "delta": "Hm"},
        {"type": "text-delta", "id": "1", "delta": "A"},
        {"type": "reasoning-end", "id": "1"},
        {"type": "text-delta", "id": "1", "delta": "B"},
    ) == [{"type": "reasoning", "id": "1", "text": "Hm", "state": "done"}, text("AB", state="streaming")]


def test_a_step_ends_what_is_open() -> None:
    delta = {"type": "text-delta", "id": "1", "delta": "A"}
    assert parts_of({"type": "start-step"}, delta, {"type": "finish-step"}, delta) == [
        {"type": "step-start"},
        text("A"),
        text("A", state="streaming"),
    ]


CALL = {"toolCallId": "c", "toolName": "add"}


@pytest.mark.parametrize(
    ("steps", "tool"),
    [
        ([{"type": "tool-input-start"}], {"state": "input-streaming"}),
        (
            [{"type": "tool-input-start"}, {"type": "tool-input-delta", "inputTextDelta": '{"a": [1, 2'}],
            {"state": "input-streaming", "input": {"a": [1, 2]}},
        ),
        (
            [{"type": "tool-input-available", "input": {"a": 1}, "providerExecuted": True}],
            {"state": "input-available", "input": {"a": 1}, "providerExecuted": True},
        ),
        (
            [{"type": "tool-input-error", "input": "{", "errorText": "bad"}],
            {"state": "output-error", "input": "{", "errorText": "bad"},
        ),
        (
            [
                {"type": "tool-input-available", "input": {}},
                {"type": "tool-output-available", "output": 1, "preliminary": True},
            ],
            {"state": "output-available", "input": {}, "output": 1, "preliminary": True},
        ),
        (
            [
                {"type": "tool-input-available", "input": {}},
                {"type": "tool-output-available", "output": 1, "preliminary": True},
                {"type": "tool-output-available", "output": None},
            ],
            {"state": "output-available", "input": {}, "output": None},
        ),
        (
            [{"type": "tool-input-available", "input": {}}, {"type": "tool-output-error", "errorText": "no"}],
            {"state": "output-error", "input": {}, "errorText": "no"},
        ),
        (
            [
                {"type": "tool-input-available", "input": {}},
                {"type": "tool-approval-request", "approvalId": "a"},
            ],
            {"state": "approval-requested", "input": {}, "approval": {"id": "a"}},
        ),
    ],
)
def test_a_tool_call_is_one_part_in_its_last_state(steps: list[dict[str, Any]], tool: dict[str, Any]) -> None:
    assert parts_of(*({**CALL, **step} for step in steps)) == [{"type": "tool-add", "toolCallId": "c", **tool}]


@pytest.mark.parametrize(
    ("cut", "value"),
    [
        ('{"city": "Par', {"city": "Par"}),
        ('{"city": "Paris", "da', {"city": "Paris"}),
        ('{"quote": "a\\"b", "list": [{"x": 1}, {"y"', {"quote": 'a"b', "list": [{"x": 1}, {}]}),
        ("{", {}),
        ('{"a": tr', {}),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_an_input_that_is_cut_off_has_what_is_complete(cut: str, value: Any) -> None:
    delta = {"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": cut}
    (tool,) = parts_of({"type": "tool-input-start", **CALL}, delta)
    assert tool["input"] == value


def test_data_with_an_id_replaces_itself_and_transient_data_is_not_kept() -> None:
    assert parts_of(
        {"type": "data-step", "id": "1", "data": 1},
        {"type": "data-step", "data": 0},
        {"type": "data-step", "id": "1", "data": 2},
        {"type": "data-step", "data": 9, "transient": True},
        {"type": "data-step", "data": 0},
    ) == [{"type": "data-step", "id": "1", "data": 2}, *[{"type": "data-step", "data": 0}] * 2]


def test_sources_and_files_are_parts() -> None:
    source = {"type": "source-url", "sourceId": "1", "url": "https://example.com"}
    file = {"type": "file", "url": "data:,x", "mediaType": "text/plain"}
    assert parts_of(source, {**file, "providerMetadata": None}) == [source, file]


def test_metadata_is_merged_and_the_last_finish_counts() -> None:
    message = assemble(
        [
            {"type": "start", "messageMetadata": {"usage": {"in": 1}}},
            {"type": "finish", "messageMetadata": {"dropped": True}},
            {"type": "message-metadata", "messageMetadata": {"usage": {"out": 2}, "model": "m"}},
            {"type": "finish", "messageMetadata": {"model": "n"}},
        ],
        message_id="m",
    )
    assert message["metadata"] == {"usage": {"in": 1, "out": 2}, "model": "n"}


def test_a_start_has_no_delta() -> None:
    (tool,) = parts_of({"type": "tool-input-start", "toolCallId": "c", "toolName": "add", "inputTextDelta": 1})
    assert tool["state"] == "input-streaming" and "input" not in tool


@pytest.mark.parametrize(
    "chunk",
    [1, None, [], {}, {"type": 3}, {"type": "done"}, {"type": "text-delta"}, {"type": "text-end", "id": "?"}]
    + [{"type": "tool-output-error", "toolCallId": "?", "errorText": "x"}, {"type": "unheard-of"}]
    + [{"type": "tool-approval-response", "approvalId": "?", "approved": True, "toolCallId": []}]
    + [{"type": "text-start", "id": "plain", "delta": []}],
)
def test_what_is_not_part_of_a_message_is_left_out(chunk: Any) -> None:
    assert parts_of("A", chunk, "B") == [text("AB", state="streaming")]
