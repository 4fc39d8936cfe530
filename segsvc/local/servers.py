"""The servers of one stack: PostgreSQL, the broker, the cache and Kafka. Each keeps the port and the password of its
first start, so that clients can connect again after a restart.
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
from segsvc.local.stack_env import StackChoices, choose_ports

_REDIS = {"broker": BROKER_CONFIG, "cache": CACHE_CONFIG}
_PORTS = ("broker", "cache", "kafka", "kafka_controller")


class Servers:
    """All servers of a stack. Cheap to construct; nothing happens before ``start`` or ``revive``.

    Args:
        home: the stack's folder.
        jars: folder of Kafka's jars.
        fast: for tests: PostgreSQL's data survives a killed process but not a power failure.
    """

    def __init__(self, home: Path, *, jars: Path, fast: bool = False) -> None:
        self.home = home
        self._jars = jars
        self._fast = fast
        self._choices = StackChoices(home / "kept.json")
        self.kafka: KafkaServer | None = None

    def postgres(self) -> PostgresServer:
        return PostgresServer(self.home / "postgres", mark=self.home, fast=self._fast)

    def redis(self, name: str) -> RedisServer:
        """The ``broker`` or the ``cache``, with the port and the password that were chosen at its first start."""
        password = self._choices.secret(f"{name}_password", lambda: secrets.token_urlsafe(24))
        port = self._choices.ports.get(name, 0)
        return RedisServer(name, self.home / name, _REDIS[name], password=password, port=port, mark=self.home)

    def daemons(self) -> list[Daemon]:
        """The servers by their pid files, whichever process started them; of the two kinds of Kafka only one."""

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
        """Start the servers that do not run; returns when all accept connections and the databases and topics exist.

        Args:
            databases: names of the databases.
            reserved: reserves the chosen ports against other stacks that start at the same time.
            say: called with a sentence about each step.

        Raises:
            LocalStackError: a server did not start; with the last lines of its log.
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
            wanted = {name: self._choices.ports.get(name, 0) for name in _PORTS if name not in running}
            self._choices.ports |= choose_ports(reserved, wanted)
            self._choices.write()
            self.redis("broker").start()
            self.redis("cache").start()

            say("starting Kafka")
            ports = (self._choices.ports["kafka"], self._choices.ports["kafka_controller"])
            self.kafka = start_kafka(self.home / "kafka", jars=self._jars, ports=ports, mark=self.home, say=say)
            self.kafka.create_topics(TOPICS)
            return self.kafka

    def revive(self) -> list[str]:
        """Start the servers again that have ended by themselves, with the same settings; returns their names.

        Except the stand-in for Kafka: it would come back on another port and without its messages. ``segsvc up``
        starts it again, and restarts our processes with its new address.

        Raises:
            LocalStackError: a server did not start; with the last lines of its log.
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
                    ports = (self._choices.ports["kafka"], self._choices.ports["kafka_controller"])
                    RealKafka(self.home / "kafka", self._jars, ports=ports, mark=self.home).start()
            return [name for name in dead if name != "kafka-stand-in"]

    def stops(self) -> list[Callable[[], None]]:
        """A function for each server that stops it, as gently as possible; in the order of stopping."""
        made: list[Callable[[], None]] = []
        for daemon in reversed(self.daemons()):
            gentle = signal.SIGINT if daemon.name == "postgres" else signal.SIGTERM  # fast, not smart, shutdown
            made.append(lambda d=daemon, g=gentle: d.stop(signals=((g, 30.0), (signal.SIGKILL, 5.0))))  # type: ignore[misc]
        return made

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process at a time starts servers; otherwise the keeper and ``up`` could start the same one twice."""
        with (self.home / "servers.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
