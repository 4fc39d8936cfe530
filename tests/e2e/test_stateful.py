"""The whole service against a pure model, in any order of calls, events, repetitions and restarts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from uuid import uuid4

import grpc
import hypothesis.strategies as st
import pytest
import redis
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from segmentation.v1 import membership_pb2, segments_pb2

from segsvc.bootstrap import Check
from segsvc.demo.client import Client
from segsvc.domain.events import TOPICS
from segsvc.local.postgres import PostgresServer
from segsvc.local.stack import LocalStack
from tests.e2e.test_outages import redis_of
from tests.eventually import eventually
from tests.service_model import CONDITIONS, Condition, Model, ModelSegment, attributes_of

Override = membership_pb2.Override
Rule = segments_pb2.RollOutRule
NAMES = ("alpha", "beta", "gamma")
USERS = 24
CALL_S = 60.0
PROCESSES = ("serve", "worker-operations", "worker-events", "worker-warming", "beat", "bridge")


class World:
    """The stack, and what every run of the machine needs from it. No two runs use the same user ids."""

    def __init__(self, stack: LocalStack) -> None:
        self.stack = stack
        self.settings = stack.settings
        self.client = Client.of(self.settings)
        self.client.wait_ready(30)

        options = {"api_version": (2, 0)} if self.settings.kafka_stand_in else {}
        servers = self.settings.kafka_bootstrap_servers.split(",")
        idempotence = not self.settings.kafka_stand_in
        self.producer = KafkaProducer(bootstrap_servers=servers, enable_idempotence=idempotence, **options)
        self._consumer = KafkaConsumer(
            bootstrap_servers=servers, group_id=self.settings.kafka_group, enable_auto_commit=False, **options
        )
        self._catalog = sa.create_engine(self.settings.catalog_dsn, poolclass=sa.NullPool)

        self.first_user = 8_000_000_000
        self.runs = 0

    def close(self) -> None:
        self.client.close()
        self.producer.close(timeout=5)
        self._consumer.close(autocommit=False)
        self._catalog.dispose()

    def salt(self, uid: str) -> int:
        """The salt of a segment, which no API returns."""
        with self._catalog.connect() as connection:
            salt = connection.execute(sa.text("SELECT salt FROM segments WHERE uid = :uid"), {"uid": uid}).scalar_one()
        return int(salt) % 2**64

    def await_events(self) -> None:
        """Wait until the offsets of all sent events are committed. After that every read must show their effects."""
        self.producer.flush(timeout=30)
        partitions = [
            TopicPartition(topic, number)
            for topic in (self.settings.kafka_topic_prefix + name for name in TOPICS)
            for number in self._consumer.partitions_for_topic(topic) or ()
        ]
        ends = self._consumer.end_offsets(partitions)
        # The bridge reaches the end of the events.
        eventually(lambda: all((self._consumer.committed(part) or 0) >= ends[part] for part in partitions), within_s=60)


class ServiceMachine(RuleBasedStateMachine):
    """One run, with its own users and segments. It touches nothing else in the stack."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.client = self.world.client
        self.world.runs += 1
        self.prefix = f"st{self.world.runs}-"
        self.ids = [self.world.first_user + n for n in range(USERS)]
        self.world.first_user += USERS
        self.faults = 0

    def slug(self, name: str) -> str:
        return f"{self.prefix}{name}"

    # -- users ------------------------------------------------------------------------------------------------------

    def send(self, topic: str, event: dict[str, object]) -> None:
        name = self.world.settings.kafka_topic_prefix + topic
        # No key: events of one user arrive in any order, even within a topic.
        self.world.producer.send(name, value=json.dumps(event).encode())

    @initialize()
    def first_users(self) -> None:
        self.events([("create", n, 0) for n in range(0, USERS, 2)])

    @rule(
        changes=st.lists(
            st.tuples(
                st.sampled_from(("create", "update", "update", "delete")),
                st.integers(0, USERS - 1),
                st.integers(1, 5),
            ),
            min_size=1,
            max_size=12,
        )
    )
    def events(self, changes: list[tuple[str, int, int]]) -> None:
        for kind, index, version in changes:
            user_id = self.ids[index]
            if kind == "delete":
                self.send("delete-user", {"user_id": user_id})
                self.model.delete_user(user_id)
            elif kind == "create":
                self.send("create-user", {"user_id": user_id, "attributes": attributes_of(user_id, 0)})
                self.model.create_or_update(user_id, 0)
            else:
                attributes = attributes_of(user_id, version)
                self.send("update-user", {"user_id": user_id, "version": version, "attributes": attributes})
                self.model.create_or_update(user_id, version)

        self.world.await_events()

    # -- segments ---------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), twice=st.booleans())
    def create(self, name: str, twice: bool) -> None:
        slug = self.slug(name)
        segment = segments_pb2.Segment(slug=slug, display_name=name)
        request = segments_pb2.CreateSegmentRequest(segment=segment, request_id=str(uuid4()))

        if slug in self.model.segments:
            with pytest.raises(grpc.RpcError) as caught:
                self.client.segments.CreateSegment(request, timeout=CALL_S)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
            return

        made = self.client.segments.CreateSegment(request, timeout=CALL_S)
        if twice:
            assert self.client.segments.CreateSegment(request, timeout=CALL_S).uid == made.uid
        self.model.segments[slug] = ModelSegment(self.world.salt(made.uid))

    @precondition(lambda self: self.model.segments)
    @rule(
        data=st.data(),
        percent=st.sampled_from((0.0, 12.345, 50.0, 100.0)),
        condition=st.sampled_from(CONDITIONS),
        frozen=st.booleans(),
        twice=st.booleans(),
    )
    def roll_out(self, data: st.DataObject, percent: float, condition: Condition, frozen: bool, twice: bool) -> None:
        slug = data.draw(st.sampled_from(sorted(self.model.segments)))
        policy = Rule.FROZEN if frozen else Rule.LIVE
        wanted = Rule(percent=percent, condition=condition.text, policy=policy)

        preview = self.client.segments.PreviewRollOut(
            segments_pb2.PreviewRollOutRequest(slug=slug, rule=wanted), timeout=CALL_S
        )

        request = segments_pb2.RollOutSegmentRequest(slug=slug, rule=wanted, request_id=str(uuid4()))
        operation = self.client.segments.RollOutSegment(request, timeout=CALL_S)
        if twice:
            assert self.client.segments.RollOutSegment(request, timeout=CALL_S).name == operation.name

        # After a killed worker the deadline may pass: then no shard applied the rollout; it may be requested again.
        if operation.HasField("error"):
            assert self.faults
            return

        response = segments_pb2.RollOutSegmentResponse()
        assert operation.done
        assert operation.response.Unpack(response)
        counted = ("matched_count", "added_count", "removed_count", "member_count")
        assert [getattr(response, name) for name in counted] == [getattr(preview, name) for name in counted]
        self.model.roll_out(slug, round(percent * 1000), condition, frozen=frozen)

    @precondition(lambda self: self.model.segments)
    @rule(data=st.data(), text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
    def edit(self, data: st.DataObject, text: str) -> None:
        slug = data.draw(st.sampled_from(sorted(self.model.segments)))
        before = self.client.segments.GetSegment(segments_pb2.GetSegmentRequest(slug=slug), timeout=CALL_S)
        changed = segments_pb2.Segment(slug=slug, description=text, etag=before.etag)
        request = segments_pb2.UpdateSegmentRequest(segment=changed, update_mask={"paths": ["description"]})
        after = self.client.segments.UpdateSegment(request, timeout=CALL_S)
        assert (after.description, after.rule, after.uid) == (text, before.rule, before.uid)

    @precondition(lambda self: self.model.segments)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        slug = data.draw(st.sampled_from(sorted(self.model.segments)))
        operation = self.client.segments.DeleteSegment(segments_pb2.DeleteSegmentRequest(slug=slug), timeout=CALL_S)
        if operation.HasField("error"):
            assert self.faults
            return
        self.model.delete_segment(slug)

    # -- overrides --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.segments)
    @rule(data=st.data(), index=st.integers(0, USERS - 1))
    def override(self, data: st.DataObject, index: int) -> None:
        user_id = self.ids[index]
        wanted: dict[str, bool | None] = data.draw(
            st.dictionaries(
                st.sampled_from(sorted(self.model.segments)), st.sampled_from((True, False, None)), min_size=1
            )
        )
        effects = {True: Override.INCLUDE, False: Override.EXCLUDE}
        request = membership_pb2.ModifyUserOverridesRequest(
            user_id=user_id,
            set=[Override(slug=slug, effect=effects[into]) for slug, into in wanted.items() if into is not None],
            clear=[slug for slug, into in wanted.items() if into is None],
        )

        if user_id not in self.model.users:
            with pytest.raises(grpc.RpcError) as caught:
                self.client.memberships.ModifyUserOverrides(request, timeout=CALL_S)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            return

        response = self.client.memberships.ModifyUserOverrides(request, timeout=CALL_S)
        overrides = self.model.users[user_id].overrides
        for slug, into in wanted.items():
            overrides.pop(slug, None)
            if into is not None:
                overrides[slug] = into

        mine = [slug for slug in response.user_segments.slugs if slug.startswith(self.prefix)]
        assert mine == self.model.slugs_of(user_id)
        assert {own.slug: own.effect == Override.INCLUDE for own in response.overrides} == overrides

    # -- faults -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.faults < 2)
    @rule(fault=st.sampled_from(("flush", "cache", "broker", "postgres", *PROCESSES)))
    def fault(self, fault: str) -> None:
        self.faults += 1
        stack = self.world.stack

        if fault == "flush":
            redis.Redis.from_url(stack.settings.cache_url).flushall()
        elif fault in ("cache", "broker"):
            redis_of(stack, fault).kill()
            redis_of(stack, fault).start()
        elif fault == "postgres":
            server = PostgresServer(stack.home / "postgres", mark=stack.home)
            server.kill()
            server.start()
            eventually(self._listing_works)
        else:
            main = self._pid_of(fault)
            if main is not None:  # None: it is restarting already
                os.killpg(os.getpgid(main), signal.SIGKILL)
            if fault == "serve":
                eventually(lambda: self._pid_of(fault) not in (main, None), within_s=60)
                eventually(self._listing_works, within_s=60)

    def _pid_of(self, process: str) -> int | None:
        [pid] = [part.pid for part in self.world.stack.status() if part.name == process]
        return pid

    def _listing_works(self) -> bool:
        with contextlib.suppress(grpc.RpcError):
            self.client.list_slugs()
            self.client.user_segments(self.ids[0])
            return True
        return self._user_is_missing()

    def _user_is_missing(self) -> bool:
        try:
            self.client.user_segments(self.ids[0])
        except grpc.RpcError as error:
            return isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.NOT_FOUND
        return True

    # -- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def every_list_is_the_models(self) -> None:
        # Other tests of this stack leave segments behind, which take in new users too.
        found = {
            user_id: None if slugs is None else [slug for slug in slugs if slug.startswith(self.prefix)]
            for user_id, slugs in self.client.many_user_segments(self.ids)
        }
        assert found == {user_id: self.model.slugs_of(user_id) for user_id in self.ids}

    def teardown(self) -> None:
        own = set(self.ids)
        for slug in sorted(self.model.segments):
            exported = list(self.client.export(slug))
            members = {user_id for user_id in self.model.users if self.model.member(user_id, slug)}
            assert own.intersection(exported) == members
            assert len(exported) == self.client.statistics(slug).member_count

        checking = Check(self.world.settings)
        try:
            report = checking.checker.run()
        finally:
            checking.close()
        assert not report.differences, report.differences

        for slug in sorted(self.model.segments):
            # After a fault an operation may be aborted; the next one must not be.
            eventually(lambda slug=slug: self._deleted(slug), within_s=60)  # type: ignore[misc]

    def _deleted(self, slug: str) -> bool:
        request = segments_pb2.DeleteSegmentRequest(slug=slug)
        return not self.client.segments.DeleteSegment(request, timeout=CALL_S).HasField("error")


@pytest.fixture
def machine(stack: LocalStack) -> Iterator[Callable[[], ServiceMachine]]:
    world = World(stack)
    made = type("ServiceMachineOnStack", (ServiceMachine,), {"world": world})
    yield made
    world.close()


QUICK = settings(
    max_examples=6,
    stateful_step_count=12,
    deadline=None,
    # A failure is shown as it was found: shrinking it would take minutes, because the service is real.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def test_the_service_is_its_model(machine: Callable[[], ServiceMachine]) -> None:
    run_state_machine_as_test(machine, settings=QUICK)  # type: ignore[no-untyped-call]


@pytest.mark.long
def test_the_service_is_its_model_for_long(machine: Callable[[], ServiceMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(QUICK, max_examples=100, stateful_step_count=40))  # type: ignore[no-untyped-call]
