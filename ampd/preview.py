"""What a run would do, found out without doing it: `--dry-run` and `--rehearse`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from .advisory_lock import LockTaken
from .emitter import Emitter
from .errors import AdvisoryLockTimeout, AmpdError
from .events import OnEvent, ignore
from .history.reading import history_warnings
from .history.refusals import check_conflicts, check_writable
from .migration import Migration
from .migrator import current_status
from .redaction import Hidden
from .run import Run, Source

if TYPE_CHECKING:
    from .apply.prepared import Execution
    from .apply.rehearsal_report import Rehearsal
    from .history.table import History
    from .postgres.connection import Session
    from .report import Status


async def dry_run(
    database: Source, *, target: int | None = None, on_event: OnEvent = ignore
) -> tuple[Status, tuple[Execution, ...]]:
    """Return the status, and what `migrate` would run, split and checked; changes nothing.

    Raises:
        AmpdError: `migrate` would refuse to run it, or the history cannot be read.
    """
    source = Hidden(database)
    del database
    run = await Run.of(source, target=target, on_event=on_event)
    run.needs_rows = False
    found = await current_status(run)
    assert run.history is not None
    async with run.emit:
        try:
            check_conflicts(found.plan)
            prepared = await run.prepared(found.plan)
        except AmpdError as error:
            error.report = run.report()
            raise
    return found, await run.executions(run.history, prepared, len(prepared))


async def rehearse(
    database: Source,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    table: str | None = None,
    target: int | None = None,
    secs: float = 5,
    on_event: OnEvent = ignore,
) -> Rehearsal:
    """Run what is pending in one transaction of at most so many seconds, roll it back, and return what it held.

    An error of connecting, reading or running is part of what is returned; nothing is left in either case.
    """
    source = Hidden(database)
    del database
    from .apply.rehearsal_report import Rehearsal

    run = await Run.of(source, migrations, schema=schema, table=table, target=target, on_event=on_event)
    try:
        async with run.emit, run.sessions() as (session, *_):
            return await _rehearse(run, session, secs)
    except AmpdError as error:
        return Rehearsal(run.shown, error=error)


async def _rehearse(run: Run, session: Session, secs: float) -> Rehearsal:
    from .apply import rehearsal
    from .apply.rehearsal_report import Rehearsal

    plan = await run.check_history(session, await run.planning())
    history = await run.read_history(session)  # from the second time on it says who holds the lock
    _check_free(history)
    plan = await run.planning()
    check_conflicts(plan)
    run.warn_if_ahead(run.report(plan))
    if not plan.pending:
        return Rehearsal(run.shown)
    check_writable(history)
    run.warn(history_warnings(history))
    prepared = await run.prepared(plan)
    run.limits = msgspec.structs.replace(run.limits, lock_retry_secs=0.0)  # one attempt
    silent = Emitter(ignore, lambda: (run.shown, history.schema))  # nothing is applied, so nothing starts
    executions = await run.executions(history, prepared, len(prepared), emit=silent)
    try:
        return await rehearsal.rehearse(run.database, session, executions, secs, run.shown)
    except LockTaken as taken:
        _check_free(await run.read_history(session))
        told = "another runner was at work meanwhile, or the history was changed by hand"
        raise taken.unless or AdvisoryLockTimeout(told, hint="run again") from taken


def _check_free(history: History) -> None:
    """Check that nobody holds the advisory lock.

    Raises:
        AdvisoryLockTimeout: names who does.
    """
    if history.holder:
        raise AdvisoryLockTimeout(
            f"the migration lock is held by {history.holder.describe()}", hint="wait for it and run again"
        )
