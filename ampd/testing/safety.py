"""Whether pending migrations would lock tables that others use: a rehearsal as an assertion."""

from __future__ import annotations

from collections.abc import Iterable

from ampd.apply.rehearsal_report import RehearsedMigration
from ampd.display import one_line
from ampd.migration import Migration
from ampd.preview import rehearse
from ampd.redaction import Hidden
from ampd.report import duration
from ampd.run import Source


async def assert_migrations_safe(
    database: Source,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    table: str | None = None,
    blocked_ms: int = 0,
    secs: float = 5,
) -> None:
    """Rehearse what is pending, and fail if it would keep others from a table that is there already.

    Everything pending that is transactional runs in one transaction, which is rolled back. The database is one that
    has the migrations before these, and rows: `database`, `migrations`, `schema` and `table` are as of `migrate`.

    What does not run in a transaction cannot be rehearsed and is passed over. A table without rows proves nothing of
    one that has some, and nothing pending proves nothing at all: both are failures too.

    Args:
        blocked_ms: how many milliseconds a migration may take that blocks reads or writes of a table with rows. With 0
            none may block any, as with `ampd migrate --rehearse --strict`. More is worth as much as the rows are:
            adding a column takes as long on a large table as on a small one, adding a constraint does not. No table
            with rows may be rewritten, however short that is.
        secs: how long the rehearsal may take and hold its locks.

    Raises:
        AssertionError: names each table with the lock on it; or the error that ended the rehearsal.
    """
    __tracebackhide__ = True  # by pytest: what stands here says nothing of the migrations
    source = Hidden(database)
    del database
    rehearsal = await rehearse(source.reveal(), migrations=migrations, schema=schema, table=table, secs=secs)
    if rehearsal.error:
        raise AssertionError(f"the rehearsal failed: {rehearsal.error}")
    if not (rehearsal.migrations or rehearsal.skipped):
        raise AssertionError(
            f"{rehearsal.database} has all migrations: nothing was rehearsed\n"
            "hint: take a database that has those before, as `ampd.migrate(…, target=VERSION)` makes one"
        )
    if lines := [line for each in rehearsal.migrations for line in _unsafe(each, blocked_ms)]:
        raise AssertionError("\n".join(("these migrations would keep others from their tables", *lines)))


def _unsafe(migration: RehearsedMigration, blocked_ms: int) -> list[str]:
    """Return a line for a migration and one for each lock of it that is too strong, and too long; or none."""
    found = []
    for lock in migration.locks:
        if lock.blocks and (lock.rewritten or migration.duration_ms >= blocked_ms):
            found.append(lock.describe(migration.duration_ms))
        elif lock.would_block and not lock.blocks:
            known = f"holds {lock.mode} on {one_line(lock.table)}, which has no rows here: insert some before"
            found.append(f"  ? {known}")
    return (
        [f"{migration.version} {one_line(migration.name)}: {duration(migration.duration_ms)}", *found] if found else []
    )
