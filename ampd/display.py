"""Text for terminals and logs: what others wrote neither moves a cursor nor passes for a line of ours. Pure."""

from __future__ import annotations

import re

# Control characters but tab and line feed; what changes the direction of a text or is not seen; what a CI runner takes,
# wherever it stands, for the beginning of a command: ##[ and ##vso[ of Azure's, ##teamcity[.
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
    r"|(?<=#)#(?=\w{0,20}\[)"
)
_COMMAND = "`[^`]*`"
_MARK = r" *\| *\^"
_OF_AN_EXCERPT = r" *\d* *\|"
_LONGEST, _LONGEST_NAME = 10_000, 200  # characters


def visible(text: str) -> str:
    """Return a text with control characters and invisible ones written as escapes."""
    return _UNSEEN.sub(_escape, text)


def folded(text: str) -> str:
    """Return a text by others as part of a message: its further lines are marked."""
    return _cut(visible(text.replace("\r\n", "\n")), _LONGEST).replace("\n", "\n  | ")


def one_line(text: str) -> str:
    """Return a name or a statement by others on one line, cut where it is long."""
    return _cut(visible(text).replace("\n", r"\n").replace("\t", " "), _LONGEST_NAME)


def fitted(text: str, columns: int) -> str:
    """Return a text with its lines broken between words to fit so many columns.

    A command in backticks is a word of its own, so that it can be pasted. The excerpt of a file is cut, if the place
    that it marks can be seen then.
    """
    from textwrap import TextWrapper

    wrapper = TextWrapper(columns, break_on_hyphens=False, break_long_words=False)

    def fit(line: str, following: str) -> str:
        if len(line) <= columns:
            return line
        if re.match(_OF_AN_EXCERPT, line):
            return f"{line[: columns - 1]}…" if re.fullmatch(_MARK, following) and len(following) < columns else line
        wrapper.subsequent_indent = " " * (len(line) - len(line.lstrip()) + 2)
        return wrapper.fill(re.sub(_COMMAND, lambda command: command[0].replace(" ", "\0"), line)).replace("\0", " ")

    lines = text.split("\n")
    return "\n".join(map(fit, lines, [*lines[1:], ""]))


def _escape(unseen: re.Match[str]) -> str:
    return r"\x23" if unseen[0] == "#" else unseen[0].encode("unicode_escape").decode()


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
