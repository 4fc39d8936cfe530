"""A Kafka for one machine: the user's brokers, a real broker of our own, or librdkafka's in-memory stand-in.

The first possible one is chosen, and the choice is always printed:

1. ``SEGSVC_KAFKA_BOOTSTRAP_SERVERS`` is set: those brokers are used; none is started or stopped.
2. Java 17 or later and Maven are installed: Apache Kafka's own broker (KRaft, one node) from its Maven artifact. The
   jars are fetched once and kept.
3. Otherwise: the mock broker of librdkafka, in a process of its own. It keeps everything in memory and lacks some
   features of Kafka. ``SEGSVC_REQUIRE_REAL_KAFKA=1`` makes this an error.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError

from segsvc.config import Settings, load_settings
from segsvc.domain import events
from segsvc.kafka_options import connection_options
from segsvc.local.kafka_jars import KAFKA_ARTIFACT, fetch_jars
from segsvc.local.processes import MARKER, Daemon, LocalStackError, free_ports, log_size, start, tail, wait_patiently

JAVA_VERSION_MIN = 17
START_TIMEOUT_S = 90.0

# The events of one user are in order within a partition. Eight partitions let several consumers share the work.
TOPICS: dict[str, int] = {
    **dict.fromkeys(events.TOPICS, 8),
    **{f"{topic}.dlq": 1 for topic in events.TOPICS},
    events.SEGMENT_EVENTS_TOPIC: 1,
}

_DEAD_LETTER_BYTES_MAX = 64 * 1024 * 1024
"""A dead letter is an event and its headers, so its topic must allow larger messages than the event's topic. This is
the largest message that the bridge's producer sends, far above the default limit of brokers."""

Say = Callable[[str], object]

_BROKER = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
num.partitions=8
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
num.network.threads=2
num.io.threads=4
"""


class KafkaServer(Protocol):
    """What the stack and the tests need from a Kafka of any kind."""

    bootstrap_servers: str
    stand_in: bool
    description: str

    @property
    def running(self) -> bool: ...

    def stop(self) -> None: ...

    def create_topics(self, topics: Mapping[str, int]) -> None: ...


def real_kafka_required(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``SEGSVC_REQUIRE_REAL_KAFKA`` requires a real broker (any value except empty and 0)."""
    return environ.get("SEGSVC_REQUIRE_REAL_KAFKA", "") not in ("", "0")


def java_version() -> int | None:
    """Major version of the ``java`` on the PATH; None if there is none or its version is unknown."""
    try:
        done = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(found[1]) if found else None


def why_no_real_kafka() -> str | None:
    """What is missing for a broker of our own, with the command that installs it; None if nothing is missing."""
    version = java_version()
    if version is None:
        return "Java is missing (apt-get install openjdk-17-jre-headless maven)"
    if version < JAVA_VERSION_MIN:
        return f"Java {version} is too old: {JAVA_VERSION_MIN} or later (apt-get install openjdk-17-jre-headless maven)"
    if shutil.which("mvn") is None:
        return "Maven is missing (apt-get install maven)"
    return None


def start_kafka(
    folder: Path,
    *,
    jars: Path,
    ports: tuple[int, int] | None = None,
    mark: Path | None = None,
    say: Say = print,
    environ: Mapping[str, str] = os.environ,
) -> KafkaServer:
    """Start the best Kafka that is possible on this machine, or use the user's. ``create_topics`` makes the topics.

    Args:
        folder: where its data and log are; made if absent.
        jars: folder where the broker's jars are kept between runs; made if absent.
        ports: ports of a real broker of our own and of its controller; by default, free ones.
        mark: the stack's folder for ``processes.find_marked``.
        say: called with a sentence about the choice, and about steps that take long.

    Raises:
        LocalStackError: Kafka did not start, or a real one is required and not possible.
    """
    if servers := environ.get("SEGSVC_KAFKA_BOOTSTRAP_SERVERS"):
        say(f"Kafka: using your brokers at {servers}")
        return UserKafka(load_settings(kafka_bootstrap_servers=servers))

    missing = why_no_real_kafka()
    if missing is None:
        try:
            fetch_jars(jars, mark=mark or folder, say=say)
        except LocalStackError as error:
            if real_kafka_required(environ):
                raise
            missing = str(error)
    elif real_kafka_required(environ):
        raise LocalStackError(
            f"SEGSVC_REQUIRE_REAL_KAFKA=1, but no real Kafka can be started: {missing}; "
            "or set SEGSVC_KAFKA_BOOTSTRAP_SERVERS to your own brokers."
        )

    server: RealKafka | StandInKafka
    if missing is None:
        server = RealKafka(folder, jars, ports=ports, mark=mark)
    else:
        say(
            "ATTENTION: NO REAL KAFKA. librdkafka's in-memory broker stands in: nothing is kept on disk, and some "
            f"features of Kafka are missing. Reason: {missing}"
        )
        server = StandInKafka(folder, mark=mark)
    server.start()
    return server


class UserKafka:
    """The user's own brokers."""

    stand_in = False

    def __init__(self, settings: Settings) -> None:
        self.bootstrap_servers = settings.kafka_bootstrap_servers
        self.description = f"Kafka at {self.bootstrap_servers} (SEGSVC_KAFKA_BOOTSTRAP_SERVERS)"
        self._options = connection_options(settings)

    @property
    def running(self) -> bool:
        return True

    def stop(self) -> None:
        """Do nothing: the brokers are not ours."""

    def create_topics(self, topics: Mapping[str, int]) -> None:
        """Create the topics that are absent, each with its number of partitions."""
        create_topics(self._options, topics)


class RealKafka:
    """Apache Kafka, one KRaft node for broker and controller, on free ports of 127.0.0.1."""

    stand_in = False

    def __init__(
        self,
        folder: Path,
        jars: Path,
        *,
        ports: tuple[int, int] | None = None,
        mark: Path | None = None,
        config: str = "",
    ) -> None:
        """``ports``: of the broker and of its controller; by default, free ones. ``config``: lines after its own."""
        self.folder = folder.resolve()
        self.bootstrap_servers = f"127.0.0.1:{ports[0]}" if ports else ""
        self.description = f"Kafka {KAFKA_ARTIFACT[2]} (a broker of our own)"
        self.log = self.folder / "kafka.log"
        self._config = config
        self._classpath = f"{jars.resolve()}/*"
        self._daemon = Daemon("kafka", self.folder, log=self.log, mark=mark)
        self._mark = (mark or folder).resolve()
        self.ports = ports

    @property
    def running(self) -> bool:
        return self._daemon.running

    @property
    def died(self) -> bool:
        """Whether it has ended without a call of ``stop`` or ``kill``."""
        return self._daemon.died

    @property
    def pid(self) -> int | None:
        return self._daemon.pid

    def start(self) -> None:
        """Start the broker, and format its storage the first time; returns when clients can connect.

        Raises:
            LocalStackError: the broker did not start; with the last lines of its log.
        """
        if self.ports and self.running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ports = self.ports or _two(free_ports(2))
        self.bootstrap_servers = f"127.0.0.1:{self.ports[0]}"

        data = self.folder / "data"
        if not data.exists():
            unfinished = self.folder / "data.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            config = self._write_config("format.properties", unfinished)
            self._format(config)
            unfinished.rename(data)

        config = self._write_config("server.properties", data)
        options = ["-Xmx512m", "-Xms128m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
        self._daemon.spawn(self._java(*options, "kafka.Kafka", str(config)), cwd=self.folder)
        # First wait until it listens: kafka-python would wait longer and longer between its attempts.
        listening = partial(_listens, self.ports[0])
        self._daemon.await_ready(listening, timeout_s=START_TIMEOUT_S)
        self._daemon.await_ready(lambda: _answers(self.bootstrap_servers), timeout_s=START_TIMEOUT_S)

    def stop(self) -> None:
        """Shut it down in order. Returns when its process is gone."""
        self._daemon.stop(signals=((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)))

    def kill(self) -> None:
        """SIGKILL, like a crash. Returns when its process is gone."""
        self._daemon.stop(signals=((signal.SIGKILL, 5.0),))

    def restart(self) -> None:
        """Stop, then start with the same address and data."""
        self.stop()
        self.start()

    def create_topics(self, topics: Mapping[str, int]) -> None:
        """Create the topics that are absent, each with its number of partitions."""
        create_topics({"bootstrap_servers": self.bootstrap_servers}, topics)

    def _write_config(self, name: str, data: Path) -> Path:
        assert self.ports is not None
        config = self.folder / name
        # Of two lines with the same name, the last one holds.
        own = _BROKER.format(port=self.ports[0], controller_port=self.ports[1], data=data)
        config.write_text(own + self._config.format(port=self.ports[0], controller_port=self.ports[1]))
        return config

    def _java(self, *arguments: str) -> list[str]:
        prefix = "-Dorg.slf4j.simpleLogger"
        logging = [
            f"{prefix}.showDateTime=true",
            f"{prefix}.dateTimeFormat=HH:mm:ss.SSS",
            f"{prefix}.defaultLogLevel=info",
        ]
        # Without these, a killed broker leaves files in the machine's temporary folder.
        places = [f"-Djava.io.tmpdir={self.folder}", "-XX:-UsePerfData"]
        return ["java", *places, *logging, "-cp", self._classpath, *arguments]

    def _format(self, config: Path) -> None:
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # One argument: the id may begin with a hyphen, and would otherwise be read as an option.
        command = self._java("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", str(config))
        before = log_size(self.log)
        with self.log.open("ab") as log:
            child = start(command, env={MARKER: str(self._mark)}, output=log, cwd=self.folder)
            try:
                wait_patiently(lambda: child.poll() is not None, timeout_s=START_TIMEOUT_S)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if child.returncode != 0:
            said = tail(self.log, since=before)
            raise LocalStackError(f"Kafka's storage could not be formatted. The last lines of {self.log}:\n{said}")


class StandInKafka:
    """librdkafka's mock broker in a process of its own; all messages are lost when it ends."""

    stand_in = True

    def __init__(self, folder: Path, *, mark: Path | None = None) -> None:
        self.folder = folder.resolve()
        self.bootstrap_servers = ""
        self.description = "librdkafka's in-memory broker (a stand-in, not Kafka)"
        self.log = self.folder / "kafka-stand-in.log"
        self._address_file = self.folder / "address.json"
        self._daemon = Daemon("kafka-stand-in", self.folder, log=self.log, mark=mark)

    @property
    def running(self) -> bool:
        return self._daemon.running

    @property
    def pid(self) -> int | None:
        return self._daemon.pid

    def start(self) -> None:
        """Start the mock broker; returns when it has written its address.

        Raises:
            LocalStackError: it did not start; with the last lines of its log.
        """
        if self.running and self._address_file.exists():
            self.bootstrap_servers = json.loads(self._address_file.read_text())["bootstrap_servers"]
            return

        self.folder.mkdir(parents=True, exist_ok=True)
        self._address_file.unlink(missing_ok=True)
        self._daemon.spawn([sys.executable, "-m", "segsvc.local.kafka_standin", str(self._address_file)])
        self._daemon.await_ready(self._address_file.exists, timeout_s=START_TIMEOUT_S)
        self.bootstrap_servers = json.loads(self._address_file.read_text())["bootstrap_servers"]

    def stop(self) -> None:
        """End the mock broker; its messages are lost. Returns when its process is gone."""
        self._daemon.stop(signals=((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)))

    def create_topics(self, topics: Mapping[str, int]) -> None:
        """Do nothing: the mock broker makes a topic (of four partitions) when a client first asks for it."""


def create_topics(connection: Mapping[str, Any], topics: Mapping[str, int]) -> None:
    """Create the topics that are absent, each with its number of partitions and the brokers' default replication.

    Args:
        connection: options of a client, as ``kafka_options.connection_options`` makes them.
        topics: name -> number of partitions.

    Raises:
        LocalStackError: the brokers refused or could not be reached.
    """
    try:
        admin = KafkaAdminClient(**connection)
        try:
            absent = set(topics) - set(admin.list_topics())
            for name in sorted(absent):
                try:
                    admin.create_topics([_new_topic(name, topics[name])])
                except TopicAlreadyExistsError:
                    continue  # another process was faster
        finally:
            admin.close()
    except KafkaError as error:
        raise LocalStackError(
            f"the topics could not be created on {connection['bootstrap_servers']}: {error}"
        ) from error


def _new_topic(name: str, partitions: int) -> NewTopic:
    options = {"max.message.bytes": str(_DEAD_LETTER_BYTES_MAX)} if name.endswith(".dlq") else {}
    return NewTopic(name=name, num_partitions=partitions, replication_factor=-1, topic_configs=options)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(bootstrap_servers: str) -> bool:
    """Whether the broker answers a metadata request and has a working controller."""
    try:
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers, request_timeout_ms=5000)
    except KafkaError:
        return False
    try:
        admin.list_topics()
    except KafkaError:
        return False
    finally:
        admin.close()
    return True


def _two(ports: list[int]) -> tuple[int, int]:
    return ports[0], ports[1]
