"""Where the server is in a message, by the notes that it sends while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ampd.postgres.connection import Session

    from .batch import Batch
    from .prepared import Execution


_LOCK_ACQUIRED = "lock"
_LONGEST_NOTE = 40  # characters: no number of ours has more digits


def note_lock_sql(session: Session) -> str:
    """Return a PL/pgSQL statement that tells `StatementTracker` that the lock is ours and the migration begun."""
    return session.note_text_sql(_LOCK_ACQUIRED)


def note_transaction_sql(session: Session) -> str:
    """Return a PL/pgSQL statement that tells `StatementTracker` which transaction it is."""
    return session.note_sql("pg_catalog.concat('transaction ', pg_catalog.pg_current_xact_id())")


class StatementTracker:
    """Which statement of a message the server is at."""

    def __init__(self, session: Session, execution: Execution, running: int = -1) -> None:
        self._session = session
        self._execution = execution
        self.running: int = running  # the statement's index; -1 in our own preamble, and one past the last at the end
        self.transaction: str | None = None  # which one it is, where that was asked for

    def __call__(self, note: str) -> None:
        """Take one note; what is none of ours, from somebody who knows the nonce, is ignored."""
        if len(note) <= _LONGEST_NOTE:
            self._take(*note.split(" "))

    def _take(self, word: str, number: str = "", *rest: str) -> None:
        if rest:
            return
        if word == _LOCK_ACQUIRED:
            self._execution.running.start()
        elif word.isdecimal():
            self.running = int(word)
            self._execution.running.start()
            statements = self._execution.statements
            if self.running < len(statements):
                self._execution.running.statement(self.running, statements.line(self.running))
        elif word == "pid" and number.isdecimal():
            self._session.backend_pid = int(number)
        elif word == "transaction" and number.isdecimal():
            self.transaction = self.transaction or number  # the first is from before the script


class BatchTracker(StatementTracker):
    """The same for a message of several transactions, each of a migration."""

    def __init__(self, session: Session, batch: Batch) -> None:
        super().__init__(session, batch.current())
        self._batch = batch
        self.begun: bool = False  # whether the server has run any of the message

    def _take(self, word: str, number: str = "", *rest: str) -> None:
        if word == "begin" and number.isdecimal():
            self._batch.reach(int(number))  # those before it are committed
            self._execution = self._batch.current()
            self.running = -1
            self.begun = True
            self._execution.running.begin()
        else:
            super()._take(word, number, *rest)
            self._batch.at_end = self.running >= len(self._execution.statements)
