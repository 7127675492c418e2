"""The story of a takeover: read the history, find what is to be recorded, prove it, and record it under the lock."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from ampd.apply.recording import record as record_in_history
from ampd.config import Limits
from ampd.display import one_line
from ampd.errors import ConfigError, MigrationConflict
from ampd.events import OnEvent, ignore
from ampd.history.first_run import FirstRun, Neighbours, read_neighbours
from ampd.history.refusals import NO_FOLDER, check_conflicts, check_project, check_writable
from ampd.history.table import History
from ampd.history.writing import baseline_sql
from ampd.migration import PACKAGED, Migration
from ampd.plan import Order, State
from ampd.postgres.connection import Session
from ampd.postgres.quoting import identifier
from ampd.redaction import Hidden
from ampd.report import Status
from ampd.run import Run, Source, check_version

from .amp import NEWEST, amp_history, catalog_problems, history_problems, read_facts
from .proof import Baseline, Record, applied_at, proved, up_to
from .tools import TOOLS, Row, found_history, read_rows


async def baseline(
    database: Source,
    version: int | None = None,
    *,
    source: str | None = None,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    table: str | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> Status:
    """Record migrations as applied without running them; what is recorded already stays as it is.

    Takes the arguments of `migrate`, and raises the errors of connecting and reading.

    Args:
        database: as for `migrate`.
        version: record every file up to this one, on the caller's word.
        source: record what the history of this tool proves: sqlx, flyway, alembic, goose, golang-migrate, dbmate,
            node-pg-migrate or yoyo; auto for the one that is there. With a version, that has to be the newest.

    Raises:
        ConfigError: neither was given, or no file has the version; or that tool has no history here.
        MigrationConflict: ampd's history or the tool's has rows that do not agree with the files.
        PermissionDenied: the owner of the tool's history is not trusted.
    """
    hidden = Hidden(database)
    del database
    check_question(version, source)
    run = await Run.of(hidden, migrations, schema=schema, table=table, target=version, limits=limits, on_event=on_event)
    return await Takeover(run, source).record()


def check_question(version: int | None, source: str | None) -> None:
    """Check that `baseline` was told what to record.

    Raises:
        ConfigError: neither version nor source was given, or there is no such tool.
        TypeError: the version is no int.
    """
    if version is None and source is None:
        raise ConfigError(
            "say what the database contains already: a version, or the tool that has migrated it",
            hint="`ampd baseline VERSION` records every file up to VERSION as applied; `ampd baseline --from TOOL` "
            "what that tool's history proves",
        )
    if version is not None:
        check_version("version", version)
    if source not in (None, "auto", *TOOLS):
        raise ConfigError(f'"{source}" is none of the tools: {", ".join(TOOLS)}, or auto')


class Takeover:
    """What `baseline` was asked for: the command line looks first, and records what it has shown.

    The version is the target of the run.
    """

    def __init__(self, run: Run, source: str | None) -> None:
        self._run, self._source = run, source

    @property
    def database(self) -> str:
        """Return the name of the database for messages."""
        return self._run.shown

    async def examine(self) -> Baseline:
        """Return what would be recorded; writes nothing."""
        return await self._run.when_free(self._found)

    async def record(self, shown: Baseline | None = None) -> Status:
        """Record it.

        Raises:
            MigrationConflict: it is no longer what a person was `shown`.
        """

        async def recorded(session: Session) -> Status:
            run, found = self._run, await self._found(session)
            assert run.history is not None
            if found.records:
                if shown not in (None, found):
                    raise MigrationConflict(
                        "the database has changed since these rows were shown; nothing was recorded",
                        hint="run `ampd baseline` again, and look at what it shows now",
                    )
                rows = [(each.migration, each.applied_at) for each in found.records]
                await record_in_history(session, run.history, baseline_sql(run.history, rows, found.source))
                await run.read_history(session)
            return Status(run.shown, run.history.schema, run.plan(whole=True))

        return await self._run.when_free(recorded)

    async def _found(self, session: Session) -> Baseline:
        """Return what is to be recorded, after checking that it does not contradict what the database remembers."""
        run = self._run
        history = run.history
        assert history is not None
        known = run.plan(whole=True)
        check_writable(history)
        check_project(known, history=history.shown_name, packaged=run.packaged)
        if known.interrupted and not history.holder_known:  # another runner may be applying it now
            await run.read_history(session)
            return await self._found(session)
        # What is to be recorded may lie below what is.
        real = tuple(conflict for conflict in known.conflicts if conflict.info.state is not State.OUT_OF_ORDER)
        check_conflicts(replace(known, conflicts=real))
        neighbours = Neighbours()
        if self._source or not history.applied:
            neighbours = await read_neighbours(session, history, packaged=True)
        if not history.applied:
            others = replace(neighbours, tools=())  # whose histories are no obstacle here
            configured = run.schema is not None
            if error := FirstRun(others, history.schema or "", configured=configured, packaged=False).error():
                raise error
            if not (neighbours.tables or self._source):
                run.warn(
                    [f"{one_line(identifier(history.schema or ''))} contains no tables: is it the right database?"]
                )
        if self._source:
            found = await self._proved(session, history, neighbours, self._source)
        else:
            assert run.target is not None
            found = Baseline(up_to(run.files, run.target))
        applied = {row.version for row in history.applied}
        return replace(found, records=tuple(each for each in found.records if each.migration.version not in applied))

    async def _proved(self, session: Session, history: History, neighbours: Neighbours, source: str) -> Baseline:
        """Return what another tool's history proves.

        Raises:
            MigrationConflict: it does not agree with the files.
        """
        run = self._run
        tool, table = found_history(neighbours.tools, history.schema or "", source)
        rows = await read_rows(session, table, TOOLS[tool], run.role)
        if tool == "sqlx" and run.files and run.files[0].file.startswith(f"{PACKAGED}/"):
            return await self._amps(session, history, rows)
        recorded, allowed = {row.version for row in history.applied}, run.order is Order.ALLOW_OUT_OF_ORDER
        found = proved(tool, rows, run.files, run.target, recorded=recorded, out_of_order=allowed)
        if found.problems:
            raise MigrationConflict(
                f"the history of {tool}, {table}, does not agree with the files; nothing was recorded:"
                + "".join(f"\n  {problem}" for problem in found.problems),
                hint=_SAY_WHICH if tool == "alembic" else _MEND,
            )
        run.warn(found.warnings)
        if not (found.records or history.applied):
            run.warn(
                [
                    f"none of these migrations is in the history of {tool}, {table}: if nothing that they create is "
                    "there, rename that table, and run `ampd migrate`; else `ampd baseline VERSION` records them"
                ]
            )
        return found

    async def _amps(self, session: Session, history: History, rows: tuple[Row, ...]) -> Baseline:
        """Return the packaged migrations that amp's own have come to, in a database that its Rust ampd has migrated.

        Raises:
            MigrationConflict: its history or its catalog is another one.
        """
        if amp_history().keys().isdisjoint(row.version for row in rows):
            raise MigrationConflict("none of the migrations in the history of sqlx is amp's", hint=NO_FOLDER)
        problems, absent = history_problems(rows)
        hint = _AMP_FIRST if absent and not problems else _NOT_AMPS
        if self._run.target not in (None, NEWEST):
            problems.append(f"the newest migration that amp of 2026-03 comes to is {NEWEST}, not {self._run.target}")
        if not absent:
            problems += catalog_problems(await read_facts(session, history.schema or ""))
        if problems or absent:
            raise MigrationConflict(
                "this is not the database of amp of 2026-03; nothing was recorded (-: only there, +: only here):"
                + "".join(f"\n  {problem}" for problem in (*problems, *absent)),
                hint=hint,
            )
        when = applied_at(rows[-1])
        return Baseline(tuple(Record(each.migration, when) for each in up_to(self._run.files, NEWEST)), "sqlx")


_AMP_FIRST = "let amp of 2026-03 migrate first, then run `ampd baseline --from sqlx` again"
_NOT_AMPS = (
    "if a newer amp has migrated this database, let a release of ampd that knows it take it over; if somebody has "
    "changed it by hand, find out whether that can be undone; "
    f"`ampd baseline {NEWEST}` records the packaged migrations on your word, once you have looked at the database"
)
_SAY_WHICH = (
    "`ampd baseline VERSION --from alembic` takes your word that the file VERSION makes what that revision makes"
)
_MEND = (
    "restore the files as they were applied, or finish what the tool has begun; what cannot be proved "
    "`ampd baseline VERSION` records on your word, once you have looked at the database"
)
