"""The names of all keys and channels in Redis.

All keys of a run carry the hash tag of its partition, so that one script can use them on a Cluster; a topic and a claim
have their own tags. Channels are sharded and carry the tag of what they announce. The number of partitions is part
of the data: a run belongs to partition `crc16(run id) mod 256`.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2s

from redis.crc import key_slot

from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.runs import LEASE_KINDS, run_topic

PARTITIONS = 256

DUE_OF_PARTITION = (*LEASE_KINDS, "unpublished", "delay", "ttl", "cancel", "expiry", "unwatched")
"""In the order of the scripts' keys."""

_RUN_TOPIC = run_topic("")


class Keys:
    """The names under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.partition = lru_cache(maxsize=10_000)(_partition)

    def _of_run(self, run_id: str, what: str) -> str:
        return f"{self._prefix}{{{self.partition(run_id)}}}:{what}:{run_id}"

    def run(self, run_id: str) -> str:
        """HASH: version, record, payload, output, end, position, epoch, state, owner, inputs;
        m:<mark> the version of a commit, v:<version> its mark."""
        return self._of_run(run_id, "run")

    def streams(self, run_id: str) -> str:
        """HASH, by stream: n:<name> next seq, f: first seq, b: bytes, e: end;
        p:<name>NUL<producer> the items of a producer and the seq of the last one."""
        return self._of_run(run_id, "streams")

    def entries(self, key: StreamKey) -> str:
        """STREAM: entry `<seq + 1>-0` with t (time in unix milliseconds) and d (data)."""
        return f"{self._of_run(key.run, 'entries')}:{key.name}"

    def watchers(self, run_id: str) -> str:
        """HASH, by process: how many readers it has, and until when that counts (unix milliseconds)."""
        return self._of_run(run_id, "watchers")

    def due(self, kind: str, partition: int) -> str:
        """ZSET: the run ids of a partition by the time at which they are due."""
        return f"{self._prefix}{{{partition}}}:due:{kind}"

    def due_of(self, run_id: str) -> list[str]:
        partition = self.partition(run_id)
        return [self.due(kind, partition) for kind in DUE_OF_PARTITION]

    def hints(self, kind: str) -> str:
        """ZSET: partitions by the earliest time at which one of their runs is due."""
        return f"{self._prefix}{{due}}:{kind}"

    def topic(self, topic: str) -> tuple[str, str]:
        """ZSET: run ids by position. HASH: their versions, and #epoch, #position, #floor."""
        tagged = f"{self._prefix}{{{_digest(topic)}}}"
        return f"{tagged}:positions:{topic}", f"{tagged}:versions:{topic}"

    def claim(self, key: str) -> str:
        return f"{self._prefix}{{{_digest(key)}}}:claim:{key}"

    def run_list(self, name: str) -> tuple[str, str]:
        """ZSET: run ids by the time of their change. HASH: their versions and summaries."""
        tagged = f"{self._prefix}{{run_list}}:{name}"
        return f"{tagged}:times", f"{tagged}:summaries"

    def stream_channel(self, key: StreamKey) -> str:
        """Announces what happens to a stream:

        * `a <seq> <time>` and one line per item: items were appended, starting with this seq
        * `p <next>`: items were appended, too large for a message
        * `e <next>` and a line of JSON: the stream ended at this position
        """
        return f"{self._of_run(key.run, 'stream')}:{key.name}"

    def topic_channel(self, topic: str) -> str:
        """Announces what happens to a topic:

        * `t <epoch> <before> <position> <version> <run id>`: a run changed
        * `f <run id>`: a run was removed
        * `w`: wake the followers

        The channel of a run's own topic, which its streams use too:

        * `c <before> <position> <version>`: the run changed
        * `E <size>`, a line of JSON of this size and a msgpack map: the run ended, and its streams at these positions
        * `r`: the run was removed
        """
        if topic.startswith(_RUN_TOPIC):
            return self._of_run(topic.removeprefix(_RUN_TOPIC), "changes")
        return f"{self._prefix}{{{_digest(topic)}}}:changes:{topic}"


def _partition(run_id: str) -> int:
    return key_slot(run_id.encode(), PARTITIONS)


def _digest(text: str) -> str:
    return blake2s(text.encode(), digest_size=6).hexdigest()


def run_of_topic(topic: str) -> str | None:
    """The id of the run whose own topic this is, or None."""
    return topic.removeprefix(_RUN_TOPIC) if topic.startswith(_RUN_TOPIC) else None
