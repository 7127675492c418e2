"""Other sessions of the server, as `pg_stat_activity` shows them: who holds a lock that a run waits for. Pure."""

from __future__ import annotations

import re
from datetime import datetime

import msgspec

from .display import one_line
from .redaction import masked
from .statement_progress import StatementProgress


def readable_sql(text: str) -> str:
    """Return an SQL expression for a text of another session of the database, itself an expression of type text.

    In a database of SQL_ASCII that can be any bytes, which no client could read: they are escaped as those of a bytea.
    The search path must be pinned.
    """
    escaped = f"encode(convert_to({text}, 'SQL_ASCII'), 'escape')"
    return f"CASE getdatabaseencoding() WHEN 'SQL_ASCII' THEN {escaped} ELSE {text} END"


class Holder(msgspec.Struct, frozen=True):
    """The session that holds the advisory lock; what the role may not see is None."""

    pid: int
    user: str | None = None
    application: str | None = None
    client: str | None = None
    since: datetime | None = None
    query: str | None = None
    progress: StatementProgress | None = None

    def __post_init__(self) -> None:
        _mask_query(self)

    @property
    def migration(self) -> str | None:
        """Return the migration that it runs.

        Its session's name says which, while the comment that its message begins with names the first of the message.
        """
        first = None
        if self.query is not None and self.query.startswith("/* ampd "):
            first = self.query.removeprefix("/* ampd ").partition(" */")[0].partition(" ")[2] or None
        progress = self._progress
        return first if progress is None or f"{first} ".startswith(f"{progress[1]} ") else progress[1]

    @property
    def _progress(self) -> re.Match[str] | None:
        return re.fullmatch(r"ampd (\d{1,18}) (\d{1,9})/(\d{1,9})", self.application or "", re.ASCII)

    def is_at(self, version: int) -> bool:
        """Return whether it says that it runs the migration with this version."""
        return (self.migration or "").partition(" ")[0] == str(version)

    def describe(self) -> str:
        """Return one line for a person, which says so if the session does not call itself ampd."""
        facts = [f"pid {self.pid}"]
        if self.user:
            facts.append(f"user {one_line(self.user)}")
        if self.client:
            facts.append(f"on {one_line(self.client)}")
        progress = self._progress
        if self.application:
            facts.append(f"application {'ampd' if progress else one_line(self.application)}")
        if self.migration:
            place = f" ({progress[2]} of {progress[3]})" if progress else ""
            facts.append(f"migration {one_line(self.migration)}{place}")
        if self.since:
            facts.append(f"since {self.since:%Y-%m-%d %H:%M:%S%z}")
        is_runner = self.migration is not None or (self.application or "").startswith("ampd")
        return f"{'' if is_runner else 'a session that is not ampd: '}{', '.join(facts)}"


class Blocker(msgspec.Struct, frozen=True):
    """A session that blocks a lock, as `pg_stat_activity` shows it."""

    pid: int
    user: str | None
    application: str | None
    client: str | None
    state: str | None
    since: datetime | None
    query: str | None
    own_pool: bool = False

    def __post_init__(self) -> None:
        _mask_query(self)

    def describe(self) -> str:
        """Return one line for a person."""
        if self.own_pool:
            return f"pid {self.pid}, a connection of this very process's own pool, {self.state or 'state unknown'}"
        facts = [f"user {one_line(self.user or '?')}", f"application {one_line(self.application or '?')}"]
        if self.client:
            facts.append(f"from {one_line(self.client)}")
        facts.append(self.state or "state unknown")
        if self.since:
            facts.append(f"since {self.since:%Y-%m-%d %H:%M:%S%z}")
        if self.query:
            facts.append(one_line(self.query))
        return f"pid {self.pid}: {', '.join(facts)}"


def _mask_query(session: Holder | Blocker) -> None:
    """Redact passwords in the last query of another session."""
    if session.query is not None:
        msgspec.structs.force_setattr(session, "query", masked(session.query))
