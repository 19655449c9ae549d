"""Medians, ratios to the raw server, the table and its JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.workloads import Result, Workload

Results = dict[str, dict[str, list[Result]]]
"""workload -> peer -> the result of each repetition"""

_PACKAGES = [
    "uvicorn",
    "uvloop",
    "httptools",
    "starlette",
    "sse-starlette",
    "broadcaster",
    "redis",
    "hiredis",
    "pyjwt",
    "asgi_realtime",
]
_COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("events/s", "events_per_s", lambda value: f"{value:,.0f}"),
    ("CPU us/event", "us_per_event", lambda value: f"{value:.3f}"),
    ("web us", "us_web", lambda value: f"{value:.2f}"),
    ("worker us", "us_worker", lambda value: f"{value:.2f}"),
    ("Redis us", "us_redis", lambda value: f"{value:.2f}"),
    ("CPU us/open", "us_per_open", lambda value: f"{value:.0f}"),
    ("KiB each", "kib", lambda value: f"{value:.1f}"),
    ("ratio", "ratio", lambda value: f"{value:.2f}"),
    ("seconds", "wait_s", lambda value: f"{value:.2f}"),
    ("sent/event", "sent", lambda value: f"{value:.3f}"),
    ("run/event", "executed", lambda value: f"{value:.2f}"),
    ("B/chunk of 20", "bytes_20", lambda value: f"{value:.1f}"),
    ("of 100", "bytes_100", lambda value: f"{value:.1f}"),
    ("idle sent/s", "idle_sent", lambda value: f"{value:.1f}"),
    ("web conns", "web_connections", lambda value: f"{value:.0f}"),
    ("worker conns", "worker_connections", lambda value: f"{value:.0f}"),
    ("p50 ms", "p50_ms", lambda value: f"{value:.1f}"),
    ("p99 ms", "p99_ms", lambda value: f"{value:.1f}"),
    ("in time", "delivered", lambda value: f"{value:.1%}"),
    ("server CPU", "server_cpu", lambda value: f"{value:.0%}"),
    ("web CPU", "web_cpu", lambda value: f"{value:.0%}"),
    ("worker CPU", "worker_cpu", lambda value: f"{value:.0%}"),
    ("Redis CPU", "redis_cpu", lambda value: f"{value:.0%}"),
    ("client CPU", "client_cpu", lambda value: f"{value:.0%}"),
    ("others' CPU", "others_cpu", lambda value: f"{value:.0%}"),
    ("missing", "missing", lambda value: f"{value:.0f}"),
    ("duplicated", "duplicated", lambda value: f"{value:.0f}"),
    ("damaged", "damaged", lambda value: f"{value:.0f}"),
]
"""Heading, figure, format. `ratio` compares the main figure of a workload. A table only has columns with figures."""


def summarize(workload: Workload, results: dict[str, list[Result]]) -> dict[str, dict[str, float]]:
    """Return the figures of each peer: medians of its repetitions, sums of its errors, its ratio to the baseline."""
    rows = {peer: _merge(repetitions) for peer, repetitions in results.items() if repetitions}
    baseline = rows.get(workload.baseline, {}).get(workload.metric)
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
    row["duplicated"] = sum(result.verdict.duplicated for result in repetitions)
    row["damaged"] = sum(result.verdict.damaged + result.unfinished for result in repetitions)
    return row


def render(workloads: Sequence[Workload], results: Results) -> str:
    """Return the table as text."""
    rows = [
        (workload.name, peer, row)
        for workload in workloads
        for peer, row in summarize(workload, results.get(workload.name, {})).items()
    ]
    columns = [column for column in _COLUMNS if any(column[1] in row for _, _, row in rows)]
    lines = [["workload", "server", *(heading for heading, _, _ in columns)]]
    for name, peer, row in rows:
        lines.append([name, peer, *(show(row[figure]) if figure in row else "" for _, figure, show in columns)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rule = "-" * len(table[0])
    width = max(len(workload.name) for workload in workloads) + 2
    notes = [
        f"{workload.name + ':':<{width}}{workload.title}; {workload.metric} against {workload.baseline}; "
        f"goal: {workload.goal}"
        for workload in workloads
    ]
    return "\n".join([table[0], rule, *table[1:], rule, *notes])


def describe_machine() -> dict[str, Any]:
    """Return the facts about the machine that a reader needs to judge the figures."""
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
    """Return the summary and the repetitions of each workload as plain values."""
    return {
        workload.name: {
            "title": workload.title,
            "goal": workload.goal,
            "metric": workload.metric,
            "baseline": workload.baseline,
            "summary": summarize(workload, results.get(workload.name, {})),
            "repetitions": {
                peer: [result.metrics for result in repetitions]
                for peer, repetitions in results.get(workload.name, {}).items()
            },
        }
        for workload in workloads
    }
