"""Table locks under live traffic: short attempts, pauses between them, and who blocks them."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

import anyio
import msgspec

from ampd import advisory_lock
from ampd.backoff import QUIET_SECS, Backoff
from ampd.errors import AmpdError, ConnectionFailed, LockTimeout, NoAnswer
from ampd.events import Blocked, LockRetry
from ampd.other_sessions import Blocker, readable_sql
from ampd.postgres.quoting import PIN_SEARCH_PATH, do_block, literal
from ampd.report import count
from ampd.statement_progress import StatementProgress, progress_sql

from .background import in_background
from .transaction import LockUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ampd.postgres.connection import Session
    from ampd.postgres.database import Database

    from .prepared import Execution


T = TypeVar("T")

_LOOK_EVERY_SECS = 1.0
_ANSWER_SECS = 5.0
_LOOKS_TO_BE_CERTAIN = 3  # that the server works for a connection no longer
_LONGEST_PAUSE_SECS = 5.0  # after attempts that are refused at once
_SILENCE_SECS = 15.0  # no answer on a second connection for so long: the first one is dead as well


class LockSnapshot(msgspec.Struct, frozen=True):
    """What a second connection sees of the first one's backend, on the server that it was given."""

    worker: int | None  # unknown where pg_stat_activity tells nothing, or on another server behind a load balancer
    alive: bool
    blockers: tuple[Blocker, ...]
    queued: int
    progress: StatementProgress | None = None


class LockMonitor:
    """Watches the running migration from a second connection, which is opened only when it takes long."""

    def __init__(
        self,
        database: Database,
        session: Session,
        current: Callable[[], Execution],
        backoff: Backoff,
        fallback: Session | None,
    ) -> None:
        self._database = database
        self._session = session
        self._current = current
        self._backoff = backoff
        self._fallback = fallback
        self._looked, self._seen_blocked = monotonic(), -inf
        self._seen_alive: int | None = None
        self._looking = anyio.Lock()  # from the guard
        self.blockers: tuple[Blocker, ...] = ()
        self.queued: int = 0
        self.most_queued: int = 0
        self.blocked_secs: float = 0.0
        self.on_limit: Callable[[], None] | None = None  # called once the limit was spent blocked

    async def run(self, first_look: float) -> None:
        """Look until cancelled; give the first connection up once it is certain to be dead."""
        interval = min(first_look, _LOOK_EVERY_SECS)
        await anyio.sleep(first_look)
        silent_since: float | None = None
        missed = 0
        while True:
            # Between two attempts there is nothing to see; or it needs another connection, maybe the last there is.
            if self._session.is_closed() or not self._session.busy:
                interval = min(first_look, _LOOK_EVERY_SECS)
                await anyio.sleep(interval)
                continue
            try:
                async with self._database.second_session(_ANSWER_SECS) as observer:
                    if self._database.pool_size is None:
                        silent_since = None  # the server has greeted: without an answer we stand in a pooler's queue
                    snapshot = await observer.ask(self._question_sql(observer), LockSnapshot, timeout=_ANSWER_SECS)
                silent_since = None
                missed = missed + 1 if self._session.busy and self._is_gone(snapshot) else 0
                if missed >= _LOOKS_TO_BE_CERTAIN:
                    return self._session.give_up("the server no longer works for this connection")
                self._record(snapshot)
                # Others may need the connection: it is given back, and asked for less often while nothing is blocked.
                longest = _LOOK_EVERY_SECS * (1 if snapshot.blockers or missed else 5)
                interval = min(interval * 1.2, longest)
                await anyio.sleep(interval)
                continue
            except NoAnswer:
                silent_since = silent_since or monotonic()
                if monotonic() - silent_since >= _SILENCE_SECS:
                    return self._session.give_up(f"the server has not answered for {_SILENCE_SECS:g} s")
            except AmpdError:  # no second connection is free, which says nothing about the first
                pass
            await self._look_from_fallback()
            await anyio.sleep(_LOOK_EVERY_SECS)

    async def _look_from_fallback(self) -> None:
        """Look from the guard's connection, where no other is free."""
        if self._fallback is not None:
            with suppress(AmpdError):
                # The savepoint gives back the locks on catalogs, for which the migration itself might wait.
                look = (
                    f"SAVEPOINT look; {do_block(self._body(self._fallback.note_sql))}; ROLLBACK TO look; RELEASE look"
                )
                async with self._looking:
                    snapshot = await self._fallback.ask(look, LockSnapshot)
                self._record(snapshot)

    async def finish_look(self) -> None:
        """Wait for a look from the guard: cancelled, it would end the guard's transaction and the lock with it."""
        async with self._looking:
            pass

    def _is_gone(self, snapshot: LockSnapshot) -> bool:
        """Return whether a backend that was seen at work is no longer."""
        if snapshot.alive:
            self._seen_alive = snapshot.worker
        return not snapshot.alive and snapshot.worker is not None and snapshot.worker == self._seen_alive

    def _question_sql(self, observer: Session) -> str:
        preamble = (
            "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SET LOCAL search_path = pg_catalog, pg_temp; "
            "SET LOCAL statement_timeout = '5s'"
        )
        return f"{preamble}; {do_block(self._body(observer.note_sql))}; COMMIT"

    def _body(self, note: Callable[[str], str]) -> str:
        pid = str(self._session.backend_pid)
        if self._session.backend_pid is None:  # until a transaction has sent it, only the label shows the backend
            label = literal(advisory_lock.label_sql(self._current().history.lock_key, self._current().migration.label))
            # Anybody can write the label; nobody else can have the login that we, and so this connection, have.
            login = "usesysid = (SELECT usesysid FROM pg_stat_activity WHERE pid = pg_backend_pid())"
            mine = f"starts_with(query, {label}) AND {login} AND datname = current_database()"
            pid = f"(SELECT pid FROM pg_stat_activity WHERE {mine} ORDER BY state = 'active' DESC LIMIT 1)"
        query = readable_sql("left(regexp_replace(a.query, '[[:space:]]+', ' ', 'g'), 60)")
        snapshot = f"""jsonb_build_object('worker', worker,
    'progress', progress,
    'alive', EXISTS (SELECT FROM pg_stat_activity WHERE pid = worker AND state IS DISTINCT FROM 'idle'),
    'queued', (SELECT count(*) FROM pg_stat_activity
               WHERE wait_event_type = 'Lock' AND worker = ANY (pg_blocking_pids(pid))),
    'blockers', (
      SELECT coalesce(jsonb_agg(jsonb_build_object('pid', b.pid, 'user', a.usename, 'application', a.application_name,
        'client', coalesce(a.client_hostname, host(a.client_addr)), 'since', coalesce(a.xact_start, a.state_change),
        'state', CASE b.pid WHEN 0 THEN 'a prepared transaction, see pg_prepared_xacts' ELSE a.state END,
        'query', CASE a.datname WHEN current_database() THEN {query} END)), '[]')
      FROM (SELECT DISTINCT unnest(pg_blocking_pids(worker)) AS pid) b
      LEFT JOIN pg_stat_activity a ON a.pid = b.pid WHERE b.pid <> pg_backend_pid()))"""
        return f"""DECLARE worker integer; progress pg_catalog.jsonb; BEGIN {PIN_SEARCH_PATH}
  PERFORM pg_stat_clear_snapshot(); worker := {pid};{progress_sql("worker", "progress")}
  {note(snapshot)} END"""

    def _record(self, snapshot: LockSnapshot) -> None:
        since, self._looked = self._looked, monotonic()
        self._current().running.progress(snapshot.progress)
        if not snapshot.blockers:
            return
        self.blocked_secs += self._looked - since
        self._seen_blocked = self._looked
        self.blockers = tuple(
            msgspec.structs.replace(blocker, own_pool=self._database.owns_pid(blocker.pid))
            for blocker in snapshot.blockers
        )
        self.queued = snapshot.queued
        self.most_queued = max(self.most_queued, snapshot.queued)
        self.report(since)
        if self.on_limit and self.blocked_secs > self._backoff.limit:
            self.on_limit()

    def report(self, since: float) -> None:
        """Emit who has been seen to block the migration since a time of `monotonic`, unless that was said just now."""
        if self._seen_blocked >= since and self._backoff.should_report():
            self._current().on_event(
                Blocked(
                    version=self._current().migration.version,
                    waited=self._backoff.waited,
                    limit=self._backoff.limit,
                    blockers=self.blockers,
                    queued=self.queued,
                )
            )

    def blockers_text(self) -> str:
        """Return the blockers as last seen, a line each."""
        if not self.blockers:
            return ""
        lines = [f"blocked by {blocker.describe()}" for blocker in self.blockers]
        return "".join(
            f"\n  {line}" for line in [*lines, f"{count(self.queued, 'session')} queued behind this migration"]
        )

    def hint(self) -> str:
        """Return what to do about them."""
        if any(blocker.own_pool for blocker in self.blockers):
            return "the service blocks itself: migrate before it uses its pool, or end the pool's transactions first"
        pids = ", ".join(str(blocker.pid) for blocker in self.blockers if blocker.pid)
        if pids:
            return f"wait for the blocking transaction, or end it (pg_terminate_backend of {pids}), and run again"
        return "run again when the table is quieter, or raise lock_retry_secs"


async def with_lock_retries(
    database: Database,
    session: Session,
    current: Callable[[], Execution],
    attempt: Callable[[Session], Awaitable[None]],
    *,
    blocked: AmpdError | None = None,
    fallback: Session | None = None,
) -> None:
    """Make attempts, each under `lock_timeout_secs`, until one succeeds or `lock_retry_secs` have passed.

    `current` returns the migration that an attempt is at: one that applies several goes on with the next.

    Between two attempts nothing is held and nothing waits, so that whoever queued behind us gets through; and for five
    times as long as the attempt took, so that whoever comes meanwhile waits for a sixth of the time at most. An attempt
    that no lock_timeout ends is cancelled when it has been blocked for `lock_retry_secs`, with `blocked` as the
    error; without it there is no such limit. A `fallback` session is one to look from when no other is free.

    Raises:
        LockTimeout: no attempt succeeded in time; the error names the blockers.
    """
    execution = current()
    limit = execution.limits.lock_retry_secs
    backoff = Backoff(limit, longest_pause=_LONGEST_PAUSE_SECS)
    backoff.begin()
    monitor = LockMonitor(database, session, current, backoff, fallback)
    # A shorter wait is not worth a second connection.
    first_look = QUIET_SECS if blocked else min(QUIET_SECS, execution.lock_timeout_secs / 2 or QUIET_SECS)
    with anyio.CancelScope() as scope:
        if blocked is not None:
            monitor.on_limit = scope.cancel
        async with in_background(partial(monitor.run, first_look)):
            while True:
                await session.reopen()  # nothing is held: one that was given up, or lost in a pause, is no loss
                session.backend_pid = None  # behind a pooler it can be another one each time
                begun = monotonic()
                try:
                    await attempt(session)
                    return await monitor.finish_look()
                except LockUnavailable as busy:
                    if current() is not execution:  # another one than the last time
                        execution = current()
                        backoff.renew(since=execution.running.since)
                    took = monotonic() - max(begun, execution.running.since)
                    waited, delay = backoff.waited, backoff.rest(took)
                    if delay < 0:
                        raise _lock_timeout_error(busy.error, monitor, waited) from busy
                    monitor.report(begun)
                    execution.running.retry(
                        LockRetry(
                            version=execution.migration.version,
                            took=took,
                            delay=delay,
                            waited=waited,
                            limit=limit,
                            queued=monitor.most_queued,
                        )
                    )
                await _stay_awake(session, delay)
    assert blocked is not None
    await session.recover()
    raise _lock_timeout_error(blocked, monitor, monitor.blocked_secs)


async def _stay_awake(session: Session, secs: float) -> None:
    """Pause, with a query every second: the server may end sessions that are idle for longer."""
    while secs > 1:
        await anyio.sleep(1)
        with suppress(ConnectionFailed):  # the next attempt has another
            await session.run("SELECT 1")
        secs -= 1
    await anyio.sleep(secs)


_FACTS = ("version", "file", "line", "column", "sqlstate", "detail", "excerpt")


def _lock_timeout_error(error: AmpdError, monitor: LockMonitor, waited: float) -> LockTimeout:
    return LockTimeout(
        f"{error.message}; gave up after {waited:.1f} s{monitor.blockers_text()}",
        hint=f"{monitor.hint()}; {error.hint}",
        blockers=monitor.blockers,
        **{name: getattr(error, name) for name in _FACTS},
    )
