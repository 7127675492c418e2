"""A plan as a script for psql that does what a run would do, the rows of the history included. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ampd import advisory_lock
from ampd.display import one_line
from ampd.errors import AdvisoryLockTimeout, MigrationInterrupted
from ampd.history import writing
from ampd.history.writing import Checkpoint
from ampd.postgres.quoting import do_block
from ampd.resumption import DoneChecksums
from ampd.sql.kinds import Kind
from ampd.sql.psql import for_psql, is_plain, join
from ampd.sql.units import units
from ampd.version import VERSION

from .prepared import milliseconds
from .session_state import RESET_OBJECTS, RUN_DEFERRED, deallocate_sql, own_role_sql, reset_settings_sql, set_role_sql
from .unit_message import limits_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ampd.report import Status

    from .prepared import Execution


_HEADER = """\
-- `psql -X -v ON_ERROR_STOP=1 -f FILE` does what `ampd migrate` would do, as {role} in schema {schema}; ampd {version}.
-- Connect as that role, and not through a pooler. It stops where the history is no longer as it was when this was
-- printed, or where a runner is at work: then print it again.
\\set ON_ERROR_STOP on
\\set ON_ERROR_ROLLBACK off
\\set AUTOCOMMIT on
\\set SINGLELINE off
"""
# By these psql finds where strings and comments end, and RESET ALL takes them back.
_READING = "\\encoding UTF8\nSET standard_conforming_strings = on;\n"
_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED; "
_UNLOCK = f"{do_block('BEGIN PERFORM pg_catalog.pg_advisory_unlock_all(); END')};\n"


def check_scriptable(status: Status, executions: Iterable[Execution]) -> None:
    """Refuse a migration that is being run or was interrupted: how far it has come, no script can find out.

    Raises:
        AdvisoryLockTimeout: names the one that is running.
        MigrationInterrupted: names the first one that was interrupted.
    """
    for info in status.plan.running:
        raise AdvisoryLockTimeout(
            f"{info.label} is being run, and what is pending after it cannot be told yet",
            hint="wait for it and run again",
        )
    for each in executions:
        if each.info.applied is not None:
            error = MigrationInterrupted(
                f"{each.migration.label} was interrupted, and no script can tell how far it came",
                hint="`ampd migrate` goes on with it, and `ampd migrate --dry-run` prints what is pending after that",
            )
            error.version, error.file = each.migration.version, each.migration.file
            raise error


def psql_script(status: Status, executions: Sequence[Execution]) -> Iterator[str]:
    """Yield, in pieces, what `migrate --dry-run` prints: comments alone, where nothing is pending."""
    yield f"-- {one_line(status.database)}: {status.summary()}\n"
    if not executions:
        return
    history = executions[0].history
    role, schema = map(one_line, (history.role or history.user, history.schema or ""))
    yield _HEADER.format(role=role, schema=schema, version=VERSION) + _READING
    for each in executions:
        execution = msgspec.structs.replace(each, history=history)
        outside = execution.directives.no_transaction
        mark = ": statement by statement, not in one transaction" if outside else ""
        yield f"\n-- {execution.migration.label} ({one_line(execution.migration.file)}){mark}\n"
        yield from _statement_by_statement(execution) if outside else _in_transaction(execution)
        history = history.with_rows([execution.as_applied()])


def _in_transaction(execution: Execution) -> Iterator[str]:
    history, migration = execution.history, execution.migration
    enter = writing.enter_sql(history, writing.insert_sql(history, migration))
    finish = writing.leave_sql(history, migration.version, len(execution.statements), history.newest_version)
    limits = f"SET LOCAL lock_timeout = {milliseconds(execution.lock_timeout_secs)}; SET LOCAL statement_timeout = 0; "
    yield _line(_BEGIN, limits, set_role_sql(history.role, local=True))
    yield _block(advisory_lock.try_lock_sql(history.lock_key), enter, execution.search_path_sql(local=True))
    yield f"SET LOCAL statement_timeout = {milliseconds(execution.statement_timeout_secs)};\n\n"
    yield from _pieces(execution, range(len(execution.statements)), local=True)
    yield migration.sql if not execution.statements else ""
    yield f"\n\n{_end_sql(execution, finish)}"


def _statement_by_statement(execution: Execution) -> Iterator[str]:
    """Yield a no-transaction migration, with each step recorded as `protocol.py` has it: a run can take over from it.

    The lock is of the session: psql has a single one, and ends with it.
    """
    history, migration, statements = execution.history, execution.migration, execution.statements
    checksums, begun = DoneChecksums(statements), Checkpoint(0, None)
    lock = advisory_lock.try_lock_sql(history.lock_key, for_session=True)
    prepare = _block(lock, execution.search_path_sql(local=False)) + _line(set_role_sql(history.role, local=False))
    own = own_role_sql(history.role, ""), execution.limits_sql()

    def record(done: int, past: int, before: str = "", *, begin: str = _BEGIN, end: str = "COMMIT;\n") -> str:
        nonlocal begun
        was, begun = begun, Checkpoint(done, checksums.of(past))
        rest = _line(*own) + _block(before, writing.advance_sql(history, migration, was, begun)) + end
        return begin + rest if is_plain(rest) else f"{_line(begin)}{_READING}{rest}"

    enter = writing.enter_sql(history, writing.insert_sql(history, migration), writing.add_done_checksum_sql(history))
    yield prepare + record(0, 0, enter)
    for unit in units(statements, 0, []):
        numbers, first, last = range(unit.first, unit.past), _BEGIN, "COMMIT;\n"
        if unit.kind is Kind.COMMIT:
            (first, last), numbers = (
                ("".join(_pieces(execution, end, local=False)) for end in (numbers[:1], numbers[-1:])),
                numbers[1:-1],
            )
        pieces = "".join(_pieces(execution, numbers, local=False))
        limits = [
            f"{name} = {milliseconds(secs)}; "
            for name, secs in limits_of(unit, execution).items()
            if name != "transaction_timeout"  # which not every server has
        ]
        yield "\n" if is_plain(first + pieces) else f"\n{_READING}"
        if unit.is_transactional:
            yield _line(first, *(f"SET LOCAL {limit}" for limit in limits))
            yield _line(pieces) + record(unit.past, unit.past, begin=RUN_DEFERRED, end=_line(last))
            continue
        yield record(unit.first, unit.past)
        yield _line(*(f"SET {limit}" for limit in limits)) + "\n-- not in a transaction:\n"
        yield f"{_line(pieces)}\n{record(unit.past, unit.past)}"
        if unit.statements[0].words[:2] == ("DISCARD", "ALL"):
            yield _READING + prepare
    finish = writing.finish_no_transaction_sql(history, migration, begun, len(statements))
    yield f"\n{_BEGIN}{_end_sql(execution, finish)}"


def _line(*statements: str) -> str:
    return f"{''.join(statements).rstrip()}\n"


def _block(*parts: str) -> str:
    body = "".join(parts)
    return f"{do_block(f'BEGIN{body} END')};\n"


def _end_sql(execution: Execution, finish: str) -> str:
    """Return the statements that take back what a script has done to the session, and commit the finished row."""
    return (
        _line(f"{RUN_DEFERRED}{reset_settings_sql('')}{RESET_OBJECTS}")
        + _READING
        + _line(
            f"SET LOCAL lock_timeout = {milliseconds(execution.lock_timeout_secs)}; ",
            set_role_sql(execution.history.role, local=True),
        )
        + f"{_block(deallocate_sql(), ';', finish)}COMMIT;\n{_UNLOCK}"
    )


def _pieces(execution: Execution, numbers: range, *, local: bool) -> Iterator[str]:
    """Yield statements of the file, with what sets path and role again where one has taken them back.

    They go in one message, as in a run, if psql could read the rest otherwise once the first ones are done.
    """
    script, statements = execution.migration.sql, execution.statements
    past = statements.start(numbers.stop) if numbers.stop < len(statements) else len(script)
    rest = script[statements.end(numbers.start) : past] if numbers else ""
    joined = not is_plain(f"{rest}{execution.history.role}{execution.schema}")
    for number in numbers:
        piece = for_psql(script, statements, number, joined=joined)
        again = execution.again_after_sql(statements[number], local=local)
        yield _line(piece) + _line(join(again) if joined else again) if again else piece
    yield "\n;\n" if joined and numbers else ""
