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


def limit_silence_sql() -> str:
    """Return a statement, of SQL or PL/pgSQL: the server ends the transaction if its next message does not come."""
    return f"SET LOCAL idle_in_transaction_session_timeout = '{session_state.LEASE_SECS}s';"


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
    kind = _Envelope if batch.whole_checks else _PreparedEnvelope
    envelope = kind(session, batch, numbers, several=part is not None)
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


def ending_sql(session: Session, batch: Batch) -> str:
    """Return the message that ends the current migration with the whole check, after its prepared one has failed."""
    return _Envelope(session, batch, range(batch.done, batch.done + 1), several=False).leave_from_savepoint_sql()


class _Envelope:
    """What stands around each script of one message, with the whole check of the history in each transaction."""

    def __init__(self, session: Session, batch: Batch, numbers: range, *, several: bool) -> None:
        """Keep what it is made from; `several` messages take the only transaction."""
        self._session = session
        self._batch = batch
        self._first, self._last = numbers[0], numbers[-1]
        self._several = several
        self._prefix = session.prefix

    def enter_sql(self, number: int) -> str:
        """Return the statements before a script."""
        execution = self._batch[number]
        migration, starting = execution.migration, execution.running.starting
        application = literal(f"{APPLICATION_NAME} {migration.version} {starting.number}/{starting.total}")
        pid = f"{self._session.note_pid_sql()} " if number == self._first else ""
        begin = f"{pid}{self._session.note_text_sql(f'begin {number}')}"
        if self._session.shared:
            begin += self._save() if number == self._first else self._save_again()
        values = (
            str(migration.version),
            literal(migration.name),
            f"'{migration.checksum.hex()}'",
            literal(self._batch.newest_before(number)[0]),
        )
        # The limit on a statement is the one that held when it began, and the script's is not meant for ours.
        limit = milliseconds(execution.statement_timeout_secs)
        return (
            f"BEGIN ISOLATION LEVEL READ COMMITTED; {_block(begin)}; {NO_STATEMENT_TIMEOUT}"
            f"SET LOCAL lock_timeout = {milliseconds(execution.lock_timeout_secs)}; "
            f"SET LOCAL application_name = {application}; {self._enter(number, *values)}"
            + (f"SET LOCAL statement_timeout = {limit};\n" if limit else "\n")
        )

    def leave_sql(self, number: int) -> str:
        """Return the statements after a script."""
        count = len(self._batch[number].statements)
        marker = f"{self._session.marker_sql(str(count))}; " if count else ""
        role = set_role_sql(self._batch.created.role, local=True)
        return f"{marker}{RUN_DEFERRED}{self._reset()}{RESET_OBJECTS}{role}{self._leave(number)} COMMIT;\n"

    def leave_from_savepoint_sql(self) -> str:
        """Return the statements after the script of the only migration, where those of `_PreparedEnvelope` failed."""
        return f"ROLLBACK TO SAVEPOINT {self._prefix}; {self._leave_and_drop(self._first, '')} COMMIT;"

    def _save(self) -> str:
        """Return PL/pgSQL that saves what others have set in the session."""
        return save_settings_sql(self._session.saved_as, local=True)

    def _save_again(self) -> str:
        """Return the same for a later transaction of the message."""
        return self._save()

    def _enter(self, number: int, *values: str) -> str:
        """Return the statements that record a migration as started: version, name, checksum, newest."""
        history = self._batch.history(number)
        insert = writing.insert_values_sql(history, *values[:3])
        enter = (
            f"{NOTICE_A_DEAD_CLIENT}{NO_TRANSACTION_TIMEOUT}{advisory_lock.try_lock_sql(history.lock_key)} "
            f"{set_role_sql(history.role, local=True)}"
            f"{writing.enter_sql(history, insert, newest=values[3], before_creation=self._batch.before_creation)}"
        )
        return f"{_block(f'{enter}{self._before_script(number)}')}; "

    def _before_script(self, number: int) -> str:
        """Return PL/pgSQL for what is set last, and that tells that it is done: what fails from now on is the script.

        That is the search path, and that the client may be silent for a while.
        """
        path = self._batch[number].search_path_sql(local=True)
        goes_on = f"{limit_silence_sql()} {note_transaction_sql(self._session)}" if self._several else ""
        return f"{path}{goes_on} {self._session.note_text_sql('0')}"

    def _reset(self) -> str:
        """Return the statements that take back role and settings."""
        return reset_settings_sql(self._session.saved_as, required=True, keep=True)

    def _leave(self, number: int) -> str:
        """Return the statements that record a migration as finished."""
        return self._leave_and_drop(number, self._prefix)

    def _leave_and_drop(self, number: int, prefix: str) -> str:
        """Return the same; what is prepared in the session is dropped, but for names that begin with `prefix`."""
        forget = f"PERFORM pg_catalog.pg_advisory_unlock_all(); {deallocate_sql(prefix)};"
        last = number == self._last and self._session.shared
        after = forget_settings_sql(self._session.saved_as) if last else ""
        limit = milliseconds(self._batch[number].lock_timeout_secs)
        leave = writing.leave_sql(self._batch.created, *self._finished(number))
        return f"SET LOCAL lock_timeout = {limit}; {_block(f'{forget}{leave}{after}')};"

    def _finished(self, number: int) -> tuple[int, int, int | None]:
        """Return the version, the number of statements, and the newest version before it."""
        execution = self._batch[number]
        return execution.migration.version, len(execution.statements), self._batch.newest_before(number)[1]


class _PreparedEnvelope(_Envelope):
    """The same, short and cheap to run: the first transaction makes the whole check, and prepares what each runs.

    Where something is not as it was, a prepared statement fails, which ends the message. Before a script, the next
    message begins there; after one, the next message goes back to the savepoint and ends the migration with the whole
    check.
    """

    def __init__(self, session: Session, batch: Batch, numbers: range, *, several: bool) -> None:
        super().__init__(session, batch, numbers, several=several)
        # The long ones that are DO blocks, which cannot be prepared: what is prepared is a query for their text.
        self._texts = {"save": _block(self._save()), "reset": super()._reset()} if session.shared else {}

    def _save_again(self) -> str:
        return self._stored("save")

    def _enter(self, number: int, *values: str) -> str:
        history = self._batch.created
        prepare = f"{_block(self._prepare(number, newest=values[3]))}; " if number == self._first else ""
        return (
            f"{prepare}{set_role_sql(history.role, local=True)}{writing.lock_sql(history)} "
            f"EXECUTE {self._prefix}_begin; EXECUTE {self._prefix}_enter({', '.join(values)}); "
            f"{_block(self._before_script(number))}; "
        )

    def _prepare(self, number: int, *, newest: str) -> str:
        """Return PL/pgSQL that takes the lock, makes the whole check, and prepares what is to be run."""
        history = self._batch.history(number)
        quote = f"$text_{self._session.nonce}$"  # nothing of ours contains it
        prepare = writing.prepare_sql(history, self._prefix, "settings") + "".join(
            f"\n    PREPARE {self._prefix}_{name} AS SELECT {quote}{text}{quote};" for name, text in self._texts.items()
        )
        return with_settings_sql(f"""
  {advisory_lock.try_lock_sql(history.lock_key)} {set_role_sql(history.role, local=True)}
  {writing.enter_sql(history, prepare, newest=newest, before_creation=self._batch.before_creation)}""")

    def _reset(self) -> str:
        if not self._session.shared:
            return super()._reset()
        return f"{NO_STATEMENT_TIMEOUT}{_block(self._stored('reset'))}; "

    def _leave(self, number: int) -> str:
        version, count, newest = self._finished(number)
        before, forget = "NULL" if newest is None else newest, ""
        if number == self._last:
            names = ("begin", "enter", "end", "leave", *self._texts)
            forget = "".join(f" DEALLOCATE {self._prefix}_{name};" for name in names)
            forget += f" {_block(forget_settings_sql(self._session.saved_as))};" if self._session.shared else ""
        return (
            f"{limit_silence_sql()} SAVEPOINT {self._prefix}; EXECUTE {self._prefix}_end({version}, {before}); "
            f"RELEASE SAVEPOINT {self._prefix}; EXECUTE {self._prefix}_leave({version}, {count});{forget}"
        )

    def _stored(self, name: str) -> str:
        """Return PL/pgSQL that runs a text that is prepared."""
        execute = f"EXECUTE 'EXECUTE {self._prefix}_{name}' INTO text; EXECUTE text;"
        return f" DECLARE text pg_catalog.text; BEGIN {execute} END;"


def _block(body: str) -> str:
    return do_block(f"BEGIN {body} END")
