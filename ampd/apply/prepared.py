"""Pending migrations, split and checked before anything runs; and the execution of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec

from ampd.emitter import Emitter, RunningMigration
from ampd.errors import InvalidMigration
from ampd.events import Starting
from ampd.migration import AppliedMigration, DirectiveError, Directives, Migration, directives, reversals
from ampd.plan import MigrationInfo, Plan
from ampd.postgres.quoting import do_block, identifier, literal
from ampd.sql import checks, kinds, scanner, splitter
from ampd.sql.slices import Slices, at_once
from ampd.version import VERSION

from .location import location_of
from .session_state import set_role_sql

if TYPE_CHECKING:
    from ampd.config import ResolvedLimits
    from ampd.events import OnEvent
    from ampd.history.table import History


class PreparedMigration(msgspec.Struct, frozen=True):
    """A pending migration, its script split and checked."""

    info: MigrationInfo
    migration: Migration
    statements: splitter.Statements
    directives: Directives
    cautions: tuple[checks.Caution, ...] = ()

    def execution(
        self,
        history: History,
        schema: str | None,
        limits: ResolvedLimits,
        emit: Emitter,
        *,
        number: int,
        total: int,
    ) -> Execution:
        """Return it with the history to add it to, limits and callbacks; without a `schema` the search path stays.

        It is the migration of that `number`, from 1, of a `total` that the run applies.
        """
        starting = Starting(
            version=self.migration.version,
            name=self.migration.name,
            number=number,
            total=total,
            statements=len(self.statements),
            transactional=not self.directives.no_transaction,
            resumed_at=self.info.applied.statements_done if self.info.applied else 0,
        )
        return Execution(
            self.info,
            self.migration,
            self.statements,
            self.directives,
            self.cautions,
            history=history,
            schema=schema,
            limits=limits,
            on_event=emit,
            running=RunningMigration(emit, starting),
        )


class Execution(PreparedMigration, frozen=True, kw_only=True):
    """A prepared migration that is being applied, with history, limits and callbacks."""

    history: History
    schema: str | None  # as configured; None leaves the search path alone
    limits: ResolvedLimits
    on_event: OnEvent
    running: RunningMigration

    def as_applied(self) -> AppliedMigration:
        """Return the row of the history that it has been given by now, but for the clock of the server."""
        now, duration = datetime.now(UTC), timedelta(milliseconds=self.running.duration_ms)
        return AppliedMigration(
            version=self.migration.version,
            name=self.migration.name,
            checksum=self.migration.checksum,
            started_at=now - duration,
            finished_at=now,
            statements_done=len(self.statements),
            applied_by=self.history.user,
            ampd_version=VERSION,
        )

    @property
    def lock_timeout_secs(self) -> float:
        """Return how long one attempt may wait for a lock: as the file says, else as configured; 0 for no limit."""
        given = self.directives.lock_timeout
        return self.limits.lock_timeout_secs if given is None else given

    @property
    def statement_timeout_secs(self) -> float:
        """Return how long one statement may run: as the file says, else as configured; 0 for no limit."""
        given = self.directives.statement_timeout
        return self.limits.statement_timeout_secs if given is None else given

    def limits_sql(self) -> str:
        """Return the statements that hold the rest of a transaction to its limits."""
        return (
            f"SET LOCAL lock_timeout = {milliseconds(self.lock_timeout_secs)}; "
            f"SET LOCAL statement_timeout = {milliseconds(self.statement_timeout_secs)}; "
        )

    def search_path_sql(self, *, local: bool) -> str:
        """Return PL/pgSQL that puts the configured schema before the rest of the search path."""
        if self.schema is None:
            return ""
        front = literal(identifier(self.schema))
        path = "pg_catalog.current_setting('search_path')"
        return f"""
  PERFORM pg_catalog.set_config('search_path', CASE WHEN {path} OPERATOR(pg_catalog.=) '' THEN {front}
    ELSE pg_catalog.concat({front}, ', ', {path}) END, {str(local).lower()});"""

    def again_after_sql(self, statement: scanner.Statement, *, local: bool) -> str:
        """Return the statements that set path and role again where a statement of the file has taken them back."""
        role = set_role_sql(self.history.role, local=local) if kinds.resets_role(statement) else ""
        if self.schema is None or not kinds.resets_path(statement):
            return role
        return f"{role}{do_block(f'BEGIN {self.search_path_sql(local=local)} END')}; "


def milliseconds(seconds: float) -> int:
    """Return what PostgreSQL's timeouts take; never 0, which is no limit, for a limit that rounds down to it."""
    return max(1, round(seconds * 1000)) if seconds else 0


def in_batches(prepared: Iterable[PreparedMigration]) -> Iterator[list[PreparedMigration]]:
    """Yield the migrations that go together: one outside of a transaction, or all that follow each other in one."""
    for no_transaction, group in groupby(prepared, lambda each: each.directives.no_transaction):
        together = list(group)
        yield from ([each] for each in together) if no_transaction else [together]


def prepare(pending: Iterable[MigrationInfo]) -> list[PreparedMigration]:
    """Return the pending migrations, split and checked before anything runs.

    Raises:
        InvalidMigration: names each thing that cannot work, with file and line.
    """
    return at_once(preparing(pending))


def preparing(pending: Iterable[MigrationInfo]) -> Slices[list[PreparedMigration]]:
    """Return them in slices; the work of `prepare`."""
    prepared = []
    problems: list[tuple[Migration, checks.Problem]] = []
    for info in pending:
        migration = info.migration
        assert migration is not None
        try:
            given = directives(migration.sql)
        except DirectiveError as error:
            given = Directives()
            hint = "write a number and one of ms, s, min, h"
            problems.append((migration, checks.Problem(error.line, 1, error.offset, str(error), hint)))
        statements = yield from splitter.splitting(migration.sql)
        found = yield from checks.finding_problems(
            migration.sql, transactional=not given.no_transaction, statements=statements
        )
        cautions = tuple(problem for problem in found if isinstance(problem, checks.Caution))
        problems.extend((migration, problem) for problem in found if not isinstance(problem, checks.Caution))
        prepared.append(PreparedMigration(info, migration, statements, given, cautions))
    if problems:
        raise _invalid_error(problems)
    return prepared


def warnings(plan: Plan, prepared: Iterable[PreparedMigration]) -> Iterator[str]:
    """Yield warnings on pending migrations before they run, a line each."""
    undone = reversals(info.migration for info in plan.migrations if info.migration)
    for each in prepared:
        file = each.migration.file
        if original := undone.get(each.migration.version):
            yield (
                f"{file} has the name of what undoes {original.file}, and ampd runs it like any other migration; "
                f"name it {original.version}_{original.name}.down.sql, which ampd ignores, if it does"
            )
        for caution in each.cautions:
            yield f"{file}:{caution.line}: {caution.message}; {caution.hint}"


_LISTED = 20  # problems that one error lists


def _invalid_error(problems: list[tuple[Migration, checks.Problem]]) -> InvalidMigration:
    migration, problem = problems[0]
    message, found = f"{migration.file}:{problem.line}: {problem.message}", location_of(migration, problem.offset)
    if len(problems) > 1:
        found["excerpt"] = None
        listed = "".join(f"\n  {each.file}:{what.line}: {what.message}" for each, what in problems[:_LISTED])
        listed += f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        message = f"{len(problems)} places in the pending migrations cannot be run; nothing was:{listed}"
    return InvalidMigration(message, hint=problem.hint, **found)
