"""What a rehearsal has found: the time of each migration, and the locks on tables that were there before. Pure."""

from __future__ import annotations

import re

import msgspec

from ampd.display import one_line
from ampd.errors import AmpdError
from ampd.report import count, duration, pretty_json

_BLOCKS = {
    "ACCESS EXCLUSIVE": "reads and writes",
    "EXCLUSIVE": "writes",
    "SHARE ROW EXCLUSIVE": "writes",
    "SHARE": "writes",
}
_MODES = (*_BLOCKS, "SHARE UPDATE EXCLUSIVE", "ROW EXCLUSIVE", "ROW SHARE", "ACCESS SHARE")  # the strongest first


class Table(msgspec.Struct, frozen=True, array_like=True):
    """A table before the rehearsal, or an index; rows and bytes are estimates of the server, rows -1 where unknown."""

    oid: int
    name: str
    partitioned: bool
    file: int
    rows: int
    bytes: int
    index_of: int | None = None


class Lock(msgspec.Struct, frozen=True, array_like=True):
    """A lock as the server holds it; file and bytes are those of the table now, None where it is dropped."""

    oid: int
    mode: str
    file: int | None
    bytes: int | None


class HeldLock(msgspec.Struct, frozen=True):
    """The strongest lock on a table after a migration; `blocks` what others could not do meanwhile."""

    table: str
    mode: str
    rows: int | None
    bytes: int
    rewritten: bool
    blocks: str | None

    @property
    def would_block(self) -> str | None:
        """Return what others could not do, whether or not the table has rows."""
        return _BLOCKS.get(self.mode)

    def describe(self, held_ms: int) -> str:
        """Return a line for a person."""
        facts = [f"holds {self.mode} on {one_line(self.table)} ({_rows(self.rows)}, {_bytes(self.bytes)})"]
        facts[0] += f" for {duration(held_ms)}"
        if self.rewritten:
            facts.append("rewritten or truncated")
        if self.blocks:
            facts.append(f"blocks {self.blocks}")
        return f"  {'!' if self.blocks else ' '} {', '.join(facts)}"


class RehearsedMigration(msgspec.Struct, frozen=True):
    """A migration that ran, and what the whole transaction held after it."""

    version: int
    name: str
    duration_ms: int
    locks: tuple[HeldLock, ...]


class SkippedMigration(msgspec.Struct, frozen=True):
    """A migration that could not be rehearsed, and why."""

    version: int
    name: str
    reason: str


class Rehearsal(msgspec.Struct, frozen=True):
    """What the pending migrations did before all of it was rolled back; `error` has ended it."""

    database: str
    migrations: tuple[RehearsedMigration, ...] = ()
    skipped: tuple[SkippedMigration, ...] = ()
    error: AmpdError | None = None

    @property
    def blocks(self) -> bool:
        """Return whether a lock would block the reads or writes of others."""
        return any(lock.blocks for each in self.migrations for lock in each.locks)

    def json(self) -> bytes:
        """Return the document of `migrate --rehearse --json`."""
        return pretty_json(
            {
                "result": "failed" if self.error else "rehearsed",
                "migrations": self.migrations,
                "skipped": self.skipped,
                "error": self.error and self.error.fields(),
            }
        )

    def text(self) -> str:
        """Return what `migrate --rehearse` prints; "" where nothing but an error is to be told."""
        if not (self.migrations or self.skipped):
            return "" if self.error else f"{self.database}: nothing to rehearse"
        spent = duration(sum(each.duration_ms for each in self.migrations))
        lines = [f"{self.database}: rehearsed {count(len(self.migrations), 'migration')} in {spent}, and rolled back"]
        if len(self.migrations) > 1:
            lines.append("(after each migration: all locks that the one transaction held by then)")
        for each in self.migrations:
            lines.append(f"{each.version} {one_line(each.name)}: {duration(each.duration_ms)}")
            lines.extend(lock.describe(each.duration_ms) for lock in each.locks)
        lines.extend(f"{each.version} {one_line(each.name)}: not rehearsed, {each.reason}" for each in self.skipped)
        return "\n".join(lines)


def held_locks(tables: dict[int, Table], files: dict[int, int | None], locks: list[Lock]) -> tuple[HeldLock, ...]:
    """Return the strongest lock on each table, by name; `files` are those before the migration, and are updated.

    An index is among them if what it is locked for blocks others, and is stronger than the lock on its table.
    """
    strongest: dict[int, tuple[int, Lock]] = {}
    for lock in locks:
        rank = _MODES.index(_spelt(lock.mode))
        if lock.oid in tables and rank < strongest.get(lock.oid, (len(_MODES),))[0]:
            strongest[lock.oid] = rank, lock
    held = []
    for oid, (rank, lock) in strongest.items():
        table, before = tables[oid], files.get(oid, tables[oid].file)
        if table.index_of is not None:
            of_table, _ = strongest.get(table.index_of, (len(_BLOCKS), None))
            if rank >= min(of_table, len(_BLOCKS)):
                continue
        changed = lock.file != table.file  # rewritten, truncated or dropped: the size before is what matters
        size = (changed and table.bytes) or lock.bytes or 0
        has_rows = size > 0 or ((changed or table.partitioned) and table.rows != 0)
        if table.index_of is not None:  # which has a page without any
            has_rows = table.rows != 0
        files[oid] = lock.file
        held.append(
            HeldLock(
                table.name,
                _MODES[rank],
                None if table.rows < 0 else table.rows,
                size,
                rewritten=lock.file is not None and lock.file != before,
                blocks=_BLOCKS.get(_MODES[rank]) if has_rows else None,
            )
        )
    return tuple(sorted(held, key=lambda lock: lock.table))


def _spelt(mode: str) -> str:
    """Return a mode as the documentation spells it: ACCESS EXCLUSIVE for AccessExclusiveLock."""
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", mode.removesuffix("Lock")).upper()


def _rows(rows: int | None) -> str:
    if rows is None:
        return "rows unknown"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if rows >= size:
            return f"{_number(rows / size)} {unit} rows"
    return count(rows, "row")


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1024:
            return f"{_number(size)} {unit}"
        size /= 1024
    return f"{_number(size)} TB"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"
