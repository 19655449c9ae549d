"""Real Redis servers for the tests: a single one, a primary with a replica and a sentinel, and a Cluster.

They listen on loopback only, store their files in a temporary directory, and stop at the end of the `with` block. Each
can be killed, restarted, paused, reconfigured, and its clients disconnected. Calls block until what their name says
holds, mostly for a few milliseconds; async tests pass longer ones to a thread. `binary` can be a `valkey-server`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import redis
import trustme
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tests.ports import free_port

T = TypeVar("T")

GUARD_S = 60.0
"""The time limit of every wait. Generous, because the machine can be busy."""

SLOTS = 16384

ClientType = Literal["normal", "pubsub"]


def until(condition: Callable[[], T], what: str, *, within_s: float = GUARD_S) -> T:
    """Evaluate a condition until it is true; return its value. Errors of a starting server count as false."""
    deadline = time.monotonic() + within_s
    while True:
        with suppress(RedisError, OSError):
            if answer := condition():
                return answer
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.005)


class RedisServer:
    """One server. Without `keeps_data` it writes nothing to disk, so `restart` cannot keep anything.

    `settings` are lines of redis.conf: `{"maxmemory": "4mb", "maxmemory-policy": "noeviction"}`.
    """

    def __init__(
        self,
        binary: str = "redis-server",
        *,
        settings: Mapping[str, str | int] | None = None,
        directory: Path | None = None,
        password: str | None = None,
        tls: bool = False,
        keeps_data: bool = True,
    ) -> None:
        self.binary = binary
        self.settings = dict(settings or {})
        self.password = password
        self.tls = tls
        self.keeps_data = keeps_data
        self.port = 0
        self._directory = directory
        self._cleanup = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.launch()
            self.until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        self._cleanup.close()

    # Addresses

    @property
    def directory(self) -> Path:
        assert self._directory is not None, "not started"
        return self._directory

    @property
    def url(self) -> str:
        if self.tls:
            return f"rediss://{self._login}localhost:{self.port}/0?ssl_ca_certs={quote(str(self.directory / 'ca.pem'))}"
        return f"redis://{self._login}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._login}{self.directory / 'redis.sock'}?db=0"

    @property
    def _login(self) -> str:
        return "" if self.password is None else f":{quote(self.password, safe='')}@"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def log(self) -> str:
        """The server's log since it was first started."""
        path = self.directory / "redis.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # Starting and stopping

    def launch(self) -> None:
        """Start the process without waiting until it answers."""
        if self._directory is None:
            self._directory = Path(self._cleanup.enter_context(TemporaryDirectory(prefix="redis-")))
        if not self.port:
            self.port = free_port()
            if self.tls:
                self._make_certificates()
        self._write_settings()
        self._process = subprocess.Popen(
            self._arguments(),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C does not reach it
        )

    def until_ready(self) -> None:
        until(self._answers, f"{self.binary} answers on port {self.port}")

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL: it cannot write anything more or close its connections."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self, *, keep_data: bool) -> None:
        """Kill the server if it runs, and start it on the same port, with all acknowledged data or without any."""
        assert self.keeps_data or not keep_data, "the server was started without keeps_data"
        self.kill()
        if not keep_data:
            shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)
            (self.directory / "dump.rdb").unlink(missing_ok=True)
        self.launch()
        self.until_ready()

    def pause(self) -> None:
        """SIGSTOP: connections stay open without answers. The system still accepts new ones."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    # Commands

    def client(self, *, timeout_s: float = GUARD_S) -> redis.Redis:
        """A client without retries. The caller closes it."""
        return redis.Redis.from_url(self.url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=timeout_s)

    def command(self, *args: str | bytes | int) -> Any:
        """Send one command on a new connection. The answer is not converted: bytes, numbers and lists."""
        with self.client() as client:
            client.response_callbacks.clear()
            return client.execute_command(*args)

    def configure(self, name: str, value: str | int) -> None:
        """Change a setting until the next restart."""
        assert self.command("CONFIG", "SET", name, value) == b"OK"

    def info(self, section: str = "everything") -> dict[str, str]:
        lines = self.command("INFO", section).decode().splitlines()
        return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}

    def clients(self, kind: ClientType) -> list[dict[str, str]]:
        """The connected clients (`CLIENT LIST`), without the one that asks."""
        lines = self.command("CLIENT", "LIST", "TYPE", kind).decode().splitlines()
        listed = [dict(field.split("=", 1) for field in line.split()) for line in lines]
        return [client for client in listed if client["cmd"] != "client|list"]

    def cut_clients(self, kind: ClientType | None = None) -> int:
        """Close connections abruptly; return how many."""
        kinds = ("normal", "pubsub") if kind is None else (kind,)
        return sum(self.command("CLIENT", "KILL", "TYPE", each, "SKIPME", "yes") for each in kinds)

    def add_user(self, name: str, password: str, *rules: str) -> str:
        """Create a user with these ACL rules; return its URL."""
        assert self.command("ACL", "SETUSER", name, "reset", "on", f">{password}", *rules) == b"OK"
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{quote(name, safe='')}:{quote(password, safe='')}@{rest.rpartition('@')[2]}"

    # Configuration

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"{self.binary} ended with {self._process.returncode}:\n{self.log}")
        loaded = self.command("PING") == b"PONG"
        return loaded and self.info("server")["process_id"] == str(self.pid)  # and not another process on our port

    def _arguments(self) -> list[str]:
        return [self.binary, str(self.directory / "redis.conf")]

    def _write_settings(self) -> None:
        settings = {**self._settings(), **self.settings}
        lines = "".join(f"{name} {value}\n" for name, value in settings.items())
        (self.directory / "redis.conf").write_text(lines)

    def _settings(self) -> dict[str, str | int]:
        settings: dict[str, str | int] = {
            "bind": "127.0.0.1",
            "port": 0 if self.tls else self.port,
            "unixsocket": str(self.directory / "redis.sock"),
            "dir": str(self.directory),
            "logfile": str(self.directory / "redis.log"),
            "save": '""',
            "appendonly": "yes" if self.keeps_data else "no",
            "appendfsync": "no",  # only needed if the machine crashes, not if the process is killed
            "enable-debug-command": "local",
        }
        if self.password is not None:
            settings["requirepass"] = self.password
        if self.tls:
            settings |= {"tls-port": self.port, "tls-auth-clients": "no", "tls-ca-cert-file": "ca.pem"}
            settings |= {"tls-cert-file": "server.pem", "tls-key-file": "server.pem"}
        return settings

    def _make_certificates(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.directory / "ca.pem"))
        issued = authority.issue_cert("localhost", "127.0.0.1")
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.directory / "server.pem"))


def _fields(listed: list[bytes]) -> dict[str, str]:
    words = [word.decode() for word in listed]
    return dict(zip(words[::2], words[1::2], strict=True))


class RedisSentinel(RedisServer):
    """Watches one primary under the name `service`, and can promote its replica alone (quorum 1)."""

    def __init__(self, watched: RedisServer, *, service: str, down_after_ms: int) -> None:
        super().__init__(watched.binary, keeps_data=False)
        self.watched = watched
        self.service = service
        self.down_after_ms = down_after_ms

    def until_ready(self) -> None:
        super().until_ready()
        # By default it polls the servers every 10 s, and does nothing for 30 s after it stalled for 2 s.
        self.command("SENTINEL", "DEBUG", "INFO-PERIOD", 200, "TILT-TRIGGER", 20_000)

    def primary_port(self) -> int:
        """The port of the primary that clients get."""
        return int(self.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])

    def primary(self) -> dict[str, str]:
        """The primary as the sentinel sees it."""
        return _fields(self.command("SENTINEL", "MASTER", self.service))

    def replicas(self) -> list[dict[str, str]]:
        """The replicas as the sentinel sees them."""
        return [_fields(listed) for listed in self.command("SENTINEL", "REPLICAS", self.service)]

    def _arguments(self) -> list[str]:
        return [*super()._arguments(), "--sentinel"]

    def _write_settings(self) -> None:
        path = self.directory / "redis.conf"
        if path.exists():  # the sentinel stores its state in it
            return
        name, log = self.service, self.directory / "redis.log"
        lines = [f"bind 127.0.0.1\nport {self.port}\ndir {self.directory}\nlogfile {log}"]
        lines.append(f"sentinel monitor {name} 127.0.0.1 {self.watched.port} 1")
        lines.append(f"sentinel down-after-milliseconds {name} {self.down_after_ms}")
        lines.append(f"sentinel failover-timeout {name} 5000")
        if self.watched.password is not None:
            lines.append(f"sentinel auth-pass {name} {self.watched.password}")
        path.write_text("\n".join(lines) + "\n")


class ReplicaPair:
    """A primary, its replica, and a sentinel that promotes the replica.

    After a failover `primary` is the new one, and `replica` the one that was killed or demoted.
    """

    service = "tests"

    def __init__(self, binary: str = "redis-server", *, password: str | None = None, down_after_ms: int = 1000) -> None:
        # Replicas have a user of their own, so that they can be locked out without the clients.
        settings = {"masteruser": "replica", "masterauth": "of-the-tests"}
        settings["user"] = "replica on >of-the-tests +psync +replconf +ping"
        settings["repl-diskless-sync-delay"] = "0"
        self.primary = RedisServer(binary, settings=settings, password=password)
        self.replica = RedisServer(binary, settings=settings, password=password)
        self.sentinel = RedisSentinel(self.primary, service=self.service, down_after_ms=down_after_ms)
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as started:
            started.enter_context(self.primary)
            self.replica.settings["replicaof"] = f"127.0.0.1 {self.primary.port}"
            started.enter_context(self.replica)
            self.until_in_step()
            started.enter_context(self.sentinel)
            until(self._watches_both, "the sentinel knows the replica")
            self._cleanup = started.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._cleanup.close()

    @property
    def sentinels(self) -> list[tuple[str, int]]:
        """For `redis.sentinel.Sentinel`."""
        return [("127.0.0.1", self.sentinel.port)]

    def until_in_step(self) -> None:
        """Wait until the replica has everything that the primary has now."""
        offset = int(self.primary.info("replication")["master_repl_offset"])
        until(lambda: self._has(offset), "the replica is in step")

    def isolate_replica(self) -> None:
        """From now on the replica receives nothing more; it can still be promoted.

        Only for a few seconds: a sentinel ignores a replica that has lost its primary for 10 × `down_after_ms`.
        """
        self.primary.command("ACL", "SETUSER", "replica", "off")
        self.primary.command("CLIENT", "KILL", "TYPE", "replica")
        until(lambda: self.replica.info("replication")["master_link_status"] == "down", "the replica is isolated")

    def fail_over(self) -> None:
        """Kill the primary and have the sentinel promote the replica.

        Writes that the replica has not received are lost: none before `until_in_step`, all after `isolate_replica`.
        """
        self.primary.kill()
        self._promote()

    def hand_over(self) -> None:
        """Have the sentinel promote the replica while the primary is running.

        The old primary does not know yet: until `bring_back` (or until the sentinel demotes it after ten seconds) it
        accepts writes, and loses them when it becomes a replica. This is how a sentinel works.
        """
        self._promote()

    def bring_back(self) -> None:
        """Make the old primary a replica of the new one, starting it if it was killed."""
        self.replica.settings["replicaof"] = f"127.0.0.1 {self.primary.port}"
        if self.replica.runs:
            self.replica.command("REPLICAOF", "127.0.0.1", self.primary.port)
        else:
            self.replica.restart(keep_data=True)
        self.until_in_step()
        until(self._watches_both, "the sentinel sees the replica again")

    def _promote(self) -> None:
        until(
            lambda: self.sentinel.command("SENTINEL", "FAILOVER", self.service) == b"OK",
            "the failover starts",
        )
        until(lambda: self.sentinel.primary_port() == self.replica.port, "the sentinel names the new primary")
        until(lambda: self.replica.info("replication")["role"] == "master", "the replica was promoted")
        until(lambda: self.sentinel.primary()["flags"] == "master", "the sentinel sees the new primary working")
        self.primary, self.replica = self.replica, self.primary
        self.primary.settings.pop("replicaof", None)
        self.primary.command("ACL", "SETUSER", "replica", "on")

    def _has(self, offset: int) -> bool:
        state = self.replica.info("replication")
        return state.get("master_link_status") == "up" and int(state["slave_repl_offset"]) >= offset

    def _watches_both(self) -> bool:
        return [(seen["port"], seen["flags"], seen["master-link-status"]) for seen in self.sentinel.replicas()] == [
            (str(self.replica.port), "slave", "ok")
        ]


class RedisCluster:
    """Primaries that share the slots, without replicas: if a node is down, its slots are unavailable."""

    def __init__(
        self,
        binary: str = "redis-server",
        *,
        size: int = 3,
        settings: Mapping[str, str | int] | None = None,
        keeps_data: bool = False,
        node_timeout_ms: int = 5000,
    ) -> None:
        ours = {"cluster-enabled": "yes", "cluster-node-timeout": node_timeout_ms, **(settings or {})}
        self.nodes = [RedisServer(binary, settings=ours, keeps_data=keeps_data) for _ in range(size)]
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as started:
            for node in self.nodes:
                started.push(node)
                node.launch()
            for node in self.nodes:
                node.until_ready()
            self._join()
            self._cleanup = started.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._cleanup.close()

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def slot_of(self, key: str) -> int:
        return int(self.nodes[0].command("CLUSTER", "KEYSLOT", key))

    def slot_owner(self, slot: int) -> RedisServer:
        """The node that owns a slot, on which all nodes agree."""
        owners = {self._owner_seen_by(node, slot) for node in self.nodes}
        assert len(owners) == 1, f"the nodes do not agree on slot {slot}"
        return self._node(owners.pop())

    def move_slot(self, slot: int, to: RedisServer) -> None:
        """Move a slot with its keys, as resharding does, while clients use it."""
        with self.moving_slot(slot, to):
            pass

    @contextmanager
    def moving_slot(self, slot: int, to: RedisServer) -> Iterator[None]:
        """In the block the slot is moving: the old owner redirects clients (ASK) for keys that it no longer has."""
        source = self.slot_owner(slot)
        assert source is not to, f"the node already owns slot {slot}"
        to.command("CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(to))
        yield
        self.move_keys(slot, source, to)
        for node in (to, source, *(node for node in self.nodes if node not in (to, source))):
            node.command("CLUSTER", "SETSLOT", slot, "NODE", self._id(to))
        until(lambda: all(self._owner_seen_by(node, slot) == to.port for node in self.nodes), f"slot {slot} has moved")

    def move_keys(self, slot: int, source: RedisServer, to: RedisServer) -> None:
        """Move the keys that a moving slot has now."""
        while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            timeout_ms = int(GUARD_S * 1000)
            source.command("MIGRATE", "127.0.0.1", to.port, "", 0, timeout_ms, "KEYS", *keys)

    def until_well(self) -> None:
        """Wait until every node knows all others and serves its slots."""
        until(lambda: all(self._is_well(node) for node in self.nodes), "the cluster is healthy")

    def _join(self) -> None:
        share = -(-SLOTS // len(self.nodes))
        for number, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.command("CLUSTER", "ADDSLOTSRANGE", number * share, min(SLOTS, (number + 1) * share) - 1)
            for other in self.nodes[:number]:
                node.command("CLUSTER", "MEET", "127.0.0.1", other.port)
        self.until_well()

    def _is_well(self, node: RedisServer) -> bool:
        lines = node.command("CLUSTER", "INFO").decode().split()
        wanted = {"cluster_state:ok", f"cluster_known_nodes:{len(self.nodes)}", f"cluster_slots_ok:{SLOTS}"}
        return wanted <= set(lines)

    def _owner_seen_by(self, node: RedisServer, slot: int) -> int | None:
        """The port of the owner as a node sees it."""
        ranges = node.command("CLUSTER", "SLOTS")
        return next((owner[1] for first, last, owner, *_ in ranges if first <= slot <= last), None)

    def _node(self, port: int | None) -> RedisServer:
        return next(node for node in self.nodes if node.port == port)

    def _id(self, node: RedisServer) -> str:
        return str(node.command("CLUSTER", "MYID").decode())
