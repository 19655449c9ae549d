"""Reads all parts of a source, as host code does, and checks them."""

from __future__ import annotations

import json
from typing import Any

from asgi_realtime.ai import parts
from tests.ai.order import check_order

Part = dict[str, Any]
CANARY = "CANARY-7d1f"
"""In everything that must not be published."""


async def collect(source: Any, **options: Any) -> list[Part]:
    """The parts of a source that ends normally."""
    async with parts(source, **options) as stream:
        found = [part async for part in stream]
    check_order(found)
    assert CANARY not in json.dumps(found)
    return found


async def collect_failing(source: Any) -> tuple[list[Part], Exception]:
    """The parts of a source that fails, and its error."""
    found: list[Part] = []
    try:
        async with parts(source) as stream:
            async for part in stream:
                found.append(part)  # noqa: PERF401
    except Exception as exc:
        check_order(found, finished=False)
        assert CANARY not in json.dumps(found)
        return found, exc
    raise AssertionError(f"the source did not fail; its parts are {found}")


def text_of(found: list[Part], kind: str = "text") -> str:
    return "".join(part["delta"] for part in found if part["type"] == f"{kind}-delta")


def types_of(found: list[Part]) -> list[str]:
    """The types in order; those of the same type in a row once."""
    types = [part["type"] for part in found]
    return [kind for before, kind in zip([None, *types], types, strict=False) if kind != before]


def of_type(found: list[Part], kind: str) -> list[Part]:
    """The parts of one type, without it."""
    return [{name: value for name, value in part.items() if name != "type"} for part in found if part["type"] == kind]
