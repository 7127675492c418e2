"""What a run would do: files and history in, a plan out. Pure; every command renders the same plan."""

from __future__ import annotations

from bisect import bisect
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from .display import one_line
from .migration import PACKAGED, AppliedMigration, Migration
from .other_sessions import Holder
from .resumption import Resumption, done_checksum, resumption, summary
from .sql.slices import Slices, at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


class State(StrEnum):
    """Where one migration stands; the values are the words of the JSON document."""

    APPLIED = "applied"
    PENDING = "pending"
    CHANGED = "changed"
    MISSING = "missing"
    OUT_OF_ORDER = "out_of_order"
    INTERRUPTED = "interrupted"
    RUNNING = "running"
    AHEAD = "ahead"


class Order(Enum):
    """Whether a migration may be applied after one with a higher version."""

    STRICT = "strict"
    ALLOW_OUT_OF_ORDER = "allow_out_of_order"


class Resolution(StrEnum):
    """What a person has found out about an interrupted migration."""

    APPLIED = "applied"
    ROLLED_BACK = "rolled back"


Known: TypeAlias = Migration | AppliedMigration


class MigrationInfo(msgspec.Struct, frozen=True, gc=False):
    """One version that the files, the history or both contain."""

    state: State
    migration: Migration | None
    applied: AppliedMigration | None
    newest_applied: int | None = None
    resumption: Resumption | None = None  # of an interrupted migration that can go on
    runner: Holder | None = None  # of a running one
    neighbours: tuple[Known | None, Known | None] = (None, None)  # files around a missing one, rows around a late one
    free_version: int = 0  # for a late one: above all there are

    @property
    def version(self) -> int:
        """Return the version that file and history have in common."""
        return self.known.version

    @property
    def name(self) -> str:
        """Return the name in the file, or in the history where there is no file."""
        return self.known.name

    @property
    def label(self) -> str:
        """Return version and name on one line."""
        return f"{self.version} {one_line(self.name)}"

    @property
    def known(self) -> Known:
        """Return the file, or the history's row where there is no file."""
        known = self.migration or self.applied
        assert known is not None
        return known


class Conflict(msgspec.Struct, frozen=True):
    """A migration whose state stops a run: what is wrong, and what to do, for a person."""

    info: MigrationInfo
    message: str
    hint: str

    @property
    def version(self) -> int:
        """Return the version in conflict."""
        return self.info.version

    @property
    def evidence(self) -> str:
        """Return what the folder and the history say of it, a line each, for a person to compare."""
        migration, applied = self.info.migration, self.info.applied
        file = f"{migration.file}, SHA-256 {migration.checksum.hex()}" if migration else "none"
        if applied is None:
            return f"  file:    {file}\n  applied: never"
        word, when = ("applied", applied.finished_at) if applied.finished_at else ("started", applied.started_at)
        name = f"as {one_line(applied.name)}, " if migration and migration.name != applied.name else ""
        by = f"{name}{when:%Y-%m-%d %H:%M:%S%z} by {one_line(applied.applied_by)}, SHA-256 {applied.checksum.hex()}"
        return "\n".join((f"  file:    {file}", f"  {word}: {by}", *self._in_doubt()))

    def _in_doubt(self) -> Iterator[str]:
        """Yield which statement an interrupted run has begun or was about to begin; none if the file has changed."""
        migration, applied = self.info.migration, self.info.applied
        if self.info.state is not State.INTERRUPTED or migration is None or applied is None:
            return
        if migration.checksum != applied.checksum:
            return
        from .sql.splitter import split

        statements, done = split(migration.sql), applied.statements_done
        if done < len(statements):
            begun = "" if applied.done_checksum == done_checksum(statements[:done]) else ", begun and perhaps done"
            where, text = f"statement {done + 1} of {len(statements)}", summary(statements[done].text)
            yield f"  at:      {where}, line {statements[done].line}{begun}: {text}"

    def fields(self) -> dict[str, object]:
        """Return what the JSON document shows."""
        migration, applied = self.info.migration, self.info.applied
        return {
            "version": self.version,
            "name": self.info.name,
            "state": self.info.state.value,
            "file": migration.file if migration else None,
            "file_checksum": migration.checksum.hex() if migration else None,
            "applied_name": applied.name if applied else None,
            "applied_checksum": applied.checksum.hex() if applied else None,
            "applied_at": (applied.finished_at or applied.started_at).isoformat() if applied else None,
            "applied_by": applied.applied_by if applied else None,
            "message": self.message,
            "hint": self.hint,
        }


class Plan(msgspec.Struct, frozen=True):
    """Every version with its state, in order, and what follows from that."""

    migrations: tuple[MigrationInfo, ...]
    pending: tuple[MigrationInfo, ...]
    conflicts: tuple[Conflict, ...]
    running: tuple[MigrationInfo, ...] = ()  # at which another runner is, up to the target
    ahead: tuple[MigrationInfo, ...] = ()  # what a newer build has applied and this one has no file for

    @property
    def current_version(self) -> int | None:
        """Return the highest version that is applied and finished."""
        finished = (info for info in reversed(self.migrations) if info.applied and info.applied.finished_at)
        return next((info.version for info in finished), None)

    @property
    def interrupted(self) -> tuple[Conflict, ...]:
        """Return the conflicts over migrations that were started and did not finish."""
        return tuple(conflict for conflict in self.conflicts if conflict.info.state is State.INTERRUPTED)

    @property
    def up_to_date(self) -> bool:
        """Return whether files and history agree exactly."""
        return not (self.pending or self.running or self.conflicts or self.ahead)


def make_plan(
    migrations: Sequence[Migration],
    applied: Iterable[AppliedMigration],
    *,
    target: int | None = None,
    order: Order = Order.STRICT,
    runner: Holder | None = None,
    find_resumption: Callable[[Migration, AppliedMigration], Resumption | None] = resumption,
) -> Plan:
    """Return what of files and history is pending up to `target`, what is in conflict, and what is ahead.

    `runner` is who holds the lock, if anybody: an unfinished migration is then still running, and so is the pending one
    that it says it is at.
    `find_resumption` may cache what `resumption` returns: for a long file it takes long.
    While the database is ahead of the files nothing is pending: a build that lags must not touch a newer schema.
    """
    return at_once(
        planning(migrations, applied, target=target, order=order, runner=runner, find_resumption=find_resumption)
    )


def planning(
    migrations: Sequence[Migration],
    applied: Iterable[AppliedMigration],
    *,
    target: int | None,
    order: Order,
    runner: Holder | None,
    find_resumption: Callable[[Migration, AppliedMigration], Resumption | None],
) -> Slices[Plan]:
    """Return the plan in slices; the work of `make_plan`."""
    files = {migration.version: migration for migration in migrations}
    rows = {row.version: row for row in applied}
    newest_file, newest_applied = max(files, default=None), max(rows, default=None)
    infos: list[MigrationInfo] = []
    states = set[State]()
    done = State.APPLIED  # to look up a member of an enumeration costs a third of this loop
    yield
    for version in sorted(files.keys() | rows.keys()):
        file, row = files.get(version), rows.get(version)
        state = _state(file, row, newest_file, newest_applied, order)
        holder, resume = None, None
        if state is not done:
            is_at_it = runner is not None and (row is not None or runner.is_at(version))
            if is_at_it and state in (State.INTERRUPTED, State.PENDING, State.OUT_OF_ORDER):
                state, holder = State.RUNNING, runner
            elif state is State.INTERRUPTED and file and row:
                resume = find_resumption(file, row)
        infos.append(MigrationInfo(state, file, row, newest_applied, resume, holder))
        states.add(state)
        yield
    if not states.isdisjoint((State.MISSING, State.OUT_OF_ORDER)):
        infos = list(_with_neighbours(infos, files, rows))
        yield
    others = [info for info in infos if info.state is not done]
    ahead = tuple(info for info in others if info.state is State.AHEAD)
    wanted = [info for info in others if not ahead and (target is None or info.version <= target)]
    pending = tuple(info for info in wanted if info.state is State.PENDING or info.resumption is not None)
    running = tuple(info for info in wanted if info.state is State.RUNNING)
    yield
    to_resume = {info.version for info in pending}
    conflicts = tuple(conflict_of(info) for info in others if info.state in _VERDICTS and info.version not in to_resume)
    return Plan(tuple(infos), pending, conflicts, running, ahead)


def _with_neighbours(
    infos: Sequence[MigrationInfo], files: Mapping[int, Migration], rows: Mapping[int, AppliedMigration]
) -> Iterator[MigrationInfo]:
    """Yield what there is with the neighbours of what is missing or late, and a version that is free for the latter."""
    ordered: dict[State, list[Known]] = {
        State.MISSING: [files[version] for version in sorted(files)],
        State.OUT_OF_ORDER: [rows[version] for version in sorted(rows)],
    }
    free = infos[-1].version
    for info in infos:
        if (others := ordered.get(info.state)) is None:
            yield info
            continue
        place = bisect(others, info.version, key=lambda other: other.version)
        before, after = others[place - 1] if place else None, others[place]
        free += info.state is State.OUT_OF_ORDER
        yield msgspec.structs.replace(info, neighbours=(before, after), free_version=free)


def _state(
    file: Migration | None,
    row: AppliedMigration | None,
    newest_file: int | None,
    newest_applied: int | None,
    order: Order,
) -> State:
    """Return where a version stands that has a file, a row of the history or both."""
    if row is None:
        assert file is not None
        late = newest_applied is not None and file.version < newest_applied
        return State.OUT_OF_ORDER if late and order is Order.STRICT else State.PENDING
    if file is None and (newest_file is None or row.version > newest_file):
        return State.AHEAD  # finished or not: it is for the newer build to finish, and this one can start meanwhile
    if row.finished_at is None:
        return State.INTERRUPTED
    if file is None:
        return State.MISSING
    return State.APPLIED if file.checksum == row.checksum else State.CHANGED


def is_another_projects(plan: Plan) -> bool:
    """Return whether no row of the history belongs to the files at hand, as another project's history has it.

    A row belongs to the file that has its version and its name or checksum, and to one with its checksum that was given
    another version. False without rows or without files.
    """
    if any(each.migration and each.applied and each.migration.name == each.applied.name for each in plan.migrations):
        return False
    files = {info.migration.checksum for info in plan.migrations if info.migration}
    rows = {info.applied.checksum for info in plan.migrations if info.applied}
    return bool(files and rows) and rows.isdisjoint(files)


_RESET = "or, where the data may be lost, reset the database and run all migrations again"
_RESTORE = f"restore the original file (from version control{{log}}), {_RESET}"

_VERDICTS: dict[State, tuple[str, str]] = {
    State.CHANGED: ("was applied and its file has changed since", _RESTORE),
    State.MISSING: ("was applied and there is no such file{span}", _RESTORE),
    State.OUT_OF_ORDER: (
        "is not applied and {newest} already is{span}",
        "give the file a version above {newest} (and no other change){rename}; or set allow_out_of_order = true: "
        f"`AMP_CONFIG_METADATA_DB__MIGRATIONS__ALLOW_OUT_OF_ORDER=true ampd migrate`; {_RESET}",
    ),
    State.INTERRUPTED: (
        "was started and did not finish: {done} recorded as done",
        "{restore}look at the database, finish or undo the migration by hand, then run "
        "`ampd resolve {version} --applied` or `ampd resolve {version} --rolled-back`",
    ),
}


def _span(info: MigrationInfo) -> str:
    """Return between which neighbours a migration is missing or late."""
    before, after = (one and f"{one.version} {one_line(one.name)}" for one in info.neighbours)
    if after is None:
        return ""
    if info.state is State.MISSING:
        return f": the files at hand go from {before} to {after}" if before else f": the first file at hand is {after}"
    return f": the history goes from {before} to {after}" if before else f": the history begins with {after}"


def _log(info: MigrationInfo) -> str:
    """Return the command that shows what version control has of the file of a changed or missing migration."""
    from shlex import quote

    migration, after = info.migration, info.neighbours[1]
    path = migration.file if migration else ""
    if isinstance(after, Migration) and "/" in after.file:
        path = f"{after.file.rpartition('/')[0]}/*{info.version}_{one_line(info.name)}*"
    return f": `git log --stat -- {quote(path)}`" if path and not path.startswith(f"{PACKAGED}/") else ""


def _rename(info: MigrationInfo) -> str:
    """Return the command that gives the file of a late migration a version above all others."""
    from shlex import quote

    if info.migration is None or info.migration.file.startswith(f"{PACKAGED}/"):
        return ""
    folder, slash, name = info.migration.file.rpartition("/")
    version, _, rest = name.partition("_")
    renamed = f"{folder}{slash}{info.free_version:0{len(version)}}_{rest}"
    return f": `mv {quote(info.migration.file)} {quote(renamed)}`"


def conflict_of(info: MigrationInfo) -> Conflict:
    """Return the conflict of a migration in such a state."""
    message, hint = _VERDICTS[info.state]
    edited = info.applied and (info.migration is None or info.migration.checksum != info.applied.checksum)
    done = info.applied.statements_done if info.applied else 0
    facts = {
        "restore": "restore the file as it was when it was started, and `ampd migrate` may resume it; else "
        if edited
        else "",
        "newest": info.newest_applied,
        "version": info.version,
        "done": "1 statement is" if done == 1 else f"{done} statements are",
        "span": _span(info),
        "log": _log(info),
        "rename": _rename(info),
    }
    return Conflict(info, f"{info.label} {message.format(**facts)}", hint.format(**facts))
