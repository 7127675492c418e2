"""The tokens of SQL, as PostgreSQL's own scanner reads them. Pure.

One regular expression knows the tokens of the server's scanner, as far as they decide where a statement ends.
Operators, parameters and the prefixes B, X, N and U& need no rule of their own: none of them changes where a quote, a
comment or a statement ends. Of the prefixes only E does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import islice, takewhile

import msgspec


class Statement(msgspec.Struct, frozen=True):
    """One statement of a script, from its first token to its last, without the closing semicolon."""

    text: str
    start: int
    end: int
    line: int
    words: tuple[str, ...]  # the bare words it begins with, in upper case, at most eight


# Tokens: (kind, start, end) each.

_Token = tuple[str, int, int]
COMMENTS = frozenset({"line", "block"})
WORDS = frozenset({"frame", "word"})
STRUCTURE = frozenset({"frame", "mark"})
LITERALS = frozenset({"string", "escape", "dollar", "open"})
TO_UPPER = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # as the server folds: ASCII only
TO_LOWER = {upper: lower for lower, upper in TO_UPPER.items()}


# To PostgreSQL every character beyond ASCII is a letter, so these sets name the ASCII characters left out.
_SPACES = " \t\n\r\f\v"
_LETTER = r"[^\0-@[-^`{-\x7f]"
_ALPHANUMERIC = r"[^\0-/:-@[-^`{-\x7f]"
_IDENTIFIER = r"[^\0-#%-/:-@[-^`{-\x7f]"  # `$` too
_OTHER = r"[\0-\x08\x0e-\x1f!\#%&*+:<>?@[\]^`{|}~\x7f]"
_TAG = rf"\$(?:{_LETTER}{_ALPHANUMERIC}*+)?\$"
_FRAME = rf"(?ai:begin|atomic|end)(?!{_IDENTIFIER})"
WORD = rf"(?![eE]'){_LETTER}{_IDENTIFIER}*+"
# A string is continued after a doubled quote, and after white space with a line break in it and another quote.
_GOES_ON = r"'(?:'|(?>(?:[ \t\f\v]++|--[^\n\r]*+)*)[\n\r](?>(?:[ \t\f\v\n\r]++|--[^\n\r]*+[\n\r])*)')"
# The content of a string is not repeated without a limit: each repetition of a group takes memory.
_ESCAPED = rf"(?>(?:[^'\\]{{1,4000}}+|\\.|{_GOES_ON}){{1,200}})"


@cache
def _token_pattern(*, coarse: bool) -> re.Pattern[str]:
    """Return the scanner, compiled when first needed: a run with nothing pending does not need it.

    The coarse one takes in one go what cannot end a statement: with it a long script takes a third of the time.

    Python before 3.11.5 mismatches `(?:…)*+` around anything that backtracks; `(?>(?:…)*)` stands for it.
    """
    # In a run the parts of a continued string count as strings of their own.
    simple = (
        rf"""(?!{_FRAME}){WORD}|[0-9]++|'[^']*+'|"[^"]*+"|[.,=]|{_OTHER}++"""
        r"|-(?!-)|/(?!\*)|\$(?=[0-9])"
    )
    space = rf"[{_SPACES}]*+"
    flat = rf"\((?>(?:{space}(?:{simple})){{0,200}}){space}\)"
    nested = rf"\((?>(?:{space}(?:{simple}|{flat})){{0,200}}){space}\)"
    run = rf"(?P<run>(?:{simple}|{nested})(?>(?:{space}(?:{simple}|{nested})){{0,200}}))|" if coarse else ""
    return re.compile(
        rf"""{space}(?:{run}
          (?P<frame>  {_FRAME} )
        | (?P<word>   {WORD} )
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
def compiled(pattern: str) -> re.Pattern[str]:
    """Return a pattern, compiled, in which a dot matches line breaks."""
    return re.compile(pattern, re.DOTALL)


def tokenize(script: str, position: int = 0) -> Iterator[_Token]:
    """Yield every token, comments included; an unterminated one reaches to the end and is of the kind "open"."""
    return _scan(script, position, coarse=False)


def coarse_tokens(script: str, position: int = 0) -> Iterator[_Token]:
    """Yield the same in larger pieces, of the kind "run", wherever the tokens make no difference to `_spans`.

    What is "open" may begin later than its token does.
    """
    return _scan(script, position, coarse=True)


def _scan(script: str, position: int, *, coarse: bool) -> Iterator[_Token]:
    """Yield tokens from a position on; what the pattern only begins is searched to its end."""
    pattern = _token_pattern(coarse=coarse)
    while match := pattern.match(script, position):
        kind = match.lastgroup or ""
        start, position = match.span(kind)
        if kind == "string":
            while position > 0 and (more := compiled(_GOES_ON).match(script, position - 1)):
                position = script.find("'", more.end()) + 1
        elif kind == "name":
            while position > 0 and script.startswith('"', position):
                position = script.find('"', position + 1) + 1
        elif kind == "dollar":
            closing = script.find(match[kind], position)
            position = closing + len(match[kind]) if closing >= 0 else 0
        elif kind == "escape":
            while more := compiled(_ESCAPED).match(script, position):
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


def leading_words(text: str) -> tuple[str, ...]:
    """Return the bare words that a statement begins with, in upper case, at most eight."""
    found = _plain_words().match(text)
    assert found is not None  # it matches the empty text as well
    plain, commented = found.groups()
    if commented is None:
        return tuple(compiled(rf"[{_SPACES}]+").split(plain.strip(_SPACES).translate(TO_UPPER))) if plain else ()
    code = (token for token in tokenize(text) if token[0] not in COMMENTS)
    words = takewhile(lambda token: token[0] in WORDS, code)
    return tuple(text[start:end].translate(TO_UPPER) for _, start, end in islice(words, 8))


@cache
def _plain_words() -> re.Pattern[str]:
    """Return the pattern of leading words with no comment among them."""
    word = rf"[{_SPACES}]*+(?![eE]'){_LETTER}{_IDENTIFIER}*+"
    return re.compile(rf"((?:{word}){{0,8}})[{_SPACES}]*+(--|/\*)?")


# Shapes: the tokens of a statement joined by single spaces, bare words in upper case, names as they stand, longer
# literals emptied. A space inside a token becomes NUL, and so no pattern over a shape takes half a token for a token.


def shape_of(text: str) -> str:
    """Return the shape of a statement."""
    return " ".join(_shaped(kind, text[start:end]) for kind, start, end in tokenize(text) if kind not in COMMENTS)


def _shaped(kind: str, token: str) -> str:
    if kind in WORDS:
        return token.translate(TO_UPPER)
    return "''" if kind in LITERALS and len(token) > 16 else token.replace(" ", "\0")


def name_parts(shape: str) -> tuple[str, ...]:
    """Return the parts of a qualified name, as the catalog has them, from its shape."""
    return tuple(map(fold_case, shape.split(" . ")))


def fold_case(token: str) -> str:
    """Return a name in a shape as the catalog has it: unquoted, or else in lower case, and cut after 63 bytes."""
    name = token[1:-1].replace('""', '"').replace("\0", " ") if token[0] == '"' else token.translate(TO_LOWER)
    return name.encode(errors="replace")[:63].decode(errors="ignore")
