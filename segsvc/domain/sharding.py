"""The shard of a user, and the size of its blocks."""

from __future__ import annotations

from segsvc.domain.errors import invalid_field

USER_ID_MAX = 2**63 - 1
BLOCK_SLOTS = 1024
"""Users per block: one directory row, and one row of 1024 bits for each segment with a member in it."""
BLOCK_BYTES = BLOCK_SLOTS // 8


def shard_of(user_id: int, shard_count: int) -> int:
    """The shard of a user: ``user_id mod N``, prescribed from outside and fixed for the life of an installation."""
    return user_id % shard_count


def check_user_id(user_id: int, field: str = "user_id") -> None:
    """Raises ServiceError FIELD_INVALID unless ``1 <= user_id <= 2**63 - 1``."""
    if not 1 <= user_id <= USER_ID_MAX:
        raise invalid_field(field, f"must be 1 to {USER_ID_MAX}, is {user_id}")
