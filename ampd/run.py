"""The state of one run: database, files, limits, the history as last read, and what was applied."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import msgspec

from .advisory_lock import LockTaken
from .config import Limits, MetadataDb, ResolvedLimits, check_name, resolved_limits
from .database_url import DatabaseUrl
from .emitter import Emitter
from .errors import ConfigError, InvalidMigration
from .events import OnEvent, Planned, Starting, Stopped, Warned, ignore
from .history.refusals import check_project
from .history.table import History, Place
from .lock_wait import LockWait
from .migration import AppliedMigration, Migration
from .plan import Order, Plan, State, is_another_projects, planning
from .postgres.connection import Connection, Pool, Session, check_event_loop
from .postgres.database import Database
from .redaction import Hidden
from .report import AppliedNow, Report, ahead_warning, as_pending, pending_of, still_pending
from .resumption import Resumption, resuming
from .source import reading
from .sql.slices import Slices, at_once, in_slices, mapping

if TYPE_CHECKING:
    from .apply.prepared import Execution, PreparedMigration


T = TypeVar("T")
Source: TypeAlias = str | DatabaseUrl | MetadataDb | Pool | Connection


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is asked for: the arguments of `migrate`, once the files are read."""

    source: Hidden[Source]
    configured: MetadataDb  # defaults where the source is no configuration
    files: tuple[Migration, ...]  # in the order of their versions
    packaged: bool  # whether these are the packaged ones because no folder was named
    schema: str | None
    table: str | None
    target: int | None
    limits: Limits | None
    on_event: OnEvent
    pool: Pool | None = None  # to take the sessions of a URL from; on the same database


class Run:
    """One run: the history as last read, the plan as last emitted, and what it has applied."""

    def __init__(self, request: Request) -> None:
        """Take what is asked for, of which nothing is begun.

        Raises:
            ConfigError: a limit, a name, the target or the URL cannot be used.
            TypeError: an argument is of the wrong type.
        """
        self._request = request
        self.emit: Emitter = Emitter(
            request.on_event, lambda: (self.shown, self.history.schema if self.history else self.schema)
        )
        policy = request.configured.migrations
        self.limits: ResolvedLimits = resolved_limits(policy, request.limits)
        self.role: str | None = policy.role
        self.order = Order.ALLOW_OUT_OF_ORDER if policy.allow_out_of_order else Order.STRICT
        self.schema: str | None = request.configured.schema if request.schema is None else request.schema
        if self.schema is not None:
            check_name("schema", self.schema)
        if request.table is not None:
            check_name("table", request.table)
        self.place: Place = Place(self.schema, policy.table if request.table is None else request.table, policy.role)
        self.files: tuple[Migration, ...] = request.files
        self.packaged: bool = request.packaged
        self.target: int | None = request.target
        _check_target(self.files, self.target)
        self.database: Database = Database(
            request.source,
            connect_wait_secs=self.limits.connect_wait_secs,
            advisory_lock_wait_secs=self.limits.advisory_lock_wait_secs,
            on_event=self.emit,
            pool=request.pool,
        )
        self.lock_wait: LockWait = LockWait(self.limits.advisory_lock_wait_secs, self.emit)
        self.history: History | None = None
        self.done: list[AppliedNow] = []
        self.planned: Planned | None = None  # as last emitted
        self._seen: Plan | None = None  # the last that `emit_plan` was given, emitted or not
        self.interrupted: Starting | None = None  # by a cancellation
        # Before a first run, in a question of its own; else the message that creates the history looks for them.
        self.asks_for_neighbours: bool = False
        self.needs_rows = True  # who and when: else a history that is as the files say need not travel
        self.confirmed = True  # whether what is not applied is known to have left nothing behind
        self.warned: set[str] = set()
        self._resumptions: dict[AppliedMigration, Resumption | None] = {}
        self._prepared: dict[tuple[int, AppliedMigration | None], PreparedMigration] = {}

    @classmethod
    async def of(
        cls,
        source: Hidden[Source],
        migrations: Iterable[Migration] | None = None,
        *,
        schema: str | None = None,
        table: str | None = None,
        target: int | None = None,
        limits: Limits | None = None,
        on_event: OnEvent = ignore,
    ) -> Run:
        """Return a run from the arguments of `migrate`; without migrations, those of the folder are read.

        Raises:
            ConfigError: this is another event loop than asyncio's, or an argument cannot be used.
            InvalidMigration: the folder or a file of it cannot be used, or two migrations have one version.
            TypeError: an argument is of the wrong type.
        """
        check_event_loop()
        configured = _configuration_in(source)
        folder = configured.migrations.dir
        files = await in_slices(reading(folder)) if migrations is None else _in_order(migrations)
        packaged = migrations is None and folder is None
        return cls(
            Request(
                source=source,
                configured=configured,
                files=files,
                packaged=packaged,
                schema=schema,
                table=table,
                target=target,
                limits=limits,
                on_event=on_event,
            )
        )

    def for_schema(self, schema: str | None, limits: Limits | None, pool: Pool | None) -> Run:
        """Return a run of the same files on another schema, which takes its sessions from a pool.

        What this run has prepared the other one has as well, and the other way round.
        """
        run = Run(msgspec.structs.replace(self._request, schema=schema, limits=limits, pool=pool))
        run._prepared = self._prepared
        return run

    @asynccontextmanager
    async def sessions(self, count: int = 1) -> AsyncIterator[list[Session]]:
        """Yield sessions, the history read on the first; while waiting for them the run holds none."""
        async with self.database.sessions(count, self.read_history) as sessions:
            yield sessions

    async def when_free(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Return what `work` returns, which raises LockTaken for as long as another runner holds the lock.

        Before each further attempt the history is read again.
        """
        while True:
            async with self.emit, self.sessions() as (session, *_):
                while True:
                    try:
                        return await work(session)
                    except LockTaken as taken:
                        assert self.history is not None
                        self.lock_wait.taken(self.history, taken)
                    if self.lock_wait.should_disconnect:
                        break
                    await self.lock_wait.pause()
                    await self.read_history(session)
            await self.lock_wait.pause()

    async def read_history(self, session: Session) -> History:
        """Read the history, and from the second time on also who holds the lock.

        Raises:
            AmpdError: as `LockWait.read_history` does.
        """
        expected = () if self.needs_rows else self.files
        self.history = await self.lock_wait.read_history(session, self.place, self.history, expected)
        return self.history

    def plan(self, *, whole: bool = False) -> Plan:
        """Return the plan from what is known; `whole` leaves the target out of account."""
        return at_once(self._planning(None if whole else self.target))

    async def planning(self) -> Plan:
        """Return the plan, after computing in slices where interrupted migrations can be resumed."""
        files = {file.version: file for file in self.files}
        for row in self.history.applied if self.history else ():
            if row.finished_at is None and row not in self._resumptions and row.version in files:
                self._resumptions[row] = await in_slices(resuming(files[row.version], row))
        return await in_slices(self._planning(self.target))

    def _planning(self, target: int | None) -> Slices[Plan]:
        applied, holder = (self.history.applied, self.history.holder) if self.history else ((), None)
        return planning(
            self.files,
            applied,
            target=target,
            order=self.order,
            runner=holder,
            find_resumption=self._resumption,
        )

    def _resumption(self, migration: Migration, row: AppliedMigration) -> Resumption | None:
        if row not in self._resumptions:
            self._resumptions[row] = at_once(resuming(migration, row))
        return self._resumptions[row]

    async def prepared(self, plan: Plan) -> list[PreparedMigration]:
        """Return the pending migrations of a plan, split and checked in slices, each of them once in a run.

        Raises:
            InvalidMigration: names each thing in them that cannot work, with file and line.
        """
        from .apply.prepared import preparing, warnings

        fresh = [info for info in plan.pending if (info.version, info.applied) not in self._prepared]
        for each in await in_slices(preparing(fresh)):
            self._prepared[each.info.version, each.info.applied] = each
        migrations = [self._prepared[info.version, info.applied] for info in plan.pending]
        self.warn(warnings(plan, migrations))
        return migrations

    async def check_history(self, session: Session, plan: Plan, *, may_ask_later: bool = False) -> Plan:
        """Check that the history belongs to these files, or that a first run may begin one here.

        The latter can be left to the message that creates the history, which then raises NeighboursFound.
        Return the plan, or the one of what another runner has begun meanwhile.

        Raises:
            MigrationConflict: it is another project's; or there is none yet, and another tool has migrated the schema.
            ConfigError: there is none yet in this schema, and one in another; or no folder was named and the
                schema contains tables.
        """
        assert self.history is not None
        check_project(plan, history=self.history.shown_name, packaged=self.packaged)
        if self.history.applied or self.history.holder or not self.files:
            return plan  # a holder has made this check
        must_ask = self.asks_for_neighbours or self.history.table_exists
        if may_ask_later and not must_ask and _begins_in_transaction(plan):
            return plan
        self.asks_for_neighbours = True
        from .history.first_run import FirstRun, read_neighbours

        assert self.history.schema is not None
        first_run = FirstRun(
            await read_neighbours(session, self.history, packaged=self.packaged),
            home=self.history.schema,
            configured=self.schema is not None,
            packaged=self.packaged,
            table=self.place.table,
        )
        error, warnings = first_run.error(), tuple(first_run.warnings())
        if error or warnings:  # unless what is there has been made since the history was read, by another runner
            await self.read_history(session)
            if self.history.applied or self.history.holder:
                return await self.check_history(session, await self.planning())
        if error:
            raise error
        self.warn(warnings)
        return plan

    async def emit_plan(self, plan: Plan) -> None:
        """Emit the plan, unless it is the one emitted before without what this run has applied since.

        The plan of another project's history is not emitted either: an error follows, and its figures mean nothing.
        """
        if plan is self._seen:
            return
        self._seen = plan
        done = {each.version for each in self.done}
        planned = Planned(
            applied=[info.state for info in plan.migrations].count(State.APPLIED),
            pending=await in_slices(mapping(as_pending, plan.pending)),
            ahead=tuple(info.version for info in plan.ahead),
            total=len(self.files),
        )
        if not planned.applied and is_another_projects(plan):
            return
        if (told := self.planned) is not None:
            rest = tuple(each for each in told.pending if each.version not in done)
            if (rest, told.ahead) == (planned.pending, planned.ahead):
                return
        self.planned = planned
        self.emit(planned)

    def stopped(self) -> Stopped:
        """Return the last event of a run that is cancelled."""
        return Stopped(
            report=self.report(),
            confirmed=self.confirmed,
            running=self.interrupted,
            waiting=self.lock_wait.waiting,
        )

    async def check_connections(self, session: Session, migrations: list[PreparedMigration]) -> None:
        """Refuse a pool that is too small for a no-transaction migration, and connections whose owner would lose.

        Raises:
            ConfigError: there is but one; or a migration, or the reset after it, would take away what is there.
        """
        if no_transaction := [each for each in migrations if each.directives.no_transaction]:
            from .apply.guard import check_two_connections

            check_two_connections(self.database, no_transaction[0].migration.label)
            if self.database.pool_size is not None and not session.pooled:
                from .apply.pooler import check_no_discard

                for each in no_transaction:
                    check_no_discard(self.database, each)
        if self.database.is_one_connection and not session.pooled:
            from .postgres.passed_connection import check_nothing_to_lose

            await check_nothing_to_lose(session)

    @property
    def shown(self) -> str:
        """Return the name of the database for messages."""
        if self.database.label is None and self.history:
            return self.history.address
        return self.database.label or f"{self.database.passed}'s database"

    def report(self, rest: Plan | None = None) -> Report:
        """Return how far the run has come; `rest` is the plan of everything, where it is known."""
        rest = rest or self.plan(whole=True)
        return Report(
            database=self.shown,
            schema=self.history.schema if self.history else self.schema,
            current_version=rest.current_version,
            applied=tuple(self.done),
            pending=pending_of(still_pending(rest)) if self.history else (),
            ahead=tuple(info.version for info in rest.ahead),
        )

    def warn(self, warnings: Iterable[str]) -> None:
        """Emit each warning once in a run."""
        for message in warnings:
            if message not in self.warned:  # for an earlier plan
                self.warned.add(message)
                self.emit(Warned(message=message))

    def warn_if_ahead(self, report: Report) -> Report:
        """Warn if the database is ahead of the files; return the report."""
        if report.ahead:
            self.emit(Warned(message=ahead_warning(report.ahead)))
        return report

    async def executions(
        self,
        history: History,
        migrations: Sequence[PreparedMigration],
        total: int,
        *,
        emit: Emitter | None = None,
    ) -> tuple[Execution, ...]:
        """Return the next migrations, of a `total` that the run applies, with the history to add them to."""

        def execution(numbered: tuple[int, PreparedMigration]) -> Execution:
            number, each = numbered
            return each.execution(history, self.schema, self.limits, emit or self.emit, number=number, total=total)

        return await in_slices(mapping(execution, enumerate(migrations, start=len(self.done) + 1)))

    def before_creation_sql(self) -> str:
        """Return PL/pgSQL that ends a first run in NeighboursFound, if there are any; "" if it has asked for them."""
        history = self.history
        if history is None or history.schema is None or history.table_exists or self.asks_for_neighbours:
            return ""
        from .history.first_run import check_nothing_found_sql

        return check_nothing_found_sql(history.schema, self.place, packaged=self.packaged)


def _begins_in_transaction(plan: Plan) -> bool:
    first = plan.pending[0].migration if plan.pending else None
    return first is not None and first.is_transactional


def _configuration_in(source: Hidden[Source]) -> MetadataDb:
    given = source.reveal()
    return given if isinstance(given, MetadataDb) else _unconfigured()


@cache
def _unconfigured() -> MetadataDb:
    return MetadataDb()


def _in_order(given: Iterable[Migration]) -> tuple[Migration, ...]:
    """Return a caller's migrations in the order of their versions, each version once.

    Raises:
        InvalidMigration: two have the same version.
        TypeError: they are no migrations, but paths, say.
    """
    offered: tuple[object, ...] = (given,) if isinstance(given, str | PurePath) else tuple(given)
    files: list[Migration] = []
    for each in offered:
        if not isinstance(each, Migration):
            raise TypeError(f"migrations= takes what ampd.read_migrations(...) returns, not {type(each).__name__}")
        files.append(each)
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


def check_version(argument: str, version: object) -> None:
    """Refuse a version of another type."""
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"{argument}= takes the version of a migration, an int, not {type(version).__name__}")


def _check_target(files: Sequence[Migration], target: int | None) -> None:
    if target is None:
        return
    check_version("target", target)
    if all(migration.version != target for migration in files):
        nearest = ", ".join(migration.label for migration in files[-3:])
        raise ConfigError(
            f"there is no migration with version {target}",
            hint=f"the newest are {nearest}" if nearest else "the folder contains no migrations",
        )
