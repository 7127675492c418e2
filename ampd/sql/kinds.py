"""What kind of statement each one is, by a table of rules, and what it names. Pure."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import msgspec

from .scanner import COMMENTS, LITERALS, TO_LOWER, TO_UPPER, WORDS, fold_case, name_parts, shape_of, tokenize

if TYPE_CHECKING:
    from .scanner import Statement


class Kind(enum.Enum):
    """How a statement of a no-transaction file can be run, and run again after an interruption."""

    TRANSACTIONAL = enum.auto()  # can run inside a transaction block
    BEGIN = enum.auto()
    COMMIT = enum.auto()
    ROLLBACK = enum.auto()
    CREATE_INDEX_CONCURRENTLY = enum.auto()
    DROP_INDEX_CONCURRENTLY = enum.auto()
    IDEMPOTENT = enum.auto()  # harmless to run twice
    NOT_RESUMABLE = enum.auto()  # the catalog does not show how far it came when it was interrupted
    SESSION = enum.auto()  # changes the session, and so whatever follows


class IndexBuild(msgspec.Struct, frozen=True):
    """What CREATE INDEX CONCURRENTLY builds, in names as the catalog has them; without one PostgreSQL chooses it."""

    name: str | None
    table: tuple[str, ...]


def kind(statement: Statement) -> Kind:
    """Return how a statement of a no-transaction file can be run and repeated."""
    return rule_of(statement).kind


def ends_transaction(statement: Statement) -> bool:
    """Return whether a statement ends its transaction, and begins no other one."""
    return rule_of(statement).label in ENDS


def sets_transaction(statement: Statement) -> bool:
    """Return whether a statement sets the mode of its transaction: SET TRANSACTION, before any query."""
    return rule_of(statement).misplacement is Misplacement.MODE


def resets_path(statement: Statement) -> bool:
    """Return whether a statement puts the search path back to what the server has for it."""
    return _match(_PATH_RESET, statement, "SET", "RESET") is not None


def resets_role(statement: Statement) -> bool:
    """Return whether a statement puts the role, or the whole login, back to what it was at the start."""
    return _match(_ROLE_RESET, statement, "SET", "RESET") is not None


def savepoint(statement: Statement) -> tuple[str, str] | None:
    """Return the savepoint that a statement sets, after "SAVEPOINT", or goes back to, after "ROLLBACK"; else None."""
    found = _match(_SAVEPOINT, statement, "SAVEPOINT", "ROLLBACK")
    return found and (statement.words[0], fold_case(found["name"]))


def is_concurrent(statement: Statement) -> bool:
    """Return whether nobody queues behind a statement while it waits for its locks."""
    return rule_of(statement).label in _CONCURRENT and not _match(_VACUUM_FULL, statement, "VACUUM")


def temporary(statement: Statement) -> str | None:
    """Return the name of the temporary object that a statement creates; None for any other statement."""
    may = statement.words[:1] in (("CREATE",), ("SELECT",), ("WITH",))
    shape = shape_of(statement.text) if may and "temp" in statement.text.translate(TO_LOWER) else ""
    found = None if " ON COMMIT DROP" in shape else re.match(_TEMPORARY, shape, re.DOTALL)
    return found and fold_case(found["name"] or found["of_schema"] or found["into"])


def mentions(statement: Statement, name: str) -> bool:
    """Return whether a statement contains a name, if only in a string."""
    for kind, start, end in tokenize(statement.text):
        token = statement.text[start:end]
        if kind in LITERALS and name in token.translate(TO_LOWER):
            return True
        if (kind in WORDS or kind == "name") and fold_case(token) == name:
            return True
    return False


def setting(statement: Statement) -> str | None:
    """Return the setting that a SET, RESET or SELECT set_config changes for the session (`all` for RESET ALL), or None.

    SET SESSION CHARACTERISTICS changes several: its name is its own words, so that it replaces only its like.
    """
    if is_set_config(statement):
        literals = (statement.text[start:end] for kind, start, end in tokenize(statement.text) if kind in LITERALS)
        return re.sub(_QUOTES, "", next(literals)).translate(TO_LOWER)
    if kind(statement) is not Kind.SESSION or not (found := _match(_SETTING, statement, "SET", "RESET")):
        return None
    name = found["name"] or found["words"]
    return _SETTINGS.get(name) or ".".join(name_parts(name)).translate(TO_LOWER)


def role(statements: Iterable[Statement]) -> str | None:
    """Return the role that these statements of a script have set; None for that of the login."""
    name: str | None = None
    for statement in statements:
        if _match(_ROLE, statement, "SET", "RESET"):
            *_, (kind, start, end) = (each for each in tokenize(statement.text) if each[0] not in COMMENTS)
            token = statement.text[start:end]
            own = statement.words[0] == "RESET" or token.translate(TO_UPPER) in ("NONE", "DEFAULT")
            name = None if own else re.sub(_QUOTES, "", token) if kind in LITERALS else fold_case(token)
    return name


def is_set_config(statement: Statement) -> bool:
    """Return whether a statement is SELECT set_config('…', '…', false) and nothing else."""
    return _match(rf"{_SET_CONFIG}\Z", statement, "SELECT") is not None


def index_build(statement: Statement) -> IndexBuild | None:
    """Return what CREATE INDEX CONCURRENTLY builds; None for any other statement, and where a name is written U&"…"."""
    found = _match(_INDEX_BUILD, statement, "CREATE")
    return found and IndexBuild(found["name"] and fold_case(found["name"]), name_parts(found["table"]))


def suggested_name(statement: Statement) -> str:
    """Return a name for the index of a CREATE INDEX CONCURRENTLY without one, made as PostgreSQL makes it.

    Of table and columns as they stand: the server also cuts and numbers names, and looks into expressions.
    """
    found = _match(rf"{_INDEX_BUILD}(?:[^(]*\( (?P<columns>[^()]*))?", statement, "CREATE")
    assert found is not None
    columns = [fold_case(each.split(" ")[0]) for each in (found["columns"] or "").split(" , ") if each.strip()]
    return "_".join((name_parts(found["table"])[-1], *columns, "idx"))


def reindexed(statement: Statement) -> tuple[str, tuple[str, ...]] | None:
    """Return what a REINDEX names: INDEX, TABLE, SCHEMA, DATABASE or SYSTEM, and the parts of the name, if any.

    None for any other statement, and where the name is written U&"…".
    """
    found = _match(_REINDEX, statement, "REINDEX")
    return found and (found["what"], name_parts(found["name"]) if found["name"] else ())


def dropped_indexes(statement: Statement) -> tuple[tuple[str, ...], ...]:
    """Return the names in a DROP INDEX CONCURRENTLY; none for any other statement, and where one is written U&"…"."""
    found = _match(_INDEX_DROP, statement, "DROP")
    return tuple(map(name_parts, found["names"].split(" , "))) if found else ()


def code_block(statement: Statement) -> tuple[int, int] | None:
    """Return where in the script the code of a DO begins and ends; None where its lines are not those of the script."""
    if statement.words[:1] != ("DO",):
        return None
    previous = ""
    for kind, start, end in tokenize(statement.text):
        token = statement.text[start:end]
        if kind in LITERALS and previous != "LANGUAGE":
            quote = token.index("$", 1) + 1 if kind == "dollar" else 1
            plain = kind == "dollar" or (kind == "string" and "'" not in token[1:-1].replace("''", ""))
            return (statement.start + start + quote, statement.start + end - quote) if plain else None
        previous = previous if kind in COMMENTS else token.translate(TO_UPPER)
    return None


def _match(pattern: str, statement: Statement, *words: str) -> re.Match[str] | None:
    """Match the shape of a statement, if its first word is one of these."""
    begins = bool(statement.words) and statement.words[0] in words
    return re.match(pattern, shape_of(statement.text), re.DOTALL) if begins else None


class Misplacement(enum.Enum):
    """Where a statement is out of place, and why."""

    NONE = enum.auto()
    CONTROL = enum.auto()  # in a transactional file: it would end or split the one transaction
    CHAIN = enum.auto()  # in every file: it begins a transaction that no BEGIN shows
    OUTSIDE = enum.auto()  # in a transactional file: the server refuses it inside a transaction block
    MODE = enum.auto()  # in a transactional file, and outside of BEGIN … COMMIT: ampd's own statements come before it
    DATA = enum.auto()  # in every file: it waits for data that nobody sends


class Rule(msgspec.Struct, frozen=True):
    """What applies to statements of one sort, which messages call by the label."""

    label: str
    kind: Kind
    misplacement: Misplacement


_NAME = r"[^ (][^ ]*(?: \. [^ ]+)*"
_TOKENS = r"(?:[^ )][^ ]* )*"
_OPTIONS = rf"\( {_TOKENS}\)"
_FALSE = r"(?i:'?(?:false|off|0)'?)"
_WITH = r"(?>.*? WITH \( )(?:.*? )??"  # as far as one of the options
_SET = r"(?>.*? SET \( )(?:.*? , )??"
_CHAIN = "(?:WORK |TRANSACTION )?AND CHAIN"
_MOVE = r"ALTER DATABASE (?:U & )?[^ ]+(?: UESCAPE [^ ]+)? (?:SET TABLESPACE|(?:WITH )?(?:TABLESPACE|\"tablespace\"))"
_INDEX_BUILD = (
    r"CREATE (?:UNIQUE )?INDEX CONCURRENTLY (?:(?:IF NOT EXISTS )?(?P<name>[^ ]+) )??"
    rf"ON (?:ONLY )?(?P<table>{_NAME})(?= USING | \()"
)
_INDEX_DROP = (
    r"DROP INDEX CONCURRENTLY (?:IF EXISTS )?"
    rf"(?P<names>{_NAME}(?: , {_NAME})*)(?: CASCADE| RESTRICT)?\Z"
)
_REINDEX = (
    rf"REINDEX (?:{_OPTIONS} )?(?P<what>INDEX|TABLE|SCHEMA|DATABASE|SYSTEM)(?: CONCURRENTLY)?(?: (?P<name>{_NAME}))?\Z"
)
ROUTINE = r"CREATE (?:OR REPLACE )?(?:FUNCTION|PROCEDURE)\b"
_OFF = r"(?i:'?(?:off?|f|false|no?|0)'?)"  # of a setting
STRINGS_OFF = rf"SET (?:SESSION |LOCAL )?STANDARD_CONFORMING_STRINGS (?:=|TO) {_OFF}"
_UTF8 = r"(?i:'?(?:utf[-_]?8|unicode)'?)"
ENCODING = rf"SET (?:SESSION |LOCAL )?(?:CLIENT_ENCODING (?:=|TO)|NAMES) (?!(?:{_UTF8}|DEFAULT)\Z)"
_SETTINGS = {  # what SET takes by another name than that of the setting
    "TIME ZONE": "timezone",
    "SESSION AUTHORIZATION": "session_authorization",
    "ROLE": "role",
    "SCHEMA": "search_path",
    "NAMES": "client_encoding",
    "XML OPTION": "xmloption",
}
_SETTING = (
    rf"(?:SET (?:SESSION )?|RESET )(?:(?P<name>{_NAME})(?= = | TO |\Z)"
    rf"|(?P<words>{'|'.join(_SETTINGS)}|SESSION CHARACTERISTICS .*)(?= |\Z))"
)
_LITERAL = r"(?:[eE]?'|\$)[^ ]*"
_SET_CONFIG = rf"SELECT (?:PG_CATALOG \. )?SET_CONFIG \( {_LITERAL} , {_LITERAL} , {_OFF} \)"
_QUOTES = r"\A(?:[eE]?'|\$[^$]*\$)|(?:'|\$[^$]*\$)\Z"
_PATH_RESET = r"(?:RESET (?:ALL|SEARCH_PATH)|SET (?:SESSION |LOCAL )?SEARCH_PATH (?:=|TO) DEFAULT)\Z"
_ROLE = r"(?:SET (?:SESSION |LOCAL )?|RESET )(?:ROLE|SESSION AUTHORIZATION)(?= |\Z)"
_ROLE_RESET = rf"RESET (?:ROLE|SESSION AUTHORIZATION)\Z|{_ROLE} (?:TO |= )?(?:NONE|DEFAULT)\Z"
_SAVEPOINT = r"(?:SAVEPOINT|ROLLBACK (?:WORK |TRANSACTION )?TO(?: SAVEPOINT)?) (?P<name>[^ ]+)\Z"
_TEMPORARY = (
    r"CREATE (?:(?:OR REPLACE|GLOBAL|LOCAL) )*(?:TEMP|TEMPORARY) (?:RECURSIVE )?(?:TABLE|SEQUENCE|VIEW) "
    r"(?:IF NOT EXISTS )?(?:PG_TEMP \. )?(?P<name>[^ ]+)"
    r"|CREATE (?:[A-Z]+ )+PG_TEMP \. (?P<of_schema>[^ ]+)"
    r"|(?:SELECT|WITH) (?>.*? INTO )(?:(?:GLOBAL|LOCAL) )?(?:TEMP|TEMPORARY) (?:TABLE )?(?P<into>[^ ]+)"
)
_CONCURRENT = {
    *("CREATE INDEX CONCURRENTLY", "DROP INDEX CONCURRENTLY", "REINDEX CONCURRENTLY"),
    *("DETACH PARTITION CONCURRENTLY", "VACUUM"),
}
_VACUUM_FULL = r"VACUUM(?: \( (?>.*?(?<= )FULL )| FULL(?= |\Z))"
_MODE = r"SET (?:SESSION |LOCAL )?(?:TRANSACTION|(?i:\"?transaction_(?:isolation|read_only|deferrable)\"?))"
AS_IT_IS = (  # what changes nothing is accepted at any time
    r"SET (?:SESSION |LOCAL )?(?:TRANSACTION(?: ,| READ WRITE| ISOLATION LEVEL READ COMMITTED)+"
    rf"|TRANSACTION_READ_ONLY (?:=|TO) {_OFF}|TRANSACTION_ISOLATION (?:=|TO) (?i:'read\0committed'))\Z"
)
READ_ONLY = rf" READ ONLY(?= |\Z)|(?i:transaction_read_only\"?) (?:=|TO) (?!(?:{_OFF}|DEFAULT)\Z)"

_PATTERNS = {  # of the statements whose shape begins otherwise than with their label
    "PREPARE TRANSACTION": r"PREPARE TRANSACTION(?! (?:AS|\() )",
    "ROLLBACK TO": "ROLLBACK (?:WORK |TRANSACTION )?TO",
    "COMMIT AND CHAIN": f"COMMIT {_CHAIN}",
    "END AND CHAIN": f"END {_CHAIN}",
    "ROLLBACK AND CHAIN": f"ROLLBACK {_CHAIN}",
    "ABORT AND CHAIN": f"ABORT {_CHAIN}",
    "CREATE INDEX CONCURRENTLY": "CREATE (?:UNIQUE )?INDEX CONCURRENTLY",
    "REINDEX CONCURRENTLY": (
        rf"REINDEX (?:{_OPTIONS} )?[A-Z]+ CONCURRENTLY"
        rf"|REINDEX \( {_TOKENS}(?:CONCURRENTLY|\"concurrently\")(?! (?:= )?{_FALSE} )"
    ),
    "REINDEX SCHEMA": rf"REINDEX (?:{_OPTIONS} )?SCHEMA",
    "REINDEX DATABASE": rf"REINDEX (?:{_OPTIONS} )?DATABASE",
    "REINDEX SYSTEM": rf"REINDEX (?:{_OPTIONS} )?SYSTEM",
    "CLUSTER without a table": rf"CLUSTER(?: VERBOSE| {_OPTIONS})?\Z",
    "ALTER DATABASE SET TABLESPACE": _MOVE,
    "DETACH PARTITION CONCURRENTLY": r"ALTER TABLE (?>.*? DETACH PARTITION ).*+(?<= CONCURRENTLY)",
    "CREATE SUBSCRIPTION that makes a replication slot": (
        rf"CREATE SUBSCRIPTION(?!{_WITH}(?:CREATE_SLOT|CONNECT|\"create_slot\"|\"connect\") = {_FALSE} )"
    ),
    "ALTER SUBSCRIPTION REFRESH": "ALTER SUBSCRIPTION .*? REFRESH (?:PUBLICATION|SEQUENCES)",
    "ALTER SUBSCRIPTION with refresh": (
        rf"ALTER SUBSCRIPTION (?>.*? (?:SET|ADD|DROP) PUBLICATION)(?!{_WITH}(?:REFRESH|\"refresh\") = {_FALSE} )"
    ),
    "ALTER SUBSCRIPTION SET (failover)": rf"ALTER SUBSCRIPTION {_SET}(?:FAILOVER|\"failover\")",
    "ALTER SUBSCRIPTION SET (two_phase = false)": (rf"ALTER SUBSCRIPTION {_SET}(?:TWO_PHASE|\"two_phase\") = {_FALSE}"),
    "SET TRANSACTION": _MODE,
    "SET": "SET(?! (?:LOCAL|CONSTRAINTS) )",
    "COPY FROM STDIN": r"COPY (?!\( )(?>.*?(?<! \.) FROM )STD(?:IN|OUT)",
}


def _rules(kind: Kind, misplacement: Misplacement, *labels: str) -> Iterator[Rule]:
    return (Rule(label, kind, misplacement) for label in labels)


_PLAIN = Rule("", Kind.TRANSACTIONAL, Misplacement.NONE)
_RULES = (  # the first that fits is taken
    *_rules(Kind.NOT_RESUMABLE, Misplacement.CONTROL, "PREPARE TRANSACTION", "COMMIT PREPARED", "ROLLBACK PREPARED"),
    *_rules(Kind.TRANSACTIONAL, Misplacement.NONE, "ROLLBACK TO"),
    *_rules(Kind.COMMIT, Misplacement.CHAIN, "COMMIT AND CHAIN", "END AND CHAIN"),
    *_rules(Kind.ROLLBACK, Misplacement.CHAIN, "ROLLBACK AND CHAIN", "ABORT AND CHAIN"),
    *_rules(Kind.BEGIN, Misplacement.CONTROL, "BEGIN", "START TRANSACTION"),
    *_rules(Kind.COMMIT, Misplacement.CONTROL, "COMMIT", "END"),
    *_rules(Kind.ROLLBACK, Misplacement.CONTROL, "ROLLBACK", "ABORT"),
    *_rules(Kind.CREATE_INDEX_CONCURRENTLY, Misplacement.OUTSIDE, "CREATE INDEX CONCURRENTLY"),
    *_rules(Kind.DROP_INDEX_CONCURRENTLY, Misplacement.OUTSIDE, "DROP INDEX CONCURRENTLY"),
    *_rules(
        Kind.IDEMPOTENT,
        Misplacement.OUTSIDE,
        *("REINDEX CONCURRENTLY", "REINDEX SCHEMA", "REINDEX DATABASE", "REINDEX SYSTEM", "CLUSTER without a table"),
        *("VACUUM", "ALTER SYSTEM", "DISCARD ALL", "DROP DATABASE IF EXISTS", "DROP TABLESPACE IF EXISTS"),
    ),
    # REINDEX and CLUSTER of a partitioned table do not run in a transaction.
    *_rules(Kind.IDEMPOTENT, Misplacement.NONE, "REINDEX", "CLUSTER", "DROP SUBSCRIPTION IF EXISTS"),
    *_rules(
        Kind.NOT_RESUMABLE,
        Misplacement.OUTSIDE,
        *("CREATE DATABASE", "CREATE TABLESPACE", "DROP DATABASE", "DROP TABLESPACE", "ALTER DATABASE SET TABLESPACE"),
        *("DETACH PARTITION CONCURRENTLY", "CREATE SUBSCRIPTION that makes a replication slot"),
        *("ALTER SUBSCRIPTION REFRESH", "ALTER SUBSCRIPTION with refresh"),
        *("ALTER SUBSCRIPTION SET (failover)", "ALTER SUBSCRIPTION SET (two_phase = false)"),
    ),
    *_rules(Kind.NOT_RESUMABLE, Misplacement.NONE, "DROP SUBSCRIPTION", "CALL", "DO"),
    *_rules(Kind.TRANSACTIONAL, Misplacement.MODE, "SET TRANSACTION"),
    *_rules(Kind.SESSION, Misplacement.NONE, "SET", "RESET", "DISCARD", "LISTEN", "UNLISTEN", "LOAD"),
    *_rules(Kind.TRANSACTIONAL, Misplacement.DATA, "COPY FROM STDIN"),
)


def rule_of(statement: Statement) -> Rule:
    """Return the first rule that fits a statement."""
    rules = rules_by_word().get(statement.words[0], ()) if statement.words else ()
    shape = shape_of(statement.text) if rules else ""
    return next((rule for pattern, rule in rules if re.match(pattern, shape, re.DOTALL)), _PLAIN)


@cache
def rules_by_word() -> dict[str, list[tuple[str, Rule]]]:
    """Return the rules by the word that their statements begin with, uncompiled: a script needs few of them."""
    by_word: dict[str, list[tuple[str, Rule]]] = {}
    for rule in _RULES:
        pattern = _PATTERNS.get(rule.label, rule.label)
        word = re.split(r"\W", pattern, maxsplit=1)[0]
        by_word.setdefault(word, []).append((rf"(?:{pattern})(?= |\Z)", rule))
    return by_word


ENDS = frozenset({"COMMIT", "END", "ROLLBACK", "ABORT", "PREPARE TRANSACTION"})
