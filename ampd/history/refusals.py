"""Checks before a history is followed or written to, and what a refused write to it means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ampd.advisory_lock import LockTaken
from ampd.display import one_line
from ampd.errors import MigrationConflict, MigrationFailed, MigrationInterrupted, PermissionDenied
from ampd.plan import is_another_projects
from ampd.postgres.failures import read_only_error
from ampd.postgres.quoting import identifier
from ampd.sqlstates import (
    ALTERED,
    BUSY,
    DUPLICATE_SCHEMA,
    DUPLICATE_TABLE,
    EMPTIED,
    EXPOSED,
    INSUFFICIENT_PRIVILEGE,
    INVALID_SCHEMA_NAME,
    MOVED,
    NEIGHBOURS,
    REPLACED,
    UNDEFINED_TABLE,
    UNIQUE_VIOLATION,
    WRONG_OBJECT_TYPE,
)

from .table import LOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ampd.errors import AmpdError
    from ampd.migration import AppliedMigration, Migration
    from ampd.plan import Plan
    from ampd.postgres.server_error import ServerError

    from .table import History


# What our own statements can only meet when somebody else has written, created or dropped the same thing just now.
_COLLISIONS = (UNIQUE_VIOLATION, UNDEFINED_TABLE, DUPLICATE_TABLE, DUPLICATE_SCHEMA)

# What a statement that names the history is refused with once the name means no table, or one that is not ours.
_GONE = (INSUFFICIENT_PRIVILEGE, UNDEFINED_TABLE, INVALID_SCHEMA_NAME, WRONG_OBJECT_TYPE)

NO_FOLDER = (
    "no folder was named, so these are the migrations packaged with ampd: give the folder of your project with "
    "--migrations DIR or metadata_db.migrations.dir"
)


def check_writable(history: History) -> None:
    """Check that the server takes writes, and that we may SET ROLE to the configured one.

    Raises:
        ReadOnlyServer: a standby, or a database set to read-only.
        PermissionDenied: the role that migrations are to run as does not exist, or we are no member of it.
    """
    if history.role is not None and history.role_refused is not None:
        role, me = identifier(history.role), identifier(history.user)
        raise PermissionDenied(
            f"{one_line(history.user)} cannot take on the role in metadata_db.migrations.role: {history.role_refused}",
            hint=f"if there is such a role, as a superuser: GRANT {role} TO {me}; "
            "else correct metadata_db.migrations.role",
        )
    if history.read_only:
        raise read_only_error(f"{history.address} takes no writes: a standby, or read-only by default")


class NeighboursFound(Exception):
    """A first run was about to create a history, and there is something else that it has to look at."""


def refusal_error(error: ServerError, history: History) -> Exception | None:
    """Return the exception for a history that could not be entered; None for any other error."""
    if error.sqlstate == NEIGHBOURS:
        return NeighboursFound()
    if error.sqlstate in (BUSY, MOVED, REPLACED, EXPOSED) or (error.sqlstate == ALTERED and history.table is not None):
        return LockTaken(error.message)  # reading it again tells what has become of it
    if error.sqlstate in _COLLISIONS:
        return LockTaken(error.message, unless=unwritable_error(error, history))
    return None


def harm(error: ServerError, history: History) -> str | None:
    """Return what has happened to the history table while a migration ran, in words; None for any other error."""
    gone, code = "was dropped, renamed or moved", error.sqlstate
    known = {
        ALTERED: "is not as ampd has made it any more (`ampd status` says why)",
        REPLACED: gone,
        EMPTIED: "has lost rows",
        EXPOSED: "is in a schema that was given to a role that is not trusted",
    }
    what = known.get(code)
    if what is None and f"{LOCK} {history.name} " in error.context:
        denied = f"may not be written by {one_line(history.user)} any more"
        what = denied if code == INSUFFICIENT_PRIVILEGE else gone if code in _GONE else None
    if what is None:
        return None
    return f"ampd's history table {history.shown_name} {what} while this migration ran"


def unwritable_error(error: ServerError, history: History) -> AmpdError:
    """Return the error for a server that has refused a statement of ampd's own."""
    return MigrationFailed(
        f"the history table {history.shown_name} could not be written: {error.message} (SQLSTATE {error.sqlstate})",
        hint="look for an event trigger, a trigger or a type that is in its way, and run again; nothing was kept",
        sqlstate=error.sqlstate,
        detail=error.detail,
    )


def check_project(plan: Plan, *, history: str, packaged: bool) -> None:
    """Check that a history is not that of another project.

    Args:
        plan: the plan of these files and that history.
        history: the name of the history table.
        packaged: these are the packaged migrations, because no folder was named.

    Raises:
        MigrationConflict: none of its rows belongs to a file at hand.
    """
    if not is_another_projects(plan):
        return
    files = [info.migration for info in plan.migrations if info.migration]
    rows = [info.applied for info in plan.migrations if info.applied]
    last = max(rows, key=lambda row: row.finished_at or row.started_at)
    folders = {file.file.rpartition("/")[0] for file in files}
    place = f" of {folders.pop()}" if len(folders) == 1 and all(folders) else " at hand"
    if packaged:
        hint = f"{NO_FOLDER}; to have amp's schema in this database as well, set metadata_db.schema to another schema"
    else:
        hint = (
            "give the folder of that project with --migrations DIR, or the database or schema (metadata_db.schema) "
            "that these files are for; if they are that project's, renamed and changed, restore them"
        )
    raise MigrationConflict(
        f"{history} is the history of another project: none of the migrations in it is among the files{place}\n"
        f"  history: {_some(rows)}, last at {last.finished_at or last.started_at:%Y-%m-%d %H:%M:%S%z} "
        f"by {one_line(last.applied_by)}\n"
        f"  files:   {_some(files)}",
        hint=hint,
    )


def _some(migrations: Sequence[Migration | AppliedMigration]) -> str:
    """Return the first three by version and name, and how many more there are."""
    shown = ", ".join(f"{each.version} {one_line(each.name)}" for each in migrations[:3])
    return f"{shown} and {len(migrations) - 3} more" if len(migrations) > 3 else shown


def check_conflicts(plan: Plan) -> None:
    """Raise for every conflict of a plan at once.

    Raises:
        MigrationInterrupted: nothing but interrupted migrations stand in the way.
        MigrationConflict: anything else does.
    """
    if not plan.conflicts:
        return
    kind = MigrationInterrupted if len(plan.interrupted) == len(plan.conflicts) else MigrationConflict
    if len(plan.conflicts) == 1:
        raise kind(plan.conflicts[0].message, conflicts=plan.conflicts, hint=plan.conflicts[0].hint)
    raise kind(
        f"{len(plan.conflicts)} migrations are in conflict with the history of the database; nothing is applied",
        conflicts=plan.conflicts,
        hint="resolve each as it says; `ampd status` shows them all",
    )
