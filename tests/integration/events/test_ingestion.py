"""Batches of events on a real shard: the state that they leave, in any order and any number of times."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segsvc.domain.errors import LockTimeout, Reason, ServiceError
from segsvc.domain.events import CreateUser, DeleteUser, UpdateUser, UserEvent
from segsvc.failpoints import NoFailpoints
from segsvc.local.processes import wait_until
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services.ingestion import BatchReport, Ingestion
from tests.eventually import quick
from tests.integration.events.conftest import MakeShards, Shards
from tests.integration.events.shard_view import view


def created(user_ids: range | list[int]) -> list[UserEvent]:
    return [CreateUser(user_id, f'{{"n":{user_id}}}') for user_id in user_ids]


def test_new_users_get_dense_slots_bits_and_counters(one_shard: Shards) -> None:
    one_shard.add_segment(1, 30_000)
    one_shard.add_segment(2, 100_000)
    one_shard.add_segment(3, 0)
    one_shard.add_segment(4, None)

    for first in (1, 900, 1500):
        report = one_shard.ingestion.apply_batch(0, created(range(first, first + 600)))
        assert report == BatchReport(600, 0)

    shard = view(one_shard.databases, 0)
    assert sorted(user.slot for user in shard.users.values()) == list(range(1800))
    assert shard.members[2] == shard.users.keys()
    assert 400 < len(shard.members[1]) < 680
    assert not shard.members[3]
    assert not shard.members[4]
    assert one_shard.cache.dropped == []


def test_attributes_keep_integers_and_doubles_apart(one_shard: Shards) -> None:
    attributes = (
        '{"i":1,"d":1.0,"e":100.0,"big":9223372036854775807,"small":0.0000001,"s":"ä\\"\\\\","t":["x"],"b":true}'
    )
    one_shard.ingestion.apply_batch(0, [CreateUser(1, attributes)])

    with one_shard.databases.shard_tx(0) as connection:
        doubles = connection.execute(
            sa.text(
                "SELECT key FROM users, jsonb_each(attributes) "
                "WHERE jsonb_typeof(value) = 'number' AND scale(value::numeric) > 0 ORDER BY key"
            )
        ).scalars()
        assert list(doubles) == ["d", "e", "small"]
        text = connection.execute(sa.text("SELECT attributes::text FROM users")).scalar_one()

    assert '"big": 9223372036854775807' in text
    assert '"d": 1.0' in text


def test_a_frozen_rule_keeps_new_users_out(one_shard: Shards) -> None:
    one_shard.add_segment(1, 100_000, policy=2, frozen_slot=-1)
    one_shard.ingestion.apply_batch(0, created(range(1, 100)))
    assert view(one_shard.databases, 0).members[1] == set()


def test_deleting_clears_bits_of_every_segment_overrides_and_directory(one_shard: Shards) -> None:
    one_shard.add_segment(1, 100_000)
    one_shard.add_segment(2, 50_000)
    one_shard.ingestion.apply_batch(0, created(range(1, 3001)))
    with one_shard.databases.shard_tx(0) as connection:
        connection.execute(sa.update(tables.shard_segments).values(rule_policy=2, frozen_slot=2999))
        connection.execute(sa.insert(tables.overrides).values(user_id=7, segment_id=2, effect=1))

    gone = [*range(1, 1025), *range(1500, 3001, 7)]
    report = one_shard.ingestion.apply_batch(0, [DeleteUser(user_id) for user_id in gone])
    assert report == BatchReport(len(gone), 0)

    shard = view(one_shard.databases, 0)
    assert shard.users.keys() == set(range(1, 3001)) - set(gone)
    assert shard.tombstones == dict.fromkeys(gone, 0)
    assert shard.members[1] == shard.users.keys()
    assert one_shard.cache.dropped == [(0, gone)]

    # No new user gets a slot that was given before.
    one_shard.ingestion.apply_batch(0, created([5000]))
    assert view(one_shard.databases, 0).users[5000].slot == 3000


def test_the_cache_hears_of_changes_and_of_repetitions_but_not_of_creations(one_shard: Shards) -> None:
    apply, cache = one_shard.ingestion.apply_batch, one_shard.cache
    cache.down = True

    apply(0, created([1, 2, 3]))
    apply(0, created([1, 2, 3]))
    apply(0, [UpdateUser(4, 5, "{}"), DeleteUser(5)])  # unknown users are never in the cache

    with pytest.raises(ServiceError) as refused:
        apply(0, [UpdateUser(1, 1, '{"a":1}'), *created([6])])
    assert refused.value.reason is Reason.CACHE_UNAVAILABLE

    # The effects are stored already; the repetition adds none, and makes them visible.
    assert view(one_shard.databases, 0).users[1].version == 1
    cache.down = False
    assert apply(0, [UpdateUser(1, 1, '{"a":1}'), *created([6])]) == BatchReport(0, 2)
    assert cache.dropped == [(0, [1])]

    apply(0, [DeleteUser(5)])
    apply(0, [DeleteUser(2), *created([2])])
    assert cache.dropped[1:] == [(0, [5]), (0, [2])]


def test_a_poison_event_is_found_and_takes_no_other_with_it(one_shard: Shards) -> None:
    one_shard.add_segment(1, 100_000)
    with one_shard.databases.shard_tx(0) as connection:
        connection.execute(sa.text("ALTER TABLE users ADD CONSTRAINT poison CHECK (id NOT IN (13, 77, 78))"))

    try:
        events = [*created(range(1, 100)), CreateUser(100, '{"broken'), UpdateUser(5, 1, '{"x":2}')]
        report = one_shard.ingestion.apply_batch(0, events)
    finally:
        with one_shard.databases.shard_tx(0) as connection:
            connection.execute(sa.text("ALTER TABLE users DROP CONSTRAINT poison"))

    refused = "the database refused the event (SQLSTATE {})"
    assert report == BatchReport(
        97,
        0,
        (
            (12, refused.format("23514")),
            (76, refused.format("23514")),
            (77, refused.format("23514")),
            (99, refused.format("22P02")),
        ),
    )
    assert view(one_shard.databases, 0).users.keys() == set(range(1, 100)) - {13, 77, 78}


def test_an_event_for_another_shard_is_refused(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with pytest.raises(ValueError, match="user 4 was sent to shard 1"):
        shards.ingestion.apply_batch(1, created([3, 4]))
    assert not view(shards.databases, 1).users


# -- any events, in any order, any number of times ---------------------------------------------------------------------

_attributes = st.sampled_from(['{"a":1}', '{"a":2}', "{}"])
_ids = st.integers(1, 6)
_events: st.SearchStrategy[UserEvent] = st.one_of(
    st.builds(CreateUser, _ids, _attributes),
    # Two events of one user and version are the same event: the attributes follow from the version.
    st.builds(lambda user_id, version: UpdateUser(user_id, version, f'{{"v":{version}}}'), _ids, st.integers(1, 4)),
    st.builds(DeleteUser, _ids),
)


def expected(events: list[UserEvent]) -> tuple[dict[int, tuple[int, object]], set[int]]:
    """The state after these events, computed from the set alone: version and attributes by user; the deleted users."""
    deleted = {event.user_id for event in events if isinstance(event, DeleteUser)}

    users: dict[int, tuple[int, object]] = {}
    for event in events:
        if event.user_id in deleted or isinstance(event, DeleteUser):
            continue
        version = event.version if isinstance(event, UpdateUser) else 0
        if event.user_id not in users or version > users[event.user_id][0]:
            users[event.user_id] = (version, event.attributes)

    return users, deleted


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(_events, max_size=30), seed=st.randoms(use_true_random=False))
def test_any_delivery_ends_in_the_same_state(one_shard: Shards, events: list[UserEvent], seed: random.Random) -> None:
    one_shard.reset()
    one_shard.add_segment(1, 50_000)
    one_shard.add_segment(2, 100_000)

    # Creations of one user are one event: the first that is delivered fixes the attributes.
    first: dict[int, UserEvent] = {}
    events = [first.setdefault(event.user_id, event) if isinstance(event, CreateUser) else event for event in events]
    deliveries = events * 2
    seed.shuffle(deliveries)

    while deliveries:
        size = seed.randint(1, 12)
        batch, deliveries = deliveries[:size], deliveries[size:]
        before = view(one_shard.databases, 0).users
        one_shard.cache.dropped.clear()

        report = one_shard.ingestion.apply_batch(0, batch)
        assert report.applied + report.ignored == len(batch)
        after = view(one_shard.databases, 0).users
        # Each user who could be in the cache and has changed was dropped from the cache.
        assert {user_id for user_id in before if after.get(user_id) != before[user_id]} <= one_shard.cache.dropped_ids()

    shard = view(one_shard.databases, 0)
    users, deleted = expected(events)
    assert {
        user_id: (user.version, str(user.attributes).replace("'", '"').replace(" ", ""))
        for user_id, user in shard.users.items()
    } == users
    assert shard.tombstones.keys() == deleted


# -- side by side ------------------------------------------------------------------------------------------------------


def test_batches_of_one_shard_side_by_side(one_shard: Shards) -> None:
    one_shard.add_segment(1, 30_000)
    batches = [created(range(first, first + 300)) for first in range(1, 3001, 150)]  # each user in two batches
    batches += [[DeleteUser(user_id) for user_id in range(first, first + 40)] for first in range(1, 3000, 500)]
    random.Random(7).shuffle(batches)

    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda batch: one_shard.ingestion.apply_batch(0, batch), batches))

    shard = view(one_shard.databases, 0)
    assert len(shard.users) + len(shard.tombstones) == 3150
    assert sum(report.applied + report.ignored for report in reports) == sum(map(len, batches))


def test_a_batch_that_waited_for_an_operation_sees_its_rule(one_shard: Shards) -> None:
    """The batch locks in a statement of its own: if one statement locked and read, the batch would see the old rule."""
    with one_shard.databases.shards[0].connect() as operation, ThreadPoolExecutor(1) as pool:
        operation.execute(sa.select(sa.func.pg_advisory_xact_lock(SHARD_LOCK)))
        batch = pool.submit(one_shard.ingestion.apply_batch, 0, created(range(1, 200)))

        assert wait_until(lambda: _waits_for_lock(one_shard.databases), timeout_s=30)

        operation.execute(
            sa.insert(tables.shard_segments).values(
                id=1, slug="new", salt=5, rule_threshold=100_000, rule_condition="", rule_policy=1
            )
        )

        assert not batch.done()
        operation.commit()
        assert batch.result(timeout=30) == BatchReport(199, 0)

    assert len(view(one_shard.databases, 0).members[1]) == 199


def test_a_lock_timeout_is_transient(one_shard: Shards, make_shards: MakeShards) -> None:
    impatient = Databases(one_shard.settings.model_copy(update={"lock_timeout_s": 0.1}), "test")
    ingestion = Ingestion(PostgresUserStore(impatient), one_shard.cache, NoFailpoints())

    try:
        with one_shard.databases.shard_tx(0) as operation:
            operation.execute(sa.select(sa.func.pg_advisory_xact_lock(SHARD_LOCK)))

            def impatient_batch() -> None:
                with pytest.raises(LockTimeout):
                    ingestion.apply_batch(0, created([1]))

            quick(impatient_batch, within_s=1.5)  # the usual bound is 2 s

        assert ingestion.apply_batch(0, created([1])) == BatchReport(1, 0)
    finally:
        impatient.close()


def test_a_process_killed_between_commit_and_report(one_shard: Shards) -> None:
    class Killed(BaseException):
        pass

    class DiesOnce:
        dead = threading.Event()

        def reach(self, point: str, **where: object) -> None:
            if point == "events-committed-not-reported" and not self.dead.is_set():
                self.dead.set()
                raise Killed

    ingestion = Ingestion(PostgresUserStore(one_shard.databases), one_shard.cache, DiesOnce())
    one_shard.add_segment(1, 100_000)
    one_shard.ingestion.apply_batch(0, created([1, 2]))
    events = [UpdateUser(1, 3, '{"x":1}'), DeleteUser(2), *created([3])]

    with pytest.raises(Killed):
        ingestion.apply_batch(0, events)
    assert one_shard.cache.dropped == []

    before = view(one_shard.databases, 0)
    assert ingestion.apply_batch(0, events) == BatchReport(0, 3)
    assert view(one_shard.databases, 0) == before
    assert one_shard.cache.dropped == [(0, [1, 2])]


def _waits_for_lock(databases: Databases) -> bool:
    with databases.shard_tx(0) as connection:
        return bool(
            connection.execute(
                sa.text("SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)")
            ).scalar_one()
        )
