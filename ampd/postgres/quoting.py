"""SQL literals, identifiers and blocks. Pure."""

from __future__ import annotations


def literal(value: str | None) -> str:
    """Return an SQL string literal, exact whatever `standard_conforming_strings` says."""
    if value is None:
        return "NULL"
    quoted = value.replace("'", "''")
    return "E'" + quoted.replace("\\", "\\\\") + "'" if "\\" in quoted else f"'{quoted}'"


def identifier(name: str) -> str:
    """Return a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def do_block(body: str) -> str:
    """Return a DO statement around a PL/pgSQL body, in a dollar quote that the body does not contain."""
    tag, number = "$ampd$", 1
    while tag in body:
        tag, number = f"$ampd{number}$", number + 1
    return f"DO {tag}{body}{tag}"
