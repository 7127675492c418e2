"""Waiting for one's turn: outside of any transaction, with jitter, and telling whom one waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from .advisory_lock import LockTaken
from .backoff import Patience
from .errors import ConnectionFailed, TurnTimeout
from .events import OnEvent, Waiting
from .history.reading import read
from .history.table import History
from .other_sessions import Holder

if TYPE_CHECKING:
    from .postgres.connection import Session


_LONGEST_PAUSE = 1.0  # seconds between two looks
_PAUSE_TO_LET_GO = 0.3
_COLLISIONS = 5  # with nobody to be seen, after which it was no other runner


class Turn:
    """The patience of one runner: how long it has waited for others since it last got its turn."""

    def __init__(self, limit: float, on_event: OnEvent) -> None:
        self._patience = Patience(limit, longest_pause=_LONGEST_PAUSE)
        self._on_event = on_event
        self.had()

    @property
    def waiting(self) -> bool:
        """Return whether others have had the turn since it was last ours."""
        return self._patience.begun

    def had(self) -> None:
        """Begin to count anew: the turn was ours."""
        self._patience.renew()
        self._collisions = 0
        self.is_missed = False  # until the next look
        self._why: LockTaken | None = None

    @property
    def lets_go(self) -> bool:
        """Return whether the next pause is long enough to let go of the connection, which others may need."""
        return self._patience.pause >= _PAUSE_TO_LET_GO

    def missed(self, history: History, why: LockTaken | None = None) -> None:
        """Begin to wait, or go on, and tell whom for.

        Raises:
            TurnTimeout: others have had the turn for too long.
        """
        if self._patience.waited >= self._patience.limit:
            raise _timeout(history.holder, self._patience.waited)
        if history.holder and self._patience.is_worth_a_word():
            self._on_event(_waiting(history.holder, self._patience.waited, self._patience.limit))
        self.is_missed, self._why = True, why

    async def pause(self) -> None:
        """Wait for a while, if the turn was not to be had, outside of any transaction."""
        if self.is_missed:
            await anyio.sleep(self._patience.next_pause())

    async def look(self, session: Session, schema: str | None, role: str | None, before: History | None) -> History:
        """Read the history; with one that was read `before` also who has the turn now.

        Raises:
            AmpdError: it was not taken by any other runner.
        """
        who = before.schema if before else None
        await session.reopen()  # whoever only waits has nothing to lose with a connection
        try:
            found = await read(session, schema, role=role, who=who)
        except ConnectionFailed:
            if before is None or not await session.reopen():
                raise
            found = await read(session, schema, role=role, who=who)
        why, self.is_missed, self._why = self._why, False, None
        unless = why.unless if why and before and not found.holder and found.applied == before.applied else None
        self._collisions = self._collisions + 1 if unless else 0
        if unless and self._collisions >= _COLLISIONS:
            raise unless from why
        return found


def describe(holder: Holder) -> str:
    """Return who has the turn, in words."""
    return _waiting(holder, 0, 0).whom


def _waiting(holder: Holder, waited: float, limit: float) -> Waiting:
    return Waiting(
        waited=waited,
        limit=limit,
        pid=holder.pid,
        user=holder.user,
        client=holder.client,
        application=holder.application,
        migration=holder.migration,
        since=holder.since,
    )


def _timeout(holder: Holder | None, waited: float) -> TurnTimeout:
    if holder is None:
        return TurnTimeout(
            f"another runner has had its turn for {waited:.0f} s",
            hint="wait for it and run again, raise turn_wait_secs",
        )
    seen = _waiting(holder, waited, waited)
    return TurnTimeout(
        f"{seen.what_happens}, for {waited:.0f} s now ({seen.whom})",
        hint=f"wait for it and run again, raise turn_wait_secs, or end it: SELECT pg_terminate_backend({holder.pid})",
    )
