"""The story of a takeover: read the history, find what is to be recorded, prove it, and record it under the lock."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from ampd.advisory_lock import LockTaken
from ampd.apply.transaction import record as record_in_history
from ampd.config import Limits
from ampd.errors import ConfigError, MigrationConflict
from ampd.events import OnEvent, ignore
from ampd.history.first_run import first_run_error, read_neighbours
from ampd.history.refusals import check_conflicts, check_project
from ampd.history.writing import adopt_sql
from ampd.migration import Migration
from ampd.plan import State
from ampd.postgres.connection import Session
from ampd.redaction import Hidden
from ampd.report import Status
from ampd.run import Run, Source, check_version

from .proof import Baseline, up_to


async def baseline(
    database: Source,
    version: int | None = None,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> Status:
    """Record migrations as applied without running them; what is recorded already stays as it is.

    Takes the arguments of `migrate`, and raises the errors of connecting and reading.

    Args:
        database: as for `migrate`.
        version: record every file up to this one.

    Raises:
        ConfigError: no version was given, or no file has it.
        MigrationConflict: the history has rows that do not agree with the files.
    """
    hidden = Hidden(database)
    del database
    takeover = await Takeover.of(hidden, version, migrations, schema, limits, on_event)
    return await takeover.record()


class Takeover:
    """What `baseline` was asked for: the command line looks first, and records what it has shown."""

    def __init__(self, run: Run, version: int) -> None:
        self._run, self._version = run, version

    @classmethod
    async def of(
        cls,
        database: Hidden[Source],
        version: int | None,
        migrations: Iterable[Migration] | None = None,
        schema: str | None = None,
        limits: Limits | None = None,
        on_event: OnEvent = ignore,
    ) -> Takeover:
        """Return one from the arguments of `baseline`.

        Raises:
            ConfigError: no version was given, or no file has it.
        """
        if version is None:
            raise ConfigError(
                "say what the database contains already: baseline needs a version",
                hint="`ampd baseline VERSION` records every file up to VERSION as applied, and runs nothing",
            )
        check_version("version", version)
        return cls(await Run.of(database, migrations, schema, version, limits, on_event), version)

    async def examine(self) -> Baseline:
        """Return what would be recorded; writes nothing."""
        async with self._run.emit, self._run.sessions() as (session, *_):
            return await self._found(session)

    async def record(self, shown: Baseline | None = None) -> Status:
        """Record it as soon as nobody else holds the lock.

        Raises:
            MigrationConflict: it is no longer what a person was `shown`.
        """
        run = self._run
        while True:
            async with run.emit, run.sessions() as (session, *_):
                if (status := await self._record(session, shown)) is not None:
                    return status
            await run.lock_wait.pause()

    async def _record(self, session: Session, shown: Baseline | None) -> Status | None:
        """Record it as soon as nobody else holds the lock; None when the wait is long."""
        run = self._run
        while True:
            found = await self._found(session)
            assert run.history is not None
            if not found.records:
                return Status(run.shown, run.history.schema, run.plan(whole=True))
            if shown is not None and found != shown:
                raise MigrationConflict(
                    "the database has changed since these rows were shown; nothing was recorded",
                    hint="run `ampd baseline` again, and look at what it shows now",
                )
            try:
                if not run.history.holder:
                    rows = [(each.migration, each.applied_at) for each in found.records]
                    await record_in_history(session, run.history, adopt_sql(run.history, rows, found.source))
                    await run.read_history(session)
                    continue
                taken = None
            except LockTaken as error:
                taken = error
            run.lock_wait.taken(run.history, taken)
            if run.lock_wait.should_disconnect:
                return None
            await run.lock_wait.pause()
            await run.read_history(session)

    async def _found(self, session: Session) -> Baseline:
        """Return what is to be recorded, after checking that it does not contradict what the database remembers."""
        run = self._run
        history = run.history
        assert history is not None
        known = run.plan(whole=True)
        check_project(known, history=history.shown_name, packaged=run.packaged)
        if known.interrupted and not history.holder_known:  # another runner may be applying it now
            await run.read_history(session)
            return await self._found(session)
        # What is to be recorded may lie below what is.
        real = tuple(conflict for conflict in known.conflicts if conflict.info.state is not State.OUT_OF_ORDER)
        check_conflicts(replace(known, conflicts=real))
        if not history.applied:
            assert history.schema is not None
            neighbours = await read_neighbours(session, history, packaged=False, role=run.role)
            configured = run.schema is not None
            others = replace(neighbours, tools=())  # whose histories are no obstacle here
            if error := first_run_error(others, history.schema, configured=configured, packaged=False):
                raise error
        applied = {row.version for row in history.applied}
        records = up_to(run.files, self._version)
        return Baseline(tuple(each for each in records if each.migration.version not in applied))
