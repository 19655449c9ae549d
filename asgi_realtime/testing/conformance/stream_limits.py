"""How much a broker keeps of a stream: old entries are trimmed, inputs are rejected instead."""

from __future__ import annotations

import pytest

from asgi_realtime.brokers.base import INPUT_COST, Position, Producer, StreamKey
from asgi_realtime.core.errors import LimitExceeded, StreamClosed
from asgi_realtime.testing.conformance.kit import (
    CHUNK,
    COMPLETE,
    MakeBroker,
    Reader,
    create,
    finished,
    have,
    items,
    new_key,
    open_backend,
    read_all,
    seqs,
    store,
)

# Retention by bytes


@pytest.mark.anyio
async def test_trimming_drops_the_oldest_entries_and_keeps_positions(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=1000) as backend:
        key = await new_key(backend)
        for _ in range(50):
            await backend.broker.append(key, [CHUNK])
        page = await backend.broker.read(key)
        assert page.first > 0, "nothing was trimmed"
        assert page.next == 50
        assert seqs(page.entries) == list(range(page.first, 50)), "a page reports where the retained part starts"
        assert len(page.entries) * len(CHUNK) <= 2000, "twice the limit, since backends can trim roughly"
        assert await backend.peer.append(key, [CHUNK]) == Position(50, 51)


@pytest.mark.anyio
async def test_the_last_entry_stays_whatever_its_size(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=50) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, [CHUNK])
        await backend.broker.append(key, [CHUNK, b'"last"'])
        entries = await read_all(backend.broker, key)
        assert (entries[-1].seq, entries[-1].data) == (2, b'"last"')
        await backend.broker.append(key, [CHUNK], end=COMPLETE)
        page = await backend.broker.read(key)
        assert (seqs(page.entries)[-1], page.next, page.end) == (3, 4, COMPLETE)


@pytest.mark.anyio
async def test_a_retry_of_trimmed_items_is_still_recognized(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=200) as backend:
        key = await new_key(backend)
        first = await backend.broker.append(key, [CHUNK] * 10, producer=Producer("p", 0))
        await backend.broker.append(key, [CHUNK] * 10)
        assert await backend.peer.append(key, [CHUNK] * 10, producer=Producer("p", 0)) == Position(first.last, 20)
        assert (await backend.broker.append(key, [CHUNK] * 2, producer=Producer("p", 9))).next == 21


@pytest.mark.anyio
async def test_a_reader_before_the_retained_part_gets_a_gap(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=1000) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, [CHUNK] * 3)
        early = await Reader(backend.peer, key).run(enough=have(3))
        await backend.broker.append(key, [CHUNK] * 50, end=COMPLETE)
        late = await Reader(backend.peer, key).run()
        await early.run()
        first = (await backend.broker.read(key)).first
        assert early.gaps == [(2, first)]
        assert late.gaps == [(-1, first)]
        assert seqs(late.seen) == list(range(first, 53))
        early.assert_seamless()


# Inputs


@pytest.mark.anyio
async def test_inputs_are_rejected_at_the_limit_and_never_trimmed(make_broker: MakeBroker) -> None:
    """Messages to a run were trimmed before the run had read them."""
    async with open_backend(make_broker, stream_bytes=2000, inputs_bytes=10_000 + 10 * INPUT_COST) as backend:
        run = await create(backend)
        one, other = (StreamKey(run.id, f"$input {name}") for name in ("one", "other"))
        for number in range(8):
            await backend.broker.append(one, [b'"%s"' % (b"x" * 1000)], producer=Producer("p", number))
        with pytest.raises(LimitExceeded, match="limit 12560") as caught:
            await backend.peer.append(other, [b'"%s"' % (b"x" * 4500)])
        assert caught.value.status == 429
        await backend.peer.append(other, [b"1"])
        await backend.broker.append(one, [b'"%s"' % (b"x" * 1000)] * 3, producer=Producer("p", 5))
        assert seqs(await read_all(backend.peer, one)) == list(range(8))
        await backend.broker.append(StreamKey(run.id, "default"), items(10_000)[-500:])


@pytest.mark.anyio
async def test_the_limit_of_inputs_counts_their_items(make_broker: MakeBroker) -> None:
    """Brokers counted differently, and small messages took 16 times the limit in memory."""
    limit = 50 * (2 + INPUT_COST)
    async with open_backend(make_broker, inputs_bytes=limit) as backend:
        run = await create(backend)
        one, other = (StreamKey(run.id, f"$input {name}") for name in ("one", "other"))
        await backend.broker.append(one, [b"12"] * 30, producer=Producer("p", 0))
        await backend.peer.append(other, [b"12"] * 20)
        with pytest.raises(LimitExceeded, match=f"hold {limit} bytes, limit {limit}"):
            await backend.broker.append(other, [b"1"])
        await backend.peer.append(one, [b"12"] * 30, producer=Producer("p", 0))  # a retry adds nothing
        with pytest.raises(LimitExceeded, match=f"hold {limit} bytes, limit {limit}"):
            await backend.peer.append(one, [b"12", b"1"], producer=Producer("p", 29))
        await store(backend.broker, finished(backend, run))
        with pytest.raises(StreamClosed):  # more room would not help
            await backend.peer.append(one, [b"1"])
