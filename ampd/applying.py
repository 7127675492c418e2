"""Applying migrations that go together, and finding out how each of them ended."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio

from .advisory_lock import LockTaken
from .apply.batch import Batch
from .apply.no_transaction import apply_no_transaction
from .apply.table_locks import with_lock_retries
from .apply.transaction import apply_transactions
from .errors import AmpdError, ConnectionFailed, MigrationInterrupted
from .events import was_stopped
from .history.reading import read
from .migration import AppliedMigration, Migration
from .postgres.connection import CLOSE_TIMEOUT_SECS, Session
from .report import AppliedNow

if TYPE_CHECKING:
    from .apply.prepared import Execution, PreparedMigration
    from .run import Run


async def apply(
    run: Run, session: Session, guards: list[Session], migrations: Sequence[PreparedMigration], total: int
) -> None:
    """Apply migrations that go together, and add them to the history as known.

    Emits how each ended that was begun, even when cancelled.
    """
    history = run.history
    assert history is not None
    executions = await run.executions(history, migrations, total)
    rows: list[AppliedMigration] = []

    def applied(execution: Execution) -> None:
        migration = execution.migration
        execution.running.finish()
        rows.append(execution.as_applied())
        run.done.append(AppliedNow(migration.version, migration.name, execution.running.duration_ms))
        run.lock_wait.acquired()
        run.database.connection_wait.acquired()
        execution.running.applied()

    batch = Batch(executions, applied, before_creation=run.before_creation_sql())
    try:
        if migrations[0].directives.no_transaction:
            await apply_no_transaction(run.database, session, guards[0], executions[0])
            batch.reach(1)
        else:
            await with_lock_retries(run.database, session, batch.current, partial(apply_transactions, batch=batch))
    except anyio.get_cancelled_exc_class():
        run.history = history.with_rows(rows)
        await _stop(run, session, batch)
        raise
    except Exception as error:
        failed = batch.current()
        if batch.at_end and await _is_applied(run, session, failed.migration):
            batch.reach(batch.done + 1)  # what has failed came after its COMMIT
            if batch.done == len(batch) and isinstance(error, AmpdError):
                run.history = history.with_rows(rows)
                return
            _blame(batch.current().migration, error, in_place_of=failed.migration)
            failed = batch.current()
        run.history = history.with_rows(rows)
        _emit_failed(failed, error)
        raise
    run.history = history.with_rows(rows)


async def _is_applied(run: Run, session: Session, migration: Migration) -> bool:
    """Return whether the history has a migration as finished, as far as it can be read."""
    with suppress(AmpdError):
        history = await read(session, run.place)
        return any(row.version == migration.version and row.finished_at for row in history.applied)
    return False


async def _stop(run: Run, session: Session, batch: Batch) -> None:
    """Roll back what a cancellation has interrupted, and find out how far the server had come."""
    run.confirmed = False
    with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_TIMEOUT_SECS), suppress(AmpdError):
        if await session.recover():
            run.history = await read(session, run.place)
            run.confirmed = True
    if batch.done == len(batch):
        return
    stopped, rows = batch.current(), run.history.applied if run.history else ()
    starting, started = stopped.running.starting, stopped.running.started
    finished = any(row.version == stopped.migration.version and row.finished_at for row in rows)
    if started and run.confirmed and finished:
        batch.reach(batch.done + 1)
        return
    if started or not run.confirmed:
        run.interrupted = starting
    stopped.running.failed(_interrupted_error(stopped.migration, was_stopped(starting, confirmed=run.confirmed)))


def _blame(migration: Migration, error: Exception, *, in_place_of: Migration) -> None:
    """Let an error name the migration that it has stopped before it began, not the one before."""
    if isinstance(error, AmpdError) and error.file == in_place_of.file:
        message = error.message.replace(" at the end of the migration", "")
        error.message = message.replace(f"{error.file}: ", f"{migration.file}: ", 1)
        error.version, error.file = migration.version, migration.file


def _emit_failed(execution: Execution, error: Exception) -> None:
    """Emit that a migration has failed; the error of a lost connection gets its name."""
    migration = execution.migration
    if isinstance(error, LockTaken):
        error = _interrupted_error(migration, f"another runner has gone on with {migration.label}")
    elif isinstance(error, ConnectionFailed) and error.version is None:
        error.version, error.file = migration.version, migration.file
        error.hint = f"{error.file} was being applied; {error.hint}"
    execution.running.failed(error)


def _interrupted_error(migration: Migration, message: str) -> MigrationInterrupted:
    error = MigrationInterrupted(message)
    error.version, error.file = migration.version, migration.file
    return error
