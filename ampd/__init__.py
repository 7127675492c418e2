"""The PostgreSQL migration runner for async Python: plain SQL files in, a current schema out.

    files = ampd.read_migrations("migrations")
    report = await ampd.migrate("postgresql://…", migrations=files, on_event=print)
    print(report.text())

These take a URL, an asyncpg.Pool, an asyncpg.Connection or the `metadata_db` section of a configuration:

    migrate             apply what is pending, in order, each migration under the lock
    migrate_schemas     the same in many schemas, one for each tenant
    status              what is applied, pending and in conflict
    baseline            record migrations as applied without running them
    resolve             record what became of a migration that was interrupted
    open_pool           a service's pool, migrated first or certain to be up to date (of a configuration alone)
    assert_migrations_safe  fail a test if what is pending fails, or blocks others

Without `migrations=` they take the configured folder, else the migrations packaged with ampd, which are amp's.

    read_migrations     the files of a folder or of a package
    load_config         a configuration, from a TOML file and the environment
    log_events, trace_events    callbacks for `on_event=`: to a logging.Logger, to OpenTelemetry

What goes wrong is an `AmpdError`: a class for each case, with `code`, `message` and `hint`. What `on_event=` is called
with is an `Event`: the union of `Planned`, `Starting`, `Applied`, `Finished` and the others, each a class of its own.

Names are loaded when first used: `import ampd` costs next to nothing, configures no logging and touches no global
state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .version import VERSION

__version__ = VERSION

# Each public name stands twice: here for type checkers, and below for the run, which loads nothing before it is used.
# isort: off
if TYPE_CHECKING:
    from .takeover.baseline import baseline as baseline
    from .config import Config as Config, Limits as Limits, MetadataDb as MetadataDb, Migrations as Migrations
    from .config_sources import load_config as load_config
    from .database_url import DatabaseUrl as DatabaseUrl
    from .errors import (
        AdvisoryLockTimeout as AdvisoryLockTimeout,
        AmpdError as AmpdError,
        AuthenticationFailed as AuthenticationFailed,
        ConfigError as ConfigError,
        ConnectionFailed as ConnectionFailed,
        DatabaseMissing as DatabaseMissing,
        InvalidMigration as InvalidMigration,
        LockTimeout as LockTimeout,
        MigrationConflict as MigrationConflict,
        MigrationFailed as MigrationFailed,
        MigrationInterrupted as MigrationInterrupted,
        NoAnswer as NoAnswer,
        PermissionDenied as PermissionDenied,
        ReadOnlyServer as ReadOnlyServer,
        TlsFailed as TlsFailed,
    )
    from .event_log import log_events as log_events
    from .events import (
        Applied as Applied,
        Blocked as Blocked,
        Event as Event,
        Failed as Failed,
        Finished as Finished,
        LockRetry as LockRetry,
        OnEvent as OnEvent,
        Planned as Planned,
        Progressed as Progressed,
        Retrying as Retrying,
        ServerMessage as ServerMessage,
        Starting as Starting,
        StatementStarted as StatementStarted,
        Stopped as Stopped,
        Waiting as Waiting,
        WaitingForConnection as WaitingForConnection,
        Warned as Warned,
    )
    from .migration import AppliedMigration as AppliedMigration, Migration as Migration
    from .migrator import migrate as migrate, status as status
    from .other_sessions import Blocker as Blocker, Holder as Holder
    from .plan import (
        Conflict as Conflict,
        MigrationInfo as MigrationInfo,
        Plan as Plan,
        Resolution as Resolution,
        State as State,
    )
    from .pool import open_pool as open_pool
    from .report import (
        AppliedNow as AppliedNow,
        PendingMigration as PendingMigration,
        Report as Report,
        Result as Result,
        Status as Status,
    )
    from .resolution import resolve as resolve
    from .resources import read_migrations as read_migrations
    from .resumption import Resumption as Resumption
    from .schemas import SchemasReport as SchemasReport, migrate_schemas as migrate_schemas
    from .tracing import trace_events as trace_events
    from .statement_progress import StatementProgress as StatementProgress
    from .testing.safety import assert_migrations_safe as assert_migrations_safe

# isort: on
_HOMES = {
    "takeover.baseline": "baseline",
    "config": "Config Limits MetadataDb Migrations",
    "config_sources": "load_config",
    "database_url": "DatabaseUrl",
    "errors": (
        "AdvisoryLockTimeout AmpdError AuthenticationFailed ConfigError ConnectionFailed DatabaseMissing "
        "InvalidMigration LockTimeout MigrationConflict MigrationFailed MigrationInterrupted NoAnswer "
        "PermissionDenied ReadOnlyServer TlsFailed"
    ),
    "event_log": "log_events",
    "events": (
        "Applied Blocked Event Failed Finished LockRetry OnEvent Planned Progressed Retrying ServerMessage Starting "
        "StatementStarted Stopped Waiting WaitingForConnection Warned"
    ),
    "migration": "AppliedMigration Migration",
    "migrator": "migrate status",
    "other_sessions": "Blocker Holder",
    "plan": "Conflict MigrationInfo Plan Resolution State",
    "pool": "open_pool",
    "report": "AppliedNow PendingMigration Report Result Status",
    "resolution": "resolve",
    "resources": "read_migrations",
    "resumption": "Resumption",
    "schemas": "SchemasReport migrate_schemas",
    "tracing": "trace_events",
    "statement_progress": "StatementProgress",
    "testing.safety": "assert_migrations_safe",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__: list[str] = sorted([*_HOME, "__version__"])  # noqa: PLE0605 - type checkers go by the imports


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
