"""What counts as an outage of a database; and the watch for hanging databases, which survives a lack of threads."""

from __future__ import annotations

import threading

import psycopg2
import pytest
import sqlalchemy as sa
from sqlalchemy import exc, pool

from segsvc.config import Settings
from segsvc.domain.errors import LockTimeout, Reason, ServiceError
from segsvc.postgres import engine, stalls
from segsvc.postgres.engine import Databases, translated

DSN = "postgresql+psycopg2:///nowhere?host=/nowhere"


def refusal(code: str) -> psycopg2.Error:
    """The error as the driver raises it while the server's last message is still unread."""
    return type("Refusal", (psycopg2.errors.lookup(code),), {"pgcode": code})()  # type: ignore[no-any-return]


@pytest.mark.parametrize("code", ["25P03", "25P04", "25006", "57P01", "08006"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_end_of_a_session_is_an_outage(code: str, wrapped: bool) -> None:
    error = refusal(code)
    with pytest.raises(ServiceError) as told, translated("catalog"):
        raise exc.DBAPIError("SELECT 1", {}, error) if wrapped else error
    assert told.value.reason is Reason.CATALOG_UNAVAILABLE


def test_other_failures_are_distinguished() -> None:
    with pytest.raises(LockTimeout), translated(0):
        raise refusal("55P03")
    with pytest.raises(psycopg2.Error), translated(0):
        raise refusal("23505")


def test_the_watch_lives_without_room_for_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    databases = Databases(Settings(_env_file=None, catalog_dsn=DSN, shard_dsns=(DSN,)), "test")  # type: ignore[call-arg]
    watched = stalls._Watched("catalog", databases.catalog, 2, threading.Event())
    monkeypatch.setattr(pool.QueuePool, "checkedout", lambda _: 1)
    asked: list[str] = []

    def no_room(thread: threading.Thread) -> None:
        asked.append(thread.name)
        raise RuntimeError("can't start new thread")

    watched.look(100.0)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", no_room)
        watched.look(100.0 + stalls.SUSPECT_AFTER_S)
    assert asked == ["stall-probe"]

    probed = threading.Event()
    monkeypatch.setattr(watched, "_probe", probed.set)
    watched.look(101.0 + stalls.SUSPECT_AFTER_S)
    assert probed.wait(20)
    databases.close()


def test_an_engine_of_another_kind_of_pool_is_left_alone() -> None:
    engine = sa.create_engine(DSN, poolclass=pool.NullPool)
    stalls._Watched("catalog", engine, 2, threading.Event()).look(100.0)


class LostConnection:
    """A driver's connection that cannot roll back any more."""

    closed = 0

    def rollback(self) -> None:
        raise psycopg2.InterfaceError("connection already closed")

    def close(self) -> None:
        self.closed = 1


def test_a_connection_that_cannot_roll_back_is_closed_without_an_error() -> None:
    """SQLAlchemy would log the failed rollback as an error, with a traceback."""
    lost = LostConnection()
    engine._end_transaction(
        lost, None, pool.PoolResetState(transaction_was_reset=False, terminate_only=False, asyncio_safe=True)
    )
    assert lost.closed


def test_a_transaction_that_has_ended_is_not_rolled_back_again() -> None:
    lost = LostConnection()
    engine._end_transaction(
        lost, None, pool.PoolResetState(transaction_was_reset=True, terminate_only=False, asyncio_safe=True)
    )
    assert not lost.closed
