"""The story of a run: read the files, connect, read the history, plan, take the lock, apply."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import anyio
import msgspec

from .advisory_lock import LockTaken
from .config import Limits, MetadataDb
from .emitter import as_ampd_error
from .errors import AmpdError, InvalidMigration
from .events import Finished, OnEvent, ignore
from .history.reading import history_warnings
from .history.refusals import NeighboursFound, check_conflicts, check_writable
from .migration import Migration
from .postgres.connection import Session
from .postgres.connection_wait import ConnectionsBusy
from .redaction import Hidden
from .report import Report, Status
from .run import Run, Source

if TYPE_CHECKING:
    from .history.overview import Overview
    from .plan import Plan


async def migrate(
    database: Source,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    table: str | None = None,
    target: int | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> Report:
    """Bring a database to the current schema: apply what is pending, in order, each migration under the lock.

    Safe to call from any number of processes at once, and any number of times; with nothing pending it reads the
    history once and writes nothing. Cancelled, it rolls the running migration back.

    Args:
        database: a PostgreSQL URL, an `asyncpg.Pool`, the `metadata_db` section of a configuration; or an
            `asyncpg.Connection` in no transaction, which nothing else uses meanwhile: it has no second one for a
            no-transaction migration.
        migrations: in any order; default: those of the configured folder, else the packaged ones.
        schema: where the tables and the history live; default: as configured, else what the search path says.
        table: what the history is called, so that several projects can share a schema; default: as configured, else
            ampd_schema_migrations.
        target: stop after this version.
        limits: how patient to be; what is not given stays as configured, and so do folder and `allow_out_of_order`.
        on_event: a plain function, called with each event. Once the history is read, `Planned`; for each migration
            `Starting`, when it has the lock, and in any case one `Applied` or `Failed`; in the end `Finished`, or
            `Stopped` after a cancellation. What the function raises ends the run and is raised from here: the running
            migration is stopped as by a cancellation, what is committed stays and is in the history, and the function
            is not called again.

    Raises:
        AmpdError: whichever of its subclasses applies; its `report` says what was applied before.
        TypeError: an argument is of the wrong type; `on_event`, say, is an `async def`.
    """
    source = Hidden(database)
    del database
    run = await Run.of(source, migrations, schema=schema, table=table, target=target, limits=limits, on_event=on_event)
    return await apply_pending(run)


async def apply_pending(run: Run) -> Report:
    """Apply what is pending, in a run that has not begun, and emit its last event."""
    run.needs_rows = False
    async with run.emit:
        try:
            report = await _apply_reconnecting(run)
        except anyio.get_cancelled_exc_class():
            run.emit(run.stopped())
            raise
        except Exception as error:
            if isinstance(error, AmpdError):
                error.report = run.report()
            run.emit(Finished(report=run.report(), error=as_ampd_error(error)))
            raise
        run.emit(Finished(report=report))
        return report


async def _apply_reconnecting(run: Run) -> Report:
    """Apply it with one session or two, and keep none during a long wait: others may need the connections."""
    needed = 1
    while True:
        try:
            async with run.sessions(needed) as sessions:
                report = await _apply_connected(run, sessions)
                if report is not None:
                    return report
                needed = 1 if run.lock_wait.is_taken_by_others else 2
            await run.lock_wait.pause()
        except ConnectionsBusy as busy:
            await run.database.connection_wait.pause(busy.failure)


async def _apply_connected(run: Run, sessions: list[Session]) -> Report | None:
    """Plan, and apply the plan, until nothing is pending; None to be called again with other sessions.

    That is when the wait for the lock gets long, or a no-transaction migration needs a second session.
    """
    session, *guards = sessions
    while True:
        assert run.history is not None
        plan = await run.planning()
        if run.planned is None:  # what is planned is told before anything is refused
            await run.emit_plan(plan)
        plan = await run.check_history(session, plan, may_ask_later=True)
        if (plan.pending or plan.running or plan.interrupted) and run.history.holder:
            run.lock_wait.taken(run.history)
        elif plan.interrupted and not run.history.holder_known:  # another runner may be applying it now
            await run.read_history(session)
            continue
        else:
            await run.emit_plan(plan)
            check_conflicts(plan)
            if not plan.pending:
                return run.warn_if_ahead(run.report(plan if run.target is None else None))
            try:
                if not await _apply_plan(run, session, guards, plan):
                    return None
                continue
            except NeighboursFound:
                run.asks_for_neighbours = True
                continue
            except LockTaken as taken:
                run.database.connection_wait.acquired()
                run.lock_wait.taken(run.history, taken)
        if run.lock_wait.should_disconnect:
            return None
        await run.lock_wait.pause()
        await run.read_history(session)


async def _apply_plan(run: Run, session: Session, guards: list[Session], plan: Plan) -> bool:
    """Apply what is pending in a plan, until another has to be made; False if that takes a second session.

    Raises:
        LockTaken: another runner has the lock.
        NeighboursFound: the message that was to create the history has found other tables.
        AmpdError: nothing can be applied, or a migration failed.
    """
    from .apply.prepared import in_batches
    from .applying import apply

    assert run.history is not None
    check_writable(run.history)
    run.warn(history_warnings(run.history))
    try:
        prepared = await run.prepared(plan)
    except InvalidMigration:
        await run.check_history(session, plan)  # what is wrong with them may be that another tool runs them
        raise
    await run.check_connections(session, prepared)
    total = len(run.done) + len(plan.pending)
    for batch in in_batches(prepared):
        if await session.reopen():  # it could not be reset after the last migration
            await run.read_history(session)
            break
        no_transaction = batch[0].directives.no_transaction
        if no_transaction and not guards:
            return False
        if guards and not no_transaction:
            await run.database.release(guards.pop())
        await apply(run, session, guards, batch, total)
    return True


async def status(
    database: Source,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    table: str | None = None,
    target: int | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> Status:
    """Return what is applied, pending and in conflict: the plan that `migrate` would follow. Needs only SELECT.

    Takes the arguments of `migrate`, and raises the errors of connecting and reading.
    """
    source = Hidden(database)
    del database
    run = await Run.of(source, migrations, schema=schema, table=table, target=target, limits=limits, on_event=on_event)
    return await current_status(run)


async def current_status(run: Run) -> Status:
    """Return the status, from a run that has not begun."""
    try:
        async with run.emit, run.sessions() as (session, *_):
            plan = await run.planning()
            plan = await run.check_history(session, plan)
            if plan.interrupted or plan.pending:  # unless another runner is applying it now
                await run.read_history(session)
                plan = await run.planning()
    except AmpdError as error:
        error.report = run.report()
        raise
    assert run.history is not None
    return Status(run.shown, run.history.schema, plan)


async def overview(database: MetadataDb, *, on_event: OnEvent = ignore) -> Overview:
    """Return how far every history of the database has come, whatever its schema and name. Needs only SELECT.

    No file is read. Raises the errors of connecting.
    """
    from .history.overview import read_overview

    source: Hidden[Source] = Hidden(database)
    del database
    run = await Run.of(source, (), on_event=on_event)
    found: list[Overview] = []

    async def look(session: Session) -> None:
        found.append(await read_overview(session, run.role))

    async with run.emit, run.database.sessions(1, look):
        return msgspec.structs.replace(found[-1], database=run.shown)
