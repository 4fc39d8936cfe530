"""Patches of the cache as an explicit-state model: bulk changes that leave the entries where they are.

The model has one shard, one user and two segments. Operations 1, 2, … are committed one after the other; odd ones set
segment X, even ones segment Y. The user changes by events and by calls. One operation may be an import whose overrides
end. An entry carries the epoch (the number of the last operation) of its own snapshot; a publisher appends a patch
for each operation to the generation's list, and a reader lays the later patches over an older entry. Every step is one
atomic step at the cache's server or at PostgreSQL. Between two steps any process may stall for ever or die; publishers
of an operation may be many, and late; the server may lose any key at any time.

A value of a segment names all that it was made of: the operation that set it, the version of the user, and the state
of the override. So a list that mixes two moments shows. In every state the model asks: what does a read answer now? It
must be the whole truth of one moment that is not older than the newest operation reported done, the newest change
acknowledged, and the last end of an override.

``cache_model`` has the steps of a single user's entry with their own weakenings; here those steps hold. Explore this
model before you change a rule of the patches.

One rule of the protocol has no weakening here: a patch that would leave a gap in the list drops the generation instead.
A gap is never found to harm, because under one nonce no entry is older than what was published before the nonce was
drawn. The rule is kept as a belt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from tests.simulation.model_search import search
from tests.simulation.model_search import stuck as find_stuck

T = TypeVar("T")
DEAD = -1
"""Owner of a lease whose process never comes back for it."""


@dataclass(frozen=True)
class Rules:
    """The rules of the protocol; a weakening turns one of them off.

    Attributes:
        epoch_with_bits: an entry's epoch is read in one snapshot with its bits, not after them.
        names_changed: a patch names the users who changed, and their older entries are misses.
        changed_since_before: ... who changed from the operation before on, not only since this one.
        one_snapshot: the bits of a patch and who changed are of one snapshot, not one read after the other.
        publish_after_commit: a patch is read after its operation's commit.
        publish_before_done: an operation is reported done after its patch is published.
        fresh_tokens: each publication has keys of its own, not those of its operation.
        in_order: a patch that is not newer than the newest one in the list is not appended.
        list_has_an_end: an entry that is older than the oldest patch in the list can bring is a miss.
        nonce_of_lease: an entry carries the generation of its lease, not the one at the fill.
        ends_in_patch: a patch says when the overrides that its operation brought end; older entries are misses then.
        lease_replaces_useless: a lease may replace an entry that the patches do not bring up to date.
    """

    epoch_with_bits: bool = True
    names_changed: bool = True
    changed_since_before: bool = True
    one_snapshot: bool = True
    publish_after_commit: bool = True
    publish_before_done: bool = True
    fresh_tokens: bool = True
    in_order: bool = True
    list_has_an_end: bool = True
    nonce_of_lease: bool = True
    ends_in_patch: bool = True
    lease_replaces_useless: bool = True


@dataclass(frozen=True)
class Bounds:
    """Attributes:
    publishers: how many there are at a time. 0: an operation is published in one step, which shows all sights.
    patches: most patches in the list; the oldest falls out.
    ending: number of the operation that is an import with an end; 0: none is.
    reader: a reader gets the patches later than the generation and the entry.
    calls: the user changes by calls, too, which nobody repeats.
    """

    operations: int = 2
    versions: int = 1
    publishers: int = 1
    loads: int = 1
    patches: int = 2
    ending: int = 0
    reader: bool = False
    calls: bool = False


class Value(NamedTuple):
    """What a segment's place in the user's list was made of.

    Attributes:
        override: 0: there is none; 1: it is in force; 2: it has ended.
    """

    operation: int
    version: int
    override: int


class Content(NamedTuple):
    """Of a patch: the segment's bit of the user, whether the user changed, whether the operation brought an end."""

    value: Value
    changed: bool
    ends: bool


class Entry(NamedTuple):
    """A value in the user's key. ``ends``: an override that it depends on will end."""

    in_force: bool
    epoch: int
    x: Value
    y: Value
    ends: bool


class Load(NamedTuple):
    """A load that has its lease.

    Attributes:
        in_force: the nonce of its lease is the one in force.
        read: what it has read; None: nothing yet.
        whole: its epoch was read, too.
    """

    in_force: bool
    read: Entry | None = None
    whole: bool = True


class Publisher(NamedTuple):
    """A publisher of an operation that has read its patch, or half of it.

    Attributes:
        changed: None; or, by the weakening, what was read before the bits.
        content: None as long as the bits are not read.
        written: its chunks are written.
    """

    operation: int
    changed: bool | None
    content: Content | None
    written: bool = False


class Reader(NamedTuple):
    """A reader that has a generation and an entry, what was promised then, and the list of then."""

    in_force: bool
    newest: int
    patches: Patches
    entry: Entry
    done: int
    acknowledged: int
    ended: bool


Patches = tuple[tuple[int, Content | None], ...]
"""Operation and content, oldest first. None: its chunks are lost."""
Key = tuple[str, int] | Entry | None
"""The user's key: absent; ("L", load) a lease; ("B", 0) a bar; or a value."""


class Sight(NamedTuple):
    """What a user's key and PostgreSQL show at one moment, without knowledge of the steps that processes do next."""

    generation: bool
    """A generation exists, of this run of the server."""
    key: str
    """The first character of the user's key; empty if the key is absent."""
    hit: str
    """"": a miss; "entry": the entry as it is; "patched": the entry with patches laid over it."""
    newest: tuple[bool, bool]
    """Whether the answer is of the newest operation, and of the user's newest version."""
    promised: tuple[bool, bool]
    """Whether it is at least of the operation last reported done, and at least of the version last acknowledged."""
    pending: tuple[bool, bool]
    """Whether a committed operation is not yet reported done, and whether a committed version is not acknowledged."""


def sight(
    *,
    generation: bool,
    key: str,
    hit: str,
    answer: tuple[int, int] | None,
    committed: tuple[int, int],
    promised: tuple[int, int],
) -> Sight:
    """Build a sight. ``answer``: of a hit. Each pair is (operation, version)."""
    at = committed if answer is None else answer

    return Sight(
        generation,
        key,
        hit,
        (at[0] == committed[0], at[1] == committed[1]),
        (at[0] >= promised[0], at[1] >= promised[1]),
        (committed[0] > promised[0], committed[1] > promised[1]),
    )


class State(NamedTuple):
    operation: int = 0
    """The last one that was committed: the shard's epoch."""
    stage: str = "done"
    """Of that operation: committed; published; or done."""
    done: int = 0
    changed: tuple[int, ...] = ()
    """For each version of the user, the epoch in which it was committed."""
    acknowledged: int = 0
    ended: bool = False
    """The import's overrides have ended."""
    newest: int | None = None
    """Of the generation: the newest patch, 0 if there is none. None: there is no generation."""
    patches: Patches = ()
    """The generation's list; empty if it has none yet, or if it is lost."""
    chunks: tuple[Content | None, ...] = ()
    """By the weakening, which names chunks by their operation: the content of each."""
    publishers: tuple[Publisher | None, ...] = ()
    user: Key = None
    loads: tuple[Load | None, ...] = ()
    writer: str = "idle"
    """idle; or an event that is committed, deleted (the key was), or dead (it is delivered again); or a call that is
    begun (before its commit), then called (committed, and not answered)."""
    intact: bool = True
    """No key was lost since the call began. If so, the caller's death after the commit must be harmless."""
    reader: Reader | None = None

    @property
    def version(self) -> int:
        return len(self.changed)


_X, _Y = 1, 0


def _value(segment: int, epoch: int, version: int, ended: bool, ending: int) -> Value:
    """The truth about a segment after so many operations and changes."""
    last = epoch if epoch % 2 == segment else epoch - 1
    mine = ending and ending % 2 == segment and epoch >= ending
    return Value(max(0, last), version, 1 + ended if mine else 0)


def _entry(state: State, bounds: Bounds, in_force: bool) -> Entry:
    """What a load reads now."""
    now = (state.operation, state.version, state.ended, bounds.ending)
    return Entry(
        in_force,
        state.operation,
        _value(_X, *now),
        _value(_Y, *now),
        bool(bounds.ending) and state.operation >= bounds.ending and not state.ended,
    )


# -- reading --------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """Attributes:
    epoch: of the newest operation in it.
    patched: patches were laid over the entry.
    """

    x: Value
    y: Value
    epoch: int
    patched: bool


def _lay_over(state: State, rules: Rules, entry: Entry, patches: Patches, ended: bool) -> Answer | None:
    """An entry that is older than the newest patch, brought up to date; None: a miss."""
    if not patches or (rules.list_has_an_end and entry.epoch < patches[0][0] - 1):
        return None

    x, y = entry.x, entry.y
    for operation, published in patches:
        if operation <= entry.epoch:
            continue
        content = published if rules.fresh_tokens else state.chunks[operation]
        if content is None or (content.changed and rules.names_changed):
            return None
        if content.ends and ended and rules.ends_in_patch:
            return None
        if operation % 2 == _X:
            x = content.value
        else:
            y = content.value

    return Answer(x, y, max(entry.epoch, patches[-1][0]), True)


def _read(
    state: State, rules: Rules, entry: Entry, in_force: bool, newest: int | None, patches: Patches, ended: bool
) -> Answer | None:
    if newest is None or not in_force or (entry.ends and ended):
        return None
    if entry.epoch >= newest:
        return Answer(entry.x, entry.y, entry.epoch, False)
    return _lay_over(state, rules, entry, patches, ended)


def answer(state: State, rules: Rules) -> Answer | None:
    """What a read finds in the cache now; None: a miss."""
    user = state.user
    if not isinstance(user, Entry):
        return None
    return _read(state, rules, user, user.in_force, state.newest, state.patches, state.ended)


def _true(state: State, bounds: Bounds, found: Answer, done: int, acknowledged: int, ended: bool) -> bool:
    """Whether an answer is the truth of one moment, none older than these."""
    for epoch in range(done, state.operation + 1):
        before = sum(1 for at in state.changed if at < epoch)
        after = sum(1 for at in state.changed if at <= epoch)
        for version in range(max(before, acknowledged), after + 1):
            for over in {ended, state.ended}:
                now = (epoch, version, over, bounds.ending)
                if (found.x, found.y) == (_value(_X, *now), _value(_Y, *now)):
                    return True
    return False


def wrong(state: State, rules: Rules, bounds: Bounds) -> bool:
    """Whether a read answers now what is not the whole truth of one moment that is new enough."""
    found = answer(state, rules)
    if found is not None and not _true(state, bounds, found, state.done, state.acknowledged, state.ended):
        return True

    reader = state.reader
    if reader is None:
        return False

    # The reader has the list of the moment of its entry in its memory, or gets the present one.
    lists = [(reader.newest, reader.patches)]
    if reader.in_force and state.newest is not None:
        lists.append((reader.newest, state.patches))
    answers = [_read(state, rules, reader.entry, True, *each, reader.ended) for each in lists]
    promised = (reader.done, reader.acknowledged, reader.ended)
    return any(found is not None and not _true(state, bounds, found, *promised) for found in answers)


def sight_of(state: State, rules: Rules) -> Sight:
    found, user = answer(state, rules), state.user
    version = None if found is None else found.x.version
    return sight(
        generation=state.newest is not None,
        key="" if user is None else "V" if isinstance(user, Entry) else user[0],
        hit="" if found is None else "patched" if found.patched else "entry",
        answer=None if found is None or version is None else (found.epoch, version),
        committed=(state.operation, state.version),
        promised=(state.done, state.acknowledged),
    )


# -- steps ----------------------------------------------------------------------------------------------------------


def _put(items: tuple[T, ...], n: int, item: T) -> tuple[T, ...]:
    return (*items[:n], item, *items[n + 1 :])


def _lose_generation(state: State) -> State:
    """Lose the generation: every value, lease and list with its nonce is useless from now on."""
    user, reader = state.user, state.reader
    return state._replace(
        newest=None,
        patches=(),
        user=user._replace(in_force=False) if isinstance(user, Entry) else user,
        loads=tuple(None if load is None else load._replace(in_force=False) for load in state.loads),
        reader=None if reader is None else reader._replace(in_force=False),
    )


def _loads(state: State, rules: Rules, bounds: Bounds, n: int) -> Iterator[State]:
    load = state.loads[n]
    if load is None:
        # A miss: the lease draws a generation if there is none.
        newest = 0 if state.newest is None else state.newest
        user = state.user
        useless = isinstance(user, Entry) and answer(state, rules) is None
        outdated = isinstance(user, Entry) and (state.newest is None or not user.in_force)
        if user is None or (useless if rules.lease_replaces_useless else outdated):
            yield state._replace(newest=newest, user=("L", n), loads=_put(state.loads, n, Load(True)))
        return

    if load.read is None:
        # The weakening gets the bits first, then the epoch.
        first = load._replace(read=_entry(state, bounds, True), whole=rules.epoch_with_bits)
        yield state._replace(loads=_put(state.loads, n, first))
    elif not load.whole:
        then = load._replace(read=load.read._replace(epoch=state.operation), whole=True)
        yield state._replace(loads=_put(state.loads, n, then))
    else:
        in_force = (load.in_force if rules.nonce_of_lease else True) and state.newest is not None
        filled = load.read._replace(in_force=in_force) if state.user == ("L", n) else state.user
        yield state._replace(user=filled, loads=_put(state.loads, n, None))

    # It dies, or never continues: no process has its token.
    forgotten = ("L", DEAD) if state.user == ("L", n) else state.user
    yield state._replace(user=forgotten, loads=_put(state.loads, n, None))


def _writer(state: State, bounds: Bounds) -> Iterator[State]:
    changed = (*state.changed, state.operation)
    if state.writer == "idle" and state.version < bounds.versions:
        # A user who changes is noted under the epoch that is committed: an operation's lock keeps events out.
        yield state._replace(writer="committed", changed=changed)
        if bounds.calls:
            yield state._replace(writer="begun", intact=True, user=("B", 0))
    elif state.writer == "begun":
        yield state._replace(writer="called", changed=changed)
        yield state._replace(writer="idle")
    elif state.writer == "called":
        yield state._replace(writer="deleted", user=None)
        yield state._replace(writer="idle", acknowledged=state.version if state.intact else state.acknowledged)
    elif state.writer in ("committed", "dead"):
        yield state._replace(writer="deleted", user=None)
        if state.writer == "committed":
            yield state._replace(writer="dead")
    elif state.writer == "deleted":
        yield state._replace(writer="idle", acknowledged=state.version)


def _bulk(state: State, rules: Rules, bounds: Bounds) -> Iterator[State]:
    if state.stage == "done" and state.operation < bounds.operations:
        yield state._replace(operation=state.operation + 1, stage="committed")
    if state.stage == "published" or (state.stage == "committed" and not rules.publish_before_done):
        yield state._replace(stage="done", done=state.operation)
    if state.stage == "committed":
        if not bounds.publishers:
            content = _content(state, bounds, state.operation, _who_changed(state, rules, state.operation))
            yield _append(state, rules, bounds, state.operation, content)._replace(stage="published")
        # Whatever goes wrong with publishing, dropping the generation is as good.
        yield _lose_generation(state)._replace(stage="published")
        # Without a cache at hand the operation waits until every older entry has ended, and every lease before.
        old = isinstance(state.user, Entry) and state.user.epoch < state.operation
        leased = isinstance(state.user, tuple) and state.user[0] == "L"
        yield state._replace(user=None if old or leased else state.user, stage="published")


def _publishers(state: State, rules: Rules, bounds: Bounds, n: int) -> Iterator[State]:
    publisher = state.publishers[n]
    if publisher is None:
        early = not rules.publish_after_commit and state.stage == "done" and state.operation < bounds.operations
        for operation in range(1, state.operation + 1 + early):
            named = _who_changed(state, rules, operation)
            begun = Publisher(operation, named, _content(state, bounds, operation, named))
            if not rules.one_snapshot:
                begun = begun._replace(content=None)
            yield state._replace(publishers=_put(state.publishers, n, begun))
        return

    yield state._replace(publishers=_put(state.publishers, n, None))  # it dies
    operation, changed, content, written = publisher
    if content is None:
        assert changed is not None
        read = publisher._replace(content=_content(state, bounds, operation, changed))
        yield state._replace(publishers=_put(state.publishers, n, read))
    elif not written and not rules.fresh_tokens:
        # Chunks under a fresh token are seen by nobody before they are in the list: there is no step for them.
        chunks = _put(state.chunks, operation, content)
        written_out = _put(state.publishers, n, publisher._replace(written=True))
        yield state._replace(chunks=chunks, publishers=written_out)
    else:
        after = _append(state, rules, bounds, operation, content)
        mine = state.stage == "committed" and operation == state.operation
        yield after._replace(publishers=_put(state.publishers, n, None), stage="published" if mine else state.stage)


def _who_changed(state: State, rules: Rules, operation: int) -> bool:
    first = operation - rules.changed_since_before
    return any(at >= first for at in state.changed)


def _content(state: State, bounds: Bounds, operation: int, changed: bool) -> Content:
    # The weakening that publishes before the commit knows the bits from the prepared work.
    epoch = max(state.operation, operation)
    value = _value(operation % 2, epoch, state.version, state.ended, bounds.ending)
    return Content(value, changed, operation == bounds.ending and not state.ended)


def _append(state: State, rules: Rules, bounds: Bounds, operation: int, content: Content) -> State:
    """The server's script, atomic."""
    newest = state.newest
    if newest is None or (newest >= operation and rules.in_order):
        return state
    if newest and operation > newest + 1:
        return _lose_generation(state)
    patches = (*state.patches, (operation, content))[-bounds.patches :]
    return state._replace(newest=operation, patches=patches)


def _reader(state: State, rules: Rules) -> Iterator[State]:
    if state.reader is not None:
        yield state._replace(reader=None)
    elif isinstance(state.user, Entry) and state.user.in_force and state.newest is not None:
        promised = (state.done, state.acknowledged, state.ended)
        yield state._replace(reader=Reader(True, state.newest, state.patches, state.user, *promised))


def steps(state: State, rules: Rules, bounds: Bounds) -> Iterator[State]:
    """The possible next states, as long as nothing is lost."""
    for n in range(bounds.loads):
        yield from _loads(state, rules, bounds, n)
    for n in range(bounds.publishers):
        yield from _publishers(state, rules, bounds, n)

    yield from _writer(state, bounds)
    yield from _bulk(state, rules, bounds)
    if bounds.reader:
        yield from _reader(state, rules)

    if bounds.ending and state.operation >= bounds.ending and not state.ended:
        yield state._replace(ended=True)

    # Leases and bars of dead processes end; a bar does not end before its writer's commit.
    user = state.user
    if isinstance(user, tuple) and (user[0] == "L" or (user[0] == "B" and state.writer != "begun")):
        yield state._replace(user=None)

    if state.newest is None:
        yield state._replace(newest=0)  # by another user's miss


def losses(state: State) -> Iterator[State]:
    """What the server can lose."""
    if state.newest is not None:
        yield _lose_generation(state)
    if state.patches:
        yield state._replace(patches=())
    for n, (operation, content) in enumerate(state.patches):
        if content is not None:
            yield state._replace(patches=_put(state.patches, n, (operation, None)))
    if state.user is not None:
        yield state._replace(user=None, intact=False)


def _first(bounds: Bounds) -> State:
    return State(
        chunks=(None,) * (bounds.operations + 1),
        publishers=(None,) * bounds.publishers,
        loads=(None,) * bounds.loads,
    )


@dataclass(frozen=True)
class Verdict:
    """What a search found.

    Attributes:
        trace: the shortest way to a wrong answer; empty if no such answer exists.
        sights: all sights that can be reached.
    """

    states: int
    trace: tuple[State, ...]
    sights: frozenset[Sight]


def explore(rules: Rules, bounds: Bounds) -> Verdict:
    """Visit every state that can be reached, breadth first, until an answer is wrong."""
    found = search(
        _first(bounds),
        lambda state: (*steps(state, rules, bounds), *losses(state)),
        lambda state: wrong(state, rules, bounds),
    )
    sights = frozenset(sight_of(state, rules) for state in found.reached) if not found.trace else frozenset()
    return Verdict(found.states, found.trace, sights)


def stuck(rules: Rules, bounds: Bounds) -> State | None:
    """A state from which the user is never a hit again unless a key is lost; None if no such state exists."""
    return find_stuck(
        _first(bounds),
        lambda state: steps(state, rules, bounds),
        losses,
        lambda state: answer(state, rules) is not None,
    )
