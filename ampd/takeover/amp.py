"""amp's own database, which its Rust ampd has migrated with sqlx: 28 migrations there, seven packaged ones here.

Their files have nothing in common, so neither names nor checksums of ours can be proof. Proof is that sqlx's history is
the one of amp of 2026-03, row by row, and that the live catalog has each fact that the packaged migrations make and no
other, names of constraints and indexes aside.
"""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files
from typing import TYPE_CHECKING

from ampd.display import one_line
from ampd.postgres.quoting import do_block, identifier, literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ampd.postgres.connection import Session

    from .tools import Row


NEWEST = 20260310090000  # the last of the packaged migrations that amp's 28 add up to; they are never changed


def _lines(name: str) -> list[str]:
    return (files("ampd.takeover") / name).read_text(encoding="utf-8").splitlines()


def amp_history() -> dict[str, tuple[str, str]]:
    """Return description and SHA-384 of each of amp's migrations, by version."""
    rows = (line.split("\t") for line in _lines("amp_history.tsv"))
    return {version: (description, checksum) for version, description, checksum in rows}


def packaged_facts() -> list[str]:
    """Return what the catalog says of the tables that the packaged migrations make, up to NEWEST."""
    return _lines("amp_catalog.txt")


def history_problems(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return where sqlx's history is not that of amp of 2026-03: what is not as there, and what is still to come."""
    known, other = amp_history(), []
    for row in rows:
        name, checksum = known.pop(row.version, (None, None))
        if not row.is_done:
            other.append(row.undone)
        elif name is None:
            other.append(f"{row.label} is none of amp's migrations of 2026-03")
        elif row.name != name:
            other.append(f"{row.label} is called {name} by amp")
        elif row.checksum != checksum:
            other.append(f"{row.label} has another SHA-384 than amp's")
    return other, [f"{version} {name} is not applied" for version, (name, _) in known.items()]


def catalog_problems(facts: Sequence[str]) -> list[str]:
    """Return where a catalog is not the packaged one: what it lacks after a minus, what it has instead after a plus."""
    expected, found = (Counter(map(_spelt, each)) for each in (packaged_facts(), facts))
    tables = {fact.partition(":")[0] for fact in found}
    absent = sorted({fact.partition(":")[0] for fact in expected} - tables)
    changes = [("-", fact) for fact in (expected - found).elements() if fact.partition(":")[0] in tables]
    changes += [("+", fact) for fact in (found - expected).elements()]
    changes.sort(key=lambda change: (change[1].split()[:2], change[0] == "+", change))  # table, and column or kind
    return [*(f"- {table}: the table" for table in absent), *(f"{sign} {one_line(fact)}" for sign, fact in changes)]


async def read_facts(session: Session, schema: str) -> list[str]:
    """Read what the catalog says of the tables in a schema that have the names of amp's, a line for each fact."""
    names = ", ".join(sorted({literal(fact.partition(":")[0]) for fact in packaged_facts()}))
    named = "'^CREATE (UNIQUE )?INDEX .*? USING '"
    home = f"quote_ident({literal(schema)}) || '.'"
    # With the path pinned, whatever is in the schema is printed with its name before it.
    document = f"""(SELECT coalesce(jsonb_agg(concat(c.relname, ': ', replace(fact, {home}, ''))), '[]')
    FROM pg_class c, LATERAL (
      SELECT concat_ws(' ', attname, format_type(atttypid, atttypmod),
          CASE WHEN attcollation <> typcollation THEN 'collate ' || attcollation::regcollation END,
          CASE WHEN attnotnull THEN 'not null' END,
          CASE attidentity WHEN 'a' THEN 'identity always' WHEN 'd' THEN 'identity by default' END,
          CASE attgenerated WHEN '' THEN 'default ' ELSE 'generated ' END || pg_get_expr(adbin, adrelid))
        FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
      UNION ALL SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = c.oid AND contype NOT IN ('n', 't')
      UNION ALL SELECT concat(regexp_replace(pg_get_indexdef(indexrelid), {named}, '\\1index '),
          CASE WHEN NOT indisvalid THEN ' INVALID' END)
        FROM pg_index WHERE indrelid = c.oid
          AND indexrelid NOT IN (SELECT conindid FROM pg_constraint WHERE conrelid = c.oid)
      UNION ALL SELECT concat('trigger ', tgname) FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal
      UNION ALL SELECT concat('rule ', rulename) FROM pg_rewrite WHERE ev_class = c.oid
      UNION ALL SELECT 'is no plain table' WHERE c.relkind <> 'r' OR c.relispartition) _ (fact)
    WHERE c.relnamespace = to_regnamespace({literal(identifier(schema))}) AND c.relname = ANY (ARRAY[{names}])
      AND c.relkind IN ('r', 'p', 'v', 'm', 'f'))"""
    body = f"""
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
          pg_catalog.set_config('statement_timeout', '30s', true);
  {session.note_sql(document)}
END"""
    message = f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {do_block(body)}; COMMIT"
    facts = await session.ask(message, list[str])
    return [fact.replace("timezone('utc'::text, now())", _IN_UTC) for fact in facts]  # as PostgreSQL 13 has it


_IN_UTC = "(now() AT TIME ZONE 'utc'::text)"


_NOW = re.compile(rf"{re.escape(_IN_UTC)}|timezone\('utc'::text, now\(\)\)|CURRENT_TIMESTAMP", re.IGNORECASE)


def _spelt(fact: str) -> str:
    """Return a fact with the current time in one of the four spellings that amp's migrations have.

    For a column with a time zone, and for a check, the time in UTC counts as the same: it is, on a server in UTC.
    """
    return _NOW.sub("now()", fact) if " timestamp with time zone " in fact or ": CHECK " in fact else fact
