"""The shards double while users are read and events arrive, and no answer is false at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
import sqlalchemy as sa
from segmentation.v1 import membership_pb2, segments_pb2

from segsvc.bootstrap import Check, OperationParts, double_shards, make_cache, undo_doubling
from segsvc.config import Settings
from segsvc.domain.bucketing import bucket
from segsvc.domain.errors import Reason, ServiceError, broker_unavailable
from segsvc.domain.events import CreateUser, DeleteUser, UpdateUser, UserEvent
from segsvc.domain.operation import Operation
from segsvc.domain.sharding import shard_of
from segsvc.failpoints import NoFailpoints
from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import RedisServer
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.installation import doubling, layout
from segsvc.postgres.installation.closing import MoveRefused
from segsvc.postgres.installation.migrate import StartupError, inspect, migrate, verify
from segsvc.postgres.installation.roles import roles_of
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services.ingestion import Ingestion, OtherShards
from tests.contract.conftest import FrontUnderTest, running_front
from tests.contract.installation import Installation
from tests.eventually import eventually
from tests.local_servers import REPOSITORY

SHARDS = 2
USERS = range(1, 6001)


@dataclass
class Doubling(Installation):
    """An installation whose next shards are there, and empty."""

    next_dsns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [f"{self.name}_{what}" for what in ("catalog", *range(SHARDS))]
        for name in names:
            self.server.create_database(name)
        self.catalog_dsn = self.server.dsn(names[0])
        self.dsns = [self.server.dsn(name) for name in names[1:]]
        for number in range(2 * SHARDS):
            self.server.create_database(f"{self.name}_next{number}")
            self.next_dsns.append(self.server.dsn(f"{self.name}_next{number}"))
        migrate(self.given, roles=True)
        redis.Redis.from_url(self.cache.url).flushall()

    @property
    def given(self) -> Settings:
        """The settings as processes get them, before and after."""
        return Settings(
            _env_file=None,  # type: ignore[call-arg]
            cluster=self.name,
            catalog_dsn=self.catalog_dsn,
            shard_dsns=tuple(self.dsns),
            shard_dsns_next=tuple(self.next_dsns),
            cache_url=self.cache.url,
        )

    @property
    def settings(self) -> Settings:  # type: ignore[override]
        """With the shards in force."""
        return layout.in_force(self.given)

    def environment(self) -> dict[str, str]:
        return {
            "SEGSVC_CLUSTER": self.name,
            "SEGSVC_CATALOG_DSN": self.catalog_dsn,
            "SEGSVC_SHARD_DSNS": " ".join(self.dsns),
            "SEGSVC_SHARD_DSNS_NEXT": " ".join(self.next_dsns),
            "SEGSVC_CACHE_URL": self.cache.url,
        }

    @contextmanager
    def ingestion(self, settings: Settings | None = None) -> Iterator[Ingestion]:
        settings = settings or self.settings
        databases, cache = Databases(settings, "worker", Pool(2)), make_cache(settings)
        try:
            yield Ingestion(PostgresUserStore(databases), cache, NoFailpoints())
        finally:
            cache.close()
            databases.close()

    def apply(self, events: Sequence[UserEvent]) -> None:
        settings = self.settings
        with self.ingestion(settings) as ingestion:
            for shard in range(settings.shard_count):
                mine = [event for event in events if shard_of(event.user_id, settings.shard_count) == shard]
                assert not ingestion.apply_batch(shard, mine).dead

    def execute(self, dsn: str, statement: str) -> list[tuple[object, ...]]:
        engine = sa.create_engine(dsn, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.execute(sa.text(statement))
            return [tuple(row) for row in result.all()] if result.returns_rows else []

    def operation_states(self) -> list[object]:
        """Of all operations, in their order."""
        return [state for (state,) in self.execute(self.catalog_dsn, "SELECT state FROM operations ORDER BY seq")]

    def assert_whole(self, users: int) -> None:
        """The checker finds nothing, every shard takes writes, and the services' role may make them."""
        assert verify(self.settings) == []
        role = roles_of(self.settings).change
        for dsn in self.settings.shard_dsns:
            assert self.execute(dsn, f"SELECT has_table_privilege('{role}', 'users', 'INSERT')") == [(True,)]
        check = Check(self.settings)
        try:
            report = check.checker.run(lambda *_: None)
        finally:
            check.close()
        assert [str(difference) for difference in report.differences[:5]] == []
        assert report.users == users

    def double(self, *, patience_s: float = 5.0) -> doubling.Doubled:
        return double_shards(self.given, lambda *_: None, patience_s=patience_s)


class NoBroker:
    """A broker that is down."""

    def check(self) -> None:
        raise broker_unavailable()

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        raise broker_unavailable()


@pytest.fixture
def installation(
    request: pytest.FixtureRequest, pg_server: PostgresServer, cache_server: RedisServer
) -> Iterator[Doubling]:
    name = f"double-{zlib.crc32(request.node.name.encode()):08x}"
    made = Doubling(name, pg_server, cache_server)
    yield made
    assert pg_server.psql("SELECT gid FROM pg_prepared_xacts") == ""


def fill(installation: Doubling, front: FrontUnderTest) -> int:
    """Users, some of them gone again, and a segment of each kind. Returns the number of users."""
    attributes = ['{"plan": "pro", "name": "ü"}', '{"plan": "free"}', "{}"]
    installation.apply([CreateUser(user_id, attributes[user_id % 3]) for user_id in USERS])
    for slug, rule in RULES.items():
        front.create(slug)
        roll_out(front, slug, **rule)
    installation.apply([DeleteUser(user_id) for user_id in range(1, 1200, 5)])
    installation.apply([CreateUser(user_id, attributes[user_id % 3]) for user_id in range(6001, 6101)])
    installation.apply([UpdateUser(user_id, 7, '{"plan": "pro"}') for user_id in range(6001, 6031)])
    for user_id in range(3000, 3040):
        override(front, user_id)
    return len(USERS) - len(range(1, 1200, 5)) + 100


RULES: dict[str, dict[str, Any]] = {
    "a-live": {"percent": 30},
    "b-frozen": {"percent": 60, "policy": "FROZEN"},
    "c-pro": {"percent": 100, "condition": 'user.plan == "pro"'},
    "d-empty": {"percent": 0},
}


def roll_out(front: FrontUnderTest, slug: str, **rule: Any) -> None:
    request = segments_pb2.RollOutSegmentRequest(slug=slug, rule=rule)
    operation = front.segments.RollOutSegment(request, timeout=20)
    assert operation.done, operation
    assert not operation.HasField("error"), operation.error


def segments_of(front: FrontUnderTest, user_id: int) -> frozenset[str]:
    answer = front.memberships.GetUserSegments(membership_pb2.GetUserSegmentsRequest(user_id=user_id), timeout=5)
    return frozenset(answer.slugs)


def override(front: FrontUnderTest, user_id: int) -> None:
    wanted = membership_pb2.Override(slug="d-empty", effect=membership_pb2.Override.INCLUDE)
    front.memberships.ModifyUserOverrides(
        membership_pb2.ModifyUserOverridesRequest(user_id=user_id, set=[wanted], request_id=REQUEST_ID.format(user_id)),
        timeout=10,
    )


REQUEST_ID = "00000000-0000-4000-8000-{:012d}"


class Readers:
    """Threads that read users without a pause, half of them past the cache; what they find must stay what it was.

    Attributes:
        failures: refused reads.
        wrong: answers that are not true.
    """

    def __init__(self, installation: Doubling, front: FrontUnderTest, truth: dict[int, frozenset[str]]) -> None:
        self.failures: list[str] = []
        self.wrong: list[str] = []
        self.reads = 0
        self._front = front
        self._truth = truth
        self._cache = redis.Redis.from_url(installation.cache.url)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(number,)) for number in range(2)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._cache.close()

    def await_reads(self, more: int = 200) -> None:
        seen = self.reads
        eventually(lambda: self.reads >= seen + more, 30)

    def _read(self, number: int) -> None:
        ids = list(self._truth)
        at = number
        while not self._stop.is_set():
            at = (at + 7) % len(ids)
            user_id = ids[at]
            if number == 0:
                for key in self._cache.keys(f"*:u:{user_id}"):
                    self._cache.delete(key)
            try:
                found = segments_of(self._front, user_id)
            except grpc.RpcError as error:
                self.failures.append(f"{error.code().name} {error.details()}")
            else:
                if found != self._truth[user_id]:
                    self.wrong.append(f"user {user_id}: {sorted(found)}, not {sorted(self._truth[user_id])}")
            self.reads += 1


class Events:
    """A thread that creates one user after the other, and tries again until each is created, as bridge and workers do.

    Attributes:
        created: users whose creation was acknowledged.
    """

    def __init__(self, installation: Doubling, first: int) -> None:
        self.created: list[int] = []
        self._installation = installation
        self._next = first
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._installation.ingestion() as ingestion:
                count = ingestion._users.shard_count
                try:
                    for _ in range(20):
                        ingestion.apply_batch(shard_of(self._next, count), [CreateUser(self._next, "{}")])
                        self.created.append(self._next)
                        self._next += 1
                except ServiceError:
                    self._stop.wait(0.05)


def command(installation: Doubling, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")}
    ours = {"SEGSVC_ENV_FILE": "/nowhere", "SEGSVC_FAILPOINT_DIR": str(folder), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "segsvc", "shards", "double", *arguments],
        env={**environ, **installation.environment(), **ours},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("kind", ["native", pytest.param("grpcio", marks=pytest.mark.long)])
def test_shards_double_while_users_are_read_and_created(installation: Doubling, tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        front = stack.enter_context(running_front(kind, installation, tmp_path))
        eventually(front.serving)
        users = fill(installation, front)
        truth = {user_id: segments_of(front, user_id) for user_id in range(1200, 6100, 5)}
        assert len(set(truth.values())) > 4

        readers = Readers(installation, front, truth)
        stack.callback(readers.stop)
        events = Events(installation, 100_001)
        stack.callback(events.stop)
        readers.await_reads()

        planned = command(installation, tmp_path, "--dry-run", "--json")
        assert json.loads(planned.stdout)["shards"] == SHARDS, planned.stderr
        done = command(installation, tmp_path, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["shards"] == 2 * SHARDS
        assert result["users"] >= users
        readers.await_reads()

        before = len(events.created)
        eventually(lambda: len(events.created) > before + 20)
        events.stop()
        readers.stop()
        assert readers.wrong == []
        assert readers.failures == []
        for user_id in events.created:
            assert segments_of(front, user_id) >= frozenset()

        # A rollout takes effect on all shards; later users get what the rules say, and stay out of FROZEN ones.
        roll_out(front, "d-empty", percent=50)
        salt = tables.salt_from_db(
            int(
                str(
                    installation.execute(installation.next_dsns[0], "SELECT salt FROM segments WHERE slug = 'd-empty'")[
                        0
                    ][0]
                )
            )
        )
        for user_id in [*range(1200, 1260, 5), *events.created[-20:]]:
            assert ("d-empty" in segments_of(front, user_id)) == (bucket(user_id, salt) < 50_000)
        assert all("b-frozen" not in segments_of(front, user_id) for user_id in events.created)
        override(front, 3000)  # the answer to this request is there still

    installation.assert_whole(users + len(events.created))
    assert installation.settings.shard_count == 2 * SHARDS
    with pytest.raises(MoveRefused, match="has decided on 4 shards"):
        undo_doubling(installation.given)
    for dsn in installation.dsns:
        name = dsn.partition("?")[0].rpartition("/")[2]
        shut = installation.server.psql("SELECT datallowconn FROM pg_database WHERE datname = :'name'", name=name)
        assert shut.strip() == "f"
    # A process that does not know the next shards does not start.
    stale = installation.given.model_copy(update={"shard_dsns_next": ()})
    with pytest.raises(StartupError, match="SEGSVC_SHARD_DSNS names 2"):
        verify(stale)


BEFORE = ["double-filled", "double-paused", "double-closed", "double-not-decided"]
AFTER = ["double-decided", "double-in-force", "double-left", "double-opened"]


def _points(points: Sequence[str], *, usual: Sequence[str]) -> list[Any]:
    """Crash points; those that are not usual are for long runs."""
    return [point if point in usual else pytest.param(point, marks=pytest.mark.long) for point in points]


def small(installation: Doubling) -> int:
    """A few users, some of them gone. Returns their number."""
    installation.apply([CreateUser(user_id, "{}") for user_id in range(1, 301)])
    installation.apply([DeleteUser(user_id) for user_id in range(1, 31)])
    return 270


def killed(installation: Doubling, folder: Path, point: str, *, undo: bool = False) -> None:
    """Let a run, in a process of its own, be killed at a point. Forked: starting Python takes longer than the run."""
    (folder / point).write_text("kill")
    settings = installation.given.model_copy(update={"failpoint_dir": folder})
    pid = os.fork()
    if pid == 0:
        try:
            undo_doubling(settings) if undo else double_shards(settings, lambda *_: None, patience_s=0)
        finally:
            os._exit(0)  # it was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (folder / point).unlink()


@pytest.mark.parametrize("point", _points(BEFORE, usual=["double-not-decided"]))
def test_before_the_decision_it_can_be_undone(installation: Doubling, tmp_path: Path, point: str) -> None:
    users = small(installation)
    killed(installation, tmp_path, point)
    assert installation.settings.shard_count == SHARDS

    assert undo_doubling(installation.given) == (point != "double-filled")
    installation.assert_whole(users)
    installation.apply([CreateUser(1001, "{}"), CreateUser(1002, "{}")])

    # The later run finds the halves as they were then, and brings them up.
    assert installation.double(patience_s=0).users == users + 2
    installation.apply([CreateUser(1003, "{}")])
    installation.assert_whole(users + 3)


@pytest.mark.parametrize("point", _points([*BEFORE, *AFTER], usual=["double-left"]))
def test_it_goes_on_where_it_was_killed(installation: Doubling, tmp_path: Path, point: str) -> None:
    users = small(installation)
    killed(installation, tmp_path, point)
    decided = point in AFTER
    assert installation.settings.shard_count == (2 if decided else 1) * SHARDS

    if decided:
        with pytest.raises(MoveRefused, match="has decided on 4 shards"):
            undo_doubling(installation.given)
    if point != "double-filled":
        findings = [str(finding) for finding in inspect(installation.settings)]
        assert "the shards are being doubled" in "".join(findings)

    installation.double(patience_s=0)
    installation.apply([CreateUser(1001, "{}")])
    installation.assert_whole(users + 1)

    # Once it is over, another run changes nothing.
    installation.double(patience_s=0)
    installation.assert_whole(users + 1)


def test_an_undo_that_is_killed_is_run_again(installation: Doubling, tmp_path: Path) -> None:
    users = small(installation)
    killed(installation, tmp_path, "double-closed")
    killed(installation, tmp_path, "double-note-cleared", undo=True)

    assert undo_doubling(installation.given)
    installation.assert_whole(users)


def test_a_run_that_wakes_after_an_undo_decides_nothing(installation: Doubling, tmp_path: Path) -> None:
    """It stood still before its decision, and its servers have ended its sessions: the undo has its locks then."""
    users = small(installation)
    (tmp_path / "double-not-decided").write_text("hold")

    with ThreadPoolExecutor(1) as thread, ExitStack() as stack:
        stack.callback((tmp_path / "double-not-decided").unlink, missing_ok=True)
        late = thread.submit(command, installation, tmp_path)
        eventually((tmp_path / "double-not-decided.fired").exists, 60)
        with pytest.raises(MoveRefused, match="another command moves a shard"):
            undo_doubling(installation.given)

        for dsn in (installation.catalog_dsn, *installation.dsns):
            installation.execute(
                installation.catalog_dsn,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'segsvc-setup' "
                f"AND datname = '{sa.make_url(dsn).database}'",
            )
        assert undo_doubling(installation.given)
        installation.apply([CreateUser(1001, "{}")])
        (tmp_path / "double-not-decided").unlink()
        assert late.result(timeout=60).returncode == 1

    assert installation.settings.shard_count == SHARDS
    installation.apply([CreateUser(1002, "{}")])
    installation.assert_whole(users + 2)


@pytest.mark.long
def test_no_operation_starts_while_shards_are_switched(installation: Doubling, tmp_path: Path) -> None:
    small(installation)
    (tmp_path / "double-paused").write_text("hold")
    with ExitStack() as stack:
        front = stack.enter_context(running_front("native", installation, tmp_path))
        eventually(front.serving)
        front.create("early")
        thread = stack.enter_context(ThreadPoolExecutor(2))
        stack.callback((tmp_path / "double-paused").unlink, missing_ok=True)
        done = thread.submit(command, installation, tmp_path)
        eventually((tmp_path / "double-paused.fired").exists, 60)

        late = segments_pb2.CreateSegmentRequest(segment=segments_pb2.Segment(slug="late"))
        waiting = thread.submit(front.segments.CreateSegment, late, timeout=100)
        eventually(lambda: installation.operation_states() == ["DONE", "QUEUED"])
        roll = segments_pb2.RollOutSegmentRequest(slug="early", rule=segments_pb2.RollOutRule(percent=40))
        assert not front.segments.RollOutSegment(roll, timeout=2).done
        assert installation.operation_states() == ["DONE", "QUEUED", "QUEUED"]

        (tmp_path / "double-paused").unlink()
        assert done.result(timeout=100).returncode == 0
        assert waiting.result(timeout=100).slug == "late"
        eventually(lambda: installation.operation_states() == ["DONE"] * 3, 60)
    installation.assert_whole(270)


def test_an_old_process_neither_writes_nor_reads_nor_starts(installation: Doubling) -> None:
    small(installation)
    given = installation.given
    stale = OperationParts(given, Databases(given, "worker", Pool(2)), make_cache(given), NoBroker())
    installation.double(patience_s=0)

    with installation.ingestion(given) as ingestion, pytest.raises(ServiceError) as refused:
        ingestion.apply_batch(1, [CreateUser(1001, "{}")])
    assert refused.value.reason is Reason.SHARD_UNAVAILABLE

    # A new worker refuses what an old bridge has grouped; the bridge sends it again, grouped as it is now.
    with installation.ingestion() as ingestion, pytest.raises(OtherShards):
        ingestion.apply_batch(1, [CreateUser(1001, "{}"), CreateUser(1003, "{}")])

    installation.execute(
        installation.catalog_dsn,
        "INSERT INTO operations (id, kind, slug, segment_id, plan, state) SELECT gen_random_uuid(), 1, 'x', 1, "
        "'{}', 'QUEUED'",
    )
    assert stale.ledger.start_next() is None
    assert installation.operation_states() == ["QUEUED"]


def test_what_cannot_be_doubled_is_refused(installation: Doubling, tmp_path: Path) -> None:
    small(installation)

    def refusal() -> str:
        with pytest.raises(MoveRefused) as refused:
            doubling.plan(installation.given)
        return str(refused.value)

    last = installation.next_dsns[-1]
    installation.next_dsns[-1] = installation.next_dsns[0]
    assert "database 3 of SEGSVC_SHARD_DSNS_NEXT: it is also database 0" in refusal()
    installation.next_dsns[-1] = installation.dsns[0]
    assert "database 3 of SEGSVC_SHARD_DSNS_NEXT: it is also shard 0" in refusal()
    installation.next_dsns[-1] = installation.catalog_dsn
    assert "database 3 of SEGSVC_SHARD_DSNS_NEXT: " in refusal()
    installation.next_dsns.pop()
    with pytest.raises(ValueError, match="SEGSVC_SHARD_DSNS_NEXT must name twice as many"):
        installation.given.shard_count  # noqa: B018
    installation.next_dsns.append(last)
    assert doubling.plan(installation.given).users == [135, 135]

    # Each half knows which one it is.
    killed(installation, tmp_path, "double-filled")
    installation.next_dsns.reverse()
    assert "it is shard" in refusal()
    installation.next_dsns.reverse()

    # And no process starts on a half before the decision.
    early = installation.given.model_copy(update={"shard_dsns": tuple(installation.next_dsns), "shard_dsns_next": ()})
    with pytest.raises(StartupError, match="here are old data"):
        verify(early)
    assert not undo_doubling(installation.given)
