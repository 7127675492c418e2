"""What a statement outside of a transaction has left behind, or done, by the catalog."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from ampd.display import one_line
from ampd.errors import AmpdError, LockTimeout, MigrationFailed, MigrationInterrupted
from ampd.events import Warned
from ampd.history import writing
from ampd.plan import State, conflict_of
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError
from ampd.sql import kinds
from ampd.sql.kinds import Kind
from ampd.sql.units import Unit

from . import indexes
from .location import location_of
from .session_state import own_role_sql, set_role_sql
from .transaction import LockUnavailable
from .unit_message import again_sql

if TYPE_CHECKING:
    from ampd.postgres.connection import Session

    from .prepared import Execution


T = TypeVar("T")

# The aftermath where the next run goes on by itself.
RESUMABLE = "it is recorded as unfinished: fix the cause and run `ampd migrate` again; it resumes at this statement"


def is_undecidable(unit: Unit) -> bool:
    """Return whether the catalog cannot show if an abandoned statement completed."""
    statement = unit.statements[0]
    if unit.kind is Kind.CREATE_INDEX_CONCURRENTLY:
        build = kinds.index_build(statement)
        return build is None or build.name is None
    if unit.kind is Kind.DROP_INDEX_CONCURRENTLY:
        return not kinds.dropped_indexes(statement)
    return unit.kind is Kind.NOT_RESUMABLE


class Outcome:
    """Queries about the statements of one migration, with the role and search path that they run with."""

    def __init__(self, session: Session, execution: Execution, label: str) -> None:
        self._session = session
        self._execution = execution
        self._migration = execution.migration
        self._label = label

    async def is_hopeless(self, unit: Unit) -> bool:
        """Return whether the server is bound to refuse a statement, or to leave things as they are.

        It must not be recorded as begun: whatever a later run found would not be the work of this one.
        """
        statement = unit.statements[0]
        if build := kinds.index_build(statement):
            return build.name is not None and await self._ask(indexes.is_taken_sql(build), bool, unit, build.table)
        if unit.kind is Kind.DROP_INDEX_CONCURRENTLY and (names := kinds.dropped_indexes(statement)):
            return not await self._ask(indexes.ARE_THERE, bool, unit, *names)
        return False

    async def leftovers(self, unit: Unit) -> list[indexes.Leftover]:
        """Return the INVALID indexes that a statement has left behind.

        Raises:
            ServerError: the history is not as it was.
        """
        statement = unit.statements[0]
        build = kinds.index_build(statement)
        reindexed = kinds.reindexed(statement) if kinds.is_concurrent(statement) else None
        if build:
            question, name = indexes.invalid_builds_sql(build, await self._begun_by()), build.table
        elif reindexed:
            question, name = indexes.invalid_copies_sql(*reindexed, await self._begun_by()), reindexed[1]
        else:
            return []
        return await self._ask(question, list[indexes.Leftover], unit, name)

    async def _begun_by(self) -> str:
        """Return the transaction in which it was recorded that a statement was begun."""
        session, history = self._session, self._execution.history
        ours = own_role_sql(history.role, session.saved_as)
        question = do_block(f"BEGIN {writing.begun_by_sql(session, history, self._migration.version)} END")
        begin = f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {ours}{self._execution.limits_sql()}"
        try:
            return await session.ask(f"{begin}{question}; ROLLBACK", str)
        except AmpdError as error:
            if isinstance(error.__cause__, ServerError):  # for `refusals.harm`
                raise error.__cause__ from None
            raise

    async def drop_leftovers(self, unit: Unit) -> bool:
        """Drop what a statement has left behind, and return whether there was anything.

        Raises:
            LockUnavailable: another session builds an index on the table, which is INVALID until it is built.
        """
        leftovers = await self.leftovers(unit)
        for each in leftovers:
            if each.worker is not None:
                raise LockUnavailable(self._busy_error(unit, each.worker))
            self._execution.on_event(
                Warned(message=f"dropping the INVALID index {one_line(each.name)} that an interrupted run left")
            )
            await self._session.run(f"{self._label} DROP INDEX CONCURRENTLY IF EXISTS {each.name}")
        return bool(leftovers)

    async def check_no_other_build(self, unit: Unit) -> None:
        """Check that nobody else builds an index on the same table: two such builds would wait for one another.

        Raises:
            LockUnavailable: another session does.
        """
        if build := kinds.index_build(unit.statements[0]):
            worker = await self._ask(indexes.WORKER, indexes.Worker, unit, build.table)
            if worker.pid is not None:
                raise LockUnavailable(self._busy_error(unit, worker.pid))

    def _busy_error(self, unit: Unit, worker: int) -> LockTimeout:
        file, line = self._migration.file, unit.statements[0].line
        return LockTimeout(
            f"{file}:{line}: session {worker} is building an index (or similar) on the same table",
            hint=RESUMABLE,
            **location_of(self._migration, unit.statements[0].start),
        )

    async def is_done(self, unit: Unit, *, dropped: bool) -> bool:
        """Return whether the statement in doubt has done its work; one with leftovers, which were `dropped`, has not.

        Raises:
            MigrationInterrupted: the catalog cannot show it.
        """
        statement = unit.statements[0]
        if dropped:
            return False
        if is_undecidable(unit):
            raise self._undecidable_error()
        if build := kinds.index_build(statement):
            index = await self._ask(indexes.index_sql(build), indexes.Index, unit, build.table)
            if index.name is not None and not index.valid:
                await self.check_no_other_build(unit)
                raise self._undecidable_error(
                    f"the INVALID index {index.name} is older than the record that its build was begun: if nobody "
                    f"needs it, DROP INDEX CONCURRENTLY {index.name} and run again; else "
                )
            return index.name is not None
        if names := kinds.dropped_indexes(statement):
            return not await self._ask(indexes.ARE_THERE, bool, unit, *names)
        return False

    def _undecidable_error(self, first: str = "") -> MigrationInterrupted:
        conflict = conflict_of(msgspec.structs.replace(self._execution.info, state=State.INTERRUPTED))
        return MigrationInterrupted(conflict.message, conflicts=(conflict,), hint=first + conflict.hint)

    async def check_valid(self, unit: Unit) -> None:
        """Check for a valid index after a build: with IF NOT EXISTS the server is content with anything of that name.

        Raises:
            MigrationFailed: there is none.
        """
        build = kinds.index_build(unit.statements[0])
        if build is None or build.name is None:
            return
        index = await self._ask(indexes.index_sql(build), indexes.Index, unit, build.table)
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
        raise MigrationFailed(
            f"{migration.file}:{line}: {problem}",
            hint=hint,
            **location_of(migration, unit.statements[0].start),
        )

    async def _ask(self, expression: str, kind: type[T], unit: Unit, *names: tuple[str, ...]) -> T:
        """Return the value of an expression about names, with the role and the search path that the file has set."""
        session, execution, there = self._session, self._execution, ""
        if session.pooled:
            path = do_block(f"BEGIN {execution.search_path_sql(local=True)} END")
            there = f"{set_role_sql(execution.history.role, local=True)}{path}; {again_sql(unit.settings)}"
        question = indexes.asking_sql(session, expression, names)
        return await session.ask(f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {there}{question}; ROLLBACK", kind)
