"""Applying a `-- no-transaction` migration: statement by statement, under a guard that holds the lock.

The lock ends with its transaction, and these statements run outside of one; so a second connection, the guard, sits in
an open transaction and holds the lock. It speaks the simple protocol only and so holds no snapshot, which a CREATE
INDEX CONCURRENTLY would wait for. It has a lease: it sends a heartbeat every few seconds, and the server ends it when
it falls silent, so that a runner that is cut off keeps nobody waiting.

What can run in a transaction does so, together with the record that it is done. Only the rest can be in doubt after a
crash; before each of those its beginning is recorded, and afterwards the database is asked how far it came.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
import msgspec

from ampd import advisory_lock
from ampd.advisory_lock import LockTaken
from ampd.errors import AmpdError, ConnectionFailed, LockTimeout, MigrationFailed, MigrationInterrupted, NoAnswer
from ampd.events import Warned
from ampd.history import reading, refusals, table, writing
from ampd.history.writing import Checkpoint
from ampd.plan import State, conflict_of
from ampd.postgres.database import ConnectionsBusy
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError
from ampd.resumption import DoneChecksums, Resumption, binding_to_session
from ampd.sql import kinds, location, scanner
from ampd.sql.kinds import Kind
from ampd.sql.slices import in_slices
from ampd.sql.units import Unit, finding_in_force, units

from . import indexes
from .diagnosis import migration_error
from .guard import Guard
from .message import Message
from .pooler import Backend, check_no_session, find_backend, restore_settings
from .prepared import milliseconds
from .session_state import (
    NO_TRANSACTION_TIMEOUT,
    NOTICE_A_DEAD_CLIENT,
    RUN_DEFERRED,
    own_role_sql,
    reset,
    reset_session_sql,
    save_settings_sql,
    set_role_sql,
)
from .table_locks import alongside, with_lock_retries
from .transaction import (
    RESET_CLIENT_ENCODING,
    LockUnavailable,
    StatementTracker,
    check_transaction_sql,
    harm_error,
    note_lock_sql,
    note_transaction_sql,
    parts,
    refused_error,
    stay_in_transaction_sql,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from ampd.postgres.connection import Session
    from ampd.postgres.database import Database
    from ampd.sql.slices import Slices

    from .prepared import Execution


T = TypeVar("T")

UNFINISHED = "it is recorded as unfinished: fix the cause and run `ampd migrate` again; it resumes at this statement"
HALTED = (
    "nothing more was run, and this statement is not recorded as done: put that table back as it was, then run again"
)
UNKNOWN = "it is recorded as unfinished: check how far it got, then settle it with `ampd resolve`"


async def apply_no_transaction(source: Database, session: Session, guarding: Session, execution: Execution) -> None:
    """Apply one no-transaction migration, or what is left of it, on two sessions.

    Raises:
        NotNow: a pooler had no server connections for both; nothing was begun.
        LockTaken: somebody else is at it.
        MigrationInterrupted: how far the statement to resume with came cannot be told.
        AmpdError: a statement failed; those before it are done and recorded.
    """
    guard = Guard(guarding)
    try:
        try:
            await guard.acquire(execution, source.connection_wait.at_once)
            backend = await find_backend(session, execution, source.connection_wait.at_once)
        except NoAnswer as error:
            raise ConnectionsBusy(error) from error
        if execution.info.applied is not None:
            await _check_again(session, execution)
        async with alongside(guard.heartbeat):
            await StatementRunner(source, session, guard, execution, backend).run()
    finally:
        await guarding.recover()  # a pooler throws away a server connection that is left in a transaction


async def _check_again(session: Session, execution: Execution) -> None:
    """Make sure, now that nobody else can begin anything, that what is to be resumed rests where it was seen to rest.

    Raises:
        LockTaken: another runner has gone on with it, or the server still works for one that is gone.
    """
    now = await reading.read(session, execution.schema, role=execution.history.role, who=execution.history.schema)
    row = next((row for row in now.applied if row.version == execution.migration.version), None)
    if row != execution.info.applied:
        raise LockTaken("another runner has gone on with it")
    if now.holder is not None and now.holder.migration is not None:
        raise LockTaken("a statement of a runner that is gone still runs")


class Wrapping(msgspec.Struct, frozen=True):
    """What is added to a unit: before it, after its BEGIN, before its last statement, after it."""

    before: str = ""
    start: str = ""
    end: str = ""
    after: str = ""


def _opening(unit: Unit) -> int:
    """Return how many statements a unit has before its first query: BEGIN, and SET TRANSACTION after it."""
    if unit.statements[0].words[:1] not in (("BEGIN",), ("START",)):
        return 0
    queries = (
        number for number in range(1, len(unit.statements)) if not kinds.sets_transaction(unit.statements[number])
    )
    return next(queries, len(unit.statements))


class StatementRunner:
    """The remaining statements of one migration, under a guard.

    On a connection of our own the session keeps what the file sets, as it would in psql. Behind a pooler each message
    may meet another session, so that everything is set for one message or one unit, and taken back with it.
    """

    def __init__(
        self, source: Database, session: Session, guard: Guard, execution: Execution, backend: Backend
    ) -> None:
        self._source = source
        self._session = session
        self._guard = guard
        self._execution = execution
        self._backend = backend
        self._migration = execution.migration
        self._statements = execution.statements
        self._checksums = DoneChecksums(self._statements)
        self._label = advisory_lock.label_sql(execution.history.lock_key, self._migration.label)
        self._checkpoint = Checkpoint(0, None)  # what the history says
        self._in_doubt = False  # whether the statement to run next was begun by an earlier run, which nobody saw end
        self._begun = False  # whether it was begun by this one
        self._refused = False  # whether the server has said that it failed
        self._dirty_backends = set[int]()  # the backends that we were given
        self._connections = session.connections  # how many the session had had when it was last prepared

    async def run(self) -> None:
        """Run what is left of the migration, and record each step of it."""
        execution, row, resume = self._execution, self._execution.info.applied, Resumption(0, in_doubt=False)
        begun = note_lock_sql(self._session)
        if row is None:
            started = writing.insert_sql(execution.history, self._migration)
            room = writing.make_room_sql(execution.history)
            await self._write(f"{writing.enter_sql(execution.history, started, room)}{self._advance(0, 0)}{begun}")
            self._checkpoint = self._checkpoint_at(0, 0)
        else:
            resume = execution.info.resumption or resume
            self._checkpoint = Checkpoint(row.statements_done, row.done_checksum)
            await self._write(writing.enter_sql(execution.history, writing.make_room_sql(execution.history)) + begun)
        try:
            settings = await in_slices(finding_in_force(self._statements[: resume.done]))
            await in_slices(self._checksums.reckoning(resume.done))
            await self._prepare_session(resume.done)
            self._in_doubt = resume.in_doubt
            for unit in units(self._statements, resume.done, settings):
                await in_slices(self._checksums.reckoning(unit.past))
                if unit.transactional:
                    await self._with_lock_retries(partial(self._together, unit))
                    self._checkpoint = self._checkpoint_at(unit.past, unit.past)
                else:
                    await self._outside(unit)
                self._in_doubt = self._begun = self._refused = False
            await self._guard.check()
            finish = writing.finish_no_transaction_sql(
                execution.history, self._migration, self._checkpoint, len(self._statements)
            )
            await self._write(finish, after=len(self._statements))
        finally:
            with anyio.CancelScope(shield=True):
                await restore_settings(
                    self._source,
                    self._session,
                    self._execution,
                    reset_session_sql(shared=self._session.shared),
                    self._dirty_backends,
                )

    async def _with_lock_retries(
        self, attempt: Callable[[Session, Execution], Awaitable[None]], *, at_length: AmpdError | None = None
    ) -> None:
        async def prepared(session: Session, execution: Execution) -> None:
            if session.connections != self._connections:
                await self._prepare_again()
            await attempt(session, execution)

        await with_lock_retries(
            self._source, self._session, self._execution, prepared, at_length=at_length, fallback=self._guard.session
        )

    async def _prepare_again(self) -> None:
        """Go on with another connection in place of one that was given up.

        Raises:
            ConnectionFailed: what is left to do needs what the file has made for the session that is gone.
        """
        if not self._session.pooled:
            self._dirty_backends.clear()  # gone with their connection
        if await in_slices(binding_to_session(self._statements, self._checkpoint.done)):
            raise ConnectionFailed(
                "the connection to the server was given up, and what the file has made for its session is gone with it",
                hint=UNKNOWN,
                version=self._migration.version,
                file=self._migration.file,
            )
        self._backend = await find_backend(self._session, self._execution)
        await self._prepare_session(self._checkpoint.done)
        self._connections = self._session.connections

    async def _write(self, body: str, *, after: int = 0) -> None:
        """Run PL/pgSQL of our own in a transaction, with our own role, after so many of the statements."""
        await self._with_lock_retries(partial(self._written, body, after))

    async def _written(self, body: str, after: int, session: Session, execution: Execution) -> None:
        block = do_block(f"BEGIN {session.note_pid_sql()} {body} END")
        ours = own_role_sql(execution.history.role, shared=session.shared)
        message = f"{self._label} BEGIN ISOLATION LEVEL READ COMMITTED; {ours}{execution.limits_sql()}{block}; COMMIT"
        try:
            await session.run(message, on_note=StatementTracker(session, execution))
        except ServerError as error:
            await session.recover()
            if after and error.sqlstate != table.MOVED and (harm := refusals.harm(error, execution.history)):
                raise harm_error(harm, error, execution, self._statements[after - 1], aftermath=HALTED) from error
            raise refused_error(error, execution, Message(), -1) from error

    def _checkpoint_at(self, done: int, begun: int) -> Checkpoint:
        return Checkpoint(done, self._checksums.of(begun))

    def _advance(self, done: int, begun: int) -> str:
        return writing.advance_sql(
            self._execution.history, self._migration, self._checkpoint, self._checkpoint_at(done, begun)
        )

    async def _record(self, done: int, begun: int) -> None:
        await self._write(self._advance(done, begun), after=done)
        self._checkpoint = self._checkpoint_at(done, begun)

    def _emit_started(self, unit: Unit) -> None:
        self._execution.running.statement(unit.first, unit.statements[0].line)

    def _limits(self, unit: Unit) -> dict[str, float]:
        """Return the limits that a unit is held to; what the file has set by then is not ours to set."""
        # lock_timeout inside a concurrent build would leave an INVALID index: such waiting is watched instead.
        wait = 0.0 if unit.is_concurrent else self._execution.lock_timeout_secs
        limits = {"lock_timeout": wait, "statement_timeout": self._execution.statement_timeout_secs}
        limits["transaction_timeout"] = 0.0  # since PostgreSQL 17, and it ends whatever runs
        set_by_file = set(map(kinds.setting, unit.settings))
        return {name: secs for name, secs in limits.items() if name not in set_by_file}

    async def _prepare_session(self, done: int) -> None:
        """Set a session of our own as it would be after the statements that an earlier run has done."""
        in_force = await in_slices(finding_in_force(self._statements[:done]))
        settings = _again(statement for _, statement in in_force)
        role = set_role_sql(self._execution.history.role, local=False)
        if self._session.pooled or not (settings or role or self._session.shared or self._execution.schema is not None):
            return
        kept = save_settings_sql(local=False) if self._session.shared else ""
        body = f"BEGIN {self._session.note_pid_sql()} {kept}{self._execution.search_path_sql(local=False)} END"
        try:
            await self._session.run(
                f"{self._label} {do_block(body)}; {role}{settings}",
                on_note=StatementTracker(self._session, self._execution),
            )
        except ServerError as error:
            await self._session.recover()
            raise await self._failed_error(error, Message(), done, UNFINISHED) from error
        finally:
            self._mark_dirty()

    async def _together(self, unit: Unit, session: Session, execution: Execution) -> None:
        """Run a unit and the record that it is done in one transaction."""
        await self._guard.check()
        message, tracker = Message(), StatementTracker(session, execution, unit.first)
        pieces = tuple(parts(unit.statements))
        around = self._around(unit, several=len(pieces) > 1)
        if unit.kind is Kind.COMMIT:
            self._emit_started(unit)  # no marker can stand before a BEGIN
        try:
            for part in pieces:
                message = await in_slices(self._composing(unit, part, around, tracker.transaction or ""))
                tracker.running = unit.first + part.start
                await session.run(str(message), on_note=tracker, on_event=execution.on_event)
        except ServerError as error:
            await session.recover()
            raise await self._failed_error(error, message, tracker.running, UNFINISHED) from error
        finally:
            self._mark_dirty()

    def _around(self, unit: Unit, *, several: bool) -> Wrapping:
        """Return what has to hold for a transactional unit, and its record; `several` messages take it."""
        session, execution = self._session, self._execution
        prelude, limits = session.note_pid_sql() + NOTICE_A_DEAD_CLIENT, self._limits(unit)
        if limits.pop("transaction_timeout", None) is not None:
            prelude += NO_TRANSACTION_TIMEOUT
        limited = "".join(f"SET LOCAL {name} = {milliseconds(secs)}; " for name, secs in limits.items())
        if session.pooled:
            prelude = save_settings_sql(local=True) + prelude + execution.search_path_sql(local=True)
        if several:
            prelude += f" {stay_in_transaction_sql()} {note_transaction_sql(session)}"
        start = f"{do_block(f'BEGIN {prelude} END')}; {limited}"
        if session.pooled:
            start += set_role_sql(execution.history.role, local=True) + _again(unit.settings)
            ours = reset(shared=True, saved=True)
        else:
            ours = own_role_sql(execution.history.role, shared=session.shared)
        record = do_block(f"BEGIN {self._advance(unit.past, unit.past)} END")
        end = f"{RUN_DEFERRED}{ours}{execution.limits_sql()}{record}; "
        if unit.kind is Kind.COMMIT:
            return Wrapping(start=start, end=end)
        return Wrapping(before=f"BEGIN ISOLATION LEVEL READ COMMITTED; {start}", after=f"{end}COMMIT")

    def _composing(self, unit: Unit, part: range, around: Wrapping, transaction: str) -> Slices[Message]:
        """Compose, in slices, the message that runs a part of a unit, each statement behind a marker.

        SET TRANSACTION wants to be the first after BEGIN: not even a marker may stand before it. In a further message
        `transaction` is the one that it must still be.
        """
        message, opening = Message(f"{self._label} "), _opening(unit)
        if part.start == 0:
            message.add(around.before)
        elif part.start > opening:
            message.add(f"{check_transaction_sql(transaction)};\n")
        for number in part:
            statement = unit.statements[number]
            if number == opening:
                message.add(around.start)
            if number == len(unit.statements) - 1:
                message.add(around.end)
            if number >= opening:
                message.add(f"{self._session.marker_sql(str(unit.first + number))}; ")
            message.add_statement(statement)
            message.add(self._execution.again_after_sql(statement, local=self._session.pooled))
            yield
        message.add(around.after if part.stop == len(unit.statements) else RESET_CLIENT_ENCODING)
        message.join()
        yield
        return message

    async def _outside(self, unit: Unit) -> None:
        """Run a unit outside of a transaction of ours; that it was begun is recorded first."""
        statement = unit.statements[0]
        await self._guard.check()
        if not self._in_doubt and not await self._is_hopeless(unit):
            await self._record(unit.first, unit.past)
        self._emit_started(unit)
        blocked = LockTimeout(
            f"{self._migration.file}:{statement.line}: blocked by other sessions",
            hint=UNKNOWN if self._is_undecidable(unit) else UNFINISHED,
            version=self._migration.version,
            file=self._migration.file,
            line=statement.line,
            excerpt=location.excerpt(self._migration.sql, statement.start, file=self._migration.file),
        )
        dirty_backends, connections = set[int](), 0

        async def alone(session: Session, execution: Execution) -> None:
            nonlocal connections
            if connections != session.connections:  # the first one, and each in place of one that was given up
                dirty_backends.update(await self._set_for_session(unit))
                connections = session.connections
            await self._alone(unit, session, execution)

        try:
            watched = unit.is_concurrent or unit.kind is not Kind.NOT_RESUMABLE
            await self._with_lock_retries(alone, at_length=blocked if watched else None)
        except AmpdError:
            await self._restore_begun(unit)
            raise
        if dirty_backends:
            await restore_settings(self._source, self._session, self._execution, reset(shared=True), dirty_backends)
        await self._record(unit.past, unit.past)
        if statement.words[:2] == ("DISCARD", "ALL"):
            await self._prepare_session(unit.past)

    async def _is_hopeless(self, unit: Unit) -> bool:
        """Tell whether the server is bound to refuse a statement, or to leave things as they are.

        It must not be recorded as begun: whatever a later run found would not be the work of this one.
        """
        statement = unit.statements[0]
        if build := kinds.index_build(statement):
            return build.name is not None and await self._ask(indexes.is_taken_sql(build), bool, unit)
        if unit.kind is Kind.DROP_INDEX_CONCURRENTLY and (names := kinds.dropped_indexes(statement)):
            return not await self._ask(indexes.are_there_sql(names), bool, unit)
        return False

    async def _restore_begun(self, unit: Unit) -> None:
        """Record that a statement was not begun: it was never sent, or was refused and nothing of it is left."""
        words = unit.statements[0].words
        atomic = unit.kind is not Kind.NOT_RESUMABLE or words[:1] in (("CREATE",), ("DROP",))
        recorded = self._checkpoint != self._checkpoint_at(unit.first, unit.first)
        if recorded and not self._in_doubt and (not self._begun or (self._refused and atomic)):
            with suppress(AmpdError, LockTaken):
                if not await self._leftovers(unit):
                    await self._record(unit.first, unit.first)

    async def _set_for_session(self, unit: Unit) -> set[int]:
        """Set what must hold for a unit that no transaction of ours is around, and return what a pooler has lent."""
        session, execution, settings = self._session, self._execution, ""
        told, path = session.note_pid_sql(), ""
        if session.pooled:
            told += save_settings_sql(local=False)
            settings = set_role_sql(execution.history.role, local=False) + _again(unit.settings)
            path = told + execution.search_path_sql(local=False) if settings or execution.schema is not None else ""
        session.backend_pid = None  # unless something is set
        limits = _limits_that_differ(self._limits(unit), "" if path else told)
        prelude = do_block(f"BEGIN {path} {limits} END")
        try:
            await session.run(f"{self._label} {prelude}; {settings}", on_note=StatementTracker(session, execution))
        except ServerError as error:
            await session.recover()
            raise await self._failed_error(error, Message(), unit.first, UNFINISHED) from error
        finally:
            self._mark_dirty()
        pid, session.backend_pid = session.backend_pid, None  # what follows may meet another
        if not session.pooled or pid is None:
            return set()
        if pid != self._backend.pid:
            await in_slices(check_no_session(execution, self._backend))
        return {pid}

    def _mark_dirty(self) -> None:
        if self._session.backend_pid is not None:
            self._dirty_backends.add(self._session.backend_pid)

    async def _alone(self, unit: Unit, session: Session, execution: Execution) -> None:
        """Run a unit as it stands, unless it was begun before and turns out to be done."""
        await self._guard.check()
        message = Message(f"{self._label} ")
        if len(unit.statements) > 1:
            message = await in_slices(self._composing(unit, range(len(unit.statements)), Wrapping(), ""))
        else:
            message.add_statement(unit.statements[0])
        tracker = StatementTracker(session, execution, unit.first)
        aftermath = UNKNOWN if unit.kind is Kind.NOT_RESUMABLE else UNFINISHED
        try:
            if self._in_doubt or self._begun:
                cleared = await self._clear_away(unit)
                if self._in_doubt and await self._is_done(unit, cleared=cleared):
                    return
            await self._check_no_other_build(unit)
            self._in_doubt, self._begun = False, True
            await session.run(str(message), on_note=tracker, on_event=execution.on_event)
        except ServerError as error:
            self._refused = True
            await session.recover()
            raise await self._failed_error(error, message, tracker.running, aftermath) from error
        if unit.kind is Kind.CREATE_INDEX_CONCURRENTLY:
            await self._check_valid(unit)

    async def _failed_error(self, error: ServerError, message: Message, running: int, aftermath: str) -> Exception:
        if error.sqlstate == table.MOVED:
            return LockTaken(error.message)
        if harm := refusals.harm(error, self._execution.history):
            statement = self._statements[min(max(running, 0), len(self._statements) - 1)]
            return harm_error(harm, error, self._execution, statement, aftermath=aftermath)
        offset, repeatable = None, aftermath is UNFINISHED
        if error.position:
            offset = message.script_offset(error.position, counts_bytes=self._session.counts_bytes)
        statement = self._statements[min(running, len(self._statements) - 1)]
        if aftermath is UNFINISHED and await in_slices(binding_to_session(self._statements, self._checkpoint.done)):
            aftermath = UNKNOWN
        meant = migration_error(
            error, self._migration, statement, offset, aftermath=aftermath, statements=self._statements
        )
        return LockUnavailable(meant) if isinstance(meant, LockTimeout) and repeatable else meant

    async def _leftovers(self, unit: Unit) -> list[indexes.Leftover]:
        """Return the INVALID indexes that a statement has left behind."""
        statement = unit.statements[0]
        build = kinds.index_build(statement)
        if build is None and not (statement.words[:1] == ("REINDEX",) and kinds.is_concurrent(statement)):
            return []
        begun_by_sql = await self._ask(indexes.begun_by_sql(self._execution.history, self._migration.version), str)
        question = (
            indexes.invalid_builds_sql(build, begun_by_sql) if build else indexes.invalid_copies_sql(begun_by_sql)
        )
        return await self._ask(question, list[indexes.Leftover], unit)

    async def _clear_away(self, unit: Unit) -> bool:
        """Drop what a statement has left behind, and tell whether there was anything.

        Raises:
            LockUnavailable: another session works on the table; an index of its own is INVALID while it is built.
        """
        leftovers = await self._leftovers(unit)
        for each in leftovers:
            if each.worker is not None:
                raise LockUnavailable(self._busy_error(unit, each.worker))
            self._execution.on_event(
                Warned(message=f"dropping the INVALID index {each.name} that an interrupted run left")
            )
            await self._session.run(f"{self._label} DROP INDEX CONCURRENTLY IF EXISTS {each.name}")
        return bool(leftovers)

    async def _check_no_other_build(self, unit: Unit) -> None:
        """Let whoever builds an index on the same table finish: two such builds would wait for one another.

        Raises:
            LockUnavailable: another session is at it.
        """
        if build := kinds.index_build(unit.statements[0]):
            worker = await self._ask(indexes.worker_sql(build), indexes.Worker, unit)
            if worker.pid is not None:
                raise LockUnavailable(self._busy_error(unit, worker.pid))

    def _busy_error(self, unit: Unit, worker: int) -> LockTimeout:
        file, line = self._migration.file, unit.statements[0].line
        return LockTimeout(
            f"{file}:{line}: session {worker} is at work on the table, such as building another index",
            hint=UNFINISHED,
            version=self._migration.version,
            file=file,
            line=line,
        )

    async def _is_done(self, unit: Unit, *, cleared: bool) -> bool:
        """Tell whether the statement in doubt has done its work.

        Raises:
            MigrationInterrupted: that cannot be told.
        """
        statement = unit.statements[0]
        if cleared:
            return False
        if self._is_undecidable(unit):
            raise self._undecidable_error()
        if build := kinds.index_build(statement):
            index = await self._ask(indexes.index_sql(build), indexes.Index, unit)
            if index.name is not None and not index.valid:
                await self._check_no_other_build(unit)
                raise self._undecidable_error(
                    f"the INVALID index {index.name} is older than the record that its build was begun: if nobody "
                    f"needs it, DROP INDEX CONCURRENTLY {index.name} and run again; else "
                )
            return index.name is not None
        if names := kinds.dropped_indexes(statement):
            return not await self._ask(indexes.are_there_sql(names), bool, unit)
        return False

    def _is_undecidable(self, unit: Unit) -> bool:
        """Tell whether nothing tells afterwards if a statement that was given up has done its work."""
        statement = unit.statements[0]
        if unit.kind is Kind.CREATE_INDEX_CONCURRENTLY:
            build = kinds.index_build(statement)
            return build is None or build.name is None
        if unit.kind is Kind.DROP_INDEX_CONCURRENTLY:
            return not kinds.dropped_indexes(statement)
        return unit.kind is Kind.NOT_RESUMABLE

    def _undecidable_error(self, first: str = "") -> MigrationInterrupted:
        conflict = conflict_of(msgspec.structs.replace(self._execution.info, state=State.INTERRUPTED))
        return MigrationInterrupted(conflict.message, conflicts=(conflict,), hint=first + conflict.hint)

    async def _check_valid(self, unit: Unit) -> None:
        """Raise if there is no valid index: with IF NOT EXISTS the server is content with anything of that name."""
        build = kinds.index_build(unit.statements[0])
        if build is None or build.name is None:
            return
        index = await self._ask(indexes.index_sql(build), indexes.Index, unit)
        if index.valid:
            return
        migration, line = self._migration, unit.statements[0].line
        if index.name is None:
            problem = f"there is no index {build.name} on {'.'.join(build.table)}: something else has that name"
            hint = "give the index another name"
            if self._session.pooled:
                problem = f"there is no index {build.name} on {'.'.join(build.table)}"
                hint = "something else has that name, or the pooler has built it in another schema: connect directly"
        else:
            problem = f"index {index.name} exists and is INVALID: an earlier build failed"
            hint = f"DROP INDEX CONCURRENTLY {index.name}; then run `ampd migrate` again"
        self._refused = True
        raise MigrationFailed(
            f"{migration.file}:{line}: {problem}",
            hint=hint,
            version=migration.version,
            file=migration.file,
            line=line,
            excerpt=location.excerpt(migration.sql, unit.statements[0].start, file=migration.file),
        )

    async def _ask(self, expression: str, kind: type[T], unit: Unit | None = None) -> T:
        """Ask what a unit would find, with the role and the search path that the file has set; or ask as ourselves."""
        session = self._session
        if unit is None:
            there = own_role_sql(self._execution.history.role, shared=session.shared)
        elif session.pooled:
            there = set_role_sql(self._execution.history.role, local=True)
            there += f"{do_block(f'BEGIN {self._execution.search_path_sql(local=True)} END')}; {_again(unit.settings)}"
        else:
            there = ""
        question = do_block(f"BEGIN {session.note_sql(f'pg_catalog.to_jsonb({expression})')} END")
        return await session.ask(f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {there}{question}; ROLLBACK", kind)


def _again(settings: Iterable[scanner.Statement]) -> str:
    return "".join(f"{each.text}\n; " for each in settings)


def _limits_that_differ(limits: Mapping[str, float], told: str) -> str:
    """Return PL/pgSQL that sets limits beyond the transaction, and tells it, only where they differ.

    Each that is set has to be taken back, which behind a pooler takes a search.
    """
    return " ".join(
        f"IF (SELECT setting OPERATOR(pg_catalog.<>) '{milliseconds(secs)}' FROM pg_catalog.pg_settings "
        f"WHERE name OPERATOR(pg_catalog.=) '{name}') THEN "
        f"{told}PERFORM pg_catalog.set_config('{name}', '{milliseconds(secs)}', false); END IF;"
        for name, secs in limits.items()
    )
