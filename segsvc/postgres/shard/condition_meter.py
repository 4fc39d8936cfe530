"""What a condition costs a user, measured on a shard's own server. Implements ``services.rule_costs.Meter``.

The statement runs over users of the shard, and over made-up users who have all of the condition's attributes, as large
as they may be, of each type in turn: what a condition costs today says little while no user has its attributes. The
group of users that costs most counts. Nothing is decided early (``conditions.steps``).

A busy machine makes a run longer, never shorter, so the shortest of several runs counts; and a run is shorter than the
time slice that a scheduler gives to a process. The time that a statement takes for no user is subtracted, and divided
among the users of a large batch.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, psycopg2

from segsvc.conditions import parse_condition, tree
from segsvc.conditions.steps import steps
from segsvc.conditions.tree import Node, attributes_of
from segsvc.domain.condition_cost import ConditionCost
from segsvc.domain.event_limits import ATTRIBUTES_BYTES_MAX, ATTRIBUTES_MAX, LIST_MAX, STRING_BYTES_MAX
from segsvc.postgres.conditions.attributes import InObject
from segsvc.postgres.conditions.columns import in_columns
from segsvc.postgres.conditions.sql import Compiler
from segsvc.postgres.conditions.values import FENCE, Sql, whole
from segsvc.postgres.engine import Databases

_DIALECT: Final = psycopg2.dialect(paramstyle="format")  # type: ignore[no-untyped-call]

SAMPLE: Final = 128
"""Users of the shard in the sample."""
BATCH: Final = 5000
"""Users among whom the fixed cost of a statement is divided: as many as a batch of events has under load."""
RUNS: Final = 4
"""Runs of a statement, of which the shortest counts."""
RUNS_MAX: Final = 24
"""Runs before a cost is believed that leads to a refusal."""
PATIENCE_S: Final = 1.0
"""How long the runs of one statement are repeated for that."""
PREPARE_S: Final = 0.02
"""A statement is planned a second time only if that does not take too long."""
RUN_S: Final = 0.002
"""What a run should take: long enough to be measured, short enough not to be interrupted."""
ROWS_MAX: Final = 4096
_EXECUTION_TIME: Final = re.compile(r"Execution Time: ([0-9.]+) ms")
_ARGUMENTS_MAX: Final = 100
"""PostgreSQL's limit of a function's arguments."""

# The group is chosen within the sample, so that a run reads no other users. Attributes are whole there, as in memory.
_SAMPLE: Final = sa.text(
    "WITH sample AS MATERIALIZED ("
    " SELECT u.attributes || CAST('{}' AS jsonb) AS attributes FROM users u"
    " WHERE $1 = 0 AND u.slot = ANY(CAST(:slots AS bigint[]))"
    " UNION ALL SELECT CAST(made.document AS jsonb)"
    " FROM unnest(CAST(:made AS text[])) WITH ORDINALITY AS made(document, number) WHERE made.number = $1"
    ") SELECT sample.attributes FROM generate_series(1, $2) CROSS JOIN sample"
).columns(attributes=JSONB)


_ALONE, _BESIDE, _LOOKED_UP = "segsvc_cost_alone", "segsvc_cost_beside", "segsvc_cost_looked_up"
"""Names of the prepared statements."""


class PostgresMeter:
    """Measures on the shards of an installation."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def measure(self, condition: str, shard: int, *, enough_us: float, timeout_s: float | None) -> ConditionCost:
        """What a condition costs a user.

        Args:
            enough_us: a cost beyond this is measured again and again before it is believed.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, DEADLINE_EXCEEDED, OVERLOADED.
        """
        root = parse_condition(condition).root
        attributes = attributes_of(root)
        parts = steps(root)
        made = made_up(parts)
        with self._databases.shard_snapshot(shard, timeout_s=timeout_s) as connection:
            slots = _some_slots(connection)
            groups = range(0 if slots else 1, len(made) + 1)

            # Planned once: a plan for each run would take longer than the run.
            connection.exec_driver_sql("SET LOCAL plan_cache_mode TO force_generic_plan")
            # They are left over if the previous measurement was cancelled.
            _drop_prepared(connection)
            users = _SAMPLE.bindparams(slots=slots, made=list(map(json.dumps, made))).subquery("users")
            lookups, in_batch = _of_batch(parts, sorted(attributes), users)

            sizes = {0: len(slots)} | dict.fromkeys(range(1, len(made) + 1), 1)
            alone = _Timed(connection, _ALONE, _of_rollout(parts, users), sizes, enough_us)
            beside = _Timed(connection, _BESIDE, in_batch, sizes, enough_us)
            looked_up = _Timed(connection, _LOOKED_UP, lookups, sizes, enough_us)

            rollout_us, _ = alone.worst(groups)
            # Both of the group that costs a batch most, so that the difference is that of the same users.
            batch_us, group = beside.worst(groups)
            lookups_us, _ = looked_up.worst([group])
            _drop_prepared(connection)

        return ConditionCost(
            rollout_us=rollout_us,
            batch_us=max(0.0, batch_us - lookups_us) + max(0.0, beside.fixed_us - looked_up.fixed_us) / BATCH,
            lookup_us=lookups_us / max(1, len(attributes)),
            attributes=attributes,
        )


def _drop_prepared(connection: sa.Connection) -> None:
    """Deallocate the statements of a measurement, and no other: the session keeps one for its reads
    (``memberships``)."""
    statement = sa.text("SELECT name FROM pg_prepared_statements WHERE name = ANY(:names)")
    for name in connection.execute(statement, {"names": [_ALONE, _BESIDE, _LOOKED_UP]}).scalars().all():
        connection.exec_driver_sql(f"DEALLOCATE {name}")


class _Timed:
    """A prepared statement over the sample, and how long it takes for a user of each group.

    Args:
        sizes: users in each group.
        enough_us: see ``PostgresMeter.measure``.
    """

    def __init__(
        self,
        connection: sa.Connection,
        name: str,
        statement: sa.Select[Any],
        sizes: Mapping[int, int],
        enough_us: float,
    ) -> None:
        self._connection = connection
        self._name = name
        self._sizes = sizes
        self._enough_us = enough_us
        compiled = statement.compile(dialect=_DIALECT)
        values = compiled.construct_params(escape_names=False)
        driver: Any = connection.connection.driver_connection
        with driver.cursor() as cursor:
            text = cursor.mogrify(str(compiled), [values[key] for key in compiled.positiontup or ()]).decode()
        self.fixed_us = self._prepare(f"PREPARE {name} (int, int) AS {text}")
        """How long the statement takes to be parsed and planned, before it reads any user."""

    def _prepare(self, text: str) -> float:
        took_s: list[float] = []
        while len(took_s) < RUNS and sum(took_s) < PREPARE_S:
            if took_s:
                self._execute(f"DEALLOCATE {self._name}")
            begin = time.perf_counter()
            self._execute(text)
            self._execute(f"EXECUTE {self._name}(-1, 0)")
            took_s.append(time.perf_counter() - begin)
        return min(took_s) * 1e6

    def _execute(self, text: str) -> sa.CursorResult[Any]:
        # Without parameters, so that a percent sign is not taken for a placeholder.
        return self._connection.exec_driver_sql(text, execution_options={"no_parameters": True})

    def run_s(self, group: int, times: int) -> float:
        """How long the statement takes for a group, repeated this many times, by the server's clock: the round trip
        says nothing about the cost."""
        lines = self._execute(
            f"EXPLAIN (ANALYZE, TIMING OFF, COSTS OFF, BUFFERS OFF, SUMMARY ON) EXECUTE {self._name}({group}, {times})"
        ).scalars()
        return float(next(found[1] for found in map(_EXECUTION_TIME.match, lines) if found)) / 1000

    def worst(self, groups: Sequence[int]) -> tuple[float, int]:
        """The cost of a user in the group that costs most, and the number of that group."""
        found = [_Group(self, group, self._sizes[group]) for group in groups]
        until = time.monotonic() + PATIENCE_S

        while True:
            # A disturbed run makes its group the most expensive one. That group then runs again, until another one is.
            worst = max(found, key=lambda group: group.user_us)
            if worst.runs >= (RUNS if time.monotonic() > until else self._runs_for(worst.user_us)):
                return worst.user_us, worst.number
            worst.again()

    def _runs_for(self, cost_us: float) -> int:
        """Runs before a cost is believed: the closer it is above the bound, the more."""
        if cost_us <= self._enough_us:
            return RUNS
        return RUNS_MAX if cost_us <= 4 * self._enough_us else 2 * RUNS


class _Group:
    """Runs of a statement for one group of the sample."""

    def __init__(self, statement: _Timed, number: int, size: int) -> None:
        self._statement = statement
        self._size = size
        self.number = number
        self.runs = 1
        self._empty_s = statement.run_s(number, 0)

        # More and more repetitions, until a run is long enough to be measured.
        self._times = 1
        self._shortest_s = statement.run_s(number, 1)
        while self._shortest_s - self._empty_s < RUN_S / 4 and self._times * size < ROWS_MAX:
            self._times = min(4 * self._times, -(-ROWS_MAX // size))
            self._shortest_s = statement.run_s(number, self._times)

    @property
    def user_us(self) -> float:
        return max(0.0, self._shortest_s - self._empty_s) / (self._times * self._size) * 1e6

    def again(self) -> None:
        self._empty_s = min(self._empty_s, self._statement.run_s(self.number, 0))
        self._shortest_s = min(self._shortest_s, self._statement.run_s(self.number, self._times))
        self.runs += 1


def _some_slots(connection: sa.Connection) -> list[int]:
    """Slots of some random users; empty: there are no users yet."""
    next_slot = connection.exec_driver_sql("SELECT next_slot FROM shard_state").scalar_one()
    wanted = np.unique(np.random.default_rng().integers(0, max(1, next_slot), SAMPLE)).tolist()
    found = connection.execute(
        sa.text("SELECT slot FROM users WHERE slot = ANY(CAST(:slots AS bigint[]))"), {"slots": wanted}
    )
    return list(found.scalars())


def _all(values: Sequence[Sql]) -> list[Sql]:
    """A count of the rows, and counts that make the server compute all of these values."""
    return [
        sa.func.count(),
        *(
            sa.func.count(sa.func.num_nonnulls(*values[first : first + _ARGUMENTS_MAX]))
            for first in range(0, len(values), _ARGUMENTS_MAX)
        ),
    ]


def _of_rollout(parts: Sequence[Node], users: sa.Subquery) -> sa.Select[Any]:
    """The statement as ``conditions.statements.slots_where`` writes it."""
    in_memory = sa.select(whole(users.c.attributes).label("attributes")).offset(FENCE).subquery("in_memory")
    compiler = Compiler(InObject(in_memory.c.attributes))
    return sa.select(*_all([compiler.truth(part) for part in parts])).select_from(in_memory)


def _of_batch(parts: Sequence[Node], names: Sequence[str], users: sa.Subquery) -> tuple[sa.Select[Any], sa.Select[Any]]:
    """The statement as ``conditions.statements.matching`` writes it: the lookups alone, and with the condition."""
    found, attributes = in_columns(names, users, [], sa.true())
    compiler = Compiler(attributes)
    answers = [compiler.truth(part) for part in parts]
    looked_up = list(attributes.used.values())
    return (
        sa.select(*_all(looked_up)).select_from(found),
        sa.select(*_all([*looked_up, *answers])).select_from(found),
    )


# -- made-up users -----------------------------------------------------------------------------------------------------


def made_up(parts: Sequence[Node]) -> list[Mapping[str, Any]]:
    """Users who have all attributes that these read (at most as many as a user may have: those named most often), of
    each type, as large as they may be together. Attributes that are used as lists are lists in every user but the
    last."""
    named = Counter(name for part in parts for name in _mentions(part))
    names = [name for name, _ in named.most_common(ATTRIBUTES_MAX)]
    if not names:
        return [{}]

    lists = {name for part in parts for name in _used_as_lists(part)}
    room = ATTRIBUTES_BYTES_MAX // len(names) - max(map(len, names)) - 8
    string = "m" * max(1, min(STRING_BYTES_MAX, room))
    strings = ["m" * max(1, min(STRING_BYTES_MAX, room // LIST_MAX - 4))] * max(1, min(LIST_MAX, room // 5))

    of_types: list[Sequence[Any]] = [(string,), (2**53 + 1,), (2**53 + 1, 0.123), (True,)]
    made: list[Mapping[str, Any]] = [
        {name: strings if name in lists else values[n % len(values)] for n, name in enumerate(names)}
        for values in of_types
    ]
    return [*made, dict.fromkeys(names, string)]


def _mentions(node: Node) -> list[str]:
    """Names of attributes, each as often as it is read."""
    if isinstance(node, tree.Attribute | tree.Has):
        return [node.name]
    return [name for operand in tree.operands(node) for name in _mentions(operand)]


def _used_as_lists(node: Node) -> list[str]:
    """Names of attributes that are searched for an item, whose size is asked, or that are compared with a list."""
    match node:
        case tree.In(item, tree.Attribute(name)):
            return [name, *_used_as_lists(item)]
        case tree.Size(tree.Attribute(name)):
            return [name]
        case tree.Compare(_, tree.Attribute(name), tree.ListOf()) | tree.Compare(
            _, tree.ListOf(), tree.Attribute(name)
        ):
            return [name]
        case tree.In(left, right) | tree.Compare(_, left, right):
            return _used_as_lists(left) + _used_as_lists(right)
        case tree.Not(of) | tree.Size(of):
            return _used_as_lists(of)
        case _:
            return []
