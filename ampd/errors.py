"""Everything that can go wrong, as one tree.

    AmpdError
    ├── ConfigError                 a file, key, variable, URL or option is wrong
    ├── InvalidMigration            a migration folder or file cannot be used; nothing was connected to
    ├── ConnectionFailed            no usable connection
    │   ├── AuthenticationFailed        the server knows no such role, or not this password
    │   ├── TlsFailed                   the URL's TLS mode and the server do not agree
    │   ├── DatabaseMissing             the server has no such database
    │   ├── NoAnswer                    the server was there and says nothing any more
    │   └── ReadOnlyServer              a standby, or a database set to read-only
    ├── PermissionDenied            the role lacks a privilege; the hint holds the GRANT
    ├── MigrationConflict           history and files disagree
    │   └── MigrationInterrupted        a no-transaction migration was started and did not finish
    ├── MigrationFailed             PostgreSQL refused a statement
    ├── LockTimeout                 a table lock could not be had in time
    └── TurnTimeout                 another runner held the advisory lock for too long

An error carries its facts as fields, and the command line and the JSON document show those fields; whatever is not
known is None. `code` is stable and part of the public contract.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import ampd  # for the annotations: whoever resolves one finds the names of the modules above this one there

from .display import visible

# Whoever made a path of the URL has lost a slash.
_UP_TO_PASSWORD = re.compile(r"(?=(\w:/{1,2}[^\s:/]*:))")  # one may begin within another
# `hide_password=False` is what a hint tells those who use SQLAlchemy.
_IN_QUERY = re.compile(r"((?<!hide_)pass(?:w|%77)ord=)(?:'[^'\n]*'|[^\s&]+)", re.IGNORECASE)
_LONGEST, _SEARCHED = 20_000, 100_000  # characters of a text that are shown; no password is longer than the difference


def masked(text: str) -> str:
    """Return a text without the password of anything in it that looks like a URL: one may stand where none belongs.

    What is longer than a person reads is cut. The time it takes grows with the length alone: what stands in a message
    of the server may be a stranger's.
    """
    text = _IN_QUERY.sub(r"\1***", _without_passwords(text[:_SEARCHED]))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… (and more)"


def shown(text: str) -> str:
    """Return a text as it may be shown: without passwords, and with nothing in it that is not seen."""
    return visible(masked(text))


def _without_passwords(text: str) -> str:
    """Replace what stands between the colon and the @ of each URL: a password may hold anything, an @ or space too."""
    # A password ends at the last @ before white space, else at the last one before a quote or the end of the line.
    word, line = _LastAt(text, r"\s"), _LastAt(text, r"""[\n'"]""")
    parts, done = list[str](), 0
    for url in _UP_TO_PASSWORD.finditer(text):
        if url.start() < done:
            continue
        begin = url.end(1)
        end = word.after(begin)
        end = line.after(begin) if end is None else end
        if end is not None:
            parts += (text[done:begin], "***@")
            done = end + 1
    return "".join((*parts, text[done:]))


class _LastAt:
    """Finds the last @ before the next match of a pattern, for places in ascending order: each stretch is read once."""

    def __init__(self, text: str, end: str) -> None:
        self._text = text
        self._end = re.compile(end)
        self._past = self._at = -1

    def after(self, place: int) -> int | None:
        """Return the offset of that @; None if there is none."""
        if place > self._past:
            found = self._end.search(self._text, place)
            self._past = found.start() if found else len(self._text)
            self._at = self._text.rfind("@", place, self._past)
        return self._at if self._at >= place else None


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
        self.hint = hint and shown(hint)
        self.version = version
        self.file = file and shown(file)
        self.line = line
        self.column = column
        self.sqlstate = sqlstate
        self.detail = detail and shown(detail)
        self.excerpt = excerpt and shown(excerpt)
        self.report: ampd.Report | None = None  # set by `migrate`: how far the run had come

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
    """The role lacks a privilege; the hint holds the GRANT to run."""

    code = "permission"


class MigrationConflict(AmpdError):
    """History and files disagree; `conflicts` lists every case."""

    code = "conflict"

    def __init__(self, message: str, *, conflicts: tuple[ampd.Conflict, ...] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint, version=conflicts[0].version if conflicts else None)
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

    Raised: for a no-transaction one that cannot be resumed safely without a word from a person. In a `Failed` event
    also for one that was stopped, or that another runner has gone on with.
    """

    code = "interrupted"


class MigrationFailed(AmpdError):
    """PostgreSQL refused a statement of a migration; a transactional one left nothing behind."""

    code = "migration_failed"


class LockTimeout(AmpdError):
    """A lock on a table could not be had within `lock_retry_secs`; `blockers` says who held it."""

    code = "lock_timeout"

    def __init__(self, message: str, *, blockers: tuple[ampd.Blocker, ...] = (), **facts: Any) -> None:
        super().__init__(message, **facts)
        self.blockers = blockers

    def fields(self) -> dict[str, object]:
        """Return what the JSON document shows under `error`."""
        return super().fields() | {"blockers": list(self.blockers)}


class TurnTimeout(AmpdError):
    """Another runner held the advisory lock for longer than `turn_wait_secs`."""

    code = "turn_timeout"
