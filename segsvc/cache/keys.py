"""Names of the keys. All keys of a shard have the same hash tag, so one node of a Redis Cluster holds them. The tag
also names the installation: two installations in one server never touch each other's keys.

::

    {1f3a99c0:3}:g          generation: run_id of the server (40 bytes), a random nonce (10), and the epoch of the
                            newest patch (8). Never expires
    {1f3a99c0:3}:p          the generation's patches, see ``patches``. Never expires
    {1f3a99c0:3}:c:<t>:<n>  chunk n of the patch that was published under token t. Expires as an entry does
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

    def patches(self, shard: int) -> bytes:
        return b"{%b:%d}:p" % (self.tag, shard)

    def chunk_prefix(self, shard: int) -> bytes:
        """The beginning of the keys of all chunks of a shard; token, colon and number follow."""
        return b"{%b:%d}:c:" % (self.tag, shard)

    def chunk(self, shard: int, token: bytes, number: int) -> bytes:
        return self.chunk_prefix(shard) + b"%b:%d" % (token, number)

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
