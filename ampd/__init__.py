"""The PostgreSQL migration runner for async Python.

    report = await ampd.migrate("postgresql://…")

Names are loaded when first used: `import ampd` costs next to nothing, configures no logging and touches no global
state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .version import VERSION as __version__

if TYPE_CHECKING:
    from .config import Config, DatabaseUrl, Limits, MetadataDb, Migrations, load_config
    from .errors import (
        AmpdError,
        AuthenticationFailed,
        ConfigError,
        ConnectionFailed,
        DatabaseMissing,
        InvalidMigration,
        LockTimeout,
        MigrationConflict,
        MigrationFailed,
        MigrationInterrupted,
        NoAnswer,
        PermissionDenied,
        ReadOnlyServer,
        TlsFailed,
        TurnTimeout,
    )
    from .events import (
        Applied,
        Blocked,
        Blocker,
        Event,
        Failed,
        Finished,
        LockRetry,
        Planned,
        Retrying,
        ServerMessage,
        Starting,
        StatementStarted,
        Stopped,
        Waiting,
        Warned,
    )
    from .migration import Migration
    from .migrator import migrate, resolve, status
    from .plan import Settlement
    from .pool import open_pool
    from .report import Report, Status
    from .source import read_migrations

_HOMES = {
    "config": ("Config", "DatabaseUrl", "Limits", "MetadataDb", "Migrations", "load_config"),
    "errors": (
        "AmpdError",
        "AuthenticationFailed",
        "ConfigError",
        "ConnectionFailed",
        "DatabaseMissing",
        "InvalidMigration",
        "LockTimeout",
        "MigrationConflict",
        "MigrationFailed",
        "MigrationInterrupted",
        "NoAnswer",
        "PermissionDenied",
        "ReadOnlyServer",
        "TlsFailed",
        "TurnTimeout",
    ),
    "events": (
        "Applied",
        "Blocked",
        "Blocker",
        "Event",
        "Failed",
        "Finished",
        "LockRetry",
        "Planned",
        "Retrying",
        "ServerMessage",
        "Starting",
        "StatementStarted",
        "Stopped",
        "Waiting",
        "Warned",
    ),
    "migration": ("Migration",),
    "migrator": ("migrate", "resolve", "status"),
    "plan": ("Settlement",),
    "pool": ("open_pool",),
    "report": ("Report", "Status"),
    "source": ("read_migrations",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AmpdError",
    "Applied",
    "AuthenticationFailed",
    "Blocked",
    "Blocker",
    "Config",
    "ConfigError",
    "ConnectionFailed",
    "DatabaseMissing",
    "DatabaseUrl",
    "Event",
    "Failed",
    "Finished",
    "InvalidMigration",
    "Limits",
    "LockRetry",
    "LockTimeout",
    "MetadataDb",
    "Migration",
    "MigrationConflict",
    "MigrationFailed",
    "MigrationInterrupted",
    "Migrations",
    "NoAnswer",
    "PermissionDenied",
    "Planned",
    "ReadOnlyServer",
    "Report",
    "Retrying",
    "ServerMessage",
    "Settlement",
    "Starting",
    "StatementStarted",
    "Status",
    "Stopped",
    "TlsFailed",
    "TurnTimeout",
    "Waiting",
    "Warned",
    "__version__",
    "load_config",
    "migrate",
    "open_pool",
    "read_migrations",
    "resolve",
    "status",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
