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
from ampd.postgres.connection import ANSWER_SECS, GOODBYE_SECS, patience
from ampd.postgres.failures import RUN_AGAIN
from ampd.postgres.quoting import do_block
from ampd.postgres.server_error import ServerError
from ampd.sql import kinds
from ampd.sql.slices import in_slices
from ampd.sql.units import units

from .transaction import Course

if TYPE_CHECKING:
    from ampd.postgres.connection import Session
    from ampd.postgres.database import Database
    from ampd.sql.slices import Slices

    from .prepared import Job


_FIRST_REST_SECS = 0.05
_GLANCES = 5  # at which server connection we are given


class Place(msgspec.Struct, frozen=True):
    """Where a message has met the server: the backend's process id, and the schema that its search path begins with."""

    pid: int
    schema: str | None


async def find_place(session: Session, job: Job, timeout: float = ANSWER_SECS) -> Place:
    """Return where we are; behind a pooler, insist that we stay there if the migration depends on it.

    A pooler in transaction mode gives the guard what we had, and us another server connection; `timeout` in seconds.
    """
    document = (
        "pg_catalog.jsonb_build_object('pid', pg_catalog.pg_backend_pid(), 'schema', pg_catalog.current_schema())"
    )
    pids, place = {job.history.pid}, None
    for _ in range(_GLANCES if session.pooled else 1):
        try:
            place = await session.ask(do_block(f"BEGIN {session.note(document)} END"), Place, timeout=timeout)
        except NoAnswer as error:
            hint = "a pooler needs two server connections for each runner of a no-transaction migration; " + RUN_AGAIN
            raise NoAnswer(error.message, hint=hint) from error
        pids.add(place.pid)
    assert place is not None
    if session.pooled and len(pids) > 1:
        await in_slices(insist_on_no_session(job, place))
    return place


def insist_on_no_session(job: Job, place: Place) -> Slices[None]:
    """Refuse, in slices, what depends on its session, behind a pooler that gives each message another one.

    Raises:
        ConfigError: objects could be made in a wrong schema or by a wrong role, or temporary ones not be found.
    """
    statements, file, needs = job.script.statements, job.script.migration.file, None
    temporary = dict[str, int]()
    for unit in units(statements, 0, []):
        line, made = unit.statements.line(0), dict[str, int]()
        for statement in unit.statements:
            yield
            if name := next((name for name in temporary if kinds.mentions(statement, name)), None):
                raise ConfigError(
                    f"{file}:{line}: behind a pooler in transaction mode this may not find {name}, which is temporary "
                    f"and made in line {temporary[name]}",
                    hint="connect directly, or to a pooler in session mode; or put both between BEGIN and COMMIT",
                    version=job.script.migration.version,
                    file=file,
                    line=line,
                )
            if name := kinds.temporary(statement):
                made[name] = statement.line
        temporary |= made
        if unit.transactional:
            continue
        if of_session := next((each for each in unit.settings if kinds.setting(each) in _WHO_AND_WHERE), None):
            needs = f"`{of_session.text}` in line {of_session.line}"
        elif job.history.role is not None:
            needs = f"role = {job.history.role!r}"
        elif job.schema not in (None, place.schema):
            needs = f"schema = {job.schema!r}"
        if needs:
            raise ConfigError(
                f"{file}:{line}: runs outside of a transaction, where {needs} does not reach it behind a pooler in "
                "transaction mode",
                hint="connect directly, or to a pooler in session mode; or let the server set it for each session, "
                "such as ALTER ROLE … SET search_path = …",
                version=job.script.migration.version,
                file=file,
                line=line,
            )


_WHO_AND_WHERE = ("search_path", "role", "session_authorization")


async def take_back(source: Database, session: Session, job: Job, resets: str, touched: set[int]) -> None:
    """Clean a session; behind a pooler, each of its server connections that we have touched and can get in time.

    It hands out first what was given back last, which hides the others, and some may be in other hands by now.
    """
    deadline = anyio.current_time() + patience()
    with anyio.CancelScope(deadline=deadline), suppress(ServerError, AmpdError):
        if await session.recover():
            pid = do_block(f"BEGIN {session.note_pid()} END")
            await session.run(f"{resets}{pid}", on_note=Course(session, job))
            touched.discard(session.backend_pid or 0)
    if session.server_pid in touched:  # no pooler: what cannot be taken back goes with the connection
        session.give_up("what the migration has set could not be taken back")
        return
    rest, window = _FIRST_REST_SECS, GOODBYE_SECS
    with anyio.CancelScope(deadline=deadline):
        while touched:
            with anyio.move_on_after(window), suppress(ServerError, AmpdError):
                await _search(source, session, job, resets, touched, window)
            if touched:  # let those through who wait for what we have held
                await anyio.sleep(rest)
                rest, window = rest * 2, window * 2
    if touched:
        pids = ", ".join(map(str, sorted(touched)))
        told = f"what {job.script.migration.label} has set may still hold in the pooler's server connection, pid {pids}"
        job.on_event(Warned(message=f"{told}: RECONNECT in the pooler's console renews it"))


async def _search(source: Database, session: Session, job: Job, resets: str, touched: set[int], window: float) -> None:
    """Clean the touched ones among a pooler's idle server connections, and hold the others until all are found."""
    alive = f"""(SELECT COALESCE(pg_catalog.jsonb_agg(pid), '[]') FROM pg_catalog.pg_stat_activity
        WHERE pid OPERATOR(pg_catalog.=) ANY (ARRAY{sorted(touched)}))"""
    question = do_block(f"BEGIN {session.note(alive)} END")
    await session.reopen()
    touched.intersection_update(await session.ask(question, list[int]))
    async with AsyncExitStack() as holding:
        while touched:
            other = await holding.enter_async_context(source.second_session(window))
            holding.push_async_callback(other.recover)  # a pooler throws away what is left in a transaction
            pid = do_block(f"BEGIN {other.note_pid()} END")
            await other.run(f"BEGIN; {pid}", on_note=Course(other, job))
            if other.backend_pid in touched:
                await other.run(f"{resets}COMMIT")
                touched.discard(other.backend_pid)
