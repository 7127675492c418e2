"""Keeping passwords out of tracebacks: error trackers collect the local variables of every frame."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
Error = TypeVar("Error", bound=BaseException)


class Hidden(Generic[T]):
    """A value that nobody sees who does not ask for it: neither `repr()` nor a list of attributes shows it."""

    __slots__ = ("reveal",)

    def __init__(self, value: T) -> None:
        self.reveal: Callable[[], T] = lambda: value

    def __repr__(self) -> str:
        return "Hidden(***)"


def without_frames(error: Error, *packages: str) -> Error:
    """Take the frames of packages, or all of them, out of an error and of whatever has led to it, and return it."""
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
    """Let a function raise its errors without the frames that its arguments have been through."""

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
