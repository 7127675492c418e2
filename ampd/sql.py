"""SQL scripts as PostgreSQL's own scanner reads them: statements, what kind each is, and what cannot work.

One regular expression knows the tokens of the server's scanner, as far as they decide where a statement ends.
Operators, parameters and the prefixes B, X, N and U& need no rule of their own: none of them changes where a quote, a
comment or a statement ends. Of the prefixes only E does. A table of rules then tells what each statement is.
"""

import enum
import re
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, chain, islice, pairwise, takewhile
from typing import overload

import msgspec

from .sections import Comment, separators, suspicious
from .slices import Slices, at_once


class Statement(msgspec.Struct, frozen=True):
    """One statement of a script, from its first token to its last, without the closing semicolon."""

    text: str
    start: int
    end: int
    line: int
    words: tuple[str, ...]  # the bare words it begins with, in upper case, at most eight


class Problem(msgspec.Struct, frozen=True):
    """Something in a script that cannot work, found before anything runs; line and column count from 1."""

    line: int
    column: int
    offset: int
    message: str
    hint: str


class Caution(Problem, frozen=True):
    """A problem that may be none: the script runs, and whoever runs it is told before."""


class Kind(enum.Enum):
    """How a statement of a no-transaction file can be run, and run again after an interruption."""

    TRANSACTIONAL = enum.auto()  # can run inside a transaction block
    BEGIN = enum.auto()
    COMMIT = enum.auto()
    ROLLBACK = enum.auto()
    CREATE_INDEX_CONCURRENTLY = enum.auto()
    DROP_INDEX_CONCURRENTLY = enum.auto()
    REPEATABLE = enum.auto()  # harmless to run twice
    OPAQUE = enum.auto()  # nobody can tell how far it came when it was interrupted
    SESSION = enum.auto()  # changes the session, and so whatever follows


class IndexBuild(msgspec.Struct, frozen=True):
    """What CREATE INDEX CONCURRENTLY builds, in names as the catalog holds them; no name means PostgreSQL picks one."""

    name: str | None
    table: tuple[str, ...]


class Statements(Sequence[Statement]):
    """The statements of a script, each made when it is asked for: 13 bytes of memory for each, beside the script."""

    __slots__ = ("_ends", "_lines", "_noted", "_script", "_starts")

    def __init__(
        self,
        script: str,
        starts: "array[int]",
        ends: "array[int]",
        lines: "array[int]",
        noted: bytes,
    ) -> None:
        self._script = script
        self._starts = starts
        self._ends = ends
        self._lines = lines
        self._noted = noted  # 1 for each statement that is notable, else 0

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Statement: ...

    @overload
    def __getitem__(self, index: slice) -> "Statements": ...

    def __getitem__(self, index: int | slice) -> "Statement | Statements":
        if isinstance(index, slice):
            parts = (self._starts[index], self._ends[index], self._lines[index], self._noted[index])
            return Statements(self._script, *parts)
        start, end = self._starts[index], self._ends[index]
        text = self._script[start:end]
        return Statement(text, start, end, self._lines[index], _leading_words(text))

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same statements; the other one may be a tuple."""
        if not isinstance(other, tuple | Statements):
            return NotImplemented
        return len(self) == len(other) and all(map(Statement.__eq__, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Statements({list(self)!r})"

    def start(self, index: int) -> int:
        """Return the offset in the script at which a statement begins."""
        return self._starts[index]

    def end(self, index: int) -> int:
        """Return the offset in the script at which a statement ends."""
        return self._ends[index]

    def line(self, index: int) -> int:
        """Return the line that a statement begins in, counted from 1."""
        return self._lines[index]

    def at(self, offset: int) -> int | None:
        """Return the number of the statement that an offset of the script lies in; None for what lies between."""
        index = bisect_right(self._starts, offset) - 1
        return index if index >= 0 and offset < self._ends[index] else None

    def before(self, offset: int) -> int:
        """Return how many statements begin before an offset of the script."""
        return bisect_left(self._starts, offset)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield where each statement starts and ends."""
        return zip(self._starts, self._ends, strict=True)

    def notable(self, start: int = 0) -> Iterator[int]:
        """Yield the numbers, from `start` on, of the statements that are more to ampd than a text to be run.

        All others have no `setting`, `savepoint`, or kind but TRANSACTIONAL; in a long script that is most of them.
        """
        while (start := self._noted.find(1, start)) >= 0:
            yield start
            start += 1


def split(script: str) -> Statements:
    """Split a script into its statements; what lies between them is white space, comments and semicolons."""
    return at_once(splitting(script))


_STRIDE = 1 << 20  # characters that are searched without a break
_HEAD = 1000  # characters of a statement, within which its first words are, unless there are comments in between


def splitting(script: str) -> Slices[Statements]:
    """Split a script in slices."""
    rules, word = _rules(), _inside(_WORD)
    wide = len(script) >= 1 << 31
    starts, ends, lines = (array("Q" if wide else "I") for _ in range(3))
    noted = bytearray()
    line, counted = 1, 0
    for span in _spans(script):
        if span is None:
            yield
            continue
        start, end = span
        line, counted = line + script.count("\n", counted, start), start
        starts.append(start)
        ends.append(end)
        lines.append(line)
        first = word.match(script, start)
        head = first[0].translate(_UPPER) if first else ""
        if head == "SELECT":
            text = script[start : min(end, start + _HEAD)].translate(_UPPER)
            noted.append("SET_CONFIG" in text or (len(text) == _HEAD and ("--" in text or "/*" in text)))
        else:
            noted.append(head in rules or head == "SAVEPOINT")
    return Statements(script, starts, ends, lines, bytes(noted))


def problems(script: str, *, transactional: bool, statements: Statements | None = None) -> tuple[Problem, ...]:
    """Find everything in a script that cannot work, in order of position; whoever has split it, hands it over.

    What may be meant as it stands is a `Caution`; any other `Problem` is certain.
    """
    return at_once(finding_problems(script, transactional=transactional, statements=statements))


def finding_problems(
    script: str, *, transactional: bool, statements: Statements | None = None
) -> Slices[tuple[Problem, ...]]:
    """Find them in slices; the work of `problems`."""
    if statements is None:
        statements = yield from splitting(script)
    ruled: list[_Ruled] = []
    copy = False
    for number in statements.notable():
        statement = statements[number]
        ruled.append((statement, _rule(statement)))
        if ruled[-1][1].fault is _Fault.DATA:  # what follows is data, not SQL
            copy, statements, script = True, statements[: number + 1], script[: statement.end]
            break
        yield
    unfinished = () if transactional or copy else _transactions(ruled)
    certain = chain(
        _misplaced(ruled, transactional),
        unfinished,
        _misread(statements),
        _miscoded(script, ruled),
        _not_sql(script, statements),
    )
    judged: Iterator[_Judged | None] = (each and (Problem, *each) for each in certain)
    nameless = () if transactional else _nameless(ruled)
    found: list[_Judged] = []
    for finding in chain(judged, _undoing(script, statements), nameless):
        if finding is None:
            yield
        else:
            found.append(finding)
    found.sort(key=lambda each: each[1:])
    places = _places(script, (offset for _, offset, _, _ in found))
    return tuple(
        sort(*place, offset, message, hint) for place, (sort, offset, message, hint) in zip(places, found, strict=True)
    )


def kind(statement: Statement) -> Kind:
    """Tell how a statement of a no-transaction file can be run and repeated."""
    return _rule(statement).kind


def ends_transaction(statement: Statement) -> bool:
    """Tell whether a statement ends the transaction it stands in, and begins no other one."""
    return _rule(statement).label in _ENDS


def sets_transaction(statement: Statement) -> bool:
    """Tell whether a statement sets the mode of the transaction it stands in: SET TRANSACTION, before any query."""
    return _rule(statement).fault is _Fault.MODE


def resets_path(statement: Statement) -> bool:
    """Tell whether a statement puts the search path back to what the server has for it."""
    return statement.words[:1] in (("SET",), ("RESET",)) and bool(re.match(_PATH_RESET, _shape(statement.text)))


def resets_role(statement: Statement) -> bool:
    """Return whether a statement puts the role, or the whole login, back to what it was at the start."""
    return statement.words[:1] in (("SET",), ("RESET",)) and bool(re.match(_ROLE_RESET, _shape(statement.text)))


def savepoint(statement: Statement) -> tuple[str, str] | None:
    """Name the savepoint that a statement sets, after "SAVEPOINT", or goes back to, after "ROLLBACK"; else None."""
    found = statement.words[:1] in (("SAVEPOINT",), ("ROLLBACK",)) and re.match(_SAVEPOINT, _shape(statement.text))
    return (found or None) and (statement.words[0], _fold(found["name"]))


def is_concurrent(statement: Statement) -> bool:
    """Tell whether a statement waits for its locks without that others queue behind it."""
    return _rule(statement).label in _CONCURRENT and not re.match(_VACUUM_FULL, _shape(statement.text))


def temporary(statement: Statement) -> str | None:
    """Name what a statement makes for its session only, until the end of that; None for any other statement."""
    makes = statement.words[:1] in (("CREATE",), ("SELECT",), ("WITH",)) and "temp" in statement.text.translate(_LOWER)
    shape = _shape(statement.text) if makes else ""
    found = None if " ON COMMIT DROP" in shape else re.match(_TEMPORARY, shape, re.DOTALL)
    return found and _fold(found["name"] or found["of_schema"] or found["into"])


def mentions(statement: Statement, name: str) -> bool:
    """Tell whether a statement has a name in it, if only in a string."""
    for kind, start, end in _tokens(statement.text):
        token = statement.text[start:end]
        if kind in _LITERALS and name in token.translate(_LOWER):
            return True
        if (kind in _WORDS or kind == "name") and _fold(token) == name:
            return True
    return False


def setting(statement: Statement) -> str | None:
    """Name the setting that a SET, RESET or SELECT set_config changes for the session, `all` for RESET ALL; else None.

    SET SESSION CHARACTERISTICS changes several: it goes by its own words, and replaces nothing but its like.
    """
    if is_set_config(statement):
        literals = (statement.text[start:end] for kind, start, end in _tokens(statement.text) if kind in _LITERALS)
        return re.sub(_QUOTES, "", next(literals)).translate(_LOWER)
    if kind(statement) is not Kind.SESSION or not (found := re.match(_SETTING, _shape(statement.text), re.DOTALL)):
        return None
    name = found["name"] or found["words"]
    return _SETTINGS.get(name) or ".".join(_qualified(name)).translate(_LOWER)


def role(statements: Iterable[Statement]) -> str | None:
    """Name the role that a script has taken on by the end of these statements; None for that of the login."""
    name: str | None = None
    for statement in statements:
        shape = _shape(statement.text) if statement.words[:1] in (("SET",), ("RESET",)) else ""
        if re.match(_ROLE, shape):
            *_, (kind, start, end) = (each for each in _tokens(statement.text) if each[0] not in _COMMENTS)
            token = statement.text[start:end]
            own = statement.words[0] == "RESET" or token.translate(_UPPER) in ("NONE", "DEFAULT")
            name = None if own else re.sub(_QUOTES, "", token) if kind in _LITERALS else _fold(token)
    return name


def is_set_config(statement: Statement) -> bool:
    """Tell whether a statement is SELECT set_config('…', '…', false) and nothing else: a SET in other words."""
    return statement.words[:1] == ("SELECT",) and bool(re.fullmatch(_SET_CONFIG, _shape(statement.text)))


def has_byte_escape(statement: Statement) -> bool:
    """Tell whether a string of a statement has an escape such as \\0 or \\xff, which by itself names no character."""
    return any(
        kind == "escape" and re.search(_BYTE_ESCAPE, statement.text[start:end])
        for kind, start, end in _tokens(statement.text)
    )


def index_build(statement: Statement) -> IndexBuild | None:
    """Read what a CREATE INDEX CONCURRENTLY builds; None for any other statement, and where a name is written U&"…"."""
    found = re.match(_INDEX_BUILD, _shape(statement.text), re.DOTALL)
    return found and IndexBuild(
        name=_fold(found["name"]) if found["name"] else None,
        table=_qualified(found["table"]),
    )


def chosen_name(statement: Statement) -> str | None:
    """Return the name that PostgreSQL would choose for a CREATE INDEX CONCURRENTLY, as far as nothing else has it.

    None for any other statement. An expression counts as `expr`, of which the server may make more.
    """
    shape = _shape(statement.text)
    if not (found := re.match(_INDEX_BUILD, shape, re.DOTALL)):
        return None
    columns: dict[str, None] = {}  # in their order
    for original in _indexed(shape[found.end() :].strip().split(" ")):
        column, number = original, 0
        while column in columns:
            number += 1
            column = f"{_clipped(original, 63 - len(str(number)))}{number}"
        columns[column] = None
    parts = [_qualified(found["table"])[-1], "_".join(columns)]
    lengths = [len(part.encode()) for part in parts]
    while sum(lengths) > 63 - len("__idx"):
        lengths[lengths[0] <= lengths[1]] -= 1
    return "_".join((*map(_clipped, parts, lengths), "idx"))


def dropped_indexes(statement: Statement) -> tuple[tuple[str, ...], ...]:
    """Read the names in a DROP INDEX CONCURRENTLY; none for any other statement, and where one is written U&"…"."""
    found = re.match(_INDEX_DROP, _shape(statement.text), re.DOTALL)
    return tuple(map(_qualified, found["names"].split(" , "))) if found else ()


def code_block(statement: Statement) -> tuple[int, int] | None:
    """Give where in the script the code of a DO begins and ends; None where its lines are not those of the script."""
    if statement.words[:1] != ("DO",):
        return None
    previous = ""
    for kind, start, end in _tokens(statement.text):
        token = statement.text[start:end]
        if kind in _LITERALS and previous != "LANGUAGE":
            quote = token.index("$", 1) + 1 if kind == "dollar" else 1
            plain = kind == "dollar" or (kind == "string" and "'" not in token[1:-1].replace("''", ""))
            return (statement.start + start + quote, statement.start + end - quote) if plain else None
        previous = previous if kind in _COMMENTS else token.translate(_UPPER)
    return None


def locate(script: str, offset: int) -> tuple[int, int]:
    """Give the line and the column of an offset, both counted from 1."""
    offset = max(0, min(offset, len(script)))
    return script.count("\n", 0, offset) + 1, offset - script.rfind("\n", 0, offset)


def _places(script: str, offsets: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield line and column of ascending offsets; each line break is counted once, however many they are."""
    line, start, counted = 1, 0, 0
    for offset in offsets:
        if breaks := script.count("\n", counted, offset):
            line, start = line + breaks, script.rfind("\n", counted, offset) + 1
        counted = offset
        yield line, offset - start + 1


def excerpt(
    script: str,
    offset: int,
    *,
    file: str,
    hide: Callable[[str], str] = str,
    place: tuple[int, int] | None = None,
) -> str:
    """Draw the line of an offset with a caret below it; for the blank end of a script, its last visible line.

    `hide` takes secrets out of a text; `place` is what `locate` returns for the offset, if that is known.
    """
    visible = _visible_end(script)
    if offset not in range(visible + 1) or place is None:
        offset = max(0, min(offset, visible))
        place = locate(script, offset)
    line, column = place
    start, far = offset - column + 1, 10 * _WINDOW  # what is farther off is not shown, however narrow the rest
    begin, end = max(start, offset - far), script.find("\n", offset, offset + far)
    around = script[begin : end if end >= 0 else offset + far]
    around = around.rstrip() if end >= 0 or offset + far >= len(script) else around
    before, around = hide(around[: offset - begin]), hide(around)
    before, after = _printable(around[: len(before)]), _printable(around[len(before) :])
    columns = list(accumulate(map(_width, before + after), initial=0))
    if columns[-1] > _WINDOW:
        first = max(0, min(columns[len(before)] - _WINDOW // 2, columns[-1] - _WINDOW))
        left, right = bisect_left(columns, first), bisect_right(columns, first + _WINDOW) - 1
        after = after[: right - len(before)] + "…" * (right < len(columns) - 1)
        before = "…" * (left > 0) + before[left:]
    margin = " " * len(str(line))
    indent = " " * sum(map(_width, before))
    return f"{file}:{line}:{column}\n{margin} |\n{line} | {before}{after}\n{margin} | {indent}^"


def _visible_end(script: str) -> int:
    """Return the length of a script without the white space at its end, of which no copy is made."""
    end = len(script)
    while end and not (last := script[max(0, end - _HEAD) : end].rstrip()):
        end = max(0, end - _HEAD)
    return max(0, end - _HEAD) + len(last) if end else 0


# Tokens: (kind, start, end) each.

_Token = tuple[str, int, int]
_COMMENTS = frozenset({"line", "block"})
_WORDS = frozenset({"frame", "word"})
_STRUCTURE = frozenset({"frame", "mark"})
_LITERALS = frozenset({"string", "escape", "dollar", "open"})
_UPPER = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # as the server folds: ASCII only
_LOWER = {upper: lower for lower, upper in _UPPER.items()}


# To PostgreSQL every character beyond ASCII is a letter, so these sets name the ASCII characters left out.
_SPACES = " \t\n\r\f\v"
_LETTER = r"[^\0-@[-^`{-\x7f]"
_ALPHANUMERIC = r"[^\0-/:-@[-^`{-\x7f]"
_IDENTIFIER = r"[^\0-#%-/:-@[-^`{-\x7f]"  # `$` too
_OTHER = r"[\0-\x08\x0e-\x1f!\#%&*+:<>?@[\]^`{|}~\x7f]"
_TAG = rf"\$(?:{_LETTER}{_ALPHANUMERIC}*+)?\$"
_FRAME = rf"(?ai:begin|atomic|end)(?!{_IDENTIFIER})"
_WORD = rf"(?![eE]'){_LETTER}{_IDENTIFIER}*+"
# A string goes on after a doubled quote, and after white space with a line break in it and another quote.
_GOES_ON = r"'(?:'|(?>(?:[ \t\f\v]++|--[^\n\r]*+)*)[\n\r](?>(?:[ \t\f\v\n\r]++|--[^\n\r]*+[\n\r])*)')"
# What a string may hold is not repeated without a limit: each turn of a repeated group takes memory.
_ESCAPED = rf"(?>(?:[^'\\]{{1,4000}}+|\\.|{_GOES_ON}){{1,200}})"


@cache
def _token_pattern(*, coarse: bool) -> re.Pattern[str]:
    """Compile the scanner when first needed: a start with nothing pending has no use for it.

    The coarse one takes in one go what cannot end a statement: with it a long script takes a third of the time.

    Python before 3.11.5 mismatches `(?:…)*+` around anything that backtracks; `(?>(?:…)*)` stands for it.
    """
    # In a run the parts of a string that goes on are as good as strings of their own.
    simple = (
        rf"""(?!{_FRAME}){_WORD}|[0-9]++|'[^']*+'|"[^"]*+"|[.,=]|{_OTHER}++"""
        r"|-(?!-)|/(?!\*)|\$(?=[0-9])"
    )
    space = rf"[{_SPACES}]*+"
    flat = rf"\((?>(?:{space}(?:{simple})){{0,200}}){space}\)"
    nested = rf"\((?>(?:{space}(?:{simple}|{flat})){{0,200}}){space}\)"
    run = rf"(?P<run>(?:{simple}|{nested})(?>(?:{space}(?:{simple}|{nested})){{0,200}}))|" if coarse else ""
    return re.compile(
        rf"""{space}(?:{run}
          (?P<frame>  {_FRAME} )
        | (?P<word>   {_WORD} )
        | (?P<mark>   [;(),.=] )
        | (?P<string> ' [^']*+ ' )
        | (?P<number> [0-9]++ )
        | (?P<name>   " [^"]*+ " )
        | (?P<line>   --[^\n\r]*+ )
        | (?P<block>  /\* )
        | (?P<dollar> {_TAG} )
        | (?P<escape> [eE]' )
        | (?P<open>   ['"] )
        | (?P<psql>   \\[^\n\r]*+ )
        | (?P<other>  {_OTHER}++ | [$/-] )
        )""",
        re.VERBOSE | re.DOTALL,
    )


@cache
def _inside(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


def _tokens(script: str, position: int = 0) -> Iterator[_Token]:
    """Yield every token, comments included; an unterminated one reaches to the end and is of the kind "open"."""
    return _scan(script, position, coarse=False)


def _runs(script: str, position: int = 0) -> Iterator[_Token]:
    """Yield the same in larger pieces, of the kind "run", wherever the tokens make no difference to `_spans`.

    What is "open" may begin later than its token does.
    """
    return _scan(script, position, coarse=True)


def _scan(script: str, position: int, *, coarse: bool) -> Iterator[_Token]:
    pattern = _token_pattern(coarse=coarse)
    while match := pattern.match(script, position):
        kind = match.lastgroup or ""
        start, position = match.span(kind)
        if kind == "string":
            while position > 0 and (more := _inside(_GOES_ON).match(script, position - 1)):
                position = script.find("'", more.end()) + 1
        elif kind == "name":
            while position > 0 and script.startswith('"', position):
                position = script.find('"', position + 1) + 1
        elif kind == "dollar":
            closing = script.find(match[kind], position)
            position = closing + len(match[kind]) if closing >= 0 else 0
        elif kind == "escape":
            while more := _inside(_ESCAPED).match(script, position):
                position = more.end()
                if coarse:
                    yield "run", start, position
            position = position + 1 if script.startswith("'", position) else 0
        elif kind == "block":
            position = _end_of_comment(script, position)
        elif kind == "open":
            position = 0
        if position <= 0:
            kind, position = "open", len(script)
        yield kind, start, position


def _end_of_comment(script: str, position: int) -> int:
    """Return the offset behind a comment, from behind its first two characters; 0 if it never ends."""
    depth, end = 1, position
    while depth:
        if end - 2 < position:
            end = script.find("*/", position) + 2
            if end < 2:
                return 0
        inner = script.find("/*", position, end - 1)
        depth += 1 if inner >= 0 else -1
        position = inner + 2 if inner >= 0 else end
    return position


def _spans(script: str) -> Iterator[tuple[int, int] | None]:
    """Yield where each statement starts and ends: at a semicolon outside parentheses and outside a routine's body.

    None in between says that here the search can be interrupted.
    """
    start, end, depth, in_body, text = -1, 0, 0, False, ""
    routine: bool | None = None  # whether the statement creates one, as soon as it matters
    for kind, at, past in _runs(script):
        if kind in _COMMENTS or kind == "run":
            yield None
        if kind in _COMMENTS:
            continue
        previous, text = text, script[at:past].upper() if kind in _STRUCTURE else ""
        if text == ";" and not depth and not in_body:
            if start >= 0:
                yield start, end
            start, routine = -1, None
            continue
        if start < 0 and kind == "psql":
            yield at, past
            continue
        start, end = at if start < 0 else start, past
        if text == "(":
            depth += 1
        elif text == ")":
            depth = max(0, depth - 1)
        elif text == "ATOMIC" and previous == "BEGIN" and not depth:
            if routine is None:
                routine = bool(re.match(_ROUTINE, " ".join(_leading_words(script[start:at]))))
            in_body = routine
        elif text == "END" and in_body and previous in (";", "ATOMIC"):  # the END of a CASE never stands there
            in_body, depth = False, 0
    if start >= 0:
        yield start, end


def _leading_words(text: str) -> tuple[str, ...]:
    found = _plain_words().match(text)
    assert found is not None  # it matches the empty text as well
    plain, commented = found.groups()
    if commented is None:
        return tuple(_inside(rf"[{_SPACES}]+").split(plain.strip(_SPACES).translate(_UPPER))) if plain else ()
    code = (token for token in _tokens(text) if token[0] not in _COMMENTS)
    words = takewhile(lambda token: token[0] in _WORDS, code)
    return tuple(text[start:end].translate(_UPPER) for _, start, end in islice(words, 8))


@cache
def _plain_words() -> re.Pattern[str]:
    """Compile what finds leading words where no comment stands among them."""
    word = rf"[{_SPACES}]*+(?![eE]'){_LETTER}{_IDENTIFIER}*+"
    return re.compile(rf"((?:{word}){{0,8}})[{_SPACES}]*+(--|/\*)?")


# Shapes: the tokens of a statement joined by single spaces, bare words in upper case, names as they stand, longer
# literals emptied. A space inside a token becomes NUL, and so no pattern over a shape takes half a token for a token.


def _shape(text: str) -> str:
    return " ".join(_shaped(kind, text[start:end]) for kind, start, end in _tokens(text) if kind not in _COMMENTS)


def _shaped(kind: str, token: str) -> str:
    if kind in _WORDS:
        return token.translate(_UPPER)
    return "''" if kind in _LITERALS and len(token) > 16 else token.replace(" ", "\0")


def _qualified(shape: str) -> tuple[str, ...]:
    return tuple(map(_fold, shape.split(" . ")))


def _fold(token: str) -> str:
    """Turn a name in a shape into the catalog's: unquoted, or else in lower case, and cut after 63 bytes."""
    name = token[1:-1].replace('""', '"').replace("\0", " ") if token[0] == '"' else token.translate(_LOWER)
    return name.encode(errors="replace")[:63].decode(errors="ignore")


def _clipped(name: str, length: int) -> str:
    """Return a name cut to so many bytes, between two characters."""
    return name.encode(errors="replace")[:length].decode(errors="ignore")


def _indexed(tokens: list[str]) -> Iterator[str]:
    """Yield the names that PostgreSQL has for what an index is on, from what follows the table in its shape."""
    depth, begins, names = 0, False, True
    for number, token in enumerate(tokens):
        if names and begins and depth == 1 and token not in "(,":
            call = number
            while tokens[call + 1 : call + 2] == ["."]:
                call += 2
            yield _fold(tokens[call]) if tokens[call + 1 : call + 2] == ["("] or call == number else "expr"
        elif names and begins and token == "(":
            yield "expr"
        begins = token == "," and depth == 1
        if token == "(":
            depth += 1
            begins = depth == 1
        elif token == ")":
            depth -= 1
            names = tokens[number + 1 : number + 2] == ["INCLUDE"] if depth == 0 else names


class _Fault(enum.Enum):
    """Where a statement is out of place, and why."""

    NONE = enum.auto()
    CONTROL = enum.auto()  # in a transactional file: it would end or split the one transaction
    CHAIN = enum.auto()  # in every file: it begins a transaction that no BEGIN shows
    OUTSIDE = enum.auto()  # in a transactional file: the server refuses it inside a transaction block
    MODE = enum.auto()  # in a transactional file, and outside of BEGIN … COMMIT: ampd's own statements come before it
    DATA = enum.auto()  # in every file: it waits for data that nobody sends


class _Rule(msgspec.Struct, frozen=True):
    """What holds for statements of one shape: those that begin with this pattern, or else with the label itself."""

    label: str
    kind: Kind
    fault: _Fault
    pattern: str = ""


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
_ROUTINE = r"CREATE (?:OR REPLACE )?(?:FUNCTION|PROCEDURE)\b"
_OFF = r"(?i:'?(?:off?|f|false|no?|0)'?)"  # of a setting
_STRING_MODE = (
    r"(?:RESET (?:ALL|STANDARD_CONFORMING_STRINGS)"
    rf"|SET (?:SESSION |LOCAL )?STANDARD_CONFORMING_STRINGS (?:=|TO) (?P<off>{_OFF})?)"
)
_UTF8 = r"(?i:'?(?:utf[-_]?8|unicode)'?)"
_ENCODING = rf"SET (?:SESSION |LOCAL )?(?:CLIENT_ENCODING (?:=|TO)|NAMES) (?!(?:{_UTF8}|DEFAULT)\Z)"
_SETTINGS = {  # what need not go by the name it has as a setting
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
_CONCURRENT = frozenset(
    {
        "CREATE INDEX CONCURRENTLY",
        "DROP INDEX CONCURRENTLY",
        "REINDEX CONCURRENTLY",
        "DETACH PARTITION CONCURRENTLY",
        "VACUUM",
    }
)
_VACUUM_FULL = r"VACUUM(?: \( (?>.*?(?<= )FULL )| FULL(?= |\Z))"
_BYTE_ESCAPE = (
    r"(?<!\\)(?:\\\\)*+\\(?:[2-7][0-7]{2}|000|0{1,2}(?![0-7])"
    r"|x(?:[89A-Fa-f][0-9A-Fa-f]|00|0(?![0-9A-Fa-f])))"
)
_MODE = r"SET (?:SESSION |LOCAL )?(?:TRANSACTION|(?i:\"?transaction_(?:isolation|read_only|deferrable)\"?))"
_AS_IT_IS = (  # what changes nothing is accepted at any time
    r"SET (?:SESSION |LOCAL )?(?:TRANSACTION(?: ,| READ WRITE| ISOLATION LEVEL READ COMMITTED)+"
    rf"|TRANSACTION_READ_ONLY (?:=|TO) {_OFF}|TRANSACTION_ISOLATION (?:=|TO) (?i:'read\0committed'))\Z"
)
_READ_ONLY = rf" READ ONLY(?= |\Z)|(?i:transaction_read_only\"?) (?:=|TO) (?!(?:{_OFF}|DEFAULT)\Z)"

_PLAIN = _Rule("", Kind.TRANSACTIONAL, _Fault.NONE)
_RULES = (  # the first that fits counts
    _Rule("PREPARE TRANSACTION", Kind.OPAQUE, _Fault.CONTROL, r"PREPARE TRANSACTION(?! (?:AS|\() )"),
    _Rule("COMMIT PREPARED", Kind.OPAQUE, _Fault.CONTROL),
    _Rule("ROLLBACK PREPARED", Kind.OPAQUE, _Fault.CONTROL),
    _Rule("ROLLBACK TO", Kind.TRANSACTIONAL, _Fault.NONE, "ROLLBACK (?:WORK |TRANSACTION )?TO"),
    _Rule("COMMIT AND CHAIN", Kind.COMMIT, _Fault.CHAIN, f"COMMIT {_CHAIN}"),
    _Rule("END AND CHAIN", Kind.COMMIT, _Fault.CHAIN, f"END {_CHAIN}"),
    _Rule("ROLLBACK AND CHAIN", Kind.ROLLBACK, _Fault.CHAIN, f"ROLLBACK {_CHAIN}"),
    _Rule("ABORT AND CHAIN", Kind.ROLLBACK, _Fault.CHAIN, f"ABORT {_CHAIN}"),
    _Rule("BEGIN", Kind.BEGIN, _Fault.CONTROL),
    _Rule("START TRANSACTION", Kind.BEGIN, _Fault.CONTROL),
    _Rule("COMMIT", Kind.COMMIT, _Fault.CONTROL),
    _Rule("END", Kind.COMMIT, _Fault.CONTROL),
    _Rule("ROLLBACK", Kind.ROLLBACK, _Fault.CONTROL),
    _Rule("ABORT", Kind.ROLLBACK, _Fault.CONTROL),
    _Rule(
        "CREATE INDEX CONCURRENTLY",
        Kind.CREATE_INDEX_CONCURRENTLY,
        _Fault.OUTSIDE,
        "CREATE (?:UNIQUE )?INDEX CONCURRENTLY",
    ),
    _Rule("DROP INDEX CONCURRENTLY", Kind.DROP_INDEX_CONCURRENTLY, _Fault.OUTSIDE),
    _Rule(
        "REINDEX CONCURRENTLY",
        Kind.REPEATABLE,
        _Fault.OUTSIDE,
        rf"REINDEX (?:{_OPTIONS} )?[A-Z]+ CONCURRENTLY"
        rf"|REINDEX \( {_TOKENS}(?:CONCURRENTLY|\"concurrently\")(?! (?:= )?{_FALSE} )",
    ),
    _Rule("REINDEX SCHEMA", Kind.REPEATABLE, _Fault.OUTSIDE, rf"REINDEX (?:{_OPTIONS} )?SCHEMA"),
    _Rule("REINDEX DATABASE", Kind.REPEATABLE, _Fault.OUTSIDE, rf"REINDEX (?:{_OPTIONS} )?DATABASE"),
    _Rule("REINDEX SYSTEM", Kind.REPEATABLE, _Fault.OUTSIDE, rf"REINDEX (?:{_OPTIONS} )?SYSTEM"),
    _Rule("VACUUM", Kind.REPEATABLE, _Fault.OUTSIDE),
    _Rule("CLUSTER without a table", Kind.REPEATABLE, _Fault.OUTSIDE, rf"CLUSTER(?: VERBOSE| {_OPTIONS})?\Z"),
    _Rule("REINDEX", Kind.REPEATABLE, _Fault.NONE),  # of a partitioned table it does not run in a transaction
    _Rule("CLUSTER", Kind.REPEATABLE, _Fault.NONE),  # likewise
    _Rule("ALTER SYSTEM", Kind.REPEATABLE, _Fault.OUTSIDE),
    _Rule("DISCARD ALL", Kind.REPEATABLE, _Fault.OUTSIDE),
    _Rule("DROP DATABASE", Kind.REPEATABLE, _Fault.OUTSIDE, "DROP DATABASE IF EXISTS"),
    _Rule("DROP DATABASE", Kind.OPAQUE, _Fault.OUTSIDE),
    _Rule("DROP TABLESPACE", Kind.REPEATABLE, _Fault.OUTSIDE, "DROP TABLESPACE IF EXISTS"),
    _Rule("DROP TABLESPACE", Kind.OPAQUE, _Fault.OUTSIDE),
    _Rule("CREATE DATABASE", Kind.OPAQUE, _Fault.OUTSIDE),
    _Rule("CREATE TABLESPACE", Kind.OPAQUE, _Fault.OUTSIDE),
    _Rule("ALTER DATABASE SET TABLESPACE", Kind.OPAQUE, _Fault.OUTSIDE, _MOVE),
    _Rule(
        "DETACH PARTITION CONCURRENTLY",
        Kind.OPAQUE,
        _Fault.OUTSIDE,
        r"ALTER TABLE (?>.*? DETACH PARTITION ).*+(?<= CONCURRENTLY)",
    ),
    _Rule(
        "CREATE SUBSCRIPTION that makes a replication slot",
        Kind.OPAQUE,
        _Fault.OUTSIDE,
        rf"CREATE SUBSCRIPTION(?!{_WITH}(?:CREATE_SLOT|CONNECT|\"create_slot\"|\"connect\") = {_FALSE} )",
    ),
    _Rule(
        "ALTER SUBSCRIPTION REFRESH",
        Kind.OPAQUE,
        _Fault.OUTSIDE,
        "ALTER SUBSCRIPTION .*? REFRESH (?:PUBLICATION|SEQUENCES)",
    ),
    _Rule(
        "ALTER SUBSCRIPTION with refresh",
        Kind.OPAQUE,
        _Fault.OUTSIDE,
        rf"ALTER SUBSCRIPTION (?>.*? (?:SET|ADD|DROP) PUBLICATION)(?!{_WITH}(?:REFRESH|\"refresh\") = {_FALSE} )",
    ),
    _Rule(
        "ALTER SUBSCRIPTION SET (failover)",
        Kind.OPAQUE,
        _Fault.OUTSIDE,
        rf"ALTER SUBSCRIPTION {_SET}(?:FAILOVER|\"failover\")",
    ),
    _Rule(
        "ALTER SUBSCRIPTION SET (two_phase = false)",
        Kind.OPAQUE,
        _Fault.OUTSIDE,
        rf"ALTER SUBSCRIPTION {_SET}(?:TWO_PHASE|\"two_phase\") = {_FALSE}",
    ),
    _Rule("DROP SUBSCRIPTION", Kind.REPEATABLE, _Fault.NONE, "DROP SUBSCRIPTION IF EXISTS"),
    _Rule("DROP SUBSCRIPTION", Kind.OPAQUE, _Fault.NONE),
    _Rule("CALL", Kind.OPAQUE, _Fault.NONE),
    _Rule("DO", Kind.OPAQUE, _Fault.NONE),
    _Rule("SET TRANSACTION", Kind.TRANSACTIONAL, _Fault.MODE, _MODE),
    _Rule("SET", Kind.SESSION, _Fault.NONE, "SET(?! (?:LOCAL|CONSTRAINTS) )"),
    _Rule("RESET", Kind.SESSION, _Fault.NONE),
    _Rule("DISCARD", Kind.SESSION, _Fault.NONE),
    _Rule("LISTEN", Kind.SESSION, _Fault.NONE),
    _Rule("UNLISTEN", Kind.SESSION, _Fault.NONE),
    _Rule("LOAD", Kind.SESSION, _Fault.NONE),
    _Rule(
        "COPY FROM STDIN",
        Kind.TRANSACTIONAL,
        _Fault.DATA,
        r"COPY (?!\( )(?>.*?(?<! \.) FROM )STD(?:IN|OUT)",
    ),
)


def _rule(statement: Statement) -> _Rule:
    rules = _rules().get(statement.words[0], ()) if statement.words else ()
    shape = _shape(statement.text) if rules else ""
    return next((rule for pattern, rule in rules if re.match(pattern, shape, re.DOTALL)), _PLAIN)


@cache
def _rules() -> dict[str, list[tuple[str, _Rule]]]:
    """Sort the rules by the word that their statements begin with, uncompiled: a script needs few of them."""
    by_word: dict[str, list[tuple[str, _Rule]]] = {}
    for rule in _RULES:
        pattern = rule.pattern or rule.label
        word = re.split(r"\W", pattern, maxsplit=1)[0]
        by_word.setdefault(word, []).append((rf"(?:{pattern})(?= |\Z)", rule))
    return by_word


# Findings: (offset, message, hint) each, one generator for each sort of problem.

_Finding = tuple[int, str, str]  # None in its place: here the search can be interrupted
_Judged = tuple[type[Problem], int, str, str]  # with whether it is certain
_Ruled = tuple[Statement, _Rule]
_ENDS = frozenset({"COMMIT", "END", "ROLLBACK", "ABORT", "PREPARE TRANSACTION"})
_UNRECORDED = ("a READ ONLY transaction, in which the migration cannot be recorded", "remove READ ONLY")
_UNTERMINATED = {"'": "string", '"': "quoted identifier", "$": "dollar-quoted string", "/": "comment"}


def _misplaced(ruled: list[_Ruled], transactional: bool) -> Iterator[_Finding]:
    for statement, rule in ruled:
        if rule.fault is _Fault.DATA:
            message = f"{rule.label} waits for data, and a migration has none to send"
            yield statement.start, message, "use INSERT, or load the data from a program outside the migrations"
        elif rule.fault is _Fault.CHAIN and not transactional:
            message = f"{rule.label} begins a transaction of which ampd cannot record that it is done"
            yield statement.start, message, f"write {statement.words[0]}; BEGIN; in its place"
        elif rule.fault in (_Fault.CONTROL, _Fault.CHAIN) and transactional:
            message = f"{rule.label} in a migration that runs in one transaction"
            hint = "remove it: ampd wraps the file itself; or add `-- no-transaction` as the first line"
            yield statement.start, message, hint
        elif rule.fault is _Fault.OUTSIDE and transactional:
            message = f"{rule.label} cannot run inside a transaction block"
            yield statement.start, message, "put it in a file of its own whose first line is `-- no-transaction`"
        elif rule.fault is _Fault.MODE and transactional:
            shape = _shape(statement.text)
            if re.search(_READ_ONLY, shape):
                yield statement.start, *_UNRECORDED
            elif not re.match(_AS_IT_IS, shape):
                message = f"{rule.label} must come before any query, and ampd's own come before it"
                hint = "make `-- no-transaction` the first line, and write BEGIN with the mode, and COMMIT, in the file"
                yield statement.start, message, hint


def _transactions(ruled: list[_Ruled]) -> Iterator[_Finding]:
    begun: Statement | None = None
    read_only: Statement | None = None
    for statement, rule in ruled:
        if rule.kind is Kind.BEGIN:
            begun = begun or statement
        elif rule.fault is _Fault.MODE and not begun:
            yield statement.start, f"{rule.label} outside of a transaction", "put it between BEGIN and COMMIT"
        elif rule.label in _ENDS:
            if read_only and rule.kind is Kind.COMMIT:
                yield read_only.start, *_UNRECORDED
            begun = read_only = None
        if begun and (rule.kind is Kind.BEGIN or rule.fault is _Fault.MODE):
            read_only = statement if re.search(_READ_ONLY, _shape(statement.text)) else read_only
    if begun:
        yield begun.start, "this transaction is never committed or rolled back", "add COMMIT where it should end"


def _misread(statements: Statements) -> Iterator[_Finding | None]:
    """Find the first string that the server would read otherwise, for standard_conforming_strings is off by then."""
    modes = ((number, bool(mode["off"])) for number, mode in _string_modes(statements))
    for (number, off), (past, _) in pairwise((*modes, (len(statements), False))):
        for statement in map(statements.__getitem__, range(number + 1, past) if off else ()):
            yield None
            for kind, start, end in _tokens(statement.text):
                if kind == "string" and "\\" in statement.text[start:end]:
                    message = "a backslash in a plain string while standard_conforming_strings is off"
                    yield statement.start + start, message, "write the string as E'…', which means the same everywhere"
                    return


def _string_modes(statements: Statements) -> Iterator[tuple[int, re.Match[str]]]:
    for number in statements.notable():
        statement = statements[number]
        if statement.words[:1] in (("SET",), ("RESET",)) and (mode := re.match(_STRING_MODE, _shape(statement.text))):
            yield number, mode


def _miscoded(script: str, ruled: list[_Ruled]) -> Iterator[_Finding]:
    """Find where the server is told to read what follows in another encoding, if that makes a difference."""
    for statement, _ in ruled:
        if statement.words[:1] == ("SET",) and re.match(_ENCODING, _shape(statement.text)):
            if not script.isascii():
                message = "another client_encoding in a file with characters beyond ASCII, which ampd sends as UTF-8"
                yield (
                    statement.start,
                    message,
                    "remove it; the server converts to the encoding of the database by itself",
                )
            return


def _not_sql(script: str, statements: Statements) -> Iterator[_Finding | None]:
    # Without a backslash, only what is never closed remains to be found, and that reaches to the end.
    last = statements[-1].start if statements else 0
    everywhere = not statements or "\\" in script
    for kind, start, end in _runs(script, 0 if everywhere else last):
        if kind == "open":
            opened = next((token for token in _tokens(script, last) if token[0] == "open"), (kind, start, end))[1]
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
    """Find where a section begins that would undo the migration; what may be one counts if any statement follows."""
    comments: list[Comment] = []
    for comment in _comments(script, statements):
        if comment is None:
            yield None
        else:
            comments.append(comment)
    for separator in separators(comments):
        if separator.tool:
            message = f"`{separator.marker}` begins the down section of {separator.tool}, and ampd runs files whole"
            yield Problem, separator.offset, message, _KEEP_UP
        elif statements and separator.offset < statements[-1].start:
            message = f"`{separator.marker}` may begin a section that undoes the migration, and ampd runs files whole"
            yield Caution, separator.offset, message, f"if it does, {_KEEP_UP}"


def _nameless(ruled: list[_Ruled]) -> Iterator[_Judged]:
    """Find the indexes of which nobody could tell, after an interruption, whether they are those of the file."""
    for statement, rule in ruled:
        if rule.kind is Kind.CREATE_INDEX_CONCURRENTLY and (build := index_build(statement)) and build.name is None:
            name = chosen_name(statement) or ""
            shown = name if re.fullmatch("[a-z_][a-z0-9_$]*", name) else '"' + name.replace('"', '""') + '"'
            message = f"{rule.label} without a name cannot be resumed where it is interrupted: a person has to look"
            yield Caution, statement.start, message, f"give it the name that PostgreSQL would choose: {shown}"


def _is_suspicious(script: str, statements: Statements) -> Generator[None, None, bool]:
    """Return whether any piece of a script may hold a separator."""
    for start, end, _ in _pieces(script, statements):
        commented = False
        for begin in range(start, end, _STRIDE):
            yield
            past = min(end, begin + _STRIDE + 1)  # a comment begins with two characters
            commented = commented or script.find("--", begin, past) >= 0 or script.find("/*", begin, past) >= 0
        if commented and suspicious(script[start:end]):
            return True
    return False


def _comments(script: str, statements: Statements) -> Iterator[Comment | None]:
    """Yield the comments among which separators may be: none at all where no word of one is in any."""
    if not (yield from _is_suspicious(script, statements)):
        return
    for first, last, between in _pieces(script, statements):
        yield None
        piece, previous = script[first:last], 0
        if not between and not suspicious(piece):
            continue
        for kind, start, end in _tokens(piece):
            if kind in _COMMENTS:
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


# Drawing.

_WINDOW = 100  # columns of a long line that an excerpt shows


def _printable(text: str) -> str:
    return "".join("    " if c == "\t" else c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
