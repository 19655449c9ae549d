"""The index of a topic, and the cursors into it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.core.topics import Change, Changes, Cursor, TopicIndex


def index(*runs: str, max_runs: int = 100) -> TopicIndex:
    made = TopicIndex("epoch", max_runs=max_runs)
    for run in runs:
        made.update(run, 1)
    return made


def test_a_change_moves_the_run_to_the_end() -> None:
    topic = index("a", "b", "c")
    assert topic.update("a", 2)
    assert topic.after(None, limit=10) == Changes(
        Cursor("epoch", 4), [Change(2, "b", 1), Change(3, "c", 1), Change(4, "a", 2)], True
    )
    assert len(topic) == 3


@pytest.mark.parametrize("version", [1, 2])
def test_a_version_that_is_not_newer_has_no_effect(version: int) -> None:
    topic = index("a", "b")
    topic.update("a", 2)
    before = topic.after(None, limit=10)
    assert not topic.update("a", version)
    assert topic.after(None, limit=10) == before


def test_a_reader_gets_the_changes_after_its_cursor() -> None:
    topic = index("a", "b", "c")
    assert topic.after(Cursor("epoch", 1), limit=10) == Changes(
        Cursor("epoch", 3), [Change(2, "b", 1), Change(3, "c", 1)], False
    )
    assert topic.after(Cursor("epoch", 3), limit=10) == Changes(Cursor("epoch", 3), [], False)


def test_a_reader_continues_from_the_last_change_of_a_page() -> None:
    topic = index("a", "b", "c")
    page = topic.after(Cursor("epoch", 0), limit=2)
    assert page == Changes(Cursor("epoch", 2), [Change(1, "a", 1), Change(2, "b", 1)], False)
    assert topic.after(page.cursor, limit=2) == Changes(Cursor("epoch", 3), [Change(3, "c", 1)], False)


def test_a_limited_snapshot_has_the_newest() -> None:
    assert index("a", "b", "c").after(None, limit=2) == Changes(
        Cursor("epoch", 3), [Change(2, "b", 1), Change(3, "c", 1)], True
    )


@pytest.mark.parametrize("useless", [Cursor("other", 2), Cursor("epoch", 4), Cursor("", 0)])
def test_an_unusable_cursor_gets_a_snapshot(useless: Cursor) -> None:
    topic = index("a", "b", "c")
    assert topic.after(useless, limit=10) == topic.after(None, limit=10)


def test_a_reader_that_missed_dropped_runs_gets_a_snapshot() -> None:
    topic = index("a", "b", "c", "d", max_runs=2)
    assert len(topic) == 2
    assert topic.after(Cursor("epoch", 1), limit=10).snapshot
    assert topic.after(Cursor("epoch", 2), limit=10) == Changes(
        Cursor("epoch", 4), [Change(3, "c", 1), Change(4, "d", 1)], False
    )


def test_a_forgotten_run_makes_no_gap() -> None:
    topic = index("a", "b", "c")
    topic.forget("b")
    topic.forget("b")
    assert topic.after(Cursor("epoch", 0), limit=10) == Changes(
        Cursor("epoch", 3), [Change(1, "a", 1), Change(3, "c", 1)], False
    )


@given(changes=st.lists(st.integers(0, 5), max_size=60), max_runs=st.integers(1, 6), limit=st.integers(1, 4))
def test_a_reader_that_polls_sees_the_newest_versions(changes: list[int], max_runs: int, limit: int) -> None:
    topic = TopicIndex("epoch", max_runs=max_runs)
    newest: dict[str, int] = {}
    known: dict[str, int] = {}
    cursor: Cursor | None = None

    def ask() -> bool:
        nonlocal cursor
        found = topic.after(cursor, limit=limit)
        if found.snapshot:
            found = topic.after(None, limit=max_runs)
        known.update({change.run_id: change.version for change in found.items})
        cursor = found.cursor
        return bool(found.items)

    for number, run in enumerate(changes):
        newest[str(run)] = newest.pop(str(run), 0) + 1
        topic.update(str(run), newest[str(run)])
        if number % 3 == 0:
            ask()
    while ask():
        pass
    for run_id in list(newest)[-max_runs:]:
        assert known[run_id] == newest[run_id]


def test_a_cursor_survives_its_text_form() -> None:
    assert str(Cursor("ab12", 7)) == "ab12.7"
    assert Cursor.parse("ab12.7") == Cursor("ab12", 7)
    assert Cursor.parse("a.b.7") == Cursor("a.b", 7)
    assert Cursor.parse("e." + "9" * 18) == Cursor("e", 10**18 - 1)


@pytest.mark.parametrize("text", ["", ".", "7", "ab12", ".7", "ab12.", "ab12.-1", "ab12.x", "ab12.٣", "e." + "9" * 19])
def test_other_text_is_not_a_cursor(text: str) -> None:
    assert Cursor.parse(text) is None
