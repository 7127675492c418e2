"""Waiting for the advisory lock: outside of any transaction, with jitter, and saying who holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from .advisory_lock import LockTaken
from .backoff import Backoff
from .errors import AdvisoryLockTimeout, ConnectionFailed
from .events import OnEvent, Waiting
from .history.reading import read
from .history.table import History, Place
from .other_sessions import Holder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .migration import Migration
    from .postgres.connection import Session


_LONGEST_PAUSE_SECS = 1.0  # between two reads of the history
_PAUSE_TO_DISCONNECT_SECS = 0.3
_LOSSES = 3  # connections lost while reading, in place of which another is opened at once
_COLLISIONS = 5  # refusals without a visible holder, after which it was no other runner


class LockWait:
    """One wait of a runner for the lock: how long so far, and how it goes on; its limit is in seconds."""

    def __init__(self, limit: float, on_event: OnEvent) -> None:
        self._backoff = Backoff(limit, longest_pause=_LONGEST_PAUSE_SECS)
        self._on_event = on_event
        self.acquired()

    @property
    def waiting(self) -> bool:
        """Return whether others have held the lock since it was last ours."""
        return self._backoff.begun

    def acquired(self) -> None:
        """Reset the wait: the lock was ours."""
        self._backoff.renew()
        self._collisions = 0
        self.is_taken_by_others: bool = False  # until the next read
        self._why: LockTaken | None = None

    @property
    def should_disconnect(self) -> bool:
        """Return whether the next pause is long enough to close the connection, which others may need."""
        return self._backoff.pause >= _PAUSE_TO_DISCONNECT_SECS

    def taken(self, history: History, why: LockTaken | None = None) -> None:
        """Begin or continue to wait, and emit who holds the lock.

        Raises:
            AdvisoryLockTimeout: others have held the lock for too long.
        """
        if self._backoff.waited >= self._backoff.limit:
            raise _timeout_error(history.holder, self._backoff.waited)
        if history.holder and self._backoff.should_report():
            waited, limit = self._backoff.waited, self._backoff.limit
            self._on_event(Waiting(waited=waited, limit=limit, holder=history.holder))
        self.is_taken_by_others, self._why = True, why

    async def pause(self) -> None:
        """Wait for a while, if others hold the lock, outside of any transaction."""
        if self.is_taken_by_others:
            await anyio.sleep(self._backoff.next_pause())

    async def read_history(
        self, session: Session, place: Place, before: History | None, expected: Sequence[Migration] = ()
    ) -> History:
        """Read the history; with one that was read `before` also who holds the lock now.

        A connection that is gone, or is lost meanwhile by a run that only waits, is replaced by another one.

        Raises:
            AmpdError: it cannot be read; or the write was refused several times, and no other runner was there.
        """
        await session.reopen()  # a session that only waits has no state to lose
        losses = 0
        while True:
            try:
                found = await read(session, place, lock_schema=before.schema if before else None, expected=expected)
                break
            except ConnectionFailed:
                losses += 1
                if before is None or losses > _LOSSES or not await session.reopen():
                    raise
        # Nobody has the lock, and the history is as it was: then it was no other runner that the write collided with.
        why, self.is_taken_by_others, self._why = self._why, False, None
        unless = why.unless if why and before and not found.holder and found.applied == before.applied else None
        self._collisions = self._collisions + 1 if unless else 0
        if unless and self._collisions >= _COLLISIONS:
            raise unless from why
        return found


def _timeout_error(holder: Holder | None, waited: float) -> AdvisoryLockTimeout:
    message, hint = f"timed out after {waited:.0f} s waiting for the migration lock", "wait for it and run again"
    if holder is None:
        return AdvisoryLockTimeout(message, hint=f"{hint}, or raise advisory_lock_wait_secs")
    return AdvisoryLockTimeout(
        f"{message}, held by {holder.describe()}",
        hint=f"{hint}, raise advisory_lock_wait_secs, or end it: SELECT pg_terminate_backend({holder.pid})",
    )
