"""The names of everything in Redis.

All keys of a run carry the hash tag of its partition, so that one script may touch them on a Cluster; a topic and a
claim have tags of their own. Channels are sharded ones, with the tags of what they tell of. The number of partitions is
part of the data: a run is found where `crc16(run id) mod 256` says.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2s

from redis.crc import key_slot

from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.runs import run_topic

PARTITIONS = 256

DUE_OF_PARTITION = ("lease", "enqueue", "unpublished", "delay", "ttl", "cancel", "expiry")
"""In the order in which the scripts take their keys."""

_RUN_TOPIC = run_topic("")


class Keys:
    """The names under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.partition = lru_cache(maxsize=10_000)(_partition)

    def _of_run(self, run_id: str, what: str) -> str:
        return f"{self._prefix}{{{self.partition(run_id)}}}:{what}:{run_id}"

    def run(self, run_id: str) -> str:
        """HASH: version, record, payload, output, end, position, epoch, state, owner, inputs, and its marks."""
        return self._of_run(run_id, "run")

    def streams(self, run_id: str) -> str:
        """HASH, by stream: n:<name> next, f: first, b: bytes, e: end, and p:<name>NUL<producer> their counts."""
        return self._of_run(run_id, "streams")

    def entries(self, key: StreamKey) -> str:
        """STREAM: entry `<seq + 1>-0` with its time and data."""
        return f"{self._of_run(key.run, 'entries')}:{key.name}"

    def due(self, kind: str, partition: int) -> str:
        """ZSET of run ids by time, for one kind."""
        return f"{self._prefix}{{{partition}}}:due:{kind}"

    def due_of(self, run_id: str) -> list[str]:
        partition = self.partition(run_id)
        return [self.due(kind, partition) for kind in DUE_OF_PARTITION]

    def note(self, kind: str) -> str:
        """ZSET of partitions by the time at which the first of their runs may be due."""
        return f"{self._prefix}{{due}}:{kind}"

    def topic(self, topic: str) -> tuple[str, str]:
        """ZSET of run ids by position, and HASH of their versions with #epoch, #position, #floor."""
        tagged = f"{self._prefix}{{{_digest(topic)}}}"
        return f"{tagged}:positions:{topic}", f"{tagged}:versions:{topic}"

    def claim(self, key: str) -> str:
        return f"{self._prefix}{{{_digest(key)}}}:claim:{key}"

    def stream_channel(self, key: StreamKey) -> str:
        return f"{self._of_run(key.run, 'stream')}:{key.name}"

    def topic_channel(self, topic: str) -> str:
        """What a topic's changes are told on; that of a run also tells how its streams end."""
        if topic.startswith(_RUN_TOPIC):
            return self._of_run(topic.removeprefix(_RUN_TOPIC), "changes")
        return f"{self._prefix}{{{_digest(topic)}}}:changes:{topic}"


def _partition(run_id: str) -> int:
    return key_slot(run_id.encode(), PARTITIONS)


def _digest(text: str) -> str:
    return blake2s(text.encode(), digest_size=6).hexdigest()


def run_of_topic(topic: str) -> str | None:
    """The run whose own topic this is."""
    return topic.removeprefix(_RUN_TOPIC) if topic.startswith(_RUN_TOPIC) else None
