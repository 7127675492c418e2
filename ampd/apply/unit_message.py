"""The message that runs a unit of a no-transaction file: its settings, its statements, its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd.postgres.quoting import do_block
from ampd.sql import kinds, scanner
from ampd.sql.kinds import Kind
from ampd.sql.units import Unit

from .message import Message
from .prepared import milliseconds
from .session_state import (
    NO_TRANSACTION_TIMEOUT,
    NOTICE_A_DEAD_CLIENT,
    RUN_DEFERRED,
    own_role_sql,
    reset_settings_sql,
    save_settings_sql,
    set_role_sql,
)
from .tracker import note_transaction_sql
from .transaction_message import RESET_CLIENT_ENCODING, check_transaction_sql, limit_silence_sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ampd.postgres.connection import Session
    from ampd.sql.slices import Slices

    from .prepared import Execution


class Wrapping(msgspec.Struct, frozen=True):
    """What is added to a unit: before it, after its BEGIN, before its last statement, after it."""

    before: str = ""
    start: str = ""
    end: str = ""
    after: str = ""


def _opening(unit: Unit) -> int:
    """Return how many statements a unit has before its first query: BEGIN, and SET TRANSACTION after it."""
    if unit.statements[0].words[:1] not in (("BEGIN",), ("START",)):
        return 0
    queries = (
        number for number in range(1, len(unit.statements)) if not kinds.sets_transaction(unit.statements[number])
    )
    return next(queries, len(unit.statements))


def limits_of(unit: Unit, execution: Execution) -> dict[str, float]:
    """Return the limits that a unit is held to; what the file has set itself is left out."""
    # lock_timeout inside a concurrent build would leave an INVALID index: such waiting is watched instead.
    wait = 0.0 if unit.is_concurrent else execution.lock_timeout_secs
    limits = {"lock_timeout": wait, "statement_timeout": execution.statement_timeout_secs}
    limits["transaction_timeout"] = 0.0  # since PostgreSQL 17, and it ends whatever runs
    set_by_file = set(map(kinds.setting, unit.settings))
    return {name: secs for name, secs in limits.items() if name not in set_by_file}


def wrapping_of(unit: Unit, record: str, session: Session, execution: Execution, *, several: bool) -> Wrapping:
    """Return what is added to a transactional unit: settings and its `record`; `several` messages take it."""
    prelude, limits = session.note_pid_sql() + NOTICE_A_DEAD_CLIENT, limits_of(unit, execution)
    if limits.pop("transaction_timeout", None) is not None:
        prelude += NO_TRANSACTION_TIMEOUT
    limited = "".join(f"SET LOCAL {name} = {milliseconds(secs)}; " for name, secs in limits.items())
    if session.pooled:
        prelude = save_settings_sql(session.saved_as, local=True) + prelude + execution.search_path_sql(local=True)
    if several:
        prelude += f" {limit_silence_sql()} {note_transaction_sql(session)}"
    start = f"{do_block(f'BEGIN {prelude} END')}; {limited}"
    if session.pooled:
        start += set_role_sql(execution.history.role, local=True) + again_sql(unit.settings)
        ours = reset_settings_sql(session.saved_as, required=True)
    else:
        ours = own_role_sql(execution.history.role, session.saved_as)
    end = f"{RUN_DEFERRED}{ours}{execution.limits_sql()}{record}; "
    if unit.kind is Kind.COMMIT:
        return Wrapping(start=start, end=end)
    return Wrapping(before=f"BEGIN ISOLATION LEVEL READ COMMITTED; {start}", after=f"{end}COMMIT")


def composing(
    unit: Unit,
    part: range,
    around: Wrapping,
    session: Session,
    execution: Execution,
    label: str,
    *,
    transaction: str = "",
) -> Slices[Message]:
    """Return, in slices, the message that runs a part of a unit, each statement behind a marker.

    SET TRANSACTION wants to be the first after BEGIN: not even a marker may stand before it. In a further message
    `transaction` is the one that it must still be.
    """
    message, opening = Message(f"{label} "), _opening(unit)
    if part.start == 0:
        message.add(around.before)
    elif part.start > opening:
        message.add(f"{check_transaction_sql(transaction)};\n")
    for number in part:
        statement = unit.statements[number]
        if number == opening:
            message.add(around.start)
        if number == len(unit.statements) - 1:
            message.add(around.end)
        if number >= opening:
            message.add(f"{session.marker_sql(str(unit.first + number))}; ")
        message.add_statement(statement)
        message.add(execution.again_after_sql(statement, local=session.pooled))
        yield
    message.add(around.after if part.stop == len(unit.statements) else RESET_CLIENT_ENCODING)
    message.join()
    yield
    return message


def again_sql(settings: Iterable[scanner.Statement]) -> str:
    """Return the SQL of statements that set the session, to be run again."""
    return "".join(f"{each.text}\n; " for each in settings)


def limits_that_differ_sql(limits: Mapping[str, float], before: str) -> str:
    """Return PL/pgSQL that sets limits for the session where they differ, each after the PL/pgSQL `before`.

    Each that is set has to be taken back, which behind a pooler takes a search.
    """
    return " ".join(
        f"IF (SELECT setting OPERATOR(pg_catalog.<>) '{milliseconds(secs)}' FROM pg_catalog.pg_settings "
        f"WHERE name OPERATOR(pg_catalog.=) '{name}') THEN "
        f"{before}PERFORM pg_catalog.set_config('{name}', '{milliseconds(secs)}', false); END IF;"
        for name, secs in limits.items()
    )
