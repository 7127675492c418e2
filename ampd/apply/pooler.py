"""Behind a pooler: noticing one, refusing what cannot work there, and giving its server connections back as they were.

A pooler in transaction mode gives each message whichever server connection is free. What is set on one of them stays
there for whoever is given it next, and does not hold for what follows.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import anyio
import msgspec

from ampd.errors import AmpdError, ConfigError, NoAnswer
from ampd.events import Warned
from ampd.postgres.connection import ANSWER_SECS, CLOSE_TIMEOUT_SECS, close_timeout
from ampd.postgres.failures import RUN_AGAIN
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError
from ampd.sql import kinds
from ampd.sql.slices import in_slices
from ampd.sql.units import units

from .location import location_of
from .tracker import StatementTracker

if TYPE_CHECKING:
    from ampd.postgres.connection import Session
    from ampd.postgres.database import Database
    from ampd.sql.slices import Slices

    from .prepared import Execution, PreparedMigration


_FIRST_PAUSE_SECS = 0.05
_PROBES = 5  # messages that find out whether each is given another server connection


class Backend(msgspec.Struct, frozen=True):
    """Where a message has met the server: the backend's process id, and the schema that its search path begins with."""

    pid: int
    schema: str | None


async def find_backend(session: Session, execution: Execution, timeout: float = ANSWER_SECS) -> Backend:
    """Return the backend of a session; behind a pooler that changes it, refuse a migration that depends on one.

    A pooler in transaction mode gives the guard what we had, and us another server connection; `timeout` in seconds.

    Raises:
        ConfigError: as `check_no_session`.
        NoAnswer: the pooler has no server connection for us.
    """
    document = (
        "pg_catalog.jsonb_build_object('pid', pg_catalog.pg_backend_pid(), 'schema', pg_catalog.current_schema())"
    )
    pids, backend = {execution.history.pid}, None
    for _ in range(_PROBES if session.pooled else 1):
        try:
            backend = await session.ask(do_block(f"BEGIN {session.note_sql(document)} END"), Backend, timeout=timeout)
        except NoAnswer as error:
            hint = "a pooler needs two server connections for each runner of a no-transaction migration; " + RUN_AGAIN
            raise NoAnswer(error.message, hint=hint) from error
        pids.add(backend.pid)
    assert backend is not None
    if session.pooled and len(pids) > 1:
        await in_slices(check_no_session(execution, backend))
    return backend


def check_no_session(execution: Execution, backend: Backend) -> Slices[None]:
    """Refuse, in slices, what depends on its session, behind a pooler that gives each message another one.

    Raises:
        ConfigError: objects could be made in a wrong schema or by a wrong role, or temporary ones not be found.
    """
    statements, file, needs = execution.statements, execution.migration.file, None
    temporary = dict[str, int]()
    for unit in units(statements, 0, []):
        line, made = unit.statements.line(0), dict[str, int]()
        for statement in unit.statements:
            yield
            if name := next((name for name in temporary if kinds.mentions(statement, name)), None):
                raise ConfigError(
                    f"{file}:{line}: the temporary {name} (made in line {temporary[name]}) may be missing here: "
                    "a pooler in transaction mode can run each statement in another session",
                    hint="connect directly, or to a pooler in session mode; or put both between BEGIN and COMMIT",
                    **location_of(execution.migration, unit.statements.start(0)),
                )
            if name := kinds.temporary(statement):
                made[name] = statement.line
        temporary |= made
        if unit.is_transactional:
            continue
        if of_session := next((each for each in unit.settings if kinds.setting(each) in _WHO_AND_WHERE), None):
            needs = f"`{of_session.text}` in line {of_session.line}"
        elif execution.history.role is not None:
            needs = f"role = {execution.history.role!r}"
        elif execution.schema not in (None, backend.schema):
            needs = f"schema = {execution.schema!r}"
        if needs:
            raise ConfigError(
                f"{file}:{line}: runs outside of a transaction, where {needs} does not reach it behind a pooler in "
                "transaction mode",
                hint="connect directly, or to a pooler in session mode; or let the server set it for each session, "
                "such as ALTER ROLE … SET search_path = …",
                **location_of(execution.migration, unit.statements.start(0)),
            )


_WHO_AND_WHERE = ("search_path", "role", "session_authorization")


def check_no_discard(database: Database, migration: PreparedMigration) -> None:
    """Refuse DISCARD ALL in a no-transaction file on connections of a pool of the caller's.

    Raises:
        ConfigError: it would take away what the pool and the driver have set and prepared there.
    """
    for statement in migration.statements:
        if statement.words[:2] == ("DISCARD", "ALL"):
            raise ConfigError(
                f"{migration.migration.file}:{statement.line}: DISCARD ALL would also discard what {database.passed} "
                "has set and prepared in the session",
                hint="give the URL, for connections of ampd's own; or take the statement out, if the migration is "
                "applied nowhere yet",
                **location_of(migration.migration, statement.start),
            )


async def restore_settings(
    database: Database, session: Session, execution: Execution, resets: str, dirty_backends: set[int]
) -> None:
    """Run `resets` on a session; behind a pooler, on each dirty backend that we are given in time.

    A pooler hands out first what was given back last, which hides the others, and some may be in use by now.
    """
    deadline = anyio.current_time() + close_timeout()
    with anyio.CancelScope(deadline=deadline), suppress(ServerError, AmpdError):
        if await session.recover():
            pid = do_block(f"BEGIN {session.note_pid_sql()} END")
            await session.run(f"{resets}{pid}", on_note=StatementTracker(session, execution))
            dirty_backends.discard(session.backend_pid or 0)
    if session.server_pid in dirty_backends:  # no pooler: what cannot be taken back goes with the connection
        session.give_up("what the migration has set could not be taken back")
        return
    pause, window = _FIRST_PAUSE_SECS, CLOSE_TIMEOUT_SECS
    with anyio.CancelScope(deadline=deadline):
        while dirty_backends:
            with anyio.move_on_after(window), suppress(ServerError, AmpdError):
                await _search(database, session, execution, resets, dirty_backends, window)
            if dirty_backends:  # for others who wait for the connections that were held
                await anyio.sleep(pause)
                pause, window = pause * 2, window * 2
    if dirty_backends:
        pids = ", ".join(map(str, sorted(dirty_backends)))
        told = f"what {execution.migration.label} has set may still hold in the pooler's server connection, pid {pids}"
        execution.on_event(Warned(message=f"{told}: RECONNECT in the pooler's console renews it"))


async def _search(
    database: Database, session: Session, execution: Execution, resets: str, dirty_backends: set[int], window: float
) -> None:
    """Run `resets` on the dirty backends among a pooler's idle ones, and hold the others until all are found."""
    alive = f"""(SELECT COALESCE(pg_catalog.jsonb_agg(pid), '[]') FROM pg_catalog.pg_stat_activity
        WHERE pid OPERATOR(pg_catalog.=) ANY (ARRAY{sorted(dirty_backends)}))"""
    question = do_block(f"BEGIN {session.note_sql(alive)} END")
    await session.reopen()
    dirty_backends.intersection_update(await session.ask(question, list[int]))
    async with AsyncExitStack() as holding:
        while dirty_backends:
            other = await holding.enter_async_context(database.second_session(window))
            holding.push_async_callback(other.recover)  # a pooler throws away what is left in a transaction
            pid = do_block(f"BEGIN {other.note_pid_sql()} END")
            await other.run(f"BEGIN; {pid}", on_note=StatementTracker(other, execution))
            if other.backend_pid in dirty_backends:
                await other.run(f"{resets}COMMIT")
                dirty_backends.discard(other.backend_pid)
