"""What a run came to and where a database stands: values, rendered as text for people and JSON for programs. Pure."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from .plan import MigrationInfo, Plan, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Result(StrEnum):
    """How `migrate` ended; the values are the words of the JSON document."""

    MIGRATED = "migrated"
    UP_TO_DATE = "up_to_date"
    AHEAD = "ahead"
    FAILED = "failed"
    PENDING = "pending"  # only of --check and --dry-run, which apply nothing


class AppliedNow(msgspec.Struct, frozen=True):
    """A migration that this very run has applied."""

    version: int
    name: str
    duration_ms: int


class PendingMigration(msgspec.Struct, frozen=True):
    """A migration that is still to be applied."""

    version: int
    name: str


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
                spent = sum(done.duration_ms for done in self.applied) / 1000
                return (
                    f"{self.database}: applied {count(len(self.applied), 'migration')} in {spent:.2f} s, now {at}{rest}"
                )
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

    def json(self) -> bytes:
        """Return the document of `status --json`."""
        return _pretty(
            {
                "database": self.database,
                "schema": self.schema,
                "current_version": self.current_version,
                "up_to_date": self.up_to_date,
                "migrations": [_fields(info) for info in self.plan.migrations],
            }
        )

    def text(self) -> str:
        """Return what `status` prints: a line for each migration, and the sum."""
        rows = [_columns(info) for info in self.plan.migrations]
        widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *([""] if lines else []), f"{self.database}: {self.summary()}"])

    def summary(self) -> str:
        """Return one line: the version, and how many migrations are in which state."""
        plan = self.plan
        at = f"at version {plan.current_version}" if plan.current_version is not None else "no migration applied"
        if plan.up_to_date:
            rest = len(still_pending(plan))  # beyond the target
            return f"nothing to apply, {at}, {rest} left pending" if rest else f"up to date, {at}"
        parts = [at]
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
    return _pretty(
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
    result = Result.AHEAD if plan.ahead else Result.PENDING if plan.pending else Result.UP_TO_DATE
    return migrate_json(result, plan.current_version, (), pending_of(still_pending(plan)), None)


_PIECE = 1 << 20  # characters


def dry_run_text(status: Status) -> Iterator[str]:
    """Yield, in pieces, what `migrate --dry-run` prints: each pending migration with its SQL, as a readable script."""
    yield f"-- {status.database}: {status.summary()}"
    for info in status.plan.pending:
        assert info.migration is not None
        script = info.migration.sql
        resumed = f", resumed at statement {info.applied.statements_done + 1}" if info.applied else ""
        yield f"\n\n-- {info.migration.label} ({info.migration.file}{resumed})\n"
        end = len(script.rstrip())
        for start in range(0, end, _PIECE):
            yield script[start : min(end, start + _PIECE)]


def still_pending(plan: Plan) -> tuple[MigrationInfo, ...]:
    """Return what is to be applied up to the target of a plan and beyond it."""
    if plan.ahead:
        return ()
    return tuple(info for info in plan.migrations if info.state is State.PENDING or info.resumption is not None)


def pending_of(migrations: tuple[MigrationInfo, ...]) -> tuple[PendingMigration, ...]:
    """Return migrations of a plan as the report shows them."""
    return tuple(PendingMigration(info.version, info.name) for info in migrations)


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
    }


def _columns(info: MigrationInfo) -> tuple[str, str, str, str]:
    applied = info.applied
    when = f"{applied.finished_at:%Y-%m-%d %H:%M:%S%z}" if applied and applied.finished_at else ""
    took = f"{applied.duration_ms} ms" if applied and applied.duration_ms is not None else ""
    if applied and info.state is State.INTERRUPTED:
        when, took = f"{applied.started_at:%Y-%m-%d %H:%M:%S%z}", f"{count(applied.statements_done, 'statement')} done"
    return info.state.value.replace("_", " "), info.label, when, took


def _pretty(document: object) -> bytes:
    try:
        encoded = msgspec.json.encode(document)
    except UnicodeEncodeError:  # a path or an argument that is not UTF-8; JSON is
        import json

        text = json.dumps(msgspec.to_builtins(document), ensure_ascii=False)
        encoded = text.encode(errors="surrogateescape").decode(errors="replace").encode()
    # What a CI runner would take for the beginning of a command stands in a string, where it can be an escape.
    return re.sub(rb"(?<=#)#(?=\w{0,20}\[)", rb"\\u0023", msgspec.json.format(encoded, indent=2))
