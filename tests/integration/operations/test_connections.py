"""Idle connections of a pool, when their server has ended them; and what errors say."""

from __future__ import annotations

import traceback
from uuid import uuid4

import pytest
import sqlalchemy as sa

from segsvc.postgres.engine import Databases
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
    assert backend(rig.databases) == ended  # one that lives is used again
    rig.installation.execute(None, "SELECT pg_terminate_backend(:pid)", pid=ended)
    eventually(lambda: not rig.installation.execute(None, "SELECT pid FROM pg_stat_activity WHERE pid = :p", p=ended))
    assert backend(rig.databases) != ended
