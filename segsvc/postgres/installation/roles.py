"""Rights in the databases: one role changes data, another one only reads it; tables belong to the migrating role.

Both are group roles without a login. The services' login is a member of the first, an analyst's of the second:
``CREATE ROLE segsvc LOGIN PASSWORD '…' IN ROLE local_segsvc_change``. All processes use one login, because only the
login that prepared a transaction can end it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from segsvc.config import Settings
from segsvc.postgres.engine import sqlstate
from segsvc.postgres.installation.identity import Finding

_INSUFFICIENT_PRIVILEGE: Final = "42501"
_EXISTS_ALREADY: Final = ("42710", "23505")
"""Duplicate object; unique violation, if two logins make it at the same moment."""

_SCHEMA: Final = "public"
_OF_THE_MIGRATOR: Final = ("alembic_version", "installation")
"""Tables that only migrations write: which schema this is, and whose databases these are."""


@dataclass(frozen=True, slots=True)
class Roles:
    """The names of an installation's group roles.

    Attributes:
        change: reads and writes rows. It can change no table, and of the tables of ``_OF_THE_MIGRATOR``
            only recovery's time.
        read: reads rows.
    """

    change: str
    read: str


def roles_of(settings: Settings) -> Roles:
    """A server may have several installations, so the names carry the cluster's."""
    name = settings.cluster.replace("-", "_")
    return Roles(f"{name}_segsvc_change", f"{name}_segsvc_read")


def grant(connection: sa.Connection, where: str, roles: Roles) -> Finding | None:
    """Make the roles where they are missing, and give them their rights on a database, in this transaction.

    Tables of later migrations get the same rights, if the same role runs them. Safe to repeat.

    Args:
        where: the database's name for people.

    Returns:
        What keeps this login from it; None: it is done.
    """
    quoted = connection.dialect.identifier_preparer.quote
    change, read = quoted(roles.change), quoted(roles.read)
    current = connection.execute(sa.select(sa.func.current_database())).scalar_one()
    name = quoted(current)

    missing = [role for role in (roles.change, roles.read) if not _exists(connection, role)]
    for role in missing:
        try:
            with connection.begin_nested():
                connection.exec_driver_sql(f"CREATE ROLE {quoted(role)} NOLOGIN")
        except sa.exc.DBAPIError as error:
            if sqlstate(error) == _INSUFFICIENT_PRIVILEGE:
                remedy = f"let a superuser run CREATE ROLE {role} NOLOGIN on its server, then run this again"
                return Finding(where, f"this login may not create the role {role}", remedy)
            # Databases of one server share their roles: another migrator may have made it meanwhile.
            if sqlstate(error) not in _EXISTS_ALREADY:
                raise

    for statement in (
        f"GRANT CONNECT ON DATABASE {name} TO {change}, {read}",
        f"REVOKE CREATE ON SCHEMA {_SCHEMA} FROM PUBLIC",
        f"GRANT USAGE ON SCHEMA {_SCHEMA} TO {change}, {read}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {_SCHEMA} TO {change}, {read}",
        f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {_SCHEMA} TO {change}",
        f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA {_SCHEMA} TO {change}",
        f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA {_SCHEMA} TO {read}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA {_SCHEMA} GRANT SELECT ON TABLES TO {change}, {read}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA {_SCHEMA} GRANT INSERT, UPDATE, DELETE ON TABLES TO {change}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA {_SCHEMA} GRANT USAGE, SELECT ON SEQUENCES TO {change}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA {_SCHEMA} GRANT SELECT ON SEQUENCES TO {read}",
    ):
        connection.exec_driver_sql(statement)

    for table in set(_OF_THE_MIGRATOR) & set(sa.inspect(connection).get_table_names(_SCHEMA)):
        connection.exec_driver_sql(f"REVOKE INSERT, UPDATE, DELETE ON {quoted(table)} FROM {change}")
        if table == "installation":
            # Recovery notes its time there; and a start locks the row, which takes the right to update a column of it.
            connection.exec_driver_sql(f"GRANT UPDATE (recovery_time) ON {quoted(table)} TO {change}")

    # A GRANT of what this login may not grant is only a warning.
    allowed = sa.text(
        "SELECT has_database_privilege(:role, :database, 'CONNECT') AND has_schema_privilege(:role, 'public', 'USAGE')"
    )
    for role in (roles.change, roles.read):
        if not connection.execute(allowed, {"role": role, "database": current}).scalar_one():
            return Finding(where, f"this login may not grant {role} its rights", "migrate with the database's owner")
    return None


def grant_if_they_exist(connection: sa.Connection, where: str, roles: Roles) -> Finding | None:
    """As ``grant``, on a new database of an installation that may have no group roles: then it does nothing."""
    if not (_exists(connection, roles.change) and _exists(connection, roles.read)):
        return None
    return grant(connection, where, roles)


def _exists(connection: sa.Connection, role: str) -> bool:
    query = sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :role)")
    return bool(connection.execute(query, {"role": role}).scalar_one())
