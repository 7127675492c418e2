"""The messages that apply migrations in transactions: several of them in one, or a large one in several. Pure.

What stands around each script is short, and cheap to run: the first transaction of a message prepares what is long.
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
    NO_STATEMENT_TIMEOUT,
    NO_TRANSACTION_TIMEOUT,
    NOTICE_A_DEAD_CLIENT,
    RESET_OBJECTS,
    RUN_DEFERRED,
    deallocate_sql,
    forget_settings_sql,
    reset_settings_sql,
    save_settings_sql,
    set_role_sql,
    with_settings_sql,
)
from .tracker import note_transaction_sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
    """What stands around each script of one message.

    The first transaction prepares what the others only run: to plan a statement costs many times what it costs to run.
    Where something is not as it was before a script, a prepared one finds no row, which ends the message: the next one
    begins there. After a script, the whole check is run in its place; a further prepared statement holds its text, as
    it does any text that is long and the same each time.
    """

    def __init__(self, session: Session, batch: Batch, numbers: range, *, several: bool) -> None:
        """Prepare the envelope; `several` messages take the only transaction."""
        self._session = session
        self._batch = batch
        self._numbers = numbers
        self._several = several
        self._ours = f"ampd_{session.nonce}"  # what the names of our prepared statements begin with
        self._texts: dict[str, Callable[[], str]] = {"leave_whole": self._leave_whole}
        if session.shared:
            self._texts |= {"save": lambda: do_block(f"BEGIN {self._save()} END"), "reset": self._reset}

    def enter_sql(self, number: int) -> str:
        """Return the statements before a script."""
        execution, first = self._batch[number], number == self._numbers.start
        migration, starting = execution.migration, execution.running.starting
        begin, at_first = (self._session.note_text_sql(text) for text in (f"begin {number}", "0"))
        save, prepare = "", ""
        if first:
            begin, prepare = f"{self._session.note_pid_sql()} {begin}", self._prepare(number)
        if self._session.shared:
            saving = self._save() if first or not self._prepares else self._stored("save")
            save, begin = f"{_block(f'{begin}{saving}')}; ", ""
        values = (
            str(migration.version),
            literal(migration.name),
            f"'{migration.checksum.hex()}'",
            literal(self._batch.newest_before(number)[0]),
        )
        goes_on = f"{stay_in_transaction_sql()} {note_transaction_sql(self._session)}" if self._several else ""
        application = literal(f"{APPLICATION_NAME} {migration.version} {starting.number}/{starting.total}")
        # The limit on a statement is the one that held when it began, and the script's is not meant for ours.
        limit = milliseconds(execution.statement_timeout_secs)
        return (
            f"BEGIN ISOLATION LEVEL READ COMMITTED; {save}{NO_STATEMENT_TIMEOUT}"
            f"SET LOCAL lock_timeout = {milliseconds(execution.lock_timeout_secs)}; "
            f"SET LOCAL application_name = {application}; "
            + _block(
                f"{begin}{prepare}{self._enter(*values)}{execution.search_path_sql(local=True)}{goes_on} {at_first}"
            )
            + (f"; SET LOCAL statement_timeout = {limit};\n" if limit else ";\n")
        )

    def leave_sql(self, number: int) -> str:
        """Return the statements after a script."""
        execution, before = self._batch[number], self._batch.newest_before(number)[1]
        count = str(len(execution.statements))
        values = str(execution.migration.version), count, "NULL" if before is None else str(before)
        marker = f"{self._session.marker_sql(count)}; " if execution.statements else ""
        reset = self._reset()
        if self._session.shared and self._prepares:
            reset = f"{NO_STATEMENT_TIMEOUT}{_block(self._stored('reset'))}; "
        forget = ""
        if number == self._numbers[-1]:
            names = ("begin", "same", "enter", "leave", *self._texts) if self._prepares else ()
            forget = "".join(f" DEALLOCATE {self._ours}_{name};" for name in names)
            forget += forget_settings_sql(self._session.found) if self._session.shared else ""
        return (
            f"{marker}{RUN_DEFERRED}{reset}{RESET_OBJECTS}"
            f"SET LOCAL lock_timeout = {milliseconds(execution.lock_timeout_secs)}; "
            f"{set_role_sql(self._batch.history().role, local=True)}"
            f"{_block(f'{self._leave(*values)}{forget}')}; COMMIT;\n"
        )

    @property
    def _prepares(self) -> bool:
        return not self._batch.unprepared

    def _prepare(self, number: int) -> str:
        """Return PL/pgSQL that takes the lock, makes the history if there is none, and prepares what is to be run."""
        history = self._batch.history()
        if self._batch.unprepared and history.table_exists:
            return ""
        prepare = ""
        if self._prepares:
            prepare = writing.prepare_sql(history, self._ours, "settings") + "".join(
                f"\n    PREPARE {self._ours}_{name} AS SELECT {self._quoted('text', text())};"
                for name, text in self._texts.items()
            )
        newest = literal(self._batch.newest_before(number)[0])
        check = f"""
  {advisory_lock.try_lock_sql(history.lock_key)} {set_role_sql(history.role, local=True)}
  {writing.enter_sql(history, prepare, newest=newest, before=self._batch.before_history)}"""
        return with_settings_sql(check) if self._prepares else check

    def _enter(self, *values: str) -> str:
        """Return PL/pgSQL that takes the lock and records a migration as started: version, name, checksum, newest."""
        history = self._batch.history(created=True)
        role = set_role_sql(history.role, local=True)
        if self._batch.unprepared:
            insert = writing.insert_values_sql(history, *values[:3])
            return (
                f"{NOTICE_A_DEAD_CLIENT}{NO_TRANSACTION_TIMEOUT}{advisory_lock.try_lock_sql(history.lock_key)} {role}"
                f"{writing.enter_sql(history, insert, newest=values[3])}"
            )
        return f"""
  {role}{writing.lock_sql(history)}
  EXECUTE 'EXECUTE {self._ours}_begin' INTO STRICT done;
  EXECUTE {self._call("enter", values)} INTO STRICT done;"""

    def _leave(self, *values: str) -> str:
        """Return PL/pgSQL that records it as finished: version, number of statements, newest version before it."""
        if self._batch.unprepared:
            return self._leave_body(*values)
        return f"""{writing.lock_sql(self._batch.history(created=True))}
  EXECUTE 'EXECUTE {self._ours}_same' INTO done;
  IF done IS NOT NULL THEN
    EXECUTE {self._call("leave", values)} INTO done;
  END IF;
  IF done IS NULL THEN
    {self._stored("leave_whole", *values)}
  END IF;"""

    def _call(self, name: str, values: Sequence[str]) -> str:
        return literal(f"EXECUTE {self._ours}_{name}({', '.join(values)})")

    def _stored(self, name: str, *values: str) -> str:
        """Return PL/pgSQL that runs a text that is prepared, with values for its arguments."""
        text = f"pg_catalog.format(done, {', '.join(map(literal, values))})" if values else "done"
        return f"EXECUTE 'EXECUTE {self._ours}_{name}' INTO done; EXECUTE {text};"

    def _leave_body(self, version: str, count: str, before: str) -> str:
        history = self._batch.history(created=True)
        forget = f"PERFORM pg_catalog.pg_advisory_unlock_all(); {deallocate_sql(self._ours)};"
        return f"{forget}{writing.leave_sql(history, version, count, before)}"

    def _leave_whole(self) -> str:
        """Return a DO statement as a format string, of three arguments."""
        block = f"DO {self._quoted('block', f'BEGIN {self._leave_body(*map(_argument, range(1, 4)))} END')}"
        return block.replace("%", "%%").replace(chr(0), "%")

    def _save(self) -> str:
        return save_settings_sql(self._session.found, local=True)

    def _reset(self) -> str:
        return reset_settings_sql(self._session.found, saved=True, keep=True)

    def _quoted(self, name: str, body: str) -> str:
        """Return a text in a dollar quote that nothing of ours or of a migration contains."""
        quote = f"${name}_{self._session.nonce}$"
        return f"{quote}{body}{quote}"


def _block(body: str) -> str:
    return do_block(f"DECLARE\n  done pg_catalog.text;\nBEGIN {body} END")


def _argument(number: int) -> str:
    """Return the place of an argument in a template: NUL, which no name contains, stands for %."""
    return f"\0{number}$s"
