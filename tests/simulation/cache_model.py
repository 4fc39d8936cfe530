"""The cache protocol as an explicit-state model: every interleaving of its steps, every loss, exhaustively.

One shard, one user. A few loads and one writer at a time, each of which may stall between any two steps or die; bulk
operations; a server that loses any key, all keys, or comes back as another run with older data. In every state the one
question is: what would a read be answered now?

Nonces are random, so two of them are the same only if one is a copy of the other: it is enough to know of each whether
it is the one in force. The model is small enough to read in one sitting, and is explored before a rule is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

DEAD = -1
"""Owner of a lease or block whose process will never come back for it."""


@dataclass(frozen=True)
class Rules:
    """The protocol; a weakening turns one of them off.

    Attributes:
        own_token: a fill needs its own lease, not just any.
        lease_replaces_stale: a lease may replace a value that no read would use.
        select_after_lease: the shard is read after the lease's reply, not before.
        nonce_of_lease: the value carries the generation of its lease, not the one at the fill.
        block: a writer whom nobody repeats puts a block in before its commit.
        delete_after_commit: a writer deletes the key before it acknowledges.
        duplicates_delete: so does an event that finds itself applied already.
        drop_after_commit: the generation is dropped after the bulk commit, not before.
        leases_end: leases and blocks of the dead end by themselves.
    """

    own_token: bool = True
    lease_replaces_stale: bool = True
    select_after_lease: bool = True
    nonce_of_lease: bool = True
    block: bool = True
    delete_after_commit: bool = True
    duplicates_delete: bool = True
    drop_after_commit: bool = True
    leases_end: bool = True


@dataclass(frozen=True)
class Bounds:
    loads: int = 2
    versions: int = 2
    operations: int = 2
    restores: int = 1


# The user's key: None; ("L", load); ("B",) a block; ("V", nonce in force?, operation, version).
Key = tuple[object, ...] | None
# A load: None, or (nonce in force?, what it read: None or (operation, version)).
Load = tuple[bool, tuple[int, int] | None] | None


@dataclass(frozen=True)
class State:
    operation: int = 0
    version: int = 0
    done: int = 0
    acknowledged: int = 0
    generation: bool = False
    user: Key = None
    loads: tuple[Load, ...] = ()
    writer: str = "idle"
    """idle, blocked (before its commit), committed (not acknowledged), dead (committed, and comes again)."""
    bulk: str = "idle"
    """idle, or dropped (by the weakening, before the commit), or committed (and not done)."""
    snapshot: Key = None
    restores: int = 0

    @property
    def answer(self) -> tuple[int, int] | None:
        """What a read finds in the cache; None: a miss."""
        if not self.generation or self.user is None or self.user[0] != "V" or not self.user[1]:
            return None
        return self.user[2], self.user[3]  # type: ignore[return-value]

    @property
    def stale(self) -> bool:
        found = self.answer
        return found is not None and (found[0] < self.done or found[1] < self.acknowledged)


def _without_nonce(key: Key) -> Key:
    return ("V", False, *key[2:]) if key is not None and key[0] == "V" else key


def _lose_generation(state: State) -> State:
    """Whatever carries its nonce is worth nothing from now on."""
    return replace(
        state,
        generation=False,
        user=_without_nonce(state.user),
        snapshot=_without_nonce(state.snapshot),
        loads=tuple(None if load is None else (False, load[1]) for load in state.loads),
    )


def _with_load(state: State, n: int, load: Load) -> State:
    return replace(state, loads=(*state.loads[:n], load, *state.loads[n + 1 :]))


def _loads(state: State, rules: Rules, n: int) -> Iterator[State]:
    load = state.loads[n]
    if load is None:
        replaceable = state.user is None or (
            state.user[0] == "V" and state.answer is None and rules.lease_replaces_stale
        )
        if replaceable:
            # Another run's or none: a fresh nonce, which nothing carries yet.
            read = None if rules.select_after_lease else (state.operation, state.version)
            yield _with_load(replace(state, generation=True, user=("L", n)), n, (True, read))
            if not rules.select_after_lease:
                return
        return
    in_force, read = load
    if read is None:
        yield _with_load(state, n, (in_force, (state.operation, state.version)))
    else:
        mine = state.user == ("L", n) or (not rules.own_token and state.user is not None and state.user[0] == "L")
        nonce = in_force if rules.nonce_of_lease else state.generation
        filled = replace(state, user=("V", nonce and state.generation, *read)) if mine else state
        yield _with_load(filled, n, None)
    # It dies, or is never heard of again: nobody has its token.
    forgotten = ("L", DEAD)
    yield _with_load(
        replace(
            state,
            user=forgotten if state.user == ("L", n) else state.user,
            snapshot=forgotten if state.snapshot == ("L", n) else state.snapshot,
        ),
        n,
        None,
    )


def _early_loads(state: State, rules: Rules, n: int) -> Iterator[State]:
    """The weakening by which the shard is read before the lease is asked for."""
    if rules.select_after_lease or state.loads[n] is not None:
        return
    yield _with_load(state, n, (False, (state.operation, state.version)))


def _writer(state: State, rules: Rules, bounds: Bounds) -> Iterator[State]:
    if state.writer == "idle" and state.version < bounds.versions:
        if rules.block:
            yield replace(state, writer="blocked", user=("B",))
        # An event, which is delivered until it is acknowledged, needs no block.
        yield replace(state, writer="committed", version=state.version + 1)
    elif state.writer == "blocked":
        yield replace(state, writer="committed", version=state.version + 1)
        yield replace(state, writer="idle")  # it died before its commit
    elif state.writer == "committed":
        user = None if rules.delete_after_commit else state.user
        yield replace(state, writer="idle", user=user, acknowledged=state.version)
        yield replace(state, writer="dead")
    elif state.writer == "dead":
        # It comes again, and finds itself applied.
        user = None if rules.duplicates_delete and rules.delete_after_commit else state.user
        yield replace(state, writer="idle", user=user, acknowledged=state.version)


def _bulk(state: State, rules: Rules, bounds: Bounds) -> Iterator[State]:
    if state.bulk == "idle" and state.operation < bounds.operations:
        if rules.drop_after_commit:
            yield replace(state, bulk="committed", operation=state.operation + 1)
        else:
            yield replace(_lose_generation(state), bulk="dropped")
    elif state.bulk == "dropped":
        yield replace(state, bulk="idle", operation=state.operation + 1, done=state.operation + 1)
    elif state.bulk == "committed":
        yield replace(_lose_generation(state), bulk="idle", done=state.operation)


def _server(state: State, rules: Rules, bounds: Bounds) -> Iterator[State]:
    yield replace(state, user=None)
    yield _lose_generation(state)
    if rules.leases_end and state.user is not None and state.user[0] in ("L", "B"):
        yield replace(state, user=None)
    if state.restores < bounds.restores:
        yield replace(state, snapshot=state.user)
        # Another run: no generation of an earlier one is in force.
        yield replace(_lose_generation(state), user=_without_nonce(state.snapshot), restores=state.restores + 1)


def successors(state: State, rules: Rules, bounds: Bounds) -> Iterator[State]:
    for n in range(bounds.loads):
        if rules.select_after_lease:
            yield from _loads(state, rules, n)
        else:
            yield from _early_loads(state, rules, n)
            load = state.loads[n]
            if load is not None and state.user is None:
                yield _with_load(replace(state, generation=True, user=("L", n)), n, (True, load[1]))
            if load is not None:
                yield from _loads(state, rules, n)
    yield from _writer(state, rules, bounds)
    yield from _bulk(state, rules, bounds)
    yield from _server(state, rules, bounds)


@dataclass(frozen=True)
class Verdict:
    """``trace``: the shortest way to a stale answer; empty: there is none. ``stuck``: a state from which no value can
    ever be cached again without a loss; None: there is none."""

    states: int
    trace: tuple[State, ...]


def explore(rules: Rules, bounds: Bounds | None = None) -> Verdict:
    """Visit every state that can be reached, breadth first."""
    bounds = bounds or Bounds()
    first = State(loads=(None,) * bounds.loads)
    came_from: dict[State, State | None] = {first: None}
    frontier = [first]
    while frontier:
        found: list[State] = []
        for state in frontier:
            for after in successors(state, rules, bounds):
                if after in came_from:
                    continue
                came_from[after] = state
                if after.stale:
                    trace: list[State] = []
                    step: State | None = after
                    while step is not None:
                        trace.append(step)
                        step = came_from[step]
                    return Verdict(len(came_from), tuple(reversed(trace)))
                found.append(after)
        frontier = found
    return Verdict(len(came_from), ())
