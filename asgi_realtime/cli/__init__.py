"""The command line: create tokens, follow runs, diagnose a deployment."""

# Each command is a module with `add`, which declares its arguments, and `run`, which returns the exit code: 0 for
# success, 1 for a negative result, 2 for wrong usage. Results go to stdout, everything else to stderr. Secrets come
# from the environment or a file, never from arguments, which every user of the machine can see.

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import asgi_realtime
from asgi_realtime.cli import doctor, runs, tail, token
from asgi_realtime.cli.terminal import harmless
from asgi_realtime.core.errors import RealtimeError, UsageError


def main(arguments: Sequence[str] | None = None, *, prog: str = "asgi-realtime") -> NoReturn:
    """Run a command and exit. `prog` is the name of the program in help texts and errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" instead of failing
    parser = _parser(prog)
    args = parser.parse_args(arguments)
    if args.run is None:
        parser.print_help()
        sys.exit(0)
    try:
        code: int = args.run(args)
    except (UsageError, ModuleNotFoundError) as exc:  # httpx, which only some commands need, is not installed
        parser.exit(2, harmless(f"{parser.prog}: {exc}\n", sys.stderr))
    except RealtimeError as exc:
        parser.exit(1, harmless(f"{exc.code}: {exc}\n", sys.stderr))
    except KeyboardInterrupt:
        code = 130  # what shells report for a program that Ctrl-C ended
    except BrokenPipeError:  # the reader of our output has exited, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Tools for asgi_realtime.")
    parser.add_argument("--version", action="version", version=asgi_realtime.__version__)
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="command")
    token.add(commands)
    tail.add(commands)
    runs.add(commands)
    doctor.add(commands)
    return parser
