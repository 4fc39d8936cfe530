"""Reads one user: attributes and version."""

from __future__ import annotations

from typing import Protocol

from segsvc.domain.errors import user_not_found
from segsvc.domain.sharding import check_user_id
from segsvc.domain.user import User


class UserReader(Protocol):
    """The shards, as far as reading a user needs them."""

    def get(self, user_id: int, *, timeout_s: float | None) -> User | None:
        """The user; None: the user was never created, or was deleted. Raises SHARD_UNAVAILABLE."""


class UserService:
    def __init__(self, reader: UserReader) -> None:
        self._reader = reader

    def get(self, user_id: int, *, timeout_s: float | None = None) -> User:
        """Raises ServiceError FIELD_INVALID, USER_NOT_FOUND, SHARD_UNAVAILABLE."""
        check_user_id(user_id)
        user = self._reader.get(user_id, timeout_s=timeout_s)
        if user is None:
            raise user_not_found(user_id)
        return user
