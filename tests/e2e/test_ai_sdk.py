"""What the AI SDK's own client, in versions 5, 6 and 7, makes of a response, compared with what Python assembles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from asgi_realtime.ai.message import assemble, message_id_of
from tests.e2e.answers import ANSWERS, ERROR, End, body_of
from tests.e2e.node import Program, frontend

VERSIONS = ["5", "6", "7"]


@pytest.fixture(scope="module")
def client() -> Iterator[Program]:
    with frontend("ai_sdk") as program:
        yield program


def read(client: Program, version: str, body: bytes, *, broken: bool = False) -> dict[str, Any]:
    client.send({"version": version, "body": body.decode(), "broken": broken})
    result: dict[str, Any] = client.next("read")
    return result


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_client_assembles_what_python_does(client: Program, answer: str, version: str) -> None:
    chunks = ANSWERS[answer]
    found = read(client, version, body_of(chunks, "ai-sdk"))
    assert found["error"] is None
    assert found["message"] == expected(chunks, version)


def expected(chunks: list[Any], version: str) -> dict[str, Any]:
    """The assembled message, with a field that has another name before version 7."""
    message = assemble(chunks, message_id=message_id_of("run_1"), is_over=True)
    for part in message["parts"]:
        if version < "7" and isinstance(part.get("input"), str):
            part["rawInput"] = part.pop("input")
    return message


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("end", "error"), [("completed", None), ("failed", ERROR), ("canceled", None)])
def test_the_client_shows_how_an_answer_ended(client: Program, end: End, error: str | None, version: str) -> None:
    chunks = ANSWERS["text that is not closed"]
    found = read(client, version, body_of(chunks, "ai-sdk", how=end))
    assert found == {"error": error, "message": expected(chunks, version)}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_broken_connection_is_an_error(client: Program, version: str) -> None:
    body, _, _ = body_of(ANSWERS["text"], "ai-sdk").partition(b'data: {"type":"finish"')
    assert read(client, version, body, broken=True)["error"] == "terminated"
