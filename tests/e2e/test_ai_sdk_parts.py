"""What the AI SDK's own client, in versions 5, 6 and 7, makes of the parts of each kind of source."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.ai.collecting import collect
from tests.ai.plain_sources import SOURCES
from tests.e2e.node import Program, frontend
from tests.e2e.test_ai_sdk import VERSIONS, read


@pytest.fixture(scope="module")
def client() -> Iterator[Program]:
    with frontend("ai_sdk") as program:
        yield program


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_the_client_assembles_the_message_of_a_source(client: Program, name: str, version: str) -> None:
    source = SOURCES[name]
    parts = asyncio.run(collect(source.items, message_id="m"))
    body = "".join(f"data: {json.dumps(part)}\n\n" for part in parts)
    expected = {"id": "m", "role": "assistant", "parts": source.message}
    assert read(client, version, body.encode()) == {"error": None, "message": expected}
