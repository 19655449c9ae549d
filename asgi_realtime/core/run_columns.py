"""The columns of a run, as named by tokens and by the run feeds of the official clients."""

from __future__ import annotations

RUN_COLUMNS = (
    "id",
    "taskIdentifier",
    "createdAt",
    "updatedAt",
    "startedAt",
    "delayUntil",
    "queuedAt",
    "expiredAt",
    "completedAt",
    "friendlyId",
    "number",
    "isTest",
    "status",
    "usageDurationMs",
    "costInCents",
    "baseCostInCents",
    "ttl",
    "payload",
    "payloadType",
    "metadata",
    "metadataType",
    "output",
    "outputType",
    "runTags",
    "error",
    "realtimeStreams",
    "idempotencyKey",
)

REQUIRED_COLUMNS = frozenset({"id", "friendlyId", "taskIdentifier", "status", "createdAt", "updatedAt"})
"""Columns that the official clients require."""

SKIPPABLE_COLUMNS = tuple(name for name in RUN_COLUMNS if name not in REQUIRED_COLUMNS)
"""Columns that a client can skip, and that a token can hide."""
