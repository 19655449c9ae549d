"""The command: `python -m benchmarks [--quick] [--only fanout,llm] [--peers raw,asgi_realtime] [--repeat N]`.

Exits with 1 if a chunk was missing, doubled or damaged anywhere, or a server failed. Goals are printed, not enforced:
figures of a busy machine would make a check that nobody believes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TypeVar

import uvloop

from benchmarks.process import choose_cpus, raise_file_limit, run_server
from benchmarks.report import Results, as_json, describe_machine, render
from benchmarks.servers import PEERS
from benchmarks.workloads import WORKLOADS, Workload

_FILES_NEEDED = 6000

T = TypeVar("T")


def _parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a short smoke run; its figures mean little")
    parser.add_argument("--only", metavar="NAMES", help="of " + ", ".join(workload.name for workload in WORKLOADS))
    parser.add_argument("--peers", metavar="NAMES", help="of " + ", ".join(PEERS))
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="medians of N runs, peers alternating")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    options = parser.parse_args(arguments)
    by_name = {workload.name: workload for workload in WORKLOADS}
    options.workloads = _choose(parser, options.only, by_name)
    options.servers = list(_choose(parser, options.peers, {peer: peer for peer in PEERS}))
    return options


def _choose(parser: argparse.ArgumentParser, names: str | None, known: dict[str, T]) -> list[T]:
    chosen = names.split(",") if names else list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"{name!r} is unknown; allowed are {', '.join(known)}")
    return [known[name] for name in chosen]


async def _measure(
    workloads: list[Workload], peers: list[str], *, repeat: int, quick: bool, cpu: int
) -> tuple[Results, bool]:
    results: Results = {workload.name: {peer: [] for peer in peers} for workload in workloads}
    right = True
    for workload in workloads:
        for number in range(repeat):
            for peer in peers:
                print(f"{workload.name} {number + 1}/{repeat}: {peer}", file=sys.stderr, flush=True)
                try:
                    async with run_server(peer, cpu=cpu) as server:
                        result = await workload.run(server, quick)
                except (OSError, RuntimeError, TimeoutError) as error:
                    print(f"{workload.name}: {peer} failed: {error!r}", file=sys.stderr)
                    right = False
                    continue
                results[workload.name][peer].append(result)
                if result.failed:
                    print(f"{workload.name}: {peer}: {result.verdict}, unfinished {result.unfinished}", file=sys.stderr)
                    right = False
    return results, right


def main() -> int:
    options = _parse()
    server_cpu, client_cpu = choose_cpus()
    if server_cpu == client_cpu:
        print("only one CPU: server and client share it, so rates and latencies mean little", file=sys.stderr)
    os.sched_setaffinity(0, {client_cpu})
    if raise_file_limit() < _FILES_NEEDED:
        print(f"fewer than {_FILES_NEEDED} open files are allowed here; the idle workload will fail", file=sys.stderr)
    results, right = uvloop.run(
        _measure(options.workloads, options.servers, repeat=options.repeat, quick=options.quick, cpu=server_cpu)
    )
    machine = describe_machine()
    print(f"Python {machine['python']}, {machine['system']};", end=" ")
    print(", ".join(f"{name} {number}" for name, number in machine["packages"].items()))
    if options.quick:
        print("Quick run: about a tenth of the sizes below, and figures that mean little.")
    print(render(options.workloads, results))
    if options.json:
        options.json.write_text(json.dumps(as_json(options.workloads, results), indent=2) + "\n")
    if not right:
        print("FAILED: something was missing, doubled or damaged, or a server failed; see above", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
