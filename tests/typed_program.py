"""A program that uses every public name of ampd, as a service would: mypy and pyright, both strict, accept it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import assert_never

import ampd


def told(event: ampd.Event) -> str:
    """Return what to show of an event; every kind is named, and a type checker tells when one is not."""
    match event:
        case ampd.Retrying(reason=reason) | ampd.WaitingForConnection(reason=reason):
            return reason
        case ampd.Planned(applied=applied, pending=pending, ahead=ahead, total=total):
            return f"{applied} of {total}, {[each.file for each in pending]}, {ahead}"
        case ampd.Waiting(holder=holder):
            return holder_of(holder)
        case ampd.Starting(version=version, transactional=transactional):
            return f"{version} {transactional}"
        case ampd.StatementStarted(number=number, statements=statements):
            return f"{number} of {statements}"
        case ampd.Progressed(version=version, progress=progress):
            return f"{version} {progress_of(progress)}"
        case ampd.Blocked(blockers=blockers):
            return ", ".join(blocker_of(each) for each in blockers)
        case ampd.LockRetry(delay=delay):
            return f"{delay:.1f} s"
        case ampd.Applied(duration_ms=duration_ms, retries=retries):
            return f"{duration_ms} ms, {retries}"
        case ampd.Failed(error=error):
            return advice(error)
        case ampd.Finished(report=report, error=failure):
            return report.text() if failure is None else advice(failure)
        case ampd.Stopped(report=report, confirmed=confirmed):
            return f"{applied_by(report)} {confirmed}"
        case ampd.ServerMessage(severity=severity, message=message):
            return f"{severity}: {message}"
        case ampd.Warned(message=message):
            return message
        case _:
            assert_never(event)


def holder_of(holder: ampd.Holder) -> str:
    """Return who holds the migration lock."""
    return f"{holder.pid} {holder.user or '?'} {holder.migration or ''}"


def progress_of(progress: ampd.StatementProgress) -> str:
    """Return how far a statement is."""
    return str(progress)


def blocker_of(blocker: ampd.Blocker) -> str:
    """Return who holds a table lock."""
    return f"{blocker.pid} {blocker.query or ''}"


def advice(error: ampd.AmpdError) -> str:
    """Return what to do about an error."""
    place = f"{error.file}:{error.line}" if error.file else ""
    match error:
        case ampd.MigrationInterrupted() | ampd.MigrationConflict():
            return "; ".join(conflict_of(each) for each in error.conflicts)
        case ampd.LockTimeout():
            return ", ".join(blocker_of(each) for each in error.blockers)
        case ampd.AuthenticationFailed() | ampd.TlsFailed() | ampd.DatabaseMissing():
            return f"look at the URL: {error.message}"
        case ampd.NoAnswer() | ampd.ReadOnlyServer() | ampd.ConnectionFailed() | ampd.AdvisoryLockTimeout():
            return f"run again: {error.code}"
        case ampd.MigrationFailed() | ampd.InvalidMigration():
            return f"{place} {error.sqlstate or ''}"
        case ampd.ConfigError() | ampd.PermissionDenied():
            return error.hint or error.message
        case _:
            return str(error)


def conflict_of(conflict: ampd.Conflict) -> str:
    """Return what is wrong with a migration."""
    return f"{conflict.version} {info_of(conflict.info)} {conflict.hint}"


def info_of(info: ampd.MigrationInfo) -> str:
    """Return where a migration stands."""
    file: ampd.Migration | None = info.migration
    row: ampd.AppliedMigration | None = info.applied
    resumption: ampd.Resumption | None = info.resumption
    state = "done" if info.state is ampd.State.APPLIED else info.state.value
    when: datetime | None = row.finished_at if row else None
    return f"{info.label} {state} {file.checksum.hex() if file else ''} {when} {resumption is not None}"


def applied_by(report: ampd.Report) -> list[str]:
    """Return what a run has done, and has left to do."""
    done: tuple[ampd.AppliedNow, ...] = report.applied
    rest: tuple[ampd.PendingMigration, ...] = report.pending
    if report.result is ampd.Result.AHEAD:
        return []
    return [f"{each.version} {each.duration_ms}" for each in done] + [each.name for each in rest]


def configured(url: str, folder: Path) -> ampd.MetadataDb:
    """Return a configuration that is put together in Python, beside one that is read."""
    config: ampd.Config = ampd.load_config()
    migrations = ampd.Migrations(dir=folder, table="history", lock_timeout_secs=2)
    assert config.metadata_db.url is None or config.metadata_db.url.label
    return ampd.MetadataDb(url=ampd.DatabaseUrl(url), schema="shop", migrations=migrations, pool_size=2)


async def main(url: str, folder: Path) -> list[str]:
    """Migrate in every way there is, and return what the events told."""
    heard: list[str] = []
    on_event: ampd.OnEvent = lambda event: heard.append(told(event))  # noqa: E731
    to_log: Callable[[ampd.Event], None] = ampd.log_events(logging.getLogger("shop"))
    files: tuple[ampd.Migration, ...] = ampd.read_migrations(folder)
    limits = ampd.Limits(connect_wait_secs=5, lock_timeout_secs=0.5)

    await ampd.assert_migrations_safe(url, migrations=files)
    report: ampd.Report = await ampd.migrate(url, migrations=files, limits=limits, target=1, on_event=on_event)
    status: ampd.Status = await ampd.status(url, migrations=files)
    plan: ampd.Plan = status.plan
    heard += [info_of(each) for each in (*plan.migrations, *status.pending, *status.ahead)]
    heard += [conflict_of(each) for each in status.conflicts] + applied_by(report)
    status = await ampd.baseline(url, 2, migrations=files)
    try:
        await ampd.resolve(url, 2, ampd.Resolution.APPLIED, migrations=files, on_event=to_log)
    except ampd.AmpdError as error:
        heard.append(advice(error))

    tenants: ampd.SchemasReport = await ampd.migrate_schemas(url, ["a", "b"], concurrency=2, migrations=files)
    heard += [f"{name} {each.current_version}" for name, each in tenants.reports.items()]
    heard += [f"{name} {each.code}" for name, each in tenants.errors.items()]

    shop = configured(url, folder)
    await ampd.migrate(shop, on_event=ampd.trace_events())
    async with ampd.open_pool(shop, on_event=on_event, statement_cache_size=0) as pool:
        await pool.execute("SELECT FROM t")  # pyright: ignore[reportUnknownMemberType] - asyncpg ships no types
        await ampd.migrate(pool, migrations=files, schema="other", table="history")
    return [*heard, ampd.__version__, str(status.ready)]
