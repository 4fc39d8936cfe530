"""Which attributes the users of a shard have: exactly for given names, and from a sample for names to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import sqlalchemy as sa

from segsvc.domain.stored import Int64s
from segsvc.postgres.copying import bigint_array

_SOME: Final = "(SELECT attributes FROM users LIMIT 2000)"
"""Users who together have nearly every attribute that exists: the rest of the users is read only for missing ones."""
_NEWEST: Final = "(SELECT attributes FROM users ORDER BY slot DESC LIMIT 2000)"
"""Users who have the attributes that producers have begun to send since then."""
_LISTED: Final = "(SELECT attributes FROM users WHERE slot = ANY(CAST(:slots AS bigint[])))"
_AT_ONCE: Final = 500
"""Names that one statement asks for: PostgreSQL allows 1664 columns."""

_WHOLE: Final = "SELECT attributes || CAST('{{}}' AS jsonb) AS attributes FROM {users} AS chosen OFFSET 0"


def absent_attributes(connection: sa.Connection, names: Sequence[str], slots: Int64s | None = None) -> list[str]:
    """The attributes among these that no user has: of the users in these slots; None: of all of the shard."""
    missing = list(names)
    listed = {} if slots is None else {"slots": bigint_array(slots.tolist())}
    for users in (_SOME, "users") if slots is None else (_LISTED,):
        missing = [
            name
            for first in range(0, len(missing), _AT_ONCE)
            for name in _absent_among(connection, users, listed, missing[first : first + _AT_ONCE])
        ]
    return missing


def _absent_among(connection: sa.Connection, users: str, listed: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """One pass over the users, whatever the number of names. Attributes are fetched once a user (see
    ``conditions.values.whole``).

    Args:
        listed: parameters of ``users``.
    """
    asked = ", ".join(f"bool_or(u.attributes ? :name{number})" for number in range(len(names)))
    row = connection.execute(
        sa.text(f"SELECT {asked} FROM ({_WHOLE.format(users=users)}) u"),  # noqa: S608  # no value is in it
        {f"name{number}": name for number, name in enumerate(names)} | dict(listed),
    ).one()
    return [name for name, found in zip(names, row, strict=True) if not found]


def attribute_names(connection: sa.Connection) -> list[str]:
    """Attributes of some of the oldest and the newest users, by name."""
    names = " UNION ".join(
        f"SELECT jsonb_object_keys(chosen.attributes) AS name FROM {users} AS chosen"  # noqa: S608  # no value is in it
        for users in (_SOME, _NEWEST)
    )
    return list(connection.execute(sa.text(f"{names} ORDER BY name")).scalars())
