"""Idle connections of a pool, when their server has ended them."""

from __future__ import annotations

from segsvc.postgres.engine import Databases
from tests.eventually import eventually
from tests.integration.operations.conftest import Rig

BACKEND = "SELECT pg_backend_pid()"


def backend(databases: Databases) -> int:
    with databases.catalog_tx() as connection:
        return int(connection.exec_driver_sql(BACKEND).scalar_one())


def test_a_connection_that_the_server_has_ended_is_replaced_before_its_use(rig: Rig) -> None:
    ended = backend(rig.databases)
    assert backend(rig.databases) == ended  # one that lives is used again
    rig.installation.execute(None, "SELECT pg_terminate_backend(:pid)", pid=ended)
    eventually(lambda: not rig.installation.execute(None, "SELECT pid FROM pg_stat_activity WHERE pid = :p", p=ended))
    assert backend(rig.databases) != ended
