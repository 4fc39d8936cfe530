"""What ``segsvc doctor`` reports about operations and transactions in doubt: since when, why, what will end them."""

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
class _Pending:
    """Why something has not ended, and what will end it. Each completes a sentence."""

    why: str
    end: str

    def __str__(self) -> str:
        return f"{self.why}; {self.end}"


@dataclass(slots=True)
class _ShardAnswers:
    """The answers of the shards.

    Attributes:
        unreachable: shards that did not answer.
        fences: for each shard that answered, the operations that have taken effect there.
    """

    prepared: list[tuple[int, PreparedTransaction]] = field(default_factory=list)
    fences: dict[int, frozenset[UUID]] = field(default_factory=dict)
    unreachable: set[int] = field(default_factory=set)


def in_doubt(settings: Settings) -> Sequence[Item]:
    """Every prepared transaction and every operation that has not ended. A database that does not answer hides nothing
    else."""
    service = Check(settings, with_cache=False)
    try:
        answers = _ask_shards(service, settings.shard_count)
        gids = {transaction.gid: Gid.parse(transaction.gid) for _, transaction in answers.prepared}
        # Read after the shards: an operation is in the ledger before any of its transactions is prepared.
        asked_for = {gid.operation_id for gid in gids.values() if gid is not None}
        try:
            catalog = service.reads.catalog(fence_ttl_s=0, asked_for=asked_for)
        except Exception as error:  # noqa: BLE001  # cannot be reached, or is not a catalog: the check of the databases says which
            del error
            catalog = None
    finally:
        service.close()

    return [
        *(
            Item(f"shard {shard}: its prepared transactions cannot be read", _SEE_ABOVE)
            for shard in sorted(answers.unreachable)
        ),
        *(
            _transaction_item(shard, transaction, gids[transaction.gid], catalog, settings, answers.unreachable)
            for shard, transaction in answers.prepared
        ),
        *(_operation_items(catalog, answers, settings.shard_count) if catalog is not None else ()),
    ]


def _ask_shards(service: Check, shard_count: int) -> _ShardAnswers:
    answers = _ShardAnswers()

    def ask(shard: int) -> None:
        try:
            with service.reads.shard(shard) as snapshot:
                answers.fences[shard] = snapshot.fences()
                answers.prepared += [(shard, transaction) for transaction in snapshot.prepared()]
        except Exception as error:  # noqa: BLE001  # cannot be reached, or is not a shard: the check of the databases says which
            del error
            answers.unreachable.add(shard)

    fan_out = ThreadFanOut(SERVERS_AT_ONCE)
    try:
        fan_out(ask, range(shard_count))
    finally:
        fan_out.close()
    answers.prepared.sort(key=lambda item: (item[0], item[1].gid))
    return answers


# -- prepared transactions ------------------------------------------------------------------------------------------


def _transaction_item(
    shard: int,
    transaction: PreparedTransaction,
    gid: Gid | None,
    catalog: CatalogView | None,
    settings: Settings,
    unreachable: Collection[int],
) -> Item:
    where = f"shard {shard}: {transaction.gid} is prepared for {transaction.age_s:.0f} s"
    if gid is None or gid.cluster != settings.cluster:
        return Item(
            f"{where}; it does not belong to this installation", "ask its owner; it keeps its locks and blocks vacuum"
        )

    if catalog is None:
        text = f"{where}; the catalog, which alone decides, cannot be read; it stays until the catalog is back"
        return Item(text, _SEE_ABOVE)

    entry = next((entry for entry in catalog.operations if entry.id == gid.operation_id), None)
    if entry is None or gid.shard != shard:
        remedy = "find out where it came from before ending it by hand with COMMIT or ROLLBACK PREPARED"
        return Item(f"{where}; the ledger has no such operation on this shard", remedy)
    if entry.state is OperationState.QUEUED:
        text = f"{where}: {entry.title}; it has not started, so the catalog seems to be older than this shard"
        return Item(text, "compare the backups that were restored; it ends when its operation does")

    text = f"{where}: {entry.title}; {_why_prepared(entry, catalog, settings.shard_count, unreachable)}"
    if overdue_s(transaction, entry, catalog.time) > IN_DOUBT_MAX_S:
        return Item(f"{text}, which is overdue", _START)
    return Item(text)


def _why_prepared(entry: LedgerEntry, catalog: CatalogView, shard_count: int, unreachable: Collection[int]) -> _Pending:
    if entry.state is OperationState.PREPARING:
        return _preparing(entry, catalog.time, shard_count, unreachable)
    if entry.state is OperationState.COMMITTED:
        return _Pending("it is decided, but not committed here yet", "recovery commits it")
    if entry.state is OperationState.ABORTED:
        metadata: Mapping[str, str] = entry.failure.metadata if entry.failure is not None else {}
        reason = metadata.get("why") or (entry.failure.reason if entry.failure is not None else "")
        return _Pending(f"it was aborted ({reason})" if reason else "it was aborted", "recovery rolls it back")
    return _Pending("every shard has its work, so this is a second copy", "recovery rolls it back")


def _preparing(entry: LedgerEntry, now: datetime, shard_count: int, unreachable: Collection[int]) -> _Pending:
    missing = [shard for shard in range(shard_count) if shard not in entry.voted]
    if entry.deadline is not None and entry.deadline <= now:
        late = (
            f"{_shard_list(missing, unreachable)} did not vote"
            if missing
            else "all shards have voted, but no decision came"
        )
        return _Pending(f"{late} in time", "a front or recovery aborts it and rolls it back")
    if not missing:
        return _Pending("all shards have voted for it", "recovery decides it")
    until = entry.deadline.isoformat(timespec="seconds") if entry.deadline else "its deadline"
    return _Pending(
        f"it waits for the vote of {_shard_list(missing, unreachable)}",
        f"recovery sends what is missing again, and aborts it at {until}",
    )


def _shard_list(shards: Sequence[int], unreachable: Collection[int]) -> str:
    names = [f"{shard} (out of reach)" if shard in unreachable else str(shard) for shard in shards]
    return f"{'shard' if len(names) == 1 else 'shards'} {', '.join(names)}"


# -- operations -----------------------------------------------------------------------------------------------------


def _operation_items(catalog: CatalogView, answers: _ShardAnswers, shard_count: int) -> Iterator[Item]:
    """Each operation that has started and not ended. For the operations in the queue, only how many and since when."""
    waiting = sorted(
        (entry for entry in catalog.operations if entry.state is OperationState.QUEUED), key=lambda e: e.create_time
    )
    started = [entry for entry in catalog.operations if entry.state.in_flight]

    for entry in started:
        yield _started_item(entry, catalog, answers, shard_count)
    if waiting:
        age_s = (catalog.time - waiting[0].create_time).total_seconds()
        text = f"{len(waiting)} in the queue, for up to {age_s:.0f} s; "
        if started:
            yield Item(f"{text}each starts when the one before it has ended")
        else:
            overdue = age_s > IN_DOUBT_MAX_S
            end = "recovery starts the oldest"
            yield Item(f"{text}{end}, which is overdue" if overdue else f"{text}{end}", _START if overdue else "")


def _started_item(entry: LedgerEntry, catalog: CatalogView, answers: _ShardAnswers, shard_count: int) -> Item:
    committed = entry.state is OperationState.COMMITTED
    since = entry.commit_time if committed else entry.start_time
    age_s = (catalog.time - since).total_seconds() if since else 0.0
    doubt = (
        _committed(entry, answers, shard_count)
        if committed
        else _preparing(entry, catalog.time, shard_count, answers.unreachable)
    )
    text = f"{entry.title} for {age_s:.0f} s; {doubt}"
    late_s = age_s if committed else (catalog.time - entry.deadline).total_seconds() if entry.deadline else 0.0
    if late_s <= IN_DOUBT_MAX_S:
        return Item(text)
    outage = bool(answers.unreachable) or entry.shards_committed_time is not None
    return Item(f"{text}, which is overdue", "bring back the server that cannot be reached" if outage else _START)


def _committed(entry: LedgerEntry, answers: _ShardAnswers, shard_count: int) -> _Pending:
    """Why a committed operation is not done: a shard or the cache is missing."""
    missing = [shard for shard in range(shard_count) if entry.id not in answers.fences.get(shard, ())]
    if missing:
        return _Pending(
            f"it is decided, but not known to be committed on {_shard_list(missing, answers.unreachable)}",
            "recovery commits it there",
        )
    if entry.shards_committed_time is not None:
        return _Pending(
            "all shards have committed, but the cache cannot be invalidated",
            "it is done when the cache can be reached, or SEGSVC_CACHE_TTL_S and some minutes after the last commit",
        )
    return _Pending("all shards have committed", "recovery drops the outdated cache entries")
