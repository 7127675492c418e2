"""The messages that apply migrations in transactions: several of them in one, or a large one in several. Pure.

What each transaction of a message runs before and after its script is in the message once, in the first of them; the
others take it from there, which `current_query()` makes possible: it returns the whole message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ampd import advisory_lock
from ampd.history import writing
from ampd.postgres.connection import APPLICATION_NAME
from ampd.postgres.quoting import do_block, literal
from ampd.sql import splitter
from ampd.sqlstates import ESCAPED

from . import session_state
from .message import Message
from .prepared import milliseconds
from .session_state import (
    NO_TRANSACTION_TIMEOUT,
    NOTICE_A_DEAD_CLIENT,
    RESET_OBJECTS,
    RUN_DEFERRED,
    deallocate_sql,
    forget_settings_sql,
    prepare_settings_sql,
    reset_settings_sql,
    save_settings_sql,
    set_role_sql,
)
from .tracker import note_transaction_sql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ampd.postgres.connection import Session
    from ampd.sql.slices import Slices

    from .batch import Batch


LARGE = 1_000_000  # characters of SQL; what is longer goes in several messages, which bounds memory on either side
_PART = 256 * 1024  # characters of SQL in each of those, and what is left of the last statement


def parts(statements: splitter.Statements) -> Iterator[range]:
    """Yield the numbers of the statements that go into each message of a transaction: mostly all of them into one."""
    count = len(statements)
    first, begin, end = 0, statements.start(0) if count else 0, statements.end(-1) if count else 0
    for border in range(begin + _PART, end, _PART) if end - begin > LARGE else ():
        past = statements.before(border)
        if first < past < count:
            yield range(first, past)
            first = past
    yield range(first, count)


def stay_in_transaction_sql() -> str:
    """Return a PL/pgSQL statement that limits how long the client may be silent between two messages."""
    lease = f"{session_state.LEASE_SECS}s"
    return f"PERFORM pg_catalog.set_config('idle_in_transaction_session_timeout', '{lease}', true);"


RESET_CLIENT_ENCODING = "SET LOCAL client_encoding = 'UTF8'; "  # whatever the script has set


def check_transaction_sql(transaction: str) -> str:
    """Return a statement that begins a further message: it fails if the script has ended the transaction."""
    # IS DISTINCT FROM would take the operator of the search path that the script has left.
    current = "COALESCE(pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text, '')"
    return do_block(f"""BEGIN
  IF {current} OPERATOR(pg_catalog.<>) '{transaction}' THEN
    RAISE EXCEPTION 'the migration ended its own transaction' USING ERRCODE = '{ESCAPED}';
  END IF;
END""")


def composing(
    session: Session, batch: Batch, numbers: range, part: range | None = None, transaction: str = ""
) -> Slices[Message]:
    """Return, in slices, the message that applies migrations of a batch, each in a transaction.

    `part` is of the statements of the only one: its first opens the transaction, its last commits; in between,
    `transaction` is the one that it must still be.
    """
    first = batch[numbers.start]
    message = Message(f"{advisory_lock.label_sql(first.history.lock_key, first.migration.label)} ")
    envelope = _Envelope(session, batch, numbers, several=part is not None)
    for number in numbers:
        execution = batch[number]
        count = len(execution.statements)
        chosen = range(count) if part is None else part
        if chosen.start == 0:
            message.add(envelope.enter_sql(number))
        else:
            message.add(f"{check_transaction_sql(transaction)};\n{session.marker_sql(str(chosen.start))}; ")
        for index in chosen:
            statement = execution.statements[index]
            if index > chosen.start:  # the first one has its marker in what was before it
                message.add(f"{session.marker_sql(str(index))}; ")
            message.add_statement(statement)
            message.add(execution.again_after_sql(statement, local=True))
            yield
        message.add(envelope.leave_sql(number) if chosen.stop == count else RESET_CLIENT_ENCODING)
        yield
    message.join()
    yield
    return message


class _Envelope:
    """What stands around each script of one message: templates that the message contains once, for all transactions.

    The first transaction prepares what the others only run: to plan a statement costs many times what it costs to run.
    Where a prepared one finds that something is not as it was, it does nothing, and the whole check is run in its
    place.
    """

    def __init__(self, session: Session, batch: Batch, numbers: range, *, several: bool) -> None:
        """Prepare the envelope; `several` messages take the only transaction."""
        self._session = session
        self._batch = batch
        self._numbers = numbers
        self._several = several
        self._ours = f"ampd_{session.nonce}"  # what the names of our prepared statements begin with
        self._templates = {"save": self._save, "enter": self._enter, "leave": self._leave}
        self._written = set[str]()

    def enter_sql(self, number: int) -> str:
        """Return the statements before a script."""
        execution, first = self._batch[number], number == self._numbers.start
        migration, starting = execution.migration, execution.running.starting
        enter = self._run(
            "enter",
            str(migration.version),
            literal(migration.name),
            f"'{migration.checksum.hex()}'",
            literal(self._batch.newest_before(number)[0]),
            str(milliseconds(execution.lock_timeout_secs)),
            str(milliseconds(execution.statement_timeout_secs)),
            literal(f"{APPLICATION_NAME} {migration.version} {starting.number}/{starting.total}"),
        )
        begin, at_first = (self._session.note_text_sql(text) for text in (f"begin {number}", "0"))
        prepare, save = "", ""
        if first:
            begin, prepare = f"{self._session.note_pid_sql()} {begin}", self._prepare(number)
        if self._session.shared:
            save, begin = do_block(f"BEGIN {begin} {self._run('save')} END") + "; ", ""
        # The limit on a statement is the one that held when it began, and the script's is not meant for ours.
        return (
            f"BEGIN ISOLATION LEVEL READ COMMITTED; {save}SET LOCAL statement_timeout = 0; "
            f"{do_block(f'BEGIN {begin}{prepare} {enter} {at_first} END')};\n"
        )

    def leave_sql(self, number: int) -> str:
        """Return the statements after a script."""
        execution, before = self._batch[number], self._batch.newest_before(number)[1]
        count = str(len(execution.statements))
        leave = self._run(
            "leave",
            str(execution.migration.version),
            count,
            "'NULL'" if before is None else str(before),
            str(milliseconds(execution.lock_timeout_secs)),
        )
        if number == self._numbers[-1] and not self._batch.unprepared:
            leave += "".join(f" DEALLOCATE {self._ours}_{name};" for name in ("settings", "same", "enter", "leave"))
        if number == self._numbers[-1] and self._session.shared:
            leave += forget_settings_sql(self._session.found)
        at_end = self._session.note_text_sql(count) if execution.statements else ""
        return f"{do_block(f'BEGIN {at_end} {leave} END')}; COMMIT;\n"

    def _run(self, name: str, *arguments: str) -> str:
        """Return a PL/pgSQL statement that runs a template."""
        quote = f"${name}_{self._session.nonce}$"
        if name in self._written:
            template = f"pg_catalog.split_part(pg_catalog.current_query(), '{quote}', 2)"
        else:
            self._written.add(name)
            template = f"{quote}{self._templates[name]().replace('%', '%%').replace(chr(0), '%')}{quote}"
        return f"EXECUTE pg_catalog.format({', '.join((template, *arguments))});"

    def _quoted(self, name: str, body: str) -> str:
        """Return a text in a dollar quote that no argument of a template can contain."""
        quote = f"${name}_{self._session.nonce}$"
        return f"{quote}{body}{quote}"

    def _prepare(self, number: int) -> str:
        """Return PL/pgSQL that takes the lock, makes the history if there is none, and prepares what is to be run."""
        history, timeout = self._batch.history(), milliseconds(self._batch[number].lock_timeout_secs)
        if self._batch.unprepared and history.table_exists:
            return ""
        settings, prepare = prepare_settings_sql(f"{self._ours}_settings"), writing.prepare_sql(history, self._ours)
        if self._batch.unprepared:
            settings = prepare = ""
        newest = literal(self._batch.newest_before(number)[0])
        return f"""
  SET LOCAL lock_timeout = {timeout};{settings}
  {advisory_lock.try_lock_sql(history.lock_key)} {set_role_sql(history.role, local=True)}
  {writing.enter_sql(history, prepare, newest=newest, before=self._batch.before_history)}"""

    def _checked(self, name: str, arguments: str, unless: str) -> str:
        """Return PL/pgSQL that runs a prepared statement, and other PL/pgSQL if that does nothing."""
        if self._batch.unprepared:
            return unless
        same, call = f"EXECUTE {self._ours}_same", self._quoted("call", f"EXECUTE {self._ours}_{name}({arguments})")
        otherwise = self._quoted("otherwise", f"DO {self._quoted('whole', f'BEGIN {unless} END')}")
        return f"""
  EXECUTE '{same}' INTO done;
  IF done IS NOT NULL THEN
    EXECUTE {call} INTO done;
  END IF;
  IF done IS NULL THEN
    EXECUTE {otherwise};
  END IF;"""

    def _save(self) -> str:
        return do_block(f"BEGIN {save_settings_sql(self._session.found, local=True)} END")

    def _enter(self) -> str:
        history = self._batch.history(created=True)
        version, name, checksum, newest = _argument(1), _argument(2, "L"), _argument(3, "L"), _argument(4, "L")
        insert = writing.insert_values_sql(history, version, name, checksum)
        whole = writing.enter_sql(history, insert, newest=newest)
        enter = self._checked("enter", f"{version}, {name}, {checksum}, {newest}", whole)
        path = self._batch[self._numbers.start].search_path_sql(local=True)
        goes_on = f"{stay_in_transaction_sql()} {note_transaction_sql(self._session)}" if self._several else ""
        settings = f"EXECUTE {self._ours}_settings; "
        if self._batch.unprepared:
            settings = f"{do_block(f'BEGIN {NOTICE_A_DEAD_CLIENT}{NO_TRANSACTION_TIMEOUT} END')}; "
        block = f"""DECLARE
  done pg_catalog.text;
BEGIN{advisory_lock.try_lock_sql(history.lock_key)}{writing.lock_sql(history)}{enter}{path}{goes_on}
END"""
        return (
            f"SET LOCAL lock_timeout = {_argument(5)}; SET LOCAL application_name = {_argument(7, 'L')}; {settings}"
            f"{set_role_sql(history.role, local=True)}DO {self._quoted('block', block)}; "
            f"SET LOCAL statement_timeout = {_argument(6)}"
        )

    def _leave(self) -> str:
        history = self._batch.history(created=True)
        version, count, before = _argument(1), _argument(2), _argument(3)
        forget = f"PERFORM pg_catalog.pg_advisory_unlock_all(); {deallocate_sql(self._ours)};"
        whole = f"{forget}{writing.leave_sql(history, version, count, before)}"
        block = f"""DECLARE
  done pg_catalog.text;
BEGIN{writing.lock_sql(history)}{self._checked("leave", f"{version}, {count}, {before}", whole)}
END"""
        return (
            f"{RUN_DEFERRED}{reset_settings_sql(self._session.found, saved=True, keep=True)}{RESET_OBJECTS}"
            f"SET LOCAL lock_timeout = {_argument(4)}; {set_role_sql(history.role, local=True)}"
            f"DO {self._quoted('block', block)}"
        )


def _argument(number: int, kind: str = "s") -> str:
    """Return the place of an argument in a template: NUL, which no name contains, stands for %."""
    return f"\0{number}${kind}"
