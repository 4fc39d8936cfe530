"""Names of the keys. The shard in braces is the hash tag: all keys of a shard lie on one node of a Redis Cluster.

::

    {3}:g          generation: run_id of the server (40 bytes) and a random nonce. Never expires
    {3}:u:<id>     one user: L<token> (lease), B<token> (block) or V… (value, see ``entry``). Always expires
    {3}:hot        sorted set: block -> reads counted by the fronts. Expires, and fades with every sweep of the warmer
    {3}:warm       what the warmer's last sweep covered. Expires when the next full sweep is due
"""

from __future__ import annotations

from collections.abc import Iterable


def generation(shard: int) -> bytes:
    return b"{%d}:g" % shard


def user_prefix(shard: int) -> bytes:
    """What the keys of all users of a shard begin with; the id follows, in decimal."""
    return b"{%d}:u:" % shard


def user(shard: int, user_id: int) -> bytes:
    return user_prefix(shard) + b"%d" % user_id


def users(shard: int, user_ids: Iterable[int]) -> list[bytes]:
    """Keys of many users of one shard, in their order."""
    prefix = user_prefix(shard)
    return [prefix + b"%d" % user_id for user_id in user_ids]


def hot(shard: int) -> bytes:
    return b"{%d}:hot" % shard


def warm(shard: int) -> bytes:
    return b"{%d}:warm" % shard
