"""Idle connections of a pool that their server has ended; the end of transactions; and the text of errors."""

from __future__ import annotations

import traceback
from contextlib import AbstractContextManager, suppress
from typing import Any
from uuid import uuid4

import psycopg2
import pytest
import sqlalchemy as sa

from segsvc.domain.errors import Reason, ServiceError
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.memberships import PostgresMemberships
from tests.eventually import eventually
from tests.integration.operations.conftest import Rig

BACKEND = "SELECT pg_backend_pid()"


def backend(databases: Databases) -> int:
    with databases.catalog_tx() as connection:
        return int(connection.exec_driver_sql(BACKEND).scalar_one())


def test_what_an_error_says_of_a_statement_holds_no_values(rig: Rig) -> None:
    value = str(uuid4())
    with pytest.raises(sa.exc.DBAPIError) as caught, rig.databases.shard_tx(0) as connection:
        connection.execute(sa.text("SELECT 1 / (length(:name) - length(:name))"), {"name": value})
    assert "length" in str(caught.value)
    assert value not in "".join(traceback.format_exception(caught.value))


def test_a_connection_that_the_server_has_ended_is_replaced_before_its_use(rig: Rig) -> None:
    ended = backend(rig.databases)
    assert backend(rig.databases) == ended  # a live connection is used again
    rig.installation.execute(None, "SELECT pg_terminate_backend(:pid)", pid=ended)
    eventually(lambda: not rig.installation.execute(None, "SELECT pid FROM pg_stat_activity WHERE pid = :p", p=ended))
    assert backend(rig.databases) != ended


# -- the end of a transaction --------------------------------------------------------------------------------------

SHORT_S = 0.4
"""A bound that differs from every bound of a session."""

WAYS = ("catalog_tx", "shard_tx", "shard_snapshot")


def bounded(databases: Databases, way: str) -> AbstractContextManager[sa.Connection]:
    """A transaction of this kind, with statements bounded by a caller's deadline."""
    if way == "catalog_tx":
        return databases.catalog_tx(timeout_s=SHORT_S)
    return getattr(databases, way)(0, timeout_s=SHORT_S)  # type: ignore[no-any-return]


def bound_of(driver: Any) -> str:
    with driver.cursor() as cursor:
        cursor.execute("SHOW statement_timeout")
        return str(cursor.fetchone()[0])


class OwnError(Exception):
    """A caller's error, which causes a rollback."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("failing", [False, True], ids=["committed", "rolled-back"])
def test_a_callers_bound_does_not_cover_the_end_of_a_transaction(rig: Rig, way: str, failing: bool) -> None:
    """A COMMIT or ROLLBACK that is cancelled leaves the server inside the transaction."""
    at_the_end: list[str] = []
    engine = rig.databases.catalog if way == "catalog_tx" else rig.databases.shards[0]

    def note(connection: sa.Connection) -> None:
        at_the_end.append(bound_of(connection.connection.driver_connection))

    def note_return(driver: Any, _: object, state: Any) -> None:
        if not state.transaction_was_reset:  # the return to the pool ends a snapshot
            at_the_end.append(bound_of(driver))

    hooks = (("commit", note), ("rollback", note), ("reset", note_return))
    for name, hook in hooks:
        sa.event.listen(engine, name, hook)

    try:
        with suppress(OwnError), bounded(rig.databases, way) as connection:
            driver = connection.connection.driver_connection
            assert bound_of(driver) == f"{int(SHORT_S * 1000)}ms"
            if failing:
                raise OwnError
    finally:
        for name, hook in hooks:
            sa.event.remove(engine, name, hook)

    usual = f"{int(rig.installation.settings.statement_timeout_s)}s"
    assert at_the_end[:1] == [usual]


@pytest.mark.parametrize("way", WAYS)
def test_a_statement_that_outlasts_its_bound_leaves_no_trace(rig: Rig, way: str) -> None:
    pids: list[int] = []

    def outlast() -> None:
        with bounded(rig.databases, way) as connection:
            pids.append(connection.exec_driver_sql(BACKEND).scalar_one())
            connection.exec_driver_sql("SELECT pg_sleep(10)")

    with pytest.raises(ServiceError) as refused:
        outlast()
    assert refused.value.reason is Reason.DEADLINE_EXCEEDED

    with bounded(rig.databases, way) as connection:
        assert connection.exec_driver_sql(BACKEND).scalar_one() == pids[0]


@pytest.mark.parametrize("role", ["operations", "reads"])
def test_a_connection_that_is_still_in_a_transaction_is_not_used_again(rig: Rig, role: str) -> None:
    """The driver treats the transaction as ended, but the server does not: a cancelled COMMIT has this effect."""
    databases = Databases(rig.installation.settings, role, Pool(1, by_key=role == "reads"))

    try:
        with databases.shard_connection(0) as connection:
            driver: Any = connection.connection.driver_connection
            before = driver.autocommit
            driver.autocommit = True
            with driver.cursor() as cursor:
                poisoned = cursor.execute("SELECT pg_backend_pid()") or cursor.fetchone()[0]
                cursor.execute("BEGIN")
                with pytest.raises(psycopg2.Error):
                    cursor.execute("SELECT 1 / 0")
            driver.autocommit = before

        for _ in range(2):
            with databases.shard_connection(0) as connection:
                assert connection.exec_driver_sql(BACKEND).scalar_one() != poisoned

        eventually(
            lambda: not rig.installation.execute(0, "SELECT pid FROM pg_stat_activity WHERE pid = :pid", pid=poisoned)
        )
    finally:
        databases.close()


def test_what_may_have_been_prepared_is_prepared_again(rig: Rig) -> None:
    """A message that is cut off after its PREPARE leaves the statement prepared, and the process does not know it."""
    databases = Databases(rig.installation.settings, "reads", Pool(1, by_key=True))
    reads = PostgresMemberships(databases)
    try:
        reads.load(0, [3], timeout_s=5)
        with databases.shard_connection(0) as connection:
            connection.info.clear()
        assert {user.user_id for user in reads.load(0, [3, 6], timeout_s=5)} == {3, 6}
    finally:
        databases.close()


@pytest.mark.parametrize("outage", ["ended", "in-use"])
def test_a_lost_connection_gives_its_place_back(rig: Rig, outage: str) -> None:
    """So does a connection whose isolation level is reset at its return, which needs a statement."""
    databases = Databases(rig.installation.settings, "test", Pool(1))

    try:
        for way in (databases.catalog_autocommit, databases.catalog_tx):
            with suppress(ServiceError), way() as connection:
                pid = connection.exec_driver_sql(BACKEND).scalar_one()
                rig.installation.execute(None, "SELECT pg_terminate_backend(:pid)", pid=pid)
                if outage == "in-use":
                    connection.exec_driver_sql(BACKEND)
            assert databases.catalog.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        databases.close()
