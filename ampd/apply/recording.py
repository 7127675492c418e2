"""Recording what nobody runs, under the lock: what became of an interrupted migration, what was applied before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ampd import advisory_lock
from ampd.history import refusals, writing
from ampd.plan import Resolution
from ampd.postgres.failures import translated_error
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError
from ampd.sql import splitter
from ampd.sql.slices import in_slices

from .session_state import set_role_sql

if TYPE_CHECKING:
    from ampd.history.table import History
    from ampd.plan import MigrationInfo
    from ampd.postgres.connection import Session


async def resolve(session: Session, history: History, info: MigrationInfo, resolution: Resolution) -> None:
    """Record, under the lock, what became of an interrupted migration.

    Raises:
        LockTaken: another runner has the lock.
    """
    statements = len(await in_slices(splitter.splitting(info.migration.sql))) if info.migration else 0
    applied = resolution is Resolution.APPLIED
    await record(
        session, history, writing.resolve_sql(history, info.version, info.migration, statements, applied=applied)
    )


async def record(session: Session, history: History, part: str) -> None:
    """Run a part of `enter_sql` under the lock, in a transaction of its own.

    Raises:
        LockTaken: another runner has the lock, or has added to the history.
    """
    refusals.check_writable(history)
    body = f"BEGIN {advisory_lock.try_lock_sql(history.lock_key)}{writing.enter_sql(history, part)} END"
    try:
        await session.run(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '10s'; "
            f"{set_role_sql(history.role, local=True)}{do_block(body)}; COMMIT"
        )
    except ServerError as error:
        await session.recover()
        raise refusals.refusal_error(error, history) or translated_error(error) from error
