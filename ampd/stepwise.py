"""Applying a `-- no-transaction` migration: statement by statement, under a guard that holds the turn.

The lock ends with its transaction, and these statements run outside of one; so a second connection, the guard, sits in
an open transaction and holds the lock. It speaks the simple protocol only and so holds no snapshot, which a CREATE
INDEX CONCURRENTLY would wait for. It has a lease: it says a word every few seconds, and the server ends it when it
falls silent, so that a runner that is cut off keeps nobody waiting.

What can run in a transaction does so, together with the record that it is done. Only the rest can be in doubt after a
crash; before each of those its beginning is recorded, and afterwards the database is asked how far it came.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
import msgspec

from . import history as sql_of
from . import sql
from .apply import NOTICE_A_DEAD_CLIENT, Course, LockUnavailable, leave_no_trace, meaning, milliseconds
from .diagnose import Message, failure
from .errors import (
    AmpdError,
    ConfigError,
    ConnectionFailed,
    LockTimeout,
    MigrationFailed,
    MigrationInterrupted,
    NoAnswer,
)
from .events import StatementStarted, Warned
from .history import TurnTaken
from .locks import alongside, with_lock_retries
from .plan import Resumption, conflict_of, done_checksum, resumption
from .postgres import ANSWER_SECS, GOODBYE_SECS, RUN_AGAIN, ServerError, do_block, identifier, literal
from .sql import Kind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from .apply import Job
    from .postgres import Database, Session

T = TypeVar("T")

_WORD_EVERY_SECS = 4.0
_SEARCH_SECS = 5.0  # for a pooler's server connection that others are using
_FIRST_REST_SECS = 0.05
_SEARCH_SECS = 5.0  # for a server connection of a pooler that others are using
_FIRST_REST_SECS = 0.05

_NO_TRANSACTION_TIMEOUT = """
  BEGIN
    PERFORM pg_catalog.set_config('transaction_timeout', '0', true);
  EXCEPTION WHEN undefined_object THEN NULL;  -- before PostgreSQL 17
  END;"""

UNFINISHED = "it is recorded as unfinished: mend the cause and run `ampd migrate` again, it resumes at this statement"
UNKNOWN = "it is recorded as unfinished: look how far it came, then settle it with `ampd resolve`"


class Unit(msgspec.Struct, frozen=True):
    """Statements that succeed or fail as one: a single one, or all from a BEGIN to its COMMIT."""

    first: int
    statements: tuple[sql.Statement, ...]
    kind: Kind

    @property
    def past(self) -> int:
        """Return the number of the first statement after it."""
        return self.first + len(self.statements)

    @property
    def transactional(self) -> bool:
        """Tell whether it can be recorded in the transaction that it runs in."""
        return self.kind in (Kind.TRANSACTIONAL, Kind.SESSION, Kind.COMMIT)


def units(statements: tuple[sql.Statement, ...], first: int) -> Iterator[Unit]:
    """Yield what remains to be run from statement `first` on, explicit transactions in one piece."""
    while first < len(statements):
        past = first + 1
        kind = sql.kind(statements[first])
        if kind is Kind.BEGIN:
            while past < len(statements) and kind not in (Kind.COMMIT, Kind.ROLLBACK):
                kind = sql.kind(statements[past])
                past += 1
        yield Unit(first, statements[first:past], kind)
        first = past


class Guard:
    """The connection that holds the turn while another one works."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._speaking = anyio.Lock()

    async def take(self, job: Job) -> None:
        """Take the turn, or raise TurnTaken; the transaction stays open and has touched no table."""
        enter = f"BEGIN {_NO_TRANSACTION_TIMEOUT}{sql_of.take_turn(job.history)} END"
        message = (
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 0; "
            f"SET LOCAL idle_in_transaction_session_timeout = '{sql_of.GUARD_LEASE_SECS}s'; {do_block(enter)}"
        )
        try:
            with anyio.fail_after(ANSWER_SECS):
                await self._session.run(message)
        except TimeoutError as error:
            raise NoAnswer(
                f"a second connection got no answer for {ANSWER_SECS:g} s",
                hint="a pooler in session mode needs two connections for each runner; " + RUN_AGAIN,
            ) from error
        except ServerError as error:
            await self._session.recover()
            raise meaning(error, job, Message(), -1) from error

    async def check(self) -> None:
        """Make sure that the turn is still ours, and renew the lease.

        Raises:
            ConnectionFailed: it is not; nothing more may be run.
        """
        try:
            async with self._speaking:
                with anyio.fail_after(sql_of.GUARD_LEASE_SECS / 2):
                    await self._session.run("SELECT 1")
        except (ServerError, ConnectionFailed, TimeoutError) as error:
            raise ConnectionFailed(
                f"the connection that holds the turn was lost: {error}",
                hint="nothing more was begun; run `ampd migrate` again, it resumes after the last statement done",
            ) from error

    async def keep(self) -> None:
        """Say a word now and then, until cancelled or lost."""
        while True:
            await anyio.sleep(_WORD_EVERY_SECS)
            try:
                await self.check()
            except ConnectionFailed:
                return  # whoever is about to run the next statement will find out


async def apply_stepwise(source: Database, session: Session, job: Job) -> None:
    """Apply one no-transaction migration, or what is left of it.

    Raises:
        TurnTaken: somebody else is at it.
        MigrationInterrupted: how far the statement to resume with came cannot be told.
        AmpdError: a statement failed; those before it are done and recorded.
    """
    if source.pool_size == 1:
        raise ConfigError(
            f"{job.script.migration.label} runs outside of a transaction and needs two connections; the pool has one",
            hint="give `ampd.migrate` a pool with max_size of at least 2, or the URL",
        )
    async with source.session() as guarding:
        guard = Guard(guarding)
        await guard.take(job)
        try:
            if job.script.step.applied is not None:
                await _look_again(session, job)
            async with alongside(guard.keep):
                await _Steps(source, session, guard, job).run()
        finally:
            await guarding.recover()  # a pooler throws away a server connection that is left in a transaction


async def _look_again(session: Session, job: Job) -> None:
    """Make sure, now that nobody else can begin anything, that what is to be resumed rests where it was seen to rest.

    Raises:
        TurnTaken: another runner has gone on with it, or the server still works for one that is gone.
    """
    now = await sql_of.read(session, job.schema, who=job.history.schema)
    row = next((row for row in now.applied if row.version == job.script.migration.version), None)
    if row != job.script.step.applied:
        raise TurnTaken("another runner has gone on with it")
    if now.holder is not None and now.holder.migration is not None:
        raise TurnTaken("a statement of a runner that is gone still runs")


class _Steps:
    """The remaining statements of one migration, under a guard."""

    def __init__(self, source: Database, session: Session, guard: Guard, job: Job) -> None:
        self._source = source
        self._session = session
        self._guard = guard
        self._job = job
        self._migration = job.script.migration
        self._statements = job.script.statements
        self._label = sql_of.label(job.history.schema or "", self._migration)
        self._in_doubt = False  # whether the statement to run next was begun before
        self._touched = set[int]()  # the backends that we were given
        # What the file sets for itself is not ours to set.
        changes = " ".join(each.text.lower() for each in self._statements if sql.kind(each) is Kind.SESSION)
        self._limits = {
            name: secs
            for name, secs in (
                ("lock_timeout", job.lock_timeout_secs),
                ("statement_timeout", job.statement_timeout_secs),
            )
            if name not in changes
        }

    async def run(self) -> None:
        job, row, resume = self._job, self._job.script.step.applied, Resumption(0, in_doubt=False)
        start = sql_of.insist_on(job.history) + sql_of.create(job.history)
        if row is None:
            start += sql_of.insert(job.history, self._migration)
        else:
            resume = resumption(self._migration, row) or resume
        await self._write(start + sql_of.make_room(job.history))
        patience = _SEARCH_SECS
        try:
            self._in_doubt = resume.in_doubt
            for unit in units(self._statements, resume.done):
                if unit.transactional:
                    await self._with_lock_retries(partial(self._together, unit))
                else:
                    await self._outside(unit)
                self._in_doubt = False
            await self._guard.check()
            await self._write(f"{sql_of.finish_stepwise(job.history, self._migration, len(self._statements))};")
        except anyio.get_cancelled_exc_class():
            patience = GOODBYE_SECS
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self._take_back(leave_no_trace(self._statements), self._touched, patience)

    async def _take_back(self, resets: str, touched: set[int], patience: float = _SEARCH_SECS) -> None:
        """Clean the session; behind a pooler, each of its server connections that we have touched and can get in time.

        It hands out first what was given back last, which hides the others, and some may be in other hands by now.
        """
        session, rest = self._session, _FIRST_REST_SECS
        with anyio.move_on_after(patience):
            with anyio.move_on_after(GOODBYE_SECS), suppress(ServerError, AmpdError):
                if await session.recover():
                    pid = do_block(f"BEGIN {session.note_pid()} END")
                    await session.run(f"{resets}{pid}", on_note=Course(session, self._job))
                    touched.discard(session.backend_pid or 0)
            if session.server_pid in touched:  # no pooler: the connection is gone, and what was set on it as well
                return
            while touched:
                with anyio.move_on_after(GOODBYE_SECS), suppress(ServerError, AmpdError):
                    await self._search(resets, touched)
                if touched:  # let those through who wait for what we have held
                    await anyio.sleep(rest)
                    rest *= 2
        if touched:
            pids = ", ".join(map(str, sorted(touched)))
            told = f"what {self._migration.label} has set may still hold in the pooler's server connection, pid {pids}"
            self._job.on_event(Warned(message=f"{told}: RECONNECT in the pooler's console renews it"))

    async def _search(self, resets: str, touched: set[int]) -> None:
        """Clean the touched ones among a pooler's idle server connections, and hold the others until all are found."""
        alive = f"""(SELECT COALESCE(pg_catalog.jsonb_agg(pid), '[]') FROM pg_catalog.pg_stat_activity
            WHERE pid OPERATOR(pg_catalog.=) ANY (ARRAY{sorted(touched)}))"""
        touched.intersection_update(await self._ask(alive, list[int]))
        async with AsyncExitStack() as holding:
            while touched:
                session = await holding.enter_async_context(self._source.second_session(GOODBYE_SECS))
                holding.push_async_callback(session.recover)  # a pooler throws away what is left in a transaction
                pid = do_block(f"BEGIN {session.note_pid()} END")
                await session.run(f"BEGIN; {pid}", on_note=Course(session, self._job))
                if session.backend_pid in touched:
                    await session.run(f"{resets}COMMIT")
                    touched.discard(session.backend_pid)

    async def _with_lock_retries(
        self, attempt: Callable[[Session, Job], Awaitable[None]], *, at_length: AmpdError | None = None
    ) -> None:
        await with_lock_retries(self._source, self._session, self._job, attempt, at_length=at_length)

    async def _write(self, body: str) -> None:
        """Run PL/pgSQL of our own in a transaction."""
        await self._with_lock_retries(partial(self._written, body))

    async def _written(self, body: str, session: Session, job: Job) -> None:
        block = do_block(f"BEGIN {session.note_pid()} {body} END")
        message = f"{self._label} BEGIN ISOLATION LEVEL READ COMMITTED; {job.set_limits()}{block}; COMMIT"
        try:
            await session.run(message, on_note=Course(session, job))
        except ServerError as error:
            await session.recover()
            raise meaning(error, job, Message(), -1) from error

    def _tell(self, unit: Unit) -> None:
        self._job.on_event(
            StatementStarted(
                version=self._migration.version,
                number=unit.first + 1,
                statements=len(self._statements),
                line=unit.statements[0].line,
            )
        )

    def _record(self, done: int, begun: int) -> str:
        return sql_of.record(self._job.history, self._migration, done, done_checksum(self._statements[:begun]))

    def _settings(self, first: int) -> str:
        """Return again what the file has set for its session before statement `first`.

        Not even that session need be the same one: an earlier run may have been interrupted, and a pooler in
        transaction mode hands out another one each time. So it is set and taken back with every single unit.
        """
        return "".join(f"{each.text}\n; " for each in self._statements[:first] if _is_setting(each))

    async def _together(self, unit: Unit, session: Session, job: Job) -> None:
        """Run a unit and the record that it is done in one transaction."""
        await self._guard.check()
        limits = "".join(f"SET LOCAL {name} = {milliseconds(secs)}; " for name, secs in self._limits.items())
        prelude = f"BEGIN {session.note_pid()}{NOTICE_A_DEAD_CLIENT}{job.set_path(local=True)} END"
        start = f" {limits}{do_block(prelude)}; {self._settings(unit.first)}"
        end = f" {_RESETS}{job.set_limits()}{self._record(unit.past, unit.past)}; "
        message = Message(f"{self._label} ")
        explicit = unit.kind is Kind.COMMIT
        if not explicit:
            message.add(f"BEGIN ISOLATION LEVEL READ COMMITTED;{start}")
        for number, statement in enumerate(unit.statements, start=unit.first):
            if explicit and number == unit.past - 1:
                message.add(end)
            message.add(f"{session.marker(str(number))}; ")
            message.add_statement(statement)
            if explicit and number == unit.first:
                message.add(start)
        if not explicit:
            message.add(f"{end}COMMIT")
        course = Course(session, job, unit.first)
        try:
            await session.run(str(message), on_note=course, on_event=job.on_event)
        except ServerError as error:
            await session.recover()
            raise self._refused(error, message, course.running, UNFINISHED) from error
        finally:
            self._touch()

    async def _outside(self, unit: Unit) -> None:
        """Run a unit outside of a transaction of ours; that it was begun is recorded first."""
        opaque, statement = unit.kind is Kind.OPAQUE, unit.statements[0]
        await self._guard.check()
        # Where it stands recorded already the row stays as old as that: what is younger is this statement's work.
        if not (self._in_doubt and self._is_recorded(unit)):
            await self._write(f"{self._record(unit.first, unit.past)};")
        self._tell(unit)
        blocked = LockTimeout(
            f"{self._migration.file}:{statement.line}: blocked by other sessions",
            hint=UNFINISHED,
            version=self._migration.version,
            file=self._migration.file,
            line=statement.line,
            excerpt=sql.excerpt(self._migration.sql, statement.start, file=self._migration.file),
        )
        touched = await self._set_for_session(unit)
        await self._with_lock_retries(partial(self._alone, unit), at_length=None if opaque else blocked)
        if touched:
            await self._take_back(_RESETS, touched)
        await self._write(f"{self._record(unit.past, unit.past)};")

    async def _set_for_session(self, unit: Unit) -> set[int]:
        """Set what must hold for a unit that no transaction of ours is around, and return in which backend."""
        # lock_timeout inside a concurrent build would leave an INVALID index: its waiting is watched instead.
        limits = {
            name: 0.0 if name == "lock_timeout" and unit.kind is not Kind.OPAQUE else secs
            for name, secs in self._limits.items()
        }
        session, job = self._session, self._job
        settings, told = self._settings(unit.first), session.note_pid()
        path = told + job.set_path(local=False) if settings or job.schema is not None else ""
        session.backend_pid = None  # unless something is set
        try:
            prelude = do_block(f"BEGIN {path} {_limits_that_differ(limits, told)} END")
            await session.run(f"{self._label} {prelude}; {settings}", on_note=Course(session, job))
        except ServerError as error:
            await session.recover()
            raise self._refused(error, Message(), unit.first, UNFINISHED) from error
        finally:
            self._touch()
        return {session.backend_pid} if session.backend_pid is not None else set()

    def _touch(self) -> None:
        if self._session.backend_pid is not None:
            self._touched.add(self._session.backend_pid)

    def _is_recorded(self, unit: Unit) -> bool:
        row = self._job.script.step.applied
        return row is not None and row.done_checksum == done_checksum(self._statements[: unit.past])

    async def _alone(self, unit: Unit, session: Session, job: Job) -> None:
        """Run a unit as it stands, unless it was begun before and turns out to be done."""
        await self._guard.check()
        message = Message(f"{self._label} ")
        for statement in unit.statements:
            message.add_statement(statement)
        aftermath = UNKNOWN if unit.kind is Kind.OPAQUE else UNFINISHED
        try:
            if self._in_doubt and await self._is_done(unit):
                return
            self._in_doubt = True
            await session.run(str(message), on_event=job.on_event)
        except ServerError as error:
            await session.recover()
            raise self._refused(error, message, unit.first, aftermath) from error
        if unit.kind is Kind.CREATE_INDEX_CONCURRENTLY:
            await self._insist_on_valid(unit.statements[0])

    def _refused(self, error: ServerError, message: Message, running: int, aftermath: str) -> Exception:
        offset = None
        if error.position:
            offset = message.script_offset(error.position, counts_bytes=self._session.counts_bytes)
        statement = self._statements[min(running, len(self._statements) - 1)]
        meant = failure(error, self._migration, statement, offset, aftermath=aftermath)
        return LockUnavailable(meant) if isinstance(meant, LockTimeout) and aftermath is UNFINISHED else meant

    async def _is_done(self, unit: Unit) -> bool:
        """Tell whether the statement in doubt has done its work, and clear away what it left half done.

        Raises:
            MigrationInterrupted: that cannot be told.
        """
        statement = unit.statements[0]
        if unit.kind is Kind.CREATE_INDEX_CONCURRENTLY:
            build = sql.index_build(statement)
            if build is None or build.name is None:
                raise self._cannot_tell()
            index = await self._index(build)
            if index.name is not None and not index.valid:
                await self._drop(index.name)
                return False
            return index.name is not None
        if unit.kind is Kind.DROP_INDEX_CONCURRENTLY:
            names = sql.dropped_indexes(statement)
            if not names:
                raise self._cannot_tell()
            shown = ", ".join(f"pg_catalog.to_regclass({literal('.'.join(map(identifier, name)))})" for name in names)
            return not (await self._ask(f"pg_catalog.num_nonnulls({shown})", int))
        if statement.words[:1] == ("REINDEX",):
            for name in await self._ask(self._half_rebuilt(), list[str]):
                await self._drop(name)
        return False

    async def _drop(self, index: str) -> None:
        self._job.on_event(Warned(message=f"dropping the INVALID index {index} that an interrupted run left"))
        await self._session.run(f"{self._label} DROP INDEX CONCURRENTLY IF EXISTS {index}")

    def _half_rebuilt(self) -> str:
        """Return an expression for the INVALID copies that REINDEX CONCURRENTLY has made since its row was written."""
        return f"""(SELECT COALESCE(pg_catalog.jsonb_agg(pg_catalog.format('%I.%I', n.nspname, c.relname)), '[]')
            FROM pg_catalog.pg_index i
            JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) i.indexrelid
            JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
            JOIN {self._job.history.name} h ON h.version OPERATOR(pg_catalog.=) {self._migration.version}
            WHERE NOT i.indisvalid AND n.nspname OPERATOR(pg_catalog.<>) 'pg_toast'
              AND c.relname OPERATOR(pg_catalog.~) '_cc(new|old)[0-9]*$'
              AND pg_catalog.age(i.xmin) OPERATOR(pg_catalog.<=) pg_catalog.age(h.xmin))"""

    def _cannot_tell(self) -> MigrationInterrupted:
        conflict = conflict_of(self._job.script.step)
        return MigrationInterrupted(conflict.message, conflicts=(conflict,), hint=conflict.hint)

    async def _insist_on_valid(self, statement: sql.Statement) -> None:
        """Raise if the index is INVALID: with IF NOT EXISTS the server is content with the ruin of an earlier build."""
        build = sql.index_build(statement)
        if build is None or build.name is None:
            return
        index = await self._index(build)
        if index.name is not None and not index.valid:
            migration = self._migration
            raise MigrationFailed(
                f"{migration.file}:{statement.line}: index {index.name} exists and is INVALID: an earlier build failed",
                hint=f"DROP INDEX CONCURRENTLY {index.name}; then run `ampd migrate` again",
                version=migration.version,
                file=migration.file,
                line=statement.line,
                excerpt=sql.excerpt(migration.sql, statement.start, file=migration.file),
            )

    async def _index(self, build: sql.IndexBuild) -> _Index:
        table = literal(".".join(map(identifier, build.table)))
        return await self._ask(
            f"""(SELECT pg_catalog.jsonb_build_object('valid', pg_catalog.bool_and(i.indisvalid AND i.indisready),
                'name', pg_catalog.min(pg_catalog.format('%I.%I', n.nspname, c.relname)))
            FROM pg_catalog.pg_index i
            JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) i.indexrelid
            JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
            WHERE i.indrelid OPERATOR(pg_catalog.=) pg_catalog.to_regclass({table})
              AND c.relname OPERATOR(pg_catalog.=) {literal(build.name)})""",
            _Index,
        )

    async def _ask(self, expression: str, kind: type[T]) -> T:
        body = f"BEGIN {self._session.note(expression)} END"
        return await self._session.ask(f"BEGIN READ ONLY; {do_block(body)}; COMMIT", kind)


class _Index(msgspec.Struct, frozen=True):
    """An index as the catalog has it: its qualified and quoted name, or None where there is none."""

    name: str | None
    valid: bool | None


# Roles too: the record is ours to write, whoever the statements run as.
_RESETS = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; "


def _is_setting(statement: sql.Statement) -> bool:
    """Tell whether a statement sets something for the session that it runs in."""
    if sql.kind(statement) is Kind.SESSION:
        return statement.words[0] in ("SET", "RESET", "LOAD")
    return statement.words[:1] == ("SELECT",) and "set_config" in statement.text.lower()


def _limits_that_differ(limits: Mapping[str, float], told: str) -> str:
    """Return PL/pgSQL that sets limits beyond the transaction, and tells it, only where they differ.

    Each that is set has to be taken back, which behind a pooler takes a search.
    """
    return " ".join(
        f"IF (SELECT setting OPERATOR(pg_catalog.<>) '{milliseconds(secs)}' FROM pg_catalog.pg_settings "
        f"WHERE name OPERATOR(pg_catalog.=) '{name}') THEN "
        f"PERFORM pg_catalog.set_config('{name}', '{milliseconds(secs)}', false); {told} END IF;"
        for name, secs in limits.items()
    )
