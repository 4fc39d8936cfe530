"""Which of several cache servers holds which shard: the text of a setting, and what it says.

Two forms, never mixed:

- URLs alone, in turn: of n servers, server ``shard mod n`` holds a shard. Twice the shards on the same servers stay
  evenly spread.
- URLs with their shards: ``0-3=redis://… 4-7=redis://…``. Every shard is named once. One shard can move to a new server
  while all other shards stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_BETWEEN: Final = re.compile(r"\s+|\s*,\s*(?=(?:[0-9]+(?:-[0-9]+)?=)?[a-z]+://)")
"""A comma parts two URLs only in front of the next one: a password may contain commas."""
_WITH_SHARDS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?=(.*)", re.DOTALL)


def split_urls(text: str) -> tuple[str, ...]:
    """The parts of a setting, separated by spaces or commas, as they were written."""
    return tuple(part for part in _BETWEEN.split(text.strip()) if part)


def url_of(part: str) -> str:
    """The URL in a part, without the shards in front of it."""
    named = _WITH_SHARDS.fullmatch(part)
    return named[3] if named else part


def urls_by_shard(parts: Sequence[str], shard_count: int) -> tuple[str, ...]:
    """The URL of each shard's server, by shard.

    Args:
        parts: not empty; from ``split_urls``.
        shard_count: at least 1.

    Raises:
        ValueError: a shard has no server or two, a server would hold nothing, or the two forms are mixed. The message
            contains no URL, which may hold a password.
    """
    named = [_WITH_SHARDS.fullmatch(part) for part in parts]
    if not any(named):
        return _in_turn(parts, shard_count)

    urls: list[str | None] = [None] * shard_count
    for number, match in enumerate(named, 1):
        if match is None:
            raise ValueError(f"URL {number} names no shards: either all URLs do, as in 0-3=redis://host, or none")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{first}-{last} is no range of shards: the first is above the last")
        if last >= shard_count:
            raise ValueError(f"there is no shard {last}: the shards are 0 to {shard_count - 1}")
        for shard in range(first, last + 1):
            if urls[shard] is not None:
                raise ValueError(f"shard {shard} has two URLs")
            urls[shard] = match[3]

    without = [str(shard) for shard, url in enumerate(urls) if url is None]
    if without:
        raise ValueError(f"no URL names shard {', '.join(without)}")
    return tuple(url for url in urls if url is not None)


def _in_turn(urls: Sequence[str], shard_count: int) -> tuple[str, ...]:
    if len(set(urls)) < len(urls):
        raise ValueError("a URL is there twice: to give a server more shards than others, name the shards of each")
    if len(urls) > shard_count:
        raise ValueError(f"{len(urls)} URLs for {shard_count} shards: a server would hold nothing")
    return tuple(urls[shard % len(urls)] for shard in range(shard_count))
