"""What squawk finds in migration files, seen with what ampd knows of how they run. Pure."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING

import msgspec

from .errors import InvalidMigration
from .report import count
from .sql.location import locations
from .sql.scanner import coarse_tokens, name_parts, shape_of
from .sql.splitter import split

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from .migration import Migration
    from .sql.splitter import Statements

_OFF = {
    # ampd sets them for each migration
    *("require-lock-timeout", "require-statement-timeout", "require-timeout-settings"),
    # a transaction leaves nothing half done, and a no-transaction file is resumed
    "prefer-robust-stmts",
    # what concerns types and style neither locks nor breaks a live database
    *("prefer-bigint-over-int", "prefer-bigint-over-smallint", "prefer-identity", "prefer-text-field"),
    *("prefer-timestamp-tz", "ban-char-field", "require-enum-value-ordering", "unused-ignore"),
}
_HARMLESS_IF_NEW = {  # nobody uses the table yet, and it is empty
    *("require-concurrent-index-creation", "constraint-missing-not-valid", "adding-foreign-key-constraint"),
    *("disallowed-unique-constraint", "adding-serial-primary-key-field", "adding-not-nullable-field"),
    *("adding-required-field", "adding-field-with-default", "changing-column-type", "renaming-column"),
    *("renaming-table", "ban-drop-column", "ban-drop-not-null"),
}
_MORE_PRECISE = {  # than constraint-missing-not-valid
    *("adding-foreign-key-constraint", "disallowed-unique-constraint", "adding-serial-primary-key-field")
}

_FIRST_LINE = "make `-- no-transaction` the first line of the file"
_VALIDATE = "add it NOT VALID, and VALIDATE CONSTRAINT in the next file"
_INDEX_FIRST = (
    "CREATE UNIQUE INDEX CONCURRENTLY in a `-- no-transaction` file, and in the next file ADD CONSTRAINT … {}"
)
_BATCHES = "fill it in batches in a `-- no-transaction` file"
_CHECK_FIRST = "ADD CONSTRAINT … CHECK (… IS NOT NULL) NOT VALID, VALIDATE it in the next file, and then SET NOT NULL"
_CONCURRENTLY = {  # what is possible in a no-transaction file only
    "require-concurrent-index-creation": "write CREATE INDEX CONCURRENTLY",
    "require-concurrent-index-deletion": "write DROP INDEX CONCURRENTLY",
    "require-concurrent-reindex": "write REINDEX … CONCURRENTLY",
    "require-concurrent-partition-detach": "write DETACH PARTITION … CONCURRENTLY",
}
_HINTS = {
    "syntax-error": "correct the statement; or, if the server does take it, write `-- lint: allow syntax-error because "
    "REASON` before it",
    "ban-concurrent-index-creation-in-transaction": _FIRST_LINE,
    "transaction-nesting": f"leave BEGIN and COMMIT out, since a file runs in one transaction; or {_FIRST_LINE}",
    "constraint-missing-not-valid": _VALIDATE,
    "adding-foreign-key-constraint": _VALIDATE,
    "disallowed-unique-constraint": _INDEX_FIRST.format("UNIQUE USING INDEX"),
    "adding-serial-primary-key-field": _INDEX_FIRST.format("PRIMARY KEY USING INDEX"),
    "adding-not-nullable-field": _CHECK_FIRST,
    "adding-required-field": f"add it without NOT NULL, {_BATCHES}; then {_CHECK_FIRST}",
    "adding-field-with-default": f"add it without the default, SET DEFAULT, and {_BATCHES}",
    "changing-column-type": f"add a column of the new type, {_BATCHES}, and drop the old one once nothing uses it",
}
_IF_UNUSED = "if no running program depends on it, write `-- lint: allow {} because REASON` before the statement"

_NAME = r"[^ (][^ ]*(?: \. [^ ]+)*"
_CREATED = rf"CREATE (?:UNLOGGED )?TABLE (?!IF NOT EXISTS )(?P<name>{_NAME}) \((?!.* \) AS )"
_CHANGED = (
    rf"ALTER TABLE (?:IF EXISTS )?(?:ONLY )?(?P<table>{_NAME})"
    rf"|CREATE (?:UNIQUE )?INDEX(?>.*? ON )(?:ONLY )?(?P<indexed>{_NAME})(?= USING | \()"
)
_ALLOW = re.compile(r"--\s*lint:\s*allow\b(.*)", re.IGNORECASE | re.DOTALL)
_ALLOWED = re.compile(r"\s+(?P<rule>[\w-]+)\s+because\s+\S.*", re.IGNORECASE | re.DOTALL)


class Finding(msgspec.Struct, frozen=True):
    """An operation that locks or breaks a live database; line and column are counted from 1."""

    file: str
    line: int
    column: int
    rule: str
    message: str
    hint: str


class Remark(msgspec.Struct, frozen=True):
    """One entry of squawk's JSON; line and column, which is in bytes, are counted from 0."""

    line: int
    column: int
    rule_name: str
    message: str
    help: str | None = None


Tables = dict[tuple[str, ...], tuple[int, int]]  # by name, which file and statement creates it


def findings(
    files: Iterable[tuple[Migration, Iterable[Remark]]], *, pending: bool, exceptions: Collection[str] = ()
) -> list[Finding]:
    """Return what remains of squawk's remarks on these files, which are in the order in which they run.

    Args:
        files: each migration with what squawk says of it.
        pending: whether none of them is applied, so that a table which one creates is new in those that follow.
        exceptions: what to pass over, each as RULE:FILE.

    Raises:
        InvalidMigration: a `-- lint: allow` names no rule, or no reason.
    """
    found: list[Finding] = []
    created: Tables = {}
    for number, (migration, remarks) in enumerate(files):
        created = created if pending else {}
        name = PurePath(migration.file).name
        kept = _of_file(migration, remarks, created, number)
        found.extend(each for each in kept if f"{each.rule}:{name}" not in exceptions)
    return found


def _of_file(migration: Migration, remarks: Iterable[Remark], created: Tables, number: int) -> Iterator[Finding]:
    sql = migration.sql
    statements = split(sql)
    for index, (start, end) in enumerate(statements.spans()):
        create = sql[start : start + 6].upper() == "CREATE"
        if create and (made := re.match(_CREATED, shape_of(sql[start:end]), re.DOTALL)):
            created.setdefault(name_parts(made["name"]), (number, index))
    allowed = set(_allowed(migration, statements))
    transactional = migration.is_transactional
    placed = list(_without_doubles(sql, remarks))
    places = locations(sql, (offset for offset, _ in placed))
    for (offset, remark), (line, column) in zip(placed, places, strict=True):
        rule, index = remark.rule_name, _statement_at(statements, offset)
        changed = _changed(statements, index) if rule in _HARMLESS_IF_NEW else set()
        new = bool(changed) and all(created.get(name, (number, index)) < (number, index) for name in changed)
        if not new and allowed.isdisjoint({(rule, None), (rule, index)}):
            hint = _hint(rule, transactional=transactional) or remark.help or _IF_UNUSED.format(rule)
            yield Finding(migration.file, line, column, rule, remark.message, hint)


def _without_doubles(sql: str, remarks: Iterable[Remark]) -> Iterator[tuple[int, Remark]]:
    """Yield what concerns ampd, with its offset, in order; of two remarks on one constraint the more precise one."""
    starts = [0, *(match.end() for match in re.finditer(r"\r\n?|\n", sql)), len(sql)]  # of lines, as squawk counts them

    def offset(remark: Remark) -> int:
        start, end = starts[remark.line : remark.line + 2]
        return start + len(sql[start:end].encode()[: remark.column].decode(errors="ignore"))

    placed = sorted(((offset(each), each) for each in remarks if each.rule_name not in _OFF), key=lambda each: each[0])
    for (at, remark), (following, more) in pairwise([*placed, (len(sql), Remark(0, 0, "", ""))]):
        of_one = more.rule_name in _MORE_PRECISE and not re.search("[;,(]", sql[at:following])
        if remark.rule_name != "constraint-missing-not-valid" or not of_one:
            yield at, remark


def _changed(statements: Statements, index: int) -> set[tuple[str, ...]]:
    """Return the tables that a statement locks, those that it refers to included; none if that is not known."""
    shape = shape_of(statements[index].text) if index < len(statements) else ""
    found = re.match(_CHANGED, shape, re.DOTALL)
    names = [found["table"] or found["indexed"], *re.findall(rf" REFERENCES ({_NAME})", shape)] if found else []
    return set(map(name_parts, names))


def _allowed(migration: Migration, statements: Statements) -> Iterator[tuple[str, int | None]]:
    """Yield each rule that a comment allows, and the number of the statement; None for the whole file."""
    sql = migration.sql
    comments = coarse_tokens(sql) if "lint:" in sql.lower() else ()
    for kind, start, end in comments:
        given = _ALLOW.fullmatch(sql, start, end) if kind == "line" else None
        if given is None:
            continue
        rule = _ALLOWED.fullmatch(given[1])
        if rule is None:
            line = sql.count("\n", 0, start) + 1
            raise InvalidMigration(
                f"{migration.file}:{line}: `-- lint: allow` needs a rule and a reason",
                hint="write `-- lint: allow RULE because REASON`",
                version=migration.version,
                file=migration.file,
                line=line,
            )
        index = _statement_at(statements, start)
        yield rule["rule"].lower(), index if index or statements.at(start) == 0 else None


def _statement_at(statements: Statements, offset: int) -> int:
    """Return the number of the statement that an offset lies in or before."""
    index = statements.at(offset)
    return statements.before(offset) if index is None else index


def _hint(rule: str, *, transactional: bool) -> str | None:
    if rule in _CONCURRENTLY:
        return f"{_CONCURRENTLY[rule]}, and {_FIRST_LINE}" if transactional else _CONCURRENTLY[rule]
    return _HINTS.get(rule)


def text(found: Collection[Finding], files: int) -> str:
    """Return the findings in so many files for people."""
    lines = (
        f"{each.file}:{each.line}:{each.column}: {each.rule}: {each.message}\n  hint: {each.hint}" for each in found
    )
    return "\n".join((*lines, _summary(found, files)))


def github(found: Collection[Finding], files: int) -> str:
    """Return the same as commands to GitHub Actions, which shows them beside the lines of a pull request."""
    lines = (
        f"::warning file={_property(each.file)},line={each.line},col={each.column}::"
        + _data(f"{each.rule}: {each.message}\nhint: {each.hint}")
        for each in found
    )
    return "\n".join((*lines, _summary(found, files)))


def _summary(found: Collection[Finding], files: int) -> str:
    return f"{count(files, 'migration')}, {count(len(found), 'finding') if found else 'nothing found'}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
