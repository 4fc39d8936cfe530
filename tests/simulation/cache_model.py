"""The cache protocol as an explicit-state model: it explores every interleaving of its steps and every loss.

The model has one shard and one user; a few loads and one writer at a time, each of which may stall between any two
steps or die; bulk operations; and a server that loses any key, loses all keys, or restarts as another run with older
data. In every state the model asks one question: what does a read answer now?

Nonces are random, so two nonces are equal only if one is a copy of the other: it is enough to know of each whether it
is the one in force. The model is small enough to read in one sitting. Explore it before you change a rule.

Here a bulk change drops the generation, which is always allowed. What it does usually is in ``patch_model``, which also
judges the simulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.simulation.model_search import search
from tests.simulation.model_search import stuck as find_stuck

DEAD = -1
"""Owner of a lease or bar whose process never comes back for it."""


@dataclass(frozen=True)
class Rules:
    """The rules of the protocol; a weakening turns one of them off.

    Attributes:
        own_token: a fill needs its own lease, not just any.
        lease_replaces_stale: a lease may replace a value that no read would use.
        select_after_lease: the shard is read after the lease's reply, not before.
        nonce_of_lease: the value carries the generation of its lease, not the one at the fill.
        bar: a writer that is not repeated puts a bar in before its commit.
        delete_after_commit: a writer deletes the key before it acknowledges.
        duplicates_delete: an event that was applied already deletes the key, too.
        drop_after_commit: the generation is dropped after the bulk commit, not before.
        leases_end: leases and bars of dead processes end by themselves.
    """

    own_token: bool = True
    lease_replaces_stale: bool = True
    select_after_lease: bool = True
    nonce_of_lease: bool = True
    bar: bool = True
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


# The user's key: None; ("L", load); ("B",) a bar; ("V", nonce in force?, operation, version).
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
    """idle; or an event that is committed (not acknowledged), or dead (committed, and delivered again); or a call,
    which is not repeated, that is begun (before its commit), then called (committed, and not answered)."""
    intact: bool = True
    """No key was lost since the call began. If so, the caller's death after the commit must be harmless."""
    bulk: str = "idle"
    """idle; or dropped (by the weakening, before the commit); or committed (and not done)."""
    snapshot: Key = None
    restores: int = 0

    @property
    def answer(self) -> tuple[int, int] | None:
        """What a read finds in the cache; None means a miss."""
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
    """Lose the generation: every value and lease with its nonce is useless from now on."""
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
            # The generation is another run's or absent: a fresh nonce is drawn, and no value has it yet.
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

    # The load dies or never continues: no process has its token.
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
    """The weakening in which the shard is read before the lease is requested."""
    if rules.select_after_lease or state.loads[n] is not None:
        return
    yield _with_load(state, n, (False, (state.operation, state.version)))


def _writer(state: State, rules: Rules, bounds: Bounds) -> Iterator[State]:
    if state.writer == "idle" and state.version < bounds.versions:
        yield replace(state, writer="begun", intact=True, user=("B",) if rules.bar else state.user)
        # An event is delivered until it is acknowledged, so it needs no bar.
        yield replace(state, writer="committed", version=state.version + 1)
    elif state.writer == "begun":
        yield replace(state, writer="called", version=state.version + 1)
        yield replace(state, writer="idle")  # it died before its commit
    elif state.writer == "called":
        yield _acknowledged(state, rules.delete_after_commit)
        # The call dies and is not repeated. Reads must still see what it committed, once its bar has ended.
        yield replace(state, writer="idle", acknowledged=state.version if state.intact else state.acknowledged)
    elif state.writer == "committed":
        yield _acknowledged(state, rules.delete_after_commit)
        yield replace(state, writer="dead")
    elif state.writer == "dead":
        # The event is delivered again, and was applied already.
        yield _acknowledged(state, rules.duplicates_delete and rules.delete_after_commit)


def _acknowledged(state: State, deletes: bool) -> State:
    return replace(state, writer="idle", user=None if deletes else state.user, acknowledged=state.version)


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


def _ends(state: State, rules: Rules) -> Iterator[State]:
    """Leases and bars end by themselves. A bar does not end before its writer's commit: the session ends first."""
    held = state.user is not None and state.user[0]
    if rules.leases_end and (held == "L" or (held == "B" and state.writer != "begun")):
        yield replace(state, user=None)


def _others(state: State) -> Iterator[State]:
    """A miss of another user, or a refused miss of this user, draws a generation if none exists."""
    yield replace(state, generation=True)


def _losses(state: State, bounds: Bounds) -> Iterator[State]:
    lost = replace(state, intact=False)
    yield replace(lost, user=None)
    yield _lose_generation(state)
    yield replace(_lose_generation(lost), user=None)
    if state.restores < bounds.restores:
        yield replace(state, snapshot=state.user)
        # Another run: no generation of an earlier one is in force.
        yield replace(_lose_generation(lost), user=_without_nonce(state.snapshot), restores=state.restores + 1)


def steps(state: State, rules: Rules, bounds: Bounds) -> Iterator[State]:
    """The possible next states, as long as nothing is lost."""
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
    yield from _ends(state, rules)
    yield from _others(state)


@dataclass(frozen=True)
class Verdict:
    """What a search found.

    Attributes:
        trace: the shortest way to an answer that is too old; empty if no such answer exists.
    """

    states: int
    trace: tuple[State, ...]


def _first(bounds: Bounds) -> State:
    return State(loads=(None,) * bounds.loads)


def explore(rules: Rules, bounds: Bounds | None = None) -> Verdict:
    """Visit every state that can be reached, breadth first, until an answer is too old."""
    limits = bounds or Bounds()
    found = search(
        _first(limits),
        lambda state: (*steps(state, rules, limits), *_losses(state, limits)),
        lambda state: state.stale,
    )
    return Verdict(found.states, found.trace)


def stuck(rules: Rules, bounds: Bounds) -> State | None:
    """A state from which the user is never a hit again unless a key is lost; None if no such state exists."""
    return find_stuck(
        _first(bounds),
        lambda state: steps(state, rules, bounds),
        lambda state: _losses(state, bounds),
        lambda state: state.answer is not None,
    )
