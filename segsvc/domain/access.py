"""Who calls, and what a caller may do: principals and their roles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

NAME_CHARACTERS_MAX: Final = 256
"""A principal's name is kept with each of its changes and is in each line of the log about its calls."""

NOBODY: Final = "-"
"""In the log, where a change was made by nobody who has a name."""


class Role(IntEnum):
    """What a principal may do. Each role includes all roles before it."""

    GATEWAY = 1
    VIEWER = 2
    EDITOR = 3
    ADMIN = 4

    @property
    def text(self) -> str:
        """The role's name in the public interface."""
        return self.name.lower()


ROLES: Final = tuple(role.text for role in Role)
"""Names of the roles, the least first."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller that has proved who it is.

    Attributes:
        name: goes into the audit trail and the log; never a secret.
        role: the highest of its roles; None: it has none, and may call nothing that needs one.
    """

    name: str
    role: Role | None

    def may(self, least: Role) -> bool:
        """Whether a method may be called that needs this role at least."""
        return self.role is not None and self.role >= least


def role_named(text: str) -> Role | None:
    """The role with this name; None: there is none."""
    return Role[text.upper()] if text in ROLES else None


def highest(names: Iterable[str]) -> Role | None:
    """The highest role among these names; names that are no role are ignored. None: no name is a role."""
    return max((role for name in names if (role := role_named(name)) is not None), default=None)


def is_name(text: str) -> bool:
    """Whether a text can be a principal's name: printable, not empty, and not too long."""
    return 0 < len(text) <= NAME_CHARACTERS_MAX and text.isprintable()
