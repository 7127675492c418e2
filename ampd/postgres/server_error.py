"""An error of the server, without passwords, and each text of it bounded: anybody may have written it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ampd.display import folded
from ampd.sqlstates import INTERNAL_ERROR

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST_CONTEXT = 4000  # characters
_OF_THE_DRIVER = "NOTE: pgbouncer with pool_mode"  # on its own prepared statements, of which we use none


class ServerError(Exception):
    """The server's error for a message that it refused; `position` counts from 1 in the whole message."""

    def __init__(self, error: Any, redact: Callable[[str], str], role: str | None) -> None:
        self.role = role
        self.redact = redact
        self.message: str = folded(redact(error.message or str(error)))
        super().__init__(self.message)
        self.sqlstate: str = sqlstate_of(error) or INTERNAL_ERROR  # as of a server that has a bug
        self.detail: str | None = folded(redact(error.detail)) if error.detail else None
        hint = (error.hint or "").partition(_OF_THE_DRIVER)[0].rstrip()
        self.hint: str | None = folded(redact(hint)) if hint else None
        self.position: int | None = int(error.position) if re.fullmatch("[0-9]{1,9}", error.position or "") else None
        self.context: str = _cut(error.context or "")


def sqlstate_of(error: object) -> str | None:
    """Return the SQLSTATE of an error of the driver's, if it has a valid one."""
    sqlstate = getattr(error, "sqlstate", None)
    return sqlstate if sqlstate and re.fullmatch("[0-9A-Z]{5}", sqlstate) else None


def _cut(context: str) -> str:
    """Return both ends of a long context: the innermost call comes first, and the outermost last."""
    half = _LARGEST_CONTEXT // 2
    return context if len(context) <= _LARGEST_CONTEXT else f"{context[:half]}\n{context[-half:]}"
