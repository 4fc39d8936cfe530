"""The writers and readers of the service, each a thread that goes on through every fault.

Each thing that changes has one writer, which repeats a change until it is acknowledged. So the history knows the two
moments between which the change took effect.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

import grpc
import sqlalchemy as sa
from google.longrunning import operations_pb2, operations_pb2_grpc
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from segmentation.v1 import membership_pb2, segments_pb2

from grpc_api.token_sender import with_token
from segsvc.access.own_token import own_token
from segsvc.config import Settings
from segsvc.demo.client import Client
from tests.service_model import CONDITIONS, attributes_of
from tests.soak.timeline import ABSENT, Change, History, SegmentRule, Timeline

CALL_S = 20.0
RETRY_S = 0.2
READS_KEPT_MAX = 200_000

_PERMANENT = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


@dataclass(slots=True)
class Counts:
    """The counts of the report. Each count has one writer, so that no lock is needed."""

    reads: int = 0
    reads_refused: dict[str, int] = field(default_factory=dict)
    reads_wrong: list[str] = field(default_factory=list)
    operations: dict[str, int] = field(default_factory=dict)
    user_changes: int = 0
    overrides: int = 0


class Actor(threading.Thread):
    """Repeats one action until ``stop`` is set. An error that no fault explains ends the run."""

    def __init__(self, name: str, stop: threading.Event, failures: list[str]) -> None:
        super().__init__(name=name, daemon=True)
        self._stop_asked = stop
        self._failures = failures

    def run(self) -> None:
        try:
            while not self._stop_asked.is_set():
                self.act()
        except Exception as error:  # noqa: BLE001  # reported, and fails the run
            self._failures.append(f"{self.name}: {type(error).__name__}: {error}")
            self._stop_asked.set()

    def act(self) -> None:
        raise NotImplementedError


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    """The status of a call that failed."""
    code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
    return code


def until_acknowledged(call: Callable[[], object]) -> object:
    """Repeat a call that may be repeated, through every outage.

    Raises:
        grpc.RpcError: a refusal that no outage explains.
    """
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if code_of(error) in _PERMANENT:
                raise
            time.sleep(RETRY_S)


class Operator(Actor):
    """Rolls segments out, and deletes (unless they are ``kept``) and creates them again; one operation at a time."""

    def __init__(
        self,
        settings: Settings,
        history: History,
        slugs: Sequence[str],
        kept: Sequence[str],
        seed: int,
        counts: Counts,
        **thread: object,
    ) -> None:
        super().__init__(f"operator {slugs}", **thread)  # type: ignore[arg-type]
        self._client = Client.of(settings)
        self._operations = operations_pb2_grpc.OperationsStub(
            with_token(grpc.insecure_channel(settings.grpc_address), own_token(settings, lambda _: None))
        )
        self._catalog = sa.create_engine(settings.catalog_dsn, poolclass=sa.NullPool)

        self._history = history
        self._slugs = slugs
        self._kept = kept
        self._random = random.Random(seed)
        self._counts = counts

    def create(self, slug: str) -> None:
        """Create a segment. It has no members, so the history does not change."""
        segment = segments_pb2.Segment(slug=slug)
        request = segments_pb2.CreateSegmentRequest(segment=segment, request_id=str(uuid4()))
        made = until_acknowledged(lambda: self._client.segments.CreateSegment(request, timeout=CALL_S))
        assert isinstance(made, segments_pb2.Segment)
        change = self._history.rules[slug].begin(SegmentRule(self._salt(made.uid)), time.monotonic())
        change.end = time.monotonic()

    def _salt(self, uid: str) -> int:
        while True:
            try:
                with self._catalog.connect() as connection:
                    statement = sa.text("SELECT salt FROM segments WHERE uid = :uid")
                    return int(connection.execute(statement, {"uid": uid}).scalar_one()) % 2**64
            except sa.exc.OperationalError:
                time.sleep(RETRY_S)

    def act(self) -> None:
        slug = self._random.choice(self._slugs)
        if slug not in self._kept and self._random.random() < 0.1:
            request = segments_pb2.DeleteSegmentRequest(slug=slug, request_id=str(uuid4()))
            gone = self._run(slug, SegmentRule(), lambda: self._client.segments.DeleteSegment(request, timeout=CALL_S))
            if gone:
                self.create(slug)
            return

        condition = self._random.randrange(len(CONDITIONS))
        percent = self._random.choice((0.0, 5.0, 20.0, 50.0, 80.0, 100.0))
        rule = SegmentRule(self._history.rules[slug].last.salt, round(percent * 1000), condition)
        wanted = segments_pb2.RollOutRule(percent=percent, condition=CONDITIONS[condition].text)
        roll_out = segments_pb2.RollOutSegmentRequest(slug=slug, rule=wanted, request_id=str(uuid4()))

        self._run(slug, rule, lambda: self._client.segments.RollOutSegment(roll_out, timeout=CALL_S))
        time.sleep(self._random.random() * 0.3)

    def _run(self, slug: str, rule: SegmentRule, call: Callable[[], operations_pb2.Operation]) -> bool:
        """Run an operation to its end. Returns whether it took effect."""
        timeline = self._history.rules[slug]
        change = timeline.begin(rule, time.monotonic())
        operation = until_acknowledged(call)
        assert isinstance(operation, operations_pb2.Operation)

        while not operation.done:
            request = operations_pb2.GetOperationRequest(name=operation.name)
            operation = until_acknowledged(lambda: self._operations.GetOperation(request, timeout=CALL_S))  # noqa: B023
            assert isinstance(operation, operations_pb2.Operation)
            time.sleep(0.02)

        outcome = "aborted" if operation.HasField("error") else "done"
        if outcome == "aborted":
            timeline.withdraw(change)  # before its end is set: no reader may take it for settled

        change.end = time.monotonic()
        self._counts.operations[outcome] = self._counts.operations.get(outcome, 0) + 1
        return outcome == "done"


class Publisher(Actor):
    """Sends events. A change is acknowledged when the bridge's group has committed its offset."""

    BATCH = 40

    def __init__(
        self, settings: Settings, history: History, user_ids: Sequence[int], seed: int, counts: Counts, **thread: object
    ) -> None:
        super().__init__("publisher", **thread)  # type: ignore[arg-type]

        options = {"api_version": (2, 0)} if settings.kafka_stand_in else {}
        servers = settings.kafka_bootstrap_servers.split(",")
        self._producer = KafkaProducer(
            bootstrap_servers=servers, enable_idempotence=not settings.kafka_stand_in, **options
        )
        self._consumer = KafkaConsumer(
            bootstrap_servers=servers, group_id=settings.kafka_group, enable_auto_commit=False, **options
        )

        self._prefix = settings.kafka_topic_prefix
        self._history = history
        self._ids = user_ids
        self._versions = dict.fromkeys(user_ids, ABSENT)
        self._left: set[int] = set()
        self._random = random.Random(seed)
        self._counts = counts

    def restrict(self, user_ids: Sequence[int]) -> None:
        """Change only these users from now on."""
        self._ids = user_ids

    def act(self) -> None:
        """Send a batch of changes of different users, some of them twice; then wait until they are applied."""
        self.send(self._random.sample(self._ids, min(self.BATCH, len(self._ids))), leaving=0.02)

    def send(self, user_ids: Sequence[int], *, leaving: float = 0.0) -> None:
        changes: list[Change[int]] = []
        ends: dict[TopicPartition, int] = {}
        futures = []

        for user_id in user_ids:
            if user_id in self._left:
                continue
            before = self._versions[user_id]
            if before != ABSENT and self._random.random() < leaving:
                topic, event, version = "delete-user", {"user_id": user_id}, ABSENT
                self._left.add(user_id)
            elif before == ABSENT:
                topic, version = "create-user", 0
                event = {"user_id": user_id, "attributes": attributes_of(user_id, 0)}
            else:
                topic, version = "update-user", before + 1
                event = {"user_id": user_id, "version": version, "attributes": attributes_of(user_id, version)}

            self._versions[user_id] = version
            timeline = self._history.users.setdefault(user_id, Timeline(ABSENT))
            changes.append(timeline.begin(version, time.monotonic()))
            for _ in range(1 + (self._random.random() < 0.2)):  # some events are sent twice
                value = json.dumps(event).encode()
                futures.append(self._producer.send(self._prefix + topic, key=str(user_id).encode(), value=value))

        for future in futures:
            sent = future.get(timeout=60)
            partition = TopicPartition(sent.topic, sent.partition)
            ends[partition] = max(ends.get(partition, 0), sent.offset + 1)

        while any((self._consumer.committed(partition) or 0) < end for partition, end in ends.items()):
            time.sleep(0.02)

        now = time.monotonic()
        for change in changes:
            change.end = now
        self._counts.user_changes += len(changes)


class Overrider(Actor):
    """Sets and clears overrides of single users."""

    def __init__(
        self,
        settings: Settings,
        history: History,
        user_ids: Sequence[int],
        slugs: Sequence[str],
        seed: int,
        counts: Counts,
        **thread: object,
    ) -> None:
        super().__init__("overrider", **thread)  # type: ignore[arg-type]
        self._client = Client.of(settings)

        self._history = history
        self._ids = user_ids
        self._slugs = slugs
        self._random = random.Random(seed)
        self._counts = counts

    def act(self) -> None:
        user_id, slug = self._random.choice(self._ids), self._random.choice(self._slugs)
        into = self._random.choice((True, False, None))

        request = membership_pb2.ModifyUserOverridesRequest(user_id=user_id)
        if into is None:
            request.clear.append(slug)
        else:
            effect = membership_pb2.Override.INCLUDE if into else membership_pb2.Override.EXCLUDE
            request.set.add(slug=slug, effect=effect)

        timeline = self._history.overrides.setdefault((user_id, slug), Timeline[bool | None](None))
        change = timeline.begin(into, time.monotonic())
        until_acknowledged(lambda: self._client.memberships.ModifyUserOverrides(request, timeout=CALL_S))
        change.end = time.monotonic()

        self._counts.overrides += 1
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class Read:
    user_id: int
    answer: frozenset[str] | None
    begin: float
    end: float


class Reader(Actor):
    """Reads users at random and notes every answer with its times."""

    def __init__(
        self, settings: Settings, user_ids: Sequence[int], seed: int, log: deque[Read], counts: Counts, **thread: object
    ) -> None:
        super().__init__(f"reader {seed}", **thread)  # type: ignore[arg-type]
        self._client = Client.of(settings)
        self._ids = user_ids
        self._random = random.Random(seed)
        self._log = log
        self.counts = counts

    def act(self) -> None:
        user_id = self._random.choice(self._ids)
        request = membership_pb2.GetUserSegmentsRequest(user_id=user_id)
        begin = time.monotonic()
        answer: frozenset[str] | None = None

        try:
            answer = frozenset(self._client.memberships.GetUserSegments(request, timeout=5).slugs)
        except grpc.RpcError as error:
            code = code_of(error)
            if code is not grpc.StatusCode.NOT_FOUND:
                name = code.name
                self.counts.reads_refused[name] = self.counts.reads_refused.get(name, 0) + 1
                time.sleep(0.01)
                return

        self._log.append(Read(user_id, answer, begin, time.monotonic()))
        self.counts.reads += 1
        while len(self._log) > READS_KEPT_MAX:  # the judge is behind
            time.sleep(0.01)
