"""Waiting for one's turn: outside of any transaction, with jitter, and telling whom one waits for."""

from __future__ import annotations

import random
from time import monotonic
from typing import TYPE_CHECKING

import anyio

from .errors import ConnectionFailed, TurnTimeout
from .events import OnEvent, Waiting
from .history import History, Holder, TurnTaken, read

if TYPE_CHECKING:
    from .postgres import Session

_SHORTEST, _LONGEST = 0.02, 1.0  # seconds between two looks
_QUIET_SECS = 1.0  # a shorter wait is not worth a word
_TELL_EVERY_SECS = 5.0
_COLLISIONS = 5  # with nobody to be seen, after which it was no other runner


class Turn:
    """The patience of one runner: how long it has waited for others since it last got its turn."""

    def __init__(self, session: Session, schema: str | None, limit: float, on_event: OnEvent) -> None:
        self._session = session
        self._schema = schema
        self._limit = limit
        self._on_event = on_event
        self.had()

    @property
    def waiting(self) -> bool:
        """Return whether others have had the turn since it was last ours."""
        return self._begun is not None

    def had(self) -> None:
        """Begin to count anew: the turn was ours."""
        self._begun: float | None = None
        self._told = 0.0
        self._pause = _SHORTEST
        self._collisions = 0

    async def wait(self, history: History, why: TurnTaken | None = None) -> History:
        """Pause, and read the history again, with who has the turn now.

        Raises:
            TurnTimeout: others have had the turn for too long.
            AmpdError: it was not taken by any other runner.
        """
        now = monotonic()
        self._begun = self._begun or now
        waited = now - self._begun
        if waited >= self._limit:
            raise _timeout(history.holder, waited)
        if history.holder and waited >= _QUIET_SECS and now - self._told >= _TELL_EVERY_SECS:
            self._told = now
            self._on_event(_waiting(history.holder, waited, self._limit))
        await anyio.sleep(min(self._pause * random.uniform(0.5, 1.5), self._limit - waited))
        self._pause = min(self._pause * 1.5, _LONGEST)
        await self._session.reopen()  # whoever only waits has nothing to lose with a connection
        try:
            found = await self.look(history)
        except ConnectionFailed:
            if not await self._session.reopen():
                raise
            found = await self.look(history)
        unless = why.unless if why and not found.holder and found.applied == history.applied else None
        self._collisions = self._collisions + 1 if unless else 0
        if unless and self._collisions >= _COLLISIONS:
            raise unless from why
        return found

    async def look(self, history: History) -> History:
        """Read the history again, with who has the turn."""
        return await read(self._session, self._schema, who=history.schema)


def describe(holder: Holder) -> str:
    """Return who has the turn, in words."""
    return _waiting(holder, 0, 0).whom


def _waiting(holder: Holder, waited: float, limit: float) -> Waiting:
    return Waiting(
        waited=waited,
        limit=limit,
        pid=holder.pid,
        client=holder.client,
        application=holder.application,
        migration=holder.migration,
        since=holder.since,
    )


def _timeout(holder: Holder | None, waited: float) -> TurnTimeout:
    whom = f" ({describe(holder)})" if holder else ""
    end = f", or end it: SELECT pg_terminate_backend({holder.pid})" if holder else ""
    return TurnTimeout(
        f"another runner has had its turn for {waited:.0f} s{whom}",
        hint=f"wait for it and run again, raise turn_wait_secs{end}",
    )
