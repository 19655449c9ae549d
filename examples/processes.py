"""Commands that end when the process that started them does, however that process exits.

An intermediate process runs each command and waits for the end of its standard input. The operating system closes that
when the starter exits, and the starter closes it to end the command. The intermediate process has its own session, so a
Ctrl-C at the terminal only reaches the starter, which ends the commands in order.
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
    """Run a command for the duration of the block, then send it a SIGTERM and wait for it."""
    with subprocess.Popen(
        [sys.executable, __file__, *command], stdin=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        assert process.stdin is not None
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait()  # after a Ctrl-C, `Popen` itself does not wait long


def main(command: list[str]) -> int:
    """The main function of the intermediate process."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as child:

        def end_with_starter() -> None:
            while os.read(0, 1):  # `sys.stdin` has a lock, which must be free at exit
                pass
            child.terminate()

        threading.Thread(target=end_with_starter, daemon=True).start()
        return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
