"""What in a script cannot work, found before anything runs. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from .down_sections import Comment, separators, suspicious
from .kinds import (
    AS_IT_IS,
    ENCODING,
    ENDS,
    READ_ONLY,
    STRINGS_OFF,
    Kind,
    Misplacement,
    Rule,
    index_build,
    rule_of,
    suggested_name,
)
from .location import locations
from .scanner import COMMENTS, Statement, coarse_tokens, shape_of, tokenize
from .slices import Slices, at_once
from .splitter import splitting

if TYPE_CHECKING:
    from .splitter import Statements


class Problem(msgspec.Struct, frozen=True):
    """Something in a script that cannot work, found before anything runs; line and column count from 1."""

    line: int
    column: int
    offset: int
    message: str
    hint: str


class Caution(Problem, frozen=True):
    """A problem that may be none: the script runs, after a warning."""


def problems(script: str, *, transactional: bool, statements: Statements | None = None) -> tuple[Problem, ...]:
    """Return what in a script cannot work, in order of position; `statements` are those of `split`, if known.

    What may be intended is a `Caution`; any other `Problem` is certain.
    """
    return at_once(finding_problems(script, transactional=transactional, statements=statements))


def finding_problems(
    script: str, *, transactional: bool, statements: Statements | None = None
) -> Slices[tuple[Problem, ...]]:
    """Return it in slices; the work of `problems`."""
    if statements is None:
        statements = yield from splitting(script)
    ruled: list[_Ruled] = []
    copy = False
    for number in statements.notable():
        statement = statements[number]
        ruled.append((statement, rule_of(statement)))
        if ruled[-1][1].misplacement is Misplacement.DATA:  # what follows is data, not SQL
            copy, statements, script = True, statements[: number + 1], script[: statement.end]
            break
        yield
    unfinished = () if transactional or copy else _transactions(ruled)
    certain = chain(_misplaced(ruled, transactional), unfinished, _misread(script, ruled), _not_sql(script, statements))
    judged: Iterator[_Judged | None] = (each and (Problem, *each) for each in certain)
    nameless = () if transactional else _nameless(ruled)
    found: list[_Judged] = []
    for finding in chain(judged, _undoing(script, statements), nameless):
        if finding is None:
            yield
        else:
            found.append(finding)
    found.sort(key=lambda each: each[1:])
    places = locations(script, (offset for _, offset, _, _ in found))
    return tuple(
        sort(*place, offset, message, hint) for place, (sort, offset, message, hint) in zip(places, found, strict=True)
    )


# One generator for each sort of problem; where one yields None the search can be interrupted.

_Finding = tuple[int, str, str]  # offset, message, hint
_Judged = tuple[type[Problem], int, str, str]  # with whether it is certain
_Ruled = tuple[Statement, Rule]
_UNRECORDED = ("a READ ONLY transaction, in which the migration cannot be recorded", "remove READ ONLY")
_UNTERMINATED = {"'": "string", '"': "quoted identifier", "$": "dollar-quoted string", "/": "comment"}


def _misplaced(ruled: list[_Ruled], transactional: bool) -> Iterator[_Finding]:
    """Yield statements that cannot stand where they are, by their rules."""
    for statement, rule in ruled:
        if rule.misplacement is Misplacement.DATA:
            message = f"{rule.label} waits for data, and a migration has none to send"
            yield statement.start, message, "use INSERT, or load the data from a program outside the migrations"
        elif rule.misplacement is Misplacement.CHAIN and not transactional:
            message = f"{rule.label} begins a transaction of which ampd cannot record that it is done"
            yield statement.start, message, f"write {statement.words[0]}; BEGIN; in its place"
        elif rule.misplacement in (Misplacement.CONTROL, Misplacement.CHAIN) and transactional:
            message = f"{rule.label} in a migration that runs in one transaction"
            hint = "remove it: ampd wraps the file itself; or add `-- no-transaction` as the first line"
            yield statement.start, message, hint
        elif rule.misplacement is Misplacement.OUTSIDE and transactional:
            message = f"{rule.label} cannot run inside a transaction block"
            yield statement.start, message, "put it in a file of its own whose first line is `-- no-transaction`"
        elif rule.misplacement is Misplacement.MODE and transactional:
            shape = shape_of(statement.text)
            if re.search(READ_ONLY, shape):
                yield statement.start, *_UNRECORDED
            elif not re.match(AS_IT_IS, shape):
                message = f"{rule.label} must come before any query, and ampd's own come before it"
                hint = "make `-- no-transaction` the first line, and write BEGIN with the mode, and COMMIT, in the file"
                yield statement.start, message, hint


def _transactions(ruled: list[_Ruled]) -> Iterator[_Finding]:
    """Yield what is wrong with the transactions that a no-transaction file writes out."""
    begun: Statement | None = None
    read_only: Statement | None = None
    for statement, rule in ruled:
        if rule.kind is Kind.BEGIN:
            begun = begun or statement
        elif rule.misplacement is Misplacement.MODE and not begun:
            yield statement.start, f"{rule.label} outside of a transaction", "put it between BEGIN and COMMIT"
        elif rule.label in ENDS:
            if read_only and rule.kind is Kind.COMMIT:
                yield read_only.start, *_UNRECORDED
            begun = read_only = None
        if begun and (rule.kind is Kind.BEGIN or rule.misplacement is Misplacement.MODE):
            read_only = statement if re.search(READ_ONLY, shape_of(statement.text)) else read_only
    if begun:
        yield begun.start, "this transaction is never committed or rolled back", "add COMMIT where it should end"


def _misread(script: str, ruled: list[_Ruled]) -> Iterator[_Finding]:
    """Yield what makes the server read the rest of a script otherwise than ampd does, where that matters."""
    last_backslash = script.rfind("\\")
    for statement, _ in ruled:
        shape = shape_of(statement.text) if statement.words[:1] == ("SET",) else ""
        if statement.end <= last_backslash and re.match(STRINGS_OFF, shape):
            message = "standard_conforming_strings is switched off before a backslash"
            yield statement.start, message, "remove it, and write strings with a backslash as E'…'"
        if re.match(ENCODING, shape) and not script.isascii():
            message = "another client_encoding in a file with characters beyond ASCII, which ampd sends as UTF-8"
            yield statement.start, message, "remove it; the server converts to the encoding of the database by itself"


def _not_sql(script: str, statements: Statements) -> Iterator[_Finding | None]:
    """Yield what is not SQL: commands of psql, and what is opened and never closed."""
    # Without a backslash, only what is never closed remains to be found, and that reaches to the end.
    last = statements[-1].start if statements else 0
    everywhere = not statements or "\\" in script
    for kind, start, end in coarse_tokens(script, 0 if everywhere else last):
        if kind == "open":
            opened = next((token for token in tokenize(script, last) if token[0] == "open"), (kind, start, end))[1]
            opener = script[opened] if script[opened] not in "eE" else "'"
            yield opened, f"unterminated {_UNTERMINATED[opener]}", "close it; it opens here and nothing ends it"
        elif kind == "psql":
            command = re.split(r"\s", script[start:end], maxsplit=1)[0]
            message = f"{command} is a command of psql, not SQL"
            yield start, message, "remove it; only psql itself understands backslash commands"
        else:
            yield None


_KEEP_UP = "keep only the up part in the file"


def _undoing(script: str, statements: Statements) -> Iterator[_Judged | None]:
    """Yield where a down section begins; what may be one counts if a statement follows."""
    for separator in separators(_comments(script, statements)):
        if separator is None:
            yield None
        elif separator.tool:
            message = f"`{separator.marker}` begins the down section of {separator.tool}, and ampd runs files whole"
            yield Problem, separator.offset, message, _KEEP_UP
        elif statements and separator.offset < statements[-1].start:
            message = f"`{separator.marker}` may begin a section that undoes the migration, and ampd runs files whole"
            yield Caution, separator.offset, message, f"if it does, {_KEEP_UP}"


def _nameless(ruled: list[_Ruled]) -> Iterator[_Judged]:
    """Yield index builds without a name: after an interruption nobody could tell which index is theirs."""
    for statement, rule in ruled:
        if rule.kind is Kind.CREATE_INDEX_CONCURRENTLY and (build := index_build(statement)) and build.name is None:
            name = suggested_name(statement)
            shown = name if re.fullmatch("[a-z_][a-z0-9_$]*", name) else '"' + name.replace('"', '""') + '"'
            message = f"{rule.label} without a name cannot be resumed where it is interrupted: a person has to look"
            yield Caution, statement.start, message, f"give it a name, such as {shown}"


def _comments(script: str, statements: Statements) -> Iterator[Comment | None]:
    """Yield the comments that may be separators."""
    for first, last, between in _pieces(script, statements):
        yield None
        piece, previous = script[first:last], 0
        if not suspicious(piece, between=between):
            continue
        for kind, start, end in tokenize(piece):
            if kind in COMMENTS:
                alone = first + previous == 0 or bool(re.search(r"[\n\r]", piece[previous:start]))
                yield Comment(first + start, piece[start:end], apart=between and alone)
            previous = end


def _pieces(script: str, statements: Statements) -> Iterator[tuple[int, int, bool]]:
    """Yield where each statement, and whatever lies around it (with True), starts and ends."""
    past = 0
    for start, end in statements.spans():
        yield past, start, True
        yield start, end, False
        past = end
    yield past, len(script), True
