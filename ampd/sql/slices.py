"""Long computations in slices, so that the event loop goes on in between. Pure but for the clock.

A thread would not do: it shares the interpreter's lock, and could not be stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from time import monotonic
from typing import TypeAlias, TypeVar

S = TypeVar("S")
T = TypeVar("T")

Slices: TypeAlias = Generator[None, None, T]  # yields where it can be interrupted, which should be every millisecond

_SLICE_SECS = 0.002
_until = 0.0  # when the event loop is to have its next turn, by the clock; works that follow one another share it


def at_once(work: Slices[T]) -> T:
    """Do all of the work and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def mapping(function: Callable[[S], T], items: Iterable[S]) -> Slices[tuple[T, ...]]:
    """Return, in slices, what a function returns for each item."""
    results = []
    for item in items:
        results.append(function(item))
        yield
    return tuple(results)


async def in_slices(work: Slices[T]) -> T:
    """Do the work, let others have the event loop every few milliseconds, and return its result."""
    global _until  # noqa: PLW0603 - one number, and at worst a turn comes a slice later
    from anyio.lowlevel import checkpoint

    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        if monotonic() >= _until:
            await checkpoint()
            _until = monotonic() + _SLICE_SECS
