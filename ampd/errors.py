"""Everything that can go wrong, as one tree.

    AmpdError
    ├── ConfigError                 a file, key, variable, URL or option is wrong
    ├── InvalidMigration            a migration folder or file cannot be used; nothing was connected to
    ├── ConnectionFailed            no usable connection
    │   ├── AuthenticationFailed        the server knows no such role, or not this password
    │   ├── TlsFailed                   the URL's TLS mode and the server do not agree
    │   ├── DatabaseMissing             the server has no such database
    │   ├── NoAnswer                    the server was there and no longer answers
    │   └── ReadOnlyServer              a standby, or a database set to read-only
    ├── PermissionDenied            the role lacks a privilege; the hint contains the GRANT
    ├── MigrationConflict           history and files disagree
    │   └── MigrationInterrupted        a no-transaction migration was started and did not finish
    ├── MigrationFailed             PostgreSQL refused a statement
    ├── LockTimeout                 a table lock was not acquired in time
    └── AdvisoryLockTimeout         another runner held the advisory lock for too long

An error carries its facts as fields, and the command line and the JSON document show those fields; whatever is not
known is None. `code` is stable and part of the public contract.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .other_sessions import Blocker
from .plan import Conflict
from .redaction import shown
from .report import Report


class AmpdError(Exception):
    """Anything ampd refuses or fails to do: `message` says what happened, `hint` what to do next.

    None of its texts shows the password of a URL.
    """

    code: ClassVar[str]

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        version: int | None = None,
        file: str | None = None,
        line: int | None = None,
        column: int | None = None,
        sqlstate: str | None = None,
        detail: str | None = None,
        excerpt: str | None = None,
    ) -> None:
        message = shown(message)
        super().__init__(message)
        self.message = message
        self.hint: str | None = hint and shown(hint)
        self.version = version
        self.file: str | None = file and shown(file)
        self.line = line
        self.column = column
        self.sqlstate = sqlstate
        self.detail: str | None = detail and shown(detail)
        self.excerpt: str | None = excerpt and shown(excerpt)
        self.report: Report | None = None  # set by `migrate`: how far the run had come

    def __str__(self) -> str:
        parts = [self.message]
        if self.excerpt:
            parts.append(self.excerpt)
        if self.detail:
            parts.append(f"detail: {self.detail}")
        if self.hint:
            parts.append(f"hint: {self.hint}")
        return "\n".join(parts)

    def fields(self) -> dict[str, object]:
        """Return what the JSON document shows under `error`."""
        return {"code": self.code} | {
            name: getattr(self, name)
            for name in ("message", "hint", "version", "file", "line", "column", "sqlstate", "detail")
        }


class ConfigError(AmpdError):
    """A file, key, variable, URL or option is wrong."""

    code = "config"


class InvalidMigration(AmpdError):
    """A migration folder or file cannot be used; found before anything connects, or before anything runs."""

    code = "invalid_migration"


class ConnectionFailed(AmpdError):
    """No usable connection to the server, or the connection was lost."""

    code = "connection"


class AuthenticationFailed(ConnectionFailed):
    """The server does not let this role in: wrong password, unknown role, or a rule in pg_hba.conf."""


class TlsFailed(ConnectionFailed):
    """The TLS mode of the URL cannot be honoured with this server."""


class DatabaseMissing(ConnectionFailed):
    """The server has no such database."""


class NoAnswer(ConnectionFailed):
    """The server did not answer in time: a dead host, a cut network, or a server far beyond its load."""


class ReadOnlyServer(ConnectionFailed):
    """The server takes no writes: a standby, or a database set to read-only."""


class PermissionDenied(AmpdError):
    """The role lacks a privilege; the hint contains the GRANT to run."""

    code = "permission"


class MigrationConflict(AmpdError):
    """History and files disagree; `conflicts` lists every case."""

    code = "conflict"

    def __init__(self, message: str, *, conflicts: tuple[Conflict, ...] = (), hint: str | None = None) -> None:
        first = conflicts[0].info if conflicts else None
        file = first.migration.file if first and first.migration else None
        super().__init__(message, hint=hint, version=first.version if first else None, file=file)
        self.conflicts = conflicts

    def __str__(self) -> str:
        parts = [self.message]
        if len(self.conflicts) == 1:  # the message and the hint are its own
            parts.append(self.conflicts[0].evidence)
        else:
            parts.extend(f"{each.message}\n{each.evidence}\n  to do:   {each.hint}" for each in self.conflicts)
        if self.hint:
            parts.append(f"hint: {self.hint}")
        return "\n".join(parts)

    def fields(self) -> dict[str, object]:
        """Return what the JSON document shows under `error`."""
        return super().fields() | {"conflicts": [conflict.fields() for conflict in self.conflicts]}


class MigrationInterrupted(MigrationConflict):
    """A migration was started and did not finish.

    Raised: for a no-transaction one that cannot be resumed safely without a person's decision. In a `Failed` event
    also for one that was stopped, or that another runner has gone on with.
    """

    code = "interrupted"


class MigrationFailed(AmpdError):
    """PostgreSQL refused a statement of a migration; a transactional one left nothing behind."""

    code = "migration_failed"


class LockTimeout(AmpdError):
    """A lock on a table was not acquired within `lock_retry_secs`; `blockers` says who held it."""

    code = "lock_timeout"

    def __init__(self, message: str, *, blockers: tuple[Blocker, ...] = (), **facts: Any) -> None:
        super().__init__(message, **facts)
        self.blockers = blockers

    def fields(self) -> dict[str, object]:
        """Return what the JSON document shows under `error`."""
        return super().fields() | {"blockers": list(self.blockers)}


class AdvisoryLockTimeout(AmpdError):
    """Another runner held the advisory lock for longer than `advisory_lock_wait_secs`."""

    code = "advisory_lock_timeout"
