from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.core import nesting
from asgi_realtime.core.chunks import json_line
from asgi_realtime.core.errors import LimitExceeded
from asgi_realtime.core.metadata import check_size, encode_metadata
from asgi_realtime.core.nesting import check_depth, check_parts
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.streams.writer import encode_within

TEXT = st.text(alphabet='a"\\[]{},\n\ud800', max_size=5)
VALUES = st.recursive(TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


def depth_of(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def count_of(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(count_of, value.values()))
    return 1 + sum(map(count_of, value))


@given(value=VALUES)
def test_brackets_in_strings_do_not_count(value: Any) -> None:
    data = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nesting, "MAX_DEPTH", 0)
        _check(check_depth, data + b" ", "JSON is nested too deeply: {} levels, limit 0", depth_of(value))
        _check(partial(check_parts, limit=0), data, "JSON has {} lists, objects and names, limit 0", count_of(value))


def _check(check: Any, data: bytes, message: str, found: int) -> None:
    if not found:
        check(data)
        return
    with pytest.raises(LimitExceeded) as caught:
        check(data)
    assert str(caught.value) == message.format(found)


@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}")])
def test_the_limits_are_exact(pair: tuple[str, str]) -> None:
    start, end = pair
    check_depth(f"{start * 100}0{end * 100}".encode())
    with pytest.raises(LimitExceeded, match="a chunk is nested too deeply: 101 levels, limit 100"):
        check_depth(f"{start * 101}0{end * 101}".encode(), what="a chunk")
    json_line(b"[" + b",".join([b"[]"] * 99_999) + b"]")
    with pytest.raises(LimitExceeded, match="JSON has 100001 lists, objects and names, limit 100000"):
        json_line(b"[" + b",".join([b"{}"] * 100_000) + b"]")


def test_whatever_can_be_stored_can_be_published() -> None:
    """Feeds wrap metadata several levels deeper."""
    deep = json.loads('{"a":' * 100 + "0" + "}" * 100)
    check_size(encode_metadata(deep), 10_000)
    record = StoredRecord(
        id="run_1",
        task="chat",
        status=Status.QUEUED,
        created_at_ms=0,
        updated_at_ms=0,
        metadata_json=encode_metadata(deep),
    )
    assert json.loads(run_json(record))["metadata"] == deep
    with pytest.raises(LimitExceeded, match="metadata is nested too deeply: 101 levels, limit 100"):
        check_size(encode_metadata({"a": deep}), 10_000)
    assert json.loads(encode_within(deep, 10_000)) == deep
    with pytest.raises(LimitExceeded, match="a chunk is nested too deeply: 101 levels, limit 100"):
        encode_within([deep], 10_000)
