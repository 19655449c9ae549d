"""What a check of `doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mark(Enum):
    """How a finding is marked: by a sign and, on a terminal, by a colour."""

    GOOD = ("✓", "32")
    NOTE = ("!", "33")
    BAD = ("✗", "31")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    mark: Mark
    text: str
    cure: str = ""
    ends: bool = False
    """Nothing else can be looked at."""
