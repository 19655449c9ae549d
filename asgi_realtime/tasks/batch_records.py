"""The record of a batch: what its runs alone do not show, and where it is stored.

A batch moves through three stages:

* OPEN: created over HTTP; its items come in a second request, until `waits_until_ms`;
* PLANNED: the items are known and some have idempotency keys. The plan fixes which run each item refers to, because a
  key can name another run when the request is repeated;
* SEALED: all runs were created. A repeated request creates nothing, even after the runs have expired.

Each stage is one claim of the broker (the first value wins) that holds the whole record, so it contains what earlier
stages stored, and the latest stage is complete. Taking the claim of a stage is the compare-and-set of the
record: of two processes that fill a batch at once, the second learns the plan of the first. Stages can be skipped: a
batch without idempotency keys has no plan, and a batch triggered in process is stored only if its runs alone do not
show which items it has, and then as SEALED. A run record could not hold this instead: it expires with
`Retention.after_end`, while the idempotency key of a batch must find it for `Retention.idempotency_key`.
"""

from __future__ import annotations

import hashlib
from enum import Enum

import msgspec


class Stage(Enum):
    """A stage of a batch. The value is the prefix of its claim."""

    OPEN = "batch"
    PLANNED = "batch-plan"
    SEALED = "batch-sealed"

    def claim(self, batch_id: str) -> str:
        return f"{self.value}:{batch_id}"  # prefixes end at the first colon; what follows can be any text


class Plan(msgspec.Struct, frozen=True):
    """Which run each item of a batch refers to, and which items create a run of the batch."""

    run_ids: list[str]
    created: list[int]
    """The indexes of the items that create a run; an idempotency key of any other item names an earlier run."""

    @classmethod
    def without_keys(cls, batch_id: str, count: int) -> Plan:
        return cls([run_id_in(batch_id, index) for index in range(count)], list(range(count)))


class BatchRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A batch at one stage."""

    id: str
    count: int
    created_at_ms: int
    waits_until_ms: int = 0
    """When its items can no longer be sent."""
    owner: str = ""
    """The owner of the public token that created it; empty for the secret key."""
    parent_id: str | None = None
    idempotency_key: str | None = None
    planned: Plan | None = None
    is_sealed: bool = False

    @classmethod
    def decode(cls, stored: str) -> BatchRecord:
        return msgspec.json.decode(stored, type=cls)

    @property
    def plan(self) -> Plan:
        return self.planned or Plan.without_keys(self.id, self.count)

    def with_plan(self, plan: Plan) -> BatchRecord:
        return msgspec.structs.replace(self, planned=plan)

    def sealed(self) -> BatchRecord:
        return msgspec.structs.replace(self, is_sealed=True)

    @property
    def last_id(self) -> str | None:
        """The run that is created last, or None if the batch creates none."""
        if self.planned is None:
            return run_id_in(self.id, self.count - 1)
        return self.planned.run_ids[self.planned.created[-1]] if self.planned.created else None

    def is_closed(self, now_ms: int) -> bool:
        """Whether the batch gets no more runs."""
        return self.is_sealed or self.last_id is None or now_ms >= self.waits_until_ms


def run_id_in(batch_id: str, index: int) -> str:
    """The id of a run in a batch. Every process derives the same id, and only the batch's id reveals it."""
    return f"run_{hashlib.sha256(f'{batch_id}/{index}'.encode()).hexdigest()[:26]}"
