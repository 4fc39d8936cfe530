"""SQL gives the same result as CEL's runtime, for every condition and user."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, assume, given, settings
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, psycopg2

from segsvc.conditions import Condition, parse_condition, tree
from segsvc.domain.errors import ServiceError
from segsvc.local.postgres import PostgresServer
from segsvc.postgres.conditions.columns import clauses_over_columns
from segsvc.postgres.conditions.sql import condition_clause
from tests.conditions import NESTED, deepest, nodes, stored, times, users, versions

COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    "phases": (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
}
QUICK = settings(max_examples=60, **COMMON)
LONG = settings(max_examples=4000, database=None, **COMMON)

# Conditions that a simple translation gets wrong.
KNOWN = [
    "user.a == 9007199254740993",
    "user.a < 9007199254740993",
    "user.a <= 9223372036854775807",
    "user.n in [9007199254740993, 1.0, 'x', true]",
    "user.a == user.n",
    "user.a < user.b",
    "user.a == 1e400 || user.a < 1e400",
    "user.flag || user.a == 1",
    "!user.flag",
    "user.flag && user.a == 1",
    "(user.a == 1) == user.flag",
    "user.a in user.tags",
    "user.tags == ['a', user.b]",
    "[user.a, 1] == [1, 1.0]",
    "'a' in ['a', user.b]",
    "size(user.tags) >= 2 && 'a' in user.tags",
    "size(user.a) == 1",
    "user.a.contains('%') || user.a.startsWith('_') || user.a.endsWith('\\\\')",
    "user.a > '\\uffff'",
    "user.a in [] || has(user.b)",
    "user.a in ['a', 'b'] || 'c' == user.b",
    "user.a != 'a' && !(user.b in ['a', 1])",
    "user.a < 'b' || 1 < user.n || user.n >= 0.5",
    "user.a.startsWith(user.b) || 'a' in user.tags || ['a'] in user.tags || 1 in user.tags",
    "user.flag == true || user.a == ['a']",
    "user.a == 'RU' || user.b != 'ab'",
    "user.a == '1' || user.a == 'true' || user.a == '{}' || user.a == '[]' || user.a == ''",
    "user.a in ['RU', '', 'null']",
    "!(user.a in ['RU', 'ab'])",
    "user.a in ['RU', '1']",
    "!(user.a >= -2) && user.n < 1e-7",
    "user.a > 5e-324 || 18 <= user.n",
    f"[user.a, {', '.join(['1'] * 250)}] == user.tags || size([user.a, {', '.join(['1'] * 250)}]) == 251",
    "((user.a == user.b) == user.flag) != (user.n == 1)",
    "(user.a == 1) in [user.flag, 9007199254740993, 1e400, true]",
    "!((user.a == user.n) in [9007199254740993, user.b])",
    "[user.a] in [[9007199254740993], ['x']] || [user.n] in [[9007199254740992.0]]",
    "[user.a, user.a == user.b] in [[1, true], [user.n, user.flag]]",
    "'a' in user && !('b' in user)",
    "user.a < 'a\\000b' || user.a >= '\\000'",
    "user.a in ['\\000', 'RU\\000'] || 'a\\000b\\000'.contains(user.a) || user.b == '\\000'",
    "'ab\\000RU'.endsWith(user.a) || 'ab\\000RU'.startsWith(user.b) || user.tags == ['\\000']",
    "!user.a.contains('\\000') && user.b != 'x\\000'",
    "user.a.lowerAscii() == 'ru' || user.b.lowerAscii() in ['ab', 'É'] || user.a.lowerAscii() == user.b.lowerAscii()",
    "user.a.lowerAscii() < 'b' || size(user.a.lowerAscii()) == 2 || user.a.lowerAscii() in user.tags",
    "timestamp(user.a) < timestamp('2024-02-29T12:00:00+05:30') || timestamp(user.b) >= timestamp(user.a)",
    "timestamp(user.a) in [timestamp('2024-01-01T00:00:00Z'), user.b] || [timestamp(user.a)] == [timestamp(user.b)]",
    "timestamp(user.a) == user.a || !(timestamp(user.a) == user.n) || timestamp(user.a) in user.tags",
    "timestamp(user.n) > timestamp('1970-01-01T00:00:18Z') || timestamp('nonsense') == timestamp(user.a)",
    "(timestamp(user.a) < timestamp(user.b)) == user.flag || (timestamp(user.a) == timestamp(user.b)) in [user.n]",
    "semver(user.a).isLessThan(semver('1.10.0')) || semver(user.b).isGreaterThan(semver('1.0.0-rc.1'))",
    "semver(user.a).compareTo(semver(user.b)) in [user.n, 0] || semver(user.a).compareTo(semver('x')) == 0",
    "isSemver(user.a) && !isSemver(user.b.lowerAscii())",
    "semver('1.0.0').isLessThan(semver('1.0.0-a')) || semver('1.0.0+a').compareTo(semver('1.0.0+b')) == user.n",
]


@pytest.fixture(scope="module")
def connection(pg_server: PostgresServer) -> Iterator[sa.Connection]:
    pg_server.create_database("conditions")
    engine = sa.create_engine(pg_server.dsn("conditions"), isolation_level="AUTOCOMMIT")
    with engine.connect() as opened:
        yield opened
    engine.dispose()


def users_of(attributes: sa.BindParameter[Any]) -> sa.TableValuedAlias:
    """The users that are asked about, as rows."""
    rows = sa.func.unnest(attributes.cast(ARRAY(JSONB))).table_valued(
        sa.column("attributes", JSONB), with_ordinality="n"
    )
    return rows.render_derived(name="u")


ATTRIBUTES = sa.bindparam("attributes", type_=ARRAY(sa.Text))


def by_sql(conditions: Sequence[Condition]) -> sa.Select[Any]:
    """For each user, the result of each condition."""
    rows = users_of(ATTRIBUTES)
    column = sa.column("attributes", JSONB)
    query = sa.select(*(condition_clause(each, column).label(f"c{n}") for n, each in enumerate(conditions)))
    return query.select_from(rows).order_by(sa.column("n"))


def by_columns(conditions: Sequence[Condition]) -> sa.Select[Any]:
    """The same results, by the query of batches of events."""
    rows = users_of(ATTRIBUTES)
    found, clauses = clauses_over_columns(conditions, rows, [rows.c.n], sa.true())
    query = sa.select(*(each.label(f"c{n}") for n, each in enumerate(clauses)))
    return query.select_from(found).order_by(found.c.n)


class Question:
    """Conditions, and the statements that compute them, which are made once: that takes longer than to run them."""

    def __init__(self, conditions: Sequence[Condition]) -> None:
        self.conditions = conditions
        self._statements = {
            asked.__name__: asked(conditions).compile(dialect=psycopg2.dialect()) for asked in (by_sql, by_columns)
        }

    def answers(self, connection: sa.Connection, attributes: Sequence[str]) -> dict[str, list[list[bool]]]:
        """By statement, for each user, the result of each condition."""
        return {
            name: [list(row) for row in connection.execute(statement, {"attributes": list(attributes)})]
            for name, statement in self._statements.items()
        }


@cache
def known() -> Question:
    return Question([parse_condition(text) for text in KNOWN])


@cache
def of_times() -> Question:
    return Question(
        [
            parse_condition(f"timestamp(user.a) {order} timestamp({other})")
            for order in ("<", "==")
            for other in ("user.a", "user.b", "'2024-02-29T00:00:00.25+05:30'", "'0001-01-01T00:00:00Z'")
        ]
    )


@cache
def of_versions() -> Question:
    others = ("user.a", "user.b", "'1.0.0'", "'1.10.0-rc.1+build'", "'2.0.0-alpha.beta'")
    tests = [f"semver(user.a).{test}(semver({other}))" for test in ("isLessThan", "isGreaterThan") for other in others]
    orders = [f"semver(user.a).compareTo(semver({other})) == {order}" for order in (-1, 0) for other in others]
    return Question([parse_condition(text) for text in ("isSemver(user.a)", *tests, *orders)])


@cache
def deep() -> Question:
    """Conditions as deep as CEL accepts them."""
    return Question([parse_condition(deepest(wrap, "user.a < user.n")) for wrap in NESTED.values()])


def agree(connection: sa.Connection, question: Question, found: Sequence[dict[str, Any]]) -> int:
    """Fail unless SQL and the runtime agree. Returns the number of compared pairs."""
    attributes = [stored(user) for user in found]
    by_runtime = [[each.holds(json.loads(text)) for each in question.conditions] for text in attributes]

    for asked, by_statement in question.answers(connection, attributes).items():
        for text, answers, expected in zip(attributes, by_statement, by_runtime, strict=True):
            assert answers == expected, (asked, [each.text for each in question.conditions], text)

    return len(question.conditions) * len(found)


def readable(candidates: Sequence[tree.Node]) -> list[Condition]:
    """The candidates that CEL's checker accepts."""
    made = []
    for node in candidates:
        try:
            made.append(parse_condition(tree.render(node)))
        except ServiceError:
            continue  # its types do not fit: 1 < "a"
    return made


times_or_seconds = st.one_of(
    times, times, st.integers(-62_135_596_805, -62_135_596_795), st.integers(253_402_300_795, 253_402_300_805)
)
batches = st.tuples(st.lists(nodes, min_size=4, max_size=8), st.lists(users, min_size=16, max_size=32))


@QUICK
@given(batch=batches)
def test_sql_agrees_with_the_runtime(
    connection: sa.Connection, batch: tuple[list[tree.Node], list[dict[str, Any]]]
) -> None:
    conditions = readable(batch[0])
    assume(conditions)
    agree(connection, Question(conditions), batch[1])


@QUICK
@given(found=st.lists(users, min_size=40, max_size=60))
def test_sql_agrees_with_the_runtime_where_it_is_known_to_be_hard(
    connection: sa.Connection, found: list[dict[str, Any]]
) -> None:
    agree(connection, known(), found)


@settings(QUICK, max_examples=20)
@given(found=st.lists(st.fixed_dictionaries({"a": times_or_seconds, "b": times}), min_size=40, max_size=60))
def test_times(connection: sa.Connection, found: list[dict[str, Any]]) -> None:
    agree(connection, of_times(), found)


@settings(QUICK, max_examples=20)
@given(found=st.lists(st.fixed_dictionaries({"a": versions, "b": versions}), min_size=40, max_size=60))
def test_versions(connection: sa.Connection, found: list[dict[str, Any]]) -> None:
    agree(connection, of_versions(), found)


@settings(QUICK, max_examples=2)
@given(found=st.lists(users, min_size=80, max_size=100))
def test_sql_agrees_with_the_runtime_however_deep(connection: sa.Connection, found: list[dict[str, Any]]) -> None:
    agree(connection, deep(), found)


def test_numbers_beyond_those_that_doubles_count_one_by_one(connection: sa.Connection) -> None:
    numbers = [2**53 - 1, 2**53, 2**53 + 1, 2.0**53, 2.0**53 + 2, 2**63 - 1, 2.0**63, -(2**63), -(2.0**63), 1, 1.0]
    forms = ("user.a == {}", "user.a < {}", "user.a >= {}", "user.a in [{}, 'x']", "[user.a] == [{}]",
             "[user.a] in [[{}], []]", "[[user.a]] in [['x'], [[{}]]]", "[user.a, 1] in [[{}, user.b]]")  # fmt: skip
    conditions = [parse_condition(form.format(number)) for form in forms for number in numbers]
    agree(connection, Question(conditions), [{"a": one, "b": 1.0} for one in numbers])


@pytest.mark.long
def test_a_million_pairs(connection: sa.Connection, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = 0
    wanted = 1_000_000

    @LONG
    @given(batch=batches, more=st.lists(users, min_size=60, max_size=80))
    def compare(batch: tuple[list[tree.Node], list[dict[str, Any]]], more: list[dict[str, Any]]) -> None:
        nonlocal pairs
        conditions = readable(batch[0])
        assume(conditions)
        pairs += agree(connection, Question(conditions), [*batch[1], *more])

    while pairs < wanted:
        compare()
        with capsys.disabled():
            print(f"\n{pairs:,} pairs of conditions and users agree")
    assert pairs >= wanted
