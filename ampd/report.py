"""What a run came to and where a database stands: values, rendered as text for people and JSON for programs. Pure."""

from __future__ import annotations

import re
from datetime import UTC
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from .display import one_line
from .plan import Conflict, MigrationInfo, Plan, State
from .sql.slices import at_once, mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Result(StrEnum):
    """How `migrate` ended; the values are the words of the JSON document."""

    MIGRATED = "migrated"
    UP_TO_DATE = "up_to_date"
    AHEAD = "ahead"
    FAILED = "failed"
    PENDING = "pending"  # only of --check and --dry-run, which apply nothing


class AppliedNow(msgspec.Struct, frozen=True, gc=False):
    """A migration that this very run has applied."""

    version: int
    name: str
    duration_ms: int


class PendingMigration(msgspec.Struct, frozen=True, gc=False):
    """A migration that is still to be applied, from this file, in a transaction or statement by statement."""

    version: int
    name: str
    file: str | None = None
    transactional: bool = True


class Report(msgspec.Struct, frozen=True):
    """What `migrate` did; `pending` is what a target has left for later."""

    database: str
    schema: str | None
    current_version: int | None
    applied: tuple[AppliedNow, ...]
    pending: tuple[PendingMigration, ...]
    ahead: tuple[int, ...] = ()

    @property
    def result(self) -> Result:
        """Return how the run ended."""
        if self.ahead:
            return Result.AHEAD
        return Result.MIGRATED if self.applied else Result.UP_TO_DATE

    def json(self) -> bytes:
        """Return the document of `migrate --json`."""
        return migrate_json(self.result, self.current_version, self.applied, self.pending, None)

    def text(self) -> str:
        """Return what `migrate` prints."""
        at = f"at version {self.current_version}" if self.current_version is not None else "without any migration"
        rest = f", {len(self.pending)} left pending" if self.pending else ""
        match self.result:
            case Result.MIGRATED:
                spent = duration(sum(done.duration_ms for done in self.applied))
                return f"{self.database}: applied {count(len(self.applied), 'migration')} in {spent}, now {at}{rest}"
            case Result.AHEAD:
                return f"{self.database}: {at}, ahead of this build; nothing applied"
            case _:
                return f"{self.database}: {'nothing to apply' if rest else 'up to date'}, {at}{rest}"


class Status(msgspec.Struct, frozen=True):
    """Where a database stands against the files."""

    database: str
    schema: str | None
    plan: Plan

    @property
    def current_version(self) -> int | None:
        """Return the highest version that is applied."""
        return self.plan.current_version

    @property
    def up_to_date(self) -> bool:
        """Return whether files and history agree exactly."""
        return self.plan.up_to_date

    @property
    def ready(self) -> bool:
        """Return whether a service can start on it: current, or ahead of this build, and nothing in conflict."""
        return not (self.plan.pending or self.plan.running or self.plan.conflicts)

    @property
    def migrations(self) -> tuple[MigrationInfo, ...]:
        """Return every migration that the files or the history contain, with its state, by version."""
        return self.plan.migrations

    @property
    def pending(self) -> tuple[MigrationInfo, ...]:
        """Return what `migrate` would apply, in order; nothing while the database is ahead."""
        return self.plan.pending

    @property
    def ahead(self) -> tuple[MigrationInfo, ...]:
        """Return what a newer build has applied and this one has no file for."""
        return self.plan.ahead

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        """Return what stops a run, each with what to do about it."""
        return self.plan.conflicts

    def json(self) -> bytes:
        """Return the document of `status --json`."""
        return pretty_json(
            {
                "database": self.database,
                "schema": self.schema,
                "current_version": self.current_version,
                "up_to_date": self.up_to_date,
                "result": "conflict" if self.plan.conflicts else _result(self.plan).value,
                "migrations": [_fields(info) for info in self.migrations],
            }
        )

    def text(self, columns: int | None = None) -> str:
        """Return what `status` prints: the database, a table of the migrations, and what to do next.

        What is least needed is left out of the table where it has to fit so many `columns`.
        """
        schema = f", schema {one_line(self.schema)}" if self.schema not in (None, "public") else ""
        top = f"{self.database}{schema}: {self.summary()}"
        parts = [top, _table(self.migrations, columns), *self._next()]
        return "\n\n".join(part for part in parts if part)

    def _next(self) -> Iterator[str]:
        """Yield what to do next, a paragraph for each thing."""
        plan = self.plan
        for conflict in plan.conflicts:
            yield f"{conflict.message}\n  to do: {conflict.hint}"
        for info in plan.pending:
            if info.resumption is not None and info.applied is not None:
                yield f"{info.label} was interrupted; it goes on after statement {info.applied.statements_done}"
        for info in plan.running:
            assert info.runner is not None
            statement = f", at statement {at[0]} of {at[1]}" if (at := _running_statement(info)) else ""
            progress = f", {info.runner.progress}" if info.runner.progress else ""
            yield f"{info.label} is being run{statement}{progress}\n  by {info.runner.describe()}"
        if plan.running:
            yield "next: `ampd migrate` waits for it"
        elif plan.pending and not plan.conflicts:
            yield f"next: `ampd migrate` applies {count(len(plan.pending), 'migration')}"
        elif plan.ahead and not plan.conflicts:
            yield "next: nothing; a newer build has migrated this database"

    def summary(self) -> str:
        """Return one line: the version, and how many migrations are in which state."""
        plan = self.plan
        at = f"at version {plan.current_version}" if plan.current_version is not None else "no migration applied"
        if plan.up_to_date:
            rest = len(still_pending(plan))  # beyond the target
            return f"nothing to apply, {at}, {rest} left pending" if rest else f"up to date, {at}"
        parts = [at]
        if plan.running:
            parts.append(f"{len(plan.running)} running")
        if plan.pending:
            parts.append(f"{len(plan.pending)} pending")
        if plan.conflicts:
            parts.append(count(len(plan.conflicts), "conflict"))
        if plan.ahead:
            parts.append(f"ahead of this build by {count(len(plan.ahead), 'migration')}")
        return ", ".join(parts)


def migrate_json(
    result: Result,
    current_version: int | None,
    applied: tuple[AppliedNow, ...],
    pending: tuple[PendingMigration, ...],
    error: dict[str, object] | None,
) -> bytes:
    """Return the document of `migrate --json`, for a run that succeeded, or failed with the fields of this error."""
    return pretty_json(
        {
            "result": result.value,
            "current_version": current_version,
            "applied": applied,
            "pending": pending,
            "error": error,
        }
    )


def examined_json(status: Status) -> bytes:
    """Return the document of `migrate --check --json` and `migrate --dry-run --json`: nothing applied.

    As after a run, `pending` is whatever is still to be applied, beyond the target as well.
    """
    plan = status.plan
    return migrate_json(_result(plan), plan.current_version, (), pending_of(still_pending(plan)), None)


def _result(plan: Plan) -> Result:
    return Result.AHEAD if plan.ahead else Result.PENDING if plan.pending or plan.running else Result.UP_TO_DATE


def still_pending(plan: Plan) -> tuple[MigrationInfo, ...]:
    """Return what is to be applied up to the target of a plan and beyond it."""
    if plan.ahead:
        return ()
    waiting = (State.PENDING, State.RUNNING)
    return tuple(info for info in plan.migrations if info.state in waiting or info.resumption is not None)


def pending_of(migrations: tuple[MigrationInfo, ...]) -> tuple[PendingMigration, ...]:
    """Return migrations of a plan as the report shows them."""
    return at_once(mapping(as_pending, migrations))


def as_pending(info: MigrationInfo) -> PendingMigration:
    """Return a migration of a plan as the report shows it."""
    file = info.migration
    named, transactional = file.file if file else None, file is None or file.is_transactional
    return PendingMigration(info.version, info.name, named, transactional)


def ahead_warning(versions: Sequence[int]) -> str:
    """Return what to warn of where a newer build has applied these versions, of which this one has no files."""
    by = count(len(versions), "migration")
    return f"the database is ahead of this build by {by} (newest: {versions[-1]}); nothing is applied"


def count(number: int, noun: str) -> str:
    """Return `1 migration`, `2 migrations`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _fields(info: MigrationInfo) -> dict[str, object]:
    applied = info.applied
    return {
        "version": info.version,
        "name": info.name,
        "state": info.state.value,
        "checksum": info.known.checksum.hex(),
        "applied_checksum": applied.checksum.hex() if applied else None,
        "applied_at": applied.finished_at.isoformat() if applied and applied.finished_at else None,
        "started_at": applied.started_at.isoformat() if applied else None,
        "duration_ms": applied.duration_ms if applied else None,
        "applied_by": applied.applied_by if applied else None,
        "statements_done": applied.statements_done if applied else None,
        "file": info.migration.file if info.migration else None,
        "runner": _runner_fields(info),
    }


def _runner_fields(info: MigrationInfo) -> dict[str, object] | None:
    runner, at = info.runner, _running_statement(info)
    if runner is None:
        return None
    progress = runner.progress
    return {
        "pid": runner.pid,
        "user": runner.user,
        "application": runner.application,
        "client": runner.client,
        "since": runner.since.isoformat() if runner.since else None,
        "statement": at[0] if at else None,
        "statements": at[1] if at else None,
        "phase": progress.phase if progress else None,
        "percent": progress.percent if progress else None,
    }


def _running_statement(info: MigrationInfo) -> tuple[int, int] | None:
    """Return at which of how many statements of a no-transaction migration its runner is."""
    if (
        info.runner is None
        or info.applied is None
        or info.migration is None
        or info.applied.checksum != info.migration.checksum
    ):
        return None
    from .sql.splitter import split

    statements = len(split(info.migration.sql))
    return min(info.applied.statements_done + 1, statements), statements


_HEADINGS = ("state", "version", "name", "when (UTC)", "took", "by")


def _table(migrations: Sequence[MigrationInfo], columns: int | None) -> str:
    """Return a line for each migration, under headings."""
    if not migrations:
        return ""
    return table([_HEADINGS, *map(_cells, migrations)], "<><<><", columns, flexible=2, least=8)


def table(rows: Sequence[tuple[str, ...]], alignments: str, columns: int | None, *, flexible: int, least: int) -> str:
    """Return rows of cells, headings first, in aligned columns.

    On a terminal of so many `columns` those of the table are left out from the right until the lines fit with a
    `flexible` one of `least` characters, which gets what is left; those before that one are never left out.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    wide = widths[flexible]
    if columns:
        while len(widths) > flexible + 1 and sum(widths) - wide + min(wide, least) + 2 * (len(widths) - 1) > columns:
            widths.pop()
        widths[flexible] = max(least, min(wide, columns - sum(widths) + wide - 2 * (len(widths) - 1)))
    lines = []
    for row in rows:
        cells = (
            f"{_cut(cell, width):{align}{width}}" for cell, width, align in zip(row, widths, alignments, strict=False)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 2]}.."


def _cells(info: MigrationInfo) -> tuple[str, ...]:
    applied = info.applied
    at = (applied.finished_at or applied.started_at) if applied else info.runner.since if info.runner else None
    when = f"{at.astimezone(UTC):%Y-%m-%d %H:%M}" if at else ""
    took = duration(applied.duration_ms) if applied and applied.duration_ms is not None else ""
    took = "baseline" if applied and applied.is_baseline else took
    by = one_line(applied.applied_by) if applied else ""
    return info.state.value.replace("_", " "), str(info.version), one_line(info.name), when, took, by


def duration(ms: float) -> str:
    """Return milliseconds as people read them: 17 ms, 15.7 s, 3 min 12 s, 2 h 5 min."""
    secs = ms / 1000
    if secs < 1:
        return f"{ms:.0f} ms"
    if secs < 59.95:
        return f"{secs:.1f} s"
    minutes, secs = divmod(round(secs), 60)
    return f"{minutes} min {secs} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def pretty_json(document: object) -> bytes:
    """Return a document as it is printed: in UTF-8, whatever is in it."""
    try:
        encoded = msgspec.json.encode(document)
    except UnicodeEncodeError:  # a path or an argument that is not UTF-8; JSON is
        import json

        text = json.dumps(msgspec.to_builtins(document), ensure_ascii=False)
        encoded = text.encode(errors="surrogateescape").decode(errors="replace").encode()
    # What a CI runner would take for the beginning of a command stands in a string, where it can be an escape.
    return re.sub(rb"(?<=#)#(?=\w{0,20}\[)", rb"\\u0023", msgspec.json.format(encoded, indent=2))
