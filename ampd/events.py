"""What a run reports while it runs: typed values for `on_event=`. Pure.

    Planned                                      once the history is read, and again if another runner has changed it
    Starting … Applied | Failed                  for each migration, one end for each start, whichever way
    Finished | Stopped                           the last event: done or failed; or cancelled

`str(event)` is what the command line prints of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import TypeAlias

import msgspec

from .errors import AmpdError
from .other_sessions import Blocker, Holder
from .report import PendingMigration, Report, count, duration
from .statement_progress import StatementProgress

UNFINISHED = "unfinished: run `ampd migrate` again; it resumes or says what to do"
UNCONFIRMED = "and the server did not confirm the rollback: run `ampd status`"


class EventBase(msgspec.Struct, frozen=True, kw_only=True):
    """What every event tells: of which database (`host:port/name`) and schema it is.

    `schema` is None where none is configured and the history was not read yet.
    """

    database: str = ""
    schema: str | None = None


class Retrying(EventBase, frozen=True):
    """The server cannot be reached yet; ampd keeps trying. Times in seconds."""

    reason: str
    waited: float
    limit: float

    def __str__(self) -> str:
        return f"{self.reason}; trying for {self.limit - self.waited:.0f} s more"


class Planned(EventBase, frozen=True):
    """What a run is about to do, emitted once it has read the history, before any file is split.

    Of the `total` migrations at hand so many are applied; `pending` is what this run will apply, and `ahead` are the
    versions that a newer build has applied. Emitted again only if another runner, for which this one has waited,
    has changed what is to be done.
    """

    applied: int
    pending: tuple[PendingMigration, ...]
    ahead: tuple[int, ...]
    total: int

    def __str__(self) -> str:
        if self.ahead:
            return f"{self.database}: ahead of this build (newest: {self.ahead[-1]}), nothing to apply"
        if not self.pending:
            return f"{self.database}: nothing to apply"
        first = self.pending[0]
        return f"{self.database}: {len(self.pending)} of {self.total} to apply, from {first.version} {first.name}"


class WaitingForConnection(EventBase, frozen=True):
    """Others have the connections that the run needs, and it holds none meanwhile. Times in seconds."""

    reason: str
    waited: float
    limit: float

    def __str__(self) -> str:
        return f"{self.reason}; waiting for {self.limit - self.waited:.0f} s more"


class Waiting(EventBase, frozen=True):
    """Another session, as a rule a runner, has the advisory lock; times in seconds."""

    waited: float
    limit: float
    holder: Holder

    def __str__(self) -> str:
        held = f"waiting for the migration lock ({self.waited:.0f} s so far), held by {self.holder.describe()}"
        return f"{held}, {self.holder.progress}" if self.holder.progress else held


class Starting(EventBase, frozen=True):
    """A migration starts, `number` of `total`: it has the lock, and no other runner has applied it.

    `resumed_at` counts the statements an earlier run has done. An attempt that ends in a lock timeout and is made again
    goes on with the same start.
    """

    version: int
    name: str
    number: int
    total: int
    statements: int
    transactional: bool = True
    resumed_at: int = 0

    @property
    def label(self) -> str:
        """Return version and name."""
        return f"{self.version} {self.name}"

    def __str__(self) -> str:
        resumed = f", resumed at statement {self.resumed_at + 1}" if self.resumed_at else ""
        return f"[{self.number}/{self.total}] {self.label} …{resumed}"


class StatementStarted(EventBase, frozen=True):
    """The server has begun statement `number` (from 1) of the running migration, which is `migration` of `total`."""

    version: int
    name: str
    migration: int
    total: int
    number: int
    statements: int
    line: int

    def __str__(self) -> str:
        at = f"[{self.migration}/{self.total}] {self.version} {self.name}"
        return f"{at}: statement {self.number}/{self.statements}, line {self.line}"


class Progressed(EventBase, frozen=True):
    """How far the server is in the running statement of a migration, `number` of `total`, where it counts.

    That is in index builds, VACUUM, CLUSTER, ANALYZE and COPY; looked at every few seconds, from a second connection.
    """

    version: int
    name: str
    number: int
    total: int
    progress: StatementProgress

    def __str__(self) -> str:
        return f"[{self.number}/{self.total}] {self.version} {self.name}: {self.progress}"


class Blocked(EventBase, frozen=True):
    """The running migration waits for a lock that others hold, and `queued` sessions wait behind it."""

    version: int
    waited: float
    limit: float
    blockers: tuple[Blocker, ...]
    queued: int

    def __str__(self) -> str:
        lines = [f"blocked for {self.waited:.0f} s (limit {self.limit:g} s) by:"]
        lines += [f"  {blocker.describe()}" for blocker in self.blockers]
        if self.queued:
            lines.append(f"  {self.queued} more wait behind this migration")
        return "\n".join(lines)


class LockRetry(EventBase, frozen=True):
    """A lock was not acquired in time: rolled back after `took` seconds, and to be tried again after `delay` more.

    So many sessions at most were seen `queued` behind the migration, in this attempt or an earlier one.
    """

    version: int
    took: float
    delay: float
    waited: float
    limit: float
    queued: int = 0

    def __str__(self) -> str:
        return f"lock not available: rolled back, trying again in {self.delay:.1f} s"


class Applied(EventBase, frozen=True):
    """A migration is applied and committed: the successful end of its `Starting`.

    `retries` are the attempts that a table lock has ended; the longest took `longest_attempt_secs`, and `most_queued`
    sessions were seen to wait behind it at once.
    """

    version: int
    name: str
    number: int
    total: int
    duration_ms: int
    retries: int = 0
    longest_attempt_secs: float = 0
    most_queued: int = 0

    def __str__(self) -> str:
        done = f"[{self.number}/{self.total}] {self.version} {self.name}  {duration(self.duration_ms)}"
        if not self.retries:
            return done
        others = "nobody was seen to wait behind it"
        if self.most_queued:
            others = (
                f"{count(self.most_queued, 'session')} waited behind it for {self.longest_attempt_secs:.1f} s at most"
            )
        return f"{done}, at attempt {self.retries + 1} to lock its tables; {others}"


class Failed(EventBase, frozen=True):
    """A migration that has started is not applied by this run: the other end of its `Starting`.

    `error` is why: a `MigrationInterrupted` where the run was cancelled or another runner has gone on with it.
    """

    version: int
    name: str
    number: int
    total: int
    duration_ms: int
    error: AmpdError

    def __str__(self) -> str:
        return f"[{self.number}/{self.total}] {self.version} {self.name} failed: {self.error.message}"


class Finished(EventBase, frozen=True):
    """The last event of a run that was not cancelled: how far it has come, and the `error` that has ended it."""

    report: Report
    error: AmpdError | None = None

    def __str__(self) -> str:
        return self.report.text() if self.error is None else f"error: {self.error}"


class Stopped(EventBase, frozen=True):
    """The last event of a run that was cancelled: how far it had come.

    `running` is the migration that was stopped, `confirmed` whether the server has said what became of it, and
    `waiting` whether the run was waiting for another runner.
    """

    report: Report
    confirmed: bool
    running: Starting | None = None
    waiting: bool = False

    def __str__(self) -> str:
        applied = [f"{each.version} {each.name}" for each in self.report.applied]
        return how_far(applied, self.running, confirmed=self.confirmed, waiting=self.waiting)


class ServerMessage(EventBase, frozen=True):
    """A NOTICE or WARNING that a migration made the server send."""

    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity.lower()}: {self.message}"


class Warned(EventBase, frozen=True):
    """Something unusual that does not stop the run."""

    message: str

    def __str__(self) -> str:
        return f"warning: {self.message}"


def how_far(applied: Iterable[str], running: Starting | None, *, confirmed: bool, waiting: bool = False) -> str:
    """Return how far a run that was stopped had come, in words."""
    done = ", ".join(applied)
    told = f"applied {done}" if done else "nothing was applied"
    if running is not None:
        return f"{told}; {was_stopped(running, confirmed=confirmed)}"
    return f"{told}; the rest was waiting for the migration lock" if waiting else told


def was_stopped(running: Starting, *, confirmed: bool) -> str:
    """Return that a migration was stopped, and what is left of it."""
    end = UNFINISHED if not running.transactional else "rolled back" if confirmed else UNCONFIRMED
    return f"{running.label} was stopped, {end}"


# All there are: a `match` over them can end in `typing.assert_never`.
Event: TypeAlias = (
    Retrying
    | Planned
    | WaitingForConnection
    | Waiting
    | Starting
    | StatementStarted
    | Progressed
    | Blocked
    | LockRetry
    | Applied
    | Failed
    | Finished
    | Stopped
    | ServerMessage
    | Warned
)
OnEvent: TypeAlias = Callable[[Event], None]

# Functions to call once the run emits no more events, with the exception that `on_event` has raised, or None. What is
# called by `on_event` adds to the list of its run: it may be called by a function around it, which raises, or keeps the
# last event from it, so that neither an event nor a method of the callback could tell.
AFTERWARDS: ContextVar[list[Callable[[Exception | None], None]]] = ContextVar("ampd_afterwards")


def ignore(_: Event) -> None:
    """Ignore an event: the default of `on_event=`."""
