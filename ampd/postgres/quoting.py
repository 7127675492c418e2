"""SQL literals, identifiers and blocks, and the search path that is pinned for these. Pure."""

from __future__ import annotations

# A statement of PL/pgSQL: for the rest of the transaction nothing is looked up where a stranger can put anything.
PIN_SEARCH_PATH = "PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);"


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
