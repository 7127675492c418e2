"""What a run tells while it runs: typed values for `on_event=`. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from .report import Report


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something worth telling the person who waits."""


class Retrying(Event, frozen=True):
    """The server cannot be reached yet; ampd keeps trying. Times in seconds."""

    reason: str
    waited: float
    limit: float


class Waiting(Event, frozen=True):
    """Another runner has the turn. Fields that the role may not see are None; times in seconds."""

    waited: float
    limit: float
    pid: int
    client: str | None = None
    application: str | None = None
    migration: str | None = None
    since: datetime | None = None


class Starting(Event, frozen=True):
    """A migration is about to run, `number` of `total`; `resumed_at` counts the statements an earlier run has done."""

    version: int
    name: str
    number: int
    total: int
    statements: int
    transactional: bool = True
    resumed_at: int = 0


class StatementStarted(Event, frozen=True):
    """The server has begun statement `number` (from 1) of the running migration."""

    version: int
    number: int
    statements: int
    line: int


class Blocker(msgspec.Struct, frozen=True):
    """A session that stands in the way of a lock, as `pg_stat_activity` shows it; times in seconds."""

    pid: int
    user: str | None
    application: str | None
    client: str | None
    state: str | None
    since: datetime | None
    query: str | None
    own_pool: bool = False

    def describe(self) -> str:
        """Return one line for a person."""
        if self.own_pool:
            return f"pid {self.pid}, a connection of this very process's own pool, {self.state or 'state unknown'}"
        facts = [f"user {self.user or '?'}", f"application {self.application or '?'}"]
        if self.client:
            facts.append(f"from {self.client}")
        facts.append(self.state or "state unknown")
        if self.since:
            facts.append(f"since {self.since:%Y-%m-%d %H:%M:%S%z}")
        if self.query:
            facts.append(self.query)
        return f"pid {self.pid}: {', '.join(facts)}"


class Blocked(Event, frozen=True):
    """The running migration waits for a lock that others hold, and `queued` sessions wait behind it."""

    version: int
    waited: float
    limit: float
    blockers: tuple[Blocker, ...]
    queued: int


class LockRetry(Event, frozen=True):
    """A lock could not be had in time: rolled back, and to be tried again after `delay` seconds."""

    version: int
    delay: float
    waited: float
    limit: float


class Applied(Event, frozen=True):
    """A migration is applied and committed."""

    version: int
    name: str
    number: int
    total: int
    duration_ms: int


class Stopped(Event, frozen=True):
    """The run was cancelled: how far it had come, and whether the server has confirmed that the rest is rolled back."""

    report: Report
    confirmed: bool


class ServerMessage(Event, frozen=True):
    """A NOTICE or WARNING that a migration made the server send."""

    severity: str
    message: str


class Warned(Event, frozen=True):
    """Something is odd and the run goes on."""

    message: str


OnEvent = Callable[[Event], None]


def ignore(_: Event) -> None:
    """Take an event and do nothing: the default of `on_event=`."""
