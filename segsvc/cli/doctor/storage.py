"""What ``segsvc doctor`` checks in PostgreSQL and the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from segsvc.bootstrap import Check, installation_of
from segsvc.cache.server import server_name
from segsvc.cache.server_check import cache_findings, other_tags, run_id_of
from segsvc.cli.doctor.items import Item
from segsvc.config import Settings
from segsvc.domain.errors import ServiceError
from segsvc.fan_out import SERVERS_AT_ONCE, ThreadFanOut
from segsvc.postgres.installation.migrate import inspect

SKEW_MAX: Final = 0.2
"""Shards may differ from their mean by this share before it is reported."""
RECOVERY_AGE_MAX_S: Final = 30.0
"""Recovery runs every few seconds."""
SHARED: Final = "give each installation a server of its own: they share its memory and its outages"
_CACHE_REMEDY: Final = "see SEGSVC_CACHE_URL, SEGSVC_CACHE_URLS and the server's configuration"
_SKEW_USERS_MIN: Final = 1000
"""With fewer users per shard, such a difference may be chance."""


def databases(settings: Settings) -> Sequence[Item]:
    """Whether every database can be reached, is the right one and is migrated, and every server can prepare enough
    transactions."""
    return [Item(f"{finding.where}: {finding.problem}", finding.remedy) for finding in inspect(settings)]


def recovery(settings: Settings) -> Sequence[Item]:
    """Whether recovery, which runs in beat, has completed a run recently."""
    service = Check(settings, with_cache=False)
    try:
        age_s = service.reads.recovery_age_s()
    except ServiceError as error:
        return [Item(str(error), "see the databases above")]
    finally:
        service.close()
    if age_s is not None and age_s <= RECOVERY_AGE_MAX_S:
        return []
    text = "recovery has never run" if age_s is None else f"the last complete recovery run was {age_s:,.0f} s ago"
    return [
        Item(text, "bring back the servers that cannot be reached; if all can, start `segsvc beat`, or read its log")
    ]


def shard_skew(settings: Settings) -> Sequence[Item]:
    """Whether the users are spread evenly: ids with a constant low part all land on one shard."""
    service = Check(settings, with_cache=False)
    fan_out = ThreadFanOut(SERVERS_AT_ONCE)

    def count(shard: int) -> int:
        with service.reads.shard(shard) as snapshot:
            return snapshot.state().user_count

    try:
        return skew_items(fan_out(count, range(settings.shard_count)))
    except ServiceError as error:
        return [Item(str(error), "see the databases above")]
    finally:
        fan_out.close()
        service.close()


def skew_items(counts: Sequence[int]) -> Sequence[Item]:
    """The items for these numbers of users per shard."""
    users = ", ".join(f"{count:,}" for count in counts)
    mean = sum(counts) / max(1, len(counts))
    text = f"users a shard: {users}"
    if mean >= _SKEW_USERS_MIN and max(abs(count - mean) for count in counts) > SKEW_MAX * mean:
        return [Item(text, "shards differ by more than 20 %: let user ids vary in their low part")]
    return [Item(text)]


def cache(settings: Settings) -> Sequence[Item]:
    """The cache's servers, their settings, and other installations that use them."""
    found: list[Item] = []
    reached: list[str] = []
    for url in settings.all_cache_urls:
        sentences = cache_findings(url, timeout_s=settings.cache_timeout_s)
        where = f"{server_name(url)}: " if len(settings.all_cache_urls) > 1 else ""
        found += [Item(where + sentence, _CACHE_REMEDY) for sentence in sentences]
        if not sentences:
            reached.append(url)
    found += _same_servers(settings)
    if not reached:
        return found

    try:
        own = installation_of(settings).tag
    except ServiceError as error:
        return [*found, Item(str(error), "see the databases above")]
    others = set[str]().union(*(other_tags(url, timeout_s=settings.cache_timeout_s) for url in reached)) - {own}
    return [
        *found,
        *(
            Item(f"another installation uses this server too: its keys begin with {{{tag}:", SHARED)
            for tag in sorted(others)
        ),
    ]


def _same_servers(settings: Settings) -> Sequence[Item]:
    """URLs that lead to one server: it holds more shards than it was meant to."""
    names: dict[str, list[str]] = {}
    for url in settings.all_cache_urls if len(settings.all_cache_urls) > 1 else ():
        run_id = run_id_of(url, timeout_s=settings.cache_timeout_s)
        if run_id is not None:
            names.setdefault(run_id, []).append(server_name(url))
    return [
        Item(f"{' and '.join(same)} are one server", "give each URL of SEGSVC_CACHE_URLS a server of its own")
        for same in names.values()
        if len(same) > 1
    ]
