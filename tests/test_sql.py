"""The SQL lexer: literal tables, PostgreSQL's own parser as the judge, and laws over arbitrary text."""

import os
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pglast import parser

from ampd.sql import scanner, splitter
from ampd.sql.checks import Caution, problems
from ampd.sql.kinds import (
    IndexBuild,
    Kind,
    code_block,
    dropped_indexes,
    ends_transaction,
    index_build,
    is_concurrent,
    is_set_config,
    kind,
    mentions,
    role,
    savepoint,
    sets_transaction,
    setting,
    temporary,
)
from ampd.sql.location import excerpt, locate
from ampd.sql.scanner import Statement
from ampd.sql.splitter import split
from tests.repetition import examples

NASTY = (
    "SELECT 'a;''b'; SELECT E'it\\'s;\\\\'; SELECT 'c:\\';SELECT e'\\\\';",
    "SELECT 'one;'\n  'two;' ; SELECT E'\\''\n\n'\\';' -- joined; \n ';\\'' ; SELECT 2",
    "SELECT 'a' -- c'omment;\n'b\\';SELECT E'a' -- it's\n'\\';';SELECT 3",
    "SELECT U&'d\\0061t;' , u&'!0061' UESCAPE '!', B'01' , X'1F', N'n;\\';SELECT b'1'\n'0'",
    'SELECT "a;""b", U&"\\0441;" FROM "t;"; SELECT "E\'"',
    "/* a; /* b; */ c; */ SELECT 1 /* ' */ ; /*/ ;*/ /**/ SELECT 2 /***/; SELECT 3 /* /*/**/*/ ; */",
    "-- ' ; \"\nSELECT 1 -- one;\r + 2; --;\n--\nSELECT 2--",
    "SELECT $$;$$, $a$;$b$;$$;$a$, $é_1$;$é$;$é_1$; SELECT $a$$a$; SELECT $_$ $a$_ $_$",
    "CREATE TABLE a$b$c (x$1 int, é$ë$ int); SELECT x$1 FROM a$b$c; SELECT 1",
    "PREPARE p AS SELECT $1,$2::text; SELECT $1+$$;$$; SELECT 1-$$;$$; SELECT $1",
    "SELECT 1--;\n, 2 */* ; */ 3; SELECT 4 @-/*;*/ 5; SELECT 6 +--;\n 7; SELECT '{}'::jsonb #>> '{a}' ?| ARRAY['x']",
    "CREATE RULE r AS ON INSERT TO t DO ALSO (INSERT INTO u VALUES (1); DELETE FROM v;); SELECT 1",
    "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 2 END; END; SELECT 1",
    "create or replace procedure p() begin /* ; */ atomic end; select 1",
    "CREATE FUNCTION f(a int) RETURNS int LANGUAGE sql BEGIN ATOMIC\n"
    "  SELECT t.end, t.case, t.begin, 1 AS end, 2 AS case FROM t;\n"
    "  SELECT CASE WHEN a > 0 THEN CASE a WHEN 1 THEN 2 END ELSE 3 END;\n"
    "  RETURN 1;;\nEND; SELECT 2",
    "CREATE FUNCTION f() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT 1 end; SELECT 'END;'; END; SELECT 3",
    "CREATE FUNCTION f() RETURNS xml BEGIN ATOMIC SELECT xmlelement(name end); RETURN NULL; END; SELECT 4",
    "CREATE FUNCTION begin() RETURNS int RETURN 1; BEGIN; SELECT 1; END; BEGIN WORK; COMMIT",
    "CREATE TABLE atomic (begin int, atomic int); SELECT begin, atomic FROM atomic; BEGIN; END",
    "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $f$ BEGIN PERFORM $q$;$q$; END; $f$; DO $$BEGIN NULL; END$$",
    ";;; SELECT 1 ;; /* nothing */ ; -- nothing\n;",
    "SELECT (1), ((';')), (SELECT max(x) FROM (VALUES (1), (2)) v (x)); SELECT (ARRAY[1])[1]",
    "\tSELECT\f1\v;\r\nSELECT 'é;ß', '日本;' AS \"名;\", größe FROM straße;SELECT 1",
    "SELECT 1e10, .5, 1., 0x1F, 1_000; SELECT 1.5e-3;SELECT a.b.c,a[1:2], x::int4 FROM a",
    "SELECT e, E, e.e FROM e; SELECT 1 AS e; SELECT e''",
    "SELECT ''''; SELECT ''''''; SELECT E''''; SELECT ''",
)


def assert_split_as_postgresql_does(script: str) -> None:
    """Hold our statements' starts against PostgreSQL's parser, and their ends against its scanner."""
    tokens = [token for token in parser.scan(script) if token.name not in ("SQL_COMMENT", "C_COMMENT", "ASCII_59")]
    starts = [raw.stmt_location or 0 for raw in parser.parse_sql(script)]
    expected = []
    for start, following in pairwise((*starts, len(script))):
        expected.append((start, max(token.end + 1 for token in tokens if start <= token.start < following)))
    assert [(statement.start, statement.end) for statement in split(script)] == expected


def accepted(script: str) -> bool:
    """Tell whether PostgreSQL's parser takes a script."""
    try:
        parser.parse_sql(script)
    except parser.ParseError:
        return False
    return True


def only(script: str) -> Statement:
    """Take the one statement of a script."""
    (statement,) = split(script)
    return statement


def messages(script: str, *, transactional: bool = True) -> list[tuple[int, int, str]]:
    """Reduce the problems of a script to line, column and message."""
    return [(each.line, each.column, each.message) for each in problems(script, transactional=transactional)]


# Splitting


@pytest.mark.parametrize("script", NASTY)
def test_statements_end_where_postgresql_ends_them(script: str) -> None:
    """Every nasty construct is split exactly as by PostgreSQL's own parser."""
    assert_split_as_postgresql_does(script)


def test_a_statement_knows_its_place_and_its_words() -> None:
    """A statement carries its text without semicolon and outer comments, its place and its leading words."""
    script = '-- first\ncreate Unique index if not exists i /* x */ ON t (a) -- why\n;\n\nDROP TABLE "ON" ;'
    assert split(script) == (
        Statement(
            text="create Unique index if not exists i /* x */ ON t (a)",
            start=9,
            end=61,
            line=2,
            words=("CREATE", "UNIQUE", "INDEX", "IF", "NOT", "EXISTS", "I", "ON"),
        ),
        Statement(text='DROP TABLE "ON"', start=72, end=87, line=5, words=("DROP", "TABLE")),
    )


@pytest.mark.parametrize("script", ["", " \n\t", ";", ";;\n;", "-- nothing", "/* nothing; */", "--\r;--\n/**/;"])
def test_empty_statements_are_dropped(script: str) -> None:
    """Comments, white space and lone semicolons are no statements."""
    assert split(script) == ()


def test_words_fold_like_keywords() -> None:
    """Only ASCII letters fold, so a look-alike letter never makes a keyword."""
    assert only("\u017fet beg\u0131n x").words == ("\u017fET", "BEG\u0131N", "X")
    assert only("straße é").words == ("STRAßE", "é")


@pytest.mark.parametrize(
    ("script", "texts"),
    [
        ("\\connect db\nSELECT 1;", ["\\connect db", "SELECT 1"]),
        ("SELECT 1 \\gset\n; SELECT 2", ["SELECT 1 \\gset", "SELECT 2"]),
        ("SELECT 1; SELECT 'a; b", ["SELECT 1", "SELECT 'a; b"]),
        ("SELECT 1; SELECT E'a\\'; b", ["SELECT 1", "SELECT E'a\\'; b"]),
        ("SELECT 1; SELECT 'a''; b", ["SELECT 1", "SELECT 'a''; b"]),
        ("SELECT 1; /* a; /* b; */", ["SELECT 1", "/* a; /* b; */"]),
        ("SELECT $a$ ; $b$ ; $", ["SELECT $a$ ; $b$ ; $"]),
        ("SELECT (1; SELECT 2", ["SELECT (1; SELECT 2"]),
        ("SELECT 1); SELECT 2", ["SELECT 1)", "SELECT 2"]),
        ("CREATE FUNCTION f() BEGIN ATOMIC SELECT CASE; END; SELECT 2", None),
        ("SELECT $a; SELECT 2$; SELECT 3", ["SELECT $a", "SELECT 2$", "SELECT 3"]),
    ],
)
def test_what_is_no_sql_degrades_gracefully(script: str, texts: list[str] | None) -> None:
    """Text that PostgreSQL would refuse still comes apart without loss, in the most useful way."""
    found = [statement.text for statement in split(script)]
    assert found == (texts or ["CREATE FUNCTION f() BEGIN ATOMIC SELECT CASE; END", "SELECT 2"])


# Classification


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SELECT 1", Kind.TRANSACTIONAL),
        ("(SELECT 1)", Kind.TRANSACTIONAL),
        ("CREATE INDEX i ON t (a)", Kind.TRANSACTIONAL),
        ('CREATE INDEX "concurrently" ON t (a)', Kind.TRANSACTIONAL),
        ("REFRESH MATERIALIZED VIEW CONCURRENTLY v", Kind.TRANSACTIONAL),
        ("begin", Kind.BEGIN),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE", Kind.BEGIN),
        ("START /**/ TRANSACTION READ ONLY", Kind.BEGIN),
        ("COMMIT", Kind.COMMIT),
        ("END WORK", Kind.COMMIT),
        ("ROLLBACK", Kind.ROLLBACK),
        ("abort", Kind.ROLLBACK),
        ("ROLLBACK TO SAVEPOINT s", Kind.TRANSACTIONAL),
        ("ROLLBACK WORK TO s", Kind.TRANSACTIONAL),
        ("SAVEPOINT s", Kind.TRANSACTIONAL),
        ("RELEASE s", Kind.TRANSACTIONAL),
        ("PREPARE TRANSACTION 'x'", Kind.NOT_RESUMABLE),
        ("COMMIT PREPARED 'x'", Kind.NOT_RESUMABLE),
        ("ROLLBACK PREPARED 'x'", Kind.NOT_RESUMABLE),
        ("PREPARE p AS SELECT 1", Kind.TRANSACTIONAL),
        ("PREPARE transaction AS SELECT 1", Kind.TRANSACTIONAL),
        ("PREPARE transaction (int) AS SELECT 1", Kind.TRANSACTIONAL),
        ("PREPARE TRANSACTION U&'x'", Kind.NOT_RESUMABLE),
        ("CREATE UNIQUE INDEX CONCURRENTLY i ON t (a)", Kind.CREATE_INDEX_CONCURRENTLY),
        ("create index concurrently on t (a)", Kind.CREATE_INDEX_CONCURRENTLY),
        ("DROP INDEX CONCURRENTLY IF EXISTS i", Kind.DROP_INDEX_CONCURRENTLY),
        ("DROP INDEX i", Kind.TRANSACTIONAL),
        ("VACUUM", Kind.IDEMPOTENT),
        ("VACUUM (FULL) t", Kind.IDEMPOTENT),
        ("REINDEX INDEX CONCURRENTLY i", Kind.IDEMPOTENT),
        ("REINDEX (VERBOSE) TABLE CONCURRENTLY t", Kind.IDEMPOTENT),
        ("REINDEX (CONCURRENTLY, VERBOSE) TABLE t", Kind.IDEMPOTENT),
        ("REINDEX (VERBOSE, CONCURRENTLY true) TABLE t", Kind.IDEMPOTENT),
        ('REINDEX ("concurrently") TABLE t', Kind.IDEMPOTENT),
        ("REINDEX (CONCURRENTLY off, VERBOSE) TABLE t", Kind.IDEMPOTENT),
        ("REINDEX (CONCURRENTLY 0) TABLE t", Kind.IDEMPOTENT),
        ("REINDEX (CONCURRENTLY 'false') TABLE t", Kind.IDEMPOTENT),
        ('REINDEX TABLE "concurrently"', Kind.IDEMPOTENT),
        ("REINDEX TABLE t", Kind.IDEMPOTENT),
        ("REINDEX SCHEMA s", Kind.IDEMPOTENT),
        ("REINDEX (VERBOSE) DATABASE d", Kind.IDEMPOTENT),
        ("REINDEX SYSTEM", Kind.IDEMPOTENT),
        ("CLUSTER", Kind.IDEMPOTENT),
        ("CLUSTER VERBOSE", Kind.IDEMPOTENT),
        ("CLUSTER (VERBOSE)", Kind.IDEMPOTENT),
        ("CLUSTER VERBOSE t", Kind.IDEMPOTENT),
        ("CLUSTER (VERBOSE) t USING i", Kind.IDEMPOTENT),
        ('CLUSTER "verbose"', Kind.IDEMPOTENT),
        ("ALTER SYSTEM SET work_mem = 1", Kind.IDEMPOTENT),
        ("DISCARD ALL", Kind.IDEMPOTENT),
        ("DISCARD PLANS", Kind.SESSION),
        ("DROP DATABASE IF EXISTS d", Kind.IDEMPOTENT),
        ("DROP DATABASE d", Kind.NOT_RESUMABLE),
        ("DROP TABLESPACE IF EXISTS s", Kind.IDEMPOTENT),
        ("DROP TABLESPACE s", Kind.NOT_RESUMABLE),
        ("DROP SUBSCRIPTION s", Kind.NOT_RESUMABLE),
        ("DROP SUBSCRIPTION IF EXISTS s", Kind.IDEMPOTENT),
        ("CREATE DATABASE d", Kind.NOT_RESUMABLE),
        ("CREATE TABLESPACE s LOCATION '/x'", Kind.NOT_RESUMABLE),
        ('ALTER DATABASE "my db" SET TABLESPACE s', Kind.NOT_RESUMABLE),
        ('ALTER DATABASE U&"d" SET TABLESPACE s', Kind.NOT_RESUMABLE),
        ("ALTER DATABASE U&\"!0064\" UESCAPE '!' SET TABLESPACE s", Kind.NOT_RESUMABLE),
        ("ALTER DATABASE d WITH TABLESPACE s", Kind.NOT_RESUMABLE),
        ("alter database tablespace with tablespace = 's'", Kind.NOT_RESUMABLE),
        ('ALTER DATABASE "d d" TABLESPACE s', Kind.NOT_RESUMABLE),
        ('ALTER DATABASE d "tablespace" = s', Kind.NOT_RESUMABLE),
        ("ALTER DATABASE U&\"!0064\" UESCAPE '!' WITH TABLESPACE s", Kind.NOT_RESUMABLE),
        ("ALTER DATABASE d SET work_mem = 1", Kind.TRANSACTIONAL),
        ("ALTER DATABASE d SET default_tablespace = tablespace", Kind.TRANSACTIONAL),
        ("ALTER DATABASE tablespace WITH CONNECTION LIMIT 5", Kind.TRANSACTIONAL),
        ("ALTER DATABASE d RENAME TO tablespace", Kind.TRANSACTIONAL),
        ("ALTER DATABASE d OWNER TO tablespace", Kind.TRANSACTIONAL),
        ('ALTER DATABASE d OWNER TO "set tablespace"', Kind.TRANSACTIONAL),
        ('ALTER TABLE ONLY a.t DETACH PARTITION a."p 1" CONCURRENTLY', Kind.NOT_RESUMABLE),
        ('ALTER TABLE t * DETACH PARTITION U&"p" CONCURRENTLY', Kind.NOT_RESUMABLE),
        ("ALTER TABLE U&\"!0064\" UESCAPE '!' DETACH PARTITION p CONCURRENTLY", Kind.NOT_RESUMABLE),
        ("ALTER TABLE IF EXISTS t DETACH PARTITION p FINALIZE", Kind.TRANSACTIONAL),
        ("ALTER TABLE t DETACH PARTITION p", Kind.TRANSACTIONAL),
        ('ALTER TABLE t DETACH PARTITION "p CONCURRENTLY"', Kind.TRANSACTIONAL),
        ("CREATE SUBSCRIPTION s CONNECTION 'host=x' PUBLICATION p", Kind.NOT_RESUMABLE),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (enabled, create_slot = true)", Kind.NOT_RESUMABLE),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (create_slot = false)", Kind.TRANSACTIONAL),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p, q WITH (enabled=off, connect='off')", Kind.TRANSACTIONAL),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (\"create_slot\" = false)", Kind.TRANSACTIONAL),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (slot_name = create_slot)", Kind.NOT_RESUMABLE),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (binary = false)", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s REFRESH PUBLICATION", Kind.NOT_RESUMABLE),
        ('ALTER SUBSCRIPTION U&"s" REFRESH PUBLICATION WITH (copy_data = false)', Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET PUBLICATION p, q", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s ADD PUBLICATION p WITH (copy_data = false)", Kind.NOT_RESUMABLE),
        ('ALTER SUBSCRIPTION "S" DROP PUBLICATION p WITH (refresh)', Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET PUBLICATION refresh WITH (refresh = on)", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET PUBLICATION p WITH (refresh = false)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s ADD PUBLICATION p WITH (copy_data, \"refresh\" = 'off')", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s DROP PUBLICATION p WITH (refresh = 0)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s SET (failover = true)", Kind.NOT_RESUMABLE),
        ('ALTER SUBSCRIPTION s SET (binary, "failover" = false)', Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET (binary = off, two_phase = off)", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET (two_phase = true)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s SET (slot_name = failover)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s SET (binary = false)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s DISABLE", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s RENAME TO refresh", Kind.TRANSACTIONAL),
        ("CALL p()", Kind.NOT_RESUMABLE),
        ("DO $$ BEGIN NULL; END $$", Kind.NOT_RESUMABLE),
        ("SET search_path = a", Kind.SESSION),
        ("SET SESSION AUTHORIZATION joe", Kind.SESSION),
        ("SET LOCAL lock_timeout = 1", Kind.TRANSACTIONAL),
        ("SET TRANSACTION READ ONLY", Kind.TRANSACTIONAL),
        ("SET SESSION TRANSACTION READ ONLY", Kind.TRANSACTIONAL),
        ("SET transaction_isolation = 'serializable'", Kind.TRANSACTIONAL),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", Kind.SESSION),
        ("SET CONSTRAINTS ALL DEFERRED", Kind.TRANSACTIONAL),
        ("RESET ALL", Kind.SESSION),
        ("LISTEN c", Kind.SESSION),
        ("UNLISTEN *", Kind.SESSION),
        ("LOAD 'x'", Kind.SESSION),
    ],
)
def test_kind_tells_how_a_statement_can_be_run(script: str, expected: Kind) -> None:
    """Each statement has the kind that the no-transaction runner acts on, and PostgreSQL's parser takes it."""
    assert accepted(script)
    assert kind(only(script)) is expected


def test_what_newer_servers_refuse_in_a_transaction_is_known() -> None:
    """A form that PostgreSQL's parser here does not know yet has its kind too."""
    assert kind(only("ALTER SUBSCRIPTION s REFRESH SEQUENCES")) is Kind.NOT_RESUMABLE


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET PUBLICATION p WITH", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET", Kind.TRANSACTIONAL),
        ("ALTER TABLE t DETACH PARTITION", Kind.TRANSACTIONAL),
        ("COPY t FROM", Kind.TRANSACTIONAL),
    ],
)
def test_a_kind_is_found_in_linear_time(script: str, expected: Kind) -> None:
    """However often the key words of a statement recur, each is looked at once; else this takes minutes."""
    tail = " ".join(script.split()[-2:])
    assert kind(only(f"{script} {f'(a = b, {tail} ' * 30_000}")) is expected


def test_statements_are_found_in_linear_time() -> None:
    """However often a routine's body seems to begin, the statement is looked at once; else this takes minutes."""
    for piece in ("begin atomic ", "CREATE FUNCTION f() BEGIN ATOMIC "):
        assert len(split(piece * 100_000)) == 1


def test_problems_are_found_in_linear_time() -> None:
    """The lines before a problem are not counted anew for each; else this takes minutes."""
    found = problems("\\x\n" * 100_000, transactional=True)
    assert (found[-1].line, found[-1].column) == (100_000, 1)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("COMMIT", True),
        ("END TRANSACTION", True),
        ("rollback work", True),
        ("ABORT", True),
        ("PREPARE TRANSACTION 'x'", True),
        ("COMMIT AND NO CHAIN", True),
        ("COMMIT AND CHAIN", False),
        ("ROLLBACK TRANSACTION AND CHAIN", False),
        ("ROLLBACK TO s", False),
        ("ROLLBACK WORK TO SAVEPOINT s", False),
        ("COMMIT PREPARED 'x'", False),
        ("ROLLBACK PREPARED 'x'", False),
        ("PREPARE p AS SELECT 1", False),
        ("BEGIN", False),
        ("SELECT 1", False),
    ],
)
def test_ends_transaction_knows_what_leaves_no_transaction_open(script: str, expected: bool) -> None:
    """After a statement that ends its transaction none is open, which AND CHAIN and savepoints do not achieve."""
    assert accepted(script)
    assert ends_transaction(only(script)) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("set /**/ transaction isolation level serializable", True),
        ("SET LOCAL TRANSACTION READ ONLY", True),
        ("SET SESSION TRANSACTION NOT DEFERRABLE", True),
        ("SET TRANSACTION SNAPSHOT '00000003-0000001B-1'", True),
        ("SET TRANSACTION READ WRITE", True),
        ("SET transaction_deferrable = on", True),
        ("SET LOCAL \"Transaction_Isolation\" TO 'repeatable read'", True),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", False),
        ("SET default_transaction_isolation = 'serializable'", False),
        ("SET CONSTRAINTS ALL DEFERRED", False),
        ("SET transaction_timeout = 1", False),
        ("BEGIN READ ONLY", False),
    ],
)
def test_sets_transaction_knows_what_must_stand_before_any_query(script: str, expected: bool) -> None:
    """Whatever sets the mode of the transaction itself is told from what sets that of others."""
    assert accepted(script)
    assert sets_transaction(only(script)) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SET Search_Path = a, b", "search_path"),
        ("set session \"Work_Mem\" to '1MB'", "work_mem"),
        ("SET amp.Owner.Id = '7'", "amp.owner.id"),
        ("SET lock_timeout TO DEFAULT", "lock_timeout"),
        ("RESET statement_timeout", "statement_timeout"),
        ("RESET amp.owner", "amp.owner"),
        ("RESET ALL", "all"),
        ("SET ROLE joe", "role"),
        ("SET role = joe", "role"),
        ("RESET ROLE", "role"),
        ("SET SESSION AUTHORIZATION joe", "session_authorization"),
        ("SET SESSION SESSION AUTHORIZATION DEFAULT", "session_authorization"),
        ("SET session_authorization = joe", "session_authorization"),
        ("RESET SESSION AUTHORIZATION", "session_authorization"),
        ("SET TIME ZONE 'UTC'", "timezone"),
        ("SET SESSION TIME ZONE INTERVAL '1' HOUR", "timezone"),
        ("SET timezone = 'UTC'", "timezone"),
        ("RESET TIME ZONE", "timezone"),
        ("SET SCHEMA 'x'", "search_path"),
        ("SET NAMES 'utf8'", "client_encoding"),
        ("SET NAMES", "client_encoding"),
        ("SET XML OPTION DOCUMENT", "xmloption"),
        ("SET session = 1", "session"),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "session characteristics as transaction read only"),
        ("SET LOCAL search_path = a", None),
        ("SET TRANSACTION READ WRITE", None),
        ("SET transaction_isolation = 'serializable'", None),
        ("SET CONSTRAINTS ALL DEFERRED", None),
        ("LOAD 'x'", None),
        ("DISCARD PLANS", None),
        ("DISCARD ALL", None),
        ("SELECT set_config('search_path', 'a', false)", "search_path"),
        ("SELECT set_config('Standard_Conforming_Strings', 'on', false)", "standard_conforming_strings"),
        ("SELECT pg_catalog.set_config($a$role$a$, 'joe', 'off')", "role"),
        ("SELECT set_config(E'a.b', 'c', false)", "a.b"),
        ("SELECT set_config('search_path', 'a', true)", None),
        ("ALTER ROLE joe SET search_path = a", None),
        ("SELECT 1", None),
    ],
)
def test_setting_names_what_a_session_is_told(script: str, expected: str | None) -> None:
    """Each SET and RESET is known by the setting that it changes, however that is written."""
    assert accepted(script)
    assert setting(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("CREATE TEMP TABLE t ()", "t"),
        ("create local temporary table if not exists t as select 1", "t"),
        ("CREATE OR REPLACE TEMP VIEW v AS SELECT 1", "v"),
        ("CREATE TEMP SEQUENCE S", "s"),
        ("CREATE TABLE pg_temp.t ()", "t"),
        ("SELECT 1 INTO TEMP t", "t"),
        ("WITH a AS (SELECT 1) SELECT * INTO TEMPORARY TABLE t FROM a", "t"),
        ("CREATE TEMP TABLE t () ON COMMIT DROP", None),
        ("CREATE TABLE temp (temp int)", None),
        ("CREATE TABLE t (a text DEFAULT 'CREATE TEMP ')", None),
        ("INSERT INTO temp VALUES (1)", None),
        ("SELECT 1", None),
    ],
)
def test_what_is_temporary(script: str, expected: str | None) -> None:
    """What is made for the session alone is known by its name, since a later session would not find it."""
    assert accepted(script)
    assert temporary(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("DELETE FROM Jobs", True),
        ('DROP TABLE pg_temp."jobs"', True),
        ("DO $$BEGIN DELETE FROM jobs; END$$", True),
        ("SELECT nextval('jobs')", True),
        ('DELETE FROM "Jobs"', False),
        ("DELETE FROM jobs_2 -- jobs", False),
    ],
)
def test_what_mentions_a_name(script: str, expected: bool) -> None:
    """A name is found as the server would read it, and rather once too often than not."""
    assert accepted(script)
    assert mentions(only(script), "jobs") is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("CREATE INDEX CONCURRENTLY ON t (a)", True),
        ("DROP INDEX CONCURRENTLY i", True),
        ("REINDEX TABLE CONCURRENTLY t", True),
        ("REINDEX (CONCURRENTLY) TABLE t", True),
        ("ALTER TABLE p DETACH PARTITION c CONCURRENTLY", True),
        ("VACUUM", True),
        ("VACUUM (ANALYZE) t", True),
        ('VACUUM "full"', True),
        ("VACUUM FULL", False),
        ("VACUUM FULL t", False),
        ("VACUUM (ANALYZE, FULL) t", False),
        ("REINDEX (CONCURRENTLY false) TABLE t", False),
        ("REINDEX TABLE t", False),
        ("CLUSTER t", False),
        ("ALTER TABLE p DETACH PARTITION c", False),
        ("CREATE INDEX ON t (a)", False),
    ],
)
def test_what_waits_in_nobodys_way(script: str, expected: bool) -> None:
    """A lock that others would have to queue behind is told from one that they need not."""
    assert accepted(script)
    assert is_concurrent(only(script)) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SELECT 1", None),
        ("SET ROLE Joe", "joe"),
        ("SET SESSION ROLE 'Joe' -- the owner", "Joe"),
        ('SET LOCAL ROLE "Joe B"', "Joe B"),
        ("SET role TO joe", "joe"),
        ("SET SESSION AUTHORIZATION 'joe'; SELECT 1", "joe"),
        ("SET ROLE joe; SET ROLE jim", "jim"),
        ("SET ROLE joe; RESET ALL", "joe"),
        ("SET ROLE joe; RESET ROLE", None),
        ("SET ROLE joe; SET ROLE NONE", None),
        ("SET SESSION AUTHORIZATION joe; SET SESSION AUTHORIZATION DEFAULT", None),
        ("SET roles.of = 'a'", None),
    ],
)
def test_role_names_who_runs_what_follows(script: str, expected: str | None) -> None:
    """The role that a script has last taken on is known, however it was written."""
    assert accepted(script)
    assert role(split(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SAVEPOINT a", ("SAVEPOINT", "a")),
        ('SAVEPOINT "A b"', ("SAVEPOINT", "A b")),
        ("ROLLBACK TO A", ("ROLLBACK", "a")),
        ("ROLLBACK WORK TO SAVEPOINT a", ("ROLLBACK", "a")),
        ("RELEASE a", None),
        ("ROLLBACK", None),
    ],
)
def test_savepoint_names_it(script: str, expected: tuple[str, str] | None) -> None:
    """A savepoint goes by the name that the server gives it."""
    assert accepted(script)
    assert savepoint(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SELECT pg_catalog.set_config('search_path', '', false)", True),
        ("select /**/ SET_CONFIG ( 'a.b' , E'it\\'s; one' , FALSE ) ", True),
        ("SELECT set_config($$role$$, 'a rather long name', 'f')", True),
        ("SELECT set_config('search_path', '', true)", False),
        ("SELECT set_config('search_path', '', false), 1", False),
        ("SELECT set_config('search_path', '', false) FROM t", False),
        ("SELECT set_config('search_path', current_setting('x'), false)", False),
        ("SELECT set_config('search_path', 'a' || 'b', false)", False),
        ("SELECT set_config(name, '', false)", False),
        ("SELECT other.set_config('search_path', '', false)", False),
        ("SELECT 'set_config(1, 2, false)'", False),
        ("VALUES (set_config('search_path', '', false))", False),
    ],
)
def test_is_set_config_knows_a_setting_in_the_guise_of_a_query(script: str, expected: bool) -> None:
    """Only a lone call with literals for the session is one, which can be run again and does nothing else."""
    assert accepted(script)
    assert is_set_config(only(script)) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("CREATE INDEX CONCURRENTLY Idx ON Tbl (a)", IndexBuild("idx", ("tbl",))),
        ("CREATE INDEX CONCURRENTLY ON t USING gin (a)", IndexBuild(None, ("t",))),
        (
            'CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS "My ""Idx" ON ONLY "S ." . Ta/**/ (a)',
            IndexBuild('My "Idx', ("S .", "ta")),
        ),
        ('CREATE INDEX CONCURRENTLY "on" ON d.s."ON"(a)', IndexBuild("on", ("d", "s", "ON"))),
        ('CREATE INDEX CONCURRENTLY GRÖßE ON "a\nb" (x)', IndexBuild("grÖße", ("a\nb",))),
        (f"CREATE INDEX CONCURRENTLY {'ä' * 40} ON t (a)", IndexBuild("ä" * 31, ("t",))),
        ('CREATE INDEX CONCURRENTLY U&"\\0061" ON t (a)', None),
        ('CREATE INDEX CONCURRENTLY i ON U&"\\0061" (a)', None),
        ("CREATE INDEX i ON t (a)", None),
        ("SELECT 1", None),
    ],
)
def test_index_build_names_what_the_catalog_holds(script: str, expected: IndexBuild | None) -> None:
    """The index and table of a concurrent build are read as PostgreSQL folds, unquotes and cuts names."""
    assert accepted(script)
    assert index_build(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("DROP INDEX CONCURRENTLY i", (("i",),)),
        ('DROP INDEX CONCURRENTLY IF EXISTS A.i, "A . , b" RESTRICT', (("a", "i"), ("A . , b",))),
        ("DROP INDEX CONCURRENTLY x.y.z CASCADE", (("x", "y", "z"),)),
        ('DROP INDEX CONCURRENTLY U&"i"', ()),
        ("DROP INDEX i", ()),
    ],
)
def test_dropped_indexes_names_each(script: str, expected: tuple[tuple[str, ...], ...]) -> None:
    """Every index of a concurrent drop is named, part by part."""
    assert accepted(script)
    assert dropped_indexes(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("DO $$BEGIN END$$", "BEGIN END"),
        ("SELECT 1; do /* $$ */ LANGUAGE plpgsql -- $$\n $x$ $$;$$ $x$", " $$;$$ "),
        ("DO LANGUAGE 'plpgsql' $$x$$", "x"),
        ("DO $$x$$ LANGUAGE 'plpgsql'", "x"),
        ("DO '\nBEGIN\n  EXECUTE $$x$$;\nEND'", "\nBEGIN\n  EXECUTE $$x$$;\nEND"),
        ("DO '\nx := ''a'';\n'", "\nx := ''a'';\n"),
        ("DO 'BEGIN'\n' END'", None),
        ("DO '''a'''\n' END'", None),
        ("DO E'BEGIN\\n END'", None),
        ("CREATE FUNCTION f() RETURNS int AS $$x$$", None),
        ("SELECT $$x$$", None),
    ],
)
def test_code_block_is_the_code_of_a_do(script: str, expected: str | None) -> None:
    """The code is what stands in the quotes of whichever sort, and not what a comment or another option holds."""
    assert accepted(script)
    block = code_block(split(script)[-1])
    assert (block and script[slice(*block)]) == expected


# Problems


@pytest.mark.parametrize(
    "script",
    [
        *NASTY[:17],
        "SAVEPOINT s; ROLLBACK TO s; RELEASE SAVEPOINT s",
        "SET TRANSACTION READ WRITE; SET LOCAL TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE",
        "SET transaction_read_only TO 'no'; SET LOCAL transaction_isolation = 'Read Committed'",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY; SET default_transaction_read_only = on",
        "COPY t FROM '/tmp/stdin'; COPY (SELECT a FROM stdin) TO STDOUT; COPY t TO STDOUT; COPY stdin FROM PROGRAM 'x'",
        "COPY t FROM '/x' WHERE a IS DISTINCT FROM stdin; COPY (SELECT (a) FROM stdin) TO '/x'; COPY t TO STDIN",
        "COPY \"from stdin\" TO '/x' (NULL 'FROM STDIN'); COPY public.from TO stdin",
        "SELECT '\n-- migrate:down\n'; DO $$\n-- +goose Down\n$$; /*\n-- +migrate Down\n*/ SELECT 1",
        "-- migrate:downwards\n-- see migrate:down\nSELECT 1 -- goose Down",
        "SET standard_conforming_strings = on; SELECT '\\'; SELECT '\\d'",
        "SELECT '\\'; SET standard_conforming_strings = off; SELECT 'a'",
        "DROP SUBSCRIPTION s",
    ],
)
def test_sound_scripts_have_no_problems(script: str) -> None:
    """What PostgreSQL takes inside a transaction is never complained about."""
    assert accepted(script)
    assert problems(script, transactional=True) == ()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "SELECT 1;\n  BEGIN;\nSELECT 2; COMMIT AND NO CHAIN;\nEND; ROLLBACK; ABORT;",
            [
                (2, 3, "BEGIN in a migration that runs in one transaction"),
                (3, 11, "COMMIT in a migration that runs in one transaction"),
                (4, 1, "END in a migration that runs in one transaction"),
                (4, 6, "ROLLBACK in a migration that runs in one transaction"),
                (4, 16, "ABORT in a migration that runs in one transaction"),
            ],
        ),
        (
            "START TRANSACTION; PREPARE TRANSACTION 'x'; COMMIT PREPARED 'x'; ROLLBACK PREPARED 'x'",
            [
                (1, 1, "START TRANSACTION in a migration that runs in one transaction"),
                (1, 20, "PREPARE TRANSACTION in a migration that runs in one transaction"),
                (1, 45, "COMMIT PREPARED in a migration that runs in one transaction"),
                (1, 66, "ROLLBACK PREPARED in a migration that runs in one transaction"),
            ],
        ),
        (
            "DROP INDEX CONCURRENTLY i;\nVACUUM t;\nCLUSTER;\nREINDEX SCHEMA s; DISCARD ALL; DROP DATABASE d",
            [
                (1, 1, "DROP INDEX CONCURRENTLY cannot run inside a transaction block"),
                (2, 1, "VACUUM cannot run inside a transaction block"),
                (3, 1, "CLUSTER without a table cannot run inside a transaction block"),
                (4, 1, "REINDEX SCHEMA cannot run inside a transaction block"),
                (4, 19, "DISCARD ALL cannot run inside a transaction block"),
                (4, 32, "DROP DATABASE cannot run inside a transaction block"),
            ],
        ),
    ],
)
def test_a_transactional_script_may_not_leave_its_transaction(
    script: str, expected: list[tuple[int, int, str]]
) -> None:
    """Transaction control, and what refuses to run in a transaction, is found in transactional scripts only."""
    assert accepted(script)
    assert messages(script) == expected
    assert messages(script, transactional=False) == []


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("BEGIN; SELECT 1; COMMIT; BEGIN; ROLLBACK; START TRANSACTION; PREPARE TRANSACTION 'x'", []),
        ("SELECT 1;\n BEGIN; SELECT 2", [(2, 2, "this transaction is never committed or rolled back")]),
        (
            "BEGIN; COMMIT AND CHAIN; SELECT 1",
            [
                (1, 1, "this transaction is never committed or rolled back"),
                (1, 8, "COMMIT AND CHAIN begins a transaction of which ampd cannot record that it is done"),
            ],
        ),
        ("BEGIN; COMMIT AND NO CHAIN; BEGIN; ROLLBACK WORK AND NO CHAIN", []),
        ("BEGIN; SAVEPOINT s; ROLLBACK TO s", [(1, 1, "this transaction is never committed or rolled back")]),
        ("BEGIN; SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SELECT 1; COMMIT", []),
        (
            "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; BEGIN; COMMIT; SET transaction_deferrable = on",
            [
                (1, 1, "SET TRANSACTION outside of a transaction"),
                (1, 62, "SET TRANSACTION outside of a transaction"),
            ],
        ),
    ],
)
def test_a_no_transaction_script_ends_what_it_begins(script: str, expected: list[tuple[int, int, str]]) -> None:
    """A BEGIN that nothing ends, or a SET TRANSACTION without one, is found in a no-transaction script."""
    assert accepted(script)
    assert messages(script, transactional=False) == expected


@pytest.mark.parametrize(
    ("script", "label", "instead"),
    [
        ("COMMIT AND CHAIN", "COMMIT AND CHAIN", "COMMIT"),
        ("end /**/ work and chain", "END AND CHAIN", "END"),
        ("ROLLBACK TRANSACTION AND CHAIN", "ROLLBACK AND CHAIN", "ROLLBACK"),
        ("ABORT AND CHAIN", "ABORT AND CHAIN", "ABORT"),
    ],
)
def test_no_script_may_chain_its_transactions(script: str, label: str, instead: str) -> None:
    """A transaction that no BEGIN shows is found in every script, and how to write it is told."""
    assert accepted(script)
    (inside,) = problems(script, transactional=True)
    assert inside.message == f"{label} in a migration that runs in one transaction"
    (outside,) = problems(f"BEGIN; {script}; COMMIT", transactional=False)
    assert outside.message == f"{label} begins a transaction of which ampd cannot record that it is done"
    assert (outside.line, outside.column) == (1, 8)
    assert outside.hint == f"write {instead}; BEGIN; in its place"


TOO_LATE = "SET TRANSACTION must come before any query, and ampd's own come before it"
READ_ONLY = "a READ ONLY transaction, in which the migration cannot be recorded"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", TOO_LATE),
        ("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, DEFERRABLE", TOO_LATE),
        ("SET TRANSACTION SNAPSHOT '00000003-0000001B-1'", TOO_LATE),
        ("SET LOCAL transaction_isolation = 'serializable'", TOO_LATE),
        ("SET transaction_deferrable TO off", TOO_LATE),
        ("SET TRANSACTION READ ONLY", READ_ONLY),
        ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE", READ_ONLY),
        ("SET LOCAL transaction_read_only = 'on'", READ_ONLY),
    ],
)
def test_a_transactional_script_may_not_set_the_mode_of_its_transaction(script: str, expected: str) -> None:
    """What the transaction of a migration cannot be made into is found, and what it is anyway is left alone."""
    assert accepted(script)
    assert messages(f"SELECT 1;\n{script};") == [(2, 1, expected)]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("BEGIN READ ONLY; SELECT 1; COMMIT", [(1, 1, READ_ONLY)]),
        ("BEGIN; COMMIT;\nSTART TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY; END", [(2, 1, READ_ONLY)]),
        ("BEGIN; SET TRANSACTION READ ONLY; SELECT 1; COMMIT", [(1, 8, READ_ONLY)]),
        ("BEGIN; SET LOCAL transaction_read_only = true; COMMIT", [(1, 8, READ_ONLY)]),
        ("BEGIN READ WRITE; SET LOCAL transaction_read_only = 'off'; COMMIT", []),
        ("BEGIN READ ONLY; SELECT 1; ROLLBACK; BEGIN; COMMIT", []),
    ],
)
def test_a_no_transaction_script_records_itself_in_what_it_commits(
    script: str, expected: list[tuple[int, int, str]]
) -> None:
    """A READ ONLY transaction that is committed is found in a no-transaction script."""
    assert accepted(script)
    assert messages(script, transactional=False) == expected


COPY = "COPY FROM STDIN waits for data, and a migration has none to send"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('SELECT 1;\nCOPY public.t (a, "b)") FROM stdin;\n1\tit\'s\n\\.\nBEGIN;\n', [(2, 1, COPY)]),
        ("COPY BINARY t FROM STDIN WITH (FORMAT csv)", [(1, 1, COPY)]),
        ('copy U&"t" from stdin', [(1, 1, COPY)]),
        ("COPY U&\"d!0061t\" UESCAPE '!' (a) FROM STDOUT", [(1, 1, COPY)]),
        ('COPY public . U&"t"(a, U&"b") FROM /* it */ STDIN WHERE a IS DISTINCT FROM b', [(1, 1, COPY)]),
        ("COPY public.from FROM STDIN", [(1, 1, COPY)]),
        (
            "\\connect db\nSELECT 1 \\gset x\n;\\",
            [
                (1, 1, "\\connect is a command of psql, not SQL"),
                (2, 10, "\\gset is a command of psql, not SQL"),
                (3, 2, "\\ is a command of psql, not SQL"),
            ],
        ),
        ("SELECT 1;\nSELECT 'a;\n", [(2, 8, "unterminated string")]),
        ("SELECT N'", [(1, 9, "unterminated string")]),
        ("SELECT E'\\';", [(1, 8, "unterminated string")]),
        ('SELECT "a""', [(1, 8, "unterminated quoted identifier")]),
        ("SELECT $a$ $b$", [(1, 8, "unterminated dollar-quoted string")]),
        ("SELECT 1; /* /* */\nCOMMIT;", [(1, 11, "unterminated comment")]),
        (
            "-- migrate:up\nSELECT 1;\n--  Migrate:Down transaction:false\nSELECT 2;\n",
            [(3, 1, "`Migrate:Down` begins the down section of dbmate, and ampd runs files whole")],
        ),
        (
            "SELECT 1 --+goose  DOWN\n",
            [(1, 10, "`+goose DOWN` begins the down section of goose, and ampd runs files whole")],
        ),
        (
            "-- +migrate Down",
            [(1, 1, "`+migrate Down` begins the down section of sql-migrate, and ampd runs files whole")],
        ),
        (
            "SET standard_conforming_strings TO 'off';\nSELECT '',\n  'a\\n';",
            [(1, 1, "standard_conforming_strings is switched off before a backslash")],
        ),
        (
            "SET standard_conforming_strings = on; SET NAMES 'LATIN1';\nSELECT 'é'",
            [(1, 39, "another client_encoding in a file with characters beyond ASCII, which ampd sends as UTF-8")],
        ),
        ("SET client_encoding = 'LATIN1'; SELECT 'e'", []),
        ("SET client_encoding = 'UTF8'; SET NAMES 'Unicode'; SET client_encoding TO DEFAULT; SELECT 'é'", []),
        (
            "SET SESSION standard_conforming_strings = FALSE; SELECT '\\'",
            [(1, 1, "standard_conforming_strings is switched off before a backslash")],
        ),
    ],
)
@pytest.mark.parametrize("transactional", [True, False])
def test_what_no_migration_can_hold(script: str, expected: list[tuple[int, int, str]], transactional: bool) -> None:
    """Data, psql commands, open quotes, down sections and misread strings are found in every script, at their place."""
    assert messages(script, transactional=transactional) == expected


def test_a_problem_says_what_to_do() -> None:
    """Each sort of problem carries a hint with the way out."""
    script = "BEGIN; VACUUM; \\x\n-- migrate:down\n COPY t FROM STDIN;"
    modes = "SET TRANSACTION READ ONLY; SET TRANSACTION DEFERRABLE"
    assert [(each.offset, each.hint) for each in problems(script, transactional=True)] == [
        (0, "remove it: ampd wraps the file itself; or add `-- no-transaction` as the first line"),
        (7, "put it in a file of its own whose first line is `-- no-transaction`"),
        (15, "remove it; only psql itself understands backslash commands"),
        (18, "keep only the up part in the file"),
        (35, "use INSERT, or load the data from a program outside the migrations"),
    ]
    assert [each.hint for each in problems(modes, transactional=True)] == [
        "remove READ ONLY",
        "make `-- no-transaction` the first line, and write BEGIN with the mode, and COMMIT, in the file",
    ]
    assert [each.hint for each in problems(f"{modes}; BEGIN READ ONLY; COMMIT; BEGIN", transactional=False)] == [
        "put it between BEGIN and COMMIT",
        "put it between BEGIN and COMMIT",
        "remove READ ONLY",
        "add COMMIT where it should end",
    ]


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("SELECT 1;\nCREATE INDEX CONCURRENTLY ON t (a, b)", "t_a_b_idx"),
        ('\nCREATE UNIQUE INDEX CONCURRENTLY ON "T" (a)', '"T_a_idx"'),
        ('\nCREATE INDEX CONCURRENTLY ON t ("a""b")', '"t_a""b_idx"'),
    ],
)
def test_an_index_without_a_name_is_a_caution(script: str, name: str) -> None:
    """Nobody can tell after an interruption whether it is there; the name that it would get is told."""
    (caution,) = problems(script, transactional=False)
    assert (type(caution), caution.line, caution.column) == (Caution, 2, 1)
    assert caution.message == (
        "CREATE INDEX CONCURRENTLY without a name cannot be resumed where it is interrupted: a person has to look"
    )
    assert caution.hint == f"give it the name that PostgreSQL would choose: {name}"
    assert not [each for each in problems(script, transactional=True) if isinstance(each, Caution)]


@pytest.mark.parametrize(
    "script",
    [
        "CREATE INDEX CONCURRENTLY i ON t (a)",
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON t (a)",
        "CREATE INDEX ON t (a)",
        "DROP INDEX CONCURRENTLY i",
    ],
)
def test_an_index_with_a_name_is_none(script: str) -> None:
    """What has a name, or is undone by the server itself, needs nobody."""
    assert problems(script, transactional=False) == ()


# Drawing


@pytest.mark.parametrize(
    ("offset", "expected"),
    [(-1, (1, 1)), (0, (1, 1)), (2, (1, 3)), (3, (2, 1)), (5, (3, 1)), (6, (3, 2)), (99, (3, 2))],
)
def test_locate_counts_from_one(offset: int, expected: tuple[int, int]) -> None:
    """Lines and columns count from 1, and an offset outside the script is the nearest one inside."""
    assert locate("ab\n\r\nc", offset) == expected


@pytest.mark.parametrize(
    ("script", "offset", "expected"),
    [
        (
            "a;\n" * 13 + "ALTER TABLE jobs ADD;\nb",
            39 + 12,
            "14:13\n   |\n14 | ALTER TABLE jobs ADD;\n   |             ^",
        ),
        ("\tx\ty", 3, "1:4\n  |\n1 |     x    y\n  |          ^"),
        ("'日本' é e\u0301 x;", 10, "1:11\n  |\n1 | '日本' é e\u0301 x;\n  |            ^"),
        ("SELECT 1,\r\n  \n\n", 15, "1:10\n  |\n1 | SELECT 1,\n  |          ^"),
        ("", 0, "1:1\n  |\n1 | \n  | ^"),
        ("\x1b[31m x\xa0y", 6, "1:7\n  |\n1 | �[31m x�y\n  |       ^"),
        ("1" * 60 + "X" + "2" * 140, 60, f"1:61\n  |\n1 | …{'1' * 50}X{'2' * 49}…\n  | {' ' * 51}^"),
        ("中" * 60 + "X" + "文" * 60, 60, f"1:61\n  |\n1 | …{'中' * 25}X{'文' * 24}…\n  | {' ' * 51}^"),
        ("中" * 50, 49, f"1:50\n  |\n1 | {'中' * 50}\n  | {' ' * 98}^"),
        ("中" * 51, 51, f"1:52\n  |\n1 | …{'中' * 50}\n  | {' ' * 101}^"),
        ("X" + "2" * 140, 0, f"1:1\n  |\n1 | X{'2' * 99}…\n  | ^"),
        ("1" * 140 + "X", 140, f"1:141\n  |\n1 | …{'1' * 99}X\n  | {' ' * 100}^"),
    ],
)
def test_excerpt_puts_the_caret_under_the_offset(script: str, offset: int, expected: str) -> None:
    """The caret stands under its character despite tabs, wide and odd characters, and long lines."""
    assert excerpt(script, offset, file="m/1_x.sql") == f"m/1_x.sql:{expected}"


# Laws

PIECES = (
    *(piece for script in NASTY for piece in script.replace(" ", "\0 \0").split("\0") if piece),
    *(
        "'",
        '"',
        "$",
        "$$",
        "$a$",
        "/*",
        "*/",
        "--",
        "\n",
        "\r",
        "\\",
        ";",
        "(",
        ")",
        "E'",
        "e",
        "U&'",
        "''",
        "BEGIN ATOMIC ",
    ),
    *(
        "SELECT 1",
        "; SELECT 2;",
        " -- x\n",
        "\n'b'",
        "CREATE FUNCTION f() ",
        " END ",
        "COPY t FROM STDIN;",
        "\\x",
        "\t",
    ),
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A real script with a few of its pieces deleted, doubled, swapped or replaced by troublemakers."""
    script = draw(st.sampled_from(NASTY)) + draw(st.sampled_from(("", ";", "\n"))) + draw(st.sampled_from(NASTY))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(script)))
        end = min(len(script), start + draw(st.integers(0, 12)))
        middle = draw(st.sampled_from(("", script[start:end] * 2, script[start:end][::-1], *PIECES)))
        script = script[:start] + middle + script[end:]
    return script


SCRIPTS = st.one_of(mutated(), st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.text())


@given(SCRIPTS)
@examples(150)
@example("\ud800'\udfff;")
def test_no_character_is_lost(script: str) -> None:
    """Gaps and statements put together give the script again, and no gap holds a statement."""
    statements = split(script)
    gaps, position = [], 0
    for statement in statements:
        gaps.append(script[position : statement.start])
        position = statement.end
        assert statement.text == script[statement.start : statement.end] != ""
        assert statement.line == locate(script, statement.start)[0]
    gaps.append(script[position:])
    joined = "".join(gap + statement.text for gap, statement in zip(gaps, statements, strict=False)) + gaps[-1]
    assert joined == script
    assert [split(gap) for gap in gaps] == [()] * len(gaps)


@given(SCRIPTS)
@examples(150)
def test_nothing_crashes(script: str) -> None:
    """Whatever the text, it is judged without an exception and in order of position."""
    for statement in split(script):
        kind(statement)
        index_build(statement)
        dropped_indexes(statement)
        setting(statement)
        is_set_config(statement)
        is_concurrent(statement)
        role([statement])
        mentions(statement, temporary(statement) or "a")
        savepoint(statement)
        code_block(statement)
    for transactional in (True, False):
        found = problems(script, transactional=transactional)
        assert found == problems(script, transactional=transactional, statements=split(script))
        assert [each.offset for each in found] == sorted(each.offset for each in found)
        for each in found:
            assert excerpt(script, each.offset, file="f").startswith("f:")
            assert (each.line, each.column) == locate(script, each.offset)


@given(SCRIPTS)
@examples(150)
def test_token_by_token_or_in_larger_pieces_a_script_is_the_same(script: str) -> None:
    """The scanner that takes much of a script at once finds the same statements and the same problems."""
    at_once = split(script), problems(script, transactional=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitter, "coarse_tokens", scanner.tokenize)
        assert (split(script), problems(script, transactional=True)) == at_once


LONG = {
    "string": "'" + "it''s\n" * 100_000 + "'",
    "string in lines": "'a'\n" * 100_000,
    "escapes": "E'" + "\\\\'';\\'\n" * 100_000 + "'",
    "dollar": "$a$" + "$b$;" * 100_000 + "$a$",
    "name": '"' + 'a"";' * 100_000 + '"',
    "block comment": "1/*" + "/* ; */" * 100_000 + "*/",
    "line comment": "1--" + "; '" * 200_000,
    "list": "(" + "(1, 'a;', (2)), " * 50_000 + "(3))",
    "operators": "1" + " + 1" * 200_000,
}


@pytest.mark.parametrize("part", LONG.values(), ids=LONG)
def test_what_is_long_is_split_as_well_and_takes_no_memory(part: str) -> None:
    """Neither the length of a literal, a comment or a list nor what is in it counts, and at most one copy is made."""
    script = f"SELECT {part}\n; COMMIT"
    split("SELECT 1"), problems("SELECT 1", transactional=True)  # which compiles the patterns
    tracemalloc.start()
    try:
        statements = split(script)
        found = problems(script, transactional=False, statements=statements)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    end = len("SELECT 1") if part.startswith("1") and "\n" not in part and "+" not in part else script.rindex("\n;")
    assert [(each.start, each.end) for each in statements] == [
        (0, len(script[:end].rstrip())),
        (len(script) - 6, len(script)),
    ]
    assert found == ()
    assert peak < len(script) + 100_000


def test_statements_are_a_sequence_that_takes_little_memory() -> None:
    """Statements can be counted, sliced and compared like a tuple of them, and are made when asked for."""
    script = "".join(f"INSERT INTO t VALUES ({number});\n" for number in range(10_000))
    tracemalloc.start()
    try:
        statements = split(script)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 20 * len(statements)
    assert len(statements) == len(tuple(statements)) == 10_000
    assert statements == tuple(statements)
    assert statements[10:12] == tuple(statements)[10:12] != statements[11:13]
    assert (statements[-1].text, statements[-1].line) == ("INSERT INTO t VALUES (9999)", 10_000)
    assert statements.line(41) == 42
    assert statements.at(statements[7].start) == statements.at(statements[7].end - 1) == 7
    assert statements.at(statements[7].end) is None
    assert split("-- 1\nSELECT").at(0) is None


@given(SCRIPTS.filter(lambda script: "\0" not in script and script.isprintable() | script.isascii()))
@examples(380)
def test_whatever_postgresql_accepts_is_split_as_by_postgresql(script: str) -> None:
    """Every script that PostgreSQL's parser takes is split where it splits it, and has nothing unterminated."""
    if accepted(script):
        assert_split_as_postgresql_does(script)
        assert not [each for each in problems(script, transactional=False) if "unterminated" in each.message]


@pytest.mark.skipif(
    "AMPD_REAL_FOLDERS" not in os.environ, reason="AMPD_REAL_FOLDERS names no folder of real migrations"
)
def test_real_migrations_are_split_as_by_postgresql() -> None:
    """Every real .sql file that PostgreSQL's parser takes is split where it splits it."""
    files = sorted(Path(os.environ["AMPD_REAL_FOLDERS"]).rglob("*.sql"))
    scripts = [text for file in files if accepted(text := file.read_bytes().decode(errors="replace").replace("\0", ""))]
    assert scripts
    for script in scripts:
        assert_split_as_postgresql_does(script)
