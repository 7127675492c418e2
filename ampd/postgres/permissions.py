"""The GRANT for a "permission denied", from the server's message."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .quoting import identifier

if TYPE_CHECKING:
    from .server_error import ServerError


# What aclcheck_error() of the server calls the common kinds, what GRANT calls them, and what a migration needs.
_RELATIONS = ("table", "view", "materialized view", "foreign table")
_ROUTINES = ("function", "procedure", "aggregate")
_GRANTS = {
    **dict.fromkeys(_RELATIONS, ("TABLE", "SELECT, INSERT, UPDATE, DELETE")),
    "sequence": ("SEQUENCE", "USAGE, SELECT, UPDATE"),
    "schema": ("SCHEMA", "USAGE, CREATE"),
    "database": ("DATABASE", "CREATE"),
    **dict.fromkeys(_ROUTINES, ("ROUTINE", "EXECUTE")),
}
_LONGEST_NAME = 63  # characters
_SEARCHED = 10_000  # characters of a statement: the rest of a long one is data


def grant_hint(error: ServerError, words: tuple[str, ...] = (), statement: str = "") -> str:
    """Return the GRANT for a "permission denied", from the server's message.

    `words` are the first ones of the statement: the server names a table, but neither its schema nor what was wanted.
    """
    role = identifier(error.role) if error.role else "the role"
    kinds = "|".join(_GRANTS)
    refused = re.fullmatch(f"(permission denied for|must be owner of) ({kinds}) (.+)", error.message, re.DOTALL)
    if not refused and error.message.startswith("must be owner of"):
        return f"migrate as its owner, or grant {role} the membership in the role that owns it"
    if not refused:
        return f"grant {role} the privilege that the message names, or migrate as a role that has it"
    what, kind, name = refused.groups()
    (word, privileges), where = _GRANTS[kind], ""
    if kind in _ROUTINES:  # without arguments, and with the schema where the statement gave it
        name = ".".join(map(identifier, name.split(".")))
    elif kind in (*_RELATIONS, "sequence"):
        schema = _schema_of(name, f"{statement[:_SEARCHED]}\n{error.context}")
        name = f"{schema}.{identifier(name)}" if schema else identifier(name)
        where = "" if schema else " (in its schema)"
    else:
        name = identifier(name)
    if what == "must be owner of":
        return f"as a superuser{where}: ALTER {word} {name} OWNER TO {role}; or migrate as the owner"
    if kind in _RELATIONS:
        privileges = _on_table(words) or privileges
    return f"as its owner{where}: GRANT {privileges} ON {word} {name} TO {role}"


def _schema_of(name: str, text: str) -> str | None:
    """Return the schema that SQL names with a table, quoted as there; None if it names none, or several."""
    spelt = rf"{re.escape(identifier(name))}|\b{re.escape(name)}(?![\w$])"
    schema = rf'"(?:[^"]|""){{1,{_LONGEST_NAME}}}"|\b[^\W\d][\w$]{{0,{_LONGEST_NAME}}}'
    found = re.findall(rf"(?:({schema})\s{{0,9}}\.\s{{0,9}})?(?:{spelt})", text)  # bounded, so that it is linear
    return found[0] if len(set(found)) == 1 and found[0] else None


def _on_table(words: tuple[str, ...]) -> str | None:
    """Return the privileges on a table that a statement needs, where they are not the usual ones."""
    match words:
        case ("TRUNCATE", *_):
            return "TRUNCATE"
        case ("CREATE", *rest) if "TRIGGER" in rest[:4]:
            return "TRIGGER"
        case ("CREATE" | "ALTER", *rest) if "TABLE" in rest[:3]:
            return "SELECT, REFERENCES"
    return None
