"""Lone surrogates survive wherever a value goes, so that the halves of an emoji in two values are whole once joined."""

from __future__ import annotations

import pydantic
import pytest

from asgi_realtime.client.states import decode_state
from asgi_realtime.core.run_json import run_json
from tests.faults import make
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

HALVES = ["\ud83d", "\ude00"]


class Model(pydantic.BaseModel):
    text: str


async def test_metadata_outputs_inputs_and_chunks_keep_them() -> None:
    async with make() as realtime:
        async with realtime.open_run("chat") as run:
            run.metadata.set("half", HALVES[0])
            run.set_output({"half": HALVES[1]})
            await realtime.append(HALVES[0])
            await realtime.send_input(run, "more", HALVES)
            assert await run.input("more").get(timeout=GUARD_S) == HALVES
        record = await realtime.runs.get(run.id)
        assert record.metadata == {"half": HALVES[0]}
        assert [chunk async for chunk in realtime.read(run)] == HALVES[:1]
        assert await realtime.result(run) == {"half": HALVES[1]}
        state = decode_state(run_json(record))
        assert (state.metadata, state.output) == ({"half": HALVES[0]}, {"half": HALVES[1]})


async def test_payloads_and_typed_chunks_keep_them() -> None:
    async with make() as realtime:

        @realtime.task("echo")
        async def echo(payload: list[str]) -> list[str]:
            return payload

        assert await (await realtime.trigger(echo, HALVES)).result(timeout=GUARD_S) == HALVES
        async with realtime.open_run("chat") as run:
            texts = realtime.define_stream("texts", str)
            for half in HALVES:
                await texts.append(half, run=run)
        assert [text async for text in texts.read(run)] == HALVES


async def test_pydantic_decodes_them_as_replacement_characters() -> None:
    async with make() as realtime:
        models = realtime.define_stream("models", Model)
        async with realtime.open_run("chat") as run:
            await models.append(Model.model_construct(text="a" + HALVES[0]), run=run)
        assert [model.text async for model in models.read(run)] == ["a\ufffd"]
