"""The steps of the cache protocol that must compare and change atomically, as Lua scripts on the server.

Each call touches keys of one shard only. The principle: a fill needs permission, and the permission is the load's own
token, which must still be in the key. So losing any key at any moment (eviction, expiry, a flush, a server replaced by
an empty one) only makes misses.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from segsvc.cache.entry import EPOCH_OFFSET, GENERATION_BYTES, HEADER_BYTES, NONCE_BYTES, PREFIX_BYTES, RUN_ID_BYTES
from segsvc.cache.patches import ITEM_BYTES, TOKEN_BYTES

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
-- KEYS: g, then users' keys. ARGV: run_id, a fresh nonce, token, lease in ms, now in us, format, and the oldest epoch
-- that is good enough for the caller; '': that of the newest patch.
-- Returns the nonce in force; for each user '1' (the lease was given), '0' (a hit) or '2' (leased or barred); and the
-- epoch of the newest patch, 0 if there is none.
local g = redis.pcall('GET', KEYS[1])
if type(g) ~= 'string' or #g ~= {GENERATION_BYTES} or string.sub(g, 1, {RUN_ID_BYTES}) ~= ARGV[1] then
  -- It is lost, of another run, or malformed: make a new one, under which no entry filled before is a hit, without a
  -- patch.
  g = ARGV[1] .. ARGV[2] .. struct.pack('<i8', 0)
  redis.call('SET', KEYS[1], g)
end
local nonce = string.sub(g, {RUN_ID_BYTES + 1}, {RUN_ID_BYTES + NONCE_BYTES})
local newest = struct.unpack('<i8', g, {RUN_ID_BYTES + NONCE_BYTES + 1})
local enough = tonumber(ARGV[7]) or newest
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
    -- A lease or a bar is another process's. A value is refused only if a read would call it a hit: any other value
    -- would stay a miss for ever if it could not be replaced. Whether an entry older than the newest patch is a hit,
    -- only its reader can tell, who has the patches; and he comes here after a miss alone. So it is replaced, unless
    -- the caller (the warmer) says that it is good enough.
    if kind == {ord("L")} or kind == {ord("B")} then
      -- Leases and bars of this service always expire soon. One that does not is foreign, and would keep its user
      -- out of the cache for ever.
      local left = call('PTTL', KEYS[i + 1])
      if left >= 0 and left <= {BAR_MS} then
        given = '2'
      end
    elseif string.sub(u, 1, {PREFIX_BYTES}) == prefix and #u >= {HEADER_BYTES} and #u % 4 == 0
        and struct.unpack('<i8', u, {PREFIX_BYTES + 1}) > now
        and struct.unpack('<I4', u, {EPOCH_OFFSET + 1}) >= enough then
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
return {{nonce, table.concat(granted), newest}}
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

APPEND_PATCH: Final = Script(
    f"""#!lua
-- KEYS: g, p. ARGV: run_id, the patch's epoch, the patch as an item of the list, most items in the list.
-- Its chunks are written. Returns 'appended'; 'known': the list has this patch or a later one; 'none': this run of the
-- server has no generation, hence no hit to patch; or 'dropped'.
local g = redis.pcall('GET', KEYS[1])
if type(g) ~= 'string' or #g ~= {GENERATION_BYTES} or string.sub(g, 1, {RUN_ID_BYTES}) ~= ARGV[1] then
  return 'none'
end
local nonce = string.sub(g, {RUN_ID_BYTES + 1}, {RUN_ID_BYTES + NONCE_BYTES})
local newest = struct.unpack('<i8', g, {RUN_ID_BYTES + NONCE_BYTES + 1})
local epoch = tonumber(ARGV[2])
if newest >= epoch then
  -- A twin has published it, or this publisher was asleep while later operations were published.
  return 'known'
end
if newest ~= 0 and newest + 1 ~= epoch then
  -- A patch between the two was never published: nobody can bring the older entries up to date.
  redis.call('DEL', KEYS[1], KEYS[2])
  return 'dropped'
end
local items = ''
if newest ~= 0 then
  local p = redis.pcall('GET', KEYS[2])
  if type(p) == 'string' and #p > {NONCE_BYTES} and (#p - {NONCE_BYTES}) % {ITEM_BYTES} == 0
      and string.sub(p, 1, {NONCE_BYTES}) == nonce
      and struct.unpack('<i8', p, #p - {ITEM_BYTES} + 1) == newest then
    items = string.sub(p, {NONCE_BYTES + 1})
  end
  -- Else the list is lost: it begins again here, and entries older than this patch's predecessor are misses.
end
items = string.sub(items .. ARGV[3], -{ITEM_BYTES} * tonumber(ARGV[4]))
redis.call('SET', KEYS[2], nonce .. items)
redis.call('SET', KEYS[1], ARGV[1] .. nonce .. struct.pack('<i8', epoch))
return 'appended'
"""
)

READ_PATCHES: Final = Script(
    f"""#!lua flags=no-writes
-- KEYS: p. ARGV: beginning of the chunks' keys, an epoch, most chunks to return, then the numbers of chunks.
-- Returns the list, and for each patch that is later than the epoch, in their order, the chunks with these numbers: a
-- reader that meets a new patch gets the list and what it needs of the patch in one round trip.
local p = redis.pcall('GET', KEYS[1])
if type(p) ~= 'string' or (#p - {NONCE_BYTES}) % {ITEM_BYTES} ~= 0 then
  return {{false}}
end
local reply = {{p}}
local after, most = tonumber(ARGV[2]), tonumber(ARGV[3])
for at = {NONCE_BYTES + 1}, #p, {ITEM_BYTES} do
  if struct.unpack('<i8', p, at) > after then
    local token = string.sub(p, at + 12, at + {11 + TOKEN_BYTES})
    for i = 4, #ARGV do
      if #reply > most then
        return reply
      end
      local chunk = redis.pcall('GET', ARGV[1] .. token .. ':' .. ARGV[i])
      reply[#reply + 1] = type(chunk) == 'string' and chunk
    end
  end
end
return reply
"""
)

ALL: Final = (ACQUIRE, FILL, RELEASE, DROP_ENTRIES, APPEND_PATCH, READ_PATCHES)
"""Every new connection loads them, so they are there again after a restart or a SCRIPT FLUSH."""
