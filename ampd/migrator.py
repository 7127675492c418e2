"""The story of a run: read the files, connect, read the history, plan, take the lock, apply."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeAlias

import anyio

from .advisory_lock import LockTaken
from .config import Limits, MetadataDb, check_schema, resolved_limits
from .database_url import DatabaseUrl
from .display import one_line
from .emitter import Emitter, RunningMigration, as_ampd_error
from .errors import AmpdError, ConfigError, ConnectionFailed, InvalidMigration, MigrationConflict, MigrationInterrupted
from .events import Finished, OnEvent, Planned, Starting, Stopped, Warned, ignore, was_stopped
from .history.reading import read, remarks
from .history.refusals import check_project, check_writable
from .history.table import History
from .lock_wait import LockWait
from .migration import AppliedMigration, Migration
from .plan import MigrationInfo, Order, Plan, Resolution, State, plan
from .postgres.connection import CLOSE_TIMEOUT_SECS, Pool, Session, check_event_loop
from .postgres.database import ConnectionsBusy, Database
from .redaction import Hidden
from .report import AppliedNow, Report, Status, count, pending_of
from .resumption import Resumption, resuming
from .source import PACKAGED, reading
from .sql.slices import at_once, in_slices
from .version import VERSION

if TYPE_CHECKING:
    from .apply.prepared import PreparedMigration


Source: TypeAlias = str | DatabaseUrl | MetadataDb | Pool


async def migrate(
    database: Source,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    target: int | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> Report:
    """Bring a database to the current schema: apply what is pending, in order, each migration under the lock.

    Safe to call from any number of processes at once, and any number of times; with nothing pending it reads the
    history once and writes nothing. Cancelled, it rolls the running migration back.

    Args:
        database: a PostgreSQL URL, an `asyncpg.Pool`, or the `metadata_db` section of a configuration.
        migrations: in any order; default: those of the configured folder, else the packaged ones.
        schema: where the tables and the history live; default: as configured, else what the search path says.
        target: stop after this version.
        limits: how patient to be; what is not given stays as configured, and so do folder and `allow_out_of_order`.
        on_event: a plain function, called with each event. Once the history is read, `Planned`; for each migration
            `Starting`, when it has the lock, and in any case one `Applied` or `Failed`; in the end `Finished`, or
            `Stopped` after a cancellation. What the function raises ends the run and is raised from here: the running
            migration is stopped as by a cancellation, what is committed stays and is in the history, and the function
            is not called again.

    Raises:
        AmpdError: whichever of its subclasses applies; its `report` says what was applied all the same.
        TypeError: an argument is of the wrong type; `on_event`, say, is an `async def`.
    """
    source = Hidden(database)
    del database
    run = await _Run.of(source, migrations, schema, target, limits, on_event)
    async with run.emit:
        try:
            report = await run.to_the_end()
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


async def status(
    database: Source,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    target: int | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> Status:
    """Return what is applied, pending and in conflict: the plan that `migrate` would follow. Needs only SELECT.

    Takes the arguments of `migrate`, and raises the errors of connecting and reading.
    """
    source = Hidden(database)
    del database
    run = await _Run.of(source, migrations, schema, target, limits, on_event)
    try:
        async with run.emit, run.sessions() as (session, *_):
            found = await run.planning()
            await run.check_history(session, found)
            if found.interrupted:  # or is somebody at it this very moment?
                await run.read_history(session)
                found = await run.planning()
    except AmpdError as error:
        error.report = run.report()
        raise
    assert run.history is not None
    return Status(run.shown, run.history.schema, found)


async def resolve(
    database: Source,
    version: int,
    resolution: Resolution,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> Status:
    """Resolve an interrupted migration as a person says who has looked: writes the history table, runs nothing.

    Takes the arguments of `migrate`, and raises the errors of connecting and reading.

    Raises:
        ConfigError: that migration is not interrupted, or these are not the files that it is one of.
        AdvisoryLockTimeout: its runner, or a statement of it, is still at work.
    """
    source = Hidden(database)
    del database
    _check_version("version", version)
    if not isinstance(resolution, Resolution):
        ways = "ampd.Resolution.APPLIED or ampd.Resolution.ROLLED_BACK"
        raise TypeError(f"the resolution is {ways}, not {type(resolution).__name__}")
    run = await _Run.of(source, migrations, schema, None, limits, on_event)
    while True:
        async with run.emit, run.sessions() as (session, *_):
            if (resolved := await _resolve(run, session, version, resolution)) is not None:
                return resolved
        await run.lock_wait.pause()


async def _resolve(run: _Run, session: Session, version: int, resolution: Resolution) -> Status | None:
    """Resolve it as soon as no runner is at it; None when that takes long."""
    from .apply.transaction import resolve as record_resolution

    while True:
        history = await run.read_history(session)
        found = await run.planning()
        await run.check_history(session, found)
        info = next((info for info in found.migrations if info.version == version), None)
        if info is None or info.state is not State.INTERRUPTED:
            state = f"is {info.state.value.replace('_', ' ')}" if info else "is unknown"
            lacking = info is not None and info.state is State.AHEAD
            raise ConfigError(
                f"version {version} {state}, not interrupted: there is nothing to resolve",
                hint=_OTHER_FOLDER if lacking else "`ampd status` shows what is interrupted",
            )
        if resolution is Resolution.APPLIED:
            _check_its_file(info, run.files)
        try:
            if not history.holder:
                await record_resolution(session, history, info, resolution)
                history = await run.read_history(session)
                return Status(run.shown, history.schema, await run.planning())
        except LockTaken:
            pass
        run.lock_wait.taken(history)
        if run.lock_wait.should_disconnect:
            return None
        await run.lock_wait.pause()


_OTHER_FOLDER = "give the folder that its file is in with --migrations DIR"


def _check_its_file(info: MigrationInfo, files: Sequence[Migration]) -> None:
    """Refuse to record as applied what another folder's file stands for; a file may be gone from a folder of one's own.

    Raises:
        ConfigError: it has another name and content, or these are the packaged migrations, which lose none.
    """
    row, migration = info.applied, info.migration
    if migration is None and all(file.file.startswith(PACKAGED) for file in files):
        raise ConfigError(f"{info.label} is none of the packaged migrations", hint=_OTHER_FOLDER)
    if migration and row and migration.name != row.name and migration.checksum != row.checksum:
        started = f"{row.version} {one_line(row.name)}"
        raise ConfigError(f"{started} was started, and {migration.file} is another migration", hint=_OTHER_FOLDER)


class _Run:
    """What one run knows: where to, from which files, how patiently, and what it has seen and done so far."""

    def __init__(
        self,
        source: Hidden[Source],
        configured: MetadataDb,
        files: tuple[Migration, ...],
        schema: str | None,
        target: int | None,
        limits: Limits | None,
        on_event: OnEvent,
        *,
        packaged: bool,
    ) -> None:
        self.emit = Emitter(on_event, lambda: (self.shown, self.history.schema if self.history else self.schema))
        policy = configured.migrations
        self.limits = resolved_limits(policy, limits)
        self.role = policy.role
        self.order = Order.ALLOW_OUT_OF_ORDER if policy.allow_out_of_order else Order.STRICT
        self.schema = configured.schema if schema is None else schema
        if self.schema is not None:
            check_schema(self.schema)
        self.files = files
        self.packaged = packaged
        self.target = target
        _check_target(self.files, target)
        self.source = Database(
            source,
            connect_wait_secs=self.limits.connect_wait_secs,
            advisory_lock_wait_secs=self.limits.advisory_lock_wait_secs,
            on_event=self.emit,
        )
        self.lock_wait = LockWait(self.limits.advisory_lock_wait_secs, self.emit)
        self.history: History | None = None
        self.done: list[AppliedNow] = []
        self.planned: Planned | None = None  # as told
        self.interrupted: Starting | None = None  # by a cancellation
        self.confirmed = True  # that what is not done has left nothing behind
        self.warned: set[str] = set()
        self._resumptions: dict[AppliedMigration, Resumption | None] = {}
        self._scripts: dict[tuple[int, AppliedMigration | None], PreparedMigration] = {}

    @classmethod
    async def of(
        cls,
        source: Hidden[Source],
        migrations: Iterable[Migration] | None,
        schema: str | None,
        target: int | None,
        limits: Limits | None,
        on_event: OnEvent,
    ) -> _Run:
        """Return a run of what a caller has given; where that is no migrations, those of the folder are read."""
        check_event_loop()
        configured = _configuration_in(source)
        folder = configured.migrations.dir
        files = await in_slices(reading(folder)) if migrations is None else _in_order(migrations)
        packaged = migrations is None and folder is None
        return cls(source, configured, files, schema, target, limits, on_event, packaged=packaged)

    async def to_the_end(self) -> Report:
        needed = 1
        while True:
            try:
                async with self.sessions(needed) as sessions:
                    report = await self._as_far_as_they_go(sessions)
                    if report is not None:
                        return report
                    needed = 1 if self.lock_wait.is_taken_by_others else 2
                await self.lock_wait.pause()
            except ConnectionsBusy as busy:
                await self.source.connection_wait.pause(busy.failure)

    @asynccontextmanager
    async def sessions(self, count: int = 1) -> AsyncIterator[list[Session]]:
        """Lend sessions, and read the history; who waits for sessions, or for long for the lock, has none."""
        async with self.source.sessions(count, self.read_history) as (sessions, _):
            yield sessions

    async def read_history(self, session: Session) -> History:
        """Read the history, and from the second time on also who holds the lock."""
        self.history = await self.lock_wait.read_history(session, self.schema, self.role, self.history)
        return self.history

    async def _as_far_as_they_go(self, sessions: list[Session]) -> Report | None:
        """Apply what is pending; None when the wait for the lock is long, or a second session is needed."""
        session, *guards = sessions
        while True:
            assert self.history is not None
            todo = await self.planning()
            if self.planned is None:
                self._emit_plan(todo)
            await self.check_history(session, todo)
            if (todo.pending or todo.interrupted) and self.history.holder:
                self.lock_wait.taken(self.history)
            elif todo.interrupted and not self.history.holder_known:  # somebody may be at it this very moment
                await self.read_history(session)
                continue
            else:
                self._emit_plan(todo)
                check_conflicts(todo)
                if not todo.pending:
                    return self._warn_if_ahead(self.report(todo if self.target is None else None))
                check_writable(self.history)
                self._warn(remarks(self.history))
                scripts = await self._prepared(todo)
                self._check_connections(scripts)
                total = len(self.done) + len(todo.pending)
                try:
                    for script in scripts:
                        if await session.reopen():  # the last one could not be cleaned
                            await self.read_history(session)
                            break
                        if script.directives.no_transaction and not guards:
                            return None
                        if guards and not script.directives.no_transaction:
                            await self.source.release(guards.pop())
                        self.history = await self._apply(session, guards, script, self.history, total)
                        self.lock_wait.acquired()
                        self.source.connection_wait.acquired()
                    continue
                except LockTaken as taken:
                    self.source.connection_wait.acquired()
                    self.lock_wait.taken(self.history, taken)
            if self.lock_wait.should_disconnect:
                return None
            await self.lock_wait.pause()
            await self.read_history(session)

    def plan(self, *, whole: bool = False) -> Plan:
        applied, holder = (self.history.applied, self.history.holder) if self.history else ((), None)
        at_work = holder.describe() if holder else None
        target = None if whole else self.target
        return plan(self.files, applied, target=target, order=self.order, at_work=at_work, resumption=self._resumption)

    async def planning(self) -> Plan:
        """Return the plan, having found out in slices how interrupted migrations can go on."""
        files = {file.version: file for file in self.files}
        for row in self.history.applied if self.history else ():
            if row.finished_at is None and row not in self._resumptions and row.version in files:
                self._resumptions[row] = await in_slices(resuming(files[row.version], row))
        return self.plan()

    def _resumption(self, migration: Migration, row: AppliedMigration) -> Resumption | None:
        if row not in self._resumptions:
            self._resumptions[row] = at_once(resuming(migration, row))
        return self._resumptions[row]

    async def _prepared(self, todo: Plan) -> list[PreparedMigration]:
        """Return the pending scripts, prepared in slices, each of them once."""
        from .apply.prepared import preparing, warnings

        fresh = [info for info in todo.pending if (info.version, info.applied) not in self._scripts]
        for script in await in_slices(preparing(fresh)):
            self._scripts[script.info.version, script.info.applied] = script
        scripts = [self._scripts[info.version, info.applied] for info in todo.pending]
        self._warn(warnings(todo, scripts))
        return scripts

    async def check_history(self, session: Session, found: Plan) -> None:
        """Refuse a history that is not that of the files at hand, and to begin one beside another that is.

        Raises:
            MigrationConflict: it is another project's; or there is none yet, and another tool has migrated the schema.
            ConfigError: there is none yet in this schema, and one in another; or nobody has named the folder for a
                schema with tables in it.
        """
        assert self.history is not None
        check_project(found, history=self.history.name, packaged=self.packaged)
        if self.history.applied or self.history.holder or not self.files:
            return  # whoever holds the lock is at the first migration, and has looked around
        from .history.first_run import first_run_error, first_run_warnings, read_neighbours

        home, circumstances = self.history.schema, {"configured": self.schema is not None, "packaged": self.packaged}
        assert home is not None
        neighbours = await read_neighbours(session, self.history, packaged=self.packaged, role=self.role)
        if error := first_run_error(neighbours, home, **circumstances):
            raise error
        self._warn(first_run_warnings(neighbours, home, **circumstances))

    def _emit_plan(self, todo: Plan) -> None:
        """Tell what is to be done, unless it is what was told, less what this run has done of it."""
        done = {each.version for each in self.done}
        planned = Planned(
            applied=sum(info.state is State.APPLIED for info in todo.migrations),
            pending=pending_of(todo.pending),
            ahead=tuple(info.version for info in todo.ahead),
            total=len(self.files),
        )
        if (told := self.planned) is not None:
            rest = tuple(each for each in told.pending if each.version not in done)
            if (rest, told.ahead) == (planned.pending, planned.ahead):
                return
        self.planned = planned
        self.emit(planned)

    def stopped(self) -> Stopped:
        """Return what to tell of a run that is cancelled."""
        return Stopped(
            report=self.report(),
            confirmed=self.confirmed,
            running=self.interrupted,
            waiting=self.lock_wait.waiting,
        )

    def _check_connections(self, scripts: list[PreparedMigration]) -> None:
        if no_transaction := [script for script in scripts if script.directives.no_transaction]:
            from .apply.guard import check_two_connections

            check_two_connections(self.source, no_transaction[0].migration.label)

    @property
    def shown(self) -> str:
        if self.source.label is None and self.history:
            return self.history.address
        return self.source.label or "the pool's database"

    def report(self, rest: Plan | None = None) -> Report:
        """Return how far the run has come; `rest` is the plan of everything, where it is known."""
        rest = rest or self.plan(whole=True)
        return Report(
            database=self.shown,
            schema=self.history.schema if self.history else self.schema,
            current_version=rest.current_version,
            applied=tuple(self.done),
            pending=pending_of(rest.pending) if self.history else (),
            ahead=tuple(info.version for info in rest.ahead),
        )

    def _warn(self, warnings: Iterable[str]) -> None:
        for message in warnings:
            if message not in self.warned:  # by the plan before, which another runner has overtaken
                self.warned.add(message)
                self.emit(Warned(message=message))

    def _warn_if_ahead(self, report: Report) -> Report:
        if report.ahead:
            by, newest = count(len(report.ahead), "migration"), report.ahead[-1]
            message = f"the database is ahead of this build by {by} (newest: {newest}); nothing is applied"
            self.emit(Warned(message=message))
        return report

    async def _apply(
        self, session: Session, guards: list[Session], script: PreparedMigration, history: History, total: int
    ) -> History:
        """Apply one migration and return the history with it; tell the truth about it even when cancelled."""
        from .apply.no_transaction import apply_no_transaction
        from .apply.table_locks import with_lock_retries
        from .apply.transaction import apply_in_transaction

        version, name, file = script.migration.version, script.migration.name, script.migration.file
        starting = Starting(
            version=version,
            name=name,
            number=len(self.done) + 1,
            total=total,
            statements=len(script.statements),
            transactional=not script.directives.no_transaction,
            resumed_at=script.info.applied.statements_done if script.info.applied else 0,
        )
        running, begun = RunningMigration(self.emit, starting), datetime.now(UTC)
        execution = script.execution(history, self.schema, self.limits, self.emit, running)

        def applied() -> None:
            self.done.append(AppliedNow(version, name, running.duration_ms))
            running.applied()

        try:
            if script.directives.no_transaction:
                await apply_no_transaction(self.source, session, guards[0], execution)
            else:
                await with_lock_retries(self.source, session, execution, apply_in_transaction)
        except anyio.get_cancelled_exc_class():
            self.confirmed = False
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_TIMEOUT_SECS), suppress(AmpdError):
                if await session.recover():
                    self.history = await read(session, self.schema, role=self.role)
                    self.confirmed = True
            rows = self.history.applied if self.history else ()
            finished = any(row.version == version and row.finished_at for row in rows)
            if running.started and self.confirmed and finished:
                applied()
            else:
                if running.started or not self.confirmed:
                    self.interrupted = starting
                running.failed(_interrupted_error(script, was_stopped(starting, confirmed=self.confirmed)))
            raise
        except LockTaken:
            running.failed(_interrupted_error(script, f"another runner has gone on with {starting.label}"))
            raise
        except Exception as error:
            if isinstance(error, ConnectionFailed) and error.version is None:
                error.version, error.file = version, file
                error.hint = f"{file} was being applied; {error.hint}"
            running.failed(error)
            raise
        applied()
        return history.with_row(
            AppliedMigration(
                version=version,
                name=name,
                checksum=script.migration.checksum,
                started_at=begun,
                finished_at=datetime.now(UTC),
                statements_done=len(script.statements),
                applied_by=history.user,
                ampd_version=VERSION,
            )
        )


def _interrupted_error(script: PreparedMigration, message: str) -> MigrationInterrupted:
    error = MigrationInterrupted(message)
    error.version, error.file = script.migration.version, script.migration.file
    return error


def _configuration_in(source: Hidden[Source]) -> MetadataDb:
    given = source.reveal()
    return given if isinstance(given, MetadataDb) else MetadataDb()


def _in_order(given: Iterable[Migration]) -> tuple[Migration, ...]:
    """Return migrations that the caller has put together as those of a folder are: in order, each version once.

    Raises:
        InvalidMigration: two have the same version.
        TypeError: these are no migrations.
    """
    files: tuple[Migration, ...] = () if isinstance(given, str | PurePath) else tuple(given)
    for each in files or (given,):
        if isinstance(each, str | PurePath):
            raise TypeError(f"migrations= takes what ampd.read_migrations(...) returns, not {type(each).__name__}")
    ordered = tuple(sorted(files, key=lambda file: file.version))
    twins = [(one, other) for one, other in pairwise(ordered) if one.version == other.version]
    if twins:
        raise InvalidMigration(
            "; ".join(f"{one.file} and {other.file} have the same version, {one.version}" for one, other in twins),
            version=twins[0][0].version,
            file=twins[0][1].file,
            hint="give each migration a version that no other has",
        )
    return ordered


def check_conflicts(found: Plan) -> None:
    """Raise for every conflict of a plan at once.

    Raises:
        MigrationInterrupted: nothing but interrupted migrations stand in the way.
        MigrationConflict: anything else does.
    """
    if not found.conflicts:
        return
    kind = MigrationInterrupted if len(found.interrupted) == len(found.conflicts) else MigrationConflict
    if len(found.conflicts) == 1:
        raise kind(found.conflicts[0].message, conflicts=found.conflicts, hint=found.conflicts[0].hint)
    raise kind(
        f"{len(found.conflicts)} migrations are in conflict with the history of the database; nothing is applied",
        conflicts=found.conflicts,
        hint="resolve each as it says; `ampd status` shows them all",
    )


def _check_version(argument: str, version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"{argument}= takes the version of a migration, an int, not {type(version).__name__}")


def _check_target(files: Sequence[Migration], target: int | None) -> None:
    if target is None:
        return
    _check_version("target", target)
    if all(migration.version != target for migration in files):
        nearest = ", ".join(migration.label for migration in files[-3:])
        raise ConfigError(
            f"there is no migration with version {target}",
            hint=f"the newest are {nearest}" if nearest else "the folder holds no migrations",
        )
