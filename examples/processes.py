"""Commands that end when the process does that started them, however that goes.

Each is run by a process of ours between the two, which waits for the end of its standard input: the operating system
closes that when the starter is gone, and the starter closes it to end the command. It is in a session of its own, so a
Ctrl-C at the terminal reaches the starter only, which ends things in their order.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def running(*command: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the block is left: it gets a SIGTERM then, and is waited for."""
    with subprocess.Popen(
        [sys.executable, __file__, *command], stdin=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        assert process.stdin is not None
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait()  # `Popen` itself does not wait long if it is left by a Ctrl-C


def main(command: list[str]) -> int:
    """What the process between the two does."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as child:

        def end_with_the_starter() -> None:
            while os.read(0, 1):  # `sys.stdin` has a lock, which at exit must not be held
                pass
            child.terminate()

        threading.Thread(target=end_with_the_starter, daemon=True).start()
        return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
