"""Searches the states that a model can reach for one that breaks a promise, or from which no good state is left."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
Following = Callable[[S], Iterable[S]]
"""State -> the states that can be next."""


@dataclass(frozen=True)
class Search(Generic[S]):
    """What a search found.

    Attributes:
        reached: all states that were visited; all that exist, if ``trace`` is empty.
        trace: the shortest way to a bad state; empty if none can be reached.
    """

    reached: Iterable[S]
    states: int
    trace: tuple[S, ...]


def search(first: S, following: Following[S], bad: Callable[[S], bool]) -> Search[S]:
    """Visit every state that can be reached, breadth first, until a bad one is found."""
    came_from: dict[S, S | None] = {first: None}
    frontier = deque([first])

    while frontier:
        state = frontier.popleft()
        for after in following(state):
            if after in came_from:
                continue
            came_from[after] = state
            if bad(after):
                return Search(came_from.keys(), len(came_from), tuple(_way_to(after, came_from)))
            frontier.append(after)

    return Search(came_from.keys(), len(came_from), ())


def _way_to(state: S, came_from: dict[S, S | None]) -> list[S]:
    way = [state]
    while (before := came_from[way[0]]) is not None:
        way.insert(0, before)
    return way


def stuck(first: S, steps: Following[S], losses: Following[S], good: Callable[[S], bool]) -> S | None:
    """A state from which no good state can be reached by steps alone; None if no such state exists.

    Args:
        steps: what processes do.
        losses: what a server loses: it leads to states, but is no way out of one.
    """
    came_from: dict[S, list[S]] = defaultdict(list)
    reached = {first}
    frontier = [first]

    while frontier:
        state = frontier.pop()
        following = list(steps(state))
        for after in following:
            came_from[after].append(state)
        for after in (*following, *losses(state)):
            if after not in reached:
                reached.add(after)
                frontier.append(after)

    hopeful = [state for state in reached if good(state)]
    not_stuck = set(hopeful)
    while hopeful:
        for before in came_from[hopeful.pop()]:
            if before not in not_stuck:
                not_stuck.add(before)
                hopeful.append(before)

    return next(iter(reached - not_stuck), None)
