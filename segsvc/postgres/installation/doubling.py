"""Doubles the number of shards while reads go on and events wait for seconds.

Each shard's users are divided over two new databases. Before the decision, which is one statement in the catalog,
nothing has happened: the old databases are the shards. After it everything will: they are not any more, for ever. The
protocol with its reasons is docs/doubling.md; the steps here have its names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Self

import sqlalchemy as sa
from alembic import command
from sqlalchemy import exc

from segsvc.config import Settings
from segsvc.failpoints import CrashPoints
from segsvc.fan_out import SERVERS_AT_ONCE, ThreadFanOut
from segsvc.postgres import tables
from segsvc.postgres.engine import Pool, make_engine, translated
from segsvc.postgres.installation import closing, identity, layout
from segsvc.postgres.installation.closing import MoveRefused
from segsvc.postgres.installation.halves import BroughtUp, Half, HalfWrong, bring_up
from segsvc.postgres.installation.identity import Database, Finding, Identity, Seen
from segsvc.postgres.installation.migrate import alembic_config, head
from segsvc.postgres.installation.relocation import layout_state, relocating
from segsvc.postgres.installation.roles import grant_if_they_exist, roles_of
from segsvc.postgres.locks import SHARD_LOCK

FEW_CHANGES: Final = 2_000
"""When a pass over all shards finds fewer changed rows than this, the rest takes the last pass a moment."""
_PASSES_MAX: Final = 6
"""Passes before the switch; with more events than a pass can follow, one more would find as much again."""
_SETTLE_LOCK_S: Final = 5.0
_TICK_S: Final = 0.1

Progress = Callable[[str, int, int], None]
"""Called with what is done now, how many steps of it are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a doubling would do.

    Attributes:
        users, bytes: of each shard, as it is.
        decided: the catalog has decided already; the doubling only has to be ended.
    """

    shards: int
    users: Sequence[int]
    bytes: Sequence[int]
    decided: bool


@dataclass(frozen=True, slots=True)
class Doubled:
    """Attributes:
    shards: their number now.
    users: on all of them; 0: an earlier run had copied them and decided.
    fill_s: how long the copy took, during which nothing waited.
    writes_waited_s: longest wait of a write to a shard, so of an event.
    operations_waited_s: how long no operation could start.
    """

    shards: int
    users: int
    fill_s: float
    writes_waited_s: float
    operations_waited_s: float


_installation = tables.installation.c


# -- commands ---------------------------------------------------------------------------------------------------------


def plan(settings: Settings) -> Plan:
    """What ``double`` would do; changes nothing. Raises MoveRefused: it would refuse."""
    with _Doubling(settings) as work:
        decided = work.refuse_unless_ready()
        sizes = [] if decided else [_size(database) for database in work.old]
        return Plan(len(work.old), [users for users, _ in sizes], [size for _, size in sizes], decided)


def _size(database: Database) -> tuple[int, int]:
    """Users and bytes of a shard."""
    size = sa.func.pg_database_size(sa.func.current_database())
    with translated(database.shard or 0), database.engine.connect() as connection:
        row = connection.execute(sa.select(tables.shard_state.c.user_count, size.label("bytes"))).one()
        return row.user_count, row.bytes


def double(
    settings: Settings,
    drop_generations: Callable[[Sequence[int]], None],
    crash_points: CrashPoints,
    *,
    patience_s: float,
    progress: Progress = lambda what, done, total: None,
) -> Doubled:
    """Double the number of shards, or go on with a doubling that was interrupted. Idempotent.

    Args:
        settings: with the shards as they are and the next ones, whatever the catalog says.
        drop_generations: makes the cache forget all that it knows of these shards.
        patience_s: how long to wait, after the decision, for processes to leave the old databases.

    Raises:
        MoveRefused: it cannot be done now; the text says why, and what holds.
        ServiceError: UNAVAILABLE, a server went away; run it again, or undo it.
    """
    with _Doubling(settings, crash_points, progress) as work, relocating(settings) as catalog:
        began = time.monotonic()
        copied = _Copied(0, began, began, began)
        if not work.refuse_unless_ready():
            copied = work.copy_and_decide(catalog)
        work.end(catalog, drop_generations, patience_s)
        now = time.monotonic()
        return Doubled(
            len(work.new), copied.users, copied.paused_at - began, now - copied.closed_at, now - copied.paused_at
        )


def undo(settings: Settings, crash_points: CrashPoints) -> bool:
    """Give up a doubling that is not decided: the shards accept writes and operations again, as before.

    The new databases keep what was copied; a later run goes on from there.

    Returns:
        Whether there was anything to undo.

    Raises:
        MoveRefused: it is decided, so it can only be gone on with.
    """
    with _Doubling(settings, crash_points) as work, relocating(settings) as catalog:
        count, since = layout_state(catalog)
        if count != len(work.old):
            raise MoveRefused("the catalog", f"it has decided on {count} shards", "run `segsvc shards double` again")
        if since is None and not any(work.see(database).closed for database in work.old):
            return False

        with ExitStack() as stack:
            # A command that is between closing and deciding holds these locks. So such a command has ended, or has lost
            # its sessions and cannot open anything; and it cannot decide once the note is gone.
            guards = [stack.enter_context(work.guard(database)) for database in work.old]
            work.clear_note(catalog, None)
            crash_points.reach("double-note-cleared")
            work.at_once(closing.open_again, guards)
        return True


@dataclass(frozen=True, slots=True)
class _Copied:
    """Times are by ``time.monotonic()``.

    Attributes:
        paused_at: since when no operation starts.
        closed_at: since when writes are refused.
    """

    users: int
    paused_at: float
    closed_at: float
    decided_at: float


class _Doubling:
    """The databases of one doubling, and its steps."""

    def __init__(
        self,
        settings: Settings,
        crash_points: CrashPoints | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        if not settings.shard_dsns_next or settings.shard_dsns_next == settings.shard_dsns:
            problem = "SEGSVC_SHARD_DSNS_NEXT names none"
            raise MoveRefused("the new databases", problem, "name twice as many databases there as there are shards")
        self._settings = settings
        self._crash = crash_points
        self._progress = progress
        self._catalog = Database(make_engine(settings.catalog_dsn, settings, "setup", Pool(1)))
        self.old = self._databases(settings.shard_dsns)
        self.new = self._databases(settings.shard_dsns_next)
        self._fan_out = ThreadFanOut(min(SERVERS_AT_ONCE, len(self.new)))

    def _databases(self, dsns: Sequence[str]) -> list[Database]:
        return [Database(make_engine(dsn, self._settings, "setup", Pool(3)), shard) for shard, dsn in enumerate(dsns)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._fan_out.close()
        for database in (self._catalog, *self.old, *self.new):
            database.engine.dispose()

    def at_once(self, visit: Callable[[Any], Any], targets: Sequence[Any]) -> list[Any]:
        """Visit all of these at once."""
        return self._fan_out(visit, targets)

    def _reach(self, point: str, **where: object) -> None:
        if self._crash is not None:
            self._crash.reach(point, **where)

    # -- checks -------------------------------------------------------------------------------------------------------

    def see(self, database: Database, name: str = "") -> Seen:
        """Raises MoveRefused: it cannot be reached or read."""
        what = identity.look(database)
        if isinstance(what, Finding):
            raise MoveRefused(name or what.where, what.problem, what.remedy)
        return what

    def _name(self, database: Database) -> str:
        return f"database {database.shard} of SEGSVC_SHARD_DSNS_NEXT"

    def refuse_unless_ready(self) -> bool:
        """Check everything that can be checked before anything changes. Returns whether the catalog has decided.

        Raises:
            MoveRefused.
        """
        catalog = self.see(self._catalog)
        if catalog.identity is None or catalog.identity.cluster != self._settings.cluster or not catalog.founded:
            raise MoveRefused("the catalog", "it is not that of this installation", "correct SEGSVC_CATALOG_DSN")
        if catalog.revision != head("catalog"):
            raise MoveRefused("the catalog", f"its schema is at {catalog.revision}", "run `segsvc migrate` first")
        self._installation = catalog.identity

        count = catalog.identity.shard_count
        if count == len(self.new):
            return True
        if count != len(self.old):
            problem = f"it counts {count} shards, and SEGSVC_SHARD_DSNS names {len(self.old)}"
            raise MoveRefused("the catalog", problem, "name them all, in their order")

        try:
            layout.doubled(self._settings).cache_url_by_shard  # noqa: B018  # read for its check
        except ValueError as error:
            raise MoveRefused("SEGSVC_CACHE_URLS", str(error), "name servers that are used in turn") from error
        seen = self._see_old()
        self._refuse_unfit_new(seen)
        return False

    def _see_old(self) -> dict[Database, Seen]:
        seen = {database: self.see(database) for database in self.old}
        for finding in identity.wrong_databases(self._settings, {self._catalog: self.see(self._catalog), **seen}):
            raise MoveRefused(finding.where, finding.problem, finding.remedy)
        for database, what in seen.items():
            if what.revision != head("shard"):
                raise MoveRefused(database.name, f"its schema is at {what.revision}", "run `segsvc migrate` first")
        return seen

    def _refuse_unfit_new(self, old: dict[Database, Seen]) -> None:
        new = {database: self.see(database, self._name(database)) for database in self.new}
        places = {(what.server, what.database): database.name for database, what in old.items()}
        for database, what in new.items():
            name = self._name(database)
            other = places.setdefault((what.server, what.database), name)
            if other != name:
                raise MoveRefused(name, f"it is also {other}", "give each a database of its own")
            self._refuse_unless_half(database, what)
            for finding in identity.unfit({database: what}):
                raise MoveRefused(name, finding.problem, finding.remedy)

        # Old and new can be on one server, and for a moment transactions of both can be prepared there.
        for finding in identity.scarce_prepared_transactions(new):
            raise MoveRefused(finding.where, finding.problem, finding.remedy)

    def _half_identity(self, database: Database) -> Identity:
        own = self._installation
        return Identity(own.cluster, len(self.new), own.installation, database.shard)

    def _refuse_unless_half(self, database: Database, what: Seen) -> None:
        """A new database is empty, or an earlier run of this doubling has filled it."""
        name = self._name(database)
        if what.revision is None and what.foreign_tables:
            raise MoveRefused(name, "it has tables of something else", "give an empty one")
        if what.revision is None:
            return
        if what.revision != head("shard"):
            raise MoveRefused(name, f"its schema is at {what.revision}, of another release", "give an empty one")
        if what.identity != self._half_identity(database):
            raise MoveRefused(name, f"it is {what.identity or 'of something else'}", "give an empty one")

    # -- copy, pause, close, decide -----------------------------------------------------------------------------------

    def copy_and_decide(self, catalog: sa.Connection) -> _Copied:
        """Everything up to the decision. If it fails before that, the shards are as they were."""
        if not any(self.see(database).closed for database in self.old):
            self._fill()
        self._reach("double-filled")

        # Behind an earlier run that was interrupted, the shards may be closed already: its note is replaced, so that
        # nothing which that run may still do counts.
        paused_at = time.monotonic()
        note = self._pause(catalog)
        self._reach("double-paused")
        with ExitStack() as guards:
            sessions: list[sa.Connection] = []
            try:
                self._await_no_operation(catalog)
                self._pass_over_all("following")
                closed_at = time.monotonic()
                self._close(guards, sessions)
                self._reach("double-closed")
                users = self._bring_up_last()
                self._reach("double-not-decided")
                self._decide(catalog, note)
            except BaseException:
                self._give_up(catalog, note, sessions)
                raise
        self._reach("double-decided")
        return _Copied(users, paused_at, closed_at, time.monotonic())

    def _fill(self) -> None:
        """Copy everything while events and operations go on, until a pass finds little that has changed."""
        for number in range(_PASSES_MAX):
            changes = self._pass_over_all("copying" if number == 0 else "following")
            if number and changes <= FEW_CHANGES:
                return

    def _pass_over_all(self, what: str) -> int:
        changes = 0
        for number, database in enumerate(self.old):
            self._progress(what, number, len(self.old))
            changes += sum(half.changes for half in self._bring_up(database))
        self._progress(what, len(self.old), len(self.old))
        return changes

    def _bring_up(self, source: Database) -> list[BroughtUp]:
        """Bring both halves of a shard up to one moment of it."""
        assert source.shard is not None
        with translated(source.shard), source.engine.connect() as reading:
            reading.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            _use_plain_text(reading)
            closing.unbounded(reading)
            reading.rollback()
            return [
                self._bring_up_half(reading, self.new[number])
                for number in (source.shard, source.shard + len(self.old))
            ]

    def _bring_up_half(self, reading: sa.Connection, target: Database) -> BroughtUp:
        assert target.shard is not None
        name = self._name(target)
        with translated(target.shard), target.engine.connect() as writing:
            writing.exec_driver_sql("SET default_transaction_read_only = off")
            _use_plain_text(writing)
            closing.unbounded(writing)
            # Only this session writes to the half, so a run that lost its sessions writes nothing more.
            if not writing.execute(sa.select(sa.func.pg_try_advisory_lock(SHARD_LOCK))).scalar_one():
                raise MoveRefused(name, "another command fills it", "wait for its end")
            writing.commit()
            try:
                return self._write_half(reading, writing, target)
            except HalfWrong as error:
                raise MoveRefused(name, str(error), "empty it, and run this again") from error
            finally:
                if not writing.invalidated:
                    writing.rollback()
                    writing.execute(sa.select(sa.func.pg_advisory_unlock(SHARD_LOCK)))
                    writing.commit()

    def _write_half(self, reading: sa.Connection, writing: sa.Connection, target: Database) -> BroughtUp:
        assert target.shard is not None
        what = identity.read(writing)
        self._refuse_unless_half(target, what)
        if what.revision is None:
            closing.set_read_only(writing, "SET default_transaction_read_only = on")
            command.upgrade(alembic_config("shard", writing), "head")
            if refused := grant_if_they_exist(writing, target.name, roles_of(self._settings)):
                raise MoveRefused(refused.where, refused.problem, refused.remedy)
        brought_up = bring_up(reading, writing, Half(target.shard, len(self.new)))
        if what.revision is None or brought_up.changes > FEW_CHANGES:
            writing.exec_driver_sql("ANALYZE")
        writing.commit()
        return brought_up

    def _pause(self, catalog: sa.Connection) -> datetime:
        """Let no further operation start. Waits for starts that are under way: they hold the row. Returns the note."""
        held = sa.select(_installation.cluster).with_for_update().cte("held")
        note: datetime = catalog.execute(
            sa.update(tables.installation)
            .where(_installation.cluster == held.c.cluster, _installation.shard_count == len(self.old))
            .values(switch_time=sa.func.clock_timestamp())
            .returning(_installation.switch_time)
        ).scalar_one()
        return note

    def _await_no_operation(self, catalog: sa.Connection) -> None:
        """Wait until the operation in flight, if there is one, has ended; events go on meanwhile."""
        in_flight = sa.exists().where(tables.operations.c.state.in_(tables.IN_FLIGHT))
        wait_s = self._settings.operation_deadline_s + 30
        until = time.monotonic() + wait_s
        while catalog.execute(sa.select(in_flight)).scalar_one():
            if time.monotonic() > until:
                problem = f"an operation has not ended within {wait_s:.0f} s"
                raise MoveRefused("the catalog", problem, "see `segsvc doctor`, and run this again")
            self._progress("waiting for an operation", 0, 1)
            time.sleep(_TICK_S)

    @contextmanager
    def guard(self, database: Database) -> Iterator[sa.Connection]:
        """A session that holds a shard's lock, and may open the shard."""
        assert database.shard is not None
        with closing.locked(database, database.shard, wait_s=self._settings.operation_deadline_s) as session:
            session.exec_driver_sql("SET default_transaction_read_only = off")
            yield session

    def _close(self, guards: ExitStack, sessions: list[sa.Connection]) -> None:
        """Refuse writes to all shards from now on; reads go on. Adds their guards to ``sessions``."""

        def close(database: Database) -> None:
            session = guards.enter_context(self.guard(database))
            sessions.append(session)
            closing.close(session)

        self._progress("closing", 0, 1)
        self.at_once(close, self.old)

    def _bring_up_last(self) -> int:
        """The last pass: nothing changes in the shards any more. Returns the number of users."""
        self._progress("following", 0, 1)

        def last(source: Database) -> int:
            halves = self._bring_up(source)
            with translated(source.shard or 0), source.engine.connect() as connection:
                _refuse_unless_whole(source, connection, halves)
            return sum(half.users for half in halves)

        return sum(self.at_once(last, self.old))

    def _decide(self, catalog: sa.Connection, note: datetime) -> None:
        """The decision. Only this run's note allows it: if another run or an undo has replaced or cleared it, this run
        has been given up. No operation is in flight, because none could start since the note.

        Raises:
            MoveRefused: it has been given up.
        """
        in_flight = sa.exists().where(tables.operations.c.state.in_(tables.IN_FLIGHT))
        decided = catalog.execute(
            sa.update(tables.installation)
            .where(_installation.shard_count == len(self.old), _installation.switch_time == note, sa.not_(in_flight))
            .values(shard_count=len(self.new))
        )
        if not decided.rowcount:
            raise MoveRefused("the catalog", "another command has taken over, or undone this", "see `segsvc doctor`")

    def clear_note(self, catalog: sa.Connection, note: datetime | None) -> bool:
        """Let operations start again, unless the doubling is decided. Returns whether they may start.

        Args:
            note: of the command that stopped them; None: of any command.
        """
        statement = sa.update(tables.installation).where(_installation.shard_count == len(self.old))
        if note is not None:
            statement = statement.where(_installation.switch_time == note)
        return bool(catalog.execute(statement.values(switch_time=None)).rowcount)

    def _give_up(self, catalog: sa.Connection, note: datetime, guards: Sequence[sa.Connection]) -> None:
        """Before the decision: open the shards again. If the answer to the decision was lost, this finds it decided, or
        cannot ask: then nothing is opened, and the next run goes on.

        A shard is opened only on the session that has held its lock since it was closed, so no other run can have
        closed it in between. A session that is lost opens nothing: `--undo` does.
        """
        if self.clear_note(catalog, note):
            self.at_once(closing.open_again, guards)

    # -- after the decision -------------------------------------------------------------------------------------------

    def end(self, catalog: sa.Connection, drop_generations: Callable[[Sequence[int]], None], patience_s: float) -> None:
        """Everything after the decision; each step may run again."""
        _, since = layout_state(catalog)
        if since is None:
            return  # an earlier run has ended it

        self._progress("switching", 0, 4)
        # From here on a process may start on the new databases, which are as closed as the old ones, and equal.
        self.at_once(self._put_in_force, self.new)
        self._reach("double-in-force")
        self._await_departure(patience_s)
        self._progress("switching", 1, 4)

        # In this order: no process can read the old databases any more; then no entry that was read there is left in
        # the cache, and no load under way can fill one; only then are writes allowed.
        self.at_once(self._leave, self.old)
        self._reach("double-left")
        self._progress("switching", 2, 4)
        drop_generations(range(len(self.new)))
        self._progress("switching", 3, 4)
        self.at_once(self._open, self.new)
        self._reach("double-opened")

        catalog.execute(
            sa.update(tables.installation).where(_installation.shard_count == len(self.new)).values(switch_time=None)
        )
        self._progress("switching", 4, 4)

    def _put_in_force(self, database: Database) -> None:
        what = self.see(database, self._name(database))
        if what.identity != self._half_identity(database):
            raise MoveRefused(self._name(database), f"it is {what.identity or 'empty'}", "correct its DSN")
        with translated(database.shard or 0), database.engine.begin() as connection:
            connection.execute(sa.text("SET TRANSACTION READ WRITE"))
            connection.execute(sa.update(tables.shard_state).values(retired_time=None))

    def _await_departure(self, patience_s: float) -> None:
        """Wait until no process has a session in an old database: then all have learnt of the decision."""
        until = time.monotonic() + patience_s
        others = sa.text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name LIKE 'segsvc-%' AND application_name <> 'segsvc-setup'"
        )
        for database in self.old:
            while time.monotonic() < until and self._count(database, others):
                time.sleep(_TICK_S)

    def _count(self, database: Database, statement: sa.TextClause) -> int:
        """The number that a statement finds; 0: the database is shut, or out of reach, and nobody reads it."""
        try:
            with database.engine.connect() as connection:
                return int(connection.execute(statement).scalar_one())
        except exc.OperationalError:
            return 0

    def _lobby(self, database: Database) -> sa.Engine:
        url = database.engine.url.set(database=closing.MAINTENANCE)
        return make_engine(url.render_as_string(hide_password=False), self._settings, "setup", Pool(1))

    def _leave(self, database: Database) -> None:
        """Take an old database out of use for ever: mark it as left, and shut it."""
        assert database.shard is not None
        own = self._installation
        expected = Identity(own.cluster, len(self.old), own.installation, database.shard)
        name = str(database.engine.url.database)
        lobby = self._lobby(database)
        try:
            with translated(database.shard), lobby.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT")
                if closing.accepts_connections(connection, name, expected):
                    what = self.see(database)
                    if what.identity != expected:
                        raise MoveRefused(database.name, f"its DSN points to {what.identity}", "correct it")
                    closing.mark_left(database, database.shard)
                    closing.shut(connection, name, expected)
                closing.end_sessions(connection, database=name)
        finally:
            lobby.dispose()

    def _open(self, database: Database) -> None:
        """Let a new shard take writes. Under its lock, which the next doubling holds from its closing on: so a command
        that stood still for that long cannot open what was closed since."""
        database.engine.dispose()
        with self.guard(database) as session:
            closing.open_again(session)


def _use_plain_text(connection: sa.Connection) -> None:
    """Rows are compared as text, which must look the same on both servers."""
    connection.exec_driver_sql("SET datestyle = 'ISO, YMD'; SET bytea_output = 'hex'")


def _refuse_unless_whole(source: Database, connection: sa.Connection, halves: Sequence[BroughtUp]) -> None:
    """The halves together must be the shard, by the shard's own counters."""
    users = connection.execute(sa.select(tables.shard_state.c.user_count)).scalar_one()
    found = sum(half.users for half in halves)
    if users != found:
        problem = f"it counts {users} users, and its halves have {found}"
        raise MoveRefused(source.name, problem, "see `segsvc check`")

    segments = tables.shard_segments.c
    for segment_id, slug, count in connection.execute(sa.select(segments.id, segments.slug, segments.rule_count)):
        found = sum(half.rule_counts.get(segment_id, 0) for half in halves)
        if count != found:
            problem = f"it counts {count} members of {slug!r}, and its halves have {found}"
            raise MoveRefused(source.name, problem, "see `segsvc check`")
