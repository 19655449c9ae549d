"""The Lua scripts: every step that has to be atomic on the server. They need Redis 7 or later, or Valkey.

A script checks everything before its first write, so a rejected call has changed nothing. Scripts that free memory or
only end something run even when memory is full (`allow-oom`); scripts that store something new are rejected then.
"""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files


class Script:
    """A script's source, and the digest that identifies it on the server."""

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
"""The same script for terminal records: a run can end, and thereby free memory, when none is left."""
REMOVE_RUN = Script(_read("remove_run"))
CLAIM = Script(_read("claim"))
RELEASE_CLAIM = Script(_read("release_claim"))

PUBLISH = Script(_read("publish"))
PUBLISHED = Script(_read("published"))
TOPIC_CHANGES = Script(_read("topic_changes"))
TOPIC_REMOVE = Script(_read("topic_remove"))

DUE = Script(_read("due"))
FIRST_DUE = Script(_read("first_due"))
ADD_HINTS = Script(_read("add_hints"))
TAKE_HINTS = Script(_read("take_hints"))
DROP_HINT = Script(_read("drop_hint"))
RENEW = Script(_read("renew"))
TAKE_DUE = Script(_read("take_due"))
WATCH = Script(_read("watch"))
WATCHERS = Script(_read("watchers"))


NOTE_RUNS = Script(_read("note_runs"))
