"""Events to a `logging.Logger`, for services whose logs are where people look."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from .errors import AmpdError
from .events import Event, Failed, Finished, OnEvent, ServerMessage, StatementStarted, Warned
from .redaction import shown

_SEVERITIES = {"DEBUG": logging.DEBUG, "WARNING": logging.WARNING, "ERROR": logging.ERROR}  # all others: INFO


def log_events(logger: logging.Logger | None = None) -> OnEvent:
    """Return a callback for `on_event=` that logs each event to a logger, by default the one called `ampd`.

    The text is that of the command line. The fields are attributes of the record, with `ampd_` before their names
    (`ampd_version`, and `ampd_event` for the event's class), in values that JSON knows. A statement is logged as DEBUG,
    a warning as WARNING, an error as ERROR, what the server says by its severity, all else as INFO. Sets no level and
    adds no handler.

    Raises:
        TypeError: it is no logger.
    """
    target = logging.getLogger("ampd") if logger is None else logger
    if not isinstance(target, logging.Logger):
        raise TypeError(f"log_events takes a logging.Logger, not {type(target).__name__}")

    def log(event: Event) -> None:
        level = _level(event)
        if target.isEnabledFor(level):
            target.log(level, "%s", shown(str(event)), extra=_fields(event))

    return log


def _level(event: Event) -> int:
    match event:
        case StatementStarted():
            return logging.DEBUG
        case Warned():
            return logging.WARNING
        case Failed() | Finished(error=AmpdError()):
            return logging.ERROR
        case ServerMessage():
            return _SEVERITIES.get(event.severity.rstrip("12345"), logging.INFO)
        case _:
            return logging.INFO


def _fields(event: Event) -> dict[str, Any]:
    """Return the fields under names that no attribute of a record has, nor one that a service gives its records."""
    fields = msgspec.to_builtins(event, enc_hook=AmpdError.fields)
    return {"ampd_event": type(event).__name__} | {f"ampd_{name}": _shown(value) for name, value in fields.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {name: _shown(each) for name, each in value.items()}
    return [_shown(each) for each in value] if isinstance(value, list | tuple) else value
