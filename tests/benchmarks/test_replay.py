"""The replay of a chat is measured and the table shows it."""

from __future__ import annotations

import pytest

from benchmarks import replay
from benchmarks.replay import Row


@pytest.mark.parametrize("protocol", ["ai-sdk", "ag-ui"])
def test_a_joined_replay_is_smaller(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "TOKENS", 200)
    live = replay.make_live(200)
    assert replay.replay(live, protocol) < 200 * len(replay.TOKEN) + 500
    assert replay.replay_singly(live, protocol) > 10 * replay.replay(live, protocol)


def test_the_table_has_bytes_and_times() -> None:
    row = Row("ai-sdk", single_bytes=2048, joined_bytes=1024, single_ms=3.0, joined_ms=2.0, resume_ms=1.0, live_us=0.5)
    assert replay.render([row]).splitlines()[-1] == "| `ai-sdk` | 2 KiB, 3.0 ms | 1 KiB, 2.0 ms | 1.0 ms | 0.5 µs |"
