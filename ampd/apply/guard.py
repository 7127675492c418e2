"""The second session of a no-transaction migration: it holds the advisory lock while the statements run."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import anyio

from ampd import advisory_lock
from ampd.errors import ConfigError, ConnectionFailed, NoAnswer
from ampd.postgres.failures import RUN_AGAIN
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError

from . import session_state
from .session_state import NO_TRANSACTION_TIMEOUT
from .transaction import refused_error

if TYPE_CHECKING:
    from ampd.postgres.connection import Session
    from ampd.postgres.database import Database

    from .prepared import Execution


_HEARTBEAT_SECS = 4.0


class Guard:
    """The connection that holds the lock while another one works."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._answered = 0.0  # when the server last did, by the clock of this process

    async def acquire(self, execution: Execution, timeout: float) -> None:
        """Take the lock within `timeout` seconds; the transaction stays open and has touched no table.

        Raises:
            LockTaken: another session has it.
            NoAnswer: there may be a pooler that has no server connection for us.
        """
        enter = f"BEGIN {NO_TRANSACTION_TIMEOUT}{advisory_lock.try_lock_sql(execution.history.lock_key)} END"
        message = (
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 0; "
            f"SET LOCAL idle_in_transaction_session_timeout = '{session_state.LEASE_SECS}s'; {do_block(enter)}"
        )
        try:
            with anyio.fail_after(timeout):
                await self.session.run(message)
            self._answered = monotonic()
        except TimeoutError as error:
            self.session.give_up("it has waited for a server connection")
            raise NoAnswer(
                f"a second connection got no answer for {timeout:g} s",
                hint="a pooler in session mode needs two connections for each runner; " + RUN_AGAIN,
            ) from error
        except ServerError as error:
            await self.session.recover()
            raise refused_error(error, execution) from error

    async def check(self) -> None:
        """Check that the lock is still ours, and renew the lease.

        Raises:
            ConnectionFailed: it is not; nothing more may be run.
        """
        try:
            with anyio.fail_after(session_state.LEASE_SECS / 2):
                await self.session.run("SELECT 1")
            self._answered = monotonic()
        except (ServerError, ConnectionFailed, TimeoutError) as error:
            what = "was ended from outside, by pg_terminate_backend, say"
            if isinstance(error, TimeoutError):
                what = "does not answer any more"
            elif monotonic() - self._answered > session_state.LEASE_SECS:
                what = (
                    f"was ended by the server after {session_state.LEASE_SECS} s of silence: something, such as a "
                    "slow on_event= callback, has held up the event loop of this process for so long"
                )
            raise ConnectionFailed(
                f"the session that held the lock for this run {what}",
                hint="nothing more was begun: run `ampd migrate` again; it resumes after the last statement done",
            ) from error

    async def heartbeat(self) -> None:
        """Send a heartbeat until cancelled or the connection is lost."""
        while True:
            await anyio.sleep(_HEARTBEAT_SECS)
            try:
                await self.check()
            except ConnectionFailed:
                return  # `check` before the next unit raises it


def check_two_connections(database: Database, label: str) -> None:
    """Refuse a pool that has no connection for the guard, or a single connection.

    Raises:
        ConfigError: there is but one.
    """
    if database.pool_size == 1:
        has_one = "one was passed" if database.is_one_connection else "the pool has one"
        raise ConfigError(
            f"{label} runs outside of a transaction and needs two connections; {has_one}",
            hint="give `ampd.migrate` a pool with max_size of at least 2, or the URL",
        )
