"""Applying a `-- no-transaction` migration: statement by statement, under a guard that holds the lock.

The lock ends with its transaction, and these statements run outside of one; so a second connection, the guard, sits in
an open transaction and holds the lock. It speaks the simple protocol only and so holds no snapshot, which a CREATE
INDEX CONCURRENTLY would wait for. It has a lease: it sends a heartbeat every few seconds, and the server ends it when
it falls silent, so that a runner that is cut off keeps nobody waiting.

What is recorded when, and what the next run makes of it, is the table in `protocol.py`; this file follows it.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio

from ampd import advisory_lock
from ampd.advisory_lock import LockTaken
from ampd.errors import AmpdError, ConnectionFailed, LockTimeout, MigrationFailed, NoAnswer
from ampd.history import reading, refusals, writing
from ampd.history.writing import Checkpoint
from ampd.postgres.connection_wait import ConnectionsBusy
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError
from ampd.resumption import DoneChecksums, Resumption, binding_to_session
from ampd.sql.kinds import Kind
from ampd.sql.slices import in_slices
from ampd.sql.units import Unit, finding_in_force, units
from ampd.sqlstates import MOVED

from .background import in_background
from .diagnosis import migration_error
from .guard import Guard
from .location import location_of
from .message import Message
from .outcome import RESUMABLE, Outcome, is_undecidable
from .pooler import Backend, check_no_session, find_backend, restore_settings
from .protocol import Protocol, State, Step
from .session_state import own_role_sql, reset_session_sql, reset_settings_sql, save_settings_sql, set_role_sql
from .table_locks import with_lock_retries
from .tracker import StatementTracker, note_lock_sql
from .transaction import LockUnavailable, harm_error, refused_error
from .transaction_message import parts
from .unit_message import Wrapping, again_sql, composing, limits_of, limits_that_differ_sql, wrapping_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ampd.postgres.connection import Session
    from ampd.postgres.database import Database

    from .prepared import Execution


HALTED = (
    "nothing more was run, and this statement is not recorded as done: put that table back as it was, then run again"
)
UNKNOWN = "it is recorded as unfinished: check how far it got; `ampd status` says how to resolve it"


async def apply_no_transaction(database: Database, session: Session, guarding: Session, execution: Execution) -> None:
    """Apply one no-transaction migration, or what is left of it, on two sessions.

    Raises:
        ConnectionsBusy: a pooler had no server connections for both; nothing was begun.
        LockTaken: another runner has the lock.
        MigrationInterrupted: the catalog does not show whether the statement in doubt has completed.
        AmpdError: a statement failed; those before it are done and recorded.
    """
    guard = Guard(guarding)
    try:
        try:
            await guard.acquire(execution, database.connection_wait.at_once)
            backend = await find_backend(session, execution, database.connection_wait.at_once)
        except NoAnswer as error:
            raise ConnectionsBusy(error) from error
        if execution.info.applied is not None:
            await _check_again(session, execution)
        async with in_background(guard.heartbeat):
            await StatementRunner(database, session, guard, execution, backend).run()
    finally:
        await guarding.recover()  # a pooler throws away a server connection that is left in a transaction


async def _check_again(session: Session, execution: Execution) -> None:
    """Check, under the lock, that what is to be resumed is as it was when the history was read.

    Raises:
        LockTaken: another runner has gone on with it, or the server still runs a statement of one that is gone.
    """
    now = await reading.read(session, execution.history.place, lock_schema=execution.history.schema)
    row = next((row for row in now.applied if row.version == execution.migration.version), None)
    if row != execution.info.applied:
        raise LockTaken("another runner has gone on with it")
    if now.holder is not None and now.holder.migration is not None:
        raise LockTaken("a statement of a runner that is gone still runs")


class StatementRunner:
    """The remaining statements of one migration, under a guard.

    On a connection of our own the session keeps what the file sets, as it would in psql. Behind a pooler each message
    may meet another session, so that everything is set for one message or one unit, and taken back with it.
    """

    def __init__(
        self, database: Database, session: Session, guard: Guard, execution: Execution, backend: Backend
    ) -> None:
        self._database = database
        self._session = session
        self._guard = guard
        self._execution = execution
        self._backend = backend
        self._migration = execution.migration
        self._statements = execution.statements
        self._checksums = DoneChecksums(self._statements)
        self._label = advisory_lock.label_sql(execution.history.lock_key, self._migration.label)
        self._checkpoint = Checkpoint(0, None)  # what the history says
        self._protocol = Protocol(State.READY)  # of the statement to run next
        self._outcome = Outcome(session, execution, self._label)
        self._dirty_backends = set[int]()
        self._connections = session.connections  # at the time of the last _prepare_session

    async def run(self) -> None:
        """Run what is left of the migration, and record each step of it."""
        resume = await self._enter()
        try:
            settings = await in_slices(finding_in_force(self._statements[: resume.done]))
            await in_slices(self._checksums.computing(resume.done))
            await self._prepare_session(resume.done)
            state = State.IN_DOUBT if resume.in_doubt else State.READY
            for unit in units(self._statements, resume.done, settings):
                await in_slices(self._checksums.computing(unit.past))
                self._protocol, state = Protocol(state), State.READY
                if unit.is_transactional:
                    await self._with_lock_retries(partial(self._run_in_transaction, unit))
                    self._checkpoint = self._checkpoint_at(unit.past, unit.past)
                    self._protocol.take(Step.COMMIT)
                else:
                    await self._run_outside(unit)
            await self._guard.check()
            history, count = self._execution.history, len(self._statements)
            finish = writing.finish_no_transaction_sql(history, self._migration, self._checkpoint, count)
            await self._write(finish, after=count)
        finally:
            with anyio.CancelScope(shield=True):
                await restore_settings(
                    self._database,
                    self._session,
                    self._execution,
                    reset_session_sql(self._session.saved_as, required=not self._session.pooled),
                    self._dirty_backends,
                )

    async def _enter(self) -> Resumption:
        """Record that the migration is started, if it is not yet, and return where to go on."""
        history, row = self._execution.history, self._execution.info.applied
        column, begun = writing.add_done_checksum_sql(history), note_lock_sql(self._session)
        if row is not None:
            self._checkpoint = Checkpoint(row.statements_done, row.done_checksum)
            await self._write(f"{writing.enter_sql(history, column)}{begun}")
            return self._execution.info.resumption or Resumption(0, in_doubt=False)
        enter = writing.enter_sql(history, writing.insert_sql(history, self._migration), column)
        await self._write(f"{enter}{self._advance_sql(0, 0)}{begun}")
        self._checkpoint = self._checkpoint_at(0, 0)
        return Resumption(0, in_doubt=False)

    async def _with_lock_retries(
        self, attempt: Callable[[], Awaitable[None]], *, blocked: AmpdError | None = None
    ) -> None:
        async def prepared(session: Session) -> None:
            if session.connections != self._connections:
                await self._prepare_again()
            await attempt()

        await with_lock_retries(
            self._database,
            self._session,
            lambda: self._execution,
            prepared,
            blocked=blocked,
            fallback=self._guard.session,
        )

    async def _prepare_again(self) -> None:
        """Prepare the connection that has replaced one that was given up.

        Raises:
            ConnectionFailed: what is left to do needs what the file has made for the session that is gone.
        """
        if not self._session.pooled:
            self._dirty_backends.clear()  # gone with their connection
        if await in_slices(binding_to_session(self._statements, self._checkpoint.done)):
            raise ConnectionFailed(
                "the connection to the server was given up, and what the file has made for its session is gone with it",
                hint=UNKNOWN,
                **location_of(self._migration),
            )
        self._backend = await find_backend(self._session, self._execution)
        await self._prepare_session(self._checkpoint.done)
        self._connections = self._session.connections

    async def _write(self, body: str, *, after: int = 0) -> None:
        """Run PL/pgSQL of our own in a transaction, with our own role; `after` is the number of statements done."""
        await self._with_lock_retries(partial(self._write_once, body, after))

    async def _write_once(self, body: str, after: int) -> None:
        session, execution = self._session, self._execution
        block = do_block(f"BEGIN {session.note_pid_sql()} {body} END")
        ours = own_role_sql(execution.history.role, session.saved_as)
        message = f"{self._label} BEGIN ISOLATION LEVEL READ COMMITTED; {ours}{execution.limits_sql()}{block}; COMMIT"
        try:
            await session.run(message, on_note=StatementTracker(session, execution))
        except ServerError as error:
            await session.recover()
            if after and error.sqlstate != MOVED and (harm := refusals.harm(error, execution.history)):
                raise harm_error(harm, error, execution, self._statements[after - 1], aftermath=HALTED) from error
            raise refused_error(error, execution) from error

    def _checkpoint_at(self, done: int, begun: int) -> Checkpoint:
        return Checkpoint(done, self._checksums.of(begun))

    def _advance_sql(self, done: int, begun: int) -> str:
        return writing.advance_sql(
            self._execution.history, self._migration, self._checkpoint, self._checkpoint_at(done, begun)
        )

    async def _record(self, step: Step, done: int, begun: int) -> None:
        """Record in the history how many statements are done and begun, and take that step of the protocol."""
        await self._write(self._advance_sql(done, begun), after=done)
        self._checkpoint = self._checkpoint_at(done, begun)
        self._protocol.take(step)

    def _emit_started(self, unit: Unit) -> None:
        self._execution.running.statement(unit.first, unit.statements[0].line)

    async def _prepare_session(self, done: int) -> None:
        """Set a session of our own as the first `done` statements have left it."""
        in_force = await in_slices(finding_in_force(self._statements[:done]))
        settings = again_sql(statement for _, statement in in_force)
        role = set_role_sql(self._execution.history.role, local=False)
        if self._session.pooled or not (settings or role or self._session.shared or self._execution.schema is not None):
            return
        kept = save_settings_sql(self._session.saved_as, local=False) if self._session.shared else ""
        body = f"BEGIN {self._session.note_pid_sql()} {kept}{self._execution.search_path_sql(local=False)} END"
        await self._set(f"{do_block(body)}; {role}{settings}", done)

    async def _set(self, settings: str, running: int) -> None:
        """Run statements of our own that set the session for statement `running` and what follows."""
        session, execution = self._session, self._execution
        try:
            await session.run(f"{self._label} {settings}", on_note=StatementTracker(session, execution))
        except ServerError as error:
            await session.recover()
            raise await self._failed_error(error, Message(), running) from error
        finally:
            self._mark_dirty()

    async def _run_in_transaction(self, unit: Unit) -> None:
        """Run a unit and the record that it is done in one transaction."""
        session, execution = self._session, self._execution
        await self._guard.check()
        message, tracker = Message(), StatementTracker(session, execution, unit.first)
        pieces = tuple(parts(unit.statements))
        record = do_block(f"BEGIN {self._advance_sql(unit.past, unit.past)} END")
        around = wrapping_of(unit, record, session, execution, several=len(pieces) > 1)
        if unit.kind is Kind.COMMIT:
            self._emit_started(unit)  # no marker can stand before a BEGIN
        try:
            for part in pieces:
                transaction = tracker.transaction or ""
                message = await in_slices(
                    composing(unit, part, around, session, execution, self._label, transaction=transaction)
                )
                tracker.running = unit.first + part.start
                await session.run(str(message), on_note=tracker, on_event=execution.on_event)
        except ServerError as error:
            await session.recover()
            raise await self._failed_error(error, message, tracker.running) from error
        finally:
            self._mark_dirty()

    async def _run_outside(self, unit: Unit) -> None:
        """Run a unit outside of a transaction of ours; that it was begun is recorded first."""
        statement = unit.statements[0]
        await self._guard.check()
        if self._protocol.state is State.READY and not await self._outcome.is_hopeless(unit):
            await self._record(Step.RECORD, unit.first, unit.past)
        self._emit_started(unit)
        blocked = LockTimeout(
            f"{self._migration.file}:{statement.line}: blocked by other sessions",
            hint=UNKNOWN if is_undecidable(unit) else RESUMABLE,
            **location_of(self._migration, statement.start),
        )
        dirty_backends, connections = set[int](), 0

        async def attempt() -> None:
            nonlocal connections
            if connections != self._session.connections:  # the first one, and each in place of one that was given up
                dirty_backends.update(await self._set_for_session(unit))
                connections = self._session.connections
            await self._send_outside(unit)

        try:
            watched = unit.is_concurrent or unit.kind is not Kind.NOT_RESUMABLE
            await self._with_lock_retries(attempt, blocked=blocked if watched else None)
        except AmpdError:
            await self._withdraw(unit)
            raise
        if dirty_backends:
            await restore_settings(
                self._database,
                self._session,
                self._execution,
                reset_settings_sql(self._session.saved_as),
                dirty_backends,
            )
        await self._record(Step.FINISH, unit.past, unit.past)
        if statement.words[:2] == ("DISCARD", "ALL"):
            await self._prepare_session(unit.past)

    async def _withdraw(self, unit: Unit) -> None:
        """Withdraw the record that a statement was begun, if it was never sent or has left nothing."""
        words, state = unit.statements[0].words, self._protocol.state
        atomic = unit.kind is not Kind.NOT_RESUMABLE or words[:1] in (("CREATE",), ("DROP",))
        if state is State.RECORDED or (state is State.REFUSED and atomic):
            with suppress(AmpdError, LockTaken, ServerError):
                if not await self._outcome.leftovers(unit):
                    await self._record(Step.WITHDRAW, unit.first, unit.first)

    async def _set_for_session(self, unit: Unit) -> set[int]:
        """Set what a unit outside of our transactions needs, and return the backends of a pooler that were changed."""
        session, execution, settings = self._session, self._execution, ""
        before, path = session.note_pid_sql(), ""
        if session.pooled:
            before += save_settings_sql(session.saved_as, local=False)
            settings = set_role_sql(execution.history.role, local=False) + again_sql(unit.settings)
            path = before + execution.search_path_sql(local=False) if settings or execution.schema is not None else ""
        session.backend_pid = None  # unless something is set
        limits = limits_that_differ_sql(limits_of(unit, execution), "" if path else before)
        await self._set(f"{do_block(f'BEGIN {path} {limits} END')}; {settings}", unit.first)
        pid, session.backend_pid = session.backend_pid, None  # what follows may meet another
        if not session.pooled or pid is None:
            return set()
        if pid != self._backend.pid:
            await in_slices(check_no_session(execution, self._backend))
        return {pid}

    def _mark_dirty(self) -> None:
        if self._session.backend_pid is not None:
            self._dirty_backends.add(self._session.backend_pid)

    async def _send_outside(self, unit: Unit) -> None:
        """Send a unit as it stands, unless it is in doubt and turns out to be done."""
        session, execution = self._session, self._execution
        await self._guard.check()
        message = Message(f"{self._label} ")
        if len(unit.statements) > 1:
            whole = range(len(unit.statements))
            message = await in_slices(composing(unit, whole, Wrapping(), session, execution, self._label))
        else:
            message.add_statement(unit.statements[0])
        tracker = StatementTracker(session, execution, unit.first)
        resumable = unit.kind is not Kind.NOT_RESUMABLE
        try:
            if self._protocol.state not in (State.READY, State.RECORDED):
                dropped = await self._outcome.drop_leftovers(unit)
                if self._protocol.state is State.IN_DOUBT and await self._outcome.is_done(unit, dropped=dropped):
                    return
            await self._outcome.check_no_other_build(unit)
            self._protocol.take(Step.SEND)
            try:
                await session.run(str(message), on_note=tracker, on_event=execution.on_event)
            except ServerError:
                self._protocol.take(Step.REFUSE)
                raise
        except ServerError as error:
            await session.recover()
            raise await self._failed_error(error, message, tracker.running, resumable=resumable) from error
        try:
            await self._outcome.check_valid(unit)
        except MigrationFailed:
            self._protocol.take(Step.REFUSE)
            raise

    async def _failed_error(
        self, error: ServerError, message: Message, running: int, *, resumable: bool = True
    ) -> Exception:
        """Return the error for a message that the server refused; it was at statement `running`.

        `resumable` says that the statement can be run again, if it does not need what is gone with its session.
        """
        if error.sqlstate == MOVED:
            return LockTaken(error.message)
        if harm := refusals.harm(error, self._execution.history):
            statement = self._statements[min(max(running, 0), len(self._statements) - 1)]
            aftermath = RESUMABLE if resumable else UNKNOWN
            return harm_error(harm, error, self._execution, statement, aftermath=aftermath)
        offset = None
        if error.position:
            offset = message.script_offset(error.position, counts_bytes=self._session.counts_bytes)
        statement = self._statements[min(running, len(self._statements) - 1)]
        bound = resumable and await in_slices(binding_to_session(self._statements, self._checkpoint.done))
        aftermath = RESUMABLE if resumable and not bound else UNKNOWN
        failure = migration_error(
            error, self._migration, statement, offset, aftermath=aftermath, statements=self._statements
        )
        return LockUnavailable(failure) if isinstance(failure, LockTimeout) and resumable else failure
