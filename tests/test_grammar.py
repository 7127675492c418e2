"""A statement of every kind that PostgreSQL has: taken apart as its own parser does, and judged as its servers do."""

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pglast import ast, parse_sql

from ampd.sql.checks import problems
from ampd.sql.splitter import split
from tests.repetition import examples
from tests.servers import Database
from tests.sql_texts import accepted, assert_split_as_postgresql_does
from tests.statements import SETTING, STATEMENTS

OUTSIDE = " cannot run inside a transaction block"
SEPARATORS = (";", ";\n", " ; ", ";;", "; -- it's;\n", ";/* ; /* ; */ ' */", "\n;\r\n\t")
PARTS = {"PLAssignStmt", "RawStmt", "ReplicaIdentityStmt", "ReturnStmt", "SetOperationStmt"}  # of others, or PL/pgSQL's


def test_every_statement_is_whole() -> None:
    """Each is one statement, from its first character to its last, to PostgreSQL's parser and to ours."""
    for text in STATEMENTS:
        assert accepted(text), text
        assert [statement.text for statement in split(f"\n{text}\n;")] == [text]
        assert_split_as_postgresql_does(f" {text} ;{text}")


def test_every_kind_of_statement_is_among_them() -> None:
    """No kind of statement that the grammar has is left out."""
    kinds = {type(raw.stmt).__name__ for text in STATEMENTS for raw in parse_sql(text)}
    known = {name for name in dir(ast) if name.endswith("Stmt")}
    assert known - kinds == PARTS


@given(st.lists(st.tuples(st.sampled_from(STATEMENTS), st.sampled_from(SEPARATORS)), max_size=8))
@examples(80)
def test_scripts_of_all_kinds_are_taken_apart_as_by_postgresql(pieces: list[tuple[str, str]]) -> None:
    """Whatever stands beside whatever, each statement ends where PostgreSQL ends it."""
    script = "".join(text + separator for text, separator in pieces)
    assert_split_as_postgresql_does(script)
    assert [statement.text for statement in split(script)] == [text for text, _ in pieces]
    assert [each.offset for each in problems(script, transactional=False) if "unterminated" in each.message] == []


def cannot_be_tried(text: str) -> bool:
    """Return whether a statement ends the transaction that it is tried in, sets its mode, or waits for a client."""
    found = [each.message for each in problems(text, transactional=True)]
    control = any("runs in one transaction" in each or "before any query" in each for each in found)
    return control or text.startswith("SET TRANSACTION") or (text.startswith("COPY") and "STD" in text)


async def refused(connection: asyncpg.Connection, text: str) -> str | None:
    """Return the SQLSTATE of the error that a statement ends in, inside of a transaction."""
    await connection.execute("SAVEPOINT tried")
    try:
        await connection.execute(text)
    except asyncpg.PostgresError as error:
        return str(error.sqlstate)
    finally:
        await connection.execute("ROLLBACK TO tried")
    return None


@pytest.mark.anyio
async def test_what_runs_in_no_transaction_block_is_what_the_server_refuses_there(database: Database) -> None:
    """A statement is held to need its own transaction if, and only if, the server says so."""
    tried = [text for text in STATEMENTS if not cannot_be_tried(text)]
    if database.server.major < 14:  # it refreshed subscriptions in a transaction block
        tried = [text for text in tried if not text.startswith("ALTER SUBSCRIPTION")]
    wrong = []
    async with database.connect() as connection:
        await connection.execute("BEGIN")
        for statement in SETTING:
            await connection.execute(statement)
        for text in tried:
            sqlstate = await refused(connection, text)
            expected = any(each.message.endswith(OUTSIDE) for each in problems(text, transactional=True))
            if expected is not (sqlstate == "25001") and sqlstate != "42601":  # a grammar older than the statement
                wrong.append((text, expected, sqlstate))
        await connection.execute("ROLLBACK")
    assert wrong == []
    assert len(tried) > 300
