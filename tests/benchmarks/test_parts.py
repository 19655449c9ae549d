"""The cost of parts is measured for each kind of source, and the table shows it."""

from __future__ import annotations

import pytest

from benchmarks import parts
from benchmarks.parts import SOURCES, Row
from tests.models.needs import need


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "TOKENS", 100)
    monkeypatch.setattr(parts, "REPEAT", 1)


def test_strings_are_measured() -> None:
    row = parts.measure("strings")
    assert row.piped == len('"word "')
    assert row.parts == pytest.approx(len('{"type":"text-delta","id":"12345","delta":"word "}'), abs=1.5)
    assert row.cpu_us > 0


@pytest.mark.parametrize(
    ("name", "package"), [("openai-agents", "agents"), ("pydantic-ai, `run_stream`", "pydantic_ai")]
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_published_is_converted(name: str, package: str) -> None:
    need(package)
    row = parts.measure(name)
    assert row.piped is None
    assert row.parts == pytest.approx(50, abs=3)


def test_the_table() -> None:
    rows = [Row("a", piped=None, parts=50.2, cpu_us=1.23), Row("b", piped=182, parts=50, cpu_us=10)]
    _, _, first, second = parts.render(rows).splitlines()
    assert first == "| a | not published | 50 | 1.2 µs |"
    assert second == "| b | 182 | 50 | 10.0 µs |"


def test_each_source_is_a_function_of_its_own() -> None:
    assert len(set(SOURCES.values())) == len(SOURCES)
