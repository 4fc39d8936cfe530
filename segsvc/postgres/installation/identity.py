"""Compares what the databases store about themselves with the settings: does each DSN lead to the right database?

It only reads. ``segsvc migrate`` checks before it changes anything, every process checks when it starts, and
``segsvc doctor`` checks whenever it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import exc

from segsvc.config import Settings, mask
from segsvc.postgres import tables
from segsvc.postgres.engine import Pool, make_engine
from segsvc.postgres.installation.demands import Nature, read_nature, unmet

Kind = Literal["catalog", "shard"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be.

    Attributes:
        where: ``the catalog``, ``shard 2``, or the databases of one server.
        problem: what is wrong, with the values seen.
        remedy: what to do about it.
        outage: it may pass by itself, or when a move ends: no reason not to start.
    """

    where: str
    problem: str
    remedy: str
    outage: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.remedy}"


class FindingsError(Exception):
    """Carries findings; its text has one line for each."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings = tuple(findings)


class StartupError(FindingsError):
    """This process must not start: it would work on the wrong data or with the wrong schema."""


@dataclass(frozen=True, slots=True)
class Database:
    """One of the databases that the settings name.

    Attributes:
        shard: its number; None: the catalog.
    """

    engine: sa.Engine
    shard: int | None = None

    @property
    def kind(self) -> Kind:
        return "catalog" if self.shard is None else "shard"

    @property
    def name(self) -> str:
        return "the catalog" if self.shard is None else f"shard {self.shard}"

    @property
    def setting(self) -> str:
        """The setting that holds its DSN."""
        return "SEGSVC_CATALOG_DSN" if self.shard is None else "SEGSVC_SHARD_DSNS"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a database belongs to: the row that founding wrote.

    Attributes:
        installation: drawn when the catalog was set up; distinguishes installations with the same name.
        shard: its number; None: it is a catalog.
    """

    cluster: str
    shard_count: int
    installation: UUID
    shard: int | None = None

    def __str__(self) -> str:
        what = "the catalog" if self.shard is None else f"shard {self.shard}"
        return f"{what} of cluster {self.cluster!r} with {self.shard_count} shards"


@dataclass(frozen=True, slots=True)
class Seen:
    """A database as it is.

    Attributes:
        server: identifies the server; different for replicas and copies.
        revision: of the schema; None: no migration has run.
        foreign_tables: tables in the database, if no migration has run: they belong to something else.
        identity: None: it has none yet.
        founded: of a shard: it has an identity; of a catalog: all shards have theirs.
        retired: since when the shard goes on in another database, and the data here are old; None: it does not.
        switched: of a catalog: since when its shards are being doubled; None: they are not.
        closed: writes are refused, because it is being moved.
        prepared_max: ``max_prepared_transactions`` of the server.
        nature: encoding, version and settings.
    """

    server: str
    database: str
    revision: str | None
    foreign_tables: tuple[str, ...]
    identity: Identity | None
    founded: bool
    retired: str | None
    switched: str | None
    closed: bool
    prepared_max: int
    nature: Nature


@contextmanager
def open_databases(settings: Settings) -> Iterator[tuple[Database, ...]]:
    """The catalog, then the shards, for one pass over them."""
    pool = Pool(size=1)
    databases = tuple(
        Database(make_engine(dsn, settings, "setup", pool), shard)
        for shard, dsn in [(None, settings.catalog_dsn), *enumerate(settings.shard_dsns)]
    )
    try:
        yield databases
    finally:
        for database in databases:
            database.engine.dispose()


def look(database: Database) -> Seen | Finding:
    """Read what a database stores about itself; a Finding if it cannot be reached or read."""
    try:
        with database.engine.connect() as connection:
            return read(connection)
    except exc.OperationalError as error:
        # The driver's reason helps the operator, whose DSN it is; it never contains the password.
        reason = mask(str(error.orig).strip().splitlines()[0])
        remedy = f"start its server or correct {database.setting}"
        return Finding(database.name, f"cannot be reached ({reason})", remedy, outage=True)
    except exc.DBAPIError as error:
        reason = mask(str(error.orig).strip().splitlines()[0])
        return Finding(database.name, f"cannot be read ({reason})", f"correct {database.setting}, or its role's rights")


def identity_of(database: Database) -> Identity | None:
    """The installation to which a database belongs; None: to none yet. Raises DBAPIError: it cannot be reached or read
    now."""
    with database.engine.connect() as connection:
        return _about(connection, set(sa.inspect(connection).get_table_names())).identity


def read(connection: sa.Connection) -> Seen:
    """Read what this database stores about itself."""
    server = connection.execute(
        sa.select(
            sa.text("(SELECT system_identifier::text FROM pg_control_system()) AS system"),
            sa.cast(sa.func.pg_postmaster_start_time(), sa.Text).label("started"),
            sa.func.current_database().label("database"),
            sa.cast(sa.func.current_setting("max_prepared_transactions"), sa.Integer).label("prepared_max"),
            (sa.func.current_setting("default_transaction_read_only") == "on").label("closed"),
        )
    ).one()

    names = set(sa.inspect(connection).get_table_names())
    revision: str | None = None
    if "alembic_version" in names:
        revision = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    about = _about(connection, names) if revision is not None else _About()

    return Seen(
        server=f"{server.system} {server.started}",
        database=server.database,
        revision=revision,
        foreign_tables=tuple(sorted(names - {"alembic_version"})) if revision is None else (),
        identity=about.identity,
        founded=about.founded,
        retired=about.retired,
        switched=about.switched,
        closed=server.closed,
        prepared_max=server.prepared_max,
        nature=read_nature(connection),
    )


@dataclass(frozen=True, slots=True)
class _About:
    """The content of a database's row about itself; empty if there is no row."""

    identity: Identity | None = None
    founded: bool = False
    retired: str | None = None
    switched: str | None = None


def _about(connection: sa.Connection, names: set[str]) -> _About:
    if tables.installation.name in names:
        of = tables.installation.c
        columns = [of.cluster, of.shard_count, of.id, of.founded]
        # The catalog of an earlier release, which is yet to be migrated, lacks it.
        known = {column["name"] for column in sa.inspect(connection).get_columns(tables.installation.name)}
        row = connection.execute(
            sa.select(*columns, of.switch_time if of.switch_time.name in known else sa.null().label("switch_time"))
        ).one_or_none()
        if row:
            switched = row.switch_time.isoformat(timespec="seconds") if row.switch_time else None
            return _About(
                Identity(row.cluster, row.shard_count, row.id), founded=row.founded is not None, switched=switched
            )

    if tables.shard_state.name in names:
        state = tables.shard_state.c
        row = connection.execute(
            sa.select(state.cluster, state.shard_count, state.installation, state.shard, state.retired_time)
        ).one_or_none()
        if row:
            identity = Identity(row.cluster, row.shard_count, row.installation, row.shard)
            retired = row.retired_time.isoformat(timespec="seconds") if row.retired_time else None
            return _About(identity, founded=True, retired=retired)
    return _About()


def wrong_databases(settings: Settings, seen: Mapping[Database, Seen]) -> list[Finding]:
    """Where the DSNs point to databases that are not the ones they should be.

    Args:
        seen: the databases that could be reached, as they are.
    """
    return [
        *_duplicates(seen),
        *_foreign(settings, seen),
        *_of_other_installations(settings, seen),
        *_retired(seen),
        *_replaced(seen),
    ]


def _duplicates(seen: Mapping[Database, Seen]) -> Iterator[Finding]:
    """Databases to which two DSNs lead."""
    first: dict[tuple[str, str], Database] = {}
    for database, what in seen.items():
        other = first.setdefault((what.server, what.database), database)
        if other is not database:
            yield Finding(
                database.name,
                f"its DSN points to the same database as that of {other.name} ({what.database!r})",
                "give each a database of its own",
            )


def _foreign(settings: Settings, seen: Mapping[Database, Seen]) -> Iterator[Finding]:
    """Databases that are another shard, belong to another cluster, or are not this service's at all."""
    for database, what in seen.items():
        found = what.identity
        if found is None:
            if what.foreign_tables:
                shown = ", ".join(what.foreign_tables[:5])
                yield Finding(
                    database.name,
                    f"the database {what.database!r} has tables of something else ({shown})",
                    "give it a database of its own",
                )
        elif found.shard != database.shard:
            yield Finding(database.name, f"its DSN points to {found}", f"correct {database.setting}")
        elif found.cluster != settings.cluster:
            yield Finding(
                database.name,
                f"its DSN points to {found}, and this is cluster {settings.cluster!r}",
                f"correct {database.setting} or SEGSVC_CLUSTER",
            )
        elif found.shard_count != settings.shard_count:
            yield Finding(
                database.name,
                f"it was founded with {found.shard_count} shards, and SEGSVC_SHARD_DSNS names {settings.shard_count}",
                "name them all, in their order; only `segsvc shards double` changes their number",
            )


def _of_other_installations(settings: Settings, seen: Mapping[Database, Seen]) -> Iterator[Finding]:
    """Shards of another installation that has the same cluster name as ours."""
    catalog = next((what for database, what in seen.items() if database.shard is None), None)
    if catalog is None or catalog.identity is None or catalog.identity.cluster != settings.cluster:
        return

    for database, what in seen.items():
        found = what.identity
        if found is None or found.shard != database.shard or found.cluster != settings.cluster:
            continue  # not set up yet, or reported already
        if found.installation != catalog.identity.installation:
            yield Finding(
                database.name,
                f"its DSN points to {found}, but of another installation of that name ({found.installation}, "
                f"and the catalog is of {catalog.identity.installation})",
                f"correct {database.setting} or SEGSVC_CATALOG_DSN",
            )


def _retired(seen: Mapping[Database, Seen]) -> Iterator[Finding]:
    """Databases from which a shard was moved away."""
    for database, what in seen.items():
        if what.retired is not None:
            yield Finding(
                database.name,
                f"it was moved away from the database {what.database!r} at {what.retired}, and here are old data",
                f"correct {database.setting}",
            )


def _replaced(seen: Mapping[Database, Seen]) -> Iterator[Finding]:
    """New databases where there must be data.

    Founding writes last of all into the catalog that the installation is founded. Before that, a shard without an
    identity is yet to be founded; after that, it is the wrong database. Likewise, the catalog is migrated first of all:
    if a shard is founded, a catalog that was never migrated is the wrong one.
    """
    catalog = next((what for database, what in seen.items() if database.shard is None), None)
    if catalog is None:
        return

    for database, what in seen.items():
        if catalog.founded and what.identity is None and not what.foreign_tables:
            yield Finding(
                database.name,
                f"the database {what.database!r} is new, and the catalog says that the installation is founded",
                f"correct {database.setting}, or restore the data",
            )
        if catalog.revision is None and database.shard is not None and what.identity is not None:
            yield Finding(
                "the catalog",
                f"the database {catalog.database!r} is new, and {database.name} is that of a founded installation",
                "correct SEGSVC_CATALOG_DSN, or restore the data",
            )
            return


def unfit(seen: Mapping[Database, Seen]) -> Iterator[Finding]:
    """Databases on which our SQL would mean something else."""
    for database, what in seen.items():
        for problem, remedy in unmet(what.database, what.nature):
            yield Finding(database.name, problem, remedy)


def closed(seen: Mapping[Database, Seen]) -> Iterator[Finding]:
    """Databases that refuse writes: they are being moved or doubled, or that was interrupted."""
    switched = next((what.switched for what in seen.values() if what.switched is not None), None)
    if switched is not None:
        yield Finding(
            "the catalog",
            f"since {switched} the shards are being doubled: no operation starts, and writes may be refused",
            "if no `segsvc shards double` runs, run it again, or with --undo",
            outage=True,
        )
        return

    for database, what in seen.items():
        if what.closed:
            yield Finding(
                database.name,
                f"the database {what.database!r} is closed to writes, because it is being moved",
                f"end the move with `segsvc shards settle {database.shard} --fence` and the DSN of the other database",
                outage=True,
            )


def scarce_prepared_transactions(seen: Mapping[Database, Seen]) -> Iterator[Finding]:
    """Servers whose ``max_prepared_transactions`` is too low. They need 2 × their shards + 4: two of each shard can
    exist while an old one waits for its rollback, and a few are for people."""
    shards_of: dict[str, list[Database]] = {}
    for database, what in seen.items():
        if database.shard is not None:
            shards_of.setdefault(what.server, []).append(database)

    for shards in shards_of.values():
        least = 2 * len(shards) + 4
        prepared_max = seen[shards[0]].prepared_max
        if prepared_max < least:
            yield Finding(
                f"the server of {', '.join(shard.name for shard in shards)}",
                f"max_prepared_transactions is {prepared_max}, and {least} is the least for its shards",
                f"set max_prepared_transactions = {least} or more in postgresql.conf and restart the server",
            )
