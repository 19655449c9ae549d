"""The worst requests are measured and the table shows them."""

from __future__ import annotations

from benchmarks import abuse
from benchmarks.abuse import ATTACKS, Row


def test_an_accepted_payload_is_stored_and_counted() -> None:
    row = abuse.measure(ATTACKS[0])
    assert row.status == 200
    assert row.blocked_ms > 0
    assert row.sent > 3_000_000 and row.counted > 3_000_000 and row.held > 3_000_000


def test_the_table_marks_what_blocks_too_long() -> None:
    fast = Row("fast", "trigger", sent=1024, status=200, blocked_ms=99.0, held=2048, counted=1024)
    slow = Row("slow", "trigger", sent=1024, status=200, blocked_ms=101.0, held=2048, counted=1024)
    _, first, second, _ = abuse.render([fast, slow]).splitlines()
    assert first.split() == ["fast", "trigger", "1", "200", "99.0", "2", "1"]
    assert second.split()[-1] == "!"


def test_each_attack_has_its_own_name() -> None:
    assert len({make().name for make in ATTACKS}) == len(ATTACKS)
