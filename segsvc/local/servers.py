"""The servers of one stack: PostgreSQL, the broker, the cache and Kafka, each on the port and with the password that it
was given first, so that whoever is connected finds it again after it was restarted.
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from segsvc.local.kafka import TOPICS, KafkaServer, RealKafka, start_kafka
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import Daemon
from segsvc.local.redis import BROKER_CONFIG, CACHE_CONFIG, RedisServer
from segsvc.local.stack_env import Kept, choose_ports

_REDIS = {"broker": BROKER_CONFIG, "cache": CACHE_CONFIG}
_PORTS = ("broker", "cache", "kafka", "kafka_controller")


class Servers:
    """Cheap to construct; nothing happens before ``start`` or ``revive``.

    Args:
        home: the stack's folder.
        jars: where Kafka's jars are kept.
        fast: for tests: PostgreSQL survives a killed process, not a power cut.
    """

    def __init__(self, home: Path, *, jars: Path, fast: bool = False) -> None:
        self.home = home
        self._jars = jars
        self._fast = fast
        self._kept = Kept(home / "kept.json")
        self.kafka: KafkaServer | None = None

    def postgres(self) -> PostgresServer:
        return PostgresServer(self.home / "postgres", mark=self.home, fast=self._fast)

    def redis(self, name: str) -> RedisServer:
        """The ``broker`` or the ``cache``, by the port and the password that were chosen at its first start."""
        password = self._kept.secret(f"{name}_password", lambda: secrets.token_urlsafe(24))
        port = self._kept.ports.get(name, 0)
        return RedisServer(name, self.home / name, _REDIS[name], password=password, port=port, mark=self.home)

    def daemons(self) -> list[Daemon]:
        """The servers by the records that they left, whoever started them; of the two Kafkas only one that is there."""

        def daemon(name: str, folder: str) -> Daemon:
            return Daemon(name, self.home / folder, log=self.home / folder / f"{name}.log", mark=self.home)

        kafkas = [daemon("kafka", "kafka"), daemon("kafka-stand-in", "kafka")]
        return [
            daemon("postgres", "postgres"),
            daemon("broker", "broker"),
            daemon("cache", "cache"),
            *([kafka for kafka in kafkas if kafka.running] or kafkas[:1]),
        ]

    def start(
        self, databases: list[str], reserved: contextlib.ExitStack, *, say: Callable[[str], object]
    ) -> KafkaServer:
        """Start those that do not run; returns when all accept connections, with the databases and topics there.

        Args:
            databases: names of the databases.
            reserved: holds the chosen ports against other stacks that start meanwhile.
            say: told, a sentence at a time, what happens.

        Raises:
            LocalStackError: one did not start; with the last lines of its log.
        """
        with self._locked():
            say("starting PostgreSQL")
            postgres = self.postgres()
            if not postgres.location.is_relative_to(self.home):
                say(f"PostgreSQL does not run as root and its user cannot enter {self.home}: {postgres.location}")
            postgres.start()
            for database in databases:
                postgres.create_database(database)

            say("starting Redis (broker, cache)")
            running = {daemon.name for daemon in self.daemons() if daemon.running}
            running |= {"kafka_controller"} if "kafka" in running else set()
            wanted = {name: self._kept.ports.get(name, 0) for name in _PORTS if name not in running}
            self._kept.ports |= choose_ports(reserved, wanted)
            self._kept.write()
            self.redis("broker").start()
            self.redis("cache").start()

            say("starting Kafka")
            ports = (self._kept.ports["kafka"], self._kept.ports["kafka_controller"])
            self.kafka = start_kafka(self.home / "kafka", jars=self._jars, ports=ports, mark=self.home, say=say)
            self.kafka.create_topics(TOPICS)
            return self.kafka

    def revive(self) -> list[str]:
        """Start those again that have ended without being told to, as they were; their names.

        The stand-in for Kafka is left out: it would come back on another port and without its messages. ``segsvc up``
        starts it again, and our processes with its new address.

        Raises:
            LocalStackError: one did not start; with the last lines of its log.
        """
        if not any(daemon.died for daemon in self.daemons()):
            return []
        with self._locked():
            # Another command may have started it while we waited for the lock.
            dead = [daemon.name for daemon in self.daemons() if daemon.died]
            for name in dead:
                if name == "postgres":
                    self.postgres().start()
                elif name in _REDIS:
                    self.redis(name).start()
                elif name == "kafka":
                    ports = (self._kept.ports["kafka"], self._kept.ports["kafka_controller"])
                    RealKafka(self.home / "kafka", self._jars, ports=ports, mark=self.home).start()
            return [name for name in dead if name != "kafka-stand-in"]

    def stops(self) -> list[Callable[[], None]]:
        """How to stop each, in the order in which they are stopped, as gently as it allows."""
        made: list[Callable[[], None]] = []
        for daemon in reversed(self.daemons()):
            gentle = signal.SIGINT if daemon.name == "postgres" else signal.SIGTERM  # fast, not smart, shutdown
            made.append(lambda d=daemon, g=gentle: d.stop(signals=((g, 30.0), (signal.SIGKILL, 5.0))))  # type: ignore[misc]
        return made

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time starts servers: the keeper and ``up`` would start the same one twice."""
        with (self.home / "servers.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
