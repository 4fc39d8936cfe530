"""The steps of the cache protocol that must compare and change atomically, as Lua scripts on the server.

Each call touches keys of one shard only. The principle: a fill needs permission, and the permission is the load's own
token, which must still be in the key. So losing any key at any moment (eviction, expiry, a flush, a server replaced by
an empty one) only makes misses.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from segsvc.cache.entry import HEADER_BYTES, NONCE_BYTES, PREFIX_BYTES, RUN_ID_BYTES

LEASE_MS: Final = 10_000
"""Life of a lease: longer than a load takes. A load that is slower than that can no longer fill."""
BAR_MS: Final = 60_000
"""Life of a bar: longer than any transaction of one user. It ends by itself if its writer has crashed."""


@dataclass(frozen=True, slots=True)
class Script:
    """One script and the name under which the server keeps it."""

    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest())


ACQUIRE: Final = Script(
    f"""#!lua
-- KEYS: g, then users' keys. ARGV: run_id, a fresh nonce, token, lease in ms, now in us, format.
-- Returns the nonce in force, and for each user '1' (the lease was given), '0' (a hit) or '2' (leased or barred).
local g = redis.pcall('GET', KEYS[1])
if type(g) ~= 'string' or #g ~= {RUN_ID_BYTES + NONCE_BYTES} or string.sub(g, 1, {RUN_ID_BYTES}) ~= ARGV[1] then
  -- It is lost, of another run, or malformed: make a new one, under which no entry filled before is a hit.
  g = ARGV[1] .. ARGV[2]
  redis.call('SET', KEYS[1], g)
end
local nonce = string.sub(g, {RUN_ID_BYTES + 1})
local prefix = 'V' .. nonce .. ARGV[6]
local lease = 'L' .. ARGV[3]
local now = tonumber(ARGV[5])
local granted = {{}}
local call = redis.call
local users = call('MGET', unpack(KEYS, 2))
for i, u in ipairs(users) do
  local given = '1'
  if u then
    local kind = string.byte(u)
    -- A lease or a bar is another process's. A value is refused exactly if a read would call it a hit: any other value
    -- would stay a miss for ever if it could not be replaced.
    if kind == {ord("L")} or kind == {ord("B")} then
      -- Leases and bars of this service always expire soon. One that does not is foreign, and would keep its user
      -- out of the cache for ever.
      local left = call('PTTL', KEYS[i + 1])
      if left >= 0 and left <= {BAR_MS} then
        given = '2'
      end
    elseif string.sub(u, 1, {PREFIX_BYTES}) == prefix and #u >= {HEADER_BYTES} and #u % 4 == 0
        and struct.unpack('<i8', u, {PREFIX_BYTES + 1}) > now then
      given = '0'
    end
  end
  if given == '1' then
    -- With GET the reply is a text, which Lua takes over in half the time of a status table. The text is not used.
    local before = redis.pcall('SET', KEYS[i + 1], lease, 'PX', ARGV[4], 'GET')
    if type(before) == 'table' then
      -- A foreign value of another type: it is replaced as well, and not read.
      call('SET', KEYS[i + 1], lease, 'PX', ARGV[4])
    end
  end
  granted[i] = given
end
return {{nonce, table.concat(granted)}}
"""
)

FILL: Final = Script(
    """#!lua
-- KEYS: users' keys. ARGV: token, life in ms, then for each key its value. Returns how many were filled.
-- Fills only over this load's own lease: whatever happened to the key since the lease was granted (a change of the
-- user, a flush, an expiry, another load's lease) may have made this value stale, and has removed the lease.
local lease = 'L' .. ARGV[1]
local filled = 0
local call = redis.call
for i, u in ipairs(call('MGET', unpack(KEYS))) do
  if u == lease then
    call('SET', KEYS[i], ARGV[i + 2], 'PX', ARGV[2], 'GET')  -- GET: as in acquire
    filled = filled + 1
  end
end
return filled
"""
)

RELEASE: Final = Script(
    """#!lua flags=allow-oom
-- KEYS: users' keys. ARGV: token. Removes this load's own leases: there is nothing to fill.
local lease = 'L' .. ARGV[1]
local removed = 0
for i = 1, #KEYS do
  if redis.pcall('GET', KEYS[i]) == lease then
    removed = removed + redis.call('DEL', KEYS[i])
  end
end
return removed
"""
)

DROP_ENTRIES: Final = Script(
    """#!lua flags=allow-oom
-- KEYS: users' keys. ARGV: token. Removes values, leases (so that loads begun before this cannot fill) and this
-- writer's own bar. Another writer's bar stays: its change is not visible yet. Works when memory is full: it only
-- frees memory.
local own = 'B' .. ARGV[1]
local removed = 0
for i = 1, #KEYS do
  local u = redis.pcall('GET', KEYS[i])
  -- A table is an error reply: a foreign value of another type.
  if u and (type(u) == 'table' or string.sub(u, 1, 1) ~= 'B' or u == own) then
    removed = removed + redis.call('DEL', KEYS[i])
  end
end
return removed
"""
)

ALL: Final = (ACQUIRE, FILL, RELEASE, DROP_ENTRIES)
"""Every new connection loads them, so they are there again after a restart or a SCRIPT FLUSH."""
