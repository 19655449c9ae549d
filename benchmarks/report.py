"""Medians, ratios to the raw server, the table and its JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.servers import PEERS
from benchmarks.workloads import Result, Workload

Results = dict[str, dict[str, list[Result]]]
"""workload -> peer -> what each repetition gave."""

_BASELINE = next(iter(PEERS))
_PACKAGES = ["uvicorn", "uvloop", "httptools", "starlette", "sse-starlette", "pyjwt", "asgi_realtime"]
_COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("events/s", "events_per_s", lambda value: f"{value:,.0f}"),
    ("CPU us/event", "us_per_event", lambda value: f"{value:.3f}"),
    ("CPU us/open", "us_per_open", lambda value: f"{value:.0f}"),
    ("KiB each", "kib", lambda value: f"{value:.1f}"),
    ("x raw", "ratio", lambda value: f"{value:.2f}"),
    ("p50 ms", "p50_ms", lambda value: f"{value:.1f}"),
    ("p99 ms", "p99_ms", lambda value: f"{value:.1f}"),
    ("in time", "delivered", lambda value: f"{value:.1%}"),
    ("server CPU", "server_cpu", lambda value: f"{value:.0%}"),
    ("client CPU", "client_cpu", lambda value: f"{value:.0%}"),
    ("others' CPU", "others_cpu", lambda value: f"{value:.0%}"),
    ("missing", "missing", lambda value: f"{value:.0f}"),
    ("doubled", "doubled", lambda value: f"{value:.0f}"),
    ("damaged", "damaged", lambda value: f"{value:.0f}"),
]
"""Heading, figure, format. Ratios are of the workload's own figure."""


def summarize(workload: Workload, results: dict[str, list[Result]]) -> dict[str, dict[str, float]]:
    """Return the figures of each peer: medians of its repetitions, sums of what is wrong, the ratio to raw."""
    rows = {peer: _merge(repetitions) for peer, repetitions in results.items() if repetitions}
    baseline = rows.get(_BASELINE, {}).get(workload.metric)
    if baseline:
        for row in rows.values():
            row["ratio"] = row[workload.metric] / baseline
    return rows


def _merge(repetitions: list[Result]) -> dict[str, float]:
    names = dict.fromkeys(name for result in repetitions for name in result.metrics)
    row = {
        name: statistics.median(result.metrics[name] for result in repetitions if name in result.metrics)
        for name in names
    }
    row["missing"] = sum(result.verdict.missing for result in repetitions)
    row["doubled"] = sum(result.verdict.doubled for result in repetitions)
    row["damaged"] = sum(result.verdict.damaged + result.unfinished for result in repetitions)
    return row


def render(workloads: Sequence[Workload], results: Results) -> str:
    """Return the whole table as text."""
    lines: list[list[str]] = [["workload", "server", *(heading for heading, _, _ in _COLUMNS)]]
    for workload in workloads:
        for peer, row in summarize(workload, results.get(workload.name, {})).items():
            cells = [show(row[name]) if name in row else "" for _, name, show in _COLUMNS]
            lines.append([workload.name, peer, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rule = "-" * len(table[0])
    notes = [f"{workload.name + ':':<13}{workload.title}; goal: {workload.goal}" for workload in workloads]
    return "\n".join([table[0], rule, *table[1:], rule, *notes])


def describe_machine() -> dict[str, Any]:
    """Return what a reader must know to judge the figures."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "packages": packages,
    }


def as_json(workloads: Sequence[Workload], results: Results) -> dict[str, Any]:
    """Return summary and single repetitions as plain values."""
    return {
        "machine": describe_machine(),
        "workloads": {
            workload.name: {
                "title": workload.title,
                "goal": workload.goal,
                "metric": workload.metric,
                "summary": summarize(workload, results.get(workload.name, {})),
                "repetitions": {
                    peer: [result.metrics for result in repetitions]
                    for peer, repetitions in results.get(workload.name, {}).items()
                },
            }
            for workload in workloads
        },
    }
