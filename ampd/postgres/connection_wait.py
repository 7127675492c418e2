"""Waiting for connections that others have: a full server or pooler, or a pool that is used up."""

from __future__ import annotations

import asyncio
import random
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

import anyio

from ampd.backoff import Backoff
from ampd.errors import AmpdError
from ampd.events import OnEvent, WaitingForConnection

if TYPE_CHECKING:
    from collections.abc import Iterator


class ConnectionsBusy(Exception):
    """Others have the connections that a run needs; nothing was begun. `failure` is what to raise if it stays so."""

    def __init__(self, failure: AmpdError) -> None:
        super().__init__(failure.message)
        self.failure = failure


class PoolInUse(ConnectionsBusy):
    """Every connection of the pool is in use."""


class HungUp(ConnectionsBusy):
    """The server has accepted the connection and closed it at once."""


class ConnectionWait:
    """One wait of a run for connections that others have: how long so far, and how it goes on; all in seconds."""

    def __init__(self, limit: float, on_event: OnEvent) -> None:
        self._backoff = Backoff(limit, longest_pause=_LONGEST_PAUSE_SECS)
        self._on_event = on_event
        self.begin()
        self.acquired()

    def acquired(self) -> None:
        """Reset the wait: the run has the connections that it needs."""
        self._backoff.renew()
        self.at_once: float = _AT_ONCE_SECS  # seconds to hold one connection while waiting for another to answer
        self.reason: str | None = None

    @property
    def left(self) -> float:
        """Return how many more seconds to wait."""
        return max(0, self._backoff.limit - self._backoff.waited)

    def begin(self) -> None:
        """Begin an attempt."""
        self._attempted = monotonic()

    def report(self) -> None:
        """Emit what is waited for, if it takes long and that was not said just now."""
        if self.reason is not None and self._backoff.should_report():
            waited, limit = self._backoff.waited, self._backoff.limit
            self._on_event(WaitingForConnection(reason=self.reason, waited=waited, limit=limit))

    async def pause(self, failure: AmpdError) -> None:
        """Wait, without a connection, before the next attempt.

        Raises:
            AmpdError: the failure, once the limit is reached.
        """
        self.check(failure)
        self.report()
        self.at_once = min(self.at_once * 2, _AT_ONCE_LONGEST_SECS)
        # Whoever stands in a pooler's queue, with one connection perhaps, keeps others from having two.
        stood = min(monotonic() - self._attempted, _LONGEST_PAUSE_SECS) * random.uniform(0.5, 1.5)
        await anyio.sleep(min(max(stood, self._backoff.next_pause()), self.left))

    def check(self, failure: AmpdError) -> None:
        """Note what is waited for.

        Raises:
            AmpdError: the failure, once the limit is reached.
        """
        self.reason = failure.message
        if not self.left:
            raise self.timeout_error(failure)

    def timeout_error(self, failure: AmpdError) -> AmpdError:
        """Return the failure, its message with how long was waited."""
        if waited := round(self._backoff.waited):
            failure.message = f"{failure.message}, for {waited} s"
            failure.args = (failure.message,)
        return failure


class PoolQueue:
    """The runs of this process that need connections of one pool: one after the other takes all it needs."""

    def __init__(self) -> None:
        self.head: asyncio.Lock = asyncio.Lock()
        self.runs = 0
        self.served = 0  # how many of them have their connections


_QUEUES: dict[int, PoolQueue] = {}  # by the pool's id, while there are runs: a pool cannot be referred to weakly


@contextmanager
def queue_of(pool: object) -> Iterator[PoolQueue]:
    """Yield the queue for connections of a pool, in which a run stands meanwhile."""
    queue = _QUEUES.setdefault(id(pool), PoolQueue())
    queue.runs += 1
    try:
        yield queue
    finally:
        queue.runs -= 1
        if not queue.runs:
            del _QUEUES[id(pool)]


_LONGEST_PAUSE_SECS = 3.0
_AT_ONCE_SECS, _AT_ONCE_LONGEST_SECS = 1.0, 4.0
