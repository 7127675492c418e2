"""A caller's single connection: a pool of one for those who take sessions, and never closed by us while it works."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import anyio

from ampd.errors import ConfigError, ConnectionFailed

from .connection import is_closed
from .quoting import PIN_SEARCH_PATH, do_block

if TYPE_CHECKING:
    from .connection import Connection, Session


# By the connection's id, while there are runs.
_KNOWN: WeakValueDictionary[int, PassedConnection] = WeakValueDictionary()


class PassedConnection:
    """A connection with the interface of a pool that has no other; one run after the other takes it."""

    def __init__(self, connection: Connection) -> None:
        self._con = connection
        self._holders = (self,)  # as of a pool, which asyncpg does not let one ask
        self._loop = getattr(connection, "_loop", None)
        self._taken = asyncio.Lock()

    @classmethod
    def of(cls, connection: Connection) -> PassedConnection:
        """Return the one of a connection: all runs that were given the same take turns."""
        return _KNOWN.setdefault(id(connection), cls(connection))

    def get_max_size(self) -> int:
        """Return how many connections there can be."""
        return 1

    def get_size(self) -> int:
        """Return how many there are."""
        return 1

    def get_idle_size(self) -> int:
        """Return how many no run has taken."""
        return 0 if self._taken.locked() else 1

    async def acquire(self, *, timeout: float) -> Any:
        """Return the connection as soon as no other run has it; sends nothing.

        Raises:
            TimeoutError: another one has had it for so many seconds.
            ConfigError: a transaction is open on it, which a migration would commit.
            ConnectionFailed: it is closed.
        """
        self._check_open()
        with anyio.fail_after(timeout):
            await self._taken.acquire()
        try:
            self._check_open()
            if self._con.is_in_transaction():
                raise ConfigError(
                    "the connection that was passed is in a transaction, which a migration would commit",
                    hint="pass it before the transaction begins or after it has ended; or pass a pool, or the URL",
                )
        except BaseException:
            self._taken.release()
            raise
        return self._con

    def _check_open(self) -> None:
        if is_closed(self._con):
            raise ConnectionFailed(
                "the connection that was passed is closed",
                hint="pass one that is open; given a pool or the URL, ampd connects again by itself",
            )

    async def release(self, _: Any, *, timeout: float) -> None:  # noqa: ARG002 - as of a pool
        """Take it back from a run."""
        if self._taken.locked():
            self._taken.release()


async def check_nothing_to_lose(session: Session) -> None:
    """Check that resetting the session after each migration takes nothing away that its owner has made there.

    Raises:
        ConfigError: it would.
    """
    kinds = ", ".join(f"CASE WHEN {there} THEN '{kind}' END" for kind, there in _LOST_BY_RESET.items())
    question = f"pg_catalog.to_jsonb(pg_catalog.array_remove(ARRAY[{kinds}], NULL))"
    body = f"""BEGIN
  {PIN_SEARCH_PATH}
  {session.note_sql(question)}
END"""
    if found := await session.ask(do_block(body), list[str]):
        raise ConfigError(
            f"the connection that was passed has {', '.join(found)}, which the reset after a migration would take away",
            hint="pass another connection, a pool or the URL",
        )


_LOST_BY_RESET = {
    "temporary tables": "EXISTS (SELECT FROM pg_class WHERE relnamespace = pg_my_temp_schema())",
    "LISTEN": "EXISTS (SELECT FROM pg_listening_channels())",
    "advisory locks": "EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())",
    "cursors WITH HOLD": "EXISTS (SELECT FROM pg_cursors WHERE is_holdable)",
    "prepared statements": "EXISTS (SELECT FROM pg_prepared_statements WHERE from_sql)",
}
