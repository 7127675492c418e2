"""Keeping passwords out of texts, and out of the local variables that error trackers collect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar

from .display import visible

# Whoever made a path of the URL has lost a slash.
_UP_TO_PASSWORD = r"(?=(\w:/{1,2}[^\s:/]*:))"  # one may begin within another
# `hide_password=False` is what a hint tells those who use SQLAlchemy.
_IN_QUERY = r"(?im)((?<!hide_)pass(?:w|%77)ord[ \t]{0,9}=[ \t]{0,9})(?:'(?:[^'\\\n]|\\.)*(?:'|$)|[^\s&]+)"
# PASSWORD '…' of CREATE ROLE and user mappings, in a statement that was cut without its end; '...' is of a hint.
_IN_SQL = (
    r"(?is)(\bpassword\s{0,9})(?!'\.\.\.')(?:(?:E|N|U&)?'(?:[^'\\]|''|\\.)*(?:'|\Z)|\$(\w{0,63})\$.*?(?:\$\2\$|\Z))"
)
_LONGEST, _SEARCHED = 20_000, 100_000  # characters of a text that are shown; no password is longer than the difference


def masked(text: str) -> str:
    """Return a text without the password of anything that looks like a URL, even where none belongs.

    What is longer than a person reads is cut. The time it takes grows with the length alone: a message of the
    server can contain what anybody has written.
    """
    text = text[:_SEARCHED]
    for password in _of_arguments:
        text = text.replace(password, ":***@")
    text = re.sub(_IN_SQL, r"\1***", re.sub(_IN_QUERY, r"\1***", _without_passwords(text)))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… (and more)"


_of_arguments = set[str]()


def learn_passwords(arguments: Iterable[str]) -> None:
    """Make `masked` know the password of an argument, in whatever form a message repeats the argument.

    In a text nobody can tell where the password of a malformed URL ends; in an argument it is at the last @.
    """
    for argument in arguments:
        for form in (argument, str(Path(argument))):
            *_, authority = re.split(":/{1,2}", form, maxsplit=1)
            password = authority.rpartition("@")[0].partition(":")[2]
            if password.strip("*"):
                _of_arguments.add(f":{password}@")


def shown(text: str) -> str:
    """Return a text as it may be shown: without passwords and invisible characters."""
    return visible(masked(text))


def _without_passwords(text: str) -> str:
    """Replace what stands between the colon and the @ of each URL: a password may contain an @ or a space."""
    # A password ends at the last @ before white space, else at the last one before a quote or the end of the line.
    word, line = _LastAt(text, r"\s"), _LastAt(text, r"""[\n'"]""")
    parts, done = list[str](), 0
    for url in re.finditer(_UP_TO_PASSWORD, text):
        if url.start() < done:
            continue
        begin = url.end(1)
        end = word.after(begin)
        end = line.after(begin) if end is None else end
        if end is not None:
            parts += (text[done:begin], "***@")
            done = end + 1
    return "".join((*parts, text[done:]))


class _LastAt:
    """Finds the last @ before the next match of a pattern, for places in ascending order: each stretch is read once."""

    def __init__(self, text: str, end: str) -> None:
        self._text = text
        self._end = re.compile(end)
        self._past = self._at = -1

    def after(self, place: int) -> int | None:
        """Return the offset of that @; None if there is none."""
        if place > self._past:
            found = self._end.search(self._text, place)
            self._past = found.start() if found else len(self._text)
            self._at = self._text.rfind("@", place, self._past)
        return self._at if self._at >= place else None


_HIDDEN = "***"
_WORTH_HIDING_IN_WORDS = 4  # characters: without a password `e` no message would be left to read


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return a text with each of the secrets replaced; a very short one only where it is a word of its own."""
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        if len(secret) < _WORTH_HIDING_IN_WORDS:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", _HIDDEN, text)
        else:
            text = text.replace(secret, _HIDDEN)
    return text


T = TypeVar("T")
P = ParamSpec("P")
Error = TypeVar("Error", bound=BaseException)


class Hidden(Generic[T]):
    """A value that neither `repr()` nor a list of attributes shows."""

    __slots__ = ("reveal",)

    def __init__(self, value: T) -> None:
        self.reveal: Callable[[], T] = lambda: value

    def __repr__(self) -> str:
        return "Hidden(***)"


def without_frames(error: Error, *packages: str) -> Error:
    """Return an error after removing the frames of packages, or all, from it and from its causes."""
    left: list[BaseException | None] = [error]
    seen = set[int]()
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = _without(each.__traceback__, packages)
            left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
    return error


def _without(traceback: TracebackType | None, packages: tuple[str, ...]) -> TracebackType | None:
    kept = []
    while traceback is not None and packages:
        if str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0] not in packages:
            kept.append(traceback)
        traceback = traceback.tb_next
    following: TracebackType | None = None
    for each in reversed(kept):
        following = TracebackType(following, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return following


def discreet(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function raise its errors without the frames that its arguments were in."""

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return function(*arguments, **options)
        except Exception as error:
            failure = without_frames(error)
        del arguments, options
        try:
            raise failure
        finally:
            del failure  # which would refer to itself by way of this frame

    return call
