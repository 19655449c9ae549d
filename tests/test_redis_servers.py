"""The servers behave as the tests of the Redis broker expect."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import AskError, MovedError

from tests import requirements
from tests.inprocess import GUARD_S
from tests.redis_servers import RedisCluster, RedisServer, ReplicaPair, until
from tests.requirements import redis_binary, valkey_binary

pytestmark = pytest.mark.redis


@pytest.fixture(params=["redis", "valkey"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    binary = redis_binary() if request.param == "redis" else valkey_binary()
    with RedisServer(binary) as server:
        yield server


def fetch(url: str) -> bytes | None:
    with redis.Redis.from_url(url) as client:
        value = client.get("kept")
        assert isinstance(value, bytes | None)
        return value


def test_acknowledged_data_survives_a_kill(server: RedisServer) -> None:
    before = server.port, server.pid
    server.command("SET", "kept", "yes")
    server.kill()
    with pytest.raises(redis.ConnectionError):
        server.command("PING")
    server.restart(keep_data=True)
    assert fetch(server.url) == b"yes"
    assert server.port == before[0]
    assert server.pid != before[1]


def test_a_restart_without_data(server: RedisServer) -> None:
    server.command("SET", "kept", "yes")
    server.restart(keep_data=False)
    assert fetch(server.url) is None


def test_a_server_without_data_cannot_restart_with_it(tmp_path: Path) -> None:
    with RedisServer(redis_binary(), directory=tmp_path, keeps_data=False) as server:
        server.command("SET", "kept", "yes")
        with pytest.raises(AssertionError, match="without keeps_data"):
            server.restart(keep_data=True)
        server.restart(keep_data=False)
        assert fetch(server.url) is None
    assert not list(tmp_path.glob("**/*.aof"))


def test_a_server_leaves_nothing_behind() -> None:
    with RedisServer(redis_binary()) as server:
        directory = server.directory
        assert server.runs
    assert not server.runs
    assert not directory.exists()
    with pytest.raises(redis.ConnectionError):
        server.command("PING")


def test_a_paused_server_answers_once_it_resumes(server: RedisServer) -> None:
    with server.client(timeout_s=0.05) as client:
        client.ping()
        with server.paused(), pytest.raises(redis.TimeoutError):
            client.execute_command("SET", "kept", "yes")
    until(lambda: fetch(server.url) == b"yes", "the buffered command is executed")


def test_a_paused_server_can_be_killed(server: RedisServer) -> None:
    server.pause()
    server.restart(keep_data=True)
    assert server.command("PING") == b"PONG"


@pytest.mark.parametrize(("kind", "cut"), [("normal", 1), ("pubsub", 1), (None, 2)])
def test_clients_are_disconnected_by_kind(server: RedisServer, kind: str | None, cut: int) -> None:
    with server.client() as client, server.client() as other, other.pubsub() as subscriber:
        client.ping()
        subscriber.subscribe("news")
        assert subscriber.get_message(timeout=GUARD_S) is not None
        assert len(server.clients("normal")) == len(server.clients("pubsub")) == 1
        assert server.cut_clients(kind) == cut  # type: ignore[arg-type]
        if kind != "normal":
            assert server.clients("pubsub") == []
        if kind != "pubsub":
            assert server.clients("normal") == []


def test_settings_at_start_and_at_run_time() -> None:
    with RedisServer(redis_binary(), settings={"maxmemory": "4mb", "maxmemory-policy": "noeviction"}) as server:
        assert server.info("memory")["maxmemory_policy"] == "noeviction"
        server.configure("maxmemory", 1)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            server.command("SET", "kept", "yes")


def test_an_invalid_setting_shows_the_log() -> None:
    with pytest.raises(AssertionError, match="ended with 1"), RedisServer(redis_binary(), settings={"no-such": "one"}):
        pass


def test_a_password_and_a_user(server: RedisServer) -> None:
    with RedisServer(server.binary, password="p@ss/word") as guarded:
        guarded.command("SET", "kept", "yes")
        assert fetch(guarded.url) == fetch(guarded.unix_url) == b"yes"
        with pytest.raises(redis.AuthenticationError):
            fetch(f"redis://127.0.0.1:{guarded.port}")
        reader = guarded.add_user("reader", "an:other", "~kept", "+get", "+client", "+hello")
        assert fetch(reader) == b"yes"
        with redis.Redis.from_url(reader) as client, pytest.raises(redis.exceptions.NoPermissionError):
            client.set("kept", "no")


def test_tls() -> None:
    with RedisServer(redis_binary(), tls=True, password="secret") as server:
        server.command("SET", "kept", "yes")
        assert server.url.startswith("rediss://:secret@localhost:")
        assert fetch(server.url) == b"yes"
        server.restart(keep_data=True)
        assert fetch(server.url) == b"yes"
        with pytest.raises(redis.ConnectionError):
            fetch(f"redis://:secret@127.0.0.1:{server.port}")


@pytest.mark.slow
def test_a_failover_loses_what_the_replica_lacks(redis_pair: ReplicaPair) -> None:
    first, second = redis_pair.primary, redis_pair.replica
    first.command("SET", "kept", "yes")
    redis_pair.until_in_step()
    redis_pair.isolate_replica()
    assert first.command("SET", "lost", "yes") == b"OK"
    redis_pair.fail_over()
    assert (redis_pair.primary, redis_pair.replica) == (second, first)
    sentinel = redis.Sentinel(redis_pair.sentinels)  # type: ignore[no-untyped-call]
    assert sentinel.discover_master(redis_pair.service) == ("127.0.0.1", second.port)  # type: ignore[no-untyped-call]
    for client in sentinel.sentinels:
        client.close()
    assert fetch(second.url) == b"yes"
    assert second.command("GET", "lost") is None

    redis_pair.bring_back()
    assert first.info("replication")["role"] == "slave"
    assert first.command("GET", "lost") is None

    redis_pair.hand_over()
    assert redis_pair.primary is first
    assert second.command("SET", "late", "yes") == b"OK", "it does not know that it was replaced"
    redis_pair.bring_back()
    assert second.command("GET", "late") is None
    assert second.info("replication")["role"] == "slave"


@pytest.mark.slow
@pytest.mark.cluster
def test_a_slot_moves_with_its_keys(redis_cluster: RedisCluster) -> None:
    slot = redis_cluster.slot_of("{moves}")
    source = redis_cluster.slot_owner(slot)
    target = next(node for node in redis_cluster.nodes if node is not source)
    with redis.RedisCluster.from_url(redis_cluster.url) as client:
        client.set("{moves}1", "yes")
        with redis_cluster.moving_slot(slot, target):
            client.set("{moves}2", "yes")
            with pytest.raises(AskError, match=f"{slot} 127.0.0.1:{target.port}"):
                source.command("GET", "{moves}2")
            assert source.command("GET", "{moves}1") == b"yes"
        assert redis_cluster.slot_owner(slot) is target
        assert [client.get("{moves}1"), client.get("{moves}2")] == [b"yes", b"yes"]
        with pytest.raises(MovedError, match=f"{slot} 127.0.0.1:{target.port}"):
            source.command("GET", "{moves}1")
        client.disconnect_connection_pools()


def test_waiting_ends_with_an_error() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match="not within 0.02 s: pigs fly"):
        until(lambda: False, "pigs fly", within_s=0.02)
    assert time.monotonic() - started >= 0.02


def test_a_missing_server_skips_tests_and_fails_them_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    monkeypatch.delenv("REQUIRE_ALL", raising=False)
    for binary in (redis_binary, valkey_binary):
        with pytest.raises(pytest.skip.Exception, match="-server is not installed"):
            binary()
    monkeypatch.setenv("REQUIRE_ALL", "1")
    for binary in (redis_binary, valkey_binary):
        with pytest.raises(pytest.fail.Exception, match="-server is not installed"):
            binary()
