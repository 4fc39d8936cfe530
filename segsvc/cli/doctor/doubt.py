"""What ``segsvc doctor`` says of everything that is not at its end: for how long, why, and what will end it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

from segsvc.bootstrap import Check
from segsvc.cli.doctor.items import Item
from segsvc.config import Settings
from segsvc.domain.operation import Gid, OperationState, PreparedTransaction
from segsvc.domain.stored import CatalogView, LedgerEntry
from segsvc.fan_out import SERVERS_AT_ONCE, ThreadFanOut
from segsvc.services.check.ledger import IN_DOUBT_MAX_S, overdue_s

_START: Final = "start `segsvc worker --queue operations` and `segsvc beat`, or read their logs"
_SEE_ABOVE: Final = "see the databases above"


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Why something is not at its end, and what will end it, as the end of a sentence each."""

    why: str
    end: str

    def __str__(self) -> str:
        return f"{self.why}; {self.end}"


@dataclass(slots=True)
class _Found:
    """What the shards have said.

    Attributes:
        silent: shards that could not be asked.
        fences: of each shard that was asked, the operations that have taken effect there.
    """

    prepared: list[tuple[int, PreparedTransaction]] = field(default_factory=list)
    fences: dict[int, frozenset[UUID]] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)


def in_doubt(settings: Settings) -> Sequence[Item]:
    """Every prepared transaction and every operation that has not ended. What cannot be asked hides nothing else."""
    service = Check(settings, with_cache=False)
    try:
        found = _look(service, settings.shard_count)
        gids = {transaction.gid: Gid.parse(transaction.gid) for _, transaction in found.prepared}
        # After the shards: an operation is in the ledger before anything of it is prepared.
        asked_for = {gid.operation_id for gid in gids.values() if gid is not None}
        try:
            catalog = service.reads.catalog(fence_ttl_s=0, asked_for=asked_for)
        except Exception as error:  # noqa: BLE001  # out of reach, or not a catalog: its own examination says which
            del error
            catalog = None
    finally:
        service.close()
    return [
        *(
            Item(f"shard {shard}: it cannot be asked what is prepared there", _SEE_ABOVE)
            for shard in sorted(found.silent)
        ),
        *(
            _transaction(shard, transaction, gids[transaction.gid], catalog, settings, found.silent)
            for shard, transaction in found.prepared
        ),
        *(_operations(catalog, found, settings.shard_count) if catalog is not None else ()),
    ]


def _look(service: Check, shard_count: int) -> _Found:
    found = _Found()

    def ask(shard: int) -> None:
        try:
            with service.reads.shard(shard) as snapshot:
                found.fences[shard] = snapshot.fences()
                found.prepared += [(shard, transaction) for transaction in snapshot.prepared()]
        except Exception as error:  # noqa: BLE001  # out of reach, or not a shard: its own examination says which
            del error
            found.silent.add(shard)

    fan_out = ThreadFanOut(SERVERS_AT_ONCE)
    try:
        fan_out(ask, range(shard_count))
    finally:
        fan_out.close()
    found.prepared.sort(key=lambda item: (item[0], item[1].gid))
    return found


# -- prepared transactions ------------------------------------------------------------------------------------------


def _transaction(
    shard: int,
    transaction: PreparedTransaction,
    gid: Gid | None,
    catalog: CatalogView | None,
    settings: Settings,
    silent: Collection[int],
) -> Item:
    where = f"shard {shard}: {transaction.gid} is prepared for {transaction.age_s:.0f} s"
    if gid is None or gid.cluster != settings.cluster:
        return Item(f"{where}; it is not ours", "ask its owner; it keeps its locks, and vacuum from working")
    if catalog is None:
        text = f"{where}; the catalog, which alone decides, cannot be asked; it stays until the catalog is back"
        return Item(text, _SEE_ABOVE)
    entry = next((entry for entry in catalog.operations if entry.id == gid.operation_id), None)
    if entry is None or gid.shard != shard:
        remedy = "find out where it came from before ending it by hand with COMMIT or ROLLBACK PREPARED"
        return Item(f"{where}; the ledger has no such operation on this shard", remedy)
    if entry.state is OperationState.QUEUED:
        text = f"{where}: {entry.title}; it has not started, so the catalog seems to be older than this shard"
        return Item(text, "compare the backups that were restored; it ends when its operation does")
    text = f"{where}: {entry.title}; {_of_transaction(entry, catalog, settings.shard_count, silent)}"
    if overdue_s(transaction, entry, catalog.time) > IN_DOUBT_MAX_S:
        return Item(f"{text}, which is overdue", _START)
    return Item(text)


def _of_transaction(entry: LedgerEntry, catalog: CatalogView, shard_count: int, silent: Collection[int]) -> _Doubt:
    if entry.state is OperationState.PREPARING:
        return _preparing(entry, catalog.time, shard_count, silent)
    if entry.state is OperationState.COMMITTED:
        return _Doubt("it is decided, and not committed here yet", "recovery commits it")
    if entry.state is OperationState.ABORTED:
        metadata: Mapping[str, str] = entry.failure.metadata if entry.failure is not None else {}
        reason = metadata.get("why") or (entry.failure.reason if entry.failure is not None else "")
        return _Doubt(f"it was aborted ({reason})" if reason else "it was aborted", "recovery rolls it back")
    return _Doubt("every shard has its work, so this is a second copy", "recovery rolls it back")


def _preparing(entry: LedgerEntry, now: datetime, shard_count: int, silent: Collection[int]) -> _Doubt:
    missing = [shard for shard in range(shard_count) if shard not in entry.voted]
    if entry.deadline is not None and entry.deadline <= now:
        late = f"{_named(missing, silent)} did not vote" if missing else "all shards have voted for it, nobody decided"
        return _Doubt(f"{late} in time", "a front or recovery aborts it and rolls it back")
    if not missing:
        return _Doubt("all shards have voted for it", "recovery decides it")
    until = entry.deadline.isoformat(timespec="seconds") if entry.deadline else "its deadline"
    return _Doubt(
        f"it waits for the vote of {_named(missing, silent)}",
        f"recovery sends what is missing again, and aborts it at {until}",
    )


def _named(shards: Sequence[int], silent: Collection[int]) -> str:
    names = [f"{shard} (out of reach)" if shard in silent else str(shard) for shard in shards]
    return f"{'shard' if len(names) == 1 else 'shards'} {', '.join(names)}"


# -- operations -----------------------------------------------------------------------------------------------------


def _operations(catalog: CatalogView, found: _Found, shard_count: int) -> Iterator[Item]:
    """Each operation that has begun and not ended; of those in the queue only how many, and since when."""
    waiting = sorted(
        (entry for entry in catalog.operations if entry.state is OperationState.QUEUED), key=lambda e: e.create_time
    )
    begun = [e for e in catalog.operations if e.state.in_flight]
    for entry in begun:
        yield _begun(entry, catalog, found, shard_count)
    if waiting:
        age_s = (catalog.time - waiting[0].create_time).total_seconds()
        text = f"{len(waiting)} in the queue, for up to {age_s:.0f} s; "
        if begun:
            yield Item(f"{text}each starts when the one before it has ended")
        else:
            overdue = age_s > IN_DOUBT_MAX_S
            end = "recovery starts the oldest"
            yield Item(f"{text}{end}, which is overdue" if overdue else f"{text}{end}", _START if overdue else "")


def _begun(entry: LedgerEntry, catalog: CatalogView, found: _Found, shard_count: int) -> Item:
    committed = entry.state is OperationState.COMMITTED
    since = entry.commit_time if committed else entry.start_time
    age_s = (catalog.time - since).total_seconds() if since else 0.0
    doubt = (
        _committed(entry, found, shard_count)
        if committed
        else _preparing(entry, catalog.time, shard_count, found.silent)
    )
    text = f"{entry.title} for {age_s:.0f} s; {doubt}"
    late_s = age_s if committed else (catalog.time - entry.deadline).total_seconds() if entry.deadline else 0.0
    if late_s <= IN_DOUBT_MAX_S:
        return Item(text)
    away = bool(found.silent) or entry.shards_committed_time is not None
    return Item(f"{text}, which is overdue", "bring back what cannot be reached" if away else _START)


def _committed(entry: LedgerEntry, found: _Found, shard_count: int) -> _Doubt:
    """It is decided, and has an end to reach: every shard, then the cache."""
    missing = [shard for shard in range(shard_count) if entry.id not in found.fences.get(shard, ())]
    if missing:
        return _Doubt(
            f"it is decided, and not known to be committed on {_named(missing, found.silent)}",
            "recovery commits it there",
        )
    if entry.shards_committed_time is not None:
        return _Doubt(
            "all shards have committed, and the cache cannot be told",
            "it is done when the cache can be reached, or SEGSVC_CACHE_TTL_S and some minutes after the last commit",
        )
    return _Doubt("all shards have committed", "recovery drops what the cache has of before")
