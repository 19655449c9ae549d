"""The command: `python -m benchmarks [SUITE …] [--quick] [--only fanout,llm] [--peers raw] [--repeat N]`.

`python -m benchmarks abuse` measures what the worst requests of a browser token cost. It exits with 1 if one of them
blocks the event loop for more than 100 ms. `python -m benchmarks parts` measures what message parts cost, and
`python -m benchmarks replay` what late readers of a chat cost.

Exits with 1 if any chunk was missing, duplicated or damaged, or a server failed. Goals are printed but not enforced,
because the figures of a busy machine are unreliable.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvloop

from benchmarks import abuse, parts, replay, workloads
from benchmarks.process import choose_cpus, raise_file_limit
from benchmarks.redis import workloads as redis_workloads
from benchmarks.redis.site import BINARY, has_redis
from benchmarks.report import Results, as_json, describe_machine, render
from benchmarks.workloads import Workload

_FILES_NEEDED = 6000

SUITES = {
    "memory": [workloads.WORKLOADS],
    "tokens": [workloads.TOKENS],
    "redis": [redis_workloads.WORKLOADS, redis_workloads.FOOTPRINT],
}
"""Suites and their tables. `memory` compares one process with the memory broker to other servers,
`tokens` does so with one reader per stream."""


def _parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a short smoke test with meaningless figures")
    parser.add_argument("--only", metavar="NAMES", help="workloads: " + "; ".join(map(_describe, SUITES)))
    parser.add_argument("--peers", metavar="NAMES", help="servers to compare, by their names in the tables")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="medians of N runs, alternating between peers"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    options = parser.parse_args(arguments)
    suites = _choose(parser, options.suites, list(SUITES))
    tables = [table for suite in suites for table in SUITES[suite]]
    known = [workload for table in tables for workload in table]
    only = _choose(parser, _split(options.only), [workload.name for workload in known])
    peers = _choose(parser, _split(options.peers), list(dict.fromkeys(peer for each in known for peer in each.peers)))
    tables = [[_restrict_peers(workload, peers) for workload in table if workload.name in only] for table in tables]
    options.tables = [table for table in tables if table]
    options.needs_redis = any(each.name in only for table in SUITES["redis"] for each in table) and "redis" in suites
    return options


def _describe(suite: str) -> str:
    return f"{suite}: " + ", ".join(workload.name for table in SUITES[suite] for workload in table)


def _split(names: str | None) -> list[str]:
    return names.split(",") if names else []


def _choose(parser: argparse.ArgumentParser, names: Sequence[str], known: list[str]) -> list[str]:
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is unknown; allowed are {', '.join(known)}")
    return list(names) or known


def _restrict_peers(workload: Workload, peers: list[str]) -> Workload:
    return replace(workload, peers=[peer for peer in workload.peers if peer in peers])


async def _measure(table: list[Workload], *, repeat: int, quick: bool, cpu: int) -> tuple[Results, bool]:
    results: Results = {workload.name: {peer: [] for peer in workload.peers} for workload in table}
    correct = True
    for workload in table:
        for number in range(repeat):
            for peer in workload.peers:
                print(f"{workload.name} {number + 1}/{repeat}: {peer}", file=sys.stderr, flush=True)
                try:
                    async with workload.start(peer, cpu) as server:
                        result = await workload.run(server, quick)
                except (OSError, RuntimeError, TimeoutError) as error:
                    print(f"{workload.name}: {peer} failed: {error!r}", file=sys.stderr)
                    correct = False
                    continue
                results[workload.name][peer].append(result)
                if result.failed:
                    print(f"{workload.name}: {peer}: {result.verdict}, unfinished {result.unfinished}", file=sys.stderr)
                    correct = False
    return results, correct


def main() -> int:
    if sys.argv[1:] == ["abuse"]:  # in this process, without servers or peers
        return abuse.main()
    if sys.argv[1:] == ["parts"]:
        return parts.main()
    if sys.argv[1:] == ["replay"]:
        return replay.main()
    options = _parse()
    server_cpu, client_cpu = choose_cpus()
    if server_cpu == client_cpu:
        print("only one CPU: server and client share it, so rates and latencies are not meaningful", file=sys.stderr)
    os.sched_setaffinity(0, {client_cpu})
    if raise_file_limit() < _FILES_NEEDED:
        print(f"the limit of open files is below {_FILES_NEEDED}; the idle workload will fail", file=sys.stderr)
    if options.needs_redis and not has_redis():
        print(f"{BINARY} is not installed; run the suite `memory` alone to do without it", file=sys.stderr)
        return 1
    machine = describe_machine()
    print(f"Python {machine['python']}, {machine['system']};", end=" ")
    print(", ".join(f"{name} {number}" for name, number in machine["packages"].items()))
    if options.quick:
        print("Quick run: a fraction of the sizes below; figures are not meaningful.")
    correct, figures = True, dict[str, object]()
    for table in options.tables:
        results, table_correct = uvloop.run(_measure(table, repeat=options.repeat, quick=options.quick, cpu=server_cpu))
        correct = correct and table_correct
        print(render(table, results), flush=True)
        figures |= as_json(table, results)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "workloads": figures}, indent=2) + "\n")
    if not correct:
        print("FAILED: chunks were missing, duplicated or damaged, or a server failed; see above", file=sys.stderr)
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
