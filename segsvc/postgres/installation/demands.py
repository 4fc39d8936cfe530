"""What the SQL of this service demands of a database and its server, apart from the schema.

The values are read on a session as the service opens it. What a session can set for itself, it sets
(``engine.SESSION_SETTINGS``); it is read nevertheless, because a pooler in between may drop what a client asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

ENCODING: Final = "UTF8"
VERSION_MIN: Final = 15

_SESSION: Final = {
    "client_encoding": ("UTF8", "text would arrive as other characters, or not at all"),
    "standard_conforming_strings": ("on", "a backslash in a string would change what follows it"),
    "transaction_isolation": (
        "read committed",
        "a change would be judged by what was there before its wait for a lock",
    ),
    "TimeZone": ("UTC", "the last hours of the year 9999 would be in a year that Python does not know"),
    "transform_null_equals": ("off", "what an attribute lacks would equal what another one lacks"),
}
"""Settings that a session sets for itself: what each must be, and why."""

_SERVER: Final = {
    "synchronous_commit": (("off",), "a decision could be lost in a crash, after a shard has committed for it"),
    "session_replication_role": (("replica", "local"), "what is forgotten would leave behind what refers to it"),
}
"""Settings of the database, its role or its server: what each must not be, and why."""

_SETTINGS: Final = (*_SESSION, *_SERVER)


@dataclass(frozen=True, slots=True)
class Nature:
    """What a database and its sessions are like.

    Attributes:
        encoding: ``server_encoding``.
        version: major version of the server.
        settings: by name, as in this session.
    """

    encoding: str
    version: int
    settings: Mapping[str, str]


def read_nature(connection: sa.Connection) -> Nature:
    """The nature of this session's database."""
    current = sa.func.current_setting
    row = connection.execute(
        sa.select(
            current("server_encoding").label("encoding"),
            sa.cast(current("server_version_num"), sa.Integer).label("version"),
            *(current(name).label(name) for name in _SETTINGS),
        )
    ).one()
    return Nature(row.encoding, row.version // 10_000, {name: getattr(row, name) for name in _SETTINGS})


def unmet(database: str, nature: Nature) -> Iterator[tuple[str, str]]:
    """Demands that a database does not meet: what is wrong, and what to do about it.

    Args:
        database: its name on its server.
    """
    if nature.version < VERSION_MIN:
        problem = f"its server is PostgreSQL {nature.version}, and {VERSION_MIN} is the oldest version that will do"
        yield problem, f"upgrade the server to {VERSION_MIN} or later"

    if nature.encoding != ENCODING:
        problem = (
            f"the encoding of the database {database!r} is {nature.encoding}, and must be {ENCODING}: conditions would "
            "count and compare other characters than the ones that were sent"
        )
        remedy = (
            f"make a database with `CREATE DATABASE … TEMPLATE template0 ENCODING '{ENCODING}'` and name that one; "
            "data goes there with pg_dump and pg_restore, for an encoding cannot be changed"
        )
        yield problem, remedy
        # The rest is reported once there is a database with the right encoding.
        return

    for name, (wanted, why) in _SESSION.items():
        if nature.settings[name] != wanted:
            problem = f"{name} is {nature.settings[name]!r} in our sessions, and must be {wanted!r}: {why}"
            remedy = (
                "let the pooler between pass on the startup parameter `options`, or set it with "
                f"`ALTER DATABASE {database} SET {name} = '{wanted}'`"
            )
            yield problem, remedy

    for name, (refused, why) in _SERVER.items():
        if nature.settings[name] in refused:
            problem = f"{name} is {nature.settings[name]!r} in the database {database!r}: {why}"
            reset = f"`ALTER DATABASE {database} RESET {name}`"
            yield problem, f"remove it from the database ({reset}), the role or postgresql.conf"
