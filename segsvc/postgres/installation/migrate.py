"""Brings the catalog and every shard to the newest schema, founds an installation, and checks both at start.

Founding writes into each shard its number, and last of all into the catalog that all shards are set up. From then on, a
DSN that leads to another database is noticed before anything is read or written (``identity``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal
from uuid import UUID

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.dialects.postgresql import insert

import migrations
from segsvc.config import Settings
from segsvc.domain.errors import LockTimeout
from segsvc.fan_out import SERVERS_AT_ONCE, ThreadFanOut
from segsvc.postgres import tables
from segsvc.postgres.engine import translated
from segsvc.postgres.installation import identity
from segsvc.postgres.installation.identity import Database, Finding, FindingsError, Kind, Seen, StartupError
from segsvc.postgres.installation.roles import grant, roles_of
from segsvc.postgres.locks import MIGRATION_LOCK

_WAIT_S: Final = 60
"""Longest wait for another migrator of the same database."""
_LOOKS_MAX: Final = 3


class MigrationError(FindingsError):
    """The databases are not the ones that the settings name, or some are missing. The findings are attached."""


@dataclass(frozen=True, slots=True)
class Migrated:
    """What was done to one database.

    Attributes:
        where: ``the catalog`` or ``shard 2``.
        before: its revision before; None: the database was new.
        after: its revision now; the same as before if there was nothing to do.
        number: the position of this database among ``total``, from 1.
    """

    where: str
    before: str | None
    after: str
    number: int
    total: int


def alembic_config(kind: Kind, connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration for the migrations of a kind of database.

    They are in the package ``migrations``, which is found both in a checkout and when it is installed.

    Args:
        connection: where to run them; None: only to read them.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent / kind).replace("%", "%%"))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    if connection is not None:
        config.attributes["connection"] = connection
    return config


def _known(kind: Kind, revision: str) -> bool:
    scripts = ScriptDirectory.from_config(alembic_config(kind))
    return any(script.revision == revision for script in scripts.walk_revisions())


@cache
def head(kind: Kind) -> str:
    """The newest revision of the migrations of a kind of database."""
    revision = ScriptDirectory.from_config(alembic_config(kind)).get_current_head()
    if revision is None:
        raise RuntimeError(f"there are no migrations of the {kind}")
    return revision


def migrate(
    settings: Settings, progress: Callable[[Migrated], None] | None = None, *, roles: bool = False
) -> list[Migrated]:
    """Migrate the catalog, then every shard, and found the installation if it is new.

    Each database is migrated in one transaction, so a crash leaves it either unchanged or done. Idempotent; two
    processes at once are safe (two threads are not: Alembic's operations are global to a process).

    Args:
        progress: called with each database when it is done.
        roles: also make the installation's group roles, and give them their rights (``roles``).

    Raises:
        MigrationError: a database is out of reach or not the one it should be, and nothing was changed at all; or
            its tables are in use, and nothing was changed there.
        ServiceError: UNAVAILABLE, a database went away meanwhile; run it again.
    """
    with identity.open_databases(settings) as databases:
        _refuse_unless_right(settings, databases)
        done: list[Migrated] = []
        installation: UUID | None = None
        for number, database in enumerate(databases, 1):
            with _migration(database) as connection:
                before, after = _upgrade(database, connection)
                if installation is None:  # the catalog, which comes first
                    installation = _name_installation(connection, settings, database)
                else:
                    _found_shard(connection, settings, database, installation)
                if roles and (refused := grant(connection, database.name, roles_of(settings))):
                    raise MigrationError([refused])
            done.append(Migrated(database.name, before, after, number, len(databases)))
            if progress is not None:
                progress(done[-1])
        with _migration(databases[0]) as connection:
            _found_catalog(connection, settings, databases[0])
        return done


def _refuse_unless_right(settings: Settings, databases: tuple[Database, ...]) -> None:
    if not settings.shard_dsns:
        raise MigrationError([Finding("the shards", "SEGSVC_SHARD_DSNS names none", "name at least one")])
    found: list[Finding] = []
    # The looks at the databases are not of one moment: another migrator may found the installation between them, and a
    # shard looks new, the catalog founded. What two looks in a row say is so, because founding only goes forward.
    for _ in range(_LOOKS_MAX):
        before, found = found, _found(settings, databases)
        if not found or found == before or any(finding.outage for finding in found):
            break
    if found:
        raise MigrationError(found)


def _found(settings: Settings, databases: tuple[Database, ...]) -> list[Finding]:
    """All that keeps these databases from being migrated."""
    seen, unreachable = _look_at(databases)
    return [*unreachable, *_wrong(settings, seen), *identity.unfit(seen), *identity.closed(seen)]


def _look_at(databases: tuple[Database, ...]) -> tuple[dict[Database, Seen], list[Finding]]:
    """The databases that could be read, and a finding for each that could not. All are read at once: a database that is
    out of reach takes seconds, and there may be many."""
    seen: dict[Database, Seen] = {}
    unreachable: list[Finding] = []
    fan_out = ThreadFanOut(SERVERS_AT_ONCE)
    try:
        looks = fan_out(identity.look, databases)
    finally:
        fan_out.close()

    for database, what in zip(databases, looks, strict=True):
        if isinstance(what, Finding):
            unreachable.append(what)
        else:
            seen[database] = what
    return seen, unreachable


def _wrong(settings: Settings, seen: Mapping[Database, Seen]) -> list[Finding]:
    """Databases that are not the ones they should be, or that a newer release has migrated."""
    found = identity.wrong_databases(settings, seen)
    named = {finding.where for finding in found}
    for database, what in seen.items():
        if database.name not in named and what.revision is not None and not _known(database.kind, what.revision):
            problem = f"its schema is at {what.revision}, which this release does not know"
            found.append(Finding(database.name, problem, "use the release that made it, or a newer one"))
    return found


@contextmanager
def _migration(database: Database) -> Iterator[sa.Connection]:
    """One transaction that holds the migration lock of a database."""
    where: Literal["catalog"] | int = "catalog" if database.shard is None else database.shard
    with _busy(database), translated(where), database.engine.begin() as connection:
        _set_local(connection, "lock_timeout", f"{_WAIT_S}s")
        _set_local(connection, "statement_timeout", f"{_WAIT_S + 1}s")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))

        # A change of a table waits for all transactions that use it, and new ones queue behind it: so it waits only
        # briefly. Once it has its locks, it may take as long as the size of the table requires.
        _set_local(connection, "lock_timeout", "2s")
        _set_local(connection, "statement_timeout", "0")
        yield connection


@contextmanager
def _busy(database: Database) -> Iterator[None]:
    try:
        yield
    except LockTimeout as error:
        problem = "another migrator or its traffic holds it locked; nothing was changed there"
        raise MigrationError([Finding(database.name, problem, "run it again")]) from error


def _set_local(connection: sa.Connection, name: str, value: str) -> None:
    connection.execute(sa.select(sa.func.set_config(name, value, True)))


def _upgrade(database: Database, connection: sa.Connection) -> tuple[str | None, str]:
    """Run the missing migrations. Returns the revisions before and after."""
    before = identity.read(connection).revision
    command.upgrade(alembic_config(database.kind, connection), "head")
    return before, head(database.kind)


def _name_installation(connection: sa.Connection, settings: Settings, catalog: Database) -> UUID:
    """The id of the installation. Inserts its row if it is missing; the installation is not founded yet then."""
    exists = connection.execute(sa.select(sa.exists().select_from(tables.installation))).scalar_one()
    if not exists:
        connection.execute(
            insert(tables.installation).values(cluster=settings.cluster, shard_count=settings.shard_count, founded=None)
        )
    _refuse_unless_ours(connection, settings, catalog)
    installation: UUID = connection.execute(sa.select(tables.installation.c.id)).scalar_one()
    return installation


def _found_shard(connection: sa.Connection, settings: Settings, database: Database, installation: UUID) -> None:
    """Write its number into a new shard."""
    connection.execute(
        insert(tables.shard_state)
        .values(
            one=True,
            cluster=settings.cluster,
            installation=installation,
            shard=database.shard,
            shard_count=settings.shard_count,
        )
        .on_conflict_do_nothing()
    )

    found = _refuse_unless_ours(connection, settings, database)
    if found != installation:
        problem = f"another migrator has made it a shard of the installation {found}"
        raise MigrationError([Finding(database.name, problem, f"correct {database.setting}")])


def _found_catalog(connection: sa.Connection, settings: Settings, database: Database) -> None:
    """Write into the catalog that every shard is founded."""
    table = tables.installation
    connection.execute(sa.update(table).where(table.c.founded.is_(None)).values(founded=sa.func.now()))
    _refuse_unless_ours(connection, settings, database)


def _refuse_unless_ours(connection: sa.Connection, settings: Settings, database: Database) -> UUID:
    """Check again under the lock: another migrator with other settings may have run since the first check.

    Returns the installation that the database belongs to.
    """
    what = identity.read(connection)
    found = identity.wrong_databases(settings, {database: what})
    if found:
        raise MigrationError(found)
    if what.identity is None:
        raise RuntimeError(f"{database.name} has lost its identity")
    return what.identity.installation


def inspect(settings: Settings) -> list[Finding]:
    """Everything that is wrong with the databases as the settings name them; changes nothing."""
    if not settings.shard_dsns:
        return [Finding("the shards", "SEGSVC_SHARD_DSNS names none", "run `segsvc up`, or name your shard databases")]
    with identity.open_databases(settings) as databases:
        seen, found = _look_at(databases)

    wrong = _wrong(settings, seen)
    named = {finding.where for finding in wrong}
    found += wrong
    for database, what in seen.items():
        if database.name in named:
            continue
        if not what.founded:
            found.append(Finding(database.name, "it was never set up", "run `segsvc migrate`"))
        elif what.revision != head(database.kind):
            problem = f"its schema is at {what.revision}, this release wants {head(database.kind)}"
            found.append(Finding(database.name, problem, "run `segsvc migrate`"))

    found += identity.unfit(seen)
    found += identity.closed({database: what for database, what in seen.items() if database.name not in named})
    found += identity.scarce_prepared_transactions(seen)
    return found


def verify(settings: Settings) -> list[Finding]:
    """Check that this process may work with these databases. Every process calls this before it does anything else.

    Returns:
        Findings about databases out of reach, or closed while they are moved: no reason not to start, because a process
        serves what it can.

    Raises:
        StartupError: a database is the wrong one, its schema is not this release's, our SQL would mean something else
            there, or its server cannot prepare.
    """
    found = inspect(settings)
    fatal = [finding for finding in found if not finding.outage]
    if fatal:
        raise StartupError(fatal)
    return found
