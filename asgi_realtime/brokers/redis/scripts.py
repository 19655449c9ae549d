"""The Lua scripts: what has to happen in one step on the server. Redis 7 or later, or Valkey.

A script checks everything before its first write, so a refused call has changed nothing. What frees memory, or only
ends what is there, may run when memory is full (`allow-oom`); what stores something new is refused then.
"""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files


class Script:
    """A script's text and the name by which the server knows it."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.sha = sha1(self.text, usedforsecurity=False).hexdigest().encode()


def _read(name: str) -> str:
    return (files(__package__) / "lua" / f"{name}.lua").read_text(encoding="utf-8")


APPEND = Script(_read("append"))
READ = Script(_read("read"))
PRODUCED = Script(_read("produced"))
COMMIT = Script("#!lua\n" + _read("commit"))
COMMIT_END = Script("#!lua flags=allow-oom\n" + _read("commit"))
"""The same for terminal records: a run may end, and so free memory, when there is none left."""
TOLD = Script(_read("told"))
ENQUEUED = Script(_read("enqueued"))
RENEW = Script(_read("renew"))
REMOVE = Script(_read("remove"))
TELL = Script(_read("tell"))
FORGET = Script(_read("forget"))
CHANGES = Script(_read("changes"))
NOTE = Script(_read("note"))
POLL = Script(_read("poll"))
DUE = Script(_read("due"))
SCAN = Script(_read("scan"))
UNCLAIM = Script(_read("unclaim"))
