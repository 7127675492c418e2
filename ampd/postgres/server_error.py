"""An error of the server, with passwords taken out of its words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ampd.display import folded

if TYPE_CHECKING:
    from collections.abc import Callable


class ServerError(Exception):
    """What the server said of a message that it refused; `position` counts from 1 in the whole message."""

    def __init__(self, error: Any, redact: Callable[[str], str], role: str | None) -> None:
        self.role = role
        self.redact = redact
        self.message = folded(redact(error.message or str(error)))
        super().__init__(self.message)
        self.sqlstate: str = error.sqlstate
        self.detail = folded(redact(error.detail)) if error.detail else None
        self.hint = folded(redact(error.hint)) if error.hint else None
        self.position = int(error.position) if (error.position or "").isdecimal() else None
        self.context: str = error.context or ""
