"""What ``segsvc doctor`` checks in the broker, Kafka and the processes of segsvc."""

from __future__ import annotations

import logging
import re
import socket
import time
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.errors import KafkaError
from kombu.exceptions import OperationalError

from segsvc.bootstrap import Check, installation_of
from segsvc.bridge.dead_letters import SUFFIX
from segsvc.cache.server_check import run_id_of
from segsvc.cli.base import Refusal
from segsvc.cli.doctor import events
from segsvc.cli.doctor.items import Item
from segsvc.cli.doctor.storage import SHARED
from segsvc.cli.front import connected
from segsvc.cli.front_tls import reachable
from segsvc.config import Settings, mask
from segsvc.domain.errors import ServiceError
from segsvc.domain.events import SEGMENT_EVENTS_TOPIC, TOPICS
from segsvc.kafka_options import connection_options
from tasks.app import app
from tasks.broker import InstallationUnknown
from tasks.dispatcher import CeleryDispatcher
from tasks.queues import QUEUES
from tasks.steps import HEALTH_COMMAND

_PING_S: Final = 2.0
_SCAN_S: Final = 1.0
_PREFIX: Final = re.compile(rb"segsvc:([a-z0-9-]+-[0-9a-f]{8}):")
_UNPUBLISHED_MAX_S: Final = 30.0
"""A commit is published within a second or two."""
_HEALTH_SERVICES: Final = ("", "segmentation.v1.SegmentService", "segmentation.v1.MembershipService")


def broker(settings: Settings) -> Sequence[Item]:
    """The broker's server and its settings, that it is not the cache's server, and other installations that use it."""
    try:
        with app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            channel: Any = connection.default_channel  # a channel of the Redis transport, which has a client
            info: Mapping[str, Any] = channel.client.info()
            owners = _owners(channel.client)
    except InstallationUnknown:
        return [
            Item("without a database it is unknown which keys belong to this installation", "see the databases above")
        ]
    except (OperationalError, OSError) as error:
        reason = mask(str(error)) or type(error).__name__
        return [Item(f"it cannot be reached ({reason})", "start it or correct SEGSVC_BROKER_URL")]

    found: list[Item] = []
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        text = f"maxmemory-policy is {policy}: messages would vanish when it is full"
        found.append(Item(text, "set maxmemory-policy noeviction"))
    if not info.get("aof_enabled"):
        text = "appendonly is off: a restart forgets every message; recovery sends operations again, later"
        found.append(Item(text, "set appendonly yes"))
    # A cache that cannot be reached is reported by its own check.
    if info.get("run_id") in {run_id_of(url, timeout_s=settings.cache_timeout_s) for url in settings.all_cache_urls}:
        found.append(Item("it is the same server as the cache", "give the cache a server of its own"))
    others = sorted(owners - {installation_of(settings).name})
    return [*found, *(Item(f"the installation {name} uses this server too", SHARED) for name in others)]


def _owners(client: Any) -> set[str]:
    """Names of the installations that have keys on the broker, as far as a scan of one second finds them."""
    found: set[str] = set()
    cursor, end = 0, time.monotonic() + _SCAN_S
    while time.monotonic() < end:
        cursor, names = client.scan(cursor, count=1000)
        found.update(name[1].decode() for key in names if (name := _PREFIX.match(key)))
        if not cursor:
            break
    return found


def kafka(settings: Settings) -> Sequence[Item]:
    """The brokers, the topics, and the state of the events in them."""
    # An unreachable broker is reported below, once.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        consumer = KafkaConsumer(
            **connection_options(settings),
            enable_auto_commit=False,
            request_timeout_ms=5_000,
            bootstrap_timeout_ms=5_000,
        )
    except (KafkaError, OSError) as error:
        return [_no_broker(settings, error)]

    try:
        return [*_topics(consumer, settings), *events.items(settings, lambda: _members(settings))]
    except (KafkaError, OSError) as error:
        return [Item(f"the brokers closed the connection ({type(error).__name__})", "read the brokers' logs")]
    finally:
        consumer.close(autocommit=False)


def _no_broker(settings: Settings, error: Exception) -> Item:
    where = f"{settings.kafka_bootstrap_servers} ({type(error).__name__})"
    if not any(map(_listens, settings.kafka_bootstrap_servers.split(","))):
        return Item(f"no broker of {where} can be reached", "start Kafka or correct SEGSVC_KAFKA_BOOTSTRAP_SERVERS")

    # The client does not say which of these it was; the broker's log does.
    remedy = "correct SEGSVC_KAFKA_SECURITY_PROTOCOL, user name, password or certificates, or read the broker's log"
    return Item(f"a broker of {where} listens, but no connection comes about", remedy)


def _listens(broker: str) -> bool:
    host, _, port = broker.strip().rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except (OSError, ValueError):
        return False
    return True


def _topics(consumer: KafkaConsumer, settings: Settings) -> Sequence[Item]:
    found: list[Item] = []
    if settings.kafka_stand_in:
        found.append(Item("an in-memory stand-in, not a real broker: for demonstrations only"))
    for name in TOPICS:
        topic = settings.kafka_topic_prefix + name
        if not consumer.partitions_for_topic(topic):
            found.append(Item(f"{topic} does not exist", f"create the topic {topic}"))
    for name in (*(name + SUFFIX for name in TOPICS), SEGMENT_EVENTS_TOPIC):
        topic = settings.kafka_topic_prefix + name
        if not consumer.partitions_for_topic(topic):
            found.append(Item(f"{topic} does not exist: its messages wait", f"create the topic {topic}"))
    return found


def bridge(settings: Settings) -> Sequence[Item]:
    """Whether a bridge runs, even while no events arrive, and whether it publishes committed changes."""
    return [*_group_items(settings), *_outbox_items(settings)]


def _group_items(settings: Settings) -> Sequence[Item]:
    if settings.kafka_stand_in:  # it does not report groups
        return []
    try:
        members = _members(settings)
    except KafkaError as error:
        return [Item(f"the brokers do not list the members of its group ({type(error).__name__})", "read their logs")]
    if members is None:
        return [Item("without Kafka it is unknown whether it runs", "see Kafka above")]
    if members:
        return []
    return [Item(f"the consumer group {settings.kafka_group} has no members", "start `segsvc bridge`, or read its log")]


def _members(settings: Settings) -> int | None:
    """Number of bridges in the consumer group; None: the brokers cannot be reached.

    Raises:
        KafkaError: the brokers do not list them.
    """
    if settings.kafka_stand_in:
        return None
    try:
        admin = KafkaAdminClient(
            **connection_options(settings),
            request_timeout_ms=5_000,
            bootstrap_timeout_ms=5_000,
        )
    except (KafkaError, OSError):
        return None
    try:
        return len(admin.describe_groups([settings.kafka_group])[settings.kafka_group]["members"])
    finally:
        admin.close()


def _outbox_items(settings: Settings) -> Sequence[Item]:
    service = Check(settings, with_cache=False)
    try:
        waiting, age_s = service.reads.unpublished()
    except ServiceError:
        return [Item("without the catalog it is unknown what waits to be published", "see the databases above")]
    finally:
        service.close()
    if age_s <= _UNPUBLISHED_MAX_S:
        return []
    text = f"{waiting:,} commits are not yet on {SEGMENT_EVENTS_TOPIC}, the oldest for {age_s:,.0f} s"
    return [Item(text, "start `segsvc bridge`, or read its log")]


def flower(settings: Settings) -> Sequence[Item]:
    """Whether Flower answers, if it is configured."""
    if not settings.flower_password:
        return [Item("not checked: SEGSVC_FLOWER_PASSWORD is empty")]
    address = reachable(settings.flower_address)
    try:
        # Without the proxy of the environment, which is for servers outside.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{address}/healthcheck", timeout=_PING_S):
            return []
    except (OSError, HTTPException) as error:
        text = f"it does not answer at {address} ({type(error).__name__})"
        return [Item(text, "start `segsvc flower`, or correct SEGSVC_FLOWER_ADDRESS")]


def front(settings: Settings) -> Sequence[Item]:
    """Whether the front answers, and which of its services can serve."""
    found: list[Item] = []
    try:
        with connected(settings) as stubs:
            for service in _HEALTH_SERVICES:
                answer = stubs.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=_PING_S)
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    text = f"{service or 'the front as a whole'} cannot serve now"
                    found.append(Item(text, "it serves again when the databases are back; see above"))
    except Refusal as error:
        remedy = "start it with `segsvc serve`, or correct SEGSVC_GRPC_ADDRESS or SEGSVC_CLIENT_TLS"
        return [Item(str(error), remedy)]
    except grpc.RpcError as error:
        return [Item(f"health: {error}", "read its log")]
    return found


def workers(settings: Settings) -> Sequence[Item]:
    """Whether a worker of each queue answers, and takes messages."""
    try:
        CeleryDispatcher(app).check()
        replies: Any = app.control.broadcast(HEALTH_COMMAND, reply=True, timeout=_PING_S)
    except (ServiceError, OperationalError, OSError):
        return [Item("without the broker they cannot be asked", "see the broker above")]
    answers = {name: answer for reply in replies or () for name, answer in reply.items()}
    return [*_missing(answers), *_reported_problems(answers)]


def _missing(answers: Mapping[str, Any]) -> Sequence[Item]:
    alive = {name.partition("@")[0] for name in answers}
    return [
        Item(f"no worker of {queue} answers", f"start `segsvc worker --queue {queue}`")
        for queue in QUEUES
        if queue not in alive
    ]


def _reported_problems(answers: Mapping[str, Any]) -> Sequence[Item]:
    """Workers that answer but do not work. A worker of an older release does not know the question, and is left out."""
    complaints = {name: answer.get("complaint") for name, answer in answers.items() if isinstance(answer, dict)}
    return [
        Item(f"the worker {name} reports a problem: {complaint}", "read its log, and restart it")
        for name, complaint in sorted(complaints.items())
        if complaint
    ]
