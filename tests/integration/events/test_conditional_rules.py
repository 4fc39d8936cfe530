"""Events under rules with conditions: a shard's members are those that each rule admits, found in few statements."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from segsvc.conditions import parse_condition
from segsvc.domain.bucketing import bucket
from segsvc.domain.events import CreateUser, DeleteUser, UpdateUser, UserEvent
from segsvc.domain.user import AttributeValue
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases
from tests.integration.events.conftest import Shards
from tests.integration.events.shard_view import view
from tests.service_model import CONDITIONS, attributes_of

TEXTS = [condition.text for condition in CONDITIONS]


def add_segments(shard: Shards, count: int) -> None:
    """Live rules with each condition in turn, at different percentages; every seventh is FROZEN and admits no user."""
    for number in range(1, count + 1):
        frozen = number % 7 == 0
        shard.add_segment(
            number,
            1000 * (number * 37 % 101),
            condition=TEXTS[number % len(TEXTS)],
            policy=2 if frozen else 1,
            frozen_slot=-1 if frozen else None,
        )


def expected(databases: Databases, attributes: dict[int, dict[str, AttributeValue]]) -> dict[int, set[int]]:
    """Members of every segment, computed with the CEL runtime and the published hash."""
    with databases.shard_tx(0) as connection:
        segments = connection.execute(sa.select(tables.shard_segments)).all()

    holding = {
        text: {user for user, own in attributes.items() if not text or parse_condition(text).holds(own)}
        for text in TEXTS
    }

    return {
        segment.id: set()
        if segment.rule_policy == 2
        else {
            user
            for user in holding[segment.rule_condition]
            if bucket(user, tables.salt_from_db(segment.salt)) < segment.rule_threshold
        }
        for segment in segments
    }


def test_members_follow_every_event(one_shard: Shards) -> None:
    add_segments(one_shard, 60)
    draw = random.Random(7)
    versions: dict[int, int] = {}
    gone: set[int] = set()

    for _ in range(6):
        events: list[UserEvent] = []
        for user in draw.sample(range(1, 1500), 700):
            choice = draw.random()
            if choice < 0.1:
                events.append(DeleteUser(user))
                gone.add(user)
                versions.pop(user, None)
                continue
            version = 0 if choice < 0.4 else draw.randint(1, 6)
            text = json.dumps(attributes_of(user, version))
            events.append(UpdateUser(user, version, text) if version else CreateUser(user, text))
            if user not in gone:
                versions[user] = max(version, versions.get(user, 0))

        one_shard.ingestion.apply_batch(0, events)

        shard = view(one_shard.databases, 0)
        assert shard.users.keys() == versions.keys()
        now = {user: attributes_of(user, version) for user, version in versions.items()}
        assert shard.members == expected(one_shard.databases, now)  # type: ignore[arg-type]

    assert all(shard.members[number] for number in (36, 37, 40, 41)), "the rules let somebody in"


@contextmanager
def counted(databases: Databases) -> Iterator[list[str]]:
    """The statements that the shard receives inside this context."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    engine = databases.shards[0]
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


@pytest.mark.parametrize("kind", ["create", "update"])
def test_the_number_of_statements_does_not_grow_with_the_segments(one_shard: Shards, kind: str) -> None:
    def batch(first: int, version: int) -> Sequence[UserEvent]:
        users = range(first, first + 500)
        if version == 0:
            return [CreateUser(user, json.dumps(attributes_of(user, 0))) for user in users]
        return [UpdateUser(user, version, json.dumps(attributes_of(user, version))) for user in users]

    numbers: list[int] = []
    for segments in (5, 400):
        one_shard.reset()
        add_segments(one_shard, segments)
        if kind == "update":
            one_shard.ingestion.apply_batch(0, batch(1, 0))

        with counted(one_shard.databases) as sent:
            one_shard.ingestion.apply_batch(0, batch(1, 0 if kind == "create" else 1))

        numbers.append(len(sent))

    assert numbers[1] <= numbers[0] + 1, numbers
    assert numbers[1] < 20


def test_many_different_conditions_take_a_handful_of_statements(one_shard: Shards) -> None:
    for number in range(1, 301):
        one_shard.add_segment(number, 50_000, condition=f'user.age >= {number} && user.country != "C{number}"')

    users = range(1, 801)
    with counted(one_shard.databases) as sent:
        one_shard.ingestion.apply_batch(0, [CreateUser(n, json.dumps({"age": n, "country": "DE"})) for n in users])

    assert len(sent) < 30

    members = view(one_shard.databases, 0).members
    for number in (1, 150, 300):
        with one_shard.databases.shard_tx(0) as connection:
            salt = connection.execute(
                sa.select(tables.shard_segments.c.salt).where(tables.shard_segments.c.id == number)
            ).scalar_one()
        assert members[number] == {
            user for user in users if user >= number and bucket(user, tables.salt_from_db(salt)) < 50_000
        }
