"""`resolve`: recording what a person has found out about an interrupted migration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .advisory_lock import LockTaken
from .apply import recording
from .config import Limits
from .display import one_line
from .errors import ConfigError
from .events import OnEvent, ignore
from .migration import PACKAGED, Migration
from .plan import MigrationInfo, Resolution, State
from .postgres.connection import Session
from .redaction import Hidden
from .report import Status
from .run import Run, Source, check_version


async def resolve(
    database: Source,
    version: int,
    resolution: Resolution,
    *,
    migrations: Iterable[Migration] | None = None,
    schema: str | None = None,
    table: str | None = None,
    limits: Limits | None = None,
    on_event: OnEvent = ignore,
) -> Status:
    """Record what a person has found out about an interrupted migration: writes the history table, runs nothing.

    Takes the arguments of `migrate`, and raises the errors of connecting and reading.

    Raises:
        ConfigError: that migration is not interrupted, or does not belong to these files.
        AdvisoryLockTimeout: its runner, or one of its statements, is still running.
    """
    source = Hidden(database)
    del database
    check_version("version", version)
    if not isinstance(resolution, Resolution):
        ways = "ampd.Resolution.APPLIED or ampd.Resolution.ROLLED_BACK"
        raise TypeError(f"the resolution is {ways}, not {type(resolution).__name__}")
    run = await Run.of(source, migrations, schema=schema, table=table, limits=limits, on_event=on_event)
    return await run.when_free(lambda session: _resolve(run, session, version, resolution))


async def _resolve(run: Run, session: Session, version: int, resolution: Resolution) -> Status:
    """Resolve it.

    Raises:
        LockTaken: a runner holds the lock.
    """
    if not (run.history and run.history.holder_known):
        await run.read_history(session)
    plan = await run.check_history(session, await run.planning())
    history = run.history
    assert history is not None
    info = next((info for info in plan.migrations if info.version == version), None)
    if info is None or info.state not in (State.INTERRUPTED, State.RUNNING):
        state = f"is {info.state.value.replace('_', ' ')}" if info else "is unknown"
        lacking = info is not None and info.state is State.AHEAD
        raise ConfigError(
            f"version {version} {state}, not interrupted: there is nothing to resolve",
            hint=_OTHER_FOLDER if lacking else "`ampd status` shows what is interrupted",
        )
    if resolution is Resolution.APPLIED:
        _check_its_file(info, run.files)
    if history.holder:
        raise LockTaken("a runner is at it")
    await recording.resolve(session, history, info, resolution)
    history = await run.read_history(session)
    return Status(run.shown, history.schema, await run.planning())


_OTHER_FOLDER = "give the folder that its file is in with --migrations DIR"


def _check_its_file(info: MigrationInfo, files: Sequence[Migration]) -> None:
    """Check that an interrupted migration belongs to these files, from which its own may be gone.

    Raises:
        ConfigError: it has another name and content, or these are the packaged migrations, which lose none.
    """
    row, migration = info.applied, info.migration
    if migration is None and all(file.file.startswith(PACKAGED) for file in files):
        raise ConfigError(f"{info.label} is none of the packaged migrations", hint=_OTHER_FOLDER)
    if migration and row and migration.name != row.name and migration.checksum != row.checksum:
        started = f"{row.version} {one_line(row.name)}"
        raise ConfigError(f"{started} was started, and {migration.file} is another migration", hint=_OTHER_FOLDER)
