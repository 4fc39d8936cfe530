"""Names of the keys. All keys of a shard have the same hash tag, so one node of a Redis Cluster holds them. The tag
also names the installation: two installations in one server never touch each other's keys.

::

    {1f3a99c0:3}:g          generation: run_id of the server (40 bytes) and a random nonce. Never expires
    {1f3a99c0:3}:u:<id>     one user: L<token> (lease), B<token> (bar) or V… (value, see ``entry``). Always expires
    {1f3a99c0:3}:hot        sorted set: block -> reads counted by the fronts. Expires, and fades with every sweep of the
                            warmer
    {1f3a99c0:3}:warm       what the warmer's last sweep covered. Expires when the next full sweep is due
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one installation.

    Attributes:
        tag: names the installation; short, because every key contains it.
    """

    tag: bytes

    def generation(self, shard: int) -> bytes:
        return b"{%b:%d}:g" % (self.tag, shard)

    def user_prefix(self, shard: int) -> bytes:
        """The beginning of the keys of all users of a shard; the user id follows, in decimal."""
        return b"{%b:%d}:u:" % (self.tag, shard)

    def user(self, shard: int, user_id: int) -> bytes:
        return self.user_prefix(shard) + b"%d" % user_id

    def users(self, shard: int, user_ids: Iterable[int]) -> list[bytes]:
        """Keys of many users of one shard, in their order."""
        prefix = self.user_prefix(shard)
        return [prefix + b"%d" % user_id for user_id in user_ids]

    def hot(self, shard: int) -> bytes:
        return b"{%b:%d}:hot" % (self.tag, shard)

    def warm(self, shard: int) -> bytes:
        return b"{%b:%d}:warm" % (self.tag, shard)
