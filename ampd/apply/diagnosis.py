"""An error of the server as an error of ampd, with file, line, caret and hint. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ampd import sqlstates
from ampd.errors import AmpdError, LockTimeout, MigrationFailed, PermissionDenied
from ampd.migration import directives
from ampd.postgres.failures import plpgsql_error, read_only_error
from ampd.postgres.permissions import grant_hint
from ampd.redaction import masked
from ampd.sql import kinds, scanner, splitter

from .location import location_of

if TYPE_CHECKING:
    from ampd.migration import Migration
    from ampd.postgres.server_error import ServerError


_OUTSIDE = "the server will not run it in a transaction: make `-- no-transaction` the first line of the file"
_ENUM = "commit the new enum value before it is used: put it in a migration of its own, before this one"
_LIMIT = "the file, or a function that it calls, sets {}: raise it"
_ESCAPE = "an escape such as \\xff in E'…' names no character of the database's encoding"
_CHARACTER = "the database's encoding has no such character: do without it, or use a UTF8 database"
_BUILD_IN_PARTS = (
    "an index on a partitioned table is built in parts: CREATE INDEX … ON ONLY the table, then for each partition "
    "CREATE INDEX CONCURRENTLY and ALTER INDEX … ATTACH PARTITION"
)
_DROP_WHOLE = "an index on a partitioned table is dropped with those of its partitions, and only without CONCURRENTLY"
_EXISTS = (
    "it exists already: was it made by hand, or by another tool? If all that the files up to a VERSION make is there, "
    "`ampd baseline VERSION` records them as applied"
)
_HINTS = {
    sqlstates.ACTIVE_SQL_TRANSACTION: _OUTSIDE,
    sqlstates.INVALID_TRANSACTION_TERMINATION: _OUTSIDE,
    sqlstates.UNSAFE_NEW_ENUM_VALUE_USAGE: _ENUM,
    sqlstates.DUPLICATE_TABLE: _EXISTS,
    sqlstates.IDLE_IN_TRANSACTION_SESSION_TIMEOUT: _LIMIT.format("idle_in_transaction_session_timeout"),
    sqlstates.TRANSACTION_TIMEOUT: _LIMIT.format("transaction_timeout"),
    sqlstates.CHARACTER_NOT_IN_REPERTOIRE: _ESCAPE,
    sqlstates.UNTRANSLATABLE_CHARACTER: _CHARACTER,
    sqlstates.FEATURE_NOT_SUPPORTED: "this server does not support it: check its version and extensions",
}
# Refused while still being read: nothing was begun.
UNREAD = (sqlstates.CHARACTER_NOT_IN_REPERTOIRE, sqlstates.UNTRANSLATABLE_CHARACTER)
# What no change of the file would mend: an SQLSTATE, or a class of them.
_NOT_THE_FILE = {
    sqlstates.SERIALIZATION_FAILURE: "another transaction was in its way",
    sqlstates.DISK_FULL: "the server's disk is full: make room",
    sqlstates.INSUFFICIENT_RESOURCES: "the server is out of memory or of another resource",
    sqlstates.OPERATOR_INTERVENTION: "the server was told to stop it",
    sqlstates.SYSTEM_ERROR: "the server's own storage or system has failed: see its log",
    sqlstates.INTERNAL: "the server's own data are damaged, or it has a bug: see its log",
}
_CANCELLED = "a person or a program has cancelled it (pg_cancel_backend)"
_TOO_SLOW = "if it needs longer, raise statement_timeout_secs or begin the file with `-- statement-timeout: 10min`"


def migration_error(
    error: ServerError,
    migration: Migration,
    statement: scanner.Statement | None,
    offset: int | None,
    *,
    aftermath: str,
    statements: splitter.Statements | None = None,
    ended: bool = True,
) -> AmpdError:
    """Return the error for a statement that the server refused: where it stands, what the server said, what to do.

    `offset` is the server's own position in the script. Where it gave none, it is the line inside a DO block that its
    context names, else the beginning of the statement. No statement means the end: the COMMIT and its checks; unless
    the script has not `ended`.
    """
    if offset is None and error.sqlstate == sqlstates.UNTRANSLATABLE_CHARACTER:
        offset = _untranslatable(error.message, migration.sql, statements or splitter.split(migration.sql))
    if offset is None and statement is not None:
        offset = _line_in_block(error.context, migration.sql, statement)
    if offset is None and statement is not None:
        offset = statement.start
    at_end = ended and offset is None and error.sqlstate not in UNREAD
    when = " at the end of the migration" if at_end else error.redact(_in_function(error.context))
    not_the_file = _not_the_file_hint(error)
    known = error.hint or not_the_file or _in_parts_hint(error, statement) or _HINTS.get(error.sqlstate, "")
    hint = known.removesuffix(".")
    if not_the_file and "timeout" not in not_the_file:
        aftermath = aftermath.replace("fix the file and run again", "run again")
    if hint == _OUTSIDE and not _runs_outside(error, migration, statement):
        hint = ""

    def hide(text: str) -> str:
        return masked(error.redact(text))

    found = location_of(migration, offset, hide)
    facts = {"sqlstate": error.sqlstate, "detail": error.detail, **found}
    where = migration.file if offset is None else f"{migration.file}:{found['line']}"
    message = f"{where}: {error.message}{when} (SQLSTATE {error.sqlstate})"
    if lacking := plpgsql_error(error):
        return MigrationFailed(f"{where}: {lacking.message} after it", hint=aftermath, **facts)
    match error.sqlstate:
        case sqlstates.INSUFFICIENT_PRIVILEGE:
            if statement is not None and (
                role := _role_at(statement.start, statements or splitter.split(migration.sql))
            ):
                error.role = role
            grant = grant_hint(error, *((statement.words, statement.text) if statement else ()))
            after_it = aftermath.replace("fix the file and run again", "run again after that")  # the file is all right
            return PermissionDenied(message, hint=f"{grant}; {after_it}", **facts)
        case sqlstates.READ_ONLY_SQL_TRANSACTION:
            return read_only_error(message, **facts)
        case sqlstates.LOCK_NOT_AVAILABLE | sqlstates.DEADLOCK_DETECTED:
            return LockTimeout(message, hint=aftermath, **facts)
    return MigrationFailed(message, hint=f"{hint}; {aftermath}" if hint else aftermath, **facts)


def _not_the_file_hint(error: ServerError) -> str:
    """Return the hint for an error that no change of the file would mend; "" for any other error."""
    if error.sqlstate == sqlstates.QUERY_CANCELED:
        # The server says only in words, and maybe not in English, what has cancelled it.
        known = {"user request": _CANCELLED, "timeout": _TOO_SLOW}
        return next((hint for word, hint in known.items() if word in error.message), f"{_CANCELLED}; or {_TOO_SLOW}")
    return _NOT_THE_FILE.get(error.sqlstate) or _NOT_THE_FILE.get(error.sqlstate[:2], "")


def _role_at(offset: int, statements: splitter.Statements) -> str | None:
    """Return the role that a script has set before an offset."""
    before = statements[: statements.before(offset)]
    return kinds.role(map(before.__getitem__, before.notable()))


def _untranslatable(message: str, script: str, statements: splitter.Statements) -> int | None:
    """Return where the statements have the character that the server names by its bytes: it gives no position."""
    character = bytes.fromhex("".join(re.findall("0x([0-9a-f]{2})", message))).decode(errors="replace")
    offset = script.find(character) if character else -1
    while offset >= 0 and statements.at(offset) is None:
        offset = script.find(character, offset + 1)
    return None if offset < 0 else offset


def _runs_outside(error: ServerError, migration: Migration, statement: scanner.Statement | None) -> bool:
    """Return whether a statement that was refused inside a transaction would be run outside of one."""
    if statement is None or directives(migration.sql).no_transaction:
        return False
    if error.sqlstate == sqlstates.INVALID_TRANSACTION_TERMINATION:
        return statement.words[:1] in (("DO",), ("CALL",))  # a function may end a transaction nowhere
    too_late = kinds.sets_transaction(statement) or "before any query" in error.message
    return not too_late and not error.context  # nor may a function run what cannot be in a transaction


def _in_parts_hint(error: ServerError, statement: scanner.Statement | None) -> str:
    """Return the hint for an index of a partitioned table to be built or dropped concurrently; else ""."""
    if error.sqlstate != sqlstates.FEATURE_NOT_SUPPORTED or statement is None:
        return ""

    def named(name: tuple[str, ...]) -> bool:  # the words around it, and the quotes, are of the server's language
        return re.search(rf"(?<!\w){re.escape(name[-1])}(?!\w)", error.message) is not None

    if (build := kinds.index_build(statement)) and named(build.table):
        return _BUILD_IN_PARTS
    return _DROP_WHOLE if any(map(named, kinds.dropped_indexes(statement))) else ""


def _in_function(context: str) -> str:
    """Return the line of the function that the statement has called and that failed, if its context names one."""
    innermost = re.search(r"function (\S.{0,500}\)) line (\d{1,9})\b", context)
    return f" in function {innermost[1]} line {innermost[2]}" if innermost else ""


def _line_in_block(context: str, script: str, statement: scanner.Statement) -> int | None:
    """Return the offset of the line that PL/pgSQL complains of, if it is one of the statement's own DO block."""
    # The outermost comes last, and the words around it are in the server's language.
    complaints = re.findall(r"inline_code_block[^\d\n]{1,100}(\d{1,9})\b", context)
    block = kinds.code_block(statement)
    if not complaints or block is None:
        return None
    offset, end = block  # line 1 is what follows the opening quote
    for _ in range(int(complaints[-1]) - 1):
        offset = script.find("\n", offset, end) + 1
        if offset == 0:
            return None
    line = script[offset:end]
    return offset + len(line) - len(line.lstrip(" \t"))
